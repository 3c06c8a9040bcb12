"""The kernels' tests run in Triton's interpreter, or, under `pytest -m gpu`, on a GPU. All other
tests, and the programs they start, run the references, as everybody does on a CPU."""

import os

# The tests' matrices are small: a second thread makes them slower. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    if "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr:
        return
    os.environ["TRITON_INTERPRET"] = "1"  # heeded while Triton and the kernels are imported
    import kernels.backend

    del os.environ["TRITON_INTERPRET"]
    kernels.backend.interpret = False  # tests/kernels/conftest.py turns it on
