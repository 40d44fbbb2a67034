"""A run on two nodes, as two agents of torchrun on this machine, of which one is lost, or stands still.

    OMP_NUM_THREADS=1 python benchmarks/two_agents.py whole node first worker hang --output FILE

trains heads on MNIST-1D by DistributedDataParallel over Gloo: 2 processes, accumulated gradients, and test examples
that fill no equal batches. `whole` ends undisturbed. In the others something happens after two epochs:

- node: the agent that does not host the rendezvous is killed with its process, and started again;
- first: the same, where that process is the first one, which writes the run's folder;
- worker: its process alone is killed; the agents start both processes again;
- hang: its process is stopped (SIGSTOP), and never goes on; the time limit is 20 s.

Each must end with the weights and scores of `whole`, to the last bit. It prints a line of JSON each, with the seconds
from the blow until training went on, and ends with exit code 1 where a promise of docs/scale.md was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import torch

from ensemblenet.storage.runs import environment

LIMIT = 20  # seconds until a process that stands still is found
PATIENCE = 240  # seconds for a whole run
RUN = [
    *("fit", "mnist1d/ensemblenet", "--num-heads", "2", "--model.heads", "looped", "--runs", "runs"),
    *("--data.init_args.num_train", "1003", "--data.init_args.num_val", "203", "--data.init_args.num_test", "501"),
    *("--data.init_args.batch_size", "10", "--model.base.init_args.width", "16", "--trainer.max_epochs", "7"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "2"),
    *("--trainer.accumulate_grad_batches", "3", "--trainer.enable_progress_bar", "false", "--trainer.strategy"),
]
LIMITED = {
    "class_path": "lightning.pytorch.strategies.DDPStrategy",
    "init_args": {"timeout": f"0:00:{LIMIT}"},
}


class Node:
    """A node of the run: an agent of torchrun, and the processes that it starts.

    Args:
        folder: where it runs, and writes what it says.
        port: where the agents meet.
        name: of its log.
        address: of the node; the lowest one has the first process.
        hosts: whether its agent hosts the rendezvous.
        arguments: of `ensemblenet`.
    """

    def __init__(self, folder: Path, port: int, name: str, address: str, hosts: bool, arguments: list[str]) -> None:
        self.log = folder / f"{name}.log"
        settings = f"is_host={int(hosts)},keep_alive_interval=1"
        agent = [
            *("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"),
            *("--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", f"127.0.0.1:{port}"),
            *("--rdzv-conf", settings, "--local-addr", address, "--monitor-interval", "0.5"),
        ]
        with self.log.open("w") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", *agent, "-m", "ensemblenet", *arguments],
                cwd=folder,
                env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[int]:
        """The numbers of the processes that its agent started."""
        found = subprocess.run(["pgrep", "-P", str(self.agent.pid)], capture_output=True, text=True, check=False)
        return [int(number) for number in found.stdout.split()]

    def signal(self, number: int) -> None:
        """Send a signal to its processes."""
        for process in self.processes():
            os.kill(process, number)

    def lose(self) -> None:
        """Kill the agent and its processes, as where a machine loses power."""
        processes = self.processes()
        self.agent.kill()  # does nothing where it has ended
        self.agent.wait()
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def run(folder: Path, happens: str, strategy: str) -> dict[str, Any]:
    """Train on two nodes while something happens; what came of it."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*RUN, json.dumps(LIMITED) if happens == "hang" else strategy]
    low, high = "127.0.0.1", "127.0.0.2"
    host, other = (high, low) if happens == "first" else (low, high)
    began = time.monotonic()
    nodes = [Node(folder, port, "host", host, True, arguments), Node(folder, port, "other", other, False, arguments)]
    found: dict[str, Any] = {"happens": happens}
    try:
        if happens != "whole":
            wait_until(lambda: any(folder.glob("runs/*/checkpoints/previous.ckpt")), nodes)  # after two epochs
            struck = time.monotonic()
            if happens in ("node", "first"):
                nodes[1].lose()
                nodes[1] = Node(folder, port, "again", other, False, arguments)
            else:
                nodes[1].signal(signal.SIGKILL if happens == "worker" else signal.SIGSTOP)
            wait_until(lambda: "It goes on" in said(folder), nodes)
            found["seconds_until_it_went_on"] = round(time.monotonic() - struck, 1)
            found["it_said"] = re.findall(r"It goes on [^.]+\.", said(folder))
        found["exit_codes"] = [node.agent.wait(PATIENCE) for node in nodes]
        found["seconds"] = round(time.monotonic() - began, 1)
    except TimeoutExpired:
        found["said"] = said(folder)[-2000:]
    finally:
        for node in nodes:
            node.lose()
    return found


def wait_until(happened: Callable[[], bool], nodes: list[Node]) -> None:
    """Wait, as long as no agent has ended."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        time.sleep(0.1)
        if time.monotonic() > deadline or any(node.agent.poll() is not None for node in nodes):
            raise TimeoutExpired("torchrun", PATIENCE)


def said(folder: Path) -> str:
    """What all agents and their processes wrote."""
    return "\n".join(log.read_text() for log in folder.glob("*.log"))


def same(one: Path, other: Path) -> bool:
    """Whether each folder has one run, of the same weights and scores, to the last bit."""
    runs = [list(folder.glob("runs/*")) for folder in (one, other)]
    if [len(found) for found in runs] != [1, 1] or not all((found[0] / "results.json").exists() for found in runs):
        return False
    first, second = (torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for [run] in runs)
    scores = [json.loads((run / "results.json").read_text())["rows"][0]["test"] for [run] in runs]
    return scores[0] == scores[1] and all(torch.equal(value, second[name]) for name, value in first.items())


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("happens", nargs="+", choices=["whole", "node", "first", "worker", "hang"])
    parser.add_argument("--strategy", default="ddp", help="or fsdp2, which takes no `hang`")
    parser.add_argument("--folder", type=Path, help="where runs and logs stay; a temporary one by default")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        rows = [run(folder / "whole", "whole", options.strategy)]
        for happens in options.happens:
            if happens != "whole":
                row = run(folder / happens, happens, options.strategy)
                rows.append(row | {"same_as_whole": same(folder / "whole", folder / happens)})
    for row in rows:
        print(json.dumps(row))
    if options.output:
        options.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    kept = [row.get("exit_codes") == [0, 0] and row.get("same_as_whole", True) for row in rows]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
