"""model.py: attention in all its forms, positions, the router, the experts, the sizes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import sft
from data.packing import Packed, pack
from model import (
    GQA,
    MLA,
    Config,
    Experts,
    Gate,
    Routing,
    Rows,
    Transformer,
    balance_loss,
    rope_frequencies,
    rotate,
    yarn_mscale,
)  # fmt: skip
from runtime.configs import from_json, to_json
from runtime.pretrained import official

# mscale and mscale_all_dim differ, so that neither the softmax scale nor the factor on cos and sin
# is one by chance. The pairs of the R = 8 dimensions fall on both ends of YaRN's ramp.
YARN = dict(rope_type="yarn", factor=8.0, beta_fast=4, beta_slow=1, mscale=1.0, mscale_all_dim=0.7,
            original_max_position_embeddings=32)  # fmt: skip
# Top 3 of 8 experts, 2 of 4 groups: fewer than all, of both.
DEEPSEEK = Config.preset(
    "toy", vocab_size=23, hidden_size=16, intermediate_size=20, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8,
    v_head_dim=5, rope_scaling=YARN, max_position_embeddings=256, n_routed_experts=8,
    num_experts_per_tok=3, moe_intermediate_size=12, n_group=4, topk_group=2,
    routed_scaling_factor=2.5, num_nextn_predict_layers=1,
)  # fmt: skip
DENSE = dict(vocab_size=23, hidden_size=24, intermediate_size=20, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, rope_theta=100.0)  # fmt: skip
CONFIGS = {
    "deepseek": DEEPSEEK,
    "deepseek-no-q-lora": replace(
        DEEPSEEK, q_lora_rank=None, rope_scaling=None, n_shared_experts=0
    ),
    "deepseek-bias": replace(DEEPSEEK, attention_bias=True, norm_topk_prob=False),
    "qwen2": from_json(dict(model_type="qwen2", tie_word_embeddings=True, **DENSE)),
    "qwen3": from_json(dict(model_type="qwen3", head_dim=10, **DENSE)),
    "llama": from_json(dict(model_type="llama", attention_bias=True, **DENSE)),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
deepseeks = pytest.mark.parametrize("name", ["deepseek", "deepseek-no-q-lora", "deepseek-bias"])


def build(config: Config, seed: int = 0) -> Transformer:
    """A float64 model of which every parameter matters: no bias is zero and no norm is one."""
    torch.manual_seed(seed)
    model = Transformer(config).double()
    randomize(model)
    return model


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.dim() > 1:
            tensor.normal_(0, 1.5 * tensor.shape[-1] ** -0.5)
        elif "norm" in name:
            tensor.normal_(1, 0.3)
        else:
            tensor.normal_(0, 0.3)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(seed))


# ---- attention -------------------------------------------------------------------------


def turned(vector, position: int, freq) -> np.ndarray:
    """A vector with its neighbours (0, 1), (2, 3), ... as complex numbers times e^(i angle)."""
    pairs = np.asarray(vector).reshape(-1, 2)
    z = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * position * np.asarray(freq))
    return np.stack((z.real, z.imag), -1).reshape(-1)


def turned_half(vector, position: int, freq) -> np.ndarray:
    """The same with the pairs (i, i + R/2)."""
    vector = np.asarray(vector)
    z = (vector[: len(freq)] + 1j * vector[len(freq) :]) * np.exp(1j * position * np.asarray(freq))
    return np.concatenate((z.real, z.imag))


def normed(x: np.ndarray, norm: nn.Module) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + norm.eps) * norm.weight.numpy()


def softmax(scores: list[float]) -> np.ndarray:
    exp = np.exp(np.array(scores) - max(scores))
    return exp / exp.sum()


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek", "deepseek-no-q-lora"])
def test_v3_eq_1_to_11_token_by_token_and_head_by_head(name):
    """V3 Eq. 1-11, token by token and head by head."""
    config = CONFIGS[name]
    model = build(config)
    mla, T = model.model.layers[0].self_attn, 7
    x_TD = torch.randn(T, config.hidden_size, dtype=torch.float64)
    out_TD = mla(x_TD[None], model.rows(torch.zeros(1, T, dtype=torch.long), None))[0]
    # 2 pi / frequency is a pair's wavelength; the frequencies have a test of their own.
    freq = rope_frequencies(config, torch.device("cpu")).double().numpy()
    K, R, U, C = 6, 8, 5, 10
    stretch, factor, scale = 1.0, 1.0, (K + R) ** -0.5
    if config.rope_scaling:
        stretch = 0.1 * 0.7 * math.log(8) + 1
        factor = (0.1 * 1.0 * math.log(8) + 1) / stretch
        scale *= stretch**2
    weight = {k: v.numpy() for k, v in mla.state_dict().items()}
    queries, keys, values = [], [], []
    for t, h in enumerate(x_TD.numpy()):
        c_q = h
        if config.q_lora_rank:
            c_q = normed(weight["q_a_proj.weight"] @ h, mla.q_a_layernorm)
        w_q = weight["q_b_proj.weight" if config.q_lora_rank else "q_proj.weight"]
        q = (w_q @ c_q).reshape(2, K + R)
        down = weight["kv_a_proj_with_mqa.weight"] @ h
        kv = (weight["kv_b_proj.weight"] @ normed(down[:C], mla.kv_a_layernorm)).reshape(2, K + U)
        shared = turned(down[C:], t, freq) * factor
        queries.append(
            [np.concatenate((q[i, :K], turned(q[i, K:], t, freq) * factor)) for i in (0, 1)]
        )
        keys.append([np.concatenate((kv[i, :K], shared)) for i in (0, 1)])
        values.append([kv[i, K:] for i in (0, 1)])
        heads = [
            softmax([queries[t][i] @ keys[j][i] * scale for j in range(t + 1)])
            @ np.array([values[j][i] for j in range(t + 1)])
            for i in (0, 1)
        ]
        expected = weight["o_proj.weight"] @ np.concatenate(heads)
        # The angles are float32's, as in the reference implementation.
        close(out_TD[t], torch.from_numpy(expected), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_gqa_computes_grouped_attention_head_by_head(name):
    """Head i reads key head i // 2; biases (Qwen2) and norms (Qwen3) come before the rotation."""
    config = CONFIGS[name]
    model = build(config)
    gqa, T = model.model.layers[0].self_attn, 6
    x_TD = torch.randn(T, config.hidden_size, dtype=torch.float64)
    out_TD = gqa(x_TD[None], model.rows(torch.zeros(1, T, dtype=torch.long), None))[0]
    K = 10 if name == "qwen3" else 6
    freq = [100.0 ** (-2 * i / K) for i in range(K // 2)]
    weight = {k: v.numpy() for k, v in gqa.state_dict().items()}
    assert ("q_proj.bias" in weight) == (name in ("qwen2", "llama"))
    assert ("o_proj.bias" in weight) == (name == "llama")

    def heads(part: str, h: np.ndarray, t: int) -> np.ndarray:
        out = (weight[f"{part}_proj.weight"] @ h + weight.get(f"{part}_proj.bias", 0)).reshape(
            -1, K
        )
        if part != "v":
            if name == "qwen3":
                out = np.array([normed(each, getattr(gqa, f"{part}_norm")) for each in out])
            out = np.array([turned_half(each, t, freq) for each in out])
        return out

    keys, values = [], []
    for t, h in enumerate(x_TD.numpy()):
        q = heads("q", h, t)
        keys.append(heads("k", h, t))
        values.append(heads("v", h, t))
        mixed = [
            softmax([q[i] @ keys[j][i // 2] * K**-0.5 for j in range(t + 1)])
            @ np.array([values[j][i // 2] for j in range(t + 1)])
            for i in range(4)
        ]
        expected = weight["o_proj.weight"] @ np.concatenate(mixed) + weight.get("o_proj.bias", 0)
        close(out_TD[t], torch.from_numpy(expected), 1e-5)


@torch.no_grad()
@deepseeks
def test_v3_2_1_1_absorbed_attention_equals_naive(name):
    config = CONFIGS[name]
    model = build(config)
    mla, T = model.model.layers[1].self_attn, 9
    x_BTD = torch.randn(3, T, config.hidden_size, dtype=torch.float64)
    positions_BT = torch.arange(T).expand(3, T)
    rows = model.rows(positions_BT, None)
    q_BTHK, q_BTHR, latent_BTC, rope_BTR = mla.project(x_BTD, rows)
    naive = mla.naive(q_BTHK, q_BTHR, latent_BTC, rope_BTR, None)
    cache_BSX = torch.cat((latent_BTC, rope_BTR), -1)
    for t in range(T):
        here = model.cached_rows(positions_BT[:, t : t + 1], T, None)
        q = q_BTHK[:, t : t + 1], q_BTHR[:, t : t + 1]
        close(mla.absorbed(*q, cache_BSX, here)[:, 0], naive[:, t])


@torch.no_grad()
@every_config
def test_v3_2_1_1_cache_decoding_equals_the_uncached_forward(config):
    """Prompts of 1, 4 and 7 tokens, prefilled together, then decoded each at its own position."""
    model = build(config)
    lengths, new = [1, 4, 7], 6
    tokens_BT = random_tokens(3, 7 + new)
    # Whatever stands in unused places of the cache is not seen.
    cache_MZYX = model.new_cache(3, 7 + new).fill_(1e3)
    assert cache_MZYX.shape == (config.num_hidden_layers, 3, 7 + new, config.cache_width)
    positions_BT = torch.arange(7).expand(3, 7)
    prompt_BTD, _ = model.hidden(tokens_BT[:, :7], positions_BT, cache_MZYX=cache_MZYX)
    alone = [model.hidden(tokens_BT[b : b + 1, : n + new])[0][0] for b, n in enumerate(lengths)]
    for b, n in enumerate(lengths):
        close(prompt_BTD[b, :n], alone[b][:n])
    at_B = torch.tensor(lengths)
    for step in range(new):
        next_B1 = tokens_BT.gather(1, at_B[:, None])
        hidden_B1D, _ = model.hidden(next_B1, at_B[:, None], cache_MZYX=cache_MZYX)
        for b, n in enumerate(lengths):
            close(hidden_B1D[b, 0], alone[b][n + step])
        at_B = at_B + 1


@torch.no_grad()
@every_config
def test_prompts_of_one_token_are_prefilled_as_any_other(config):
    """A single position takes the absorbed form from the start."""
    model = build(config)
    tokens_BT = random_tokens(2, 5)
    cache_MZYX = model.new_cache(2, 5)
    full_BTD, _ = model.hidden(tokens_BT)
    for t in range(5):
        at_B1 = torch.full((2, 1), t)
        hidden_B1D, _ = model.hidden(tokens_BT[:, t : t + 1], at_B1, cache_MZYX=cache_MZYX)
        close(hidden_B1D[:, 0], full_BTD[:, t])


@torch.no_grad()
@every_config
def test_a_cache_in_shuffled_pages_equals_one_in_order(config):
    model = build(config)
    tokens_BT = random_tokens(2, 9)
    full_BTD, _ = model.hidden(tokens_BT)
    cache_MZYX = model.new_cache(8, 3).fill_(float("nan"))  # what isn't written isn't read
    table_BP = torch.tensor([[5, 0, 7], [2, 6, 1]], dtype=torch.int32)
    for t in range(9):
        hidden_B1D, _ = model.hidden(
            tokens_BT[:, t : t + 1], torch.full((2, 1), t), cache_MZYX=cache_MZYX, table_BP=table_BP
        )
        close(hidden_B1D[:, 0], full_BTD[:, t])


@torch.no_grad()
@every_config
def test_no_token_sees_a_later_one(config):
    model = build(config)
    tokens_BT = random_tokens(1, 8)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 5] = (changed_BT[0, 5] + 1) % 23
    before, after = model(tokens_BT)[0], model(changed_BT)[0]
    close(before[:5], after[:5])
    assert all((before[t] - after[t]).abs().max() > 1e-6 for t in (5, 6, 7))


# ---- documents in rows -----------------------------------------------------------------

LENGTHS = [5, 1, 7, 3, 2, 9]


def one_a_row(documents: list[list[int]], width: int) -> Packed:
    """Each document in a row of its own, padded at the end."""
    tokens_BT = torch.zeros(len(documents), width, dtype=torch.long)
    positions_BT, documents_BT = tokens_BT - 1, tokens_BT - 1
    for b, document in enumerate(documents):
        n = len(document)
        tokens_BT[b, :n], positions_BT[b, :n] = torch.tensor(document), torch.arange(n)
        documents_BT[b, :n] = b
    return Packed(tokens_BT, positions_BT, documents_BT)


@torch.no_grad()
@every_config
def test_packed_equals_padded_equals_alone(config):
    model = build(config)
    documents = [random_tokens(n, seed=n).tolist() for n in LENGTHS]
    packed, padded = pack(documents, 11), one_a_row(documents, 12)
    assert len(packed.tokens_BT) == 3 and (packed.positions_BT[:, -1] == -1).any()
    for batch in (packed, padded):
        hidden_BTD, routings = model.hidden(batch.tokens_BT, batch.positions_BT)
        for i, document in enumerate(documents):
            alone_TD, alone_routings = model.hidden(torch.tensor([document]))
            here = batch.documents_BT == i
            close(hidden_BTD[here], alone_TD[0])
            for routing, alone in zip(routings, alone_routings, strict=True):
                assert torch.equal(routing.experts_BTA[here], alone.experts_BTA[0])


@torch.no_grad()
@deepseeks
def test_multi_token_prediction_packed_equals_alone(name):
    config = CONFIGS[name]
    model = build(config)
    documents = [random_tokens(n, seed=n).tolist() for n in LENGTHS]
    batch = pack(documents, 11)
    hidden_BTD, _ = model.hidden(batch.tokens_BT, batch.positions_BT)
    second_BTD, _ = model.predict_second_next(hidden_BTD, batch.tokens_BT, batch.positions_BT)
    assert second_BTD.shape[1] == batch.tokens_BT.shape[1] - 1
    for i, document in enumerate(documents):
        if len(document) == 1:
            continue
        tokens_1T = torch.tensor([document])
        alone_BTD, _ = model.predict_second_next(model.hidden(tokens_1T)[0], tokens_1T)
        inner = (batch.documents_BT == i) & (batch.positions_BT < len(document) - 1)
        close(second_BTD[inner[:, :-1]], alone_BTD[0])


@torch.no_grad()
def test_v3_eq_21_to_22_mtp_merges_embedding_then_hidden():
    """V3 Eq. 21-22 in the released weights' order: the left half of eh_proj reads the embedding."""
    model = build(DEEPSEEK)
    tokens_BT = random_tokens(2, 6)
    hidden_BTD, _ = model.hidden(tokens_BT)
    second_BTD, _ = model.predict_second_next(hidden_BTD, tokens_BT)
    mtp = model.model.layers[3]
    left_DD, right_DD = mtp.eh_proj.weight.chunk(2, 1)

    def rms(x: Tensor, norm: nn.Module) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    embedded_BTD = model.model.embed_tokens.weight[tokens_BT[:, 1:]]
    x_BTD = (
        rms(embedded_BTD, mtp.enorm) @ left_DD.T + rms(hidden_BTD[:, :-1], mtp.hnorm) @ right_DD.T
    )
    rows = model.rows(tokens_BT[:, :-1], None)
    x_BTD, _ = mtp(x_BTD, rows)
    close(second_BTD, rms(x_BTD, mtp.shared_head.norm))


@torch.no_grad()
@every_config
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_and_entropy_equal_a_softmax_written_out(config, temperature):
    model = build(config)
    documents = [random_tokens(n, seed=n).tolist() for n in LENGTHS]
    batch = pack(documents, 11)
    mask_BT = (batch.positions_BT > 0) & (batch.positions_BT % 3 != 2)
    logprobs_N, entropy_N, _, _ = model.logprobs(
        batch.tokens_BT, batch.positions_BT, mask_BT, temperature=temperature
    )
    places = mask_BT.nonzero().tolist()
    assert len(places) == len(logprobs_N) > 10
    for n, (b, t) in enumerate(places):
        document, at = documents[int(batch.documents_BT[b, t])], int(batch.positions_BT[b, t])
        logits_V = model(torch.tensor([document[:at]]))[0, -1].numpy() / temperature
        p_V = softmax(logits_V)
        assert float(logprobs_N[n]) == pytest.approx(math.log(p_V[document[at]]), abs=1e-10)
        assert float(entropy_N[n]) == pytest.approx(-(p_V * np.log(p_V)).sum(), abs=1e-10)


def test_logprobs_in_chunks_have_the_same_values_and_gradients():
    torch.manual_seed(0)
    x_ND = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    targets_N = torch.randint(0, 13, (11,))
    weights_N = torch.randn(11, dtype=torch.float64)
    results = []
    for chunk in (4096, 4, 1):
        logprobs_N, entropy_N = kernels.linear_logprob(x_ND, weight_VD, targets_N, 0.7, chunk)
        grads = torch.autograd.grad(logprobs_N @ weights_N, (x_ND, weight_VD))
        results.append((logprobs_N.detach(), entropy_N, *grads))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(a, b, 1e-12)


# ---- positions -------------------------------------------------------------------------


def yarn_by_hand(dim: int, theta: float, yarn: dict) -> list[float]:
    """YaRN 3.2 as transformers computes it, pair by pair.

    A pair whose wave fits more than beta_fast times into the original context stays; one that fits
    less than beta_slow times is interpolated; the ramp between is linear in the pair's number.
    """

    def number_of_the_pair_that_turns(times: float) -> float:
        # times = original / wavelength, wavelength = 2 pi theta^(2i / dim), solved for i
        original = yarn["original_max_position_embeddings"]
        return dim / 2 * math.log(original / (2 * math.pi * times), theta)

    low = max(0, math.floor(number_of_the_pair_that_turns(yarn["beta_fast"])))
    high = min(dim - 1, math.ceil(number_of_the_pair_that_turns(yarn["beta_slow"])))
    result = []
    for i in range(dim // 2):
        frequency = 1 / theta ** (2 * i / dim)
        if i <= low:
            share = 0.0
        elif i >= high:
            share = 1.0
        else:
            share = (i - low) / (high - low)
        result.append((1 - share) * frequency + share * frequency / yarn["factor"])
    return result


@pytest.mark.parametrize("name", ["deepseek-v3", "small", "qwen2"])
def test_yarn_3_2_frequency_of_each_pair_equals_the_papers(name):
    config = Config.preset("deepseek-v3") if name == "deepseek-v3" else DEEPSEEK
    dim = config.qk_rope_head_dim
    if name == "qwen2":
        config, dim = replace(CONFIGS["qwen2"], rope_scaling=YARN, head_dim=16), 16
    expected = yarn_by_hand(dim, config.rope_theta, config.rope_scaling)
    plain = [config.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
    factor = config.rope_scaling["factor"]
    assert expected[0] == plain[0] and expected[-1] == pytest.approx(plain[-1] / factor)
    assert any(p / factor * 1.01 < e < p * 0.99 for e, p in zip(expected, plain)), (
        "no pair on the ramp"
    )
    got = rope_frequencies(config, torch.device("cpu"))
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=1e-5)


def test_without_yarn_the_frequencies_are_powers_of_theta():
    got = rope_frequencies(replace(DEEPSEEK, rope_scaling=None), torch.device("cpu"))
    np.testing.assert_allclose(got.numpy(), [1, 100**-0.25, 100**-0.5, 100**-0.75], rtol=1e-6)


def test_yarn_3_4_temperature_makes_deepseeks_softmax_scale_0_13523_and_leaves_cos_and_sin():
    config = Config.preset("deepseek-v3")
    with torch.device("meta"):
        mla = MLA(config)
    assert mla.scale == pytest.approx(0.13523, abs=5e-6)
    assert mla.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    small = build(replace(DEEPSEEK, rope_scaling={**YARN, "mscale_all_dim": 1.0}))
    rows = small.rows(torch.zeros(1, 5, dtype=torch.long), None)
    close(rows.turn_BTr.abs(), torch.ones(1, 5, 4, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("scaling", [dict(), dict(beta_fast=32, beta_slow=1)])
def test_yarn_without_mscale_all_dim_puts_its_temperature_on_cos_and_sin(scaling):
    """As in DeepSeek's modeling file and in transformers: mscale_all_dim is 0 by default, and the
    betas are 32 and 1. Qwen2.5's model card has only type, factor and the original length."""
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, **scaling)
    config = replace(CONFIGS["qwen2"], rope_scaling=yarn)
    model = build(config)
    rows = model.rows(torch.zeros(1, 5, dtype=torch.long), None)
    size = float(rows.turn_BTr[0, 3, 0].abs())
    assert size == pytest.approx(0.1 * math.log(4) + 1, rel=1e-6)
    deepseek = Transformer(replace(DEEPSEEK, rope_scaling=yarn))
    assert deepseek.model.layers[0].self_attn.scale == pytest.approx(14**-0.5)
    expected = yarn_by_hand(6, 100.0, {"beta_fast": 32, "beta_slow": 1, **yarn})
    got = rope_frequencies(config, torch.device("cpu"))
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=1e-5)


def test_yarn_of_factor_one_changes_nothing():
    config = replace(DEEPSEEK, rope_scaling={**YARN, "factor": 1.0})
    plain = replace(DEEPSEEK, rope_scaling=None)
    assert yarn_mscale(config, "mscale_all_dim") == 1
    tokens_BT = random_tokens(1, 6)
    close(build(config)(tokens_BT), build(plain)(tokens_BT), 1e-6)


def rows_at(positions: list[float], freq: list[float]) -> Rows:
    angles = torch.tensor(positions, dtype=torch.float64)[None, :, None] * torch.tensor(
        freq, dtype=torch.float64
    )
    return Rows(torch.tensor([positions]), torch.complex(angles.cos(), angles.sin()))


FREQ = [1.0, 0.3, 0.05]


def test_interleaved_rotation_is_a_complex_product():
    x_BTHR = torch.randn(
        1, 3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    out = rotate(x_BTHR, rows_at([0, 4, 31], FREQ), interleaved=True)
    half = rotate(x_BTHR, rows_at([0, 4, 31], FREQ), interleaved=False)
    for t, position in enumerate((0, 4, 31)):
        for h in (0, 1):
            close(out[0, t, h], torch.from_numpy(turned(x_BTHR[0, t, h], position, FREQ)), 1e-12)
            close(
                half[0, t, h], torch.from_numpy(turned_half(x_BTHR[0, t, h], position, FREQ)), 1e-12
            )
    close(out[0, 0], x_BTHR[0, 0])
    assert (out[0, 1] - half[0, 1]).abs().max() > 0.1, "the two pairings are the same"
    # One is the other after putting the even dimensions before the odd ones.
    order = [0, 2, 4, 1, 3, 5]
    close(rotate(x_BTHR[..., order], rows_at([0, 4, 31], FREQ), interleaved=False), out[..., order])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotated_scores_depend_on_the_distance_alone(interleaved):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64, generator=generator)

    def score(at_q: int, at_k: int) -> float:
        turned_q = rotate(q, rows_at([at_q], FREQ), interleaved)
        return float((turned_q * rotate(k, rows_at([at_k], FREQ), interleaved)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-12)
    assert score(3, 7) == pytest.approx(score(0, 4), abs=1e-12)
    assert abs(score(7, 3) - score(3, 7)) > 0.1 and abs(score(7, 3) - score(8, 3)) > 0.1


def test_rotation_keeps_bf16_but_turns_in_fp32():
    model = build(DEEPSEEK).bfloat16()
    rows = model.rows(torch.zeros(1, 200, dtype=torch.long), None)
    assert rows.turn_BTr.dtype == torch.complex64
    x_BTHR = torch.randn(1, 200, 2, 8).bfloat16()
    out = rotate(x_BTHR, rows, interleaved=True)
    assert out.dtype == torch.bfloat16
    close(out.float(), rotate(x_BTHR.float(), rows, interleaved=True), 0.02)


# ---- the router ------------------------------------------------------------------------

ROUTERS = {
    "one group": dict(n_group=1, topk_group=1),
    "all groups": dict(n_group=4, topk_group=4),
    "some groups": dict(n_group=4, topk_group=2),
    "groups of one": dict(n_group=12, topk_group=5),
    "not normed": dict(n_group=3, topk_group=2, norm_topk_prob=False),
    "one expert": dict(n_group=3, topk_group=1, num_experts_per_tok=1),
}
BIASES = {"none": (0.0, 0.0), "spread": (0.0, 0.4), "all negative": (-3.0, 0.4), "high": (2.0, 0.4)}


def route_by_hand(scores: list[float], bias: list[float], config: Config) -> dict[int, float]:
    """V3 Eq. 12-16 with node-limited routing: expert -> weight."""
    E = len(scores)
    size = E // config.n_group
    biased = [s + b for s, b in zip(scores, bias)]
    merits = []
    for g in range(config.n_group):
        members = sorted(biased[g * size : (g + 1) * size], reverse=True)
        merits.append(sum(members[:2]))
    groups = sorted(range(config.n_group), key=lambda g: -merits[g])[: config.topk_group]
    allowed = [e for e in range(E) if e // size in groups]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


@torch.no_grad()
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_v3_eq_13_to_16_routing_equals_a_plain_loop(router, bias):
    config = replace(DEEPSEEK, n_routed_experts=12, **router)
    torch.manual_seed(3)
    gate = Gate(config).double()
    gate.weight.normal_(0, 0.4)
    gate.e_score_correction_bias.normal_(*bias)
    x_BTD = torch.randn(4, 9, 16, dtype=torch.float64)
    routing = gate(x_BTD)
    changed = 0
    for b in range(4):
        for t in range(9):
            logits = [float(x_BTD[b, t] @ row) for row in gate.weight]
            scores = [1 / (1 + math.exp(-logit)) for logit in logits]
            assert routing.scores_BTE[b, t].tolist() == pytest.approx(scores, abs=1e-12)
            expected = route_by_hand(scores, gate.e_score_correction_bias.tolist(), config)
            got = dict(zip(routing.experts_BTA[b, t].tolist(), routing.weights_BTA[b, t].tolist()))
            assert got == pytest.approx(expected, abs=1e-12)
            if config.norm_topk_prob:
                assert sum(got.values()) == pytest.approx(2.5)
            best = sorted(range(12), key=lambda e: -scores[e])[: config.num_experts_per_tok]
            changed += set(best) != set(got)
    if config.topk_group < config.n_group < 12 or bias[1]:
        assert changed > 0, "neither groups nor bias decided anything"


def test_the_bias_selects_but_gets_no_gradient_and_changes_no_weight():
    config = replace(DEEPSEEK, n_group=1, topk_group=1)
    gate = Gate(config).double()
    nn.init.normal_(gate.weight, std=0.4)
    x_BTD = torch.randn(1, 20, 16, dtype=torch.float64)
    free = gate(x_BTD)
    gate.e_score_correction_bias[2] = 50.0
    pulled = gate(x_BTD)
    assert (pulled.experts_BTA[..., 0] == 2).all() and not (free.experts_BTA[..., 0] == 2).all()
    picked_BTA = pulled.scores_BTE.gather(-1, pulled.experts_BTA)
    close(pulled.weights_BTA, 2.5 * picked_BTA / picked_BTA.sum(-1, keepdim=True))
    assert not gate.e_score_correction_bias.requires_grad
    assert "e_score_correction_bias" in gate.state_dict()


def test_the_weights_carry_the_routers_gradient():
    gate = Gate(replace(DEEPSEEK, n_group=1, topk_group=1)).double()
    nn.init.normal_(gate.weight, std=0.4)
    x_BTD = torch.randn(1, 5, 16, dtype=torch.float64)
    routing = gate(x_BTD)
    routing.weights_BTA[..., 0].sum().backward()
    grad, step = gate.weight.grad.clone(), 1e-6
    expert = int(routing.experts_BTA[0, 0, 0])
    with torch.no_grad():
        gate.weight[expert, 3] += step
        difference = (gate(x_BTD).weights_BTA - routing.weights_BTA)[..., 0].sum() / step
    assert float(difference) == pytest.approx(float(grad[expert, 3]), abs=1e-4)
    assert abs(float(grad[expert, 3])) > 1e-3


@torch.no_grad()
def test_a_replayed_route_decides_the_experts_and_minus_one_leaves_it_to_the_router():
    model = build(DEEPSEEK)
    tokens_BT = random_tokens(2, 7)
    own_BTD, routings = model.hidden(tokens_BT)
    own_BTMA = torch.stack([routing.experts_BTA for routing in routings], 2)
    nothing_BTMA = torch.full((2, 7, 2, 3), -1, dtype=torch.int16)
    close(model.hidden(tokens_BT, routes_BTMA=nothing_BTMA)[0], own_BTD, 0)
    close(model.hidden(tokens_BT, routes_BTMA=own_BTMA.to(torch.int16))[0], own_BTD, 0)

    routes_BTMA = nothing_BTMA.clone()
    routes_BTMA[0, 2, 0] = torch.tensor([7, 0, 3])  # of three groups, which the router cannot pick
    routes_BTMA[1, 4, 1] = torch.tensor([1, 2, 5])
    changed_BTD, changed = model.hidden(tokens_BT, routes_BTMA=routes_BTMA)
    assert changed[0].experts_BTA[0, 2].tolist() == [7, 0, 3]
    assert changed[1].experts_BTA[1, 4].tolist() == [1, 2, 5]
    scores_A = changed[0].scores_BTE[0, 2, [7, 0, 3]]
    close(changed[0].weights_BTA[0, 2], 2.5 * scores_A / scores_A.sum())
    # Before the first replayed token, and in the other row, nothing changes.
    close(changed_BTD[0, :2], own_BTD[0, :2])
    close(changed_BTD[1, :4], own_BTD[1, :4])
    assert (changed_BTD[0, 2] - own_BTD[0, 2]).abs().max() > 1e-3
    elsewhere = torch.ones(2, 7, dtype=torch.bool)
    elsewhere[0, 2] = False
    assert torch.equal(changed[0].experts_BTA[elsewhere], routings[0].experts_BTA[elsewhere])


# ---- the experts -----------------------------------------------------------------------


def experts_by_hand(
    experts: Experts, x_ND: Tensor, weights_NA: Tensor, experts_NA: Tensor
) -> Tensor:
    out = []
    for x_D, weights_A, experts_A in zip(x_ND, weights_NA, experts_NA):
        y_D = torch.zeros_like(x_D)
        for weight, e in zip(weights_A, experts_A.tolist()):
            gate_F, up_F = experts.gate_proj[e] @ x_D, experts.up_proj[e] @ x_D
            y_D = y_D + weight * (experts.down_proj[e] @ (gate_F * torch.sigmoid(gate_F) * up_F))
        out.append(y_D)
    return torch.stack(out)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("used", [range(6), [0, 1], [3], [2, 5], [1, 4]], ids=str)
def test_experts_equal_a_loop_and_unused_ones_get_no_gradient(used, dtype, tolerance):
    torch.manual_seed(0)
    experts = Experts(6, 8, 12)
    randomize(experts)
    experts = experts.to(dtype)
    x_ND = torch.randn(9, 8, dtype=dtype, requires_grad=True)
    A = min(2, len(used))
    experts_NA = torch.stack([torch.tensor(used)[torch.randperm(len(used))[:A]] for _ in range(9)])
    weights_NA = torch.rand(9, A, dtype=dtype, requires_grad=True)
    inputs = (x_ND, weights_NA, *experts.parameters())
    direction_ND = torch.randn(9, 8, dtype=dtype)
    results = []
    for compute in (experts, lambda *args: experts_by_hand(experts, *args)):
        out_ND = compute(x_ND, weights_NA, experts_NA)
        results.append(
            (out_ND.detach(), *torch.autograd.grad((out_ND * direction_ND).sum(), inputs))
        )
    for got, expected in zip(*results, strict=True):
        close(got, expected, tolerance)
    unused = [e for e in range(6) if e not in experts_NA]
    assert unused or len(used) == 6
    for grad_EFD in results[0][3:]:
        assert (grad_EFD[unused] == 0).all()


@torch.no_grad()
def test_experts_of_any_width_are_computed_in_fp32():
    """A grouped product may want aligned rows; a config need not have them."""
    experts = Experts(3, 6, 5)
    randomize(experts)
    x_ND, weights_NA = torch.randn(4, 6), torch.rand(4, 2)
    experts_NA = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    close(
        experts(x_ND, weights_NA, experts_NA),
        experts_by_hand(experts, x_ND, weights_NA, experts_NA),
        1e-5,
    )


@torch.no_grad()
def test_v3_eq_12_adds_shared_and_routed_experts():
    """V3 Eq. 12."""
    model = build(DEEPSEEK)
    moe = model.model.layers[1].mlp
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64)
    y_BTD, routing = moe(x_BTD)
    routed_ND = experts_by_hand(
        moe.experts,
        x_BTD.flatten(0, 1),
        routing.weights_BTA.flatten(0, 1),
        routing.experts_BTA.flatten(0, 1),
    )
    shared = moe.shared_experts
    shared_BTD = (
        F.silu(x_BTD @ shared.gate_proj.weight.T) * (x_BTD @ shared.up_proj.weight.T)
    ) @ shared.down_proj.weight.T
    close(y_BTD, routed_ND.view_as(x_BTD) + shared_BTD)
    assert model.model.layers[0].is_moe is False and isinstance(
        model.model.layers[0].mlp.up_proj, nn.Linear
    )


# ---- balance ---------------------------------------------------------------------------


def test_v3_2_1_2_bias_moves_by_the_sign_of_the_load():
    gate = Gate(replace(DEEPSEEK, n_routed_experts=4, n_group=1, topk_group=1))
    gate.balance(torch.tensor([5.0, 1.0, 3.0, 3.0]), 0.25)  # mean 3
    assert gate.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    gate.balance(torch.tensor([100.0, 0.0, 0.0, 0.0]), 0.25)  # only the sign counts
    assert gate.e_score_correction_bias.tolist() == [-0.5, 0.5, 0.25, 0.25]


@torch.no_grad()
def test_the_load_counts_each_real_token_and_no_padding():
    model = build(DEEPSEEK)
    documents = [random_tokens(n, seed=n).tolist() for n in LENGTHS]
    batch = pack(documents, 11)
    assert (batch.positions_BT < 0).sum() > 0
    _, routings = model.hidden(batch.tokens_BT, batch.positions_BT)
    for routing in routings:
        expected = [0.0] * 8
        for b, t in (batch.documents_BT >= 0).nonzero().tolist():
            for e in routing.experts_BTA[b, t].tolist():
                expected[e] += 1
        load_E = sft.expert_load(routing, batch.positions_BT)
        assert load_E.tolist() == expected and load_E.sum() == 3 * sum(LENGTHS)


@torch.no_grad()
def test_each_layers_bias_moves_by_its_own_load():
    model = build(DEEPSEEK)
    gates = [model.model.layers[i].mlp.gate for i in (1, 2, 3)]
    before = [gate.e_score_correction_bias.clone() for gate in gates]
    loads = [torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0]), torch.tensor([0.0, 8, 0, 0, 0, 0, 0, 0])]
    sft.balance(model, loads, 0.5)
    moved = [
        ((gate.e_score_correction_bias - old) / 0.5).round().tolist()
        for gate, old in zip(gates, before)
    ]
    assert moved[0] == [-1, 1, 1, 1, 1, 1, 1, 1]
    assert moved[1] == [1, -1, 1, 1, 1, 1, 1, 1]
    assert moved[2] == [0] * 8  # the MTP layer's load was not given


@torch.no_grad()
def test_repeated_balancing_evens_the_load_of_a_skewed_router():
    torch.manual_seed(0)
    config = replace(DEEPSEEK, num_nextn_predict_layers=0, num_hidden_layers=2)
    model = build(config)
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.zero_()
    gate.weight.normal_(0, 0.1)
    gate.weight[:2] += 0.15  # with x of mean 0.5 below, experts 0 and 1 are everyone's choice
    x_BTD = torch.randn(1, 512, 16, dtype=torch.float64) + 0.5
    positions_BT = torch.arange(512)[None]

    def overload() -> float:
        load_E = sft.expert_load(gate(x_BTD), positions_BT)
        return float(load_E.max() / load_E.mean())

    assert overload() > 2
    for _ in range(200):
        sft.balance(model, [sft.expert_load(gate(x_BTD), positions_BT)], 0.005)
    assert overload() < 1.2


def balance_by_hand(routing: Routing, documents_BT: Tensor) -> float:
    """V3 Eq. 17-20 for each document, without alpha."""
    E, A = routing.scores_BTE.shape[-1], routing.experts_BTA.shape[-1]
    total = 0.0
    for number in sorted(set(documents_BT.flatten().tolist()) - {-1}):
        tokens = (documents_BT == number).nonzero().tolist()
        for e in range(E):
            f = (
                sum(e in routing.experts_BTA[b, t].tolist() for b, t in tokens)
                * E
                / (A * len(tokens))
            )
            shares = [
                routing.scores_BTE[b, t, e] / routing.scores_BTE[b, t].sum() for b, t in tokens
            ]
            total += f * float(sum(shares).detach()) / len(tokens)
    return total


def test_v3_eq_17_to_20_for_each_document():
    model = build(DEEPSEEK)
    documents = [random_tokens(n, seed=n).tolist() for n in LENGTHS]
    batch = pack(documents, 11)
    _, routings = model.hidden(batch.tokens_BT, batch.positions_BT)
    for routing in routings:
        loss = balance_loss(routing, batch.documents_BT, len(LENGTHS))
        assert float(loss.detach()) == pytest.approx(
            balance_by_hand(routing, batch.documents_BT), abs=1e-12
        )
    loss.backward()
    assert model.model.layers[2].mlp.gate.weight.grad.abs().max() > 0


def test_balance_loss_of_an_even_router_is_one_a_document_and_of_a_stuck_one_more():
    scores_BTE = torch.full((1, 4, 4), 0.5, dtype=torch.float64)
    even = Routing(None, torch.tensor([[[0, 1], [2, 3], [1, 2], [3, 0]]]), scores_BTE)
    documents_BT = torch.zeros(1, 4, dtype=torch.long)
    assert float(balance_loss(even, documents_BT, 1)) == pytest.approx(1.0)
    scores_BTE = torch.tensor([0.9, 0.9, 0.1, 0.1], dtype=torch.float64).expand(1, 4, 4)
    stuck = Routing(None, torch.tensor([[[0, 1]] * 4]), scores_BTE)
    # f = 2, 2, 0, 0 and P = 0.45, 0.45, 0.05, 0.05
    assert float(balance_loss(stuck, documents_BT, 1)) == pytest.approx(1.8)


@torch.no_grad()
def test_the_balance_losses_of_micro_batches_add_up_to_the_whole():
    model = build(DEEPSEEK)
    batch = pack([random_tokens(n, seed=n).tolist() for n in LENGTHS], 11)
    _, routings = model.hidden(batch.tokens_BT, batch.positions_BT)
    whole = balance_loss(routings[0], batch.documents_BT, len(LENGTHS))
    parts = 0.0
    for rows in (slice(0, 1), slice(1, 3)):
        _, routings = model.hidden(batch.tokens_BT[rows], batch.positions_BT[rows])
        count = int(batch.documents_BT[rows].max()) + 1
        parts += float(balance_loss(routings[0], batch.documents_BT[rows], count))
    assert parts == pytest.approx(float(whole), abs=1e-10)


# ---- sizes, names, configs -------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek_v3() -> Transformer:
    with torch.device("meta"):
        return Transformer(Config.preset("deepseek-v3"))


def test_deepseek_v3_has_671_03_billion_parameters(deepseek_v3):
    D, H, V = 7168, 128, 129280
    attention = D * 1536 + 1536 + 1536 * H * 192 + D * 576 + 512 + 512 * H * 256 + H * 128 * D
    dense = 3 * D * 18432
    moe = 257 * 3 * D * 2048 + 256 * D
    total = 2 * V * D + D + 61 * (attention + 2 * D) + 3 * dense + 58 * moe
    assert deepseek_v3.num_parameters() == total == pytest.approx(671.03e9, abs=0.01e9)
    extra = attention + 2 * D + moe + 2 * D * D + 3 * D
    assert deepseek_v3.num_parameters(mtp=True) == total + extra
    assert deepseek_v3.config.cache_width == 576
    assert deepseek_v3.config.num_moe_layers == 58


def test_tied_embeddings_are_counted_once():
    tied, untied = CONFIGS["qwen2"], replace(CONFIGS["qwen2"], tie_word_embeddings=False)
    counts = [Transformer(config).num_parameters() for config in (tied, untied)]
    assert counts[1] - counts[0] == 23 * 24


def test_the_tensors_have_the_official_names(deepseek_v3):
    names = {
        stored
        for name, tensor in deepseek_v3.state_dict().items()
        if ".layers." not in name or name.split(".")[2] in ("0", "3", "61")
        for stored in official(name, tensor)
    }
    attention = {
        f"self_attn.{part}.weight"
        for part in ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa",
                     "kv_a_layernorm", "kv_b_proj", "o_proj")
    }  # fmt: skip
    block = attention | {"input_layernorm.weight", "post_attention_layernorm.weight"}
    parts = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    dense = {f"mlp.{part}" for part in parts}
    moe = {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    moe |= {f"mlp.shared_experts.{part}" for part in parts}
    moe |= {f"mlp.experts.{e}.{part}" for e in range(256) for part in parts}
    # Released checkpoints repeat the embedding and the head in layer 61; ours are the main ones.
    mtp = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    layers = {0: block | dense, 3: block | moe, 61: block | moe | mtp}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, members in layers.items():
        expected |= {f"model.layers.{layer}.{member}" for member in members}
    assert names == expected


def test_without_q_lora_the_query_has_one_projection():
    names = set(MLA(replace(DEEPSEEK, q_lora_rank=None)).state_dict())
    assert "q_proj.weight" in names and not any(name.startswith("q_a") for name in names)
    qwen3 = set(GQA(CONFIGS["qwen3"]).state_dict())
    assert {"q_norm.weight", "k_norm.weight"} <= qwen3 and "q_proj.bias" not in qwen3
    assert "q_proj.bias" in GQA(CONFIGS["qwen2"]).state_dict()


def test_a_new_model_starts_from_small_normal_matrices_and_zero_biases():
    torch.manual_seed(0)
    model = Transformer(replace(DEEPSEEK, attention_bias=True, hidden_size=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert float(parameter.detach().std()) == pytest.approx(0.006, rel=0.3), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("config", [*CONFIGS.values(), Config(), Config.preset("toy")])
def test_a_config_survives_its_json(config):
    settings = json.loads(json.dumps(to_json(config)))
    assert from_json(settings) == config
    assert settings["architectures"][0].endswith("ForCausalLM")


def test_from_dict_reads_the_official_config_and_passes_over_what_is_not_the_models():
    settings = dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_size=1536, vocab_size=151936,
        intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        rms_norm_eps=1e-6, rope_theta=10000, sliding_window=4096, torch_dtype="bfloat16",
        max_position_embeddings=131072, tie_word_embeddings=False, use_cache=True,
    )  # fmt: skip
    config = from_json(settings)
    assert not config.is_moe and config.num_moe_layers == 0 and config.kv_lora_rank is None
    assert config.gqa_head_dim == 128 and config.cache_width == 2 * 2 * 128
    with torch.device("meta"):
        count = Transformer(config).num_parameters()
    assert count == pytest.approx(1.777e9, rel=1e-3)  # DeepSeek-R1-Distill-Qwen-1.5B


def test_from_dict_takes_theta_from_rope_parameters_or_refuses():
    """transformers 5 writes rope_theta there; to pass over it would turn at the wrong speed."""
    settings = dict(model_type="qwen2", rope_parameters=dict(rope_type="default", rope_theta=1e6))
    try:
        assert from_json(settings).rope_theta == 1e6
    except ValueError as error:
        assert "rope_parameters" in str(error)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_group=3, topk_group=1), ("8", "n_group=3")),
        (
            dict(n_group=4, topk_group=1, num_experts_per_tok=3),
            ("topk_group=1", "num_experts_per_tok=3"),
        ),
        (dict(n_group=2, topk_group=3), ("n_group=2", "topk_group=3")),
        (dict(num_experts_per_tok=9), ("num_experts_per_tok=9",)),
        (dict(rope_scaling=dict(type="linear", factor=2)), ("linear", "yarn")),
        (dict(rope_scaling=dict(rope_type="dynamic", factor=2)), ("dynamic", "yarn")),
        (dict(num_nextn_predict_layers=2), ("num_nextn_predict_layers=2", "0 or 1")),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused_with_its_values(changes, words):
    with pytest.raises(ValueError) as error:
        Config.preset("toy", **changes)
    assert all(word in str(error.value) for word in words)


def test_unknown_presets_and_model_types_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'tiny'.*deepseek-v3, toy"):
        Config.preset("tiny")
    with pytest.raises(ValueError, match="'gpt2'.*deepseek_v3, qwen2, qwen3, llama"):
        from_json(dict(model_type="gpt2"))


def test_config_json_has_no_head_dim_where_none_is_given():
    """transformers would take null for a value."""
    assert "head_dim" not in to_json(CONFIGS["qwen2"])
    assert to_json(replace(CONFIGS["qwen2"], head_dim=8))["head_dim"] == 8
    assert from_json(to_json(CONFIGS["qwen2"])) == CONFIGS["qwen2"]


def random_routes(config: Config, rows: int, length: int) -> torch.Tensor:
    """Some experts for each token, and here and there the router's own choice."""
    shape = (rows, length, config.num_moe_layers, config.n_routed_experts)
    order = torch.rand(shape, generator=torch.Generator().manual_seed(3)).argsort(-1)
    routes_BTMA = order[..., : config.num_experts_per_tok].to(torch.int16)
    routes_BTMA[:, 4:7] = -1
    return routes_BTMA


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("name", ["toy", "toy-student"])
def test_recomputed_blocks_have_the_same_gradients_and_keep_less(name, replayed):
    config = Config.preset(name, initializer_range=0.1)
    tokens_BT = torch.arange(60).view(2, 30) % config.vocab_size
    positions_BT = torch.cat([torch.arange(18), torch.arange(12)]).expand(2, 30)
    routes_BTMA = random_routes(config, 2, 30) if replayed and config.is_moe else None
    found, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(5)
        model = Transformer(config)
        model.recompute = recompute
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.nbytes) or x, lambda x: x
        ):
            logprobs_N, entropy_N, _, _ = model.logprobs(
                tokens_BT, positions_BT, positions_BT > 0, routes_BTMA=routes_BTMA
            )
        kept.append(sum(sizes))
        (logprobs_N.sum() + 0.1 * entropy_N.sum()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert kept[1] < kept[0] / 2
