"""SLA2: routing, mixing, SoftTop-k and the soft attention of stage 1."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sla.attention.sla2 as sla2
from sla.attention import (
    AttentionContext,
    SLA2Attention,
    SLA2Config,
    SLAConfig,
    UnsupportedAttentionError,
    build_attention,
)
from sla.attention.sla2 import soft_top_k

HEADS, HEAD_DIM = 2, 16
TOKENS = 200  # 13 query blocks and 9 key blocks, the last ones short
CONTEXT = AttentionContext()
NUMBERS: dict[str, object] = {"block_q": 16, "block_kv": 24, "critical": 0.34}


def build(**numbers: object) -> SLA2Attention:
    config = SLA2Config(**{**NUMBERS, **numbers})  # type: ignore[arg-type]
    method = build_attention(config, HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)
    assert isinstance(method, SLA2Attention)
    return method


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, HEADS, TOKENS, HEAD_DIM, generator=generator) for _ in range(3)]
    tensors[1] += torch.randn(HEADS, 1, HEAD_DIM, generator=generator)  # for smoothing to remove
    return [tensor.to(dtype) for tensor in tensors]


def shaken(**numbers: object) -> SLA2Attention:
    method = build(**numbers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return method


def probabilities(method: SLA2Attention, query: Tensor, key: Tensor) -> Tensor:
    """P_c from its definition."""
    pooled = [
        torch.stack([chunk.mean(dim=2) for chunk in tensor.split(block, dim=2)], dim=2)
        for tensor, block in ((query, method.config.block_q), (key, method.config.block_kv))
    ]
    matrices = (method.router.proj_q, method.router.proj_k)
    projected = [p @ m.to(p).T for p, m in zip(pooled, matrices, strict=True)]
    return (projected[0] @ projected[1].transpose(-1, -2) / HEAD_DIM**0.5).softmax(-1)


def dense(method: SLA2Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """O of a mask over pairs of blocks, hard or soft."""
    rows = mask.repeat_interleave(method.config.block_q, dim=2)[:, :, :TOKENS]
    mask = rows.repeat_interleave(method.config.block_kv, dim=3)[..., :TOKENS]
    weights = mask * (query @ key.transpose(-1, -2) / HEAD_DIM**0.5).exp()
    sparse = weights @ value / weights.sum(-1, keepdim=True)
    weights = (1 - mask) * (query.softmax(-1) @ key.softmax(-1).transpose(-1, -2))
    linear = weights @ value / weights.sum(-1, keepdim=True)
    alpha = torch.sigmoid(method.mixing.logit)  # (1 or H, 1 or T_m)
    alpha = alpha.repeat_interleave(method.config.block_q, 1) if alpha.shape[1] > 1 else alpha
    alpha = alpha[:, :TOKENS, None]
    return alpha * sparse + (1 - alpha) * linear


@pytest.mark.parametrize("mixing", ["scalar", "head", "block"])
@pytest.mark.parametrize("smooth", [True, False])
def test_output_is_the_definition(mixing: str, smooth: bool) -> None:
    method = shaken(mixing=mixing, mixing_blocks=13, smooth_key=smooth)
    query, key, value = inputs()
    output = method(query, key, value, CONTEXT)
    key = key - key.mean(2, keepdim=True) if smooth else key
    order = probabilities(method, query, key).argsort(-1, descending=True)
    mask = torch.zeros(order.shape).scatter_(-1, order[..., :3], 1.0)  # floor(0.34 * 9)
    torch.testing.assert_close(output, dense(method, query, key, value, mask), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("leading", [0, 30])
def test_identity_router_chooses_the_blocks_of_sla(smooth: bool, leading: int) -> None:
    context = AttentionContext(always_critical=leading)
    query, key, _ = inputs()
    config = SLAConfig(**NUMBERS)  # type: ignore[arg-type]
    sla = build_attention(config, HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)
    expected = sla.block_map(query, key, context)
    found = build(smooth_key=smooth).block_map(query, key, context)
    assert expected is not None
    assert torch.equal(found.labels == 1, expected.labels == 1)
    assert found.labels.min() == 0, "two classes only"
    other = shaken(smooth_key=smooth).block_map(query, key, context)
    assert not torch.equal(other.labels == 1, expected.labels == 1)


def test_equal_scores_go_to_the_lower_block() -> None:
    query, key, _ = inputs()
    labels = build(smooth_key=False).block_map(query, torch.zeros_like(key), CONTEXT).labels
    assert (labels[..., :3] == 1).all()
    assert (labels[..., 3:] == 0).all()


def test_smoothing_makes_a_shift_of_all_keys_harmless() -> None:
    query, key, value = inputs()
    shift = 3.0 * torch.randn(1, HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    for smooth, same in ((True, True), (False, False)):
        method = build(smooth_key=smooth, alpha_init=0.5)
        outputs = [method(query, k, value, CONTEXT) for k in (key, key + shift)]
        assert torch.allclose(outputs[0], outputs[1], atol=1e-5) == same


def test_rows_without_marginal_blocks_are_exact_whatever_alpha() -> None:
    query, key, value = inputs()
    method = build(alpha_init=0.2)
    output = method(query, key, value, AttentionContext(always_critical=20))
    exact = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(output[:, :, :32], exact[:, :, :32], atol=2e-6, rtol=1e-5)
    assert (output[:, :, 32:] - exact[:, :, 32:]).norm() > 0.1 * exact.norm()


def test_mixing_by_block_names_the_token_count() -> None:
    method = build(mixing="block", mixing_blocks=12)
    with pytest.raises(UnsupportedAttentionError, match="200 tokens are 13 query blocks of 16"):
        method(*inputs(), CONTEXT)
    with pytest.raises(UnsupportedAttentionError, match="13 query blocks of 16"):
        method.soft_attend(*inputs(), CONTEXT)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"mixing": "row"}, "attention.mixing is 'row'"),
        ({"mixing": "block"}, "attention.mixing_blocks is 0"),
        ({"alpha_init": 1.0}, "attention.alpha_init is 1.0"),
        ({"precision": "int8"}, "attention.precision is 'int8'; it must be one of 16bit, fp8"),
        ({"critical": 0.0}, "attention.critical is 0.0"),
    ],
)
def test_numbers_out_of_range_are_named(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**numbers)


def test_router_is_frozen_outside_of_stage_1_and_stays_float32() -> None:
    method = build()
    assert [tuple(p.shape) for p in method.router_parameters()] == [(HEAD_DIM, HEAD_DIM)] * 2
    assert not any(p.requires_grad for p in method.router_parameters())
    method.router.requires_grad_(True)
    method.soft_attend(*inputs(), CONTEXT).sum().backward()
    assert all(p.grad is not None for p in method.router_parameters())
    method.freeze_router()
    assert not any(p.requires_grad or p.grad is not None for p in method.router_parameters())
    assert method.to(torch.bfloat16).router.proj_q.dtype == torch.float32
    assert method(*inputs(torch.bfloat16), CONTEXT).dtype == torch.bfloat16


def test_routing_does_not_change_under_autocast() -> None:
    query, key, value = inputs()
    method = shaken()
    expected = method.block_map(query, key, CONTEXT).labels
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.block_map(query, key, CONTEXT).labels, expected)
        assert method(query, key, value, CONTEXT).dtype == torch.bfloat16
        assert method.soft_attend(query, key, value, CONTEXT).dtype == torch.float32


def test_fp8_forward_and_16_bit_backward() -> None:
    weight = torch.randn(2, HEADS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    outputs, gradients = [], []
    for precision in ("16bit", "fp8"):
        tensors = [t.requires_grad_() for t in inputs()]
        output = build(precision=precision)(*tensors, CONTEXT)
        outputs.append(output)
        gradients.append(torch.autograd.grad((output * weight).sum(), tensors))
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 0.003 < error < 0.06
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def test_flops_add_the_projection_of_pooled_blocks() -> None:
    grid = (2, 10, 10)
    sla = build_attention(SLAConfig(**NUMBERS, negligible=0.0), HEADS, HEAD_DIM, 32, 0)  # type: ignore[arg-type]
    proj = 2 * TOKENS * HEAD_DIM**2
    router = 2 * (13 + 9) * HEAD_DIM**2
    assert build().flops(grid) == pytest.approx(sla.flops(grid) + HEADS * (router - proj))
    assert build().density(grid) == 3 / 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_top_k_sums_to_k_and_keeps_the_order(dtype: torch.dtype) -> None:
    scores = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    for scale in (0.01, 1.0, 50.0):
        for count in (1, 7, 39):
            mask = soft_top_k(scores * scale, count)
            assert mask.dtype == dtype
            torch.testing.assert_close(
                mask.sum(-1), torch.full((3, 5), float(count), dtype=dtype), atol=1e-4, rtol=0
            )
            assert ((mask >= 0) & (mask <= 1)).all()
    order = (scores[0, 0]).argsort()
    assert (soft_top_k(scores, 7)[0, 0][order].diff() >= 0).all()


def test_soft_top_k_becomes_top_k_as_scores_grow() -> None:
    scores = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).double()
    hard = torch.zeros_like(scores).scatter_(-1, scores.topk(7).indices, 1.0)
    torch.testing.assert_close(soft_top_k(scores * 1e5, 7), hard, atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [1, 4, 11])
def test_soft_top_k_gradient(count: int) -> None:
    scores = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: soft_top_k(x, count), (scores.requires_grad_(),), atol=1e-8, rtol=1e-6
    )
    # Raising all scores of a row changes nothing, and the sum cannot change.
    (gradient,) = torch.autograd.grad((soft_top_k(scores, count) ** 2).sum(), scores)
    assert gradient.sum(-1).abs().max() < 1e-12
    assert gradient.abs().max() > 1e-3


def test_soft_top_k_of_all_is_one() -> None:
    scores = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = soft_top_k(scores, 12)
    (gradient,) = torch.autograd.grad(mask.square().sum(), scores)
    assert (mask == 1).all()
    assert (gradient == 0).all()
    for count in (0, 13):
        with pytest.raises(ValueError, match=f"count is {count}; it must be from 1 to 12"):
            soft_top_k(scores, count)


@pytest.mark.parametrize("mixing", ["scalar", "block"])
def test_soft_attention_is_the_definition(mixing: str) -> None:
    method = shaken(mixing=mixing, mixing_blocks=13)
    query, key, value = inputs(torch.float64)
    smooth = key - key.mean(2, keepdim=True)
    scores = probabilities(method, query, smooth) / 0.1
    low, high = torch.full((2, *scores.shape[:3], 1), 0.0).double()
    low, high = low - 50.0, high + 50.0
    for _ in range(60):  # lambda for which each row sums to floor(0.2 * 9)
        middle = (low + high) / 2
        above = (scores + middle).sigmoid().sum(-1, keepdim=True) > 1
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    mask = (scores + middle).sigmoid()
    expected = dense(method, query, smooth, value, mask)
    output = method.soft_attend(query, key, value, CONTEXT, critical=0.2, tau=0.1)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)

    rows = torch.tensor([12, 3])  # the short last block first
    tokens = method.row_tokens(rows, TOKENS)
    assert tokens.tolist() == [*range(192, 200), *range(48, 64)]
    some = method.soft_attend(query, key, value, CONTEXT, critical=0.2, rows=rows)
    torch.testing.assert_close(some, output[:, :, tokens], atol=1e-12, rtol=0)


def test_soft_attention_becomes_the_hard_one_at_a_low_temperature() -> None:
    method = shaken()
    query, key, value = inputs(torch.float64)
    soft = method.soft_attend(query, key, value, CONTEXT, tau=1e-7)
    torch.testing.assert_close(soft, method(query, key, value, CONTEXT), atol=1e-5, rtol=1e-5)


def test_soft_attention_keeps_forced_blocks() -> None:
    method = build(alpha_init=0.3)
    query, key, value = inputs(torch.float64)
    context = AttentionContext(always_critical=20)
    output = method.soft_attend(query, key, value, context)
    exact = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(output[:, :, :32], exact[:, :, :32], atol=1e-6, rtol=1e-6)
    hard = method.soft_attend(query, key, value, context, tau=1e-7)
    torch.testing.assert_close(hard, method(query, key, value, context), atol=1e-5, rtol=1e-5)


def test_straight_through_has_the_hard_output_and_a_soft_gradient() -> None:
    query, key, value = inputs(torch.float64)
    context = AttentionContext(always_critical=20)
    method = shaken()
    method.router.requires_grad_(True)
    hard = method(query, key, value, context)
    output = method.soft_attend(query, key, value, context, straight_through=True)
    torch.testing.assert_close(output, hard, atol=1e-12, rtol=1e-12)

    # The gradient of the output at hard masks, taken through the soft masks' own.
    mask = torch.where(method.block_map(query, key, context).labels == 1, 1.0, 0.0).double()
    mask.requires_grad_()
    smooth = key - key.mean(2, keepdim=True)
    weight = torch.randn(query.shape, generator=torch.Generator().manual_seed(3)).double()
    weight[:, :, :32] = 0.0  # the rows that are critical in any case
    rows = mask.repeat_interleave(16, dim=2)[:, :, 32:TOKENS]
    kept = rows.repeat_interleave(24, dim=3)[..., :TOKENS]
    scores = (query[:, :, 32:] @ smooth.transpose(-1, -2) / HEAD_DIM**0.5).exp() * kept
    products = query[:, :, 32:].softmax(-1) @ smooth.softmax(-1).transpose(-1, -2) * (1 - kept)
    alpha = torch.sigmoid(method.mixing.logit)
    both = alpha * (scores @ value / scores.sum(-1, keepdim=True))
    both = both + (1 - alpha) * (products @ value / products.sum(-1, keepdim=True))
    (d_mask,) = torch.autograd.grad((both * weight[:, :, 32:]).sum(), mask)
    # One forced key block, three more of eight.
    free = soft_top_k(probabilities(method, query, smooth)[..., 1:] / 0.1, 3)
    expected = torch.autograd.grad(free, method.router_parameters(), d_mask[..., 1:])
    found = torch.autograd.grad((output * weight).sum(), method.router_parameters())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert one.abs().max() > 1e-3


def test_soft_attention_gradient_of_the_router_by_differences() -> None:
    query, key, value = inputs(torch.float64)
    weight = torch.randn(query.shape, generator=torch.Generator().manual_seed(3)).double()
    direction = torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(4))

    def loss(step: float, name: str) -> Tensor:
        with torch.no_grad():
            getattr(moved.router, name).copy_(getattr(start.router, name) + step * direction)
        return (moved.soft_attend(query, key, value, CONTEXT) * weight).sum()

    start, moved = shaken(), shaken()
    for name in ("proj_q", "proj_k"):
        moved.router.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(0.0, name), getattr(moved.router, name))
        step = 2.0**-9
        numeric = (loss(step, name) - loss(-step, name)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-3)
        loss(0.0, name)


def test_soft_attention_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs(torch.float64)
    found = []
    for chunk in (2**26, 3 * 2 * HEADS * 16 * TOKENS):  # all rows, three rows at a time
        monkeypatch.setattr(sla2, "_CHUNK", chunk)
        method = shaken(mixing="block", mixing_blocks=13)
        method.router.requires_grad_(True)
        output = method.soft_attend(query, key, value, CONTEXT)
        output.square().sum().backward()
        found.append([output, *(p.grad for p in method.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert one.abs().sum() > 0
    assert math.isfinite(found[0][0].sum().item())
