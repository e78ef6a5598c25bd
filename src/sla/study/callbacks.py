"""What a run of the study does in training: measure at the steps of its curve, keep time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from sla.training.module import DiffusionModule


class OutOfTimeError(Exception):
    """The session's time is over; the run has a checkpoint of its last step."""


class Curve(Callback):
    """Measures at given steps, times the steps between, and stops when time is over.

    Args:
        steps: optimiser steps after which `measure` is called, with the module and the step.
        measure: see there.
        deadline: of `time.monotonic`, after which no further step begins; None for none.
        checkpoint: file that a run stopped by the deadline leaves.
        window: steps that are timed together; the first window of a run warms up and does not
            count.

    Attributes:
        step_seconds: mean seconds a step of each window, the wait for data in it.
    """

    def __init__(
        self,
        steps: Collection[int],
        measure: Callable[[DiffusionModule, int], None],
        deadline: float | None,
        checkpoint: Path,
        window: int,
    ) -> None:
        self.steps = frozenset(steps)
        self.measure = measure
        self.deadline = deadline
        self.checkpoint = checkpoint
        self.window = window
        self.step_seconds: list[float] = []
        self._warm = False
        self._begun = 0.0
        self._count = 0

    @property
    def step_ms(self) -> float | None:
        """Median milliseconds a step, or None for a run too short to tell."""
        return 1e3 * float(np.median(self.step_seconds)) if self.step_seconds else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._warm = False
        self._restart()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, DiffusionModule)
        step = trainer.global_step
        self._count += 1
        if self._count == self.window:
            _wait(pl_module)
            if self._warm:
                self.step_seconds.append((time.perf_counter() - self._begun) / self.window)
            self._warm = True
            self._restart()
        if step in self.steps:
            self.measure(pl_module, step)
            self._restart()
        if (
            self.deadline is not None
            and time.monotonic() > self.deadline
            and step < trainer.max_steps
        ):
            trainer.save_checkpoint(self.checkpoint)
            raise OutOfTimeError

    def _restart(self) -> None:
        self._count = 0
        self._begun = time.perf_counter()


class KernelTime(Callback):
    """Sums the time of all kernels of some steps: what a step takes of the GPU, whatever the host
    takes to launch it. Kernels of other processes must not run meanwhile. Nothing on a CPU.

    Args:
        first: number of the first step that is watched, from 0; it has compiled before.
        steps: how many are watched.

    Attributes:
        step_ms: mean milliseconds of kernels and copies a step; None before, and on a CPU.
    """

    def __init__(self, first: int, steps: int) -> None:
        self.first = first
        self.steps = steps
        self.step_ms: float | None = None
        self._profile: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        starts = batch_idx == self.first * trainer.accumulate_grad_batches
        if starts and pl_module.device.type == "cuda":
            _wait(pl_module)
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
            )
            self._profile.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        done = (batch_idx + 1) // trainer.accumulate_grad_batches
        if self._profile is None or done < self.first + self.steps:
            return
        _wait(pl_module)
        self._profile.stop()
        microseconds = sum(
            event.time_range.elapsed_us()
            for event in self._profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        self.step_ms = microseconds / 1e3 / self.steps
        self._profile = None


def _wait(module: pl.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
