"""Group relative policy optimization: how R1-Zero learns (R1 2.2.1; DeepSeekMath, 2402.03300).

The model that learns is the policy. A question is asked G times, by sampling; its G outputs are a
group. Each output gets one number, its reward (accuracy + format, rewards.py). Its advantage A is
that reward minus the group's mean, divided by the group's std. All tokens of an output share its A:
where A > 0 they become likelier, where A < 0 less likely.

    1. group_advantages, kl_estimate, grpo_loss    the equations, as pure functions
    2. draw_outputs, reward_outputs    a rollout: questions -> outputs, with the log-probs they were
                                       drawn with -> rewards, advantages
    3. step       one optimizer update on a minibatch of a rollout
    4. reinforce  the loop: rollout, the reference's log-probs, several steps, and again

The loss is minus the mean over outputs of the mean over their tokens of

    min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL        rho = pi / pi_old

pi is the token's probability under the policy now, pi_old what it was when the token was drawn: a
number that was stored then. eps is the clip range (0.2), beta a small weight (0.001).

What the reference is for: KL says how far the policy is from the reference, a second model: a copy
of an earlier policy, at first of the one that RL began with. beta KL pulls back, so that chasing
the reward does not unlearn what pretraining taught. Every so often (400 updates in the paper) the
current policy is copied into it, so that RL can go on from there: drift is slowed, not bounded.

Why a loss of about 0 teaches: on the first update after a rollout the policy is the one that
sampled (on-policy), so every rho is 1. A minibatch has whole groups, and a group's advantages add
up to 0 (an output counts the same, long or short): only beta KL is left, a small number. The
gradient is not 0: at rho = 1 the gradient of rho is that of log pi, so each token is pushed up or
down by its own output's A. It is cross-entropy with a weight for each output: the weights add up to
0, the gradients don't. Watch the reward, not the loss.

What the clip does: a rollout is split into minibatches (16 in the paper), one for each update. The
later ones hold other questions, but what the earlier updates taught has moved their rho as well
(the loss is then slightly below 0). A token with A > 0 whose rho is above 1 + eps, or one with
A < 0 whose rho is below 1 - eps, has gone far enough: the comparison with what was drawn is good
near the policy that drew it only. The min is a constant there, and the reward pushes it no further.
A token that has moved against its A is still pushed back.

Choices where the paper is silent or says two things (shapes: P questions, G outputs of each, O
outputs in all, N tokens):
- R1 Eq. 1 prints one ratio rho per output, DeepSeekMath Eq. 3 one per token, and a mean over the
  output's tokens. R1 remarks that clipping cuts the gradients of many *tokens*, so the default is
  per token; `ratio="sequence"` is the other.
- With ratio="sequence", the KL stays a mean over tokens.
- std is the population's (ddof 0). Where a group's rewards are equal, its advantages are 0, not
  NaN.
- What an output that was cut off is worth is up to the reward; train_zero.py gives it 0, for it has
  not answered. (DAPO leaves it out of the loss: mask_truncated.)

Read next: train_zero.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean as mean

import torch
from torch import Tensor, nn

import rewards
from data.packing import Packed, pack
from data.problems import Problem
from data.tokenizer import Tokenizer
from model import Transformer
from runtime import parallel
from runtime.advice import Advice
from runtime.balance import Lengths
from runtime.optimizer import adamw, away, visiting
from runtime.run import Run, check_finite, progress
from runtime.sharding import in_step, twin
from runtime.spool import Spool
from sample import Output, average, fitting_prompts, generate, judge, spell
from sft import set_rates, update

# reward(problems, texts, which of them ended by themselves) -> a number for each output. One that
# has a method begin(problem, text, ended) is told of each output when it is written.
Reward = Callable[[list[Problem], list[str], list[bool]], list[float]]


def group_advantages(rewards_PG: Tensor, normalize_std: bool = True) -> Tensor:
    """How much better than its group each output was, shape PG.

    normalize_std=False: Dr. GRPO (2503.20783), which finds that dividing by std favours questions
    that are almost always, or almost never, solved.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if not normalize_std or not len(rewards_PG):  # a process may have none of the questions
        # Dr. GRPO 3.2, advantage: A_i = r_i - mean(r)
        return centred_PG
    # R1 Eq. 3: A_i = (r_i - mean(r)) / std(r)
    std_P1 = rewards_PG.std(1, keepdim=True, correction=0)
    # Equal sums may differ in their last bits (0.1 + 0.2 and 0.3): that is no disagreement.
    rounding = 8 * torch.finfo(rewards_PG.dtype).eps
    agreed_P1 = std_P1 <= rounding * rewards_PG.abs().amax(1, keepdim=True)
    return torch.where(agreed_P1, 0.0, centred_PG / std_P1.where(~agreed_P1, 1.0))


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """A never negative estimate of KL(policy || reference) from the policy's samples, shape N: "k3"
    (Schulman 2020). Its mean is that KL; its mean gradient, on-policy, is that of the KL the other
    way round, KL(reference || policy)."""
    # R1 Eq. 2: pi_ref / pi - log(pi_ref / pi) - 1
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def token_weights(
    lengths_O: Tensor, aggregation: str, *, outputs: int, tokens: int, longest: int
) -> Tensor:
    """What each token of an output counts in the loss, shape O. `outputs` and `tokens` count the
    whole batch, of which these outputs may be a part: the weights must not depend on how it is cut.
    """
    if aggregation == "output":  # DeepSeekMath Eq. 3: 1/G sum_i 1/|o_i| sum_t
        return 1 / (outputs * lengths_O)
    if aggregation == "token":  # DAPO (2503.14476) Eq. 8: 1 / sum_i |o_i| sum_i sum_t
        return torch.full_like(lengths_O, 1 / max(1, tokens))
    if aggregation == "constant":  # Dr. GRPO 3.2, constant: 1/G 1/L, L: longest allowed
        return torch.full_like(lengths_O, 1 / max(1, outputs * longest))
    raise ValueError(f"unknown aggregation {aggregation!r}: output, token or constant")


def importance_ratio(logprobs_N: Tensor, old_N: Tensor, output_N: Tensor, level: str) -> Tensor:
    """rho = pi / pi_old, shape N: each token's own, or (R1 Eq. 1 as printed) its whole output's."""
    log_ratio_N = logprobs_N - old_N
    if level == "sequence":
        sums_O = log_ratio_N.new_zeros(int(output_N.max()) + 1).index_add(0, output_N, log_ratio_N)
        log_ratio_N = sums_O[output_N]
    elif level != "token":
        raise ValueError(f"unknown ratio {level!r}: token or sequence")
    return log_ratio_N.exp()


def grpo_loss(
    logprobs_N: Tensor, old_N: Tensor, ref_N: Tensor | None, advantages_N: Tensor,
    weights_N: Tensor, output_N: Tensor, *, eps: float, beta: float, eps_high: float | None = None,
    ratio: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss over the tokens of some outputs, laid end to end: N numbers each. The losses of the
    parts of a batch add up to the batch's, if the weights were made for the whole of it.

    old_N are the log-probs stored when the tokens were drawn. output_N: which output a token is of.
    eps_high: a wider upper bound ("clip-higher", DAPO); eps = inf turns the clip off.
    """
    # R1 Eq. 1: J = mean_i [ min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i) - beta KL_i ]
    rho_N = importance_ratio(logprobs_N, old_N, output_N, ratio)
    clipped_N = rho_N.clamp(1 - eps, 1 + (eps if eps_high is None else eps_high))
    gain_N = torch.min(rho_N * advantages_N, clipped_N * advantages_N)
    kl_N = kl_estimate(logprobs_N, ref_N) if ref_N is not None else torch.zeros_like(gain_N)
    loss = -(weights_N * (gain_N - beta * kl_N)).sum()
    with torch.no_grad():
        # These tokens get no gradient from the reward; the KL's remains.
        cut_N = clipped_N * advantages_N < rho_N * advantages_N
        stats = dict(clip_fraction=cut_N.float().sum(), kl=kl_N.sum())
    return loss, stats


@dataclass(frozen=True)
class Settings:
    """How outputs are drawn and what is made of them; R1-Zero's values, where reported."""

    group_size: int = 16  # G
    max_new_tokens: int = 32768
    temperature: float = 1.0
    top_p: float = 1.0  # anything less would make the ratio wrong: refused
    eps: float = 0.2  # not reported for R1-Zero
    eps_high: float | None = None
    beta: float = 0.001
    # Departs from R1 Eq. 1, ratio: of each token, as DeepSeekMath prints it, not of an output. R1
    # remarks that a low clip cuts the gradients of many tokens.
    ratio: str = "token"
    # Departs from R1 Eq. 1, length: with DeepSeekMath's 1/|o|, which R1 does not print. A sum over
    # each output's tokens would let the long outputs decide.
    aggregation: str = "output"
    normalize_std: bool = True
    mask_truncated: bool = False  # leave outputs that were cut off out of the loss (DAPO)
    replay_routes: bool = False  # train with the experts that were used when sampling
    repetition_penalty: float = 0.0  # weight of rewards.repetition
    overlong_buffer: int = 0  # tokens over which rewards.overlong_penalty falls (DAPO); 0: without
    max_grad_norm: float = 1.0
    row_tokens: int = 256  # outputs are packed into rows of so many tokens, or of the longest
    micro_tokens: int = 4096  # tokens of a micro-batch, padding included; at least one row
    slots: int = 256

    def __post_init__(self):
        if self.top_p != 1:
            raise ValueError(
                f"top_p={self.top_p}: training needs 1. Tokens that nucleus sampling can't draw"
                " have a probability in the loss that they didn't have when drawn"
            )
        if self.eps_high is not None and self.eps_high <= 0:
            raise ValueError(f"eps_high={self.eps_high}: more than 0, or none for eps")
        if self.repetition_penalty < 0 or not 0 <= self.overlong_buffer <= self.max_new_tokens:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty}, overlong_buffer="
                f"{self.overlong_buffer}: need a weight >= 0, and a buffer from 0 (off) to the"
                f" longest output, {self.max_new_tokens}"
            )
        if self.group_size < 2 or self.temperature <= 0 or self.eps <= 0 or self.beta < 0:
            raise ValueError(
                f"group_size={self.group_size}, temperature={self.temperature}, eps={self.eps},"
                f" beta={self.beta}: need a group of 2 or more, temperature > 0, eps > 0, beta >= 0"
            )


@dataclass
class Questions:
    """What is asked in one rollout, or a share of it, each question with its number within the
    whole batch."""

    numbers: list[int]
    problems: list[Problem]
    prompts: list[list[int]]

    def part(self, numbers: Sequence[int]) -> "Questions":
        places = [self.numbers.index(number) for number in numbers]
        parts = [[column[place] for place in places] for column in (self.problems, self.prompts)]
        return Questions(list(numbers), *parts)


@dataclass
class Rollout:
    """Questions and what the policy answered: P prompts, and O = P*G outputs, group after group."""

    numbers: list[int]  # of the questions within the batch of all processes
    problems: list[Problem]
    prompts: list[list[int]]
    outputs: list[Output]
    texts: list[str]
    rewards_PG: Tensor | None = None
    advantages_PG: Tensor | None = None
    ref_logprobs: list[Tensor] | None = None  # a tensor for each output
    shaping: list[dict[str, float]] | None = None  # of each output: what its reward includes
    right: list[bool | None] | None = None  # of each output, as the rules judge it
    metrics: dict = field(default_factory=dict)
    lengths: dict[int, float] = field(default_factory=dict)  # of all processes: number -> tokens

    def groups(self) -> dict[int, tuple[list[Output], list[str]]]:
        """By the question's number, its outputs and their texts."""
        G = len(self.outputs) // max(1, len(self.numbers))
        parts = [slice(p * G, (p + 1) * G) for p in range(len(self.numbers))]
        return {n: (self.outputs[p], self.texts[p]) for n, p in zip(self.numbers, parts)}


def rollout(
    model: Transformer, tokenizer: Tokenizer, questions: Questions, reward: Reward,
    settings: Settings, *, seed: int, step: int,
) -> Rollout:  # fmt: skip
    """Draw a group of outputs for each question and reward them."""
    batch = draw_outputs(model, tokenizer, questions, settings, reward, seed=seed, step=step)
    reward_outputs(batch, reward, settings, tokenizer.tags)
    return batch


def draw_outputs(
    model: Transformer, tokenizer: Tokenizer, questions: Questions, settings: Settings,
    reward: Reward | None = None, *, seed: int, step: int,
) -> Rollout:  # fmt: skip
    """Every output draws from its own random stream, (seed, step, number of the question, place in
    the group), so that the batch is the same on any number of processes.

    reward: it may begin with each output as it is written.
    """
    G, begin = settings.group_size, getattr(reward, "begin", None)
    asked = [problem for problem in questions.problems for _ in range(G)]

    def written(i: int, output: Output) -> None:
        begin(asked[i], spell(tokenizer, output), output.finish == "stop")

    outputs = generate(
        model, [prompt for prompt in questions.prompts for _ in range(G)],
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        stop=tokenizer.stop_ids, seed=seed, slots=settings.slots, routes=settings.replay_routes,
        rows=[(step << 32) + number * G + i for number in questions.numbers for i in range(G)],
        on_finish=written if begin else None,
    )  # fmt: skip
    texts = [spell(tokenizer, output) for output in outputs]
    return Rollout(questions.numbers, questions.problems, questions.prompts, outputs, texts)


def reward_outputs(batch: Rollout, reward: Reward, settings: Settings, tags: bool = True) -> None:
    """Put rewards, advantages and what describes them into the batch."""
    asked = [problem for problem in batch.problems for _ in range(settings.group_size)]
    values = reward(asked, batch.texts, [output.finish == "stop" for output in batch.outputs])
    batch.shaping = [shaping(*pair, settings) for pair in zip(batch.texts, batch.outputs)]
    values = [value + sum(terms.values()) for value, terms in zip(values, batch.shaping)]
    batch.rewards_PG = torch.tensor(values, dtype=torch.float64).view(
        len(batch.problems), settings.group_size
    )
    batch.advantages_PG = group_advantages(batch.rewards_PG, settings.normalize_std)
    describe(batch, tags)


def shaping(text: str, output: Output, settings: Settings) -> dict[str, float]:
    """What is added to an output's reward, finished or not, beside the paper's; none by default."""
    terms = {}
    if settings.repetition_penalty:
        terms["repetition"] = -settings.repetition_penalty * rewards.repetition(text)
    if settings.overlong_buffer:
        limits = settings.max_new_tokens, settings.overlong_buffer
        terms["overlong"] = rewards.overlong_penalty(len(output.tokens), *limits)
    return terms


def describe(batch: Rollout, tags: bool = True) -> None:
    """What explains a flat reward or a zero loss, as means over the outputs of all processes."""
    G = batch.rewards_PG.shape[1]
    groups, batch.right = [], []
    for p, (problem, values_G) in enumerate(zip(batch.problems, batch.rewards_PG)):
        members = slice(p * G, (p + 1) * G)
        outputs = zip(batch.texts[members], batch.outputs[members], values_G.tolist())
        rows = [dict(reward=value, **judge(problem, *output, tags)) for *output, value in outputs]
        for row, terms in zip(rows, (batch.shaping or [])[members]):
            row |= terms
        judged = [row["accuracy"] for row in rows]
        batch.right += [None if value is None else value == 1.0 for value in judged]
        groups.append((problem.level, bool(batch.advantages_PG[p].any()), rows))
    # A question's group is never split over processes.
    groups = parallel.gather_numbered(dict(zip(batch.numbers, groups)))
    rows = [row for _, _, group in groups.values() for row in group]
    by_level: dict[int, list[float]] = {}
    for level, _, group in groups.values():
        known = [row["accuracy"] for row in group if row["accuracy"] is not None]
        if known:
            by_level.setdefault(level, []).extend(known)

    batch.lengths = {n: mean(row["tokens"] for row in group[2]) for n, group in groups.items()}
    batch.metrics |= dict(
        **{key: average(row[key] for row in rows) for key in rows[0]},
        groups_without_signal=mean(not signal for _, signal, _ in groups.values()),
        by_level={str(level): mean(by_level[level]) for level in sorted(by_level)},
    )


def shown(batch: Rollout, tokenizer: Tokenizer, count: int) -> list[dict]:
    """The first `count` groups of all processes as a reader wants to see them: the question, and of
    each output what it earned and, token by token, its log-probs under policy and reference."""
    G = batch.rewards_PG.shape[1]
    groups = {}
    for p, (number, problem) in enumerate(zip(batch.numbers, batch.problems)):
        if number >= count:
            continue
        rows = []
        for i, o in enumerate(range(p * G, (p + 1) * G)):
            output, text = batch.outputs[o], batch.texts[o]
            row = dict(reward=batch.rewards_PG[p, i], advantage=batch.advantages_PG[p, i])
            row |= dict(text=text, finished=output.finish == "stop")
            row |= dict(right=batch.right[o]) if batch.right else {}
            row |= dict(tokens=[tokenizer.decode([token]) for token in output.tokens])
            row |= dict(logprobs=[round(float(value), 3) for value in output.logprobs])
            if batch.ref_logprobs:
                row |= dict(ref_logprobs=[round(x, 3) for x in batch.ref_logprobs[o].tolist()])
            rows.append(row)
        asked = {key: getattr(problem, key) for key in ("question", "answer", "checker", "level")}
        groups[number] = {**asked, "outputs": rows}
    return list(parallel.gather_numbered(groups).values())


@dataclass
class Laid:
    """Outputs packed into rows, and where each of their N tokens comes from."""

    packed: Packed
    mask_BT: Tensor  # the outputs' tokens: prompts and padding are not trained
    output_N: Tensor  # which of the outputs
    place_N: Tensor  # which of its tokens
    routes_BTMA: Tensor | None

    def pick(self, values: list[Tensor], dtype: torch.dtype) -> Tensor:
        """From one number for each token of each output, those of the N tokens."""
        table_OT = nn.utils.rnn.pad_sequence(values, batch_first=True)
        return table_OT.to(self.mask_BT.device, dtype)[self.output_N, self.place_N]

    def micro_batches(self, tokens: int) -> Iterator[tuple["Laid", slice]]:
        """As many rows at a time as `tokens` fill, and which of the N tokens are theirs."""
        rows = max(1, tokens // self.mask_BT.shape[1])
        counts = self.mask_BT.sum(1).tolist()
        for start in range(0, len(counts), rows):
            b = slice(start, start + rows)
            n = slice(sum(counts[:start]), sum(counts[: start + rows]))
            routes = None if self.routes_BTMA is None else self.routes_BTMA[b]
            part = self.packed[b], self.mask_BT[b], self.output_N[n], self.place_N[n], routes
            yield Laid(*part), n

    def logprobs(self, model: Transformer, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, N each, of the distributions that the sampler draws from."""
        logprobs_N, entropy_N, _, _ = model.logprobs(
            self.packed.tokens_BT, self.packed.positions_BT, self.mask_BT,
            temperature=temperature, routes_BTMA=self.routes_BTMA,
        )  # fmt: skip
        return logprobs_N, entropy_N


def lay_out(
    batch: Rollout, chosen: Sequence[int], settings: Settings, device: torch.device
) -> Laid:
    """Pack the chosen ones of a rollout's outputs, each behind its prompt."""
    outputs = [batch.outputs[o] for o in chosen]
    prompts = [batch.prompts[o // settings.group_size] for o in chosen]
    documents = [prompt + output.tokens for prompt, output in zip(prompts, outputs)]
    packed = pack(documents, max(settings.row_tokens, *map(len, documents)), device)
    start_O = torch.tensor([len(prompt) for prompt in prompts], device=device)
    document_BT, position_BT = packed.documents_BT.clamp(min=0), packed.positions_BT.clamp(min=0)
    mask_BT = (packed.documents_BT >= 0) & (position_BT >= start_O[document_BT])
    output_N = document_BT[mask_BT]
    routes_BTMA = None
    if settings.replay_routes and outputs[0].routes is not None:  # a dense model has none
        # The last token of a document was never fed when sampling: -1 leaves it to the router.
        table_OSMA = nn.utils.rnn.pad_sequence([o.routes for o in outputs], True, padding_value=-1)
        table_OSMA = nn.functional.pad(table_OSMA, (0, 0, 0, 0, 0, 1), value=-1).to(device)
        routes_BTMA = table_OSMA[document_BT, position_BT]
    return Laid(packed, mask_BT, output_N, position_BT[mask_BT] - start_O[output_N], routes_BTMA)


@torch.no_grad()
def reference_logprobs(reference: Transformer, batch: Rollout, settings: Settings) -> list[Tensor]:
    """Of every output's tokens under the reference model, a tensor for each output. Replayed routes
    are replayed in the reference too."""
    device, found = reference.lm_head.weight.device, []
    with in_step(reference):
        for first in range(0, len(batch.outputs), 256):  # a rollout may be larger than the device
            chosen = range(first, min(first + 256, len(batch.outputs)))
            laid = lay_out(batch, chosen, settings, device)
            parts = laid.micro_batches(settings.micro_tokens)
            temperature = settings.temperature
            logprobs_N = torch.cat([part.logprobs(reference, temperature)[0] for part, _ in parts])
            lengths = [len(batch.outputs[o].tokens) for o in chosen]
            table_OT = logprobs_N.new_zeros(len(lengths), max(lengths))
            table_OT[laid.output_N, laid.place_N] = logprobs_N
            found += [row[:length].cpu() for row, length in zip(table_OT, lengths)]
    return found


def step(
    model: Transformer, optimizer: torch.optim.Optimizer, batch: Rollout, settings: Settings,
    minibatch: int = 0, minibatches: int = 1,
) -> dict:  # fmt: skip
    """One update on the minibatch-th of `minibatches` parts of the rollout's questions, on all
    processes together; this process holds some of the outputs, and may hold none."""
    chosen = members(batch, settings, minibatch, minibatches)
    lengths_O = torch.tensor([len(batch.outputs[o].tokens) for o in chosen], dtype=torch.float64)
    outputs, tokens = (int(parallel.all_sum(n)) for n in (len(chosen), int(lengths_O.sum())))
    weights_O = token_weights(
        lengths_O, settings.aggregation, outputs=outputs, tokens=tokens,
        longest=settings.max_new_tokens,
    )  # fmt: skip
    with in_step(model):
        sums = accumulate(model, batch, chosen, weights_O, settings)
    grad_norm = update(model, [optimizer], settings.max_grad_norm)
    totals = {key: float(parallel.all_sum(value)) for key, value in sums.items()}
    means = {key: totals[key] / max(1, tokens) for key in totals if key != "loss"}
    return dict(loss=totals["loss"], **means, grad_norm=grad_norm, tokens_trained=tokens)


def accumulate(
    model: Transformer, batch: Rollout, chosen: list[int], weights_O: Tensor, settings: Settings
) -> Counter:  # fmt: skip
    """The gradient of the loss over the chosen outputs, which may be none; sums over their tokens
    of what `step` reports."""
    sums = Counter(loss=0.0, clip_fraction=0.0, kl=0.0, entropy=0.0, mismatch=0.0)
    if not chosen:
        return sums
    weight = model.lm_head.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    laid = lay_out(batch, chosen, settings, weight.device)
    drawn = [torch.tensor(batch.outputs[o].logprobs, dtype=torch.float64) for o in chosen]
    old_N = laid.pick(drawn, dtype)
    ref_N = laid.pick([batch.ref_logprobs[o] for o in chosen], dtype) if settings.beta else None
    advantages_N = batch.advantages_PG.flatten()[chosen].to(weight.device, dtype)[laid.output_N]
    weights_N = weights_O.to(weight.device, dtype)[laid.output_N]
    for part, n in laid.micro_batches(settings.micro_tokens):
        logprobs_N, entropy_N = part.logprobs(model, settings.temperature)
        loss, stats = grpo_loss(
            logprobs_N, old_N[n], None if ref_N is None else ref_N[n], advantages_N[n],
            weights_N[n], part.output_N, eps=settings.eps, eps_high=settings.eps_high,
            beta=settings.beta, ratio=settings.ratio,
        )  # fmt: skip
        loss.backward()
        mismatch = (logprobs_N.detach() - old_N[n]).abs().sum()
        stats |= dict(loss=loss.detach(), entropy=entropy_N.sum(), mismatch=mismatch)
        sums.update({key: float(value) for key, value in stats.items()})
    return sums


def members(batch: Rollout, settings: Settings, minibatch: int, minibatches: int) -> list[int]:
    """This process's outputs in the minibatch: whole groups, by the question's number, so that the
    minibatch has the same outputs on any number of processes."""
    G, total = settings.group_size, int(parallel.all_sum(len(batch.numbers)))
    chosen = []
    for p, number in enumerate(batch.numbers):
        if number * minibatches // total == minibatch:
            chosen += range(p * G, (p + 1) * G)
    if settings.mask_truncated:
        chosen = [o for o in chosen if batch.outputs[o].finish == "stop"]
    return chosen


@dataclass(frozen=True)
class Course:
    """How long, how fast, on how much at a time."""

    steps: int  # updates
    minibatches: int  # updates that follow a rollout
    lr: float
    warmup: int  # updates over which the learning rate rises
    refresh: int  # updates after which the policy becomes the reference
    save_every: int = 20
    keep_groups: int = 4  # of each rollout, with all that is known of them, in rollouts.jsonl
    states: str = "master"  # of the optimizer of a policy in bf16: runtime/optimizer.py
    offload: bool = False  # reference and optimizer on the CPU while they are not needed


def reinforce(
    policy: Transformer, tokenizer: Tokenizer, draw: Callable[[int], list[Problem]], reward: Reward,
    settings: Callable[[int], Settings], course: Course, run: Run, *, seed: int, phase: str = "rl",
    spool: Spool | None = None,
) -> bool:  # fmt: skip
    """R1 2.2.1 as a loop, from run's last checkpoint of this phase; False where Ctrl-C stopped it.

    draw(updates done) are the questions of a rollout, settings(updates done) what holds for it.
    spool: other programs draw the outputs (runtime/spool.py), from weights that may be older.
    """
    device = policy.lm_head.weight.device
    state = first_state(policy, course, settings(0).beta > 0, seed)
    optimizer, reference = state["optimizer"], state.get("reference")
    done, lengths = run.resume(phase, state), Lengths()
    advice = Advice(course.steps, done)
    sample = partial(draw_outputs, policy, tokenizer, reward=reward, seed=seed)
    with progress(course.steps, "GRPO", initial=done) as bar:
        while done < course.steps:
            now = settings(done)
            asked, skipped = fitting_questions(draw(done), tokenizer, policy, now)
            with away(optimizer) if course.offload else nullcontext():
                # Sample a group of outputs for each question from the old policy, and reward them.
                with run.phase("rollout") as timer:
                    if spool is None:
                        batch = sample(asked.part(lengths.share(asked)), now, step=done)
                    elif (batch := received(spool, policy, asked, done, run)) is None:
                        return run.goes_on(phase, done, state, every=1)  # Ctrl-C while waiting
                    written = parallel.all_sum(sum(len(output.tokens) for output in batch.outputs))
                    timer.tokens += written
                with run.phase("reward"):
                    reward_outputs(batch, reward, now, tokenizer.tags)
                lengths.note(asked, batch.lengths)
                # The reference's log-probs of the same outputs, for the KL.
                if reference is not None:
                    with visiting(reference, device), run.phase("reference") as timer:
                        batch.ref_logprobs = reference_logprobs(reference, batch, now)
                        timer.tokens += written
            kept = shown(batch, tokenizer, course.keep_groups)
            run.keep_rollouts(kept, phase=phase, step=done + 1)
            # Several updates, the later ones on outputs of a policy that has since moved on.
            for minibatch in range(min(course.minibatches, course.steps - done)):
                set_rates([optimizer], min(1.0, (done + 1) / max(1, course.warmup)))
                with run.phase("update") as timer:
                    stats = step(policy, optimizer, batch, now, minibatch, course.minibatches)
                    timer.tokens += stats["tokens_trained"]
                done += 1
                for name in ("loss", "grad_norm"):
                    check_finite(stats[name], done, run.checkpoints(phase), name)
                # This rollout's other minibatches keep the log-probs of the former reference.
                if reference is not None and done % course.refresh == 0:
                    reference.load_state_dict(policy.state_dict())
                sampled = dict(batch.metrics, skipped=skipped) if minibatch == 0 else {}
                run.log(phase=phase, step=done, **stats, **sampled, **run.timing())
                advice.update(done, stats, sampled, now.beta)
                bar.update(1)
            bar.set_postfix({key: batch.metrics[key] for key in ("reward", "accuracy", "tokens")})
            every = course.save_every if done < course.steps else 1  # the end is always saved
            if not run.goes_on(phase, done, state, every=every):
                return False
    return True


def first_state(policy: Transformer, course: Course, reference: bool, seed: int) -> dict:
    """What a checkpoint holds: policy, optimizer and, where the loss has a KL, its reference."""
    optimizer = adamw(policy.parameters(), course.lr, course.states, seed)
    state = dict(policy=policy, optimizer=optimizer)
    if reference:
        state["reference"] = twin(policy)
        if course.offload:
            state["reference"].cpu()
    return state


def received(
    spool: Spool, policy: Transformer, asked: Questions, done: int, run: Run
) -> Rollout | None:  # fmt: skip
    """This process's part of a rollout that others have drawn; None where stopped."""
    groups = spool.take(policy, done, run)
    if groups is None:
        return None
    mine = asked.part(sorted(groups))
    outputs, texts = ([each for n in mine.numbers for each in groups[n][i]] for i in (0, 1))
    batch = Rollout(mine.numbers, mine.problems, mine.prompts, outputs, texts)
    batch.metrics |= spool.metrics
    return batch


def fitting_questions(
    problems: list[Problem], tokenizer: Tokenizer, model: Transformer, settings: Settings
) -> tuple[Questions, int]:
    """The questions of one rollout, on all processes, and how many are left out of it because they
    are too long for the context."""
    prompts, fitting = fitting_prompts(model, tokenizer, problems, settings.max_new_tokens)
    asked = [problems[i] for i in fitting], [prompts[i] for i in fitting]
    return Questions(list(range(len(fitting))), *asked), len(problems) - len(fitting)
