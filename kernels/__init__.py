"""The one door to the computations that decide the speed: each as a Triton kernel and as a
reference in plain torch, which is what the tests compare with and what runs on a CPU.

backend.py decides which of the two runs. Each of the other files has one idea and reads from top to
bottom: the maths, the reference, the kernels, what launches them, the operator that torch knows,
the function that the model calls. The shape letters are those of ../model.py.

Read next: norm.py (the simplest), experts.py, logprob.py, attention.py, decode.py, fp8.py.
"""

from kernels.attention import attention
from kernels.backend import full, use_triton
from kernels.decode import gqa_decode, mla_decode
from kernels.experts import grouped_linear, grouped_swiglu
from kernels.fp8 import dequant_fp8, quant_fp8
from kernels.logprob import linear_logprob
from kernels.norm import rms_norm, swiglu

__all__ = [
    "attention", "dequant_fp8", "full", "gqa_decode", "grouped_linear", "grouped_swiglu",
    "linear_logprob", "mla_decode", "quant_fp8", "rms_norm", "swiglu", "use_triton",
]  # fmt: skip
