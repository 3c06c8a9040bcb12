"""Group relative policy optimization: how R1-Zero learns (R1 2.2.1; DeepSeekMath, 2402.03300).

For each question the policy writes a group of G outputs. An output is as good as its reward
compares with its group's: the group replaces the critic of PPO.

    1. group_advantages, kl_estimate, grpo_loss    the equations, as pure functions
    2. rollout    questions -> outputs, with the log-probs they were drawn with -> rewards
    3. step       one optimizer update on a minibatch of a rollout

Several updates follow one rollout (16 in the paper), so that from the second on the policy is no
longer the one that sampled: the ratio of the two, and its clip, are for that.

Choices where the paper is silent or says two things:
- R1 Eq. 1 prints one ratio per output, DeepSeekMath Eq. 3 one per token with 1/|o|. R1 remarks that
  clipping cuts the gradients of many *tokens*, so the default is per token; `ratio="sequence"`
  is the other.
- std is the population's (ddof 0). Where a group agrees, its advantages are 0, not NaN.

Read next: train_zero.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean as mean

import torch
from torch import Tensor, nn

import rewards
from data.packing import Packed, pack
from data.problems import Problem
from model import Transformer
from runtime import parallel
from sample import Output, generate, spell
from sft import update


def group_advantages(rewards_PG: Tensor, normalize_std: bool = True) -> Tensor:
    """How much better than its group each output was, PG.

    normalize_std=False: Dr. GRPO (2503.20783), which finds that dividing by std favours questions
    that are almost always, or almost never, solved.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if not normalize_std:
        return centred_PG
    # R1 Eq. 3: A_i = (r_i - mean(r)) / std(r)
    std_P1 = rewards_PG.std(1, keepdim=True, correction=0)
    rounding = 8 * torch.finfo(rewards_PG.dtype).eps
    agreed_P1 = std_P1 <= rounding * rewards_PG.abs().amax(1, keepdim=True)
    return torch.where(agreed_P1, 0.0, centred_PG / std_P1.where(~agreed_P1, 1.0))


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """An unbiased, never negative estimate of KL(policy || reference) from the policy's samples:
    "k3" (Schulman 2020)."""
    # R1 Eq. 2: pi_ref / pi - log(pi_ref / pi) - 1
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def token_weights(
    lengths_O: Tensor, aggregation: str, *, outputs: int, tokens: int, longest: int
) -> Tensor:
    """What each token of an output counts in the loss, O. `outputs` and `tokens` count the whole
    batch, of which these outputs may be a part: the weights must not depend on how it is cut."""
    if aggregation == "output":  # DeepSeekMath Eq. 3: 1/G sum_i 1/|o_i| sum_t
        return 1 / (outputs * lengths_O)
    if aggregation == "token":  # DAPO (2503.14476) Eq. 8: 1 / sum_i |o_i|
        return torch.full_like(lengths_O, 1 / max(1, tokens))
    if aggregation == "constant":  # Dr. GRPO: 1/G 1/L, with L the longest output allowed
        return torch.full_like(lengths_O, 1 / max(1, outputs * longest))
    raise ValueError(f"unknown aggregation {aggregation!r}: output, token or constant")


def importance_ratio(logprobs_N: Tensor, old_N: Tensor, output_N: Tensor, level: str) -> Tensor:
    """rho = pi / pi_old, N: each token's own, or (R1 Eq. 1 as printed) its whole output's."""
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
        cut_N = clipped_N * advantages_N < rho_N * advantages_N  # these tokens get no gradient
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
    ratio: str = "token"
    aggregation: str = "output"
    normalize_std: bool = True
    mask_truncated: bool = False  # leave outputs that were cut off out of the loss (DAPO)
    replay_routes: bool = False  # train with the experts that were used when sampling
    max_grad_norm: float = 1.0
    row_tokens: int = 256  # outputs are packed into rows of so many tokens, or of the longest
    micro_rows: int = 16  # rows of a micro-batch
    slots: int = 256

    def __post_init__(self):
        if self.top_p != 1:
            raise ValueError(
                f"top_p={self.top_p}: training needs 1. Tokens that nucleus sampling can't draw"
                " have a probability in the loss that they didn't have when drawn"
            )
        if self.group_size < 2 or self.temperature <= 0 or self.eps <= 0 or self.beta < 0:
            raise ValueError(
                f"group_size={self.group_size}, temperature={self.temperature}, eps={self.eps},"
                f" beta={self.beta}: need a group of 2 or more, temperature > 0, eps > 0, beta >= 0"
            )


@dataclass
class Rollout:
    """Questions and what the policy answered: P prompts, and O = P*G outputs, group after group."""

    numbers: list[int]  # of the questions within the batch of all processes
    problems: list[Problem]
    prompts: list[list[int]]
    outputs: list[Output]
    texts: list[str]
    rewards_PG: Tensor
    advantages_PG: Tensor
    ref_logprobs: list[Tensor] | None = None  # a tensor for each output
    metrics: dict = field(default_factory=dict)


def rollout(
    model: Transformer, tokenizer, numbers: Sequence[int], problems: Sequence[Problem],
    prompts: Sequence[list[int]], reward: Callable[[Problem, str], float], settings: Settings, *,
    seed: int, step: int,
) -> Rollout:  # fmt: skip
    """Draw a group of outputs for each question and reward them.

    Every output draws from its own random stream, (seed, step, number of the question, place in the
    group), so that the batch is the same on any number of processes.
    """
    G = settings.group_size
    repeated = [prompt for prompt in prompts for _ in range(G)]
    streams = [(step << 32) + number * G + i for number in numbers for i in range(G)]
    outputs = generate(
        model, repeated, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        stop=(tokenizer.eos_token_id,), seed=seed, rows=streams, slots=settings.slots,
        routes=settings.replay_routes,
    )  # fmt: skip
    texts = [spell(tokenizer, output) for output in outputs]
    values = [reward(problems[i // G], text) for i, text in enumerate(texts)]
    rewards_PG = torch.tensor(values, dtype=torch.float64).view(len(problems), G)
    advantages_PG = group_advantages(rewards_PG, settings.normalize_std)
    batch = Rollout(
        list(numbers), list(problems), list(prompts), outputs, texts, rewards_PG, advantages_PG
    )
    batch.metrics = describe(batch)
    return batch


def describe(batch: Rollout) -> dict:
    """What explains a flat reward or a zero loss, as means over the outputs of all processes."""
    G = batch.rewards_PG.shape[1]
    groups = []
    for p, (problem, values_G) in enumerate(zip(batch.problems, batch.rewards_PG)):
        members = slice(p * G, (p + 1) * G)
        outputs = list(zip(batch.outputs[members], batch.texts[members], values_G.tolist()))
        signal = bool(batch.advantages_PG[p].any())
        groups.append((problem.level, signal, [judge(problem, *output) for output in outputs]))
    groups = parallel.gather_list(groups)  # a question's group is never split over processes
    rows = [row for _, _, group in groups for row in group]
    by_level: dict[int, list[float]] = {}
    for level, _, group in groups:
        by_level.setdefault(level, []).extend(row["accuracy"] for row in group)
    return dict(
        **{key: mean([row[key] for row in rows]) for key in rows[0]},
        groups_without_signal=mean(not signal for _, signal, _ in groups),
        by_level={str(level): mean(by_level[level]) for level in sorted(by_level)},
    )


def judge(problem: Problem, output: Output, text: str, reward: float) -> dict[str, float]:
    answer = rewards.extract_answer(text)
    return dict(
        reward=reward,
        accuracy=float(rewards.CHECKERS[problem.checker](answer, problem.answer)),
        format=rewards.format_reward(text),
        unparsed=float(answer is None),
        truncated=float(output.finish == "length"),
        tokens=float(len(output.tokens)),
        reflection=float(rewards.reflections(text) > 0),
    )


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

    def micro_batches(self, rows: int) -> Iterator[tuple["Laid", slice]]:
        """Some rows at a time, and which of the N tokens are theirs."""
        counts = self.mask_BT.sum(1).tolist()
        for start in range(0, len(counts), rows):
            b = slice(start, start + rows)
            n = slice(sum(counts[:start]), sum(counts[: start + rows]))
            routes = None if self.routes_BTMA is None else self.routes_BTMA[b]
            part = self.packed[b], self.mask_BT[b], self.output_N[n], self.place_N[n], routes
            yield Laid(*part), n

    def logprobs(self, model: Transformer, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, N each, of the distributions that the sampler draws from."""
        tokens_BT, positions_BT, _ = tuple(self.packed)
        logprobs_N, entropy_N, _, _ = model.logprobs(
            tokens_BT, positions_BT, self.mask_BT, temperature=temperature,
            routes_BTMA=self.routes_BTMA,
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
    """Of every output's tokens under the reference model, a tensor for each output."""
    lengths = [len(output.tokens) for output in batch.outputs]
    if not lengths:
        return []
    laid = lay_out(batch, range(len(lengths)), settings, reference.lm_head.weight.device)
    parts = [part.logprobs(reference, settings.temperature)[0]
             for part, _ in laid.micro_batches(settings.micro_rows)]  # fmt: skip
    logprobs_N = torch.cat(parts)
    table_OT = logprobs_N.new_zeros(len(lengths), max(lengths))
    table_OT[laid.output_N, laid.place_N] = logprobs_N
    return [row[:length].cpu() for row, length in zip(table_OT, lengths)]


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
    sums = Counter(loss=0.0, clip_fraction=0.0, kl=0.0, entropy=0.0, mismatch=0.0)
    if chosen:
        weight = model.lm_head.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        laid = lay_out(batch, chosen, settings, weight.device)
        drawn = [torch.tensor(batch.outputs[o].logprobs, dtype=torch.float64) for o in chosen]
        old_N = laid.pick(drawn, dtype)
        ref_N = laid.pick([batch.ref_logprobs[o] for o in chosen], dtype) if settings.beta else None
        advantages_N = batch.advantages_PG.flatten()[chosen].to(weight.device, dtype)[laid.output_N]
        weights_N = weights_O.to(weight.device, dtype)[laid.output_N]
        for part, n in laid.micro_batches(settings.micro_rows):
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
    grad_norm = update(model, [optimizer], settings.max_grad_norm)
    totals = {key: float(parallel.all_sum(value)) for key, value in sums.items()}
    means = {key: totals[key] / max(1, tokens) for key in totals if key != "loss"}
    return dict(loss=totals["loss"], **means, grad_norm=grad_norm, tokens_trained=tokens)


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
