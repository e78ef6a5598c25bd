"""README.md says what is true: commands, links, tables."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from sla.cli.main import build_parser, main
from sla.figures.tables import TABLES, TableError, update_readme

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# `make test` runs these tests; its own variables must not reach the make that they start.
OF_MAKE = ("MAKE", "MFLAGS", "ARGS", "CONFIG", "RESUME", "RECORD", "CKPT", "OUT", "PROMPT")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(OF_MAKE)}
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS.splitlines() if line.strip()]


def test_there_are_commands() -> None:
    assert "make finetune" in COMMANDS
    assert "make test" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_reach_a_command_line_that_parses(command: str) -> None:
    """What make would run, with its arguments, parses; nothing is run."""
    assert command.startswith("make ")
    # An environment given by PY needs no set-up, so that make prints the command alone.
    done = subprocess.run(
        [*shlex.split(command), "--dry-run", "PY=python"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("python -m ")]
    assert lines, done.stdout
    for line in lines:
        module, *arguments = shlex.split(line)[2:]
        if module == "sla":
            build_parser().parse_args(arguments)
        else:
            assert module in ("pytest", "tensorboard.main")


def test_every_target_named_in_the_text_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z0-9-]+)", README)) | {c.split()[1] for c in COMMANDS}
    assert named <= targets


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    done = subprocess.run(
        ["make", "help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert {line.split()[0] for line in done.stdout.splitlines()} == phony


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["tables", "--check"]) == 0


def test_tables_are_filled_and_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table:finetune -->\nold\n<!-- /table -->\nafter\n")
    assert update_readme(page, root=ROOT / "results", check=True)
    assert "old" in page.read_text()
    assert update_readme(page, root=ROOT / "results")
    assert not update_readme(page, root=ROOT / "results")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_an_unknown_table_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table:nonsense -->\n<!-- /table -->\n")
    with pytest.raises(TableError, match="nonsense"):
        update_readme(page)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table:finetune -->\nkept\n<!-- table:kernels_cpu -->\n<!-- /table -->\n",
        "<!-- table:finetune -->\nkept\n",
        "kept\n<!-- /table -->\n",
        "<!--table:finetune-->\nkept\n<!-- /table -->\n",
        "text <!-- table finetune -->\nkept\n<!-- /table -->\n",
    ],
)
def test_a_marker_without_its_other_half_is_an_error(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(TableError, match=r"page\.md"):
        update_readme(page, root=tmp_path)
    assert page.read_text() == text


@pytest.mark.parametrize("name", TABLES)
def test_without_results_a_table_says_how_to_get_them(name: str, tmp_path: Path) -> None:
    assert "make" in TABLES[name](tmp_path)
