"""What timm, torchvision and transformers expect of their models, for models that were converted from theirs.

Shapes: N examples, K heads, C classes, F features of one head, * further dimensions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ensemblenet.errors import EnsembleNetError
from ensemblenet.functional import codistillation, combine_heads

if TYPE_CHECKING:
    from ensemblenet.ensemble import EnsembleNet
    from ensemblenet.inputs import Inputs

__all__ = ["Family", "FamilyModel", "Timm", "Torchvision", "Transformers"]

_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "tag")  # of the base's weights
_WEIGHT = 2.0  # of co-distillation


@dataclass(frozen=True)
class Family:
    """What is known of a model's base beyond its layers; a method is what models get under its name.

    Attributes:
        joined_at: of a model that has lost its classifiers the dimension at which heads are put side by side.
    """

    joined_at: int | None = field(default=None, kw_only=True)

    def answers(self, options: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments by name is for [`answer`][ensemblenet.families.Family.answer]."""
        return False

    def answer(self, model: EnsembleNet, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What such a call gives."""
        raise NotImplementedError


# -- timm


@dataclass(frozen=True)
class Timm(Family):
    """A network of timm's.

    Attributes:
        cfg: its `pretrained_cfg`.
        classifiers: the names of its classifiers, in a head as in the base.
        inputs: what it takes.
        features: the node of a head's graph that its `forward_features` gives, where there is one.
        dim: the dimension of the features' channels.
        undecayed: the names that the base's `no_weight_decay` gives.
    """

    cfg: Mapping[str, Any]
    classifiers: tuple[str, ...]
    inputs: Inputs
    features: str | None
    dim: int
    undecayed: frozenset[str] = frozenset()

    def num_classes(self, model: EnsembleNet) -> int:
        """C; 0 without classifiers."""
        classifier = model.heads[0].get_submodule(self.classifiers[0])
        return getattr(classifier, "out_features", getattr(classifier, "out_channels", 0))

    def num_features(self, model: EnsembleNet) -> int:
        """The channels of `forward_features`, K * F."""
        with torch.no_grad():
            return self.forward_features(model, self.inputs.zeros(2, like=model)).shape[self.dim]

    def head_hidden_size(self, model: EnsembleNet) -> int:
        """The features that all heads' classifiers take together."""
        with torch.no_grad():
            features = self.forward_features(model, self.inputs.zeros(2, like=model))
            return self.forward_head(model, features, pre_logits=True).shape[-1]

    def pretrained_cfg(self, model: EnsembleNet) -> dict[str, Any]:
        """The base's configuration, with the names that classifiers and first convolutions have here."""
        known = {key: value for key, value in self.cfg.items() if key not in _SOURCES}
        first = self.cfg.get("first_conv") or ()
        first = (first,) if isinstance(first, str) else first
        return known | {
            "num_classes": self.num_classes(model),
            "classifier": tuple(f"heads.{k}.{name}" for k in range(model.num_heads) for name in self.classifiers),
            "first_conv": tuple(place for name in first for place in _places(model, name)),
        }

    default_cfg = pretrained_cfg

    def get_classifier(self, model: EnsembleNet) -> nn.ModuleList:
        """The classifiers of all heads."""
        return nn.ModuleList(head.get_submodule(name) for head in model.heads for name in self.classifiers)

    def reset_classifier(self, model: EnsembleNet, num_classes: int, global_pool: str | None = None) -> None:
        """Give each head fresh classifiers of so many classes, or none with 0.

        Without classifiers the model gives features, those of all heads side by side, (N, K * F), in evaluation, and
        with `global_pool=""` the unpooled ones of `forward_features`; it can then not be saved. The costs of heads are
        not known until the model is saved and loaded.
        """
        if hasattr(model, "fusion"):
            raise EnsembleNetError("reset_classifier changes heads one by one: call it before ensemblenet.fuse(model).")
        unpooled = global_pool == "" and num_classes == 0
        if global_pool is not None and not unpooled:
            raise EnsembleNetError(
                "A converted model keeps its base's pooling: give the base another one, and convert it."
            )
        if self.joined_at is not None and not unpooled:
            raise EnsembleNetError("The model has lost its classifiers: convert the base, or load the model, again.")
        end = self._node(model) if unpooled else None
        head: Any
        for head in model.heads:
            for name in self.classifiers:
                head.set_submodule(name, _fresh(head.get_submodule(name), num_classes))
            if end is not None:
                [output] = head.graph.find_nodes(op="output")
                output.args = tuple(node for node in head.graph.nodes if node.name == end)
                head.recompile()
        model.family = replace(self, joined_at=None if num_classes else self.dim if unpooled else -1)
        model.recipe = model.recipe.with_classes(num_classes) if model.recipe and num_classes else None
        model.head_cost, model.output_shapes = None, ((2, num_classes),) if num_classes else ()

    def forward_features(self, model: EnsembleNet, x: Tensor) -> Tensor:
        """The unpooled features of all heads side by side."""
        given: Any = model.trunk(x)
        parts = [_between(head, None, self._node(model)) for head in model.heads]
        return torch.cat([part(*given) if isinstance(given, tuple) else part(given) for part in parts], self.dim)

    def forward_head(self, model: EnsembleNet, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What the model gives for such features; with `pre_logits` what its classifiers take, side by side."""
        outputs = []
        head: Any
        for head, own in zip(model.heads, x.chunk(model.num_heads, self.dim), strict=True):
            classifier = next(node for node in head.graph.nodes if node.target == self.classifiers[0])
            end = classifier.all_input_nodes[0].name if pre_logits else None
            outputs.append(_between(head, self._node(model), end)(own))
        if pre_logits:
            return torch.cat(outputs, -1)
        return torch.stack(outputs) if model.training else model.prediction(torch.stack(outputs))

    def set_grad_checkpointing(self, model: EnsembleNet, enable: bool = True) -> None:
        """Set `checkpoint_activations`, by the name that timm's training script calls."""
        model.checkpoint_activations = enable

    def no_weight_decay(self, model: EnsembleNet) -> set[str]:
        """The parameters that timm's optimizers leave without weight decay, as the base says."""
        names = (name for name, _ in model.named_parameters())
        return {name for name in names if re.sub(r"^(trunk|heads\.\d+)\.", "", name) in self.undecayed}

    def _node(self, model: EnsembleNet) -> str:
        if self.features is None:
            raise AttributeError(
                "The base's features are not one tensor within the heads; split the base in front of them."
            )
        return self.features


def _places(model: EnsembleNet, name: str) -> list[str]:
    """Where a layer of the base is now."""
    parts = {"trunk": model.trunk, **{f"heads.{k}": head for k, head in enumerate(model.heads)}}
    names = {part: dict(module.named_modules()) for part, module in parts.items()}
    return [f"{part}.{name}" for part, known in names.items() if name in known]


def _fresh(classifier: Any, num_classes: int) -> nn.Module:
    """A layer like a classifier, for other classes."""
    if num_classes == 0:
        return nn.Identity()
    like = classifier.weight
    options = {"bias": classifier.bias is not None, "device": like.device, "dtype": like.dtype}
    if isinstance(classifier, nn.Linear):
        return nn.Linear(classifier.in_features, num_classes, **options)
    return nn.Conv2d(classifier.in_channels, num_classes, classifier.kernel_size, **options)


def _between(head: Any, begin: str | None, end: str | None) -> fx.GraphModule:
    """A part of a head, which shares its layers: from what one node gives, or the head takes, to another's output."""
    nodes = {node.name: node for node in head.graph.nodes}
    graph = fx.Graph()
    taken = [nodes[begin]] if begin else [node for node in head.graph.nodes if node.op == "placeholder"]
    copies = {node: graph.placeholder(node.name) for node in taken}
    last = nodes[end] if end else next(reversed(head.graph.nodes)).all_input_nodes[0]
    needed, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node not in copies and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    for node in head.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[last])
    part = fx.GraphModule(head, graph)
    part.training = head.training
    return part


# -- torchvision


@dataclass(frozen=True)
class Torchvision(Family):
    """A network of torchvision's.

    Attributes:
        name: of its builder.
    """

    name: str

    def transforms(self, model: EnsembleNet, **options: Any) -> Any:
        """The preprocessing of the builder's default weights; options are those of the weights' own `transforms`."""
        from torchvision.models import get_model_weights

        weights: Any = get_model_weights(self.name)
        return weights.DEFAULT.transforms(**options)


# -- transformers


@dataclass(frozen=True)
class Transformers(Family):
    """A network of transformers'.

    Attributes:
        own_config: its configuration.
        is_causal: whether it predicts the next token, so that labels are shifted by one.
        criterion: the loss of head outputs (K, N, C, *) and labels; None takes co-distillation of weight 2.
    """

    own_config: Any
    is_causal: bool = False
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None

    def config(self, model: EnsembleNet) -> Any:
        """The base's configuration."""
        return self.own_config

    def answers(self, options: Mapping[str, Any]) -> bool:
        """Whether labels are given, or an object is asked for."""
        return "labels" in options or "return_dict" in options

    def answer(self, model: EnsembleNet, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """An object of transformers with the prediction as `logits`, and `loss` where there are labels."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        labels, as_object = options.pop("labels", None), options.pop("return_dict", True)
        heads = model(*args, **{**options, "per_head": True})
        if not isinstance(heads, Tensor):
            raise EnsembleNetError("A loss or an object is for models of one output: convert with output= that one.")
        dense = heads.movedim(-1, 2)  # classes stand last here, and behind the examples in this library
        logits = combine_heads(dense, model.combine, model.task).movedim(1, -1)
        loss = None if labels is None else self._loss(model, dense, labels)
        if as_object is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]

    def _loss(self, model: EnsembleNet, heads: Tensor, labels: Tensor) -> Tensor:
        if self.is_causal:
            heads, labels = heads[..., :-1], labels[..., 1:]
        if model.task == "regression":
            labels = labels.reshape(heads.shape[1:])
        if self.criterion is not None:
            return self.criterion(heads, labels)
        return codistillation(heads, labels, _WEIGHT, model.task, combine=model.combine)


# -- what models get


class _OfFamily:
    """An attribute that models have whose family has it."""

    def __init__(self, is_method: bool) -> None:
        self.is_method = is_method

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self
        give = getattr(model.family, self.name, None)
        if give is None:
            raise AttributeError(f"{self.name}: the base of this model has none.")
        return partial(give, model) if self.is_method else give(model)


class FamilyModel(nn.Module):
    """A model that behaves like the family of its base.

    Of timm it has `num_classes`, `num_features`, `head_hidden_size`, `pretrained_cfg`, `default_cfg`, `get_classifier`,
    `reset_classifier`, `forward_features`, `forward_head`, `set_grad_checkpointing` and `no_weight_decay`; of
    torchvision `transforms`; of transformers `config`, and calls with `labels` or `return_dict`. What a family lacks
    is no attribute.

    Attributes:
        family: of the base; None for one that is of none.

    Example:
        >>> import ensemblenet, timm
        >>> model = ensemblenet.convert(timm.create_model("test_resnet", num_classes=5), torch.randn(2, 3, 32, 32))
        >>> model.num_classes, hasattr(model, "config")
        (5, False)
        >>> model.reset_classifier(7)
        >>> model.eval()(torch.randn(4, 3, 32, 32)).shape, model.pretrained_cfg["num_classes"]
        (torch.Size([4, 7]), 7)
    """

    family: Family | None = None

    if not TYPE_CHECKING:  # type checkers would then take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Say why there is no such attribute: Python asks here again, and PyTorch alone would not know."""
            if isinstance(getattr(FamilyModel, name, None), _OfFamily):
                return getattr(FamilyModel, name).__get__(self)
            return super().__getattr__(name)

    num_classes, num_features, head_hidden_size = _OfFamily(False), _OfFamily(False), _OfFamily(False)
    pretrained_cfg, default_cfg, config = _OfFamily(False), _OfFamily(False), _OfFamily(False)
    get_classifier, reset_classifier = _OfFamily(True), _OfFamily(True)
    forward_features, forward_head = _OfFamily(True), _OfFamily(True)
    set_grad_checkpointing, no_weight_decay = _OfFamily(True), _OfFamily(True)
    transforms = _OfFamily(True)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], base: nn.Module | None = None, *, trust: bool = False
    ) -> EnsembleNet:
        """Load a model by its name on the Hugging Face Hub, `owner/name`, or from a folder; see [`ensemblenet.load`][].

        Example:
            >>> import ensemblenet, tempfile
            >>> from ensemblenet.models import MNIST1DNet
            >>> model = ensemblenet.convert(MNIST1DNet(8), torch.randn(2, 40))
            >>> ensemblenet.EnsembleNet.from_pretrained(model.save_pretrained(tempfile.mkdtemp())).num_heads
            2
        """
        import ensemblenet

        is_folder = Path(name).is_dir() or str(name).startswith("hf://")
        return ensemblenet.load(name if is_folder else f"hf://{name}", base, trust=trust)

    def save_pretrained(self, directory: str | os.PathLike[str], **options: Any) -> Path:
        """Write the model into a new folder; see [`ensemblenet.save`][]."""
        import ensemblenet

        return ensemblenet.save(self, directory, **options)  # pyright: ignore[reportArgumentType]

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put the model on the Hugging Face Hub; see [`ensemblenet.push_to_hub`][]."""
        import ensemblenet

        return ensemblenet.push_to_hub(self, repo_id, **options)  # pyright: ignore[reportArgumentType]
