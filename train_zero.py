"""R1-Zero: reinforcement learning on a base model, with no supervised step before it (R1 2.2).

    python train_zero.py                                   the toy, from nothing, in minutes
    python train_zero.py --preset gsm8k --model DIR --data train.jsonl
    torchrun --nproc_per_node=8 train_zero.py --preset countdown --model DIR

The default run first makes its own base: it pretrains a small DeepSeek-V3 on the corpus of
data/corpus.py, and goes on only if that base is competent, that is, if it gets single steps of a
solution right: RL can only reinforce what a base sometimes does.

It leaves in --out: base/ and model/ (model directories), metrics.jsonl, config.json, result.json,
curve.png, checkpoints/.

Departures from the paper, besides size:
- the toy's prompt has no instruction (data/prompts.py);
- the toy has its own learning rate, group size, minibatches per rollout and refresh of the
  reference; `--preset paper` has the published ones;
- the evaluation samples as RL does, at T = 1 and top-p 1 (the paper: 0.6 and 0.95);
- not reported and chosen here: AdamW without weight decay, a short linear warm-up, gradients
  clipped at norm 1, eps = 0.2, router biases frozen during RL.

Read next: sft.py (how the toy's base is made), bench/zero.py (five seeds and two controls).
"""

import copy
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import torch

import grpo
import rewards
import sft
from data.problems import Generated, Listed, Problem, load
from data.prompts import build_prompt
from data.tokenizer import Tokenizer
from model import Config as ModelConfig
from model import Transformer
from runtime import parallel
from runtime.plot import draw_curve
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.run import (
    Run, UserError, check_finite, flag, launch, parse, pick_device, progress, usable_dtype,
)  # fmt: skip
from sample import evaluate, fitting_prompts, table


@dataclass(frozen=True)
class Config:
    model: str | None = flag(None, "directory of the base model; none: pretrain the toy's own")
    data: str = flag("calc-chain", "questions: calc-chain, countdown or a JSONL file")
    test_data: str | None = flag(
        None, "JSONL file to evaluate on (default: held-out part of --data)"
    )
    template: str | None = flag(None, "prompt template, toy or r1-zero (default: the model's own)")
    out: str = flag("runs/zero", "directory of the run")
    seed: int = flag(0, "random seed")
    # The toy's base.
    pretrain_steps: int = flag(1000, "updates of pretraining, of 2048 tokens each")
    force: bool = flag(False, "go on with a base that is not competent")
    # R1 2.2.1, and the list of hyperparameters in its appendix.
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
    reward: Literal["rules", "format", "random"] = flag("rules", "rules, or a control")
    format_weight: float = flag(1.0, "weight of the format reward beside the accuracy's 1")
    # Evaluation.
    eval_problems: int = flag(225, "held-out problems")
    eval_samples: int = flag(16, "outputs for each of them, at temperature 1 and top-p 1")
    # The machine.
    save_every: int = flag(20, "updates between checkpoints")
    slots: int = flag(256, "outputs written at the same time; fewer need less memory")
    micro_tokens: int = flag(4096, "tokens of a micro-batch; fewer need less memory")
    device: str = flag("auto", "cpu, cuda or auto")
    dtype: Literal["float32", "float64"] = flag("float32", "of the weights that are trained")
    threads: int = flag(0, "CPU threads; 0 leaves the choice to torch")
    resume: bool = flag(False, "continue the run in --out")

    def __post_init__(self):
        for name in COUNTS:
            if getattr(self, name) < 1:
                flag_name = name.replace("_", "-")
                raise UserError(f"--{flag_name} {getattr(self, name)}: at least 1")
        if self.model is None and self.data != "calc-chain":
            raise UserError(
                f"--data {self.data} needs --model DIR: the base that this program pretrains"
                " knows calc-chain only"
            )
        if self.minibatches > self.questions:
            raise UserError(
                f"--minibatches {self.minibatches}: at most --questions, {self.questions}"
            )
        if self.raise_at and self.raised_max_new_tokens < self.max_new_tokens:
            raise UserError(
                f"--raise-at {self.raise_at} needs --raised-max-new-tokens of at least"
                f" {self.max_new_tokens}, not {self.raised_max_new_tokens}"
            )
        if self.template is not None:
            build_prompt("", self.template)  # refuses an unknown one
        grpo_settings(self, done=0)  # and so does this for what concerns GRPO


MAY_CHANGE = ("steps", "save_every", "force", "slots", "micro_tokens")  # on --resume
COUNTS = ("questions", "minibatches", "refresh", "save_every", "eval_problems", "eval_samples",
          "max_new_tokens", "steps", "pretrain_steps", "slots", "micro_tokens")  # fmt: skip
REAL = dict(lr=1e-6, group_size=16, minibatches=4, max_new_tokens=1024, steps=400, refresh=100,
            eval_samples=4)  # fmt: skip
PRESETS = {
    "toy": {},
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
    source, held_out = questions(config)
    given = load_base(config) if config.model else None
    check_context(config, given[0].config if given else ModelConfig.preset("toy"))
    run = Run(config.out, config, resume=config.resume, may_change=MAY_CHANGE)
    model, tokenizer = given or pretrain_base(config, run)
    if model is None:  # stopped by Ctrl-C; --resume goes on
        return
    base = measure(model, tokenizer, held_out, config, run, "base")
    model = reinforce(model, tokenizer, source, config, run)
    if model is None:
        return
    save_pretrained(model, run.out / "model", tokenizer_files=tokenizer.files())
    zero = measure(model, tokenizer, held_out, config, run, "zero", step=config.steps)
    report(base, zero, run)


def questions(config: Config) -> tuple[Generated | Listed, list[Problem]]:
    """Where the training questions come from, and the held-out ones."""
    try:
        source = load(config.data)
        test = source if config.test_data is None else load(config.test_data, all_held_out=True)
        return source, test.held_out(config.eval_problems)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_context(config: Config, model: ModelConfig) -> None:
    longest = max(config.max_new_tokens, config.raised_max_new_tokens)
    if longest >= model.max_position_embeddings:
        raise UserError(
            f"outputs of up to {longest} tokens leave no room for a question in the model's context"
            f" of {model.max_position_embeddings}: lower --max-new-tokens"
        )


def load_base(config: Config) -> tuple[Transformer, Tokenizer]:
    # Not in bf16 even where it is stored so: AdamW's steps of 1e-6 would vanish in its rounding.
    device = pick_device(config.device)
    dtype = usable_dtype(getattr(torch, config.dtype), device)
    model = load_pretrained(config.model, dtype=dtype, device=device)
    try:
        return model, Tokenizer.load(config.model)
    except ValueError as error:
        raise UserError(str(error)) from error


def pretrain_base(config: Config, run: Run) -> tuple[Transformer | None, Tokenizer]:
    """The toy's own base; None where Ctrl-C stopped its pretraining."""
    tokenizer = Tokenizer.toy()
    model = sft.pretrain_toy(
        tokenizer, run, seed=config.seed, steps=config.pretrain_steps, force=config.force,
        device=pick_device(config.device), dtype=getattr(torch, config.dtype),
    )  # fmt: skip
    return model, tokenizer


# ---- reinforcement learning ----------------------------------------------------------------


def reinforce(
    policy: Transformer, tokenizer: Tokenizer, source: Generated | Listed, config: Config, run: Run
) -> Transformer | None:
    """R1 2.2.1 as a loop; None where stopped."""
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    reward = reward_rule(config)
    state = dict(policy=policy, reference=reference, optimizer=optimizer)
    done = run.resume("rl", state)
    with progress(config.steps, "GRPO", initial=done) as bar:
        while done < config.steps:
            settings = grpo_settings(config, done)
            asked, skipped = ask(source, tokenizer, policy, config, done, settings)
            # Sample a group of outputs for each question from the old policy, and reward them.
            with run.phase("rollout") as timer:
                batch = grpo.rollout(
                    policy, tokenizer, asked, reward, settings, seed=config.seed, step=done
                )
                written = parallel.all_sum(sum(len(output.tokens) for output in batch.outputs))
                timer.tokens += written
            # The reference's log-probs of the same outputs, for the KL.
            with run.phase("reference") as timer:
                if config.beta:
                    timer.tokens += written
                    batch.ref_logprobs = grpo.reference_logprobs(reference, batch, settings)
            # Several updates, the later ones on outputs of a policy that has since moved on.
            for minibatch in range(min(config.minibatches, config.steps - done)):
                sft.set_rates([optimizer], min(1.0, (done + 1) / max(1, config.warmup)))
                with run.phase("update") as timer:
                    stats = grpo.step(
                        policy, optimizer, batch, settings, minibatch, config.minibatches
                    )
                    timer.tokens += stats["tokens_trained"]
                done += 1
                for name in ("loss", "grad_norm"):
                    check_finite(stats[name], done, run.checkpoints("rl"), name)
                if done % config.refresh == 0:  # the rest of this rollout keeps the old one's KL
                    reference.load_state_dict(policy.state_dict())
                sampled = dict(batch.metrics, skipped=skipped) if minibatch == 0 else {}
                run.log(phase="rl", step=done, **stats, **sampled, **run.timing())
                bar.update(1)
            bar.set_postfix(
                accuracy=f"{batch.metrics['accuracy']:.2f}", tokens=f"{batch.metrics['tokens']:.0f}"
            )
            if not run.goes_on("rl", done, state, every=config.save_every):
                return None
    return policy


def grpo_settings(config: Config, done: int) -> grpo.Settings:
    raised = config.raise_at and done >= config.raise_at
    return grpo.Settings(
        group_size=config.group_size,
        max_new_tokens=config.raised_max_new_tokens if raised else config.max_new_tokens,
        temperature=config.temperature, eps=config.eps, eps_high=config.eps_high, beta=config.beta,
        ratio=config.ratio, aggregation=config.aggregation, normalize_std=config.normalize_std,
        mask_truncated=config.mask_truncated, replay_routes=config.replay_routes,
        slots=config.slots, micro_tokens=config.micro_tokens,
    )  # fmt: skip


def ask(
    source: Generated | Listed, tokenizer: Tokenizer, model: Transformer, config: Config, done: int,
    settings: grpo.Settings,
) -> tuple[grpo.Questions, int]:  # fmt: skip
    """This process's share of the questions of one rollout. The batch is the same on any number of
    processes; questions too long for the context are left out of it, and counted."""
    problems = source.batch(config.questions, seed=config.seed, step=-(-done // config.minibatches))
    prompts, fitting = fitting_prompts(
        model, tokenizer, problems, config.template, settings.max_new_tokens
    )
    numbers = list(parallel.shard(range(len(fitting))))
    mine = [fitting[number] for number in numbers]
    asked = grpo.Questions(numbers, [problems[i] for i in mine], [prompts[i] for i in mine])
    return asked, len(problems) - len(fitting)


def reward_rule(config: Config):
    """R1 2.2.2: accuracy and format, equally weighted. The controls are told less, or nothing."""

    def rules(problem: Problem, response: str, finished: bool) -> float:
        if not finished:  # cut off: what stands there so far is no answer
            return 0.0
        check = rewards.CHECKERS[problem.checker]
        accuracy = rewards.accuracy_reward(response, problem.answer, check)
        return accuracy + config.format_weight * rewards.format_reward(response)

    def only_format(problem: Problem, response: str, finished: bool) -> float:
        return rewards.format_reward(response) if finished else 0.0

    def coin(problem: Problem, response: str, finished: bool) -> float:
        """By a hash of the text: the same text always earns the same, and it means nothing."""
        told = f"{config.seed} {problem.question} {response}"
        return float(hashlib.sha256(told.encode()).digest()[0] % 2)

    return {"rules": rules, "format": only_format, "random": coin}[config.reward]


# ---- evaluation ----------------------------------------------------------------------------


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    config: Config,
    run: Run,
    name: str,
    step: int = 0,
) -> dict:
    """Evaluate a model as RL samples it (T = 1, top-p 1), and greedy; on resuming, read back what
    was found after the same step."""
    file = run.out / f"evaluation_{name}.json"
    if file.exists():
        saved = json.loads(file.read_text())
        if saved["step"] == step:
            return saved["result"]
    run.rewind(f"evaluate {name}", -1)
    common = dict(
        max_new_tokens=grpo_settings(config, step).max_new_tokens, seed=config.seed,
        template=config.template, slots=config.slots,
    )  # fmt: skip
    with run.phase("evaluate") as timer:
        result = evaluate(
            model, tokenizer, problems, samples=config.eval_samples, temperature=1.0, top_p=1.0,
            title=f"evaluate {name}", **common,
        )  # fmt: skip
        greedy = evaluate(
            model, tokenizer, problems, samples=1, temperature=0.0, title="greedy", **common
        )
        timer.tokens += round(result["tokens"] * result["problems"] * result["samples"])
    result["greedy"] = greedy["pass@1"]
    run.log(phase=f"evaluate {name}", step=step, **result, **run.timing())
    run.save_json(file.name, dict(step=step, result=result))
    solved = result[f"pass@{config.eval_samples}"]
    if solved < 0.05 and parallel.is_main():
        print(
            f"{name}: {solved:.1%} of the questions are ever solved in {config.eval_samples}"
            f" outputs ({result['unparsed']:.0%} of these had no answer that could be read,"
            f" {result['truncated']:.0%} were cut off). Where all outputs of a question are equally"
            " wrong, accuracy gives RL nothing to reinforce: it needs a base that solves some of"
            " the questions sometimes."
        )
    return result


def report(base: dict, zero: dict, run: Run) -> None:
    seconds = {"pretrain": run.seconds["pretrain"], "eval": run.seconds["evaluate"]}
    seconds["rl"] = sum(run.seconds[phase] for phase in ("rollout", "reference", "update"))
    run.save_json("result.json", {"base": base, "zero": zero, "seconds": seconds})
    if parallel.is_main():
        print(table({"base": base, "zero": zero}))
        print(f"{run.out}: {', '.join(f'{phase} {s:.0f} s' for phase, s in seconds.items())}")
        draw_curve(run.out)


if __name__ == "__main__":
    launch(main, parse(Config, PRESETS))
