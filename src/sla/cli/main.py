"""`python -m sla COMMAND`: the commands behind the Makefile's targets.

Exit status: 0 done, 1 the job failed, 2 the call or config was wrong.
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sla.cli.analysis_options import DEMO_CAPTURE, add_parsers

# Commands import what they need when they run: `--help` and `tables` need no torch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parse(arguments)
    _configure_logging()
    try:
        status = options.run(options)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except OSError as error:
        hint = "; free some space and run the same command again to go on"
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"error: {error.strerror or error}{where}{hint if full else ''}", file=sys.stderr)
        return 1
    except Exception as error:
        if options.traceback or not _is_expected(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return int(status or 0)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a call; overrides may stand in several places, which argparse alone refuses."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(not _is_override(x) for x in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    rest = [*vars(options).pop(_LATE, []), *rest]
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    return options


_LATE = "overrides_among_values"


class _Several(argparse.Action):
    """One value or more; overrides that follow them, which argparse counts among them, are not."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        type: Callable[[str], Any] = str,
        **options: Any,
    ) -> None:
        super().__init__(option_strings, dest, "+", **options)
        self.convert = type

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        late = [value for value in values if _is_override(value)]
        found = []
        for value in values:
            if value in late:
                continue
            try:
                found.append(self.convert(value))
            except ValueError:
                kind = getattr(self.convert, "__name__", "value")
                raise argparse.ArgumentError(self, f"invalid {kind} value: {value!r}") from None
        if not found:
            raise argparse.ArgumentError(self, "expected at least one argument")
        setattr(namespace, self.dest, found)
        setattr(namespace, _LATE, [*getattr(namespace, _LATE, []), *late])


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _configure_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("sla")
    log.handlers = [handler]
    log.setLevel(logging.INFO)


def _is_expected(error: Exception) -> bool:
    """Errors whose message says all that the user needs."""
    return type(error).__module__.startswith(("sla.", "sla_kernels.", "sla_eval."))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(prog="python -m sla", description=__doc__)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="build the demo set of real clips")
    data.add_argument("--root", type=Path, default=Path("data/demo"), help="folder to write")
    data.set_defaults(run=_data)

    study = commands.add_parser("study-data", help="make the study set of simulated clips")
    study.add_argument("--out", type=Path, default=Path("data/study"), help="folder to write")
    study.add_argument("--seed", type=int, default=0, help="of every clip; default: %(default)s")
    for split, count in (("train", 8000), ("val", 400), ("test", 400)):
        study.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help="clips; default: %(default)s"
        )
    study.add_argument(
        "--shard-clips", type=int, default=200, metavar="N", help="of a shard; default: %(default)s"
    )
    study.add_argument(
        "--workers", type=_positive, metavar="N", help="processes; default: one a core"
    )
    study.add_argument("--real", action="store_true", help="add the demo set's real clips")
    study.add_argument(
        "--verify", action="store_true", help="compare a finished set with its checksums instead"
    )
    study.set_defaults(run=_study_data)

    arms = commands.add_parser("study", help="run what is missing of a study")
    _add_config(arms)
    arms.add_argument("--arms", action=_Several, default=[], metavar="NAME", help="only these arms")
    arms.add_argument(
        "--groups", action=_Several, default=[], metavar="NAME", help="only these groups"
    )
    arms.add_argument(
        "--seeds", action=_Several, type=int, default=[], metavar="N", help="only these"
    )
    arms.add_argument(
        "--max-seconds", type=float, metavar="N", help="begin no step after so long; resumable"
    )
    arms.add_argument(
        "--begin-within", type=float, metavar="N", help="begin no run after so many seconds"
    )
    arms.add_argument(
        "--share", type=_share, metavar="I/N", help="every N-th run from the I-th, for N machines"
    )
    arms.add_argument(
        "--processes", type=int, default=1, metavar="N", help="at once, spread over the GPUs"
    )
    arms.add_argument("--out", type=Path, default=Path("results"), help="results folder")
    arms.add_argument("--runs", type=Path, default=Path("runs/study"), help="unfinished runs")
    arms.add_argument(
        "--retry", action="store_true", help="run again what had failed, and what --times measured"
    )
    arms.add_argument(
        "--untimed", action="store_true", help="no times of steps: other processes share the GPU"
    )
    arms.add_argument(
        "--times", action="store_true", help="measure times of steps alone, where there are none"
    )
    arms.add_argument("--list", action="store_true", help="say what is missing, run nothing")
    arms.add_argument(
        "--withdraw",
        metavar="REASON",
        help="take back what is finished of --arms or --groups, which is wrong; run nothing",
    )
    arms.set_defaults(run=_study)

    classifier = commands.add_parser("study-evaluator", help="train a study's evaluator network")
    _add_config(classifier)
    classifier.add_argument("--out", type=Path, default=Path("results"), help="results folder")
    classifier.add_argument("--force", action="store_true", help="replace the one that is there")
    classifier.set_defaults(run=_study_evaluator)

    parts = commands.add_parser("study-weights", help="split a weights file into parts, or join it")
    parts.add_argument("action", choices=["split", "join"])
    parts.add_argument("file", type=Path, metavar="FILE", help="the whole file")
    parts.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="of the parts")
    parts.set_defaults(run=_study_weights)

    latents = commands.add_parser("latents", help="encode a set into a latent cache")
    _add_config(latents)
    latents.add_argument(
        "--out", type=Path, help="folder of the cache; default: data.cache, or data/latents"
    )
    latents.add_argument("--rank", type=int, help="of this process; default: $RANK, or 0")
    latents.add_argument("--world-size", type=int, help="default: $WORLD_SIZE, or 1")
    latents.set_defaults(run=_latents)

    report = commands.add_parser("data-report", help="say what a set holds and what is wrong")
    _add_config(report)
    report.add_argument("--out", type=Path, help="folder to write; default: runs/data-report/NAME")
    report.add_argument(
        "--sheet", type=int, default=48, metavar="N", help="clips on the contact sheet"
    )
    report.add_argument(
        "--quick", action="store_true", help="decode each clip's first frame, not all of them"
    )
    report.add_argument(
        "--workers", type=_positive, metavar="N", help="processes; default: one a core"
    )
    report.set_defaults(run=_data_report)

    for name, run, text in (
        ("pretrain", _pretrain, "train the model with full attention"),
        ("finetune", _finetune, "swap the attention in and fine-tune"),
        ("config", _config, "print a config with every value resolved"),
    ):
        command = commands.add_parser(name, help=text)
        _add_config(command)
        if run is not _config:
            command.add_argument(
                "--record", action="store_true", help="keep the summary under results/"
            )
        command.set_defaults(run=run)

    router = commands.add_parser("router", help="train SLA2's routers before fine-tuning")
    _add_config(router)
    router.set_defaults(run=_router)

    generate = commands.add_parser("generate", help="write videos of prompts")
    _add_config(generate)
    given = generate.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="what the video shows")
    given.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line, or JSON, or 'builtin' or 'vbench'"
    )
    generate.add_argument("--weights", type=Path, help="model.safetensors; default: the newest")
    generate.add_argument(
        "--out", type=Path, help="mp4 to write, or with --prompts the folder to write"
    )
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser("eval", help="measure a model")
    _add_config(evaluate)
    evaluate.add_argument("--weights", type=Path, help="model.safetensors; default: the newest")
    evaluate.add_argument("--out", type=Path, help="folder to write")
    evaluate.add_argument("--record", action="store_true", help="keep the scores under results/")
    evaluate.set_defaults(run=_evaluate)

    tables = commands.add_parser("tables", help="write the tables of our pages from results/")
    tables.add_argument(
        "--readme",
        type=Path,
        nargs="+",
        metavar="PAGE",
        help="pages with markers; default: README.md REPRODUCTION.md docs/*.md",
    )
    tables.add_argument("--check", action="store_true", help="fail if they are out of date")
    tables.set_defaults(run=_tables)

    flops = commands.add_parser("flops", help="count FLOPs beside the paper's efficiency columns")
    flops.add_argument("--format", choices=["markdown", "csv"], default="markdown")
    flops.add_argument(
        "--grid",
        type=_positive,
        nargs=3,
        metavar=("FRAMES", "HEIGHT", "WIDTH"),
        help="latent grid in tokens; default: Wan2.1-1.3B's at 480p x 81 frames",
    )
    for name, what in (
        ("--heads", "attention heads"),
        ("--head-dim", "width of a head"),
        ("--layers", "attention layers"),
    ):
        flops.add_argument(
            name, type=_positive, metavar="N", help=f"{what}; default: Wan2.1-1.3B's"
        )
    flops.set_defaults(run=_flops)

    add_parsers(commands)

    figures = commands.add_parser("figures", help="draw the paper's figures from results/")
    figures.add_argument("--out", type=Path, default=Path("figures"), help="folder to write")
    figures.add_argument("--results", type=Path, default=Path("results"), help="folder to read")
    figures.add_argument(
        "--capture",
        type=Path,
        default=DEMO_CAPTURE,
        help="capture whose maps are drawn; default: %(default)s",
    )
    figures.add_argument(
        "--videos",
        type=Path,
        default=Path("runs/finetune-demo/eval"),
        help="folder of `make eval` whose videos are drawn; default: %(default)s",
    )
    figures.set_defaults(run=_figures)

    notebooks = commands.add_parser("notebooks", help="run the notebooks, keep a picture of each")
    notebooks.add_argument("names", nargs="*", metavar="NAME", help="such as 02; default: all")
    notebooks.add_argument("--folder", type=Path, default=Path("notebooks"), help="folder to read")
    notebooks.add_argument(
        "--out", type=Path, default=Path("docs/pictures"), help="folder to write"
    )
    notebooks.set_defaults(run=_notebooks)

    screenshot = commands.add_parser("screenshot", help="photograph TensorBoard on the runs")
    screenshot.add_argument("--logdir", type=Path, default=Path("runs"), help="folder of runs")
    screenshot.add_argument(
        "--out", type=Path, default=Path("docs/pictures/tensorboard.png"), help="PNG to write"
    )
    screenshot.add_argument("--tags", metavar="REGEX", help="of the scalars to show")
    screenshot.add_argument(
        "--browser", type=Path, help="a Chromium; default: Playwright's, or the system's"
    )
    screenshot.set_defaults(run=_screenshot)

    convert = commands.add_parser(
        "convert-checkpoint", help="convert TurboDiffusion's SLA checkpoints to ours, and back"
    )
    convert.add_argument(
        "source", type=Path, metavar="IN", help="their .safetensors or .pth file, or our folder"
    )
    convert.add_argument(
        "target", type=Path, metavar="OUT", help="our folder to write, or their file"
    )
    convert.add_argument(
        "--critical",
        type=float,
        default=0.10,
        metavar="FRACTION",
        help="top-k ratio that their model was trained with; default: %(default)s",
    )
    convert.set_defaults(run=_convert)

    consolidate = commands.add_parser(
        "consolidate", help="make one file, or a model, of a sharded checkpoint"
    )
    consolidate.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="runs/NAME/checkpoints/last.ckpt"
    )
    consolidate.add_argument(
        "out", type=Path, metavar="OUT", help="FILE.ckpt to go on from, or a folder for the model"
    )
    consolidate.set_defaults(run=_consolidate)

    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 1/2")
    return int(number), int(total)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file under configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="override a config value"
    )


def _data(options: argparse.Namespace) -> None:
    from sla.cli.data import build

    build(options.root)


def _study_data(options: argparse.Namespace) -> None:
    from sla.cli.study_data import make, verify

    if options.verify:
        verify(options.out)
        return
    names = ("seed", "train", "val", "test", "shard_clips")
    numbers = {name: getattr(options, name) for name in names}
    make(options.out, numbers, workers=options.workers, real=options.real)


def _study(options: argparse.Namespace) -> int:
    from sla.cli.study import run, run_processes

    runs_something = not options.list and options.withdraw is None
    if options.processes != 1 and runs_something:
        alone = _without("--processes", options.arguments)
        return run_processes(alone, options.processes, timed=not options.untimed)

    return run(
        options.config,
        options.overrides,
        arms=options.arms,
        groups=options.groups,
        seeds=options.seeds,
        share=options.share or (1, 1),
        max_seconds=options.max_seconds,
        begin_within=options.begin_within,
        out=options.out,
        runs=options.runs,
        retry=options.retry,
        timed=not options.untimed,
        times=options.times,
        listing=options.list,
        withdraw=options.withdraw,
    )


def _without(name: str, arguments: Sequence[str]) -> list[str]:
    """The call without an option that takes one value, however it was given."""
    given = iter(arguments)
    kept: list[str] = []
    for argument in given:
        option, equals, _ = argument.partition("=")
        if not (len(option) > 2 and name.startswith(option)):  # argparse takes a beginning of it
            kept.append(argument)
        elif not equals:
            next(given)
    return kept


def _study_evaluator(options: argparse.Namespace) -> None:
    from sla.cli.study import evaluator

    evaluator(options.config, options.overrides, out=options.out, force=options.force)


def _study_weights(options: argparse.Namespace) -> None:
    from sla.cli.study import join, split

    if options.action == "split":
        split(options.file, options.folder or options.file.parent)
    else:
        join(options.file, options.folder)


def _latents(options: argparse.Namespace) -> None:
    from sla.cli.latents import encode

    encode(options.config, options.overrides, options.out, options.rank, options.world_size)


def _data_report(options: argparse.Namespace) -> None:
    from sla.cli.data_report import report

    report(
        options.config,
        options.overrides,
        options.out,
        sheet=options.sheet,
        whole=not options.quick,
        workers=options.workers,
    )


def _pretrain(options: argparse.Namespace) -> None:
    from sla.cli.train import pretrain

    pretrain(options.config, options.overrides, record=options.record)


def _finetune(options: argparse.Namespace) -> None:
    from sla.cli.train import finetune

    finetune(options.config, options.overrides, record=options.record)


def _router(options: argparse.Namespace) -> None:
    from sla.cli.router import train

    train(options.config, options.overrides)


def _config(options: argparse.Namespace) -> None:
    from sla.config import dump, load_experiment

    print(dump(load_experiment(options.config, options.overrides)), end="")


def _generate(options: argparse.Namespace) -> None:
    from sla.cli.generate import generate

    generate(
        options.config,
        options.overrides,
        options.weights,
        options.out,
        prompt=options.prompt,
        prompts=options.prompts,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from sla.cli.evaluate import evaluate

    evaluate(options.config, options.overrides, options.weights, options.out, record=options.record)


def _tables(options: argparse.Namespace) -> int:
    from sla.figures.tables import pages, update_readme

    wanted = options.readme or pages()
    changed = [page for page in wanted if update_readme(page, check=options.check)]
    if changed and options.check:
        names = ", ".join(map(str, changed))
        print(f"{names} differ from results/: run `make tables`", file=sys.stderr)
        return 1
    return 0


def _flops(options: argparse.Namespace) -> None:
    from sla.cli.flops import show

    show(options.grid, options.heads, options.head_dim, options.layers, options.format)


def _figures(options: argparse.Namespace) -> int:
    from sla.figures.drawing import FIGURES, FigureError, Sources

    sources = Sources(options.results, options.capture, options.videos)
    drawn: list[Path] = []
    for draw in FIGURES:
        try:
            drawn += draw(options.out, sources)
        except FigureError as error:  # the others may have what they need
            print(f"not drawn: {error}", file=sys.stderr)
    for path in drawn:
        print(path)
    return 0 if drawn else 1


def _notebooks(options: argparse.Namespace) -> None:
    from sla.figures.notebooks import render

    for path in render(options.names, folder=options.folder, out=options.out):
        print(path)


def _screenshot(options: argparse.Namespace) -> None:
    from sla.figures.screenshot import TAGS, take

    tags = options.tags or TAGS
    print(take(options.logdir, options.out, tags=tags, browser=options.browser))


def _consolidate(options: argparse.Namespace) -> None:
    from sla.cli.consolidate import consolidate

    consolidate(options.checkpoint, options.out)


def _convert(options: argparse.Namespace) -> None:
    from sla.models.interchange import convert_checkpoint

    written = convert_checkpoint(options.source, options.target, critical=options.critical)
    print("\n".join(str(path) for path in written))
