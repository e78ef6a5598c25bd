"""RMS norm and rotary embedding in one pass, against double precision."""

import os

import pytest
import torch
from sla_kernels.norm_rotary import norm_rotary
from sla_kernels.testing import relative_error
from torch import Tensor

GPU = os.environ.get("SLA_TEST_GPU") == "1"
LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = list(LIMITS) if GPU else [torch.float32, torch.float16]
# (batch, tokens, heads, head_dim): neither heads nor head_dim a power of two; one token; Wan's.
SHAPES = [(2, 9, 3, 24), (1, 1, 5, 8), (2, 5, 12, 128)]
if GPU:
    SHAPES.append((1, 32760, 12, 128))
EPS = 1e-3


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], int, float]:
    """Query and key are parts of one tensor, as a fused projection gives them."""
    batch, tokens, heads, head_dim = shape
    generator = torch.Generator().manual_seed(3)
    width = heads * head_dim
    joined = torch.randn(batch, tokens, 3 * width, generator=generator)
    query, key, _ = joined.to(device, dtype).chunk(3, dim=-1)
    weights = [(1 + torch.randn(width, generator=generator)).to(device, dtype) for _ in range(2)]
    angles = 6 * torch.randn(1, tokens, 1, head_dim // 2, generator=generator)
    turns = [f(angles).repeat_interleave(2, -1).to(device) for f in (torch.cos, torch.sin)]
    return [query, key, *weights, *turns], heads, EPS


def expected(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """By complex numbers, in double precision."""
    x, weight, cos, sin = (t.double() for t in (x, weight, cos, sin))
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    pairs = torch.view_as_complex(normed.unflatten(-1, (heads, -1, 2)))
    turned = pairs * torch.complex(cos[..., ::2], sin[..., ::2])
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_double_precision(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    (query, key, query_weight, key_weight, cos, sin), heads, eps = make(shape, dtype, device)
    found = norm_rotary(query, key, query_weight, key_weight, cos, sin, heads, eps)
    for got, x, weight in zip(found, (query, key), (query_weight, key_weight), strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert relative_error(got, expected(x, weight, cos, sin, heads)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.bfloat16 or GPU], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_kernel_equals_double_precision(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    """The kernel itself, which the operator takes on a GPU alone; interpreted here."""
    fused = pytest.importorskip("sla_kernels.triton.norm_rotary").norm_rotary
    (query, key, query_weight, key_weight, cos, sin), heads, eps = make(shape, dtype, device)
    found = fused(query, key, query_weight, key_weight, cos, sin, heads, eps)
    for got, x, weight in zip(found, (query, key), (query_weight, key_weight), strict=True):
        assert relative_error(got, expected(x, weight, cos, sin, heads)) < LIMITS[dtype]
    # Rows that do not lie equally far apart: two samples cut from more tokens than they have.
    padded = [torch.cat([x, x], dim=1)[:, : x.shape[1]] for x in (query, key)]
    again = fused(*padded, query_weight, key_weight, cos, sin, heads, eps)
    for got, want in zip(again, found, strict=True):
        assert torch.equal(got, want)


def test_opcheck(device: str) -> None:
    arguments, heads, eps = make(SHAPES[0], torch.float32, device)
    torch.library.opcheck(norm_rotary, (*arguments, heads, eps))


def test_refuses_sizes_that_do_not_fit(device: str) -> None:
    (query, key, query_weight, key_weight, cos, sin), heads, eps = make(
        SHAPES[0], torch.float32, device
    )
    weights = query_weight, key_weight
    with pytest.raises(ValueError, match=r"query is \(2, 9, 72\) and key \(2, 8, 72\)"):
        norm_rotary(query, key[:, 1:], *weights, cos, sin, heads, eps)
    with pytest.raises(ValueError, match="heads is 8; it must divide 72 channels into even"):
        norm_rotary(query, key, *weights, cos, sin, 8, eps)
    with pytest.raises(ValueError, match=r"sin is \(1, 8, 1, 24\); it must have 216 elements"):
        norm_rotary(query, key, *weights, cos, sin[:, 1:], heads, eps)
    with pytest.raises(ValueError, match=r"key_weight is \(71,\); it must have 72 elements"):
        norm_rotary(query, key, query_weight, key_weight[1:], cos, sin, heads, eps)
