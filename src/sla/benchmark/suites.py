"""What the kernel benchmark measures: points, and named lists of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sla.figures.paper import (
    GPU_BLOCKS,
    NEGLIGIBLE,
    PAPER_BLOCKS,
    SPARSITY,
    WAN_1_3B,
    WAN_14B_720P,
)

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Point:
    """One set of inputs and of the operator's numbers.

    Attributes:
        map: `uniform` (routing of normal random inputs) or `skewed` (sinks).
    """

    batch: int
    heads: int
    tokens: int
    head_dim: int
    sparsity: float = SPARSITY
    negligible: float = NEGLIGIBLE
    block_q: int = GPU_BLOCKS[0]
    block_kv: int = GPU_BLOCKS[1]
    map: str = "uniform"

    @property
    def shape(self) -> Shape:
        """(batch, heads, tokens, head_dim)."""
        return self.batch, self.heads, self.tokens, self.head_dim

    @property
    def critical(self) -> float:
        """k_h."""
        return round(1 - self.sparsity, 9)


@dataclass(frozen=True)
class Suite:
    """Points, and the methods that are measured at them on a GPU."""

    points: tuple[Point, ...]
    methods: tuple[str, ...]


EXACT = ("flash_attention_2", "cudnn")
OURS = ("sla", "sla_given_map", "sparse_only")
# flex_block_sparse compiles anew for every point, so only the two real shapes have it.
EVERYTHING = (*EXACT, "flex_block_sparse", *OURS)
BRIEF = (*EXACT, "sla", "sla_given_map")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
BREAK_EVEN = (2304, 3072, 4096)
SPARSITIES = (0.80, 0.90, 0.95, 0.97)
BLOCKS = ((64, 64), (128, 64), (64, 128), (128, 128))


def _blocks(point: Point, block_q: int, block_kv: int) -> Point:
    return replace(point, block_q=block_q, block_kv=block_kv)


_SMALL, _LARGE = Point(*WAN_1_3B), Point(*WAN_14B_720P)
SUITES: dict[str, Suite] = {
    "wan-1.3b": Suite((_SMALL, _blocks(_SMALL, *PAPER_BLOCKS)), EVERYTHING),
    "blocks": Suite(tuple(_blocks(_SMALL, *blocks) for blocks in BLOCKS), (*EXACT, *OURS)),
    "sparsities": Suite(tuple(replace(_SMALL, sparsity=s) for s in SPARSITIES), BRIEF),
    "wan-14b-720p": Suite((_LARGE, _blocks(_LARGE, *PAPER_BLOCKS)), EVERYTHING),
    "lengths": Suite(tuple(replace(_SMALL, tokens=n) for n in LENGTHS), BRIEF),
    "break-even": Suite(tuple(replace(_SMALL, tokens=n) for n in BREAK_EVEN), BRIEF),
}


def plan(name: str) -> dict[Point, tuple[str, ...]]:
    """Points of a suite, or of `all`, each with its methods; points of one shape together."""
    found: dict[Point, tuple[str, ...]] = {}
    for suite in SUITES.values() if name == "all" else [SUITES[name]]:
        for point in suite.points:
            methods = (*found.get(point, ()), *suite.methods)
            found[point] = tuple(dict.fromkeys(methods))
    return grouped(found)


def grouped(points: dict[Point, tuple[str, ...]]) -> dict[Point, tuple[str, ...]]:
    """The same points, those of one shape together, shapes by first appearance."""
    shapes = list(dict.fromkeys(point.shape for point in points))
    return dict(sorted(points.items(), key=lambda item: shapes.index(item[0].shape)))
