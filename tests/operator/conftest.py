"""The device under test: the CPU, or with SLA_TEST_GPU=1 (`make test-gpu`) a GPU."""

import os

import pytest
import torch

GPU = os.environ.get("SLA_TEST_GPU") == "1"


def pytest_configure(config: pytest.Config) -> None:
    if GPU and not torch.cuda.is_available():
        pytest.exit("SLA_TEST_GPU is 1, but PyTorch finds no CUDA device", returncode=4)
    if GPU and os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.exit("SLA_TEST_GPU and TRITON_INTERPRET are both 1; unset one", returncode=4)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs SLA_TEST_GPU=1 and a GPU"))
        elif item.path.name.startswith("test_triton"):
            item.add_marker("interpreter")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if GPU else "cpu"
