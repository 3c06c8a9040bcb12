"""GRPO with the KL in the reward, as PPO has it in InstructGPT, in place of the loss.

    python -m bench.claims.kl_reward --model runs/zero/base --beta 0.04

Every token is charged beta log(pi / ref). An output earns the sum, so that, of two outputs that are
equally right, the longer one earns less: this is what the paper takes the KL into the loss for. All
else is grpo.py.
"""

from dataclasses import dataclass, replace

import torch

import grpo
import train_zero
from bench.claims.ppo import token_rewards
from bench.claims.rl import refuse, reinforce, run_between_evaluations
from data.problems import Generated, Listed
from data.tokenizer import Tokenizer
from model import Transformer
from runtime.run import Run, UserError, flag, launch, parse
from sft import set_rates


@dataclass(frozen=True)
class Config(train_zero.Config):
    model: str | None = flag("runs/zero/base", "directory of the base")
    out: str = flag("runs/kl-reward", "directory of the run")
    beta: float = flag(0.04, "weight of the KL in the reward")

    def __post_init__(self):
        super().__post_init__()
        refuse(self)
        if self.beta <= 0:
            raise UserError(f"--beta {self.beta}: more than 0; without a KL, python train_zero.py")


def charge(batch: grpo.Rollout, beta: float, normalize_std: bool = True) -> None:
    """Take the KL of each output's tokens out of its reward, and compare the groups anew."""
    outcomes_PG = batch.rewards_PG
    earned = [
        token_rewards(outcome, torch.tensor(output.logprobs, dtype=torch.float64), ref_T, beta)
        for outcome, output, ref_T in zip(
            outcomes_PG.flatten().tolist(), batch.outputs, batch.ref_logprobs, strict=True
        )
    ]
    batch.rewards_PG = torch.stack([each.sum() for each in earned]).view_as(outcomes_PG)
    batch.advantages_PG = grpo.group_advantages(batch.rewards_PG, normalize_std)
    # Of a whole output. `kl` stays 0 in metrics.jsonl: the loss has none.
    batch.metrics["charged"] = float((outcomes_PG - batch.rewards_PG).mean())
    agreed_P = (batch.advantages_PG == 0).all(1)
    batch.metrics["groups_without_signal"] = float(agreed_P.double().mean())


def learn(
    policy: Transformer, tokenizer: Tokenizer, source: Generated | Listed, config: Config, run: Run
) -> bool:
    course = grpo.Course(
        steps=config.steps, minibatches=config.minibatches, lr=config.lr, warmup=config.warmup,
        refresh=config.refresh,
    )  # fmt: skip
    state = grpo.first_state(policy, course, reference=True, seed=config.seed)

    def prepare(batch: grpo.Rollout, settings: grpo.Settings) -> None:
        charge(batch, config.beta, settings.normalize_std)

    def learned(batch, _, settings: grpo.Settings, minibatch: int, share: float) -> dict:
        set_rates([state["optimizer"]], share)
        without = replace(settings, beta=0.0)
        return grpo.step(policy, state["optimizer"], batch, without, minibatch, config.minibatches)

    return reinforce(policy, tokenizer, source, config, run, state, prepare, learned)


def main(config: Config) -> None:
    run_between_evaluations(config, lambda *parts: learn(*parts[:3], config, parts[3]))


if __name__ == "__main__":
    launch(main, parse(Config, train_zero.PRESETS), user_errors=(ValueError,))
