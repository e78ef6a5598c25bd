"""`python -m sla COMMAND`: the commands behind the Makefile's targets.

Exit status: 0 done, 1 the job failed, 2 the call or config was wrong.
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

# Commands import what they need when they run: `--help` and `tables` need no torch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
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

    tables = commands.add_parser("tables", help="write README.md's tables from results/")
    tables.add_argument("--readme", type=Path, default=Path("README.md"))
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

    figures = commands.add_parser("figures", help="draw the paper's figures from results/")
    figures.add_argument("--out", type=Path, default=Path("figures"), help="folder to write")
    figures.add_argument("--results", type=Path, default=Path("results"), help="folder to read")
    figures.set_defaults(run=_figures)

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


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file under configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="override a config value"
    )


def _data(options: argparse.Namespace) -> None:
    from sla.cli.data import build

    build(options.root)


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
    from sla.figures.tables import update_readme

    changed = update_readme(options.readme, check=options.check)
    if changed and options.check:
        print(f"{options.readme} differs from results/: run `make tables`", file=sys.stderr)
        return 1
    return 0


def _flops(options: argparse.Namespace) -> None:
    from sla.cli.flops import show

    show(options.grid, options.heads, options.head_dim, options.layers, options.format)


def _figures(options: argparse.Namespace) -> int:
    from sla.figures import figure6a, figure6b

    drawn: list[Path] = []
    for figure in (figure6a, figure6b):
        try:
            drawn += figure.draw(options.out, options.results)
        except figure6a.FigureError as error:  # the others may have what they need
            print(f"not drawn: {error}", file=sys.stderr)
    for path in drawn:
        print(path)
    return 0 if drawn else 1


def _consolidate(options: argparse.Namespace) -> None:
    from sla.cli.consolidate import consolidate

    consolidate(options.checkpoint, options.out)


def _convert(options: argparse.Namespace) -> None:
    from sla.models.interchange import convert_checkpoint

    written = convert_checkpoint(options.source, options.target, critical=options.critical)
    print("\n".join(str(path) for path in written))
