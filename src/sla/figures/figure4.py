"""Figure 4: the algorithm, drawn on a real block map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sla_kernels import classify_blocks
from sla_kernels.block_map import pool_blocks
from torch import Tensor

from sla.analysis.capture_files import Capture, Captured, Moment
from sla.analysis.routing import whole_blocks
from sla.attention import SLAConfig
from sla.figures.analysis import COLOURS, capture_origin, new_figure, open_capture, save
from sla.figures.figure3 import CHOICE, choose_map
from sla.figures.figure6a import FigureError

CLASSES = {"critical": 1, "marginal": 0, "negligible": -1}


@dataclass(frozen=True)
class BlockPicture:
    """A block map of one head and what it was made from.

    Attributes:
        pooled: P_c, float32 (M, T_n), M whole query blocks.
        labels: int8 (M, T_n).
        blocks: int64 (M,): which query blocks they are.
    """

    pooled: Tensor
    labels: Tensor
    blocks: Tensor


def block_picture(captured: Captured, config: SLAConfig) -> BlockPicture:
    """Routing of the first head at a config's blocks and fractions, raster order.

    Raises:
        FigureError: no query block was captured as a whole.
    """
    tokens, block = captured.key.shape[1], config.block_q
    whole = whole_blocks(captured.rows, tokens, block, torch.arange(tokens))
    if not len(whole):
        raise FigureError(
            f"{captured.moment.file} holds no whole block of {block} queries; capture with "
            "--query-blocks all"
        )
    query = captured.query[:1, whole.flatten()].float()[None]
    key = captured.key[:1].float()[None]
    scores = pool_blocks(query, block) @ pool_blocks(key, config.block_kv).transpose(-1, -2)
    labels = classify_blocks(
        query,
        key,
        critical=config.critical,
        negligible=config.negligible,
        block_q=block,
        block_kv=config.block_kv,
    ).labels[0, 0]
    pooled = torch.softmax(scores[0, 0] / math.sqrt(query.shape[-1]), dim=-1)
    return BlockPicture(pooled, labels, captured.rows[whole[:, 0]] // block)


def caption(capture: Capture, moment: Moment, head: int, row: int, config: SLAConfig) -> str:
    """What the figure shows, and from which file and command."""
    return "\n".join(
        [
            "Sparse-Linear Attention on a real block map: queries and keys are pooled over blocks "
            f"of {config.block_q} and {config.block_kv} tokens (raster order); of each row of P_c "
            f"the highest {config.critical:.0%} of the key blocks are critical (exact attention), "
            f"the lowest {config.negligible:.0%} negligible (skipped), the rest marginal (linear "
            f"attention). The strip is the row of query block {row}. Layer {moment.layer}, head "
            f"{head}, timestep {moment.timestep:g} ({CHOICE}).",
            capture_origin(capture, moment.file),
        ]
    )


def draw(out: Path, folder: Path) -> list[Path]:
    """Write figure4.png, figure4.pdf and their caption figure4.txt to a folder.

    Args:
        folder: of a capture.

    Raises:
        FigureError: there is no capture, or none of whole query blocks.
    """
    capture = open_capture(folder)
    moment, head = choose_map(capture)
    config = SLAConfig()
    picture = block_picture(capture.read(moment, heads=[head]), config)
    place = len(picture.blocks) // 2
    row = int(picture.blocks[place])
    figure = new_figure(12, 6.4)
    grid = figure.add_gridspec(2, 3, height_ratios=[4, 2.2])
    _pooled(figure.add_subplot(grid[0, 0]), picture, place)
    _labels(figure.add_subplot(grid[0, 1]), picture, place, config)
    _branches(figure.add_subplot(grid[0, 2]), picture, place)
    _strip(figure.add_subplot(grid[1, :]), picture, place, row)
    return save(figure, out, "figure4", caption(capture, moment, head, row, config))


def _pooled(axes: Any, picture: BlockPicture, place: int) -> None:
    axes.imshow(
        picture.pooled.log10().numpy(), cmap="magma", aspect="auto", interpolation="nearest"
    )
    axes.set_title("1. $P_c$ = softmax(pool(Q) pool(K)$^T$/$\\sqrt{d}$), log scale", fontsize=10)
    _frame(axes, picture, place)


def _labels(axes: Any, picture: BlockPicture, place: int, config: SLAConfig) -> None:
    axes.imshow(_colours(picture.labels), aspect="auto", interpolation="nearest")
    axes.set_title(
        f"2. $M_c$: top {config.critical:.0%} and bottom {config.negligible:.0%} of each row",
        fontsize=10,
    )
    _frame(axes, picture, place)


def _frame(axes: Any, picture: BlockPicture, place: int) -> None:
    from matplotlib.patches import Rectangle

    width = picture.labels.shape[1]
    axes.add_patch(
        Rectangle((-0.5, place - 0.5), width, 1, fill=False, edgecolor="lime", linewidth=1.5)
    )
    axes.set(xticks=[], yticks=[], xlabel="key blocks", ylabel="query blocks")


def _colours(labels: Tensor) -> np.ndarray:
    from matplotlib.colors import to_rgb

    image = np.zeros((*labels.shape, 3))
    for name, label in CLASSES.items():
        image[labels.numpy() == label] = to_rgb(COLOURS[name])
    return image


def _branches(axes: Any, picture: BlockPicture, place: int) -> None:
    """What is done with the blocks of each class."""
    counts = {name: int((picture.labels[place] == n).sum()) for name, n in CLASSES.items()}
    texts = {
        "critical": f"{counts['critical']} critical blocks: exact\n"
        "$O^s_i$ = softmax$(Q_i K^T/\\sqrt{d})\\,V$",
        "marginal": f"{counts['marginal']} marginal blocks: linear\n"
        "$H_i = \\Sigma_j\\,\\phi(K_j)^T V_j,\\ \\ Z_i = \\Sigma_j\\,\\Sigma\\,\\phi(K_j)$\n"
        "$O^l_i = \\phi(Q_i) H_i \\,/\\, \\phi(Q_i) Z_i$",
        "negligible": f"{counts['negligible']} negligible blocks:\nskipped",
    }
    heights = {"critical": 0.86, "marginal": 0.55, "negligible": 0.25}
    for name, text in texts.items():
        axes.text(
            *(0.5, heights[name], text),
            ha="center",
            va="center",
            fontsize=10,
            transform=axes.transAxes,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": COLOURS[name], "alpha": 0.45},
        )
    axes.text(
        *(0.5, 0.04, "$O_i = O^s_i + \\mathrm{Proj}(O^l_i)$"),
        ha="center",
        va="center",
        fontsize=12,
        transform=axes.transAxes,
    )
    axes.set_title("3. two branches", fontsize=10)
    axes.axis("off")


def _strip(axes: Any, picture: BlockPicture, place: int, row: int) -> None:
    """One row: the height of each key block is its pooled weight."""
    weights, labels = picture.pooled[place].numpy(), picture.labels[place].numpy()
    for name, label in CLASSES.items():
        of_class = np.flatnonzero(labels == label)
        axes.bar(of_class, weights[of_class], 1.0, color=COLOURS[name], label=name)
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(weights) - 0.5)
    axes.set_xlabel("key block")
    axes.set_ylabel("$P_c$")
    axes.set_title(f"row of query block {row}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
