"""R1-Zero: reinforcement learning on a base model, with no supervised step before it (R1 2.2).

    python train_zero.py                                   the toy, from nothing, in minutes
    python train_zero.py --preset gsm8k --model DIR --data train.jsonl
    torchrun --nproc_per_node=8 train_zero.py --preset countdown --model DIR

The default run first makes its own base: it pretrains a small DeepSeek-V3 on the corpus of
data/corpus.py, and goes on only if that base is competent, that is, if it gets single steps of a
solution right: RL can only reinforce what a base sometimes does.

It leaves in --out: base/ and model/ (model directories), metrics.jsonl, rollouts.jsonl (some groups
of each rollout), config.json, result.json, curve.png, report.html (the run as a page for a
browser), checkpoints/.

Departures from the paper, besides size:
- the toy's prompt has no instruction (data/prompts.py), and its task is one;
- the toy has its own learning rate, group size, minibatches per rollout and refresh of the
  reference; `--preset paper` has the published ones;
- the evaluation samples as RL does, at T = 1 and top-p 1 (the paper: 0.6 and 0.95);
- not reported and chosen here: AdamW without weight decay, a short linear warm-up, gradients
  clipped at norm 1, eps = 0.2, router biases frozen during RL.

Read next: sft.py (how the toy's base is made), bench/zero.py (five seeds and two controls).
"""

import hashlib
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import grpo
import rewards
import sft
from data.corpus import BILINGUAL, Mix
from data.problems import Generated, Listed, Problem, load
from data.prompts import check_template
from data.tokenizer import Tokenizer
from model import Config as ModelConfig
from model import Transformer
from runtime import memory, parallel
from runtime.flags import Machine
from runtime.plot import draw_curve
from runtime.pretrained import save_pretrained
from runtime.run import (
    Run, UserError, flag, launch, parse, pick_device, spare_devices,
)  # fmt: skip
from runtime.sharding import check_grid, shard
from runtime.spool import Plan, Spool, Worker
from runtime.workers import closing, with_workers
from sample import fitting_prompts, measure, open_model, table, write_page


@dataclass(frozen=True)
class Config(Machine):
    model: str | None = flag(None, "directory of the base model; none: pretrain the toy's own")
    # Departs from R1 2.2.2, tasks: one, arithmetic; R1 mixes mathematics, code, STEM and logic. A
    # file may have several kinds of questions.
    data: str = flag(
        "calc-chain",
        "questions: calc-chain, bilingual-chain, countdown, a puzzle of data/puzzles.py"
        " (arithmetic, knights-and-knaves, sorting, programs) or a JSONL file",
    )
    test_data: str | None = flag(
        None, "JSONL file to evaluate on (default: held-out part of --data)"
    )
    template: str | None = flag(
        None, "prompt template: r1-zero, toy or a chat's (default: the model's own)"
    )
    out: str = flag("runs/zero", "directory of the run")
    seed: int = flag(0, "random seed")
    # The toy's base.
    pretrain_steps: int = flag(1000, "updates of pretraining, of 2048 tokens each")
    force: bool = flag(False, "go on with a base that is not competent")
    # What R1 2.2.1 and the list of hyperparameters in its appendix set.
    # Departs from R1 2.2.1, settings: the toy's learning rate, group size, minibatches and refresh.
    # So small a model bears larger steps; --preset paper has the published values.
    steps: int = flag(160, "updates of RL")
    questions: int = flag(32, "questions of a rollout")
    group_size: int = flag(8, "outputs for each question (G)")
    minibatches: int = flag(2, "updates that follow one rollout")
    lr: float = flag(5e-4, "learning rate of RL")
    warmup: int = flag(4, "updates over which the learning rate rises")
    eps: float = flag(0.2, "clip range of the ratio")
    eps_high: float | None = flag(None, "upper clip range, where it differs (DAPO)")
    beta: float = flag(0.001, "weight of the KL to the reference")
    refresh: int = flag(40, "updates after which the policy becomes the reference")
    temperature: float = flag(1.0, "sampling temperature of the rollouts")
    max_new_tokens: int = flag(112, "longest output")
    raise_at: int = flag(0, "update from which --raised-max-new-tokens holds; 0: never")
    raised_max_new_tokens: int = flag(0, "longest output from then on")
    ratio: Literal["token", "sequence"] = flag("token", "what an importance ratio is of")
    aggregation: Literal["output", "token", "constant"] = flag(
        "output",
        "mean over each output's tokens (1/|o|), all tokens (DAPO), or G x longest (Dr. GRPO)",
    )
    normalize_std: bool = flag(True, "divide advantages by the group's std")
    mask_truncated: bool = flag(False, "leave truncated outputs out of the loss (DAPO)")
    replay_routes: bool = flag(False, "train with the experts used when sampling")
    # Rewards.
    reward: Literal["rules", "format", "random", "contains"] = flag(
        "rules", "rules, or a control; contains: a weak verifier, to see it hacked"
    )
    format_weight: float = flag(1.0, "weight of the format reward beside the accuracy's 1")
    repetition_penalty: float = flag(
        0.0, "weight of the share of ten-word runs that repeat, 0: without (Yeo et al.)"
    )
    overlong_buffer: int = flag(
        0, "last tokens before the limit over which the reward falls by 1, 0: without (DAPO)"
    )
    reward_workers: int = flag(
        0, "processes that compute rewards while outputs are still written; 0: this one, afterwards"
    )
    # Asynchronous rollouts (runtime/spool.py).
    async_rollouts: int | None = flag(
        None, "so many programs draw outputs while this one trains (0: only those that --join)"
    )
    join: str | None = flag(None, "draw outputs for the run in this directory, until it is over")
    ahead: int = flag(1, "rollouts that may be drawn beyond what the newest weights are for")
    part: int = flag(8, "questions that a rollout worker claims at a time")
    # Evaluation.
    eval_problems: int = flag(225, "held-out problems")
    eval_samples: int = flag(16, "outputs for each of them, at temperature 1 and top-p 1")
    save_every: int = flag(20, "updates that a kill loses, at most")
    keep_groups: int = flag(4, "groups of each rollout to keep in rollouts.jsonl, for a reader")
    resume: bool = flag(False, "continue the run in --out")
    dry_run: bool = flag(False, "print what memory this takes and what fits, and stop")
    gpu_memory: float = flag(0.0, "GB of a GPU, for --dry-run; 0: that of the GPU at hand, or 80")

    def __post_init__(self):
        super().__post_init__()
        for name in COUNTS:
            if getattr(self, name) < 1:
                flag_name = name.replace("_", "-")
                raise UserError(f"--{flag_name} {getattr(self, name)}: at least 1")
        if self.model is None and self.data not in CORPORA:
            raise UserError(
                f"--data {self.data} needs --model DIR: the base that this program pretrains"
                f" knows {' and '.join(CORPORA)} only"
            )
        if self.async_rollouts is not None and self.tp > 1:
            raise UserError(f"--tp {self.tp} and --async-rollouts: a rollout worker has it whole")
        for name in ("ahead", "async_rollouts", "reward_workers"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: 0 or more")
        if self.minibatches > self.questions:
            raise UserError(
                f"--minibatches {self.minibatches}: at most --questions, {self.questions}"
            )
        if self.raise_at and self.raised_max_new_tokens < self.max_new_tokens:
            raise UserError(
                f"--raise-at {self.raise_at} needs --raised-max-new-tokens of at least"
                f" {self.max_new_tokens}, not {self.raised_max_new_tokens}"
            )
        if self.model is None and self.dtype == "bfloat16":
            raise UserError(
                "--dtype bfloat16 needs --model DIR: a toy's base is trained in float32"
            )
        if self.template is not None:
            check_template(self.template)
        grpo_settings(self, done=0)  # and so does this for what concerns GRPO


CORPORA = {"calc-chain": Mix(), "bilingual-chain": BILINGUAL}  # what a toy base reads for its task
PROMPT_TOKENS = 512  # of the longest question, for --dry-run
MAY_CHANGE = (
    "steps",
    "save_every",
    "keep_groups",
    "force",
    "slots",
    "micro_tokens",
    "async_rollouts",
    "ahead",
    "part",
)  # on --resume
COUNTS = ("questions", "minibatches", "refresh", "save_every", "eval_problems", "eval_samples",
          "part", "max_new_tokens", "steps", "pretrain_steps")  # fmt: skip
REAL = dict(lr=1e-6, group_size=16, minibatches=4, max_new_tokens=1024, steps=400, refresh=100,
            eval_samples=4, reward_workers=2)  # fmt: skip
PRESETS = {
    "toy": {},
    # For train_r1.py: half in Chinese, and a corpus that has chats as well.
    "bilingual": dict(
        data="bilingual-chain", out="runs/zero-bilingual", pretrain_steps=1600, steps=120
    ),
    "countdown": {**REAL, "data": "countdown", "out": "runs/countdown"},
    "gsm8k": {**REAL, "data": "train.jsonl", "out": "runs/gsm8k"},
    # The published settings: 32 questions x 16 outputs a step, 16 steps for each rollout.
    "paper": dict(
        data="train.jsonl",
        out="runs/paper",
        template="r1-zero",
        steps=10400,
        questions=512,
        group_size=16,
        minibatches=16,
        lr=3e-6,
        beta=0.001,
        refresh=400,
        temperature=1.0,
        max_new_tokens=32768,
        raise_at=8200,
        raised_max_new_tokens=65536,
    ),  # fmt: skip
}


def main(config: Config) -> None:
    if config.dry_run:
        return report_memory(config)
    if config.join:
        return join(config)
    source, held_out = questions(config)
    given = None
    if config.model:
        dtype = getattr(torch, config.dtype)
        how = config.template, config.ep, config.optimizer, config.tp
        given = open_model(config.model, config.device, dtype, *how)
    shape = given[0].config if given else ModelConfig.preset("toy")
    check_context(config, shape)
    check_grid(shape, config.ep, config.tp)
    if given:
        fitting_prompts(*given, held_out, config.max_new_tokens)  # refuses where none fits
    run = Run(config.out, config, resume=config.resume, may_change=MAY_CHANGE, at_end=write_page)
    model, tokenizer = given or pretrain_base(config, run)
    if model is None:  # stopped by Ctrl-C; --resume goes on
        return
    model.recompute = config.recompute
    if not given:
        shard(model, config.ep, pick_device(config.device))
    base = assess(model, tokenizer, held_out, config, run, "base")
    if not reinforce(model, tokenizer, source, config, run):
        return
    save_pretrained(model, run.out / "model", tokenizer_files=tokenizer.files())
    zero = assess(model, tokenizer, held_out, config, run, "zero", step=config.steps)
    report(base, zero, run)


def report_memory(config: Config) -> None:
    """--dry-run: from the model's config.json alone."""
    model = memory.read_config(config.model) if config.model else ModelConfig.preset("toy")
    check_context(config, model)
    longest = max(config.max_new_tokens, config.raised_max_new_tokens) + PROMPT_TOKENS
    inputs = memory.Inputs(
        model, config.dtype, config.optimizer, reference=config.beta > 0,
        offload_reference=config.offload, offload_optimizer=config.offload,
        recompute=config.recompute, micro_tokens=config.micro_tokens,
        longest=min(longest, model.max_position_embeddings), slots=config.slots,
        gpus=parallel.world_size(), gpu_memory=config.gpu_memory or memory.device_memory(),
    )  # fmt: skip
    if parallel.is_main():
        print(memory.table(memory.plan(inputs)))


def questions(config: Config) -> tuple[Generated | Listed, list[Problem]]:
    """Where the training questions come from, and the held-out ones."""
    try:
        source = load(config.data)
        test = source if config.test_data is None else load(config.test_data, all_held_out=True)
        held_out = test.held_out(config.eval_problems)
        rewards.need_rules([*held_out, *getattr(source, "train", [])])
        return source, held_out
    except ValueError as error:
        raise UserError(str(error)) from error


def check_context(config: Config, model: ModelConfig) -> None:
    longest = max(config.max_new_tokens, config.raised_max_new_tokens)
    if longest >= model.max_position_embeddings:
        raise UserError(
            f"outputs of up to {longest} tokens leave no room for a question in the model's context"
            f" of {model.max_position_embeddings}: lower --max-new-tokens"
        )


def pretrain_base(config: Config, run: Run) -> tuple[Transformer | None, Tokenizer]:
    """The toy's own base; None where Ctrl-C stopped its pretraining."""
    mix = CORPORA[config.data]
    tokenizer = Tokenizer.toy(bilingual=mix.chinese > 0)
    model = sft.pretrain_toy(
        tokenizer, run, seed=config.seed, steps=config.pretrain_steps, force=config.force, mix=mix,
        device=pick_device(config.device), dtype=getattr(torch, config.dtype),
    )  # fmt: skip
    return model, tokenizer


# ---- reinforcement learning ----------------------------------------------------------------


def reinforce(
    policy: Transformer, tokenizer: Tokenizer, source: Generated | Listed, config: Config, run: Run
) -> bool:
    """False where stopped."""
    course = grpo.Course(
        steps=config.steps, minibatches=config.minibatches,
        lr=config.lr, warmup=config.warmup, refresh=config.refresh, save_every=config.save_every,
        states=config.optimizer, offload=config.offload, keep_groups=config.keep_groups,
    )  # fmt: skip

    rule = reward_rule(config, tokenizer.tags)
    with spool_of(config, tokenizer) as spool, closing(rule) as reward:
        finished = grpo.reinforce(
            policy, tokenizer, lambda done: drawn(source, config, done), reward,
            lambda done: grpo_settings(config, done), course, run, seed=config.seed, spool=spool,
        )  # fmt: skip
        if spool is not None:
            spool.over = finished
    return finished


def drawn(source: Generated | Listed, config: Config, done: int) -> list[Problem]:
    """The questions of the rollout that follows so many updates."""
    rollouts = -(-done // config.minibatches)
    return source.batch(config.questions, seed=config.seed, step=rollouts)


def grpo_settings(config: Config, done: int) -> grpo.Settings:
    raised = config.raise_at and done >= config.raise_at
    return grpo.Settings(
        group_size=config.group_size,
        max_new_tokens=config.raised_max_new_tokens if raised else config.max_new_tokens,
        temperature=config.temperature, eps=config.eps, eps_high=config.eps_high, beta=config.beta,
        ratio=config.ratio, aggregation=config.aggregation, normalize_std=config.normalize_std,
        mask_truncated=config.mask_truncated, replay_routes=config.replay_routes,
        repetition_penalty=config.repetition_penalty, overlong_buffer=config.overlong_buffer,
        slots=config.slots, micro_tokens=config.micro_tokens,
    )  # fmt: skip


def reward_rule(config: Config, tags: bool = True) -> grpo.Reward:
    """R1 2.2.2: accuracy and format, equally weighted. The controls are told less, or nothing."""

    rules = partial(rewards.rule_reward, format_weight=config.format_weight, tags=tags)
    only_format, random = partial(format_rule, tags=tags), partial(coin, seed=config.seed)
    rule = {"rules": rules, "format": only_format, "random": random, "contains": contains}
    return with_workers(rule[config.reward], config.reward_workers)


def format_rule(problem: Problem, response: str, finished: bool, tags: bool) -> float:
    return rewards.format_reward(response, tags) if finished else 0.0


def contains(problem: Problem, response: str, finished: bool) -> float:
    """A weak verifier, as found in use: right is what has the gold answer somewhere in it."""
    return float(finished and problem.answer in response)


def coin(problem: Problem, response: str, finished: bool, seed: int) -> float:
    """By a hash of the text: the same text always earns the same, and it means nothing."""
    told = f"{seed} {problem.question} {response}"
    return float(hashlib.sha256(told.encode()).digest()[0] % 2)


# ---- asynchronous rollouts -----------------------------------------------------------------


def plan_of(config: Config) -> Plan:
    return Plan(Path(config.out), config.steps, config.minibatches, config.ahead, config.questions,
                config.part)  # fmt: skip


def spool_of(config: Config, tokenizer: Tokenizer) -> AbstractContextManager[Spool | None]:
    """Where the outputs come from, if not from this process."""
    if config.async_rollouts is None:
        return nullcontext()
    threads = config.threads or max(1, torch.get_num_threads() // (1 + config.async_rollouts))
    command = [sys.executable, __file__, "--join", config.out, "--threads", str(threads),
               "--slots", str(config.slots), "--timeout", str(config.timeout)]  # fmt: skip
    devices = spare_devices(config.device, config.async_rollouts)
    commands = [[*command, "--device", device] for device in devices]
    return Spool(plan_of(config), tokenizer, commands)


def join(config: Config) -> None:
    """--join: draw outputs for another process's run. Its is the method, ours the machine."""
    file = Path(config.join) / "config.json"
    if not file.exists():
        raise UserError(
            f"--join {config.join}: no run is there; first start it: python train_zero.py"
            f" --async-rollouts 0 --out {config.join}"
        )
    if config.ep or config.tp > 1:
        raise UserError("--join with --ep or --tp: a rollout worker has the model whole")
    ours = {field.name for field in fields(Machine)} - {"dtype", "optimizer"}
    theirs = {field.name for field in fields(Config)} - ours
    saved = json.loads(file.read_text())
    saved = {name: saved[name] for name in theirs if name in saved}
    run = replace(config, **{**saved, "out": config.join, "join": None})
    if run.async_rollouts is None:
        raise UserError(f"--join {config.join}: that run draws its outputs itself; give"
                        " --async-rollouts when it is started")  # fmt: skip
    source, _ = questions(run)

    def write(model: Transformer, tokenizer: Tokenizer, done: int, numbers: range) -> dict:
        now = grpo_settings(run, done)
        asked, _ = grpo.fitting_questions(drawn(source, run, done), tokenizer, model, now)
        mine = asked.part([number for number in asked.numbers if number in numbers])
        return grpo.draw_outputs(model, tokenizer, mine, now, seed=run.seed, step=done).groups()

    device = pick_device(config.device)
    Worker(plan_of(run), write, device, run.template).serve(config.timeout)


# ---- evaluation ----------------------------------------------------------------------------


def assess(
    model: Transformer, tokenizer: Tokenizer, problems: list[Problem], config: Config, run: Run,
    name: str, step: int = 0,
) -> dict:  # fmt: skip
    return measure(
        model, tokenizer, problems, run, name, step=step, samples=config.eval_samples,
        max_new_tokens=grpo_settings(config, step).max_new_tokens, seed=config.seed,
        slots=config.slots,
    )  # fmt: skip


def report(base: dict, zero: dict, run: Run) -> None:
    if not parallel.is_main():
        return
    parts = dict(pretrain=["pretrain"], rl=["rollout", "reward", "reference", "update"],
                 eval=["evaluate"])  # fmt: skip
    seconds = {name: sum(run.seconds[phase] for phase in part) for name, part in parts.items()}
    if parallel.world_size() > 1:
        seconds["communication"] = run.seconds["communication"]  # in any of them
    run.save_json("result.json", {"base": base, "zero": zero, "seconds": seconds})
    print(table({"base": base, "zero": zero}))
    print(f"{run.out}: {', '.join(f'{phase} {s:.0f} s' for phase, s in seconds.items())}")
    draw_curve(run.out)


if __name__ == "__main__":
    launch(main, parse(Config, PRESETS), user_errors=(ValueError,))
