"""The kernels on a GPU beside what torch offers: one table.

    python -m bench.kernels                              everything; some minutes
    python -m bench.kernels --quick --only attention     fewer sizes and repeats
    python -m bench.kernels --json bench/results/kernels.json

First what the GPU gives at best, the roof: a large bf16 matrix product and a copy. Then for each
case the two results are compared, and if they agree timed in turns: CUDA events, caches emptied,
the median. ratio: the baseline's time by ours, above 1 we are faster. roof: the share of the matrix
product's TFLOP/s, or of the copy's GB/s. memory: the peak while it runs, less what was there before
and what it returns. goal: what the kernel should reach, in the column that is named.

Without a CUDA GPU the table says so. --dry runs each case once at toy sizes on the CPU, through the
references, and prints no time: a test that everything here still runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention
from kernels.decode import gqa_decode, mla_decode
from kernels.experts import grouped_linear, grouped_swiglu
from kernels.fp8 import dequant_fp8, quant_fp8, quant_fp8_blocks, quant_fp8_reference
from kernels.logprob import linear_logprob
from kernels.norm import rms_norm, swiglu

GPU = "cuda"  # a test puts the CPU in its place
TOLERANCE = 2e-2  # of the largest number: both results are bf16
grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm

Run = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass
class Case:
    """One kernel at one size. ours and each baseline are functions that get ready, for a backward
    pass by running the forward pass, and return the function that is timed."""

    kernel: str
    sizes: str
    ours: Callable[[], Run]
    baselines: dict[str, tuple[Callable[[], Run], str]]  # name -> (get ready, goal)
    flops: float = 0
    bytes: float = 0  # where no flops are given: what has to be read and written
    memory: bool = False  # whether its peak is of interest


@dataclass
class Place:
    """Where the inputs live: a GPU, the CPU at toy sizes, or nowhere (meta), for a table without
    figures."""

    device: str
    toy: bool = False
    clock: bool = False  # whether there are figures
    quick: bool = False

    def size(self, n: int, toy: int = 16) -> int:
        return min(n, toy) if self.toy else n

    def some(self, *sizes: int) -> tuple[int, ...]:
        return sizes[-1:] if self.quick else sizes

    def normal(self, *shape: int, std: float = 1.0, grad: bool = False) -> Tensor:
        x = torch.randn(shape, device=self.device, dtype=torch.bfloat16) * std
        return x.requires_grad_(grad)

    def free(self) -> float:
        """Bytes of memory."""
        return torch.cuda.mem_get_info()[0] if self.clock else float("inf")


def ready(run: Run) -> Callable[[], Run]:
    """There is nothing to prepare."""
    return lambda: run


def backward(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], dout: Tensor):
    """Get ready to run the backward pass alone."""

    def prepare() -> Run:
        out = forward()
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    return prepare


# ---- the cases -----------------------------------------------------------------------------------
# Sizes: DeepSeek-R1, Moonlight (64 experts), Qwen2.5-7B (28 heads, 4 key heads) and 32B (40, 8).
# A case makes its inputs when it is called, so that only one case's inputs exist at a time.

Cases = Iterator[Callable[[], Case]]


def sdpa(q_BTHK: Tensor, k_BTJK: Tensor, v_BTJU: Tensor, scale: float, cudnn: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTJK, v_BTJU))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)


def attention_case(at: Place, H: int, J: int, K: int, U: int, T: int, grad: bool) -> Case:
    B, T, K, U = at.size(16384 // T, 2), at.size(T), at.size(K, K // 8), at.size(U, U // 8)
    shapes = ((B, T, H, K), (B, T, J, K), (B, T, J, U))
    qkv = tuple(at.normal(*shape, grad=grad) for shape in shapes)
    dout_BTHU, scale = at.normal(B, T, H, U), K**-0.5

    def contender(function: Callable, *args) -> Callable[[], Run]:
        forward = lambda: function(*qkv, scale, *args)  # noqa: E731
        return backward(forward, qkv, dout_BTHU) if grad else ready(forward)

    products = 3 * K + 2 * U if grad else K + U  # each 2 T^2 / 2: half of the pairs are masked
    vs_sdpa = "ratio 1.05" if K == U and not grad else ""
    return Case(
        f"attention {'backward' if grad else 'forward'}",
        f"{B} x {T} tokens, {H}/{J} heads of {K}/{U}",
        contender(attention),
        {
            "SDPA": (contender(sdpa, False), vs_sdpa),
            "SDPA, cuDNN": (contender(sdpa, True), f"ratio {'0.50' if grad else '0.70'}"),
        },
        flops=B * H * T * T * products,
    )


def attention_cases(at: Place) -> Cases:
    mla = [(16, 16, 192, 128), (128, 128, 192, 128)]
    gqa = [(16, 16, 128, 128), (28, 4, 128, 128)]
    for grad in (False, True):
        for heads in mla + gqa:
            for T in at.some(2048, 4096, 8192, 16384):
                yield partial(attention_case, at, *heads, T, grad)


def pages_of(at: Place, B: int, S: int, X: int) -> tuple[Tensor, Tensor, Tensor]:
    """A cache in pages of 64 tokens that lie anywhere, which page is whose, and full lengths."""
    Y = at.size(64, 4)
    P = S // Y
    pages_ZYX = at.normal(B * P, Y, X)
    table_BP = torch.randperm(B * P).to(at.device, torch.int32).view(B, P)
    return pages_ZYX, table_BP, torch.full((B,), S, device=at.device, dtype=torch.int32)


def mla_decode_case(at: Place, B: int, H: int, S: int) -> Case:
    B, S, C, R = at.size(B, 3), at.size(S), at.size(512), at.size(64)
    X, scale = C + R, 192**-0.5
    q_BHX = at.normal(B, H, X)
    pages_ZYX, table_BP, lengths_B = pages_of(at, B, S, X)
    cache_BSX = pages_ZYX[table_BP].flatten(1, 2)

    def plain() -> Tensor:
        probs_BHS = (q_BHX @ cache_BSX.mT * scale).softmax(-1, torch.float32)
        return probs_BHS.to(q_BHX.dtype) @ cache_BSX[..., :C]

    return Case(
        "MLA decode",
        f"{B} x {S} cached tokens, {H} heads",
        ready(lambda: mla_decode(q_BHX, pages_ZYX, table_BP, lengths_B, C, scale)),
        {"two matmuls, no pages": (ready(plain), "roof 65%" if H <= 64 else "")},
        bytes=2 * (B * S * X + B * H * (X + C)),
    )


def gqa_decode_case(at: Place, B: int, H: int, J: int, S: int) -> Case:
    B, S, K = at.size(B, 3), at.size(S), at.size(128)
    q_BHK = at.normal(B, H, K)
    pages_ZYX, table_BP, lengths_B = pages_of(at, B, S, 2 * J * K)
    entries = pages_ZYX[table_BP].flatten(1, 2).unflatten(2, (2, J, K))  # (B, S, 2, J, K)
    k_BJSK, v_BJSK = entries.permute(2, 0, 3, 1, 4)

    def plain() -> Tensor:
        out_BH1K = F.scaled_dot_product_attention(
            q_BHK[:, :, None], k_BJSK, v_BJSK, enable_gqa=True
        )
        return out_BH1K[:, :, 0]

    return Case(
        "GQA decode",
        f"{B} x {S} cached tokens, {H}/{J} heads of {K}",
        ready(lambda: gqa_decode(q_BHK, pages_ZYX, table_BP, lengths_B, K**-0.5)),
        {"SDPA, no pages": (ready(plain), "")},
        bytes=2 * (B * S * 2 * J * K + 2 * B * H * K),
    )


def decode_cases(at: Place) -> Cases:
    for S in at.some(4096, 16384):
        for H in (16, 64, 128):
            yield partial(mla_decode_case, at, 64, H, S)
        for H, J in ((28, 4), (40, 8)):
            yield partial(gqa_decode_case, at, 64, H, J, S)


def routes(at: Place, N: int, E: int, A: int) -> tuple[Tensor, Tensor]:
    """A random A of E experts for each of N tokens: ends_E, and the token of each of W copies."""
    expert_W = torch.rand(N, E).topk(A).indices.flatten()
    rows_W = expert_W.argsort(stable=True) // A
    ends_E = expert_W.bincount(minlength=E).cumsum(0)
    return ends_E.to(at.device, torch.int32), rows_W.to(at.device, torch.int32)


def torch_linear(x_WD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    return grouped_mm(x_WD, weight_EFD.mT, offs=ends_E)


def torch_swiglu(x_ND: Tensor, gate_EFD: Tensor, up_EFD: Tensor, ends_E: Tensor, rows_W: Tensor):
    x_WD = x_ND[rows_W]
    gate_WF, up_WF = (torch_linear(x_WD, w, ends_E) for w in (gate_EFD, up_EFD))
    return F.silu(gate_WF) * up_WF


def experts_case(
    at: Place, name: str, N: int, E: int, A: int, D: int, F_: int, gated: bool, grad: bool
) -> Case:
    goal = "ratio 0.80" if E <= 16 else "ratio 1.0"
    N, E, A, D, F_ = at.size(N), at.size(E), at.size(A, 2), at.size(D), at.size(F_, 32)
    ends_E, rows_W = routes(at, N, E, A)
    W, matrices = N * A, 2 if gated else 1
    x = at.normal(N if gated else W, D, grad=grad)
    weights = tuple(at.normal(E, F_, D, std=D**-0.5, grad=grad) for _ in range(matrices))
    dout_WF = at.normal(W, F_)

    def contender(function: Callable) -> Callable[[], Run]:
        forward = lambda: function(x, *weights, ends_E, *(rows_W,) * gated)  # noqa: E731
        return backward(forward, (x, *weights), dout_WF) if grad else ready(forward)

    theirs = contender(torch_swiglu if gated else torch_linear)
    return Case(
        f"{'grouped_swiglu' if gated else 'grouped_linear'}{' backward' if grad else ''}",
        f"{name}: {N} tokens x {A} of {E} experts, {D} x {F_}",
        contender(grouped_swiglu if gated else grouped_linear),
        {"grouped_mm": (theirs, goal)},
        flops=2 * W * D * F_ * matrices * (2 if grad else 1),
    )


def experts_cases(at: Place) -> Cases:
    shapes = [
        ("large", 32768, 16, 2, 7168, 2048),
        ("R1", 4096, 256, 8, 7168, 2048),
        ("Moonlight", 16384, 64, 6, 2048, 1408),
    ]
    for gated in (False, True):
        for grad in (False, True):
            for shape in shapes:
                yield partial(experts_case, at, *shape, gated, grad)


def logprob_case(at: Place, N: int, D: int, V: int) -> Case:
    while 20 * N * V > 0.8 * at.free():  # about what the unfused one needs, 14 bytes a logit
        N //= 2
    N, D, V = at.size(N), at.size(D), at.size(V, 40)
    x_ND, weight_VD = at.normal(N, D, grad=True), at.normal(V, D, std=D**-0.5, grad=True)
    targets_N = torch.randint(V, (N,), device=at.device)
    dlogprobs_N = torch.randn(N, device=at.device)

    def both(logprobs: Callable[[], Tensor]) -> Callable[[], Run]:
        def run() -> tuple[Tensor, ...]:
            logprobs_N = logprobs()
            gradients = torch.autograd.grad(logprobs_N, (x_ND, weight_VD), dlogprobs_N)
            return logprobs_N.detach(), *gradients

        return ready(run)

    def unfused() -> Tensor:
        logprobs_NV = F.log_softmax(F.linear(x_ND, weight_VD).float(), dim=-1)
        return logprobs_NV.gather(-1, targets_N[:, None])[:, 0]

    return Case(
        "linear_logprob, forward and backward",
        f"{N} tokens, {D} x {V}",
        both(lambda: linear_logprob(x_ND, weight_VD, targets_N)[0]),
        {"log_softmax(linear)": (both(unfused), "ratio 0.9, memory 1/80")},
        flops=6 * N * D * V,
        memory=True,
    )


def logprob_cases(at: Place) -> Cases:
    yield partial(logprob_case, at, 16384, 7168, 129_280)
    yield partial(logprob_case, at, 16384, 3584, 152_064)


def norm_case(at: Place, N: int, D: int, grad: bool) -> Case:
    N, D = at.size(N), at.size(D)
    x_ND, weight_D, dy_ND = at.normal(N, D, grad=grad), at.normal(D, grad=grad), at.normal(N, D)

    def contender(forward: Callable[[], Tensor]) -> Callable[[], Run]:
        return backward(forward, (x_ND, weight_D), dy_ND) if grad else ready(forward)

    return Case(
        f"rms_norm{' backward' if grad else ''}",
        f"{N} x {D}",
        contender(lambda: rms_norm(x_ND, weight_D, 1e-6)),
        {"F.rms_norm": (contender(lambda: F.rms_norm(x_ND, (D,), weight_D, 1e-6)), "")},
        bytes=2 * N * D * (3 if grad else 2),
    )


def swiglu_case(at: Place, N: int, F_: int, grad: bool) -> Case:
    N, F_ = at.size(N), at.size(F_)
    gate_NF, up_NF = at.normal(N, F_, grad=grad), at.normal(N, F_, grad=grad)
    dy_NF = at.normal(N, F_)

    def contender(forward: Callable[[], Tensor]) -> Callable[[], Run]:
        return backward(forward, (gate_NF, up_NF), dy_NF) if grad else ready(forward)

    return Case(
        f"swiglu{' backward' if grad else ''}",
        f"{N} x {F_}",
        contender(lambda: swiglu(gate_NF, up_NF)),
        {"silu(gate) * up": (contender(lambda: F.silu(gate_NF) * up_NF), "")},
        bytes=2 * N * F_ * (5 if grad else 3),
    )


def norm_cases(at: Place) -> Cases:
    for grad in (False, True):
        yield partial(norm_case, at, 16384, 7168, grad)
        yield partial(norm_case, at, 16384 * 32, 128, grad)  # the queries' heads of Qwen3
        yield partial(swiglu_case, at, 16384, 18432, grad)


def dequant_case(at: Place, F_: int, D: int) -> Case:
    F_, D = at.size(F_, 256), at.size(D, 384)
    codes_FD, scale_inv = quant_fp8_blocks(at.normal(F_, D))
    blocks = (F_ // 128, 128, D // 128, 128)

    def plain() -> Tensor:
        scaled = codes_FD.view(blocks).float() * scale_inv[:, None, :, None]
        return scaled.to(torch.bfloat16).view(F_, D)

    return Case(
        "dequant_fp8",
        f"{F_} x {D}",
        ready(lambda: dequant_fp8(codes_FD, scale_inv)),
        {"torch, eager": (ready(plain), "")},
        bytes=3 * F_ * D,
    )


def quant_case(at: Place, N: int, D: int) -> Case:
    N, D = at.size(N), at.size(D, 384)
    x_ND = at.normal(N, D)

    def contender(quant: Callable) -> Callable[[], Run]:
        return ready(lambda: quant(x_ND))

    return Case(
        "quant_fp8",
        f"{N} x {D}",
        contender(quant_fp8),
        {"torch, eager": (contender(quant_fp8_reference), "")},
        bytes=3 * N * D,
    )


def fp8_cases(at: Place) -> Cases:
    yield partial(dequant_case, at, 18432, 7168)
    yield partial(quant_case, at, 16384, 7168)


CASES = dict(
    attention=attention_cases, decode=decode_cases, experts=experts_cases, logprob=logprob_cases,
    norm=norm_cases, fp8=fp8_cases,
)  # fmt: skip


# ---- measuring -----------------------------------------------------------------------------------


def times(runs: list[Run], at: Place) -> list[float]:
    """The median milliseconds of each, run in turns."""
    # Writing 1 GB empties the cache, and meanwhile the CPU queues what is timed.
    flush = torch.empty(at.size(2**30), dtype=torch.int8, device=at.device)

    def once(run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        return start, end

    def turns(count: int) -> list[float]:
        events = [[once(run) for run in runs] for _ in range(count)]
        torch.cuda.synchronize()
        return [statistics.median(s.elapsed_time(e) for s, e in column) for column in zip(*events)]

    estimate = sum(turns(3))  # ms; also the warm-up
    return turns(min(max(round((300 if at.quick else 1000) / estimate), 5), 50))


def error(found, right) -> float:
    """The largest difference, in units of the largest number that is right."""
    tensors = (x if isinstance(x, tuple) else (x,) for x in (found, right))
    errors = []
    for f, r in zip(*tensors, strict=True):
        assert f.shape == r.shape, f"{f.shape=} {r.shape=}"
        parts = []
        for a, b in zip(f.split(4096), r.split(4096)):  # in fp32 the whole may not fit
            a, b = a.float(), b.float()
            parts.append(torch.stack([(a - b).abs().max(), b.abs().max()]))
        difference, most = torch.stack(parts).amax(0)
        errors.append(float((difference / most.clamp(min=1e-30)).nan_to_num(nan=torch.inf)))
    return max(errors)


def peak(run: Run, at: Place) -> float:
    """GB in use at most while it runs, less what was there before and what it returns."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    torch.cuda.synchronize()
    returned = sum(x.nbytes for x in (out if isinstance(out, tuple) else (out,)))
    return (torch.cuda.max_memory_allocated() - before - returned) / 1e9


def roofs(at: Place) -> dict[str, float]:
    """TFLOP/s of a large matrix product in bf16, GB/s of a copy (read and written)."""
    n = at.size(8192)
    a, b = at.normal(n, n), at.normal(n, n)
    source = torch.zeros(at.size(2**30), dtype=torch.int32, device=at.device)
    target = torch.empty_like(source)
    matmul, copy = (times([run], at)[0] for run in (lambda: a @ b, lambda: target.copy_(source)))
    return {"TFLOP/s": 2 * n**3 / matmul / 1e9, "GB/s": 2 * source.nbytes / copy / 1e6}


def reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).strip() or '?'}".splitlines()[0][:80]


def measure(case: Case, name: str, at: Place, roof: dict[str, float]) -> dict:
    """A row's figures, against one of the case's baselines. A baseline that raises leaves its
    reason; ours may not raise."""
    prepare, _ = case.baselines[name]
    row: dict = {}
    ours, theirs = case.ours(), None
    result = ours()
    try:
        theirs = prepare()
        row["error"] = error(result, theirs())
    except RuntimeError as problem:  # what has no kernel for this, or runs out of memory
        theirs, row["why"] = None, reason(problem)
    del result
    if row.get("error", 0) > TOLERANCE or not at.clock:
        return row
    runs = [ours] if theirs is None else [ours, theirs]
    row["ours_ms"], row["baseline_ms"] = (*times(runs, at), None)[:2]
    unit, work = ("TFLOP/s", case.flops / 1e9) if case.flops else ("GB/s", case.bytes / 1e6)
    row["unit"], row["rate"] = unit, work / row["ours_ms"]
    row["roof"] = row["rate"] / roof[unit]
    if theirs is not None:
        row["ratio"] = row["baseline_ms"] / row["ours_ms"]
    if case.memory:
        row["memory_gb"] = [peak(run, at) for run in runs]
    return row


# ---- the table -----------------------------------------------------------------------------------

HEAD = ("kernel", "sizes", "ours, ms", "baseline", "its ms", "ratio", "rate", "roof", "memory, GB",
        "goal")  # fmt: skip


def line(row: dict, figures: bool) -> str:
    """A row of the table; without figures it says so in place of each."""
    ours = theirs = ratio = rate = roof = "not measured"
    memory = "not measured" if "memory_gb" in row else "-"
    if figures and "ours_ms" not in row:
        wrong = f"WRONG: error {row['error']:.2g}" if "error" in row else ""
        ours = wrong or f"FAILED: {row['failed']}"
        theirs = ratio = rate = roof = memory = "-"
    elif figures:
        ours = f"{row['ours_ms']:.3f}" + ("" if "error" in row else " (unchecked)")
        theirs = f"{row['baseline_ms']:.3f}" if "ratio" in row else row["why"]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        rate, roof = f"{row['rate']:,.0f} {row['unit']}", f"{row['roof']:.0%}"
        memory = " / ".join(f"{gb:.2f}" for gb in row.get("memory_gb", ())) or "-"
    cells = (row["kernel"], row["sizes"], ours, row["baseline"], theirs, ratio, rate, roof, memory,
             row["goal"] or "-")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def about_gpu() -> dict[str, str]:
    """What the figures depend on."""
    import triton

    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True).stdout.split()[0]
    except (FileNotFoundError, IndexError):
        driver = "unknown"
    return dict(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        gpu=torch.cuda.get_device_name(), driver=driver,
        torch=torch.__version__, triton=triton.__version__,
    )  # fmt: skip


def rows_of(make: Callable[[], Case], at: Place, roof: dict[str, float]) -> Iterator[dict]:
    """A row for each baseline. On a GPU what fails leaves its reason, and the others go on."""
    try:
        case = make()
    except torch.OutOfMemoryError as problem:  # the inputs alone
        name, sizes = make.func.__name__, ", ".join(map(str, make.args[1:]))
        yield dict(kernel=name, sizes=sizes, baseline="-", goal="", failed=reason(problem))
        return
    for name, (_, goal) in case.baselines.items():
        row = dict(kernel=case.kernel, sizes=case.sizes, baseline=name, goal=goal)
        if case.memory:
            row["memory_gb"] = []
        if at.device != "meta":
            try:
                row |= measure(case, name, at, roof)
            except Exception as problem:
                if not at.clock:
                    raise
                row["failed"] = reason(problem)
        yield row


def table(files: list[str], at: Place, roof: dict[str, float]) -> list[dict]:
    """Measure, and print row by row."""
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
    rows = []
    for file in files:
        for make in CASES[file](at):
            for row in rows_of(make, at, roof):
                rows.append(row)
                print(line(row, at.clock), flush=True)
            if at.clock:
                torch.cuda.empty_cache()
    return rows


def main(args: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES),
                        help="files of kernels/ to measure")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="the longest sizes, fewer repeats")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU, no figures")
    given = parser.parse_args(args)
    torch.manual_seed(0)
    if given.dry or not torch.cuda.is_available():
        at = Place("cpu" if given.dry else "meta", toy=given.dry, quick=given.quick)
        rows = table(given.only, at, {})
        why = "a dry run" if given.dry else "no CUDA GPU: torch.cuda.is_available() is False"
        print(f"\nnot measured: {why}" + (f"; {given.json} not written" if given.json else ""))
        return rows
    at, about = Place(GPU, clock=True, quick=given.quick), about_gpu()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    roof = roofs(at)
    print(", ".join(f"{value:,.0f} {unit}" for unit, value in roof.items()) + " is the roof\n")
    rows = table(given.only, at, roof)
    if given.json:
        Path(given.json).parent.mkdir(parents=True, exist_ok=True)
        content = dict(**about, roof=roof, rows=rows)
        Path(given.json).write_text(json.dumps(content, indent=2) + "\n")
    bad = sum("ours_ms" not in row for row in rows)
    if bad:
        sys.exit(f"{bad} rows are wrong or failed")
    return rows


if __name__ == "__main__":
    main()
