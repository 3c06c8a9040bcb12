"""What a claim of the paper is here, and the rule by which it counts as shown.

A claim names its runs, and measures of each seed some figures to print, curves to draw, and
effects: numbers that are positive where the paper is right, each with what it may be by chance.

    shown           every effect is above its noise, on every seed
    contradicted    one and the same effect is below minus its noise, on every seed
    not shown       anything else

The rule is the same for all claims; what an effect is, and its noise, is written down beside each
of them in growth.py, objective.py, credit.py and stages.py. It was written before the runs that a
claim needs were made, where these were not published already (README's tables), and is not changed
after them. One effect was made stricter when the results were known ("R1 within 3 points of Zero",
of the stages, counts the evaluation's noise now, as its rule says); its verdict is the same.

Noise is the larger one of two:
- what the evaluation leaves open: 95 % intervals over problems, those of a share from above, as if
  all of a problem's outputs were alike; 3 standard errors over rollouts or outputs;
- where the ends or the means of two arms are compared, what two runs of the same flags and seed
  may differ by. RL is chaotic: another machine rounds otherwise and takes another course. Measured
  on three pairs that were at hand (bench/results/zero/seed-S, bench/results/asynchronous/sync-S):
  pass@1 .000, .009 and .023, mean accuracy over the run .035, .007 and .011 (over its first 120
  updates .048, .014 and .013), tokens .3, .0 and .0.

These pairs have bases of their own, where the arms of a claim share one, on one machine. So the
second kind is rather too large: a difference is too hard to show, and "no worse" too easy. What
cap, bias (of lengths) and hacking compare has noise of the first kind alone.
"""

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

from bench.claims.jobs import Job, Lab

# Between two runs of the same flags and seed.
SAME_PASS, SAME_MEAN, SAME_TOKENS = 0.025, 0.04, 0.5
VERDICTS = ("shown", "not shown at this scale", "contradicted")
ROW = ("name", "claim", "paper", "ours", "figures", "verdict", "reason", "rule", "note", "seeds",
       "command", "commit", "machine", "versions", "date", "runs")  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """Positive where the paper is right; `noise` is what it may be by chance."""

    name: str
    value: float
    noise: float


@dataclass(frozen=True)
class Measured:
    """What one seed gave. Curves: title of a panel -> name of a line -> (x, y); x may be words."""

    figures: dict[str, float]
    effects: list[Effect]
    curves: dict[str, dict[str, tuple[list, list[float]]]] = field(default_factory=dict)

    @staticmethod
    def read(saved: dict) -> "Measured":
        return Measured(**{**saved, "effects": [Effect(**each) for each in saved["effects"]]})


@dataclass(frozen=True)
class Claim:
    name: str
    states: str  # in one line
    paper: str  # its figure
    rule: str  # what has to be above noise on all seeds
    runs: Callable[[Lab, int], dict[str, Job]]  # by arm, those of a seed
    measure: Callable[[Mapping[str, Path]], Measured]  # of a seed, from the directories of its runs
    note: str = ""  # what a reader of the verdict has to know; may be added after the runs


def decide(seeds: Sequence[Sequence[Effect]]) -> tuple[str, str]:
    """The verdict, and what it is based on."""
    holds, opposed, said = True, False, []
    for part in zip(*seeds, strict=True):
        above = all(effect.value > effect.noise for effect in part)
        below = all(effect.value < -effect.noise for effect in part)
        holds, opposed = holds and above, opposed or below
        how = "yes" if above else "the opposite" if below else "not beyond noise on all seeds"
        values = ", ".join(f"{effect.value:+.3g} ± {effect.noise:.2g}" for effect in part)
        said.append(f"{part[0].name}: {how} ({values})")
    verdict = VERDICTS[0] if holds and said else VERDICTS[2] if opposed else VERDICTS[1]
    return verdict, "; ".join(said)


def spread(values: Sequence[float]) -> str:
    """The mean, and from where to where."""
    digits = 3 if max(map(abs, values)) < 10 else 1
    low, middle, high = (f"{each:.{digits}f}" for each in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


# ---- what measures are made of -------------------------------------------------------------


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def rollouts(out: Path) -> list[dict]:
    """The updates of a run that a rollout precedes, with what describes it."""
    lines = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == "rl" and "accuracy" in line]


def curve(rows: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    return [row["step"] for row in rows], [round(row[key], 4) for row in rows]


def together(*noises: float) -> float:
    """The noise of a sum or difference of what is independent."""
    return math.hypot(*noises)


def half(evaluation: dict) -> float:
    """Half of the 95 % interval of pass@1."""
    low, high = evaluation["interval"]
    return (high - low) / 2


def share_noise(share: float, problems: int) -> float:
    """95 %, from above: as if all outputs of a problem, or the one there is, were alike."""
    return 1.96 * math.sqrt(max(0.0, share * (1 - share)) / max(1, problems))


def standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def change(name: str, before: Sequence[float], after: Sequence[float]) -> Effect:
    """By how much the mean is larger afterwards."""
    if not before or not after:
        return Effect(name, math.nan, math.inf)
    noise = 3 * together(standard_error(before), standard_error(after))
    return Effect(name, mean(after) - mean(before), noise)


def passes_more(name: str, better: dict, worse: dict) -> Effect:
    """pass@1 of two runs at their ends."""
    noise = max(together(half(better), half(worse)), SAME_PASS)
    return Effect(name, better["pass@1"] - worse["pass@1"], noise)


def learns_more(name: str, better: Sequence[dict], worse: Sequence[dict]) -> Effect:
    """Mean accuracy over all rollouts of two runs, which counts speed as well as the end."""
    gained = [mean(row["accuracy"] for row in rows) for rows in (better, worse)]
    return Effect(name, gained[0] - gained[1], SAME_MEAN)


# ---- what is left of a claim ---------------------------------------------------------------


def draw(measured: Sequence[Measured], file: Path, title: str) -> None:
    """A panel for each kind of curve, a colour for each line, and all seeds in it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no figure.png: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(measured[0].curves)
    size = (4.6 * max(1, len(panels)), 3.4)
    figure, row = pyplot.subplots(1, max(1, len(panels)), figsize=size, squeeze=False)
    for axes, panel in zip(row[0], panels):
        for seed, each in enumerate(measured):
            for i, (name, (x, y)) in enumerate(each.curves.get(panel, {}).items()):
                label = name if seed == 0 else None
                axes.plot(x, y, ".-", ms=3, lw=0.9, color=f"C{i}", alpha=0.75, label=label)
        axes.set_title(panel, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(textwrap.fill(title, 50 * max(1, len(panels))), fontsize="medium")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def keep(claim: Claim, lab: Lab) -> dict:
    """Measure all seeds and write row.json, metrics.json and figure.png; the row."""
    jobs = {seed: claim.runs(lab, seed) for seed in lab.seeds}
    outs = {seed: {arm: job.out for arm, job in each.items()} for seed, each in jobs.items()}
    measured = [claim.measure(outs[seed]) for seed in lab.seeds]
    verdict, reason = decide([each.effects for each in measured])
    figures = {name: [each.figures[name] for each in measured] for name in measured[0].figures}
    ours = "; ".join(f"{name} {spread(values)}" for name, values in figures.items())
    runs = {job.name: dict(command=job.made_by(), **job.made_where())
            for each in jobs.values() for job in each.values()}  # fmt: skip
    about = {key: ", ".join(dict.fromkeys(run[key] for run in runs.values()))
             for key in ("commit", "machine", "versions", "date")}  # fmt: skip
    row = dict(
        name=claim.name, claim=claim.states, paper=claim.paper, ours=ours, figures=figures,
        verdict=verdict, reason=reason, rule=claim.rule, note=claim.note, seeds=list(lab.seeds),
        command=f"python -m bench.claims {claim.name}", runs=runs, **about,
    )  # fmt: skip
    place = lab.results / claim.name
    place.mkdir(parents=True, exist_ok=True)
    saved = {str(seed): asdict(each) for seed, each in zip(lab.seeds, measured)}
    (place / "metrics.json").write_text(json.dumps(saved) + "\n")
    draw(measured, place / "figure.png", claim.states)
    (place / "row.json").write_text(json.dumps({key: row[key] for key in ROW}, indent=2) + "\n")
    return row


def table(claims: Sequence[Claim], results: Path) -> str:
    """README's table, from the rows that are there."""
    lines = ["| claim | the paper | here, mean and range of the seeds | verdict |",
             "|---|---|---|---|"]  # fmt: skip
    for claim in claims:
        file = results / claim.name / "row.json"
        if file.exists():
            row = json.loads(file.read_text())
            cells = [f"[{row['claim']}](bench/results/claims/{claim.name})", row["paper"]]
            cells += [row["ours"], f"**{row['verdict']}**" + f". {row['note']}" * bool(row["note"])]
            cells = [cell.replace("|", "\\|") for cell in cells]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
