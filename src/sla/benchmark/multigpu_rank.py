"""What the multi-GPU benchmark starts, as a user starts a run: `python -m sla finetune` with a
callback that watches, and one video's inference shared by torchrun's ranks.

Lightning starts the other ranks of the first with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sla.attention import SLAConfig
from sla.benchmark import e2e
from sla.benchmark.kernels import SEED
from sla.cli.quiet import quiet_lightning
from sla.config import load_experiment, to_dict
from sla.models.fusion import compile_blocks, fuse_feed_forward
from sla.models.injection import apply_attention
from sla.models.sequence_parallel import enable_sequence_parallel
from sla.models.wan import build_wan
from sla.training import run

GO = "go"  # the file that is waited for
_DEADLINE = timedelta(minutes=5)  # of a collective


def main(arguments: Sequence[str] | None = None) -> int:
    """Be one rank; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sla.benchmark.multigpu_rank")
    tasks = parser.add_subparsers(required=True)
    train = tasks.add_parser("train")
    train.add_argument("--config", type=Path, required=True)
    train.add_argument("--folder", type=Path, required=True, help="of what is written down")
    train.add_argument("--stop-after", type=int, help="optimiser steps of this launch")
    train.add_argument("overrides", nargs="*")
    train.set_defaults(run=_train)
    inference = tasks.add_parser("inference")
    inference.add_argument("--folder", type=Path, required=True)
    inference.add_argument("--size", required=True)
    inference.add_argument("--device", required=True)
    inference.add_argument("--blocks", type=int, nargs=2, required=True)
    inference.add_argument("--modes", nargs="+", required=True)
    inference.add_argument("--generation-steps", type=int, required=True)
    inference.add_argument("--repeats", type=int, required=True)
    inference.set_defaults(run=_infer)
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


# Training


def _train(options: argparse.Namespace) -> None:
    quiet_lightning()
    experiment = load_experiment(options.config, options.overrides)
    watch = StepLog(options.folder, options.stop_after)
    run.finetune(experiment, to_dict(experiment), [watch])


class StepLog(Callback):
    """Writes down each rank's optimiser steps, in `rank-R.jsonl`; ends the run after some.

    A run that is ended so is one that was interrupted: nothing is exported or evaluated.

    Args:
        folder: exists. Training begins when there is a file `go` in it, so that a launch can start
            while another is measured.
        stop_after: steps; None for no end.
    """

    def __init__(self, folder: Path, stop_after: int | None) -> None:
        self.folder = folder
        self.stop_after = stop_after
        self._losses: list[tuple[Tensor, Tensor]] = []  # sample indices and their losses
        self._step = self._first = 0
        self._last = 0.0  # when the step before was over
        self._saving = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._write(trainer, ready=time.time(), pid=os.getpid())
        while not (self.folder / GO).exists():
            time.sleep(0.02)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._first = trainer.global_step
        self._write(trainer, started=time.time(), at=self._first)
        self._last = time.perf_counter()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saving = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._saving:  # since the last step
            now = time.perf_counter()
            self._write(trainer, saved=self._step, seconds=now - self._last)
            self._saving, self._last = False, now

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._losses.append((batch["sample_index"], outputs["losses"]))
        if trainer.global_step == self._step:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._step = trainer.global_step
        losses = {
            int(index): float(loss)
            for indices, values in self._losses
            for index, loss in zip(indices, values, strict=True)
        }
        self._write(
            trainer,
            step=self._step,
            seconds=now - self._last,
            losses=losses,
            peak_bytes=_peak_bytes(),
        )
        self._losses = []
        self._last = now
        if self.stop_after is not None and self._step - self._first >= self.stop_after:
            self._write(trainer, ended=self._step)
            raise SystemExit(0)

    def _write(self, trainer: pl.Trainer, **line: Any) -> None:
        _append(self.folder, trainer.global_rank, line)


def _append(folder: Path, rank: int, line: dict[str, Any]) -> None:
    with (folder / f"rank-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _peak_bytes() -> int:
    """Of the GPU's memory, or of this process's where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Inference


def _infer(options: argparse.Namespace) -> None:
    """Rank 0 writes a line a mode and task, on one rank and on all."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    on_gpu = options.device == "cuda"
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_DEADLINE)
    ranks = dist.get_world_size()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    inputs = e2e.make_inputs(options.size, device, dtype)
    for mode in options.modes:
        alone: dict[str, tuple[Tensor, dict[str, float]]] = {}
        for shared in (False, True):
            # Ranks that work alone do so at the same time, each on its own.
            model = build_wan(options.size, dtype, device, seed=SEED)
            apply_attention(model, SLAConfig(block_q=options.blocks[0], block_kv=options.blocks[1]))
            fuse_feed_forward(model)
            if shared:
                enable_sequence_parallel(model, ranks)
            if mode == "compiled":
                compile_blocks(model.blocks)
            for what in ("step", "generation"):
                # Else sizes that differ from an earlier call's become variable, and kernels slower.
                torch._dynamo.reset()
                call = e2e.make_step(
                    model,
                    partial(e2e.forward, model),
                    inputs,
                    what,
                    options,
                    steps=options.generation_steps,
                )
                output, found = _timed(call, 1 if what == "generation" else options.repeats, on_gpu)
                if not shared:
                    alone[what] = (output, found)
                    continue
                expected, times = alone[what]
                difference = (output.float() - expected.float()).norm() / expected.float().norm()
                row = {"what": what, "mode": mode, "ranks": ranks, **found}
                row |= {f"{name}_alone": value for name, value in times.items()}
                row["difference"] = float(difference)
                if rank == 0:
                    _append(options.folder, rank, row)
            del model
            torch._dynamo.reset()
            if on_gpu:
                torch.cuda.empty_cache()
    dist.barrier()  # whoever leaves first would take the others' connections along
    _append(options.folder, rank, {"ended": True})
    dist.destroy_process_group()


def _timed(call: Callable[[], object], repeats: int, on_gpu: bool) -> tuple[Tensor, dict[str, Any]]:
    """A fixed number of repeats, as every rank must take part in each, after one that warms up."""
    output = call()
    assert isinstance(output, Tensor)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return output, {"ms_median": statistics.median(times), "peak_bytes": _peak_bytes()}


__all__ = ["GO", "StepLog", "main"]

if __name__ == "__main__":
    sys.exit(main())
