"""Taggers for YouTube-8M, in one file since they share their experts, gates and hidden layers.

They are the models of the challenge's code and of its winners, as ordinary modules.

All give logits (N, C) for `CoDistillationLoss(task="multilabel")`; a mixture of experts gives the log-odds of its
probability. Taggers of frames take (N, T, D), in which frames that are not there are zero throughout: no length
comes beside it. A network learns its labels' rarity slowly, so output biases begin at the odds of 3 labels a video.

Shapes: N videos, T frames, D features, C classes, M experts, K clusters, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemblenet.models.sources import made_with

__all__ = ["DeepBagOfFrames", "GRUTagger", "GatedNetVLAD", "LogisticTagger", "MLPTagger", "MoETagger", "NeXtVLAD"]

NUM_CLASSES = 3862

_LABELS = 3  # of a video, on average
_TINY = 1e-12


def _start_rare(layer: nn.Linear, num_classes: int) -> None:
    if num_classes > _LABELS:
        nn.init.constant_(layer.bias, math.log(_LABELS / (num_classes - _LABELS)))


class _Logistic(nn.Linear):
    """Logits of every class, from D features."""

    def __init__(self, size: int, num_classes: int) -> None:
        super().__init__(size, num_classes)
        _start_rare(self, num_classes)


class _Experts(nn.Module):
    """Log-odds of every class, from D features: each class has M logistic experts and a gate over them.

    p = sum_m g_m sigmoid(e_m), where the gate g is a softmax over M experts and one more that always says no
    (Jordan and Jacobs 1994, as the challenge's code has it). The softmax's normalisation cancels in the odds, so
    log p - log(1 - p) needs nothing but two sums of exponentials.
    """

    def __init__(self, size: int, num_classes: int, num_experts: int) -> None:
        super().__init__()
        self.gates = nn.Linear(size, num_classes * num_experts)
        self.experts = nn.Linear(size, num_classes * num_experts)
        self.num_classes = num_classes
        _start_rare(self.experts, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # (N, M, C); the gate logit of the expert that says no is fixed at 0: softmax is shift-invariant
        gates = _full_precision(self.gates(x)).unflatten(1, (-1, self.num_classes))
        experts = _full_precision(self.experts(x)).unflatten(1, (-1, self.num_classes))
        yes = gates - F.softplus(-experts)  # not logsigmoid, which ONNX has as log(sigmoid(e)): infinite below e = -104
        no = yes - experts  # as log sigmoid(-e) = log sigmoid(e) - e
        return yes.logsumexp(1) - F.softplus(no.logsumexp(1))


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _hidden(in_size: int, out_size: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_size, out_size, bias=False), nn.BatchNorm1d(out_size), nn.ReLU(), nn.Dropout(dropout)
    )


class LogisticTagger(nn.Module):
    """A logistic regression for every class. It has no hidden layer, so there is nothing in it to narrow.

    Args:
        feature_size: D.
        num_classes: C.

    Shape:
        - input: (N, D).
        - output: (N, C), logits.

    Example:
        >>> LogisticTagger(feature_size=8, num_classes=5)(torch.zeros(2, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(self, feature_size: int = 1152, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        self.input_shape = (feature_size,)
        self.classifier = _Logistic(feature_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tag videos; see the class for shapes."""
        return self.classifier(x)


class MLPTagger(nn.Module):
    """Hidden layers with batch normalisation and ReLU, then a logistic regression for every class.

    Args:
        feature_size: D.
        num_classes: C.
        hidden: widths of the hidden layers.
        dropout: after each hidden layer.

    Shape:
        - input: (N, D).
        - output: (N, C), logits.

    Example:
        >>> MLPTagger(feature_size=8, num_classes=5, hidden=[16])(torch.zeros(2, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        feature_size: int = 1152,
        num_classes: int = NUM_CLASSES,
        hidden: Sequence[int] = (1024, 1024),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        sizes = [feature_size, *hidden]
        self.input_shape = (feature_size,)
        self.hidden = nn.Sequential(*(_hidden(*pair, dropout) for pair in pairwise(sizes)))
        self.classifier = _Logistic(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tag videos; see the class for shapes."""
        return self.classifier(self.hidden(x))


class MoETagger(nn.Module):
    """A mixture of experts for every class, behind hidden layers if there are any.

    The output is the log-odds of the mixture's probability, computed without it: `torch.sigmoid` gives the
    probability, and losses and ensembles of logits take it as it is. Heads of a conversion may share out the
    experts among them.

    Args:
        feature_size: D.
        num_classes: C.
        num_experts: M.
        hidden: widths of hidden layers; the challenge's model has none, but then little can be narrowed.
        dropout: after each hidden layer.

    Shape:
        - input: (N, D).
        - output: (N, C), log-odds.

    Example:
        >>> MoETagger(feature_size=8, num_classes=5, hidden=[16])(torch.zeros(2, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        feature_size: int = 1152,
        num_classes: int = NUM_CLASSES,
        num_experts: int = 2,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        sizes = [feature_size, *hidden]
        self.input_shape = (feature_size,)
        self.hidden = nn.Sequential(*(_hidden(*pair, dropout) for pair in pairwise(sizes)))
        self.classifier = _Experts(sizes[-1], num_classes, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Tag videos; see the class for shapes."""
        return self.classifier(self.hidden(x))


# -- frames


def _is_there(x: Tensor) -> Tensor:
    """Which frames are there, (N, T, 1): those that are not are zero throughout."""
    return (x != 0).any(2, keepdim=True).to(x.dtype)


class _FrameNorm(nn.BatchNorm1d):
    """Batch normalisation of (N, T, D) over videos and frames; like the challenge's models it counts padding."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mT).mT


class _ContextGate(nn.Module):
    """Features times a gate that all of them decide (Miech, Laptev and Sivic 2017, arXiv 1706.06905)."""

    def __init__(self, size: int, reduction: int = 1) -> None:
        super().__init__()
        inner: list[nn.Module] = [nn.Linear(size, size // reduction, bias=False), nn.BatchNorm1d(size // reduction)]
        if reduction > 1:
            inner += [nn.ReLU(), nn.Linear(size // reduction, size)]
        self.gate = nn.Sequential(*inner, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class DeepBagOfFrames(nn.Module):
    """Deep bag of frames (Abu-El-Haija et al. 2016, arXiv 1609.08675): codes of single frames, pooled by maximum.

    The challenge's code takes 30 random frames of a video: `YouTube8M(num_frames=30, sample_frames=True)`.

    Args:
        feature_size: D.
        num_classes: C.
        cluster_size: size of a frame's code.
        hidden_size: size of the layer behind the pooling.
        num_experts: M.
        num_frames: T; only the size that `info` assumes, as any number will do.

    Shape:
        - input: (N, T, D).
        - output: (N, C), log-odds.

    Example:
        >>> network = DeepBagOfFrames(8, 5, cluster_size=16, hidden_size=8)
        >>> network(torch.ones(2, 3, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        feature_size: int = 1152,
        num_classes: int = NUM_CLASSES,
        cluster_size: int = 8192,
        hidden_size: int = 1024,
        num_experts: int = 2,
        num_frames: int = 30,
    ) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        self.input_shape = (num_frames, feature_size)
        self.input_norm = _FrameNorm(feature_size)
        self.cluster = nn.Linear(feature_size, cluster_size, bias=False)
        self.cluster_norm = _FrameNorm(cluster_size)
        self.hidden = nn.Linear(cluster_size, hidden_size, bias=False)
        self.hidden_norm = nn.BatchNorm1d(hidden_size)
        self.classifier = _Experts(hidden_size, num_classes, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Tag videos by their frames; see the class for shapes."""
        codes = F.relu6(self.cluster_norm(self.cluster(self.input_norm(x)))) * _is_there(x)
        return self.classifier(F.relu6(self.hidden_norm(self.hidden(codes.amax(1)))))


class _NetVLAD(nn.Module):
    """Residuals of frames to K centres, summed by soft assignment: (N, T, D) to (N, K * D)."""

    def __init__(self, size: int, num_clusters: int) -> None:
        super().__init__()
        self.assign = nn.Linear(size, num_clusters, bias=False)
        self.norm = _FrameNorm(num_clusters)
        self.centres = nn.Parameter(torch.randn(num_clusters, size) / math.sqrt(size))

    def forward(self, x: Tensor, is_there: Tensor) -> Tensor:
        share = self.norm(self.assign(x)).softmax(2) * is_there
        residuals = share.mT @ x - share.sum(1).unsqueeze(2) * self.centres
        return F.normalize(F.normalize(residuals, dim=2, eps=_TINY).flatten(1), dim=1, eps=_TINY)


class GatedNetVLAD(nn.Module):
    """NetVLAD with context gating (Miech, Laptev and Sivic 2017, arXiv 1706.06905), which won the 2017 challenge.

    Args:
        feature_sizes: sizes of the features that stand side by side and are clustered each by itself; the later
            ones into half as many clusters.
        num_classes: C.
        num_clusters: K of the first feature.
        hidden_size: size of the layer behind the pooling.
        num_experts: M.
        dropout: before the classifier.
        num_frames: T; only the size that `info` assumes, as any number will do.

    Shape:
        - input: (N, T, D), D the sum of `feature_sizes`.
        - output: (N, C), log-odds.

    Example:
        >>> network = GatedNetVLAD([8, 4], 5, num_clusters=4, hidden_size=8)
        >>> network(torch.ones(2, 3, 12)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        feature_sizes: Sequence[int] = (1024, 128),
        num_classes: int = NUM_CLASSES,
        num_clusters: int = 64,
        hidden_size: int = 1024,
        num_experts: int = 2,
        dropout: float = 0.0,
        num_frames: int = 300,
    ) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        self.input_shape = (num_frames, sum(feature_sizes))
        self.feature_sizes = list(feature_sizes)
        clusters = _halved(num_clusters, len(feature_sizes))
        self.input_norm = _FrameNorm(sum(feature_sizes))
        self.pools = nn.ModuleList(map(_NetVLAD, feature_sizes, clusters))
        pooled = sum(size * number for size, number in zip(feature_sizes, clusters, strict=True))
        self.hidden = nn.Linear(pooled, hidden_size, bias=False)
        self.hidden_norm = nn.BatchNorm1d(hidden_size)
        self.gate = _ContextGate(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = _Experts(hidden_size, num_classes, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Tag videos by their frames; see the class for shapes."""
        is_there = _is_there(x)
        parts = self.input_norm(x).split(self.feature_sizes, dim=2)
        pooled = torch.cat([pool(part, is_there) for pool, part in zip(self.pools, parts, strict=True)], dim=1)
        return self.classifier(self.dropout(self.gate(F.relu6(self.hidden_norm(self.hidden(pooled))))))


def _halved(number: int, features: int) -> list[int]:
    return [number, *[max(1, number // 2)] * (features - 1)]


class _NeXtVLAD(nn.Module):
    """Residuals of frames in G groups of lower dimension, attended: (N, T, D) to (N, K * expansion * D / G)."""

    def __init__(self, size: int, num_clusters: int, groups: int, expansion: int) -> None:
        super().__init__()
        wide = size * expansion
        if wide % groups:
            raise ValueError(f"feature sizes times expansion must be multiples of groups, got {wide} and {groups}.")
        self.groups = groups
        self.expand = nn.Linear(size, wide)
        self.attend = nn.Linear(wide, groups)
        self.assign = nn.Linear(wide, groups * num_clusters, bias=False)
        self.assign_norm = _FrameNorm(groups * num_clusters)
        self.centres = nn.Parameter(torch.randn(num_clusters, wide // groups) / math.sqrt(wide // groups))
        self.norm = nn.BatchNorm1d(num_clusters * wide // groups)

    def forward(self, x: Tensor, is_there: Tensor) -> Tensor:
        x = self.expand(x)
        attention = (self.attend(x).sigmoid() * is_there).unsqueeze(3)
        share = self.assign_norm(self.assign(x)).unflatten(2, (self.groups, -1)).softmax(3) * attention
        share = share.flatten(1, 2)  # (N, T * G, K)
        residuals = share.mT @ x.unflatten(2, (self.groups, -1)).flatten(1, 2)
        residuals = residuals - share.sum(1).unsqueeze(2) * self.centres
        return self.norm(F.normalize(residuals, dim=2, eps=_TINY).flatten(1))


class NeXtVLAD(nn.Module):
    """NeXtVLAD (Lin, Xiao and Fan 2018, arXiv 1811.05014), the best single model of the 2018 challenge.

    Args:
        feature_sizes: sizes of the features that stand side by side and are clustered each by itself; the later
            ones into half as many clusters and groups.
        num_classes: C.
        num_clusters: K of the first feature.
        groups: G of the first feature.
        expansion: how much wider frames become before they are cut into groups.
        hidden_size: size of the layer behind the pooling.
        gate_reduction: how much narrower the gate is.
        dropout: of the pooled features.
        num_frames: T; only the size that `info` assumes, as any number will do.

    Shape:
        - input: (N, T, D), D the sum of `feature_sizes`.
        - output: (N, C), logits.

    Example:
        >>> network = NeXtVLAD([8, 4], 5, num_clusters=4, groups=2, hidden_size=8)
        >>> network(torch.ones(2, 3, 12)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        feature_sizes: Sequence[int] = (1024, 128),
        num_classes: int = NUM_CLASSES,
        num_clusters: int = 64,
        groups: int = 8,
        expansion: int = 2,
        hidden_size: int = 1024,
        gate_reduction: int = 8,
        dropout: float = 0.5,
        num_frames: int = 300,
    ) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        self.input_shape = (num_frames, sum(feature_sizes))
        self.feature_sizes = list(feature_sizes)
        several = list(
            zip(
                feature_sizes,
                _halved(num_clusters, len(feature_sizes)),
                _halved(groups, len(feature_sizes)),
                strict=True,
            )
        )
        self.pools = nn.ModuleList(_NeXtVLAD(size, number, group, expansion) for size, number, group in several)
        pooled = sum(number * size * expansion // group for size, number, group in several)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(pooled, hidden_size, bias=False)
        self.hidden_norm = nn.BatchNorm1d(hidden_size)
        self.gate = _ContextGate(hidden_size, gate_reduction)
        self.classifier = _Logistic(hidden_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tag videos by their frames; see the class for shapes."""
        is_there = _is_there(x)
        parts = x.split(self.feature_sizes, dim=2)
        pooled = torch.cat([pool(part, is_there) for pool, part in zip(self.pools, parts, strict=True)], dim=1)
        return self.classifier(self.gate(self.hidden_norm(self.hidden(self.dropout(pooled)))))


class GRUTagger(nn.Module):
    """Gated recurrent units over the frames; the state at a video's last frame is classified.

    Args:
        feature_size: D.
        num_classes: C.
        hidden_size: of the recurrent state.
        num_layers: recurrent layers, one on the other.
        num_experts: M.
        num_frames: T; only the size that `info` assumes, as any number will do.

    Shape:
        - input: (N, T, D).
        - output: (N, C), log-odds.

    Example:
        >>> GRUTagger(8, 5, hidden_size=8)(torch.ones(2, 3, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        feature_size: int = 1152,
        num_classes: int = NUM_CLASSES,
        hidden_size: int = 1024,
        num_layers: int = 2,
        num_experts: int = 2,
        num_frames: int = 300,
    ) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        self.input_shape = (num_frames, feature_size)
        self.recurrent = nn.GRU(feature_size, hidden_size, num_layers, batch_first=True)
        self.classifier = _Experts(hidden_size, num_classes, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Tag videos by their frames; see the class for shapes."""
        is_there = _is_there(x)
        is_last = is_there - F.pad(is_there, (0, 0, 0, 1))[:, 1:]
        states, _ = self.recurrent(x)
        return self.classifier((states * is_last).sum(1))
