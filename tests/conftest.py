"""Shared settings of all tests: each starts from the same seeds, and the process is afterwards as it was before."""

import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parent))

# The same examples each time, however busy the machine is.
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background process would ignore

# What a process has once: how it is asked for, and set.
_STATE = [
    (os.getcwd, os.chdir),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    *(
        (partial(getattr, torch.backends.cudnn, name), partial(setattr, torch.backends.cudnn, name))
        for name in ("benchmark", "deterministic", "allow_tf32")
    ),
    *(
        (partial(signal.getsignal, number), partial(signal.signal, number))
        for number in signal.valid_signals() - {signal.SIGCHLD}  # PyTorch handles that from its first DataLoader on
    ),
]


def _seed() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)


def _loggers() -> dict[logging.Logger, tuple[int, list[logging.Handler]]]:
    loggers = [one for one in list(logging.root.manager.loggerDict.values()) if isinstance(one, logging.Logger)]
    return {one: (one.level, list(one.handlers)) for one in loggers}


@contextmanager
def _process_as_before(folders: Path) -> Iterator[None]:
    """Tests must not depend on which ones ran before in their process.

    Args:
        folders: where tests have their folders; modules that were imported from there are forgotten.
    """
    _seed()
    state, environment, path = [get() for get, _ in _STATE], dict(os.environ), list(sys.path)
    loggers, modules = _loggers(), set(sys.modules)
    yield
    for (get, put), before in zip(_STATE, state, strict=True):
        if get() != before:
            put(before)
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    sys.path[:] = path
    for logger, (level, handlers) in loggers.items():
        if logger.level != level:
            logger.setLevel(level)
        logger.handlers[:] = handlers
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folders)):
            del sys.modules[name]


@pytest.fixture(autouse=True, scope="module")
def _module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with _process_as_before(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(autouse=True)
def _test(_module: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with _process_as_before(tmp_path_factory.getbasetemp()):
        yield


def pytest_collectstart() -> None:
    """What a test module draws while it is imported does not depend on the modules before it."""
    _seed()


@pytest.fixture
def one_thread() -> None:
    """PyTorch computes on one thread: two runs of one seed are then the same to the bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nodes() -> "Iterator[Cluster]":
    """Two nodes of a Ray cluster, to which no process is connected yet or one still is."""
    from on_nodes import two_nodes  # Ray takes seconds to import

    with two_nodes() as nodes:
        yield nodes


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow above 20 kB, as on a disk that is full; Python ignores the signal that goes with it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """A server of S3 on this machine; yields the environment in which a process reaches it."""
    from servers import s3_environment, s3_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as server:
        yield s3_environment(server)


@pytest.fixture
def s3(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same, set for this process, with an empty cache and little patience."""
    from ensemblenet.data import remote

    settings = {**s3_server, "ENSEMBLENET_CACHE": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name, seconds in {"FIRST_WAIT": 0.02, "DEADLINE": 0.3}.items():
        monkeypatch.setattr(remote, name, seconds)
    return settings


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new bucket on a server of Google's storage, which this process reaches without rights."""
    from fsspec.config import conf
    from gcsfs.core import GCSFileSystem  # the package's own asks by gRPC, which the server here does not know
    from servers import gcs_server

    for name in ("gs", "gcs"):
        monkeypatch.setitem(conf, name, {"token": "anon"})
        monkeypatch.setitem(vars(sys.modules["fsspec.registry"])["_registry"], name, GCSFileSystem)
    with gcs_server("bucket") as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        GCSFileSystem.clear_instance_cache()  # of another server
        yield "bucket"
    GCSFileSystem.clear_instance_cache()
