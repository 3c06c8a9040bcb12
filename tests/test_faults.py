"""Kills at any moment, ranks that fail, and two processes that want the same run."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_zero
from data.tokenizer import Tokenizer
from model import Config as ModelConfig
from model import Transformer
from runtime.checkpoint import latest
from runtime.flags import UserError
from runtime.pretrained import save_pretrained
from runtime.run import launch, lock, parse

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
OPTIONS = dict(env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True)
EVERY = 4  # updates that a kill may lose
SMALL = ["--questions", "2", "--group-size", "3", "--minibatches", "2", "--max-new-tokens", "8",
         "--eval-problems", "1", "--eval-samples", "1", "--reward", "random", "--refresh", "4",
         "--save-every", str(EVERY), "--threads", "1", "--device", "cpu", "--resume"]  # fmt: skip
unix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither fork nor these locks")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Of a training from a base that takes an instant for each update."""
    tokenizer = Tokenizer.toy()
    torch.manual_seed(0)
    config = ModelConfig.preset(
        "toy", vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4, moe_intermediate_size=8,
        max_position_embeddings=1024,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "base"
    save_pretrained(Transformer(config), path, tokenizer_files=tokenizer.files())
    return [*SMALL, "--model", str(path)]


def train(flags: list[str]) -> None:
    train_zero.draw_curve = lambda out: None
    launch(train_zero.main, parse(train_zero.Config, train_zero.PRESETS, flags))


def logged(out: Path) -> int:
    """The last update in metrics.jsonl, whose last line may be half written."""
    metrics = out / "metrics.jsonl"
    rows = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return max((json.loads(row)["step"] for row in rows if '"phase": "rl"' in row), default=0)


def in_a_save(out: Path) -> bool:
    """Whether a checkpoint is half written, or an old one half deleted."""
    return any(not (path / ".metadata").exists() for path in out.glob("checkpoints/rl/step_*"))


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


# --- kill -9


@unix
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_any_moment_lose_little_and_change_nothing(flags, tmp_path, kills):
    """Every second one in the middle of a save."""
    context = multiprocessing.get_context("forkserver")  # which imports torch once
    context.set_forkserver_preload(["train_zero"])
    flags = [*flags, "--steps", str(12 * kills)]
    whole, cut, rng, halves, lost = tmp_path / "whole", tmp_path / "cut", random.Random(0), 0, []

    def started(out: Path):
        process = context.Process(target=train, args=([*flags, "--out", str(out)],))
        process.start()
        return process

    for kill in range(kills):
        process, before = started(cut), logged(cut)
        wait_until(lambda: logged(cut) > before)
        if kill % 2:
            wait_until(lambda: in_a_save(cut))
        else:
            time.sleep(0.3 * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        lost.append(logged(cut) - (latest(cut / "checkpoints" / "rl") or 0))
        halves += in_a_save(cut)
    print(f"{kills} kills, {halves} of them in a save; updates lost: {lost}")
    assert max(lost) <= EVERY and halves >= kills // 4
    for out in (cut, whole):
        process = started(out)
        process.join()
        assert process.exitcode == 0
    assert weights(cut) == weights(whole)


def workers(job: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


@unix
@pytest.mark.slow
def test_torchrun_starts_again_after_kills_and_ends_with_the_same_weights(flags, tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=3", "train_zero.py", *flags]
    runs, kills = [tmp_path / "whole", tmp_path / "cut"], [0, 1]
    for out in runs:
        with (tmp_path / "log").open("w") as log:
            job = subprocess.Popen(
                [*command, "--steps=40", "--out", out], cwd=ROOT, stdout=log, stderr=log, **OPTIONS
            )
        for rank in kills if out.name == "cut" else []:
            before = logged(out)
            wait_until(lambda: logged(out) > before + 2 and len(workers(job)) == 2)
            os.kill(workers(job)[rank], signal.SIGKILL)
        assert job.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert weights(runs[0]) == weights(runs[1])


# --- ranks that fail


def run_job(tmp_path: Path, processes: int, body: str, **options) -> tuple[str, float]:
    """What a job says that runs `body` as the main of each rank, and how long it took from the
    last rank's start; it must fail."""
    (tmp_path / "recipe.py").write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from runtime import parallel\n"
        "from runtime.run import Run, flag, launch\n"
        f"def main(config):\n    rank = parallel.rank()\n    parallel.barrier()\n"
        f"    Path('started').touch()\n{body}\n"
        f"launch(main, SimpleNamespace(**{options}))\n"
    )
    command = [*TORCHRUN, f"--nproc_per_node={processes}", "recipe.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, **OPTIONS)
    assert done.returncode != 0
    return done.stderr, time.time() - (tmp_path / "started").stat().st_mtime


def test_a_rank_that_fails_speaks_first_and_ends_all_whatever_they_do(tmp_path):
    err, seconds = run_job(
        tmp_path, 4,
        "    parallel.GRACE = 2\n"
        "    if rank == 1:\n"
        "        raise ValueError('the cause')\n"
        "    if rank == 0:\n"
        "        parallel.barrier()\n"
        "    if rank == 2:\n"
        "        time.sleep(1000)\n"
        "    while rank == 3:\n"
        "        pass\n",
    )  # fmt: skip
    assert seconds < 30
    said = [line for line in err.splitlines() if "rank" in line or "Traceback" in line]
    assert said[0].startswith("[rank1]: Traceback")
    traceback = err[: err.index("the cause")]
    assert traceback.count("Traceback") == 1 and "ended" not in traceback
    assert "pair.cc" not in err  # what the others find is that one has gone, and no news


@pytest.mark.slow
def test_a_rank_that_never_comes_ends_the_job_with_the_name_of_the_flag(tmp_path):
    err, seconds = run_job(
        tmp_path, 2,
        "    parallel.GRACE = 2\n"
        "    if rank == 1:\n"
        "        time.sleep(1000)\n"
        "    parallel.barrier()\n",
        timeout=8,
    )  # fmt: skip
    assert seconds < 40
    said = [line for line in err.splitlines() if line.startswith("error")]
    assert len(said) == 1 and said[0].startswith("error: [rank 0] another process did not come")
    assert "within --timeout 8 s" in said[0]


# --- one process for a run

HOLDER = """
import os, sys, time
from pathlib import Path
from runtime.run import lock
lock(Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(1000)  # a child that outlives it
print("has it", flush=True)
time.sleep(1000)
"""


@unix
def test_a_second_process_is_refused_until_the_first_has_ended_however_it_ends(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, **OPTIONS)
    try:
        assert holder.stdout.readline() == "has it\n"
        with pytest.raises(UserError, match=rf"another process \(pid {holder.pid}\) is writing"):
            lock(tmp_path, wait=0.2)
        holder.kill()
        holder.wait()
        lock(tmp_path)
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        lock(tmp_path)  # its own
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()
