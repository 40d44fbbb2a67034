"""FSDP2: weights, gradients and the optimizer's state of trunk and heads in shares, one on each device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import TrainingError

__all__ = ["FSDP2", "FullyShardedStrategy", "check_sharding"]

FSDP2 = "fsdp2"  # its name as `trainer.strategy`


# FSDP2 would break where heads' outputs were changed in place, and nothing here does so
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDP\w+\) returned a view tensor")


def check_sharding(options: Mapping[str, Any], ema: float | None) -> None:
    """Refuse other ways to shard than FSDP2, and what does not go with it.

    Args:
        options: of Lightning's Trainer, by name.
        ema: the decay of averaged weights.

    Raises:
        TrainingError: what to use.

    Example:
        >>> check_sharding({"strategy": "fsdp", "sync_batchnorm": False}, None)
        Traceback (most recent call last):
            ...
        ensemblenet.errors.TrainingError: trainer.strategy fsdp: fit shards by FSDP2; use --trainer.strategy fsdp2.
    """
    strategy = options["strategy"]
    if strategy != FSDP2 and not isinstance(strategy, FullyShardedStrategy):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        if name.startswith("fsdp") or isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
            raise TrainingError(f"trainer.strategy {name}: fit shards by FSDP2; use --trainer.strategy {FSDP2}.")
        return
    for setting, is_given in (("ema", ema is not None), ("trainer.sync_batchnorm", options["sync_batchnorm"])):
        if is_given:
            raise TrainingError(f"{setting} works on whole networks, not with trainer.strategy {FSDP2}: use ddp.")


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards trunk, each head and the rest over all processes; checkpoints are whole, as those of one process.

    Args:
        timeout: after which a process that does not answer ends the run.
        process_group_backend: of `torch.distributed`; None takes that of the device.
    """

    def __init__(self, timeout: timedelta = default_pg_timeout, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._whole: nn.Module | None = None

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size
        module = self.lightning_module
        assert module is not None
        module.configure_model = self._shard  # the hook that Lightning calls when the network is made

    def _shard(self) -> None:
        network = self._network
        if isinstance(network, FSDPModule):  # testing comes after training
            return
        if self.is_global_zero:
            self._whole = deepcopy(network)
        parts = (network.trunk, *network.heads) if isinstance(network, EnsembleNet) else ()
        for part in (*parts, network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    @property
    def _network(self) -> nn.Module:
        assert self.lightning_module is not None
        network = self.lightning_module.network
        assert isinstance(network, nn.Module)
        return network

    # Checkpoints are read and written as by other strategies, so that a run may change its own. Lightning's way would
    # number the optimizer's parameters otherwise.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for the optimizer's state."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it as a whole."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take the process's own share of the weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state; all processes call it."""
        state = optimizer.state_dict()
        whole = {number: {name: _whole(value) for name, value in own.items()} for number, own in state["state"].items()}
        return state | {"state": whole}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the process's own share of the state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {
                number: {name: _share(value, parameters[number]) for name, value in own.items()}
                for number, own in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": shares})

    def on_validation_start(self) -> None:
        """Let all processes evaluate the same network: statistics of normalisation are no weights, and not shared."""
        for buffer in self._network.buffers():
            dist.broadcast(buffer, 0)

    def on_test_start(self) -> None:
        """The same."""
        self.on_validation_start()

    def gathered(self) -> nn.Module:
        """The network as it was before it was sharded, with the weights of now, in the first process; all call it."""
        state = self.lightning_module_state_dict()
        if self._whole is None:
            return self._network
        self._whole.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
        return self._whole


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _share(value: Any, parameter: Tensor) -> Any:
    """Of what an optimizer keeps for each number of a parameter."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


StrategyRegistry.register(FSDP2, FullyShardedStrategy, description="FSDP2 of trunk and heads")
