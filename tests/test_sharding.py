"""runtime/sharding.py: on any grid of processes the update is that of one process.

Everything that is compared is made by `everything`, here on one process and under torchrun on gloo:
one launch goes through all grids of so many processes. In float64, so that "equal" means 1e-12.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_grpo import MOE, TOKENIZER, count_letters, make_model, problem
from torch import Tensor, nn

import grpo
import sft
from data.packing import pack
from data.tokenizer import Tokenizer
from grpo import Questions, Settings
from model import Config, Transformer
from rewards import RewardModel, pairwise_loss, pointwise_loss
from runtime import memory, parallel
from runtime.checkpoint import save_state
from runtime.flags import Machine
from runtime.optimizer import adamw
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.record import Recorded
from runtime.run import Run, UserError
from runtime.sharding import begin, choose_ep, default_ep, gathered, in_step, say, shard, twin
from sample import generate
from sft import Objective, judge_answers, learn_rows, sft_step

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
GRIDS = {1: [1], 2: [0, 1, 2], 4: [0, 1, 2, 4]}  # processes: ep, 0 for a whole model on each
EQUAL, ROUGH = 1e-12, 1e-5


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parallel.whole(t).detach().clone() for name, t in model.state_dict().items()}


def optimizer_of(model: nn.Module, eps: float = 1e-8) -> torch.optim.Optimizer:
    """AdamW. Its first step is lr g / (|g| + eps): where a gradient is 0 but for rounding, 1e-14 of
    it become lr / eps times as much, 4e-9. With ROUGH equal updates look equal there too."""
    return adamw([p for p in model.parameters() if p.requires_grad], 3e-3, eps=eps)


def reinforced(model: Transformer, reference: Transformer, questions: int) -> dict:
    """Two rollouts and three updates, with a norm that is clipped and routes that are replayed."""
    optimizer = optimizer_of(model, ROUGH if questions == 1 else 1e-8)
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


def resume(place: Path, phase: str, parts: dict) -> int:
    """Run's own, without the lock of its directory, where all of these tests' processes read."""
    run = SimpleNamespace(checkpoints=lambda phase: place / "checkpoints" / phase, _saved={},
                          rewind=lambda *line: None)  # fmt: skip
    return Run.resume(run, phase, parts)


def ranked(place: Path, ep: int) -> dict:
    """A reward model learns pairs and verdicts, of which some ranks have none, and is read back."""
    load = partial(load_pretrained, shard=partial(shard, ep=ep))
    model = RewardModel(load(place / "moe"))
    pairs = [(DOCUMENTS[i], DOCUMENTS[i // 2]) for i in range(5)]

    def losses(rows: list) -> Tensor:
        if len(rows[0]) == 2:
            return pairwise_loss(*model([text for side in zip(*rows) for text in side]).chunk(2))
        return pointwise_loss(model([text for (text,) in rows]), torch.ones(len(rows)))

    optimizer = optimizer_of(model, ROUGH)
    learn = learn_rows(model, losses, at_once=1)
    reports = [learn([optimizer], rows) for rows in (pairs, pairs[:1], [(DOCUMENTS[0],)])]
    held = dict(weights=weights(model), stats=[(r.loss, r.grad_norm) for r in reports])
    folder = place / f"reward {parallel.world_size()} {ep}"
    save_pretrained(model.trunk, folder, tokenizer_files=model.head_files())
    again = RewardModel.load(load(folder), folder)
    assert apart(dict(weights=weights(again)), dict(weights=held["weights"])) == 0
    # A run that is resumed: the head that is not asked has no state to read.
    again = RewardModel(load(place / "moe"))
    parts = dict(model=again, optimizer=optimizer_of(again, ROUGH))
    phase = f"reward {parallel.world_size()} {ep}"
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    save_state(place / "checkpoints" / phase, 3, state)
    assert resume(place, phase, parts) == 3
    assert apart(dict(weights=weights(again)), dict(weights=held["weights"])) == 0
    return held


def resumed(place: Path, ep: int) -> dict:
    """Two more updates from the checkpoint."""
    model = load_pretrained(place / "moe", shard=partial(shard, ep=ep))
    optimizer = optimizer_of(model)
    parts = dict(model=model, optimizer=optimizer)
    assert resume(place, "sft", parts) == 3
    return supervised(model, optimizer, updates=2)


def judged(ep: int) -> list[bool]:
    """What a model says of answers, of which some ranks have more than others."""
    tokenizer = Tokenizer.toy(bilingual=True)
    torch.manual_seed(0)
    shape = Config.preset("toy", initializer_range=0.3, vocab_size=tokenizer.vocab_size)
    model = shard(Transformer(shape).double(), ep)
    answers = ["4", None, "7", "two", "9", None, "1", "3", "8"]
    numbers = parallel.shard(range(len(answers)))
    questions = [problem(f"compute {i} a +1 ?", "two") for i in numbers]
    said = judge_answers(model, tokenizer, questions, [answers[i] for i in numbers], at_once=2)
    return parallel.gather_list(said)


def wrong(kind: str, place: Path, ep: int) -> dict[str, dict]:
    """Both recipes, where a mean is taken of each rank's or of each micro-batch's own tokens, and
    the mean of these means is what is learned."""
    world, right_loss, right_grpo = parallel.world_size(), sft.sft_loss, grpo.grpo_loss
    rows = len(pack(parallel.shard(DOCUMENTS), capacity=7).tokens_BT)
    parts = parallel.all_sum(rows)  # micro-batches of a row each
    local = sum(len(document) - 1 for document in parallel.shard(DOCUMENTS))

    def sft_loss(model, batch, mask_BT, tokens, *rest):
        tokens = world * local if kind == "rank" else parts * int(mask_BT.sum())
        return right_loss(model, batch, mask_BT, tokens, *rest)

    def token_weights(lengths_O, aggregation, *, outputs, **rest):
        return 1 / (lengths_O * (world * len(lengths_O) if kind == "rank" else outputs))

    def grpo_loss(logprobs_N, old_N, ref_N, advantages_N, weights_N, *rest, **options):
        if kind == "micro-batch":  # of tokens, where it should be of outputs
            weights_N = torch.full_like(weights_N, 1 / (2 * world * len(weights_N)))
        return right_grpo(logprobs_N, old_N, ref_N, advantages_N, weights_N, *rest, **options)

    load = partial(load_pretrained, place / "moe", shard=partial(shard, ep=ep))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "sft_loss", sft_loss)
        patch.setattr(grpo, "token_weights", token_weights)
        patch.setattr(grpo, "grpo_loss", grpo_loss)
        model = load()
        learned = supervised(model, optimizer_of(model))
        model = load()
        return {"moe sft": learned, "moe grpo 5": reinforced(model, twin(model), 5)}


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
    parallel.sum_gradients(model)
    grads = {name: parallel.whole(p.grad) for name, p in model.named_parameters()}
    return dict(weights=grads | dict(logprobs=logprobs_N.detach()))


def bf16(place: Path, ep: int, states: str, *, save: bool = False, again: bool = False) -> dict:
    """Four steps of our own AdamW on parts of the weights, the last two from a checkpoint."""
    torch.manual_seed(0)
    model = shard(Transformer(Config.preset("toy", initializer_range=0.1)).bfloat16(), ep)
    optimizer = adamw(model.parameters(), 1e-3, states)
    parts = dict(model=model, optimizer=optimizer)
    first = resume(place, states, parts) if again else 0
    for step in range(first, 4):
        grads = torch.Generator().manual_seed(step)
        for p in model.parameters():
            whole = torch.randn(p.shape, generator=grads)
            whole = whole.to(torch.float32 if states == "master" else p.dtype)
            p.grad = parallel.like(whole[parallel.local_region(p)].clone(), p)
        optimizer.step()
        if save and step == 1:
            saved = {name: part.state_dict() for name, part in parts.items()}
            save_state(place / "checkpoints" / states, 2, saved)
    return dict(weights=weights(model))


def everything(place: Path, ep: int) -> dict[str, dict]:
    """All that is compared, on this grid."""
    found = {}
    for name in MODELS:
        load = partial(load_pretrained, place / name, shard=partial(shard, ep=ep))
        if name == "dense" and ep > 1 or name != "moe" and ep == 0:
            continue
        model = load()
        size = sum(parallel.local(p).numel() for p in model.parameters())
        found[f"{name} load"] = dict(weights=weights(model))
        found[f"{name} share"] = size / model.num_parameters(mtp=True)
        if name == "moe":
            found["moe reward"] = ranked(place, ep)
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
    found["judged"] = judged(ep)
    for states in ("master", "rounding"):
        found[states] = bf16(place, ep, states, save=ep == parallel.world_size() == 2)
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
    for ep in GRIDS[world]:  # what was saved by 2 processes with ep=2
        torch.save(all_resumed(place, ep), place / f"resumed {world} {ep} {parallel.rank()}.pt")
    found = {kind: wrong(kind, place, 1) for kind in ("rank", "micro-batch")}
    torch.save(found, place / f"wrong {world} {parallel.rank()}.pt")
    parallel.shutdown()


def all_resumed(place: Path, ep: int) -> dict[str, dict]:
    found = {states: bf16(place, ep, states, again=True) for states in ("master", "rounding")}
    return found | dict(sft=resumed(place, ep))


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
        if world == 4:
            launch(2)  # which leaves the checkpoints
        done.add(world)
        script = "import sys; from pathlib import Path; import test_sharding;"
        (place / "worker.py").write_text(script + "test_sharding.worker(Path(sys.argv[1]))")
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={world}", "worker.py", str(place)]  # fmt: skip
        limit = 150 * world  # seconds
        ended = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=limit
        )
        assert ended.returncode == 0, ended.stderr[-5000:]

    return launch


def apart(found: dict, wanted: dict) -> float:
    """The largest difference of weights; what was sampled and reported must be the same."""
    assert found.keys() == wanted.keys() and found["weights"].keys() == wanted["weights"].keys()
    assert found.get("tokens") == wanted.get("tokens")
    for ours, theirs in zip(found.get("stats", ()), wanted.get("stats", ()), strict=True):
        assert ours == pytest.approx(theirs, abs=EQUAL)
    pairs = [(found["weights"][name], tensor) for name, tensor in wanted["weights"].items()]
    return max(float((ours.double() - theirs).abs().max()) for ours, theirs in pairs)


GRID = [*((2, ep) for ep in GRIDS[2]),
        *(pytest.param(4, ep, marks=pytest.mark.slow) for ep in GRIDS[4])]  # fmt: skip
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


def test_a_model_is_spread_where_it_would_fill_more_than_half_of_the_memory(monkeypatch):
    assert default_ep(MOE, 100, room=10, local=8) == 0  # one process
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    assert default_ep(MOE, 100, room=200, local=4) == 0
    assert default_ep(MOE, 101, room=200, local=4) == 4
    assert default_ep(DENSE, 101, room=200, local=4) == 1
    assert default_ep(MOE, 101, room=200, local=2) == 2  # two nodes
    assert default_ep(MOE, 101, room=200, local=1) == 1
    assert default_ep(replace(MOE, n_routed_experts=6), 101, room=200, local=4) == 2
    odd = replace(MOE, moe_intermediate_size=7)  # which can't be cut: whole experts, or all of them
    assert [default_ep(odd, 101, room=200, local=local) for local in (4, 2)] == [4, 1]


@pytest.mark.parametrize(
    ("dtype", "states", "each"),
    [(torch.float64, "master", 32), (torch.float32, "master", 16), (torch.bfloat16, "master", 18),
     (torch.bfloat16, "rounding", 8), (torch.bfloat16, None, 2), (torch.float16, None, 2)],
)  # fmt: skip
def test_what_is_counted_is_all_that_training_holds(monkeypatch, capsys, dtype, states, each):
    model = make_model().to(dtype)
    size = each * model.num_parameters()
    say.cache_clear()
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "gather_list", lambda told: [*told, (1e9, 2)])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for room, ep in ((2 * size, 0), (2 * size - 1, 2)):
        monkeypatch.setattr(memory, "process_memory", lambda device: room)
        assert choose_ep(model, "cpu", states) == ep
    assert "spread over 2 processes, --ep 2" in capsys.readouterr().out
    monkeypatch.setattr(parallel, "gather_list", lambda told: [*told, (size, 2)])  # the other has
    monkeypatch.setattr(memory, "process_memory", lambda device: 1e9)  # less
    assert choose_ep(model, "cpu", states) == 2


def test_a_process_has_its_share_of_the_machine(monkeypatch):
    alone = memory.process_memory("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 1e8 < memory.process_memory("cpu") == alone / 4


def test_what_is_offloaded_is_not_spread():
    assert Machine().ep is None and Machine(offload=True).ep == 0
    with pytest.raises(UserError, match="--ep and --offload: give one of them"):
        Machine(offload=True, ep=1)


# ---- several -------------------------------------------------------------------------------------


@on_each_grid
def test_on_any_grid_updates_and_samples_are_those_of_one_process(
    place, alone, launched, world, ep
):
    launched(world)
    for found in results(place, world, ep):
        kinds = [name for name in found if name.split()[-1] not in ("load", "share")]
        kinds = [name for name in kinds if name.split()[0] in MODELS]
        assert len(kinds) == {0: 4, 1: 7}.get(ep, 5)
        for name in kinds:
            assert apart(found[name], alone[name]) < EQUAL, name
            if name != "moe reward":
                learned = dict(weights=alone[name]["weights"])
                assert apart(learned, alone[f"{name.split()[0]} load"]) > 1e-3


@on_each_grid
def test_each_rank_holds_its_part_of_the_model_that_was_saved(place, alone, launched, world, ep):
    launched(world)
    for found in results(place, world, ep):
        for name in (name for name in found if "load" in name):
            assert apart(found[name], alone[name]) == 0
            # Not cut into even parts: a router of 4 rows, say.
            share = found[f"{name.split()[0]} share"]
            assert share < 1 / world + 0.1 if ep else share == 1


@on_each_grid
def test_experts_without_tokens_have_no_gradient_and_spoil_none(place, alone, launched, world, ep):
    launched(world)
    assert not alone["one-sided"]["weights"]["model.layers.1.mlp.experts.up_proj"][2:].any()
    for found in results(place, world, ep):
        assert apart(found["one-sided"], alone["one-sided"]) < EQUAL
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
        for states in ("master", "rounding"):  # and rounds with the same noise
            assert apart(found[states], alone[states]) == 0


@on_each_grid
def test_a_judge_says_the_same_of_answers_on_any_rank(place, alone, launched, world, ep):
    launched(world)
    assert {True, False} == set(alone["judged"])
    for found in results(place, world, ep):
        assert found["judged"] == alone["judged"]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["rank", "micro-batch"])
def test_means_of_means_are_another_update(place, alone, launched, world, kind):
    launched(world)
    for rank in range(world):
        for name, found in torch.load(place / f"wrong {world} {rank}.pt")[kind].items():
            found = dict(weights=found["weights"])
            assert apart(found, dict(weights=alone[name]["weights"])) > 1e-3, name


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_in_bf16_gradients_are_summed_in_float32(place, alone, launched, world):
    launched(world)
    for found in results(place, world, 1):
        for ours, theirs in zip(found["trained in bf16"], alone["trained in bf16"], strict=True):
            assert ours == pytest.approx(theirs, rel=0.01)


@on_each_grid
def test_a_spread_model_is_saved_as_one_that_is_not(place, alone, launched, world, ep):
    launched(world)
    for name in {0: ("moe",), 1: MODELS}.get(ep, ("moe", "mtp")):
        saved = load_pretrained(place / f"{name} {world} {ep}").state_dict()
        assert apart(dict(weights=saved), dict(weights=alone[f"{name} sft"]["weights"])) < EQUAL


@pytest.mark.parametrize(("world", "ep"), [(1, 0), *GRID])
def test_a_checkpoint_of_a_grid_is_resumed_on_another(place, alone, launched, world, ep):
    launched(max(world, 2))  # 2 processes saved with ep=2
    model = load_pretrained(place / "moe")
    wanted = supervised(model, optimizer_of(model), updates=5)
    wanted["stats"] = wanted["stats"][3:]
    files = [place / f"resumed {world} {ep} {rank}.pt" for rank in range(world)]
    for found in [all_resumed(place, 0)] if world == 1 else map(torch.load, files):
        assert apart(found["sft"], wanted) < EQUAL
        for states in ("master", "rounding"):
            assert apart(found[states], alone[states]) == 0
