"""Lists of prompts, and which video belongs to which prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from sla_eval.prompts import (
    VBENCH_FILE,
    Prompt,
    PromptError,
    assign_prompts,
    read_prompts,
    read_sidecar,
)

FULL_INFO = [
    {"prompt_en": "a person", "dimension": ["human_action"], "auxiliary_info": {}},
    {"prompt_en": "a red car", "dimension": ["color", "subject_consistency"]},
]


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.touch()
    return paths


def test_our_own_list_ships() -> None:
    prompts = read_prompts("builtin")
    assert 12 <= len(prompts) <= 20
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert all(prompt.is_for("subject_consistency") for prompt in prompts)


def test_text_files_have_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("\ufeff# comment\n a fox \n\nein Fuß, läuft\n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["a fox", "ein Fuß, läuft"]


def test_vbench_list_with_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vbench"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    (package / VBENCH_FILE).write_text(json.dumps(FULL_INFO))
    monkeypatch.syspath_prepend(tmp_path)
    person, car = read_prompts("vbench")
    assert person == Prompt("a person", ("human_action",))
    assert read_prompts(package / VBENCH_FILE) == [person, car]
    assert person.is_for("human_action")
    assert not person.is_for("subject_consistency")
    assert person.is_for("psnr"), "what is not VBench's takes every prompt"
    assert car.is_for("subject_consistency")
    assert "vbench" not in sys.modules


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "{}", "must hold a list of prompts, got dict"),
        ("a.json", '["fox", 3]', "entry 1, must be a text or VBench's"),
        ("a.json", '[{"prompt_en": "fox", "dimension": [1]}]', "entry 0"),
        ("a.txt", "# nothing\n", "holds no prompt"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=message):
        read_prompts(tmp_path / name)


def test_missing_lists_say_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptError, match=r"nowhere\.txt.*No such file"):
        read_prompts(tmp_path / "nowhere.txt")
    monkeypatch.setattr("sla_eval.prompts.find_vbench_file", lambda: None)
    with pytest.raises(PromptError, match="pip install vbench"):
        read_prompts("vbench")


def test_sidecars_say_prompt_and_seed(tmp_path: Path) -> None:
    first, second, third, fourth = touch(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    (tmp_path / "a.json").write_text('{"prompt": "a fox", "seed": 7}')
    (tmp_path / "b.json").write_text('{"prompt": "a hen", "sampling": {"seed": 8}}')
    (tmp_path / "c.json").write_text('{"prompt"')
    assert read_sidecar(first) == Prompt("a fox", seed=7)
    assert read_sidecar(second) == Prompt("a hen", seed=8)
    assert read_sidecar(third) is None
    assert assign_prompts([first, second, third, fourth]) == {
        "a.mp4": Prompt("a fox", seed=7),
        "b.mp4": Prompt("a hen", seed=8),
    }


def test_videos_are_told_by_sidecar_name_or_place(tmp_path: Path) -> None:
    prompts = [Prompt("a fox", ("color",)), Prompt("a-hen"), Prompt("a fox", ("scene",))]
    named = touch(tmp_path, "a fox-0.mp4", "a fox-11.mp4", "a-hen.mp4", "x.mp4")
    (tmp_path / "x.json").write_text('{"prompt": "a-hen", "seed": 3}')
    fox = Prompt("a fox", ("color", "scene"))
    assert assign_prompts(named, prompts) == {
        "a fox-0.mp4": fox,
        "a fox-11.mp4": fox,
        "a-hen.mp4": Prompt("a-hen"),
        "x.mp4": Prompt("a-hen", seed=3),
    }
    by_place = touch(tmp_path, "2.mp4", "1.mp4")
    expected = {"1.mp4": Prompt("first"), "2.mp4": Prompt("second")}
    assert assign_prompts(by_place, [Prompt("first"), Prompt("second")]) == expected


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"of 1 of 2 videos cannot be told, the first is b\.mp4"):
        assign_prompts(touch(tmp_path, "fox-0.mp4", "b.mp4"), [Prompt("fox"), Prompt("hen")])
    with pytest.raises(PromptError, match=r"1 were given"):
        assign_prompts(touch(tmp_path, "a.mp4", "b.mp4"), [Prompt("fox")])
