"""README.md, REPRODUCTION.md and docs/ say what is true: commands, links, code, tables."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from sla_eval.__main__ import build_parser as eval_parser
from sla_eval.backbones import backbone_table

from sla.benchmark.__main__ import BENCHMARKS
from sla.cli.main import build_parser, main
from sla.figures.tables import TABLES, TableError, pages, update_readme

ROOT = Path(__file__).resolve().parents[2]
# Text of each page by its name, such as docs/data.md.
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in pages(ROOT)}
README = PAGES["README.md"]
TOOLS = ("pytest", "tensorboard.main", "ruff", "mypy")
MAKEFILE = (ROOT / "Makefile").read_text()
# `make test` runs these tests; its own variables must not reach the make that they start.
OF_MAKE = ("MAKE", "MFLAGS", "ARGS", "CONFIG", "RESUME", "RECORD", "CKPT", "OUT", "PROMPT", "BENCH")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(OF_MAKE)}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def spans(page: str) -> list[str]:
    """Code in single backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: str) -> list[str]:
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def choices(parser: argparse.ArgumentParser) -> set[str]:
    """Names of a parser's commands."""
    assert parser._subparsers is not None
    return set(next(iter(parser._subparsers._group_actions)).choices or ())


COMMANDS = sorted({(page, command) for page in PAGES for command in commands(page)})


def test_there_are_commands() -> None:
    assert "make finetune" in commands("README.md")
    assert "make test" in commands("README.md")


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_reach_a_command_line_that_parses(page: str, command: str) -> None:
    """What would run, with its arguments, parses; nothing is run."""
    lines = [command]
    if not command.startswith("python -m "):
        assert command.startswith("make "), page
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
        printed = [line.strip() for line in done.stdout.splitlines()]
        lines = [line for line in printed if line.startswith("python -m ")]
        assert lines, done.stdout
    for line in lines:
        module, *arguments = shlex.split(line.rstrip("; \\"))[2:]
        if module == "sla":
            build_parser().parse_args(arguments)
        elif module == "sla_eval":
            eval_parser().parse_args(arguments)
        elif module == "sla.benchmark":
            parser = argparse.ArgumentParser()
            import_module(f"sla.benchmark.{arguments[0]}").add_parser(parser)
            parser.parse_args(arguments[1:])
        else:
            assert module in TOOLS


@pytest.mark.parametrize("page", PAGES)
def test_everything_named_in_the_text_exists(page: str) -> None:
    """Targets of make, commands of our modules, paths of the repository."""
    targets = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
    for span in [*spans(page), *commands(page)]:
        words = shlex.split(span) if span.startswith(("make ", "python -m ")) else [span]
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, span
        elif words[0] == "python" and words[2] in ("sla", "sla.benchmark") and len(words) > 3:
            known = choices(build_parser()) if words[2] == "sla" else set(BENCHMARKS)
            command = next(word for word in words[3:] if not word.startswith("--"))
            assert command in known or not command.islower(), span
        elif re.fullmatch(r"(src|kernels|eval|configs|tests|docs|assets)/[\w./-]+", span):
            assert (ROOT / span).exists(), span


def test_make_help_lists_every_target() -> None:
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())  # type: ignore[index]
    done = subprocess.run(
        ["make", "help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert {line.split()[0] for line in done.stdout.splitlines()} == phony


LINKS = sorted(
    {(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)}
)


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_somewhere(page: str, link: str) -> None:
    if link.startswith("https://"):
        return
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_the_readme_leads_to_every_page(page: str) -> None:
    assert ("README.md", page) in {(of, link.partition("#")[0]) for of, link in LINKS}


# No network: a tiny Wan in place of the hub's.
PREAMBLE = """
from types import SimpleNamespace

import diffusers
import torch

import sla.models.wan


class Pipeline:
    @classmethod
    def from_pretrained(cls, source):
        assert source == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        pipe = cls()
        pipe.transformer = sla.models.wan.build_wan("tiny", torch.float32, seed=0)
        return pipe

    def __call__(self, prompt):
        config = self.transformer.config
        latents = torch.zeros(1, config.in_channels, 2, 8, 8)
        text = torch.zeros(1, 4, config.text_dim)
        found = self.transformer(latents, torch.zeros(1), text, return_dict=False)[0]
        assert found.shape == latents.shape
        return SimpleNamespace(frames=found)


diffusers.WanPipeline = Pipeline
"""


@pytest.mark.slow  # loads torch and diffusers in a process of its own
def test_python_code_runs(tmp_path: Path) -> None:
    """All of it, one block after the other; in a process that it may register names in."""
    code = [block for page in PAGES for block in blocks(page, "python")]
    assert len(code) >= 5
    script = tmp_path / "pages.py"
    script.write_text("\n\n".join([PREAMBLE, *code]))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_networks_of_metrics_are_listed() -> None:
    assert backbone_table() in PAGES["docs/evaluation.md"]


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
