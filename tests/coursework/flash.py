"""Exercise 12's file: what the forward kernel of kernels/attention.py computes, in plain torch, for
one head and one document."""

import torch
from torch import Tensor


def flash_attention(
    q_TK: Tensor, k_TK: Tensor, v_TU: Tensor, scale: float, tile: int
) -> tuple[Tensor, Tensor]:
    """Causal attention, TU, and of each query the log of its sum of exponentials, T, from `tile`
    keys at a time: no tensor may have more than T x tile numbers (if K and U are no larger), and no
    sum, maximum or product may go over more than a tile."""
    T = len(q_TK)
    max_T = q_TK.new_full((T,), float("-inf"))
    sum_T = q_TK.new_zeros(T)
    acc_TU = q_TK.new_zeros(T, v_TU.shape[1])
    for first in range(0, T, tile):
        k_NK, v_NU = k_TK[first : first + tile], v_TU[first : first + tile]
        key_N = torch.arange(first, first + len(k_NK), device=q_TK.device)
        unseen_TN = key_N > torch.arange(T, device=q_TK.device)[:, None]
        # FlashAttention: S = scale q k, of a tile of keys; -inf where a key is in the future
        scores_TN = (scale * q_TK @ k_NK.T).masked_fill(unseen_TN, float("-inf"))
        # Online softmax: m' = max(m, max S); what was summed with a smaller maximum shrinks:
        #   l' = e^(m - m') l + sum e^(S - m')        O' = e^(m - m') O + e^(S - m') V
        new_max_T = torch.maximum(max_T, scores_TN.amax(1))
        probs_TN = (scores_TN - new_max_T[:, None]).exp()
        shrink_T = (max_T - new_max_T).exp()
        sum_T = shrink_T * sum_T + probs_TN.sum(1)
        acc_TU = shrink_T[:, None] * acc_TU + probs_TN @ v_NU
        max_T = new_max_T
    # FlashAttention: out = O / l, lse = m + log l
    return acc_TU / sum_T[:, None], max_T + sum_T.log()
