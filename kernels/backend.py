"""Where a kernel runs: as Triton on a GPU, in Triton's interpreter where a test asks for it, as the
torch reference everywhere else. Read next: norm.py, the simplest kernels.
"""

import os
from types import SimpleNamespace

import torch
from torch import Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # newer Tritons need to be told
HAS_TRITON = True
try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # macOS and Windows have no Triton; the references need none
    HAS_TRITON = False
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=None)

# Set TRITON_INTERPRET=1 before Triton is first imported: the kernels then run on the CPU, slowly.
interpret = HAS_TRITON and bool(triton.knobs.runtime.interpret)


def use_triton(x: Tensor) -> bool:
    """The one decision. Triton for a GPU with bf16 (Ampere and newer); the reference on the CPU, on
    older GPUs, and for float64."""
    if x.dtype == torch.float64:
        return False
    if x.is_cuda:
        return HAS_TRITON and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return interpret


def arch() -> int:
    """Which column of a kernel's table of tiles holds here: 80 (A100: 163 KB of shared memory a
    block), 89 (RTX 4090 and other cards with 99 KB), 90 (H100, and B200 with as much: 227 KB), or
    0, the interpreter. A table and not autotune, so that what runs on an A100, a 4090 or an H100 is
    what was compiled by the tests."""
    if interpret:
        return 0
    found = triton.runtime.driver.active.get_current_target().arch
    return {80: 80, 90: 90, 100: 90, 103: 90}.get(found, 89)


def precision(x: Tensor) -> str:
    """How tl.dot multiplies fp32: exactly, unless torch is allowed TF32 for its own products."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def full(x: Tensor) -> Tensor:
    """bf16 and fp16 in fp32, so that sums keep their digits; fp32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _teach_the_interpreter_bf16() -> None:
    """Triton's interpreter keeps bf16 as 16-bit integers, and multiplies these in tl.dot."""
    import numpy as np
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):  # bf16 is the upper half of an fp32
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = np.ascontiguousarray(x.data).view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


if interpret:
    _teach_the_interpreter_bf16()
