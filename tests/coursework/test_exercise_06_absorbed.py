from unittest.mock import patch

import pytest
import torch

import kernels
import model
from tests.coursework.checks import close

pytestmark = pytest.mark.exercise_6

H, K, R, C, U = 3, 4, 2, 5, 6
YARN = dict(rope_type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=4096)  # fmt: skip


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer(rope_scaling=None):
    config = model.Config(
        hidden_size=8, num_attention_heads=H, kv_lora_rank=C, qk_nope_head_dim=K,
        qk_rope_head_dim=R, v_head_dim=U, q_lora_rank=None, n_routed_experts=None,
        rope_scaling=rope_scaling,
    )  # fmt: skip
    attention = model.MLA(config).double()
    attention.kv_b_proj.weight.data = random(H * (K + U), C)
    return attention


def rows(lengths, table=None):
    """What is known of one new token a row, which is the last that it sees."""
    seen_B = torch.tensor(lengths)
    last_B1 = seen_B[:, None] - 1
    table_BP = None if table is None else torch.tensor(table)
    return model.Rows(last_B1, torch.empty(0), None, None, None, table_BP, seen_B)


def expected(attention, q_BTHK, q_BTHR, cached, scale):
    """Keys and values of every head built from each row's cached (latent, rotated key)."""
    w_HkC = attention.kv_b_proj.weight.view(H, K + U, C)
    out = []
    for b, entries_SX in enumerate(cached):
        for h in range(H):
            k_SK, v_SU = entries_SX[:, :C] @ w_HkC[h, :K].T, entries_SX[:, :C] @ w_HkC[h, K:].T
            scores_S = k_SK @ q_BTHK[b, 0, h] + entries_SX[:, C:] @ q_BTHR[b, 0, h]
            out.append((scale * scores_S).softmax(0) @ v_SU)
    return torch.stack(out).view(len(cached), 1, H * U)


def test_it_equals_attention_over_each_heads_own_keys_and_values():
    attention, cache_ZYX = layer(), random(1, 7, C + R)
    q_BTHK, q_BTHR = random(1, 1, H, K), random(1, 1, H, R)
    got = attention.absorbed(q_BTHK, q_BTHR, cache_ZYX, rows([7]))
    wanted = expected(attention, q_BTHK, q_BTHR, [cache_ZYX[0]], (K + R) ** -0.5)
    close(got, wanted, "one row of 7 cached tokens, head by head")


def test_rows_and_heads_stay_apart():
    attention, cache_ZYX = layer(), random(2, 7, C + R)
    q_BTHK, q_BTHR = random(2, 1, H, K), random(2, 1, H, R)
    got = attention.absorbed(q_BTHK, q_BTHR, cache_ZYX, rows([7, 7]))
    wanted = expected(attention, q_BTHK, q_BTHR, list(cache_ZYX), (K + R) ** -0.5)
    close(got, wanted, "two rows: B, 1, and the heads one after another")


def test_a_row_sees_as_many_tokens_as_it_has():
    attention, cache_ZYX = layer(), random(2, 7, C + R)
    q_BTHK, q_BTHR = random(2, 1, H, K), random(2, 1, H, R)
    got = attention.absorbed(q_BTHK, q_BTHR, cache_ZYX, rows([3, 5]))
    cached = [cache_ZYX[0, :3], cache_ZYX[1, :5]]
    wanted = expected(attention, q_BTHK, q_BTHR, cached, (K + R) ** -0.5)
    close(got, wanted, "rows of 3 and 5 tokens in a cache with room for 7")


def test_one_call_of_the_kernel_mixes_the_latents():
    # What it returns is given here: the result is W_UV of that, and of nothing else.
    attention, mixed_BHC, calls = layer(), random(2, H, C), []

    def mla_decode(*arguments, **named):
        calls.append(arguments)
        return mixed_BHC

    with patch.object(kernels, "mla_decode", mla_decode):
        got = attention.absorbed(
            random(2, 1, H, K), random(2, 1, H, R), random(2, 7, C + R), rows([7, 7])
        )
    assert len(calls) == 1, f"kernels.mla_decode was called {len(calls)} times, not once"
    w_HkC = attention.kv_b_proj.weight.view(H, K + U, C)
    wanted = [torch.cat([w_HkC[h, K:] @ row_HC[h] for h in range(H)])[None] for row_HC in mixed_BHC]
    close(got, torch.stack(wanted), "W_UV of each row's and head's mixture of latents")


def test_the_scale_counts_all_dimensions():
    # Of queries whose rotated part is 0: what is left of the scores is the latent's.
    attention, cache_ZYX = layer(), random(1, 4, C + R)
    q_BTHK, q_BTHR = random(1, 1, H, K), torch.zeros(1, 1, H, R, dtype=torch.float64)
    got = attention.absorbed(q_BTHK, q_BTHR, cache_ZYX, rows([4]))
    wanted = expected(attention, q_BTHK, q_BTHR, [cache_ZYX[0]], (K + R) ** -0.5)
    close(got, wanted, "scores of the latent part, times (K + R)^-0.5")


def test_the_scale_has_yarns_temperature():
    # (K + R)^-0.5 (0.1 ln 40 + 1)^2: over both parts of the query, with the temperature.
    attention, cache_ZYX = layer(YARN), random(1, 4, C + R)
    q_BTHK, q_BTHR = random(1, 1, H, K), random(1, 1, H, R)
    got = attention.absorbed(q_BTHK, q_BTHR, cache_ZYX, rows([4]))
    temperature = 1.3688879454113936  # 0.1 ln 40 + 1
    scale = (K + R) ** -0.5 * temperature**2
    wanted = expected(attention, q_BTHK, q_BTHR, [cache_ZYX[0]], scale)
    close(got, wanted, "the scores' scale with YaRN's factor 40")


def test_it_reads_a_rows_tokens_from_its_pages():
    attention, cache_ZYX = layer(), random(4, 2, C + R)
    q_BTHK, q_BTHR = random(2, 1, H, K), random(2, 1, H, R)
    got = attention.absorbed(q_BTHK, q_BTHR, cache_ZYX, rows([3, 4], table=[[2, 0], [1, 3]]))
    cached = [torch.cat((cache_ZYX[2], cache_ZYX[0]))[:3], torch.cat((cache_ZYX[1], cache_ZYX[3]))]
    wanted = expected(attention, q_BTHK, q_BTHR, cached, (K + R) ** -0.5)
    close(got, wanted, "rows whose tokens are in pages 2, 0 and 1, 3")
