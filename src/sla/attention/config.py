"""The numbers of every attention method: one dataclass a method, the only home of its defaults.

Paper sections and equations refer to arXiv 2509.24006. Fractions are of the key blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class AttentionConfig:
    """What every method's config has.

    Attributes:
        name: registered name of the method, see `available_attention()`.
        tile: order of the video tokens inside the model: None for raster order, as in the paper;
            three numbers for tiles of so many frames, rows and columns, one after the other
            (`sla.attention.token_order`). It belongs to the method and not to the weights, which
            are the same in every order.

    A subclass with a `__post_init__` of its own calls this one's.

    Raises:
        ValueError: `tile` is not None and not three positive integers.
    """

    name: str = "full"
    tile: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.tile is None:
            return
        sizes = tuple(self.tile) if isinstance(self.tile, list | tuple) else ()
        if len(sizes) != 3 or not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(
                f"attention.tile is {self.tile!r}; it must be null or three positive integers: "
                "frames, height, width"
            )
        self.tile = sizes  # YAML and JSON give lists


@dataclass
class FullConfig(AttentionConfig):
    """Exact softmax attention over all keys."""

    name: str = "full"


@dataclass
class LinearOnlyConfig(AttentionConfig):
    """Linear attention over all keys (the "Linear only" row of Table 2).

    Attributes:
        feature_map: `softmax`, `elu+1`, `relu` or `hedgehog`.
    """

    name: str = "linear_only"
    feature_map: str = "softmax"


@dataclass
class BlockSparseConfig(AttentionConfig):
    """What the methods that route over blocks of consecutive tokens share (Section 4).

    Attributes:
        critical: fraction k_h of the key blocks of a row that get exact attention, in (0, 1].
        block_q: queries in a block, b_q.
        block_kv: keys in a block, b_kv.
        backend: backend of the operator; `auto` takes the fastest that supports the inputs.
        branch_outputs: how many outputs of branches training keeps beside the method's own.
    """

    branch_outputs: ClassVar[int] = 0

    critical: float = 0.05
    block_q: int = 64
    block_kv: int = 64
    backend: str = "auto"


@dataclass
class SparseOnlyConfig(BlockSparseConfig):
    """SLA's sparse branch alone (the "Sparse only" row of Table 2)."""

    name: str = "sparse_only"


@dataclass
class SparsePooledConfig(BlockSparseConfig):
    """The sparse branch, with the mean key and value of every other block in the same softmax."""

    branch_outputs: ClassVar[int] = 1

    name: str = "sparse_pooled"


@dataclass
class SLAConfig(BlockSparseConfig):
    """Sparse-Linear Attention (Section 4).

    Attributes:
        negligible: fraction k_l of the key blocks of a row that are skipped, in [0, 1].
        feature_map: feature map phi of the linear branch: `softmax`, `elu+1`, `relu` or `hedgehog`.
        proj_init: `zero` (a converted model starts as pure sparse attention) or `identity`.
        linear_scope: keys of the linear branch: `marginal` (equation 5), or `all` (the authors'
            later public code: every key, critical ones too, whatever the row; `negligible` then
            has no effect).
    """

    name: str = "sla"
    negligible: float = 0.10
    feature_map: str = "softmax"
    proj_init: str = "zero"
    linear_scope: str = "marginal"


@dataclass
class LinearPlusSparseConfig(BlockSparseConfig):
    """Outputs of `linear_only` and `sparse_only` added (the "L+S" row of Table 2).

    Attributes:
        critical: fraction of the key blocks of a row that get exact attention; the table's row has
            a sparsity of 90 %.
        feature_map: feature map phi of the linear part: `softmax`, `elu+1`, `relu` or `hedgehog`.
    """

    branch_outputs: ClassVar[int] = 2

    name: str = "linear_plus_sparse"
    critical: float = 0.10
    feature_map: str = "softmax"


# What null means in a `SpargeConfig`, by selection; a selection does not use what it does not list.
# mass: simthreshd1 and cdfthreshd of `spas_sage2_attn_meansim_cuda` in the authors' public code
# (thu-ml/SpargeAttn; earlier releases had 0.1 and 0.9; the paper searches both for every layer).
# density: simthreshd1 and topk of its `spas_sage2_attn_meansim_topk_cuda`.
# union: arXiv 2602.13515, Appendix A, Wan2.1-1.3B at 480p (14B at 720p: mass 0.16); no test there.
SPARGE_DEFAULTS: dict[str, dict[str, float]] = {
    "mass": {"similarity": 0.6, "mass": 0.98},
    "density": {"similarity": -0.1, "critical": 0.35},
    "union": {"similarity": -0.1, "critical": 0.03, "mass": 0.2},
}


@dataclass
class SpargeConfig(AttentionConfig):
    """SpargeAttn (arXiv 2502.18137) and the selection of SpargeAttention2 (arXiv 2602.13515).

    A number that is null is the default of the selection, in `SPARGE_DEFAULTS`; one that the
    selection does not use has no effect.

    Attributes:
        selection: `mass` (SpargeAttn: the best blocks of a row up to a share of the pooled softmax,
            and all blocks that are not self-similar), `density` (a given share of the blocks of
            every row, for comparison at equal exact work) or `union` (SpargeAttention2: top-k and
            top-p together).
        similarity: theta: blocks whose mean cosine similarity is below it are not self-similar, in
            [-1, 1]. The mean is never negative: zero or less is no test.
        mass: tau, the share of the pooled softmax that the chosen blocks hold, in [0, 1]; not used
            by `density`.
        critical: fraction of the key blocks of a row, in (0, 1]: all that it attends with
            `density`, the top-k with `union`; not used by `mass`.
        smooth_key: measure the similarity of keys after their mean over all tokens is subtracted,
            as the public code does (the paper: as they are).
        block_q: queries in a block.
        block_kv: keys in a block.
        backend: backend of the operator; `auto` takes the fastest that supports the inputs.
    """

    name: str = "sparge"
    selection: str = "mass"
    similarity: float | None = None
    mass: float | None = None
    critical: float | None = None
    smooth_key: bool = True
    block_q: int = 128
    block_kv: int = 64
    backend: str = "auto"


@dataclass
class SLA2Config(BlockSparseConfig):
    """SLA2 (arXiv 2602.12675): learned routing, and a learned ratio of the two branches.

    The paper reports critical fractions of 5 % and 3 %.

    Attributes:
        block_q: queries in a block, 128 in the paper.
        feature_map: feature map phi of the linear branch: `softmax`, `elu+1`, `relu` or `hedgehog`.
        smooth_key: subtract the keys' mean over tokens before everything else.
        mixing: what has an alpha of its own in a layer: `scalar` one for all, `head` each head,
            `block` each query block and head, as in the paper: then only samples of
            `mixing_blocks` query blocks can be computed.
        mixing_blocks: ceil(tokens / block_q) for mixing `block`; not looked at for the others.
        alpha_init: alpha when built, in (0, 1); near 1 a converted model starts near pure sparse
            attention. Where the marginal set is empty, alpha is 1 whatever this says.
        precision: forward of the sparse branch: `16bit`, the dtype of the inputs, or `fp8`, with
            Q, K and V rounded to FP8 (the paper: INT8 and FP8). The backward is never rounded.
    """

    branch_outputs: ClassVar[int] = 2

    name: str = "sla2"
    block_q: int = 128
    feature_map: str = "softmax"
    smooth_key: bool = True
    mixing: str = "scalar"
    mixing_blocks: int = 0
    alpha_init: float = 0.95
    precision: str = "16bit"


@dataclass
class VSAConfig(AttentionConfig):
    """Video Sparse Attention (arXiv 2505.13389): a coarse and a fine branch over 3D cubes.

    Attributes:
        critical: fraction of the cubes that a cube attends to exactly, in (0, 1]; at least one
            cube. 0.11 is where the SLA paper runs it (sparsity 89 %, Table 1); the VSA paper takes
            the best 32 cubes, whatever their number.
        cube: frames, rows and columns of a cube, 4 x 4 x 4 in the paper. Their product, rounded up
            to a power of two, is the block size of the kernels; cubes at the far ends of the grid
            may be smaller, and take as long: at Wan's 21 x 30 x 52 tokens, 3 x 5 x 4 divides the
            grid and fills 94 % of the blocks, 4 x 4 x 4 only 82 %.
        fine_gate: gate of the fine branch: `fixed` at one, as in the paper's fine-tuning of
            pretrained models and its released code, or `learned` from the hidden states.
        backend: backend of the operator; `auto` takes the fastest that supports the inputs.

    Raises:
        ValueError: `cube` is not three positive integers.
    """

    name: str = "vsa"
    critical: float = 0.11
    cube: tuple[int, int, int] = (4, 4, 4)
    fine_gate: str = "fixed"
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        frames, height, width = _sizes("cube", self.cube, 3)
        self.cube = (frames, height, width)

    @property
    def block(self) -> int:
        """Tokens in a block of the kernels: those of a cube, rounded up to a power of two."""
        frames, height, width = self.cube
        return 1 << (frames * height * width - 1).bit_length()


@dataclass
class VMoBAConfig(AttentionConfig):
    """Video Mixture of Block Attention (arXiv 2506.23858): each query picks blocks of keys.

    Layers partition the keys by turns into blocks in time, in space, and in both. Blocks are given
    by their sizes in tokens, as in the paper's Table 4; the defaults are its row for Wan 2.1 at
    81 x 480 x 832 (a grid of 21 x 30 x 52 tokens). Blocks at the far ends may be smaller, and a
    size beyond the grid's is the grid's.

    Attributes:
        temporal: frames of a block in the layers 0, 3, 6, ...: all tokens of these frames.
        spatial: rows and columns of a block in the layers 1, 4, ...: these tokens of all frames.
        spatio_temporal: frames, rows and columns of a block in the layers 2, 5, ...
        selection: which pairs of a query and a block a head attends to, beside every query's own
            block: `threshold` (the paper: the pairs of the highest similarities, until they hold
            a share of the sum of all) or `density` (the same ranking, cut at a given share of the
            exact scores, for comparison at equal work).
        threshold: tau, the share of the head's sum of normalised similarities, in [0, 1]; 0.25 in
            the paper. 1 takes all pairs. Not used by `density`.
        critical: fraction of the scores computed exactly, in (0, 1]; 0.15 is where the SLA paper
            runs it (sparsity 85 %, Table 1). The own blocks are taken whatever it says: with
            blocks of equal size it is never below one over their number. Not used by `threshold`.
        block_q: queries in a block of the kernels: the queries of a key block are grouped by so
            many.
        block_kv: keys in a block of the kernels: a key block is filled up to a multiple of it.
        backend: backend of the operator; `auto` takes the fastest that supports the inputs.

    Raises:
        ValueError: a size of a block is not a positive integer, or there are more or fewer.
    """

    name: str = "vmoba"
    temporal: int = 3
    spatial: tuple[int, int] = (5, 13)
    spatio_temporal: tuple[int, int, int] = (7, 5, 13)
    selection: str = "threshold"
    threshold: float = 0.25
    critical: float = 0.15
    block_q: int = 64
    block_kv: int = 64
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("temporal", "block_q", "block_kv"):
            _sizes(field, (getattr(self, field),), 1)
        rows, columns = _sizes("spatial", self.spatial, 2)
        self.spatial = (rows, columns)
        frames, rows, columns = _sizes("spatio_temporal", self.spatio_temporal, 3)
        self.spatio_temporal = (frames, rows, columns)


def _sizes(field: str, value: object, count: int) -> tuple[int, ...]:
    """`count` positive integers; YAML and JSON give lists.

    Raises:
        ValueError: it is something else.
    """
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != count or not all(type(size) is int and size >= 1 for size in sizes):
        shown = sizes[0] if count == 1 else value
        wanted = "a positive integer" if count == 1 else f"{count} positive integers"
        raise ValueError(f"attention.{field} is {shown!r}; it must be {wanted}")
    return sizes


__all__ = [
    "SPARGE_DEFAULTS",
    "AttentionConfig",
    "BlockSparseConfig",
    "FullConfig",
    "LinearOnlyConfig",
    "LinearPlusSparseConfig",
    "SLA2Config",
    "SLAConfig",
    "SpargeConfig",
    "SparseOnlyConfig",
    "VMoBAConfig",
    "VSAConfig",
]
