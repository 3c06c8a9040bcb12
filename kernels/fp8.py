"""DeepSeek-V3's 8-bit weights (its report, 3.3): e4m3 with one fp32 scale for each 128 x 128 block.

    e4m3: sign, 4 bits of exponent, 3 of mantissa    (-1)^s 2^(e-7) (1 + m/8)    e = 1 .. 15
                                                     (-1)^s 2^(-6) m/8           e = 0
    largest 448; 0x7f and 0xff are NaN, and so they stay here; there is no infinity

    dequantise   w = code scale            a checkpoint's name.weight_scale_inv is this scale
    quantise     scale = max|x| / 448      code = x / scale, to the nearest, ties to even

Activations have one scale for each token and 128 channels, so that an outlier costs its neighbours
digits and nobody else. There is no matrix product of 8-bit numbers here: weights are dequantised.

GPUs before Ada (sm_89) have no e4m3, so the kernels take a code as the byte it is. Its bits, moved
up by 20, are those of an fp32 with the same mantissa, and an exponent that is 120 = 127 - 7 too
low. Times 2^120 it is the number, exactly, the subnormal ones (e = 0) too.

Read next: experts.py.
"""

import torch
from torch import Tensor

from kernels.backend import arch, tl, triton, use_triton

SIDE = 128  # of a block
LARGEST = 448
TINY = 1e-30  # the smallest scale: zeros have one too
# Rows of a tile by arch(); it is 128 wide, a cache line of bytes, and has one scale or one a row.
TILES = {0: 64, 80: 32, 89: 32, 90: 32}


def dequant_fp8_reference(weight_FD: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    D, wide = weight_FD.shape[1], torch.promote_types(dtype, torch.float32)
    out_FD = torch.empty_like(weight_FD, dtype=dtype)
    # V3 3.3, blocks: W = e4m3 code x scale_inv, one for each 128 x 128 block
    # One row of blocks at a time: in fp32 the whole is four times the checkpoint's size.
    for out_fD, codes_fD, scales in zip(out_FD.split(SIDE), weight_FD.split(SIDE), scale_inv):
        out_fD.copy_(codes_fD.to(wide) * scales.to(wide).repeat_interleave(SIDE)[:D])
    return out_FD


def quant_fp8_reference(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    x_NGc = x_ND.float().unflatten(1, (-1, SIDE))
    # Times 1 / 448 and 1 / scale, as in the kernel: a division may differ in its last bit.
    scales_NG = (x_NGc.abs().amax(2) * (1 / LARGEST)).clamp(min=TINY)
    codes_NGc = (x_NGc * scales_NG.reciprocal()[:, :, None]).to(torch.float8_e4m3fn)
    return codes_NGc.flatten(1), scales_NG


@triton.jit
def _decode(code):
    """The bytes of e4m3 as fp32."""
    bits = code.to(tl.uint32)
    value = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _encode(x):
    """fp32 as the bytes of e4m3, to the nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.abs(x)
    # Add a half of the last bit kept, less 1 if this bit is 0: a tie then stays where it is even.
    exact = (bits & 0x7FFFFFFF) - (120 << 23)
    normal = (exact + 0x7FFFF + ((exact >> 20) & 1)) >> 20
    # Below 2^-6 the codes are steps of 2^-9, as the fp32 from 2^14 on: adding 2^14 rounds to them.
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(size < 0.015625, subnormal, normal)
    code = tl.where(size <= 464.0, code, 0x7F)  # 464 is half way to what would be 480; NaN fails
    return (bits >> 24 & 0x80 | code).to(tl.uint8)


@triton.jit
def _dequant(
    codes_ptr, scales_ptr, out_ptr, F, D, BLOCK_M: tl.constexpr, SIDE: tl.constexpr
):  # fmt: skip
    f_M = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d_C = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    inside_MC = (f_M < F)[:, None] & (d_C < D)[None, :]
    at_MC = f_M[:, None] * D + d_C
    block = tl.program_id(1) * BLOCK_M // SIDE * tl.num_programs(0) + tl.program_id(0)
    out_MC = _decode(tl.load(codes_ptr + at_MC, mask=inside_MC, other=0))
    tl.store(out_ptr + at_MC, out_MC * tl.load(scales_ptr + block), mask=inside_MC)


@triton.jit
def _quant(
    x_ptr, codes_ptr, scales_ptr, N, D, LARGEST: tl.constexpr, TINY: tl.constexpr,
    BLOCK_M: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    n_M = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_MC = n_M[:, None] * D + tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    inside_M1 = (n_M < N)[:, None]
    x_MC = tl.load(x_ptr + at_MC, mask=inside_M1, other=0.0).to(tl.float32)
    scales_M = tl.maximum(tl.max(tl.abs(x_MC), 1) * (1 / LARGEST), TINY)
    # div_rn rounds as IEEE says, and as torch does; a plain / may miss the last bit.
    codes_MC = _encode(x_MC * tl.div_rn(1.0, scales_M)[:, None])
    tl.store(codes_ptr + at_MC, codes_MC, mask=inside_M1)
    scales_at_M = n_M * tl.num_programs(0) + tl.program_id(0)
    tl.store(scales_ptr + scales_at_M, scales_M, mask=n_M < N)


def dequant_fp8_launch(codes_FD: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Of codes as bytes."""
    F, D = codes_FD.shape
    codes_FD, scale_inv = codes_FD.contiguous(), scale_inv.float().contiguous()
    out_FD = codes_FD.new_empty((F, D), dtype=dtype)
    rows = TILES[arch()]
    if out_FD.numel():
        grid = (triton.cdiv(D, SIDE), triton.cdiv(F, rows))
        _dequant[grid](codes_FD, scale_inv, out_FD, F, D, BLOCK_M=rows, SIDE=SIDE)
    return out_FD


def quant_fp8_launch(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as bytes, and scales."""
    N, D = x_ND.shape
    codes_ND = x_ND.new_empty((N, D), dtype=torch.uint8)
    scales_NG = x_ND.new_empty((N, D // SIDE), dtype=torch.float32)
    rows = TILES[arch()]
    if codes_ND.numel():
        grid = (D // SIDE, triton.cdiv(N, rows))
        _quant[grid](
            x_ND.contiguous(), codes_ND, scales_NG, N, D, LARGEST=LARGEST, TINY=TINY,
            BLOCK_M=rows, SIDE=SIDE,
        )  # fmt: skip
    return codes_ND, scales_NG


dequant_fp8_op = torch.library.custom_op("nanor1::dequant_fp8", dequant_fp8_launch, mutates_args=())
dequant_fp8_op.register_fake(
    lambda codes_FD, scale_inv, dtype: codes_FD.new_empty(codes_FD.shape, dtype=dtype)
)
quant_fp8_op = torch.library.custom_op("nanor1::quant_fp8", quant_fp8_launch, mutates_args=())
quant_fp8_op.register_fake(
    lambda x_ND: (
        x_ND.new_empty(x_ND.shape, dtype=torch.uint8),
        x_ND.new_empty((x_ND.shape[0], x_ND.shape[1] // SIDE), dtype=torch.float32),
    )
)


def dequant_fp8(
    weight_FD: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """A weight in e4m3 times its blocks' scales, FD in dtype. Not differentiable.

    scale_inv has a scale for each 128 x 128 block, also where weight ends within one: ValueError
    otherwise, or where weight isn't float8_e4m3fn.
    """
    if weight_FD.dtype != torch.float8_e4m3fn or weight_FD.dim() != 2:
        raise ValueError(
            f"weight is {tuple(weight_FD.shape)} in {weight_FD.dtype}: only a matrix in"
            " torch.float8_e4m3fn can be dequantised"
        )
    F, D = weight_FD.shape
    needed = (-(-F // SIDE), -(-D // SIDE))
    if scale_inv.shape != needed:
        raise ValueError(
            f"scale_inv is {tuple(scale_inv.shape)}, weight {(F, D)}: blocks of {SIDE} x {SIDE}"
            f" need {needed}"
        )
    if use_triton(weight_FD) and dtype != torch.float64:
        return dequant_fp8_op(weight_FD.view(torch.uint8), scale_inv, dtype)
    return dequant_fp8_reference(weight_FD, scale_inv, dtype)


def quant_fp8(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 ND, and the fp32 scales of each token's runs of 128 channels, (N, D/128); multiply to
    come back. Not differentiable. ValueError where D isn't a multiple of 128.
    """
    if x_ND.dim() != 2 or x_ND.shape[1] % SIDE:
        raise ValueError(
            f"x is {tuple(x_ND.shape)}: it needs two dimensions, the second a multiple of {SIDE}"
        )
    if not use_triton(x_ND):
        return quant_fp8_reference(x_ND)
    codes_ND, scales_NG = quant_fp8_op(x_ND)
    return codes_ND.view(torch.float8_e4m3fn), scales_NG


def quant_fp8_blocks(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """What dequant_fp8 takes, from a matrix of any size: e4m3 FD, scale_inv. To save a checkpoint;
    plain torch everywhere."""
    if weight_FD.dim() != 2:
        raise ValueError(f"weight is {tuple(weight_FD.shape)}: it needs two dimensions")
    F, D = weight_FD.shape
    padded = torch.nn.functional.pad(weight_FD.float(), (0, -D % SIDE, 0, -F % SIDE))
    blocks = padded.unflatten(1, (-1, SIDE)).unflatten(0, (-1, SIDE))  # (F/128, 128, D/128, 128)
    scales = (blocks.abs().amax((1, 3), keepdim=True) / LARGEST).clamp(min=TINY)
    codes = (blocks / scales).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1)[:F, :D].contiguous(), scales[:, 0, :, 0]
