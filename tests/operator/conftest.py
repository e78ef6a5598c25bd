"""The device under test: the CPU, or with SLA_TEST_GPU=1 (`make test-gpu`) a GPU."""

import importlib.metadata
import os

import pytest
import torch

GPU = os.environ.get("SLA_TEST_GPU") == "1"


def _old_interpreter() -> bool:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) < (3, 8)


OLD_INTERPRETER = _old_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    if GPU and not torch.cuda.is_available():
        pytest.exit("SLA_TEST_GPU is 1, but PyTorch finds no CUDA device", returncode=4)
    if GPU and os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.exit("SLA_TEST_GPU and TRITON_INTERPRET are both 1; unset one", returncode=4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs SLA_TEST_GPU=1 and a GPU"))
        elif OLD_INTERPRETER and item.path.name.startswith("test_triton"):
            reason = "this Triton's interpreter fails under NumPy 2; it takes Triton 3.8 or newer"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if GPU else "cpu"
