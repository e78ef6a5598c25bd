"""One command as several processes, spread over the GPUs of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may name, one GPU each; empty without any."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def run_together(arguments: Sequence[str], processes: int, gpus: Sequence[str]) -> int:
    """Run `python -m sla ARGUMENTS` so many times at once; the i-th sees GPU i modulo their number.

    If this process is interrupted or terminated, so are they.

    Returns:
        0 if all of them ended well, else the largest exit status.
    """

    def terminated(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminated)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(processes):
            environment = dict(os.environ)
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
            command = [sys.executable, "-m", "sla", *arguments]
            started.append(subprocess.Popen(command, env=environment))
        # A process that a signal has ended has a negative status.
        return max(abs(process.wait()) for process in started)
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            process.wait()
        signal.signal(signal.SIGTERM, before)


__all__ = ["run_together", "visible_gpus"]
