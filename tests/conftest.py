"""Shared settings of all tests."""

import logging
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread: two runs of one seed are then the same to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    for name, seconds in {"FIRST_WAIT": 0.02, "DEADLINE": 0.3, "SILENCE": 0.3}.items():
        monkeypatch.setattr(remote, name, seconds)
    return settings
