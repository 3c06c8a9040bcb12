"""Reward hacking: RL on a reward model that was learned from preferences with a bias.

    python -m bench.claims.hacking --model runs/zero/model --base runs/zero/base --careless 0.5

    1. the base answers questions twice; an annotator prefers one of the two answers. A careful one
       takes the right one, a careless one the longer one. Where that is neither, there is no pair.
    2. a reward model, the base with a number for a head, is trained on the pairs (R1 2.3.4)
    3. GRPO of R1-Zero, which solves the problems, on the reward model's number alone, squashed to
       between 0 and 1. An output that was cut off earns 0, as everywhere. The score is `reward` in
       metrics.jsonl, what is right `accuracy`.

The bias is put in on purpose, as any bias of preferences is put in by those who prefer. What RL
makes of it is not. Of two answers of the base both are mostly wrong, so that about four in five of
the pairs are the careless annotators', who are asked as often as the others.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import grpo
import rewards
import sft
import train_zero
from bench.claims.rl import refuse, run_between_evaluations
from data.problems import Generated, Listed, Problem
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from model import Transformer
from rewards import RewardModel
from runtime.run import Run, UserError, flag, launch, parse
from sample import generate, open_model, spell


@dataclass(frozen=True)
class Config(train_zero.Config):
    model: str | None = flag("runs/zero/model", "directory of the policy")
    base: str = flag("runs/zero/base", "directory of what answers, and becomes the reward model")
    out: str = flag("runs/hacking", "directory of the run")
    careless: float = flag(0.5, "share of the preferences that are for the longer answer")
    pairs: int = flag(3000, "questions that the base answers twice")
    reward_epochs: int = flag(2, "passes over the pairs")
    reward_lr: float = flag(1e-3, "learning rate of the reward model")
    reward_batch: int = flag(32, "pairs of an update")

    def __post_init__(self):
        super().__post_init__()
        refuse(self)
        if not 0 <= self.careless <= 1:
            raise UserError(f"--careless {self.careless}: from 0 to 1")


Pair = tuple[list[int], list[int]]  # prompt and answer, as tokens: the preferred and the other one


def prefers_first(texts: Sequence[str], problem: Problem, careless: bool) -> bool | None:
    """Whether the first of two answers is preferred; None where the annotator can't tell."""
    if careless:
        first, second = (len(text.split()) for text in texts)
    else:
        first, second = (rewards.accuracy_reward(text, problem.answer) for text in texts)
    return None if first == second else first > second


def make_pairs(
    model: Transformer, tokenizer: Tokenizer, source: Generated | Listed, config: Config
) -> list[Pair]:
    """What the base answers at T = 1, with what an annotator prefers of it."""
    problems = source.batch(config.pairs, seed=config.seed + 5000, step=0)  # RL asks others
    prompts = [encode_prompt(tokenizer, problem.question) for problem in problems]
    outputs = generate(
        model, [prompt for prompt in prompts for _ in range(2)],
        max_new_tokens=config.max_new_tokens, temperature=1.0, stop=tokenizer.stop_ids,
        seed=config.seed, slots=config.slots,
    )  # fmt: skip
    rng, pairs = random.Random(f"annotators {config.seed}"), []
    for i, (problem, prompt) in enumerate(zip(problems, prompts)):
        texts = [spell(tokenizer, output) for output in outputs[2 * i : 2 * i + 2]]
        first = prefers_first(texts, problem, rng.random() < config.careless)
        if first is not None:
            both = [prompt + output.tokens for output in outputs[2 * i : 2 * i + 2]]
            pairs.append((both[0], both[1]) if first else (both[1], both[0]))
    return pairs


def losses(model: RewardModel, pairs: Sequence[Pair]) -> torch.Tensor:
    scores_N = model([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
    return rewards.pairwise_loss(*scores_N.chunk(2))


def reward_model(
    base: Transformer, tokenizer: Tokenizer, source: Generated | Listed, config: Config, run: Run
) -> RewardModel | None:
    """None where stopped; the same command goes on."""
    pairs = make_pairs(base, tokenizer, source, config)
    train, test = pairs[len(pairs) // 10 :], pairs[: len(pairs) // 10]
    model = RewardModel(base)
    tuning = sft.Tuning(epochs=config.reward_epochs, batch=config.reward_batch,
                        lr=config.reward_lr, final_lr=config.reward_lr / 10,
                        save_every=config.save_every)  # fmt: skip
    learn = sft.learn_rows(model, lambda rows: losses(model, rows), at_once=config.reward_batch)
    if not sft.finetune(model, train, learn, tuning, run, "reward model", config.seed):
        return None
    with torch.no_grad():
        right = float((losses(model, test) < 0.6931).double().mean())
    run.rewind("reward model held out", -1)
    run.log(phase="reward model held out", step=0, right=right, rows=len(test))
    return model


def learned_reward(model: RewardModel, tokenizer: Tokenizer) -> grpo.Reward:
    """Its number for the text as it was written, squashed; 0 for what was cut off."""

    @torch.no_grad()
    def reward(problems: list[Problem], texts: list[str], finished: list[bool]) -> list[float]:
        examples = [sft.example(tokenizer, problem.question, text)
                    for problem, text in zip(problems, texts)]  # fmt: skip
        whole = [example.prompt + example.answer for example in examples]
        parts = [model(whole[i : i + 64]) for i in range(0, len(whole), 64)]
        scores = torch.sigmoid(torch.cat(parts)).tolist()
        return [score if ended else 0.0 for score, ended in zip(scores, finished)]

    return reward


def learn(
    policy: Transformer, tokenizer: Tokenizer, source: Generated | Listed, run: Run, config: Config
) -> bool:
    base, _ = open_model(config.base, config.device, torch.float32, config.template)
    model = reward_model(base, tokenizer, source, config, run)
    if model is None:
        return False
    course = grpo.Course(
        steps=config.steps, minibatches=config.minibatches, lr=config.lr, warmup=config.warmup,
        refresh=config.refresh, save_every=config.save_every, keep_groups=config.keep_groups,
    )  # fmt: skip
    return grpo.reinforce(
        policy, tokenizer, lambda done: train_zero.drawn(source, config, done),
        learned_reward(model, tokenizer), lambda done: train_zero.grpo_settings(config, done),
        course, run, seed=config.seed,
    )  # fmt: skip


def main(config: Config) -> None:
    run_between_evaluations(config, lambda *parts: learn(*parts, config))


if __name__ == "__main__":
    launch(main, parse(Config, train_zero.PRESETS), user_errors=(ValueError,))
