"""The one door to the computations that decide the speed.

Each function here is the reference: plain torch, correct on every device, and what the tests
compare with. The shape letters are those of ../model.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute


def full(x: Tensor) -> Tensor:
    """bf16 and fp16 in fp32, so that sums keep their digits; fp32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(full(x), weight.shape, full(weight), eps).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def attention(
    q_BTHK: Tensor, k_BTJK: Tensor, v_BTJU: Tensor, scale: float, segments_BT: Tensor | None = None
) -> Tensor:
    """Causal attention, BTHU; J divides H, and each of the J key heads serves H/J queries.

    With segments, tokens of a row see only their own segment: that is how documents share a row.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTJK, v_BTJU))
    mask = None
    if segments_BT is not None:
        mask = (segments_BT[:, None, :, None] == segments_BT[:, None, None, :]).tril()
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=k.shape[1] < q.shape[1],
    )
    return out.transpose(1, 2)


def decode(
    q_BHK: Tensor, k_BSJK: Tensor, v_BSJU: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    """One new query a row against the first lengths_B keys of a cache, BHU."""
    S, J = k_BSJK.shape[1:3]
    unseen_BS = torch.arange(S, device=q_BHK.device) >= lengths_B[:, None]
    outs = []
    # One key head at a time, and matmul: einsum, or a product over all heads, copies the cache.
    for q_BgK, k_BSK, v_BSU in zip(q_BHK.chunk(J, 1), k_BSJK.unbind(2), v_BSJU.unbind(2)):
        scores_BgS = full(q_BgK @ k_BSK.transpose(1, 2) * scale)
        probs_BgS = scores_BgS.masked_fill_(unseen_BS[:, None], float("-inf")).softmax(-1)
        outs.append(probs_BgS.to(q_BHK.dtype) @ v_BSU)
    return torch.cat(outs, 1)


def mla_decode(q_BHX: Tensor, cache_BSX: Tensor, lengths_B: Tensor, C: int, scale: float) -> Tensor:
    """MLA in absorbed form: all heads read one shared key of X = C + R numbers, whose first C are
    the value as well. BHC."""
    keys_BSX1 = cache_BSX.unsqueeze(2)
    return decode(q_BHX, keys_BSX1, keys_BSX1[..., :C], lengths_B, scale)


def grouped_linear(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """NF: rows ends_E[e-1] to ends_E[e] of x times the matrix of expert e. Groups may be empty."""
    aligned = all(d * x_ND.element_size() % 16 == 0 for d in weight_EFD.shape[1:])
    if x_ND.dtype == torch.float64 or not aligned:  # which grouped_mm doesn't take
        sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        return torch.cat([x @ w.T for x, w in zip(x_ND.split(sizes), weight_EFD)])
    return F.grouped_mm(x_ND, weight_EFD.transpose(1, 2), offs=ends_E.to(torch.int32))


def linear_logprob(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """log softmax(x W^T / temperature) at the targets, and the entropy of each row; N, N.

    The logits of only `chunk` rows exist at a time, in the backward pass too (0: what fits 2^27
    numbers, 0.5 GB).
    """
    chunk = chunk or max(1, 2**27 // len(weight_VD))

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
