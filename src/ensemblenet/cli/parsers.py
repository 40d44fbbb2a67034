"""The options of each command, and what is refused of them before the command imports what takes seconds.

PyTorch alone is imported here, for a conversion or a device.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from ensemblenet.cli.options import (
    CommandParser,
    add_base,
    add_data,
    add_device,
    add_split,
    add_trained_models,
    add_trust,
    check_new,
    check_place,
    check_there,
    command_parser,
    conversion_of,
    positive_integer,
)
from ensemblenet.deploy import Format
from ensemblenet.errors import LoadError
from ensemblenet.metrics.scores import meanings
from ensemblenet.names import check_network
from ensemblenet.reports.tables import COST_NOTE
from ensemblenet.storage.runs import check_saved, check_trained

__all__ = ["DEMO_EPOCHS", "PARSERS", "read"]

DEMO_EPOCHS = 40


def read(command: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and those of its data module; what they name is there, or is new.

    Args:
        command: its name; `fit` and `compare` have settings instead, see [`ensemblenet.cli.settings`][].
        arguments: what follows it.

    Raises:
        FileExistsError: what --output names exists.
        OSError: --output or --runs cannot be made, or what is to be read is not there.
        ConversionError: a conversion that cannot be.
        LoadError: MODEL is a folder without a model, or predictions of another format.

    Example:
        >>> read("export", ["nowhere", "--output", "model.onnx"])
        Traceback (most recent call last):
        ...
        ensemblenet.errors.LoadError: nowhere holds no saved model: there is no such folder.
    """
    parser = PARSERS[command]()
    options, changes = parser.parse_with_data(arguments)
    given = vars(options)
    if command == "convert":
        if options.calibrate is None and changes:
            parser.error(f"{' '.join(changes)} needs --calibrate, which names the data")
        if options.calibrate is not None and options.init != "inherit":
            parser.error("--calibrate needs --init inherit")
    if (output := given.get("output")) is not None:
        check_new(output, {"convert": "folder", "export": "path"}.get(command, "file"))
        check_place(output.absolute().parent)
        if command == "predict" and output.suffix not in (".csv", ".parquet"):
            raise LoadError(f"The file of predictions must end in .csv or .parquet, got {output}.")
    if "runs" in given:
        check_place(options.runs.absolute())
    calibrated = given.get("calibrate") or ""
    files = [given.get("config"), calibrated if calibrated.endswith((".yaml", ".yml")) else None]
    for path in filter(None, [*files, *_listed(given.get("data"))]):
        check_there(str(path))
    if "num_heads" in given:
        if ":" not in options.model and ("/" in options.model or Path(options.model).is_dir()):  # no network's name
            (check_trained if command == "info" else check_saved)(Path(options.model))
        else:
            check_network(options.model)
        if given.get("weights") not in (None, "pretrained"):
            check_there(options.weights)
        conversion_of(options)
    else:
        for model in (*given.get("models", ()), *_listed(given.get("model"))):
            if "://" not in model:
                check_trained(Path(model))
    if given.get("device", "auto") not in ("auto", "cpu"):
        import torch

        torch.empty(0, device=options.device)
    return options, changes


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _demo() -> CommandParser:
    parser = command_parser(
        "demo",
        "Train a residual base of 1-d convolutions and its multi-headed conversions on MNIST-1D, which this machine "
        "generates; show a table and write figures, results.json and a page. It needs no data, no network and no GPU, "
        "and takes about 5 minutes on 2 cores.",
    )
    parser.add_argument("--seeds", type=positive_integer, default=5, help="of each method (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=positive_integer, default=DEMO_EPOCHS, help="of a training (default: %(default)s)"
    )
    parser.add_argument("--workers", type=positive_integer, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="for run folders (default: %(default)s)")
    return parser


def _info() -> CommandParser:
    parser = command_parser(
        "info",
        "Show where a network can be split, and how wide and deep heads could be. It trains nothing, and needs no data "
        "unless MODEL is the folder of a base's run of `fit`, of which it also says whether it has capacity to spare.",
        COST_NOTE,
    )
    add_base(parser)
    add_trust(parser)
    measuring = parser.add_argument_group("times, measured on this machine")
    measuring.add_argument("--measure", action="store_true", help="time the plans that come first against the base")
    measuring.add_argument("--batch-size", type=positive_integer, default=32, help="N (default: %(default)s)")
    add_device(measuring, default="cpu")
    measuring.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    measuring.add_argument("--channels-last", action="store_true", help="with the channels of images last in memory")
    return parser


def _convert() -> CommandParser:
    parser = command_parser(
        "convert",
        "Convert a network into a multi-headed one, and save it: with fresh weights, which needs no data, or with "
        "those of a trained network.",
        COST_NOTE,
        allow_abbrev=False,
    )
    add_base(parser)
    parser.add_argument("--output", type=Path, required=True, help="the folder to create")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    inherit = parser.add_argument_group("of a trained network")
    inherit.add_argument(
        "--init",
        default="fresh",
        metavar="WAY",
        help="fresh weights, or inherit those that MODEL comes with (default: %(default)s)",
    )
    inherit.add_argument(
        "--importance",
        metavar="WAY",
        help="which channels and blocks heads inherit: magnitude, scale, taylor, loss or random (default: taylor with "
        "--calibrate, else magnitude)",
    )
    inherit.add_argument("--freeze", metavar="trunk", help="train the heads alone, behind a trunk that stays")
    inherit.add_argument(
        "--calibrate",
        metavar="DATA",
        help="a data module such as ensemblenet.data.ImageData, or a YAML file with class_path and init_args; "
        "--data.KEY VALUE is an argument of it. Some training batches repair inherited heads; what the network, each "
        "head and their mean reach on validation data before any training is printed",
    )
    return parser


def _benchmark() -> CommandParser:
    parser = command_parser(
        "benchmark",
        "Time a network and its conversion, whose heads run one after another (looped) or as one (fused), in turns "
        "on random inputs. It trains nothing.",
    )
    add_base(parser)
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="N (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_integer, default=7, help="of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile, which takes minutes")
    add_device(parser, default="cpu")
    add_trust(parser)
    return parser


def _test(name: str, words: str) -> CommandParser:
    parser = command_parser(
        name,
        f"Score a trained network on {words} examples: the whole model, each "
        "head alone, and the first heads together. It needs the folder of a run of `fit`, which knows its data, or a "
        "saved model and a data module.",
        f"{meanings(('nll', 'ece', 'brier', 'disagreement'))} Shares are in percent.",
        allow_abbrev=False,
    )
    add_trained_models(parser)
    add_data(parser)
    add_device(parser)
    parser.add_argument("--output", type=Path, help="a new JSON file for the scores")
    return parser


def _export() -> CommandParser:
    parser = command_parser(
        "export",
        "Write a trained model for other programs to run, with its class names and preprocessing. It needs "
        "a trained model. The file is checked against PyTorch before it gets its name.",
        allow_abbrev=False,
    )
    add_trained_models(parser)
    parser.add_argument("--output", type=Path, required=True, help="the file or directory to create")
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="onnx",
        help="onnx; torch (torch.export, *.pt2); aot (compiled by AOTInductor for this kind of machine, *.pt2); "
        "executorch (for devices, *.pte); safetensors (a directory for ensemblenet.load); default: %(default)s",
    )
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--head", type=int, metavar="K", help="this head alone, counted from 0 (default: all heads)")
    heads.add_argument("--first", type=positive_integer, metavar="K", help="the first K heads")
    parser.add_argument(
        "--prediction-only",
        action="store_true",
        help="leave out what each head says and the spread between heads, which files of onnx and executorch give too",
    )
    parser.add_argument("--fuse", action="store_true", help="run the heads as one, see docs/heads.md")
    parser.add_argument(
        "--batch-size", type=positive_integer, metavar="N", help="fix it, and all other sizes (default: any size)"
    )
    parser.add_argument("--device", default="cpu", help="what to write the file for, such as cuda (default: cpu)")
    parser.add_argument(
        "--base",
        metavar="NAME",
        help="the base of a saved model that does not know it: a timm name, torchvision:NAME or module.path:callable",
    )
    quantising = parser.add_argument_group("8-bit integers, for onnx; the data is the run's own, or")
    quantising.add_argument(
        "--int8", action="store_true", help="static quantisation; prints the scores on validation data before and after"
    )
    quantising.add_argument(
        "--calibration",
        type=positive_integer,
        default=256,
        metavar="N",
        help="training examples by which the ranges of activations are found (default: %(default)s)",
    )
    add_data(quantising)
    return parser


def _predict() -> CommandParser:
    parser = command_parser(
        "predict",
        "Predict examples with a trained network: those of --data, or without it a split of the data that "
        "the network was trained on.",
        "The file has a row for each example: id, label where it is known, predicted class, its probability, "
        "the spread of that probability over heads, the share of pairs of heads that disagree, and the probabilities "
        "of all classes. For files of YouTube-8M it is instead the CSV file of a submission to the challenge.",
        allow_abbrev=False,
    )
    add_trained_models(parser)
    parser.add_argument("--output", type=Path, required=True, help="the .csv or .parquet file to create")
    parser.add_argument(
        "--data",
        nargs="+",
        help="images or videos: files or folders. TFRecord files of YouTube-8M: files, folders or patterns such as "
        "'test*.tfrecord', remote ones too",
    )
    parser.add_argument(
        "--batch-size", type=positive_integer, default=64, help="of --data, examples at once (default: %(default)s)"
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=2,
        help="processes that read images or videos; 0 for none (default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument(
        "--on-broken", choices=("error", "skip"), default="error", help="for broken examples (default: %(default)s)"
    )
    parser.add_argument("--on-damage", choices=("error", "skip"), help=argparse.SUPPRESS)  # its name in version 0.1
    split = parser.add_argument_group("without --data")
    add_split(split)
    add_data(split, folder=False)
    tags = parser.add_argument_group("for YouTube-8M")
    tags.add_argument("--top", type=positive_integer, default=20, help="classes a video (default: %(default)s)")
    tags.add_argument(
        "--sample-frames",
        action="store_true",
        help="for a saved model of frames: spread its frames over the whole video; a run's folder knows this itself",
    )
    return parser


def _report() -> CommandParser:
    parser = command_parser(
        "report",
        "Evaluate trained networks and write one self-contained HTML page: scores of the whole, of single heads and "
        "of the first heads; training curves, calibration, classes, how heads differ, and on what.",
        allow_abbrev=False,
    )
    add_trained_models(parser, several=True)
    add_split(parser)
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="a new file (default: %(default)s)")
    add_data(parser)
    add_device(parser)
    return parser


PARSERS = {
    "demo": _demo,
    "info": _info,
    "convert": _convert,
    "benchmark": _benchmark,
    "validate": partial(_test, "validate", "validation"),
    "test": partial(_test, "test", "test"),
    "export": _export,
    "predict": _predict,
    "report": _report,
}
