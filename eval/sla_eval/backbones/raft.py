"""RAFT: optical flow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sla_eval.backbones.registry import (
    EVAL_EXTRA,
    Backbone,
    Source,
    WeightFile,
    register_backbone,
    state_dict,
)


class Raft(nn.Module):
    """Optical flow (N, 2, H, W) in pixels, x then y, from frames (N, 3, H, W), levels 0 to 255.

    H and W are multiples of 8.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        flows = self.model(before / 127.5 - 1, after / 127.5 - 1, num_flow_updates=20)
        return flows[-1]


def _raft() -> Raft:
    from torchvision.models.optical_flow import raft_large

    return Raft(raft_large(weights=None))


def _load_raft(path: Path) -> nn.Module:
    network = _raft()
    network.model.load_state_dict(state_dict(path))
    return network


def _random_raft() -> nn.Module:
    network: Any = _raft()
    # The flow stays 0. Random flow leaves the frame, and the metric stops early at a video that
    # moves: this one has all of its pairs looked at, the most work there is.
    for parameter in network.model.update_block.flow_head.conv2.parameters():
        nn.init.zeros_(parameter).requires_grad_(False)
    return network


register_backbone(
    Backbone(
        "raft",
        "RAFT trained on FlyingChairs and FlyingThings3D",
        (
            Source(
                (
                    WeightFile(
                        "raft_large_C_T_V1-22a6c225.pth",
                        "torchvision's port of raft-things.pth",
                        "22a6c225",
                    ),
                ),
                {"torchvision": EVAL_EXTRA},
                _load_raft,
            ),
        ),
        random=_random_raft,
    )
)
