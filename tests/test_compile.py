"""Every kernel, compiled for GPUs that are not there: quickly for one and at the sizes of R1, with
-m slow, which takes minutes, for three and at all sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes a block may have: A100, RTX 4090, H100
NO_DOT = ("_rms_norm", "_rms_norm_backward", "_swiglu", "_swiglu_backward", "_merge",
          "_sum_copies", "_dequant", "_quant")  # fmt: skip


QUICK = ["--arch", "90", "--match", r"\bR1\b(?!.*(fp32|no table|16 heads|of 256|latent))"]


@pytest.fixture(scope="module", params=[QUICK, pytest.param([], marks=pytest.mark.slow)])
def kernels(request, tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("compile") / "kernels.json"
    command = [sys.executable, "-m", "bench.compile", "--json", str(file), *request.param]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(file.read_text())["kernels"]


def test_every_kernel_compiles_without_spills(kernels):
    archs = {kernel["arch"] for kernel in kernels}
    for arch in archs:
        assert len({k["kernel"] for k in kernels if k["arch"] == arch}) == 16, arch
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= SHARED[kernel["arch"]], kernel
        assert kernel["registers"] <= 255, kernel


def test_bf16_products_use_the_warp_group_instructions_of_hopper_alone(kernels):
    products = [k for k in kernels if k["kernel"] not in NO_DOT and "fp32" not in k["case"]]
    assert not any(k["wgmma"] for k in products if k["arch"] != 90)
    hopper = [k for k in products if k["arch"] == 90]
    assert len(hopper) > 12
    # A tile for keys of 256 numbers has no room for the 64 rows that these instructions take.
    without = {(k["case"], k["kernel"]) for k in hopper if not k["wgmma"]}
    assert without <= {("attention: 16 heads of 256", "_backward_kv")}
