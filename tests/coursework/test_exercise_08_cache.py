from unittest.mock import patch

import pytest
import torch

import model
from tests.coursework.checks import close, same

pytestmark = pytest.mark.exercise_8

CONFIG = model.Config(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=None, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=3,
    n_routed_experts=None, first_k_dense_replace=0, num_nextn_predict_layers=0, n_group=1,
    topk_group=1, rope_theta=10.0, initializer_range=0.6, max_position_embeddings=64,
)  # fmt: skip


def marked(x_BTHR, rows, interleaved):
    """In the place of exercise 5: a position's angles, added. No turning, but as telling here."""
    return x_BTHR + torch.view_as_real(rows.turn_BTr).flatten(-2).unsqueeze(2)


def absorbed(self, q_BTHK, q_BTHR, cache_ZYX, rows):
    """In the place of exercise 6: the naive form, over a row's entries, for its last token."""
    out = []
    for b, seen in enumerate(rows.seen_B.tolist()):
        pages = [b] if rows.table_BP is None else rows.table_BP[b]
        entries_1SX = torch.cat([cache_ZYX[page] for page in pages])[None, :seen]
        queries = [q[b : b + 1].expand(1, seen, -1, -1) for q in (q_BTHK, q_BTHR)]
        out.append(self.naive(*queries, *entries_1SX.split((self.C, self.R), -1), None)[:, -1:])
    return torch.cat(out)


@pytest.fixture(autouse=True)
def _stand_ins():
    with stand_ins():
        yield


def stand_ins():
    """Exercises 5 and 6 are not needed while this file's tests run."""
    return patch.multiple(
        model, rotate=marked, MLA=type("MLA", (model.MLA,), {"absorbed": absorbed})
    )


def transformer():
    torch.manual_seed(2)
    return model.Transformer(CONFIG).double().eval()


def tokens(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(3))


def decoded(transformer, tokens_BT, starts, table_BP=None, page=16, pages=None):
    """Hidden states of the tokens from each row's start on, one token a step."""
    B, T = tokens_BT.shape
    cache_MZYX = transformer.new_cache(pages or B, page)
    steps = []
    with torch.no_grad():
        for b in range(B):  # each row's beginning, by itself
            row = None if table_BP is None else table_BP[b : b + 1]
            part = cache_MZYX if row is not None else cache_MZYX[:, b : b + 1]
            positions_1T = torch.arange(starts[b])[None]
            transformer.hidden(
                tokens_BT[b : b + 1, : starts[b]], positions_1T, cache_MZYX=part, table_BP=row
            )
        for step in range(T - max(starts)):
            at_B1 = torch.tensor(starts)[:, None] + step
            hidden_B1D, _ = transformer.hidden(
                tokens_BT.gather(1, at_B1), at_B1, cache_MZYX=cache_MZYX, table_BP=table_BP
            )
            steps.append(hidden_B1D)
    return torch.cat(steps, 1)


def uncached(transformer, tokens_BT, starts):
    """The same from whole rows, without a cache."""
    with torch.no_grad():
        hidden_BTD, _ = transformer.hidden(tokens_BT)
    length = tokens_BT.shape[1] - max(starts)
    rows = [row[start : start + length] for row, start in zip(hidden_BTD, starts)]
    return torch.stack(rows)


def cached_rows(positions, Y, table=None):
    table_BP = None if table is None else torch.tensor(table)
    return transformer().cached_rows(torch.tensor(positions), Y, table_BP)


def test_a_new_token_sees_itself():
    rows = cached_rows([[6], [0]], 16)
    same(rows.seen_B.tolist(), [7, 1], "tokens seen from positions 6 and 0")


def test_without_a_table_row_b_is_page_b():
    rows = cached_rows([[6], [3]], 16)
    same(rows.page_BT.expand(2, 1).tolist(), [[0], [1]], "the pages of two rows")
    same(rows.place_BT.tolist(), [[6], [3]], "the places in them of positions 6 and 3")


def test_with_a_table_a_position_is_in_one_of_the_rows_pages():
    rows = cached_rows([[6], [3]], 4, [[5, 2], [7, 1]])
    same(rows.page_BT.tolist(), [[2], [7]], "positions 6 and 3 in pages of 4: 5, 2 and 7, 1")
    same(rows.place_BT.tolist(), [[2], [3]], "the places in these pages")


def test_a_prefill_is_no_step():
    rows = cached_rows([[0, 1, 2]], 16)
    assert rows.seen_B is None, f"seen_B is {rows.seen_B} with three tokens a row, not None"


def test_an_entry_is_the_latent_and_then_the_rotated_key():
    attention, rows = transformer().model.layers[0].self_attn, cached_rows([[3]], 4, [[2, 0]])
    cache_ZYX, x_BTD = torch.zeros(3, 4, 9, dtype=torch.float64), torch.randn(1, 1, 8).double()
    with torch.no_grad():
        attention(x_BTD, rows, cache_ZYX)
        _, _, latent_BTC, rope_BTR = attention.project(x_BTD, rows)
    wanted = torch.zeros_like(cache_ZYX)
    wanted[2, 3] = torch.cat((latent_BTC[0, 0], rope_BTR[0, 0]))
    close(cache_ZYX, wanted, "position 3 of pages of 4: the entry [2, 3], and no other")


def test_decoding_equals_the_whole_row_at_once():
    net, tokens_BT = transformer(), tokens(1, 7)
    close(decoded(net, tokens_BT, [3]), uncached(net, tokens_BT, [3]), "4 steps after 3 tokens")


def test_rows_go_on_at_their_own_positions():
    net, tokens_BT = transformer(), tokens(2, 8)
    got = decoded(net, tokens_BT, [5, 2])
    close(got, uncached(net, tokens_BT, [5, 2]), "3 steps of rows that have 5 and 2 tokens")


def test_decoding_over_pages_equals_the_whole_row():
    net, tokens_BT = transformer(), tokens(2, 8)
    table_BP = torch.tensor([[3, 0, 4], [1, 5, 2]])
    got = decoded(net, tokens_BT, [2, 3], table_BP, page=3, pages=6)
    close(got, uncached(net, tokens_BT, [2, 3]), "rows over pages of 3 tokens")


def test_documents_in_one_row_do_not_see_each_other():
    net, parts = transformer(), (3, 2)
    attention, x_BTD = net.model.layers[0].self_attn, torch.randn(1, 5, 8).double()
    packed = net.rows(torch.zeros(1, 5, dtype=torch.long), torch.tensor([[0, 1, 2, 0, 1]]))
    wanted = []
    with torch.no_grad():
        for part_BTD in x_BTD.split(parts, 1):
            rows = net.rows(torch.zeros(part_BTD.shape[:2], dtype=torch.long), None)
            projected = attention.project(part_BTD, rows)
            wanted.append(attention.o_proj(attention.naive(*projected, None)))
        got = attention(x_BTD, packed)
    close(got, torch.cat(wanted, 1), "documents of 3 and 2 tokens in one row, and each by itself")


def test_without_a_cache_it_is_the_naive_form():
    attention = transformer().model.layers[0].self_attn
    x_BTD = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(4)).double()
    rows = transformer().rows(torch.zeros(1, 3, dtype=torch.long), None)
    with torch.no_grad():
        got = attention(x_BTD, rows)
        wanted = attention.o_proj(attention.naive(*attention.project(x_BTD, rows), None))
    close(got, wanted, "three tokens, no cache")
