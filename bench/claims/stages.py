"""What is more than one run of RL: stages, distillation, base sizes, a learned reward, and rollouts
drawn by others.

`stages`, `language` and `distillation` read what bench.r1 has made, `asynchronous` what
bench.asynchronous has: in runs/, or, where that has none, the committed results. These were known
before the rules were written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean as mean

from bench.claims.claim import (
    SAME_PASS, Claim, Effect, Measured, change, curve, half, passes_more, result, rollouts,
    share_noise, together,
)  # fmt: skip
from bench.claims.jobs import Job, Lab

Outs = Mapping[str, Path]
R1 = "python -m bench.r1 makes them, in 22 minutes a seed and more"
STAGES = ("zero", "dev1", "dev2", "dev3", "r1")
# Of the 600 general requests, those that a measure concerns: orders to write, what can be helped
# with, what harms (tests/test_claims.py counts them).
CONCERNS = {"instruction": 134, "helpful": 468, "safe": 132}


def of_r1(lab: Lab, seed: int) -> dict[str, Job]:
    return {"r1": lab.made(f"r1-{seed}", f"r1/r1-{seed}", R1)}


def more(found: dict, key: str, better: str, worse: str) -> Effect:
    """A measure of two stages."""
    high, low = found[better], found[worse]
    name = f"{key}, {better} above {worse}"
    if key == "pass@1":
        return Effect(name, high[key] - low[key], together(half(high), half(low)))
    n = CONCERNS.get(key, high["problems"])
    noise = together(share_noise(high[key], n), share_noise(low[key], n))
    return Effect(name, high[key] - low[key], noise)


def stages(outs: Outs) -> Measured:
    found = result(outs["r1"])
    figures = {f"pass@1 {stage}": found[stage]["pass@1"] for stage in STAGES}
    figures |= {f"helpful {stage}": found[stage]["helpful"] for stage in ("zero", "dev3", "r1")}
    near = more(found, "pass@1", "r1", "zero")
    effects = [
        more(found, "pass@1", "zero", "dev1"),
        more(found, "language", "dev1", "zero"),
        more(found, "pass@1", "dev2", "dev1"),
        Effect("pass@1 of r1 within 3 points of zero or above", near.value + 0.03, near.noise),
        *(more(found, key, "dev3", "zero") for key in ("instruction", "helpful")),
        *(more(found, key, "r1", "dev3") for key in ("instruction", "helpful")),
    ]
    order = [stage.capitalize() for stage in STAGES]
    lines = {key: (order, [found[stage][key] for stage in STAGES])
             for key in ("pass@1", "language", "instruction", "helpful", "safe")}  # fmt: skip
    return Measured(figures, effects, {"by stage": lines})


TABLE = Claim(
    name="stages", states="The table of stages",
    paper="AIME 77.9, 59.0, 74.0, 78.1, 79.8 %; IF-Eval 46.6 to 83.3, AlpacaEval 24.7 to 87.6",
    rule="Dev1 less accurate and more in one language than Zero, Dev2 more accurate than Dev1, R1"
    " as accurate as Zero within 3 points, Dev3 above Zero and R1 above Dev3 in following"
    " instructions and in helpfulness, each beyond 95 % intervals",
    note="All but two: R1 follows instructions no better than Dev3 (its reward model likes courtesy"
    " better than a list of the right length), and seed 2's Dev1 keeps to one language within noise"
    " of Zero.",
    runs=of_r1, measure=stages,
)  # fmt: skip


def with_and_without(lab: Lab, seed: int) -> dict[str, Job]:
    name = f"r1-mixed-{seed}"
    return {**of_r1(lab, seed), "mixed": lab.made(name, f"r1/{name}", R1)}


def language(outs: Outs) -> Measured:
    on, off = (result(outs[name]) for name in ("r1", "mixed"))
    found = {"with": on["dev2"], "without": off["dev2"]}
    figures = {name: each["language"] for name, each in found.items()}
    figures |= {f"pass@1 {name}": each["pass@1"] for name, each in found.items()}
    order = [stage.capitalize() for stage in STAGES[:3]]
    lines = {
        name: (order, [each[stage]["language"] for stage in STAGES[:3]])
        for name, each in (("with the reward", on), ("without", off))
    }
    return Measured(
        figures, [more(found, "language", "with", "without")], {"consistency by stage": lines}
    )


LANGUAGE = Claim(
    name="language", states="The language reward keeps the reasoning in one language",
    paper="consistency holds with it and decays without; mathematics equal, code slightly lower",
    rule="after Dev2's RL, language consistency is higher with the reward, beyond 95 % intervals",
    note="Without it two seeds fall to .48; the third, whose cold start had reached .97, stays"
    " there.",
    runs=with_and_without, measure=language,
)  # fmt: skip


def students(lab: Lab, seed: int) -> dict[str, Job]:
    name = f"distill-{seed}"
    return {"distill": lab.made(name, f"r1/{name}", R1)}


def distillation(outs: Outs) -> Measured:
    found = result(outs["distill"])
    figures = {name: found[key]["pass@1"] for name, key in
               (("distilled", "distilled"), ("by RL", "rl"), ("base", "base"))}  # fmt: skip
    saved = json.loads((outs["distill"] / "curves.json").read_text())["curves"]
    lines = {name: ([point["seconds"] for point in saved[key]],
                    [point["pass@1"] for point in saved[key]])
             for name, key in (("distilled", "distilled"), ("by RL", "rl"))}  # fmt: skip
    effects = [passes_more("distilled above RL", found["distilled"], found["rl"])]
    return Measured(figures, effects, {"pass@1 by CPU-seconds": lines})


DISTILLATION = Claim(
    name="distillation", states="Distilling a small model beats RL on it",
    paper="Qwen2.5-32B on AIME: 72.6 % distilled, 47.0 % by RL",
    rule="at the same cost pass@1 of the distilled student is higher, beyond what two equal runs"
    " differ by",
    note="At the same cost, of 19 to 25 CPU-seconds. Given more, RL gets there too (.96 after 54 s"
    " on a tuning seed); the paper's, with over 10,000 updates, does not.",
    runs=students, measure=distillation,
)  # fmt: skip


def both_ways(lab: Lab, seed: int) -> dict[str, Job]:
    bench = "python -m bench.asynchronous makes them, in 10 minutes a seed"
    return {kind: lab.made(f"{kind}-{seed}", f"asynchronous/{kind}-{seed}", bench)
            for kind in ("sync", "async")}  # fmt: skip


def asynchronous(outs: Outs) -> Measured:
    sync, other = (result(outs[kind])["zero"] for kind in ("sync", "async"))
    figures = {"synchronous pass@1": sync["pass@1"], "asynchronous": other["pass@1"]}
    margin = other["pass@1"] - sync["pass@1"] + SAME_PASS
    curves = {kind: curve(rollouts(out), "accuracy") for kind, out in outs.items()}
    return Measured(figures, [Effect("asynchronous no worse, within what equal runs differ by",
                                     margin, 0.0)], {"accuracy by update": curves})  # fmt: skip


ASYNCHRONOUS = Claim(
    name="asynchronous", states="Asynchronous rollouts learn as well as synchronous ones",
    paper="not R1's: its rollouts are up to 15 updates old within one, and none is drawn ahead",
    rule="pass@1 of the asynchronous run is not lower by more than two equal runs differ by (.025)",
    runs=both_ways, measure=asynchronous,
)  # fmt: skip


def base_sizes(lab: Lab, seed: int) -> dict[str, Job]:
    arms = {
        size: lab.program("sizes", f"size-{size}", seed, "--size", size, "--eval-samples", "8",
                          seconds=seconds, models={})
        for size, seconds in (("tiny", 170), ("small", 265))
    }  # fmt: skip
    return {**arms, "toy": lab.zero(seed)}


def size(outs: Outs) -> Measured:
    found = {name: result(out) for name, out in outs.items()}
    gains = {name: each["zero"]["pass@1"] - each["base"]["pass@1"] for name, each in found.items()}
    noises = {name: together(half(each["zero"]), half(each["base"]))
              for name, each in found.items()}  # fmt: skip
    figures = {f"gain, {name}": value for name, value in gains.items()}
    noise = max(together(noises["toy"], noises["tiny"]), SAME_PASS)
    effects = [Effect("gain of the largest above the smallest's",
                      gains["toy"] - gains["tiny"], noise)]  # fmt: skip
    curves = {name: curve(rollouts(out), "accuracy") for name, out in outs.items()}
    return Measured(figures, effects, {"accuracy by update": curves})


SIZE = Claim(
    name="size", states="The same RL gains more on a larger base",
    paper="7B dense and 16B MoE bases gained little; 32B, 230B and 671B ones a lot",
    rule="the gain in pass@1 of the toy (0.41M parameters) is above that of the smallest base,"
    " beyond noise",
    note="All bases read the same corpus, for as many updates. It is size by way of competence: the"
    " smallest gets 5 to 33 % of single steps right, the other two all.",
    runs=base_sizes, measure=size,
)  # fmt: skip


def annotators(lab: Lab, seed: int) -> dict[str, Job]:
    # A policy that is paid for length writes until it is cut off, which takes time.
    arms = {"careless half of the time": ("0.5", 230), "careful": ("0.0", 170)}
    models = {"model": lab.zero(seed).out / "model", "base": lab.bases(seed)}
    flags = ("--steps", "80", "--eval-samples", "8", "--careless")
    return {
        name: lab.program("hacking", f"hacking-{share}", seed, *flags, share, seconds=seconds,
                          models=models)
        for name, (share, seconds) in arms.items()
    }  # fmt: skip


LEAST_FALL = 0.1  # the best of many rollouts is above the last ones by chance, too


def hacking(outs: Outs) -> Measured:
    rows = rollouts(outs["careless half of the time"])
    score, truth = ([row[key] for row in rows] for key in ("reward", "accuracy"))
    peak = max((truth[i : i + 5] for i in range(max(1, len(truth) - 4))), key=mean)
    fall = change("accuracy falls from its best", truth[-5:], peak)
    effects = [change("the reward model's score rises", score[:5], score[-5:]),
               Effect(fall.name, fall.value, max(fall.noise, LEAST_FALL))]  # fmt: skip
    careful = [row["accuracy"] for row in rollouts(outs["careful"])]
    figures = {"score at the end": mean(score[-5:]), "accuracy at best": mean(peak),
               "accuracy at the end": mean(truth[-5:]),
               "of a careful reward model, at the end": mean(careful[-5:])}  # fmt: skip
    curves = {}
    for name, out in outs.items():
        lines = rollouts(out)
        curves[f"annotators {name}"] = {"score of the reward model": curve(lines, "reward"),
                                        "accuracy": curve(lines, "accuracy")}  # fmt: skip
    return Measured(figures, effects, curves)


HACKING = Claim(
    name="hacking", states="A learned reward is hacked: its score rises while the true one falls",
    paper="with a helpful reward model the reward rises and Codeforces falls",
    rule="R1-Zero, trained on under a reward model half of whose annotators prefer the longer"
    " answer, has a higher score in its last five rollouts than in its first, and a lower accuracy"
    " than in its best five, each by 3 standard errors, accuracy by 10 points",
    note="Accuracy does fall, from .97 to between .43 and .79, but the score, near its top from the"
    " start, rises by less than noise; and under careful annotators it falls as well. A group's std"
    " scales up what is left of differences, and that is the reward model's errors. Four in five"
    " pairs are careless ones, as careful annotators can't tell two wrong answers apart.",
    runs=annotators, measure=hacking,
)  # fmt: skip

CLAIMS = [HACKING, LANGUAGE, TABLE, DISTILLATION, SIZE, ASYNCHRONOUS]
