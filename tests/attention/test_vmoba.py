"""VMoBA against a dense reference that is written over token masks."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

from sla.attention import (
    AttentionContext,
    UnsupportedAttentionError,
    VMoBAAttention,
    VMoBAConfig,
    build_attention,
    vmoba,
)
from sla.attention.token_order import tile_order

HEADS, HEAD_DIM, BATCH = 2, 8, 2
# Of blocks that divide the grid, and of blocks that do not.
WHOLE, RAGGED = (4, 6, 4), (3, 5, 7)
SIZES: dict[str, object] = {"temporal": 2, "spatial": (3, 2), "spatio_temporal": (2, 3, 2)}


def build(layer_index: int = 0, **numbers: object) -> VMoBAAttention:
    values = {**SIZES, "block_q": 4, "block_kv": 8, **numbers}
    config = VMoBAConfig(**values)  # type: ignore[arg-type]
    method = build_attention(config, HEADS, HEAD_DIM, HEADS * HEAD_DIM, layer_index)
    assert isinstance(method, VMoBAAttention)
    return method


def inputs(grid: tuple[int, int, int], seed: int = 0) -> tuple[list[Tensor], AttentionContext]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, math.prod(grid), HEADS, HEAD_DIM)
    qkv = [torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3)]
    return qkv, AttentionContext(grid=grid)


def members(grid: tuple[int, int, int], method: VMoBAAttention) -> Tensor:
    """float (C, N): whether the token, in raster order, lies in the key block (equation 1)."""
    config, (frames, rows, columns) = method.config, grid
    size = [
        (config.temporal, rows, columns),
        (frames, *config.spatial),
        config.spatio_temporal,
    ][method.layer_index % 3]
    coordinates = list(itertools.product(*(range(n) for n in grid)))
    blocks = [tuple(x // s for x, s in zip(token, size, strict=True)) for token in coordinates]
    return torch.tensor([[float(b == which) for b in blocks] for which in sorted(set(blocks))])


def select(method: VMoBAAttention, query: Tensor, key: Tensor, of_block: Tensor) -> Tensor:
    """bool (B, H, C, N): pairs chosen one after the other, in float64 and Python."""
    config, lengths = method.config, of_block.sum(1)
    tokens = query.shape[2]
    similarity = (of_block / lengths[:, None]) @ key @ query.transpose(-1, -2)
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    for head, mask in zip(similarity.flatten(0, 1), chosen.flatten(0, 1), strict=True):
        head = ((head - head.min()) / (head.max() - head.min())).double()
        amount = head if config.selection == "threshold" else lengths.double()[:, None] + 0 * head
        mask |= of_block.bool()
        held = amount[mask].sum().item()
        ranking = head.flatten().argsort(descending=True, stable=True).tolist()
        for pair in ranking:
            if mask.view(-1)[pair]:
                continue
            added = amount.flatten()[pair].item()
            if config.selection == "threshold":
                if held >= config.threshold * amount.sum().item():
                    break
            elif held + added > config.critical * tokens**2:
                break
            mask.view(-1)[pair] = True
            held += added
    return chosen


def reference(
    method: VMoBAAttention, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Output, and the mask of exact scores (B, H, N, N), for tokens in raster order."""
    of_block = members(grid, method)
    chosen = select(method, query.detach(), key.detach(), of_block)
    mask = (chosen.float().transpose(-1, -2) @ of_block).bool()
    scores = query @ key.transpose(-1, -2) / math.sqrt(HEAD_DIM)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ value, mask


def check(
    method: VMoBAAttention, grid: tuple[int, int, int], tile: tuple[int, int, int] | None
) -> float:
    """Compare output, gradients and fraction with the reference; the fraction."""
    qkv, context = inputs(grid)
    leaves = [t.requires_grad_() for t in qkv]
    expected, mask = reference(method, *qkv, grid)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)

    order = torch.arange(math.prod(grid)) if tile is None else tile_order(grid, tile)
    ordered = replace(context, tile=tile)
    output = method(*(t[:, :, order] for t in qkv), ordered)
    found = torch.autograd.grad((output * weight[:, :, order]).sum(), leaves)
    torch.testing.assert_close(output, expected[:, :, order], atol=2e-6, rtol=1e-5)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    exact = method.exact_fraction(*(t[:, :, order] for t in qkv[:2]), ordered)
    assert exact == pytest.approx(mask.double().mean().item())
    return exact


@pytest.mark.parametrize("layer_index", [0, 1, 5])
@pytest.mark.parametrize("selection", ["threshold", "density"])
@pytest.mark.parametrize("grid", [WHOLE, RAGGED])
def test_output_and_gradients_match_the_dense_reference(
    grid: tuple[int, int, int], selection: str, layer_index: int
) -> None:
    method = build(layer_index, selection=selection, threshold=0.6, critical=0.6)
    assert 0.5 < check(method, grid, None) < 0.8


@pytest.mark.parametrize(
    ("grid", "tile"), [(WHOLE, (2, 3, 2)), (WHOLE, (4, 6, 3)), (RAGGED, (1, 2, 4))]
)
def test_the_order_of_the_tokens_does_not_matter(
    grid: tuple[int, int, int], tile: tuple[int, int, int]
) -> None:
    for layer_index in range(3):
        check(build(layer_index, threshold=0.5), grid, tile)


def test_threshold_one_is_full_attention() -> None:
    for layer_index, grid in itertools.product(range(3), (WHOLE, RAGGED)):
        qkv, context = inputs(grid)
        method = build(layer_index, threshold=1.0)
        expected = scaled_dot_product_attention(*qkv)
        torch.testing.assert_close(method(*qkv, context), expected, atol=2e-6, rtol=1e-5)
        assert method.exact_fraction(*qkv[:2], context) == 1.0
        assert method.density(grid) == 1.0


def test_threshold_zero_leaves_every_query_its_own_block() -> None:
    for layer_index, grid in itertools.product(range(3), (WHOLE, RAGGED)):
        (query, key, _), context = inputs(grid)
        method = build(layer_index, threshold=0.0)
        own = members(grid, method).bool()
        assert torch.equal(method.selected(query, key, context), own.expand(BATCH, HEADS, -1, -1))
        least = build(layer_index, selection="density", critical=1e-3).density(grid)
        assert method.exact_fraction(query, key, context) == pytest.approx(least)


def test_the_asked_density_is_met_to_within_one_pair() -> None:
    for layer_index, grid in itertools.product(range(3), (WHOLE, RAGGED)):
        (query, key, _), context = inputs(grid)
        method = build(layer_index, selection="density", critical=0.7)
        of_block = members(grid, method)
        chosen = method.selected(query, key, context).double()
        fractions = (chosen.sum(-1) @ of_block.sum(1).double()) / math.prod(grid) ** 2
        one_pair = of_block.sum(1).max().item() / math.prod(grid) ** 2
        assert (fractions <= 0.7 + 1e-9).all()
        assert (fractions > 0.7 - one_pair).all()
        assert method.density(grid) == 0.7


def test_the_threshold_is_reached_and_not_passed_by_a_pair() -> None:
    (query, key, _), context = inputs(WHOLE)
    for layer_index in range(3):
        method = build(layer_index, threshold=0.55)
        of_block = members(WHOLE, method)
        chosen = method.selected(query, key, context)
        mean = of_block / of_block.sum(1, keepdim=True)
        for head, mask in zip(
            (mean @ key @ query.transpose(-1, -2)).flatten(0, 1), chosen.flatten(0, 1), strict=True
        ):
            share = (head - head.min()) / (head - head.min()).sum()
            others = share[mask & ~of_block.bool()]
            assert share[mask].sum() >= 0.55 - 1e-6
            assert share[mask].sum() - others.min() < 0.55 + 1e-6
            # The best pairs, and no others.
            assert others.min() > share[~mask].max()


def test_equal_similarities_take_the_first_pairs() -> None:
    (query, key, _), context = inputs(WHOLE)
    method = build(0, selection="density", critical=0.75)
    chosen = method.selected(query, torch.zeros_like(key), context)
    assert chosen.shape[2:] == (2, 96)  # half of the tokens in each block: 48 more pairs of 96
    own = members(WHOLE, method).bool()
    assert chosen[:, :, 0].all()  # its 48 queries, and the other 48
    assert torch.equal(chosen[:, :, 1], own[1].expand(BATCH, HEADS, -1))
    # By threshold, no similarity is above the least: none is worth a pair.
    chosen = build(0, threshold=0.9).selected(query, torch.zeros_like(key), context)
    assert torch.equal(chosen, own.expand(BATCH, HEADS, -1, -1))


@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize("reach", [True, False])
def test_bisection_takes_what_a_sort_would(reach: bool, by_block: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 4, 25)
    for levels in (2, 7, 10**6):  # many equal numbers, and hardly any
        ranked = torch.randint(levels, shape, generator=generator) / (levels - 1)
        ranked = torch.where(torch.rand(shape, generator=generator) < 0.2, -1.0, ranked)
        sizes_of = (*shape[:3], 1 if by_block else shape[3])
        amounts = torch.randint(1, 6, sizes_of, generator=generator).float()
        for budget in (-3.0, 0.0, 0.5, 17.0, 60.0, 10**6):
            budgets = torch.full(shape[:2], budget, dtype=torch.float64)
            found = vmoba._take(ranked, amounts, budgets, reach=reach)
            for numbers, sizes, mask in zip(
                ranked.flatten(0, 1),
                amounts.expand(shape).flatten(0, 1),
                found.flatten(0, 1),
                strict=True,
            ):
                held, expected = 0.0, torch.zeros(100, dtype=torch.bool)
                for pair in numbers.flatten().argsort(descending=True, stable=True).tolist():
                    added = sizes.flatten()[pair].item()
                    full = held >= budget if reach else held + added > budget
                    if full or numbers.flatten()[pair] < 0:
                        break
                    expected[pair] = True
                    held += added
                assert torch.equal(mask.flatten(), expected)


def test_groups_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, context = inputs(RAGGED)
    method = build(2, threshold=0.5)
    leaves = [t.requires_grad_() for t in qkv]

    def run() -> list[Tensor]:
        output = method(*qkv, context)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    once = run()
    for again, first in zip(run(), once, strict=True):
        assert torch.equal(again, first)
    monkeypatch.setattr(vmoba, "_STRIDE", 16)
    monkeypatch.setattr(vmoba, "_CHUNK", 16 * HEAD_DIM * 5)
    for grouped, whole in zip(run(), once, strict=True):
        torch.testing.assert_close(grouped, whole, atol=1e-6, rtol=1e-5)


def test_low_precision_is_near_float32() -> None:
    qkv, context = inputs(RAGGED)
    method = build(1, threshold=0.5)
    expected = method(*qkv, context)
    low = [t.bfloat16().requires_grad_() for t in qkv]
    output = method(*low, context)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = method(*qkv, context)
    for found in (output, under_autocast):
        assert found.dtype == torch.bfloat16
        error = (found.float() - expected).abs().mean() / expected.abs().mean()
        assert error < 0.05
    output.float().square().sum().backward()
    for tensor in low:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_inputs_that_are_not_the_grid_are_refused() -> None:
    method = build()
    qkv, context = inputs(WHOLE)
    for wrong, reason in (
        (replace(context, grid=None), "no grid"),
        (replace(context, grid=(4, 4, 5)), "96 tokens, but a grid of 4 x 4 x 5 = 80"),
        (replace(context, always_critical=3), "3 leading tokens"),
    ):
        with pytest.raises(UnsupportedAttentionError, match=reason):
            method(*qkv, wrong)
        with pytest.raises(UnsupportedAttentionError, match=reason):
            method.exact_fraction(*qkv[:2], wrong)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"temporal": 0}, "temporal is 0; it must be a positive integer"),
        ({"spatial": (5,)}, "spatial is"),
        ({"spatio_temporal": (7, 5, 1.5)}, "spatio_temporal is"),
        ({"selection": "topk"}, "selection is 'topk'"),
        ({"threshold": 1.1}, "threshold is 1.1"),
        ({"critical": 0.0}, "critical is 0.0"),
        ({"block_kv": 0}, "block_kv is 0"),
    ],
)
def test_numbers_out_of_range_are_named(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**numbers)  # type: ignore[arg-type]


def test_flops_need_a_density_that_depends_on_the_inputs() -> None:
    method = build(1)  # 4 blocks of 24 tokens
    with pytest.raises(ValueError, match="depends on its inputs"):
        method.flops(WHOLE)
    pairs = 0.5 * 96 * 4
    exact, similarity = 4 * 96**2 * HEAD_DIM * 0.5, 2 * 96 * 4 * HEAD_DIM
    expected = HEADS * (exact + similarity + 2 * pairs * HEAD_DIM)
    assert method.flops(WHOLE, 0.5) == pytest.approx(expected)
    assert build(1, selection="density", critical=0.5).flops(WHOLE) == pytest.approx(expected)


def test_compiling_leaves_it_as_it_is() -> None:
    method = build()
    counter = CompileCounter()
    compiled = torch.compile(lambda *args: method(*args) * 2, backend=counter)
    for seed in range(2):
        qkv, context = inputs(WHOLE, seed)
        leaves = [[t.clone().requires_grad_() for t in qkv] for _ in range(2)]
        found, expected = compiled(*leaves[0], context), method(*leaves[1], context) * 2
        assert torch.equal(found, expected)
        for output in (found, expected):
            output.square().sum().backward()
        for ours, plain in zip(*leaves, strict=True):
            assert torch.equal(ours.grad, plain.grad)  # type: ignore[arg-type]
    assert counter.op_count == 1  # what is done with its output
