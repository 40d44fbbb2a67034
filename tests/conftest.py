"""Shared settings of all tests."""

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
