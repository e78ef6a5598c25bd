"""L+S is the sum of two methods, and nothing else."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sla.attention import (
    AttentionConfig,
    AttentionContext,
    AttentionMethod,
    LinearOnlyConfig,
    LinearPlusSparseConfig,
    SparseOnlyConfig,
    build_attention,
)

HEADS, HEAD_DIM, GRID = 2, 16, (4, 6, 8)
TOKENS = 4 * 6 * 8
CONTEXT = AttentionContext(grid=GRID)
BLOCKS = {"block_q": 20, "block_kv": 28}


def build(config: AttentionConfig) -> AttentionMethod:
    return build_attention(config, HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, HEADS, TOKENS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("feature_map", ["softmax", "hedgehog"])
@pytest.mark.parametrize("always_critical", [0, 30])
def test_it_is_the_sum_of_linear_only_and_sparse_only(
    feature_map: str, always_critical: int
) -> None:
    both = build(LinearPlusSparseConfig(critical=0.2, feature_map=feature_map, **BLOCKS))
    linear = build(LinearOnlyConfig(feature_map=feature_map))
    sparse = build(SparseOnlyConfig(critical=0.2, **BLOCKS))
    linear.load_state_dict(both.state_dict())
    context = AttentionContext(grid=GRID, always_critical=always_critical)
    tensors = inputs()
    expected = linear(*tensors, context) + sparse(*tensors, context)
    output = both(*tensors, context)
    torch.testing.assert_close(output, expected)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    for got, want in zip(
        torch.autograd.grad((output * weight).sum(), tensors), wanted, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_it_is_not_exact_even_at_full_density() -> None:
    query, key, value = inputs()
    method = build(LinearPlusSparseConfig(critical=1.0, **BLOCKS))
    rest = method(query, key, value, CONTEXT) - scaled_dot_product_attention(query, key, value)
    linear = build(LinearOnlyConfig())(query, key, value, CONTEXT)
    torch.testing.assert_close(rest, linear)
    assert method.exact_fraction(query, key, CONTEXT) == 1.0


def test_no_block_is_skipped_and_a_tenth_is_exact() -> None:
    query, key, _ = inputs()
    method = build(LinearPlusSparseConfig(block_q=16, block_kv=8))
    block_map = method.block_map(query, key, CONTEXT)
    assert block_map is not None
    assert (block_map.labels == 1).sum(-1).eq(TOKENS // 8 // 10).all()
    assert (block_map.labels >= 0).all()
    assert method.density(GRID) == method.exact_fraction(query, key, CONTEXT) == 2 / 24


def test_flops_are_those_of_both() -> None:
    both = build(LinearPlusSparseConfig(feature_map="hedgehog", **BLOCKS))
    linear = build(LinearOnlyConfig(feature_map="hedgehog"))
    sparse = build(SparseOnlyConfig(critical=0.10, **BLOCKS))
    assert both.flops(GRID) == linear.flops(GRID) + sparse.flops(GRID)
