"""Proximal policy optimization (Schulman et al. 2017), beside which the paper sets GRPO.

    python -m bench.claims.ppo --model runs/zero/base --lam 0.95

A second network, the critic, says of each token's place what the output will earn. A token's
advantage is what was earned against what had been expected, by generalized advantage estimation
(GAE, Schulman et al. 2016). lambda = 1 compares the whole rest of the output with the expectation
before the token; a smaller one trusts the critic, and what is earned n tokens later counts
lambda^n.

Choices:
- the critic is a copy of the base with a number for a head, zero at first (the RewardModel of
  rewards.py), with an optimizer of its own; the value's loss is half the mean square, not clipped;
- its learning rate is ten times the policy's: at the policy's own, 5e-4, it had not learned the
  mean of the rewards after 30 updates (seed 0; chosen by the value's loss alone);
- advantages are whitened over the rollout: less their mean, by their std over all tokens;
- every token counts alike; gamma = 1; an output that was cut off ends there, and earned 0;
- beta: InstructGPT's penalty (2203.02155), -beta log(pi / ref) in the reward of every token; the
  claim has none, as GRPO's 0.001 does nothing here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import grpo
import train_zero
from bench.claims.rl import refuse, reinforce, run_between_evaluations
from data.problems import Generated, Listed
from data.tokenizer import Tokenizer
from model import Transformer
from rewards import RewardModel
from runtime.optimizer import adamw
from runtime.run import Run, UserError, flag, launch, parse
from runtime.sharding import twin
from sft import set_rates, update


@dataclass(frozen=True)
class Config(train_zero.Config):
    model: str | None = flag("runs/zero/base", "directory of the base")
    out: str = flag("runs/ppo", "directory of the run")
    lam: float = flag(1.0, "lambda of the advantages")
    critic_lr: float = flag(5e-3, "learning rate of the critic")
    beta: float = flag(0.0, "weight of the KL in the reward of each token")

    def __post_init__(self):
        super().__post_init__()
        refuse(self, "aggregation", "ratio", "normalize_std", "mask_truncated")
        if not 0 <= self.lam <= 1:
            raise UserError(f"--lam {self.lam}: from 0 to 1")


def token_rewards(outcome: float, logprobs_T: Tensor, ref_T: Tensor | None, beta: float) -> Tensor:
    """What each token of an output earns: the outcome at the last, less the KL's part at each."""
    # InstructGPT Eq. 2: r - beta log(pi / ref), token by token
    rewards_T = torch.zeros_like(logprobs_T)
    if ref_T is not None:
        rewards_T = -beta * (logprobs_T - ref_T)
    rewards_T[-1] += outcome
    return rewards_T


def gae(
    rewards_T: Tensor, values_T: Tensor, lam: float, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Advantages, and the returns that the values should have been. values_T: what was expected
    before each token; nothing after the last."""
    advantages, following, value_after = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards_T.tolist()), reversed(values_T.tolist())):
        # GAE Eq. 11-16: delta_t = r_t + gamma V_t+1 - V_t,  A_t = delta_t + gamma lambda A_t+1
        delta = reward + gamma * value_after - value
        following = delta + gamma * lam * following
        advantages.append(following)
        value_after = value
    advantages_T = torch.tensor(advantages[::-1], dtype=values_T.dtype)
    return advantages_T, advantages_T + values_T


class Critic(RewardModel):
    """What an output will earn, as expected before each of its tokens."""

    def values(self, laid: grpo.Laid) -> Tensor:
        """N numbers, in the order of the laid out tokens."""
        packed = laid.packed
        hidden_BTD, _ = self.trunk.hidden(packed.tokens_BT, packed.positions_BT)
        before_ND = hidden_BTD[:, :-1][laid.mask_BT[:, 1:]]
        return self.head(before_ND)[:, 0]


@dataclass
class Advantages:
    """A tensor for each output of a rollout, a number for each token."""

    advantages: list[Tensor]
    returns: list[Tensor]


@torch.no_grad()
def judge(
    critic: Critic, batch: grpo.Rollout, settings: grpo.Settings, lam: float, beta: float
) -> Advantages:
    everything, device = range(len(batch.outputs)), critic.head.weight.device
    laid = grpo.lay_out(batch, everything, settings, device)
    parts = laid.micro_batches(settings.micro_tokens)
    values_N = torch.cat([critic.values(part) for part, _ in parts]).double().cpu()
    output_N, place_N = laid.output_N.cpu(), laid.place_N.cpu()
    found = Advantages([], [])
    outcomes = batch.rewards_PG.flatten().tolist()
    for o in everything:
        mine_N = output_N == o
        values_T = values_N[mine_N][place_N[mine_N].argsort()]
        logprobs_T = torch.tensor(batch.outputs[o].logprobs, dtype=torch.float64)
        ref_T = batch.ref_logprobs[o].double() if batch.ref_logprobs else None
        rewards_T = token_rewards(outcomes[o], logprobs_T, ref_T, beta)
        for kept, values in zip(
            (found.advantages, found.returns), gae(rewards_T, values_T, lam), strict=True
        ):
            kept.append(values)
    found.advantages = whitened(found.advantages)
    return found


def whitened(advantages: Sequence[Tensor]) -> list[Tensor]:
    every_N = torch.cat(list(advantages))
    scale = every_N.std(correction=0) + 1e-8
    return [(each - every_N.mean()) / scale for each in advantages]


def step(
    policy: Transformer, critic: Critic, optimizers: Sequence[torch.optim.Optimizer],
    batch: grpo.Rollout, judged: Advantages, settings: grpo.Settings, minibatch: int,
    minibatches: int,
) -> dict:  # fmt: skip
    """One update of policy and critic on a part of the rollout."""
    chosen = grpo.members(batch, settings, minibatch, minibatches)
    device, dtype = policy.lm_head.weight.device, policy.lm_head.weight.dtype
    laid = grpo.lay_out(batch, chosen, settings, device)
    drawn = [torch.tensor(batch.outputs[o].logprobs, dtype=torch.float64) for o in chosen]
    old_N = laid.pick(drawn, dtype)
    advantages_N = laid.pick([judged.advantages[o] for o in chosen], dtype)
    returns_N = laid.pick([judged.returns[o] for o in chosen], dtype)
    total = len(old_N)
    weights_N = torch.full_like(old_N, 1 / total)
    sums = dict(loss=0.0, value_loss=0.0, clip_fraction=0.0, entropy=0.0)
    for part, n in laid.micro_batches(settings.micro_tokens):
        logprobs_N, entropy_N = part.logprobs(policy, settings.temperature)
        loss, stats = grpo.grpo_loss(
            logprobs_N, old_N[n], None, advantages_N[n], weights_N[n], part.output_N,
            eps=settings.eps, eps_high=settings.eps_high, beta=0.0,
        )  # fmt: skip
        value_loss = ((critic.values(part) - returns_N[n]) ** 2).sum() / (2 * total)
        (loss + value_loss).backward()  # they share no weight
        sums["loss"] += float(loss.detach())
        sums["value_loss"] += float(value_loss.detach())
        sums["clip_fraction"] += float(stats["clip_fraction"]) / total
        sums["entropy"] += float(entropy_N.detach().sum()) / total
    norms = [
        update(model, [optimizer], settings.max_grad_norm)
        for model, optimizer in zip((policy, critic), optimizers)
    ]
    return dict(**sums, grad_norm=norms[0], critic_grad_norm=norms[1], tokens_trained=total)


def learn(
    policy: Transformer, tokenizer: Tokenizer, source: Generated | Listed, config: Config, run: Run
) -> bool:
    critic = Critic(twin(policy))
    asked = [p for p in critic.parameters() if p.requires_grad]
    state = dict(
        policy=policy, critic=critic, optimizer=adamw(policy.parameters(), config.lr),
        critic_optimizer=adamw(asked, config.critic_lr),
    )  # fmt: skip
    if config.beta:
        state["reference"] = twin(policy)
    optimizers = state["optimizer"], state["critic_optimizer"]

    def prepare(batch: grpo.Rollout, settings: grpo.Settings) -> Advantages:
        with run.phase("critic"):
            return judge(critic, batch, settings, config.lam, config.beta)

    def learned(batch, judged, settings, minibatch: int, share: float) -> dict:
        set_rates(optimizers, share)
        return step(policy, critic, optimizers, batch, judged, settings, minibatch,
                    config.minibatches)  # fmt: skip

    return reinforce(policy, tokenizer, source, config, run, state, prepare, learned)


def main(config: Config) -> None:
    run_between_evaluations(config, lambda *parts: learn(*parts[:3], config, parts[3]))


if __name__ == "__main__":
    launch(main, parse(Config, train_zero.PRESETS), user_errors=(ValueError,))
