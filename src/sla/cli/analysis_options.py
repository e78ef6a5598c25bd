"""The options of `capture` and `analyse`; imports what these need when they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# Where `make capture` writes: the run of configs/finetune/demo.yaml.
DEMO_CAPTURE = Path("runs/finetune-demo/capture")


def add_parsers(commands: Any) -> None:
    """Add both commands to `python -m sla`."""
    capture = commands.add_parser(
        "capture", help="store what a model's attention is given and does, for figures"
    )
    capture.add_argument("--config", type=Path, required=True, help="YAML file under configs/")
    capture.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="override a config value"
    )
    capture.add_argument("--weights", type=Path, help="default: the pretrained ones of the config")
    capture.add_argument("--out", type=Path, help="folder; default: runs/NAME/capture")
    given = capture.add_mutually_exclusive_group()
    given.add_argument(
        "--clips", type=int, default=1, metavar="N", help="validation clips; default: %(default)s"
    )
    given.add_argument("--prompt", help="sample a video of this prompt instead")
    given.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line, or JSON, or 'builtin' or 'vbench'"
    )
    capture.add_argument(
        "--timesteps",
        type=_numbers,
        default=(950.0, 700.0, 400.0, 100.0),
        metavar="T,T",
        help="in 0 to 1000; default: 950,700,400,100",
    )
    capture.add_argument("--layers", type=_indices, metavar="I,I", help="default: all")
    capture.add_argument("--heads", type=_indices, metavar="I,I", help="default: all")
    capture.add_argument(
        "--query-blocks",
        type=_count_or_all,
        metavar="N",
        help="whole query blocks kept of raster order, and as many of tile order; default: all",
    )
    capture.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the files",
    )
    capture.add_argument("--no-values", action="store_true", help="keep queries and keys alone")
    capture.add_argument(
        "--max-gib",
        type=float,
        default=4.0,
        metavar="GIB",
        help="the most that the files may take; default: %(default)s",
    )
    capture.set_defaults(run=_capture)

    analyse = commands.add_parser("analyse", help="measure a capture: weights, errors, routing")
    analyse.add_argument(
        "--capture", type=Path, default=DEMO_CAPTURE, help="its folder; default: %(default)s"
    )
    analyse.add_argument(
        "--rows",
        type=int,
        default=512,
        metavar="N",
        help="query rows of a map, evenly spaced, at which weights are measured; "
        "default: %(default)s",
    )
    analyse.add_argument(
        "--block",
        type=int,
        default=64,
        metavar="N",
        help="tokens of a block, at which routing is measured; default: %(default)s",
    )
    analyse.add_argument(
        "--no-methods",
        action="store_true",
        help="leave the methods out, which need captures of all queries",
    )
    analyse.add_argument("--device", default="auto", help="default: a GPU if there is one")
    analyse.add_argument("--record", action="store_true", help="keep the rows under results/")
    analyse.add_argument(
        "--stage",
        metavar="TEXT",
        help="where in training the model is ('before training', 'after ...'), for the table of "
        "stages; figures are not drawn of such a record",
    )
    analyse.set_defaults(run=_analyse)


def _capture(options: argparse.Namespace) -> None:
    from sla.cli.capture import capture, read_options

    choice = read_options(
        prompt=options.prompt,
        prompts=options.prompts,
        clips=options.clips,
        timesteps=options.timesteps,
        layers=options.layers,
        heads=options.heads,
        query_blocks=options.query_blocks,
        dtype=options.dtype,
        values=not options.no_values,
        max_gib=options.max_gib,
    )
    capture(options.config, options.overrides, options.weights, options.out, choice)


def _analyse(options: argparse.Namespace) -> None:
    from sla.cli.analyse import analyse

    analyse(
        options.capture,
        rows=options.rows,
        block=options.block,
        methods=not options.no_methods,
        device=options.device,
        record=options.record,
        stage=options.stage,
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from error


def _indices(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between")
    return tuple(int(part) for part in parts)


def _count_or_all(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive whole number nor 'all'")
    return int(text)
