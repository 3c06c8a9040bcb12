"""runtime/sharding.py: on any grid of processes the update is that of one process.

Everything that is compared is made by `everything`, here on one process and under torchrun on gloo:
one launch goes through all grids of so many processes. In float64, so that "equal" means 1e-10.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_grpo import MOE, TOKENIZER, count_letters, make_model, problem
from torch import Tensor

import grpo
from data.packing import pack
from grpo import Questions, Settings
from model import Config, Transformer
from runtime import parallel
from runtime.checkpoint import save_state
from runtime.optimizer import adamw
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.record import Recorded
from runtime.run import Run, UserError
from runtime.sharding import begin, gathered, in_step, shard, twin
from sample import generate
from sft import Objective, sft_step

ROOT = Path(__file__).parent.parent
# Multi-token prediction too, and for the dense model a head that is the embedding.
MTP = replace(MOE, num_nextn_predict_layers=1, n_group=2)
DENSE = Config.preset("toy-student", vocab_size=9, hidden_size=12, intermediate_size=20,
                      num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
                      max_position_embeddings=64)  # fmt: skip
MODELS = dict(moe=MOE, mtp=MTP, dense=DENSE)
SETTINGS = Settings(group_size=3, max_new_tokens=9, row_tokens=16, micro_tokens=16, beta=0.1,
                    max_grad_norm=0.5)  # fmt: skip
DOCUMENTS = [[1, 2, 3, 4, 5, 0], [5, 5, 1], [7, 8, 3, 2], [2, 6], [4, 3, 1, 1, 0]]
GRIDS = {1: [1], 2: [1, 2], 4: [1, 2, 4]}  # processes: ep


def weights(model: Transformer) -> dict[str, Tensor]:
    return {name: parallel.whole(t).detach().clone() for name, t in model.state_dict().items()}


def optimizer_of(model: Transformer) -> torch.optim.Optimizer:
    """AdamW. With its usual eps of 1e-8, a gradient that is 0 but for rounding, 1e-14, is a step of
    1e-9: equal updates would not look equal."""
    return adamw(model.parameters(), 3e-3, eps=1e-5)


def reinforced(model: Transformer, reference: Transformer, questions: int) -> dict:
    """Two rollouts and three updates, with a norm that is clipped and routes that are replayed."""
    optimizer = optimizer_of(model)
    settings = replace(SETTINGS, replay_routes=True)
    found, stats = [], []
    for start, minibatches in ((0, 2), (1, 1)):
        numbers = list(parallel.shard(range(questions)))
        prompts = [[1 + n, 2, 3][: 1 + n % 3] for n in numbers]
        asked = Questions(numbers, [problem() for _ in numbers], prompts)
        batch = grpo.rollout(
            model, TOKENIZER, asked, count_letters, settings, seed=0, step=start
        )  # fmt: skip
        batch.ref_logprobs = grpo.reference_logprobs(reference, batch, settings)
        G = settings.group_size
        groups = [batch.outputs[i : i + G] for i in range(0, len(batch.outputs), G)]
        for group in parallel.gather_list(groups):
            found += [output.tokens for output in group]
        for minibatch in range(minibatches):
            stats.append(grpo.step(model, optimizer, batch, settings, minibatch, minibatches))
    return dict(weights=weights(model), tokens=found, stats=stats)


def supervised(model: Transformer, optimizer: torch.optim.Optimizer, updates: int = 3) -> dict:
    """Updates on documents that don't divide evenly, with all that a step can add to the loss."""
    config = model.config
    objective = Objective(bias_step=0.01 * config.is_moe, balance_alpha=0.01 * config.is_moe,
                          mtp_weight=0.3 * config.num_nextn_predict_layers, rows=1,
                          max_grad_norm=0.5)  # fmt: skip
    batch = pack(parallel.shard(DOCUMENTS), capacity=7)
    model.recompute = parallel.world_size() > 1
    reports = [sft_step(model, [optimizer], batch, objective=objective) for _ in range(updates)]
    shown = [(report.loss, report.grad_norm) for report in reports]
    return dict(weights=weights(model), stats=shown)


def resumed(place: Path, ep: int) -> dict:
    """One more update from the checkpoint."""
    model = load_pretrained(place / "moe", shard=partial(shard, ep=ep))
    optimizer = optimizer_of(model)
    run = Run(place, SETTINGS, resume=None)
    assert run.resume("sft", dict(model=model, optimizer=optimizer)) == 3
    return supervised(model, optimizer, updates=1)


def one_sided(ep: int, dtype: torch.dtype) -> dict:
    """Log-probs and gradients where all tokens go to the first two experts."""
    torch.manual_seed(0)
    model = Transformer(Config.preset("toy", initializer_range=0.1)).to(dtype)
    shard(model, ep)
    tokens_BT = torch.arange(12).view(2, 6)
    positions_BT = torch.arange(6).expand(2, 6)
    routes_BTMA = torch.tensor([0, 1]).expand(2, 6, 2, 2)
    logprobs_N, *_ = model.logprobs(
        tokens_BT, positions_BT, positions_BT > 0, routes_BTMA=routes_BTMA
    )
    logprobs_N.mean().div(parallel.world_size()).backward()
    grads = {name: parallel.whole(p.grad) for name, p in model.named_parameters()}
    return dict(weights=grads | dict(logprobs=logprobs_N.detach()))


def bf16(ep: int) -> dict:
    """Our own AdamW on parts of the weights."""
    torch.manual_seed(0)
    model = shard(Transformer(Config.preset("toy", initializer_range=0.1)).bfloat16(), ep)
    optimizer = adamw(model.parameters(), 1e-3)
    grads = torch.Generator().manual_seed(1)
    for _ in range(2):
        for p in model.parameters():
            whole = torch.randn(p.shape, generator=grads)
            p.grad = parallel.like(whole[parallel.local_region(p)].clone(), p)
        optimizer.step()
    return dict(weights=weights(model))


def everything(place: Path, ep: int) -> dict[str, dict]:
    """All that is compared, on this grid."""
    found = {}
    for name in MODELS:
        load = partial(load_pretrained, place / name, shard=partial(shard, ep=ep))
        if name == "dense" and ep > 1:
            continue
        model = load()
        size = sum(parallel.local(p).numel() for p in model.parameters())
        found[f"{name} load"] = dict(weights=weights(model))
        found[f"{name} share"] = size / model.num_parameters(mtp=True)
        optimizer = optimizer_of(model)
        found[f"{name} sft"] = supervised(model, optimizer)
        if name == "moe" and ep == parallel.world_size() > 1:
            parts = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            save_state(place / "checkpoints" / "sft", 3, parts)
        save_pretrained(twin(model), place / f"{name} {parallel.world_size()} {ep}")
        for questions in dict(moe=(5, 1), dense=(5,), mtp=())[name]:  # 1: only one rank has any
            model = load()
            found[f"{name} grpo {questions}"] = reinforced(model, twin(model), questions)
    found["one-sided"] = one_sided(ep, torch.float64)
    found["one-sided float32"] = one_sided(ep, torch.float32)
    found["master"] = bf16(ep)
    if ep == 1:
        # Dense: rounding sends a token to another expert.
        model = load_pretrained(place / "dense", dtype=torch.bfloat16, shard=shard)
        optimizer = optimizer_of(model)
        begin(optimizer)
        found["trained in bf16"] = supervised(model, optimizer)["stats"]
    return found


PROMPTS = [[1, 2], [3], [5, 4, 3]]  # rank r has r of them


def hold_in_step(place: Path, ep: int) -> list[list[int]]:
    """Different numbers of passes on each rank, which without `gathered` or `in_step` never end."""
    model = load_pretrained(place / "moe", shard=partial(shard, ep=ep))
    rank = parallel.rank()
    with gathered(model), torch.no_grad():
        for n in range(1 + 2 * rank):
            model.hidden(torch.ones(1, 2 + n, dtype=torch.long))
    outputs = generate(model, PROMPTS[:rank], max_new_tokens=30)
    with in_step(model), torch.no_grad():
        for _ in range(2 * (rank == 0)):
            model.hidden(torch.ones(1, 3, dtype=torch.long))
    return [output.tokens for output in outputs]


def worker(place: Path) -> None:
    parallel.init()
    world, Recorded.OFTEN = parallel.world_size(), 2  # so that steps are played back
    for ep in GRIDS[world]:
        found = everything(place, ep)
        found["in step"] = hold_in_step(place, ep)
        torch.save(found, place / f"{world} {ep} {parallel.rank()}.pt")
    if world == 2:  # saved with ep=2
        torch.save(resumed(place, 1), place / f"resumed {parallel.rank()}.pt")
    parallel.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Models to begin with."""
    folder = tmp_path_factory.mktemp("sharding")
    for name, config in MODELS.items():
        save_pretrained(make_model(config), folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(place) -> dict[str, dict]:
    return everything(place, 1)


@pytest.fixture(scope="module")
def launched(place) -> Callable[[int], None]:
    """Start so many processes, once."""
    done = set()

    def launch(world: int) -> None:
        if world in done:
            return
        done.add(world)
        script = "import sys; from pathlib import Path; import test_sharding;"
        (place / "worker.py").write_text(script + "test_sharding.worker(Path(sys.argv[1]))")
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={world}", "worker.py", str(place)]  # fmt: skip
        ended = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=100
        )
        assert ended.returncode == 0, ended.stderr[-5000:]

    return launch


def apart(found: dict, wanted: dict) -> float:
    """The largest difference of weights; what was sampled and reported must be the same."""
    assert found.keys() == wanted.keys() and found["weights"].keys() == wanted["weights"].keys()
    assert found.get("tokens") == wanted.get("tokens")
    for ours, theirs in zip(found.get("stats", ()), wanted.get("stats", ()), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-10)
    pairs = [(found["weights"][name], tensor) for name, tensor in wanted["weights"].items()]
    return max(float((ours.double() - theirs).abs().max()) for ours, theirs in pairs)


GRID = [(2, 1), (2, 2), *(pytest.param(4, ep, marks=pytest.mark.slow) for ep in (1, 2, 4))]
on_each_grid = pytest.mark.parametrize(("world", "ep"), GRID)


def results(place: Path, world: int, ep: int) -> list[dict]:
    return [torch.load(place / f"{world} {ep} {rank}.pt") for rank in range(world)]


# ---- one process ---------------------------------------------------------------------------------


def test_on_one_process_a_model_stays_as_it_is():
    model = make_model()
    before = dict(vars(model)), model.state_dict()
    assert shard(model, 1) is model and (dict(vars(model)), type(model)) == (before[0], Transformer)
    with gathered(model), in_step(model):
        assert (dict(vars(model)), type(model)) == (before[0], Transformer)
    copied = twin(model)
    assert all(torch.equal(copied.state_dict()[name], t) for name, t in before[1].items())
    assert copied.lm_head.weight is not model.lm_head.weight


def test_a_grid_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    with pytest.raises(UserError, match="--ep 2: must divide the number of processes, 1"):
        shard(make_model(), 2)
    monkeypatch.setattr(parallel, "world_size", lambda: 6)
    with pytest.raises(UserError, match="--ep 3: .* the number of experts, .* has 4 experts"):
        shard(make_model(), 3)
    with pytest.raises(UserError, match="--ep 2: .* the model is dense"):
        shard(make_model(DENSE), 2)
    with pytest.raises(UserError, match="--ep 2 leaves 3 processes .* 8 and 12 can't be divided"):
        shard(make_model(), 2)


# ---- several -------------------------------------------------------------------------------------


@on_each_grid
def test_on_any_grid_updates_and_samples_are_those_of_one_process(
    place, alone, launched, world, ep
):
    launched(world)
    for found in results(place, world, ep):
        for name, wanted in alone.items():
            if "sft" in name or "grpo" in name:
                if "dense" in name and ep > 1:
                    continue
                assert apart(found[name], wanted) < 1e-10, name
                start = alone[f"{name.split()[0]} load"]
                assert apart(dict(weights=wanted["weights"]), start) > 1e-3  # it learned


@on_each_grid
def test_each_rank_holds_its_part_of_the_model_that_was_saved(place, alone, launched, world, ep):
    launched(world)
    for found in results(place, world, ep):
        for name in (name for name in found if "load" in name):
            assert apart(found[name], alone[name]) == 0
            # Not cut into even parts: a router of 4 rows, say.
            assert found[f"{name.split()[0]} share"] < 1 / world + 0.1


@on_each_grid
def test_experts_without_tokens_have_no_gradient_and_spoil_none(place, alone, launched, world, ep):
    launched(world)
    assert not alone["one-sided"]["weights"]["model.layers.1.mlp.experts.up_proj"][2:].any()
    for found in results(place, world, ep):
        assert apart(found["one-sided"], alone["one-sided"]) < 1e-10
        assert apart(found["one-sided float32"], alone["one-sided float32"]) < 1e-5


@on_each_grid
def test_ranks_that_run_the_model_unequally_often_wait_for_none(place, alone, launched, world, ep):
    launched(world)
    model = load_pretrained(place / "moe")
    for rank, found in enumerate(results(place, world, ep)):
        outputs = generate(model, PROMPTS[:rank], max_new_tokens=30)
        assert found["in step"] == [output.tokens for output in outputs]


@on_each_grid
def test_adamw_in_bf16_steps_on_parts_as_on_the_whole(place, alone, launched, world, ep):
    launched(world)
    for found in results(place, world, ep):
        assert apart(found["master"], alone["master"]) == 0


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_in_bf16_gradients_are_summed_in_float32(place, alone, launched, world):
    launched(world)
    for found in results(place, world, 1):
        for ours, theirs in zip(found["trained in bf16"], alone["trained in bf16"], strict=True):
            assert ours == pytest.approx(theirs, rel=0.01)


@on_each_grid
def test_a_spread_model_is_saved_as_one_that_is_not(place, alone, launched, world, ep):
    launched(world)
    for name in MODELS if ep == 1 else ("moe", "mtp"):
        saved = load_pretrained(place / f"{name} {world} {ep}").state_dict()
        assert apart(dict(weights=saved), dict(weights=alone[f"{name} sft"]["weights"])) < 1e-10


def test_a_checkpoint_of_a_grid_is_resumed_on_another(place, alone, launched):
    launched(2)  # which saved with ep=2 after 3 updates, and went on with ep=1
    model = load_pretrained(place / "moe")
    wanted = supervised(model, optimizer_of(model), updates=4)
    wanted["stats"] = wanted["stats"][3:]
    for found in (resumed(place, 1), *(torch.load(place / f"resumed {r}.pt") for r in (0, 1))):
        assert apart(found, wanted) < 1e-10
