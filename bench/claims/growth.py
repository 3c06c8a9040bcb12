"""What grows under RL alone, from the default runs (train_zero.py --seed S), and its measures.

The first four and `test-time` only read the default run. `voting` samples its two models more
often, `greedy` trains once more and stops at each of many checkpoints.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

import numpy as np

from bench.claims.claim import (
    Claim, Effect, Measured, change, curve, half, result, rollouts, share_noise,
    together,
)  # fmt: skip
from bench.claims.jobs import Job, Lab

EASY, HARD = ("2", "3", "4"), ("8", "9", "10")  # operations
Outs = Mapping[str, Path]


def default(lab: Lab, seed: int) -> dict[str, Job]:
    return {"zero": lab.zero(seed)}


def accuracy(outs: Outs) -> Measured:
    found, rows = result(outs["zero"]), rollouts(outs["zero"])
    base, zero = found["base"], found["zero"]
    k = base["samples"]
    cons = f"cons@{k}"
    figures = {"base pass@1": base["pass@1"], "after RL": zero["pass@1"],
               f"base {cons}": base[cons], f"after RL {cons}": zero[cons]}  # fmt: skip
    effects = [Effect("gain in pass@1", zero["pass@1"] - base["pass@1"],
                      together(half(zero), half(base)))]  # fmt: skip
    return Measured(figures, effects, {"accuracy by update": {"RL": curve(rows, "accuracy")}})


ACCURACY = Claim(
    name="accuracy", states="Accuracy rises under RL alone",
    paper="AIME 2024 pass@1 15.6 to 77.9 %, cons@64 86.7 %",
    rule="pass@1 on held-out problems is higher after RL, by more than both 95 % intervals",
    runs=default, measure=accuracy,
)  # fmt: skip


def length(outs: Outs) -> Measured:
    found, rows = result(outs["zero"]), rollouts(outs["zero"])
    tokens = [row["tokens"] for row in rows]
    middle = mean(tokens[len(tokens) // 2 :][:5])
    figures = {"times as long after RL": found["zero"]["tokens"] / found["base"]["tokens"],
               "over the second half of RL alone": mean(tokens[-5:]) / middle}  # fmt: skip
    effects = [change("tokens, first to last five rollouts", tokens[:5], tokens[-5:])]
    return Measured(figures, effects, {"tokens by update": {"RL": curve(rows, "tokens")}})


LENGTH = Claim(
    name="length", states="Outputs grow longer under RL alone",
    paper="about 28 times as long, still growing at the end",
    rule="the last five rollouts are longer than the first five, by more than 3 standard errors",
    note="Not the paper's second half: growth ends halfway, as a solution that is written out in"
    " full is as long as it is.",
    runs=default, measure=length,
)  # fmt: skip


def reflection(outs: Outs) -> Measured:
    found, rows = result(outs["zero"]), rollouts(outs["zero"])
    before, after = (found[name]["reflection"] for name in ("base", "zero"))
    n = found["base"]["problems"]
    noise = together(share_noise(before, n), share_noise(after, n))
    figures = {"base, share of outputs": before, "after RL": after}
    effects = [Effect("share with a reflective word", after - before, noise)]
    return Measured(figures, effects, {"reflection by update": {"RL": curve(rows, "reflection")}})


REFLECTION = Claim(
    name="reflection", states="Reflection grows over training",
    paper="reflective words 5 to 7 times as frequent",
    rule="the share of held-out outputs with a reflective word rises by more than 95 % intervals",
    note="The base has its few from the corpus; its single steps are all but always right, so that"
    " there is nothing to check.",
    runs=default, measure=reflection,
)  # fmt: skip


def of_levels(row: dict, levels: tuple[str, ...]) -> list[float]:
    return [row["by_level"][level] for level in levels if level in row["by_level"]]


def gaps(rows: list[dict]) -> list[float]:
    """Accuracy on easy problems less that on hard ones, of rollouts that have both."""
    both = [(of_levels(row, EASY), of_levels(row, HARD)) for row in rows]
    return [mean(easy) - mean(hard) for easy, hard in both if easy and hard]


def difficulty(outs: Outs) -> Measured:
    rows = rollouts(outs["zero"])
    early, late = gaps(rows[: len(rows) // 2]), gaps(rows[-len(rows) // 4 :])
    figures = {"easy ahead of hard, first half": mean(early), "last quarter": mean(late)}
    effects = [change("easy problems are ahead in the first half", [0.0, 0.0], early),
               change("hard ones catch up", late, early)]  # fmt: skip
    lines = {}
    for name, levels in (("2 to 4 operations", EASY), ("8 to 10", HARD)):
        known = [(row["step"], mean(found)) for row in rows if (found := of_levels(row, levels))]
        smooth = [(known[i][0], mean(y for _, y in known[max(0, i - 3) : i + 4]))
                  for i in range(len(known))]  # fmt: skip
        lines[name] = tuple(map(list, zip(*smooth)))
    return Measured(figures, effects, {"accuracy by update": lines})


DIFFICULTY = Claim(
    name="difficulty", states="Easy problems are solved first, hard ones catch up",
    paper="MATH levels 1 to 3 soon at 90 to 95 %, level 5 from 55 to 90 %",
    rule="2 to 4 operations are ahead of 8 to 10 over the first half of training, and less so in"
    " its last quarter, each by 3 standard errors over rollouts",
    note="The gap shrinks on all seeds, by .044 to .052, but by less than the noise of so few"
    " rollouts.",
    runs=default, measure=difficulty,
)  # fmt: skip


def slope(evaluation: dict) -> tuple[float, float]:
    """Tokens for each operation more, by least squares over the levels, and its standard error."""
    levels = sorted(evaluation["by_level"], key=int)
    x = np.array([int(level) for level in levels], dtype=float)
    y = np.array([evaluation["by_level"][level]["tokens"] for level in levels])
    centred = x - x.mean()
    rise = float(centred @ y / (centred @ centred))
    left = y - y.mean() - rise * centred
    return rise, float(np.sqrt(left @ left / max(1, len(x) - 2) / (centred @ centred)))


def test_time(outs: Outs) -> Measured:
    found = result(outs["zero"])
    (base, base_error), (zero, zero_error) = slope(found["base"]), slope(found["zero"])
    figures = {"tokens for each operation more": zero, "base": base}
    noise = 3 * together(zero_error, base_error)
    effects = [Effect("longer where harder", zero, 3 * zero_error),
               Effect("more so than the base", zero - base, noise)]  # fmt: skip
    lines = {}
    for name, title in (("base", "base"), ("zero", "after RL")):
        levels = sorted(found[name]["by_level"], key=int)
        tokens = [found[name]["by_level"][level]["tokens"] for level in levels]
        lines[title] = ([int(level) for level in levels], tokens)
    return Measured(figures, effects, {"tokens by number of operations": lines})


TEST_TIME = Claim(
    name="test-time", states="Length adapts to difficulty at test time",
    paper="fewer tokens for easy problems, more for hard ones",
    rule="tokens rise with the number of operations, and more so than the base's, each by 3"
    " standard errors of the slope over levels",
    note="How long a full solution is, is given by the task; that it is written out is RL's doing.",
    runs=default, measure=test_time,
)  # fmt: skip


def sampled_often(lab: Lab, seed: int) -> dict[str, Job]:
    zero = lab.zero(seed).out
    models = dict(base=lab.bases(seed), trained=zero / "model")
    return {"voting": lab.program("sampling", "voting", seed, seconds=90, models=models)}


def voting(outs: Outs) -> Measured:
    found = result(outs["voting"])
    k, after = max(found["k"]), found["trained"]
    figures = {"pass@1 after RL": after["pass@1"], f"cons@{k}": after["cons"][-1],
               f"pass@{k}": after["pass"][-1], "base pass@1": found["base"]["pass@1"],
               f"base cons@{k}": found["base"]["cons"][-1]}  # fmt: skip
    effects = [Effect(f"cons@{k} above pass@1", after["gain"], after["noise"])]
    curves = {}
    for name, title in (("base", "base"), ("trained", "after RL")):
        ks = [str(k) for k in found["k"]]  # as far apart as the powers of 2 that they are
        lines = {f"{key}@k": (ks, found[name][key]) for key in ("cons", "pass")}
        curves[f"{title}, by k"] = lines
    return Measured(figures, effects, curves)


VOTING = Claim(
    name="voting", states="A majority vote is better than one output",
    paper="AIME 2024: pass@1 77.9 %, cons@64 86.7 %",
    rule="after RL, cons@64 is above pass@1 by more than the 95 % interval of their difference over"
    " problems",
    runs=sampled_often, measure=voting,
)  # fmt: skip


def many_checkpoints(lab: Lab, seed: int) -> dict[str, Job]:
    return {"checkpoints": lab.program("checkpoints", "greedy", seed, seconds=220)}


def jumps(values: list[float]) -> float:
    """How much neighbours differ beyond the trend: the spread of second differences."""
    return stdev(np.diff(values, 2).tolist()) / 6**0.5  # as large as the spread around a line


def greedy(outs: Outs) -> Measured:
    rows = result(outs["checkpoints"])["checkpoints"]
    spreads = [jumps([row[key] for row in rows]) for key in ("greedy", "sampled")]
    ratio = (spreads[0] + 1e-4) / (spreads[1] + 1e-4)  # of 1 where neither moves
    figures = {"spread of greedy accuracy": spreads[0], "of sampled": spreads[1]}
    effects = [Effect("log2 of the ratio of spreads", float(np.log2(ratio)), 1.0)]
    steps = [row["step"] for row in rows]
    lines = {key: (steps, [row[key] for row in rows]) for key in ("greedy", "sampled")}
    return Measured(figures, effects, {"held-out accuracy by update": lines})


GREEDY = Claim(
    name="greedy", states="Greedy evaluation is unreliable: neighbouring checkpoints differ more",
    paper="greedy decoding given up for its variance between checkpoints; T = 0.6, top-p 0.95",
    rule="between checkpoints of updates 20 to 100, four apart, greedy accuracy jumps more than"
    " twice as much around its trend as accuracy sampled at T = 0.6",
    note="Two seeds jump tenfold, by one early leap each (.18 to .91, .34 to .98) in which greedy"
    " learns at once what sampling learns slowly; without the first four checkpoints greedy is the"
    " steadier one on all seeds, though it has one answer a problem and sampling eight.",
    runs=many_checkpoints, measure=greedy,
)  # fmt: skip

CLAIMS = [ACCURACY, LENGTH, REFLECTION, DIFFICULTY, TEST_TIME, VOTING, GREEDY]
