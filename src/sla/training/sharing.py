"""Sequence parallelism of a run: which ranks share a sample, and which statistics are theirs."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist

from sla.models.diffusers_model import DiffusersVideoModel
from sla.models.sequence_parallel import enable_sequence_parallel, sequence_parallel_group
from sla.models.video_model import VideoModel
from sla.training.run_folder import RunError


def check_can_share(model: VideoModel, name: str, degree: int) -> None:
    """Refuse a model whose tokens cannot be shared by ranks.

    Args:
        name: the model's family.
        degree: `trainer.sequence_parallel`.

    Raises:
        RunError: names both.
    """
    if degree > 1 and not isinstance(model, DiffusersVideoModel):
        raise RunError(
            f"trainer.sequence_parallel is {degree}, but ranks cannot share the tokens of "
            f"model.name={name}, only those of wan: set trainer.sequence_parallel=1 "
            "(trainer.strategy=ddp or fsdp2 uses all ranks)"
        )


def share_tokens(model: VideoModel, degree: int) -> None:
    """Let neighbouring ranks share each sample, unless they do already.

    Raises:
        UnsupportedAttentionError: the model's heads or its method cannot be shared so.
    """
    assert isinstance(model, DiffusersVideoModel)  # `check_can_share`
    group = _group(degree)
    if sequence_parallel_group(model.transformer) is not group:
        enable_sequence_parallel(model.transformer, group)


@cache
def _group(degree: int) -> dist.ProcessGroup:
    """This rank's group: made once, as attention is swapped and every Trainer sets up anew."""
    if degree == dist.get_world_size():
        own = dist.group.WORLD
    else:
        own = dist.new_subgroups(degree)[0]
    assert own is not None
    return own


def mean_over_group(values: list[float], degree: int, device: torch.device) -> list[float]:
    """The values' means over the ranks that share a sample: over all heads, as each has some."""
    if degree == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=_group(degree))
    mean: list[float] = (total / degree).tolist()
    return mean
