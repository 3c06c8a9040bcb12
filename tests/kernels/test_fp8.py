"""e4m3 and its scales: every code, every kind of fp32, blocks cut short."""

import itertools

import pytest
import torch
from harness import Canaries, backwards, guarded, relative_error

from kernels import fp8

E4M3 = torch.float8_e4m3fn


def bytes_of(codes):
    return codes.cpu().view(torch.uint8)


def same(found, right):
    """The same numbers, and NaN in the same places."""
    return torch.equal(found.nan_to_num(nan=12345.0), right.nan_to_num(nan=12345.0))


def a_weight(F, D, device):
    """Codes other than NaN, and scales as in a checkpoint."""
    torch.manual_seed(0)
    codes = torch.randint(0, 0x7F, (F, D), dtype=torch.uint8)
    codes |= torch.randint(0, 2, (F, D), dtype=torch.uint8) << 7
    scales = 1e-4 * (0.1 + torch.rand(-(-F // 128), -(-D // 128)))
    return guarded(codes.to(device)).view(E4M3), guarded(scales.to(device))


# ---- dequantise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_of_the_256_codes_becomes_its_number(dtype, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(1, 256)
    right = []
    for code in range(256):  # by the formula
        sign, e, m = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
        number = 2.0 ** (e - 7) * (1 + m / 8) if e else 2.0**-6 * m / 8
        right.append(float("nan") if code & 0x7F == 0x7F else sign * number)
    right = torch.tensor([right], device=device)
    for dequant in (fp8.dequant_fp8, fp8.dequant_fp8_reference):
        found = dequant(codes.view(E4M3), torch.ones(1, 2, device=device), dtype)
        assert same(found.float(), right)
        assert found[0, 128].signbit(), "-0"


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 257), (300, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantised_is_the_reference_bit_for_bit(shape, dtype, device):
    codes_FD, scale_inv = a_weight(*shape, device)
    with Canaries():
        found = fp8.dequant_fp8_launch(codes_FD.view(torch.uint8), scale_inv, dtype)
    assert found.dtype == dtype and found.isfinite().all()
    right = fp8.dequant_fp8_reference(codes_FD, scale_inv, dtype)
    if dtype == torch.bfloat16 and device == "cpu":  # the interpreter cuts bf16 off
        assert torch.allclose(found, right, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, right)


def test_v3_3_3_blocks_each_have_their_own_scale(device):
    codes_FD = torch.full((300, 200), 0x38, dtype=torch.uint8, device=device).view(E4M3)  # ones
    scale_inv = torch.arange(1.0, 7.0, device=device).view(3, 2)
    right = scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    assert torch.equal(fp8.dequant_fp8(codes_FD, scale_inv, torch.float32), right)


def test_views_are_dequantised_as_their_copies(device):
    codes_FD, scale_inv = a_weight(130, 256, device)
    found = fp8.dequant_fp8(codes_FD[:, 128:], scale_inv[:, 1:])
    assert torch.equal(found, fp8.dequant_fp8(codes_FD, scale_inv)[:, 128:])
    found = fp8.dequant_fp8(codes_FD.T, scale_inv.T)
    assert torch.equal(found, fp8.dequant_fp8(codes_FD, scale_inv).T)


def test_float64_is_the_exact_product(device):
    codes_FD, scale_inv = a_weight(3, 130, device)
    exact = fp8.dequant_fp8(codes_FD, scale_inv, torch.float64)
    right = codes_FD.to(torch.float64) * scale_inv.double().repeat_interleave(128, 1)[:, :130]
    assert torch.equal(exact, right)
    found = fp8.dequant_fp8(codes_FD, scale_inv, torch.float32)
    assert relative_error(found, exact) < 1e-7


# ---- quantise ------------------------------------------------------------------------------------


def test_encoding_rounds_to_the_nearest_code_and_ties_to_even(device):
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    finite = numbers[numbers.isfinite()].unique()
    ties = (finite[1:] + finite[:-1]) / 2
    around = [torch.nextafter(ties, torch.full_like(ties, s * 1e9)) for s in (-1, 1)]
    torch.manual_seed(0)
    random = torch.randn(5000) * torch.exp2(torch.randint(-16, 10, (5000,)).float())
    # The largest in each run is 448, so that the scale is 1: what is tested is the code alone.
    x = torch.cat([finite, ties, *around, random]).clamp(-448, 448)
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(x, (0, 1), value=448.0).to(device)
    codes, scales = fp8.quant_fp8_launch(guarded(x))
    assert torch.equal(scales, torch.ones_like(scales))
    assert torch.equal(codes.cpu(), bytes_of(x.to(E4M3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 128), (67, 384)])
def test_quantised_is_the_reference_bit_for_bit(shape, dtype, device):
    torch.manual_seed(0)
    x_ND = torch.randn(shape) * torch.exp2(torch.randint(-12, 8, (shape[0], 1)))
    x_ND = guarded(x_ND.to(device, dtype))
    with Canaries():
        codes_ND, scales_NG = fp8.quant_fp8_launch(x_ND)
    right_codes, right_scales = fp8.quant_fp8_reference(x_ND)
    assert torch.equal(scales_NG, right_scales)
    assert torch.equal(codes_ND.cpu(), bytes_of(right_codes))


def test_a_number_comes_back_to_half_a_step(device):
    torch.manual_seed(0)
    x_ND = torch.randn(9, 256, device=device)
    codes_ND, scales_NG = fp8.quant_fp8(x_ND)
    scales_ND = scales_NG.repeat_interleave(128, 1)
    assert torch.allclose(scales_NG, x_ND.unflatten(1, (2, 128)).abs().amax(2) / 448)
    error_ND = (codes_ND.float() * scales_ND - x_ND).abs()
    assert (error_ND <= (x_ND.abs() / 16).maximum(scales_ND * 2**-10) * (1 + 1e-6)).all()


def test_zeros_stay_zero_and_nan_stays_nan(device):
    x_ND = torch.zeros(3, 128, device=device)
    x_ND[1, 5] = float("nan")
    x_ND[2] = 1e-38
    codes_ND, scales_NG = fp8.quant_fp8(x_ND)
    found = codes_ND.float() * scales_NG
    assert torch.equal(found[0], x_ND[0]) and found[1, 5].isnan()
    assert scales_NG[0] > 0 and (found[2] - x_ND[2]).abs().max() < 1e-30


@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (130, 300)])
def test_a_weight_in_blocks_comes_back_to_half_a_step(shape, device):
    torch.manual_seed(0)
    weight_FD = torch.randn(shape, device=device) / 50
    weight_FD[128:, :128] = 0  # a block that has no largest number
    codes_FD, scale_inv = fp8.quant_fp8_blocks(weight_FD)
    assert codes_FD.dtype == E4M3 and codes_FD.is_contiguous()
    found = fp8.dequant_fp8(codes_FD, scale_inv, torch.float32)
    for f, d in itertools.product(range(0, shape[0], 128), range(0, shape[1], 128)):
        block = weight_FD[f : f + 128, d : d + 128]
        scale = scale_inv[f // 128, d // 128]
        assert torch.allclose(scale, block.abs().max() / 448)
        error = (found[f : f + 128, d : d + 128] - block).abs()
        assert (error <= (block.abs() / 16).maximum(scale * 2**-10) * (1 + 1e-6)).all()


# ---- both ----------------------------------------------------------------------------------------


def test_the_order_of_programs_changes_no_bit(device):
    if device == "cuda":
        pytest.skip("only the interpreter has an order")
    codes_FD, scale_inv = a_weight(200, 256, device)

    def everything():
        weight_FD = fp8.dequant_fp8(codes_FD, scale_inv, torch.float32)
        return weight_FD, *fp8.quant_fp8_launch(weight_FD)

    forwards = everything()
    with backwards():
        assert all(torch.equal(f, b) for f, b in zip(forwards, everything(), strict=True))


def test_nothing_gives_nothing(device):
    for F, D in ((0, 128), (5, 0)):
        codes, scales = fp8.quant_fp8(torch.randn(F, D, device=device))
        assert codes.shape == (F, D) and scales.shape == (F, D // 128)
        scale_inv = torch.ones(-(-F // 128), -(-D // 128), device=device)
        assert fp8.dequant_fp8(codes, scale_inv).shape == (F, D)


def test_torch_accepts_the_operators(device):
    codes_FD, scale_inv = a_weight(3, 130, device)
    codes_FD = codes_FD.view(torch.uint8)
    torch.library.opcheck(fp8.dequant_fp8_op, (codes_FD, scale_inv, torch.bfloat16))
    torch.library.opcheck(fp8.quant_fp8_op, (torch.randn(3, 128, device=device),))


def test_compiled_is_eager(device):
    x_ND = torch.randn(5, 256, device=device)
    compiled = torch.compile(fp8.quant_fp8, fullgraph=True, backend="aot_eager")
    codes_ND, scales_NG = fp8.quant_fp8(x_ND)
    for found, right in zip(compiled(x_ND), (codes_ND, scales_NG), strict=True):
        assert torch.equal(found.float(), right.float())
    compiled = torch.compile(fp8.dequant_fp8, fullgraph=True, backend="aot_eager")
    found = compiled(codes_ND, scales_NG[:1])
    assert torch.equal(found, fp8.dequant_fp8(codes_ND, scales_NG[:1]))


def test_what_does_not_fit_is_refused(device):
    codes_FD, scale_inv = a_weight(130, 128, device)
    with pytest.raises(ValueError, match=r"scale_inv is \(1, 1\).*\(130, 128\).*need \(2, 1\)"):
        fp8.dequant_fp8(codes_FD, scale_inv[:1])
    with pytest.raises(ValueError, match="torch.bfloat16.*float8_e4m3fn"):
        fp8.dequant_fp8(codes_FD.bfloat16(), scale_inv)
    with pytest.raises(ValueError, match=r"x is \(3, 100\)"):
        fp8.quant_fp8(torch.randn(3, 100, device=device))
    with pytest.raises(ValueError, match=r"weight is \(3,\)"):
        fp8.quant_fp8_blocks(torch.randn(3, device=device))
