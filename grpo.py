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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean as mean

import torch
from torch import Tensor

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
    agreed_P1 = rewards_PG.amax(1, keepdim=True) == rewards_PG.amin(1, keepdim=True)
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
    logprobs_N: Tensor, old_N: Tensor, ref_N: Tensor | None, advantages_N: Tensor, weights_N: Tensor,
    output_N: Tensor, *, eps: float, beta: float, eps_high: float | None = None, ratio: str = "token",
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
    """How outputs are drawn and what is made of them. The defaults are R1-Zero's, where reported."""

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
        groups.append((problem.level, [judge(problem, *output) for output in outputs]))
    groups = parallel.gather_list(groups)  # a question's group is never split over processes
    rows = [row for _, group in groups for row in group]
    by_level: dict[int, list[float]] = {}
    for level, group in groups:
        by_level.setdefault(level, []).extend(row["accuracy"] for row in group)
    same = [len({row["reward"] for row in group}) == 1 for _, group in groups]
    return dict(
        **{key: mean([row[key] for row in rows]) for key in rows[0]},
        groups_without_signal=mean(same),
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
    """Outputs packed into rows, and where each of their N tokens came from."""

    packed: Packed
    mask_BT: Tensor  # the outputs' tokens; prompts and padding are not trained
    output_N: Tensor
    place_N: Tensor
    routes_BTMA: Tensor | None

    def pick(self, values: list[Tensor]) -> Tensor:
        """From a tensor for each output, the numbers of the N tokens."""
        padded_OT = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        return padded_OT[self.output_N.cpu(), self.place_N.cpu()].to(self.output_N.device)


def lay_out(
    prompts: list[list[int]],
    outputs: list[Output],
    row_tokens: int,
    replay: bool,
    device: torch.device,
) -> Laid:
    """prompts: one for each output."""
    documents = [prompt + output.tokens for prompt, output in zip(prompts, outputs)]
    packed = pack(documents, max(row_tokens, *map(len, documents)), device)
    start_O = torch.tensor([len(prompt) for prompt in prompts], device=device)
    is_real_BT = packed.documents_BT >= 0
    mask_BT = is_real_BT & (packed.positions_BT >= start_O[packed.documents_BT.clamp(min=0)])
    output_N = packed.documents_BT[mask_BT]
    place_N = packed.positions_BT[mask_BT] - start_O[output_N]
    routes_BTMA = None
    if replay:
        # The last token of a document was never fed when sampling: -1 leaves it to the router.
        shape = (*mask_BT.shape, *outputs[0].routes.shape[1:])
        routes_BTMA = torch.full(shape, -1, dtype=torch.int16)
        for o, output in enumerate(outputs):
            row, first = (
                ((packed.documents_BT == o) & (packed.positions_BT == 0)).nonzero()[0].tolist()
            )
            routes_BTMA[row, first : first + len(output.routes)] = output.routes
        routes_BTMA = routes_BTMA.to(device)
    return Laid(packed, mask_BT, output_N, place_N, routes_BTMA)


def micro_batches(laid: Laid, rows: int):
    """(slice of the rows, slice of the N tokens) for each micro-batch."""
    counts = laid.mask_BT.sum(1).tolist()
    first = 0
    for start in range(0, len(counts), rows):
        size = sum(counts[start : start + rows])
        yield slice(start, start + rows), slice(first, first + size)
        first += size


def token_logprobs(
    model: Transformer, laid: Laid, rows: slice, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the outputs' tokens under the distribution that is sampled from."""
    part = laid.packed[rows]
    routes = None if laid.routes_BTMA is None else laid.routes_BTMA[rows]
    logprobs_N, entropy_N, _, _ = model.logprobs(
        part.tokens_BT,
        part.positions_BT,
        laid.mask_BT[rows],
        temperature=temperature,
        routes_BTMA=routes,
    )
    return logprobs_N, entropy_N


@torch.no_grad()
def reference_logprobs(reference: Transformer, batch: Rollout, settings: Settings) -> list[Tensor]:
    """Of every output's tokens under the reference model, a tensor for each output."""
    G, device = settings.group_size, reference.lm_head.weight.device
    prompts = [prompt for prompt in batch.prompts for _ in range(G)]
    laid = lay_out(prompts, batch.outputs, settings.row_tokens, settings.replay_routes, device)
    lengths = [len(output.tokens) for output in batch.outputs]
    table_OT = torch.zeros(
        len(lengths), max(lengths), dtype=reference.lm_head.weight.dtype, device=device
    )
    for rows, tokens in micro_batches(laid, settings.micro_rows):
        logprobs_N, _ = token_logprobs(reference, laid, rows, settings.temperature)
        table_OT[laid.output_N[tokens], laid.place_N[tokens]] = logprobs_N.to(table_OT.dtype)
    return [row[:n].cpu() for row, n in zip(table_OT, lengths)]


def step(
    model: Transformer, optimizer: torch.optim.Optimizer, batch: Rollout, settings: Settings,
    minibatch: int = 0, minibatches: int = 1,
) -> dict:  # fmt: skip
    """One update on the minibatch-th of `minibatches` parts of the rollout's questions, on all
    processes together; this process holds some of the outputs, and may hold none."""
    G, device = settings.group_size, model.lm_head.weight.device
    total = int(parallel.all_sum(len(batch.numbers)))
    mine = [
        p for p, number in enumerate(batch.numbers) if number * minibatches // total == minibatch
    ]
    chosen = [p * G + i for p in mine for i in range(G)]
    if settings.mask_truncated:
        chosen = [o for o in chosen if batch.outputs[o].finish == "stop"]
    lengths = torch.tensor(
        [float(len(batch.outputs[o].tokens)) for o in chosen], dtype=torch.float64
    )
    outputs_all, tokens_all = (
        int(parallel.all_sum(len(chosen))),
        int(parallel.all_sum(int(lengths.sum()))),
    )
    weights_O = token_weights(
        lengths, settings.aggregation, outputs=outputs_all, tokens=tokens_all,
        longest=settings.max_new_tokens,
    )  # fmt: skip
    sums: dict[str, float] = dict.fromkeys(
        ("loss", "clip_fraction", "kl", "entropy", "mismatch"), 0.0
    )
    if chosen:
        outputs = [batch.outputs[o] for o in chosen]
        prompts = [batch.prompts[o // G] for o in chosen]
        laid = lay_out(prompts, outputs, settings.row_tokens, settings.replay_routes, device)
        old_N = laid.pick([torch.tensor(o.logprobs, dtype=torch.float64) for o in outputs])
        ref_N = None
        if settings.beta:
            ref_N = laid.pick([batch.ref_logprobs[o] for o in chosen])
        advantages_N = batch.advantages_PG.flatten()[chosen].to(device)[laid.output_N]
        weights_N = weights_O.to(device)[laid.output_N]
        for rows, tokens in micro_batches(laid, settings.micro_rows):
            logprobs_N, entropy_N = token_logprobs(model, laid, rows, settings.temperature)
            cast = logprobs_N.dtype
            loss, stats = grpo_loss(
                logprobs_N, old_N[tokens].to(cast), None if ref_N is None else ref_N[tokens].to(cast),
                advantages_N[tokens].to(cast), weights_N[tokens].to(cast), laid.output_N[tokens],
                eps=settings.eps, eps_high=settings.eps_high, beta=settings.beta, ratio=settings.ratio,
            )  # fmt: skip
            loss.backward()
            sums["loss"] += float(loss.detach())
            sums["entropy"] += float(entropy_N.sum())
            sums["mismatch"] += float((logprobs_N.detach() - old_N[tokens]).abs().sum())
            sums["clip_fraction"] += float(stats["clip_fraction"])
            sums["kl"] += float(stats["kl"])
    grad_norm = update(model, [optimizer], settings.max_grad_norm)
    means = {
        key: float(parallel.all_sum(value)) / max(1, tokens_all) for key, value in sums.items()
    }
    means["loss"] *= max(1, tokens_all)  # a sum of weighted terms already
    return dict(**means, grad_norm=grad_norm, tokens_trained=tokens_all)
