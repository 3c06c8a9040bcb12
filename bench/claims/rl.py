"""The loop of grpo.reinforce with two places to do otherwise: what is made of a rollout before it
is learned from, and what an update is. For what only a claim needs: ppo.py, kl_reward.py.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

import grpo
import train_zero
from data.problems import Generated, Listed
from data.tokenizer import Tokenizer
from model import Transformer
from runtime.run import Run, UserError, check_finite, progress
from runtime.workers import closing
from sample import open_model


# What train_zero.py does and this loop does not.
ABSENT = ("async_rollouts", "join", "ahead", "part", "ep", "tp", "dtype", "recompute", "offload",
          "optimizer", "pretrain_steps", "force", "dry_run")  # fmt: skip


def refuse(config: train_zero.Config, *names: str) -> None:
    """Raises UserError where a flag is given that would change nothing."""
    for each in fields(config):
        if each.name in (*ABSENT, *names) and getattr(config, each.name) != each.default:
            raise UserError(f"--{each.name.replace('_', '-')} does nothing here: leave it out")


def reinforce(
    policy: Transformer, tokenizer: Tokenizer, source: Generated | Listed,
    config: train_zero.Config, run: Run, state: dict,
    prepare: Callable[[grpo.Rollout, grpo.Settings], Any],
    update: Callable[[grpo.Rollout, Any, grpo.Settings, int, float], dict],
) -> bool:  # fmt: skip
    """False where stopped. state: what a checkpoint holds, with a reference where there is a KL.

    update(rollout, what prepare made of it, settings, minibatch, share of the learning rate).
    """
    reference, done = state.get("reference"), run.resume("rl", state)
    with (
        progress(config.steps, "RL", initial=done) as bar,
        closing(train_zero.reward_rule(config, tokenizer.tags)) as reward,
    ):
        while done < config.steps:
            now = train_zero.grpo_settings(config, done)
            drawn = train_zero.drawn(source, config, done)
            asked, _ = grpo.fitting_questions(drawn, tokenizer, policy, now)
            with run.phase("rollout"):
                batch = grpo.rollout(
                    policy, tokenizer, asked, reward, now, seed=config.seed, step=done
                )
            if reference is not None:
                with run.phase("reference"):
                    batch.ref_logprobs = grpo.reference_logprobs(reference, batch, now)
            prepared = prepare(batch, now)
            kept = grpo.shown(batch, tokenizer, config.keep_groups)
            run.keep_rollouts(kept, phase="rl", step=done + 1)
            for minibatch in range(min(config.minibatches, config.steps - done)):
                share = min(1.0, (done + 1) / max(1, config.warmup))
                with run.phase("update"):
                    stats = update(batch, prepared, now, minibatch, share)
                done += 1
                for name in ("loss", "grad_norm", "critic_grad_norm"):
                    check_finite(stats.get(name, 0.0), done, run.checkpoints("rl"), name)
                if reference is not None and done % config.refresh == 0:
                    reference.load_state_dict(policy.state_dict())
                sampled = batch.metrics if minibatch == 0 else {}
                run.log(phase="rl", step=done, **stats, **sampled, **run.timing())
                bar.update(1)
            every = config.save_every if done < config.steps else 1
            if not run.goes_on("rl", done, state, every=every):
                return False
    return True


def run_between_evaluations(
    config: train_zero.Config,
    learn: Callable[[Transformer, Tokenizer, Generated | Listed, Run], bool],
) -> None:
    """The base, evaluated; RL; what came of it, evaluated; result.json."""
    source, held_out = train_zero.questions(config)
    policy, tokenizer = open_model(config.model, config.device, torch.float32, config.template)
    run = Run(config.out, config, resume=None)
    base = train_zero.assess(policy, tokenizer, held_out, config, run, "base")
    if not learn(policy, tokenizer, source, run):
        return
    zero = train_zero.assess(policy, tokenizer, held_out, config, run, "zero", step=config.steps)
    run.save_json("result.json", {"base": base, "zero": zero})
