"""What a run says of itself: once, when it is so, and not when it isn't."""

import pytest
import torch

from runtime import launch
from runtime.advice import FLAT, Advice

STATS = dict(loss=0.5, kl=0.001, grad_norm=0.3)
FINE = dict(reward=0.6, accuracy=0.4, groups_without_signal=0.3, truncated=0.0, unparsed=0.1,
            tokens=30.0, by_level={"2": 0.4})  # fmt: skip


def hear(rollouts: int, sampled: dict, stats: dict = STATS) -> list[str]:
    heard = []
    advice = Advice(steps=1000, say=heard.append)
    for i in range(rollouts):
        advice.update(2 * i + 1, stats, sampled, beta=0.001)
        advice.update(2 * i + 2, stats, {}, beta=0.001)  # the second update of a rollout
    return [line for line in heard if not line.startswith("an update takes")]


def test_a_run_that_goes_well_hears_of_its_time_alone():
    assert hear(3 * FLAT, FINE) == []


def test_a_loss_of_zero_is_explained_once_with_its_figures():
    (line,) = hear(3, FINE, STATS | dict(loss=1.2e-6))
    assert "the loss is 1.2e-06" in line and "0.001 x 1.0e-03" in line and "0.600" in line


@pytest.mark.parametrize(
    "figures, reason",
    [
        (dict(truncated=0.8, accuracy=0.0, unparsed=0.9), "80% were cut off after 30 tokens"),
        (dict(unparsed=0.95, accuracy=0.0), "In 95% no answer could be read"),
        (dict(accuracy=0.0), "0.0% are right: RL reinforces"),
        (dict(accuracy=0.99), "99% are right: take harder"),
        (dict(accuracy=None), "The mean reward is 0.600"),  # no rule can tell
    ],
)
def test_a_flat_reward_is_explained_by_what_is_so(figures, reason):
    flat = FINE | dict(groups_without_signal=0.95) | figures
    assert hear(FLAT - 1, flat) == []  # one rollout may be unlucky
    (line,) = hear(3 * FLAT, flat)
    assert "in 95% of the groups" in line and reason in line


def test_the_time_is_told_once_and_after_a_resume_counts_from_there(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("runtime.advice.time.monotonic", lambda: now[0])
    heard = []
    advice = Advice(steps=1000, done=500, say=heard.append)
    for done in range(501, 520):
        now[0] += 3.0
        advice.update(done, STATS, FINE, beta=0.0)
    assert heard == ["an update takes 3 s so far: 495 more take 25 min"]


class Config:
    micro_tokens, slots, recompute, offload, dry_run = 4096, 256, False, True, False


@pytest.mark.parametrize(
    "error, asked",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
         "tried to allocate 20.00 gib"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't"
                      " allocate memory: you tried to allocate 400 bytes. Error code 12"),
         "tried to allocate 400 bytes"),
        (MemoryError(), "none was left"),
    ],
)  # fmt: skip
def test_out_of_memory_names_the_flags_that_need_less(error, asked):
    code, line = launch._explain(error, Config(), ())
    assert code == 1 and line.startswith("out of memory") and asked in line
    assert "--micro-tokens (now 4096)" in line and "--recompute" in line and "--dry-run" in line
    assert "--offload" not in line  # it is in use already


def test_torch_says_so_on_the_cpu_when_there_is_no_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert launch._explain(caught.value, Config(), ())[0] == 1
