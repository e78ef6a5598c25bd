"""Analytic FLOPs of self-attention, and the paper's efficiency columns beside ours.

Convention: a multiply-add counts as two, and products of matrices alone are counted, so that full
attention is 4 N^2 D per head and layer. Not counted: softmax and exponentials, feature maps (the
product inside the learned one of Hedgehog too), means and sums over tokens (pooling, normalisers),
divisions, sorts and thresholds of a routing; nor what every method has alike: the projections to
query, key, value and output. One sample, one forward pass. A method's formula is its `flops`.
"""

from __future__ import annotations

import csv
import inspect
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sla.attention import (
    AttentionConfig,
    AttentionMethod,
    FullConfig,
    LinearOnlyConfig,
    SLAConfig,
    SparseOnlyConfig,
    attention_config_class,
    attention_config_from_dict,
    available_attention,
    build_attention,
)
from sla.attention.interface import Grid, tokens_of

CONVENTION = (
    "a multiply-add counts as two and only products of matrices are counted: full attention is "
    "4 N^2 D per head and layer; softmax, feature maps, pooling, normalisers, divisions and the "
    "sorts of a routing are not counted, nor the projections to query, key, value and output"
)


@dataclass(frozen=True)
class Shape:
    """The self-attention of a model on one sample.

    Attributes:
        grid: latent grid in tokens.
        num_heads, head_dim: H and D.
        num_layers: L.

    Raises:
        ValueError: a size is not positive; names it.
    """

    grid: Grid
    num_heads: int
    head_dim: int
    num_layers: int

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(
                f"grid is {self.grid}; it must be three positive numbers: frames, height, width"
            )
        for name in ("num_heads", "head_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def tokens(self) -> int:
        """N."""
        return tokens_of(self.grid)

    def __str__(self) -> str:
        frames, height, width = self.grid
        return (
            f"grid {frames} x {height} x {width} = {self.tokens:,} tokens, {self.num_layers} "
            f"layers of {self.num_heads} heads of {self.head_dim}"
        )


# Wan2.1-1.3B at 480p x 81 frames: latents of 21 x 60 x 104, patches of 1 x 2 x 2.
WAN_1_3B = Shape(grid=(21, 30, 52), num_heads=12, head_dim=128, num_layers=30)


@dataclass(frozen=True)
class Case:
    """A row of the table: a method at the paper's setting, and what the paper prints for it.

    Attributes:
        label: the paper's name of it.
        attention: our config of it, as plain values.
        paper_tflops, paper_sparsity: as printed; None where the paper has no such row.
        source: the paper's table.
    """

    label: str
    attention: dict[str, Any]
    paper_tflops: float | None = None
    paper_sparsity: float | None = None
    source: str = ""


_SLA_PAPER = "arXiv 2509.24006, Tables 1 and 2"
_SLA2_PAPER = "arXiv 2602.12675, Table 1"
PAPER_FULL_TFLOPS = 52.75  # of full attention, in both


def _sla(label: str, tflops: float, sparsity: float, **numbers: Any) -> Case:
    return Case(label, {"name": "sla", **numbers}, tflops, sparsity, _SLA_PAPER)


# The paper's numbers are for Wan2.1-1.3B; ours beside them are at the same density.
CASES: tuple[Case, ...] = (
    Case("Full attention", {"name": "full"}, PAPER_FULL_TFLOPS, 0.0, _SLA_PAPER),
    Case("Sparge-F", {"name": "sparge"}, 7.91, 0.85, _SLA_PAPER),
    Case("Sparge-T", {"name": "sparge"}, 7.38, 0.84, _SLA_PAPER),
    Case("VMoBA", {"name": "vmoba"}, 7.91, 0.85, _SLA_PAPER),
    Case("VSA", {"name": "vsa", "critical": 0.11}, 5.92, 0.89, _SLA_PAPER),
    _sla("SLA (top 5 %)", 2.74, 0.95, critical=0.05),
    Case("Linear only", {"name": "linear_only"}, 0.10, 1.0, _SLA_PAPER),
    Case("Sparse only", {"name": "sparse_only", "critical": 0.15}, 7.91, 0.85, _SLA_PAPER),
    Case("L+S", {"name": "linear_plus_sparse", "critical": 0.10}, 5.37, 0.90, _SLA_PAPER),
    _sla("SLA (elu+1)", 2.74, 0.95, critical=0.05, feature_map="elu+1"),
    _sla("SLA (hedgehog)", 3.11, 0.95, critical=0.05, feature_map="hedgehog"),
    _sla("SLA (top 10 %)", 5.38, 0.90, critical=0.10),
    _sla("SLA (top 20 %)", 10.65, 0.80, critical=0.20),
    Case(
        "SLA (top 5 %), linear branch over all keys",
        {"name": "sla", "critical": 0.05, "linear_scope": "all"},
    ),
    Case("Sparse, the rest pooled (top 5 %)", {"name": "sparse_pooled", "critical": 0.05}),
    Case("SLA2 (95 %)", {"name": "sla2", "critical": 0.05}, 2.87, 0.95, _SLA2_PAPER),
    Case("SLA2 (97 %)", {"name": "sla2", "critical": 0.03}, 1.82, 0.97, _SLA2_PAPER),
)


@dataclass(frozen=True)
class Cost:
    """Our FLOPs of one row.

    Attributes:
        case: the row.
        density: fraction of the N^2 scores computed exactly that was counted with; None where it
            depends on the inputs and the paper gives none.
        assumed: the method's density depends on the inputs, `density` is the paper's.
        flops: of all layers; None without a density.
        full_flops: of all layers of full attention.
    """

    case: Case
    density: float | None
    assumed: bool
    flops: float | None
    full_flops: float

    @property
    def ratio(self) -> float | None:
        """Over full attention."""
        return None if self.flops is None else self.flops / self.full_flops

    @property
    def rest(self) -> float | None:
        """What is not exact attention, over full attention: `ratio` - `density`."""
        return None if self.ratio is None or self.density is None else self.ratio - self.density

    @property
    def paper_ratio(self) -> float | None:
        """The paper's FLOPs over its own full attention's."""
        tflops = self.case.paper_tflops
        return None if tflops is None else tflops / PAPER_FULL_TFLOPS

    @property
    def paper_rest(self) -> float | None:
        """The paper's ratio beyond 1 - its sparsity."""
        if self.paper_ratio is None or self.case.paper_sparsity is None:
            return None
        return self.paper_ratio - (1.0 - self.case.paper_sparsity)


def layer_flops(
    config: AttentionConfig,
    grid: Grid,
    num_heads: int,
    head_dim: int,
    density: float | None = None,
    *,
    layer_index: int = 0,
) -> float:
    """Forward FLOPs of one layer's attention for one sample.

    Args:
        config: config of a registered method.
        grid: latent grid in tokens.
        num_heads, head_dim: H and D; the layer is H * D wide.
        density: fraction of exact scores, in [0, 1]; needed where it depends on the inputs.
        layer_index: for methods that differ from layer to layer.

    Raises:
        ValueError: no such method, a number out of its range, or no density where one is needed.
    """
    if density is not None and not 0.0 <= density <= 1.0:
        raise ValueError(f"density is {density}; it must be in [0, 1]")
    shape = Shape(grid, num_heads, head_dim, layer_index + 1)
    return _layer(config, shape, layer_index).flops(grid, density)


def model_flops(config: AttentionConfig, shape: Shape, density: float | None = None) -> float:
    """`layer_flops` of all layers."""
    return sum(
        layer_flops(config, shape.grid, shape.num_heads, shape.head_dim, density, layer_index=index)
        for index in range(shape.num_layers)
    )


def table(shape: Shape = WAN_1_3B, cases: Sequence[Case] = CASES) -> list[Cost]:
    """Our cost of every case, and of every registered method that no case names.

    Where a method's density depends on its inputs it is counted at the paper's sparsity.

    Raises:
        ValueError: a case that no registered method can be built for.
    """
    named = {case.attention["name"] for case in cases}
    others = [Case(name, {"name": name}) for name in available_attention() if name not in named]
    full = model_flops(FullConfig(), shape)
    return [_cost(case, shape, full) for case in (*cases, *others)]


def _cost(case: Case, shape: Shape, full: float) -> Cost:
    config = attention_config_from_dict(case.attention)
    layers = [_layer(config, shape, index) for index in range(shape.num_layers)]
    densities = [layer.density(shape.grid) for layer in layers]
    known = [density for density in densities if density is not None]
    if len(known) == len(layers):
        flops = sum(layer.flops(shape.grid) for layer in layers)
        return Cost(case, sum(known) / len(known), False, flops, full)
    if case.paper_sparsity is None:
        return Cost(case, None, False, None, full)
    density = 1.0 - case.paper_sparsity
    flops = sum(layer.flops(shape.grid, density) for layer in layers)
    return Cost(case, density, True, flops, full)


def _layer(config: AttentionConfig, shape: Shape, index: int) -> AttentionMethod:
    with torch.device("meta"):  # only its numbers are asked
        dim = shape.num_heads * shape.head_dim
        return build_attention(config, shape.num_heads, shape.head_dim, dim, index)


# --- printing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SLAParts:
    """Parts of SLA's FLOPs over full attention's, by what other methods count of them.

    `linear` are the two products phi(K)^T V and phi(Q) H, `aggregation` is H = M h.
    """

    exact: float
    routing: float
    linear: float
    aggregation: float
    proj: float

    @property
    def total(self) -> float:
        """All of SLA's FLOPs over full attention's."""
        return self.exact + self.routing + self.linear + self.aggregation + self.proj


def sla_parts(config: SLAConfig, shape: Shape) -> SLAParts:
    """Split SLA's FLOPs: routing as of `sparse_only`, the linear products as of `linear_only`."""
    full = model_flops(FullConfig(), shape)
    sparse = SparseOnlyConfig(
        critical=config.critical, block_q=config.block_q, block_kv=config.block_kv
    )
    exact = _layer(sparse, shape, 0).density(shape.grid)
    assert exact is not None
    routing = model_flops(sparse, shape, density=0.0) / full
    linear = model_flops(LinearOnlyConfig(feature_map=config.feature_map), shape) / full
    proj = shape.head_dim / (2.0 * shape.tokens)  # 2 N D^2 of 4 N^2 D
    total = model_flops(config, shape) / full
    return SLAParts(exact, routing, linear, total - exact - routing - linear - proj, proj)


def markdown(costs: Sequence[Cost], shape: Shape) -> str:
    """The table, the differences from the paper, and notes that explain them.

    The paper's columns are those of Wan2.1-1.3B; at any other shape they are left out.
    """
    with_paper = shape == WAN_1_3B
    lines = [f"Attention FLOPs of one forward pass, {shape}.", f"Convention: {CONVENTION}.", ""]
    head = ["method", "ours: sparsity", "ours: TFLOPs", "ours: of full", "ours: beyond exact part"]
    if with_paper:
        of_paper = ["sparsity", "TFLOPs", "of full", "beyond 1 - sparsity"]
        head[1:1] = [f"paper: {column}" for column in of_paper]
    rows = []
    for cost in costs:
        sparsity = None if cost.density is None else 1.0 - cost.density
        mark = " *" if cost.assumed else ""
        row = [
            cost.case.label,
            _percent(sparsity) + mark,
            "" if cost.flops is None else f"{cost.flops / 1e12:.2f}",
            _percent(cost.ratio),
            _percent(cost.rest),
        ]
        if with_paper:
            printed, tflops = cost.case.paper_sparsity, cost.case.paper_tflops
            row[1:1] = [
                "" if printed is None else f"{printed:.0%}",
                "" if tflops is None else f"{tflops:.2f}",
                _percent(cost.paper_ratio),
                _percent(cost.paper_rest),
            ]
        rows.append(row)
    lines += _table(head, rows)
    if any(cost.assumed for cost in costs):
        lines += ["", "\\* depends on the inputs; counted at the paper's sparsity."]
    if with_paper:
        lines += ["", *_differences(costs), "", *_notes(costs, shape)]
    lines += ["", "What a method's formula counts:", ""]
    for name in available_attention():
        text = inspect.getdoc(_layer(attention_config_class(name)(), shape, 0).flops) or ""
        lines.append(f"- `{name}`: {' '.join(text.split())}")
    return "\n".join(lines)


def to_csv(costs: Sequence[Cost], shape: Shape) -> str:
    """One line a row, ratios as fractions, unrounded; empty where there is no number."""
    stream = io.StringIO()
    names = [
        *("label", "attention", "grid", "num_heads", "head_dim", "num_layers"),
        *("ours_density", "ours_density_is_the_papers", "ours_flops", "ours_ratio", "ours_rest"),
    ]
    with_paper = shape == WAN_1_3B
    if with_paper:
        names += ["paper_sparsity", "paper_tflops", "paper_ratio", "paper_rest", "paper_source"]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for cost in costs:
        case = cost.case
        numbers = " ".join(f"{key}={value}" for key, value in case.attention.items())
        row = asdict(shape) | {
            "grid": "x".join(map(str, shape.grid)),
            "label": case.label,
            "attention": numbers,
            "ours_density": cost.density,
            "ours_density_is_the_papers": cost.assumed,
            "ours_flops": cost.flops,
            "ours_ratio": cost.ratio,
            "ours_rest": cost.rest,
        }
        if with_paper:
            row |= {
                "paper_sparsity": case.paper_sparsity,
                "paper_tflops": case.paper_tflops,
                "paper_ratio": cost.paper_ratio,
                "paper_rest": cost.paper_rest,
                "paper_source": case.source,
            }
        writer.writerow(row)
    return stream.getvalue()


def _differences(costs: Sequence[Cost]) -> list[str]:
    """Ours less the paper's in points of full attention, from the exact part and from the rest."""
    rows = []
    for cost in costs:
        values = (cost.ratio, cost.rest, cost.paper_ratio, cost.paper_rest)
        if any(value is None for value in values):
            continue
        ratio, rest, paper_ratio, paper_rest = (float(value or 0.0) for value in values)
        total, of_rest = ratio - paper_ratio, rest - paper_rest
        rows.append([cost.case.label, *(_points(v) for v in (total, total - of_rest, of_rest))])
    head = ["ours less the paper's, points of full", "all", "exact part", "rest"]
    return [
        *_table(head, rows),
        "",
        "Exact parts differ because a fraction of a row's blocks is rounded down to whole blocks.",
    ]


def _notes(costs: Sequence[Cost], shape: Shape) -> list[str]:
    """Where the differences come from, computed."""
    full = model_flops(FullConfig(), shape) / 1e12
    per_layer = full / shape.num_layers
    tokens, dim = shape.tokens, shape.head_dim
    frame = shape.grid[1] * shape.grid[2]
    solved = math.sqrt(PAPER_FULL_TFLOPS * 1e12 / (4 * shape.num_heads * dim * shape.num_layers))
    notes = [
        f"Full attention: 4 N^2 D H L is {full:.2f}T, the paper prints {PAPER_FULL_TFLOPS}T, "
        f"{full / PAPER_FULL_TFLOPS:.3f} times less, and does not say how it counts. At its "
        f"{shape.num_layers} layers that is N = {solved:,.0f} tokens, {solved / frame:.2f} latent "
        f"frames, which is no video of Wan's; at N = {tokens:,} it is "
        f"{PAPER_FULL_TFLOPS / per_layer:.3f} layers. A factor common to all rows cancels in "
        "ratios, so ratios are what we compare.",
        *_sla_notes(costs, shape),
        *_other_notes(costs, shape),
    ]
    for cost in costs:
        rest = cost.paper_rest
        if rest is not None and cost.paper_ratio is not None and rest < -0.005:
            notes.append(
                f"{cost.case.label}: the paper's FLOPs are {cost.paper_ratio:.2%} of full, which "
                f"is a sparsity of {1 - cost.paper_ratio:.0%} and not the "
                f"{cost.case.paper_sparsity:.0%} that it prints."
            )
    return [f"{number}. {note}" for number, note in enumerate(notes, 1)]


def _sla_notes(costs: Sequence[Cost], shape: Shape) -> list[str]:
    by_label = {cost.case.label: cost for cost in costs}
    sla, linear_only = by_label.get("SLA (top 5 %)"), by_label.get("Linear only")
    if sla is None or linear_only is None:
        return []
    config = attention_config_from_dict(sla.case.attention)
    assert isinstance(config, SLAConfig)
    parts = sla_parts(config, shape)
    blocks = math.ceil(shape.tokens / config.block_kv)
    printed = _known(sla.case.paper_tflops)
    paper, paper_rest = _known(sla.paper_ratio), _known(sla.paper_rest)
    remainder = printed - config.critical * PAPER_FULL_TFLOPS
    half = _known(linear_only.ratio) / 2
    low, high = ((printed + step) / PAPER_FULL_TFLOPS for step in (-0.005, 0.005))
    percent = f"{config.critical:.0%}"
    notes = [
        f"SLA at {percent}: ours is {parts.total:.2%} of full, the paper's {paper:.2%}. Ours = "
        f"exact {parts.exact:.3%} ({round(parts.exact * blocks)} of {blocks} blocks: a fraction is "
        f"rounded down to whole blocks) + routing {parts.routing:.3%} + the linear branch's two "
        f"products {parts.linear:.3%} + H = M h as a product of the block map with the blocks' "
        f"sums {parts.aggregation:.3%} + Proj {parts.proj:.3%}.",
        f"The paper's {paper:.2%} is {percent} + {paper_rest:.2%}: {printed}T less {percent} of "
        f"{PAPER_FULL_TFLOPS}T leaves {remainder:.2f}T, and it prints "
        f"{linear_only.case.paper_tflops:.2f}T for Linear only. We count {2 * half:.3%} for that "
        f"branch, the paper half as much ({half:.3%}): one product instead of two, or a "
        "multiply-add as one there but not in full attention. Routing, H = M h and Proj it does "
        f"not count. Counted so, our {percent} is {config.critical + half:.2%}, within the "
        f"rounding of {printed}T ({low:.2%} to {high:.2%}); with whole blocks "
        f"{parts.exact + half:.2%}.",
        "H = M h is the largest of ours beyond the exact part: 2 T_m T_n D^2 as a product of "
        "matrices, which our kernels do on tensor cores; subtracting, or tables (Appendix A.3), "
        "would take fewer additions. Where the linear branch runs over all keys, as in the "
        "authors' later code, there is none.",
    ]
    hedgehog = by_label.get("SLA (hedgehog)")
    if hedgehog is not None:
        theirs = _known(hedgehog.paper_rest)
        notes.append(
            f"Hedgehog: twice as many features, so ours has {_known(hedgehog.rest):.2%} beyond the "
            f"exact part where softmax has {parts.total - parts.exact:.2%}. Its learned product on "
            f"queries and keys, 4 N D^2 a head, would add {2 * half:.2%}. The paper has "
            f"{theirs:.2%} where softmax has {paper_rest:.2%}, {theirs / paper_rest:.1f} times as "
            "much; we know no count that gives that."
        )
    return notes


def _other_notes(costs: Sequence[Cost], shape: Shape) -> list[str]:
    by_label = {cost.case.label: cost for cost in costs}
    notes = []
    vsa, sla2 = by_label.get("VSA"), by_label.get("SLA2 (95 %)")
    if vsa is not None:
        gate = shape.num_heads * shape.head_dim / (2.0 * shape.tokens)  # 2 N (H D) D of 4 N^2 D
        notes.append(
            f"VSA: of our {_known(vsa.rest):.2%} beyond the exact part the gate, a linear map of "
            f"the hidden states, takes {gate:.2%} and the coarse branch "
            f"{_known(vsa.rest) - gate:.2%}; the paper's {_known(vsa.paper_rest):.2%} has no room "
            "for the gate."
        )
    if sla2 is not None:
        linear = model_flops(LinearOnlyConfig(), shape) / _known(sla2.full_flops)
        notes.append(
            f"SLA2: of our {_known(sla2.rest):.2%} the two products of the linear branch take "
            f"{linear:.2%}, the rest is nearly all H = M h, for half as many query blocks as SLA's."
            f" The paper's {_known(sla2.paper_rest):.2%} is close to the two products alone: here "
            "they are not counted by half."
        )
    return notes


def _known(number: float | None) -> float:
    assert number is not None
    return number


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _percent(fraction: float | None) -> str:
    # No minus before a zero.
    return "" if fraction is None else f"{round(fraction * 100, 2) + 0.0:.2f}%"


def _points(fraction: float) -> str:
    return f"{round(fraction * 100, 2) + 0.0:+.2f}"
