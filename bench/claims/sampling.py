"""pass@1, cons@k and pass@k against k, of a base and of what RL made of it, from 64 outputs each.

python -m bench.claims.sampling --base runs/zero/base --trained runs/zero/model
"""

import math
import random
from dataclasses import dataclass
from statistics import fmean as mean
from statistics import stdev

import rewards
from data.problems import Problem, load
from runtime.flags import Machine
from runtime.run import Run, UserError, flag, launch, parse
from sample import encode_prompt, generate, open_model, spell


@dataclass(frozen=True)
class Config(Machine):
    base: str = flag("runs/zero/base", "model directory")
    trained: str = flag("runs/zero/model", "model directory")
    data: str = flag("calc-chain", "problems")
    out: str = flag("runs/voting", "directory of the run")
    seed: int = flag(0, "random seed")
    eval_problems: int = flag(225, "held-out problems")
    samples: int = flag(64, "outputs for each: the largest k, a power of 2")
    temperature: float = flag(1.0, "at which they are drawn")
    max_new_tokens: int = flag(112, "longest output")

    def __post_init__(self):
        super().__post_init__()
        if self.samples < 2 or self.samples & (self.samples - 1):
            raise UserError(f"--samples {self.samples}: a power of 2, from 2")


def pass_at(k: int, right: int, n: int) -> float:
    """Unbiased (Chen et al. 2021): the chance that k of n outputs have one of the right ones."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def cons_at(k: int, answers: list[str | None], gold: str) -> float:
    """The mean over blocks of k outputs each, so that every output votes once."""
    blocks = [answers[i : i + k] for i in range(0, len(answers), k)]
    return mean(float(rewards.math_equal(rewards.majority(block), gold)) for block in blocks)


def curves(problems: list[Problem], answers: list[list[str | None]], ks: list[int]) -> dict:
    """The three measures at each k; and by how much cons at the largest is above pass@1."""
    right = [
        [rewards.math_equal(answer, problem.answer) for answer in group]
        for problem, group in zip(problems, answers)
    ]
    n, last = len(answers[0]), ks[-1]
    votes = [cons_at(last, group, problem.answer) for problem, group in zip(problems, answers)]
    gains = [vote - mean(group) for vote, group in zip(votes, right)]
    voted = [[cons_at(k, group, problem.answer) for problem, group in zip(problems, answers)]
             for k in ks]  # fmt: skip
    return {
        "pass@1": mean(mean(group) for group in right),
        "cons": [mean(values) for values in voted],
        "pass": [mean(pass_at(k, sum(group), n) for group in right) for k in ks],
        "gain": mean(gains),
        "noise": 1.96 * stdev(gains) / math.sqrt(len(gains)),
    }


def drawn_answers(directory: str, problems: list[Problem], config: Config) -> list[list]:
    model, tokenizer = open_model(directory, config.device, None)
    prompts = [encode_prompt(tokenizer, problem.question) for problem in problems]
    outputs = generate(
        model, [prompt for prompt in prompts for _ in range(config.samples)],
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        stop=tokenizer.stop_ids, seed=config.seed, slots=config.slots,
    )  # fmt: skip
    answers = [
        rewards.extract_answer(spell(tokenizer, output)) if output.finish == "stop" else None
        for output in outputs
    ]
    k = config.samples
    groups = [answers[i * k : (i + 1) * k] for i in range(len(problems))]
    rng = random.Random(config.seed)
    return [rng.sample(group, k) for group in groups]  # blocks of neighbours mean nothing


def main(config: Config) -> None:
    run = Run(config.out, config, resume=None)
    problems = load(config.data).held_out(config.eval_problems)
    ks = [2**i for i in range(config.samples.bit_length())]
    found = {
        name: curves(problems, drawn_answers(directory, problems, config), ks)
        for name, directory in (("base", config.base), ("trained", config.trained))
    }
    run.save_json("result.json", {"k": ks, **found})


if __name__ == "__main__":
    launch(main, parse(Config, {}), user_errors=(ValueError,))
