"""The supervised step: the toy's base, cold start, rejection-sampling SFT, distillation.

    loss = - sum over the answer's tokens of w log pi(token | what stands before it)

with one weight w for all tokens of the batch, so that the update is the same however the batch is
cut into micro-batches or spread over processes.

Where it stands: DeepSeek-R1 2.3.1, 2.3.3 and 2.4; the report on DeepSeek-V3 2.1.2 and 2.2 for the
balance and the multi-token losses.

Departures from the paper:
- the optimizer is not reported by R1; the toy's base is pretrained with Muon (a laptop minute has
  few steps, and Muon makes the most of each), everything else with AdamW.

Read next: data/corpus.py (what the toy's base reads).
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import kernels
from data.corpus import Chain, Corpus, work
from data.packing import Packed, pack
from data.prompts import build_prompt
from data.tokenizer import Tokenizer
from model import Config, MoE, Routing, Transformer, balance_loss
from runtime import parallel
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.run import Run, UserError, check_finite, progress


def cosine(step: int, steps: int, lr: float, final: float, warmup: int = 0) -> float:
    """From 0 to lr in `warmup` steps, then along a cosine to `final` (R1: 5e-5 to 5e-6)."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warm_constant_decay(step: int, steps: int, warmup: int = 20, decay: float = 0.4) -> float:
    """The share of the peak rate: linear warm-up, constant, linear to 0 over the last `decay`."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def set_rates(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every learning rate to this share of its peak, which is what the optimizer began with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = share * group["peak_lr"]


@dataclass(frozen=True)
class Objective:
    """What is added to the next-token loss, and the limits of a step."""

    mtp_weight: float = 0.0  # V3: 0.3, later 0.1
    balance_alpha: float = 0.0  # V3: 1e-4, the sequence-wise balance loss
    bias_step: float = 0.0  # V3: 0.001, the auxiliary-loss-free balancing
    max_grad_norm: float = 1.0
    rows: int = 8  # rows of a micro-batch


@dataclass
class Report:
    loss: float = 0.0
    tokens: int = 0  # that the loss is over
    grad_norm: float = 0.0
    loads: list[Tensor] = field(default_factory=list)  # E, for each MoE layer: tokens it was sent


def sft_loss(
    model: Transformer,
    batch: Packed,
    mask_BT: Tensor,
    tokens: int,
    objective: Objective,
    documents: int,
) -> tuple[Tensor, list[Routing]]:
    """This micro-batch's share of the loss; the shares of a batch add up to its loss.

    mask_BT: which tokens are learned. tokens, documents: how many the whole batch has.
    """
    logprobs_N, _, hidden_BTD, routings = model.logprobs(
        batch.tokens_BT, batch.positions_BT, mask_BT
    )
    tokens, documents = max(1, tokens), max(1, documents)
    loss = -logprobs_N.sum() / tokens
    if objective.mtp_weight:
        second_BTD, _ = model.predict_second_next(hidden_BTD, batch.tokens_BT, batch.positions_BT)
        # From position t to the token at t + 2, which must be of the same document and learned.
        learned_BT = mask_BT[:, 2:] & (batch.positions_BT[:, 2:] >= 2)
        second_N, _ = kernels.linear_logprob(
            second_BTD[:, :-1][learned_BT], model.lm_head.weight, batch.tokens_BT[:, 2:][learned_BT]
        )
        loss = loss - objective.mtp_weight / tokens * second_N.sum()
    if objective.balance_alpha:
        count = int(batch.documents_BT.max()) + 1
        for routing in routings:
            share = balance_loss(routing, batch.documents_BT, count)
            loss = loss + objective.balance_alpha / documents * share
    return loss, routings


def sft_step(
    model: Transformer, optimizers: list[torch.optim.Optimizer], batch: Packed,
    mask_BT: Tensor | None = None, objective: Objective = Objective(),
) -> Report:  # fmt: skip
    """One update on this process's rows of the batch. mask_BT: the tokens to learn, by default all;
    never padding, nor the first of a document, which nothing predicts."""
    follows_BT = batch.positions_BT > 0
    mask_BT = follows_BT if mask_BT is None else mask_BT & follows_BT
    report = Report(tokens=int(parallel.all_sum(int(mask_BT.sum()))))
    documents = int(parallel.all_sum(int((batch.positions_BT == 0).sum())))
    report.loads = [
        torch.zeros(model.config.n_routed_experts) for _ in range(model.config.num_moe_layers)
    ]
    for start in range(0, len(mask_BT), objective.rows):
        rows = slice(start, start + objective.rows)
        loss, routings = sft_loss(
            model, batch[rows], mask_BT[rows], report.tokens, objective, documents
        )
        loss.backward()
        report.loss += float(loss.detach())
        for load_E, routing in zip(report.loads, routings):
            load_E += expert_load(routing, batch.positions_BT[rows])
    report.loss = float(parallel.all_sum(report.loss))
    report.grad_norm = update(model, optimizers, objective.max_grad_norm)
    if objective.bias_step and math.isfinite(report.grad_norm):
        balance(model, report.loads, objective.bias_step)
    return report


def update(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], max_grad_norm: float
) -> float:
    """Sum the gradients over processes, clip, step, clear; the norm before clipping.

    A norm that is not finite leaves the weights as they are."""
    parallel.sum_gradients(model)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if math.isfinite(norm):
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return norm


def expert_load(routing: Routing, positions_BT: Tensor) -> Tensor:
    """How many real tokens each expert was sent, E."""
    E = routing.scores_BTE.shape[-1]
    return (
        torch.bincount(routing.experts_BTA[positions_BT >= 0].flatten(), minlength=E).cpu().float()
    )


def balance(model: Transformer, loads: list[Tensor], step: float) -> None:
    """Auxiliary-loss-free balancing, by the load of the whole batch on all processes. The router
    of the multi-token prediction layer, the last one, has no load here and keeps its bias."""
    gates = [block.mlp.gate for block in model.model.layers if isinstance(block.mlp, MoE)]
    for gate, load_E in zip(gates, loads):
        load_E = parallel.all_sum(load_E)
        gate.balance(load_E.to(gate.e_score_correction_bias), step)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024): every singular direction of a matrix's update
    gets the same length. For matrices, and stacks of them; everything else belongs in AdamW."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(state["momentum"], group["momentum"])
                matrices = nesterov.reshape(-1, *p.shape[-2:])
                same_shape.setdefault(p.shape[-2:], []).append((p, matrices))
            for (rows, columns), items in same_shape.items():  # one batched product for each shape
                updates = orthogonalize(torch.cat([matrices for _, matrices in items]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (p, matrices), u in zip(items, updates.split([len(m) for _, m in items])):
                    p.sub_(u.view_as(p), alpha=scale)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest matrices with singular values near 1, by a quintic Newton-Schulz iteration."""
    # Jordan's coefficients: 5 rounds take singular values from 0.01 to 1 to between 0.7 and 1.2.
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def initialize_small(model: Transformer, seed: int) -> None:
    """The start of a tiny model: embeddings N(0, 1); matrices by fan-in; what writes into the
    residual stream (o, down) and the head zero, so that each block begins as the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed_tokens" in name:
                p.normal_(0, 1, generator=generator)
            elif any(part in name for part in ("o_proj", "down_proj", "lm_head")):
                p.zero_()
            elif p.dim() > 1:
                p.normal_(0, p.shape[-1] ** -0.5, generator=generator)


def small_optimizers(
    model: Transformer, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embedding, head, norms and routers."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        in_block = p.dim() > 1 and ".layers." in name and ".gate.weight" not in name
        (matrices if in_block else others).append(p)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=muon_lr), adam]


# ---- the toy's base ------------------------------------------------------------------------

COMPETENT = 0.97  # share of single steps right; all bases of the published runs have over 0.99


def pretrain_toy(
    tokenizer: Tokenizer, run: Run, *, seed: int, steps: int, force: bool, device: torch.device,
    dtype: torch.dtype = torch.float32, tokens: int = 2048,
) -> Transformer | None:  # fmt: skip
    """The toy's base, from random weights and the corpus of data/corpus.py, in run.out/base; None
    where Ctrl-C stopped it. Raises UserError for a base that is not competent, unless forced."""
    if (run.out / "base").is_dir():
        return load_pretrained(run.out / "base", device=device, dtype=dtype)
    model = Transformer(Config.preset("toy", vocab_size=tokenizer.vocab_size))
    initialize_small(model, seed)
    model.to(device, dtype)
    optimizers = small_optimizers(model, muon_lr=0.02, adam_lr=0.02)
    parts = dict(model=model, muon=optimizers[0], adam=optimizers[1])
    done = run.resume("pretrain", parts)
    corpus = Corpus(seed, steps)
    objective = Objective(bias_step=0.001, rows=16)
    with progress(steps, "pretrain", initial=done) as bar:
        while done < steps:
            set_rates(optimizers, warm_constant_decay(done, steps))
            with run.phase("pretrain") as timer:
                texts = parallel.shard(documents(corpus, tokenizer, done, tokens))
                batch = pack(texts, capacity=128, device=device)
                trained = sft_step(model, optimizers, batch, objective=objective)
                timer.tokens += trained.tokens
            done += 1
            for name in ("loss", "grad_norm"):
                check_finite(getattr(trained, name), done, run.checkpoints("pretrain"), name)
            bar.update(1)
            bar.set_postfix(loss=f"{trained.loss:.3f}")
            if done % 20 == 0:
                shown = dict(loss=trained.loss, grad_norm=trained.grad_norm)
                run.log(phase="pretrain", step=done, **shown, **run.timing())
            if not run.goes_on("pretrain", done, parts, every=200):
                return None
    check_competence(model, tokenizer, run, seed, force)
    save_pretrained(model, run.out / "base", tokenizer_files=tokenizer.files())
    return model


def documents(corpus: Corpus, tokenizer: Tokenizer, step: int, tokens: int) -> list[list[int]]:
    """The corpus's documents for one step, until the next one would not fit the token budget."""
    taken: list[list[int]] = []
    for text in corpus.documents(step):
        document = tokenizer.encode(text) + [tokenizer.eos_token_id]
        tokens -= len(document)
        if tokens < 0:
            return taken
        taken.append(document)


@torch.no_grad()
def check_competence(
    model: Transformer, tokenizer: Tokenizer, run: Run, seed: int, force: bool
) -> None:
    """Can the base do one step of a solution? Along the right solutions of held-out problems, its
    greedy next token should be each step's operation, copied from the question, and its value.

    Not whether it goes on to the end, nor whether it begins at all: that is left to RL.
    """
    device = model.lm_head.weight.device
    chains = [chain for chain in random_chains(seed) if chain.held_out()]
    texts = [
        f"{build_prompt(chain.question(), 'toy')} <think> first {work(chain)}" for chain in chains
    ]
    batch = pack([tokenizer.encode(text) for text in texts], capacity=128, device=device)
    predicted_BT = model(batch.tokens_BT, batch.positions_BT).argmax(-1)
    right_BT = predicted_BT[:, :-1] == batch.tokens_BT[:, 1:]
    operation_right_BT = right_BT.roll(2, 1)  # at a value: was the operation two places before?
    [equals] = tokenizer.encode(" =")
    # A value follows " ="; the operation is the token before it.
    value_BT = (batch.tokens_BT[:, :-1] == equals) & (batch.positions_BT[:, 1:] > 0)
    share = float((right_BT & operation_right_BT)[value_BT].double().mean())
    run.rewind("competence", -1)
    run.log(phase="competence", step=0, steps_right=share)
    if share < COMPETENT and not force:
        raise UserError(
            f"the base is not competent: it gets {share:.1%} of single steps right, and below"
            f" {COMPETENT:.0%} there is little for RL to reinforce. Raise --pretrain-steps, try"
            " another --seed,"
            " or go on with --force"
        )
    if parallel.is_main():
        print(f"the base gets {share:.1%} of single steps right")


def random_chains(seed: int, count: int = 2000) -> list[Chain]:
    rng = random.Random(f"competence {seed}")
    return [Chain.random(rng.randint(2, 10), rng) for _ in range(count)]
