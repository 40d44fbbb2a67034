"""Converted models behave like the family of their base: what timm, torchvision and transformers ask of theirs."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from networks import Text, text_batch
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import ensemblenet
from ensemblenet import CoDistillationLoss, EnsembleNet, EnsembleNetError, convert, fuse, register_timm, save
from ensemblenet.deploy.timm_task import CoDistillationTask

NETWORKS = {"test_resnet": 64, "test_vit": 160, "test_convnext": 64}  # the three layouts of timm's classifiers


def images(size: int, number: int = 2) -> Tensor:
    return torch.randn(number, 3, size, size)


@pytest.fixture(scope="module", params=NETWORKS)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A conversion of a network of timm's, under a name in timm."""
    size = NETWORKS[request.param]
    base = timm.create_model(request.param, num_classes=5)
    model = convert(base, images(size), seed=1)
    folder = tmp_path_factory.mktemp("saved") / request.param
    register_timm(f"two_heads_{request.param}", save(model, folder))
    return SimpleNamespace(name=f"two_heads_{request.param}", base=base.eval(), model=model.eval(), size=size)


# -- what timm's own tests ask of a model


def test_forward_gives_numbers_and_every_parameter_learns(known: SimpleNamespace) -> None:
    made = timm.create_model(known.name, num_classes=42)
    outputs = made.train()(images(known.size))
    assert outputs.shape == (2, 2, 42)  # of each head
    outputs.mean().backward()
    assert [name for name, parameter in made.named_parameters() if parameter.grad is None] == []
    outputs = made.eval()(images(known.size, 1))
    assert outputs.shape == (1, 42)
    assert outputs.isfinite().all()


def test_the_configuration_names_what_is_there(known: SimpleNamespace) -> None:
    made = timm.create_model(known.name, pretrained=True)
    cfg, tensors = made.default_cfg, made.state_dict()
    assert cfg == made.pretrained_cfg
    assert (cfg["num_classes"], cfg["input_size"], cfg["architecture"]) == (5, (3, known.size, known.size), known.name)
    assert len(cfg["classifier"]) == 2
    for name in (*cfg["classifier"], *cfg["first_conv"]):
        assert f"{name}.weight" in tensors
    assert resolve_model_data_config(made)["mean"] == tuple(known.base.pretrained_cfg["mean"])
    assert not {"url", "hf_hub_id"} & cfg.keys()  # of the base's weights


def test_features_and_what_follows_them(known: SimpleNamespace) -> None:
    model, x = known.model, images(known.size, 3)
    features, of_base = model.forward_features(x), known.base.forward_features(x)
    assert features.ndim == of_base.ndim
    if features.ndim == 4:
        assert features.shape[2:] == of_base.shape[2:]  # unpooled
        assert features.shape[1] == model.num_features
    else:
        assert features.shape[:2] == of_base.shape[:2]
        assert features.shape[-1] == model.num_features
    torch.testing.assert_close(model.forward_head(features), model(x))
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (3, model.head_hidden_size)
    by_hand = [layer(part) for layer, part in zip(model.get_classifier(), before.chunk(2, 1), strict=True)]
    torch.testing.assert_close(torch.stack(by_hand).mean(0), model(x))
    model.train()
    assert model.forward_head(model.forward_features(x)).shape == (2, 3, 5)
    model.eval()


def test_features_are_those_of_the_base(known: SimpleNamespace) -> None:
    inherited = convert(known.base, images(known.size), num_heads=1, init="inherit", width=1.0, budget=2.0).eval()
    x = images(known.size, 3)
    torch.testing.assert_close(inherited.forward_features(x), known.base.forward_features(x), rtol=1e-4, atol=1e-5)
    logits = known.base.forward_head(known.base.forward_features(x), pre_logits=True)
    got = inherited.forward_head(inherited.forward_features(x), pre_logits=True)
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-5)


def test_another_classifier_and_none(known: SimpleNamespace, tmp_path: Path) -> None:
    model, x = copy.deepcopy(known.model), images(known.size, 3)
    model.reset_classifier(7)
    assert (model.num_classes, model(x).shape) == (7, (3, 7))
    assert model.pretrained_cfg["num_classes"] == 7
    again = EnsembleNet.from_pretrained(model.save_pretrained(tmp_path / "seven"))
    torch.testing.assert_close(again(x), model(x))
    assert again.num_classes == 7
    assert again.cost is not None
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), expected)
    assert model.first(1)(x).shape == (3, model.num_features // 2)
    with pytest.raises(ensemblenet.LoadError, match="has no recipe"):
        save(model, tmp_path / "none")
    features = known.model.forward_features(x)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    pool_size = timm.get_pretrained_cfg_value(known.name, "pool_size")
    made = timm.create_model(known.name, num_classes=0, global_pool="").eval()
    assert made(x).shape == features.shape
    if features.ndim == 4:
        assert features.shape[2:] == pool_size == made.default_cfg["pool_size"]
    assert timm.get_pretrained_cfg_value(known.name, "fixed_input_size") == known.base.default_cfg["fixed_input_size"]


def test_gradient_checkpointing_changes_no_output_and_no_gradient(known: SimpleNamespace) -> None:
    x, gradients = images(known.size), {}
    for enable in (False, True):
        model = copy.deepcopy(known.model).train()
        model.set_grad_checkpointing(enable)
        assert model.checkpoint_activations is enable
        outputs = model(x)
        outputs.square().mean().backward()
        gradients[enable] = [outputs, *(own.grad for own in model.parameters())]
    torch.testing.assert_close(gradients[True], gradients[False])


def test_weight_decay_spares_what_it_spares_in_the_base() -> None:
    base = timm.create_model("test_vit", num_classes=5)
    model = convert(base, images(160), split_at="input")
    spared, decayed = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1).param_groups
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    names = {id(own): name for name, own in model.named_parameters()}
    by_name = {names[id(own)] for own in spared["params"] if own.ndim > 1}
    assert by_name == {f"heads.{k}.{name}" for k in (0, 1) for name in ("pos_embed", "cls_token")}


@pytest.mark.parametrize(
    "options", [{"features_only": True}, {"global_pool": "max"}, {"num_classes": 3, "global_pool": ""}, {"in_chans": 1}]
)
def test_what_a_name_cannot_give_is_refused(known: SimpleNamespace, options: dict[str, Any]) -> None:
    with pytest.raises(EnsembleNetError, match=rf"{known.name} is a saved model: |keeps its base's pooling"):
        timm.create_model(known.name, **options)


def test_what_a_classifier_cannot_be() -> None:
    model = convert(timm.create_model("test_resnet", num_classes=5), images(32))
    with pytest.raises(EnsembleNetError, match="keeps its base's pooling"):
        model.reset_classifier(3, "max")
    with pytest.raises(EnsembleNetError, match=r"call it before ensemblenet.fuse\(model\)"):
        fuse(model).reset_classifier(3)
    model.reset_classifier(0)
    with pytest.raises(EnsembleNetError, match="has lost its classifiers"):
        model.reset_classifier(3)


def test_other_models_have_none_of_it() -> None:
    by_hand = EnsembleNet(nn.Linear(4, 8), [nn.Linear(8, 3)])
    model = convert(Text(), text_batch(), budget=1.5)
    for name in ("num_classes", "get_classifier", "forward_features", "pretrained_cfg", "config", "transforms"):
        assert not hasattr(by_hand, name)
        assert not hasattr(model, name)


def test_what_a_model_lacks_is_said() -> None:
    base = timm.create_model("test_resnet", num_classes=5)
    late = convert(base, images(32), 2, 2.0, split_at="global_pool.pool")
    for name in ("num_features", "head_hidden_size"):
        with pytest.raises(AttributeError, match="features are not one tensor within the heads; split the base in"):
            getattr(late, name)
    with pytest.raises(AttributeError, match="config: the base of this model has none"):
        _ = late.config
    with pytest.raises(AttributeError, match="no attribute 'trnk'"):
        _ = late.trnk


# -- timm's training task


def test_a_training_task_learns_averages_and_evaluates() -> None:
    torch.manual_seed(0)
    y = torch.randint(5, (64,))
    x = torch.randn(5, 3, 32, 32)[y] + 0.3 * torch.randn(64, 3, 32, 32)
    model = convert(timm.create_model("test_resnet", num_classes=5), x[:2], seed=0)
    task = CoDistillationTask(model, verbose=False)
    heads = copy.deepcopy(model)(x)
    result = task(x, y)
    torch.testing.assert_close(result["loss"], CoDistillationLoss(weight=2.0)(heads, y))
    torch.testing.assert_close(result["output"], heads.mean(0))
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=3e-3)
    task.setup_ema(decay=0.5)
    for step in range(15):
        optimizer.zero_grad()
        task(x, y)["loss"].backward()
        optimizer.step()
        task.update_ema(step=step)
    scores = {}
    for averaged in (False, True):
        evaluator = task.create_evaluator()
        evaluator.update(task.get_eval_model(ema=averaged).eval()(x), y)
        scores[averaged] = evaluator.compute()["top1"]
    assert min(scores.values()) > 80
    clipped = {id(own) for own in task.get_clip_parameters(exclude_head=True)}
    excluded = {name for name, own in model.named_parameters() if id(own) not in clipped}
    assert excluded == {f"heads.{k}.fc.{name}" for k in (0, 1) for name in ("weight", "bias")}
    state = task.get_checkpoint_state()["state_dict"]
    assert state.keys() == model.state_dict().keys()  # ensemblenet's own names
    task.compile(backend="eager")
    assert torch.isfinite(task(x, y)["loss"])


# -- torchvision and transformers


def test_torchvisions_preprocessing_is_kept(tmp_path: Path) -> None:
    model = convert(torchvision.models.resnet18(num_classes=5), images(32))
    expected = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    picture = torch.randint(256, (3, 300, 260), dtype=torch.uint8)
    again = ensemblenet.load(save(model, tmp_path / "saved"))
    assert torch.equal(again.transforms()(picture), expected(picture))
    assert not hasattr(model, "pretrained_cfg")


@pytest.fixture(scope="module")
def classifier() -> SimpleNamespace:
    sizes = {"vocab_size": 30, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "dropout": 0.0}
    base = DistilBertForSequenceClassification(DistilBertConfig(**sizes, attention_dropout=0.0, num_labels=4))
    batch = {"input_ids": torch.randint(30, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    model = convert(base, batch, output="logits", budget=1.5).eval()
    return SimpleNamespace(base=base, model=model, batch=batch, labels=torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize("how", ["looped", "fused"])
def test_transformers_get_an_object_with_logits_and_loss(classifier: SimpleNamespace, how: str) -> None:
    model, batch, labels = classifier.model, classifier.batch, classifier.labels
    network = fuse(copy.deepcopy(model)) if how == "fused" else model
    heads = model(**batch, per_head=True)
    answer = network(**batch, labels=labels)
    torch.testing.assert_close(answer.loss, CoDistillationLoss(weight=2.0)(heads, labels))
    torch.testing.assert_close(answer.logits, heads.mean(0))
    assert network(**batch, return_dict=True).loss is None
    assert [len(network(**batch, **options)) for options in ({"return_dict": False}, {})] == [1, 4]
    loss, logits = network(**batch, labels=labels, return_dict=False)
    assert torch.equal(loss, answer.loss)
    assert logits.shape == (4, 4)
    assert network.config.to_dict() == classifier.base.config.to_dict()
    assert network.config is not classifier.base.config


def test_labels_of_a_language_model_are_shifted() -> None:
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False)
    ids = torch.randint(20, (3, 7))
    base = GPT2LMHeadModel(config).eval()
    model = convert(base, {"input_ids": ids}, num_heads=1, init="inherit", width=1.0, budget=3.0, output="logits")
    expected = base(input_ids=ids, labels=ids)
    answer = model.eval()(input_ids=ids, labels=ids)
    torch.testing.assert_close(answer.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer.loss, expected.loss, rtol=1e-4, atol=1e-5)  # of one head: cross-entropy
