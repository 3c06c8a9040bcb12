"""DeepSeek-R1 in four stages (R1 2.3), each of which leaves a model directory in --out.

    python train_r1.py                                            the toy, from nothing, in minutes
    python train_r1.py --language-weight 0 --until dev2 --out runs/r1-mixed           the ablation
    torchrun --nproc_per_node=8 train_r1.py --preset paper --model DIR --zero RUN --data FILE ...

    zero   R1-Zero, a run of train_zero.py: it reasons well and mixes languages
    dev1   cold start: SFT of the base on zero's readable outputs, rewritten with a summary
    dev2   RL for reasoning, with a reward for keeping to the question's language
    dev3   rejection sampling: SFT of the base again, on dev2's best outputs and on general data
    r1     RL for all scenarios: the rules and, late, two reward models learned from preferences

The same command continues a run that was stopped at any moment; a finished stage is not redone.
Whatever is sampled or learned from is a file of JSON lines in --out that a person can open, and
report.html shows the curves and the outputs of the run in a browser.

The toy lives in the bilingual world of data/corpus.py and data/chat.py. `--preset paper` has the
published settings and needs three files: --general (prompt, response), --preferences (prompt,
chosen, rejected), --safety (prompt, response, safe).

Departures from the paper, besides size:
- a rule rewrites the cold-start outputs, where the paper has people and DeepSeek-V3 do it;
- the special tokens around the reasoning are R1-Zero's think tags, and the summary stands in its
  answer tags with the result in a box: one format from Zero to R1;
- the reward models start from the base, and their numbers are squashed to between 0 and 1; what the
  paper starts from and whether it scales them is not reported. Nor are the limits of what is
  readable, the share of general prompts in a batch, the length of the second stage.

Read next: distill.py.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from typing import Literal

import torch

import grpo
import rewards
import sft
from data import chat
from data.problems import Generated, Listed, Problem, load
from data.prompts import check_template, encode_prompt, join, sum_up
from data.tokenizer import Tokenizer
from model import Config as ModelConfig
from model import Transformer
from rewards import RewardModel
from runtime import parallel
from runtime.configs import read_config
from runtime.flags import Machine
from runtime.pretrained import save_pretrained
from runtime.run import Run, UserError, flag, launch, parse, run_command
from runtime.sharding import check_grid, in_step
from runtime.workers import Workers, closing, with_workers
from sample import generate, measure, open_model, spell, write_page

STAGES = ("dev1", "dev2", "dev3", "r1")
REWARD_MODELS = ("helpful", "harmless")


@dataclass(frozen=True)
class Config(Machine):
    zero: str = flag("runs/zero-bilingual", "directory of the R1-Zero run; the toy's is made")
    model: str | None = flag(None, "directory of the base (default: base/ in --zero)")
    data: str = flag("bilingual-chain", "reasoning questions: bilingual-chain or a JSONL file")
    test_data: str | None = flag(
        None, "JSONL file to evaluate on (default: held-out part of --data)"
    )
    judged: str | None = flag(
        None, "questions that only a model can judge, for the third stage (default: the toy's)"
    )
    general: str | None = flag(None, "JSONL of prompt, response (default: the toy's)")
    preferences: str | None = flag(None, "JSONL of prompt, chosen, rejected (default: the toy's)")
    safety: str | None = flag(None, "JSONL of prompt, response, safe (default: the toy's)")
    template: str | None = flag(
        None, "prompt template: r1-zero, toy or a chat's (default: the model's own)"
    )
    out: str = flag("runs/r1", "directory of the run")
    seed: int = flag(0, "random seed")
    until: Literal["dev1", "dev2", "dev3", "r1"] = flag("r1", "the last stage to run")
    # The data of the two supervised stages (R1 2.3.1 and 2.3.3).
    cold_questions: int = flag(1000, "questions that zero answers for the cold start")
    cold_examples: int = flag(400, "examples of the cold start, at most")
    questions_sft: int = flag(3000, "questions that dev2 answers for the third stage")
    judged_questions: int = flag(400, "questions of --judged that it answers besides")
    general_examples: int = flag(4000, "examples of --general in the third stage, at most")
    samples: int = flag(2, "outputs for each of these questions")
    least_consistency: float = flag(0.95, "share of a kept reasoning's words in its language")
    longest_paragraph: int = flag(300, "words of the longest paragraph that is kept")
    epochs: int = flag(3, "passes over the examples")
    batch: int = flag(32, "examples of an update")
    lr: float = flag(3e-3, "highest learning rate of SFT")
    final_lr: float = flag(3e-4, "where its cosine ends")
    row_tokens: int = flag(128, "examples are packed into rows of so many tokens")
    # The two stages of RL (R1 2.3.2 and 2.3.4).
    steps: int = flag(80, "updates of RL for reasoning")
    final_steps: int = flag(120, "updates of RL for all scenarios")
    preference_share: float = flag(0.25, "last part of these, which has general prompts")
    general_share: float = flag(0.5, "share of general prompts in that part's rollouts")
    questions: int = flag(32, "questions of a rollout")
    group_size: int = flag(8, "outputs for each question (G)")
    minibatches: int = flag(2, "updates that follow one rollout")
    rl_lr: float = flag(5e-4, "learning rate of RL")
    warmup: int = flag(4, "updates over which it rises")
    eps: float = flag(10.0, "clip range of the ratio")
    beta: float = flag(0.001, "weight of the KL to the reference")
    refresh: int = flag(40, "updates after which the policy becomes the reference")
    language_weight: float = flag(1.0, "weight of the language-consistency reward; 0: without")
    reward_workers: int = flag(
        0, "processes that compute rewards while outputs are still written; 0: this one, afterwards"
    )
    final_temperature: float = flag(0.7, "sampling temperature of RL for all scenarios")
    max_new_tokens: int = flag(112, "longest output")
    # The reward models (R1 2.3.4).
    preference_rows: int = flag(3000, "rows of the toy's --preferences, and of its --safety")
    reward_lr: float = flag(1e-3, "learning rate of the reward models")
    reward_batch: int = flag(32, "rows of an update")
    # Evaluation.
    eval_problems: int = flag(150, "held-out reasoning problems")
    eval_samples: int = flag(16, "outputs for each of them, at temperature 1 and top-p 1")
    eval_requests: int = flag(600, "held-out general requests")
    save_every: int = flag(20, "updates that a kill loses, at most")
    keep_groups: int = flag(4, "groups of each rollout to keep in rollouts.jsonl, for a reader")

    def __post_init__(self):
        super().__post_init__()

        def refuse(name: str, allowed: str) -> None:
            raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: {allowed}")

        for name in COUNTS:
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        if self.reward_workers < 0:
            refuse("reward_workers", "0 or more")
        for name in ("preference_share", "general_share", "least_consistency"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(name, "from 0 to 1")
        for name in ("lr", "rl_lr", "reward_lr", "final_temperature"):
            if getattr(self, name) <= 0:
                refuse(name, "more than 0")
        if self.minibatches > self.questions:
            refuse("minibatches", f"at most --questions, {self.questions}")
        if not self.is_toy and self.until in ("dev3", "r1"):
            needed = ("general", "preferences", "safety")[: 1 if self.until == "dev3" else 3]
            if missing := [f"--{name} FILE" for name in needed if getattr(self, name) is None]:
                raise UserError(
                    f"--data {self.data} needs {', '.join(missing)} for --until {self.until}; or"
                    " stop before: --until dev2"
                )
        if self.template is not None:
            check_template(self.template)
        settings(self, self.final_temperature)  # and so does this for what concerns GRPO

    @property
    def is_toy(self) -> bool:
        return self.data == "bilingual-chain"


COUNTS = ("cold_questions", "cold_examples", "questions_sft", "judged_questions",
          "general_examples", "samples", "row_tokens",
          "epochs", "batch", "steps", "final_steps", "questions", "minibatches", "refresh",
          "max_new_tokens", "preference_rows", "reward_batch", "eval_problems", "eval_samples",
          "eval_requests", "save_every")  # fmt: skip
MAY_CHANGE = ("until", "save_every", "keep_groups", "slots", "micro_tokens")
PRESETS = {
    "toy": {},
    # As published; what is not reported: cold_questions, samples, steps, general_share.
    "paper": dict(
        data="train.jsonl", out="runs/r1-paper", template="r1-zero",
        cold_questions=10_000, cold_examples=5_000, questions_sft=200_000, samples=4,
        general_examples=200_000, longest_paragraph=500, epochs=2, batch=128, lr=5e-5,
        final_lr=5e-6, row_tokens=32768, steps=10_400, final_steps=1700,
        preference_share=400 / 1700, questions=512, group_size=16, minibatches=16, rl_lr=3e-6,
        refresh=400, max_new_tokens=32768, reward_lr=6e-6, reward_batch=256,
    ),
}  # fmt: skip


def main(config: Config) -> None:
    source, held_out = prepare(config)
    run = Run(config.out, config, resume=None, may_change=MAY_CHANGE, at_end=write_page)
    if not zero_is_there(config, run):  # stopped by Ctrl-C; the same command goes on
        return
    tokenizer = Tokenizer.load(Path(config.zero) / "model", config.template)
    lab = Lab(config, run, tokenizer, source, held_out)
    if config.until == "r1" and not all(reward_model(name, lab) for name in REWARD_MODELS):
        return
    stages = dict(dev1=cold_start, dev2=reasoning_rl, dev3=rejection_sampling, r1=all_scenarios)
    results = {"zero": assess("zero", lab)}
    for name in STAGES[: STAGES.index(config.until) + 1]:
        directory = run.out / name
        if not parallel.from_main(directory.is_dir()):
            model = stages[name](lab)
            if model is None:
                return
            save_pretrained(model, directory, tokenizer_files=lab.tokenizer.files())
        results[name] = assess(name, lab)
    report(results, run, config.eval_samples)


def prepare(config: Config) -> tuple[Generated | Listed, list[Problem]]:
    """The reasoning questions and the held-out ones. What can't work is refused here, before
    anything is written or computed."""
    source = load(config.data)
    test = source if config.test_data is None else load(config.test_data, all_held_out=True)
    held_out = test.held_out(config.eval_problems)
    problems = [*held_out, *getattr(source, "train", [])]
    rewards.need_rules(problems)
    for language in {problem.language for problem in problems}:
        rewards.language_reward("", language)  # refuses an unknown one
    if config.judged:
        try:
            load(config.judged)
        except ValueError as error:
            raise UserError(f"--judged {config.judged}: {error}") from error
    for name in FIELDS:
        if file := getattr(config, name):
            if not sft.read_rows(Path(file), FIELDS[name]):
                raise UserError(f"--{name} {file}: the file has no row")
    zero = Path(config.zero)
    if not (zero / "model").is_dir() and not (config.is_toy and config.model is None):
        raise UserError(
            f"no R1-Zero in {zero}: first run python train_zero.py --preset paper --model"
            f" {config.model or 'DIR'} --data {config.data} --out {zero}"
        )
    if (zero / "model").is_dir():
        base = Path(config.model or zero / "base")
        if not base.is_dir():
            raise UserError(f"no base in {base}: give --model DIR, what the R1-Zero began as")
        tokenizer = Tokenizer.load(zero / "model", config.template)
        if not tokenizer.same_tokens(Tokenizer.load(base, config.template)):
            raise UserError(f"{base} and {zero / 'model'} have different tokenizers: give the base"
                            " that the R1-Zero began as")  # fmt: skip
        for directory in (base, zero / "model"):
            check_grid(read_config(directory), config.ep, config.tp)
    else:
        check_grid(ModelConfig.preset("toy"), config.ep, config.tp)
    return source, held_out


def zero_is_there(config: Config, run: Run) -> bool:
    """Whether there is an R1-Zero to begin with; the toy's is trained, by a command of its own."""
    zero = Path(config.zero)
    if (zero / "model").is_dir():
        return True
    command = ["train_zero.py", "--preset", "bilingual", "--out", config.zero]
    command += ["--seed", str(config.seed), "--device", config.device]
    command += ["--threads", str(config.threads)]
    return run_command([*command, *["--resume"] * (zero / "config.json").exists()], run)


@dataclass
class Lab:
    """What all stages work with."""

    config: Config
    run: Run
    tokenizer: Tokenizer
    source: Generated | Listed
    held_out: list[Problem]

    def model(self, name: str) -> Transformer:
        """A stage's model, zero or the base; or the trunk of a reward model."""
        config, zero = self.config, Path(self.config.zero)
        places = dict(base=config.model or zero / "base", zero=zero / "model")
        place = places.get(name, self.run.out / name)
        how = dict(ep=config.ep, states=config.optimizer, tp=config.tp)
        model, _ = open_model(place, config.device, getattr(torch, config.dtype), **how)
        model.recompute = config.recompute
        return model

    def draw(self, done: int, stage: str) -> list[Problem]:
        """The questions of a rollout."""
        seed = self.config.seed + SEEDS[stage]
        rollouts = -(-done // self.config.minibatches)
        return self.source.batch(self.config.questions, seed=seed, step=rollouts)


# No stage asks the questions of another.
SEEDS = {name: 1000 * (i + 1) for i, name in enumerate((*STAGES, "judged"))}


# ---- the four stages -----------------------------------------------------------------------


def cold_start(lab: Lab) -> Transformer | None:
    """R1 2.3.1: zero's readable outputs, rewritten, show the base how to write for people."""
    config = lab.config
    rows = sampled(lab, "dev1_samples", "zero", lab.source, config.cold_questions)
    if rows is None:
        return None
    kept = sft.count_verdicts(rows, "dev1_samples", lab.run)[: config.cold_examples]
    return tuned(
        lab, "dev1", [(row["question"], rewritten(row, lab.tokenizer.template)) for row in kept]
    )


def reasoning_rl(lab: Lab) -> Transformer | None:
    """R1 2.3.2: R1-Zero's RL once more, from dev1, and with the language in the reward."""
    return reinforced(lab, "dev2", "dev1", lambda done: lab.draw(done, "dev2"),
                      reasoning_reward(lab.config, lab.tokenizer.tags), lab.config.steps,
                      temperature=1.0)  # fmt: skip


def rejection_sampling(lab: Lab) -> Transformer | None:
    """R1 2.3.3: what dev2 writes well, and general data, teach the base once more. Not dev2 itself:
    the paper starts again from the base."""
    config = lab.config
    rows = sampled(lab, "dev3_samples", "dev2", lab.source, config.questions_sft)
    if rows is None:
        return None
    kept = sft.count_verdicts(rows, "dev3_samples", lab.run)
    if config.judged or config.is_toy:
        source = load(config.judged or "spelled-chain")
        rows = sampled(lab, "dev3_judged", "dev2", source, config.judged_questions, judge="base")
        if rows is None:
            return None
        kept += sft.count_verdicts(rows, "dev3_judged", lab.run)
    general = data_rows(lab, "general")[: config.general_examples]
    examples = [(row["question"], row["response"]) for row in kept]
    # R1 2.3.3, base: SFT of the base again, not of the model that wrote the samples
    return tuned(lab, "dev3", examples + [(row["prompt"], row["response"]) for row in general])


def all_scenarios(lab: Lab) -> Transformer | None:
    """R1 2.3.4: reasoning goes on under the rules; in the last part, general prompts join it, under
    reward models. For a short time: a learned reward is found out before long."""
    config = lab.config
    helpful, harmless = (reward_model(name, lab) for name in REWARD_MODELS)
    general = general_prompts(lab)

    def draw(done: int) -> list[Problem]:
        problems = lab.draw(done, "r1")
        if done < (1 - config.preference_share) * config.final_steps:
            return problems
        count = min(len(general), round(config.general_share * len(problems)))
        rng = random.Random(f"general {config.seed} {done}")
        # Mixed, for the updates that follow a rollout take its questions in order.
        mixed = problems[count:] + rng.sample(general, count)
        return rng.sample(mixed, len(mixed))

    reward = scenario_reward(lab, helpful, harmless)
    return reinforced(lab, "r1", "dev3", draw, reward, config.final_steps, config.final_temperature)


# ---- rewards -------------------------------------------------------------------------------


def reasoning_reward(config: Config, tags: bool = True) -> grpo.Reward:
    """R1 2.3.2: accuracy + format + the share of the reasoning's words in the right language."""
    rule = partial(reasoning_rule, language_weight=config.language_weight, tags=tags)
    return with_workers(rule, config.reward_workers)


def reasoning_rule(
    problem: Problem, response: str, finished: bool, language_weight: float, tags: bool
) -> float:
    if not finished:
        return 0.0
    language = rewards.language_reward(response, problem.language)
    return rewards.rule_reward(problem, response, finished, tags=tags) + language_weight * language


def scenario_reward(lab: Lab, helpful: RewardModel, harmless: RewardModel) -> grpo.Reward:
    """R1 2.3.4: by the kind of prompt, the rules or a reward model; and format and language."""
    config, tags = lab.config, lab.tokenizer.tags
    rules = reasoning_reward(config, tags)

    def reward(problems: list[Problem], texts: list[str], finished: list[bool]) -> list[float]:
        values = [0.0] * len(texts)
        of: dict[str, list[int]] = {"helpful": [], "harmless": [], "rules": []}
        for i, problem in enumerate(problems):
            if finished[i]:
                of[problem.checker if problem.checker in of else "rules"].append(i)
        # R1 2.3.4, judges: helpfulness by the final summary, harmlessness by the whole response
        judged = {
            "helpful": (helpful, [rewards.summary(texts[i]) for i in of["helpful"]]),
            "harmless": (harmless, [texts[i] for i in of["harmless"]]),
        }
        for kind, (model, parts) in judged.items():
            scores = score(model, lab, [problems[i].question for i in of[kind]], parts)
            for i, value in zip(of[kind], torch.sigmoid(scores).tolist()):
                language = 1.0
                if rewards.THINK_TAG.search(texts[i]):  # a plain answer may be a translation
                    language = rewards.language_reward(texts[i], problems[i].language)
                layout = rewards.general_format_reward(texts[i], tags)
                values[i] = value + layout + config.language_weight * language
        rest = of["rules"]
        told = rules(*([part[i] for i in rest] for part in (problems, texts, finished)))
        for i, value in zip(rest, told):
            values[i] = value
        return values

    def begin(problem: Problem, text: str, finished: bool) -> None:
        if problem.checker not in ("helpful", "harmless"):
            rules.begin(problem, text, finished)

    if isinstance(rules, Workers):
        reward.begin = begin
    return reward


def reward_model(name: str, lab: Lab) -> RewardModel | None:
    """The base with a number for a head, trained on pairs (helpful) or verdicts (harmless)."""
    config, directory = lab.config, lab.run.out / f"reward_{name}"
    if parallel.from_main(directory.is_dir()):
        return RewardModel.load(lab.model(directory.name), directory)
    model = RewardModel(lab.model("base"))
    train, test = split(data_rows(lab, "preferences" if name == "helpful" else "safety"))
    losses = preference_losses if name == "helpful" else verdict_losses
    tuning = sft.Tuning(epochs=1, batch=config.reward_batch, lr=config.reward_lr,
                        final_lr=config.reward_lr / 10, save_every=config.save_every,
                        states=config.optimizer)  # fmt: skip
    at_once = max(1, config.micro_tokens // config.row_tokens)
    learn = sft.learn_rows(model, lambda rows: losses(model, lab, rows), at_once)
    if not sft.finetune(model, train, learn, tuning, lab.run, f"reward {name}", config.seed):
        return None
    mine = parallel.shard(test)
    with torch.no_grad(), in_step(model, lambda: losses(model, lab, test[:1])):
        parts = [losses(model, lab, mine[i : i + 64]) for i in range(0, len(mine), 64)]
    found = parallel.gather_list([loss for part in parts for loss in part.tolist()])
    right = mean(loss < 0.6931 for loss in found)  # more likely than not
    lab.run.rewind(f"reward {name} held out", -1)
    lab.run.log(phase=f"reward {name} held out", step=0, right=right, rows=len(test))
    if parallel.is_main():
        print(f"reward model, {name}: right about {right:.1%} of {len(test)} held-out rows")
    files = lab.tokenizer.files() | model.head_files()
    save_pretrained(model.trunk, directory, tokenizer_files=files)
    return model


def preference_losses(model: RewardModel, lab: Lab, rows: list[dict]) -> torch.Tensor:
    texts = [
        whole(lab, row["prompt"], row[which]) for which in ("chosen", "rejected") for row in rows
    ]
    return rewards.pairwise_loss(*model(texts).chunk(2))


def verdict_losses(model: RewardModel, lab: Lab, rows: list[dict]) -> torch.Tensor:
    scores = model([whole(lab, row["prompt"], row["response"]) for row in rows])
    return rewards.pointwise_loss(scores, torch.tensor([row["safe"] for row in rows]))


@torch.no_grad()
def score(model: RewardModel, lab: Lab, prompts: list[str], texts: list[str]) -> torch.Tensor:
    """What this process's texts are worth."""
    whole_texts = [whole(lab, prompt, text) for prompt, text in zip(prompts, texts)]
    with in_step(model, lambda: model([[0]])):
        parts = [model(whole_texts[i : i + 64]) for i in range(0, len(texts), 64)]
    return torch.cat(parts) if parts else torch.zeros(0)


def whole(lab: Lab, prompt: str, text: str) -> list[int]:
    example = sft.example(lab.tokenizer, prompt, text)
    return example.prompt + example.answer


# ---- what the stages are made of -----------------------------------------------------------


def settings(config: Config, temperature: float) -> grpo.Settings:
    return grpo.Settings(
        group_size=config.group_size, max_new_tokens=config.max_new_tokens,
        temperature=temperature, eps=config.eps, beta=config.beta, slots=config.slots,
        micro_tokens=config.micro_tokens,
    )  # fmt: skip


def reinforced(
    lab: Lab, name: str, start: str, draw: Callable[[int], list[Problem]], reward: grpo.Reward,
    steps: int, temperature: float,
) -> Transformer | None:  # fmt: skip
    """GRPO from a stage's model; None where Ctrl-C stopped it."""
    config, policy = lab.config, lab.model(start)
    course = grpo.Course(
        steps=steps, minibatches=config.minibatches, lr=config.rl_lr,
        warmup=config.warmup, refresh=config.refresh, save_every=config.save_every,
        states=config.optimizer, offload=config.offload, keep_groups=config.keep_groups,
    )  # fmt: skip
    with closing(reward):
        finished = grpo.reinforce(
            policy, lab.tokenizer, draw, reward, lambda done: settings(config, temperature), course,
            lab.run, seed=config.seed + SEEDS[name], phase=name,
        )  # fmt: skip
    return policy if finished else None


def tuned(lab: Lab, name: str, texts: list[tuple[str, str]]) -> Transformer | None:
    """SFT of the base on (prompt, response), which go into a file; None where Ctrl-C stopped it."""
    config, model = lab.config, lab.model("base")
    rows = [dict(prompt=prompt, response=response) for prompt, response in texts]
    sft.write_rows(lab.run.out / f"{name}_sft.jsonl", rows)
    if not rows:
        raise UserError(f"no example is left for {name}: {lab.run.out} says why in"
                        f" {name}_samples.jsonl; raise --cold-questions or --questions-sft,"
                        " or give a better --zero")  # fmt: skip
    tuning = sft.Tuning(
        epochs=config.epochs, batch=config.batch, lr=config.lr, final_lr=config.final_lr,
        row_tokens=config.row_tokens, save_every=config.save_every, states=config.optimizer,
    )  # fmt: skip
    examples = [sft.example(lab.tokenizer, *text) for text in texts]
    longest = model.config.max_position_embeddings
    examples = [each for each in examples if len(each.prompt) + len(each.answer) <= longest]
    if parallel.is_main():
        left = f"; {len(texts) - len(examples)} are longer than the model's {longest} tokens"
        print(f"{name}: SFT on {len(examples)} examples{left * (len(examples) < len(texts))}")
    learn = sft.learn_answers(model, tuning, config.micro_tokens)
    finished = sft.finetune(model, examples, learn, tuning, lab.run, name, config.seed)
    return model if finished else None


def rewritten(row: dict, template: str) -> str:
    """The reasoning as it is, and a summary that names the result."""
    # Departs from R1 2.3.1, writers: a rule, where people and DeepSeek-V3 rewrite.
    # Departs from R1 2.3.1, tokens: R1-Zero's tags, not special tokens: one format from Zero to R1.
    reasoning, _ = rewards.split_reasoning(row["response"])
    reasoning = reasoning.replace("<think>", "").strip()
    said = sum_up(rewards.extract_answer(row["response"]), row["language"], template)
    return join(reasoning, said, template)


def sampled(
    lab: Lab, name: str, model: str, source: Generated | Listed, questions: int,
    judge: str | None = None,
) -> list[dict] | None:  # fmt: skip
    """Outputs of a model with their verdicts, in a file; None where Ctrl-C stopped it. judge: the
    model that compares an answer with its reference, where no rule can."""
    config = lab.config
    readable = sft.Readable(
        config.least_consistency, config.longest_paragraph, tags=lab.tokenizer.tags
    )
    judge_model = lab.model(judge) if judge else None

    def verdicts(problems: list[Problem], texts: list[str], finished: list[bool]) -> list[str]:
        right = [None] * len(texts)
        if judge_model is not None:
            answers = [rewards.extract_answer(text) for text in texts]
            right = sft.judge_answers(judge_model, lab.tokenizer, problems, answers)
        return [sft.verdict(*each, readable) for each in zip(problems, texts, finished, right)]

    return sft.collect(
        lab.model(model), lab.tokenizer, source, lab.run.out / f"{name}.jsonl", lab.run,
        questions=questions, samples=config.samples, judge=verdicts, temperature=1.0, top_p=1.0,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed + SEEDS["judged" if judge else name[:4]],
        slots=config.slots,
    )  # fmt: skip


FIELDS = dict(
    general=dict(prompt=str, response=str),
    preferences=dict(prompt=str, chosen=str, rejected=str),
    safety=dict(prompt=str, response=str, safe=bool),
)


def data_rows(lab: Lab, name: str) -> list[dict]:
    """The rows of --general, --preferences or --safety; the toy's are written first."""
    config, given = lab.config, getattr(lab.config, name)
    file = Path(given) if given else lab.run.out / f"{name}.jsonl"
    if not given:
        makers = dict(general=chat.general, preferences=chat.preferences, safety=chat.safety)
        count = config.general_examples if name == "general" else config.preference_rows
        sft.write_rows(file, list(makers[name](count, config.seed)))
    return sft.read_rows(file, FIELDS[name])


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """All but every tenth, and every tenth, which is held out."""
    return [row for i, row in enumerate(rows) if i % 10], rows[::10]


def general_prompts(lab: Lab) -> list[Problem]:
    """What the preferences ask (helpful) and what the verdicts are about (harmless), once each."""
    found: dict[str, Problem] = {}
    for name, checker in (("safety", "harmless"), ("preferences", "helpful")):
        for row in split(data_rows(lab, name))[0]:
            language = rewards.language_of(row["prompt"])
            found[row["prompt"]] = Problem(row["prompt"], "", checker, language=language)
    return list(found.values())


# ---- evaluation ----------------------------------------------------------------------------


def assess(name: str, lab: Lab) -> dict:
    """The measures of train_zero.py, and how the model does on general requests."""
    config, run, file = lab.config, lab.run, lab.run.out / f"evaluation_{name}_general.json"
    model = lab.model(name)
    common = dict(max_new_tokens=config.max_new_tokens, seed=config.seed, slots=config.slots)
    samples = config.eval_samples
    result = measure(model, lab.tokenizer, lab.held_out, run, name, samples=samples, **common)
    saved = parallel.from_main(json.loads(file.read_text()) if file.exists() else None)
    if saved is not None:
        return {**result, **saved}
    with run.phase("evaluate"):
        marks = (world_marks if config.is_toy else learned_marks)(model, lab)
    means = {key: mean(marks[key]) if marks[key] else None for key in marks}
    if any(marks.values()):
        run.rewind(f"evaluate {name} general", -1)
        run.log(phase=f"evaluate {name} general", step=0, **means, **run.timing())
        run.save_json(file.name, means)
    return {**result, **means}


def world_marks(model: Transformer, lab: Lab) -> dict[str, list[float]]:
    """What the toy's world says of an answer to each held-out request."""
    marks: dict[str, list[float]] = {"instruction": [], "helpful": [], "safe": []}
    requests = chat.held_out(lab.config.eval_requests)
    texts = answers_to([request.question for request in requests], model, lab)
    for request, (text, finished) in zip(requests, texts):
        summary = rewards.summary(text) if finished else ""
        for key, value in chat.grade(request, text, summary).items():
            marks[key].append(value)
    return marks


def learned_marks(model: Transformer, lab: Lab) -> dict[str, list[float]]:
    """What the reward models say, where they are: how probably an answer is preferred to the chosen
    one of the held-out pairs, and whether it is safe. `instruction` is not measured."""
    marks: dict[str, list[float]] = {"instruction": [], "helpful": [], "safe": []}
    if not all((lab.run.out / f"reward_{name}").is_dir() for name in REWARD_MODELS):
        return marks
    helpful, harmless = (reward_model(name, lab) for name in REWARD_MODELS)
    pairs = split(data_rows(lab, "preferences"))[1][: lab.config.eval_requests]
    asked = [row["prompt"] for row in pairs]
    written = answers_to(asked, model, lab)
    summaries = [rewards.summary(text) if finished else "" for text, finished in written]
    mine = parallel.shard(asked)
    chosen = score(helpful, lab, mine, parallel.shard([row["chosen"] for row in pairs]))
    better = score(helpful, lab, mine, parallel.shard(summaries)) - chosen
    marks["helpful"] = parallel.gather_list(torch.sigmoid(better).tolist())
    asked = [row["prompt"] for row in split(data_rows(lab, "safety"))[1]]
    asked = list(dict.fromkeys(asked))[: lab.config.eval_requests]
    texts = [text for text, _ in answers_to(asked, model, lab)]
    safe = score(harmless, lab, parallel.shard(asked), parallel.shard(texts)) > 0
    marks["safe"] = parallel.gather_list(safe.double().tolist())
    return marks


def answers_to(prompts: list[str], model: Transformer, lab: Lab) -> list[tuple[str, bool]]:
    """One answer at T = 1 to each, and whether it ended by itself."""
    config, mine = lab.config, parallel.shard(range(len(prompts)))
    outputs = generate(
        model, [encode_prompt(lab.tokenizer, prompts[i]) for i in mine], rows=mine,
        max_new_tokens=config.max_new_tokens, temperature=1.0, seed=config.seed,
        stop=lab.tokenizer.stop_ids, slots=config.slots,
    )  # fmt: skip
    written = [(spell(lab.tokenizer, output), output.finish == "stop") for output in outputs]
    return parallel.gather_list(written)


MEASURES = ("pass@1", "cons@{k}", "greedy", "format", "language", "instruction", "helpful", "safe",
            "tokens")  # fmt: skip


def report(results: dict[str, dict], run: Run, k: int) -> None:
    """The paper's table of stages, and whether each of its tendencies is there."""
    if not parallel.is_main():
        return
    seconds = {phase: round(value, 1) for phase, value in run.spent().items() if value}
    claims = {claim: bool(holds) for claim, holds in tendencies(results)}
    run.save_json("result.json", {**results, "claims": claims, "seconds": seconds})
    print(" " * 12 + "".join(f"{name.capitalize():>9}" for name in results))
    for measure_name in (name.format(k=k) for name in MEASURES):
        values = [result[measure_name] for result in results.values()]
        shown = "".join(f"{'-':>9}" if v is None else f"{v:9.3f}" for v in values)
        print(f"{measure_name:<12}{shown}")
    for claim, holds in claims.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")


def tendencies(results: dict[str, dict]) -> Iterator[tuple[str, bool]]:
    """What the paper's table shows, each with whether these results do."""
    zero, dev1, dev2, dev3, r1 = (results.get(name) for name in ("zero", *STAGES))
    yield "Dev1 keeps to the language better than Zero", dev1["language"] > zero["language"]
    yield "Dev1 is less accurate than Zero", dev1["pass@1"] < zero["pass@1"]
    if dev2:
        yield "Dev2 regains accuracy", dev2["pass@1"] > dev1["pass@1"]
        yield "Dev2 keeps to the language: 0.97 or more", dev2["language"] >= 0.97
    for name, result in (("Dev3", dev3), ("R1", r1)):
        if result:
            close = result["pass@1"] >= zero["pass@1"] - 0.03
            yield f"{name} is as accurate as Zero, within 3 points", close
            for key in ("instruction", "helpful", "safe"):
                if result[key] is not None:
                    yield f"{name} is better than Zero: {key}", result[key] > zero[key]
    for key in ("instruction", "helpful"):
        if r1 and r1[key] is not None:
            yield f"R1 is better than Dev3: {key}", r1[key] > dev3[key]


if __name__ == "__main__":
    launch(main, parse(Config, PRESETS), user_errors=(ValueError,))
