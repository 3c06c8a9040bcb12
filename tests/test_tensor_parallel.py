"""runtime/tensor_parallel.py: ranks that each have a part of every matrix write what one process
writes.

As in test_sharding.py, everything is made by functions that run here on one process and under
torchrun on gloo, one launch for so many processes, in float64.
"""

import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_grpo import LETTERS, MOE, make_model
from test_sharding import apart, reinforced
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import sample
from data.problems import Problem
from data.tokenizer import Tokenizer
from model import Config, Transformer
from runtime import parallel, tensor_parallel
from runtime.flags import Machine
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.run import UserError
from runtime.sharding import gathered, shard, twin
from sample import Output, evaluate, generate

ROOT = Path(__file__).parent.parent
V = 13  # not a multiple of the number of ranks
SIZES = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=8, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
STRETCHED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=16)  # fmt: skip
CONFIGS = dict(
    # Biases of q, k and v, and a head that is the embedding.
    qwen2=dict(num_key_value_heads=4, tie_word_embeddings=True),
    # A norm in each head, and heads of another size than D / H.
    qwen3=dict(model_type="qwen3", num_key_value_heads=4, head_dim=6),
    # A bias of o too, and as many key-value heads as heads.
    llama=dict(
        model_type="llama", num_key_value_heads=None, attention_bias=True, rope_scaling=STRETCHED
    ),  # fmt: skip
)
CONFIGS = {name: Config.preset("toy-student", **SIZES, **c) for name, c in CONFIGS.items()}
LEARNER = replace(CONFIGS["qwen2"], vocab_size=len(LETTERS))
PROMPTS = [[3], [1, 2], [3], [4, 5, 6, 7, 8], [9, 0, 9], [1, 2], [5, 4, 3, 2, 1, 0, 12]]
SAMPLING = dict(max_new_tokens=12, stop=[0], seed=5)
CASES = dict(
    plain={},
    nucleus=dict(temperature=0.7, top_p=0.8),
    greedy=dict(temperature=0.0),
    # Fewer slots than prompts, and a cache in which outputs have to start again.
    crowded=dict(slots=3, page=4, cache_tokens=28),
)
GRIDS = {2: [2], 4: [2, 4]}  # processes: tp


def build(config: Config, seed: int = 0) -> Transformer:
    """With biases and norms that are not those of a new model."""
    torch.manual_seed(seed)
    model = Transformer(config).double()
    for name, p in model.named_parameters():
        spread = 1.3 * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
        p.data.normal_("norm" in name, spread)
    return model


def written(model: Transformer, prompts: list, mine: list[int], **options) -> dict:
    """The outputs of some of the prompts, and what was said of them while they were written."""
    streamed: dict[int, list[int]] = {i: [] for i in range(len(mine))}
    finished: dict[int, Output] = {}
    outputs = generate(
        model, [prompts[i] for i in mine], rows=mine, **{**SAMPLING, **options},
        on_token=lambda i, token: streamed[i].append(token), on_finish=finished.__setitem__,
    )  # fmt: skip
    assert [finished[i] for i in range(len(mine))] == outputs
    ends = [streamed[i][-len(output.tokens) :] for i, output in enumerate(outputs)]
    return dict(
        tokens=[output.tokens for output in outputs], streamed=ends,
        logprobs=[output.logprobs for output in outputs],
    )  # fmt: skip


def everything(place: Path, name: str, tp: int) -> dict:
    """What the ranks write with a model that is cut, and of what."""
    load = partial(load_pretrained, place / name, shard=partial(shard, ep=0, tp=tp))
    model, world = load(), parallel.world_size()
    shares = {case: list(parallel.shard(range(len(PROMPTS)))) for case in CASES}
    shares["one asks"] = list(range(3)) if parallel.rank() == world - 1 else []
    found = {
        case: written(model, PROMPTS, mine, **CASES.get(case, {})) for case, mine in shares.items()
    }
    floats = load(dtype=torch.float32)
    found["float32"] = written(floats, PROMPTS, shares["greedy"], temperature=0.0)
    found["sizes"] = sizes(model)
    return found


def agreement(model: Transformer) -> tuple:
    """Of ranks that have drawn different tokens, and have room for different numbers of pages."""
    rank = parallel.rank()
    tokens_B, logprobs_B = torch.tensor([2**40 + rank, 5]), torch.tensor([-0.1 * rank, -1.0])
    drawn = tensor_parallel.agreed(model, tokens_B, logprobs_B)
    return *drawn, tensor_parallel.least(model, 100 + rank)


def sizes(model: Transformer) -> dict[str, float]:
    """How many numbers a rank has of each parameter, and in the cache of a token."""
    found = {name: parallel.local(p).numel() for name, p in model.named_parameters()}
    return found | {"cache": model.new_cache(1, 1).numel()}


class Collectives(TorchDispatchMode):
    """Counts them by name, FSDP's and DTensor's too."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace in ("c10d", "_c10d_functional"):
            self.counts[operator.__name__.split(".")[0]] += 1
        return operator(*args, **(kwargs or {}))


def collectives(model: Transformer, tokens: int) -> Counter:
    """What one prompt's output of so many tokens costs."""
    with Collectives() as made:
        written(model, [[3]], list(parallel.shard([0])), max_new_tokens=tokens, stop=[])
    return made.counts


def evaluated(model: Transformer) -> tuple[dict, str]:
    """pass@1 and what explains it, and an answer on the screen."""
    tokenizer = Tokenizer.toy()
    problems = [Problem("compute 7 a +5 b ?", "2"), Problem("compute 1 a +1 b ?", "2")]
    problems.append(Problem("compute 3 a *3 b ?", "9"))
    config = SimpleNamespace(max_new_tokens=9, temperature=1.0, top_p=1.0, seed=3)
    with redirect_stdout(io.StringIO()) as screen:
        result = evaluate(model, tokenizer, problems, samples=3, max_new_tokens=9)
        text = sample.answer(model, tokenizer, problems[0].question, config)
    assert text.strip() in screen.getvalue() or not parallel.is_main()
    return result, screen.getvalue()


def worker(place: Path) -> None:
    parallel.init()
    world = parallel.world_size()
    for tp in GRIDS[world]:
        found = {name: everything(place, name, tp) for name in CONFIGS}
        found["agreed"] = agreement(
            load_pretrained(place / "llama", shard=partial(shard, ep=0, tp=tp))
        )
        if tp == 2:
            spread = partial(shard, ep=1, tp=tp)
            model = load_pretrained(place / "learner", shard=spread)
            found["counts"] = [collectives(model, tokens) for tokens in (4, 14)]
            with gathered(model) as writer:
                found["writer"] = sizes(writer)
            # With one question, only one rank has any.
            for questions in (5, 1):
                model = load_pretrained(place / "learner", shard=spread)
                found[f"grpo {questions}"] = reinforced(model, twin(model), questions)
            toy = load_pretrained(place / "toy", shard=partial(shard, ep=0, tp=tp))
            found["evaluated"] = evaluated(toy)
        torch.save(found, place / f"{world} {tp} {parallel.rank()}.pt")
    parallel.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name, config in CONFIGS.items():
        save_pretrained(build(config), folder / name)
    save_pretrained(make_model(LEARNER), folder / "learner")
    save_pretrained(build(replace(CONFIGS["qwen3"], vocab_size=408)), folder / "toy")
    return folder


@pytest.fixture(scope="module")
def launched(place) -> Callable[[int], None]:
    """Start so many processes, once."""
    done = set()

    def launch(world: int) -> None:
        if world in done:
            return
        done.add(world)
        script = "import sys; from pathlib import Path; import test_tensor_parallel as tests;"
        (place / "worker.py").write_text(script + "tests.worker(Path(sys.argv[1]))")
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={world}", "worker.py", str(place)]  # fmt: skip
        ended = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=200
        )
        assert ended.returncode == 0, ended.stderr[-5000:]

    return launch


GRID = [(2, 2), *(pytest.param(4, tp, marks=pytest.mark.slow) for tp in (2, 4))]
on_each_grid = pytest.mark.parametrize(("world", "tp"), GRID)
on_two = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])


def results(place: Path, world: int, tp: int) -> list[dict]:
    return [torch.load(place / f"{world} {tp} {rank}.pt") for rank in range(world)]


# ---- one process ---------------------------------------------------------------------------------


def test_on_one_process_a_model_is_whole_and_writes_itself():
    for tp in (0, 1):
        model = shard(build(CONFIGS["qwen2"]), 0, tp=tp)
        with gathered(model) as writer:
            assert writer is model and not hasattr(model, "group")


def test_what_can_not_be_cut_is_refused_with_what_would(monkeypatch):
    model, refused = build(CONFIGS["qwen2"]), partial(pytest.raises, UserError)
    with refused(match="--tp 2: must divide the number of processes, 1; here it can be 1$"):
        shard(model, 0, tp=2)
    monkeypatch.setattr(parallel, "world_size", lambda: 24)
    with refused(match="--tp 16: must divide the number of processes, 24; .* 1, 2, 4$"):
        shard(model, 0, tp=16)
    with refused(match="--tp 8: must divide the number of key-value heads, 4; .* 1, 2, 4$"):
        shard(model, 1, tp=8)
    with refused(match="--tp 3: must divide the number of heads, 8"):
        shard(model, 0, tp=3)
    narrow = build(replace(CONFIGS["llama"], intermediate_size=20))
    with refused(match="--tp 8: must divide the intermediate size, 20"):
        shard(narrow, 0, tp=8)
    with refused(match="--tp -2: must divide"):
        shard(model, 0, tp=-2)
    with refused(match="--tp 2: .* dense models .* deepseek_v3, whose experts --ep shares out"):
        shard(make_model(MOE), 1, tp=2)


def test_where_tp_goes_with_ep():
    assert Machine(tp=2).ep is None and Machine(tp=2, ep=1).tp == 2 and Machine(tp=1, ep=0).tp == 1
    for wrong in (dict(ep=0), dict(offload=True)):
        with pytest.raises(UserError, match="--tp 2 is for a model that is spread: --ep 1"):
            Machine(tp=2, **wrong)
    with pytest.raises(UserError, match="--tp 2 and --ep 1: give one of them"):
        sample.Config(tp=2, ep=1)
    asked = distill.Config(tp=2)  # of a teacher with experts and a dense student
    assert (distill.tp_of(asked, MOE), distill.tp_of(asked, CONFIGS["qwen2"])) == (0, 2)


# ---- several -------------------------------------------------------------------------------------


def alone(place: Path, name: str, case: str, mine: list[int], **options) -> dict:
    model = load_pretrained(place / name, **options)
    return written(model, PROMPTS, mine, **CASES.get(case, {}))


@on_each_grid
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_write_together_what_one_process_writes(place, launched, name, world, tp):
    launched(world)
    for case in (*CASES, "one asks"):
        everyone = range(3) if case == "one asks" else range(len(PROMPTS))
        wanted = alone(place, name, case, list(everyone))
        assert len({tuple(tokens) for tokens in wanted["tokens"]}) > 2  # says something
        for rank, found in enumerate(results(place, world, tp)):
            mine = everyone[rank::world]
            if case == "one asks":
                mine = everyone if rank == world - 1 else []
            got = found[name][case]
            assert got["tokens"] == got["streamed"] == [wanted["tokens"][i] for i in mine], case
            for ours, i in zip(got["logprobs"], mine, strict=True):
                assert ours == pytest.approx(wanted["logprobs"][i], abs=1e-10)


@on_each_grid
def test_greedy_in_float32_is_the_same_for_most(place, launched, world, tp):
    launched(world)
    same = []
    for name in CONFIGS:
        wanted = alone(place, name, "greedy", list(range(len(PROMPTS))), dtype=torch.float32)
        for rank, found in enumerate(results(place, world, tp)):
            ours = found[name]["float32"]["tokens"]
            same += [a == b for a, b in zip(ours, wanted["tokens"][rank::world], strict=True)]
    assert sum(same) / len(same) > 0.8


def check_sizes(found: list[dict], whole: dict, tp: int) -> None:
    for name, size in whole.items():
        norm = "norm" in name or name.endswith("o_proj.bias")
        for share in found:
            most = (
                size if norm else size / tp * (16 / V if "embed" in name or "head" in name else 1)
            )
            assert share[name] <= most, name
        total = sum(share[name] for share in found)
        assert total == size * (len(found) if norm else len(found) / tp), name


@on_each_grid
def test_a_rank_holds_its_part_of_the_weights_and_of_the_cache(place, launched, world, tp):
    launched(world)
    for name in CONFIGS:
        found = [result[name]["sizes"] for result in results(place, world, tp)]
        check_sizes(found, sizes(load_pretrained(place / name)), tp)
    if tp == 2:
        found = [result["writer"] for result in results(place, world, tp)]
        check_sizes(found, sizes(load_pretrained(place / "learner")), tp)


@on_two
def test_a_token_costs_two_sums_a_layer_and_no_weight_travels(place, launched, world):
    launched(world)
    layers = LEARNER.num_hidden_layers
    for found in results(place, world, 2):
        few, many = found["counts"]
        wanted = {"allreduce_": 2 * layers + 1, "allgather_": 1, "broadcast_": 1}
        if few["allreduce_"] == 0:  # this group has nothing to write
            wanted = {}
        assert {name: n / 10 for name, n in (many - few).items()} == wanted


@on_two
def test_grpo_with_parts_that_write_is_that_of_one_process(place, launched, world):
    launched(world)
    for questions in (5, 1):
        model = load_pretrained(place / "learner")
        wanted = reinforced(model, twin(model), questions)
        for found in results(place, world, 2):
            assert apart(found[f"grpo {questions}"], wanted) < 1e-10


@on_each_grid
def test_ranks_that_would_part_go_with_the_first_of_their_group(place, launched, world, tp):
    launched(world)
    for rank, found in enumerate(results(place, world, tp)):
        first = rank // tp * tp
        tokens_B, logprobs_B, pages = found["agreed"]
        assert (tokens_B.tolist(), pages) == ([2**40 + first, 5], 100 + first)
        assert torch.equal(logprobs_B, torch.tensor([-0.1 * first, -1.0]))


@on_two
def test_an_evaluation_is_the_same_and_an_answer_is_printed_once(place, launched, world):
    launched(world)
    result, screen = evaluated(load_pretrained(place / "toy"))
    for rank, found in enumerate(results(place, world, 2)):
        assert found["evaluated"][0] == result
        if rank == 0:
            assert screen in found["evaluated"][1]
        else:
            assert found["evaluated"][1] == ""
