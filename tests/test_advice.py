"""What a run says of itself: once, when it is so, and not when it isn't."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from runtime import launch
from runtime.advice import BY_CHANCE, SILENT, WINDOW, Advice
from runtime.flags import Machine

RESULTS = Path(__file__).parent.parent / "bench" / "results"
STATS = dict(loss=0.5, kl=0.001, grad_norm=0.3, clip_fraction=0.0)
FINE = dict(reward=0.6, accuracy=0.4, groups_without_signal=0.3, truncated=0.0, unparsed=0.1,
            tokens=30.0, by_level={"2": 0.4})  # fmt: skip


def hear(rollouts, stats: dict = STATS) -> list[str]:
    heard = []
    advice = Advice(steps=1000, say=heard.append)
    for i, sampled in enumerate(rollouts):
        advice.update(2 * i + 1, stats, sampled, beta=0.001)
        advice.update(2 * i + 2, stats, {}, beta=0.001)  # the second update of a rollout
    return [line for line in heard if not line.startswith("an update takes")]


def course(count: int, begin: float, end: float, noise: float = 0.02, **figures) -> list[dict]:
    """Rollouts whose mean reward goes from begin to end."""
    dice = random.Random(0)
    rewards = [begin + (end - begin) * i / count + dice.gauss(0, noise) for i in range(count)]
    return [FINE | dict(reward=reward) | figures for reward in rewards]


def test_a_run_that_goes_well_hears_of_its_time_alone():
    assert hear(course(4 * WINDOW, 0.3, 0.8)) == []


def test_a_loss_of_zero_is_explained_once_with_its_figures():
    (line,) = hear([FINE] * 3, STATS | dict(loss=1.2e-6))
    assert "the loss is 1.2e-06" in line and "0.001 x 1.0e-03" in line and "0.600" in line


def test_a_loss_of_zero_that_teaches_nothing_is_told_apart_and_keeps_the_other_for_later():
    heard = []
    advice = Advice(steps=1000, say=heard.append)
    stats = STATS | dict(loss=0.0, kl=0.0)
    silent = FINE | dict(groups_without_signal=1.0, accuracy=1.0)
    advice.update(1, stats | dict(grad_norm=4.6e-14), silent, beta=0.001)
    (line,) = heard
    assert "because all outputs of every question of this rollout earned the same" in line
    assert "without signal 100%, grad_norm 4.6e-14, reward 0.600, 100% right" in line
    # A rollout with a signal, but none in the questions of its first update.
    advice.update(2, stats | dict(grad_norm=1e-9), FINE, beta=0.001)
    assert heard == [line]
    advice.update(3, stats, FINE, beta=0.001)
    assert len(heard) == 2 and "It teaches all the same (grad_norm 0.3)" in heard[1]


def replayed(file: Path) -> dict[str, list[str]]:
    """By phase, what a committed run would have said."""
    advice, heard = {}, {}
    for row in map(json.loads, file.read_text().splitlines()):
        if "clip_fraction" in row:
            said = heard.setdefault(row["phase"], [])
            teller = advice.setdefault(row["phase"], Advice(10**6, say=said.append))
            sampled = row if "groups_without_signal" in row else {}
            teller.update(row["step"], row, sampled, beta=0.001)
    return heard


RUNS = sorted(RESULTS.glob("*/*/metrics.jsonl"))


@pytest.mark.parametrize("file", RUNS, ids=lambda file: "-".join(file.parts[-3:-1]))
def test_what_committed_runs_would_have_said_is_true(file):
    phases = replayed(file)
    assert phases
    for phase, said in phases.items():
        loss = [line for line in said if line.startswith("the loss")]
        taught = "It teaches all the same"
        if phase == "r1":  # nearly all is solved by then: first nothing to learn, then a little
            assert ["because all outputs" in line for line in loss] == [True, False]
            assert taught in loss[1] and "100% right" in loss[0]
        else:
            assert taught in loss[0]
        for line in loss:  # a gradient is said to teach where there is one
            norm = float(line.split("grad_norm ")[1].split(")")[0].split(",")[0])
            assert (norm > 0.01) == (taught in line), line
        alarms = [line for line in said if line not in loss and "an update takes" not in line]
        if file.parent.name == "control-random":  # the one whose reward stays where it was
            (line,) = alarms
            assert "the reward does not rise: 0.500 over the first 20" in line
            assert "(in 99% of the groups)" in line and "does the reward tell good from bad" in line
        else:
            assert alarms == []


@pytest.mark.parametrize(
    "figures, reason",
    [
        (dict(truncated=0.8, accuracy=0.0, unparsed=0.9), "80% were cut off after 30 tokens"),
        (dict(unparsed=0.95, accuracy=0.0), "In 95% no answer could be read"),
        (dict(accuracy=0.0), "0.0% are right: RL reinforces"),
        (dict(accuracy=0.5), "The mean reward is 0.600 and 50% are right"),
        (dict(accuracy=None), "The mean reward is 0.600: take"),  # no rule can tell
    ],
)
def test_a_reward_without_signal_is_explained_early_by_what_is_so(figures, reason):
    flat = FINE | dict(groups_without_signal=0.95) | figures
    assert hear([flat] * SILENT) == []  # one rollout may be unlucky
    (line,) = hear([flat] * 3 * SILENT)
    assert "In 95% of the groups" in line and reason in line


def test_where_all_is_solved_or_the_reward_has_risen_there_is_no_alarm():
    silent = dict(groups_without_signal=0.97)
    assert hear([FINE | silent | dict(accuracy=0.99)] * 3 * WINDOW) == []
    assert hear(course(10, 0.5, 0.9) + course(3 * WINDOW, 1.0, 1.0, 0.001, **silent)) == []


@pytest.mark.parametrize(
    "figures, stats, reason",
    [
        (dict(groups_without_signal=0.88, accuracy=0.02), {}, "In 88% of the groups all outputs"),
        (dict(groups_without_signal=0.88, accuracy=0.02), {}, "2.0% are right: RL reinforces"),
        (dict(unparsed=0.6), {}, "In 60% no answer could be read"),
        (dict(truncated=0.7), {}, "70% were cut off after 30 tokens"),
        ({}, dict(clip_fraction=0.4), "holds back up to 40% of the tokens: a lower"),
        ({}, dict(kl=3.5), "up to 3.5 per token: the policy has left"),
        ({}, dict(kl=2e-6), "2.0e-06 per token at most: the policy has hardly moved"),
        ({}, dict(kl=0.0), "(in 70% of the groups), and the policy moves"),
    ],
)
def test_a_flat_reward_is_measured_against_its_noise_and_explained(figures, stats, reason):
    level = 0.02 if figures.get("accuracy") == 0.02 else 0.6
    flat = course(400, level, level, **figures)
    assert hear(flat[: 2 * WINDOW], STATS | stats) == []
    (line,) = hear(flat, STATS | stats)
    means = [sum(row["reward"] for row in part) / WINDOW
             for part in (flat[:WINDOW], flat[WINDOW : 2 * WINDOW])]  # fmt: skip
    if abs(means[1] - means[0]) < 0.01:  # else a later look found it
        assert f"{means[0]:.3f} over the first 20" in line and f"{means[1]:.3f} over" in line
    assert line.startswith("the reward does not rise") and reason in line
    chance = float(line.split("chance alone moves it by up to ")[1].split(". ")[0])
    assert chance == pytest.approx(BY_CHANCE * 0.02 * math.sqrt(2 / WINDOW), rel=0.4)


def test_a_reward_that_falls_is_told_and_one_that_rises_slowly_is_not():
    assert "does not rise: 0.8" in hear(course(3 * WINDOW, 0.9, 0.3))[0]
    assert hear(course(20 * WINDOW, 0.3, 0.9, noise=0.005)) == []
    # A steady rise is no noise, even where it is all that there is.
    assert hear(course(3 * WINDOW, 0.0, 0.5, noise=0.0)) == []


@pytest.mark.parametrize("m", [1, 2, 16])
@pytest.mark.parametrize("done", [0, 480])
def test_the_time_counts_whole_rollouts_and_from_a_resume(monkeypatch, m, done):
    now = [100.0]
    monkeypatch.setattr("runtime.advice.time.monotonic", lambda: now[0])
    heard, steps, expected = [], 960, None
    advice = Advice(steps=steps, done=done, say=heard.append)
    for update in range(done, steps):
        if update % m == 0:
            now[0] += 60.0 if update > done else 500.0  # to sample; the first also compiles
        now[0] += 4.0
        sampled = FINE | dict(reward=update / 960) if update % m == 0 else {}
        advice.update(update + 1, STATS, sampled, beta=0.0)
        if heard and expected is None:
            expected, told = (update + 1), now[0]
    (line,) = heard
    each, left = 4.0 + 60.0 / m, (now[0] - told) / 60
    assert line.startswith(f"an update takes {each:.2g} s so far, with its share of the rollout:")
    said = line.split(f" {steps - expected} more take ")[1].split(", without the evaluation")[0]
    minutes = float(said.split()[0]) * (60 if said.endswith("h") else 1)
    assert minutes == pytest.approx(left, rel=0.02) and expected - done <= 2 * m + 5


def test_at_the_end_no_time_is_told():
    heard = []
    advice = Advice(steps=5, say=heard.append)
    for update in range(5):
        advice.update(update + 1, STATS, FINE, beta=0.0)
    assert not [line for line in heard if line.startswith("an update takes")]


NAMED = ["--micro-tokens (now 4096)", "--slots (now 256)", "--recompute", "--dry-run shows"]


@dataclass(frozen=True)
class Config(Machine):
    dry_run: bool = False
    model: str | None = None


@pytest.mark.parametrize(
    "error, asked",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
         "tried to allocate 20.00 GiB"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't"
                      " allocate memory: you tried to allocate 400 bytes. Error code 12"),
         "tried to allocate 400 bytes"),
        (MemoryError(), "none was left"),
    ],
)  # fmt: skip
def test_out_of_memory_names_the_flags_that_need_less(error, asked):
    code, line = launch._explain(error, Config(), ())
    assert code == 1 and line.startswith("out of memory") and asked in line
    assert all(name in line for name in NAMED) and "--offload" in line
    assert "--optimizer" not in line  # the toy's own base is trained in float32
    assert "on several GPUs, under torchrun, --ep N" in line


def test_out_of_memory_names_no_flag_that_is_in_use():
    line = launch._explain(MemoryError(), Config(model="DIR"), ())[1]
    assert "--dtype bfloat16 --optimizer rounding" in line
    line = launch._explain(MemoryError(), Config(dtype="bfloat16", offload=True), ())[1]
    assert "--optimizer rounding" in line and "--offload" not in line and "--ep" not in line
    config = Config(dtype="bfloat16", optimizer="rounding", ep=2, recompute=True)
    line = launch._explain(MemoryError(), config, ())[1]
    unused = ("--optimizer", "--recompute", "--ep")
    assert not any(name in line for name in unused) and "--slots" in line


def test_torch_says_so_on_the_cpu_when_there_is_no_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert launch._explain(caught.value, Config(), ())[0] == 1
