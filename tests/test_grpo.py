"""grpo.py: the equations against hand-made numbers, the update against REINFORCE and enumeration.

The models are tiny and in float64, so that "equal" means 1e-12. The tests with two processes start
them with gloo on this machine.
"""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import grpo
from data.problems import Problem
from grpo import (
    Questions,
    Rollout,
    Settings,
    describe,
    group_advantages,
    grpo_loss,
    importance_ratio,
    kl_estimate,
    lay_out,
    reference_logprobs,
    reward_outputs,
    rollout,
    shown,
    step,
    token_weights,
)  # fmt: skip
from data.tokenizer import Tokenizer
from model import Config, Transformer
from runtime import parallel
from sample import Output

LETTERS = "$abcdefgh"  # token i is the i-th letter; $ ends an output, and 0 is what pads a row too
TOKENIZER = SimpleNamespace(
    stop_ids=(0,),
    template="toy",
    tags=True,
    decode=lambda tokens: "".join(LETTERS[token] for token in tokens),
)
MOE = Config.preset(
    "toy", vocab_size=len(LETTERS), hidden_size=12, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, max_position_embeddings=64,
)  # fmt: skip
DENSE = replace(MOE, n_routed_experts=None, num_hidden_layers=1)
# No clipping of the norm, which would hide a wrong scale.
SETTINGS = Settings(
    group_size=3, max_new_tokens=6, row_tokens=16, micro_tokens=32, max_grad_norm=math.inf
)
FREE = dict(beta=0.0)  # the policy gradient alone


def make_model(config: Config = MOE, seed: int = 0) -> Transformer:
    """Random enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    model = Transformer(config).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
    return model


def problem(question: str = "abc", answer: str = "1", level: int = 0) -> Problem:
    return Problem(question, answer, level=level)


def letters(text: str) -> float:
    return text.count("a") + 0.5 * text.count("b")


def count_letters(problems: list[Problem], texts: list[str], finished: list[bool]) -> list[float]:
    return [letters(text) for text in texts]


def draw(model: Transformer, settings: Settings = SETTINGS, numbers=range(4), **options) -> Rollout:
    """A rollout on questions of 1, 2, 3, ... tokens, rewarded by the letters in the output."""
    prompts = [[1 + (n + i) % 8 for i in range(n + 1)] for n in numbers]
    problems = [problem(level=n) for n in numbers]
    options = {"seed": 0, "step": 0, **options}
    questions = Questions(list(numbers), problems, prompts)
    return rollout(model, TOKENIZER, questions, count_letters, settings, **options)


def handmade(model: Transformer, prompts: list, groups: list, rewards: list, **changes) -> Rollout:
    """A rollout of outputs that are given: token lists, one that ends in $ has stopped. The stored
    log-probs are the model's, from one plain forward for each output."""
    outputs = [
        Output(tokens, plain_logprobs(model, prompt, tokens).tolist(),
               "stop" if tokens[-1] == 0 else "length")
        for prompt, group in zip(prompts, groups) for tokens in group
    ]  # fmt: skip
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    P = len(prompts)
    texts = [TOKENIZER.decode(output.tokens) for output in outputs]
    batch = Rollout(
        list(range(P)), [problem()] * P, prompts, outputs, texts, rewards_PG,
        group_advantages(rewards_PG),
    )  # fmt: skip
    return replace(batch, **changes)


def plain_logprobs(model, prompt: list[int], tokens: list[int], temperature=1.0) -> Tensor:
    """One unpacked row, the whole log-softmax."""
    logits_TV = model(torch.tensor([prompt + tokens]))[0] / temperature
    logprobs_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs_TV[torch.arange(len(tokens)), torch.tensor(tokens)]


def flat(model: Transformer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model: Transformer, batch: Rollout, settings: Settings, *place) -> Tensor:
    """What `step` descends along: the parameters' change under SGD with lr 1."""
    moved = copy.deepcopy(model)
    step(moved, torch.optim.SGD(moved.parameters(), lr=1.0), batch, settings, *place)
    return flat(model) - flat(moved)


def autograd(loss: Tensor, model: Transformer) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([
        (torch.zeros_like(p) if g is None else g).flatten()
        for g, p in zip(found, model.parameters())
    ])  # fmt: skip


def prompt_of(batch: Rollout, o: int) -> list[int]:
    return batch.prompts[o // batch.rewards_PG.shape[1]]


# --- R1 Eq. 3: advantages


def test_eq_3_advantages_by_hand_with_ddof_0():
    rewards_PG = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [3, 1, 2, 2]], dtype=torch.float64)
    # Row 1: mean 1/4, std sqrt(3)/4 (with ddof 1 it would be 1/2).
    wanted = [
        [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)],
        [1, 1, -1, -1],
        [2**0.5, -(2**0.5), 0, 0],
    ]
    advantages_PG = group_advantages(rewards_PG)
    torch.testing.assert_close(
        advantages_PG, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1.2, -3.3])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_that_agrees_has_no_advantages(value, size, dtype):
    # The mean of seven 0.1 is not 0.1 in floating point, nor their std 0.
    advantages_PG = group_advantages(torch.full((2, size), value, dtype=dtype))
    assert torch.equal(advantages_PG, torch.zeros(2, size, dtype=dtype))


def test_rounding_is_no_disagreement():
    values = [0.1 + 0.2, 0.3, 0.3, 0.3]
    assert values[0] != values[1]
    advantages_PG = group_advantages(torch.tensor([values], dtype=torch.float64))
    assert torch.equal(advantages_PG, torch.zeros(1, 4, dtype=torch.float64))


def test_a_small_difference_of_rewards_is_a_signal():
    advantages_PG = group_advantages(torch.tensor([[1.0, 1.0 + 1e-4]], dtype=torch.float64))
    torch.testing.assert_close(advantages_PG, torch.tensor([[-1.0, 1.0]], dtype=torch.float64))


def test_dr_grpo_3_2_advantage_is_not_divided_by_std():
    advantages_PG = group_advantages(torch.tensor([[1.0, 0, 0, 0], [5, 5, 5, 5]]), False)
    assert advantages_PG.tolist() == [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]]


def test_advantages_are_of_the_group_and_not_of_the_batch():
    group = torch.tensor([[1.0, 0, 0, 1]], dtype=torch.float64)
    alone = group_advantages(group)
    among = group_advantages(torch.cat([torch.full((1, 4), 9.0), group, 100 * group + 7]))
    torch.testing.assert_close(among[1:2], alone)
    torch.testing.assert_close(among[2:3], alone)  # neither scale nor offset matters


def test_two_questions_with_the_same_prompt_stay_two_groups():
    batch = rollout(
        make_model(), TOKENIZER, Questions([0, 1], [problem(), problem()], [[1, 2], [1, 2]]),
        lambda problems, texts, finished: [float(i) for i in range(len(texts))], SETTINGS, seed=0,
        step=0,
    )  # fmt: skip
    assert batch.rewards_PG.tolist() == [[0, 1, 2], [3, 4, 5]]
    edge = 1.5**0.5
    torch.testing.assert_close(
        batch.advantages_PG, torch.tensor([[-edge, 0, edge]] * 2, dtype=torch.float64)
    )
    first, second = batch.outputs[:3], batch.outputs[3:]
    assert [o.tokens for o in first] != [o.tokens for o in second]


# --- R1 Eq. 1: the clipped objective


def objective(ratio: float, advantage: float, **options) -> tuple[float, float, float]:
    """J of one token, its gradient by that token's log-prob, and whether it was counted as cut."""
    old = torch.tensor([-1.3], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    options = {"eps": 0.2, "beta": 0.0, **options}
    loss, stats = grpo_loss(new, old, None, advantage * one, one, torch.tensor([0]), **options)
    loss.backward()
    return -loss.item(), -new.grad.item(), stats["clip_fraction"].item()


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (0.5, -1, -0.8, 0),  # it is improbable enough already
        (2.0, -1, -2.0, -2),  # min, and not max: a bad token that became likelier
        (2.0, +1, +1.2, 0),  # it is probable enough already
        (0.5, +1, +0.5, 0.5),  # min: a good token that became less likely
        (1.1, +1, +1.1, 1.1),
        (1.1, -1, -1.1, -1.1),
        (0.9, +3, +2.7, 2.7),
        (0.9, -3, -2.7, -2.7),
        (1.0, +1, +1.0, 1),  # on-policy: min of two equals has the whole gradient
        (1.0, -1, -1.0, -1),
        (2.0, 0, 0, 0),
    ],
)
def test_eq_1_clip_truth_table_at_eps_0_2(ratio, advantage, value, slope):
    found_value, found_slope, cut = objective(ratio, advantage)
    assert found_value == pytest.approx(value, abs=1e-12)
    assert found_slope == pytest.approx(slope, abs=1e-12)
    assert cut == (slope == 0 and advantage != 0)


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [(1.25, 1, 1.25, 1.25), (1.5, 1, 1.28, 0), (0.5, -1, -0.8, 0), (0.75, -1, -0.8, 0)],
)
def test_clip_higher_widens_the_upper_bound_only(ratio, advantage, value, slope):
    found = objective(ratio, advantage, eps_high=0.28)
    assert found[:2] == pytest.approx((value, slope), abs=1e-12)


@pytest.mark.parametrize("ratio", [1e-3, 0.5, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("advantage", [-1.0, 2.0])
def test_an_infinite_eps_never_clips(ratio, advantage):
    value, slope, cut = objective(ratio, advantage, eps=math.inf)
    assert (value, slope) == pytest.approx((ratio * advantage, ratio * advantage))
    assert cut == 0


def test_eps_10_clips_above_11_and_never_below():
    assert objective(12, 1, eps=10.0) == pytest.approx((11, 0, 1))
    assert objective(1e-6, -1, eps=10.0) == pytest.approx((-1e-6, -1e-6, 0))


# --- R1 Eq. 2: the KL to the reference

KL_PAIRS = [
    ((0.5, 0.5), (0.99, 0.01), 1.614),
    ((0.2, 0.3, 0.5), (0.6, 0.3, 0.1), 0.585),
    ((0.25, 0.75), (0.25, 0.75), 0.0),
]


@pytest.mark.parametrize("policy, reference, about", KL_PAIRS)
def test_eq_2_the_estimates_expectation_is_the_exact_kl(policy, reference, about):
    pi, ref = (torch.tensor(p, dtype=torch.float64) for p in (policy, reference))
    exact = sum(p * math.log(p / q) for p, q in zip(policy, reference))
    assert exact == pytest.approx(about, abs=1e-3)
    assert (pi * kl_estimate(pi.log(), ref.log())).sum().item() == pytest.approx(exact, abs=1e-12)


def test_eq_2_by_hand_and_never_negative():
    # pi_ref / pi = 1/2: 1/2 - log(1/2) - 1, and for 2: 2 - log 2 - 1
    found = kl_estimate(torch.tensor([0.5, 0.2]).log(), torch.tensor([0.25, 0.4]).log())
    assert found.tolist() == pytest.approx([math.log(2) - 0.5, 1 - math.log(2)])
    grid = torch.linspace(-8, -0.01, 200, dtype=torch.float64)
    estimates = kl_estimate(grid[:, None], grid[None, :])
    assert estimates.min() >= 0
    assert torch.equal(estimates.diagonal(), torch.zeros_like(grid))


@pytest.mark.parametrize("policy, reference, about", KL_PAIRS[:2])
def test_as_a_loss_on_policy_the_estimate_has_the_gradient_of_the_reverse_kl(
    policy, reference, about
):
    """Its value is KL(pi || ref), its gradient that of KL(ref || pi): samples of pi are drawn, and
    what is differentiated is the estimate alone."""
    ref = torch.tensor(reference, dtype=torch.float64)
    theta = torch.tensor(policy, dtype=torch.float64).log().requires_grad_()
    logprobs = theta.log_softmax(0)
    estimate = (logprobs.exp().detach() * kl_estimate(logprobs, ref.log())).sum()
    found = torch.autograd.grad(estimate, theta)[0]
    ref_pi = (ref * (ref.log() - theta.log_softmax(0))).sum()
    pi_ref = (theta.softmax(0) * (theta.log_softmax(0) - ref.log())).sum()
    torch.testing.assert_close(found, torch.autograd.grad(ref_pi, theta)[0], rtol=0, atol=1e-12)
    assert (found - torch.autograd.grad(pi_ref, theta)[0]).abs().max() > 0.01


# --- DeepSeekMath Eq. 3: the whole loss, against plain loops


def loss_by_loops(
    groups: list[list[dict]], *, eps, eps_high, beta, ratio, aggregation, longest
) -> float:
    """As printed, over groups, outputs, tokens. An output: its A, and lists new, old, ref."""
    total = 0.0
    all_tokens = sum(len(output["new"]) for group in groups for output in group)
    for group in groups:
        for output in group:
            A, n = output["A"], len(output["new"])
            whole = math.exp(sum(output["new"]) - sum(output["old"]))
            inner = 0.0
            for new, old, ref in zip(output["new"], output["old"], output["ref"]):
                rho = whole if ratio == "sequence" else math.exp(new - old)
                clipped = min(max(rho, 1 - eps), 1 + eps_high)
                kl = math.exp(ref - new) - (ref - new) - 1
                inner += min(rho * A, clipped * A) - beta * kl
            if aggregation == "output":
                total += inner / n / len(group) / len(groups)
            elif aggregation == "token":
                total += inner / all_tokens
            else:
                total += inner / longest / len(group) / len(groups)
    return -total


def random_groups(seed: int = 0) -> list[list[dict]]:
    rng = torch.Generator().manual_seed(seed)

    def numbers(n: int, low: float, high: float) -> list[float]:
        values = torch.rand(n, generator=rng, dtype=torch.float64)
        return (low + (high - low) * values).tolist()

    groups = []
    for lengths in ((3, 1, 7), (2, 9, 4)):
        group = []
        for n in lengths:
            old = numbers(n, -3, -0.1)
            new = [a + b for a, b in zip(old, numbers(n, -0.5, 0.5))]
            group.append(dict(A=numbers(1, -2, 2)[0], old=old, new=new, ref=numbers(n, -3, -0.1)))
        groups.append(group)
    return groups


LOSSES = [
    dict(),
    dict(beta=0.0),
    dict(beta=0.7, eps=0.05),
    dict(eps_high=0.4),
    dict(aggregation="token"),
    dict(aggregation="constant"),
    dict(ratio="sequence"),
    dict(ratio="sequence", aggregation="token", eps=0.5, eps_high=0.5),
]


@pytest.mark.parametrize("changes", LOSSES, ids=lambda c: " ".join(map(str, c.values())) or "paper")
def test_deepseekmath_eq_3_dapo_eq_8_and_dr_grpo_3_2_constant_against_plain_loops(changes):
    options = dict(eps=0.2, eps_high=None, beta=0.04, ratio="token")
    options |= {key: value for key, value in changes.items() if key != "aggregation"}
    aggregation = changes.get("aggregation", "output")
    groups = random_groups()
    upper = options["eps"] if options["eps_high"] is None else options["eps_high"]
    wanted = loss_by_loops(
        groups, **{**options, "eps_high": upper}, aggregation=aggregation, longest=11
    )
    outputs = [output for group in groups for output in group]
    lengths = [len(output["new"]) for output in outputs]
    lengths_O = torch.tensor(lengths, dtype=torch.float64)
    weights_O = token_weights(
        lengths_O, aggregation, outputs=len(outputs), tokens=sum(lengths), longest=11
    )
    output_N = torch.repeat_interleave(torch.arange(len(outputs)), torch.tensor(lengths))

    def end_to_end(key: str) -> Tensor:
        return torch.tensor([x for output in outputs for x in output[key]], dtype=torch.float64)

    A_O = torch.tensor([output["A"] for output in outputs], dtype=torch.float64)
    new_N = end_to_end("new").requires_grad_()
    loss, _ = grpo_loss(
        new_N, end_to_end("old"), end_to_end("ref"), A_O[output_N], weights_O[output_N], output_N,
        **options,
    )  # fmt: skip
    assert loss.item() == pytest.approx(wanted, abs=1e-13)
    loss.backward()
    for n in range(len(new_N)):  # and its gradient, by central differences of the loops
        o, t = int(output_N[n]), int(n - sum(lengths[: output_N[n]]))
        slopes = []
        for h in (1e-6, -1e-6):
            moved = copy.deepcopy(groups)
            [output for group in moved for output in group][o]["new"][t] += h
            slopes.append(loss_by_loops(
                moved, **{**options, "eps_high": upper}, aggregation=aggregation, longest=11
            ))  # fmt: skip
        assert new_N.grad[n].item() == pytest.approx((slopes[0] - slopes[1]) / 2e-6, abs=1e-8)


def test_unknown_variants_are_refused_by_name():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="'sample'.*output, token or constant"):
        token_weights(one, "sample", outputs=1, tokens=1, longest=1)
    with pytest.raises(ValueError, match="'word'.*token or sequence"):
        importance_ratio(one, one, torch.tensor([0]), "word")


@pytest.mark.parametrize(
    "changes", [dict(top_p=0.95), dict(group_size=1), dict(temperature=0.0), dict(eps=0.0),
                dict(beta=-0.1), dict(eps_high=-2.0), dict(repetition_penalty=-0.5),
                dict(overlong_buffer=-1), dict(overlong_buffer=40_000)]
)  # fmt: skip
def test_settings_refuse_what_makes_the_update_wrong(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Settings(**changes)


# --- rollout: the same batch however it is spread, and what is told about it


def test_a_rollout_in_two_shares_is_the_rollout_in_one():
    model = make_model()
    whole = draw(model)
    shares = {0: draw(model, numbers=[0, 2]), 1: draw(model, numbers=[1, 3])}
    for number in range(4):
        share = shares[number % 2]
        p = share.numbers.index(number)
        for i in range(3):
            here, there = whole.outputs[number * 3 + i], share.outputs[p * 3 + i]
            assert (here.tokens, here.finish) == (there.tokens, there.finish)
            assert here.logprobs == pytest.approx(there.logprobs, abs=1e-12)
        assert torch.equal(whole.rewards_PG[number], share.rewards_PG[p])
        assert torch.equal(whole.advantages_PG[number], share.advantages_PG[p])
    assert len({tuple(output.tokens) for output in whole.outputs}) > 8  # they are not all alike


def test_each_step_and_each_seed_draws_other_outputs():
    model = make_model()
    batches = [draw(model), draw(model, step=1), draw(model, seed=1)]
    tokens = [[output.tokens for output in batch.outputs] for batch in batches]
    assert tokens[0] != tokens[1] and tokens[0] != tokens[2] and tokens[1] != tokens[2]
    assert tokens[0] == [output.tokens for output in draw(model).outputs]


def test_a_rollout_follows_its_settings():
    batch = draw(make_model(), replace(SETTINGS, normalize_std=False, max_new_tokens=4))
    centred_PG = batch.rewards_PG - batch.rewards_PG.mean(1, keepdim=True)
    torch.testing.assert_close(batch.advantages_PG, centred_PG)
    assert {len(o.tokens) for o in batch.outputs if o.finish == "length"} == {4}
    assert all(o.finish == ("stop" if o.tokens[-1] == 0 else "length") for o in batch.outputs)
    rewards = [letters(text) for text in batch.texts]
    assert batch.rewards_PG.flatten().tolist() == rewards
    assert not any("$" in text for text in batch.texts)  # the stop token is not judged


def test_the_reward_is_told_of_each_output_its_question_its_text_and_whether_it_ended_by_itself():
    calls = []
    problems = [problem("one"), problem("two")]

    def reward(*told) -> list[float]:
        calls.append(told)
        return [0.0] * len(told[0])

    batch = rollout(
        make_model(), TOKENIZER, Questions([0, 1], problems, [[1, 2], [3]]), reward, SETTINGS,
        seed=0, step=0,
    )  # fmt: skip
    [(asked, texts, finished)] = calls  # once for the whole batch
    assert [each.question for each in asked] == ["one"] * 3 + ["two"] * 3
    assert texts == batch.texts and len(set(texts)) > 3
    assert finished == [output.finish == "stop" for output in batch.outputs]
    assert set(finished) == {True, False}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_stored_logprobs_are_those_of_the_distribution_drawn_from(temperature):
    settings = replace(SETTINGS, temperature=temperature)
    model = make_model()
    batch = draw(model, settings)
    for o, output in enumerate(batch.outputs):
        wanted = plain_logprobs(model, prompt_of(batch, o), output.tokens, temperature)
        assert output.logprobs == pytest.approx(wanted.tolist(), abs=1e-10)
    stats = step(model, torch.optim.SGD(model.parameters(), lr=0), batch, replace(settings, **FREE))
    assert stats["mismatch"] < 1e-10


RIGHT = "<think> wait, 2 </think> <answer> 2 </answer>"
WRONG = "<think> x </think> <answer> 3 </answer>"
BARE = "the answer is 2"


def test_metrics_by_hand():
    def output(length: int, finish: str) -> Output:
        return Output([1] * length, [0.0] * length, finish)

    problems = [problem(answer="2", level=3), problem(answer="2", level=5),
                problem(answer="3", level=3)]  # fmt: skip
    problems[1] = replace(problems[1], language="zh")
    texts = [RIGHT, WRONG, BARE, RIGHT, WRONG, RIGHT]  # the second RIGHT was cut off: no answer
    outputs = [output(4, "stop"), output(6, "stop"), output(9, "length"), output(9, "length"),
               output(1, "stop"), output(1, "stop")]  # fmt: skip
    rewards_PG = torch.tensor([[1.0, 0.2], [0.0, 0.0], [1.2, 0.2]], dtype=torch.float64)
    batch = Rollout(
        [0, 1, 2], problems, [[1]] * 3, outputs, texts, rewards_PG, group_advantages(rewards_PG)
    )
    describe(batch)
    metrics = batch.metrics
    assert metrics.pop("by_level") == {"3": 2 / 4, "5": 0.0}
    assert metrics == pytest.approx(dict(
        reward=2.6 / 6,
        accuracy=2 / 6,  # right for its own question: a rule, whatever the reward was
        format=4 / 6,
        unparsed=2 / 6,
        truncated=2 / 6,
        tokens=30 / 6,
        language=4 / 6,  # the English words about the Chinese question are not
        reflection=3 / 6,
        groups_without_signal=1 / 3,
    ))  # fmt: skip


def test_what_is_shown_of_a_rollout_is_what_was_drawn_and_paid():
    tokenizer = Tokenizer.toy()
    tokens = tokenizer.encode("so 3 .")
    outputs = [Output([*tokens, tokenizer.end_id], [-0.12345] * (len(tokens) + 1), "stop"),
               Output(tokens, [-1.0] * len(tokens), "length")] * 2  # fmt: skip
    texts = [tokenizer.decode(tokens)] * 4
    rewards_PG = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    problems = [problem(question="1 + 2 ?", answer="3", level=1)] * 2
    batch = Rollout(
        [0, 7], problems, [[1]] * 2, outputs, texts, rewards_PG, group_advantages(rewards_PG)
    )
    batch.ref_logprobs = [torch.full((len(output.tokens),), -2.0) for output in outputs]
    (group,) = shown(batch, tokenizer, 7)  # number 7 is beyond the first seven
    assert group.items() >= dict(question="1 + 2 ?", answer="3", checker="math", level=1).items()
    first, second = group["outputs"]
    assert (first["reward"], first["advantage"], first["finished"]) == (1.0, 1.0, True)
    assert (second["reward"], second["advantage"], second["finished"]) == (0.0, -1.0, False)
    assert "".join(second["tokens"]) == second["text"] == texts[0]
    assert len(first["tokens"]) == len(first["logprobs"]) == len(first["ref_logprobs"])
    assert set(first["logprobs"]) == {-0.123} and set(first["ref_logprobs"]) == {-2.0}
    assert "right" not in first  # it has not been judged
    assert shown(batch, tokenizer, 0) == []


def test_what_is_shown_has_the_verdict_that_was_reached_when_it_was_paid():
    """So that nobody has to run a program again, or to guess what an older rule had said."""
    tokenizer = Tokenizer.toy()
    written = [tokenizer.encode(f"<answer> {n} </answer>") for n in (3, 4, 3)]
    ends = ["stop", "stop", "length"]
    outputs = [Output([*w, tokenizer.end_id] if end == "stop" else w, [-1.0] * 9, end)
               for w, end in zip(written, ends)]  # fmt: skip
    texts = [tokenizer.decode(tokens) for tokens in written]
    problems = [problem(answer="3"), replace(problem(answer=""), checker="judge")]
    batch = Rollout([0, 1], problems, [[1]] * 2, outputs * 2, texts * 2)
    settings = Settings(group_size=3, max_new_tokens=20)
    reward_outputs(batch, lambda problems, *outputs: [0.0] * len(problems), settings)
    rows = [[row["right"] for row in group["outputs"]] for group in shown(batch, tokenizer, 2)]
    assert rows == [[True, False, False], [None] * 3]


def test_shaping_is_added_to_any_output_and_told_only_where_it_is_on():
    def outputs_of(*lengths) -> list[Output]:
        return [Output([1] * n, [0.0] * n, "length" if n == 20 else "stop") for n in lengths]

    def shaped(**changes) -> Rollout:
        texts = [RIGHT, WRONG, "wait a bit , " * 30, BARE]
        outputs, problems = outputs_of(4, 12, 20, 16), [problem(answer="2"), problem(answer="3")]
        batch = Rollout([0, 1], problems, [[1]] * 2, outputs, texts)
        settings = Settings(group_size=2, max_new_tokens=20, **changes)
        reward_outputs(batch, lambda problems, texts, ended: [2.0, 0.1, 0.0, 0.7], settings)
        return batch

    plain = shaped()
    assert plain.rewards_PG.tolist() == [[2.0, 0.1], [0.0, 0.7]]
    assert not {"repetition", "overlong"} & set(plain.metrics)
    # Ten of 20 tokens are the buffer: 12 are 2 too many, 16 are 6, and the one cut off has all 20.
    overlong = shaped(overlong_buffer=10)
    assert overlong.rewards_PG.flatten().tolist() == pytest.approx(
        [2.0, 0.1 - 0.2, -1.0, 0.7 - 0.6]
    )
    assert overlong.metrics["overlong"] == pytest.approx(-1.8 / 4)
    assert overlong.metrics["reward"] == pytest.approx(1.0 / 4)
    assert "repetition" not in overlong.metrics
    # 120 words, 111 runs of ten, of which four are new.
    both = shaped(overlong_buffer=10, repetition_penalty=0.5)
    repeats = -0.5 * 107 / 111
    assert both.rewards_PG[1].tolist() == pytest.approx([-1.0 + repeats, 0.7 - 0.6])
    assert both.metrics["repetition"] == pytest.approx(repeats / 4)


def test_a_group_that_differs_by_rounding_only_has_no_signal():
    rewards_PG = torch.tensor([[0.1 + 0.2, 0.3]], dtype=torch.float64)
    outputs = [Output([1], [0.0], "stop")] * 2
    batch = Rollout(
        [0], [problem()], [[1]], outputs, [BARE] * 2, rewards_PG, group_advantages(rewards_PG)
    )
    describe(batch)
    assert batch.metrics["groups_without_signal"] == 1 and batch.lengths.keys() == set(
        batch.numbers
    )


# --- the layout


CPU = torch.device("cpu")


def four_outputs() -> Rollout:
    """Of two questions; one has the EOS's number in its prompt, and two outputs are short."""
    groups = [[[4, 4, 4, 0], [0]], [[6, 7], [1, 2, 3, 0]]]
    return handmade(make_model(DENSE), [[1, 2, 3], [5, 0, 5]], groups, [[0, 1], [0, 1]])


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1, 2, 3], [3]])
def test_every_token_of_an_output_is_trained_the_eos_too_and_nothing_else(chosen):
    batch, settings = four_outputs(), replace(SETTINGS, group_size=2, row_tokens=12)
    laid = lay_out(batch, chosen, settings, CPU)
    trained: dict[int, list[int]] = {}
    for token, o in zip(laid.packed.tokens_BT[laid.mask_BT].tolist(), laid.output_N.tolist()):
        trained.setdefault(o, []).append(token)
    assert trained == {i: batch.outputs[o].tokens for i, o in enumerate(chosen)}
    pads = laid.packed.documents_BT < 0
    assert pads.any() == (len(chosen) > 1)  # a single one needs none
    assert not (pads & laid.mask_BT).any()  # they hold the EOS's number here
    for i, o in enumerate(chosen):  # each stands behind its own question
        document = laid.packed.tokens_BT[laid.packed.documents_BT == i].tolist()
        assert document == prompt_of(batch, o) + batch.outputs[o].tokens


def test_micro_batches_cut_the_tokens_where_they_cut_the_rows():
    laid = lay_out(four_outputs(), range(4), replace(SETTINGS, group_size=2, row_tokens=8), CPU)
    assert len(laid.mask_BT) > 2
    width = laid.mask_BT.shape[1]
    for tokens, rows in ((1, 1), (width, 1), (2 * width + 1, 2), (10**6, 10**6)):
        parts = list(laid.micro_batches(tokens))
        assert max(len(part.mask_BT) for part, _ in parts) == min(rows, len(laid.mask_BT))
        assert torch.equal(torch.cat([laid.output_N[n] for _, n in parts]), laid.output_N)
        for part, n in parts:
            assert torch.equal(part.packed.documents_BT[part.mask_BT], laid.output_N[n])
            assert torch.equal(part.output_N, laid.output_N[n])
            assert torch.equal(part.place_N, laid.place_N[n])


def test_numbers_of_an_output_are_picked_in_the_order_of_the_layout():
    batch = four_outputs()
    laid = lay_out(batch, range(4), replace(SETTINGS, group_size=2, row_tokens=8), CPU)
    values = [100.0 * o + torch.arange(len(each.tokens)) for o, each in enumerate(batch.outputs)]
    wanted = [100.0 * o + t for o, t in zip(laid.output_N.tolist(), laid.place_N.tolist())]
    assert laid.pick(values, torch.float64).tolist() == wanted
    assert sorted(wanted) == torch.cat(values).tolist()


# --- the update against REINFORCE


def reinforce_gradient(model: Transformer, batch: Rollout, temperature: float = 1.0) -> Tensor:
    """REINFORCE with the group as baseline: no ratio, no packing."""
    G = batch.rewards_PG.shape[1]
    loss = 0.0
    for o, output in enumerate(batch.outputs):
        group = batch.rewards_PG[o // G]
        std = group.var(correction=0).sqrt().item()
        advantage = (group[o % G] - group.mean()).item() / std if std > 1e-9 else 0.0
        logprobs_T = plain_logprobs(model, prompt_of(batch, o), output.tokens, temperature)
        loss = loss - advantage * logprobs_T.mean() / len(batch.outputs)
    return autograd(loss, model)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_on_policy_the_gradient_is_that_of_reinforce_with_the_group_as_baseline(temperature):
    model = make_model()
    settings = replace(SETTINGS, temperature=temperature, **FREE)
    batch = draw(model, settings)
    wanted = reinforce_gradient(model, batch, temperature)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient(model, batch, settings), wanted, rtol=0, atol=1e-10)


def test_on_policy_the_loss_without_kl_is_zero_because_advantages_average_to_zero():
    model = make_model()
    batch = draw(model)
    stats = step(model, torch.optim.SGD(model.parameters(), lr=0), batch, replace(SETTINGS, **FREE))
    assert abs(stats["loss"]) < 1e-12
    assert stats["clip_fraction"] == 0
    assert stats["grad_norm"] > 1e-3  # and yet it learns
    assert stats["tokens_trained"] == sum(len(output.tokens) for output in batch.outputs)


def test_on_policy_with_a_reference_the_loss_is_beta_times_the_kl():
    model, settings = make_model(), replace(SETTINGS, beta=0.3)
    batch = draw(model)
    batch.ref_logprobs = reference_logprobs(make_model(seed=1), batch, settings)
    stats = step(model, torch.optim.SGD(model.parameters(), lr=0), batch, settings)
    kls = []  # by hand, of each output
    for o, output in enumerate(batch.outputs):
        mine, theirs = (
            plain_logprobs(each, prompt_of(batch, o), output.tokens)
            for each in (model, make_model(seed=1))
        )
        kls.append([math.exp(r - p) - (r - p) - 1 for p, r in zip(mine.tolist(), theirs.tolist())])
    assert stats["loss"] == pytest.approx(0.3 * sum(sum(k) / len(k) for k in kls) / len(kls))
    assert stats["kl"] == pytest.approx(sum(map(sum, kls)) / sum(map(len, kls)))


def test_the_exact_policy_gradient_of_a_bandit():
    """One prompt, one token: the expected update over all groups of two, each with its probability,
    is (1 - 1/G) times the gradient of the expected reward."""
    config = replace(DENSE, vocab_size=5)
    model, prompt = make_model(config), [1, 2]
    values_V = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64)
    settings = replace(SETTINGS, group_size=2, max_new_tokens=1, normalize_std=False, **FREE)
    probs_V = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    wanted = 0.5 * autograd(-(probs_V * values_V).sum(), model)
    found = torch.zeros_like(wanted)
    for pair in itertools.product(range(5), repeat=2):
        rewards = values_V[list(pair)].tolist()
        batch = handmade(model, [prompt], [[[token] for token in pair]], [rewards])
        batch.advantages_PG = group_advantages(batch.rewards_PG, normalize_std=False)
        chance = probs_V[list(pair)].prod().item()
        found += chance * gradient(model, batch, settings)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_rewarded_letter_becomes_common():
    model = make_model(DENSE)
    settings = replace(SETTINGS, group_size=8, max_grad_norm=1.0, beta=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    shares = []
    for i in range(15):
        batch = draw(model, settings, step=i)
        text = "".join(batch.texts)
        shares.append(text.count("a") / len(text))
        step(model, optimizer, batch, settings)
    assert shares[0] < 0.3 and shares[-1] > 0.7


def test_raising_the_advantage_of_an_output_that_stopped_raises_its_eos():
    model = make_model()
    prompts, groups = [[1, 2, 3]], [[[4, 5, 0], [4, 5, 6]]]

    def eos(model: Transformer) -> float:
        return plain_logprobs(model, prompts[0], groups[0][0])[2].item()

    def after(rewards: list[float]) -> float:
        batch = handmade(model, prompts, groups, [rewards])
        moved = copy.deepcopy(model)
        optimizer = torch.optim.SGD(moved.parameters(), lr=0.01)
        step(moved, optimizer, batch, replace(SETTINGS, group_size=2, **FREE))
        return eos(moved)

    assert after([1, 0]) > eos(model) + 1e-4
    assert after([0, 1]) < eos(model) - 1e-4
    assert after([1, 1]) == eos(model)


# --- however the batch is cut

VARIANTS = [
    dict(),
    dict(mask_truncated=True),
    dict(aggregation="token"),
    dict(aggregation="constant", mask_truncated=True),
    dict(ratio="sequence"),
]


def batch_with_reference(model: Transformer, settings: Settings) -> Rollout:
    """Some outputs stop and some are cut off; the reference is another model."""
    batch = draw(model, settings)
    assert {output.finish for output in batch.outputs} == {"stop", "length"}
    batch.ref_logprobs = reference_logprobs(make_model(seed=1), batch, settings)
    return batch


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: " ".join(map(str, c)) or "paper")
def test_micro_batches_make_the_update_of_one_batch(changes):
    model = make_model()
    settings = replace(SETTINGS, beta=0.1, micro_tokens=10**6, row_tokens=10**4, **changes)
    batch = batch_with_reference(model, settings)
    whole = gradient(model, batch, settings)
    assert whole.abs().max() > 1e-3
    for micro_tokens, row_tokens in ((1, 1), (16, 16), (32, 16), (120, 40), (10**6, 1)):
        cut = replace(settings, micro_tokens=micro_tokens, row_tokens=row_tokens)
        torch.testing.assert_close(gradient(model, batch, cut), whole, rtol=0, atol=1e-12)


def test_a_mean_for_each_micro_batch_would_not_pass_for_one_batch(monkeypatch):
    model = make_model()
    settings = replace(SETTINGS, beta=0.1)
    batch = batch_with_reference(model, settings)

    def wrong(logprobs_N, old_N, ref_N, advantages_N, weights_N, *rest, **options):
        return grpo_loss(
            logprobs_N, old_N, ref_N, advantages_N, weights_N / weights_N.sum(), *rest, **options
        )

    monkeypatch.setattr(grpo, "grpo_loss", wrong)
    whole = gradient(model, batch, replace(settings, micro_tokens=10**6))
    cut = gradient(model, batch, replace(settings, micro_tokens=1))
    assert (whole - cut).abs().max() > 0.01


def test_masked_truncated_outputs_do_not_count():
    """As if they had not been drawn, but for the group's mean and std."""
    model, settings = make_model(), replace(SETTINGS, group_size=2, mask_truncated=True, **FREE)
    prompts, groups = [[1, 2], [3]], [[[4, 0], [5, 6, 7]], [[1, 1, 0], [2, 0]]]
    batch = handmade(model, prompts, groups, [[1, 0], [0, 1]])
    loss = 0.0
    for prompt, tokens, advantage in (
        (prompts[0], [4, 0], 1.0), (prompts[1], [1, 1, 0], -1.0), (prompts[1], [2, 0], 1.0)
    ):  # fmt: skip
        loss = loss - advantage * plain_logprobs(model, prompt, tokens).mean() / 3
    torch.testing.assert_close(
        gradient(model, batch, settings), autograd(loss, model), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("aggregation", ["output", "token", "constant"])
def test_where_all_outputs_are_masked_nothing_moves(aggregation):
    model = make_model()
    settings = replace(SETTINGS, group_size=2, mask_truncated=True, aggregation=aggregation, **FREE)
    batch = handmade(model, [[1, 2]], [[[4, 5], [5, 6, 7]]], [[1, 0]])
    before = flat(model).clone()
    stats = step(model, torch.optim.SGD(model.parameters(), lr=1.0), batch, settings)
    assert torch.equal(flat(model), before)
    assert (stats["loss"], stats["grad_norm"], stats["tokens_trained"]) == (0, 0, 0)


@pytest.mark.parametrize("questions, minibatches", [(4, 1), (4, 2), (5, 2), (5, 3), (3, 3)])
def test_the_minibatches_of_a_rollout_hold_each_question_once(monkeypatch, questions, minibatches):
    model = make_model(DENSE)
    settings = replace(SETTINGS, **FREE)
    batch = draw(model, settings, numbers=range(questions))
    seen = []

    def record(batch, chosen, *rest):
        seen.append(list(chosen))
        return lay_out(batch, chosen, *rest)

    monkeypatch.setattr(grpo, "lay_out", record)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    for minibatch in range(minibatches):
        step(model, optimizer, batch, settings, minibatch, minibatches)
    assert len(seen) == minibatches
    assert [o for part in seen for o in part] == list(range(len(batch.outputs)))
    sizes = [len(part) // settings.group_size for part in seen]
    assert max(sizes) - min(sizes) <= 1


# --- off-policy: several updates follow one rollout


def test_the_second_minibatch_divides_by_the_logprobs_stored_when_sampled(monkeypatch):
    model = make_model()
    settings = replace(SETTINGS, beta=0.0, eps=0.01)
    batch = draw(model, settings)
    stored = [list(output.logprobs) for output in batch.outputs]
    calls = []

    def record(logprobs_N, old_N, *rest, **options):
        calls.append((logprobs_N.detach(), old_N))
        return grpo_loss(logprobs_N, old_N, *rest, **options)

    monkeypatch.setattr(grpo, "grpo_loss", record)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = step(model, optimizer, batch, settings, 0, 2)
    assert torch.cat([(new - old).exp() for new, old in calls]).sub(1).abs().max() < 1e-10
    assert first["clip_fraction"] == 0
    calls.clear()
    wanted = []  # of the second half's tokens: stored, and by a plain forward of the moved policy
    for o in range(6, 12):
        tokens = batch.outputs[o].tokens
        new = plain_logprobs(model, prompt_of(batch, o), tokens).detach().tolist()
        wanted += zip(new, stored[o])
    second = step(model, optimizer, batch, settings, 1, 2)
    found = [pair for new, old in calls for pair in zip(new.tolist(), old.tolist())]
    torch.testing.assert_close(
        torch.tensor(sorted(found)), torch.tensor(sorted(wanted)), rtol=0, atol=1e-10
    )
    ratios = [math.exp(new - old) for new, old in wanted]
    assert max(abs(ratio - 1) for ratio in ratios) > 0.01
    cut = 0  # and what is said about the clip, by hand
    for o in range(6, 12):
        tokens = batch.outputs[o].tokens
        advantage = batch.advantages_PG.flatten()[o].item()
        for ratio in ratios[: len(tokens)]:
            cut += advantage > 0 and ratio > 1.01 or advantage < 0 and ratio < 0.99
        ratios = ratios[len(tokens) :]
    assert cut > 0
    assert second["clip_fraction"] == pytest.approx(cut / len(wanted))


@pytest.mark.parametrize("changes", LOSSES, ids=lambda c: " ".join(map(str, c.values())) or "paper")
def test_off_policy_a_step_minimises_the_printed_formula_in_every_variant(changes):
    settings = replace(SETTINGS, **{"beta": 0.04, **changes})
    batch = draw(make_model(), settings)
    model, reference = make_model(), make_model(seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    batch.ref_logprobs = reference_logprobs(reference, batch, settings)
    groups: list[list[dict]] = [[] for _ in batch.prompts]
    for o, output in enumerate(batch.outputs):
        prompt, tokens = prompt_of(batch, o), output.tokens
        new, ref = (plain_logprobs(each, prompt, tokens) for each in (model, reference))
        A = batch.advantages_PG.flatten()[o].item()
        groups[o // 3].append(dict(A=A, old=output.logprobs, new=new.tolist(), ref=ref.tolist()))
    wanted = loss_by_loops(
        groups, eps=settings.eps, eps_high=settings.eps_high or settings.eps, beta=settings.beta,
        ratio=settings.ratio, aggregation=settings.aggregation, longest=6,
    )  # fmt: skip
    stats = step(model, torch.optim.SGD(model.parameters(), lr=0), batch, settings)
    assert stats["loss"] == pytest.approx(wanted, abs=1e-11)
    assert stats["clip_fraction"] > 0


# --- the reference


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_reference_that_is_the_policy_gives_its_logprobs_and_no_kl(replay, temperature):
    model = make_model()
    settings = replace(SETTINGS, replay_routes=replay, temperature=temperature)
    batch = draw(model, settings)
    batch.ref_logprobs = reference_logprobs(copy.deepcopy(model), batch, settings)
    for output, logprobs in zip(batch.outputs, batch.ref_logprobs):
        assert logprobs.tolist() == pytest.approx(output.logprobs, abs=1e-10)
    stats = step(model, torch.optim.SGD(model.parameters(), lr=0), batch, settings)
    assert abs(stats["kl"]) < 1e-15


def test_the_reference_reads_a_rollout_of_many_outputs_in_its_order():
    model, settings = make_model(DENSE), replace(SETTINGS, group_size=70)
    batch = draw(model, settings, numbers=range(8))
    found = reference_logprobs(model, batch, settings)
    for output, logprobs in zip(batch.outputs, found, strict=True):
        assert logprobs.tolist() == pytest.approx(output.logprobs, abs=1e-10)


def test_reference_logprobs_are_those_of_a_plain_forward():
    batch, other = draw(make_model()), make_model(seed=1)
    found = reference_logprobs(other, batch, SETTINGS)
    for o, output in enumerate(batch.outputs):
        wanted = plain_logprobs(other, prompt_of(batch, o), output.tokens)
        torch.testing.assert_close(found[o], wanted.detach(), rtol=0, atol=1e-12)


def test_the_kl_pulls_towards_the_reference():
    """Without a difference of rewards, the update lowers the KL to the reference, and the larger
    beta is, the more."""
    model, reference = make_model(), make_model(seed=1)
    settings = replace(SETTINGS, beta=1.0)
    batch = draw(model, settings)
    batch.advantages_PG = torch.zeros_like(batch.advantages_PG)
    batch.ref_logprobs = reference_logprobs(reference, batch, settings)
    pull = gradient(model, batch, settings)
    half = gradient(model, batch, replace(settings, beta=0.5))
    torch.testing.assert_close(half, pull / 2, rtol=0, atol=1e-12)
    moved = copy.deepcopy(model)
    optimizer = torch.optim.SGD(moved.parameters(), lr=0.01)
    before = step(moved, optimizer, batch, settings)["kl"]
    assert step(moved, optimizer, batch, settings)["kl"] < before - 1e-3


def test_in_bfloat16_a_reference_that_is_the_policy_gives_no_kl():
    """The log-probs of both are fp32; rounding one of them to bf16 would look like a KL."""
    model = make_model(DENSE).bfloat16()
    batch = draw(model)
    batch.ref_logprobs = reference_logprobs(copy.deepcopy(model), batch, SETTINGS)
    stats = step(model, torch.optim.SGD(model.parameters(), lr=0), batch, SETTINGS)
    assert abs(stats["kl"]) < 1e-9


# --- MoE: the experts used when sampling


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_replayed_routes_give_the_samplers_logprobs_where_the_router_has_changed_its_mind(
    temperature,
):
    model = make_model(replace(MOE, num_hidden_layers=3))
    settings = replace(SETTINGS, replay_routes=True, temperature=temperature, **FREE)
    batch = draw(model, settings)
    for block in model.model.layers[1:]:  # this changes the selection, and nothing else
        block.mlp.gate.e_score_correction_bias += torch.tensor([0.5, -0.5, 0.3, -0.3]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    assert step(model, optimizer, batch, settings)["mismatch"] < 1e-10
    unheeded = step(model, optimizer, batch, replace(settings, replay_routes=False))
    assert unheeded["mismatch"] > 1e-3


def test_a_dense_model_has_no_routes_to_replay():
    model = make_model(DENSE)
    settings = replace(SETTINGS, replay_routes=True, **FREE)
    wanted = gradient(model, draw(model), replace(settings, replay_routes=False))
    found = gradient(model, draw(model, settings), settings)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


# --- several processes

SPREAD = replace(SETTINGS, beta=0.1)


def two_updates(questions: int) -> tuple[Tensor, list[dict]]:
    """A rollout on this rank's share of the questions, and two updates."""
    model, reference = make_model(), make_model(seed=1)
    numbers = parallel.shard(range(questions))
    batch = draw(model, SPREAD, numbers=numbers)
    batch.ref_logprobs = reference_logprobs(reference, batch, SPREAD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stats = [batch.metrics] + [step(model, optimizer, batch, SPREAD, i, 2) for i in range(2)]
    return flat(model), stats


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    for questions in (6, 3, 5, 1):
        torch.save(two_updates(questions), f"{folder}/{questions} {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with what each of two processes got; it lacks what they failed at, and says so."""
    folder = tmp_path_factory.mktemp("ranks")
    try:
        torch.multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    except torch.multiprocessing.ProcessRaisedException as error:
        (folder / "failed").write_text(str(error))
    return folder


@pytest.mark.parametrize("questions", [6, 3, 5, 1])  # 3, 5: uneven; 1: a rank without questions
def test_two_processes_make_the_update_of_one(two_ranks, questions):
    if not (two_ranks / f"{questions} 1.pt").exists():
        pytest.fail((two_ranks / "failed").read_text())
    weights, stats = two_updates(questions)
    for rank in range(2):
        found_weights, found_stats = torch.load(two_ranks / f"{questions} {rank}.pt")
        assert (found_weights - weights).abs().max() < 1e-12, f"{rank=}"
        for found, wanted in zip(found_stats, stats):
            assert found.keys() == wanted.keys()
            for key in wanted:
                assert found[key] == pytest.approx(wanted[key], abs=1e-9), f"{key} {rank=}"
    assert (weights - flat(make_model())).abs().max() > 1e-4  # it did learn
