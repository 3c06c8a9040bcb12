"""Attention of one new token a row against a paged cache: what each step of sampling reads.

    scores_s = scale q . k_s,   probs = softmax(scores),   out = sum_s probs_s v_s,   s < length

MLA in absorbed form (V3 2.1.1): all heads read one key of X = C + R numbers, a latent and a rotated
part, and its first C numbers are the value as well. Grouped-query attention: a token's entry is J
keys and then J values, and key head j serves the query heads j H/J to (j+1) H/J - 1. The first is
the second with J = 1 and a value that lies where the key does, so one kernel computes both.

Nearly all the time goes into reading the cache: once, and by many programs at a time.

- Flash decoding: there are few rows, so their keys are split among programs. Each keeps the running
  maximum m, the sum l of exp2(score - m) and the sum of exp2(score - m) v over its keys, and leaves
  acc / l and m + log2 l; a second kernel adds these up with the weights exp2(m + log2 l). exp2 is
  what the hardware has: log2(e) goes into the scale.
- A split is a fixed number of keys. So a row's result is the same, bit for bit, whatever rows are
  beside it and however much room the cache has. Splits beyond a row's length end at once: how many
  are launched follows from shapes, and the CPU never waits to learn a length.
- The tile of keys is the matrix's tall side, and the heads the narrow one: 16 heads would not fill
  the 64 rows that the tensor cores of an H100 take. All heads of a tile use a key that was read
  once, and MLA reads its values out of the tile of keys.

Read next: ../sample.py, which fills the cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import arch, full, precision, tl, triton, use_triton

# Y tokens a page, P pages a row, Z pages in all; I splits, of G keys each; M heads and N keys in a
# tile. The kernels' key is C + R numbers and their value C, which in GQA means K + 0 and K.


def reference(
    q_BHK: Tensor, pages_ZYX: Tensor, table_BP: Tensor | None, lengths_B: Tensor,
    J: int, C: int, values_at: int, scale: float,
) -> Tensor:  # fmt: skip
    """BHC. Key head j's key is at jK of an entry, and its value of C numbers at values_at + jC."""
    cache_BSX = pages_ZYX if table_BP is None else pages_ZYX[table_BP].flatten(1, 2)
    S, K = cache_BSX.shape[1], q_BHK.shape[-1]
    unseen_BS = torch.arange(S, device=q_BHK.device) >= lengths_B[:, None]
    if table_BP is not None:  # a page's rest may hold anything, and 0 x NaN is NaN; it is our copy
        cache_BSX.masked_fill_(unseen_BS[..., None], 0)
    if C == K:  # GQA: torch's own kernel, with a group's heads in the place of positions
        k_BJSK = cache_BSX[..., : J * K].unflatten(-1, (J, K)).transpose(1, 2)
        v_BJSK = cache_BSX[..., values_at:].unflatten(-1, (J, K)).transpose(1, 2)
        seen_B11S = ~unseen_BS[:, None, None]
        return F.scaled_dot_product_attention(
            q_BHK.unflatten(1, (J, -1)), k_BJSK, v_BJSK, attn_mask=seen_B11S, scale=scale
        ).flatten(1, 2)
    # MLA. bmm: einsum takes longer to set up, and torch's kernel to take a narrower value.
    scores_BHS = full(torch.bmm(q_BHK * scale, cache_BSX.transpose(1, 2)))
    probs_BHS = scores_BHS.masked_fill_(unseen_BS[:, None], float("-inf")).softmax(-1)
    return torch.bmm(probs_BHS.to(q_BHK.dtype), cache_BSX[..., :C])


@triton.jit
def _attend(
    q_ptr, pages_ptr, table_ptr, lengths_ptr, part_ptr, lse_ptr,
    scale, stride_z, stride_y, P, H, heads, blocks, values_at,
    Y: tl.constexpr, SHARED: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    C_PAD: tl.constexpr, R_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs side by side are the blocks of heads of one split: they find its keys in L2.
    j, split, b = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    first = split * G
    if first < length:
        in_head_M = tl.program_id(0) % blocks * M + tl.arange(0, M)  # among the heads of key head j
        is_head_M = in_head_M < heads
        h_M = j * heads + in_head_M
        c, r = tl.arange(0, C_PAD), tl.arange(0, R_PAD)
        q_M_ptr = q_ptr + (b * H + h_M) * (C + R)
        mask_CM = (c < C)[:, None] & is_head_M[None, :]
        q_CM = tl.load(q_M_ptr[None, :] + c[:, None], mask=mask_CM, other=0.0)
        if R > 0:
            mask_RM = (r < R)[:, None] & is_head_M[None, :]
            q_RM = tl.load(q_M_ptr[None, :] + C + r[:, None], mask=mask_RM, other=0.0)
        m_M = tl.full([M], float("-inf"), tl.float32)
        l_M = tl.zeros([M], tl.float32)
        acc_CM = tl.zeros([C_PAD, M], tl.float32)
        stop = tl.minimum(first + G, length)
        for start in range(first, stop, N):
            s_N = start + tl.arange(0, N)
            seen_N = s_N < stop
            s_N = tl.minimum(s_N, stop - 1)  # past the end the last key again, but with no weight
            if Y == 0:  # no table: row b is page b
                entry_N_ptr = pages_ptr + b * stride_z + s_N.to(tl.int64) * stride_y
            else:
                page_N = tl.load(table_ptr + b * P + s_N // Y).to(tl.int64)
                entry_N_ptr = pages_ptr + page_N * stride_z + s_N % Y * stride_y
            key_NC_ptr = entry_N_ptr[:, None] + j * (C + R) + c[None, :]
            k_NC = tl.load(key_NC_ptr, mask=(c < C)[None, :], other=0.0)
            scores_NM = tl.dot(k_NC, q_CM, input_precision=PRECISION)
            if R > 0:
                key_NR_ptr = entry_N_ptr[:, None] + j * (C + R) + C + r[None, :]
                k_NR = tl.load(key_NR_ptr, mask=(r < R)[None, :], other=0.0)
                scores_NM = tl.dot(k_NR, q_RM, scores_NM, input_precision=PRECISION)
            scores_NM = tl.where(seen_N[:, None], scores_NM * scale, float("-inf"))
            max_M = tl.maximum(m_M, tl.max(scores_NM, 0))  # finite: first < length
            probs_NM = tl.exp2(scores_NM - max_M[None, :])
            shrink_M = tl.exp2(m_M - max_M)
            m_M, l_M = max_M, l_M * shrink_M + tl.sum(probs_NM, 0)
            if SHARED:
                v_NC = k_NC
            else:
                value_NC_ptr = entry_N_ptr[:, None] + values_at + j * C + c[None, :]
                v_NC = tl.load(value_NC_ptr, mask=(c < C)[None, :], other=0.0)
            acc_CM = tl.dot(
                tl.trans(v_NC), probs_NM.to(v_NC.dtype), acc_CM * shrink_M[None, :],
                input_precision=PRECISION,
            )  # fmt: skip
        part_M = (b * tl.num_programs(1) + split) * H + h_M
        tl.store(lse_ptr + part_M, m_M + tl.log2(l_M), mask=is_head_M)
        out_CM = (acc_CM / l_M[None, :]).to(part_ptr.dtype.element_ty)
        tl.store(part_ptr + part_M[None, :] * C + c[:, None], out_CM, mask=mask_CM)


@triton.jit
def _merge(
    part_ptr, lse_ptr, lengths_ptr, out_ptr, splits, H, C: tl.constexpr,
    G: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    written = tl.cdiv(tl.load(lengths_ptr + b).to(tl.int32), G)  # the other splits ended at once
    m, l = float("-inf"), 0.0
    acc_C = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, written, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        part_I = (b * splits + i) * H + h
        lse_I = tl.load(lse_ptr + part_I, mask=i < written, other=float("-inf"))
        mask_IC = (i < written)[:, None] & (c < C)[None, :]
        part_IC = tl.load(part_ptr + part_I[:, None] * C + c[None, :], mask=mask_IC, other=0.0)
        new = tl.maximum(m, tl.max(lse_I))
        weight_I, shrink = tl.exp2(lse_I - new), tl.exp2(m - new)
        m, l = new, l * shrink + tl.sum(weight_I)
        acc_C = acc_C * shrink + tl.sum(weight_I[:, None] * part_IC, 0)
    tl.store(out_ptr + (b * H + h) * C + c, (acc_C / l).to(out_ptr.dtype.element_ty), mask=c < C)


# arch -> kind -> (heads M, keys N in a tile, keys G in a split, warps, stages). A latent of 512
# leaves less room than a head's 128 numbers; "many" is a latent under 64 heads or more.
GQA = {"gqa": (16, 64, 256, 4, 3)}
FP32 = {"gqa_fp32": (16, 32, 256, 8, 3), "mla_fp32": (16, 16, 512, 8, 3)}
TILES = {
    0: dict.fromkeys(("mla", "many", *GQA, *FP32), (16, 16, 32, 4, 3)),
    80: {"mla": (16, 32, 512, 4, 3), "many": (32, 32, 1024, 8, 3), **GQA, **FP32},
    89: {"mla": (16, 32, 512, 4, 3), "many": (32, 16, 1024, 8, 3), **GQA, **FP32},
    90: {"mla": (16, 64, 512, 8, 3), "many": (64, 32, 1024, 8, 3), **GQA, **FP32},
}


def tiles(q_BHK: Tensor, C: int, heads: int) -> tuple[int, ...]:
    """The row of the table for `heads` query heads on one key head, and values of C numbers."""
    small, fp32 = C <= 256, q_BHK.dtype == torch.float32
    kind = "gqa" if small else "many" if heads >= 64 and not fp32 else "mla"
    if fp32 and precision(q_BHK) == "tf32" and kind == "mla" and arch() == 89:
        return 16, 16, 512, 4, 2  # the tile of exact fp32 takes more shared memory in TF32
    return TILES[arch()][kind + ("_fp32" if fp32 else "")]


def launch(
    q_BHK: Tensor, pages_ZYX: Tensor, table_BP: Tensor | None, lengths_B: Tensor,
    J: int, C: int, values_at: int, scale: float,
) -> Tensor:  # fmt: skip
    """Both kernels; only the first where the cache has room for one split."""
    B, H, K = q_BHK.shape
    Y, heads, paged = pages_ZYX.shape[1], H // J, table_BP is not None
    M, N, G, warps, stages = tiles(q_BHK, C, heads)
    stages -= not paged  # with a table the first stage loads its entries, a step ahead of the keys
    P, blocks = table_BP.shape[1] if paged else 1, triton.cdiv(heads, M)
    I = triton.cdiv(P * Y, G)
    lengths_B = lengths_B.contiguous()
    out_BHC = q_BHK.new_empty(B, H, C)
    # A single split's part is the result, and is written where the result goes.
    part_BIHC = q_BHK.new_empty(B, I, H, C, dtype=torch.float32) if I > 1 else out_BHC
    lse_BIH = q_BHK.new_empty(B, I, H, dtype=torch.float32)
    _attend[(J * blocks, I, B)](
        q_BHK.contiguous(), pages_ZYX, table_BP.contiguous() if paged else None, lengths_B,
        part_BIHC, lse_BIH, scale * math.log2(math.e), pages_ZYX.stride(0), pages_ZYX.stride(1),
        P, H, heads, blocks, values_at, Y=Y if paged else 0, SHARED=values_at == 0, C=C, R=K - C,
        G=G, M=M, N=N, C_PAD=max(16, triton.next_power_of_2(C)),
        R_PAD=max(16, triton.next_power_of_2(K - C)), PRECISION=precision(q_BHK),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if I > 1:
        width = min(128, triton.next_power_of_2(C))
        _merge[(H, triton.cdiv(C, width), B)](
            part_BIHC, lse_BIH, lengths_B, out_BHC, I, H, C=C, G=G, BLOCK_I=16, BLOCK_C=width,
            num_warps=4,
        )  # fmt: skip
    return out_BHC


@torch.library.custom_op("nanor1::decode", mutates_args=())
def decode_op(
    q_BHK: Tensor, pages_ZYX: Tensor, table_BP: Tensor | None, lengths_B: Tensor,
    J: int, C: int, values_at: int, scale: float,
) -> Tensor:  # fmt: skip
    return launch(q_BHK, pages_ZYX, table_BP, lengths_B, J, C, values_at, scale)


@decode_op.register_fake
def _(q_BHK, pages_ZYX, table_BP, lengths_B, J, C, values_at, scale):
    return q_BHK.new_empty(*q_BHK.shape[:2], C)


def mla_decode(
    q_BHX: Tensor, pages_ZYX: Tensor, table_BP: Tensor | None, lengths_B: Tensor,
    C: int, scale: float,
) -> Tensor:  # fmt: skip
    """BHC: all heads of a new token against the first lengths_B entries of its row, whose X numbers
    are the key and whose first C are the value too. No gradients.

    Token s of row b is pages_ZYX[table_BP[b, s // Y], s % Y]; without a table row b is page b, and
    pages_ZYX may be a view such as cache[:, :filled]. Lengths are at least 1, and at most the room
    of a row. What lies beyond them is not read by the kernel; the reference without a table needs
    it to be finite. ValueError for shapes and dtypes that don't fit together.
    """
    if q_BHX.shape[-1] != pages_ZYX.shape[-1] or not 0 < C <= q_BHX.shape[-1]:
        raise ValueError(
            f"queries of {q_BHX.shape[-1]} numbers, entries of {pages_ZYX.shape[-1]}, {C=}:"
            " MLA's query is as long as an entry of the cache, and C at most that"
        )
    return _decode(q_BHX, pages_ZYX, table_BP, lengths_B, 1, C, 0, scale)


def gqa_decode(
    q_BHK: Tensor, pages_ZYX: Tensor, table_BP: Tensor | None, lengths_B: Tensor, scale: float
) -> Tensor:
    """BHK: query head h of a new token against key head h // (H/J) of the first lengths_B entries
    of its row. An entry is J keys and then J values, X = 2JK. The rest is as in mla_decode."""
    H, K, X = *q_BHK.shape[1:], pages_ZYX.shape[-1]
    J = X // (2 * K)
    if J < 1 or X != 2 * J * K or H % J:
        raise ValueError(
            f"{H} query heads of {K} numbers, entries of {X}: an entry holds J keys and J values of"
            f" {K} numbers each, and J divides {H}"
        )
    return _decode(q_BHK, pages_ZYX, table_BP, lengths_B, J, K, J * K, scale)


def _decode(
    q_BHK: Tensor, pages_ZYX: Tensor, table_BP: Tensor | None, lengths_B: Tensor,
    J: int, C: int, values_at: int, scale: float,
) -> Tensor:  # fmt: skip
    B, Z = len(q_BHK), len(pages_ZYX)
    if q_BHK.dtype != pages_ZYX.dtype:
        raise ValueError(f"queries are {q_BHK.dtype}, the cache is {pages_ZYX.dtype}: cast one")
    if pages_ZYX.stride(-1) != 1:
        raise ValueError(f"{pages_ZYX.stride()=}: an entry's numbers must lie side by side")
    if len(lengths_B) != B or (Z if table_BP is None else len(table_BP)) != B:
        rows = f"{Z} pages and no table" if table_BP is None else f"a table of {len(table_BP)} rows"
        raise ValueError(f"{B} queries, {len(lengths_B)} lengths, {rows}: give as many of each")
    operation = decode_op if use_triton(q_BHK) else reference
    return operation(q_BHK, pages_ZYX, table_BP, lengths_B, J, C, values_at, scale)
