"""SLA's two scopes of the linear branch, against dense definitions."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sla.attention import AttentionContext, SLAAttention, SLAConfig, SparseOnlyConfig
from sla.attention.registry import build_attention

HEADS, HEAD_DIM, GRID = 2, 16, (4, 6, 8)
TOKENS = 4 * 6 * 8
CONTEXT = AttentionContext(grid=GRID)
# Blocks that do not divide 192 tokens.
NUMBERS: dict[str, object] = {"block_q": 20, "block_kv": 28, "critical": 0.3, "negligible": 0.3}


def build(**numbers: object) -> SLAAttention:
    config = SLAConfig(**{**NUMBERS, **numbers})  # type: ignore[arg-type]
    method = build_attention(config, HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)
    assert isinstance(method, SLAAttention)
    return method


def shake(method: SLAAttention) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, HEADS, TOKENS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def dense(method: SLAAttention, query: Tensor, key: Tensor, value: Tensor, scope: str) -> Tensor:
    """O^s + O^l W^T + b on N x N weights, the classes taken from the method's own block map."""
    labels = method.block_map(query, key, CONTEXT).token_labels()
    scores = query @ key.transpose(-1, -2) / math.sqrt(HEAD_DIM)
    sparse = scores.masked_fill(labels != 1, -math.inf).softmax(-1) @ value
    weights = query.softmax(-1) @ key.softmax(-1).transpose(-1, -2)
    if scope == "marginal":
        weights = weights * (labels == 0)
    linear = (weights / weights.sum(-1, keepdim=True)) @ value
    return sparse + linear @ method.proj_l.weight.T + method.proj_l.bias


@pytest.mark.parametrize("scope", ["marginal", "all"])
def test_output_and_gradients_follow_the_definition(scope: str) -> None:
    method = build(linear_scope=scope)
    shake(method)
    tensors = [t.requires_grad_() for t in inputs()]
    sources = [*tensors, method.proj_l.weight, method.proj_l.bias]
    expected = dense(method, *tensors, scope)
    output = method(*tensors, CONTEXT)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad((expected * weight).sum(), sources)
    found = torch.autograd.grad((output * weight).sum(), sources)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=1e-4)


def test_the_scopes_differ_once_proj_is_not_zero() -> None:
    marginal, everything = build(negligible=0.0), build(negligible=0.0, linear_scope="all")
    tensors = inputs()
    sparse = build_attention(
        SparseOnlyConfig(block_q=20, block_kv=28, critical=0.3), HEADS, HEAD_DIM, 32, 0
    )(*tensors, CONTEXT)
    assert torch.equal(marginal(*tensors, CONTEXT), sparse)
    assert torch.equal(everything(*tensors, CONTEXT), sparse)
    for method in (marginal, everything):
        shake(method)
    assert torch.equal(marginal.proj_l.weight, everything.proj_l.weight)
    difference = marginal(*tensors, CONTEXT) - everything(*tensors, CONTEXT)
    assert difference.norm() > 0.01 * sparse.norm()


def test_with_all_keys_in_scope_no_block_is_skipped() -> None:
    query, key, value = inputs()
    one, other = (build(linear_scope="all", negligible=share) for share in (0.0, 0.6))
    shake(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(query, key, value, CONTEXT), other(query, key, value, CONTEXT))
    labels = other.block_map(query, key, CONTEXT).labels
    critical = build(negligible=0.6).block_map(query, key, CONTEXT).labels == 1
    assert torch.equal(labels, critical.to(torch.int8))
    # The same numbers are out of range where they count.
    build(linear_scope="all", critical=0.9, negligible=0.6)
    with pytest.raises(ValueError, match=r"negligible is 0\.6"):
        build(critical=0.9, negligible=0.6)


def test_critical_blocks_take_part_in_the_linear_branch_over_all_keys() -> None:
    method = build(linear_scope="all", critical=1.0, proj_init="identity")
    query, key, value = inputs()
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    weights = query.softmax(-1) @ key.softmax(-1).transpose(-1, -2)
    linear = (weights / weights.sum(-1, keepdim=True)) @ value
    torch.testing.assert_close(method(query, key, value, CONTEXT) - exact, linear)


def test_both_scopes_share_one_checkpoint_format() -> None:
    states = [build(linear_scope=scope).state_dict() for scope in ("marginal", "all")]
    assert [sorted(state) for state in states] == [["proj_l.bias", "proj_l.weight"]] * 2


@pytest.mark.parametrize("scope", ["marginal", "all"])
def test_low_precision_keeps_its_dtype(scope: str) -> None:
    method = build(linear_scope=scope)
    shake(method)
    tensors = inputs(torch.bfloat16)
    output = method(*tensors, CONTEXT)
    assert output.dtype == torch.bfloat16
    accurate = method(*(t.float() for t in tensors), CONTEXT)
    assert (output.float() - accurate).norm() < 0.02 * accurate.norm()


def test_flops_are_those_of_the_products() -> None:
    numbers = {"block_q": 16, "block_kv": 8}
    sparse = build_attention(
        SparseOnlyConfig(critical=0.3, block_q=16, block_kv=8), HEADS, HEAD_DIM, 32, 0
    ).flops(GRID)
    query, key, value = (t[:1] for t in inputs())
    with FlopCounterMode(display=False) as linear:
        sums = key.transpose(-1, -2) @ value
        query @ sums @ torch.eye(HEAD_DIM)
    everything = build(linear_scope="all", **numbers).flops(GRID)
    assert everything - sparse == linear.get_total_flops()
    with FlopCounterMode(display=False) as masked:
        mask = torch.ones(HEADS, TOKENS // 16, TOKENS // 8)
        mask @ torch.ones(HEADS, TOKENS // 8, HEAD_DIM * HEAD_DIM)
    marginal = build(linear_scope="marginal", **numbers).flops(GRID)
    assert marginal - everything == masked.get_total_flops()


def test_an_unknown_scope_is_named() -> None:
    with pytest.raises(ValueError, match=r"linear_scope is 'critical'.*'marginal' or 'all'"):
        build(linear_scope="critical")
