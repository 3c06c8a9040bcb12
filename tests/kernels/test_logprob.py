import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from harness import TOLERANCE, Canaries, backwards, guarded, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import logprob
from kernels.logprob import linear_logprob, reference

# (N, D, V): less than a tile, exactly tiles, more than tiles and not a multiple of them.
SIZES = [(1, 17, 5), (32, 32, 64), (33, 40, 131)]


def make(N, D, V, dtype=torch.float32, device="cpu", size=1.0, seed=0):
    """Logits of about `size`, and g, the gradient of a loss by the log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(N, D, generator=generator) * size
    weight_VD = torch.randn(V, D, generator=generator) / D**0.5
    targets_N = torch.randint(0, V, (N,), generator=generator)
    g_N = torch.randn(N, generator=generator)
    tensors = x_ND.to(dtype), weight_VD.to(dtype), targets_N, g_N
    return tuple(guarded(tensor.to(device)) for tensor in tensors)


def right(x_ND, weight_VD, targets_N, g_N, temperature=1.0):
    """logprobs, entropy, dx, dweight in float64, without log_softmax and without autograd."""
    x_ND, weight_VD, g_N = (tensor.double().cpu() for tensor in (x_ND, weight_VD, g_N))
    targets_N1 = targets_N.cpu()[:, None]
    logits_NV = x_ND @ weight_VD.T / temperature
    logprobs_NV = logits_NV - logits_NV.logsumexp(-1, keepdim=True)
    p_NV = logprobs_NV.exp()
    onehot_NV = torch.zeros_like(p_NV).scatter_(1, targets_N1, 1)
    dlogits_NV = g_N[:, None] * (onehot_NV - p_NV) / temperature
    entropy_N = -(p_NV * logprobs_NV).sum(-1)
    dx_ND, dweight_VD = dlogits_NV @ weight_VD, dlogits_NV.T @ x_ND
    return logprobs_NV.gather(1, targets_N1)[:, 0], entropy_N, dx_ND, dweight_VD


def found(x_ND, weight_VD, targets_N, g_N, temperature=1.0, chunk=0):
    """The same four from the launchers, with every buffer of theirs guarded."""
    with Canaries():
        logprobs_N, entropy_N, lse_N = logprob.forward(x_ND, weight_VD, targets_N, temperature)
        grads = logprob.backward(g_N, x_ND, weight_VD, targets_N, lse_N, temperature, chunk)
    return logprobs_N, entropy_N, *grads


def through_autograd(function, x_ND, weight_VD, targets_N, g_N, *options):
    x_ND, weight_VD = x_ND.detach().requires_grad_(), weight_VD.detach().requires_grad_()
    logprobs_N, entropy_N = function(x_ND, weight_VD, targets_N, *options)
    return logprobs_N, entropy_N, *torch.autograd.grad(logprobs_N, (x_ND, weight_VD), g_N)


def close(results, answers, tolerance):
    for name, a, b in zip(("logprobs", "entropy", "dx", "dweight"), results, answers, strict=True):
        assert relative_error(a, b) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_are_those_of_float64(size, dtype, device):
    inputs = make(*size, dtype, device)
    results = found(*inputs)
    assert [x.dtype for x in results] == [torch.float32, torch.float32, dtype, dtype]
    close(results, right(*inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_logits_are_not_rounded_to_the_dtype_of_the_input(dtype, device):
    inputs = make(9, 40, 131, dtype, device, size=4.0)
    close(found(*inputs)[:2] + right(*inputs)[2:], right(*inputs), TOLERANCE[torch.float32])
    lost = [relative_error(a, b) for a, b in zip(reference(*inputs[:3]), right(*inputs))]
    assert min(lost) > 10 * TOLERANCE[torch.float32], "the reference rounds them"


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_temperature_divides_the_logits_and_their_gradients(temperature, device):
    inputs = make(5, 40, 70, device=device)
    answers = right(*inputs, temperature)
    assert relative_error(right(*inputs)[0], answers[0]) > 0.01, "the temperature would not show"
    close(found(*inputs, temperature), answers, TOLERANCE[torch.float32])


@pytest.mark.parametrize("chunk", [1, 12, 33])
def test_slices_of_the_vocabulary_have_the_same_gradients(chunk, device):
    inputs = make(33, 40, 131, device=device)
    close(found(*inputs, 0.7, chunk), right(*inputs, 0.7), TOLERANCE[torch.float32])


def test_large_logits_do_not_overflow_and_a_certain_row_has_no_entropy(device):
    inputs = make(33, 40, 131, device=device, size=100.0)
    logprobs_N, entropy_N, *grads = found(*inputs)
    answers = right(*inputs)
    assert answers[1].min() < 1e-6 and answers[0].min() < -300
    close((logprobs_N, entropy_N, *grads), answers, 2e-5)  # fp32 logits of 300 are off by 2e-5
    for tensor in (logprobs_N, entropy_N, *grads):
        assert tensor.isfinite().all()
    assert (logprobs_N <= 0).all() and (entropy_N >= 0).all()
    x_1D, weight_VD = torch.ones(1, 16, device=device), torch.zeros(40, 16, device=device)
    weight_VD[35] = 1e4  # a logit of 160,000 in the last tile, 39 of zero
    target_1 = torch.tensor([35], device=device)
    logprobs_1, entropy_1, lse_1 = logprob.forward(x_1D, weight_VD, target_1, 1.0)
    assert logprobs_1.item() == 0 and entropy_1.item() == 0 and lse_1.isfinite()


def test_equal_logits_have_the_entropy_log_v(device):
    x_ND, weight_VD = torch.ones(3, 16, device=device), torch.ones(77, 16, device=device)
    targets_N = torch.tensor([0, 40, 76], device=device)
    logprobs_N, entropy_N, _ = logprob.forward(x_ND, weight_VD, targets_N, 1.0)
    assert logprobs_N.tolist() == pytest.approx([-math.log(77)] * 3, rel=1e-6)
    assert entropy_N.tolist() == pytest.approx([math.log(77)] * 3, rel=1e-6)


def test_rows_without_a_gradient_give_none(device):
    x_ND, weight_VD, targets_N, g_N = make(33, 40, 70, device=device)
    g_N[::2] = 0
    results = found(x_ND, weight_VD, targets_N, g_N)
    assert (results[2][::2] == 0).all()
    close(results, right(x_ND, weight_VD, targets_N, g_N), TOLERANCE[torch.float32])


def test_a_target_that_is_no_word_gives_nan(device):
    x_ND, weight_VD, _, _ = make(4, 16, 70, device=device)
    targets_N = torch.tensor([0, 70, -1, 69], device=device)
    logprobs_N = logprob.forward(x_ND, weight_VD, targets_N, 1.0)[0]
    assert logprobs_N.isnan().tolist() == [False, True, True, False]


def test_no_rows_give_empty_results_and_zero_gradients(device):
    x_ND, weight_VD, targets_N, g_N = make(0, 16, 40, device=device)
    logprobs_N, entropy_N, dx_ND, dweight_VD = through_autograd(
        linear_logprob, x_ND, weight_VD, targets_N, g_N
    )
    assert logprobs_N.shape == entropy_N.shape == (0,) and dx_ND.shape == (0, 16)
    assert dweight_VD.shape == (40, 16) and (dweight_VD == 0).all()


def test_the_order_of_the_programs_changes_nothing(device):
    if device == "cuda":
        pytest.skip("a GPU chooses its own order")
    inputs = make(33, 40, 131, torch.bfloat16)
    forwards = found(*inputs, 1.0, 12)
    with backwards():
        for a, b in zip(forwards, found(*inputs, 1.0, 12), strict=True):
            assert torch.equal(a, b)


def test_every_tile_is_computed_once_whatever_the_groups(device, monkeypatch):
    inputs = make(60, 16, 70, device=device)  # 4 tiles of rows and 3 of words in the interpreter
    right_results = found(*inputs)
    for group in (1, 3, 16):
        table = {key: (*t[:3], group, *t[4:]) for key, t in logprob.TILES.items()}
        monkeypatch.setattr(logprob, "TILES", table)
        for a, b in zip(right_results, found(*inputs), strict=True):
            assert torch.equal(a, b)


def test_inputs_that_are_not_contiguous(device):
    x_ND, weight_VD, targets_N, g_N = make(9, 40, 70, device=device)
    expected = through_autograd(linear_logprob, x_ND, weight_VD, targets_N, g_N)
    views = (
        torch.stack([x_ND, x_ND], -1)[..., 0], weight_VD.T.contiguous().T,
        torch.stack([targets_N, targets_N], -1)[:, 1], torch.stack([g_N, g_N], -1)[:, 0],
    )  # fmt: skip
    assert not any(view.is_contiguous() for view in views)
    for a, b in zip(through_autograd(linear_logprob, *views), expected, strict=True):
        assert torch.equal(a, b)


def test_no_gradient_flows_through_the_entropy(device):
    x_ND, weight_VD, targets_N, _ = make(4, 16, 40, device=device)
    logprobs_N, entropy_N = linear_logprob(x_ND.requires_grad_(), weight_VD, targets_N)
    assert logprobs_N.requires_grad and not entropy_N.requires_grad
    (logprobs_N - entropy_N).sum().backward()  # a g that is expanded, and a weight that is frozen
    expected = right(x_ND.detach(), weight_VD, targets_N, torch.ones(4))[2]
    assert relative_error(x_ND.grad, expected) < TOLERANCE[torch.float32]


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation within it makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.itemsize)
        return out


def test_no_tensor_is_larger_than_chunk_rows_of_logits(device):
    # On a GPU a slice is at least one of its tiles: 256 words for each row.
    N, D, V, chunk = (2048, 16, 8192, 128) if device == "cuda" else (48, 8, 200, 16)
    x_ND, weight_VD, targets_N, g_N = make(N, D, V, device=device)
    with Largest() as fused:
        lse_N = logprob.forward(x_ND, weight_VD, targets_N, 1.0)[2]
        logprob.backward(g_N, x_ND, weight_VD, targets_N, lse_N, 1.0, chunk)
    with Largest() as unfused:
        through_autograd(reference, x_ND, weight_VD, targets_N, g_N, 1.0, N)
    assert fused.bytes <= chunk * V * 4 < N * V * 4 <= unfused.bytes


def test_the_public_function_agrees_with_the_reference(device):
    inputs = make(20, 24, 70, device=device)
    expected = through_autograd(reference, *inputs, 0.7, 7)
    close(through_autograd(linear_logprob, *inputs, 0.7, 7), expected, TOLERANCE[torch.float32])


def test_float64_takes_the_reference(device, monkeypatch):
    monkeypatch.setattr(logprob, "_op", None)
    inputs = make(5, 16, 40, torch.float64, device)
    results = through_autograd(linear_logprob, *inputs, 0.7)
    assert all(result.dtype == torch.float64 for result in results)
    close(results, right(*inputs, 0.7), 1e-12)


def test_the_operators_keep_torchs_contract(device):
    x_ND, weight_VD, targets_N, g_N = make(3, 16, 40, device=device)
    x_ND.requires_grad_(), weight_VD.requires_grad_()
    torch.library.opcheck(logprob._op, (x_ND, weight_VD, targets_N, 0.7, 0))
    lse_N = logprob._op(x_ND, weight_VD, targets_N, 0.7, 0)[2].detach()
    x_ND, weight_VD = x_ND.detach(), weight_VD.detach()
    for frozen in (False, True):
        args = (g_N, x_ND, weight_VD, targets_N, lse_N, 0.7, 0, frozen)
        torch.library.opcheck(logprob._backward_op, args)


def test_a_frozen_weight_gets_no_gradient_and_costs_none(device, monkeypatch):
    x_ND, weight_VD, targets_N, g_N = make(5, 24, 40, device=device)
    expected, _ = logprob.backward(
        g_N, x_ND, weight_VD, targets_N, logprob.forward(x_ND, weight_VD, targets_N, 0.7)[2], 0.7, 0
    )
    monkeypatch.setattr(torch, "mm", None)  # what makes the gradient of the weight
    x_ND.requires_grad_()
    linear_logprob(x_ND, weight_VD, targets_N, 0.7)[0].backward(g_N)
    assert torch.equal(x_ND.grad, expected)


def test_compiled_it_is_what_it_is_eagerly(device):
    inputs = make(5, 24, 40, device=device)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    expected = through_autograd(linear_logprob, *inputs, 0.7)
    for a, b in zip(through_autograd(compiled, *inputs, 0.7), expected, strict=True):
        assert torch.equal(a, b)


def test_compiled_once_it_takes_any_number_of_rows(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(linear_logprob, fullgraph=True, backend=counter, dynamic=True)
    for N in (5, 7, 9, 11):
        x_ND, weight_VD, targets_N, _ = make(N, 24, 40, device=device)
        assert torch.equal(compiled(x_ND, weight_VD, targets_N)[0],
                           linear_logprob(x_ND, weight_VD, targets_N)[0])  # fmt: skip
    assert counter.frame_count <= 2


def test_mistakes_are_named():
    x_ND, weight_VD, targets_N, _ = make(3, 16, 40)
    for args, message in [
        ((x_ND[:, :8], weight_VD, targets_N), r"x=\(3, 8\), weight=\(40, 16\)"),
        ((x_ND, weight_VD, targets_N[:2]), r"targets=\(2,\)"),
        ((x_ND, weight_VD, targets_N.float()), "torch.float32"),
        ((x_ND.bfloat16(), weight_VD, targets_N), "bfloat16.*convert"),
        ((x_ND, weight_VD, targets_N, 0.0), "temperature=0.0 must be above 0"),
        ((x_ND, weight_VD, targets_N, 1.0, -1), "chunk=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_logprob(*args)
