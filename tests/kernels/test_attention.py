"""kernels/attention.py against the reference in float64."""

import sys

import pytest
import torch
from harness import TOLERANCE, Canaries, backwards, guarded, relative_error

from kernels.attention import (
    attention, attention_backward, attention_forward, attention_reference,
)  # fmt: skip

f32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
PACKED = [30, 1, 45, 9]  # and the rest of the row is padding, each token alone


def starts_of(lengths: list[int], T: int, device: str, dtype=torch.int32) -> torch.Tensor:
    lengths = lengths + [1] * (T - sum(lengths))
    firsts = [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor(firsts[:T], dtype=dtype, device=device)


def inputs(device: str, B: int, T: int, H: int, J: int, K: int, U: int, dtype=f32):
    """q, k, v, dout between NaNs."""
    torch.manual_seed(0)
    shapes = (B, T, H, K), (B, T, J, K), (B, T, J, U), (B, T, H, U)
    return [guarded(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]


def run(q, k, v, dout, starts, scale):
    """out, dq, dk, dv of the launchers, in fresh memory between canaries."""
    with Canaries():
        out, lse = attention_forward(q, k, v, starts, scale)
        return out, *attention_backward(dout, q, k, v, starts, out, lse, scale)


def gradients(function, q, k, v, dout, starts, scale):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, scale, starts)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def right(q, k, v, dout, starts, scale):
    wide = (x.double() for x in (q, k, v, dout))
    return gradients(attention_reference, *wide, starts, scale)


@pytest.mark.parametrize("dtype, sizes, lengths", [
    (f32, (2, 97, 1, 1, 32, 24), PACKED),
    (f32, (1, 97, 4, 2, 192, 128), PACKED),
    (f32, (1, 97, 2, 1, 64, 64), [97]),
    (f32, (1, 33, 7, 1, 96, 64), [3, 20]),
    (f32, (1, 17, 2, 2, 12, 40), [17]),
    (bf16, (1, 97, 2, 1, 192, 128), PACKED),
    (fp16, (1, 65, 2, 2, 128, 256), [40, 10]),
])  # fmt: skip
def test_output_and_gradients_are_those_of_float64(device, dtype, sizes, lengths):
    T, K = sizes[1], sizes[4]
    tensors = inputs(device, *sizes, dtype=dtype)
    rows = [starts_of(lengths, T, device), starts_of(lengths[::-1], T, device)]
    starts = guarded(torch.stack(rows[: sizes[0]]))
    found = run(*tensors, starts, K**-0.5)
    for name, x, wanted in zip(("out", "dq", "dk", "dv"), found, right(*tensors, starts, K**-0.5)):
        assert relative_error(x, wanted) < TOLERANCE[dtype], name


def test_a_single_token_sees_itself(device):
    q, k, v, dout = inputs(device, 2, 1, 3, 1, 32, 24)
    starts = starts_of([1], 1, device).expand(2, 1).contiguous()
    out, dq, dk, dv = run(q, k, v, dout, starts, 0.1)
    assert relative_error(out, v.expand(-1, -1, 3, -1)) < 1e-6
    assert relative_error(dv, dout.double().sum(2, keepdim=True)) < 1e-6
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5  # softmax of one number is constant


def test_a_document_in_a_row_is_as_it_is_alone(device):
    q, k, v, dout = inputs(device, 1, 97, 2, 1, 32, 24)
    packed = gradients(attention, q, k, v, dout, starts_of(PACKED, 97, device)[None], 0.2)
    for start, n in ((0, 30), (30, 1), (31, 45), (76, 9), (90, 1)):
        alone = (x[:, start : start + n] for x in (q, k, v, dout))
        for x, wanted in zip(packed, right(*alone, None, 0.2)):
            assert (x[:, start : start + n] - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-6


@pytest.mark.filterwarnings("ignore:All-NaN")  # numpy, inside the interpreter
def test_tiles_of_other_documents_are_not_loaded(device):
    # Documents that end where tiles end. Were such a tile only masked, 0 x NaN would be NaN.
    q, k, v, dout = inputs(device, 1, 128, 1, 1, 32, 24)
    starts = starts_of([64, 64], 128, device)[None]
    poisoned = [x.clone() for x in (q, k, v, dout)]
    for x in poisoned[1:3]:
        x[:, :64] = float("nan")  # keys that the second document's queries don't see
    out, dq, _, _ = run(*poisoned, starts, 0.2)
    assert out[:, 64:].isfinite().all() and dq[:, 64:].isfinite().all()
    poisoned = [x.clone() for x in (q, k, v, dout)]
    for x in (poisoned[0], poisoned[3]):
        x[:, 64:] = float("nan")  # queries that don't see the first document's keys
    _, _, dk, dv = run(*poisoned, starts, 0.2)
    assert dk[:, :64].isfinite().all() and dv[:, :64].isfinite().all()


def test_scores_of_thousands_do_not_overflow(device):
    q, k, v, dout = inputs(device, 1, 64, 1, 1, 32, 32)
    starts = starts_of([40, 20], 64, device)[None]
    out, *found = run(q * 1000, k, v, dout, starts, 1.0)
    assert relative_error(out, right(q * 1000, k, v, dout, starts, 1.0)[0]) < 1e-2
    assert all(x.isfinite().all() for x in found)


def test_programs_may_run_in_any_order(device):
    if device == "cuda":
        pytest.skip("the interpreter's grid is walked backwards")
    tensors = inputs(device, 2, 65, 4, 2, 32, 24)
    starts = starts_of([30, 1, 20], 65, device).expand(2, 65).contiguous()
    forwards = run(*tensors, starts, 0.2)
    with backwards():
        reversed_ = run(*tensors, starts, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed_))


def test_views_give_what_copies_give(device):
    B, T, H, J, K, U = 2, 65, 2, 1, 32, 24
    torch.manual_seed(0)
    q = guarded(torch.randn(B, H, T, K, device=device)).transpose(1, 2)  # heads before tokens
    k, v = guarded(torch.randn(B, T, J, K + U, device=device)).split((K, U), -1)  # as in MLA
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)  # the last stride is not 1
    dout = torch.ones(1, 1, 1, 1, device=device).expand(B, T, H, U)  # as from a sum
    starts = starts_of([20, 33], T, device, torch.int64).expand(B, T)
    views = gradients(attention, q, k, v, dout, starts, 0.2)
    copies = gradients(attention, *(x.contiguous() for x in (q, k, v, dout, starts.int())), 0.2)
    assert all(torch.equal(a, b) for a, b in zip(views, copies))
    assert all(x.is_contiguous() for x in views)


def test_no_starts_is_one_document_a_row(device):
    q, k, v, dout = inputs(device, 1, 40, 2, 1, 32, 24)
    zeros = torch.zeros(1, 40, dtype=torch.int64, device=device)
    found = gradients(attention, q, k, v, dout, None, 0.2)
    for x, y, wanted in zip(
        found, gradients(attention, q, k, v, dout, zeros, 0.2), right(q, k, v, dout, None, 0.2)
    ):
        assert torch.equal(x, y) and relative_error(x, wanted) < TOLERANCE[f32]


@pytest.mark.parametrize("B, T", [(0, 5), (2, 0)])
def test_nothing_in_nothing_out(device, B, T):
    q, k, v, dout = inputs(device, B, T, 2, 1, 32, 24)
    found = gradients(attention, q, k, v, dout, None, 0.2)
    assert [x.shape for x in found] == [x.shape for x in (dout, q, k, v)]


def test_the_operators_keep_torchs_rules(device):
    q, k, v, dout = inputs(device, 1, 9, 2, 1, 16, 24)
    starts = starts_of([5, 3], 9, device)[None]
    out, lse = attention_forward(q, k, v, starts, 0.2)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.nanor1.attention, (*leaves, starts, 0.2))
    torch.library.opcheck(
        torch.ops.nanor1.attention_backward, (dout, q, k, v, starts, out, lse, 0.2)
    )


def test_compiled_is_eager(device):
    q, k, v, dout = inputs(device, 1, 20, 2, 1, 16, 24)
    starts = starts_of([5, 3], 20, device)[None]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = gradients(attention, q, k, v, dout, starts, 0.2)
    again = gradients(compiled, q, k, v, dout, starts, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(eager, again))


def test_float64_takes_the_reference(device, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.attention"], "_attention", None)
    q, k, v, _ = (x.double() for x in inputs(device, 1, 9, 2, 1, 16, 24))
    starts = starts_of([5, 3], 9, device)[None]
    wanted = attention_reference(q, k, v, 0.2, starts)
    assert torch.equal(attention(q, k, v, 0.2, starts), wanted)


@pytest.mark.parametrize("change, message", [
    (dict(k=(1, 5, 3, 16), v=(1, 5, 3, 24)), "J divides H"),
    (dict(k=(1, 6, 2, 16)), "BTJK"),
    (dict(v=(1, 5, 2, 257)), "up to 256"),
    (dict(v=bf16), "one dtype"),
    (dict(scale=0.0), "scale=0.0"),
    (dict(starts=(1, 4)), "starts_BT"),
    (dict(starts=f32), "and int32 or int64"),
])  # fmt: skip
def test_mistakes_are_told(device, change, message):
    shapes = dict(q=(1, 5, 4, 16), k=(1, 5, 2, 16), v=(1, 5, 2, 24), starts=(1, 5))
    dtypes = dict(q=f32, k=f32, v=f32, starts=torch.int32)
    for name, what in change.items():
        (shapes if isinstance(what, tuple) else dtypes)[name] = what
    made = {name: torch.zeros(shapes[name], dtype=dtypes[name], device=device) for name in shapes}
    with pytest.raises(ValueError, match=message):
        attention(made["q"], made["k"], made["v"], change.get("scale", 1.0), made["starts"])
