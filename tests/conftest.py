"""What must hold before any test imports the packages."""

import importlib.metadata
import os

import pytest

# Each worker of pytest-xdist has one core to itself; more threads would fight for it. (Set before
# torch is imported, and for what tests start.)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# Triton decides when it decorates a kernel, so when sla_kernels is first imported, whether it will
# interpret or compile it. Without a GPU under test it interprets, and a GPU that is there is
# hidden, so that no tensor on it meets an interpreted kernel.
if os.environ.get("SLA_TEST_GPU") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _has_interpreter() -> bool:
    """Whether Triton's interpreter works here: under NumPy 2 it takes Triton 3.8 or newer."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:
        return True  # what is missing is another matter
    return int(numpy.split(".")[0]) < 2 or tuple(map(int, triton.split(".")[:2])) >= (3, 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or _has_interpreter():
        return
    reason = "this Triton's interpreter fails under NumPy 2; it takes Triton 3.8 or newer"
    for item in items:
        if item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """No test's numbers depend on the tests that its worker has run before."""
    import torch

    torch.manual_seed(0)
