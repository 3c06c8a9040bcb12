"""runtime/parallel.py: one process, and two under torchrun on gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from runtime import parallel
from runtime.checkpoint import latest, load_state

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LENGTHS = range(6)  # of lists that are shared out, some shorter than the number of ranks
OPTIONS = dict(env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True)


def toy(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.ModuleDict(dict(
        both=nn.Linear(3, 1, dtype=torch.float64), first=nn.Linear(3, 1),
        never=nn.Linear(3, 1), norm=nn.BatchNorm1d(2),
    ))  # fmt: skip
    model["norm"].running_mean += seed
    return model


def backward(model: nn.Module, rows: torch.Tensor, weight: float) -> None:
    """Every row goes through `both`, and row 0 of the batch, which is all ones, through `first`."""
    for row_D in rows:
        loss = model["both"](row_D.double()).sum() ** 2
        if bool((row_D == 1).all()):
            loss = loss + model["first"](row_D).sum() ** 2
        (weight * loss).backward()


def batch(rows: int = 5) -> torch.Tensor:
    data_BD = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    data_BD[0] = 1
    return data_BD


def gradients(model: nn.Module) -> dict:
    return {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()}


WORKER = """
import json, sys, time
from types import SimpleNamespace
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from runtime import parallel
from runtime.checkpoint import finish_saving, latest, load_state, save_state
from runtime.run import Run, launch
from runtime.flags import Machine
sys.path.insert(0, sys.argv[1])
from test_parallel import LENGTHS, backward, batch, gradients, toy

def main(config):
    rank, out = parallel.rank(), {}
    out["world"] = [rank, parallel.world_size(), parallel.is_main()]
    out["shares"] = [list(parallel.shard(range(n))) for n in LENGTHS]
    named = [[f"item {i}" for i in share] for share in out["shares"]]
    out["gathered"] = [parallel.gather_list(share) for share in named]
    tensor = torch.tensor([1.5, rank])
    out["sums"] = [parallel.all_sum(number) for number in (rank + 1, 0.1, 2**53 + rank)]
    out["tensor sum"], out["tensor left"] = parallel.all_sum(tensor).tolist(), tensor.tolist()

    model = toy(seed=0)
    out["model"] = {name: t.tolist() for name, t in model.state_dict().items()}
    for rows in (5, 1):  # with one row, rank 1 has no tokens and no gradients
        model.zero_grad(set_to_none=True)
        backward(model, parallel.shard(batch(rows)), weight=1 / rows)
        parallel.sum_gradients(model)
        out[f"gradients {rows}"] = gradients(model)

    directory = sys.argv[2] + "/checkpoints"
    for step in (1, 2, 3):
        save_state(directory, step, {"model": model.state_dict(), "step": step})
    state = load_state(directory, latest(directory), {"model": toy(seed=7).state_dict()})
    out["loaded"] = {name: t.tolist() for name, t in state["model"].items()}

    mesh = init_device_mesh("cpu", (2,))
    spread = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    alike = torch.ones(3)
    for step in (1, 2):  # the second waits for the first
        save_state(directory + "2", step, {"spread": spread, "alike": alike}, wait=False)
        spread.mul_(10)
        alike.mul_(10)
    out["while saving"] = parallel.all_sum(1)
    finish_saving()
    state = load_state(directory + "2", 2, {"spread": spread, "alike": alike})
    out["saved"] = [parallel.whole(state["spread"]).tolist(), state["alike"].tolist()]

    run = Run(sys.argv[2] + "/run", Machine())
    run.timing()
    with run.phase("work"):
        time.sleep(rank)
        parallel.barrier()
    out["timing"] = run.timing()
    with open(f"{sys.argv[2]}/rank{rank}.json", "w") as file:
        json.dump(out, file)
    parallel.barrier()
    open("none.jsonl")  # the user's mistake, on all ranks

launch(main, SimpleNamespace())
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> SimpleNamespace:
    """What the worker above wrote on each of two ranks, what they said, and where."""
    place = tmp_path_factory.mktemp("two")
    (place / "worker.py").write_text(WORKER)
    command = [*TORCHRUN, place / "worker.py", Path(__file__).parent, place]
    done = subprocess.run(command, capture_output=True, timeout=100, cwd=place, **OPTIONS)
    files = [place / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr
    outs = [json.loads(file.read_text()) for file in files]
    return SimpleNamespace(outs=outs, place=place, stderr=done.stderr, code=done.returncode)


# --- one process


def test_on_one_process_each_helper_is_the_identity():
    parallel.init()  # not under torchrun: nothing happens
    assert (parallel.rank(), parallel.world_size(), parallel.is_main()) == (0, 1, True)
    assert parallel.shard([1, 2, 3]) == parallel.gather_list([1, 2, 3]) == [1, 2, 3]
    tensor = torch.ones(2)
    assert parallel.all_sum(3) == 3 and parallel.all_sum(tensor) is tensor
    model = toy(0)
    backward(model, batch(), 1.0)
    before = gradients(model), {n: t.tolist() for n, t in model.state_dict().items()}
    parallel.sum_gradients(model)
    parallel.barrier()
    assert before == (gradients(model), {n: t.tolist() for n, t in model.state_dict().items()})
    parallel.shutdown()


# --- two


def test_torchrun_gives_each_process_its_rank(two_ranks):
    assert [out["world"] for out in two_ranks.outs] == [[0, 2, True], [1, 2, False]]


def test_shards_hold_each_item_once_and_are_gathered_in_the_global_order(two_ranks):
    first, second = two_ranks.outs
    for n, ours, theirs in zip(LENGTHS, first["shares"], second["shares"]):
        assert sorted(ours + theirs) == list(range(n)) and abs(len(ours) - len(theirs)) <= 1
    whole = [[f"item {i}" for i in range(n)] for n in LENGTHS]
    assert first["gathered"] == second["gathered"] == whole


def test_sums_are_over_ranks_exact_and_leave_their_argument(two_ranks):
    for rank, out in enumerate(two_ranks.outs):
        assert out["sums"] == [3, 0.2, 2**54 + 1]
        assert out["tensor sum"] == [3.0, 1.0] and out["tensor left"] == [1.5, rank]


def test_rank_0s_parameters_and_buffers_are_broadcast(two_ranks):
    expected = {name: tensor.tolist() for name, tensor in toy(seed=0).state_dict().items()}
    assert [out["model"] for out in two_ranks.outs] == [expected, expected]


@pytest.mark.parametrize("rows", [5, 1])
def test_summed_gradients_equal_those_of_one_process(two_ranks, rows):
    model = toy(seed=0)
    backward(model, batch(rows), weight=1 / rows)
    expected = gradients(model)
    assert expected["never.weight"] is None and expected["first.weight"] is not None
    for out in two_ranks.outs:
        found = out[f"gradients {rows}"]
        for name, gradient in expected.items():
            if gradient is None:
                assert found[name] is None, f"{name} has no gradient on one process"
            else:
                torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(gradient))


def test_a_state_saved_on_two_ranks_is_read_on_two_and_on_one(two_ranks):
    outs, place = two_ranks.outs, two_ranks.place
    state = load_state(place / "checkpoints", 3, {"model": toy(seed=9).state_dict()})
    expected = {name: tensor.tolist() for name, tensor in toy(seed=0).state_dict().items()}
    assert {name: tensor.tolist() for name, tensor in state["model"].items()} == expected
    assert [out["loaded"] for out in outs] == [expected, expected] and state["step"] == 3
    kept = sorted(path.name for path in (place / "checkpoints").iterdir())
    assert kept == ["step_000002", "step_000003"]


def test_a_state_is_saved_while_the_ranks_go_on_and_change_it(two_ranks):
    for out in two_ranks.outs:
        assert out["while saving"] == 2
        assert out["saved"] == [[10.0 * i for i in range(8)], [10.0] * 3]
    directory = two_ranks.place / "checkpoints2"
    again = load_state(directory, latest(directory), {})
    assert again["spread"].tolist() == [10.0 * i for i in range(8)]


def test_what_a_rank_waits_for_another_is_communication_and_not_its_phase(two_ranks):
    first, second = (out["timing"] for out in two_ranks.outs)
    assert first["seconds_communication"] > 0.5 > first["seconds_work"]
    assert second["seconds_work"] >= 1


def test_a_rank_that_fails_takes_the_job_down_and_says_why(tmp_path):
    (tmp_path / "recipe.py").write_text(
        "from types import SimpleNamespace\n"
        "from runtime import parallel\n"
        "from runtime.run import UserError, launch\n"
        "def main(config):\n"
        "    if parallel.rank() == 1:\n"
        "        raise UserError('no file here')\n"
        "    parallel.barrier()\n"  # rank 0 waits for a rank that never comes
        "launch(main, SimpleNamespace())\n"
    )
    start = time.monotonic()
    command = [*TORCHRUN, "recipe.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, **OPTIONS)
    assert done.returncode != 0 and time.monotonic() - start < 45
    assert done.stderr.count("error: [rank 1] no file here") == 1


def test_what_all_ranks_find_wrong_is_said_once(two_ranks):
    assert two_ranks.code != 0 and two_ranks.stderr.count("none.jsonl: No such file") == 1


def test_ctrl_c_under_torchrun_saves_the_same_step_on_all_ranks(tmp_path):
    (tmp_path / "recipe.py").write_text(
        "import time\n"
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "from runtime import parallel\n"
        "from runtime.run import Run, flag, launch\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    out: str = flag('run', 'where')\n"
        "def main(config):\n"
        "    run = Run(config.out, config)\n"
        "    for step in range(1, 1000):\n"
        "        time.sleep(0.02 + 0.02 * parallel.rank())\n"
        "        run.log(phase='rl', step=step)\n"
        "        if run.stopping:\n"
        "            Path(f'saved{parallel.rank()}').write_text(str(step))\n"
        "            return\n"
        "launch(main, Config())\n"
    )
    command = [*TORCHRUN, "recipe.py"]
    job = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, **OPTIONS)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 40
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    err = job.communicate(timeout=40)[1]
    steps = [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)]
    assert steps[0] == steps[1] and int(steps[0]) < 999
    assert err.count("press Ctrl-C again") == 1
