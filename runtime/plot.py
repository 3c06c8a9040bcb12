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
