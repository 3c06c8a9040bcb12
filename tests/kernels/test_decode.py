"""Decoding against attention spelt out in float64, over caches that are NaN wherever a row may not
look."""

import pytest
import torch
from harness import TOLERANCE, Canaries, backwards, guarded, relative_error

from kernels.decode import decode_op, gqa_decode, launch, mla_decode, tiles

SCALE = 0.3
MLA = {"J": 1, "C": 48, "X": 56, "values_at": 0}  # 8 numbers of the key are rope
R1 = {"J": 1, "C": 512, "X": 576, "values_at": 0}


def gqa(J: int, K: int) -> dict:
    return {"J": J, "C": K, "X": 2 * J * K, "values_at": J * K}


def split(shape: dict, H: int, dtype=torch.float32) -> int:
    """How many keys one program walks: 32 in the interpreter."""
    return tiles(torch.empty(0, dtype=dtype), shape["C"], H // shape["J"])[2]


class Case:
    """Queries, shuffled pages that are NaN but for the rows' tokens, and what is right."""

    def __init__(self, shape, H, lengths, Y=16, dtype=torch.float32, device="cpu", spare=0, seed=0):
        torch.manual_seed(seed)
        self.shape, B, X = shape, len(lengths), shape["X"]
        K = shape["C"] if shape["values_at"] else X
        self.q_BHK = torch.randn(B, H, K).to(dtype)
        self.rows = [torch.randn(n, X).to(dtype) for n in lengths]
        P = -(-max(lengths) // Y) + spare
        table_BP = torch.zeros(B, P, dtype=torch.int32)
        pages_ZYX = torch.full((1 + B * P, Y, X), float("nan"), dtype=dtype)
        order = iter((1 + torch.randperm(B * P)).tolist())  # page 0 is nobody's, all NaN
        for b, row in enumerate(self.rows):
            for p, part in enumerate(row.split(Y)):
                table_BP[b, p] = next(order)
                pages_ZYX[table_BP[b, p], : len(part)] = part
        self.lengths_B = torch.tensor(lengths)
        self.q_BHK, self.pages_ZYX, self.table_BP, self.lengths_B = (
            guarded(x.to(device)) for x in (self.q_BHK, pages_ZYX, table_BP, self.lengths_B)
        )

    def run(self):
        return call(self.shape, self.q_BHK, self.pages_ZYX, self.table_BP, self.lengths_B)

    def right(self):
        """Each head of each row by itself, over its own keys and nothing else."""
        J, C, values_at = self.shape["J"], self.shape["C"], self.shape["values_at"]
        B, H, K = self.q_BHK.shape
        out_BHC = torch.empty(B, H, C, dtype=torch.float64)
        for b, row_SX in enumerate(self.rows):
            row_SX = row_SX.double()
            for h in range(H):
                j = h // (H // J)
                k_SK, v_SC = row_SX[:, j * K :][:, :K], row_SX[:, values_at + j * C :][:, :C]
                scores_S = k_SK @ self.q_BHK[b, h].double().cpu() * SCALE
                out_BHC[b, h] = scores_S.softmax(0) @ v_SC
        return out_BHC


def call(shape, q_BHK, pages_ZYX, table_BP, lengths_B):
    if shape["values_at"]:
        return gqa_decode(q_BHK, pages_ZYX, table_BP, lengths_B, SCALE)
    return mla_decode(q_BHK, pages_ZYX, table_BP, lengths_B, shape["C"], SCALE)


def launched(shape, *tensors):
    """The launcher under canaries, which see only what is allocated outside an operation."""
    with Canaries():
        return launch(*tensors, shape["J"], shape["C"], shape["values_at"], SCALE)


def check(case):
    out = case.run()
    assert out.dtype == case.q_BHK.dtype
    assert relative_error(out, case.right()) < TOLERANCE[out.dtype]
    tensors = (case.q_BHK, case.pages_ZYX, case.table_BP, case.lengths_B)
    assert torch.equal(launched(case.shape, *tensors), out)


@pytest.mark.parametrize("H, dtype", [(1, torch.float32), (4, torch.bfloat16), (20, torch.float32),
                                      (16, torch.float16)])  # fmt: skip
def test_mla_mixes_the_latents_of_a_row_s_own_tokens(device, H, dtype):
    G = split(MLA, H, dtype)
    for lengths in ([1], [G, G - 1, 3 * G + 5]):
        check(Case(MLA, H, lengths, dtype=dtype, device=device))


@pytest.mark.parametrize("H, J, K, dtype", [(1, 1, 32, torch.float32), (4, 2, 24, torch.float32),
                                            (28, 4, 64, torch.bfloat16)])  # fmt: skip
def test_each_query_head_reads_its_group_s_key_and_value(device, H, J, K, dtype):
    G = split(gqa(J, K), H, dtype)
    for lengths in ([1], [2 * G, G + 1]):
        check(Case(gqa(J, K), H, lengths, dtype=dtype, device=device))


@pytest.mark.parametrize("shape", [MLA, gqa(2, 32)], ids=["mla", "gqa"])
@pytest.mark.parametrize("Y", [1, 7, 64])
def test_pages_may_have_any_size(device, shape, Y):
    check(Case(shape, 4, [split(shape, 4) + 3, 5], Y=Y, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape, H", [(R1, 16), (R1, 64), (gqa(4, 128), 28)], ids=["R1-16", "R1-64", "Qwen"]
)
def test_at_the_sizes_of_r1_and_qwen(device, shape, H, dtype):
    """Where a GPU has a tile for each, the interpreter has the same one as above."""
    if device == "cpu" and H == 64 and dtype == torch.float32:
        pytest.skip("slow, and the same as with 16 heads")
    check(Case(shape, H, [split(shape, H, dtype) + 13], Y=64, dtype=dtype, device=device))


def test_a_row_may_have_more_splits_than_are_added_up_at_once(device):
    check(Case(MLA, 16, [20 * split(MLA, 16) + 1], Y=64, device=device))


def test_the_scores_may_be_large(device):
    case = Case(MLA, 4, [2 * split(MLA, 4) + 3], device=device)
    case.q_BHK *= 100
    assert relative_error(case.run(), case.right()) < 1e-4


def test_two_rows_may_share_pages(device):
    """The rows of a group have one question: its pages are in each of their tables."""
    case = Case(MLA, 4, [40, 40], device=device)
    case.table_BP[1, :2] = case.table_BP[0, :2]
    case.rows[1][:32] = case.rows[0][:32]
    check(case)


@pytest.mark.parametrize("shape", [MLA, gqa(2, 24)], ids=["mla", "gqa"])
def test_without_a_table_a_row_is_a_page_and_may_be_a_view(device, shape):
    H, S = 4, 2 * split(shape, 4) + 9
    case = Case(shape, H, [S, 1, S - 10], device=device)
    cache_BSX = torch.full((3, S + 20, shape["X"]), float("nan"), device=device)
    for b, row in enumerate(case.rows):
        cache_BSX[b, : len(row)] = row
    for filled in (S, S + 3):  # with 3 tokens more than anyone sees
        view_BSX = guarded(cache_BSX)[:, :filled]
        out = launched(shape, case.q_BHK, view_BSX, None, case.lengths_B.int())
        assert relative_error(out, case.right()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", [MLA, gqa(2, 32)], ids=["mla", "gqa"])
def test_a_row_s_result_depends_on_nothing_beside_it(device, shape):
    """Bit for bit: alone or among others, in a cache with room for one split or for many, in bf16
    or fp32, with a table or without."""
    for dtype in (torch.float32, torch.bfloat16):
        G = split(shape, 4, dtype)
        case = Case(shape, 4, [G - 2, 2 * G + 1, 7], dtype=dtype, device=device)
        among = case.run()
        for b, row in enumerate(case.rows):
            q_1HK, length_1 = case.q_BHK[b : b + 1], case.lengths_B[b : b + 1]
            out = call(shape, q_1HK, row.to(device)[None], None, length_1)
            assert torch.equal(out[0], among[b])


def test_the_order_of_the_programs_does_not_matter(device):
    if device != "cpu":
        pytest.skip("a GPU runs them in any order")
    for shape in (MLA, gqa(2, 32)):
        case = Case(shape, 4, [70, 33], dtype=torch.bfloat16)
        out = case.run()
        with backwards():
            assert torch.equal(case.run(), out)


def test_every_input_may_be_a_view(device):
    case = Case(MLA, 4, [40, 17], device=device)
    out = case.run()
    case.q_BHK = case.q_BHK.transpose(1, 2).contiguous().transpose(1, 2)
    _, Y, X = case.pages_ZYX.shape
    case.pages_ZYX = case.pages_ZYX.repeat(1, 2, 2)[:, :Y, :X]
    case.table_BP = case.table_BP.repeat_interleave(2, 1)[:, ::2]
    case.lengths_B = case.lengths_B.repeat_interleave(2)[::2]
    assert torch.equal(case.run(), out)


@pytest.mark.parametrize("shape", [MLA, gqa(2, 24)], ids=["mla", "gqa"])
def test_the_reference_looks_at_a_row_s_own_tokens(shape):
    """The reference runs for float64. With a table it survives NaN beyond a row's tokens."""
    case = Case(shape, 4, [40, 1, 17], dtype=torch.float64)
    assert relative_error(case.run(), case.right()) < 1e-12
    cache_BSX = torch.nn.utils.rnn.pad_sequence(case.rows, batch_first=True)
    out = call(shape, case.q_BHK, cache_BSX, None, case.lengths_B)
    assert relative_error(out, case.right()) < 1e-12


@pytest.mark.parametrize("shape", [MLA, gqa(2, 32)], ids=["mla", "gqa"])
def test_the_operation_is_declared_rightly(device, shape):
    case = Case(shape, 4, [33, 5], device=device)
    rest = (shape["J"], shape["C"], shape["values_at"], SCALE)
    torch.library.opcheck(
        decode_op, (case.q_BHK, case.pages_ZYX, case.table_BP, case.lengths_B, *rest)
    )


def test_a_compiled_caller_gets_the_same(device):
    def caller(q_BHX, pages_ZYX, table_BP, lengths_B):
        out_BHC = mla_decode(q_BHX * 1.0, pages_ZYX, table_BP, lengths_B, MLA["C"], SCALE)
        return gqa_decode(out_BHC[..., :28], pages_ZYX, table_BP, lengths_B, SCALE) + 1

    case = Case(MLA, 4, [33, 5], device=device)
    inputs = (case.q_BHK, case.pages_ZYX, case.table_BP, case.lengths_B)
    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), caller(*inputs))


@pytest.mark.gpu
def test_a_captured_step_follows_the_lengths():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: torch.cuda.is_available() is False here")
    case = Case(MLA, 16, [1200, 1200], device="cuda")
    case.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    for lengths in ([1, 1200], [700, 513]):
        case.lengths_B.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, case.run())


def test_what_does_not_fit_together_is_refused(device):
    def q(*shape):
        return torch.zeros(*shape, device=device)

    pages, table, lengths = q(3, 16, 64), q(2, 1).int(), q(2).int() + 1
    with pytest.raises(ValueError, match="queries of 60 numbers, entries of 64"):
        mla_decode(q(2, 4, 60), pages, table, lengths, 48, SCALE)
    with pytest.raises(ValueError, match="C=65"):
        mla_decode(q(2, 4, 64), pages, table, lengths, 65, SCALE)
    with pytest.raises(ValueError, match="4 query heads of 24 numbers, entries of 64"):
        gqa_decode(q(2, 4, 24), pages, table, lengths, SCALE)
    with pytest.raises(ValueError, match="J divides 3"):
        gqa_decode(q(2, 3, 16), pages, table, lengths, SCALE)
    with pytest.raises(ValueError, match="2 queries, 2 lengths, 3 pages and no table"):
        mla_decode(q(2, 4, 64), pages, None, lengths, 48, SCALE)
    with pytest.raises(ValueError, match="2 queries, 3 lengths, a table of 2 rows"):
        mla_decode(q(2, 4, 64), pages, table, q(3).int(), 48, SCALE)
    with pytest.raises(ValueError, match="float16, the cache is torch.float32"):
        mla_decode(q(2, 4, 64).half(), pages, table, lengths, 48, SCALE)
    with pytest.raises(ValueError, match="side by side"):
        mla_decode(q(2, 4, 64), pages.mT.contiguous().mT, table, lengths, 48, SCALE)
