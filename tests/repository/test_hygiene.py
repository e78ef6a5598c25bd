"""What must not be in the repository."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Weights that are kept here: of `make finetune`, and of the study of clips and of images, in parts.
# Runs of the study compare only with runs of the same weights.
LARGE = {
    "assets/demo/model.safetensors": 8 * 2**20,
    **{f"assets/study/model.safetensors.{i:02d}": 15 * 2**20 for i in range(3)},
    "assets/study/evaluator.safetensors.00": 11 * 2**20,
    **{f"assets/study/images/model.safetensors.{i:02d}": 15 * 2**20 for i in range(4)},
    "assets/study/images/image_evaluator.safetensors.00": 11 * 2**20,
}
# A folder of one machine at the start of a path; `runs/home/x` and `https://host/home/x` are none.
MACHINE_PATH = re.compile(r"(?<![\w./:~}-])/(?:home|root|work|tmp|mnt|scratch|Users)/\w[^\s'\"]*")


def tracked() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_large_files() -> None:
    for name in tracked():
        assert (ROOT / name).stat().st_size <= LARGE.get(name, 2**20), name


def test_no_caches_logs_or_environments() -> None:
    for name in tracked():
        assert not name.endswith((".pyc", ".log", ".ckpt")), name
        assert not name.startswith((".venv/", "runs/", "data/")), name


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for name in tracked():
        data = (ROOT / name).read_bytes()
        if b"\0" not in data:  # text
            lines = data.decode("utf-8").splitlines()
            found += [
                f"{name}:{number}: {match[0]}"
                for number, line in enumerate(lines, 1)
                for match in MACHINE_PATH.finditer(line)
            ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("root: '/{}/someone/clips'", True),
        ("path=/{}/x", True),
        ("see /{}/a/b.py", True),
        ("runs/{}/x", False),
        ("https://host/{}/x", False),
        ("the folder /{}", False),
    ],
)
@pytest.mark.parametrize("folder", ["home", "root", "work", "tmp", "mnt"])
def test_a_machine_path_is_recognised(text: str, folder: str, is_found: bool) -> None:
    assert bool(MACHINE_PATH.search(text.format(folder))) is is_found


def test_notebooks_hold_no_outputs() -> None:
    for name in tracked():
        if name.endswith(".ipynb"):
            for cell in json.loads((ROOT / name).read_text())["cells"]:
                assert not cell.get("outputs"), name


def test_every_result_has_its_provenance() -> None:
    files = [name for name in tracked() if name.startswith("results/") and name.endswith("jsonl")]
    assert files
    for name in files:
        first = json.loads((ROOT / name).read_text().splitlines()[0])["provenance"]
        assert {"command", "commit", "date", "device", "python", "torch", "seed"} <= set(first)
