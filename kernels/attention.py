"""Causal attention over packed documents, without the matrix of scores: flash attention.

For one head, with query t seeing the keys s of its own document, starts[t] <= s <= t:

    S = scale Q K^T       P = softmax over the keys seen, of S       O = P V

S and P have T^2 numbers. They are made in tiles that live and die inside the GPU's cores, so memory
holds O(T) numbers and is hardly touched. Softmax needs a whole row of S; the way out is to carry,
while tiles of keys pass by, each row's maximum m and sum l so far, and to shrink what was summed
with a smaller maximum (online softmax):

    m' = max(m, max S)    O' = e^(m - m') O + e^(S - m') V    l' = e^(m - m') l + sum e^(S - m')

and at the end O / l. One number a row is kept for the backward pass, the log of the sum of
exponentials, lse = m + log l, from which any tile of P can be made again: P = e^(S - lse). Then

    dV = P^T dO     dP = dO V^T     dS = P (dP - delta), delta = rowsum(P dP) = rowsum(dO O)
    dQ = scale dS K               dK = scale dS^T Q

The backward pass is two kernels, one that owns queries and passes over keys (dQ) and one that owns
keys and passes over queries (dK, dV): scores are made twice, but no two programs add to one number,
so the result is the same every time. Documents are intervals, so what a tile sees is an interval
too: tiles outside it are never loaded, and those that each query of a tile sees whole need no mask.
Exponentials are powers of two, which is what GPUs compute: e^x = 2^(x log2 e); lse is kept in base
2 as well, and scale_log2 is the scale times log2 e.

FlashAttention (arXiv 2205.14135), 2 (2307.08691). Read next: decode.py, one query at a time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import arch, precision, tl, triton, use_triton

LOG2_E = math.log2(math.e)


def attention_reference(
    q_BTHK: Tensor, k_BTJK: Tensor, v_BTJU: Tensor, scale: float, starts_BT: Tensor | None = None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTJK, v_BTJU))
    mask = None
    if starts_BT is not None:
        t_T = torch.arange(q.shape[2], device=q.device)
        mask = (starts_BT[:, None, :, None] <= t_T) & (t_T <= t_T[:, None])
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=k.shape[1] < q.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)


# ---- kernels -------------------------------------------------------------------------------------
# M: a tile of queries. N: a tile of keys. A key's K numbers are two parts, each a power of two as
# tiles must be: the first MAIN and, in R, the REST (192 = 128 + 64); U is padded with zeros. Where
# there is no REST, a tile of R is still named, for Triton's sake, and never used.


@triton.jit
def _load(ptr, row, stride, T, FIRST: tl.constexpr, WIDTH: tl.constexpr,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """A tile of a matrix [T, WIDTH] from `row` and the column FIRST on; zero outside. CHECK False:
    its rows are known to be inside."""
    r = tl.arange(0, ROWS)[:, None]
    c = FIRST + tl.arange(0, COLUMNS)[None, :]
    # One 64-bit number for the tile, 32-bit ones within it: fewer registers.
    at = ptr + row.to(tl.int64) * stride + (r * stride + c)
    if FIRST + COLUMNS > WIDTH:
        tile = tl.load(at, mask=(row + r < T) & (c < WIDTH), other=0.0)
    elif CHECK:
        tile = tl.load(at, mask=row + r < T, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _store(ptr, tile, row, stride, T, FIRST: tl.constexpr, WIDTH: tl.constexpr,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    r = tl.arange(0, ROWS)[:, None]
    c = FIRST + tl.arange(0, COLUMNS)[None, :]
    at = ptr + row.to(tl.int64) * stride + (r * stride + c)
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(row + r < T) & (c < WIDTH))


@triton.jit
def _keys_seen(starts_ptr, m0, T, BM: tl.constexpr, BN: tl.constexpr):
    """What queries m0 to m0 + BM see: `tiles` tiles of keys from the key `first` on. Each query
    sees the first `full` of them whole: they need no mask."""
    end = tl.minimum(m0 + BM, T)
    first = tl.load(starts_ptr + m0).to(tl.int32)
    one_document = tl.load(starts_ptr + end - 1) == first
    full = tl.where(one_document, (m0 + 1 - first) // BN, 0)
    return first, tl.cdiv(end - first, BN), full


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, starts_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, scale_log2, T, H,
    GROUP: tl.constexpr, K: tl.constexpr, U: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The last queries see the most keys: they start first, so that short programs fill the end.
    # Neighbours share a head, whose keys stay in the L2 cache.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_ptr += b * q_strides[0] + h * q_strides[2]
    k_ptr += b * k_strides[0] + h // GROUP * k_strides[2]
    v_ptr += b * v_strides[0] + h // GROUP * v_strides[2]
    starts_ptr += b * T

    q_MK = _load(q_ptr, m0, q_strides[1], T, 0, K, BM, MAIN, True)
    q_MR = _load(q_ptr, m0, q_strides[1], T, MAIN, K, BM, REST, True) if REST else q_MK
    m = m0 + tl.arange(0, BM)
    start_M = tl.load(starts_ptr + m, mask=m < T, other=0)
    # Finite: for a row that has seen no key yet, -inf would make inf - inf.
    max_M = tl.full([BM], -1e30, tl.float32)
    sum_M = tl.zeros([BM], tl.float32)
    acc_MU = tl.zeros([BM, BU], tl.float32)

    first, tiles, full = _keys_seen(starts_ptr, m0, T, BM, BN)
    # Compiled twice: without the mask's code for the full tiles, with it for the rest.
    for MASKED in tl.static_range(2):
        for i in range(full if MASKED else 0, tiles if MASKED else full):
            n0 = first + i * BN
            k_NK = _load(k_ptr, n0, k_strides[1], T, 0, K, BN, MAIN, MASKED)
            scores_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION)
            if REST:
                k_NR = _load(k_ptr, n0, k_strides[1], T, MAIN, K, BN, REST, MASKED)
                scores_MN = tl.dot(q_MR, tl.trans(k_NR), scores_MN, input_precision=PRECISION)
            if MASKED:
                n = n0 + tl.arange(0, BN)[None, :]
                seen_MN = (start_M[:, None] <= n) & (n <= m[:, None])
                scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
            # scale_log2 is positive, so the largest score stays the largest.
            new_max_M = tl.maximum(max_M, tl.max(scores_MN, 1) * scale_log2)
            probs_MN = tl.exp2(scores_MN * scale_log2 - new_max_M[:, None])
            shrink_M = tl.exp2(max_M - new_max_M)
            sum_M = sum_M * shrink_M + tl.sum(probs_MN, 1)
            v_NU = _load(v_ptr, n0, v_strides[1], T, 0, U, BN, BU, MASKED)
            acc_MU = tl.dot(probs_MN.to(v_NU.dtype), v_NU, acc_MU * shrink_M[:, None],
                            input_precision=PRECISION)  # fmt: skip
            max_M = new_max_M

    out_ptr += (b * T * H + h) * U
    _store(out_ptr, acc_MU / sum_M[:, None], m0, H * U, T, 0, U, BM, BU)
    tl.store(lse_ptr + (b * H + h) * T + m, max_M + tl.log2(sum_M), mask=m < T)


@triton.jit
def _backward_q(
    q_ptr, k_ptr, v_ptr, starts_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, scale_log2, T, H, scale,
    GROUP: tl.constexpr, K: tl.constexpr, U: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_ptr += b * q_strides[0] + h * q_strides[2]
    k_ptr += b * k_strides[0] + h // GROUP * k_strides[2]
    v_ptr += b * v_strides[0] + h // GROUP * v_strides[2]
    starts_ptr += b * T

    m = m0 + tl.arange(0, BM)
    start_M = tl.load(starts_ptr + m, mask=m < T, other=0)
    lse_M = tl.load(lse_ptr + (b * H + h) * T + m, mask=m < T, other=0.0)
    out_MU = _load(out_ptr + (b * T * H + h) * U, m0, H * U, T, 0, U, BM, BU, True)
    dout_MU = _load(dout_ptr + (b * T * H + h) * U, m0, H * U, T, 0, U, BM, BU, True)
    delta_M = tl.sum(out_MU.to(tl.float32) * dout_MU.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * T + m, delta_M, mask=m < T)
    q_MK = _load(q_ptr, m0, q_strides[1], T, 0, K, BM, MAIN, True)
    q_MR = _load(q_ptr, m0, q_strides[1], T, MAIN, K, BM, REST, True) if REST else q_MK
    dq_MK = tl.zeros([BM, MAIN], tl.float32)
    dq_MR = tl.zeros([BM, REST if REST else 16], tl.float32)

    first, tiles, full = _keys_seen(starts_ptr, m0, T, BM, BN)
    for MASKED in tl.static_range(2):
        for i in range(full if MASKED else 0, tiles if MASKED else full):
            n0 = first + i * BN
            k_NK = _load(k_ptr, n0, k_strides[1], T, 0, K, BN, MAIN, MASKED)
            scores_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION)
            if REST:
                k_NR = _load(k_ptr, n0, k_strides[1], T, MAIN, K, BN, REST, MASKED)
                scores_MN = tl.dot(q_MR, tl.trans(k_NR), scores_MN, input_precision=PRECISION)
            if MASKED:
                n = n0 + tl.arange(0, BN)[None, :]
                seen_MN = (start_M[:, None] <= n) & (n <= m[:, None])
                scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
            probs_MN = tl.exp2(scores_MN * scale_log2 - lse_M[:, None])
            v_NU = _load(v_ptr, n0, v_strides[1], T, 0, U, BN, BU, MASKED)
            dprobs_MN = tl.dot(dout_MU, tl.trans(v_NU), input_precision=PRECISION)
            dscores_MN = (probs_MN * (dprobs_MN - delta_M[:, None])).to(k_NK.dtype)
            dq_MK = tl.dot(dscores_MN, k_NK, dq_MK, input_precision=PRECISION)
            if REST:
                dq_MR = tl.dot(dscores_MN, k_NR, dq_MR, input_precision=PRECISION)

    dq_ptr += (b * T * H + h) * K
    _store(dq_ptr, dq_MK * scale, m0, H * K, T, 0, K, BM, MAIN)
    if REST:
        _store(dq_ptr, dq_MR * scale, m0, H * K, T, MAIN, K, BM, REST)


@triton.jit
def _backward_kv(
    q_ptr, k_ptr, v_ptr, ends_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, scale_log2, T, H, scale,
    GROUP: tl.constexpr, K: tl.constexpr, U: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n0 = tl.program_id(0) * BN  # the first keys are seen by the most queries, and start first
    j, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k_ptr += b * k_strides[0] + j * k_strides[2]
    v_ptr += b * v_strides[0] + j * v_strides[2]
    ends_ptr += b * T

    k_NK = _load(k_ptr, n0, k_strides[1], T, 0, K, BN, MAIN, True)
    k_NR = _load(k_ptr, n0, k_strides[1], T, MAIN, K, BN, REST, True) if REST else k_NK
    v_NU = _load(v_ptr, n0, v_strides[1], T, 0, U, BN, BU, True)
    dk_NK = tl.zeros([BN, MAIN], tl.float32)
    dk_NR = tl.zeros([BN, REST if REST else 16], tl.float32)
    dv_NU = tl.zeros([BN, BU], tl.float32)

    # `tiles` tiles of queries, from n0 on, see some of these keys. `full` of them, from the tile
    # `before` on, see each key: no mask. Those before have keys to come, those after lost some.
    n = n0 + tl.arange(0, BN)
    end_N = tl.load(ends_ptr + n, mask=n < T, other=0)
    last = tl.minimum(n0 + BN, T) - 1
    tiles = tl.cdiv(tl.load(ends_ptr + last) - n0, BM)
    before = tl.cdiv(last - n0, BM)
    full = tl.maximum((tl.load(ends_ptr + n0) - n0) // BM - before, 0)
    for MASKED in tl.static_range(2):
        # Each tile of queries, of each of the query heads that this key head serves.
        for ig in range(GROUP * (tiles - full if MASKED else full)):
            i, h = ig // GROUP, j * GROUP + ig % GROUP
            m0 = n0 + (i + full * (i >= before) if MASKED else i + before) * BM
            m = m0 + tl.arange(0, BM)
            q_head = q_ptr + b * q_strides[0] + h * q_strides[2]
            q_MK = _load(q_head, m0, q_strides[1], T, 0, K, BM, MAIN, MASKED)
            scores_NM = tl.dot(k_NK, tl.trans(q_MK), input_precision=PRECISION)
            if REST:
                q_MR = _load(q_head, m0, q_strides[1], T, MAIN, K, BM, REST, MASKED)
                scores_NM = tl.dot(k_NR, tl.trans(q_MR), scores_NM, input_precision=PRECISION)
            if MASKED:
                seen_NM = (n[:, None] <= m[None, :]) & (m[None, :] < end_N[:, None])
                scores_NM = tl.where(seen_NM, scores_NM, float("-inf"))
            lse_M = tl.load(lse_ptr + (b * H + h) * T + m, mask=m < T, other=0.0)
            probs_NM = tl.exp2(scores_NM * scale_log2 - lse_M[None, :])
            dout_head = dout_ptr + (b * T * H + h) * U
            dout_MU = _load(dout_head, m0, H * U, T, 0, U, BM, BU, MASKED)
            dv_NU = tl.dot(probs_NM.to(dout_MU.dtype), dout_MU, dv_NU, input_precision=PRECISION)
            dprobs_NM = tl.dot(v_NU, tl.trans(dout_MU), input_precision=PRECISION)
            delta_M = tl.load(delta_ptr + (b * H + h) * T + m, mask=m < T, other=0.0)
            dscores_NM = (probs_NM * (dprobs_NM - delta_M[None, :])).to(q_MK.dtype)
            dk_NK = tl.dot(dscores_NM, q_MK, dk_NK, input_precision=PRECISION)
            if REST:
                dk_NR = tl.dot(dscores_NM, q_MR, dk_NR, input_precision=PRECISION)

    J = H // GROUP
    dk_ptr += (b * T * J + j) * K
    _store(dk_ptr, dk_NK * scale, n0, J * K, T, 0, K, BN, MAIN)
    if REST:
        _store(dk_ptr, dk_NR * scale, n0, J * K, T, MAIN, K, BN, REST)
    _store(dv_ptr + (b * T * J + j) * U, dv_NU, n0, J * U, T, 0, U, BN, BU)


# ---- launchers -----------------------------------------------------------------------------------

# By architecture and bytes a number, for K + U, padded, up to the first column: forward, dQ, dK and
# dV, each (queries BM, keys BN, warps, stages).
TILES = {
    0: {4: [(512, (64, 32, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1))]},
    80: {
        2: [
            (128, (128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3)),
            (256, (128, 32, 8, 3), (64, 64, 8, 2), (32, 64, 8, 3)),
            (320, (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2)),
            (512, (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
        ],
        4: [
            (320, (32, 32, 8, 1), (32, 16, 8, 2), (16, 32, 8, 2)),
            (512, (16, 16, 8, 1), (16, 16, 4, 2), (16, 16, 8, 2)),
        ],
    },
    90: {
        2: [
            (128, (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
            (256, (128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3)),
            (320, (128, 64, 8, 3), (128, 64, 8, 3), (32, 64, 8, 4)),
            (512, (128, 32, 8, 3), (64, 32, 8, 2), (32, 32, 8, 2)),
        ],
        4: [
            (320, (32, 32, 8, 1), (32, 16, 8, 2), (16, 32, 8, 2)),
            (512, (16, 16, 8, 1), (16, 16, 4, 2), (16, 16, 8, 2)),
        ],
    },
}
TILES[0][2] = TILES[0][4]
TILES[89] = TILES[80]  # tiles that fit both


def _tiles(kernel: int, q: Tensor, constants: dict) -> dict:
    """The tiles of kernel 0 (forward), 1 (dQ) or 2 (dK and dV)."""
    width = constants["MAIN"] + constants["REST"] + constants["BU"]  # K + U as padded
    row = next(row for row in TILES[arch()][q.element_size()] if width <= row[0])
    return dict(zip(("BM", "BN", "num_warps", "num_stages"), row[1 + kernel]))


def _shared(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[tuple, dict]:
    """What the three kernels are given alike: positional arguments and constants."""
    T, H, K = q.shape[1:]
    J, U = v.shape[2:]
    power = triton.next_power_of_2
    main = max(16, power(K + 1) // 2)  # the largest power of two in K; tl.dot takes 16 and more
    rest = max(16, power(K - main)) if K > main else 0
    strides = tuple(x.stride()[:3] for x in (q, k, v))
    constants = dict(
        GROUP=H // J, K=K, U=U, MAIN=main, REST=rest, BU=max(16, power(U)), PRECISION=precision(q)
    )  # fmt: skip
    return (*strides, scale * LOG2_E, T, H), constants


def _rows(*tensors: Tensor) -> list[Tensor]:
    """The kernels take any strides but that of the last dimension, which is 1."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out_BTHU and lse_BHT, in base 2."""
    q, k, v = _rows(q, k, v)
    B, T, H, _ = q.shape
    out = q.new_empty(B, T, H, v.shape[-1])
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    if out.numel():
        arguments, constants = _shared(q, k, v, scale)
        tiles = _tiles(0, q, constants)
        _forward[(triton.cdiv(T, tiles["BM"]), H, B)](
            q, k, v, starts, out, lse, *arguments, **constants, **tiles
        )
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, out: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq_BTHK, dk_BTJK, dv_BTJU."""
    q, k, v = _rows(q, k, v)
    dout = dout.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not out.numel():
        return dq, dk, dv
    B, T, H, _ = q.shape
    # ends[s]: how many queries t have starts[t] <= s, hence the first that no longer sees s.
    keys_BT = torch.arange(T, device=q.device, dtype=starts.dtype).expand(B, T).contiguous()
    ends = torch.searchsorted(starts, keys_BT, right=True, out_int32=True)
    delta = torch.empty_like(lse)
    arguments, constants = _shared(q, k, v, scale)
    tiles = _tiles(1, q, constants)
    _backward_q[(triton.cdiv(T, tiles["BM"]), H, B)](
        q, k, v, starts, out, lse, dout, delta, dq, *arguments, scale, **constants, **tiles
    )
    tiles = _tiles(2, q, constants)  # after _backward_q, which makes delta
    _backward_kv[(triton.cdiv(T, tiles["BN"]), k.shape[2], B)](
        q, k, v, ends, lse, dout, delta, dk, dv, *arguments, scale, **constants, **tiles
    )
    return dq, dk, dv


# ---- the operator --------------------------------------------------------------------------------

_attention = torch.library.custom_op("nanor1::attention", attention_forward, mutates_args=())
_attention_backward = torch.library.custom_op(
    "nanor1::attention_backward", attention_backward, mutates_args=()
)


@_attention.register_fake
def _(q, k, v, starts, scale):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)


@_attention_backward.register_fake
def _(dout, q, k, v, starts, out, lse, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse):
    dq, dk, dv = _attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, None


_attention.register_autograd(_gradients, setup_context=_save)


def attention(
    q_BTHK: Tensor, k_BTJK: Tensor, v_BTJU: Tensor, scale: float, starts_BT: Tensor | None = None
) -> Tensor:
    """Causal attention, BTHU; J divides H, and each of the J key heads serves H/J query heads.

    starts_BT, int32 or int64: where in its row the document of each token begins. A token sees its
    own document up to itself. Documents follow each other without gaps, so starts rise along a row
    and starts[t] <= t, which is not checked (it would make the GPU wait). None: one document a row.
    """
    (B, T, H, K), (J, U) = q_BTHK.shape, v_BTJU.shape[2:]
    if k_BTJK.shape != (B, T, J, K) or v_BTJU.shape != (B, T, J, U) or H % J:
        raise ValueError(
            f"q {tuple(q_BTHK.shape)}, k {tuple(k_BTJK.shape)}, v {tuple(v_BTJU.shape)}: they must"
            " be BTHK, BTJK and BTJU, where J divides H"
        )
    if not q_BTHK.dtype == k_BTJK.dtype == v_BTJU.dtype:
        raise ValueError(
            f"q {q_BTHK.dtype}, k {k_BTJK.dtype}, v {v_BTJU.dtype}: cast them to one dtype"
        )
    if max(K, U) > 256:
        raise ValueError(f"heads of K={K} and U={U} numbers: up to 256 each")
    if scale <= 0:
        raise ValueError(f"scale={scale}: must be positive (usually 1 / sqrt(K))")
    if starts_BT is not None and (
        starts_BT.shape != (B, T) or starts_BT.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"starts_BT {tuple(starts_BT.shape)} {starts_BT.dtype}: must be {(B, T)}, and int32 or"
            " int64"
        )
    if not use_triton(q_BTHK):
        return attention_reference(q_BTHK, k_BTJK, v_BTJU, scale, starts_BT)
    if starts_BT is None:
        starts_BT = torch.zeros(B, T, dtype=torch.int32, device=q_BTHK.device)
    return _attention(q_BTHK, k_BTJK, v_BTJU, starts_BT.contiguous(), scale)[0]
