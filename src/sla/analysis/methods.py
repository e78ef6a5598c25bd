"""Error against sparsity for each method: fresh methods on captured queries, keys and values.

Nothing is trained: what is measured is the swap, before any fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sla.analysis.capture_files import Captured
from sla.analysis.capture_qkv import CaptureError
from sla.attention import (
    AttentionConfig,
    AttentionContext,
    attention_config_from_dict,
    available_attention,
    build_attention,
)
from sla.attention.token_order import tile_order
from sla.seeds import drawing

Grid = tuple[int, int, int]

# Lines of the figure: label to the method's numbers; `critical` is swept.
SWEEPS: dict[str, dict[str, Any]] = {
    "sparse_only": {"name": "sparse_only"},
    "sparse_only, 4x4x4 tiles": {"name": "sparse_only", "tile": (4, 4, 4)},
    "sparse_pooled": {"name": "sparse_pooled"},
    "sparse_pooled, 4x4x4 tiles": {"name": "sparse_pooled", "tile": (4, 4, 4)},
    "sla, Proj at identity": {"name": "sla", "proj_init": "identity"},
    "linear_plus_sparse": {"name": "linear_plus_sparse"},
    "sparge, by density": {"name": "sparge", "selection": "density"},
    "vsa": {"name": "vsa"},
    "vmoba, by density": {"name": "vmoba", "selection": "density"},
    "sla2": {"name": "sla2"},
}


@dataclass(frozen=True)
class Case:
    """One method at one setting.

    Attributes:
        label: its line.
        config: its numbers.
        default: all numbers are the method's defaults, those of its paper.
    """

    label: str
    config: AttentionConfig
    default: bool = False


def method_cases(critical: Sequence[float]) -> list[Case]:
    """Every registered method at its defaults, then those of `SWEEPS` at each fraction."""
    cases = [
        Case(name, attention_config_from_dict({"name": name}), default=True)
        for name in available_attention()
    ]
    for label, numbers in SWEEPS.items():
        for fraction in critical:
            negligible = {"negligible": min(0.1, 1 - fraction)} if numbers["name"] == "sla" else {}
            config = attention_config_from_dict({**numbers, **negligible, "critical": fraction})
            cases.append(Case(label, config))
    return cases


@dataclass(frozen=True)
class MethodError:
    """A method on one captured call, over its heads.

    Attributes:
        exact_fraction: share of the scores that it computes exactly.
        error_l1, error_l2: ||O - O_exact|| / ||O_exact||, mean over heads.
    """

    exact_fraction: float
    error_l1: float
    error_l2: float


@torch.no_grad()
def method_error(case: Case, captured: Captured, *, device: torch.device | str) -> MethodError:
    """Run a fresh method on a captured call.

    Gates of the hidden states (VSA's) start at zero, so the hidden states, which a capture does not
    hold, do not matter; zeros are given.

    Raises:
        CaptureError: not all queries, or no values, were captured.
        UnsupportedAttentionError: the method cannot work on them.
    """
    if not captured.whole or captured.value is None:
        raise CaptureError(
            f"{captured.moment.file} holds {len(captured.rows)} of {captured.key.shape[1]} queries"
            f"{'' if captured.value is not None else ' and no values'}; whole methods need all: "
            "capture with --query-blocks all"
        )
    heads, tokens, head_dim = captured.query.shape
    config, dim = case.config, heads * head_dim
    with drawing(0):
        method = build_attention(config, heads, head_dim, dim, captured.moment.layer)
    method = method.to(device).eval()
    query, key, value = (
        t.to(device).float()[None] for t in (captured.query, captured.key, captured.value)
    )
    exact = scaled_dot_product_attention(query, key, value)
    if config.tile is not None:
        order = tile_order(captured.grid, config.tile, device)
        query, key, value, exact = (t[:, :, order] for t in (query, key, value, exact))
    context = AttentionContext(
        grid=captured.grid,
        timestep=torch.tensor([captured.moment.timestep], device=device),
        hidden_states=torch.zeros(1, tokens, dim, device=device),
        tile=config.tile,
    )
    output = method(query, key, value, context)
    exact_fraction = method.exact_fraction(query, key, context)
    difference = (output.float() - exact)[0]

    def relative(order: int) -> float:
        sizes = [torch.linalg.vector_norm(t, order, dim=(1, 2)) for t in (difference, exact[0])]
        return (sizes[0] / sizes[1]).mean().item()

    return MethodError(exact_fraction, relative(1), relative(2))


__all__ = ["SWEEPS", "Case", "MethodError", "method_cases", "method_error"]
