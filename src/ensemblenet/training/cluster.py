"""A Ray cluster that others run: how this process joins it, and what its nodes have."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

from ensemblenet.errors import TrainingError
from ensemblenet.extras import require

__all__ = ["REPEATS", "board", "check_address", "check_versions", "go_to", "joined", "nodes", "versions"]

REPEATS = 3  # times that something is run again whose node or process died
_ANSWER = 5.0  # seconds within which an address must take a connection
# Of this process alone. Ray would try an address that nobody answers for half an hour.
_OWN = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_server_port_wait_time_s": "1"}


def check_address(address: str) -> None:
    """Refuse what is no address of a cluster.

    Args:
        address: "auto" is the cluster that this machine is a node of; HOST:PORT names one that this machine is a node
            of; ray://HOST:PORT is the client's server of any other.

    Raises:
        TrainingError: it has another form.

    Example:
        >>> check_address("ray://head:10001")
    """
    if not re.fullmatch(r"auto|(ray://)?[^/\s]+:\d{1,5}", address):
        raise TrainingError(f"--address must be auto, HOST:PORT or ray://HOST:PORT, got {address!r}.")


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Within it this process is a driver of the cluster; one that was connected before stays so.

    Args:
        address: as [`check_address`][ensemblenet.training.cluster.check_address] takes it.

    Raises:
        TrainingError: no cluster, or one of another version.
        MissingExtraError: Ray is not installed.
    """
    require("ray", "ray")
    for name, value in _OWN.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    _join(address)
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[Mapping[str, float]]:
    """The resources of each node that lives, by name."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def versions() -> dict[str, str]:
    """Of what decides a figure; builds for other devices (`2.11.0+cpu`) count as one."""
    return {name: version(name).partition("+")[0] for name in ("ensemblenet", "torch")}


def check_versions(of_driver: Mapping[str, str]) -> None:
    """Refuse to work on a node whose versions are not the driver's.

    Raises:
        TrainingError: they are not.
    """
    if (here := versions()) != of_driver:
        raise TrainingError(f"it has {_named(here)}, the driver {_named(of_driver)}. Install the same on all nodes.")


def board() -> Any:
    """An actor that keeps what processes of the nodes tell it until this one reads it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Board:  # in here it is sent as it stands: its process need not import PyTorch
        def __init__(self) -> None:
            self.told: list[Any] = []

        def tell(self, item: Any) -> None:
            self.told.append(item)

        def read(self) -> list[Any]:
            """What was told since the last call."""
            told, self.told = self.told, []
            return told

    # beside the driver: on another node it could die with that
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1)(Board).remote()


def go_to(folder: str) -> None:
    """On a node: let relative paths be the driver's, where its folder is shared."""
    with suppress(OSError):
        os.chdir(folder)


def _named(numbers: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {number}" for name, number in numbers.items())


def _join(address: str) -> None:
    import ray
    from ray.exceptions import RayError

    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
        except (OSError, OverflowError) as error:
            raise TrainingError(
                f"Nothing answers at --address {address}: {getattr(error, 'strerror', None) or error}. "
                "`ray start --head` begins a cluster and prints its address; `ray status` asks one."
            ) from error
    is_main = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, AssertionError, RayError) as error:
        said = " ".join(str(error).split())
        raise TrainingError(
            f"No Ray cluster can be used at --address {address}: {said} "
            "From a machine that is no node of it, --address is ray://HOST:10001."
        ) from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's would end with its number as the exit code
