"""What all data modules have in common: seeds, resuming, the splits of a stage, and single files."""

from __future__ import annotations

import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from made_images import encoded, make_folders
from made_videos import make_video
from shards import AUDIO, CLASSES, RGB, videos, write

import ensemblenet.data
from ensemblenet.data import MNIST1D, ImageData, Kinetics, ParquetImages, YouTube8M
from ensemblenet.data.files import file_reader
from ensemblenet.data.loading import ResumableLoader
from ensemblenet.data.module import DataModule
from ensemblenet.data.parquet_images import Normalize, read_parquet_images
from ensemblenet.errors import DataError
from ensemblenet.inputs import Inputs
from ensemblenet.storage.restore import Restored, data_module


def mnist1d(folder: Path, **options: Any) -> DataModule:
    return MNIST1D(batch_size=4, num_train=20, num_val=10, num_test=10, **options)


def images(folder: Path, **options: Any) -> DataModule:
    make_folders(folder) if not (folder / "train").exists() else None
    return ImageData(folder, image_size=16, batch_size=4, num_workers=0, **options)


def parquet(folder: Path, **options: Any) -> DataModule:
    for split, rows in (("train", 40), ("test", 10)):
        column = [{"bytes": encoded(number % 3, number), "path": ""} for number in range(rows)]
        table = pa.table({"image": column, "label": [number % 3 for number in range(rows)]})
        pq.write_table(table, folder / f"{split}.parquet")
    return ParquetImages(folder, image_size=16, batch_size=4, num_val=10, **options)


def kinetics(folder: Path, **options: Any) -> DataModule:
    for split in ("train", "val"):
        rows = [f"class {number % 2},v{number},0,1,{split}\n" for number in range(6)]
        (folder / f"{split}.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "".join(rows))
    for number in range(6):
        make_video(folder / f"class_{number % 2}" / f"v{number}.mp4")
    settings = {"num_frames": 4, "stride": 2, "image_size": 16, "batch_size": 2, "num_workers": 0}
    return Kinetics(folder, **settings | options)


def youtube8m(folder: Path, **options: Any) -> DataModule:
    for split in ("train", "validate"):
        write(folder / f"{split}0000.tfrecord", videos(20))
    features = {"mean_rgb": RGB, "mean_audio": AUDIO}
    return YouTube8M(str(folder), features=features, num_classes=CLASSES, batch_size=4, num_workers=0, **options)


Make = Callable[..., DataModule]
MODULES = [mnist1d, images, parquet, kinetics, youtube8m]


def epoch(data: Any, number: int = 0) -> list[torch.Tensor]:
    """The inputs of the training batches of an epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [inputs for inputs, _ in loader]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# -- seeds


@pytest.mark.parametrize("make", MODULES)
def test_a_module_that_is_used_again_with_another_seed_gives_other_batches(tmp_path: Path, make: Make) -> None:
    data: Any = make(tmp_path)
    data.setup()
    found = {}
    for seed in (1, 2, 1):
        data.seed = seed
        torch.manual_seed(0)  # what the data draws is its own
        batches = epoch(data)
        assert seed not in found or same(batches, found[seed])
        found[seed] = batches
        assert not same(batches, epoch(data, 1))
    assert not same(found[1], found[2])


@pytest.mark.parametrize("make", MODULES)
def test_reseeding_keeps_a_seed_that_was_given(tmp_path: Path, make: Make) -> None:
    data = make(tmp_path)
    data.setup()
    found = []
    for given, run in ((None, 1), (None, 2), (5, 1), (5, 2)):
        data.seed = given
        data.reseed(run)
        found.append(epoch(data))
    assert same(found[2], found[3])
    assert not any(same(found[k], other) for k, other in ((0, found[1]), (0, found[2]), (1, found[2])))


@pytest.mark.parametrize("make", MODULES)
def test_a_plain_loop_shuffles_each_epoch_anew(tmp_path: Path, make: Make) -> None:
    data = make(tmp_path)
    data.setup()
    loader = data.train_dataloader()
    first, second = ([inputs for inputs, _ in loader] for _ in range(2))
    assert same(first, epoch(data, 0))
    assert same(second, epoch(data, 1))
    assert data.state_dict()["epoch"] == 2


class Sees(LightningModule):
    """Keeps its training inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        self.seen.append(batch[0])
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("make", MODULES)
def test_without_a_seed_each_training_takes_that_of_its_run(tmp_path: Path, make: Make) -> None:
    data: Any = make(tmp_path)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    found = {}
    for seed in (1, 2, 1):
        seed_everything(seed, verbose=False)
        module = Sees()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few workers and few steps
            Trainer(**options).fit(module, data)
        assert seed not in found or same(module.seen, found[seed])
        found[seed] = module.seen
    assert not same(found[1], found[2])


# -- going on where a killed run was


@pytest.mark.parametrize("make", MODULES)
def test_training_goes_on_within_an_epoch(tmp_path: Path, make: Make) -> None:
    data = make(tmp_path)
    data.seed = 3
    data.setup()
    whole = epoch(data, 1)
    loader = data.train_dataloader()
    loader.set_epoch(1)
    for _, _ in zip(range(2), loader, strict=False):
        pass
    state = data.state_dict()
    assert (state["epoch"], state["consumed"]) == (1, 2)
    other = make(tmp_path)
    other.seed = 3
    other.setup()
    asked_before = other.train_dataloader()  # as schedules ask
    other.load_state_dict(state)
    asked_before.set_epoch(1)
    assert same([inputs for inputs, _ in asked_before], whole[2:])
    assert same(epoch(other, 1), whole[2:])
    other.seed = 3  # begins anew
    assert same(epoch(other, 1), whole)


@pytest.mark.parametrize("make", MODULES)
def test_processes_share_each_batch(tmp_path: Path, make: Make) -> None:
    data = make(tmp_path)
    data.setup()
    seen = []
    for rank in (0, 1):
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": 2})()  # pyright: ignore
        loader = data.val_dataloader()
        assert isinstance(loader, ResumableLoader)
        seen += [inputs for inputs, _ in loader]
    data.trainer = None
    alone = torch.cat([inputs for inputs, _ in data.val_dataloader()])
    assert torch.equal(torch.cat(seen), alone)


# -- what a network is told of its data


@pytest.mark.parametrize("make", MODULES)
def test_a_description_names_the_data_and_its_classes(tmp_path: Path, make: Make) -> None:
    data = make(tmp_path)
    data.setup()
    described = data.description()
    assert described["data"] == type(data).__name__
    assert (described["classes"] is None) == (make is youtube8m)
    assert isinstance(data.example_name("val", 0), str)


# -- single files are read as those of the test split


def read(data: DataModule, path: Path) -> torch.Tensor:
    inputs, _ = next(iter(data.train_dataloader()))
    reader = file_reader(tuple(inputs.shape[1:]), data.description())
    assert reader is not None
    return reader.read(path)


@pytest.mark.parametrize(("num_clips", "num_crops"), [(1, 1), (3, 1), (2, 3), (10, 1)])
@pytest.mark.parametrize("short", ["loop", "pad"])
def test_videos(tmp_path: Path, num_clips: int, num_crops: int, short: str) -> None:
    data = kinetics(
        tmp_path, num_clips=num_clips, num_crops=num_crops, crop_pct=0.8, short=short, num_frames=6, stride=5
    )
    data.setup()
    views = torch.cat([inputs for inputs, _ in data.test_dataloader()])
    for place in range(len(views)):
        assert torch.equal(read(data, tmp_path / data.example_name("test", place)), views[place])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images(tmp_path: Path, interpolation: str) -> None:
    data = images(tmp_path, interpolation=interpolation, crop_pct=0.7, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    data.setup()
    inputs = torch.cat([inputs for inputs, _ in data.test_dataloader()])
    for place in (0, 7, 14):
        path = tmp_path / "val" / data.example_name("test", place)
        assert torch.equal(read(data, path), inputs[place])


@pytest.mark.parametrize("image_size", [16, 9])
def test_images_of_parquet_files(tmp_path: Path, image_size: int) -> None:
    parquet(tmp_path)
    data = ParquetImages(tmp_path, image_size=image_size, batch_size=4, num_val=10)
    data.setup()
    inputs = torch.cat([inputs for inputs, _ in data.test_dataloader()])
    for number in range(3):
        (tmp_path / "x.png").write_bytes(encoded(number % 3, number))
        assert torch.equal(read(data, tmp_path / "x.png"), inputs[number])


def test_descriptions_of_version_0_1_read_as_before(tmp_path: Path) -> None:
    data = kinetics(tmp_path, num_clips=10, num_crops=1)
    data.setup()
    described = data.description()
    del described["data"], described["preprocessing"]["num_clips"], described["preprocessing"]["num_crops"]
    reader = file_reader((3, 4, 16, 16), described)
    assert reader is not None
    views, _ = next(iter(data.test_dataloader()))
    assert torch.equal(reader.read(tmp_path / data.example_name("test", 0)), views[0])


def test_a_description_of_other_data_is_read_by_its_shape() -> None:
    known = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    reader = file_reader((3, 16, 16), {"data": "TheirImages", "preprocessing": known})
    assert reader is not None
    assert ".jpg" in reader.suffixes
    for shape, preprocessing in (((3, 16, 16), {}), ((3, 16, 16), None), ((40,), known)):
        assert file_reader(shape, {"data": "TheirImages", "preprocessing": preprocessing}) is None


def test_data_whose_files_are_no_examples(tmp_path: Path) -> None:
    for make in (mnist1d, youtube8m):
        data = make(tmp_path)
        data.setup()
        assert file_reader((24,), data.description()) is None


# -- names of version 0.1


def test_on_damage_is_on_broken(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="on_damage is now on_broken"):
        data = youtube8m(tmp_path, on_damage="skip")
    assert data.on_broken == "skip"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a stored configuration names what it leaves as it was
        assert youtube8m(tmp_path, on_damage="error", on_broken="skip").on_broken == "skip"


def test_a_stored_configuration_of_version_0_1(tmp_path: Path) -> None:
    """With all arguments that YouTube8M then had."""
    arguments = {
        "folder": str(tmp_path),
        "level": "video",
        "train": "train*.tfrecord",
        "val": "validate*.tfrecord",
        "test": "validate*.tfrecord",
        "num_classes": CLASSES,
        "features": {"mean_rgb": RGB, "mean_audio": AUDIO},
        "num_frames": None,
        "sample_frames": False,
        "batch_size": 4,
        "shuffle_buffer": 1000,
        "num_workers": 0,
        "on_damage": "skip",
        "seed": 3,
    }
    config = {"data": {"class_path": "ensemblenet.data.YouTube8M", "init_args": arguments}}
    restored = Restored(torch.nn.Identity(), "multilabel", Inputs.of(torch.zeros(1, RGB + AUDIO)), {}, config, tmp_path)
    with pytest.warns(DeprecationWarning, match="on_damage is now on_broken"):
        data: Any = data_module(restored)
    assert (type(data), data.on_broken, data.seed) == (YouTube8M, "skip", 3)


def test_checkpoints_of_version_0_1_go_on(tmp_path: Path) -> None:
    share = {"batch_size": 4, "train": True, "shuffle_buffer": 1000, "seed": 3}
    share |= {"rank": 0, "world_size": 1, "num_workers": 0}
    old: dict[Make, dict[str, Any]] = {
        youtube8m: {"epoch": 1, "consumed": 2, "total": 20, "share": share},
        images: {"epoch": 1, "consumed": 2, "examples": 24, "seed": 3, "global_batch_size": 4},
    }
    for make, state in old.items():
        data = make(tmp_path, seed=3)
        data.setup("fit")
        whole = epoch(data, 1)
        data.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert same(epoch(data, 1), whole[2:])
        if make is youtube8m:
            with pytest.warns(DeprecationWarning, match="under their own names: 'batch_size', 'seed', ... and 'recor"):
                data.train_dataloader()
            with (
                pytest.warns(DeprecationWarning, match="own names"),
                pytest.raises(DataError, match="seed was 4 and is 3"),
            ):
                data.load_state_dict({**state, "share": share | {"seed": 4}})


@pytest.mark.parametrize(
    ("home", "name"),
    [
        ("kinetics", "find_videos"),
        ("kinetics", "LabelledVideos"),
        ("parquet_images", "Normalise"),
        ("tensors", "DataError"),
        ("classes", "ClassesError"),
        ("youtube8m", "NUM_CLASSES"),
        ("youtube8m", "SegmentLevel"),
        ("youtube8m", "VideoBatch"),
        ("youtube8m", "make_level"),
    ],
)
def test_names_that_moved(home: str, name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(import_module(f"ensemblenet.data.{home}"), name)
    assert all(name in str(warning.message) and " is now " in str(warning.message) for warning in caught)


def test_the_old_name_of_normalize() -> None:
    pixels = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    with pytest.warns(DeprecationWarning, match=r"Normalize\.of"):
        from ensemblenet.data.parquet_images import Normalise  # pyright: ignore
    assert torch.equal(Normalise(pixels)(pixels), Normalize.of(pixels)(pixels))


# -- the package is loaded piece by piece


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_module_needs_no_library_of_another_format() -> None:
    code = (
        "import sys\n"
        "absent = ('pyarrow', 'timm', 'av', 'google_crc32c', 'datasets')\n"
        "sys.modules |= dict.fromkeys(absent)\n"  # importing them fails
        "from ensemblenet.data import MNIST1D, load_all\n"
        "data = MNIST1D(num_train=20, num_val=5, num_test=5, batch_size=10)\n"
        "data.setup()\n"
        "print(len(list(data.train_dataloader())))\n"
        "load_all()\n"  # those that can be
        "print(sorted(name for name in sys.modules if name.startswith('ensemblenet.data.') and sys.modules[name]))\n"
    )
    batches, modules = python(code).splitlines()
    assert batches == "2"
    assert "'ensemblenet.data.mnist1d'" in modules
    assert "'ensemblenet.data.images'" in modules
    assert "parquet_images" not in modules
    assert "youtube8m'" not in modules


def test_every_class_is_listed_once() -> None:
    for name in ensemblenet.data.__all__:
        module = getattr(ensemblenet.data, name)
        assert issubclass(module, DataModule)
        assert module.__module__ == f"ensemblenet.data.{ensemblenet.data._HOMES[name]}"
    with pytest.raises(AttributeError, match=r"module 'ensemblenet\.data' has no attribute 'Nothing'"):
        ensemblenet.data.Nothing  # pyright: ignore  # noqa: B018


# -- images that cannot be decoded


def bomb() -> bytes:
    """A PNG that says that it has 4e9 pixels, for which Pillow has an error of its own."""
    data = bytearray(encoded(0, 0))
    data[16:24] = struct.pack(">II", 1 << 16, 1 << 16)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("content", [b"", b"nonsense", encoded(0, 0)[:60], bomb()])
def test_every_reader_of_images_refuses_a_broken_one_in_one_line(tmp_path: Path, content: bytes) -> None:
    data = images(tmp_path / "folders")
    (tmp_path / "folders" / "val" / "cat" / "100.png").write_bytes(content)
    data.setup()
    message = r"the image cat/100\.png cannot be decoded: [^\n]+$"
    with pytest.raises(DataError, match=message):
        list(data.val_dataloader())
    with pytest.raises(DataError, match=r"100\.png: the image cannot be decoded: [^\n]+$"):
        read(data, tmp_path / "folders" / "val" / "cat" / "100.png")
    table = pa.table({"image": [{"bytes": content, "path": ""}], "label": [0]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet, row 0: the image cannot be decoded: [^\n]+$"):
        read_parquet_images(tmp_path / "x.parquet")
