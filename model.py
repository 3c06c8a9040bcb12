"""DeepSeek-V3, the model under DeepSeek-R1, and the dense models that R1 was distilled into
(Qwen2.5, Llama 3; Qwen3 beside them).

Read it beside the DeepSeek-V3 report (arXiv 2412.19437), section 2. From top to bottom: the
configuration, RMSNorm, rotary positions and YaRN, attention (MLA, then GQA for the dense models),
the MLP, the router, the experts, a block, multi-token prediction, the Transformer.

    model = Transformer(Config.preset("toy"))
    logits_BTV = model(tokens_BT)

The names of modules and fields are those of the official checkpoint and its config.json.

A tensor's name ends in its shape:

    B sequences      H heads            D model (d)          E experts (N_r)
    T positions      J key-value heads  F feed-forward       A active experts (K_r)
    S cached keys    K head dim (d_h)   C latent (d_c)       V vocabulary
    N = B*T tokens   R rope dim (d_h^R) L query latent       W = N*A copies of tokens
    M layers         U value head dim   X cached numbers     P prompts, G group
    Z pages          Y tokens of a page P pages of a row (of a table)

and in lower case k = K + R, r = R/2 pairs of dimensions, g groups of experts, d documents. In
routes, M counts the MoE layers only.

Departures from the report, each marked where it stands:
- the MTP module reads [embedding; hidden], as the released weights do; the report prints the
  opposite order;
- the toy has no MTP, query compression, YaRN and groups of experts.

Read next: sample.py (how it writes), then grpo.py (how it learns).
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import full


@dataclass(frozen=True)
class Config:
    """The fields of the official config.json; the defaults are DeepSeek-V3. Symbols: the report."""

    model_type: str = "deepseek_v3"  # or qwen2, qwen3, llama: dense, with GQA
    vocab_size: int = 129280  # V
    hidden_size: int = 7168  # d
    intermediate_size: int = 18432  # width of a dense MLP
    num_hidden_layers: int = 61  # l
    num_attention_heads: int = 128  # n_h
    initializer_range: float = 0.006
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # YaRN, or Llama 3's
    max_position_embeddings: int = 163840
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    # Multi-head latent attention; kv_lora_rank None means GQA.
    q_lora_rank: int | None = 1536  # d_c'
    kv_lora_rank: int | None = 512  # d_c
    qk_nope_head_dim: int = 128  # d_h
    qk_rope_head_dim: int = 64  # d_h^R
    v_head_dim: int = 128
    # Grouped-query attention, of the dense models.
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / heads
    # DeepSeekMoE; n_routed_experts None means an MLP in each layer.
    n_routed_experts: int | None = 256  # N_r
    n_shared_experts: int = 1  # N_s
    num_experts_per_tok: int = 8  # K_r
    moe_intermediate_size: int = 2048  # width of an expert
    first_k_dense_replace: int = 3
    n_group: int = 8  # experts are in groups (nodes in the report) ...
    topk_group: int = 4  # M: ... of which a token may use so many
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    # Multi-token prediction.
    num_nextn_predict_layers: int = 1  # D: how many further tokens each position predicts
    # What its config.json says besides, of tokens, versions and tools: carried along.
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.is_moe:
            experts, groups, used = self.n_routed_experts, self.n_group, self.topk_group
            fits = groups >= 1 and experts % groups == 0 and 1 <= used <= groups
            if not fits or self.num_experts_per_tok > experts // groups * used:
                raise ValueError(
                    f"{experts} experts in n_group={groups} groups, of which a token may use"
                    f" topk_group={used}, can't give"
                    f" num_experts_per_tok={self.num_experts_per_tok} experts"
                )
            if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
                raise ValueError(
                    f"first_k_dense_replace={self.first_k_dense_replace}: between 0 and"
                    f" num_hidden_layers={self.num_hidden_layers}"
                )
        if self.rope_type not in (None, "yarn", "llama3"):
            raise ValueError(f"rope_scaling {self.rope_scaling}: only yarn and llama3 are known")
        if self.num_nextn_predict_layers not in (0, 1):
            raise ValueError(
                f"num_nextn_predict_layers={self.num_nextn_predict_layers}: 0 or 1, as released"
            )

    @property
    def rope_type(self) -> str | None:
        return None if self.rope_scaling is None else self.rope_scaling.get("rope_type", "none")

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts is not None

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace if self.is_moe else 0

    @property
    def cache_width(self) -> int:
        """X: how many numbers the cache holds per token and layer."""
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * (self.num_key_value_heads or self.num_attention_heads) * self.gqa_head_dim

    @property
    def gqa_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def preset(cls, name: str, **changes) -> "Config":
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}: one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


PRESETS = {
    "deepseek-v3": dict(
        rope_scaling=dict(rope_type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0,
                          mscale_all_dim=1.0, original_max_position_embeddings=4096),
    ),
    # Departs from V3 4.2, shape: 0.41M parameters, without MTP, query compression, YaRN and groups
    # of experts, which so small a model does not need. The tests have shapes with all of them.
    "toy": dict(
        vocab_size=408, hidden_size=96, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=48, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=24, rope_theta=100.0, max_position_embeddings=2048,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        first_k_dense_replace=1, n_group=1, topk_group=1, routed_scaling_factor=1.0,
        num_nextn_predict_layers=0,
    ),
    "toy-student": dict(
        model_type="qwen2", vocab_size=593, hidden_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_theta=100.0,
        max_position_embeddings=2048, q_lora_rank=None, kv_lora_rank=None, n_routed_experts=None,
        first_k_dense_replace=0, num_nextn_predict_layers=0,
    ),
}  # fmt: skip


class Rows(NamedTuple):
    """Where each token of the rows stands: computed once, read by every layer."""

    positions_BT: Tensor
    turn_BTr: Tensor  # e^(i angle) of each of the r = R/2 pairs of dimensions
    starts_BT: Tensor | None = None  # where in the row each token's document starts; None: at 0
    # With a cache: the page and the place in it of each token, the pages of each row, and, where
    # one token a row is decoded, how many tokens it sees.
    page_BT: Tensor | None = None
    place_BT: Tensor | None = None
    table_BP: Tensor | None = None
    seen_B: Tensor | None = None


class Routing(NamedTuple):
    """What a router decided for each token."""

    weights_BTA: Tensor
    experts_BTA: Tensor
    scores_BTE: Tensor


def chosen_experts(routings: list[Routing]) -> Tensor:
    """BTMA, the experts of all MoE layers."""
    return torch.stack([routing.experts_BTA for routing in routings], 2).to(torch.int16)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Angle per position of each pair of dimensions, r = R/2, stretched beyond the original context
    by YaRN (2309.00071) or as Llama 3.1 does (2407.21783, 3.4.2).

    Both leave the fast pairs as they are, divide the frequency of the slow ones by `factor`, and go
    linearly from one to the other: YaRN in the number of the pair, Llama in the turns it makes.
    """
    dim = config.gqa_head_dim if config.kv_lora_rank is None else config.qk_rope_head_dim
    pair_r = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequency_r = config.rope_theta**-pair_r
    scaling = config.rope_scaling
    if scaling is None:
        return frequency_r
    context = scaling["original_max_position_embeddings"]

    def pair_that_turns(rotations: float) -> float:
        """The pair that makes so many turns within the original context."""
        return (
            dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    if config.rope_type == "yarn":
        low = max(math.floor(pair_that_turns(scaling.get("beta_fast") or 32)), 0)
        high = min(math.ceil(pair_that_turns(scaling.get("beta_slow") or 1)), dim - 1)
        place_r = torch.arange(dim // 2, dtype=torch.float32, device=device)
        slow_r = (place_r - low) / max(high - low, 0.001)
    else:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        slow_r = (high - context * frequency_r / (2 * math.pi)) / (high - low)
    slow_r = slow_r.clamp(0, 1)
    # YaRN 3.2, frequency: (1 - gamma) theta / s + gamma theta, with gamma = 1 - slow
    return frequency_r * (1 - slow_r) + frequency_r / scaling["factor"] * slow_r


def yarn_mscale(config: Config, key: str) -> float:
    """YaRN's temperature, 0.1 m ln(factor) + 1. The two keys say where it goes: mscale_all_dim onto
    the scores of all dimensions (MLA), what mscale has beyond that onto cos and sin."""
    yarn = config.rope_scaling
    if config.rope_type != "yarn" or yarn["factor"] <= 1:
        return 1.0
    m = yarn.get(key, {"mscale": 1.0, "mscale_all_dim": 0.0}[key])
    # YaRN 3.4, temperature: sqrt(1 / t) = 0.1 ln(s) + 1
    return 0.1 * m * math.log(yarn["factor"]) + 1.0


def rotate(x_BTHR: Tensor, rows: Rows, interleaved: bool) -> Tensor:
    """Turn each pair of dimensions by its angle: as one complex number, times e^(i angle).
    DeepSeek's pairs are (0, 1), (2, 3), ...; those of Qwen and Llama are (0, R/2), (1, R/2 + 1),
    ... The two are not interchangeable."""
    # RoFormer 3.2.1: (x, y) becomes (x cos a - y sin a, x sin a + y cos a), a the angle
    turn_BT1r, real_BTHR = rows.turn_BTr.unsqueeze(2), full(x_BTHR)
    if interleaved:
        pairs_BTHr = torch.view_as_complex(real_BTHR.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs_BTHr * turn_BT1r).flatten(-2).to(x_BTHR.dtype)
    pairs_BTHr = torch.view_as_complex(torch.stack(real_BTHR.chunk(2, -1), -1)) * turn_BT1r
    return torch.cat((pairs_BTHr.real, pairs_BTHr.imag), -1).to(x_BTHR.dtype)


class MLA(nn.Module):
    """Multi-head latent attention (V3 2.1.1). Keys and values of all heads are linear maps of one
    latent vector of C numbers; only it and one rotated key of R numbers are cached.

    Two forms that compute the same: the naive one builds each head's keys and values, and is the
    faster over many positions (training, prefill); the absorbed one moves the maps to the other
    side, W_UK to the query and W_UV to the output, so that decoding reads only the latents.
    """

    def __init__(self, config: Config):
        super().__init__()
        D, H, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.H, self.K, self.R = H, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.C, self.U = config.kv_lora_rank, config.v_head_dim
        self.q_lora_rank = config.q_lora_rank
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * (self.K + self.R), bias=False)
        else:
            self.q_a_proj = nn.Linear(D, self.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(self.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(self.q_lora_rank, H * (self.K + self.R), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, self.C + self.R, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.C, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.C, H * (self.K + self.U), bias=False)
        self.o_proj = nn.Linear(H * self.U, D, bias=bias)
        # YaRN's temperature belongs on the scores, over all K + R dimensions.
        self.scale = (self.K + self.R) ** -0.5 * yarn_mscale(config, "mscale_all_dim") ** 2

    def forward(self, x_BTD: Tensor, rows: Rows, cache_ZYX: Tensor | None = None) -> Tensor:
        q_BTHK, q_BTHR, latent_BTC, rope_BTR = self.project(x_BTD, rows)
        if cache_ZYX is not None:
            # V3 2.1.1, cache: cache[page, place] = [c_KV ; k_R], all that is kept of a token
            cache_ZYX[rows.page_BT, rows.place_BT] = torch.cat((latent_BTC, rope_BTR), -1)
            if rows.seen_B is not None:
                return self.o_proj(self.absorbed(q_BTHK, q_BTHR, cache_ZYX, rows))
        # V3 Eq. 11: u = W_O [o_1; ...; o_n_h]
        return self.o_proj(self.naive(q_BTHK, q_BTHR, latent_BTC, rope_BTR, rows.starts_BT))

    def project(self, x_BTD: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each head's query, its K numbers and its R rotated ones; the normed latent; the rotated
        key that all heads share."""
        B, T, _ = x_BTD.shape
        # V3 Eq. 6-9: c_Q = W_DQ h;  q = [W_UQ c_Q ; RoPE(W_QR c_Q)]
        if self.q_lora_rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BTHK, q_BTHR = q.view(B, T, self.H, -1).split((self.K, self.R), -1)
        # V3 Eq. 1, 3: c_KV = W_DKV h;  k_R = RoPE(W_KR h), one for all heads
        latent_BTC, k_BTR = self.kv_a_proj_with_mqa(x_BTD).split((self.C, self.R), -1)
        return (
            q_BTHK,
            rotate(q_BTHR, rows, interleaved=True),
            self.kv_a_layernorm(latent_BTC),
            rotate(k_BTR.unsqueeze(2), rows, interleaved=True).squeeze(2),
        )

    def naive(
        self, q_BTHK: Tensor, q_BTHR: Tensor, latent_BTC: Tensor, rope_BTR: Tensor,
        starts_BT: Tensor | None,
    ) -> Tensor:  # fmt: skip
        B, T, _ = latent_BTC.shape
        # V3 Eq. 2, 4, 5: k = [W_UK c_KV ; k_R];  v = W_UV c_KV
        kv = self.kv_b_proj(latent_BTC).view(B, T, self.H, self.K + self.U)
        k_BTHK, v_BTHU = kv.split((self.K, self.U), -1)
        shared_BTHR = rope_BTR.unsqueeze(2).expand(-1, -1, self.H, -1)
        k_BTHk = torch.cat((k_BTHK, shared_BTHR), -1)
        q_BTHk = torch.cat((q_BTHK, q_BTHR), -1)
        # V3 Eq. 10: o_t = sum_j softmax_j(q_t . k_j / sqrt(d_h + d_h^R)) v_j
        return kernels.attention(q_BTHk, k_BTHk, v_BTHU, self.scale, starts_BT).flatten(2)

    def absorbed(self, q_BTHK: Tensor, q_BTHR: Tensor, cache_ZYX: Tensor, rows: Rows) -> Tensor:
        # V3 2.1.1, absorbed: q . k = (W_UK^T q_C) . c + q_R . k_R;  o = W_UV (sum_s p_s c_s)
        # As einsums, which take longer to set up than to compute: bhk,hkc->bhc and bhc,huc->bhu.
        w_HkC = self.kv_b_proj.weight.view(self.H, self.K + self.U, self.C)
        w_uk_HKC, w_uv_HUC = w_HkC.split((self.K, self.U), 1)
        q_BHC = torch.bmm(q_BTHK[:, 0].transpose(0, 1), w_uk_HKC).transpose(0, 1)
        q_BHX = torch.cat((q_BHC, q_BTHR[:, 0]), -1)
        mixed_BHC = kernels.mla_decode(
            q_BHX, cache_ZYX, rows.table_BP, rows.seen_B, self.C, self.scale
        )
        out_HBU = torch.bmm(mixed_BHC.transpose(0, 1), w_uv_HUC.transpose(1, 2))
        return out_HBU.transpose(0, 1).flatten(1).unsqueeze(1)


class GQA(nn.Module):
    """Grouped-query attention: Llama, Qwen2 (with biases), Qwen3 (with norms in each head)."""

    def __init__(self, config: Config):
        super().__init__()
        D, H, K = config.hidden_size, config.num_attention_heads, config.gqa_head_dim
        J = config.num_key_value_heads or H
        self.K, self.scale = K, K**-0.5
        qkv_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(D, H * K, bias=qkv_bias)
        self.k_proj = nn.Linear(D, J * K, bias=qkv_bias)
        self.v_proj = nn.Linear(D, J * K, bias=qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.attention_bias)
        self.has_norms = config.model_type == "qwen3"
        if self.has_norms:
            self.q_norm = RMSNorm(K, config.rms_norm_eps)
            self.k_norm = RMSNorm(K, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, rows: Rows, cache_ZYX: Tensor | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        # -1: H or J heads, or as many of them as this process has (runtime/tensor_parallel.py).
        q_BTHK = self.q_proj(x_BTD).view(B, T, -1, self.K)
        k_BTJK = self.k_proj(x_BTD).view(B, T, -1, self.K)
        v_BTJK = self.v_proj(x_BTD).view(B, T, -1, self.K)
        if self.has_norms:
            q_BTHK, k_BTJK = self.q_norm(q_BTHK), self.k_norm(k_BTJK)
        q_BTHK = rotate(q_BTHK, rows, interleaved=False)
        k_BTJK = rotate(k_BTJK, rows, interleaved=False)
        if cache_ZYX is not None:
            cache_ZYX[rows.page_BT, rows.place_BT] = torch.cat((k_BTJK, v_BTJK), 2).flatten(2)
            if rows.seen_B is not None:
                out_BHK = kernels.gqa_decode(
                    q_BTHK[:, 0], cache_ZYX, rows.table_BP, rows.seen_B, self.scale
                )
                return self.o_proj(out_BHK.flatten(1).unsqueeze(1))
        out_BTHK = kernels.attention(q_BTHK, k_BTJK, v_BTJK, self.scale, rows.starts_BT)
        return self.o_proj(out_BTHK.flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, D: int, F: int):
        super().__init__()
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class Gate(nn.Module):
    """The router (V3 2.1.2, Eq. 13-16): which experts a token goes to, and their weights.

    The bias takes part in the selection only. It moves by a fixed step against the load
    (`balance`), and does what an auxiliary loss does elsewhere without touching the gradient.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        E = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(E))

    def forward(self, x_BTD: Tensor, route_BTA: Tensor | None = None) -> Routing:
        """With a route, its experts are taken as they are, where they are not -1."""
        config = self.config
        # V3 Eq. 15: s = sigmoid(u . e)
        scores_BTE = F.linear(full(x_BTD), full(self.weight)).sigmoid()
        experts_BTA = self.select(scores_BTE.detach() + self.e_score_correction_bias)
        if route_BTA is not None:
            experts_BTA = torch.where(route_BTA >= 0, route_BTA.long(), experts_BTA)
        # V3 Eq. 13: g = s / sum of the selected s; the bias is not in the weight
        weights_BTA = scores_BTE.gather(-1, experts_BTA)
        if config.norm_topk_prob:
            weights_BTA = weights_BTA / (weights_BTA.sum(-1, keepdim=True) + 1e-20)
        weights_BTA = weights_BTA * config.routed_scaling_factor
        return Routing(weights_BTA.to(x_BTD.dtype), experts_BTA, scores_BTE)

    def select(self, biased_BTE: Tensor) -> Tensor:
        """The A best experts within the best `topk_group` groups; a group is as good as the sum of
        its two best experts."""
        config = self.config
        if config.n_group > 1:
            grouped_BTge = biased_BTE.unflatten(-1, (config.n_group, -1))
            best = min(2, grouped_BTge.shape[-1])
            group_scores_BTg = grouped_BTge.topk(best, -1).values.sum(-1)
            kept_BTm = group_scores_BTg.topk(config.topk_group, -1).indices
            lost_BTg = torch.ones_like(group_scores_BTg).scatter(-1, kept_BTm, 0).bool()
            # -inf and not 0: with negative biases a losing expert's 0 would win.
            biased_BTE = grouped_BTge.masked_fill(lost_BTg.unsqueeze(-1), float("-inf")).flatten(-2)
        # V3 Eq. 14, 16: the K_r experts with the largest s + b (14: before there is a bias)
        return biased_BTE.topk(config.num_experts_per_tok, -1).indices

    @torch.no_grad()
    def balance(self, load_E: Tensor, step: float) -> None:
        """V3 2.1.2: after each training step, overloaded experts lose `step`, underloaded ones
        gain it. load_E counts the real tokens of the whole batch, padding left out."""
        # V3 2.1.2, bias: b_i falls by gamma if the expert is overloaded, rises by gamma if under
        self.e_score_correction_bias += step * (load_E.mean() - load_E).sign()


class Experts(nn.Module):
    """The routed experts, stacked: copies of the tokens sorted by expert, one grouped product for
    all experts, and the weighted sum back. This dispatch and combination is in `forward` and
    nowhere else, so that expert parallelism can replace it."""

    def __init__(self, E: int, D: int, F: int):
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(E, F, D))
        self.up_proj = nn.Parameter(torch.empty(E, F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))

    def forward(self, x_ND: Tensor, weights_NA: Tensor, experts_NA: Tensor) -> Tensor:
        E, (N, A) = len(self.gate_proj), experts_NA.shape
        flat_W = experts_NA.flatten()  # W: a copy of a token for each of its experts
        order_W = flat_W.argsort(stable=True)
        experts_E = torch.arange(E, device=flat_W.device)
        ends_E = torch.searchsorted(flat_W[order_W], experts_E, right=True)
        token_W = order_W // A
        out_WD = self.grouped(x_ND, ends_E, token_W)
        # Each token's A copies, put side by side again; no two programs add to the same number.
        out_NAD = out_WD.index_select(0, order_W.argsort()).unflatten(0, (N, A))
        return (out_NAD * weights_NA.unsqueeze(-1)).sum(1)

    def grouped(self, x_ND: Tensor, ends_E: Tensor, token_W: Tensor) -> Tensor:
        hidden_WF = kernels.grouped_swiglu(x_ND, self.gate_proj, self.up_proj, ends_E, token_W)
        return kernels.grouped_linear(hidden_WF, self.down_proj, ends_E)


class MoE(nn.Module):
    """The shared experts and the routed ones, whose sum a block adds to its input."""

    def __init__(self, config: Config):
        super().__init__()
        D, F = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = Experts(config.n_routed_experts, D, F)
        shared = config.n_shared_experts
        self.shared_experts = MLP(D, F * shared) if shared else None

    def forward(self, x_BTD: Tensor, route_BTA: Tensor | None = None) -> tuple[Tensor, Routing]:
        # V3 Eq. 12: h = u + sum_i shared_i(u) + sum_i g_i expert_i(u)
        routing = self.gate(x_BTD, route_BTA)
        flat = (part.flatten(0, 1) for part in (x_BTD, routing.weights_BTA, routing.experts_BTA))
        y_BTD = self.experts(*flat).view_as(x_BTD)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        return y_BTD, routing


def balance_loss(routing: Routing, documents_BT: Tensor, count: int) -> Tensor:
    """The sequence-wise balance loss (V3 Eq. 17-20), summed over documents, before alpha.

    documents_BT numbers the documents of the batch from 0 to count - 1, with -1 for padding.
    """
    scores_BTE, experts_BTA = routing.scores_BTE, routing.experts_BTA
    E, A = scores_BTE.shape[-1], experts_BTA.shape[-1]
    real_N = documents_BT.flatten() >= 0
    document_N = documents_BT.flatten()[real_N]
    # V3 Eq. 19: s' = s / sum s
    shares_NE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).flatten(0, 1)[real_N]
    chosen_NE = torch.zeros_like(shares_NE).scatter_(1, experts_BTA.flatten(0, 1)[real_N], 1.0)
    zeros_dE = shares_NE.new_zeros(count, E)
    length_d1 = torch.bincount(document_N, minlength=count).clamp(min=1).unsqueeze(1)
    # V3 Eq. 18: f_i = N_r / (K_r T) sum_t 1(token t goes to expert i)
    load_dE = zeros_dE.index_add(0, document_N, chosen_NE) * E / (A * length_d1)
    # V3 Eq. 20: P_i = 1/T sum_t s'_i,t
    share_dE = zeros_dE.index_add(0, document_N, shares_NE) / length_d1
    # V3 Eq. 17: L_Bal = alpha sum_i f_i P_i
    return (load_dE * share_dE).sum()


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = GQA(config) if config.kv_lora_rank is None else MLA(config)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.is_moe = config.is_moe and layer >= config.first_k_dense_replace
        self.mlp = MoE(config) if self.is_moe else MLP(D, config.intermediate_size)

    def forward(
        self, x_BTD: Tensor, rows: Rows, cache_ZYX: Tensor | None = None,
        route_BTA: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:  # fmt: skip
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rows, cache_ZYX)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if not self.is_moe:
            return x_BTD + self.mlp(normed_BTD), None
        y_BTD, routing = self.mlp(normed_BTD, route_BTA)
        return x_BTD + y_BTD, routing


class MTPBlock(Block):
    """Multi-token prediction (V3 2.2): one more block that sees position t and the token at t + 1,
    and predicts the token at t + 2. It shares the embedding; its head is a copy of the main one in
    released checkpoints, and the main one itself here."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.shared_head = nn.ModuleDict(dict(norm=RMSNorm(D, eps)))

    def merge(self, hidden_BTD: Tensor, next_BTD: Tensor) -> Tensor:
        # V3 Eq. 21: h' = M [RMSNorm(h); RMSNorm(Emb(t))]
        # Departs from V3 Eq. 21: [embedding; hidden], the order of the released weights.
        return self.eh_proj(torch.cat((self.enorm(next_BTD), self.hnorm(hidden_BTD)), -1))


class Transformer(nn.Module):
    """DeepSeek-V3, or a dense Qwen or Llama, as the config says."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        layers = [Block(config, i) for i in range(config.num_hidden_layers)]
        layers += [MTPBlock(config, config.num_hidden_layers)] * config.num_nextn_predict_layers
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(layers),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))  # fmt: skip
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequency_r: Tensor | None = None  # of the rotary positions, once they are needed
        self.cache_width = config.cache_width  # less where a process has some of the heads
        # Keep only what goes into each block for the backward pass, and compute the block again.
        self.recompute = False
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """V3 4.2: every matrix from N(0, 0.006^2); norms are ones, biases zeros."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Logits, BTV. See `hidden` for packed rows."""
        hidden_BTD, _ = self.hidden(tokens_BT, positions_BT)
        return self.lm_head(hidden_BTD)

    def hidden(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, *,
        cache_MZYX: Tensor | None = None, table_BP: Tensor | None = None,
        routes_BTMA: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:  # fmt: skip
        """The normed output of the last block, BTD, and what each router decided.

        positions_BT: a document starts wherever it is 0, and attends to itself alone; several may
        share a row. None: one document a row.
        cache_MZYX: from `new_cache`, filled at the positions. With T > 1 the rows are prefilled
        from position 0; with T = 1 each row goes on at its own position, in absorbed form.
        table_BP: a row's tokens are in these pages of the cache, in order; None: row b is page b.
        routes_BTMA: experts to use instead of the routers' choice (-1: the router chooses), in the
        order of the MoE layers.
        """
        if cache_MZYX is None:
            rows = self.rows(tokens_BT, positions_BT)
        else:
            rows = self.cached_rows(positions_BT, cache_MZYX.shape[2], table_BP)
        x_BTD = self.model.embed_tokens(tokens_BT)
        routings: list[Routing] = []
        again = self.recompute and torch.is_grad_enabled()
        for i, block in enumerate(self.model.layers[: self.config.num_hidden_layers]):
            cache_ZYX = None if cache_MZYX is None else cache_MZYX[i]
            route_BTA = None
            if routes_BTMA is not None and block.is_moe:
                route_BTA = routes_BTMA[:, :, len(routings)]
            run = partial(checkpoint, block, use_reentrant=False) if again else block
            x_BTD, routing = run(x_BTD, rows, cache_ZYX, route_BTA)
            if routing is not None:
                routings.append(routing)
        return self.model.norm(x_BTD), routings

    def logprobs(
        self, tokens_BT: Tensor, positions_BT: Tensor, mask_BT: Tensor, *,
        temperature: float = 1.0, routes_BTMA: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[Routing]]:  # fmt: skip
        """For each masked token, in row order: its log-probability given what stands before it in
        its document, and the entropy of that distribution (N, N); then what `hidden` returns.

        The first token of a document has nothing before it and may not be masked.
        """
        hidden_BTD, routings = self.hidden(tokens_BT, positions_BT, routes_BTMA=routes_BTMA)
        before_ND = hidden_BTD[:, :-1][mask_BT[:, 1:]]
        logprobs_N, entropy_N = kernels.linear_logprob(
            before_ND, self.lm_head.weight, tokens_BT[mask_BT], temperature
        )
        return logprobs_N, entropy_N, hidden_BTD, routings

    def rows(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> Rows:
        B, T = tokens_BT.shape
        place_T = torch.arange(T, device=tokens_BT.device)
        if positions_BT is None:
            positions_BT = place_T.expand(B, T)
            return Rows(positions_BT, self.turn(positions_BT))
        # Padding, at position -1, is a document of its own.
        starts_BT = place_T - positions_BT.clamp(min=0)
        return Rows(positions_BT, self.turn(positions_BT), starts_BT)

    def cached_rows(self, positions_BT: Tensor, Y: int, table_BP: Tensor | None) -> Rows:
        """Y: tokens of a page."""
        B, T = positions_BT.shape
        row_B1 = torch.arange(B, device=positions_BT.device).unsqueeze(1)
        if table_BP is None:
            page_BT, place_BT = row_B1, positions_BT
        else:
            # PagedAttention (2309.06180): page = table[position // Y], place = position % Y
            page_BT, place_BT = table_BP[row_B1, positions_BT // Y], positions_BT % Y
        # The sum of V3 Eq. 10 goes over the keys at 0 .. position: seen = position + 1
        seen_B = positions_BT[:, 0] + 1 if T == 1 else None
        turn_BTr = self.turn(positions_BT)
        return Rows(positions_BT, turn_BTr, None, page_BT, place_BT, table_BP, seen_B)

    def turn(self, positions_BT: Tensor) -> Tensor:
        """e^(i angle), BTr, of every pair of dimensions at every position."""
        weight = self.lm_head.weight
        if self.frequency_r is None or self.frequency_r.device != weight.device:
            self.frequency_r = rope_frequencies(self.config, weight.device)
        angles_BTr = positions_BT.unsqueeze(-1) * self.frequency_r
        factor = yarn_mscale(self.config, "mscale") / yarn_mscale(self.config, "mscale_all_dim")
        turn_BTr = torch.polar(torch.full_like(angles_BTr, factor), angles_BTr)
        return turn_BTr.to(torch.complex128) if weight.dtype == torch.float64 else turn_BTr

    def predict_second_next(
        self, hidden_BTD: Tensor, tokens_BT: Tensor, positions_BT: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """MTP: the hidden states, BT'D with T' = T - 1, from which lm_head predicts the token at
        t + 2, given those of `hidden` and the tokens. At the last position of a document the result
        means nothing: leave it out of the loss."""
        mtp = self.model.layers[self.config.num_hidden_layers]
        earlier = None if positions_BT is None else positions_BT[:, :-1]
        rows = self.rows(tokens_BT[:, :-1], earlier)
        x_BTD = mtp.merge(hidden_BTD[:, :-1], self.model.embed_tokens(tokens_BT[:, 1:]))
        # V3 Eq. 22: h = TRM(h')
        x_BTD, routing = mtp(x_BTD, rows)
        return mtp.shared_head.norm(x_BTD), routing

    def new_cache(self, pages: int, tokens: int) -> Tensor:
        """`pages` pages of so many tokens: one vector per token and layer, MZYX."""
        weight = self.lm_head.weight
        shape = (self.config.num_hidden_layers, pages, tokens, self.cache_width)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    def num_parameters(self, mtp: bool = False) -> int:
        """With or without the multi-token prediction layer."""
        skipped = f"model.layers.{self.config.num_hidden_layers}."
        kept = (p for name, p in self.named_parameters() if mtp or not name.startswith(skipped))
        return sum(p.numel() for p in kept)
