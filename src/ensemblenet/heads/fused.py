"""fuse() and unfuse(): the same model, its heads run as one network or one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import FusionError
from ensemblenet.heads.program import Program, has_hooks
from ensemblenet.heads.stacks import Stack
from ensemblenet.operations import fusing_operation
from ensemblenet.operations.convolution import FusedConvolution

__all__ = ["FusedEnsembleNet", "evaluating", "fuse", "unfuse"]


def fuse(model: EnsembleNet, example_inputs: Tensor | None = None) -> FusedEnsembleNet:
    """The same model, whose K heads run as one network.

    It has the same trunk and the same heads, the very modules, so training one trains the other, and names, state
    dicts, optimizer states, `head(k)` and `first(k)` stay what they were. Convolutions of the heads run as grouped
    ones, linear layers as batched products, normalisations per head; what has no class that says how (see
    [`ensemblenet.operations.register`][]) runs by `torch.vmap`, or one head after another, for that part alone; so do
    layers with hooks, but hooks that come later are not seen. Outputs differ from those of the plain model by rounding
    only. Dropout and stochastic depth are independent for every head, as they were, but draw other random numbers.

    The memory of the heads' parameters and buffers is laid out anew, once, so that those of one name lie side by side.
    Where that is undone, as by `model.to(...)`, the next forward pass does it again.

    Args:
        model: with K heads of the same structure. A fused one is returned as it is.
        example_inputs: shape (N, *). A converted model needs none; one made by hand takes the shapes of its first
            forward pass, but must know them before it is compiled or exported.

    Raises:
        FusionError: the heads differ in more than the values of their parameters.

    Example:
        >>> trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        >>> model = EnsembleNet(trunk, [nn.Linear(16, 3) for _ in range(4)])
        >>> x = torch.randn(5, 8)
        >>> torch.testing.assert_close(fuse(model)(x), model(x))
        >>> list(fuse(model).state_dict()) == list(model.state_dict())
        True
    """
    if isinstance(model, FusedEnsembleNet):
        return model
    fused = _as(FusedEnsembleNet, model)
    fused.graph_of_head = _common_graph(list(model.heads))
    x = example_inputs
    if x is None and model.recipe is not None:
        x = model.recipe.inputs.zeros(2, like=model)
    if x is not None:
        with evaluating(model), torch.no_grad():
            fused.prepare(model.trunk(x))
    return fused


def unfuse(model: EnsembleNet) -> EnsembleNet:
    """The same model, whose heads run one after another; the inverse of [`ensemblenet.fuse`][].

    It has the very modules of the fused model. A plain model is returned as it is.

    Example:
        >>> model = EnsembleNet(nn.Linear(8, 16), [nn.Linear(16, 3) for _ in range(4)])
        >>> unfuse(fuse(model)).heads[2] is model.heads[2]
        True
    """
    return _as(EnsembleNet, model) if isinstance(model, FusedEnsembleNet) else model


def _as(kind: type[EnsembleNet], model: EnsembleNet) -> Any:
    """A model of another class on the same modules, whose modes stay as they are."""
    other = model.with_heads(model.heads, kind)
    other.training = model.training
    return other


class Fusion(NamedTuple):
    """How K heads run as one.

    Attributes:
        program: from the features and the values of the stacks to the outputs (K, N, C, *).
        stacks: the heads' tensors.
        by_vmap: names of operations that run by `torch.vmap`.
        looped: names of operations that run for one head after another.
    """

    program: fx.GraphModule
    stacks: list[Stack]
    by_vmap: list[str]
    looped: list[str]


class FusedEnsembleNet(EnsembleNet):
    """An `EnsembleNet` whose heads run as one network; [`ensemblenet.fuse`][] makes it.

    Copies and pickles are made by way of the plain model.

    Attributes:
        fusion: how the heads run; None before the first forward pass of a model that was made by hand.

    Example:
        >>> model = fuse(EnsembleNet(nn.Identity(), [nn.Linear(8, 3) for _ in range(2)]), torch.randn(4, 8))
        >>> type(model).__name__, len(model.fusion.stacks), model.fusion.looped
        ('FusedEnsembleNet', 2, [])
    """

    graph_of_head: fx.Graph
    fusion: Fusion | None = None

    def prepare(self, features: Tensor) -> None:
        """Write the program for features of that shape, (N, *)."""
        graph = self.graph_of_head
        try:
            examples = _examples(self.heads[0], graph, features)
        except Exception:  # what it does depends on more than shapes; a real mistake shows when the head runs
            graph = _whole_head()
            examples = {node: _fake(features) for node in graph.nodes if node.op == "placeholder"}
        program = Program(list(self.heads), graph, examples, _tied(self))
        self.fusion = Fusion(program.write(), program.stacks, program.by_vmap, program.looped)
        self._join()

    @property
    def convolutions(self) -> dict[str, FusedConvolution]:
        """The convolutions that can run grouped or head by head, by name."""
        modules = self.fusion.program.named_modules() if self.fusion else ()
        return {name: part for name, part in modules if isinstance(part, FusedConvolution) and part.can_separate}

    def separate(self, names: Collection[str], training: bool) -> None:
        """Run those convolutions head by head and the others grouped, with gradients or without.

        [`ensemblenet.heads.tune`][] finds out which are faster so.
        """
        for name, layer in self.convolutions.items():
            layer.separate[training] = name in names

    def _run_heads(self, features: Tensor) -> Tensor:
        if self.fusion is None:
            if torch.compiler.is_compiling():
                raise FusionError(
                    "The shapes of this model, made by hand, are not known: call it once before it is compiled or "
                    "exported, or fuse(model, example_inputs)."
                )
            self.prepare(features)
        assert self.fusion is not None
        return self.fusion.program(features, *(stack.value() for stack in self.fusion.stacks))

    def _join(self) -> None:
        for stack in self.fusion.stacks if self.fusion else ():
            stack.join()

    def _apply(self, fn: Any, recurse: bool = True) -> FusedEnsembleNet:
        super()._apply(fn, recurse)
        self._join()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`, with `assign=True` too."""
        result = super().load_state_dict(*args, **kwargs)
        self._join()
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        layers = self.convolutions.items()
        separate = {mode: [name for name, layer in layers if layer.separate[mode]] for mode in (True, False)}
        return _fused_again, (unfuse(self), separate)


def _fused_again(model: EnsembleNet, separate: dict[bool, list[str]]) -> FusedEnsembleNet:
    fused = fuse(model)
    for training, names in separate.items():
        fused.separate(names, training)
    return fused


def _examples(head: nn.Module, graph: fx.Graph, features: Tensor) -> dict[fx.Node, Any]:
    """The outputs of a head's nodes for such features, as fake tensors: nothing is computed."""
    examples: dict[fx.Node, Any] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            examples[n] = super().run_node(n)
            return examples[n]

        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return head.get_submodule(target)(*args, **kwargs)  # "" is the head itself

    x = _fake(features)
    with evaluating(head), x.fake_mode, torch.no_grad():
        Keeping(head, graph=graph).run(x)
    return examples


def _fake(tensor: Tensor) -> FakeTensor:
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(tensor.detach())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode for a while, so that nothing in a module changes.

    The caller may be under autocast, which keeps the weights that it has cast for later calls. What a probe casts must
    not stay there: fake tensors, and casts without a gradient.
    """
    training = [part for part in module.modules() if part.training]
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    for part in training:
        part.training = False
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caches)
        for part in training:
            part.training = True


def _tied(model: EnsembleNet) -> set[int]:
    """The ids of tensors that several heads have, or a head and the trunk."""
    parts = (model.trunk, *model.heads)
    count = Counter(id(tensor) for part in parts for tensor in {*part.parameters(), *part.buffers()})
    return {key for key, times in count.items() if times > 1}


# -- the heads' graph


def _common_graph(heads: Sequence[nn.Module]) -> fx.Graph:
    """The graph of the first head, which must be that of all."""
    first = _structure(heads[0])
    for k, head in enumerate(heads):
        other = _structure(head)
        if other != first:
            where = next((f"{a} and {b}" for a, b in zip(first, other, strict=False) if a != b), "their lengths")
            raise FusionError(
                f"fuse() needs heads of one structure, but heads 0 and {k} differ: {where}. Such a model runs its "
                "heads one after another; leave it as it is."
            )
    return _whole_head() if any(has_hooks(head, recurse=False) for head in heads) else _graph(heads[0])


def _structure(head: nn.Module) -> list[str]:
    """All of a head except its tensors' values, as lines of text."""
    layers = [
        (name or "head", f"{type(layer).__qualname__}({layer.extra_repr()})") for name, layer in head.named_modules()
    ]
    tensors = [
        (name, f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}")
        for name, tensor in (*head.named_parameters(), *head.named_buffers())
    ]
    graph = str(head.graph).splitlines() if isinstance(head, fx.GraphModule) else []
    return [*(f"{name}: {what}" for name, what in (*layers, *tensors)), *graph]


class _Tracer(fx.Tracer):
    """Keeps layers whole that can be fused."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return fusing_operation(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _graph(head: nn.Module) -> fx.Graph:
    """A head's graph: its own, one traced in both modes, or a call of the whole head."""
    if isinstance(head, fx.GraphModule):
        return head.graph
    modes = [part.training for part in head.modules()]
    graphs = []
    for training in (True, False):
        head.train(training)
        try:
            graphs.append(_Tracer().trace(head))
        except Exception:  # whatever keeps it from being traced
            graphs = []
            break
    for part, training in zip(head.modules(), modes, strict=True):
        part.training = training
    if graphs and str(graphs[0]) == str(graphs[1]):
        return graphs[0]
    return _whole_head()


def _whole_head() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_module("", (graph.placeholder("features"),)))
    return graph
