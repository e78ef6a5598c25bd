"""The kernels compile for a Hopper GPU by Triton and ptxas, where there is none to run them on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

offline = pytest.importorskip("sla_kernels.triton.offline")
ROOT = Path(__file__).parents[2]
SHARED = 227 * 1024  # bytes that a program can have on sm_90


def compiled(*arguments: str) -> dict[str, tuple[list[int], str]]:
    """Kernel to its numbers and to what is said of its products."""
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "sla_kernels.triton.offline", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for line in done.stdout.splitlines()[1:]:
        name, *numbers = line.split()[:5]
        found[name] = ([int(number) for number in numbers], line.partition("serialised")[2])
    return found


@pytest.mark.slow
def test_kernels_fit_a_hopper_gpu_and_its_products_overlap() -> None:
    found = compiled("--fp8")
    assert {"forward", "backward_keys", "merge", "merge_backward_keys", "quantise"} <= set(found)
    for name, ((_, _, shared, _), serialised) in found.items():
        assert shared <= SHARED, name
        assert not serialised, name
    for name in ("forward", "prepare", "backward_queries", "merge", "merge_backward_keys"):
        assert found[name][0][3] > 0, f"{name} multiplies no matrices"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_fit(dtype: str) -> None:
    for name, ((_, _, shared, _), _) in compiled("--dtype", dtype, "--head-dim", "64").items():
        assert shared <= SHARED, name


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (one, *_) = offline.launches(offline.DTYPES["bfloat16"], 64, 64, 64)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is 1"):
        offline.compile_for(one, 90)


def test_nothing_is_launched_or_kept_while_launches_are_recorded() -> None:
    from sla_kernels.triton import calls

    before = dict(calls._records)
    found = offline.launches(offline.DTYPES["bfloat16"], 64, 64, 64, fp8=True)
    assert len({one.kernel for one in found}) == len(found)
    assert all(re.fullmatch(r"[a-z_]+", one.kernel.__name__) for one in found)
    assert calls._records == before
