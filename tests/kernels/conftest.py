import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The interpreter on the CPU; under -m gpu a GPU, where there is one."""
    import kernels.backend  # which ../conftest.py has to be the first to import

    if request.param == "cpu":
        monkeypatch.setattr(kernels.backend, "interpret", True)
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton asks while it runs as well
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: torch.cuda.is_available() is False here")
    elif torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} has no bf16: the references run there")
    return request.param
