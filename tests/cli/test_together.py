"""Several processes of one command."""

import subprocess
from collections.abc import Sequence
from typing import ClassVar

import pytest

from sla.cli import together
from sla.cli.main import _without


class Process:
    """One that ends with a status, and remembers what it was started with."""

    made: ClassVar[list["Process"]] = []
    statuses: ClassVar[Sequence[int]] = ()

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.command, self.gpu = command[1:], env.get("CUDA_VISIBLE_DEVICES")
        self.status = self.statuses[len(self.made)]
        self.ended = False
        self.made.append(self)

    def wait(self) -> int:
        if self.status == 99 and not self.ended:
            raise KeyboardInterrupt
        return self.status

    def poll(self) -> int | None:
        return None if self.status == 99 and not self.ended else self.status

    def terminate(self) -> None:
        self.ended = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    monkeypatch.setattr(Process, "made", [])
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Process.made


def test_processes_are_spread_over_the_gpus(
    started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "statuses", [0, 0, 0])
    assert together.run_together(["study", "--untimed"], 3, ["2", "5"]) == 0
    assert [process.gpu for process in started] == ["2", "5", "2"]
    assert started[0].command == ["-m", "sla", "study", "--untimed"]


def test_the_status_is_that_of_the_worst(
    started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "statuses", [0, -9, 1])
    assert together.run_together(["study"], 3, []) == 9
    assert [process.gpu for process in started] == [None] * 3


def test_an_interruption_ends_them_all(
    started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "statuses", [99, 99])
    with pytest.raises(KeyboardInterrupt):
        together.run_together(["study"], 2, [])
    assert all(process.ended for process in started)


def test_gpus_are_those_that_the_environment_leaves() -> None:
    for given, gpus in (("", []), ("-1", []), ("3, 1", ["3", "1"])):
        assert together.visible_gpus({"CUDA_VISIBLE_DEVICES": given}) == gpus


@pytest.mark.parametrize(
    "given", [["--processes", "3"], ["--processes=3"], ["--pro", "3"], ["--process=3"]]
)
def test_an_option_is_taken_out_of_a_call(given: list[str]) -> None:
    call = ["study", "--untimed", "trainer.max_steps=3"]
    assert _without("--processes", [*call[:2], *given, *call[2:]]) == call
    assert _without("--processes", call) == call
