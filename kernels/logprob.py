"""Log-probability of the token that was drawn, and entropy, from hidden states and the head's
matrix: the last layer and its softmax, without the logits ever existing.

    l_nv = x_n . w_v / temperature,     Z_n = sum_v exp(l_nv),     p_nv = exp(l_nv) / Z_n
    logprob_n = l_nt - log Z_n          t: the target of row n
    entropy_n = - sum_v p_nv log p_nv = log Z_n - sum_v p_nv l_nv

The logits of 16,384 tokens over the 129,280 words of DeepSeek-R1 are 8.5 GB in fp32, and softmax
and its gradient want several such arrays. But a row needs only four numbers of its logits:

    m = max l,   S = sum exp(l - m),   R = sum exp(l - m) (l - m),   and l_t;   then
    logprob = (l_t - m) - log S,   entropy = log S - R / S

Forward: a program multiplies one tile of rows with one tile of words and leaves m, S and R of that
tile; l_t is left by the one program that has it. A few torch operations then merge the tiles i of a
row, which has m = max m_i:

    S = sum_i exp(m_i - m) S_i        R = sum_i exp(m_i - m) (R_i + (m_i - m) S_i)

Everything is relative to the maximum, so that nothing overflows and a nearly certain row has an
exact entropy.

Backward, with g_n the gradient of logprob_n:

    dlogits_nv = g_n ([v = t] - p_nv) / temperature,   dx = dlogits W,   dW = dlogits^T x

For one slice of the vocabulary after the other, the logits are computed again and become dlogits,
in a buffer of bounded size, and two plain matrix products do the rest. Slices of the vocabulary and
not of the rows: a slice's rows of dW are then complete, and what adds up over slices is dx, which
has N x D numbers, where dW has V x D.

Read next: attention.py, where the sums over tiles are kept while the tiles go by.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from kernels.backend import arch, full, precision, tl, triton, use_triton

BUFFER = 2**27  # numbers of logits that exist at a time unless the caller says: 0.25 GB in bf16


def reference(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """The logits of only `chunk` rows exist at a time, in the backward pass too."""
    chunk = chunk or max(1, BUFFER // len(weight_VD))

    def piece(x_nD: Tensor, weight_VD: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_nV = F.log_softmax(full(F.linear(x_nD, weight_VD)) / temperature, dim=-1)
        entropy_n = -(logprobs_nV.detach().exp() * logprobs_nV.detach()).sum(-1)
        return logprobs_nV.gather(-1, targets_n[:, None])[:, 0], entropy_n

    if len(x_ND) <= chunk:
        return piece(x_ND, weight_VD, targets_N)
    pieces = [
        recompute(
            piece, x_ND[i : i + chunk], weight_VD, targets_N[i : i + chunk], use_reentrant=False
        )
        for i in range(0, len(x_ND), chunk)
    ]
    return tuple(torch.cat(part) for part in zip(*pieces))


# In a tile: M rows, C words (columns of the logits), K of the D numbers. Logits in the kernels are
# times log2(e), which `scale` has, because exp2 is what the hardware computes.


@triton.jit
def _logits(
    x_ptr, weight_ptr, n_M, v_C, N, V, scale,
    D: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile, in fp32. Rows and words past the end repeat the last one: no mask while loading."""
    k = tl.arange(0, K)
    x_MK_ptr = x_ptr + tl.minimum(n_M, N - 1).to(tl.int64)[:, None] * D + k[None, :]
    weight_KC_ptr = weight_ptr + tl.minimum(v_C, V - 1).to(tl.int64)[None, :] * D + k[:, None]
    logits_MC = tl.zeros([n_M.shape[0], v_C.shape[0]], tl.float32)
    for _ in range(D // K):
        logits_MC = tl.dot(
            tl.load(x_MK_ptr), tl.load(weight_KC_ptr), logits_MC, input_precision=PRECISION
        )
        x_MK_ptr += K
        weight_KC_ptr += K
    if D % K > 0:  # D is known when this is compiled: where K divides it, nothing is masked
        rest_MK = tl.load(x_MK_ptr, mask=(k < D % K)[None, :], other=0.0)
        rest_KC = tl.load(weight_KC_ptr, mask=(k < D % K)[:, None], other=0.0)
        logits_MC = tl.dot(rest_MK, rest_KC, logits_MC, input_precision=PRECISION)
    return logits_MC * scale


@triton.jit
def _place(M: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr):
    """Which rows and words a program has. Programs that run at the same time share GROUP tiles of
    rows and few tiles of words, and find both in L2."""
    row, column = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP
    )
    return row * M + tl.arange(0, M), column, column * C + tl.arange(0, C)


@triton.jit
def _forward(
    x_ptr, weight_ptr, targets_ptr, max_ptr, sum_ptr, moment_ptr, target_logit_ptr, N, V, scale,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n_M, tile, v_C = _place(M, C, GROUP)
    logits_MC = _logits(x_ptr, weight_ptr, n_M, v_C, N, V, scale, D, K, PRECISION)
    # Words past the end weigh nothing. Not -inf: 0 times it is NaN.
    logits_MC = tl.where((v_C < V)[None, :], logits_MC, -1e30)
    is_row_M = n_M < N
    target_M = tl.load(targets_ptr + n_M, mask=is_row_M, other=-1)
    is_target_MC = v_C[None, :] == target_M.to(tl.int32)[:, None]
    target_logit_M = tl.sum(tl.where(is_target_MC, logits_MC, 0.0), 1)
    here_M = (target_M >= tile * C) & (target_M < tl.minimum(tile * C + C, V))
    tl.store(target_logit_ptr + n_M, target_logit_M, mask=here_M)
    max_M = tl.max(logits_MC, 1)
    logits_MC -= max_M[:, None]
    exp_MC = tl.exp2(logits_MC)
    at_M = tile.to(tl.int64) * N + n_M
    tl.store(max_ptr + at_M, max_M, mask=is_row_M)
    tl.store(sum_ptr + at_M, tl.sum(exp_MC, 1), mask=is_row_M)
    tl.store(moment_ptr + at_M, tl.sum(exp_MC * logits_MC, 1), mask=is_row_M)


@triton.jit
def _dlogits(
    x_ptr, weight_ptr, targets_ptr, lse_ptr, g_ptr, dlogits_ptr, N, V, width, first, scale,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """weight_ptr points at the slice's first word, V are the words in it; g has 1 / temperature."""
    n_M, _, v_C = _place(M, C, GROUP)
    logits_MC = _logits(x_ptr, weight_ptr, n_M, v_C, N, V, scale, D, K, PRECISION)
    is_row_M = n_M < N
    target_M = tl.load(targets_ptr + n_M, mask=is_row_M, other=-1).to(tl.int32) - first
    lse_M = tl.load(lse_ptr + n_M, mask=is_row_M, other=float("inf"))
    g_M = tl.load(g_ptr + n_M, mask=is_row_M, other=0.0)
    onehot_MC = tl.where(v_C[None, :] == target_M[:, None], 1.0, 0.0)
    dlogits_MC = g_M[:, None] * (onehot_MC - tl.exp2(logits_MC - lse_M[:, None]))
    # The buffer's width is a multiple of C: what is written for words past the end has room there.
    at_MC = n_M.to(tl.int64)[:, None] * width + v_C[None, :]
    tl.store(
        dlogits_ptr + at_MC, dlogits_MC.to(dlogits_ptr.dtype.element_ty), mask=is_row_M[:, None]
    )


# (architecture, bytes a number): M, C, K, GROUP, warps, stages.
TILES = {
    (0, 2): (16, 32, 16, 2, 4, 1),
    (0, 4): (16, 32, 16, 2, 4, 1),
    (80, 2): (128, 256, 64, 16, 8, 4),
    (80, 4): (128, 128, 32, 16, 8, 4),
    (89, 2): (128, 128, 64, 16, 8, 4),
    (89, 4): (128, 128, 32, 16, 8, 4),
    (90, 2): (128, 256, 64, 16, 8, 4),
    (90, 4): (128, 128, 32, 16, 8, 4),
}


def tiles(x_ND: Tensor) -> tuple[int, int, dict]:
    M, C, K, group, warps, stages = TILES[arch(), x_ND.element_size()]
    config = {"D": x_ND.shape[1], "M": M, "C": C, "K": K, "GROUP": group}
    config |= {"PRECISION": precision(x_ND), "num_warps": warps, "num_stages": stages}
    return M, C, config


def forward(x_ND, weight_VD, targets_N, temperature):
    """logprobs_N, entropy_N, and log2 Z of each row, for the backward pass."""
    x_ND, weight_VD, targets_N = x_ND.contiguous(), weight_VD.contiguous(), targets_N.contiguous()
    (N, _), V = x_ND.shape, len(weight_VD)
    M, C, config = tiles(x_ND)
    I = triton.cdiv(V, C)  # tiles of words
    max_IN, sum_IN, moment_IN = torch.empty(3, I, N, dtype=torch.float32, device=x_ND.device)
    # A target that is no word is found by no program: it gives NaN.
    target_N = torch.empty(N, dtype=torch.float32, device=x_ND.device).fill_(float("nan"))
    if N:
        _forward[(I, triton.cdiv(N, M))](
            x_ND, weight_VD, targets_N, max_IN, sum_IN, moment_IN, target_N, N, V,
            math.log2(math.e) / temperature, **config,
        )  # fmt: skip
    # The tiles merged: what was relative to a tile's maximum becomes relative to the row's.
    max_N = max_IN.amax(0)
    less_IN = max_IN - max_N
    share_IN = less_IN.exp2()
    sum_N = (share_IN * sum_IN).sum(0)
    moment_N = (share_IN * (moment_IN + less_IN * sum_IN)).sum(0)
    log_sum_N = sum_N.log2()
    logprobs_N = (target_N - max_N - log_sum_N) * math.log(2)
    entropy_N = (log_sum_N - moment_N / sum_N) * math.log(2)
    return logprobs_N, entropy_N, max_N + log_sum_N


def backward(g_N, x_ND, weight_VD, targets_N, lse_N, temperature, chunk, frozen=False):
    """dx_ND, and dweight_VD or, for a frozen weight, an empty matrix."""
    x_ND, weight_VD, targets_N = x_ND.contiguous(), weight_VD.contiguous(), targets_N.contiguous()
    g_N = g_N / temperature  # contiguous, whatever it was
    (N, D), V = x_ND.shape, len(weight_VD)
    if not N:
        return torch.zeros_like(x_ND), torch.zeros_like(weight_VD[:0, :0] if frozen else weight_VD)
    M, C, config = tiles(x_ND)
    numbers = chunk * V or BUFFER
    width = min(max(1, numbers // (N * C)), triton.cdiv(V, C)) * C  # words in a slice
    buffer = torch.empty(N, width, dtype=x_ND.dtype, device=x_ND.device)
    dx_ND = torch.zeros(N, D, dtype=torch.float32, device=x_ND.device)
    dweight_VD = weight_VD.new_empty((0, 0) if frozen else weight_VD.shape)
    for first in range(0, V, width):
        weight_vD = weight_VD[first : first + width]
        v = len(weight_vD)
        _dlogits[(triton.cdiv(v, C), triton.cdiv(N, M))](
            x_ND, weight_vD, targets_N, lse_N, g_N, buffer, N, v, width, first,
            math.log2(math.e) / temperature, **config,
        )  # fmt: skip
        dlogits_Nv = buffer[:, :v]
        if not frozen:
            torch.mm(dlogits_Nv.T, x_ND, out=dweight_VD[first : first + width])
        dx_ND += dlogits_Nv @ weight_vD
    return dx_ND.to(x_ND.dtype), dweight_VD


@torch.library.custom_op("nanor1::linear_logprob", mutates_args=())
def _op(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(x_ND, weight_VD, targets_N, temperature)


@_op.register_fake
def _(x_ND, weight_VD, targets_N, temperature, chunk):
    return tuple(x_ND.new_empty(x_ND.shape[0], dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("nanor1::linear_logprob_backward", mutates_args=())
def _backward_op(
    g_N: Tensor, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor,
    temperature: float, chunk: int, frozen: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return backward(g_N, x_ND, weight_VD, targets_N, lse_N, temperature, chunk, frozen)


@_backward_op.register_fake
def _(g_N, x_ND, weight_VD, targets_N, lse_N, temperature, chunk, frozen):
    return x_ND.new_empty(x_ND.shape), weight_VD.new_empty((0, 0) if frozen else weight_VD.shape)


def _save(ctx, inputs, output):
    x_ND, weight_VD, targets_N, ctx.temperature, ctx.chunk = inputs
    ctx.save_for_backward(x_ND, weight_VD, targets_N, output[2])


def _gradient(ctx, g_N, _entropy, _lse):
    frozen = not ctx.needs_input_grad[1]
    dx_ND, dweight_VD = _backward_op(g_N, *ctx.saved_tensors, ctx.temperature, ctx.chunk, frozen)
    return dx_ND, None if frozen else dweight_VD, None, None, None


_op.register_autograd(_gradient, setup_context=_save)


def linear_logprob(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """log softmax(x W^T / temperature) at the targets, and each row's entropy in nats; N, N.

    Both are fp32 (float64 for float64); gradients reach x and W through the log-probabilities only.
    No more than chunk x V logits exist at a time (0: 2^27 of them), or, if that is more, one tile
    of words (256 at most) for each row. Tensors that are not contiguous are copied.
    """

    def shapes() -> str:
        x, weight, targets = (tuple(tensor.shape) for tensor in (x_ND, weight_VD, targets_N))
        return f"{x=}, {weight=}, {targets=}"

    if x_ND.ndim != 2 or weight_VD.ndim != 2 or x_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"x must be [N, D] and weight [V, D]: {shapes()}")
    if targets_N.shape != x_ND.shape[:1] or targets_N.is_floating_point():
        raise ValueError(f"targets must be one integer a row: {shapes()}, {targets_N.dtype}")
    if x_ND.dtype != weight_VD.dtype:
        raise ValueError(f"x is {x_ND.dtype} and weight {weight_VD.dtype}: convert one of them")
    if temperature <= 0 or chunk < 0:
        raise ValueError(f"{temperature=} must be above 0, and {chunk=} not below 0")
    if not use_triton(x_ND):
        return reference(x_ND, weight_VD, targets_N, temperature, chunk)
    logprobs_N, entropy_N, _ = _op(x_ND, weight_VD, targets_N, temperature, chunk)
    return logprobs_N, entropy_N.detach()
