"""SpargeAttn's selections against loops written from the papers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sla.attention import (
    AttentionContext,
    FullConfig,
    SLAConfig,
    SpargeAttention,
    SpargeConfig,
    build_attention,
)
from sla.attention.sparge import self_similarity

HEADS, HEAD_DIM, GRID = 2, 16, (4, 6, 8)
TOKENS = 4 * 6 * 8
CONTEXT = AttentionContext(grid=GRID)
# Blocks that do not divide 192 tokens: the last ones are short.
NUMBERS: dict[str, object] = {"block_q": 28, "block_kv": 20}
SELECTIONS = ["mass", "density", "union"]


def build(**numbers: object) -> SpargeAttention:
    config = SpargeConfig(**{**NUMBERS, **numbers})  # type: ignore[arg-type]
    method = build_attention(config, HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)
    assert isinstance(method, SpargeAttention)
    return method


def chosen_by(method: SpargeAttention, query: Tensor, key: Tensor, context=CONTEXT) -> Tensor:  # type: ignore[no-untyped-def]
    labels = method.block_map(query, key, context).labels
    assert labels.abs().eq(1).all()  # no marginal blocks
    return labels == 1


def inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries and keys whose blocks lie around one direction each, some tight and some loose."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*sizes: int) -> Tensor:
        return torch.randn((2, HEADS, *sizes), generator=generator)

    def pieces(block: int) -> Tensor:
        count = math.ceil(TOKENS / block)
        centre, spread = noise(count, HEAD_DIM), 0.8 * noise(count, 1).exp()
        centre, spread = (
            t.repeat_interleave(block, dim=2)[:, :, :TOKENS] for t in (centre, spread)
        )
        return (centre + spread * noise(TOKENS, HEAD_DIM)) / (1 + spread)

    return [t.to(dtype) for t in (pieces(28), pieces(20), noise(TOKENS, HEAD_DIM))]


def blocks_of(tensor: Tensor, block: int) -> list[Tensor]:
    """Of one head, (N, D)."""
    return list(tensor.split(block))


def cosine(tokens: Tensor) -> float:
    units = tokens / tokens.norm(dim=-1, keepdim=True)
    return (units @ units.T).mean().item()


def select(
    query: Tensor, key: Tensor, method: SpargeAttention, similarity: float, smooth: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask (T_m, T_n), fix queries and fix keys of one head: Section 3.2, and equation 9 of the
    successor."""
    config = method.config
    queries, keys = blocks_of(query, config.block_q), blocks_of(key, config.block_kv)
    smoothed = blocks_of(key - key.mean(0), config.block_kv) if smooth else keys
    fix_query = torch.tensor([cosine(tokens) < similarity for tokens in queries])
    fix_key = torch.tensor([cosine(tokens) < similarity for tokens in smoothed])
    scores = torch.stack([q.mean(0) for q in queries]) @ torch.stack([k.mean(0) for k in keys]).T
    scores = scores / math.sqrt(HEAD_DIM)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for i, row in enumerate(scores):
        weights = row.masked_fill(fix_key, -math.inf).softmax(0)
        order = sorted(range(len(row)), key=lambda j, w=weights: (-w[j], j))  # type: ignore[misc]
        total = 0.0
        for rank, j in enumerate(order):
            before, total = total, total + weights[j].item()
            if config.selection == "mass":
                taken = total <= config.mass or rank == 0
            else:
                taken = before < config.mass or rank < int(config.critical * len(row))
            mask[i, j] = taken
    mask[fix_query] = True
    mask[:, fix_key] = True
    return mask, fix_query, fix_key


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(
    "numbers",
    [
        {"selection": "mass", "similarity": 0.55, "mass": 0.9},
        {"selection": "mass", "similarity": -0.5, "mass": 0.3},
        {"selection": "union", "mass": 0.3, "critical": 0.25},
        {"selection": "union", "mass": 0.8, "critical": 0.25, "similarity": 0.55},
    ],
    ids=lambda numbers: "-".join(map(str, numbers.values())) if isinstance(numbers, dict) else None,
)
def test_blocks_are_those_of_the_paper(numbers: dict[str, Any], smooth: bool) -> None:
    method = build(smooth_key=smooth, **numbers)
    query, key, _ = inputs()
    chosen = chosen_by(method, query, key)
    theta = numbers.get("similarity", -1.0)
    fixed = []
    for sample in range(2):
        for head in range(HEADS):
            wanted, *fix = select(query[sample, head], key[sample, head], method, theta, smooth)
            assert torch.equal(chosen[sample, head], wanted)
            fixed += fix
    assert not chosen.all()
    # With a test, both kinds of blocks must have been there.
    share = torch.cat(fixed).float().mean()
    assert 0.05 < share < 0.95 if theta > 0 else share == 0


def test_self_similarity_is_the_mean_of_all_cosines() -> None:
    _, key, _ = inputs()
    found = self_similarity(key, 20)
    wanted = torch.tensor([[[cosine(b) for b in blocks_of(h, 20)] for h in s] for s in key])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert found.min() < 0.3 < 0.7 < found.max()
    # The paper's measure, for tokens of one length.
    units = normalize(key, dim=-1)[0, 0, :20]
    gram = units @ units.T
    torch.testing.assert_close(found[0, 0, 0], gram.mean() / gram.max().abs())
    assert self_similarity(torch.zeros(1, 1, 8, 4), 4).eq(0).all()


def test_keys_are_smoothed_for_the_test_alone() -> None:
    query, key, _ = inputs()
    # A part common to all keys makes them alike, and changes no softmax.
    shifted = key + 20.0
    plain, smooth = (
        build(selection="mass", similarity=0.6, mass=0.2, smooth_key=flag) for flag in (False, True)
    )
    steady = query[:, :, :28].repeat(1, 1, 7, 1)[:, :, :TOKENS]  # all queries as the first block
    steady = 2 * steady.mean(2, keepdim=True) + 0.1 * steady
    assert self_similarity(shifted, 20).min() > 0.9
    assert chosen_by(plain, steady, shifted).sum(-1).max() <= 3
    chosen = chosen_by(smooth, steady, shifted)
    assert chosen.all(dim=-2).sum() > 3
    assert torch.equal(chosen, chosen_by(smooth, steady, key))


@pytest.mark.parametrize("similarity", [None, 0.35])
def test_density_gives_every_row_as_many_blocks(similarity: float | None) -> None:
    method = build(selection="density", critical=0.3, similarity=similarity, block_kv=8)
    query, key, _ = inputs()
    chosen = chosen_by(method, query, key)
    count = int(0.3 * TOKENS / 8)
    assert chosen.sum(-1).eq(count).all()
    assert method.density(GRID) == method.exact_fraction(query, key, CONTEXT) == count / 24
    fixed = self_similarity(key - key.mean(2, keepdim=True), 8) < (similarity or -1)
    # Fix keys first, as far as they fit.
    held = (chosen & fixed.unsqueeze(-2)).sum(-1)
    assert torch.equal(held, fixed.sum(-1, keepdim=True).clamp(max=count).expand_as(held))
    if similarity:
        assert 0 < fixed.sum(-1).min() < count < fixed.sum(-1).max()


def test_density_ranks_by_score_among_too_many_fix_keys() -> None:
    query, key, _ = inputs()
    fix_all = build(selection="density", critical=0.3, similarity=1.0)
    fix_none = build(selection="density", critical=0.3)
    assert torch.equal(chosen_by(fix_all, query, key), chosen_by(fix_none, query, key))


@pytest.mark.parametrize("always_critical", [0, 25])
def test_density_without_a_test_is_slas_routing(always_critical: int) -> None:
    query, key, _ = inputs()
    context = AttentionContext(grid=GRID, always_critical=always_critical)
    sla = build_attention(SLAConfig(block_q=28, block_kv=20, critical=0.3), HEADS, HEAD_DIM, 32, 0)
    critical = sla.block_map(query, key, context).labels == 1  # type: ignore[union-attr]
    assert torch.equal(
        chosen_by(build(selection="density", critical=0.3), query, key, context), critical
    )


def test_union_holds_both_of_its_parts() -> None:
    query, key, _ = inputs()
    query = 3 * query  # so that rows are uneven
    union = chosen_by(build(selection="union", critical=0.3, mass=0.6), query, key)
    top_k = chosen_by(build(selection="density", critical=0.3), query, key)
    top_p = chosen_by(build(selection="union", critical=1e-9, mass=0.6), query, key)
    assert torch.equal(union, top_k | top_p)
    assert (top_k & ~top_p).any()
    assert (top_p & ~top_k).any()


@pytest.mark.parametrize(
    "numbers",
    [
        {"selection": "mass", "similarity": 0.5, "mass": 0.6},
        {"selection": "density", "critical": 0.3},
        {"selection": "union", "critical": 0.2, "mass": 0.4},
    ],
    ids=SELECTIONS,
)
def test_training_goes_through_the_chosen_blocks(numbers: dict[str, object]) -> None:
    method = build(**numbers)
    tensors = [t.requires_grad_() for t in inputs(dtype=torch.float64)]
    query, key, value = tensors
    skipped = method.block_map(query, key, CONTEXT).token_labels() != 1
    assert 0.1 < skipped.float().mean() < 0.9
    scores = query @ key.transpose(-1, -2) / math.sqrt(HEAD_DIM)
    expected = scores.masked_fill(skipped, -math.inf).softmax(-1) @ value
    output = method(query, key, value, CONTEXT)
    torch.testing.assert_close(output, expected)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    found = torch.autograd.grad((output * weight).sum(), tensors)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_always_critical_tokens_attend_and_are_attended(selection: str) -> None:
    query, key, _ = inputs()
    method = build(selection=selection, similarity=-1.0, mass=0.2, critical=0.1)
    context = AttentionContext(grid=GRID, always_critical=25)
    chosen = chosen_by(method, query, key, context)
    assert chosen[..., :2].all()  # 25 keys reach into two blocks of 20
    assert chosen[..., :1, :].all()  # 25 queries lie in one block of 28
    rest = chosen[..., 1:, 2:]
    assert rest.any(dim=-1).all()  # in addition to what the row chooses itself
    assert not rest.all()
    everything = AttentionContext(grid=GRID, always_critical=10 * TOKENS)
    assert chosen_by(method, query, key, everything).all()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_row_keeps_one_block_at_least(selection: str) -> None:
    query, key, _ = inputs()
    method = build(selection=selection, similarity=-1.0, mass=0.0, critical=1e-6)
    assert chosen_by(method, query, key).sum(-1).eq(1).all()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_lower_index_comes_first_among_equals(selection: str) -> None:
    query, key = (torch.ones(1, HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    # Ten equal blocks, of which three hold 0.3 of the sum.
    method = build(selection=selection, similarity=-1.0, mass=0.35, critical=0.3)
    count = 4 if selection == "union" else 3
    chosen = chosen_by(method, query, key)
    assert chosen[..., :count].all()
    assert not chosen[..., count:].any()


@pytest.mark.parametrize("selection", ["mass", "union"])
def test_where_no_block_is_self_similar_attention_is_full(selection: str) -> None:
    query, key, value = inputs()
    method = build(selection=selection, similarity=1.0)
    assert chosen_by(method, query, key).all()
    # Keys alone: each row has nothing left to choose from.
    steady = query[:, :, :1].expand_as(query)
    assert chosen_by(method, steady, key).all()
    full = build_attention(FullConfig(), HEADS, HEAD_DIM, 32, 0)(query, key, value, CONTEXT)
    torch.testing.assert_close(method(query, key, value, CONTEXT), full, atol=2e-6, rtol=1e-5)


def test_all_of_the_mass_is_all_blocks() -> None:
    query, key, _ = inputs()
    # Scores so far apart that most weights are zero in float32.
    assert chosen_by(build(similarity=-1.0, mass=1.0), 50 * query, 50 * key).all()


def test_numbers_left_out_are_those_of_the_selection() -> None:
    query, key, _ = inputs()
    for nothing, given in (
        ({"selection": "mass"}, {"selection": "mass", "similarity": 0.6, "mass": 0.98}),
        ({"selection": "density"}, {"selection": "density", "similarity": -0.1, "critical": 0.35}),
        (
            {"selection": "union"},
            {"selection": "union", "similarity": 0.0, "critical": 0.03, "mass": 0.2},
        ),
    ):
        assert torch.equal(
            chosen_by(build(**nothing), query, key), chosen_by(build(**given), query, key)
        )
    assert (build().config.block_q, SpargeConfig().block_q, SpargeConfig().block_kv) == (
        28,
        128,
        64,
    )


def test_density_is_known_only_where_it_is_given() -> None:
    query, key, _ = inputs()
    for selection in ("mass", "union"):
        method = build(selection=selection)
        assert method.density(GRID) is None
        with pytest.raises(ValueError, match="depends on its inputs"):
            method.flops(GRID)
    method = build(selection="density", critical=0.25, block_q=16, block_kv=8)
    query, key = query[:1], key[:1]
    with FlopCounterMode(display=False) as routing:
        method.block_map(query, key, CONTEXT)
    assert method.flops(GRID) == 0.25 * 4 * HEADS * TOKENS**2 * HEAD_DIM + routing.get_total_flops()
    assert method.flops(GRID, density=0.5) - method.flops(GRID) == HEADS * TOKENS**2 * HEAD_DIM


class LargestResult(TorchDispatchMode):
    """Watches the size of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selection_forms_no_pairs_of_tokens(selection: str) -> None:
    query, key, _ = (t[:1, :1] for t in inputs())
    method = build(selection=selection, similarity=0.5)
    with LargestResult() as largest:
        method.block_map(query, key, CONTEXT)
    assert 0 < largest.numel <= TOKENS * HEAD_DIM


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selection_looks_at_no_value_on_the_host(selection: str) -> None:
    method = build(selection=selection, similarity=0.5)
    context = AttentionContext(grid=GRID, always_critical=25)
    # Tensors without values: reading one, or a shape that depends on one, raises.
    with FakeTensorMode(allow_non_fake_inputs=False):
        query, key = (torch.empty(2, HEADS, TOKENS, HEAD_DIM) for _ in range(2))
        labels = method.block_map(query, key, context).labels
    assert labels.shape == (2, HEADS, 7, 10)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_low_precision_inputs_are_ranked_in_float32(selection: str) -> None:
    query, key = (t.bfloat16() for t in inputs()[:2])
    method = build(selection=selection, similarity=0.5, mass=0.6, critical=0.3)
    wanted = chosen_by(method, query.float(), key.float())
    assert torch.equal(chosen_by(method, query, key), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chosen_by(method, query.float(), key.float()), wanted)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"selection": "top-k"}, "selection is 'top-k'.*mass, density, union"),
        ({"similarity": 1.5}, "similarity is 1.5"),
        ({"mass": -0.1}, "mass is -0.1"),
        ({"critical": 0.0}, "critical is 0.0"),
        ({"block_kv": 0}, "block_kv is 0"),
    ],
)
def test_numbers_out_of_range_are_named(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**numbers)
