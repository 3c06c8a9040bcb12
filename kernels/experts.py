"""The matrix products of a mixture of experts: each row times the matrix of its own expert.

Rows are sorted by expert, and ends_E has where each expert's rows end. Row w, of expert e(w), reads
token rows_W[w] of x, so that the A copies of a token are never made in memory:

    grouped linear    y_w = W_e x_n                    n = rows_W[w], e = e(w)
    grouped SwiGLU    h_w = silu(G_e x_n) (U_e x_n)    silu(g) = g sigmoid(g)

    dx_n = sum of W_e^T dy_w over the copies w of token n
    dW_e = sum of dy_w x_n^T over the rows w of expert e; zero for an expert without rows
    dg_w = dh_w u_w s (1 + g_w (1 - s)),  du_w = dh_w g_w s,  with s = sigmoid(g_w)

How many rows an expert has is known on the GPU only, and asking would make the CPU wait. So the
grid has as many tiles of rows as the worst case needs, and each program finds its expert itself:
an expert with n rows fills cdiv(n, BM) tiles, and tile t belongs to the first expert whose running
total of tiles is above t. Nothing is padded, and programs past the last tile return at once.

SwiGLU keeps two sums per output, gate and up, and writes only their product. Its backward runs the
same products again instead of keeping gate and up: they are 2 A F numbers a token and layer, 4.6
times x itself in DeepSeek-R1, and making them again costs 2 products beside the 9 of a layer's
forward and backward.

Read next: logprob.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import arch, precision, tl, triton, use_triton


def grouped_linear_reference(
    x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor, rows_W: Tensor | None = None
) -> Tensor:
    x_WD = x_ND if rows_W is None else x_ND.index_select(0, rows_W)
    aligned = all(d * x_WD.element_size() % 16 == 0 for d in weight_EFD.shape[1:])
    if x_WD.dtype == torch.float64 or not aligned:  # which grouped_mm doesn't take
        # Every expert on every row, most of them 0: nothing here depends on how the rows are split,
        # so that a step can be recorded.
        expert_W = torch.searchsorted(ends_E, torch.arange(len(x_WD)).to(ends_E), right=True)
        own_EW1 = torch.arange(len(ends_E)).to(ends_E)[:, None, None] == expert_W[:, None]
        return sum((x_WD * own_W1) @ w.T for own_W1, w in zip(own_EW1, weight_EFD))
    return F.grouped_mm(x_WD, weight_EFD.transpose(1, 2), offs=ends_E.to(torch.int32))


def grouped_swiglu_reference(
    x_ND: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    ends_E: Tensor,
    rows_W: Tensor | None = None,
) -> Tensor:
    x_WD = x_ND if rows_W is None else x_ND.index_select(0, rows_W)
    gate_WF = grouped_linear_reference(x_WD, gate_EFD, ends_E)
    return F.silu(gate_WF) * grouped_linear_reference(x_WD, up_EFD, ends_E)


# ---- the kernels. A tile has M rows and N columns of the output; K is what is summed over. -------


@triton.jit
def _find_tile(
    ends_ptr, E, T, columns, BLOCK_E: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr
):
    """This program's expert, first row, the end of that expert's rows, and its tile of columns.

    The expert is BLOCK_E or more where the program has nothing to do.
    """
    # Programs that run together share x and weights in L2: GROUP tiles of rows by all columns.
    pid = tl.program_id(0)
    first = pid // (GROUP * columns) * GROUP
    height = tl.minimum(T - first, GROUP)
    within = pid % (GROUP * columns)
    t = first + within % height
    e_E = tl.arange(0, BLOCK_E)
    end_E = tl.load(ends_ptr + e_E, mask=e_E < E, other=0).to(tl.int32)
    start_E = tl.load(ends_ptr + e_E - 1, mask=(e_E > 0) & (e_E < E), other=0).to(tl.int32)
    tiles_E = tl.cumsum((end_E - start_E + BM - 1) // BM)
    e = tl.sum((tiles_E <= t).to(tl.int32))
    before = tl.max(tl.where(tiles_E <= t, tiles_E, 0))  # tiles of the experts before e
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0).to(tl.int32)
    end = tl.load(ends_ptr + e, mask=e < E, other=0).to(tl.int32)
    return e, start + (t - before) * BM, end, within // height


@triton.jit
def _token(w, end, rows_ptr):
    """The row of x that each row w reads. Past the expert's end it is the last row's once more,
    so that loads of x need no mask; what comes of them is not stored."""
    w = tl.minimum(w, end - 1)
    if rows_ptr is not None:
        w = tl.load(rows_ptr + w)
    return w.to(tl.int64)


@triton.jit
def _product(
    acc_MN, x_M1_ptr, x_k, weight_1N_ptr, weight_k, fits_1N, K, BK: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k_K = tl.arange(0, BK)
    x_MK_ptr = x_M1_ptr + k_K[None, :] * x_k
    weight_KN_ptr = weight_1N_ptr + k_K[:, None] * weight_k
    for k in range(0, K, BK):
        if EVEN_K:
            x_MK = tl.load(x_MK_ptr)
            weight_KN = tl.load(weight_KN_ptr, mask=fits_1N, other=0.0)
        else:
            x_MK = tl.load(x_MK_ptr, mask=(k + k_K < K)[None, :], other=0.0)
            weight_KN = tl.load(weight_KN_ptr, mask=fits_1N & (k + k_K < K)[:, None], other=0.0)
        acc_MN = tl.dot(x_MK, weight_KN, acc_MN, input_precision=PRECISION)
        x_MK_ptr += BK * x_k
        weight_KN_ptr += BK * weight_k
    return acc_MN


@triton.jit
def _grouped_linear(
    x_ptr, x2_ptr, weight_ptr, weight2_ptr, y_ptr, ends_ptr, rows_ptr, E, T, N, K,
    x_w, x_k, weight_e, weight_n, weight_k, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x weight^T, or with x2: x weight^T + x2 weight2^T."""
    e, first, end, column = _find_tile(ends_ptr, E, T, tl.cdiv(N, BN), BLOCK_E, BM, GROUP)
    if e >= E:
        return
    w_M = first + tl.arange(0, BM)
    n_1N = (column * BN + tl.arange(0, BN))[None, :]
    x_M1 = (_token(w_M, end, rows_ptr) * x_w)[:, None]
    weight_1N = e.to(tl.int64) * weight_e + n_1N * weight_n
    acc_MN = tl.zeros((BM, BN), tl.float32)
    acc_MN = _product(acc_MN, x_ptr + x_M1, x_k, weight_ptr + weight_1N, weight_k, n_1N < N,
                      K, BK, EVEN_K, PRECISION)  # fmt: skip
    if x2_ptr is not None:
        acc_MN = _product(acc_MN, x2_ptr + x_M1, x_k, weight2_ptr + weight_1N, weight_k, n_1N < N,
                          K, BK, EVEN_K, PRECISION)  # fmt: skip
    y_MN_ptr = y_ptr + first.to(tl.int64) * N + tl.arange(0, BM)[:, None] * N + n_1N
    tl.store(y_MN_ptr, acc_MN, mask=(w_M < end)[:, None] & (n_1N < N))


@triton.jit
def _grouped_swiglu(
    x_ptr, gate_ptr, up_ptr, dh_ptr, out_ptr, out2_ptr, ends_ptr, rows_ptr, E, T, N, K,
    x_w, x_k, weight_e, weight_n, weight_k, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = silu(gate) up; or with dh: out, out2 = the gradients of gate and up."""
    e, first, end, column = _find_tile(ends_ptr, E, T, tl.cdiv(N, BN), BLOCK_E, BM, GROUP)
    if e >= E:
        return
    w_M = first + tl.arange(0, BM)
    n_1N = (column * BN + tl.arange(0, BN))[None, :]
    k_K = tl.arange(0, BK)
    x_MK_ptr = x_ptr + (_token(w_M, end, rows_ptr) * x_w)[:, None] + k_K[None, :] * x_k
    weight_KN = e.to(tl.int64) * weight_e + n_1N * weight_n + k_K[:, None] * weight_k
    gate_KN_ptr, up_KN_ptr = gate_ptr + weight_KN, up_ptr + weight_KN
    gate_MN = tl.zeros((BM, BN), tl.float32)
    up_MN = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if EVEN_K:
            x_MK = tl.load(x_MK_ptr)
            gate_KN = tl.load(gate_KN_ptr, mask=n_1N < N, other=0.0)
            up_KN = tl.load(up_KN_ptr, mask=n_1N < N, other=0.0)
        else:
            fits_KN = (n_1N < N) & (k + k_K < K)[:, None]
            x_MK = tl.load(x_MK_ptr, mask=(k + k_K < K)[None, :], other=0.0)
            gate_KN = tl.load(gate_KN_ptr, mask=fits_KN, other=0.0)
            up_KN = tl.load(up_KN_ptr, mask=fits_KN, other=0.0)
        gate_MN = tl.dot(x_MK, gate_KN, gate_MN, input_precision=PRECISION)
        up_MN = tl.dot(x_MK, up_KN, up_MN, input_precision=PRECISION)
        x_MK_ptr += BK * x_k
        gate_KN_ptr += BK * weight_k
        up_KN_ptr += BK * weight_k
    mask_MN = (w_M < end)[:, None] & (n_1N < N)
    # One 64-bit number for the tile and 32-bit ones within it: fewer registers.
    tile, within_MN = first.to(tl.int64) * N, tl.arange(0, BM)[:, None] * N + n_1N
    sigmoid_MN = 1 / (1 + tl.exp2(gate_MN * -1.4426950408889634))  # log2(e)
    silu_MN = gate_MN * sigmoid_MN
    if dh_ptr is None:
        tl.store(out_ptr + tile + within_MN, silu_MN * up_MN, mask=mask_MN)
    else:
        dh_MN = tl.load(dh_ptr + tile + within_MN, mask=mask_MN, other=0.0).to(tl.float32)
        dgate_MN = dh_MN * up_MN * (sigmoid_MN + silu_MN * (1 - sigmoid_MN))
        tl.store(out_ptr + tile + within_MN, dgate_MN, mask=mask_MN)
        tl.store(out2_ptr + tile + within_MN, dh_MN * silu_MN, mask=mask_MN)


@triton.jit
def _grouped_wgrad(
    dy_ptr, x_ptr, dweight_ptr, ends_ptr, rows_ptr, M, N, dy_w, dy_m, x_w, x_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight_EMN of one expert: here M is F, N is D, and K runs over the expert's rows."""
    m_M, n_N = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    e = tl.program_id(2)
    start = tl.load(ends_ptr + e - 1, mask=e > 0, other=0).to(tl.int32)
    end = tl.load(ends_ptr + e).to(tl.int32)
    acc_MN = tl.zeros((BM, BN), tl.float32)
    for w in range(start, end, BK):
        w_K = w + tl.arange(0, BK)
        dy_KM_ptr = dy_ptr + w_K[:, None].to(tl.int64) * dy_w + m_M[None, :] * dy_m
        x_KN_ptr = x_ptr + (_token(w_K, end, rows_ptr) * x_w)[:, None] + n_N[None, :] * x_n
        # Zeros past the expert's end: the next rows are another expert's.
        dy_KM = tl.load(dy_KM_ptr, mask=(w_K < end)[:, None] & (m_M < M)[None, :], other=0.0)
        x_KN = tl.load(x_KN_ptr, mask=(n_N < N)[None, :], other=0.0)
        acc_MN = tl.dot(tl.trans(dy_KM), x_KN, acc_MN, input_precision=PRECISION)
    offset_MN = (e.to(tl.int64) * M + m_M[:, None]) * N + n_N[None, :]
    mask_MN = (m_M < M)[:, None] & (n_N < N)[None, :]
    tl.store(dweight_ptr + offset_MN, acc_MN, mask=mask_MN)


@triton.jit
def _sum_copies(dx_WD_ptr, dx_ND_ptr, order_ptr, ends_ptr, D, BLOCK: tl.constexpr):
    """The gradient of a token: the sum over its copies, always in the same order."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(ends_ptr + n - 1, mask=n > 0, other=0)
    end = tl.load(ends_ptr + n)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(start, end):
        w = tl.load(order_ptr + i)
        acc += tl.load(dx_WD_ptr + w * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(dx_ND_ptr + n * D + d, acc, mask=d < D)


# ---- the launchers -------------------------------------------------------------------------------

# BM, BN, BK, warps, stages by arch and bytes of a number.
TILE_OF_4 = dict(
    linear=(128, 128, 16, 8, 3), swiglu=(128, 64, 16, 8, 3), wgrad=(128, 128, 16, 8, 3)
)
TINY = dict(linear=(16, 32, 16, 4, 1), swiglu=(16, 16, 16, 4, 1), wgrad=(32, 16, 16, 4, 1))
TILES = {
    0: {2: TINY, 4: TINY},
    80: {4: TILE_OF_4, 2: dict(linear=(128, 128, 64, 8, 4), swiglu=(128, 64, 32, 8, 4),
                               wgrad=(128, 256, 64, 8, 3))},
    89: {4: TILE_OF_4, 2: dict(linear=(128, 128, 32, 8, 4), swiglu=(128, 64, 32, 8, 4),
                               wgrad=(128, 128, 32, 8, 4))},
    90: {4: TILE_OF_4, 2: dict(linear=(128, 256, 64, 8, 3), swiglu=(128, 128, 64, 8, 3),
                               wgrad=(128, 256, 64, 8, 3))},
}  # fmt: skip
GROUP = 8  # tiles of rows that go through all columns together


def _grid(W: int, weight_ENK: Tensor, kind: str) -> tuple[tuple, dict]:
    """The grid and the constants of the two kernels whose programs find their own tile."""
    E, N, K = weight_ENK.shape
    BM, BN, BK, warps, stages = TILES[arch()][weight_ENK.element_size()][kind]
    # The worst case: each expert that has rows leaves one row in its last tile.
    T = (W + min(E, W) * (BM - 1)) // BM
    sizes = dict(E=E, T=T, N=N, K=K, BLOCK_E=triton.next_power_of_2(E), GROUP=GROUP)
    tile = dict(BM=BM, BN=BN, BK=BK, EVEN_K=K % BK == 0, num_warps=warps, num_stages=stages)
    return (T * triton.cdiv(N, BN),), sizes | tile


def linear_launch(
    x: Tensor,
    weight_ENK: Tensor,
    ends_E: Tensor,
    rows_W: Tensor | None = None,
    x2: Tensor | None = None,
    weight2_ENK: Tensor | None = None,
) -> Tensor:
    """x weight^T + x2 weight2^T by groups, WN."""
    W = len(x) if rows_W is None else len(rows_W)
    y_WN = x.new_empty(W, weight_ENK.shape[1])
    if not W:
        return y_WN
    if x2 is not None:
        assert x2.stride() == x.stride(), f"{x2.stride()=} {x.stride()=}"
        weight_ENK, weight2_ENK = _same_strides(weight_ENK, weight2_ENK)
    grid, sizes = _grid(W, weight_ENK, "linear")
    _grouped_linear[grid](
        x, x2, weight_ENK, weight2_ENK, y_WN, ends_E, rows_W,
        x_w=x.stride(0), x_k=x.stride(1), weight_e=weight_ENK.stride(0),
        weight_n=weight_ENK.stride(1), weight_k=weight_ENK.stride(2),
        PRECISION=precision(x), **sizes,
    )  # fmt: skip
    return y_WN


def _same_strides(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (a, b) if a.stride() == b.stride() else (a.contiguous(), b.contiguous())


def swiglu_launch(
    x_ND: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    ends_E: Tensor,
    rows_W: Tensor | None = None,
    dh_WF: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_WF and nothing; or, given dh_WF, the gradients dgate_WF and dup_WF."""
    W = len(x_ND) if rows_W is None else len(rows_W)
    out_WF = x_ND.new_empty(W, gate_EFD.shape[1])
    out2_WF = None
    if dh_WF is not None:
        dh_WF, out2_WF = dh_WF.contiguous(), torch.empty_like(out_WF)
    if not W:
        return out_WF, out2_WF
    gate_EFD, up_EFD = _same_strides(gate_EFD, up_EFD)
    grid, sizes = _grid(W, gate_EFD, "swiglu")
    _grouped_swiglu[grid](
        x_ND, gate_EFD, up_EFD, dh_WF, out_WF, out2_WF, ends_E, rows_W,
        x_w=x_ND.stride(0), x_k=x_ND.stride(1), weight_e=gate_EFD.stride(0),
        weight_n=gate_EFD.stride(1), weight_k=gate_EFD.stride(2),
        PRECISION=precision(x_ND), **sizes,
    )  # fmt: skip
    return out_WF, out2_WF


def wgrad_launch(
    dy_WF: Tensor, x_ND: Tensor, ends_E: Tensor, rows_W: Tensor | None = None
) -> Tensor:
    """For each expert, dy^T x over its rows; EFD."""
    E, F, D = len(ends_E), dy_WF.shape[1], x_ND.shape[1]
    dweight_EFD = x_ND.new_empty(E, F, D)
    BM, BN, BK, warps, stages = TILES[arch()][x_ND.element_size()]["wgrad"]
    if rows_W is not None:
        stages += 2  # which the loads of rows_W take from the pipeline, as x waits for them
    _grouped_wgrad[(triton.cdiv(F, BM), triton.cdiv(D, BN), E)](
        dy_WF, x_ND, dweight_EFD, ends_E, rows_W, F, D, *dy_WF.stride(), *x_ND.stride(),
        BM, BN, BK, precision(x_ND), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dweight_EFD


def sum_copies_launch(dx_WD: Tensor, rows_W: Tensor, N: int) -> Tensor:
    """dx_ND: row n is the sum of the rows w of dx_WD with rows_W[w] = n."""
    D = dx_WD.shape[1]
    dx_ND = dx_WD.new_empty(N, D)
    sorted_W, order_W = rows_W.sort(stable=True)
    tokens_N = torch.arange(N, device=rows_W.device, dtype=rows_W.dtype)
    ends_N = torch.searchsorted(sorted_W, tokens_N, right=True)  # bincount would wait for the GPU
    if N:
        grid = (N, triton.cdiv(D, 1024))
        _sum_copies[grid](dx_WD, dx_ND, order_W, ends_N, D, BLOCK=1024)
    return dx_ND


# ---- the operators that torch sees ---------------------------------------------------------------


@torch.library.custom_op("nanor1::grouped_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, ends: Tensor, rows: Tensor | None) -> Tensor:
    return linear_launch(x, weight, ends, rows)


@torch.library.custom_op("nanor1::grouped_swiglu", mutates_args=())
def _swiglu(x: Tensor, gate: Tensor, up: Tensor, ends: Tensor, rows: Tensor | None) -> Tensor:
    return swiglu_launch(x, gate, up, ends, rows)[0]


@torch.library.custom_op("nanor1::grouped_swiglu_backward", mutates_args=())
def _dswiglu(
    dh: Tensor, x: Tensor, gate: Tensor, up: Tensor, ends: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    return swiglu_launch(x, gate, up, ends, rows, dh)


@torch.library.custom_op("nanor1::grouped_dgrad", mutates_args=())
def _dgrad(
    dys: list[Tensor], weights: list[Tensor], ends: Tensor, rows: Tensor | None, N: int
) -> Tensor:
    """The gradient of x_ND through one weight or two: the same product, weights transposed."""
    (dy, dy2), (weight, weight2) = [*dys, None][:2], [*(w.mT for w in weights), None][:2]
    dx_WD = linear_launch(dy, weight, ends, None, dy2, weight2)
    return dx_WD if rows is None else sum_copies_launch(dx_WD, rows, N)


@torch.library.custom_op("nanor1::grouped_wgrad", mutates_args=())
def _wgrad(dy: Tensor, x: Tensor, ends: Tensor, rows: Tensor | None) -> Tensor:
    return wgrad_launch(dy, x, ends, rows)


@_linear.register_fake
def _(x, weight, ends, rows):
    return x.new_empty((x if rows is None else rows).shape[0], weight.shape[1])


@_swiglu.register_fake
def _(x, gate, up, ends, rows):
    return x.new_empty((x if rows is None else rows).shape[0], gate.shape[1])


@_dswiglu.register_fake
def _(dh, x, gate, up, ends, rows):
    return x.new_empty(dh.shape), x.new_empty(dh.shape)


@_dgrad.register_fake
def _(dys, weights, ends, rows, N):
    return dys[0].new_empty(N, weights[0].shape[2])


@_wgrad.register_fake
def _(dy, x, ends, rows):
    return x.new_empty(len(ends), dy.shape[1], x.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx, dy):
    x, weight, ends, rows = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx = _dgrad([dy], [weight], ends, rows, x.shape[0]) if need_x else None
    return dx, _wgrad(dy, x, ends, rows) if need_weight else None, None, None


def _swiglu_backward(ctx, dh):
    x, gate, up, ends, rows = ctx.saved_tensors
    need_x, need_gate, need_up = ctx.needs_input_grad[:3]
    dgate, dup = _dswiglu(dh, x, gate, up, ends, rows)
    dx = _dgrad([dgate, dup], [gate, up], ends, rows, x.shape[0]) if need_x else None
    dgate_EFD = _wgrad(dgate, x, ends, rows) if need_gate else None
    dup_EFD = _wgrad(dup, x, ends, rows) if need_up else None
    return dx, dgate_EFD, dup_EFD, None, None


_linear.register_autograd(_linear_backward, setup_context=_save)
_swiglu.register_autograd(_swiglu_backward, setup_context=_save)


# ---- what the model calls ------------------------------------------------------------------------


def grouped_linear(
    x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor, rows_W: Tensor | None = None
) -> Tensor:
    """WF: output row w, ends_E[e-1] <= w < ends_E[e], is x[rows_W[w]] times the matrix of expert e.

    ends_E and rows_W are int32 or int64; without rows_W, row w reads x[w]. Groups may be empty, and
    ends_E[-1] must be W. Raises ValueError for shapes and dtypes that don't fit.
    """
    _check(x_ND, dict(weight_EFD=weight_EFD), ends_E, rows_W)
    if use_triton(x_ND):
        return _linear(x_ND, weight_EFD, ends_E, rows_W)
    return grouped_linear_reference(x_ND, weight_EFD, ends_E, rows_W)


def grouped_swiglu(
    x_ND: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    ends_E: Tensor,
    rows_W: Tensor | None = None,
) -> Tensor:
    """WF: silu(gate) up, where gate and up are grouped_linear of gate_EFD and of up_EFD."""
    _check(x_ND, dict(gate_EFD=gate_EFD, up_EFD=up_EFD), ends_E, rows_W)
    if use_triton(x_ND):
        return _swiglu(x_ND, gate_EFD, up_EFD, ends_E, rows_W)
    return grouped_swiglu_reference(x_ND, gate_EFD, up_EFD, ends_E, rows_W)


def _check(x_ND: Tensor, weights: dict[str, Tensor], ends_E: Tensor, rows_W: Tensor | None) -> None:
    if x_ND.ndim != 2:
        raise ValueError(f"x_ND has shape {tuple(x_ND.shape)}; it must be N, D: flatten it")
    for name, index in (("ends_E", ends_E), ("rows_W", rows_W)):
        if index is None or (index.ndim == 1 and index.dtype in (torch.int32, torch.int64)):
            continue
        raise ValueError(
            f"{name} is {index.dtype} of shape {tuple(index.shape)}; it must be int32 or int64 "
            "of one dimension"
        )
    for name, weight in weights.items():
        right = (len(ends_E), next(iter(weights.values())).shape[1], x_ND.shape[1])
        if weight.shape != right:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}; it must be {right}: E as ends_E, "
                "F the same for gate and up, D as x_ND"
            )
        if weight.dtype != x_ND.dtype:
            raise ValueError(f"{name} is {weight.dtype}; it must be {x_ND.dtype} as x_ND: cast one")
