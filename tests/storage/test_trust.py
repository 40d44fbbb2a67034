"""Hostile configurations in saved folders: no command runs what they name."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import ensemblenet
from ensemblenet import EnsembleNetError, LoadError, data, push_to_hub
from ensemblenet.cli.main import main
from ensemblenet.models import MNIST1DNet
from ensemblenet.models.sources import ModelNameError, create
from ensemblenet.storage.restore import data_module, restore
from ensemblenet.storage.trust import read_config
from ensemblenet.training.fit import fit, opened

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
CREATE, IMAGES = "ensemblenet.models.create", "ensemblenet.data.ImageData"
SMALL = {"num_train": 60, "num_val": 20, "num_test": 50, "batch_size": 20}

# Importing it is enough, and every class of it is one that a configuration may hold.
TROJAN = """
from pathlib import Path

Path({canary!r}).touch()

import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

from ensemblenet.models import MNIST1DNet


class Net(MNIST1DNet): ...
class Data(MNIST1D): ...
class Call(Callback): ...
class Log(CSVLogger): ...
class Plug(Precision): ...
class Profile(SimpleProfiler): ...
class Device(CPUAccelerator): ...
class Plan(SingleDeviceStrategy): ...
class Descent(torch.optim.SGD): ...
class Rate(torch.optim.lr_scheduler.StepLR): ...


def make(**options) -> torch.nn.Module:
    return Net()
"""


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path for modules, with code, pickles and settings that make the file `canary` in it."""
    folder = tmp_path / "evil"
    folder.mkdir()
    canary = folder / "canary"
    (folder / "trojan.py").write_text(TROJAN.format(canary=str(canary)))
    (folder / "hubconf.py").write_text("from trojan import make\n")
    (folder / "settings.yaml").write_text("class_path: trojan.Device\n")
    (folder / "trainer.yaml").write_text("callbacks: {class_path: trojan.Call}\n")
    (folder / "base.pkl").write_bytes(pickle.dumps(Touch(canary)))
    torch.save(Touch(canary), folder / "base.pth")
    torch.jit.script(nn.Identity()).save(folder / "base.pt")
    monkeypatch.syspath_prepend(folder)
    yield folder
    assert not canary.exists(), "it ran"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fit` leaves of a base, without results: it can be resumed, too."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    small = [part for key, value in SMALL.items() for part in (f"--data.{key}", str(value))]
    plain = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"]
    base = ["--model.base", "MNIST1DNet", "--model.base.width", "8", "--data", "MNIST1D"]
    fit([*base, *small, *plain, "--runs", str(folder.parent), "--name", "tiny"]).rename(folder)
    (folder / "results.json").unlink()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def read(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


def write(folder: Path, config: Any) -> None:
    text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
    (folder / "config.yaml").write_text(text)


# -- the attacks


def named(name: str, /, **options: Any) -> dict[str, Any]:
    """A base by a name that the project's own factory takes."""
    return {"model.base": of_class(CREATE, name=name, options=options)}


def of_class(path: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def timm(**options: Any) -> dict[str, Any]:
    return named("test_resnet", **options)


NESTED = of_class("trojan.Net")
TOUCH = "touch {evil}/canary"

# What stands where in a stored configuration; {evil} is the folder of that name.
ATTACKS: dict[str, dict[str, Any] | str] = {
    "os.system": named("os:system", command=TOUCH),
    "os.popen": named("os:popen", cmd=TOUCH),
    "subprocess.run": named("subprocess:run", args=TOUCH, shell=True),
    "subprocess.Popen": named("subprocess:Popen", args=TOUCH, shell=True),
    "subprocess.getoutput": named("subprocess:getoutput", cmd=TOUCH),
    "eval": named("builtins:eval", source="open('{evil}/canary', 'w')"),
    "exec": named("builtins:exec", source="open('{evil}/canary', 'w')"),
    "timeit": named("timeit:timeit", stmt="open('{evil}/canary', 'w')", number=1),
    "cProfile": named("cProfile:run", statement="open('{evil}/canary', 'w')"),
    "runpy.run_path": named("runpy:run_path", path_name="{evil}/trojan.py"),
    "runpy.run_module": named("runpy:run_module", mod_name="trojan"),
    "importlib": named("importlib:import_module", name="trojan"),
    "importlib by way of the factory": named("ensemblenet.models.sources:importlib.import_module", name="trojan"),
    "the factory by way of itself": named("ensemblenet.models:create", name="os:system", options={"command": TOUCH}),
    "the factory alone": named("ensemblenet.models:create"),
    "a module": named("trojan:Net"),
    "a function": named("trojan:make"),
    "a name within ours": named("ensemblenet.storage.restore:shutil"),
    "torch.load": named("torch:load", f="{evil}/base.pth", weights_only=False),
    "torch.hub": named("torch.hub:load", repo_or_dir="{evil}", model="make", source="local"),
    "torch.jit": named("torch.jit:load", f="{evil}/base.pt"),
    "numpy.load": named("numpy:load", file="{evil}/base.pkl", allow_pickle=True),
    "pandas": named("pandas:read_pickle", filepath_or_buffer="{evil}/base.pkl"),
    "timm from elsewhere": named("timm:create_model", model_name="local-dir:{evil}"),
    "a path behind a name of timm's": named("test_resnet.in1k/{evil}"),
    "timm's layers": named("timm.layers:create_conv2d", in_channels=3, out_channels=3, kernel_size=1),
    "timm's hub": named("hf-hub:someone/net"),
    "timm's hub, old": named("hf_hub:someone/net"),
    "a folder of timm's": named("local-dir:{evil}"),
    "a detector of torchvision": named("torchvision:fasterrcnn_resnet50_fpn"),
    "pretrained_cfg_overlay": timm(pretrained_cfg_overlay={"file": "{evil}/base.pth"})
    | {"model.base.init_args.weights": "pretrained"},
    "pretrained_cfg": timm(pretrained_cfg={"file": "{evil}/base.pth", "custom_load": True}),
    "checkpoint_path": timm(checkpoint_path="{evil}/base.pth"),
    "cache_dir": timm(cache_dir="{evil}"),
    "a class among options": timm(act_layer=NESTED),
    "a class among options, as text": timm(act_layer="{{class_path: trojan.Net}}"),
    "options as text": {"model.base": of_class(CREATE, name="test_resnet", options="{{a: trojan.Net}}")},
    "a class for the base": {"model.base": of_class("trojan.Net")},
    "a class for the base, as text": {"model.base": "trojan.Net"},
    "a function for the base": {"model.base": of_class("trojan.make")},
    "a class beside ours": {"model.base": of_class("ensemblenet.models.sources.importlib")},
    "a class of torch": {"model.base": of_class("torch.nn.TransformerEncoder", num_layers=1, encoder_layer=NESTED)},
    "a class in an argument": {"model.base.init_args.width": NESTED},
    "a class in a list": {"model.base.init_args.width": [NESTED]},
    "more arguments of the base": {"model.base.dict_kwargs": {"a": NESTED}},
    "the model in another file": {"model": "{evil}/settings.yaml"},
    "a conversion": {"model.conversion": of_class("trojan.Net")},
    "a conversion in another file": {"model.conversion": "{evil}/settings.yaml"},
    "mixing": {"model.mixing": of_class("trojan.Net")},
    "optimization": {"model.optimization": of_class("trojan.Descent")},
    "options of the optimizer": {"model.optimization.options": {"a": of_class("trojan.Net")}},
    "data": {"data": of_class("trojan.Data")},
    "data, as text": {"data": "trojan.Data"},
    "data in another file": {"data": "{evil}/settings.yaml"},
    "a class in the data": {"data.init_args.num_train": NESTED},
    "a class in the augmentation": {"data": of_class(IMAGES, folder="x", augmentation={"color_jitter": NESTED})},
    "code of a data set": {"data": of_class(IMAGES, folder="x", reader={"trust_remote_code": True})},
    "a reader's pickle": {"data": of_class(IMAGES, folder="x", reader={"class_map": "{evil}/base.pkl"})},
    "a chain of file systems": {
        "data": of_class("ensemblenet.data.YouTube8M", folder="reference::file://{evil}/base.pkl")
    },
    "a callback": {"trainer.callbacks": [of_class("trojan.Call")]},
    "one callback": {"trainer.callbacks": of_class("trojan.Call")},
    "a callback, as text": {"trainer.callbacks": "trojan.Call"},
    "callbacks as text": {"trainer.callbacks": "[{{class_path: trojan.Call}}]"},
    "a callback's function": {
        "trainer.callbacks": [of_class("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="trojan.make")]
    },
    "callbacks added": {"trainer.callbacks+": of_class("trojan.Call")},
    "callbacks in another file": {"trainer": "{evil}/trainer.yaml"},
    "a logger": {"trainer.logger": of_class("trojan.Log", save_dir="{evil}")},
    "a logger, as text": {"trainer.logger": "trojan.Log"},
    "a plugin": {"trainer.plugins": [of_class("trojan.Plug")]},
    "a plugin, as text": {"trainer.plugins": "trojan.Plug"},
    "a profiler": {"trainer.profiler": of_class("trojan.Profile")},
    "a profiler, as text": {"trainer.profiler": "trojan.Profile"},
    "an accelerator": {"trainer.accelerator": of_class("trojan.Device")},
    "an accelerator, as text": {"trainer.accelerator": "trojan.Device"},
    "an accelerator in another file": {"trainer.accelerator": "{evil}/settings.yaml"},
    "a strategy": {"trainer.strategy": of_class("trojan.Plan", device="cpu")},
    "a strategy that loads pickles": {"trainer.strategy": "deepspeed"},
    "an optimizer": {"optimizer": of_class("trojan.Descent", lr=0.1)},
    "an optimizer, as text": {"optimizer": "trojan.Descent"},
    "a scheduler": {"lr_scheduler": of_class("trojan.Rate", step_size=1)},
    "another configuration": {"config": "{evil}/settings.yaml"},
    "another configuration, listed": {"config": ["{evil}/settings.yaml"]},
    "YAML's apply": "model: !!python/object/apply:os.system ['touch {evil}/canary']\n",
    "YAML's new": "model: !!python/object/new:trojan.Net {{}}\n",
    "YAML's name": "model: {{base: !!python/name:trojan.Net ''}}\n",
    "YAML's module": "model: {{base: !!python/module:trojan ''}}\n",
    "YAML's tuple": "model: {{base: !!python/tuple [1]}}\n",
    "YAML's set": "model: {{base: !!set {{a, b}}}}\n",
    "YAML without an end": "model: &a [*a]\n",
}


def filled(value: Any, evil: Path) -> Any:
    if isinstance(value, str):
        return value.format(evil=evil)
    if isinstance(value, dict):
        return {name: filled(item, evil) for name, item in value.items()}
    return [filled(item, evil) for item in value] if isinstance(value, list) else value


def attack(folder: Path, what: dict[str, Any] | str, evil: Path) -> None:
    """Put an attack in the stored configuration of a run."""
    if isinstance(what, str):
        write(folder, filled(what, evil))
        return
    config = read(folder)
    for place, value in what.items():
        *sections, key = place.split(".")
        part = config
        for section in sections:
            part = part[section]
        part[key] = filled(value, evil)
    write(folder, config)


COMMANDS = {
    "predict": ["--output", "{tmp}/p.csv"],
    "test": [],
    "validate": [],
    "report": ["--output", "{tmp}/r.html"],
    "export": ["--format", "torch", "--output", "{tmp}/m.pt2"],
    "info": [],
    "fit": [],
}


@pytest.mark.parametrize("what", ATTACKS.values(), ids=ATTACKS)
def test_nothing_that_a_stored_configuration_names_is_run(
    what: dict[str, Any] | str, evil: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack(run, what, evil)
    config = (run / "config.yaml").read_text()
    remedy = "is not plain YAML" if isinstance(what, str) and "set" not in what else "add --trust"
    empty = tmp_path / "saved"
    (empty / "model").mkdir(parents=True)
    write(empty, config)
    for command, options in COMMANDS.items():
        for folder in (run, empty):
            given = ["--resume", str(folder)] if command == "fit" else [str(folder)]
            assert main([command, *given, *(option.format(tmp=tmp_path) for option in options)]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert remedy in line
    for folder in (run, empty):
        for call in (restore, lambda folder: push_to_hub(folder, "someone/net")):
            with pytest.raises(LoadError, match=remedy):
                call(folder)
    with pytest.raises(LoadError):
        ensemblenet.load(empty)
    assert (run / "config.yaml").read_text() == config
    assert {path.name for path in tmp_path.iterdir()} == {"evil", "run", "saved"}


def places(part: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where something stands in settings, and one more place beside it everywhere."""
    for key, value in [*part.items(), ("more", None)]:
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def test_a_class_is_refused_wherever_it_stands(evil: Path, run: Path) -> None:
    config = read(run)
    for place in places(config):
        write(run, config)
        attack(run, {".".join(place): of_class("trojan.Net")}, evil)
        with pytest.raises(LoadError, match=re.escape(".".join(place))):
            read_config(run / "config.yaml")


def test_a_text_is_refused_or_names_nothing_that_is_run(evil: Path, run: Path) -> None:
    config, accepted = read(run), set()
    for place in places(config):
        write(run, config)
        attack(run, {".".join(place): "trojan.Net"}, evil)
        with suppress(EnsembleNetError), ExitStack() as held:
            read_config(run / "config.yaml")
            accepted.add(".".join(place))
            opened(["--resume", str(run)], held)
        with suppress(EnsembleNetError):
            data_module(restore(run))
    assert accepted == {
        *("name", "runs", "resume", "plan", "base_run", "log_to", "model.task", "model.heads", "model.loss"),
        "model.teacher",
        *("trainer.precision", "trainer.max_time", "trainer.val_check_interval", "trainer.gradient_clip_algorithm"),
        *("trainer.deterministic", "trainer.default_root_dir", "model.optimization.optimizer"),
    }


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_no_file_of_the_name_of_a_setting_is_read(
    name: str, evil: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attack(run, {"trainer.accelerator": name}, evil)
    shutil.copy(evil / "settings.yaml", run / name)
    shutil.copy(evil / "trainer.yaml", run / "1e5")
    with ExitStack() as held:
        assert opened(["--resume", str(run)], held).config["trainer"]["accelerator"] == name
    monkeypatch.chdir(run)
    assert main(["fit", "--resume", "."]) == 2
    assert f"'trainer.accelerator' is '{name}'" in capsys.readouterr().err
    attack(run, {"trainer.accelerator": None, "trainer.callbacks": "1e5"}, evil)  # which may be a number
    assert main(["fit", "--resume", "."]) == 2


def test_the_hub_has_no_configurations(
    evil: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attack(run, ATTACKS["os.system"], evil)
    cache = tmp_path / "cache"
    ensemblenet.save(ensemblenet.convert(MNIST1DNet(8), torch.randn(2, 40)).eval(), cache)
    shutil.copytree(run, cache, dirs_exist_ok=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(cache))
    assert restore("hf://someone/net", trust=True).config is None
    mnist = ["--data.class_path", "ensemblenet.data.MNIST1D", "--data.num_test", "20", "--data.num_val", "20"]
    for command in ("predict", "validate", "export"):
        output = [option.format(tmp=tmp_path) for option in COMMANDS[command]]
        more = [] if command == "export" else mnist
        assert main([command, "hf://someone/net", *output, *more]) == 0
    capsys.readouterr()
    assert main(["test", str(cache), *mnist]) == 2  # the same as a folder
    assert "add --trust" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["os.system", "a module", "a class for the base", "data", "YAML's apply"])
def test_a_study_is_no_other(label: str, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = yaml.safe_load((CONFIGS[0].parents[1] / "compare" / "mnist1d.yaml").read_text())
    (tmp_path / "study").mkdir()
    what = ATTACKS[label]
    write(tmp_path / "study", study)
    attack(tmp_path / "study", what if isinstance(what, str) else _at_the_top(what), evil)
    assert main(["compare", "--resume", str(tmp_path / "study"), "--workers", "0"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert ("is not plain YAML" if isinstance(what, str) else "add --trust") in line


def _at_the_top(what: dict[str, Any]) -> dict[str, Any]:
    return {place.removeprefix("model."): value for place, value in what.items()}


@pytest.mark.parametrize("text", ["", "5", "[1]", "model: 5", "{model: {base: {}}}", "[" * 400, "\0", "a: 2026-99-99"])
def test_settings_that_are_none(text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, text)
    for command in (["test"], ["info"], ["fit", "--resume"]):
        assert main([*command, str(run)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_small_file_that_stands_for_much_is_refused(run: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]" for n in range(1, 12)]
    write(run, "\n".join(lines))
    with pytest.raises(LoadError, match="at most 10,000"):
        read_config(run / "config.yaml", trust=True)


# -- what goes on working


@pytest.mark.parametrize("config", CONFIGS, ids=[f"{path.parent.name}-{path.stem}" for path in CONFIGS])
def test_what_is_ours_needs_no_trust(config: Path) -> None:
    assert read_config(config) == read_config(config, trust=True)


@pytest.mark.parametrize("name", data.__all__)
def test_the_texts_that_data_modules_take_are_known(name: str, run: Path, evil: Path) -> None:
    parameters = inspect.signature(getattr(data, name)).parameters.values()
    texts = {each.name: each.default for each in parameters if isinstance(each.default, str)}
    attack(run, {"data": of_class(f"ensemblenet.data.{name}", folder="/images/here", **texts)}, evil)
    assert read_config(run / "config.yaml")["data"]["init_args"].keys() == {"folder", *texts}


@pytest.mark.parametrize(
    "what",
    [
        named("resnet18.a1_in1k", drop_path_rate=0.1, global_pool="max", block_sizes=[1, 2]),
        named("torchvision:resnet18", zero_init_residual=True),
        named("ensemblenet.models:CifarResNet", depth=8),
        {"model.base": of_class("ensemblenet.models.resnet.CifarResNet", depth=8)},
        {"model.optimization": {"optimizer": "lamb", "lr": "1e-3", "options": {"betas": [0.9, 0.99]}}},
        {"model.conversion": {"num_heads": 2, "split_at": "layers.0.conv", "combine": "logits"}},
        {"model.conversion": {"init": "inherit", "importance": "loss", "freeze": "trunk", "output": ["logits"]}},
        {"init": "inherit", "importance": "scale", "freeze": "trunk"},
        {
            "trainer.strategy": "ddp",
            "trainer.devices": "auto",
            "trainer.precision": "bf16-mixed",
            "trainer.logger": True,
        },
        {"data": of_class("ensemblenet.data.YouTube8M", folder="gs://set/2", train=["a*", "b*"], features={"rgb": 4})},
        {
            "data": of_class(
                "ensemblenet.data.images.ImageData",
                folder=r"C:\images",
                dataset="hfds/someone/set",
                augmentation={"auto_augment": "rand-m9-mstd0.5-inc1", "scale": [0.1, 1.0], "re_prob": 0.25},
                reader={"input_key": "img", "target_key": "fine_label"},
            )
        },
    ],
)
def test_plain_settings_are_known(what: dict[str, Any], run: Path, evil: Path) -> None:
    attack(run, what, evil)
    assert read_config(run / "config.yaml") == read(run)


def test_code_of_the_users_own_is_run_if_trusted(evil: Path, run: Path, tmp_path: Path) -> None:
    (evil / "own.py").write_text("from ensemblenet.models import MNIST1DNet\nclass Net(MNIST1DNet): ...\n")
    attack(run, {"model.base": of_class("own.Net", width=8)}, evil)
    with pytest.raises(LoadError, match=r"'model.base.class_path' is 'own.Net', which is not known"):
        restore(run)
    assert type(restore(run, trust=True).network).__name__ == "Net"
    for command in ("predict", "test", "validate", "report", "export", "info"):
        output = [option.format(tmp=tmp_path) for option in COMMANDS[command]]
        assert main([command, str(run), "--trust", *output]) == 0
    assert main(["fit", "--resume", str(run), "--trust"]) == 0
    assert (run / "results.json").is_file()
    assert read(run)["model"]["base"]["class_path"] == "own.Net"
    (run / "results.json").unlink()
    attack(run, {"trust": True}, evil)  # says the run of itself
    assert main(["fit", "--resume", str(run)]) == 2


def test_a_recipe_names_code_only_if_it_is_trusted(
    evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (evil / "own.py").write_text(
        "from torch import nn\ndef make(num_classes): return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), "
        "nn.Linear(16, num_classes))\n"
    )
    saved = tmp_path / "saved"
    assert main(["convert", "own:make", "--input-shape", "4", "--num-classes", "3", "--output", str(saved)]) == 0
    with pytest.raises(LoadError, match=r"'own:make' is code of the model's author. .* trust=True"):
        ensemblenet.load(saved)
    output = ["--format", "torch", "--output", str(tmp_path / "m.pt2")]
    assert main(["export", str(saved), *output]) == 2
    assert "--trust" in capsys.readouterr().err.splitlines()[-1]
    assert main(["export", str(saved), *output, "--trust"]) == 0
    base = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.ones(1, 4)
    assert torch.equal(ensemblenet.load(saved, trust=True)(x), ensemblenet.load(saved, base)(x))

    recipe = json.loads((saved / "recipe.json").read_text())
    for factory, name in [
        ("module", "trojan:make"),
        ("ensemblenet", "create"),
        ("ensemblenet", "named"),
        ("timm", "trojan:make"),
        ("torchvision", "trojan:make"),
        ("torchvision", "fasterrcnn_resnet50_fpn"),
        ("trojan", "make"),
    ]:
        recipe["base"] |= {"factory": factory, "name": name, "arguments": {"name": 5}}
        (saved / "recipe.json").write_text(json.dumps(recipe))
        with pytest.raises(LoadError):
            ensemblenet.load(saved)


def test_a_recipe_names_networks_of_torchvision(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    arguments = ["--num-classes", "5", "--input-shape", "3,32,32", "--budget", "1", "--split-at", "input"]
    assert main(["convert", "torchvision:squeezenet1_1", *arguments, "--output", str(saved)]) == 0
    assert ensemblenet.load(saved)(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_weights_that_training_began_with_are_not_read_again(run: Path, evil: Path, tmp_path: Path) -> None:
    base = create("test_resnet", 10)
    config = read(run)
    config["model"]["base"] = of_class(CREATE, name="test_resnet", num_classes=10, weights="gone.pth")
    write(run, config)
    save_file(base.state_dict(), run / "model" / "model.safetensors")
    description = json.loads((run / "model" / "data.json").read_text())
    (run / "model" / "data.json").write_text(json.dumps(description | {"input_shape": [3, 64, 64]}))
    restored = restore(run)
    assert restored.config is not None
    assert restored.config["model"]["base"]["init_args"]["weights"] == "gone.pth"
    for name, tensor in restored.network.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])


def test_weights_are_no_pickle(evil: Path) -> None:
    with pytest.raises(ModelNameError, match=r"base.pth is not a state dict of tensors alone"):
        create("test_resnet", weights=str(evil / "base.pth"))
