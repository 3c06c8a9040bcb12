"""sample.py: the engine, what it draws from, and what the evaluation makes of the outputs."""

import io
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import sample
from data.packing import pack
from data.problems import Problem
from data.tokenizer import Tokenizer
from model import Config, Transformer
from runtime.configs import from_json
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.record import Recorded, Step
from runtime.run import UserError, launch, parse
from sample import Output, choose, evaluate, generate, judge_group, spell, summarize, table

ROOT = Path(__file__).parent.parent
V = 13
DEEPSEEK = Config.preset(
    "toy", vocab_size=V, hidden_size=16, intermediate_size=20, num_hidden_layers=3,
    num_attention_heads=2, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5,
    max_position_embeddings=64, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12,
    n_group=4, topk_group=2, routed_scaling_factor=2.5,
)  # fmt: skip
QWEN = from_json(
    dict(model_type="qwen2", vocab_size=V, hidden_size=16, intermediate_size=20,
         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
         max_position_embeddings=64)
)  # fmt: skip
CONFIGS = {"deepseek": DEEPSEEK, "qwen2": QWEN}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Lengths 1, 2, 3, 5 and 7; duplicates apart and side by side.
PROMPTS = [
    [3],
    [1, 2],
    [3],
    [4, 5, 6, 7, 8],
    [1, 2],
    [1, 2],
    [9, 0, 9],
    [5, 4, 3, 2, 1, 0, 12],
    [3],
]


def build(config: Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).to(dtype)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() > 1:
                tensor.normal_(0, 1.3 * tensor.shape[-1] ** -0.5)
            elif "norm" not in name:
                tensor.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def deepseek() -> Transformer:
    return build(DEEPSEEK)


def assert_same(got: list[Output], expected: list[Output]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a.tokens, a.finish) == (b.tokens, b.finish)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-12)
        assert (a.routes is None) == (b.routes is None)
        assert a.routes is None or torch.equal(a.routes, b.routes)


def logits_by_hand(model: Transformer, tokens: list[int]) -> np.ndarray:
    """What the uncached model says after the tokens."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, -1].double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max())
    return exp / exp.sum()


# ---- the engine ------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("slots", [256, 4, 2, 1])
def test_a_batch_of_many_equals_batches_of_one_for_any_number_of_slots(config, slots):
    model = build(config)
    routes = config.is_moe
    settings = dict(max_new_tokens=12, temperature=1.2, stop=(0, 7), seed=5, routes=routes)
    alone = [
        generate(model, [prompt], rows=[row], **settings)[0] for row, prompt in enumerate(PROMPTS)
    ]
    lengths = {len(output.tokens) for output in alone}
    assert len(lengths) > 3, f"the outputs should end at different times, not after {lengths}"
    assert_same(generate(model, PROMPTS, slots=slots, **settings), alone)


@every_config
def test_results_do_not_depend_on_the_order_of_the_requests(config):
    model = build(config)
    settings = dict(max_new_tokens=10, stop=(0,), seed=2, slots=3)
    expected = generate(model, PROMPTS, **settings)
    order = random.Random(0).sample(range(len(PROMPTS)), len(PROMPTS))
    shuffled = generate(model, [PROMPTS[i] for i in order], rows=order, **settings)
    assert_same(shuffled, [expected[i] for i in order])


def test_the_row_and_the_seed_decide_the_stream(deepseek):
    settings = dict(max_new_tokens=20, temperature=1.5)
    group = generate(deepseek, [[1, 2]] * 6, seed=0, **settings)
    assert len({tuple(output.tokens) for output in group}) == 6, "members of a group are copies"
    again = generate(deepseek, [[1, 2]] * 6, seed=0, rows=[3, 3, 0, 1, 5, 2], **settings)
    assert_same(again, [group[row] for row in (3, 3, 0, 1, 5, 2)])
    other = generate(deepseek, [[1, 2]] * 6, seed=1, **settings)
    assert not {tuple(o.tokens) for o in group} & {tuple(o.tokens) for o in other}
    # As many rows as a long run has (grpo: step << 32), and still different streams.
    far = generate(
        deepseek, [[1, 2]] * 2, rows=[(9000 << 32) + 1, (9001 << 32) + 1], seed=0, **settings
    )
    assert far[0].tokens != far[1].tokens


def test_a_longer_limit_continues_the_same_output(deepseek):
    short = generate(deepseek, PROMPTS, max_new_tokens=5, seed=1)
    long = generate(deepseek, PROMPTS, max_new_tokens=15, seed=1)
    assert [output.tokens for output in short] == [output.tokens[:5] for output in long]


@every_config
def test_logprobs_are_those_of_the_uncached_model(config):
    model = build(config)
    outputs = generate(model, PROMPTS, max_new_tokens=9, temperature=0.7, seed=3, slots=4)
    for prompt, output in zip(PROMPTS, outputs):
        for i, token in enumerate(output.tokens):
            p_V = softmax(logits_by_hand(model, prompt + output.tokens[:i]) / 0.7)
            assert output.logprobs[i] == pytest.approx(math.log(p_V[token]), abs=1e-10)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampler_logprobs_equal_trainer_logprobs_with_replayed_routes(deepseek, temperature):
    outputs = generate(
        deepseek, PROMPTS, max_new_tokens=12, temperature=temperature, stop=(0, 7), seed=4, slots=4,
        routes=True,
    )  # fmt: skip
    documents = [prompt + output.tokens for prompt, output in zip(PROMPTS, outputs)]
    batch = pack(documents, 30)
    routes_BTMA = torch.full((*batch.tokens_BT.shape, 2, 3), -1, dtype=torch.int16)
    expected = {}
    for i, (prompt, output) in enumerate(zip(PROMPTS, outputs)):
        assert output.routes.shape == (len(documents[i]) - 1, 2, 3)
        assert (output.routes >= 0).all()
        for at, route_MA in enumerate(output.routes):
            routes_BTMA[(batch.documents_BT == i) & (batch.positions_BT == at)] = route_MA
        for at, logprob in enumerate(output.logprobs, len(prompt)):
            expected[i, at] = logprob
    places = list(zip(batch.documents_BT.flatten().tolist(), batch.positions_BT.flatten().tolist()))
    mask_BT = torch.tensor([place in expected for place in places]).view_as(batch.tokens_BT)
    with torch.no_grad():
        logprobs_N, _, _, _ = deepseek.logprobs(
            batch.tokens_BT,
            batch.positions_BT,
            mask_BT,
            temperature=temperature,
            routes_BTMA=routes_BTMA,
        )
    wanted = [expected[place] for place in places if place in expected]
    assert logprobs_N.tolist() == pytest.approx(wanted, abs=1e-10)


def test_a_route_is_what_each_token_was_sent_to(deepseek):
    """Of the prompt and of the output but its last token, which is never fed."""
    outputs = generate(deepseek, PROMPTS, max_new_tokens=8, seed=4, slots=4, routes=True)
    for prompt, output in zip(PROMPTS, outputs):
        with torch.no_grad():
            _, routings = deepseek.hidden(torch.tensor([prompt + output.tokens[:-1]]))
        experts_TMA = torch.stack([routing.experts_BTA[0] for routing in routings], 1)
        assert torch.equal(output.routes.long(), experts_TMA)


# ---- the draw --------------------------------------------------------------------------

HAND = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (1.0, {0: 0.15, 1: 0.5, 2: 0.05, 3: 0.3}),
        (0.96, {0: 0.15, 1: 0.5, 2: 0.05, 3: 0.3}),
        (0.94, {0: 0.15 / 0.95, 1: 0.5 / 0.95, 3: 0.3 / 0.95}),
        (0.81, {0: 0.15 / 0.95, 1: 0.5 / 0.95, 3: 0.3 / 0.95}),  # the token that crosses stays
        (0.79, {1: 0.625, 3: 0.375}),
        (0.51, {1: 0.625, 3: 0.375}),
        (0.49, {1: 1.0}),
        (1e-9, {1: 1.0}),  # never nothing
    ],
)
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p_renormalised(top_p, kept):
    count = 2000
    uniform_B = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens_B, logprobs_B = choose(HAND.expand(count, 4), uniform_B, 1.0, top_p)
    drawn = Counter(tokens_B.tolist())
    assert set(drawn) == set(kept)
    for token, p in kept.items():
        assert drawn[token] / count == pytest.approx(p, abs=1.01 / count)
        assert logprobs_B[tokens_B == token].exp().tolist() == pytest.approx([p] * drawn[token])


@pytest.mark.parametrize("top_p", [0.9, 0.5, 0.2])
def test_generated_logprobs_are_of_the_distribution_that_was_drawn_from(deepseek, top_p):
    outputs = generate(deepseek, PROMPTS, max_new_tokens=8, temperature=1.3, top_p=top_p, seed=1)
    sure = 0
    for prompt, output in zip(PROMPTS, outputs):
        for i, token in enumerate(output.tokens):
            p_V = softmax(logits_by_hand(deepseek, prompt + output.tokens[:i]) / 1.3)
            nucleus: list[int] = []
            while sum(p_V[nucleus]) < top_p:
                nucleus.append(max(set(range(V)) - set(nucleus), key=p_V.__getitem__))
            assert token in nucleus
            expected = math.log(p_V[token] / sum(p_V[nucleus]))
            assert output.logprobs[i] == pytest.approx(expected, abs=1e-10)
            sure += len(nucleus) > 1
    assert sure > 5, "every nucleus held a single token"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choose_draws_each_token_as_often_as_its_probability_says(dtype, temperature):
    count = 5000
    logits_V = (2 * torch.randn(20, generator=torch.Generator().manual_seed(0))).to(dtype)
    p_V = softmax(logits_V.double().numpy() / temperature)
    uniform_B = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens_B, logprobs_B = choose(logits_V.expand(count, 20), uniform_B, temperature, 1.0)
    drawn_V = np.bincount(tokens_B.numpy(), minlength=20) / count
    np.testing.assert_allclose(drawn_V, p_V, atol=1.01 / count)
    np.testing.assert_allclose(
        logprobs_B.double().numpy(), np.log(p_V[tokens_B.numpy()]), atol=1e-5
    )


def test_the_streams_of_many_rows_draw_the_models_distribution(deepseek):
    """Chi-square over 4000 rows, each of its own stream: at most 40 for 12 degrees of freedom."""
    count = 4000
    outputs = generate(deepseek, [[4, 2]] * count, max_new_tokens=2, seed=11, slots=count)
    expected_V = count * softmax(logits_by_hand(deepseek, [4, 2]))
    drawn_V = np.bincount([output.tokens[0] for output in outputs], minlength=V)
    assert ((drawn_V - expected_V) ** 2 / expected_V).sum() < 40
    # And the second number of a stream does not follow from the first.
    first = max(range(V), key=drawn_V.__getitem__)
    seconds = [output.tokens[1] for output in outputs if output.tokens[0] == first]
    expected_V = len(seconds) * softmax(logits_by_hand(deepseek, [4, 2, first]))
    drawn_V = np.bincount(seconds, minlength=V)
    assert ((drawn_V - expected_V) ** 2 / expected_V).sum() < 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_of_probability_zero_is_never_drawn(dtype):
    inf = math.inf
    logits_V = torch.tensor([-inf, -inf, 0.3, -inf, 1.1, -200.0, -inf], dtype=dtype)
    ends = [0.0, 5e-324, 1e-17, 0.5, 1 - 2**-53, float(np.nextafter(1, 0))]
    uniform_B = torch.tensor(
        ends + np.random.default_rng(0).random(500).tolist(), dtype=torch.float64
    )
    tokens_B, logprobs_B = choose(logits_V.expand(len(uniform_B), 7), uniform_B, 1.0, 1.0)
    assert set(tokens_B.tolist()) == {2, 4}
    assert tokens_B[:3].tolist() == [2, 2, 2] and tokens_B[4:6].tolist() == [4, 4]
    assert torch.isfinite(logprobs_B).all()
    tokens_B, _ = choose(logits_V.expand(len(uniform_B), 7), uniform_B, 1.0, 0.3)
    assert set(tokens_B.tolist()) == {4}


def test_uniform_numbers_close_to_one_draw_the_last_token_with_any_rounding():
    """Float32 probabilities rarely add up to one."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = 3 * torch.randn(3000, 37, generator=generator)
    logits_BV[:, -3:] = -math.inf
    almost_one_B = torch.full((3000,), float(np.nextafter(1, 0)), dtype=torch.float64)
    tokens_B, _ = choose(logits_BV, almost_one_B, 1.0, 1.0)
    assert (tokens_B == 33).all()


def test_temperature_zero_takes_the_best_token_with_probability_one(deepseek):
    tokens_B, logprobs_B = choose(HAND.expand(5, 4), torch.linspace(0, 0.99, 5), 0.0, 0.3)
    assert tokens_B.tolist() == [1] * 5 and logprobs_B.tolist() == [0.0] * 5
    outputs = generate(deepseek, PROMPTS[:5], max_new_tokens=6, temperature=0.0, seed=9)
    for prompt, output in zip(PROMPTS, outputs):
        assert output.logprobs == [0.0] * 6
        for i, token in enumerate(output.tokens):
            assert token == logits_by_hand(deepseek, prompt + output.tokens[:i]).argmax()


# ---- the end of an output --------------------------------------------------------------


def test_an_output_ends_with_its_first_stop_token_or_at_the_limit(deepseek):
    free = generate(deepseek, PROMPTS, max_new_tokens=16, temperature=1.5, seed=6)
    assert all(output.finish == "length" and len(output.tokens) == 16 for output in free)
    for stop in [(4,), (2, 9), (12, 0, 6), ()]:
        outputs = generate(
            deepseek, PROMPTS, max_new_tokens=16, temperature=1.5, seed=6, stop=stop, slots=4
        )
        finishes = set()
        for output, whole in zip(outputs, free):
            at = next((i for i, token in enumerate(whole.tokens) if token in stop), None)
            assert output.tokens == (whole.tokens if at is None else whole.tokens[: at + 1])
            assert output.finish == ("length" if at is None else "stop")
            assert len(output.logprobs) == len(output.tokens)
            finishes.add(output.finish)
        assert "stop" in finishes or not stop


def test_a_stop_token_at_the_last_allowed_place_counts_as_stop(deepseek):
    whole = generate(deepseek, [[1, 2]], max_new_tokens=16, temperature=1.5, seed=6)[0].tokens
    at = next(i for i in range(3, 16) if whole[i] not in whole[:i])
    for limit, finish in ((at, "length"), (at + 1, "stop"), (at + 2, "stop")):
        settings = dict(max_new_tokens=limit, temperature=1.5, seed=6, stop=(whole[at],))
        (output,) = generate(deepseek, [[1, 2]], **settings)
        assert output.finish == finish
        assert output.tokens == whole[: min(limit, at + 1)]


def test_a_stop_token_in_the_prompt_ends_nothing(deepseek):
    (output,) = generate(deepseek, [[4, 4]], max_new_tokens=3, temperature=0, stop=(4,))
    assert len(output.tokens) >= 1
    first = logits_by_hand(deepseek, [4, 4]).argmax()
    assert output.tokens[0] == first


def test_callbacks_tell_every_token_in_order_and_every_end_once(deepseek):
    tokens, finished = {}, {}
    outputs = generate(
        deepseek, PROMPTS, max_new_tokens=9, temperature=1.5, stop=(0, 7), seed=5, slots=2,
        on_token=lambda i, token: tokens.setdefault(i, []).append(token),
        on_finish=lambda i, output: finished.setdefault(i, []).append(output),
    )  # fmt: skip
    assert tokens == {i: output.tokens for i, output in enumerate(outputs)}
    assert finished == {i: [output] for i, output in enumerate(outputs)}


def test_the_stop_token_is_not_part_of_the_judged_text():
    tokenizer = Tokenizer.toy()
    tokens = tokenizer.encode(" so 4 .")
    end = tokenizer.eos_token_id
    assert spell(tokenizer, Output([*tokens, end], [], "stop")) == " so 4 ."
    assert spell(tokenizer, Output(tokens, [], "length")) == " so 4 ."


# ---- the cache in pages, and CUDA graphs -------------------------------------------------


@every_config
@pytest.mark.parametrize("page", [1, 3, 4, 19])
def test_outputs_do_not_depend_on_the_size_of_a_page(config, page):
    model = build(config)
    settings = dict(max_new_tokens=12, temperature=1.2, stop=(0, 7), seed=5, routes=config.is_moe)
    expected = generate(model, PROMPTS, **settings)
    assert_same(generate(model, PROMPTS, page=page, slots=4, **settings), expected)


@every_config
@pytest.mark.parametrize("cache_tokens", [26, 30, 48])
def test_where_the_cache_is_full_outputs_start_again_and_are_the_same(
    config, cache_tokens, monkeypatch
):
    model = build(config)
    settings = dict(max_new_tokens=12, temperature=1.2, stop=(0, 7), seed=5, routes=config.is_moe)
    expected = generate(model, PROMPTS, **settings)
    evicted, largest = [], []
    advance = sample.Slots.advance

    def watched(state):
        found = advance(state)
        evicted.extend(found)
        used = sum(map(len, state.pages.owned)) + len(state.pages.free)
        largest.append(state.pages.cache_MZYX.shape[1])
        assert used == largest[-1], "a page was lost, or has two owners"
        return found

    monkeypatch.setattr(sample.Slots, "advance", watched)
    got = generate(model, PROMPTS, page=2, slots=8, cache_tokens=cache_tokens, **settings)
    assert_same(got, expected)
    assert max(largest) * 2 <= cache_tokens
    assert evicted or cache_tokens == 48, "no output had to start again: nothing was tested"


def test_a_cache_too_small_for_one_output_is_refused(deepseek):
    with pytest.raises(ValueError, match="a cache of 6 tokens has no room for an output of 11"):
        generate(deepseek, [[1, 2, 3]], max_new_tokens=8, page=2, cache_tokens=6)


class Replayed(TorchDispatchMode):
    """A CUDA graph on the CPU: the operations of the first call with whatever the host had decided,
    the same tensors by address, and nothing of Python in between."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = ("_local_scalar_dense", "nonzero", "bincount", "repeat_interleave")
        assert not any(read in function.name() for read in reads), f"the host waits: {function}"
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        made = {}
        for function, args, kwargs, out in self.operations:
            args, kwargs = tree_map(lambda x: made.get(id(x), x), (args, kwargs))
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if old is not new:
                    made[id(old)] = new


@every_config
@pytest.mark.parametrize("page", [4, 64])
def test_a_step_can_be_captured_as_a_cuda_graph(config, page, monkeypatch):
    """The captured step reads nothing back, and works on tensors that stay in place."""
    replays = []

    def call(captured):
        if captured.graph is None:
            captured.graph = Replayed()
            with captured.graph:
                captured.function()
        else:
            replays.append(captured)
            captured.graph.replay()

    model = build(config)
    settings = dict(max_new_tokens=12, temperature=1.2, stop=(0, 7), seed=5, routes=config.is_moe)
    expected = generate(model, PROMPTS, **settings)
    on_gpu = sample.Pages.__init__

    def as_on_a_gpu(pages, *args):
        monkeypatch.setattr(sample.Pages, "fitting", lambda pages: 10**6)
        on_gpu(pages, *args)
        pages.on_gpu = True
        pages.cache_MZYX = model.new_cache(pages.most, pages.Y)
        pages.free = list(range(pages.slots, pages.most))

    monkeypatch.setattr(sample.Pages, "__init__", as_on_a_gpu)
    monkeypatch.setattr(sample.Captured, "__call__", call)
    assert_same(generate(model, PROMPTS, page=page, slots=4, **settings), expected)
    assert len(replays) > 20


def step_inputs(model: Transformer, rows: int, at: int) -> tuple[torch.Tensor, ...]:
    tokens_B = torch.arange(rows) % V
    return tokens_B, torch.full((rows,), at), model.new_cache(rows, 32).normal_()


@every_config
@torch.no_grad()
def test_a_recorded_step_equals_the_step_and_follows_the_weights(config, monkeypatch):
    model = build(config, dtype=torch.float32)
    monkeypatch.setattr(Recorded, "OFTEN", 8)
    recorded = Recorded.of(model, routes=config.is_moe)
    assert Recorded.of(model, routes=config.is_moe) is recorded
    for call in range(14):
        inputs = step_inputs(model, 4, at=call + 2)
        again = [x.clone() for x in inputs]
        for got, expected in zip(recorded(*inputs), recorded.step(*again), strict=True):
            assert torch.equal(got, expected)
        if call > 8:  # the optimizer changes weights in place
            model.lm_head.weight.mul_(1.1)
            model.model.layers[1].self_attn.o_proj.weight.mul_(1.1)
    [recording] = recorded.recordings.values()
    assert isinstance(recording, torch.jit.ScriptModule)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    assert Recorded.of(model, routes=config.is_moe) is not recorded, "it has the old weight"


@torch.no_grad()
def test_a_step_that_depends_on_its_data_is_not_played_back(deepseek, monkeypatch):
    monkeypatch.setattr(Recorded, "OFTEN", 8)

    class Fickle(Step):
        def forward(self, tokens_B, *rest):
            (logits_BV,) = super().forward(tokens_B, *rest)
            return (logits_BV * int(tokens_B.sum()),)

    recorded = Recorded(Fickle(deepseek, routes=False))
    for call in range(16):
        tokens_B, *rest = step_inputs(deepseek, 3, at=call)
        tokens_B += call % 5
        again = [x.clone() for x in rest]
        assert torch.equal(recorded(tokens_B, *rest)[0], recorded.step(tokens_B, *again)[0])
    assert list(recorded.recordings.values()) == [recorded.step]


# ---- prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 5, 256])
def test_each_prompt_is_prefilled_once_and_forgotten(deepseek, monkeypatch, slots):
    distinct = [[i % V] + [i // V] * (i % 4 + 1) for i in range(80)]
    assert len(set(map(tuple, distinct))) == 80
    prompts = [prompt for prompt in distinct for _ in range(3)] + distinct[:5]
    read, held = [], []
    prefill, fill = sample.prefill, sample.Queue.fill

    def counted_prefill(model, batch):
        read.extend(batch)
        return prefill(model, batch)

    def watched_fill(queue, state):
        fill(queue, state)
        held.append(len(queue.prefixes))

    monkeypatch.setattr(sample, "prefill", counted_prefill)
    monkeypatch.setattr(sample.Queue, "fill", watched_fill)
    generate(deepseek, prompts, max_new_tokens=2, seed=0, slots=slots)
    assert Counter(read) == Counter({tuple(prompt) for prompt in prompts})
    assert held[-1] == 0
    # 32 are read ahead, and the five that come back at the end are kept until then.
    assert max(held) <= 32 + 5, "prompts are read too far ahead"


def test_prefill_reads_prompts_of_any_lengths_together(deepseek):
    prompts = [tuple(prompt) for prompt in PROMPTS]
    for prompt, prefix in zip(prompts, sample.prefill(deepseek, prompts), strict=True):
        (alone,) = sample.prefill(deepseek, [prompt])
        assert prefix.cache_MSX.shape == (3, len(prompt), DEEPSEEK.cache_width)
        torch.testing.assert_close(prefix.cache_MSX, alone.cache_MSX, atol=1e-12, rtol=0)
        np.testing.assert_allclose(
            prefix.logits_V.detach().numpy(), logits_by_hand(deepseek, list(prompt)), atol=1e-12
        )
        assert torch.equal(prefix.routes_SMA, alone.routes_SMA)


def test_no_prompts_give_no_outputs(deepseek):
    assert generate(deepseek, [], max_new_tokens=3) == []


def test_a_prompt_may_fill_the_context_to_its_last_place(deepseek):
    (output,) = generate(deepseek, [[1] * 60], max_new_tokens=4)
    assert len(output.tokens) == 4
    with pytest.raises(ValueError, match="prompt 1 has 61 tokens.*60.*max_new_tokens=4.*64"):
        generate(deepseek, [[1], [1] * 61], max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt 2 has 0 tokens"):
        generate(deepseek, [[1], [2], []], max_new_tokens=4)


@pytest.mark.parametrize(
    "settings",
    [
        dict(max_new_tokens=0),
        dict(temperature=-0.1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(slots=0),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_with_their_value(deepseek, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        generate(deepseek, [[1]], **{"max_new_tokens": 4, **settings})


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_the_model_as_it_was_and_builds_no_graph(training):
    model = build(DEEPSEEK)
    model.train(training)
    seen = []
    generate(
        model, PROMPTS, max_new_tokens=3, slots=2,
        on_token=lambda i, token: seen.append(torch.is_grad_enabled()),
    )  # fmt: skip
    assert set(seen) == {False}
    assert model.training is training and model.model.layers[1].mlp.training is training
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), build(DEEPSEEK).state_dict().values())
    )


# ---- evaluation ------------------------------------------------------------------------


def output(tokens: int, finish: str = "stop") -> Output:
    return Output([0] * tokens, [0.0] * tokens, finish)


GOOD = "<think> 1 + 1 wait </think> <answer> 2 </answer>"
BAD = "<think> so </think> <answer> 3 </answer>"
OTHER = "<think> so </think> <answer> 5 </answer>"
CUT = "<think> so so so"


def test_r1_3_mean_of_one_problems_outputs_and_what_else_is_measured():
    problem = Problem("1 + 1", "2", level=4)
    group = judge_group(
        problem, [GOOD, BAD, GOOD, CUT], [output(10), output(4), output(12), output(6, "length")]
    )
    assert group == {
        "level": 4, "pass@1": 0.5, "cons": 1.0, "pass": 1.0, "format": 0.75, "language": 1.0,
        "tokens": 8.0, "reflection": 0.5, "truncated": 0.25, "unparsed": 0.25,
    }  # fmt: skip
    # The vote is for the wrong answer, then nothing is right, then nothing was said.
    four = [output(1)] * 4
    lost = judge_group(problem, [GOOD, BAD, BAD, CUT], four)
    assert (lost["pass@1"], lost["cons"], lost["pass"]) == (0.25, 0.0, 1.0)
    wrong = judge_group(problem, [OTHER, BAD, BAD, CUT], four)
    assert (wrong["pass@1"], wrong["cons"], wrong["pass"]) == (0.0, 0.0, 0.0)
    silent = judge_group(problem, [CUT] * 4, four)
    assert (silent["cons"], silent["unparsed"], silent["format"]) == (0.0, 1.0, 0.0)


def test_the_language_is_measured_against_that_of_the_question_also_where_it_was_cut_off():
    texts = ["<think> so 2 </think> <answer> 2 </answer>", "<think> so so so 猜"]
    outputs = [output(9), output(5, "length")]
    shares = {"en": (1 + 0.75) / 2, "zh": (0 + 0.25) / 2}
    for language, share in shares.items():
        group = judge_group(Problem("1 + 1", "2", language=language), texts, outputs)
        assert group["language"] == pytest.approx(share)


def test_the_vote_counts_equal_numbers_as_one_answer():
    texts = [f"<think> a </think> <answer> {a} </answer>" for a in ("0.5", "3", "1/2", "3", "0.50")]
    assert judge_group(Problem("", "1/2"), texts, [output(1)] * 5)["cons"] == 1.0


def test_countdown_votes_by_text_and_judges_by_value():
    texts = [
        f"<think> a </think> <answer> {a} </answer>"
        for a in ("(8-3)*4", "4*(8-3)", "8+4+3", "8+4+3")
    ]
    group = judge_group(Problem("", "20 from 3 4 8", "countdown"), texts, [output(1)] * 4)
    assert (group["pass@1"], group["cons"], group["pass"]) == (0.5, 0.0, 1.0)


def group_of(
    level: int, right: float, tokens: float, cons: float = 0.0, any_right: float = 1.0
) -> dict:
    rest = dict.fromkeys(("format", "reflection", "truncated", "unparsed"), 0.25)
    return {
        "level": level,
        "pass@1": right,
        "cons": cons,
        "pass": any_right,
        "tokens": tokens,
        **rest,
    }


GROUPS = [group_of(2, 1.0, 10, 1.0), group_of(3, 0.5, 20), group_of(2, 0.0, 60, any_right=0.0)]


def test_summarize_takes_means_over_problems_and_the_interval_of_pass_at_1():
    result = summarize(GROUPS, 16, skipped=2)
    assert result["interval"] == [0.0, 1.0]  # a share is never outside
    half = 1.96 * 0.1 / math.sqrt(3)  # the deviation of 0.6, 0.5 and 0.4 is 0.1
    close = [{**group, "pass@1": share} for group, share in zip(GROUPS, (0.6, 0.5, 0.4))]
    assert summarize(close, 16)["interval"] == pytest.approx([0.5 - half, 0.5 + half])
    assert result["pass@1"] == 0.5
    assert result["cons@16"] == pytest.approx(1 / 3)
    assert result["pass@16"] == pytest.approx(2 / 3)
    assert (result["tokens"], result["format"]) == (30, 0.25)
    assert (result["problems"], result["samples"], result["skipped"]) == (3, 16, 2)
    assert list(result["by_level"]) == ["2", "3"]
    assert result["by_level"]["2"] == {"pass@1": 0.5, "tokens": 35}
    assert result["by_level"]["3"] == {"pass@1": 0.5, "tokens": 20}
    assert json.loads(json.dumps(result)) == result


def test_levels_are_listed_in_the_order_of_their_numbers():
    groups = [group_of(level, 0.5, 1) for level in (10, 9, 2)]
    assert list(summarize(groups, 1)["by_level"]) == ["2", "9", "10"]


def test_one_problem_has_no_spread():
    result = summarize(GROUPS[1:2], 4)
    assert result["interval"] == [0.5, 0.5]


def test_table_sets_evaluations_beside_each_other():
    other = [{**group, "pass@1": 0.875, "tokens": 7.0} for group in GROUPS]
    text = table(
        {"base": summarize(GROUPS, 16, skipped=2), "zero": summarize(other, 16, skipped=2)}
    )
    rows = {line.rpartition("   ")[0]: line.split() for line in text.splitlines()}
    lines = text.splitlines()
    assert lines[0] == "3 problems x 16 samples (2 skipped: the prompt is too long)"
    assert lines[1].split() == ["base", "zero"]
    assert ["pass@1", "0.500", "0.875"] in rows.values()
    assert ["cons@16", "0.333", "0.333"] in rows.values()
    assert ["level", "3", "pass@1", "0.500", "0.875"] in rows.values()
    assert ["to", "1.000", "0.875"] in rows.values()
    assert len({len(line) for line in lines[1:]}) == 1, "the columns are not aligned"
    assert "skipped" not in table({"base": summarize(GROUPS, 16)})


def test_evaluate_gives_each_problem_its_own_outputs(monkeypatch):
    """With `generate` replaced: the k-th output of problem i answers i + 1 when k < i, else -1."""
    tokenizer = Tokenizer.toy()
    problems = [Problem(f"compute {i} a +1 ?", f"{i + 1}", level=i) for i in range(4)]
    problems.insert(2, Problem("compute " + "1 a +1 " * 400 + "?", "1"))  # does not fit
    config = Config.preset("toy", num_hidden_layers=1, max_position_embeddings=1024)
    asked = {}

    def fake(model, prompts, *, rows, max_new_tokens, stop, on_finish, **settings):
        asked.update(
            settings, prompts=[tokenizer.decode(prompt) for prompt in prompts], rows=rows, stop=stop
        )
        outputs = []
        for n, text in enumerate(asked["prompts"]):
            start, k = int(text.split()[2]), n % 4
            answer = start + 1 if k < start else -1
            tokens = tokenizer.encode(f" <think> so </think> <answer> {answer} </answer>")
            outputs.append(Output([*tokens, tokenizer.eos_token_id], [], "stop"))
            on_finish(n, outputs[-1])
        return outputs

    monkeypatch.setattr(sample, "generate", fake)
    result = evaluate(
        Transformer(config),
        tokenizer,
        problems,
        samples=4,
        max_new_tokens=100,
        temperature=0.7,
        top_p=0.8,
        seed=3,
    )
    assert asked["prompts"][4] == "User: compute 1 a +1 ? Assistant:"
    assert (asked["temperature"], asked["top_p"], asked["seed"]) == (0.7, 0.8, 3)
    assert tuple(asked["stop"]) == (tokenizer.eos_token_id,)
    # A problem's streams are its own, whether or not another one was skipped.
    assert list(asked["rows"]) == [*range(8), *range(12, 20)]
    assert result["by_level"]["0"]["pass@1"] == 0 and result["by_level"]["3"]["pass@1"] == 0.75
    assert result["pass@1"] == (0 + 0.25 + 0.5 + 0.75) / 4
    assert result["pass@4"] == 0.75 and result["format"] == 1
    assert result["cons@4"] == 0.5  # a tie of 2 to 2 goes to the earliest answer, which is right
    assert (result["problems"], result["skipped"]) == (4, 1)


def test_evaluate_explains_why_no_problem_can_be_asked(deepseek):
    tokenizer = Tokenizer.toy()
    problem = Problem("compute 1 a +1 ?", "2")
    with pytest.raises(
        UserError, match="none of 1 problems fits: the shortest prompt has 9.* 4 fit"
    ):
        evaluate(deepseek, tokenizer, [problem], samples=2, max_new_tokens=60)
    with pytest.raises(UserError, match="no problems|0 problems"):
        evaluate(deepseek, tokenizer, [], samples=2, max_new_tokens=4)
    with pytest.raises(UserError, match="samples=0|0 samples"):
        evaluate(deepseek, tokenizer, [problem], samples=0, max_new_tokens=4)


# ---- the command -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "model"
    tokenizer = Tokenizer.toy()
    config = replace(
        DEEPSEEK, vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=2,
        max_position_embeddings=128,
    )  # fmt: skip
    save_pretrained(build(config, dtype=torch.float32), path, tokenizer_files=tokenizer.files())
    return path


def command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "sample.py", *arguments], cwd=ROOT, input=stdin, text=True,
        capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def in_process(*arguments: str) -> int:
    """The same without a new process; the exit code."""
    try:
        launch(sample.main, parse(sample.Config, {}, arguments), user_errors=(ValueError,))
    except SystemExit as error:
        return error.code
    return 0


def test_the_command_answers_a_prompt(directory):
    done = command(
        "--model", str(directory), "--prompt", "compute 7 a +5 ?", "--max-new-tokens", "8",
        "--temperature", "1", "--top-p", "1", "--seed", "3", "--device", "cpu", "--threads", "1",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    tokenizer = Tokenizer.toy()
    prompt = tokenizer.encode("User: compute 7 a +5 ? Assistant:")
    (expected,) = generate(
        load_pretrained(directory),
        [prompt],
        max_new_tokens=8,
        stop=(tokenizer.eos_token_id,),
        seed=3,
    )
    assert done.stdout == spell(tokenizer, expected) + "\n"
    assert "\x1b" not in done.stdout, "colours in a pipe"


def test_the_command_evaluates_a_file(directory, tmp_path, capsys):
    file = tmp_path / "test.jsonl"
    rows = [
        dict(question=f"compute {i} a +5 ?", answer=str((i + 5) % 10), level=1) for i in range(5)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--model", str(directory), "--data", str(file), "--samples", "3",
                "--max-new-tokens", "6", "--device", "cpu"]  # fmt: skip
    assert in_process(*settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 problems x 3 samples"  # all of a test file, none kept from training
    assert [line.split()[0] for line in lines if "@" in line] == [
        "pass@1",
        "cons@3",
        "pass@3",
        "level",
    ]
    assert in_process(*settings, "--slots", "2") == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert in_process(*settings, "--data", "calc-chain", "--limit", "4") == 0
    assert capsys.readouterr().out.startswith("4 problems x 3 samples")


def test_the_command_chats_until_an_empty_line_or_the_end_of_the_input(
    directory, monkeypatch, capsys
):
    settings = ["--model", str(directory), "--max-new-tokens", "3", "--device", "cpu"]
    for typed in ("compute 1 a +1 ?\n\nnever read\n", "compute 1 a +1 ?\n"):  # the second: Ctrl-D
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert in_process(*settings) == 0
        assert capsys.readouterr().out.count(">") == 2


def test_a_missing_model_ends_with_one_line_and_code_2(tmp_path):
    done = command("--model", str(tmp_path / "nowhere"), "--prompt", "x", "--device", "cpu")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no model at") and "nowhere" in line


CALC_CHAIN = ["--data", "calc-chain", "--max-new-tokens", "8"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--temprature", "1"], ["--temprature", "did you mean --temperature?"]),
        (["--max-new-tokens", "many"], ["'many' is not a whole number"]),
        (["--max-new-tokens", "0", "--prompt", "x"], ["max_new_tokens=0"]),
        (["--max-new-tokens", "500", "--prompt", "x"], ["500", "128"]),
        (["--data", "calc-chian"], ["calc-chian", "calc-chain"]),
        ([*CALC_CHAIN, "--samples", "0"], ["samples"]),
        ([*CALC_CHAIN, "--limit", "0"], ["limit"]),
        ([*CALC_CHAIN, "--slots", "0"], ["slots"]),
        (["--template", "zero", "--prompt", "x"], ["'zero'", "r1-zero"]),
    ],
    ids=str,
)
def test_a_users_mistake_ends_with_one_line_and_code_2(directory, capsys, arguments, words):
    assert in_process("--model", str(directory), "--device", "cpu", *arguments) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert len(progress) <= 1 and "error" in line and all(word in line for word in words)
