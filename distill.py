"""Distillation: a small dense model learns to reason from R1's outputs alone (R1 2.4 and 3).

    python distill.py                                       the toy, from runs/r1/r1
    python distill.py --compare-rl                          and RL on the same base, as dear
    python distill.py --preset qwen-1.5b --teacher DIR --student DIR --data FILE

    1. the teacher answers questions; what is right and readable is the dataset (dataset.jsonl)
    2. SFT of the student's base on it, without any RL: distilled/
    3. with --compare-rl, R1-Zero's RL on the same base instead, until it has used as many
       CPU-seconds as 1 and 2 together: rl/

The toy's student is pretrained first, on the corpus that its teacher's base read. result.json has
the teacher, the base and both students; curves.json (and distill.png) what they had learned after
how many CPU-seconds, report.html every curve. The same command continues a run that was stopped, at
any moment.

Departures from the paper, besides size:
- the dataset is of reasoning only: the paper's 800k samples have 200k general ones;
- the paper compares students after any compute (RL: over 10k updates); here both use the same
  (--rl-cost gives RL more), and the curve without the cost of the samples is for whom they are
  there anyway;
- the evaluation samples at T = 1 and top-p 1, as RL does (the paper: 0.6 and 0.95);
- the toy's RL is rewarded for accuracy alone, its best recipe: with the format's reward besides, it
  may learn to guess in the right format (LOG.md);
- not reported and chosen here: AdamW without weight decay, the samples for each question, the
  limits of what is readable, R1-Zero's settings for the RL that is compared.

Read next: LOG.md (what was tried).
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import grpo
import rewards
import sft
from data.corpus import BILINGUAL
from data.problems import Generated, Listed, Problem, load
from data.prompts import check_template
from data.tokenizer import Tokenizer
from model import PRESETS as MODELS
from model import Config as ModelConfig
from model import Transformer
from runtime import parallel
from runtime.configs import read_config
from runtime.flags import Machine
from runtime.plot import draw_distillation
from runtime.pretrained import save_pretrained
from runtime.run import Run, UserError, flag, launch, parse, pick_device
from runtime.sharding import check_grid, shard
from sample import evaluate, measure, open_model, table, write_page

# R1, the table of the distilled models: the base of each student, and its highest learning rate.
STUDENTS = {
    "qwen-1.5b": ("Qwen2.5-Math-1.5B", 1e-4),
    "qwen-7b": ("Qwen2.5-Math-7B", 8e-5),
    "qwen-14b": ("Qwen2.5-14B", 7e-5),
    "qwen-32b": ("Qwen2.5-32B", 6e-5),
    "llama-8b": ("Llama-3.1-8B", 5e-5),
    "llama-70b": ("Llama-3.3-70B-Instruct", 2e-5),
}
# 800k samples; 2 to 3 epochs, batch 64, context 32,768, cosine to a tenth of the learning rate.
# What follows max_new_tokens is R1-Zero's, for the RL that is compared.
PAPER = dict(
    teacher="DeepSeek-R1", data="train.jsonl", samples=800_000, per_question=4, epochs=2, batch=64,
    decay=0.1, context=32768, max_new_tokens=30720, questions=512, group_size=16, minibatches=16,
    rl_lr=3e-6, beta=0.001, format_weight=1.0, refresh=400, micro_tokens=32768,
)  # fmt: skip


@dataclass(frozen=True)
class Config(Machine):
    teacher: str = flag("runs/r1/r1", "directory of the model that writes the dataset")
    student: str = flag("toy-student", "directory of the base, or a preset of model.py to pretrain")
    data: str = flag("bilingual-chain", "questions: bilingual-chain or a JSONL file")
    test_data: str | None = flag(None, "JSONL file to evaluate on (default: held-out part)")
    template: str | None = flag(
        None, "prompt template: r1-zero, toy or a chat's (default: each model's own)"
    )
    out: str = flag("runs/distill", "directory of the run")
    seed: int = flag(0, "random seed")
    compare_rl: bool = flag(False, "RL on the same base as well, at the same cost")
    pretrain_steps: int = flag(1200, "updates that make a toy student's base, of 2048 tokens each")
    # The dataset.
    samples: int = flag(1500, "outputs that the teacher writes, before they are filtered")
    per_question: int = flag(1, "of these to each question")
    temperature: float = flag(1.0, "at which it writes them")
    top_p: float = flag(1.0, "nucleus: the fewest tokens that together are as probable as this")
    least_consistency: float = flag(0.95, "share of a kept reasoning's words in its language")
    longest_paragraph: int = flag(300, "words of the longest paragraph that is kept")
    # Distillation.
    epochs: int = flag(4, "passes over the dataset")
    batch: int = flag(64, "examples of an update")
    lr: float = flag(5e-3, "highest learning rate")
    decay: float = flag(0.1, "share of it that the cosine ends at")
    context: int = flag(128, "tokens of a row of examples; longer ones are left out")
    # RL.
    rl_cost: float = flag(1.0, "what it may cost, as a multiple of distilling and its samples")
    questions: int = flag(32, "questions of a rollout")
    group_size: int = flag(8, "outputs for each question (G)")
    minibatches: int = flag(2, "updates that follow one rollout")
    rl_lr: float = flag(1e-3, "learning rate of RL")
    warmup: int = flag(4, "updates over which it rises")
    eps: float = flag(0.2, "clip range of the ratio")
    beta: float = flag(0.0, "weight of the KL to the reference; 0 saves its forward pass")
    refresh: int = flag(40, "updates after which the policy becomes the reference")
    # Departs from R1 2.2.2, student: accuracy alone; so small a base may else learn to guess in the
    # right format (LOG.md).
    format_weight: float = flag(0.0, "weight of the format reward beside the accuracy's 1")
    # Evaluation.
    max_new_tokens: int = flag(112, "longest output")
    eval_problems: int = flag(224, "held-out problems")
    eval_samples: int = flag(16, "outputs for each of them, at temperature 1 and top-p 1")
    curve_problems: int = flag(105, "of these for a point of a curve")
    curve_samples: int = flag(4, "outputs for each of them")
    points: int = flag(8, "of the distilled student's curve, which is also how often it is saved")
    rollouts: int = flag(3, "between two points of the curve of RL, and two of its checkpoints")

    def __post_init__(self):
        super().__post_init__()
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if self.samples % self.per_question:
            raise UserError(
                f"--samples {self.samples}: a multiple of --per-question, {self.per_question}"
            )
        if self.minibatches > self.questions:
            most = f"at most --questions, {self.questions}"
            raise UserError(f"--minibatches {self.minibatches}: {most}")
        if not 0 < self.decay <= 1 or min(self.lr, self.rl_lr, self.rl_cost) <= 0:
            raise UserError(
                f"--lr {self.lr}, --rl-lr {self.rl_lr}, --rl-cost {self.rl_cost}, --decay"
                f" {self.decay}: all are more than 0, and --decay is at most 1"
            )
        if self.student in MODELS and self.data != "bilingual-chain":
            raise UserError(
                f"--data {self.data} needs --student DIR: the base that this program pretrains"
                " knows bilingual-chain only"
            )
        if self.student in MODELS and self.dtype == "bfloat16":
            raise UserError("--dtype bfloat16 needs --student DIR: a toy's is trained in float32")
        if self.template is not None:
            check_template(self.template)
        settings(self)  # and so does this for what concerns GRPO


COUNTS = ("pretrain_steps", "samples", "per_question", "epochs", "batch", "context", "questions",
          "minibatches", "refresh", "eval_problems", "eval_samples", "curve_problems",
          "curve_samples", "points", "rollouts", "max_new_tokens")  # fmt: skip
CHUNK = 256  # questions that are sampled, and paid, at a time
MAY_CHANGE = ("compare_rl", "slots", "micro_tokens")
PRESETS = {
    "toy": {},
    **{name: dict(PAPER, student=base, lr=lr, out=f"runs/distill-{name}")
       for name, (base, lr) in STUDENTS.items()},
}  # fmt: skip


@dataclass
class Lab:
    """What every part works with; and the ledger, curves.json: what has been spent, in seconds, and
    what each student could do when it had cost so much."""

    config: Config
    run: Run
    source: Generated | Listed
    held_out: list[Problem]
    tokenizer: Tokenizer | None = None  # the student's
    results: dict[str, dict] = field(default_factory=dict)
    asked: int = 0  # questions that the teacher has answered
    spent: Counter[str] = field(default_factory=Counter)  # on samples, distilled, rl
    curves: dict[str, list[dict]] = field(default_factory=lambda: {"distilled": [], "rl": []})

    def __post_init__(self):
        file = self.run.out / "curves.json"
        if file.exists():
            saved = json.loads(file.read_text())
            self.asked, self.curves = saved["asked"], saved["curves"]
            self.spent = Counter(saved["spent"])

    def save(self) -> None:
        ledger = dict(asked=self.asked, spent=self.spent, curves=self.curves)
        self.run.save_json("curves.json", ledger)

    @contextmanager
    def paying(self, name: str) -> Iterator[None]:
        """Enter what is done here in the ledger: CPU-seconds of all processes and threads or, with
        GPUs, seconds. What is killed here has no entry: it will be done again."""
        clock = time.process_time if pick_device(self.config.device).type == "cpu" else time.time
        start = clock()
        yield
        self.spent[name] += parallel.all_sum(clock() - start)
        self.save()

    def follow(
        self, name: str, model: Transformer, learn: Callable[[int], bool], *, part: int,
        total: float = math.inf, budget: float = math.inf,
    ) -> bool:  # fmt: skip
        """Learn in parts of so many updates, with a point of the curve after each, until all are
        done or the budget is spent; learn(updates) goes on to so many, and saves at their end only:
        what is saved has to be paid. False where stopped."""
        curve = self.curves[name]
        done = curve[-1]["step"] if curve else 0
        while True:
            with self.paying(name):
                going = learn(done)  # at first from the checkpoint of a run that was stopped
            if not going:
                return False
            if not curve or curve[-1]["step"] < done:
                curve.append(self.point(name, model, done))
                self.save()
            if done >= total or curve[-1]["seconds"] >= budget:
                return True
            done = min(done + part, total)

    def point(self, name: str, model: Transformer, step: int) -> dict:
        """What the student can do after `step` updates, and what it had cost. Not charged."""
        config = self.config
        with self.run.phase("evaluate"):
            found = evaluate(
                model, self.tokenizer, self.held_out[: config.curve_problems],
                samples=config.curve_samples, temperature=1.0, top_p=1.0, seed=config.seed,
                max_new_tokens=config.max_new_tokens, slots=config.slots,
                title=f"{name} {step}",
            )  # fmt: skip
        numbers = {"pass@1": found["pass@1"], "tokens": found["tokens"]}
        return {"step": step, "seconds": self.spent[name], **numbers}

    def assess(self, name: str, model: Transformer, tokenizer: Tokenizer | None = None) -> None:
        config = self.config
        self.results[name] = measure(
            model, tokenizer or self.tokenizer, self.held_out, self.run, name,
            samples=config.eval_samples, max_new_tokens=config.max_new_tokens, seed=config.seed,
            slots=config.slots,
        )  # fmt: skip


def main(config: Config) -> None:
    lab = prepare(config)
    base = student(lab)
    if base is None:  # stopped by Ctrl-C, here and below; the same command goes on
        return
    rows = dataset(lab)
    if rows is None:
        return
    lab.assess("base", base)
    for name in ("distilled", "rl") if config.compare_rl else ("distilled",):
        directory = lab.run.out / name
        if not parallel.from_main(directory.is_dir()):
            model = student(lab)  # both start from the same weights
            done = distill(model, rows, lab) if name == "distilled" else reinforce(model, lab)
            if not done:
                return
            save_pretrained(model, directory, tokenizer_files=lab.tokenizer.files())
        lab.assess(name, opened(directory, config, config.dtype)[0])
    report(lab)


def opened(place: str | Path, config: Config, dtype: str | None, template: str | None = None):
    """A model in this dtype (None: as stored), spread as --ep and --tp say, and its tokenizer."""
    dtype, shape = dtype and getattr(torch, dtype), read_config(Path(place))
    ep, tp = ep_of(config, shape), tp_of(config, shape)
    states = config.optimizer if dtype else None  # the teacher, as stored, is not trained
    return open_model(place, config.device, dtype, template, ep, states, tp)


def ep_of(config: Config, shape: ModelConfig) -> int | None:
    """--ep for a model: a dense one, such as most students, has no experts to share out."""
    return 1 if config.ep and not shape.is_moe else config.ep


def tp_of(config: Config, shape: ModelConfig) -> int:
    """--tp for a model: one with experts, such as most teachers, is not cut."""
    return 0 if shape.is_moe else config.tp


def shape_of(place: str) -> ModelConfig:
    return ModelConfig.preset(place) if place in MODELS else read_config(Path(place))


def prepare(config: Config) -> Lab:
    """Refuse what can't work before anything is computed."""
    if not Path(config.teacher).is_dir():
        raise UserError(
            f"no teacher at {config.teacher}: `python train_r1.py` makes the toy's, or give"
            " --teacher DIR, a model directory"
        )
    if config.student not in MODELS and not Path(config.student).is_dir():
        raise UserError(
            f"--student {config.student}: no such directory, nor one of the presets"
            f" {', '.join(MODELS)}; give the model directory of a base"
        )
    source = load(config.data)
    test = source if config.test_data is None else load(config.test_data, all_held_out=True)
    held_out = test.held_out(config.eval_problems)
    rewards.need_rules([*held_out, *getattr(source, "train", [])])
    for directory in {config.teacher, config.student} - set(MODELS):
        Tokenizer.load(directory, config.template)  # refuses what can't be asked in this template
    shapes = [shape_of(config.teacher), shape_of(config.student)]
    for shape in shapes:
        some, all_ = (test(shape.is_moe for shape in shapes) for test in (any, all))
        ep = ep_of(config, shape) if some else config.ep
        check_grid(shape, ep, config.tp if all_ else tp_of(config, shape))
    run = Run(config.out, config, resume=None, may_change=MAY_CHANGE, at_end=write_page)
    return Lab(config, run, source, held_out)


def student(lab: Lab) -> Transformer | None:
    """The base, as it was before any of this; a toy's is pretrained when first asked for."""
    config = lab.config
    if config.student in MODELS:
        lab.tokenizer = Tokenizer.load(config.teacher, config.template)
        # Not held to being competent: that so small a base is not is what this is about.
        model = sft.pretrain_toy(
            lab.tokenizer, lab.run, seed=config.seed, steps=config.pretrain_steps, force=True,
            device=pick_device(config.device), dtype=getattr(torch, config.dtype), mix=BILINGUAL,
            preset=config.student,
        )  # fmt: skip
        if model is not None:
            ep, tp = ep_of(config, model.config), tp_of(config, model.config)
            shard(model, ep, pick_device(config.device), config.optimizer, tp)
    else:
        model, lab.tokenizer = opened(config.student, config, config.dtype, config.template)
    if model is not None:
        model.recompute = config.recompute
    longest = max(config.max_new_tokens + 1, config.context)
    if model is not None and longest > model.config.max_position_embeddings:
        raise UserError(
            f"--max-new-tokens {config.max_new_tokens} and --context {config.context} are too much"
            f" for the student's {model.config.max_position_embeddings} tokens: lower them, or (the"
            " paper changed its students' configs) raise max_position_embeddings in its config.json"
        )
    return model


# ---- the dataset ---------------------------------------------------------------------------


def dataset(lab: Lab) -> list[dict] | None:
    """What the teacher wrote that is right and readable (R1 2.3.3), as rows of dataset.jsonl."""
    config = lab.config
    teacher, tokenizer = opened(config.teacher, config, None, config.template)
    file = lab.run.out / "dataset.jsonl"
    lab.assess("teacher", teacher, tokenizer)
    readable = sft.Readable(config.least_consistency, config.longest_paragraph, tags=tokenizer.tags)

    def verdicts(*outputs: list) -> list[str]:
        return [sft.verdict(*output, None, readable) for output in zip(*outputs)]

    # Departs from R1 2.4, data: only what a rule checks; a quarter of the paper's is general.
    questions = config.samples // config.per_question
    while lab.asked < questions:
        until = min(lab.asked + CHUNK, questions)
        with lab.paying("samples"):
            found = sft.collect(
                teacher, tokenizer, lab.source, file, lab.run, questions=until,
                samples=config.per_question, judge=verdicts, temperature=config.temperature,
                top_p=config.top_p, max_new_tokens=config.max_new_tokens, seed=config.seed + 1000,
                slots=config.slots, chunk=CHUNK,
            )  # fmt: skip
            lab.asked = until
        if found is None or lab.run.stopping:
            return None
    return sft.count_verdicts(sft.read_rows(file), "dataset", lab.run)


def examples(rows: list[dict], lab: Lab) -> list[sft.Example]:
    """The dataset in the student's own tokens; what is longer than its context is left out."""
    config = lab.config
    found = [sft.example(lab.tokenizer, row["question"], row["response"]) for row in rows]
    short = [each for each in found if len(each.prompt) + len(each.answer) <= config.context]
    if len(short) < len(found) and parallel.is_main():
        print(f"{len(found) - len(short)} of them are longer than --context {config.context}")
    if not short:
        raise UserError(
            f"nothing to learn from: {len(rows)} of {config.samples} outputs of {config.teacher}"
            f" were kept, none of them within --context {config.context}; the verdicts are in"
            f" {lab.run.out / 'dataset.jsonl'}"
        )
    return short


# ---- the two students ----------------------------------------------------------------------


def distill(model: Transformer, rows: list[dict], lab: Lab) -> bool:
    """R1 2.4: SFT on the teacher's outputs, and no RL after it. False where stopped."""
    # R1 2.4, sft: on the teacher's outputs, and no RL after it
    config, texts = lab.config, examples(rows, lab)
    steps = config.epochs * -(-len(texts) // config.batch)
    every = -(-steps // config.points)
    tuning = sft.Tuning(
        epochs=config.epochs, batch=config.batch, lr=config.lr, final_lr=config.decay * config.lr,
        row_tokens=config.context, save_every=2 * every, states=config.optimizer,
    )  # fmt: skip
    learn = sft.learn_answers(model, tuning, config.micro_tokens)

    def learn_until(done: int) -> bool:
        seed, run = config.seed, lab.run
        return sft.finetune(model, texts, learn, tuning, run, "distilled", seed, until=done)

    return lab.follow("distilled", model, learn_until, part=every, total=steps)


def reinforce(policy: Transformer, lab: Lab) -> bool:
    """R1-Zero's RL (R1 2.2) on the same base, for as long as distillation and its samples took, to
    the end of the part in which they are used up. False where stopped."""
    config = lab.config
    # Departs from R1 4.1, cost: RL for as long as distilling took; the paper's: 10,000 updates.
    budget = config.rl_cost * (lab.spent["samples"] + lab.spent["distilled"])
    part = config.rollouts * config.minibatches

    def draw(done: int) -> list[Problem]:
        rollout = -(-done // config.minibatches)
        return lab.source.batch(config.questions, seed=config.seed + 2000, step=rollout)

    def learn_until(done: int) -> bool:
        course = grpo.Course(
            steps=done, minibatches=config.minibatches, lr=config.rl_lr, warmup=config.warmup,
            refresh=config.refresh, save_every=2 * part, states=config.optimizer,
            offload=config.offload,
        )  # fmt: skip
        reward = rule_reward(config, lab.tokenizer.tags)
        return grpo.reinforce(
            policy, lab.tokenizer, draw, reward, lambda done: settings(config), course, lab.run,
            seed=config.seed + 2000,
        )  # fmt: skip

    return lab.follow("rl", policy, learn_until, part=part, budget=budget)


def settings(config: Config) -> grpo.Settings:
    return grpo.Settings(
        group_size=config.group_size, max_new_tokens=config.max_new_tokens, eps=config.eps,
        beta=config.beta, slots=config.slots, micro_tokens=config.micro_tokens,
    )  # fmt: skip


def rule_reward(config: Config, tags: bool = True) -> grpo.Reward:
    """R1 2.2.2: accuracy and format."""

    def rules(problem: Problem, response: str, finished: bool) -> float:
        return rewards.rule_reward(problem, response, finished, config.format_weight, tags)

    return lambda *outputs: [rules(*output) for output in zip(*outputs)]


# ---- the comparison ------------------------------------------------------------------------


def report(lab: Lab) -> None:
    results = lab.results
    lab.run.save_json("result.json", results)
    if not parallel.is_main():
        return
    print(table(results))
    if "rl" in results:
        print(compare(lab.spent, lab.curves))
    draw_distillation(lab.run.out)


def compare(spent: dict[str, float], curves: dict[str, list[dict]], rows: int = 10) -> str:
    """pass@1 of both students against what they had cost, as text."""
    lines = [
        f"CPU-seconds: {spent['samples']:.0f} for the teacher's samples,"
        f" {spent['distilled']:.0f} for SFT on them, {spent['rl']:.0f} for RL",
        f"{'CPU-seconds':>11}{'distilled':>12}{'samples free':>14}{'RL':>8}",
    ]
    longest = max(spent["samples"] + spent["distilled"], spent["rl"])
    for i in range(rows + 1):
        seconds = i / rows * longest
        values = [
            reached(curves["distilled"], seconds - spent["samples"]),
            reached(curves["distilled"], seconds),
            reached(curves["rl"], seconds),
        ]
        lines.append(f"{seconds:11.0f}{values[0]:12.3f}{values[1]:14.3f}{values[2]:8.3f}")
    return "\n".join(lines)


def reached(curve: list[dict], seconds: float) -> float:
    """pass@1 at the last point that cost no more; the base's before the first."""
    return [curve[0], *(p for p in curve if p["seconds"] <= seconds + 1e-6)][-1]["pass@1"]


if __name__ == "__main__":
    launch(main, parse(Config, PRESETS), user_errors=(ValueError,))
