"""What each head inherits of a trained base: which channels of its layers, and which block's values in which place.

Shapes: N examples, C channels, * any dimensions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ensemblenet.conversion.blocks import Block, Run, runs_behind, tensors_of_twins
from ensemblenet.conversion.build import HeadDesign
from ensemblenet.conversion.trace import GraphRunner, NodeError, Trace, arguments, pick
from ensemblenet.ensemble import as_tuple
from ensemblenet.errors import ConversionError, EnsembleNetError, first_line
from ensemblenet.functional import codistillation
from ensemblenet.inputs import Inputs, Tree, call, inputs_and_targets, tensors_in, to_device
from ensemblenet.operations.axes import Axis
from ensemblenet.recipe import Importance, Recipe

__all__ = ["Batches", "Inheritance", "batches_of", "deal", "telling"]

Batches = Sequence[tuple[Tree, Tensor]]
_SHARED = 0.5


def batches_of(calibration: Iterable[Any], trace: Trace) -> Batches:
    """The batches of a loader, as the traced network takes its inputs and on its device.

    Raises:
        ConversionError: there are none, they are no pairs of inputs and targets, or the inputs are of another form.
    """
    device = trace.tensors[0].device
    try:
        pairs = [inputs_and_targets(batch) for batch in calibration]
        found = [(_like(trace.inputs, inputs), targets.to(device)) for inputs, targets in pairs]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConversionError(
            f"calibration must be a loader of batches, each of inputs as in example_inputs, "
            f"{', '.join(map(str, trace.inputs.tensors))}, and of targets: {first_line(error)}"
        ) from error
    if not found:
        raise ConversionError("calibration has no batches: give a loader of some, each of inputs and targets.")
    return [(to_device(inputs, device), targets) for inputs, targets in found]


def _like(expected: Inputs, inputs: Tree) -> Tree:
    """Inputs as others, in their order and without what these have not."""
    if isinstance(expected.tree, dict):
        inputs = {name: inputs[name] for name in expected.tree}
    got = Inputs.of(inputs)
    ranks = [[len(spec.whole(1)) for spec in one.tensors] for one in (got, expected)]
    if got.tree != expected.tree or ranks[0] != ranks[1]:
        raise ValueError(f"got inputs of {', '.join(map(str, got.tensors))}.")
    return inputs


@contextmanager
def telling(what: str, inputs: Tree, targets: Tensor | None = None) -> Iterator[None]:
    """Say on which calibration batch something fails, in one line."""
    try:
        yield
    except EnsembleNetError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NodeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs))
        with_targets = "" if targets is None else f" and targets of shape {tuple(targets.shape)}"
        raise ConversionError(
            f"{what} fails on a calibration batch of shape {shapes}{with_targets}: {first_line(error)}"
        ) from error


def deal(order: Sequence[int], number: int, head: int, num_heads: int) -> list[int]:
    """The positions that one of some heads keeps, in order.

    The most important go to every head: half of what it keeps, or fewer where other positions would be kept by no head
    that could be kept by one. The others are dealt out in turns, there and back again, so that no head has the best of
    each turn; who has room for more takes the next one's.

    Args:
        order: the positions, the most important first.
        number: how many each head keeps.
        head: which of the heads.
        num_heads: how many heads share them.

    Example:
        >>> [deal([4, 3, 2, 1, 0], 3, head, 2) for head in (0, 1)]
        [[0, 3, 4], [1, 2, 4]]
    """
    if num_heads == 1:
        return sorted(order[:number])
    shared = int(_SHARED * number)
    if num_heads * number >= len(order):
        shared = min(shared, (num_heads * number - len(order)) // (num_heads - 1))
    others = order[shared:]

    def turns_away(place: int) -> int:
        lap, turn = divmod(place, num_heads)
        return ((num_heads - 1 - turn if lap % 2 else turn) - head) % num_heads

    places = sorted(range(len(others)), key=lambda place: (turns_away(place), place))
    return sorted([*order[:shared], *(others[place] for place in places[: number - shared])])


class Inheritance:
    """What the heads inherit.

    Channels that are one and the same unknown of the equations are a group; heads keep the most important ones of each
    group, see [`deal`][ensemblenet.conversion.importance.deal]. A group's scores are, with the values of all its
    parameters side by side, for each channel the L2 norm of

    - "magnitude": weights and normalisations' scales;
    - "scale": normalisations' scales; where a group has none, as "magnitude";
    - "taylor": parameters times their gradients: the first-order change of the loss without them, root mean square over
      batches (Molchanov et al. 2019, arXiv 1906.10771);

    "loss" is as "taylor"; "random" makes all equal, and chance decides between equals.

    Where heads are without blocks of a run, those that stay may take the values of any blocks of the run but the first,
    if these differ in nothing else; importance is then how much a block turns what flows through it: one minus the
    cosine of its input and output, mean over examples (Gromov et al. 2024, arXiv 2403.17887); by "loss", the base's
    loss where the block is left out. Without batches it is the norm of its parameters. Where nothing is asked of
    importance, the blocks that stay keep their own values.

    Args:
        base: the trained network.
        design: of the heads.
        recipe: of the model.
        runs: of the base's blocks.
        importance: as for `convert`.
        batches: for calibration; none where there are none.
        anew: names of parameters in which nothing was learned, so that each head draws its own.

    Attributes:
        anew: names of parameters that each head draws anew.
        design: of the heads.
        shape: of the heads.
        moved: for each head, by the names of parameters and buffers, those whose values it takes in their places.

    Raises:
        ConversionError: "taylor" or "loss" without batches, "scale" without normalisations, batches that the base does
            not take.
    """

    def __init__(
        self,
        base: nn.Module,
        design: HeadDesign,
        recipe: Recipe,
        runs: Sequence[Run],
        importance: Importance | None = None,
        batches: Batches = (),
        anew: AbstractSet[str] = frozenset(),
    ) -> None:
        self.anew = anew
        self.design = design
        self.shape = recipe.head
        self.moved: list[dict[str, str]] = [{} for _ in range(recipe.num_heads)]
        self._base = getattr(base, "_orig_mod", base)  # of torch.compile
        self._recipe = recipe
        self._batches = batches
        has_loss = batches and not anew and not isinstance(recipe.output, tuple)  # of one output, that was learned
        self._importance: Importance = importance or ("taylor" if has_loss else "magnitude")
        self._generator = torch.Generator().manual_seed(recipe.seed)
        self._orders: dict[_Key, list[int]] = {}
        if self.shape.dropped and (importance is not None or batches):
            self._move_blocks(runs_behind(runs, design.cut))
        # by unknown, the parameters that it is in: name, dimension, and place among the unknowns of that
        self._members: dict[Axis, list[tuple[str, int, int]]] = defaultdict(list)
        for name, axes in design.parameters.items():
            for dim, axis in enumerate(axes):
                for place, unknown in enumerate(dict.fromkeys(axis.unknowns())):
                    self._members[unknown].append((name, dim, place))
        self._owners: dict[_Key, list[int]] = defaultdict(list)
        for head in range(recipe.num_heads):
            for key in {self._key(head, unknown) for unknown in self._members}:
                self._owners[key].append(head)

    def tensor(self, head: int, name: str, own: Tensor) -> Tensor:
        """The parameter or buffer of the base whose values a head takes in the place of one, which may be its own."""
        return self.design.trace.tensor(self.moved[head][name]) if name in self.moved[head] else own

    def positions(self, head: int, unknown: Axis, number: int) -> list[int]:
        """The positions of an unknown that a head keeps, in order."""
        key = self._key(head, unknown)
        if key not in self._orders:
            self._orders[key] = self._order(self._scores(head, unknown))
        owners = self._owners.get(key, range(self._recipe.num_heads))
        return deal(self._orders[key], number, owners.index(head), len(owners))

    @property
    def is_narrow(self) -> bool:
        """Whether heads have lost channels."""
        axes = [axis for own in self.design.parameters.values() for axis in own]
        return any(axis.value(self.shape.size) != axis.size for axis in axes)

    @property
    def is_same(self) -> bool:
        """Whether all heads inherit the same."""
        return not self.anew and not self.is_narrow and all(moved == self.moved[0] for moved in self.moved)

    def rows(self, head: int, name: str, dim: int = 0) -> list[int]:
        """The places along a dimension that a head keeps of a parameter."""
        size_of = self.shape.size
        return self.design.parameters[name][dim].indices(
            lambda unknown: self.positions(head, unknown, size_of(unknown))
        )

    def layer(self, head: int, name: str) -> str:
        """The layer of the base whose weight a head has in the place of another, or in its own."""
        return self.moved[head].get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    # -- channels

    def _key(self, head: int, unknown: Axis) -> _Key:
        """What tells a group from others: where in the base its values come from."""
        members = self._members.get(unknown)
        moved = self.moved[head]
        return (unknown,) if members is None else tuple((moved.get(name, name), *place) for name, *place in members)

    def _order(self, scores: Tensor) -> list[int]:
        """Positions by their scores, the highest first; chance decides between equals."""
        mixed = torch.randperm(len(scores), generator=self._generator)
        return mixed[scores.cpu()[mixed].argsort(descending=True, stable=True)].tolist()

    def _scores(self, head: int, unknown: Axis) -> Tensor:
        for values in self._values:
            group = [
                (source, _channels(values[source], self.design.parameters[name][dim], dim, unknown))
                for name, dim, _ in self._members.get(unknown, [])
                if (source := self.moved[head].get(name, name)) in values
            ]
            if group:
                score = self._importance if callable(self._importance) else _norm
                return _checked(score(group), unknown.size)
        return torch.zeros(unknown.size)

    @cached_property
    def _values(self) -> list[Mapping[str, Tensor]]:
        """By name, the values whose norm counts; of several, the first that a group is in."""
        trace, equations = self.design.trace, self.design.equations
        parameters = {name: own.detach() for name, own in trace.module.named_parameters()}
        if callable(self._importance):
            return [parameters]
        if self._importance == "random":
            return []
        if self._importance in ("taylor", "loss"):
            return [self._first_order(parameters)]
        sources = {name: {moved.get(name, name) for moved in self.moved} for name in parameters}
        scales = {source: parameters[source] for name in equations.scales for source in sources[name]}
        weights = {source: parameters[source] for name in equations.contracted for source in sources.get(name, ())}
        if self._importance == "magnitude":
            return [weights | scales]
        if not scales:
            raise ConversionError(
                'The heads have no normalisation whose scale importance="scale" could read: pass "magnitude".'
            )
        return [scales, weights]

    def _first_order(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters times their gradients, root mean square over batches."""
        self._check_batches()
        names = [name for name, own in parameters.items() if own.is_floating_point()]
        squares = {name: torch.zeros_like(parameters[name]) for name in names}
        was_training = self._base.training
        self._base.eval()
        try:
            for inputs, targets in self._batches:
                leaves = {name: parameters[name].clone().requires_grad_() for name in names}
                # cuDNN's recurrent layers have no gradients in evaluation mode
                with (
                    torch.enable_grad(),
                    torch.backends.cudnn.flags(enabled=False),
                    telling("The base's loss", inputs, targets),
                ):
                    loss = self._loss(leaves, inputs, targets)
                    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        squares[name] += (parameters[name] * gradient).square() / len(self._batches)
        finally:
            self._base.train(was_training)
        return {name: square.sqrt() for name, square in squares.items()}

    def _check_batches(self) -> None:
        if not self._batches:
            raise ConversionError(
                f'importance="{self._importance}" needs data: pass calibration=, a loader of inputs and targets.'
            )

    def _loss(self, parameters: dict[str, Tensor], inputs: Tree, targets: Tensor) -> Tensor:
        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self._base, parameters, args, kwargs)

        return self._loss_of(pick(call(run, inputs), self._recipe.output), targets)

    def _loss_of(self, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        if len(outputs) > 1:
            raise ConversionError(
                f'importance="{self._importance}" needs the loss of one output; give a function for several.'
            )
        return codistillation(outputs[0].unsqueeze(0), targets, 1.0, self._recipe.task)

    # -- blocks

    def _move_blocks(self, runs: Iterable[Run]) -> None:
        """Choose which blocks' values each head takes."""
        runs = [run for run in runs if any(block.names in self.shape.dropped for block in run.blocks)]
        scores = iter(self._block_scores([block for run in runs for block in run.blocks[1:]]))
        for run in runs:
            blocks = run.blocks[1:]
            order = self._order(torch.tensor([next(scores) for _ in blocks]))
            places = [place for place, block in enumerate(blocks) if block.names not in self.shape.dropped]
            names = tensors_of_twins(blocks)
            if names is None:
                continue
            for head, moved in enumerate(self.moved):
                sources = deal(order, len(places), head, self._recipe.num_heads)
                for place, source in zip(places, sources, strict=True):
                    moved.update(zip(names[place], names[source], strict=True))

    def _block_scores(self, blocks: Sequence[Block]) -> list[float]:
        if self._importance == "random":
            return [0.0 for _ in blocks]
        if self._importance == "loss":
            self._check_batches()
            return [self._loss_without(block) for block in blocks]
        if self._batches:
            return _turns(self.design.trace, blocks, self._batches)
        read = [[p for node in block.nodes for p in block.begin.flow.parameters_read(node)] for block in blocks]
        return [sum(p.detach().square().sum().item() for p in own) for own in read]

    def _loss_without(self, block: Block) -> float:
        """The base's loss where a block gives what it takes, mean over batches."""
        trace, losses = self.design.trace, []
        runner = _Without(trace, block)
        for inputs, targets in self._batches:
            with torch.no_grad(), telling("The base's loss", inputs, targets):
                outputs = runner.run(*arguments(trace.inputs, tensors_in(inputs)))
                losses.append(self._loss_of(as_tuple(outputs), targets).item())
        return sum(losses) / len(losses)


_Key = tuple[Any, ...]


def _channels(values: Tensor, axis: Axis, dim: int, unknown: Axis) -> Tensor:
    """The values of each position of an unknown that one dimension is made of, (positions, *)."""
    coordinates = torch.tensor(axis.coordinates(unknown), device=values.device)
    order = coordinates.argsort(stable=True)[int((coordinates < 0).sum()) :]
    return values.movedim(dim, 0)[order].reshape(unknown.size, -1)


def _norm(group: Sequence[tuple[str, Tensor]]) -> Tensor:
    norms = [torch.linalg.vector_norm(values.abs(), dim=1, dtype=torch.float64) for _, values in group]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _checked(scores: Any, size: int) -> Tensor:
    """The scores of a group, which may be a user's."""
    if not isinstance(scores, Tensor) or scores.shape != (size,) or scores.isnan().any():
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ConversionError(f"importance must give a number for each of {size} channels, shape ({size},), got {got}.")
    return scores.detach()


class _Turns(GraphRunner):
    """Runs a network and notes, for each example, one minus the cosine of what blocks take and what they give."""

    def __init__(self, trace: Trace, blocks: Sequence[Block]) -> None:
        super().__init__(fx.GraphModule(trace.module, trace.graph).eval())
        self.turns: dict[str, list[Tensor]] = {block.end.node.name: [] for block in blocks}
        self._begins = {block.end.node.name: block.begin.node.name for block in blocks}
        self._taken: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.name in self._begins:
            taken = self._taken[self._begins[n.name]]
            self.turns[n.name].append(1 - torch.cosine_similarity(taken, value.flatten(1), dim=1).float())
        if n.name in self._begins.values():
            self._taken[n.name] = value.flatten(1)  # nothing writes into it later: it is a split point
        return value


class _Without(GraphRunner):
    """Runs a network as if a block gave what it takes."""

    def __init__(self, trace: Trace, block: Block) -> None:
        super().__init__(fx.GraphModule(trace.module, trace.graph).eval())
        self._begin, self._end = (cut.node.name for cut in (block.begin, block.end))
        self._taken: Any = None

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.name == self._begin:
            self._taken = value
        return self._taken if n.name == self._end else value


def _turns(trace: Trace, blocks: Sequence[Block], batches: Batches) -> list[float]:
    """How much each block turns what flows through it, mean over examples."""
    runner = _Turns(trace, blocks)
    for inputs, _ in batches:
        with torch.no_grad(), telling("The base", inputs):
            runner.run(*arguments(trace.inputs, tensors_in(inputs)))
    return [torch.cat(runner.turns[block.end.node.name]).mean().item() for block in blocks]
