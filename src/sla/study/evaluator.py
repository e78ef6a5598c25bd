"""The evaluator: a small 3D convolutional classifier of clips' attributes that we train.

It answers whether a sample shows what its prompt says, and its penultimate features give a Frechet
distance ("evaluator Frechet distance"). It is nobody's published network: its numbers compare arms
of this study with each other and with nothing else. Its accuracy on real held-out clips is the
most that an arm can be expected to reach.

Shapes: B clips, T frames, H x W pixels, F features.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sla.data.module import DataConfig, VideoDataModule
from sla.data.video import to_tensor
from sla.files import atomic_path
from sla.seeds import drawing
from sla.study.labels import classes_of, read_labels
from sla.study.plan import EvaluatorConfig, StudyError
from sla.study.stills import Stills
from sla.training.build import resolve_precision
from sla.training.config import TrainerConfig

log = logging.getLogger(__name__)

FORMAT = "sla-study-evaluator"
_HEADER = "sla"
_REFERENCE = "reference_features"


class _Stage(nn.Module):
    """Halves time and space, then a residual convolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.down = nn.Conv3d(channels, out, 3, stride=2, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(min(8, out), out) for _ in range(2))
        self.mix = nn.Conv3d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norms[0](self.down(x)))
        return F.gelu(self.norms[1](x + self.mix(x)))


class Evaluator(nn.Module):
    """Video to features and to one classification an attribute.

    All attributes shape the features. Those of `config.stills` are told by a second network.

    Args:
        config: its sizes.
        classes: {attribute: its values}.
    """

    def __init__(self, config: EvaluatorConfig, classes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.config = config
        self.classes = {name: list(values) for name, values in classes.items()}
        width = 8 * -(-config.width // 8)  # of groups of 8
        self.stem = nn.Conv3d(3, width // 2, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2))
        widths = [width // 2, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(_Stage(a, b) for a, b in itertools.pairwise(widths))
        # Means say what there is, maxima what there is somewhere, however small.
        self.features = nn.Linear(2 * widths[-1], config.features)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.features, len(v)) for name, v in self.classes.items()}
        )
        of_stills = {name: v for name, v in self.classes.items() if name in config.stills}
        self.stills = Stills(config, of_stills) if of_stills else None

    def forward(self, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, T, H, W) in [-1, 1] to features (B, F) and {attribute: logits (B, classes)}."""
        features, logits = self.of_motion(video)
        if self.stills is not None:
            for name, of_frames in self.stills(video).items():
                logits[name] = of_frames.float().log_softmax(-1).mean(1)
        return features, logits

    def of_motion(self, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `forward`, of the whole clip alone."""
        x = F.gelu(self.stem(video))
        for stage in self.stages:
            x = stage(x)
        pooled = torch.cat((x.mean((2, 3, 4)), x.amax((2, 3, 4))), dim=1)
        features = F.gelu(self.features(pooled))
        return features, {name: head(features) for name, head in self.heads.items()}

    def targets(self, labels: Sequence[Mapping[str, str | None]]) -> dict[str, Tensor]:
        """{attribute: int64 (B,)}; -1 where a clip has no value, or one that is not known."""
        return {
            name: torch.tensor(
                [values.index(v) if (v := of.get(name)) in values else -1 for of in labels]
            )
            for name, values in self.classes.items()
        }


@dataclass(frozen=True)
class Findings:
    """What the evaluator finds in videos.

    Attributes:
        features: float32 (videos, F).
        correct: {attribute: float32 (videos,), 1 where it finds the value that was asked for}.
    """

    features: NDArray[np.float32]
    correct: dict[str, NDArray[np.float32]]


@torch.no_grad()
def find(
    evaluator: Evaluator,
    videos: NDArray[np.uint8],
    wanted: Sequence[Mapping[str, str | None]],
    device: torch.device,
    batch_size: int = 32,
) -> Findings:
    """Run the evaluator on videos, in float32.

    Args:
        evaluator: moved to the device.
        videos: uint8 (videos, T, H, W, 3).
        wanted: attributes of each.
    """
    evaluator = evaluator.to(device).eval()
    features: list[Tensor] = []
    correct: dict[str, list[Tensor]] = {name: [] for name in evaluator.classes}
    for start in range(0, len(videos), batch_size):
        part = videos[start : start + batch_size]
        inputs = torch.stack([to_tensor(video) for video in part]).to(device)
        found, logits = evaluator(inputs)
        features.append(found.float().cpu())
        targets = evaluator.targets(wanted[start : start + batch_size])
        for name in correct:
            right = logits[name].argmax(1).cpu() == targets[name]
            correct[name].append(right.float())
    return Findings(
        torch.cat(features).numpy(),
        {name: torch.cat(parts).numpy() for name, parts in correct.items()},
    )


class _EvaluatorModule(pl.LightningModule):
    """Cross-entropy of every attribute, each of equal weight."""

    def __init__(
        self, evaluator: Evaluator, labels: Mapping[str, Mapping[str, str | None]]
    ) -> None:
        super().__init__()
        self.evaluator = evaluator
        self.labels = labels
        self._nothing = dict.fromkeys(evaluator.classes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        of_clips = [self.labels.get(clip, self._nothing) for clip in batch["clip_id"]]
        targets = self.evaluator.targets(of_clips)
        _, logits = self.evaluator.of_motion(batch["video"])
        losses = [_loss(logits[name], target) for name, target in targets.items()]
        if self.evaluator.stills is not None:
            for name, of_frames in self.evaluator.stills(batch["video"]).items():
                target = targets[name].repeat_interleave(of_frames.shape[1])
                losses.append(_loss(of_frames.flatten(0, 1), target, smoothing=0.1))
        loss = torch.stack(losses).mean()
        if self.global_step % 100 == 0:
            log.info(f"evaluator, step {self.global_step}: loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> Any:
        config = self.evaluator.config
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=config.steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _loss(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy; real clips among the simulated ones have no attributes."""
    total = F.cross_entropy(
        logits.float(),
        target.to(logits.device),
        ignore_index=-1,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return total / max(1, int((target >= 0).sum()))


@dataclass(frozen=True)
class Trained:
    """What `train_evaluator` made.

    Attributes:
        path: the safetensors file.
        accuracy: {attribute: float32 (clips,), 1 where right} on the real held-out clips.
    """

    path: Path
    accuracy: dict[str, NDArray[np.float32]]


def train_evaluator(
    config: EvaluatorConfig,
    data: DataConfig,
    test_shards: Sequence[str],
    hardware: TrainerConfig,
) -> Trained:
    """Train on the clips of `data.shards`, test on those of `test_shards`, write the file.

    The features of the test clips are stored in it: the reference of the Frechet distance.

    Args:
        config: sizes and training; `weights` is the file to write.
        data: how clips are cut; of shards whose JSON has the attributes.
        test_shards: held-out clips.
        hardware: accelerator, devices and precision.

    Raises:
        StudyError: no file is named, or an attribute of which the clips have fewer than two values.
        DataError: clips cannot be read.
    """
    if not config.weights:
        raise StudyError("evaluator.weights is empty; name the file to write")
    labels = read_labels(data.shards, config.attributes)
    classes = classes_of(labels)
    for name in config.attributes:
        if len(classes.get(name, [])) < 2:
            raise StudyError(
                f"evaluator.attributes: {name!r} has the values {classes.get(name, [])} in "
                f"{data.shards}; there is nothing to tell apart"
            )
    with drawing(config.seed):
        evaluator = Evaluator(config, classes)
    stream = replace(
        data, batch_size=config.batch_size, seed=config.seed, val_shards=list(test_shards)
    )
    module = _EvaluatorModule(evaluator, labels)
    trainer = pl.Trainer(
        accelerator=hardware.accelerator,
        devices=1,
        precision=resolve_precision(hardware),
        max_steps=config.steps,
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    device = trainer.strategy.root_device
    with drawing(config.seed):  # what is done to still frames
        trainer.fit(module, datamodule=VideoDataModule(stream))
    found = _on_real_clips(evaluator, stream, device)
    _save(evaluator.cpu(), Path(config.weights), found)
    return Trained(Path(config.weights), found.correct)


def _on_real_clips(evaluator: Evaluator, data: DataConfig, device: torch.device) -> Findings:
    labels = read_labels(data.val_shards, list(evaluator.classes))
    parts: list[Findings] = []
    loader: Any = VideoDataModule(replace(data, val_clips=0)).val_dataloader()
    for batch in loader:
        read = [i for i, weight in enumerate(batch["weight"].tolist()) if weight]
        if not read:
            continue
        frames = ((batch["video"][read] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        videos = frames.permute(0, 2, 3, 4, 1).contiguous().numpy()
        wanted = [labels[batch["clip_id"][i]] for i in read]
        parts.append(find(evaluator, videos, wanted, device))
    return Findings(
        np.concatenate([part.features for part in parts]),
        {name: np.concatenate([p.correct[name] for p in parts]) for name in evaluator.classes},
    )


def _save(evaluator: Evaluator, path: Path, found: Findings) -> None:
    header = {
        "format": FORMAT,
        "config": asdict(evaluator.config),
        "classes": evaluator.classes,
        "accuracy": {name: float(values.mean()) for name, values in found.correct.items()},
        "test_clips": len(found.features),
    }
    tensors = {name: t.detach().contiguous() for name, t in evaluator.state_dict().items()}
    tensors[_REFERENCE] = torch.from_numpy(found.features)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})


def load_evaluator(path: Path) -> tuple[Evaluator, Tensor]:
    """The trained network, and the features (clips, F) of the real held-out clips.

    Raises:
        StudyError: no such file, or not such a file.
    """
    if not path.is_file():
        raise StudyError(
            f"evaluator.weights is {str(path)!r}, which is no file: `make study-weights`, or train "
            "it with `make study-evaluator`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}")
        reference = tensors.pop(_REFERENCE)
        evaluator = Evaluator(EvaluatorConfig(**header["config"]), header["classes"])
        evaluator.load_state_dict(tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise StudyError(f"{path} is not an evaluator of this study: {error}") from error
    return evaluator.eval(), reference
