"""No rank outlives the process that started it."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sla.training import ranks

RANK = """
import os, time
from sla.training.ranks import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
LAUNCHER = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=dict(os.environ, **{ranks}))
import time; time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def outlives(ranks: str) -> bool:
    """Whether the process that it started is there two seconds after a launcher was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.replace("{ranks}", ranks), RANK],
        stdout=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "LOCAL_RANK"},
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 3
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(pid)
    if left:
        os.kill(pid, signal.SIGKILL)
    process.stdout.close()
    return left


def test_a_rank_ends_with_its_launcher() -> None:
    assert not outlives("{'LOCAL_RANK': '1'}")
    assert outlives("{}"), "whoever starts a run in the background may leave"


@pytest.mark.parametrize(
    ("world_size", "exception", "ends"),
    [
        (2, RuntimeError("no more data"), True),
        (1, RuntimeError("no more data"), False),
        (2, KeyboardInterrupt(), False),
    ],
)
def test_a_rank_that_failed_ends_though_others_wait(
    world_size: int,
    exception: BaseException,
    ends: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(ranks, "_GRACE", 0.01)
    monkeypatch.setattr(ranks.os, "_exit", codes.append)
    trainer: Any = SimpleNamespace(world_size=world_size, global_rank=1)
    module: Any = None
    ranks.EndOnFailure().on_exception(trainer, module, exception)
    time.sleep(0.2)
    assert codes == [1] * ends
    assert ("rank 1 failed" in caplog.text and "no more data" in caplog.text) == ends
