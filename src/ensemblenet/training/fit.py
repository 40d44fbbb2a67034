"""Train from a YAML file, and go on where a run was killed."""

from __future__ import annotations

import gc
import json
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ensemblenet._moved import renamed
from ensemblenet.cost import measure_cost
from ensemblenet.data import load_all
from ensemblenet.errors import TrainingError
from ensemblenet.inputs import Inputs, inputs_and_targets
from ensemblenet.metrics.scores import TASKS
from ensemblenet.recipe import Conversion
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.restore import Describes, expect_classes, store, stored_classes
from ensemblenet.storage.runs import (
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    RESULTS,
    environment,
    quiet_lightning,
    scores_row,
)
from ensemblenet.storage.specs import plain
from ensemblenet.storage.trust import config_option
from ensemblenet.training.module import Classifier
from ensemblenet.training.options import (
    check_replaced,
    replaced_options,
)
from ensemblenet.training.processes import is_first_process
from ensemblenet.training.search import Candidate, candidates, search
from ensemblenet.training.settings import FitCLI, complete_arguments

__all__ = ["fit"]

__getattr__ = renamed(__name__, {"EpochSeed": "ensemblenet.training.callbacks.EpochSeed"})


def fit(arguments: Sequence[str]) -> Path:
    """Train from a configuration, test, and write down the results.

    Args:
        arguments: command-line arguments.

    Returns:
        The run's folder.

    Raises:
        TrainingError: bad arguments, nothing to resume, a run that another process is writing or that was made
            with other settings, or a loss that became non-finite.
    """
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # it takes them for the user's
    with ExitStack() as held:
        cli = _opened(arguments, held)
        if cli.config["plan"] == "search":
            # what is stored was checked or typed before
            found = [*config_option(cli.folder / CONFIG, trust=True), *_arguments(_searched(cli))]
            cli = _opened(found, held, cli.folder)
        return _finished(cli)


def _finished(cli: FitCLI) -> Path:
    """The folder of a run after its training, its test and its results."""
    folder, module, data = cli.folder, cli.model, cli.datamodule
    if is_first_process():
        write_json(folder / ENVIRONMENT, environment())
    _train(cli)
    with _lightning_errors():
        [metrics] = cli.trainer.test(module, data, verbose=False)
    if not is_first_process():
        return folder
    if batches := cli.config["trainer"]["fast_dev_run"]:
        print(f"A trial of {int(batches)} batch(es): it keeps no results.")
        return folder
    description = data.description() if isinstance(data, Describes) else {}
    store(module.network, module.task, Inputs.of(module.example_inputs), description, folder)
    row = _row(cli, metrics)
    write_json(folder / RESULTS, {"rows": [row]})
    return folder


def _opened(arguments: Sequence[str], held: ExitStack, folder: Path | None = None) -> FitCLI:
    """A run that is ready to begin, or to go on; its folder is this process's until held ends."""
    quiet_lightning()
    check_replaced(replaced_options(arguments))
    complete = complete_arguments(arguments)
    load_all()
    try:
        with _lightning_errors():
            return FitCLI(complete, held, folder)
    except ArgumentError as error:
        raise TrainingError(plain(error)) from error
    except ValueError as error:  # of a class that the configuration names; jsonargparse wraps it at length
        raise TrainingError(str(_innermost(error))) from error


@contextmanager
def _lightning_errors() -> Iterator[None]:
    """What Lightning itself raises is of options that it cannot follow; errors of other code keep their traceback."""
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith("lightning."):
            raise
        raise TrainingError(str(error) or f"Lightning's {frame.f_code.co_qualname} failed.") from error


def _train(cli: FitCLI) -> None:
    checkpoint = cli.folder / CHECKPOINT
    resumed = str(checkpoint) if checkpoint.exists() else None
    expect_classes(stored_classes(cli.folder), cli.datamodule)
    try:
        with _lightning_errors():
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"A process that loads data died: {error} If memory ran out, use fewer num_workers or smaller batches."
        ) from error
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    if cli.trainer.global_step == 0 and 0 not in (cli.trainer.max_epochs, cli.trainer.max_steps):
        raise TrainingError(
            "The run ended before its first step, so nothing was trained: see whether trainer.max_time or a callback "
            "stopped it, and whether the data fills one batch. For the untrained network, use --trainer.max_epochs 0."
        )


def _searched(cli: FitCLI) -> Candidate:
    """The plan that short runs in a folder within the run's chose."""
    if cli.trainer.world_size > 1:
        raise TrainingError("--plan search runs in one process; train the plan that it finds in several.")
    epochs = cli.config["trainer"]["max_epochs"]
    if epochs is None:
        raise TrainingError("--plan search shortens runs by epochs: give --trainer.max_epochs.")
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    inputs, _ = inputs_and_targets(next(iter(cli.datamodule.train_dataloader())))
    among = candidates(cli.model.network, inputs, cli.model.conversion or Conversion())

    def score(candidate: Candidate, length: int) -> float:
        where = ["--runs", str(cli.folder / "search"), "--name", f"{candidate.name}-{length}-epochs"]
        short = ["--resume", "auto", *where, "--trainer.max_epochs", str(length)]
        with ExitStack() as held:
            stored = config_option(cli.folder / CONFIG, trust=True)
            proxy = _opened([*stored, *short, *_arguments(candidate)], held)
            _train(proxy)
            [metrics] = proxy.trainer.validate(proxy.model, proxy.datamodule, verbose=False)
        gc.collect()  # trainers and modules refer to each other: those of earlier runs would fill the memory
        return metrics[f"val/{TASKS[proxy.model.task].main}"]

    return search(cli.folder, among, epochs, score)


def _arguments(chosen: Candidate) -> list[str]:
    conversion = None if chosen.conversion is None else asdict(chosen.conversion)
    return ["--plan", "given", "--model.conversion", json.dumps(conversion)]


def _innermost(error: BaseException) -> BaseException:
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _row(cli: FitCLI, metrics: Mapping[str, float]) -> dict[str, Any]:
    module: Classifier = cli.model
    cost = measure_cost(module.network, cli.trainer.precision_plugin.convert_input(module.example_inputs))
    method = "base" if module.conversion is None else "ensemblenet"
    test = {key.removeprefix("test/"): value for key, value in metrics.items() if key.startswith("test/")}
    if module.task == "multilabel":
        scores = {name: [100 * test[name]] for name in ("gap", "head_gap", "map")}
    else:
        scores = {f"{head}error": [100 * (1 - test[f"{head}accuracy"])] for head in ("", "head_")}
    seed, limited = cli.config["seed_everything"], _tested_on(cli)
    return scores_row(method, cost, scores, num_heads=module.num_heads, seed=seed, test=test, **limited)


def _tested_on(cli: FitCLI) -> dict[str, str]:
    """The mark of a result that is not of a whole test split of its own."""
    limit = cli.trainer.limit_test_batches  # a number of batches, or a share of them
    part = f"{limit} batches of " if isinstance(limit, int) else f"{limit:.3g} of " if limit < 1 else ""
    validation = getattr(cli.datamodule, "tests_on_validation", False)
    split = "the validation data, as there is no test split" if validation else "the test data"
    return {"tested_on": f"{part}{split}"} if part or validation else {}
