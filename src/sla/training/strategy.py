"""How a run is spread over processes: `trainer.strategy` and `trainer.sequence_parallel`.

`auto`, `ddp` and Lightning's other words go to Lightning as they are. `fsdp2` is Lightning's
`ModelParallelStrategy` with torch's `fully_shard`: weights, gradients, optimiser states and the
moving average lie in equal parts on all ranks, and layers are put together when they are needed.

What is gathered together, and in which dtype (`shard_module`): trained weights are float32 shards,
for the optimiser's small steps. For computing in bf16 the parts of a block that hold linear layers
are gathered in bf16, one collective each, as autocast would cast them; gathered in float32,
autocast's copies would stay until the backward and undo the sharding. What is left of a block are
tables and norms, which Wan wants in float32 (`_keep_in_fp32_modules`): they are gathered as they
are, and so is what lies around the blocks. An attention method's own parameters are a group of
their own in float32: a mixing ratio computes in it, and whoever observes a method reads them
(`whole_methods`). All of these are sharded and reduced like the rest: replicated parameters would
need a reduction of our own.

Checkpoints are folders of torch.distributed.checkpoint with Lightning's `meta.pt`. Any number of
ranks reads them, and `consolidate` makes the one file that every other strategy reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sla.training.config import TrainerConfig
from sla.training.module import DiffusionModule
from sla.training.run_folder import RunError, previous_checkpoint

FSDP2 = "fsdp2"
_META = "meta.pt"  # Lightning's name for what is not sharded
_WHOLE = StateDictOptions(full_state_dict=True)


def build_strategy(config: TrainerConfig) -> str | Strategy:
    """What to give to Lightning's Trainer."""
    return ShardedStrategy() if config.strategy == FSDP2 else config.strategy


def check_ranks(config: TrainerConfig, ranks: int) -> None:
    """Refuse ranks that cannot be put into groups of `trainer.sequence_parallel`.

    Raises:
        RunError: names both.
    """
    if ranks % config.sequence_parallel:
        raise RunError(
            f"trainer.sequence_parallel is {config.sequence_parallel}, which does not divide the "
            f"{ranks} rank(s) of trainer.devices={config.devices} on "
            f"trainer.num_nodes={config.num_nodes}: choose a divisor, or another number of devices"
        )


class ShardedDiffusionModule(DiffusionModule):
    """A `DiffusionModule` that is sharded over the ranks of the first Trainer that it is given to.

    From then on its forward is a collective, and another attention cannot be swapped in.
    """

    _gathered_in: torch.dtype | None = None

    @property
    def gathered_in(self) -> torch.dtype | None:
        return self._gathered_in

    @property
    def collective(self) -> bool:
        return True

    def configure_model(self) -> None:
        """Called by each Trainer, before optimisers are made."""
        self.shard(self.trainer)

    def shard(self, trainer: pl.Trainer) -> None:
        """Shard what is not yet, as a Trainer would; there must be processes already."""
        # Not the strategy's mesh, which a Trainer that has not run does not have.
        mesh = init_device_mesh(trainer.strategy.root_device.type, (dist.get_world_size(),))
        self._gathered_in = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
        shard_module(self, mesh, self._gathered_in)

    def on_fit_end(self) -> None:
        """The teacher's shards stay where they are."""


def is_sharded(module: DiffusionModule) -> bool:
    """Whether the weights are parts of what `shard_module` has cut up."""
    return isinstance(module.model, FSDPModule)


def shard_module(module: DiffusionModule, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Shard a module's networks, and its teacher, over a mesh of one dimension, in place.

    Nothing happens to a network that is sharded already. See the head of this file.

    Args:
        module: with its weights, attention, LoRA and sequence parallelism; blocks may be compiled.
            Trained weights of different dtypes (Wan with `model.dtype=bfloat16`) become float32.
        dtype: in which linear layers compute and are gathered; None for that of the weights.
    """
    networks: list[Any] = [module.model, *module.teachers]
    for model in networks:
        if isinstance(model, FSDPModule):
            continue
        # A group's gradients are reduced in one buffer, which has one dtype.
        trained = [p for p in model.parameters() if p.requires_grad]
        if len({p.dtype for p in trained}) > 1:
            for parameter in trained:
                parameter.data = parameter.data.float()
        for block in model.repeated_blocks():
            _shard_block(block, set(model.attention_modules()), mesh, dtype)
        _shard(model, mesh)
    if isinstance(module.text_encoder, nn.Module) and not isinstance(
        module.text_encoder, FSDPModule
    ):
        _shard(module.text_encoder, mesh)


def _shard_block(
    block: nn.Module, methods: set[Any], mesh: DeviceMesh, dtype: torch.dtype | None
) -> None:
    for part in block.modules():
        if part in methods and next(part.parameters(), None) is not None:
            _shard(part, mesh)
    for part in block.children():
        if any(isinstance(layer, nn.Linear) for layer in part.modules()):
            _shard(part, mesh, dtype)
    _shard(block, mesh)


def _shard(part: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    if isinstance(part, FSDPModule):
        return
    # Inputs are cast by autocast, layer by layer: angles and modulation stay in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )
    # Always resharded: outside of a forward every parameter is its shard, for averages and state.
    fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@contextmanager
def whole_methods(module: DiffusionModule) -> Iterator[None]:
    """Keep the attention methods' parameters whole after their forward, for hooks that read them.

    (FSDP's own hook on a method, which takes them apart, runs before hooks that were added later.)
    """
    methods = [part for part in module.model.attention_modules() if isinstance(part, FSDPModule)]
    for method in methods:
        method.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for method in methods:
            method.set_reshard_after_forward(True, recurse=False)
            method.reshard()


def whole_state(module: DiffusionModule) -> dict[str, Tensor]:
    """The state dict of a sharded module put together, on the CPU of rank 0; empty elsewhere.

    A collective.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    return state


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all ranks, with checkpoints that are replaced whole.

    A checkpoint may hold a moving average (`ShardedAverage`): its `state_dict`, with the weights
    themselves in `current_model_state`, as in Lightning's for one process. It may also be one of
    those: a single file, whatever strategy wrote it.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a folder beside, then put it in place of the last one. A collective."""
        path = Path(self.broadcast(filepath))
        part = path.with_name(f"{path.name}.part")
        if self.is_global_zero:
            _remove(part)
        self.barrier()
        sharded: dict[str, Any] = {
            name: checkpoint.pop(name)
            for name in ("state_dict", "current_model_state")
            if name in checkpoint
        }
        for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
            sharded[f"optimizer_{number}"] = state
        dcp.save(sharded, checkpoint_id=part)
        if self.is_global_zero:
            torch.save(checkpoint, part / _META)
            _replace(part, path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Fill the model and the optimisers; returns the rest, with the average. A collective."""
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if path.is_file():
            return self._load_file(path)
        weights = {"state_dict": _copies(self.model)}
        if "current_model_state" in _stored_sections(path):
            weights["current_model_state"] = _copies(self.model)
        dcp.load(weights, checkpoint_id=path)
        for number, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{number}"
            state: dict[str, Any] = {name: get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(self.model, optimizer, state[name])
        set_model_state_dict(self.model, weights.get("current_model_state", weights["state_dict"]))
        rest: dict[str, Any] = _meta(path)
        return {**rest, **weights}

    def _load_file(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        checkpoint: dict[str, Any] = torch.load(
            path, map_location="cpu", mmap=True, weights_only=False
        )
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # Numbers of parameters are counted through the groups, which Lightning's own loading
            # does not know.
            named = _named(state, _parameter_names(self.model, optimizer))
            set_optimizer_state_dict(self.model, optimizer, named, options=_WHOLE)
        weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
        set_model_state_dict(self.model, weights, options=_WHOLE)
        return checkpoint


class _Average(AveragedModel):
    """torch's average of a module, which does not wait for the GPU that it is on.

    Args:
        decay: of the moving average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        if self._pairs is None:  # finding them takes as long as averaging them
            self._pairs = [*self.module.parameters()], [*model.parameters()]
        averages, weights = self._pairs
        # The count is on the CPU: torch's own update reads it back, or copies it, in every step.
        if self.n_averaged == 0:
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(weight)
        else:
            assert self.multi_avg_fn is not None
            self.multi_avg_fn(averages, weights, self.n_averaged)
        # An average of parameters alone has no buffers.
        for own, other in zip(self.module.buffers(), model.buffers(), strict=False):
            own.copy_(other)
        self.n_averaged += 1


class MovingAverage(WeightAveraging):
    """Lightning's exponential moving average of the weights, beside them on their device.

    Lightning's own `EMAWeightAveraging` copies the module before it is moved to its GPU and leaves
    the average on the CPU, where every step then fetches all weights; and it takes them one by one.

    Args:
        decay: of the average per step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    @property
    def state_key(self) -> str:
        """As of Lightning's own: one goes on from the other's checkpoint."""
        return EMAWeightAveraging.__qualname__

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._average_model = _Average(pl_module, self.decay)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The module is on its device now."""
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)


class ShardedAverage(MovingAverage):
    """The moving average of a sharded module's weights, each rank's of its own shards.

    Lightning's own copies the module, which FSDP2 does not allow, before it is sharded.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The module is not sharded yet."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._average_model = _Average(nn.ParameterList(pl_module.parameters()), self.decay)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert self._average_model is not None
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        averages = {name: average.detach() for name, average in self._averages(pl_module)}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **averages}
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged.cpu()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is None:
            return
        state = checkpoint.get("averaging_state")
        if state is not None:
            self._average_model.n_averaged.copy_(state["n_averaged"])
        with torch.no_grad():
            for name, average in self._averages(pl_module):
                value = checkpoint["state_dict"][name]
                if not isinstance(value, DTensor):  # of a file: all ranks have it whole
                    device = average.device
                    value = distribute_tensor(
                        value.to(device),
                        average.device_mesh,
                        average.placements,
                        src_data_rank=None,
                    )
                average.copy_(value)

    def _averages(self, pl_module: pl.LightningModule) -> Iterator[tuple[str, Any]]:
        assert self._average_model is not None
        names = (name for name, _ in pl_module.named_parameters())
        return zip(names, self._average_model.module.parameters(), strict=True)


# Checkpoint folders


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a path is a folder that `ShardedStrategy` has written."""
    return path.is_dir() and (path / _META).is_file()


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of the weights in a sharded checkpoint.

    Raises:
        RunError: the folder is not one, or is damaged.
    """
    prefix = "state_dict."
    return {
        name.removeprefix(prefix): tuple(entry.size)
        for name, entry in _metadata(path).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def stored_step(path: Path) -> int:
    """Optimiser steps of a sharded checkpoint."""
    return int(_meta(path)["global_step"])


def load_weights(path: Path, module: nn.Module) -> None:
    """Fill a module that is not sharded from a sharded checkpoint: the average, where there is one.

    No collective.
    """
    state = {"state_dict": module.state_dict()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    module.load_state_dict(state["state_dict"])


def consolidate(path: Path, out: Path) -> None:
    """Write a sharded checkpoint as the one file that every strategy goes on from.

    Needs memory for all of it, and while it works twice its size on the disk.

    Raises:
        RunError: the folder is not one, or is damaged.
        OSError: the file cannot be written.
    """
    _metadata(path)  # or an error that says what is wrong
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = [out.with_name(f"{out.name}.part{number}") for number in (0, 1)]
    try:
        dcp_to_torch_save(path, parts[0])
        whole = torch.load(parts[0], map_location="cpu", mmap=True, weights_only=False)
        numbers = sorted(int(name.split("_")[1]) for name in whole if name.startswith("optimizer_"))
        optimizers = [_numbered(whole.pop(f"optimizer_{number}")) for number in numbers]
        torch.save({**_meta(path), **whole, "optimizer_states": optimizers}, parts[1])
        parts[1].replace(out)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _replace(part: Path, path: Path) -> None:
    # A crash in here is mended by `run_folder.has_checkpoint`.
    previous = previous_checkpoint(path)
    _remove(previous)
    if path.exists():
        path.rename(previous)
    part.rename(path)
    _remove(previous)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _metadata(path: Path) -> Any:
    if not is_sharded_checkpoint(path):
        raise RunError(f"{path} is not a sharded checkpoint: no folder with a {_META}")
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise RunError(f"{path} is not a readable checkpoint: {error}") from error


def _meta(path: Path) -> dict[str, Any]:
    # Our own: it holds random states, which weights_only refuses.
    meta: dict[str, Any] = torch.load(path / _META, map_location="cpu", weights_only=False)
    return meta


def _stored_sections(path: Path) -> set[str]:
    return {name.split(".", 1)[0] for name in _metadata(path).state_dict_metadata}


def _copies(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = get_model_state_dict(model)
    return {name: value.clone() for name, value in state.items()}


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of an optimiser's parameters, in the order in which its state numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _named(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimiser's state by the names of the parameters, as torch's sharded states are."""
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `_named`."""
    groups = state["param_groups"]
    numbers = {
        name: number
        for number, name in enumerate(name for group in groups for name in group["params"])
    }
    return {
        "state": {numbers[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in groups
        ],
    }


__all__ = [
    "FSDP2",
    "MovingAverage",
    "ShardedAverage",
    "ShardedDiffusionModule",
    "ShardedStrategy",
    "build_strategy",
    "check_ranks",
    "consolidate",
    "is_sharded",
    "is_sharded_checkpoint",
    "load_weights",
    "shard_module",
    "stored_shapes",
    "stored_step",
    "whole_methods",
    "whole_state",
]
