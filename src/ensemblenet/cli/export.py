"""The command `export`: write a trained model for other programs to run."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from ensemblenet.cli.options import add_trained_models, check_new, command_parser, positive_integer
from ensemblenet.deploy.export import Exported, Format
from ensemblenet.deploy.export import export as export_model
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ExportError
from ensemblenet.heads import fuse
from ensemblenet.models.sources import create
from ensemblenet.storage.restore import restore

__all__ = ["export"]


def export(arguments: Sequence[str]) -> Path:
    """Write a trained model, check the file against PyTorch, and print how the two compare.

    Args:
        arguments: command-line arguments.

    Returns:
        The file, or the directory.

    Raises:
        ExportError: a model that the format cannot hold, or a file that differs from PyTorch.
        LoadError: there is no model to load.
        FileExistsError: the output exists.
    """
    options = _parser().parse_args(arguments)
    check_new(options.output, "path")
    base = create(options.base) if options.base else None
    restored = restore(options.model, base, trust=options.trust)
    network = restored.network
    if options.fuse:
        if not isinstance(network, EnsembleNet):
            raise ExportError(f"{options.model} is a single network and has no heads to fuse.")
        network = fuse(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters, about their own parts
        exported = export_model(
            network.to(options.device),
            options.output,
            options.format,
            example_inputs=None if isinstance(network, EnsembleNet) else restored.inputs.zeros(),
            head=options.head,
            first=options.first,
            batch_size=options.batch_size,
            description=restored.description,
            base=base,
        )
    _show(exported, options.device)
    return exported.path


def _show(exported: Exported, device: str) -> None:
    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else device
    table = Table(title=f"{exported.path.name}: {exported.size / 1e6:,.2f} MB", caption=f"medians; {where}")
    for column in ("prediction of", "PyTorch, ms", f"{exported.format}, ms"):
        table.add_column(column, justify="right")
    for size, seconds in exported.seconds.items():
        table.add_row(str(size), *(f"{1000 * value:.2f}" for value in seconds))
    console = Console()
    console.print(table)
    console.print(
        f"Outputs agree with PyTorch within {exported.difference:.1g} of the largest: {exported.path}",
        highlight=False,
        soft_wrap=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "export",
        "Write a trained model for other programs to run, with its class names and preprocessing. It needs "
        "a trained model. The file is checked against PyTorch before it gets its name.",
    )
    add_trained_models(parser)
    parser.add_argument("--output", type=Path, required=True, help="the file or directory to create")
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="onnx",
        help="onnx; torch (torch.export, *.pt2); aot (compiled by AOTInductor for this kind of machine, *.pt2); "
        "safetensors (a directory for ensemblenet.load); default: %(default)s",
    )
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--head", type=int, metavar="K", help="this head alone, counted from 0 (default: all heads)")
    heads.add_argument("--first", type=positive_integer, metavar="K", help="the first K heads")
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
    return parser
