"""R1-Zero's RL with an evaluation at each of many checkpoints: greedy, and as the paper samples.

python -m bench.claims.checkpoints --model runs/zero/base
"""

import json
from dataclasses import dataclass, replace

import torch

import train_zero
from runtime.run import Run, flag, launch, parse
from sample import evaluate, open_model


@dataclass(frozen=True)
class Config(train_zero.Config):
    model: str | None = flag("runs/zero/base", "directory of the base")
    out: str = flag("runs/checkpoints", "directory of the run")
    first: int = flag(20, "updates before the first checkpoint")
    last: int = flag(100, "updates before the last one")
    every: int = flag(4, "updates between two")
    eval_samples: int = flag(8, "outputs for each problem, at T = 0.6 and top-p 0.95")


def main(config: Config) -> None:
    source, held_out = train_zero.questions(config)
    policy, tokenizer = open_model(config.model, config.device, torch.float32, config.template)
    run = Run(config.out, config, resume=None)
    file, rows = run.out / "checkpoints.json", []
    if file.exists():
        rows = json.loads(file.read_text())
    how = dict(max_new_tokens=config.max_new_tokens, seed=config.seed, slots=config.slots)
    for step in range(config.first, config.last + 1, config.every):
        if any(row["step"] == step for row in rows):
            continue
        # The same course each time, which goes on from its last checkpoint.
        if not train_zero.reinforce(policy, tokenizer, source, replace(config, steps=step), run):
            return
        paper = dict(samples=config.eval_samples, temperature=0.6, top_p=0.95)
        sampled = evaluate(policy, tokenizer, held_out, **paper, **how)
        best = evaluate(policy, tokenizer, held_out, samples=1, temperature=0.0, **how)
        rows.append(dict(step=step, greedy=best["pass@1"], sampled=sampled["pass@1"]))
        run.save_json(file.name, rows)
        if run.stopping:
            return
    run.save_json("result.json", {"checkpoints": rows})


if __name__ == "__main__":
    launch(main, parse(Config, train_zero.PRESETS), user_errors=(ValueError,))
