"""The kernels compiled for GPUs that need not be there, at the sizes of DeepSeek-R1 and Qwen2.5-7B.

    python -m bench.compile                       all kernels for sm_80, sm_89 and sm_90
    python -m bench.compile --arch 90 --only attention
    python -m bench.compile --match "R1(?!.*fp32)"        the cases whose name has this in it

Triton's compiler and ptxas need no GPU. The launchers run as they are, on tensors without memory
("meta"), under a driver that compiles, loads nothing and launches nothing. What comes out is what
a GPU of that kind would run: registers, spills, shared memory, and whether it uses the tensor
cores' warp-group instructions (wgmma). A spill, or more shared memory than the GPU has, fails.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes that one block may use
bf16, f32 = torch.bfloat16, torch.float32


@dataclass
class Compiled:
    kernel: str
    arch: int
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int
    warps: int
    wgmma: bool


class DryGPU:
    """A Triton driver for a GPU that is not there. Within it, launchers given meta tensors compile
    their kernels for `arch`, and launch nothing."""

    def __init__(self, arch: int):
        self.arch, self.utils = arch, self

    def __enter__(self) -> "DryGPU":
        triton.runtime.driver.set_active(self)
        return self

    def __exit__(self, *error) -> None:
        triton.runtime.driver._active = None

    # What Triton asks of a driver.

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict:
        return dict(max_shared_mem=SHARED[self.arch], multiprocessor_count=132)

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        registers, stack = resources(cubin)
        return 1, 1, registers, stack, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source, metadata) -> Callable:
        def launch(grid_x, grid_y, grid_z, stream, function, *rest):
            pass

        return launch


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills) that a thread uses."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def compile_case(launch: Callable[[], object], arch: int) -> list[Compiled]:
    """Every kernel that a launcher launches, compiled for `arch`; once, if it is launched often."""
    launched: list[CompiledKernel] = []
    run = CompiledKernel.run

    def noted(kernel: CompiledKernel) -> Callable:
        launched.append(kernel)
        return run.fget(kernel)

    CompiledKernel.run = property(noted)
    try:
        with DryGPU(arch):
            launch()
    finally:
        CompiledKernel.run = run
    return [
        Compiled(
            kernel.name, arch, kernel.n_regs, kernel.n_spills, kernel.metadata.shared,
            kernel.metadata.num_warps, "wgmma.mma_async" in kernel.asm["ptx"],
        )
        for kernel in {id(kernel): kernel for kernel in launched}.values()
    ]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tf32(launch: Callable[[], object]) -> Callable[[], None]:
    """The same launch where torch, and so the kernels, may multiply fp32 as TF32."""

    def allowed() -> None:
        torch.set_float32_matmul_precision("high")
        try:
            launch()
        finally:
            torch.set_float32_matmul_precision("highest")

    return allowed


# ---- the cases: (name, a function that launches) -------------------------------------------------
# Sizes: DeepSeek-R1 (128 heads, 192 = 128 + 64 and 128; experts 7168 x 2048; vocabulary 129,280)
# and Qwen2.5-7B (28 heads, 4 key heads, 128; 3584; vocabulary 152,064).


def norm_cases() -> Iterator[tuple[str, Callable]]:
    from kernels.norm import rms_norm_backward, rms_norm_forward, swiglu_backward, swiglu_forward

    def rms_norm(N: int, D: int, X: int, dtype: torch.dtype) -> None:
        """Rows of D numbers in rows of X."""
        x_ND, weight_D = meta(N, X, dtype=dtype)[:, :D], meta(D, dtype=dtype)
        y_ND, rstd_N = rms_norm_forward(x_ND, weight_D, 1e-6)
        rms_norm_backward(y_ND, x_ND, weight_D, rstd_N)

    def swiglu(N: int, F: int, dtype: torch.dtype) -> None:
        gate_NF = meta(N, F, dtype=dtype)
        swiglu_backward(swiglu_forward(gate_NF, gate_NF), gate_NF, gate_NF)

    yield "R1", lambda: rms_norm(16384, 7168, 7168, bf16)
    yield "R1 latent", lambda: rms_norm(16384, 512, 576, bf16)
    yield "Qwen2.5-7B", lambda: rms_norm(16384, 3584, 3584, bf16)
    yield "Qwen2.5-7B fp32", lambda: rms_norm(16384, 3584, 3584, f32)
    yield "R1 fp32", lambda: rms_norm(16384, 7168, 7168, f32)
    yield "Qwen3 heads", lambda: rms_norm(16384 * 32, 128, 128, bf16)
    yield "R1 experts", lambda: swiglu(16384 * 8, 2048, bf16)
    yield "Qwen2.5-7B fp32", lambda: swiglu(16384, 18944, f32)


def attention_cases() -> Iterator[tuple[str, Callable]]:
    from kernels.attention import attention_backward, attention_forward

    def case(B, T, H, J, K, U, dtype):
        q, k, v = (meta(B, T, *heads, dtype=dtype) for heads in ((H, K), (J, K), (J, U)))
        starts = meta(B, T, dtype=torch.int32)
        out, lse = attention_forward(q, k, v, starts, K**-0.5)
        attention_backward(out, q, k, v, starts, out, lse, K**-0.5)

    for name, *sizes in (
        ("R1, 128 heads of 192 / 128", 1, 4096, 128, 128, 192, 128),
        ("Qwen2.5-7B, 28 heads, 4 key heads of 128", 1, 4096, 28, 4, 128, 128),
        ("14 heads, 2 key heads of 64", 4, 4096, 14, 2, 64, 64),
        ("16 heads of 256", 1, 4096, 16, 16, 256, 256),
    ):
        yield name, lambda sizes=sizes: case(*sizes, bf16)
    yield "Qwen2.5-7B, fp32", lambda: case(1, 4096, 28, 4, 128, 128, f32)
    yield "R1, fp32", lambda: case(1, 4096, 128, 128, 192, 128, f32)
    yield "16 heads of 256, fp32", lambda: case(1, 4096, 16, 16, 256, 256, f32)
    yield "R1, fp32 as TF32", tf32(lambda: case(1, 4096, 128, 128, 192, 128, f32))


def decode_cases() -> Iterator[tuple[str, Callable]]:
    from kernels.decode import launch

    def case(H: int, J: int, K: int, C: int, X: int, table: bool = True, dtype=bf16) -> Callable:
        B, Z, Y, P = (64, 4096, 64, 64) if table else (64, 64, 4096, 1)  # P*Y = 4096 tokens a row
        return lambda: launch(
            meta(B, H, K, dtype=dtype), meta(Z, Y, X, dtype=dtype),
            meta(B, P, dtype=torch.int32) if table else None, meta(B, dtype=torch.int64),
            J, C, 0 if J == 1 else J * K, 0.1,
        )  # fmt: skip

    yield "R1, 128 heads", case(128, 1, 576, 512, 576)
    yield "R1, 128 heads, no table", case(128, 1, 576, 512, 576, table=False)
    yield "R1, 16 heads", case(16, 1, 576, 512, 576)
    yield "R1, 16 heads, no table", case(16, 1, 576, 512, 576, table=False)
    yield "R1, 16 heads, fp32", case(16, 1, 576, 512, 576, dtype=f32)
    yield "Qwen", case(28, 4, 128, 128, 1024)
    yield "Qwen, no table", case(28, 4, 128, 128, 1024, table=False)
    yield "Qwen, fp32", case(28, 4, 128, 128, 1024, dtype=f32)
    yield "R1, 16 heads, fp32 as TF32", tf32(case(16, 1, 576, 512, 576, dtype=f32))


def expert_cases() -> Iterator[tuple[str, Callable]]:
    from kernels import experts

    def index(n: int) -> Tensor:
        return meta(n, dtype=torch.int64)

    def case(name: str, E: int, D: int, F: int, A: int, N: int = 4096, dtype=bf16) -> Iterator:
        x_ND, x_WF, x_WD = (meta(*shape, dtype=dtype) for shape in ((N, D), (N * A, F), (N * A, D)))
        gate_EFD, down_EDF = meta(E, F, D, dtype=dtype), meta(E, D, F, dtype=dtype)
        ends_E, rows_W = index(E), index(N * A)
        up, back = (gate_EFD, gate_EFD, ends_E, rows_W), (gate_EFD.mT, ends_E, None)
        yield f"{name} swiglu", lambda: experts.swiglu_launch(x_ND, *up)
        yield f"{name} swiglu backward", lambda: experts.swiglu_launch(x_ND, *up, x_WF)
        yield f"{name} dgrad of swiglu", lambda: experts.linear_launch(x_WF, *back, x_WF, back[0])
        yield f"{name} sum of copies", lambda: experts.sum_copies_launch(x_WD, rows_W, N)
        yield f"{name} gate wgrad", lambda: experts.wgrad_launch(x_WF, x_ND, ends_E, rows_W)
        yield f"{name} down", lambda: experts.linear_launch(x_WF, down_EDF, ends_E)
        yield f"{name} down dgrad", lambda: experts.linear_launch(x_WD, down_EDF.mT, ends_E)
        yield f"{name} down wgrad", lambda: experts.wgrad_launch(x_WD, x_WF, ends_E)

    yield from case("R1", E=256, D=7168, F=2048, A=8)
    shard = case("R1, 32 of 256 experts", E=32, D=7168, F=2048, A=1)
    yield from ((name, launch) for name, launch in shard if name.endswith((" swiglu", " down")))
    yield from case("Moonlight", E=64, D=2048, F=1408, A=6)
    yield from case("Moonlight fp32", E=64, D=2048, F=1408, A=6, dtype=f32)
    as_tf32 = case("Moonlight fp32 as TF32", E=64, D=2048, F=1408, A=6, dtype=f32)
    yield from ((name, tf32(launch)) for name, launch in as_tf32)


def logprob_cases() -> Iterator[tuple[str, Callable]]:
    from kernels import logprob

    def both(N: int, D: int, V: int, dtype: torch.dtype) -> None:
        x_ND, weight_VD = meta(N, D, dtype=dtype), meta(V, D, dtype=dtype)
        targets_N = meta(N, dtype=torch.int64)
        lse_N = logprob.forward(x_ND, weight_VD, targets_N, 1.0)[2]
        logprob.backward(meta(N, dtype=f32), x_ND, weight_VD, targets_N, lse_N, 1.0, 0)

    yield "DeepSeek-R1", lambda: both(16384, 7168, 129280, bf16)
    yield "Qwen2.5-7B", lambda: both(16384, 3584, 152064, bf16)
    yield "Qwen2.5-1.5B, odd N", lambda: both(16383, 1536, 151936, bf16)
    yield "Qwen2.5-1.5B, fp32", lambda: both(16384, 1536, 151936, f32)
    yield "Qwen2.5-1.5B, fp32 as TF32", tf32(lambda: both(16384, 1536, 151936, f32))


def fp8_cases() -> Iterator[tuple[str, Callable]]:
    from kernels.fp8 import dequant_fp8_launch, quant_fp8_launch

    def dequant(F: int, D: int, dtype: torch.dtype) -> None:
        scales = meta(triton.cdiv(F, 128), triton.cdiv(D, 128), dtype=f32)
        dequant_fp8_launch(meta(F, D, dtype=torch.uint8), scales, dtype)

    yield "dequantise R1's MLP", lambda: dequant(18432, 7168, bf16)
    yield "dequantise R1's latent, 576 rows, fp32", lambda: dequant(576, 7168, f32)
    yield "quantise R1's tokens", lambda: quant_fp8_launch(meta(16384, 7168))
    yield "quantise Qwen2.5's, fp32", lambda: quant_fp8_launch(meta(16384, 3584, dtype=f32))


CASES = dict(
    norm=norm_cases, attention=attention_cases, decode=decode_cases, experts=expert_cases,
    logprob=logprob_cases, fp8=fp8_cases,
)  # fmt: skip


def compile_numbered(file: str, number: int, arch: int) -> tuple[str, list[Compiled]]:
    """The number-th case of a file of kernels/: its name, and what its kernels became. A process of
    its own does this, and functions don't travel between processes."""
    name, launch = list(CASES[file]())[number]
    return f"{file}: {name}", compile_case(launch, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED), choices=list(SHARED),
                        help="compute capabilities to compile for")  # fmt: skip
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES),
                        help="files of kernels/ to compile")  # fmt: skip
    parser.add_argument("--match", default="", help="a regular expression: cases whose name has it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", help="file to write the table to as well")
    args = parser.parse_args()
    tasks = [
        (file, number, arch)
        for file in args.only for number, (name, _) in enumerate(CASES[file]())
        for arch in args.arch if re.search(args.match, name)
    ]  # fmt: skip
    print(f"torch {torch.__version__}, triton {triton.__version__}\n")
    header = ("case", "kernel", "arch", "warps", "registers", "spills", "shared", "wgmma")
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    rows = []
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for name, kernels in pool.map(compile_numbered, *zip(*tasks)):
            for c in kernels:
                rows.append(dict(case=name, **asdict(c)))
                cells = (name, c.kernel, f"sm_{c.arch}", c.warps, c.registers, c.spills, c.shared,
                         "yes" if c.wgmma else "no")  # fmt: skip
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if args.json:
        versions = dict(torch=torch.__version__, triton=triton.__version__)
        Path(args.json).write_text(json.dumps(dict(versions=versions, kernels=rows), indent=1))
    spilling = [f"{row['case']} on sm_{row['arch']}" for row in rows if row["spills"]]
    sys.exit(f"spilling: {', '.join(spilling)}" if spilling else 0)


if __name__ == "__main__":
    main()
