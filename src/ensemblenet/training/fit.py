"""Train from a YAML file, and go on where a run was killed."""

from __future__ import annotations

import gc
import json
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ensemblenet._moved import renamed
from ensemblenet.cost import measure_cost
from ensemblenet.data import load_all
from ensemblenet.errors import EnsembleNetError, TrainingError
from ensemblenet.inputs import Inputs, inputs_and_targets
from ensemblenet.metrics.scores import TASKS
from ensemblenet.recipe import Conversion
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.bucket import push
from ensemblenet.storage.restore import Describes, expect_classes, store, stored_classes
from ensemblenet.storage.runs import (
    CONFIG,
    RESULTS,
    quiet_lightning,
    scores_row,
)
from ensemblenet.storage.specs import plain
from ensemblenet.storage.trust import read_config
from ensemblenet.training.checkpoints import whole_checkpoint
from ensemblenet.training.executor import Outcome
from ensemblenet.training.module import Classifier
from ensemblenet.training.options import (
    check_replaced,
    replaced_options,
)
from ensemblenet.training.processes import ending_together, is_first_process
from ensemblenet.training.search import (
    PLAN,
    SEARCH,
    Candidate,
    candidates,
    check_base_run,
    choose,
    show,
    take_over,
    validate,
)
from ensemblenet.training.settings import FitCLI, complete_arguments
from ensemblenet.training.sharding import FullyShardedStrategy

__all__ = ["finished", "fit", "opened", "searched", "tried"]

_NO_DEVICE = r"(?s)^`(\w+?)(?:Accelerator)?` can not run on your system.*"
_NAME_ANOTHER = r"The device cannot be used: this machine has none for \1. Name one that it has, such as --device cpu."

Run = TypeVar("Run", bound=FitCLI)

__getattr__ = renamed(__name__, {"EpochSeed": "ensemblenet.training.callbacks.EpochSeed"})


def fit(arguments: Sequence[str]) -> Path:
    """Train from a configuration, test, and write down the results.

    Args:
        arguments: command-line arguments.

    Returns:
        The run's folder; of a run in a bucket, the one on this machine that stands for it.

    Raises:
        TrainingError: bad arguments, nothing to resume, a run that another process is writing or that was made
            with other settings, or a loss that became non-finite.
    """
    with ExitStack() as held:
        cli = opened(arguments, held)
        with ending_together(cli.trainer.strategy.launcher, cli.advice):
            if cli.config["plan"] == "given":
                return finished(cli)
            return searched(cli, lambda wanted: ((one, tried(cli, one)) for one in wanted))


def finished(cli: FitCLI) -> Path:
    """The folder of a run after its training, its test and its results."""
    folder, module, data = cli.folder, cli.model, cli.datamodule
    if cli.config["base_run"] is not None:
        _check_base_run(cli)
    _train(cli)
    cli.keep_settings()  # where no step was left to train
    strategy = cli.trainer.strategy
    whole = strategy.gathered() if isinstance(strategy, FullyShardedStrategy) else module.network
    with _lightning_errors():
        [metrics] = cli.trainer.test(module, data, verbose=False)
    if not is_first_process():
        return folder
    if batches := cli.config["trainer"]["fast_dev_run"]:
        print(f"A trial of {int(batches)} batch(es): it keeps no results.")
        return folder
    module.network = whole
    description = data.description() if isinstance(data, Describes) else {}
    store(module.network, module.task, Inputs.of(module.example_inputs), description, folder)
    row = _row(cli, metrics)
    write_json(folder / RESULTS, {"rows": [row]})
    push(folder)
    return folder


def opened(arguments: Sequence[str], held: ExitStack, kind: Callable[..., Run] = FitCLI) -> Run:
    """A run that is ready to begin, or to go on; its folder is this process's until held ends.

    Args:
        arguments: command-line arguments.
        held: when it ends, other processes may write the folder.
        kind: makes it of complete arguments, `held` and `trust`.

    Raises:
        TrainingError: as [`fit`][ensemblenet.training.fit.fit] does.
    """
    quiet_lightning()
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # it takes them for the user's
    check_replaced(replaced_options(arguments))
    complete = complete_arguments(arguments)
    load_all()
    try:
        with _lightning_errors():
            return kind(complete, held, trust="--trust" in arguments)
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
        said = str(error) or f"Lightning's {frame.f_code.co_qualname} failed."
        raise TrainingError(re.sub(_NO_DEVICE, _NAME_ANOTHER, said)) from error


def _train(cli: FitCLI) -> None:
    resumed = whole_checkpoint(cli.folder)
    expect_classes(stored_classes(cli.folder), cli.datamodule)
    with _lightning_errors():
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True)
    if cli.trainer.global_step == 0 and 0 not in (cli.trainer.max_epochs, cli.trainer.max_steps):
        raise TrainingError(
            "The run ended before its first step, so nothing was trained: see whether trainer.max_time or a callback "
            "stopped it, and whether the data fills one batch. For the untrained network, use --trainer.max_epochs 0."
        )


def searched(cli: FitCLI, run: Callable[[Sequence[Candidate]], Iterable[tuple[Candidate, Outcome]]]) -> Path:
    """The folder of a run that is the best of its candidates, each of which is a run within it.

    Args:
        cli: the search.
        run: trains candidates, and gives of each what [`tried`][ensemblenet.training.fit.tried] does.
    """
    if cli.trainer.world_size > 1 or cli.config["trainer"]["fast_dev_run"]:
        raise TrainingError("--plan search takes whole runs in one process: one device and no fast_dev_run.")
    cli.keep_settings()
    base_run = cli.config["base_run"]
    note = None if base_run is None else _check_base_run(cli)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    with _lightning_errors():
        if next(iter(cli.datamodule.val_dataloader()), None) is None:
            raise TrainingError("--plan search chooses by validation examples, and the data has none.")
    inputs, _ = inputs_and_targets(next(iter(cli.datamodule.train_dataloader())))
    found = candidates(cli.model.network, inputs, cli.model.conversion or Conversion())
    # the base, trained first, decides on the others
    [(_, base)] = run([Candidate("base", base=None if base_run is None else str(base_run))])
    known = str(base_run or cli.folder / base["run"])
    others = [Candidate(name, asdict(one), known) for name, one in found.items() if one is not None]
    trained = {"base": base} | {one.name: outcome for one, outcome in run(others)}
    outcomes = {name: trained[name] for name in found}
    main = TASKS[cli.model.task].main
    best, ties = choose(outcomes, main)
    plan = {"chosen": best, "score": main, "not_told_apart": ties, "note": note, "candidates": outcomes}
    write_json(cli.folder / PLAN, plan)
    show(outcomes, main, best, ties)
    if note:
        print(note)
    take_over(cli.folder / outcomes[best]["run"], cli.folder)
    push(cli.folder)
    return cli.folder


def tried(cli: FitCLI, candidate: Candidate) -> Outcome:
    """Train a candidate of a search, unless its run is finished, and validate it.

    Args:
        cli: the search; its trainer validates, and its data is set up for training.
        candidate: what to train.

    Returns:
        The `run`, from the search's folder, and what [`ensemblenet.training.search.validate`][] gives.
    """
    known = candidate.conversion is None and candidate.base is not None
    run = Path(str(candidate.base)) if known else _trained(cli, candidate)
    return {"run": os.path.relpath(run, cli.folder), **validate(run, cli.trainer, cli.datamodule)}


def _check_base_run(cli: FitCLI) -> str | None:
    base_run = cli.config["base_run"]
    expect_classes(stored_classes(base_run), cli.datamodule)
    return check_base_run(base_run, read_config(cli.folder / CONFIG, trust=True))


def _trained(cli: FitCLI, candidate: Candidate) -> Path:
    """The folder of a candidate's finished run, which is not trained again."""
    runs, base = cli.folder / SEARCH, candidate.base
    for results in runs.glob(f"{candidate.name}-*/{RESULTS}"):
        return results.parent
    where = ["--resume", "auto", "--runs", str(runs), "--name", candidate.name, "--base_run", base or "null"]
    chosen = ["--plan", "given", "--model.conversion", json.dumps(candidate.conversion)]
    if cli.model.criterion.teacher_weight and cli.model.teacher_folder is None:
        chosen += ["--model.teacher_weight", "null"] if base is None else ["--model.teacher", base, "--trust"]
    with ExitStack() as held:
        # what it names was checked or typed before
        folder = finished(opened(["--config", cli.stored_settings(), *where, *chosen], held))
    gc.collect()  # trainers and modules refer to each other: those of earlier runs would fill the memory
    return folder


def _innermost(error: BaseException) -> BaseException:
    while not isinstance(error, EnsembleNetError) and (inner := error.__cause__ or error.__context__):
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
    more = {"num_heads": module.num_heads, "seed": cli.config["seed_everything"], "test": test}
    if module.conversion is not None:
        more["heads"] = {"run": module.choice.heads, "separate": module.choice.separate}
    return scores_row(method, cost, scores, **more, **_tested_on(cli))


def _tested_on(cli: FitCLI) -> dict[str, str]:
    """The mark of a result that is not of a whole test split of its own."""
    limit = cli.trainer.limit_test_batches  # a number of batches, or a share of them
    part = f"{limit} batches of " if isinstance(limit, int) else f"{limit:.3g} of " if limit < 1 else ""
    validation = getattr(cli.datamodule, "tests_on_validation", False)
    split = "the validation data, as there is no test split" if validation else "the test data"
    return {"tested_on": f"{part}{split}"} if part or validation else {}
