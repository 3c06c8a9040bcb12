"""The kernels' tests run in Triton's interpreter, or, under `pytest -m gpu`, on a GPU."""

import os

import pytest


def pytest_configure(config):
    on_gpu = "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


@pytest.fixture(autouse=True)
def references(monkeypatch, request):
    """Outside tests/kernels the CPU runs the references, as it does for everybody."""
    if "kernels" not in request.path.parts:
        import kernels.backend

        monkeypatch.setattr(kernels.backend, "interpret", False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # nor do the programs tests start
