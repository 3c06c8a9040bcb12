"""RMSNorm and SwiGLU against float64."""

import pytest
import torch
from harness import TOLERANCE, Canaries, backwards, guarded, relative_error

from kernels import norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One row, an odd width, heads (several to a tile), wider than the tile of the tests.
NORM_SHAPES = [(1, 5), (7, 33), (2, 9, 3, 16), (5, 128)]


def norm_inputs(shape, dtype, device, seed=0):
    torch.manual_seed(seed)
    x, dy = (guarded(torch.randn(shape).to(device, dtype)) for _ in range(2))
    weight = guarded((1 + torch.randn(shape[-1]) / 4).to(device, dtype))
    return x, weight, dy


def swiglu_inputs(shape, dtype, device):
    """With numbers behind the end and not NaN: a number read there is harmless, one written not,
    and the canary that lives there is NaN."""
    torch.manual_seed(0)
    size = torch.Size(shape).numel()
    return [(3 * torch.randn(size + 64)).to(device, dtype)[:size].view(shape) for _ in range(3)]


def gradients(function, inputs, dy):
    """Of each input in float64, through autograd."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    return y, torch.autograd.grad(y, inputs, dy)


def check(found, right, dtype):
    for f, r in zip(found, right, strict=True):
        assert f.dtype == dtype
        assert relative_error(f, r) < TOLERANCE[dtype]


# ---- RMSNorm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_rms_norm_and_its_gradients_are_those_of_float64(shape, dtype, device):
    x, weight, dy = norm_inputs(shape, dtype, device)
    with Canaries():
        y, rstd = norm.rms_norm_forward(x, weight, 1e-5)
        grads = norm.rms_norm_backward(dy, x, weight, rstd)
    right, right_grads = gradients(
        lambda x, w: norm.rms_norm_reference(x, w, 1e-5), (x.double(), weight.double()), dy.double()
    )
    check((y, *grads), (right, *right_grads), dtype)


def test_eps_counts_where_x_is_small(device):
    x, weight, dy = norm_inputs((4, 33), torch.float32, device)
    x = x * 1e-3
    y, rstd = norm.rms_norm_forward(x, weight, 1e-6)
    dx, _ = norm.rms_norm_backward(dy, x, weight, rstd)
    right, (right_dx, _) = gradients(
        lambda x, w: norm.rms_norm_reference(x, w, 1e-6), (x.double(), weight.double()), dy.double()
    )
    check((y, dx), (right, right_dx), torch.float32)
    assert relative_error(norm.rms_norm_reference(x, weight, 0.0), right) > 0.1


def test_dweight_sums_more_rows_than_programs(device):
    shape = (301, 32) if device == "cpu" else (100_003, 32)
    x, weight, dy = norm_inputs(shape, torch.float32, device)
    tile = norm._tile(32)
    programs = norm.TILES[norm.arch()][1] // tile["num_warps"]
    assert shape[0] > tile["BLOCK_M"] * programs, "every program needs to loop"
    _, rstd = norm.rms_norm_forward(x, weight, 1e-5)
    _, dweight = norm.rms_norm_backward(dy, x, weight, rstd)
    h = torch.nn.functional.rms_norm(x.double(), (32,), eps=1e-5)
    check([dweight], [(dy.double() * h).sum(0)], torch.float32)


def test_rows_of_a_split_projection_are_read_in_place(device, monkeypatch):
    projected, weight, _ = norm_inputs((2, 3, 24), torch.float32, device)
    latent, rope = projected.split([16, 8], -1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", None)  # a copy would call it
        assert norm._rows(latent).data_ptr() == projected.data_ptr()
        assert norm._rows(rope).stride() == (24, 1)
    y, rstd = norm.rms_norm_forward(latent, weight[:16], 1e-5)
    assert torch.equal(y, norm.rms_norm_forward(latent.contiguous(), weight[:16], 1e-5)[0])
    one = torch.ones((), device=device).expand(2, 3, 16)  # the gradient of a sum, stride 0
    for dy in (one, projected[..., 8:]):
        found = norm.rms_norm_backward(dy, latent, weight[:16], rstd)
        right = norm.rms_norm_backward(dy.contiguous(), latent.contiguous(), weight[:16], rstd)
        assert all(torch.equal(f, r) for f, r in zip(found, right, strict=True))


def test_a_transposed_x_is_copied(device):
    x, weight, _ = norm_inputs((16, 16), torch.float32, device)
    right = norm.rms_norm_reference(x.T.double(), weight.double(), 1e-5)
    check([norm.rms_norm(x.T, weight, 1e-5)], [right], torch.float32)


def test_no_rows_give_no_rows_and_no_gradient(device):
    x = torch.randn(0, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    y = norm.rms_norm(x, weight, 1e-5)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8, device=device))


def test_a_weight_in_fp32_leaves_x_in_bf16(device):
    x, _, dy = norm_inputs((5, 24), torch.bfloat16, device)
    weight = torch.randn(24, device=device)
    found, (dx, dweight) = gradients(lambda x, w: norm.rms_norm(x, w, 1e-5), (x, weight), dy)
    right, right_grads = gradients(
        lambda x, w: norm.rms_norm_reference(x, w, 1e-5), (x.double(), weight.double()), dy.double()
    )
    check((found, dx), (right, right_grads[0]), torch.bfloat16)
    check([dweight], right_grads[1:], torch.float32)


# ---- SwiGLU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 11), (4, 32)])
def test_swiglu_and_its_gradients_are_those_of_float64(shape, dtype, device):
    gate, up, dy = swiglu_inputs(shape, dtype, device)
    with Canaries():
        y = norm.swiglu_forward(gate, up)
        grads = norm.swiglu_backward(dy, gate, up)
    right, right_grads = gradients(norm.swiglu_reference, (gate.double(), up.double()), dy.double())
    check((y, *grads), (right, *right_grads), dtype)


@pytest.mark.filterwarnings("ignore:overflow")
def test_swiglu_is_finite_where_exp_overflows(device):
    gate = torch.tensor([-200.0, -90.0, 90.0, 200.0], device=device)
    up = torch.ones_like(gate)
    y = norm.swiglu_forward(gate, up)
    assert torch.equal(y.clamp(min=0), gate.clamp(min=0)) and (y <= 0).tolist() == [1, 1, 0, 0]
    dgate, dup = norm.swiglu_backward(up, gate, up)
    assert torch.allclose(dgate.cpu(), torch.tensor([0.0, 0.0, 1.0, 1.0])) and dup.isfinite().all()


def test_halves_of_one_projection_are_gate_and_up(device):
    both = torch.randn(6, 40, device=device)
    gate, up = both.chunk(2, -1)
    assert torch.equal(norm.swiglu(gate, up), norm.swiglu(gate.contiguous(), up.contiguous()))


def test_nothing_gives_nothing(device):
    nothing = torch.randn(0, 8, device=device, requires_grad=True)
    y = norm.swiglu(nothing, nothing)
    y.sum().backward()
    assert y.shape == (0, 8)


# ---- both ----------------------------------------------------------------------------------------


def test_the_order_of_programs_changes_no_bit(device):
    if device == "cuda":
        pytest.skip("only the interpreter has an order")
    x, weight, dy = norm_inputs((37, 20), torch.float32, device)

    def everything():
        y, rstd = norm.rms_norm_forward(x, weight, 1e-5)
        return y, *norm.rms_norm_backward(dy, x, weight, rstd), norm.swiglu_forward(x, dy)

    forwards = everything()
    with backwards():
        assert all(torch.equal(f, b) for f, b in zip(forwards, everything(), strict=True))


def test_torch_accepts_the_operators(device):
    x, weight, dy = norm_inputs((3, 8), torch.float32, device)
    rstd = torch.rand(3, device=device)
    leaf = lambda t: t.clone().requires_grad_()  # noqa: E731
    torch.library.opcheck(norm.rms_norm_op, (leaf(x), leaf(weight), 1e-5))
    torch.library.opcheck(norm.rms_norm_backward_op, (dy, x, weight, rstd))
    torch.library.opcheck(norm.swiglu_op, (leaf(x), leaf(dy)))
    torch.library.opcheck(norm.swiglu_backward_op, (x, dy, dy))


def test_compiled_is_eager(device):
    x, weight, dy = norm_inputs((6, 24), torch.float32, device)

    def block(x, weight):
        h = norm.rms_norm(x, weight, 1e-5)
        return norm.swiglu(h, x)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found, found_grads = gradients(compiled, (x, weight), dy)
    right, right_grads = gradients(block, (x, weight), dy)
    for f, r in zip((found, *found_grads), (right, *right_grads), strict=True):
        assert torch.equal(f, r)


def test_float64_takes_the_references(device, monkeypatch):
    monkeypatch.setattr(norm, "rms_norm_op", None)
    monkeypatch.setattr(norm, "swiglu_op", None)
    x = torch.randn(3, 8, dtype=torch.float64, device=device)
    assert torch.equal(norm.rms_norm(x, x[0], 1e-5), norm.rms_norm_reference(x, x[0], 1e-5))
    assert torch.equal(norm.swiglu(x, x), norm.swiglu_reference(x, x))


def test_shapes_that_do_not_fit_are_refused(device):
    x = torch.randn(3, 8, device=device)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), x \(3, 8\)"):
        norm.rms_norm(x, x[0, :7], 1e-5)
    with pytest.raises(ValueError, match=r"gate is \(3, 8\).*up \(2, 8\)"):
        norm.swiglu(x, x[:2])
    with pytest.raises(ValueError, match="bfloat16"):
        norm.swiglu(x, x.bfloat16())
