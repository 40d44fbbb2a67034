"""Stopping early gives what the slow way gives: all heads for all examples, and then a choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Dense
from torch import nn

from ensemblenet import Cost, EnsembleNet, convert, fuse
from ensemblenet.evaluation.findings import Findings
from ensemblenet.evaluation.stopping import savings, settling
from ensemblenet.heads.anytime import AnytimeError, confident, heads_agree, predict_anytime, settled


def model_with(combine="logits", task="multiclass", noise=0.3):
    """Four heads that are alike but for some noise: for some examples they agree, for some they do not."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(40, 16), nn.ReLU())
    shared = torch.randn(10, 16)
    heads = [nn.Linear(16, 10) for _ in range(4)]
    for head in heads:
        head.weight.data = shared + noise * torch.randn(10, 16)
    costs = {"trunk_cost": Cost(656, 640.0), "head_cost": Cost(170, 160.0)}
    return EnsembleNet(trunk, heads, combine, task=task, **costs).eval()


def slowly(model, x, stops):
    """For each example by itself: the first k at which `stops(outputs (k, C))`, and the output of first(k)."""
    outputs, used = [], []
    with torch.no_grad():
        every = model(x, per_head=True)
        for n in range(len(x)):
            k = next((k for k in range(1, model.num_heads) if stops(every[:k, n])), model.num_heads)
            used.append(k)
            outputs.append(model.first(k)(x[n : n + 1])[0])
    return torch.stack(outputs), torch.tensor(used)


def has_settled(z: torch.Tensor) -> bool:
    """One example: what its first k heads say, for the last two k."""
    if len(z) < 2:
        return False
    before, now = (z[:k].mean(0).softmax(0) for k in (len(z) - 1, len(z)))
    return before.argmax() == now.argmax() and bool((before.max() - now.max()).abs() <= 0.05)


RULES = {
    "settled": (settled(1, 0.05), has_settled),
    "agree": (None, lambda z: len(z) > 1 and len(set(z.argmax(1).tolist())) == 1),
    "confident": (confident(0.6), lambda z: z.mean(0).softmax(0).max() >= 0.6),
    "own": (lambda z: z[-1].amax(1) > 3, lambda z: z[-1].max() > 3),
}


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("fused", [False, True])
def test_the_slow_way_gives_the_same(name: str, combine: str, fused: bool) -> None:
    rule, slow_rule = RULES[name]
    model = model_with(combine)
    x = torch.randn(60, 40)
    outputs, used = slowly(model, x, slow_rule)
    result = predict_anytime(fuse(model) if fused else model, x, rule)
    assert torch.equal(result.heads_used, used)
    assert len(set(used.tolist())) > 1  # else the test says little
    torch.testing.assert_close(result.outputs, outputs, rtol=1e-4, atol=1e-5)
    assert not result.outputs.requires_grad


@pytest.mark.parametrize("window", [1, 2])
def test_the_table_of_savings_stops_as_the_rule_does(window: int) -> None:
    model, x = model_with(), torch.randn(200, 40)
    findings = Findings()
    with torch.no_grad():
        findings.update(None, model(x, per_head=True), torch.randint(10, (200,)))
    stops = settling(findings.firsts, window, 0.1)
    used = torch.cat([stops[:-1], torch.ones(1, 200).bool()]).int().argmax(0) + 1
    assert torch.equal(predict_anytime(model, x, settled(window, 0.1)).heads_used, used)
    assert len(set(used.tolist())) > 1


def test_savings_are_scored_on_examples_that_did_not_choose() -> None:
    z = torch.zeros(4, 200, 2)
    z[..., 0] = 3.0
    even, odd = torch.arange(200) % 2 == 0, torch.arange(200) % 2 == 1
    z[0, odd, 0] = -2.0  # the first head is wrong of the odd ones, which only they can show
    findings = Findings()
    findings.update(None, z, torch.zeros(200, dtype=torch.int64))
    rows = {row["rule"]: row for row in savings(findings, {1: 20.0, 4: 50.0})}
    assert (rows["never"]["saved"], rows["never"]["heads"], rows["never"]["accuracy"]) == (0.0, 4.0, 1.0)
    kept = rows["confidence"]
    assert kept["accuracy"] < 1.0  # chosen on the even ones, one head is enough; on the odd ones it is wrong
    assert kept["macs"] == pytest.approx(20 + 10 * (kept["heads"] - 1))
    assert kept["saved"] == pytest.approx(1 - kept["macs"] / 50)
    assert even.sum() == odd.sum()


@pytest.mark.parametrize("options", [(0, 0.1), (1, -0.1), (1, 2.0)])
def test_windows_that_cannot_be(options: tuple[int, float]) -> None:
    with pytest.raises(AnytimeError, match="settled needs a window of at least 1 head"):
        settled(*options)


def test_labels_that_agree() -> None:
    model = model_with(task="multilabel", noise=0.05)
    x = torch.randn(60, 40)
    outputs, used = slowly(model, x, lambda z: len(z) > 1 and bool(((z > 0) == (z[0] > 0)).all()))
    assert len(set(used.tolist())) > 1
    result = predict_anytime(model, x)
    assert torch.equal(result.heads_used, used)
    torch.testing.assert_close(result.outputs, outputs, rtol=1e-4, atol=1e-5)


def test_dense_outputs_agree_everywhere() -> None:
    model = convert(Dense(), torch.randn(2, 3, 16, 16), num_heads=3).eval()
    x = torch.randn(4, 3, 16, 16)
    assert predict_anytime(model, x).outputs.shape == (4, 7, 16, 16)
    same = torch.randn(1, 4, 7, 5, 5).expand(2, -1, -1, -1, -1).clone()
    assert heads_agree()(same).tolist() == [True] * 4
    same[1, 2, :, 3, 3] = -same[1, 2, :, 3, 3]
    assert heads_agree()(same).tolist() == [True, True, False, True]
    sure = torch.zeros(1, 2, 3, 2, 2)
    sure[:, :, 0] = 9.0
    sure[:, 1, 0, 0, 0] = 0.0
    assert confident(0.9)(sure).tolist() == [True, False]


def test_the_mean_cost() -> None:
    model = model_with()
    x = torch.randn(50, 40)
    result = predict_anytime(model, x)
    wanted = sum(model.first(int(k)).cost.macs for k in result.heads_used) / len(x)
    assert result.macs == pytest.approx(wanted)
    assert result.macs < model.cost.macs
    by_hand = EnsembleNet(nn.Linear(4, 8), [nn.Linear(8, 3), nn.Linear(8, 3)]).eval()
    assert predict_anytime(by_hand, torch.randn(2, 4)).macs is None


def test_heads_run_only_on_what_is_left() -> None:
    model = model_with()
    seen = []
    for head in model.heads:
        head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    result = predict_anytime(model, torch.randn(50, 40))
    left = [int((result.heads_used >= k).sum()) for k in range(1, 5)]
    assert seen == [count for count in left if count]
    seen.clear()
    predict_anytime(model, torch.randn(50, 40), confident(0.0))
    assert seen == [50]


def test_no_examples_and_one_head() -> None:
    model = model_with()
    assert predict_anytime(model, torch.randn(0, 40)).outputs.shape == (0, 10)
    x = torch.randn(3, 40)
    single = predict_anytime(model.first(1), x)
    assert single.heads_used.tolist() == [1, 1, 1]
    torch.testing.assert_close(single.outputs, model.head(0)(x).detach())


class Regroups(nn.Module):
    """A trunk that gives more rows than examples, as windows do."""

    def forward(self, x):
        return x.reshape(-1, 2)


@pytest.mark.parametrize(
    ("model", "rule", "message"),
    [
        (EnsembleNet(nn.Identity(), [nn.Identity()] * 2), None, "needs a model in evaluation mode"),
        (EnsembleNet(Regroups(), [nn.Identity()] * 2).eval(), None, r"gives \(10, 2\) for 5 examples"),
        (
            EnsembleNet(nn.Identity(), [nn.Identity()] * 2).eval(),
            lambda z: z.argmax(2),
            r"booleans of shape \(5,\), got torch.int64 of shape \(1, 5\)",
        ),
    ],
)
def test_mistakes(model: EnsembleNet, rule: Callable[..., Any], message: str) -> None:
    with pytest.raises(AnytimeError, match=message):
        predict_anytime(model, torch.randn(5, 4), rule)
