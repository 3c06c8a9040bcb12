"""bench.kernels needs a GPU for its figures. What it does with one runs here, at toy sizes on the
CPU, through the references."""

import json
import time
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import kernels as bench


class Event:
    """torch.cuda.Event, of the CPU."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA GPU that is the CPU, with toy sizes, a clock, and nobody's memory."""
    monkeypatch.setattr(bench, "GPU", "cpu")
    monkeypatch.setattr(bench, "Place", partial(bench.Place, toy=True))
    monkeypatch.setattr(bench, "about_gpu", lambda: dict(gpu="none", torch=torch.__version__))
    pretended = dict(
        Event=Event, is_available=lambda: True, synchronize=lambda: None,
        empty_cache=lambda: None, mem_get_info=lambda: (10**12, 10**12),
        memory_allocated=lambda: 10**9, max_memory_allocated=lambda: 3 * 10**9,
        reset_peak_memory_stats=lambda: None,
    )  # fmt: skip
    for name, function in pretended.items():
        monkeypatch.setattr(torch.cuda, name, function)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_each_case_agrees_with_its_baseline_in_a_dry_run(capsys):
    rows = bench.main(["--dry"])
    assert {row["kernel"].split()[0] for row in rows} >= {
        "attention", "MLA", "GQA", "grouped_linear", "grouped_swiglu", "linear_logprob,",
        "rms_norm", "swiglu", "dequant_fp8", "quant_fp8",
    }  # fmt: skip
    for row in rows:
        if row["baseline"] == "SDPA, cuDNN":
            assert row["why"].startswith("RuntimeError: No "), row  # on a CPU
        else:
            assert row["error"] <= bench.TOLERANCE, row
        assert not {"ours_ms", "rate"} & set(row), "a dry run has no figures"
    assert "not measured: a dry run" in capsys.readouterr().out


def test_without_a_gpu_the_table_says_so(no_gpu, capsys, tmp_path):
    rows = bench.main(["--json", str(tmp_path / "rows.json")])
    out = capsys.readouterr().out
    assert "16384 tokens, 7168 x 129280" in out and "ratio 0.70" in out
    assert out.count("| not measured |") >= len(rows)
    assert "not measured: no CUDA GPU" in out and not list(tmp_path.iterdir())
    assert not any({"ours_ms", "error"} & row.keys() for row in rows)


def test_with_a_gpu_each_row_has_its_figures(gpu, capsys, tmp_path):
    bench.main(["--quick", "--json", str(tmp_path / "new" / "rows.json")])
    found = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert found["gpu"] == "none" and found["roof"].keys() == {"TFLOP/s", "GB/s"}
    for row in found["rows"]:
        assert row["ours_ms"] > 0 and row["rate"] > 0 and row["roof"] > 0
        if "why" not in row:
            assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"])
    out = capsys.readouterr().out
    assert "TFLOP/s" in out and "(unchecked) | SDPA, cuDNN | RuntimeError" in out
    assert "| 2.00 / 2.00 |" in out, "the peak of linear_logprob"
    assert "not measured" not in out


def test_a_wrong_kernel_is_not_timed(gpu, capsys, monkeypatch):
    monkeypatch.setattr(bench, "swiglu", lambda gate, up: gate * up)
    monkeypatch.setattr(bench, "rms_norm", lambda x, weight, eps: x * weight * float("nan"))
    with pytest.raises(SystemExit, match="6 rows are wrong or failed"):
        bench.main(["--only", "norm"])
    out = capsys.readouterr().out
    assert out.count("WRONG: error") == 6 and out.count("WRONG: error inf") == 4


def test_what_fails_leaves_its_reason_and_the_others_go_on(gpu, capsys, monkeypatch):
    def broken(*args):
        raise TypeError("ours is broken")

    def too_large(at, N, D):
        raise torch.OutOfMemoryError("20 GB too many")

    monkeypatch.setattr(bench, "dequant_fp8", broken)
    monkeypatch.setattr(bench, "quant_case", too_large)
    with pytest.raises(SystemExit, match="2 rows"):
        bench.main(["--only", "fp8"])
    out = capsys.readouterr().out
    assert "FAILED: TypeError: ours is broken" in out
    assert "| too_large | 16384, 7168 | FAILED: OutOfMemoryError: 20 GB too many" in out


def test_the_unfused_logprob_gets_fewer_tokens_where_memory_is_short(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24e9, 24e9))
    case = bench.logprob_case(bench.Place("meta", toy=False, clock=True), 16384, 7168, 129_280)
    assert case.sizes.startswith("4096 tokens")


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_operations_are_those_that_torch_counts():
    at = bench.Place("cpu", toy=True)
    case = bench.logprob_case(at, 16384, 7168, 129_280)
    assert case.flops == flops_of(case.baselines["log_softmax(linear)"][0]())
    q, k, v = torch.randn(2, 16, 5, 24), torch.randn(2, 16, 5, 24), torch.randn(2, 16, 5, 16)

    def attention_pairs(q, k, v):  # every pair; the masked half is not counted in the table
        scores = torch.einsum("bthk,bshk->bhts", q, k)
        return torch.einsum("bhts,bshu->bthu", scores, v)

    case = bench.attention_case(at, 5, 5, 192, 128, 8192, grad=False)
    assert "2 x 16 tokens" in case.sizes
    assert 2 * case.flops == flops_of(lambda: attention_pairs(q, k, v))
    for gated in (False, True):
        case = bench.experts_case(at, "toy", 64, 8, 2, 64, 64, gated, grad=False)
        x, weight = torch.randn(16 * 2, 16), torch.randn(32, 16)
        assert case.flops == (1 + gated) * flops_of(lambda: x @ weight.T)
        both = bench.experts_case(at, "toy", 64, 8, 2, 64, 64, gated, grad=True)
        assert both.flops == 2 * case.flops


def test_a_nan_is_an_error_wherever_it_is():
    good, bad = torch.ones(3, 2), torch.ones(3, 2)
    bad[1, 1] = float("nan")
    assert bench.error(good, good) == 0
    assert bench.error(bad, good) == bench.error(good, bad) == float("inf")
    assert bench.error((good, good), (good, 2 * good)) == 0.5
