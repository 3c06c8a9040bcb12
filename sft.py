"""The supervised step: the toy's base, cold start, rejection-sampling SFT, distillation.

    loss = - sum over the answer's tokens of w log pi(token | what stands before it)

with one weight w for all tokens of the batch, so that the update is the same however the batch is
cut into micro-batches or spread over processes.

    1. sft_loss, sft_step, update      the step
    2. pretrain_toy                    the toy's base, with Muon, and the gate that it has to pass
    3. finetune, learn_answers         epochs over examples: cold start, the third stage, students
    4. collect, verdict                rejection sampling: which outputs become examples

Where it stands: DeepSeek-R1 2.3.1, 2.3.3 and 2.4; the report on DeepSeek-V3 2.1.2 and 2.2 for the
balance and the multi-token losses.

Departures from the paper:
- the toy's base is pretrained with Muon, DeepSeek-V3 with AdamW: a laptop minute has few steps, and
  Muon makes the most of each. Everything else here has AdamW; R1's optimizer is not reported.

Read next: data/corpus.py (what the toy's base reads).
"""

import json
import math
import operator
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import kernels
import rewards
from data.corpus import WORDS, Chain, Corpus, Mix, prose, work
from data.packing import Packed, pack
from data.problems import Generated, Listed, Problem
from data.prompts import answer_text, build_judgement, build_prompt, encode_prompt
from data.tokenizer import Tokenizer
from model import Config, MoE, Routing, Transformer, balance_loss
from runtime import parallel
from runtime.optimizer import adamw
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.run import Run, UserError, check_finite, progress, write_file
from runtime.sharding import clip_grad_norm, in_step
from sample import fitting_prompts, generate, spell

T = TypeVar("T")


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
        # V3 Eq. 23, 24: P = OutHead(h);  L_MTP = CrossEntropy(P, the token at t + 2)
        second_N, _ = kernels.linear_logprob(
            second_BTD[:, :-1][learned_BT], model.lm_head.weight, batch.tokens_BT[:, 2:][learned_BT]
        )
        # V3 Eq. 25: L_MTP = lambda / D sum_k L_MTP^k, with D = 1
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

    def nothing() -> Tensor:
        idle = pack([[0, 0, 0]], 3, mask_BT.device)
        return sft_loss(model, idle, idle.positions_BT > 0, 1, objective, 1)[0]

    with in_step(model, nothing):
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
    norm = clip_grad_norm(list(model.parameters()), max_grad_norm)
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
    # Departs from V3 4.2, optimizer: Muon, for the toy's base has few steps and Muon makes most of
    # each. The report has AdamW.
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
    dtype: torch.dtype = torch.float32, tokens: int = 2048, mix: Mix = Mix(), preset: str = "toy",
) -> Transformer | None:  # fmt: skip
    """The toy's base, from random weights and the corpus of data/corpus.py, in run.out/base; None
    where Ctrl-C stopped it. Raises UserError for a base that is not competent, unless forced."""
    if parallel.from_main((run.out / "base").is_dir()):
        return load_pretrained(run.out / "base", device=device, dtype=dtype)
    model = Transformer(Config.preset(preset, vocab_size=tokenizer.vocab_size))
    initialize_small(model, seed)
    model.to(device, dtype)
    optimizers = small_optimizers(model, muon_lr=0.02, adam_lr=0.02)
    parts = dict(model=model, muon=optimizers[0], adam=optimizers[1])
    done = run.resume("pretrain", parts)
    corpus = Corpus(seed, steps, mix)
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
    check_competence(model, tokenizer, run, seed, force, mix)
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
    model: Transformer, tokenizer: Tokenizer, run: Run, seed: int, force: bool, mix: Mix = Mix()
) -> None:
    """Can the base do one step of a solution? Along the right solutions of held-out problems, its
    greedy next token should be each step's operation, copied from the question, and its value.

    Not whether it goes on to the end, nor whether it begins at all: that is left to RL.
    """
    device = model.lm_head.weight.device
    texts = solutions(seed, mix)
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


def solutions(seed: int, mix: Mix, count: int = 2000) -> list[str]:
    """The held-out ones of `count` random problems, each with its solution."""
    rng, texts = random.Random(f"competence {seed}"), []
    for number in range(count):
        chain = Chain.random(rng.randint(2, mix.longest), rng)
        language = "zh" if mix.chinese and number % 2 else "en"
        thoughts = f"{WORDS[language]['first']} {work(chain)}"
        if mix.prose:
            thoughts = prose(thoughts, language, rng)
        if chain.held_out():
            texts.append(f"{build_prompt(chain.question(language), 'toy')} <think> {thoughts}")
    return texts


# ---- fine-tuning ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """How a stage goes through its examples; R1's settings."""

    epochs: int = 2  # R1: 2 to 3
    batch: int = 128  # examples of an update
    lr: float = 5e-5
    final_lr: float = 5e-6  # along a cosine
    warmup: int = 0
    row_tokens: int = 32768  # examples are packed into rows of so many tokens
    save_every: int = 100
    states: str = "master"  # of the optimizer of a model in bf16: runtime/optimizer.py


class Example(NamedTuple):
    prompt: list[int]
    answer: list[int]  # the part that is learned, the stop token included


def finetune(
    model: nn.Module, examples: Sequence[T], learn: Callable[..., Report], tuning: Tuning, run: Run,
    phase: str, seed: int, until: int | None = None,
) -> bool:  # fmt: skip
    """Epochs over the examples, from run's last checkpoint of this phase; False where Ctrl-C
    stopped it. learn(optimizers, examples of a batch) makes one update: `learn_answers`, say.
    until: stop after so many updates, saved, for another call to go on."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(trained, tuning.lr, tuning.states, seed)
    state = dict(model=model, optimizer=optimizer)
    done = run.resume(phase, state)
    batches = -(-len(examples) // tuning.batch)  # of an epoch
    steps, order, shuffled = tuning.epochs * batches, [], -1
    last = steps if until is None else min(until, steps)
    with progress(steps, phase, initial=done) as bar:
        while done < last:
            epoch, place = divmod(done, batches)
            if shuffled != epoch:
                rng = random.Random(f"{phase} {seed} {epoch}")
                order, shuffled = rng.sample(range(len(examples)), len(examples)), epoch
            chosen = order[place * tuning.batch : (place + 1) * tuning.batch]
            final = tuning.final_lr / tuning.lr
            set_rates([optimizer], cosine(done, steps, 1.0, final, tuning.warmup))
            with run.phase("sft") as timer:
                report = learn([optimizer], [examples[i] for i in chosen])
                timer.tokens += report.tokens
            done += 1
            for name in ("loss", "grad_norm"):
                check_finite(getattr(report, name), done, run.checkpoints(phase), name)
            bar.update(1)
            bar.set_postfix(loss=f"{report.loss:.3f}")
            if done % 10 == 0 or done == last:
                shown = dict(loss=report.loss, grad_norm=report.grad_norm, tokens=report.tokens)
                run.log(phase=phase, step=done, epoch=done / batches, **shown, **run.timing())
            every = 1 if done == until else tuning.save_every
            if not run.goes_on(phase, done, state, every=every):
                return False
    return True


def example(tokenizer: Tokenizer, question: str, response: str) -> Example:
    answer = tokenizer.encode(answer_text(response, tokenizer.template))
    return Example(encode_prompt(tokenizer, question), answer + [tokenizer.end_id])


def learn_answers(model: Transformer, tuning: Tuning, micro_tokens: int) -> Callable[..., Report]:
    """For `finetune`: the loss over the answers' tokens of a batch of Examples."""

    def learn(optimizers: list[torch.optim.Optimizer], batch: Sequence[Example]) -> Report:
        mine = parallel.shard(batch)
        documents = [example.prompt + example.answer for example in mine]
        capacity = max(tuning.row_tokens, *map(len, documents), 1)
        packed = pack(documents, capacity, model.lm_head.weight.device)
        starts = torch.tensor([len(example.prompt) for example in mine] or [0])
        starts_BT = starts.to(packed.positions_BT.device)[packed.documents_BT.clamp(min=0)]
        rows = max(1, micro_tokens // max(1, packed.tokens_BT.shape[1]))
        mask_BT = packed.positions_BT >= starts_BT
        return sft_step(model, optimizers, packed, mask_BT, Objective(rows=rows))

    return learn


def learn_rows(
    model: nn.Module, losses: Callable[[Sequence[T]], Tensor], at_once: int
) -> Callable[..., Report]:
    """For `finetune`: the mean of losses(rows), one for each of a batch's rows, at_once of them in
    a forward pass."""

    def learn(optimizers: list[torch.optim.Optimizer], batch: Sequence[T]) -> Report:
        mine, report = parallel.shard(batch), Report()
        with in_step(model, lambda: losses(batch[:1])):
            for start in range(0, len(mine), at_once):
                loss = losses(mine[start : start + at_once]).sum() / len(batch)
                loss.backward()
                report.loss += float(loss.detach())
        report.loss = float(parallel.all_sum(report.loss))
        report.grad_norm = update(model, optimizers, Objective().max_grad_norm)
        return report

    return learn


# ---- rejection sampling --------------------------------------------------------------------

VERDICTS = ("kept", "cut off", "wrong", "mixed", "repeated", "too long", "code", "twice", "no room")


@dataclass(frozen=True)
class Readable:
    """What a person likes to read (R1 2.3.1, 2.3.3). The limits are not reported."""

    least_consistency: float = 0.95  # of the reasoning's words, in the question's language
    longest_paragraph: int = 300  # words, or Chinese characters
    most_repeats: int = 3  # times that the same ten words in a row may stand in a text
    tags: bool = True  # whether its template asks for <answer> tags


def verdict(
    problem: Problem, text: str, finished: bool, correct: bool | None, readable: Readable
) -> str:
    """ "kept", or the first reason to drop an output. correct: what a judge says, None to apply the
    problem's rule."""
    # R1 2.3.3, filter: no mixed languages, long paragraphs and code blocks, and correct ones only
    if not finished:
        return "cut off"
    if correct is None:
        check = rewards.CHECKERS[problem.checker]
        correct = rewards.accuracy_reward(text, problem.answer, check) == 1
    if not correct or not rewards.format_reward(text, readable.tags):
        return "wrong"
    if rewards.language_reward(text, problem.language) < readable.least_consistency:
        return "mixed"
    if "```" in text:
        return "code"
    words = rewards.WORD.findall(text)
    tens = Counter(zip(*(words[i:] for i in range(10))))
    if max(tens.values(), default=0) > readable.most_repeats:
        return "repeated"
    longest = max(len(rewards.WORD.findall(paragraph)) for paragraph in text.split("\n"))
    return "too long" if longest > readable.longest_paragraph else "kept"


def collect(
    model: Transformer, tokenizer: Tokenizer, source: Generated | Listed, file: Path, run: Run, *,
    questions: int, samples: int, judge: Callable[..., list[str]], temperature: float, top_p: float,
    max_new_tokens: int, seed: int, slots: int, chunk: int = 64,
) -> list[dict] | None:  # fmt: skip
    """What the model answers to `questions` questions, `samples` times each, with a verdict:
    judge(problems, texts, finished) -> "kept" or why not. None where Ctrl-C stopped it.

    It goes into a file, a line of JSON for each output, chunk by chunk; a killed run goes on after
    the last whole chunk. The same answer to the same question is kept once.
    """
    rows = []
    if parallel.is_main():
        rows = read_rows(file, whole=chunk * samples, total=questions * samples)
    done, seen = parallel.all_sum(len(rows)) // samples, set()
    mark_repeated(rows, seen)
    with progress(questions, f"sample {file.stem}", initial=done) as bar:
        while done < questions:
            count = min(chunk, questions - done)
            problems = source.batch(chunk, seed=seed, step=done // chunk)[:count]
            with run.phase("sample") as timer:
                found = answers(
                    model, tokenizer, problems, samples, judge, slots=slots,
                    temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed,
                    first=done * samples,
                )  # fmt: skip
                timer.tokens += sum(row["tokens"] for row in found)
            done += count
            if parallel.is_main():
                file.parent.mkdir(parents=True, exist_ok=True)
                mark_repeated(found, seen)
                with file.open("a", encoding="utf-8") as out:
                    out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            bar.update(count)
            if run.stopping and done < questions:
                return None
    run.rewind(f"sample {file.stem}", -1)
    run.log(phase=f"sample {file.stem}", step=done, **run.timing())
    parallel.barrier()
    return read_rows(file)


def answers(
    model: Transformer, tokenizer: Tokenizer, problems: list[Problem], samples: int,
    judge: Callable[..., list[str]], *, max_new_tokens: int, first: int, **sampling,
) -> list[dict]:  # fmt: skip
    """The rows of one chunk, in the order of the questions, on all processes."""
    prompts, fitting = fitting_prompts(model, tokenizer, problems, max_new_tokens, or_none=True)
    mine = parallel.shard(fitting)
    outputs = generate(
        model, [prompts[i] for i in mine for _ in range(samples)], max_new_tokens=max_new_tokens,
        stop=tokenizer.stop_ids, **sampling,
        rows=[first + i * samples + k for i in mine for k in range(samples)],
    )  # fmt: skip
    asked = [problems[i] for i in mine for _ in range(samples)]
    texts = [spell(tokenizer, output) for output in outputs]
    said = judge(asked, texts, [output.finish == "stop" for output in outputs])
    judged = zip(asked, texts, outputs, said)
    rows = [row(problem, text.strip(), len(o.tokens), why) for problem, text, o, why in judged]
    groups = [rows[j : j + samples] for j in range(0, len(rows), samples)]
    found = dict(zip(fitting, parallel.gather_list(groups)))
    none = {i: [row(problems[i], "", 0, "no room")] * samples for i in range(len(problems))}
    return [each for i in range(len(problems)) for each in found.get(i, none[i])]


def mark_repeated(rows: list[dict], seen: set[tuple[str, str]]) -> None:
    """The same kept answer to the same question is kept once."""
    for row in rows:
        if row["verdict"] == "kept":
            told = row["question"], row["response"]
            row["verdict"] = "twice" if told in seen else "kept"
            seen.add(told)


def row(problem: Problem, response: str, tokens: int, verdict: str) -> dict:
    asked = {key: getattr(problem, key) for key in ("question", "answer", "language", "checker")}
    return dict(**asked, response=response, tokens=tokens, verdict=verdict)


@torch.no_grad()
def judge_answers(
    model: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem],
    answers: Sequence[str | None], at_once: int = 64,
) -> list[bool]:  # fmt: skip
    """The model as generative reward model (R1 2.3.3): whether, asked if an answer is the same as
    the reference, it finds yes likelier than no. No answer is never right."""
    given = [i for i, answer in enumerate(answers) if answer]
    texts = []
    for i in given:
        asked = problems[i].question, problems[i].answer, answers[i]
        texts.append(tokenizer.encode(build_judgement(*asked, tokenizer.template)))
    likely: dict[str, list[float]] = {" yes": [], " no": []}
    with in_step(model):  # each process has answers of its own
        for word, logprobs in likely.items():
            said = tokenizer.encode(word)
            for start in range(0, len(texts), at_once):
                some = [text + said for text in texts[start : start + at_once]]
                logprobs += ending_logprobs(model, some, len(said))
    # R1 2.3.3, judge: the model reads reference and answer, and says whether they are the same
    right = dict(zip(given, map(operator.gt, likely[" yes"], likely[" no"])))
    return [right.get(i, False) for i in range(len(answers))]


def ending_logprobs(model: Transformer, texts: list[list[int]], last: int) -> list[float]:
    """The log-probability of the last tokens of each text."""
    packed = pack(texts, max(256, *map(len, texts)), model.lm_head.weight.device)
    lengths = torch.tensor([len(text) for text in texts], device=packed.tokens_BT.device)
    number_BT = packed.documents_BT.clamp(min=0)
    mask_BT = (packed.positions_BT >= lengths[number_BT] - last) & (packed.documents_BT >= 0)
    logprobs_N, *_ = model.logprobs(packed.tokens_BT, packed.positions_BT, mask_BT)
    sums = logprobs_N.new_zeros(len(texts)).index_add(0, number_BT[mask_BT], logprobs_N)
    return sums.tolist()


def write_rows(file: Path, rows: Sequence[dict]) -> None:
    """A file of JSON lines, whole or not at all."""
    if parallel.is_main():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(file, "".join(lines).encode())
    parallel.barrier()


def read_rows(
    file: Path, fields: dict[str, type] = {}, *, whole: int = 0, total: int = 0
) -> list[dict]:
    """The JSON lines of a file. whole: cut off what follows the last whole chunk of so many lines,
    which a killed run has left, unless all `total` are there. Raises FileNotFoundError, or
    UserError with file and line for what is no JSON object with these fields of these types."""
    if whole and not file.exists():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    if whole and (rest or len(lines) != total):
        lines = lines[: len(lines) // whole * whole]
        write_file(file, b"".join(line + b"\n" for line in lines))
    elif rest:
        lines.append(rest)  # somebody's own file, without a line break at its end
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"{file}:{number}: {error}; expected a JSON object") from None
        if found is None and not line.strip():
            continue
        known = isinstance(found, dict)
        if not (known and all(type(found.get(name)) is kind for name, kind in fields.items())):
            kinds = ", ".join(kind.__name__ for kind in fields.values())
            raise UserError(
                f"{file}:{number}: found {line[:60].decode(errors='replace')!r}; expected a JSON"
                + f" object with {', '.join(fields)} ({kinds})".removesuffix(" with  ()")
            )
        rows.append(found)
    return rows


def count_verdicts(rows: list[dict], name: str, run: Run) -> list[dict]:
    """Log and print how many were dropped, and why; the kept ones."""
    counts = Counter(row["verdict"] for row in rows)
    counts = {key: counts[key] for key in VERDICTS if counts[key] or key == "kept"}
    run.rewind(f"filter {name}", -1)
    run.log(phase=f"filter {name}", step=0, outputs=len(rows), **counts)
    if parallel.is_main():
        shown = ", ".join(f"{key} {count}" for key, count in counts.items())
        print(f"{name}: of {len(rows)} outputs {shown}")
    return [row for row in rows if row["verdict"] == "kept"]
