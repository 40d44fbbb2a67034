"""Find out of which family a base is: timm's, torchvision's or transformers'."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from ensemblenet.conversion.trace import Trace
from ensemblenet.families import Family, Timm, Torchvision, Transformers
from ensemblenet.recipe import Recipe

__all__ = ["family_of"]


def family_of(trace: Trace, recipe: Recipe, in_head: set[str]) -> Family | None:
    """What a traced base says of itself; its weights are still its own.

    Args:
        trace: of the base.
        recipe: of the model.
        in_head: the names of the nodes that heads have.
    """
    base: Any = trace.module
    if recipe.base is not None and recipe.base.factory == "torchvision":
        return Torchvision(recipe.base.name)
    kind = next((kind for kind in type(base).__mro__ if kind.__module__.startswith(("timm.", "transformers."))), None)
    if kind is None:
        return None
    if kind.__module__.startswith("transformers."):
        takes_labels = isinstance(recipe.inputs.tree, dict) and "labels" in recipe.inputs.tree
        if takes_labels or not hasattr(base, "config"):
            return None
        return Transformers(copy.deepcopy(base.config), kind.__name__.endswith(("ForCausalLM", "LMHeadModel")))
    names = (getattr(base, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    called = {node.target for node in trace.graph.nodes if node.op == "call_module" and node.name in in_head}
    if not names or not called.issuperset(names) or recipe.inputs.tree != 0:
        return None  # its classifier is elsewhere
    features, dim = _features(trace)
    undecayed = frozenset(base.no_weight_decay()) if hasattr(base, "no_weight_decay") else frozenset()
    return Timm(base.pretrained_cfg, names, recipe.inputs, features if features in in_head else None, dim, undecayed)


def _features(trace: Trace) -> tuple[str | None, int]:
    """The last node that gives what the base's `forward_features` gives, and the dimension of its channels."""
    base: Any = trace.module.eval()
    found: list[str] = []
    with torch.no_grad():
        expected = base.forward_features(*trace.tensors)
        if not isinstance(expected, Tensor):
            return None, 1

        class Finder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, Tensor) and value.shape == expected.shape and torch.equal(value, expected):
                    found.append(n.name)
                return value

        Finder(fx.GraphModule(base, trace.graph)).run(*trace.arguments)
    is_nchw = expected.ndim == 4 and expected.shape[1] == base.num_features
    return (found[-1] if found else None), 1 if is_nchw else expected.ndim - 1
