"""SwiGLU and RMSNorm: what stands between two matrix products. The kernels to read first.

    SwiGLU    y = silu(g) u             silu(g) = g s,   s = 1 / (1 + exp(-g))
              dg = dy u s (1 + g (1 - s))           du = dy g s

    RMSNorm   y = w h                   h = x r,         r = 1 / sqrt(mean(x^2) + eps)
              dx = r (w dy - h mean(w dy h))        dw = sum of dy h over all rows

dx is the loss's gradient with respect to x. A few operations for each number: what takes the time
is moving numbers between the GPU's memory and its registers. torch moves them once for each
operation; a kernel moves them once for all of its operations.

A kernel is written for one program. The launcher starts a grid of them, which run in any order,
many at a time. A program learns its place from program_id, loads a tile of numbers, computes in
fp32 whatever they are stored in, and stores, which casts them back. A tile's sides are powers of
two: what lies past the data's end is masked, neither read nor written. Tiles are named like
tensors, after their shape: M rows, or M numbers where there are no rows, and the D of a row.

Read next: experts.py, where a tile is a matrix and the work a matrix product.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import arch, full, tl, triton, use_triton

# By arch(): the numbers in a tile, and how many warps of 32 threads the GPU runs at a time: 32 on
# each of its multiprocessors, at the 64 registers a thread that RMSNorm's backward pass needs.
TILES = {0: (64, 4), 80: (2048, 32 * 108), 89: (2048, 32 * 128), 90: (2048, 32 * 132)}
NUMBERS_A_WARP = 256  # 8 a thread: in bf16 one load of 16 bytes, the widest there is


# ---- SwiGLU --------------------------------------------------------------------------------------


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@triton.jit
def _swiglu(gate_ptr, up_ptr, y_ptr, size, BLOCK_M: tl.constexpr):
    # This program's M numbers; int64, for there may be more than 2^31 in all.
    at_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_M = at_M < size
    gate_M = tl.load(gate_ptr + at_M, mask=inside_M).to(tl.float32)
    up_M = tl.load(up_ptr + at_M, mask=inside_M).to(tl.float32)
    tl.store(y_ptr + at_M, gate_M * tl.sigmoid(gate_M) * up_M, mask=inside_M)


@triton.jit
def _swiglu_backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, size, BLOCK_M: tl.constexpr
):  # fmt: skip
    at_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_M = at_M < size
    dy_M = tl.load(dy_ptr + at_M, mask=inside_M).to(tl.float32)
    gate_M = tl.load(gate_ptr + at_M, mask=inside_M).to(tl.float32)
    up_M = tl.load(up_ptr + at_M, mask=inside_M).to(tl.float32)
    s_M = tl.sigmoid(gate_M)  # again: computing it is cheaper than keeping it
    dgate_M = dy_M * up_M * s_M * (1 + gate_M * (1 - s_M))
    tl.store(dgate_ptr + at_M, dgate_M, mask=inside_M)
    tl.store(dup_ptr + at_M, dy_M * gate_M * s_M, mask=inside_M)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = gate.new_empty(gate.shape)
    block = TILES[arch()][0]
    if y.numel():
        _swiglu[(triton.cdiv(y.numel(), block),)](gate, up, y, y.numel(), BLOCK_M=block)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    block = TILES[arch()][0]
    if dy.numel():
        grid = (triton.cdiv(dy.numel(), block),)
        _swiglu_backward[grid](dy, gate, up, dgate, dup, dy.numel(), BLOCK_M=block)
    return dgate, dup


# torch learns of each launcher as an operator: what it returns (the fake, which torch.compile asks)
# and what its gradient is. A gradient is an operator too, so that it can be compiled as well.
swiglu_op = torch.library.custom_op("nanor1::swiglu", swiglu_forward, mutates_args=())
swiglu_backward_op = torch.library.custom_op(
    "nanor1::swiglu_backward", swiglu_backward, mutates_args=()
)
swiglu_op.register_fake(lambda gate, up: gate.new_empty(gate.shape))
swiglu_backward_op.register_fake(
    lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape))
)
swiglu_op.register_autograd(
    lambda ctx, dy: swiglu_backward_op(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, number by number. Any shape; views are copied first.

    ValueError where the two differ in shape or dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {tuple(gate.shape)} in {gate.dtype}, up {tuple(up.shape)} in {up.dtype}:"
            " give both the same shape and dtype"
        )
    return swiglu_op(gate, up) if use_triton(gate) else swiglu_reference(gate, up)


# ---- RMSNorm -------------------------------------------------------------------------------------
# A tile holds whole rows, so that a row's mean needs no other program: one row where D is the width
# of a model, several where it is that of a head (Qwen3 normalises each query).


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(full(x), weight.shape, full(weight), eps).to(x.dtype)


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, N, D, stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d_D = tl.arange(0, BLOCK_D)
    inside_MD = (n_M < N)[:, None] & (d_D < D)[None, :]
    x_MD = tl.load(x_ptr + n_M[:, None] * stride + d_D, mask=inside_MD, other=0.0).to(tl.float32)
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    rstd_M = tl.rsqrt(tl.sum(x_MD * x_MD, 1) / D + eps)
    y_MD = x_MD * rstd_M[:, None] * weight_D
    tl.store(y_ptr + n_M[:, None] * D + d_D, y_MD, mask=inside_MD)
    tl.store(rstd_ptr + n_M, rstd_M, mask=n_M < N)


@triton.jit
def _rms_norm_backward(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, N, D, dy_stride, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    d_D = tl.arange(0, BLOCK_D)
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    # dweight is a sum over all rows. Each program adds up every programs'th tile and writes one row
    # of sums; the launcher adds these. Always in the same order, so always to the same bits.
    dweight_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(program * BLOCK_M, N, programs * BLOCK_M):
        n_M = start + tl.arange(0, BLOCK_M).to(tl.int64)
        inside_MD = (n_M < N)[:, None] & (d_D < D)[None, :]
        x_MD = tl.load(x_ptr + n_M[:, None] * x_stride + d_D, mask=inside_MD, other=0.0)
        dy_MD = tl.load(dy_ptr + n_M[:, None] * dy_stride + d_D, mask=inside_MD, other=0.0)
        rstd_M = tl.load(rstd_ptr + n_M, mask=n_M < N, other=0.0)
        h_MD = x_MD.to(tl.float32) * rstd_M[:, None]
        dweight_MD += dy_MD.to(tl.float32) * h_MD
        dh_MD = dy_MD.to(tl.float32) * weight_D
        mean_M = tl.sum(dh_MD * h_MD, 1) / D
        dx_MD = rstd_M[:, None] * (dh_MD - h_MD * mean_M[:, None])
        tl.store(dx_ptr + n_M[:, None] * D + d_D, dx_MD, mask=inside_MD)
    tl.store(dweight_ptr + program * D + d_D, tl.sum(dweight_MD, 0), mask=d_D < D)


def _rows(x: Tensor) -> Tensor:
    """ND: a view where the strides allow it, as those of a split projection do; else a copy."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def _tile(D: int) -> dict[str, int]:
    """The tile that holds whole rows of D numbers, and the warps that share it."""
    block_D = triton.next_power_of_2(D)
    block_M = max(1, TILES[arch()][0] // block_D)
    warps = min(max(block_M * block_D // NUMBERS_A_WARP, 1), 32)
    return dict(BLOCK_M=block_M, BLOCK_D=block_D, num_warps=warps)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and r of every row for the backward pass."""
    x_ND, tile = _rows(x), _tile(x.shape[-1])
    N, D = x_ND.shape
    y = x.new_empty(x.shape)
    rstd_N = x.new_empty(N, dtype=torch.float32)
    if N:
        _rms_norm[(triton.cdiv(N, tile["BLOCK_M"]),)](
            x_ND, weight.contiguous(), y, rstd_N, N, D, x_ND.stride(0), eps, **tile
        )
    return y, rstd_N


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd_N: Tensor
) -> tuple[Tensor, Tensor]:
    dy_ND, x_ND, tile = _rows(dy), _rows(x), _tile(x.shape[-1])
    N, D = x_ND.shape
    programs = min(triton.cdiv(N, tile["BLOCK_M"]), TILES[arch()][1] // tile["num_warps"])
    dx = x.new_empty(x.shape)
    dweight_PD = x.new_empty((programs, D), dtype=torch.float32)
    if N:
        _rms_norm_backward[(programs,)](
            dy_ND, x_ND, weight.contiguous(), rstd_N, dx, dweight_PD,
            N, D, dy_ND.stride(0), x_ND.stride(0), **tile,
        )  # fmt: skip
    return dx, dweight_PD.sum(0).to(weight.dtype)


rms_norm_op = torch.library.custom_op("nanor1::rms_norm", rms_norm_forward, mutates_args=())
rms_norm_backward_op = torch.library.custom_op(
    "nanor1::rms_norm_backward", rms_norm_backward, mutates_args=()
)
rms_norm_op.register_fake(
    lambda x, weight, eps: (
        x.new_empty(x.shape),
        x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32),
    )
)
rms_norm_backward_op.register_fake(
    lambda dy, x, weight, rstd_N: (x.new_empty(x.shape), weight.new_empty(weight.shape))
)


def _keep_for_rms_norm_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _rms_norm_autograd(ctx, dy: Tensor, drstd_N: Tensor) -> tuple[Tensor, Tensor, None]:
    return *rms_norm_backward_op(dy, *ctx.saved_tensors), None


rms_norm_op.register_autograd(_rms_norm_autograd, setup_context=_keep_for_rms_norm_backward)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last dimension, in x's dtype; any shape before it.

    ValueError where weight is not as long as x's last dimension.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, x {tuple(x.shape)}: weight needs"
            " one number for each of x's last dimension"
        )
    return rms_norm_op(x, weight, eps)[0] if use_triton(x) else rms_norm_reference(x, weight, eps)
