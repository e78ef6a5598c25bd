"""The choice of a backend: what the kernels refuse, and systems without Triton."""

import os
import subprocess
import sys

import pytest
import torch
from sla_kernels import available_backends, classify_blocks, sparse_linear_attention
from torch import Tensor

GPU = os.environ.get("SLA_TEST_GPU") == "1"
TRITON = pytest.mark.skipif("triton" not in available_backends(), reason="Triton is for Linux")


def tensors(device: str, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = (1, 2, 96, head_dim)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]


def outcome(code: str, **environment: str) -> str:
    """What Python prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REFUSED = [
    ({"block_q": 48}, 16, torch.float32, r"block_q is 48; it must be one of 16, 32, 64, 128"),
    ({"block_kv": 256}, 16, torch.float32, r"block_kv is 256; it must be one of 16, 32, 64, 128"),
    ({}, 20, torch.float32, r"head_dim is 20; it must be a multiple of 8, at most 128"),
    ({}, 136, torch.float32, r"head_dim is 136; it must be a multiple of 8, at most 128"),
    ({}, 16, torch.float64, r"query is torch.float64; .* take float16, bfloat16 or float32"),
]


@TRITON
@pytest.mark.parametrize(("options", "head_dim", "dtype", "message"), REFUSED)
def test_what_the_kernels_cannot_do_is_refused(
    options: dict[str, int], head_dim: int, dtype: torch.dtype, message: str, device: str
) -> None:
    query, key, value = tensors(device, head_dim, dtype)
    message = f"backend is 'triton', which cannot be used here: {message}"
    with pytest.raises(ValueError, match=message):
        sparse_linear_attention(query, key, value, **options, backend="triton")
    with pytest.raises(ValueError, match=message):
        classify_blocks(query, key, **options, backend="triton")


@pytest.mark.parametrize(("options", "head_dim", "dtype", "message"), REFUSED)
def test_auto_does_without_the_kernels(
    options: dict[str, int], head_dim: int, dtype: torch.dtype, message: str, device: str
) -> None:
    query, key, value = tensors(device, head_dim, dtype)
    found = sparse_linear_attention(query, key, value, **options)
    eager = sparse_linear_attention(query, key, value, **options, backend="eager")
    assert torch.equal(found, eager)


@TRITON
def test_auto_takes_the_kernels_on_a_gpu_only(device: str) -> None:
    query, key, value = tensors(device, dtype=torch.float16)
    options = {"critical": 0.4, "block_q": 16, "block_kv": 16}
    chosen = "triton" if GPU else "eager"
    found = sparse_linear_attention(query, key, value, **options)
    expected = sparse_linear_attention(query, key, value, **options, backend=chosen)
    assert torch.equal(found, expected)
    taken = classify_blocks(query, key, **options).row_table is not None
    assert taken is GPU


@TRITON
@pytest.mark.skipif(GPU, reason="a GPU does not interpret")
def test_bfloat16_is_refused_by_the_interpreter() -> None:
    with pytest.raises(ValueError, match=r"query is torch\.bfloat16, which Triton's interpreter"):
        sparse_linear_attention(*tensors("cpu", dtype=torch.bfloat16), backend="triton")


ON_A_CPU = """
import torch
from sla_kernels import sparse_linear_attention as sla
tensors = torch.ones(3, 1, 1, 64, 16).unbind()
try:
    sla(*tensors, backend="triton")
except ValueError as error:
    print(error)
print(torch.equal(sla(*tensors), sla(*tensors, backend="eager")))
"""


@TRITON
def test_a_cpu_is_refused_without_the_interpreter() -> None:
    refusal, equal = outcome(ON_A_CPU).splitlines()
    assert "backend is 'triton', which cannot be used here: query is on cpu; Triton" in refusal
    assert "TRITON_INTERPRET=1" in refusal
    assert equal == "True"


WITHOUT_TRITON = '''
import sys

class WithoutTriton:
    """A finder that finds what another one does, but for Triton."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "triton":
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [WithoutTriton(finder) for finder in sys.meta_path]
import torch
import sla_kernels
tensors = [t.requires_grad_() for t in torch.ones(3, 1, 1, 128, 16).unbind()]
sla_kernels.sparse_linear_attention(*tensors).sum().backward()
print(*sla_kernels.available_backends())
try:
    sla_kernels.sparse_linear_attention(*tensors, backend="triton")
except ValueError as error:
    print(error)
'''


def test_without_triton_eager_is_left() -> None:
    known, refusal = outcome(WITHOUT_TRITON).splitlines()
    assert known == "eager reference"
    assert refusal == "backend is 'triton'; it must be one of auto, eager, reference"
