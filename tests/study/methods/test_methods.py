"""What each method trains: its network, its cost, and where its gradients go."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ensemblenet.models import MNIST1DNet
from ensemblenet.recipe import Conversion
from ensemblenet.study.methods import METHODS, Setup, Source, TrainingTask
from ensemblenet.study.methods.co_training import co_training
from ensemblenet.study.methods.okddip import okddip

X = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 5])
SETUP = Setup(Conversion(num_heads=3, budget=0.9), weight=3.0)
SINGLE = {"base", "narrow", "reshaped", "head_alone"}
SHARED = set(METHODS) - SINGLE - {"co_training", "deep_ensemble", "deep_ensemble_of_bases"}


def source(seed: int = 0) -> Source:
    return Source(lambda: MNIST1DNet(16), X, seed)


@pytest.fixture(scope="module")
def built():
    return {key: method.build(source(), SETUP) for key, method in METHODS.items()}


@pytest.mark.parametrize("key", METHODS)
def test_every_method_trains_all_its_parameters_and_predicts(key: str) -> None:
    task = METHODS[key].build(source(), SETUP).train()
    task.loss(X, Y, 0.5).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)
    outputs, prediction = task.eval()(X)
    assert outputs.shape == ((1 if key in SINGLE else 3), 6, 10)
    assert prediction.shape == (6, 10)
    assert METHODS[key].several == (key not in SINGLE)


def test_costs(built: dict[str, TrainingTask]) -> None:
    costs = {key: task.cost(X[:1]) for key, task in built.items()}
    base = costs["base"]
    for key in set(METHODS) - {"deep_ensemble_of_bases", "one"}:
        assert costs[key].parameters <= (1 if key == "base" else 0.9) * base.parameters, key
        assert costs[key].macs <= (1 if key == "base" else 0.9) * base.macs, key
    assert costs["deep_ensemble_of_bases"].parameters == 3 * base.parameters
    assert costs["deep_ensemble_of_bases"].macs == 3 * base.macs
    alike = {(costs[key].parameters, costs[key].macs) for key in SHARED - {"one"}}
    assert len(alike) == 1  # one conversion for all
    gate = 16 * 3 + 3 + 2 * 3
    assert costs["one"].parameters == costs["joint"].parameters + gate
    features = built["okddip"].network.heads[0].classifier.in_features
    assert built["okddip"].training_only() == 2 * features * max(1, features // 8)


@pytest.mark.parametrize("key", METHODS)
def test_a_seed_gives_the_same_weights_and_another_one_others(key: str) -> None:
    first, again, other = (
        torch.cat([p.flatten() for p in METHODS[key].build(source(seed), SETUP).parameters()]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_base_teaches_every_head_and_is_not_changed(built: dict[str, TrainingTask]) -> None:
    base = MNIST1DNet(16)
    base(5 * torch.randn(50, 40))  # its statistics are no batch's
    base.classifier.weight.data *= 50  # it tells examples apart
    before = copy.deepcopy(base.state_dict())
    setup = replace(SETUP, teacher_weight=0.7, temperature=3.0)
    task = METHODS["teacher"].build(replace(source(), teacher=base), setup).train()
    twin = copy.deepcopy(task.network)
    loss = task.loss(X, Y, 0.0)
    z, teacher = twin(X), copy.deepcopy(base).eval()(X)
    kl = sum(F.kl_div((z_k / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean") for z_k in z) / 3
    untaught = 3 * sum(F.cross_entropy(z_k, Y) for z_k in z) / 3 - 2 * F.cross_entropy(z.mean(0), Y)
    assert loss.item() == pytest.approx((untaught + 0.7 * 9 * kl).item(), rel=1e-4)
    loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())
    assert built["teacher"].training_only() == sum(parameter.numel() for parameter in base.parameters())


@pytest.mark.parametrize("key", sorted(SINGLE))
def test_single_networks_have_cross_entropy(key: str, built: dict[str, TrainingTask]) -> None:
    task = built[key].eval()
    assert task.loss(X, Y, 0.0).item() == pytest.approx(F.cross_entropy(task.network(X), Y).item())


@pytest.mark.parametrize(("key", "weight"), [("joint", 0.0), ("independent", 1.0), ("codistillation", 3.0)])
def test_the_weights_of_co_distillation(key: str, weight: float, built: dict[str, TrainingTask]) -> None:
    task = built[key].eval()
    z = task.network(X, per_head=True)
    whole, heads = F.cross_entropy(z.mean(0), Y), sum(F.cross_entropy(z_k, Y) for z_k in z) / 3
    assert task.loss(X, Y, 0.0).item() == pytest.approx(((1 - weight) * whole + weight * heads).item(), rel=1e-4)


@pytest.mark.parametrize("key", ["deep_ensemble", "deep_ensemble_of_bases"])
def test_networks_of_a_deep_ensemble_learn_as_if_each_were_alone(key: str) -> None:
    task = METHODS[key].build(source(), SETUP).train()
    task.loss(X, Y, 0.0).backward()
    for network in task.network.heads:
        together = [p.grad.clone() for p in network.parameters()]
        network.zero_grad()
        F.cross_entropy(network(X), Y).backward()
        for ours, alone in zip(together, network.parameters(), strict=True):
            torch.testing.assert_close(ours, alone.grad)


def test_one_predicts_by_its_gate() -> None:
    task = METHODS["one"].build(source(), SETUP).eval()
    torch.nn.init.normal_(task.gate[0].weight, std=5.0)  # far from the same weight for all heads
    outputs, prediction = task(X)
    gate = task.gate(task.network.trunk(X).mean(2))
    assert gate.shape == (6, 3)
    assert gate.max() > 0.5
    expected = sum(gate[:, k, None] * outputs[k] for k in range(3))
    torch.testing.assert_close(prediction, expected)


def test_one_and_okddip_ramp_their_distillation_up(built: dict[str, TrainingTask]) -> None:
    for key in ("one", "okddip"):
        task = built[key].eval()
        early, late, end = (task.loss(X, Y, progress).item() for progress in (0.0, 80 / 300, 1.0))
        assert early < late == end


def test_okddip_reads_what_enters_the_classifiers() -> None:
    task = METHODS["okddip"].build(source(), SETUP).eval()
    for projection in (task.query, task.key):
        torch.nn.init.normal_(projection.weight, std=5.0)  # far from the same attention for all peers
    features = []
    for head in task.network.heads:
        head.classifier.register_forward_pre_hook(lambda layer, inputs: features.append(inputs[0]))
    actual = task.loss(X, Y, 1.0)
    outputs, prediction = task(X)
    projected = torch.stack(features[:2])
    expected = okddip(outputs, task.query(projected), task.key(projected), Y)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(prediction, outputs.mean(0))
    assert task.students == (2,)


def test_co_training_warms_up(built: dict[str, TrainingTask]) -> None:
    task = built["co_training"].eval()
    z = task.network(X, per_head=True)
    for progress, ramp in ((0.0, 0.0), (20 / 300, 0.5), (40 / 300, 1.0), (1.0, 1.0)):
        expected = co_training(z, Y, weight=0.5, ramp=ramp)
        torch.testing.assert_close(task.loss(X, Y, progress), expected)


def test_multilabel_targets() -> None:
    labels = torch.randint(2, (6, 10), generator=torch.Generator().manual_seed(1))
    for key in set(METHODS) - {"kdcl"}:
        task = METHODS[key].build(source(), Setup(Conversion(num_heads=2, budget=0.9), task="multilabel"))
        assert task.loss(X, labels, 0.5).isfinite(), key
    with pytest.raises(RuntimeError, match="KDCL's teacher is made of each example's one true class"):
        METHODS["kdcl"].build(source(), Setup(task="multilabel"))
