"""AMT-S: interpolation of frames."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla_eval.backbones.registry import Backbone, Source, WeightFile, register_backbone, state_dict


class Amt(nn.Module):
    """The frame in the middle of two, all (N, 3, H, W), levels 0 to 1; H and W multiples of 16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        time = torch.full((len(before), 1, 1, 1), 0.5, device=before.device)
        return self.model(before, after, time, scale_factor=1.0, eval=True)["imgt_pred"]


@contextlib.contextmanager
def _importing_from(folder: Path, *names: str) -> Iterator[None]:
    """Imports `names` from a folder, and forgets them after: they are common words."""

    def forget() -> dict[str, Any]:
        keys = [k for k in sys.modules if k.split(".")[0] in names]
        return {key: sys.modules.pop(key) for key in keys}

    others = forget()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        forget()
        sys.modules.update(others)


def _load_amt(folder: Path, path: Path) -> nn.Module:
    with _importing_from(folder.resolve(), "networks", "utils"):
        module = importlib.import_module("networks.AMT-S")
        model = module.Model(corr_radius=3, corr_lvls=4, num_flows=3)
    model.load_state_dict(state_dict(path, "state_dict"))
    return Amt(model)


register_backbone(
    Backbone(
        "amt_s",
        "AMT-S",
        (
            Source(
                (
                    WeightFile("AMT", "a copy of GitHub MCG-NKU/AMT, whose code is run"),
                    WeightFile("amt-s.pth", "hub: lalala125/AMT"),
                ),
                {},
                _load_amt,
            ),
        ),
        why_not_random="its code is no package; a copy lies beside its weights",
    )
)
