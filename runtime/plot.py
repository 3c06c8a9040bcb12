"""curve.png: accuracy and length over RL, as in the paper's first figure. It is no part of the
method. Needs matplotlib: pip install nanor1[plots]"""

import json
from pathlib import Path


def draw_curve(out: Path) -> None:
    """Draw out/curve.png from out/metrics.jsonl and out/result.json, or say what is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no curve.png: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rl = [line for line in lines if line["phase"] == "rl" and "accuracy" in line]
    result = json.loads((out / "result.json").read_text())
    steps = [line["step"] for line in rl]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axes, key, title in (
        (left, "accuracy", "accuracy, sampled"),
        (right, "tokens", "tokens of an output"),
    ):
        axes.plot(steps, [line[key] for line in rl], color="C0", label="training questions")
        held_out = "pass@1" if key == "accuracy" else key
        ends = [result["base"][held_out], result["zero"][held_out]]
        axes.plot([0, steps[-1]], ends, "o", color="C1", label="held-out questions")
        axes.set(title=title, xlabel="update", ylim=(0, None))
        axes.legend()
    left.set(ylim=(0, 1))
    levels = list(result["zero"]["by_level"])
    for i, level in enumerate(levels):
        known = [
            (line["step"], line["by_level"][level]) for line in rl if level in line["by_level"]
        ]
        color = pyplot.cm.viridis(i / max(1, len(levels) - 1))
        middle.plot(*zip(*smooth(known)), color=color, label=level)
    middle.set(title="accuracy by level", xlabel="update", ylim=(0, 1))
    middle.legend(fontsize="small", ncols=2)
    figure.savefig(out / "curve.png", dpi=120)
    pyplot.close(figure)


def smooth(points: list[tuple[int, float]], window: int = 7) -> list[tuple[int, float]]:
    """A running mean: a rollout has few questions of one level."""
    means = []
    for i, (step, _) in enumerate(points):
        around = [value for _, value in points[max(0, i - window // 2) : i + window // 2 + 1]]
        means.append((step, sum(around) / len(around)))
    return means


def draw_distillation(out: Path) -> None:
    """Draw out/distill.png from out/curves.json: what a student could do after how many seconds."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no distill.png: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    saved = json.loads((out / "curves.json").read_text())
    lines = (
        ("distilled", saved["spent"]["samples"], "C0-", "distilled"),
        ("distilled", 0.0, "C0--", "the same, where the samples were there"),
        ("rl", 0.0, "C1-", "RL"),
    )
    figure, axes = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
    for name, before, style, label in lines:
        if points := saved["curves"][name]:
            seconds = [before + point["seconds"] for point in points]
            axes.plot(seconds, [point["pass@1"] for point in points], style, label=label)
    axes.set(xlabel="CPU-seconds", ylabel="pass@1, held-out questions", ylim=(0, 1))
    axes.legend()
    figure.savefig(out / "distill.png", dpi=120)
    pyplot.close(figure)
