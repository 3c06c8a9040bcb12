"""kernels/experts.py against loops over experts in float64."""

import pytest
import torch
import torch.nn.functional as F
from harness import TOLERANCE, Canaries, backwards, guarded, relative_error

from kernels import experts
from kernels.experts import grouped_linear, grouped_swiglu

SIZES = {  # rows of each expert; the interpreter's tiles have 16 rows
    "uneven, the first and the last empty": [0, 17, 1, 0, 16, 0],
    "all rows in one expert": [0, 0, 33, 0],
    "one row": [0, 1, 0],
    "no rows": [0, 0],
    "one expert": [20],
}


def problem(sizes, D=24, F=20, dtype=torch.float32, device="cpu", tokens=None, seed=0):
    """x, gate, up, ends, rows; without `tokens` every row reads its own row of x."""
    make = torch.Generator().manual_seed(seed)
    E, W = len(sizes), sum(sizes)
    x = torch.randn(tokens or W, D, generator=make)
    gate, up = torch.randn(2, E, F, D, generator=make) / D**0.5
    rows = torch.randint(tokens, (W,), generator=make).to(device) if tokens else None
    ends = torch.tensor(sizes).cumsum(0).to(device)
    return *(guarded(t.to(device, dtype)) for t in (x, gate, up)), ends, rows


def linear_loop(x, weight, ends, rows=None):
    x, start, out = x if rows is None else x[rows], 0, []
    for end, w in zip(ends.tolist(), weight):
        out.append(x[start:end] @ w.T)
        start = end
    return torch.cat(out)


def swiglu_loop(x, gate, up, ends, rows=None):
    return F.silu(linear_loop(x, gate, ends, rows)) * linear_loop(x, up, ends, rows)


def gradients(function, tensors, ends, rows, dy=None):
    """The output and the gradients of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, ends, rows)
    if dy is None:
        make = torch.Generator().manual_seed(9)
        dy = torch.randn(y.shape, generator=make).to(y.device, y.dtype)
    return y, *torch.autograd.grad(y, leaves, dy)


def close(found, right, dtype):
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        error = relative_error(a, b)
        assert error < TOLERANCE[dtype], f"{i=} {error=}"


def compare(function, loop, tensors, ends, rows, dy=None):
    """Forward and gradients, with those of the loop in float64."""
    found = gradients(function, tensors, ends, rows, dy)
    right = gradients(loop, [t.double() for t in tensors], ends, rows, dy)
    close(found, right, tensors[0].dtype)
    return found


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_linear_is_a_loop_over_experts(sizes, device):
    x, weight, _, ends, _ = problem(sizes, device=device)
    *_, dweight = compare(grouped_linear, linear_loop, (x, weight), ends, None)
    for n, dw in zip(sizes, dweight):
        assert n or not dw.any(), "an expert without rows has a gradient"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_swiglu_gathers_tokens_and_sums_the_gradients_of_their_copies(dtype, device):
    x, gate, up, ends, rows = problem([0, 17, 1, 0], dtype=dtype, device=device, tokens=9)
    rows = torch.where(rows == 5, 4, rows)  # token 5 has no expert; its gradient is zero
    *_, dx, dgate, dup = compare(grouped_swiglu, swiglu_loop, (x, gate, up), ends, rows)
    assert not dx[5].any() and not dgate[0].any() and not dup[3].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear_gathers_tokens_too(dtype, device):
    x, weight, _, ends, rows = problem([3, 0, 18], dtype=dtype, device=device, tokens=7)
    compare(grouped_linear, linear_loop, (x, weight), ends, rows)


def test_the_launchers_stay_within_their_buffers(device):
    x, gate, up, ends, rows = problem([0, 17, 0, 4, 0], device=device, tokens=9)
    ends, rows = torch.cat([ends, ends.new_full((8,), -(10**6))])[:5], guarded(rows)
    y, *_ = right = gradients(swiglu_loop, (x, gate, up), ends, rows)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(device)
    with Canaries():
        y, _ = experts.swiglu_launch(x, gate, up, ends, rows)
        dg, du = experts.swiglu_launch(x, gate, up, ends, rows, dy)
        dgate, dup = (experts.wgrad_launch(d, x, ends, rows) for d in (dg, du))
        dx_WD = experts.linear_launch(dg, gate.mT, ends, None, du, up.mT)
        dx = experts.sum_copies_launch(dx_WD, rows, len(x))
    close((y, dx, dgate, dup), right, x.dtype)


@pytest.mark.parametrize("D, F", [(16, 32), (1, 1), (35, 33)])
def test_any_width(D, F, device):
    x, gate, up, ends, _ = problem([3, 0, 18], D, F, device=device)
    compare(grouped_linear, linear_loop, (x, gate), ends, None)
    compare(grouped_swiglu, swiglu_loop, (x, gate, up), ends, None)


def test_256_experts_and_int32_indices(device):
    sizes = [0] * 256
    sizes[3], sizes[250], sizes[255] = 17, 1, 2
    x, weight, _, ends, rows = problem(sizes, 8, 8, device=device, tokens=9)
    found = grouped_linear(x, weight, guarded(ends.int()), guarded(rows.int()))
    close([found], [linear_loop(x.double(), weight.double(), ends, rows)], x.dtype)


def test_many_tiles_of_rows_visit_every_tile_once(device):
    """More tiles of rows than GROUP, which is where the order that spares L2 starts to matter."""
    x, weight, _, ends, _ = problem([50, 0, 90, 7], D=16, F=70, device=device)
    compare(grouped_linear, linear_loop, (x, weight), ends, None)


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity times zero, in the interpreter
def test_rows_of_one_expert_do_not_see_the_infinities_of_another(device):
    x, gate, up, ends, _ = problem([5, 20, 4], device=device)
    x = x.clone()
    x[5:25] = float("inf")
    dy = torch.ones(29, 20, device=device)
    right = gradients(swiglu_loop, (x, gate, up), ends, None, dy)
    found = gradients(grouped_swiglu, (x, gate, up), ends, None, dy)
    for name, a, b in zip(("y", "dx", "dgate", "dup"), found, right):
        keep = [0, 1, 2, 3, 4, 25, 26, 27, 28] if name in ("y", "dx") else [0, 2]
        assert relative_error(a[keep], b[keep]) < 3e-6, name


def test_inputs_need_not_be_contiguous(device):
    x, gate, up, ends, rows = problem([4, 0, 5], device=device, tokens=6)
    x, gate, up = x.T.contiguous().T, gate.mT.contiguous().mT, torch.cat([up, up], 2)[..., :24]
    assert not any(t.is_contiguous() for t in (x, gate, up)) and gate.stride() != up.stride()
    dy = torch.ones((), device=device).expand(9, 20)  # what y.sum() sends back
    for function, loop, tensors in (
        (grouped_linear, linear_loop, (x, gate)),
        (grouped_swiglu, swiglu_loop, (x, gate, up)),
    ):
        compare(function, loop, tensors, ends, rows, dy)


def test_only_the_gradients_that_are_needed_are_made(device, monkeypatch):
    x, gate, up, ends, rows = problem([4, 3], device=device, tokens=5)
    monkeypatch.setattr(experts, "_wgrad", None)  # calling it would fail
    x.requires_grad_()
    (grouped_swiglu(x, gate, up, ends, rows) * grouped_linear(x, up, ends, rows)).sum().backward()
    assert x.grad is not None and gate.grad is None


def test_the_order_of_programs_changes_nothing(device):
    if device != "cpu":
        pytest.skip("only the interpreter can walk a grid backwards")
    x, gate, up, ends, rows = problem([17, 0, 2], dtype=torch.bfloat16, tokens=6)
    found = gradients(grouped_swiglu, (x, gate, up), ends, rows)
    with backwards():
        again = gradients(grouped_swiglu, (x, gate, up), ends, rows)
    assert all(torch.equal(a, b) for a, b in zip(found, again))


def test_opcheck(device):
    x, gate, up, ends, rows = problem([5, 0, 3], 8, 8, device=device, tokens=4)
    dy = torch.randn(8, 8, device=device)
    x, gate, up = (t.requires_grad_() for t in (x, gate, up))
    for op, args in (
        (experts._linear, (x, gate, ends, rows)),
        (experts._swiglu, (x, gate, up, ends, rows)),
    ):
        torch.library.opcheck(op, args)
    x, gate, up = (t.detach() for t in (x, gate, up))
    for op, args in (
        (experts._dswiglu, (dy, x, gate, up, ends, rows)),
        (experts._dgrad, ([dy, dy], [gate, up], ends, rows, 4)),
        (experts._dgrad, ([dy], [gate], ends, None, 8)),
        (experts._wgrad, (dy, x, ends, rows)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_compile_equals_eager(device):
    x, gate, up, ends, rows = problem([5, 0, 3], 16, 16, device=device, tokens=4)

    def both(x, gate, up, ends, rows):
        return grouped_linear(grouped_swiglu(x, gate, up, ends, rows), up, ends)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    right = gradients(both, (x, gate, up), ends, rows)
    found = gradients(compiled, (x, gate, up), ends, rows)
    assert all(torch.equal(a, b) for a, b in zip(found, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("D", [16, 6])
def test_the_reference_is_a_loop_over_experts(dtype, D, device, monkeypatch):
    monkeypatch.setattr(experts, "use_triton", lambda x: False)
    x, gate, up, ends, rows = problem([0, 9, 4, 0], D, 24, dtype, device, tokens=5)
    right = gradients(swiglu_loop, [t.double() for t in (x, gate, up)], ends, rows)
    found = gradients(grouped_swiglu, (x, gate, up), ends, rows)
    close(found, right, torch.float32 if dtype == torch.float64 else dtype)


def test_float64_takes_the_reference(device):
    x, gate, up, ends, rows = problem([5, 3], dtype=torch.float64, device=device, tokens=4)
    assert torch.equal(
        grouped_swiglu(x, gate, up, ends, rows),
        experts.grouped_swiglu_reference(x, gate, up, ends, rows),
    )


def test_what_does_not_fit_is_refused():
    x, gate, up, ends, rows = problem([5, 3], tokens=4)
    for arguments, message in (
        ((x[0], gate, ends), "x_ND has shape"),
        ((x, gate[..., 1:], ends), "weight_EFD has shape"),
        ((x, gate.half(), ends), "weight_EFD is torch.float16"),
        ((x, gate, ends.float()), "ends_E is torch.float32"),
        ((x, gate, ends[1:]), "weight_EFD has shape"),
        ((x, gate, ends, rows[None]), "rows_W is torch.int64 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_linear(*arguments)
    with pytest.raises(ValueError, match="up_EFD has shape"):
        grouped_swiglu(x, gate, up[:, 1:], ends)
