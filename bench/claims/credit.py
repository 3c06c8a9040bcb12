"""What a token is credited with: by a critic or by its group, and how much each token counts. The
default run itself is GRPO's arm; the others start from the same base.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean as mean

from bench.claims.claim import (
    SAME_PASS, Claim, Effect, Measured, change, curve, half, learns_more, result, rollouts,
    together,
)  # fmt: skip
from bench.claims.jobs import Job, Lab
from bench.claims.objective import accuracies, passes

Outs = Mapping[str, Path]

# ---- the critic ----------------------------------------------------------------------------

UPDATES = 120  # of PPO, which take twice as long as GRPO's, and of GRPO's run the first so many


def critics(lab: Lab, seed: int) -> dict[str, Job]:
    arms = {"GRPO": lab.zero(seed)}
    for name, lam in (("PPO, lambda 0.95", "0.95"), ("PPO, lambda 1", "1.0")):
        flags = ("--lam", lam, "--steps", str(UPDATES), "--eval-samples", "8")
        arms[name] = lab.program("ppo", f"ppo-{lam}", seed, *flags, seconds=200)
    return arms


def critic(outs: Outs) -> Measured:
    names = ("GRPO", "PPO, lambda 0.95", "PPO, lambda 1")
    all_rows = {name: [row for row in rollouts(outs[name]) if row["step"] <= UPDATES]
                for name in names}  # fmt: skip
    grpo, low, one = all_rows.values()
    effects = [
        learns_more("mean accuracy, GRPO above PPO with lambda 0.95", grpo, low),
        learns_more("PPO with lambda 1 above 0.95", one, low),
    ]
    over = f"mean accuracy over {UPDATES} updates"
    figures = {f"{name}, {over}": mean(row["accuracy"] for row in rows)
               for name, rows in all_rows.items()}  # fmt: skip
    figures |= {f"{name}, over their last five rollouts": mean(row["accuracy"] for row in rows[-5:])
                for name, rows in all_rows.items()}  # fmt: skip
    lines = {name: curve(rows, "accuracy") for name, rows in all_rows.items()}
    return Measured(figures, effects, {"accuracy by update": lines})


PPO = Claim(
    name="ppo", states="PPO with lambda 0.95 learns worse than GRPO, and than with lambda 1",
    paper="on MATH: lambda 0.95 considerably worse, 1.0 nearly as good as GRPO",
    rule="mean accuracy over 120 updates: GRPO is above PPO with lambda 0.95, and so is PPO with"
    " lambda 1, each by more than two equal runs differ by",
    note="With lambda 1 PPO learns as fast as GRPO, at equal updates, which take 1.4 to 2.2 times"
    " as long. It has a critic as large as the policy, no KL, and counts all tokens alike; it was"
    " not tuned but for the critic's learning rate. GRPO is the default run.",
    runs=critics, measure=critic,
)  # fmt: skip

# ---- what a token counts -------------------------------------------------------------------

DR = ("--aggregation", "constant")


def unbiased(lab: Lab, seed: int) -> dict[str, Job]:
    return {
        "GRPO": lab.zero(seed),
        "no 1/|o|": lab.arm("constant", seed, *DR),
        "no std": lab.arm("no-std", seed, "--no-normalize-std"),
        "neither (Dr. GRPO)": lab.arm("dr-grpo", seed, *DR, "--no-normalize-std"),
    }


def wrong_tokens(out: Path, after: int = 40) -> list[int]:
    """Lengths of outputs that did not earn all, of the groups that were kept."""
    lengths = []
    with (out / "rollouts.jsonl").open() as file:
        for group in map(json.loads, file):
            if group["phase"] == "rl" and group["step"] > after:
                wrong = [each for each in group["outputs"] if each["reward"] < 2]
                lengths += [len(each["tokens"]) for each in wrong]
    return lengths


def bias(outs: Outs) -> Measured:
    lengths = {name: wrong_tokens(out) for name, out in outs.items()}
    dr = "neither (Dr. GRPO)"
    figures = {f"tokens of wrong outputs, {name}": mean(lengths[name] or [0])
               for name in ("GRPO", "no 1/|o|", dr)}  # fmt: skip
    figures |= passes(outs)
    effects = [change("wrong outputs, GRPO longer than without 1/|o|",
                      lengths["no 1/|o|"], lengths["GRPO"])]  # fmt: skip
    one, other = (result(outs[name])["zero"] for name in (dr, "GRPO"))
    noise = together(half(one), half(other))
    no_worse = one["pass@1"] - other["pass@1"] + max(noise, SAME_PASS)
    effects.append(Effect("Dr. GRPO no less accurate, within noise", no_worse, 0.0))
    curves = {f"{key} by update": accuracies(outs, key) for key in ("accuracy", "tokens")}
    return Measured(figures, effects, curves)


BIAS = Claim(
    name="bias",
    states="GRPO's 1/|o| makes wrong outputs longer; without its biases nothing is lost",
    paper="Dr. GRPO (2503.20783), not R1: wrong outputs grow shorter at the same accuracy",
    rule="wrong outputs after update 40 are longer with 1/|o| than without, by 3 standard errors,"
    " and pass@1 without either bias is not lower by more than noise",
    note="On all seeds wrong outputs are longer with 1/|o|, by 1 to 5 tokens of 24, but these are"
    " some 200 outputs a run, of which that is within the noise. Without 1/|o| alone one seed ends"
    " at .900.",
    runs=unbiased, measure=bias,
)  # fmt: skip


def weights(lab: Lab, seed: int) -> dict[str, Job]:
    return {
        "output": lab.zero(seed),
        "token": lab.arm("token", seed, "--aggregation", "token"),
        "constant": lab.arm("constant", seed, *DR),
    }


def weighting(outs: Outs) -> Measured:
    rows = {name: rollouts(out) for name, out in outs.items()}
    figures = {f"{name}, mean accuracy": mean(row["accuracy"] for row in each)
               for name, each in rows.items()}  # fmt: skip
    figures |= passes(outs)
    effects = [learns_more("mean accuracy, token above output", rows["token"], rows["output"])]
    curves = {f"{key} by update": accuracies(outs, key) for key in ("accuracy", "tokens")}
    return Measured(figures, effects, curves)


AGGREGATION = Claim(
    name="aggregation", states="All tokens weighted alike learn better than each output's mean",
    paper="DAPO (2503.14476), not R1, whose Eq. 1 has no 1/|o|",
    rule="mean accuracy over the run with the mean over all tokens is above that with the mean over"
    " each output's, by more than two equal runs differ by",
    note="Mean accuracies differ by less than those of two equal runs: right outputs of a group are"
    " about equally long. With a constant one seed ends at .900.",
    runs=weights, measure=weighting,
)  # fmt: skip

CLAIMS = [PPO, BIAS, AGGREGATION]
