"""`predict` writes what the network says, and how far its heads agree."""

from __future__ import annotations

import csv
import io
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.cli.predict import predict
from ensemblenet.data.files import InputFiles, file_reader, find_files
from ensemblenet.data.kinetics import Kinetics
from ensemblenet.data.youtube8m_levels import VideoBatch
from ensemblenet.evaluation.predictions import PredictionFile
from ensemblenet.evaluation.submission import submission_rows
from ensemblenet.inputs import Inputs
from ensemblenet.models import CifarResNet, MLPTagger
from ensemblenet.storage.restore import Restored, data_module, restore
from ensemblenet.training.fit import fit

CLASSES = ["cat", "dog, or wolf", "crane", "crane"]  # ImageNet has two of that name
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    sizes = {"num_train": 60, "num_val": 40, "num_test": 50, "batch_size": 20}
    settings = {
        "name": "tiny",
        "model": {
            "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
            "conversion": {"num_heads": 3},
            "heads": "looped",
        },
        "data": {"class_path": "ensemblenet.data.MNIST1D", "init_args": sizes},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return fit(["--config", str(folder / "tiny.yaml"), "--runs", str(folder / "runs")])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network of 16 x 16 images."""
    torch.manual_seed(0)
    base = CifarResNet(8, 8, num_classes=4)
    model = ensemblenet.convert(base, torch.randn(2, 3, 16, 16), num_heads=2).eval()
    preprocessing = {"mean": MEAN, "std": STD, "crop_pct": 0.8, "interpolation": "bicubic"}
    folder = tmp_path_factory.mktemp("saved") / "model"
    return ensemblenet.save(model, folder, {"classes": CLASSES, "preprocessing": preprocessing})


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name, size, mode in [("b.PNG", (40, 30), "RGB"), ("a.jpg", (20, 50), "L"), ("deep/c.png", (16, 16), "RGBA")]:
        pixels = rng.integers(256, size=(*size[::-1], {"RGB": 3, "L": 1, "RGBA": 4}[mode]), dtype=np.uint8)
        Image.fromarray(pixels.squeeze(), mode).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def read(path):
    """Rows as dictionaries; probabilities as a list under `p`."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        assert json.loads(table.schema.metadata[b"classes"])
        return [{**row, "p": row["probabilities"]} for row in table.to_pylist()]
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    first = next(place for place, name in enumerate(header) if name.startswith("p_"))
    return [dict(zip(header[:first], line, strict=False)) | {"p": line[first:]} for line in lines]


def check(rows, z, classes):
    """Rows against the logits of every head, (K, N, C)."""
    p = z.mean(0).softmax(1)
    for n, row in enumerate(rows):
        best = int(p[n].argmax())
        votes = z[:, n].argmax(1).tolist()
        several = [(j, k) for j in range(len(votes)) for k in range(len(votes)) if j != k]
        assert row["predicted"] == classes[best]
        assert float(row["probability"]) == pytest.approx(p[n, best].item(), rel=1e-4)
        assert float(row["spread"]) == pytest.approx(np.std(z[:, n].softmax(1)[:, best].tolist()), rel=1e-3, abs=1e-7)
        assert float(row["disagreement"]) == pytest.approx(np.mean([votes[j] != votes[k] for j, k in several]))
        assert [float(value) for value in row["p"]] == pytest.approx(p[n].tolist(), rel=1e-4)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(("split", "more"), [("test", []), ("val", ["--split", "val"])])
def test_a_split_of_the_runs_data(run: Path, tmp_path: Path, suffix: str, split: str, more: list[str]) -> None:
    path = predict([str(run), "--output", str(tmp_path / f"predictions{suffix}"), *more])
    restored = restore(run)
    data = data_module(restored)
    data.setup()
    x, y = getattr(data, split)
    rows = read(path)
    assert [row["id"] for row in rows] == [str(n) for n in range(len(x))]
    assert [row["label"] for row in rows] == [str(digit) for digit in y.tolist()]
    with torch.inference_mode():
        check(rows, restored.network(x, per_head=True), list("0123456789"))


def test_data_that_is_changed(run: Path, tmp_path: Path) -> None:
    assert len(read(predict([str(run), "--output", str(tmp_path / "x.csv"), "--data.num_test", "20"]))) == 20


def prepared(path):
    """Resize the shorter side to 16 / 0.8 = 20 pixels, take the centre, normalise."""
    image = Image.open(path).convert("RGB")
    image = image.resize([20 * side // min(image.size) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (round((side - 16) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + 16, top + 16))) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_images_are_prepared_as_for_testing(
    saved: Path, images: Path, tmp_path: Path, suffix: str, workers: str
) -> None:
    output = tmp_path / f"x{suffix}"
    arguments = [str(saved), "--data", str(images), str(images / "a.jpg"), "--output", str(output)]
    rows = read(predict([*arguments, "--batch-size", "3", "--num-workers", workers]))
    paths = [images / "a.jpg", images / "b.PNG", images / "deep" / "c.png", images / "a.jpg"]
    assert [row["id"] for row in rows] == [str(path) for path in paths]
    assert "label" not in rows[0]
    model = ensemblenet.load(saved)
    with torch.inference_mode():
        z = model(torch.stack([prepared(path) for path in paths]), per_head=True)
    check(rows, z, CLASSES)


def test_grey_images(images: Path, tmp_path: Path) -> None:
    described = {"preprocessing": {"mean": [0.5], "std": [0.25], "crop_pct": 1.0}}
    reader = file_reader((1, 20, 20), described)
    assert reader is not None
    with Image.open(images / "a.jpg") as image:
        expected = (np.asarray(image)[15:35] / 255 - 0.5) / 0.25
    assert np.allclose(reader.read(images / "a.jpg")[0], expected, atol=1e-6)


def test_videos_are_seen_as_in_testing(tmp_path: Path) -> None:
    """Ten clips of the centre, as the data module has them."""
    av = pytest.importorskip("av")
    rng = np.random.default_rng(0)
    for split, label in (("train", "run"), ("train", "walk"), ("val", "run"), ("val", "walk")):
        path = tmp_path / split / label / f"{label}.mp4"
        path.parent.mkdir(parents=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for _ in range(20):
                picture = np.kron(rng.integers(256, size=(4, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    settings = {"num_frames": 4, "stride": 2, "image_size": 16, "crop_pct": 0.8, "num_crops": 1, "num_workers": 0}
    data = Kinetics(tmp_path, "train", "val", **settings)
    data.setup()
    views, _ = next(iter(data.test_dataloader()))
    assert views.shape == (2, 10, 3, 4, 16, 16)
    reader = file_reader((3, 4, 16, 16), data.description())
    assert reader is not None
    files = InputFiles(find_files([str(tmp_path / "val")], reader.suffixes), reader.read)
    [batch] = files.batches(batch_size=4, num_workers=0)
    assert [Path(path).name for path in batch.paths] == ["run.mp4", "walk.mp4"]
    assert torch.allclose(batch.inputs, views)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_images(
    saved: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    (images / "broken.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])
    (images / "empty.png").touch()
    output = tmp_path / "x.csv"
    arguments = ["predict", str(saved), "--data", str(images), "--output", str(output), "--num-workers", workers]
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{images / 'broken.jpg'}: the image cannot be decoded" in line
    assert not list(tmp_path.glob("*x.csv*"))
    assert main([*arguments, "--on-broken", "skip"]) == 0
    printed = capsys.readouterr().out
    assert f"Skipped {images / 'empty.png'}: the image cannot be decoded" in printed
    assert "3 files, 2 skipped" in printed
    assert len(read(output)) == 3


def nothing_but_broken(images):
    for path in images.rglob("*.*"):
        path.unlink()
    (images / "x.png").touch()


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (nothing_but_broken, ["--on-broken", "skip"], "There is no example to predict"),
        (lambda images: [path.unlink() for path in images.rglob("*.*")], [], "holds no files that end in .avif, .bmp"),
        (lambda images: None, ["--data", "nowhere"], "nowhere: No such file or directory"),
        (lambda images: None, ["--data.folder", "x"], "--config and --data.KEY are for the data of a run"),
        (lambda images: None, ["--data.class_path=MNIST1D"], "--config and --data.KEY are for the data of a run"),
        (lambda images: None, ["--config", __file__], "--config and --data.KEY are for the data of a run"),
        (lambda images: None, ["--output", "x.txt"], "must end in .csv or .parquet, got x.txt"),
        (lambda images: None, ["--output", __file__], "exists; --output needs a new file"),
    ],
)
def test_what_a_user_gets_wrong(
    saved: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[..., Any],
    more: list[str],
    message: str,
) -> None:
    change(images)
    arguments = ["predict", str(saved), "--output", str(tmp_path / "new" / "x.csv"), "--data", str(images), *more]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert not Path("x.txt").exists()


def test_a_submission_is_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = MLPTagger(1152, 6, [16])
    saved = ensemblenet.save(ensemblenet.convert(base, torch.randn(2, 1152), task="multilabel"), tmp_path / "saved")
    assert main(["predict", str(saved), "--data", "x*", "--output", str(tmp_path / "x.parquet")]) == 2
    assert "submission to the challenge is a .csv file" in capsys.readouterr().err


FORMULAS = ["=1+1", "+1+cmd|'/C calc'!A0", "-1+cmd|'/C calc'!A0", "@SUM(1)", "\t=1", " =1", "\r\n=1"]
PLAIN = ["-Ab_1-.mp4", "--Ab/c d.mp4", "a=b", "a, b", 'a "b"', "a\nb", "\u00e9"]


def test_no_cell_of_a_csv_file_is_a_formula(tmp_path: Path) -> None:
    ids = FORMULAS + PLAIN
    network = torch.nn.Linear(4, 2)
    classes = {"classes": ["=cmd()", "b"]}
    for name in ("x.csv", "x.parquet"):
        restored = Restored(network, "multiclass", Inputs.of(torch.zeros(1, 4)), classes, None, Path())
        with PredictionFile(tmp_path / name, restored) as file:
            file.write(ids, torch.tensor([[[9.0, 0.0]] * len(ids)]), torch.zeros(len(ids), dtype=torch.int64))
    rows = read(tmp_path / "x.csv")
    assert [row["id"] for row in rows] == [f"'{name}" for name in FORMULAS] + PLAIN
    assert {row["predicted"] for row in rows} == {row["label"] for row in rows} == {"'=cmd()"}
    rows = read(tmp_path / "x.parquet")  # which no spreadsheet runs
    assert [row["id"] for row in rows] == ids
    assert {row["predicted"] for row in rows} == {"=cmd()"}


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_names_that_are_no_utf_8_are_written(tmp_path: Path, name: str) -> None:
    network = torch.nn.Linear(4, 2)
    restored = Restored(network, "multiclass", Inputs.of(torch.zeros(1, 4)), {"classes": ["a", "b"]}, None, Path())
    with PredictionFile(tmp_path / name, restored) as file:
        file.write(["do\udcffg.png"], torch.tensor([[[9.0, 0.0]]]))
    assert [row["id"] for row in read(tmp_path / name)] == ["do\\udcffg.png"]


def test_ids_of_a_submission_are_one_cell_each(tmp_path: Path) -> None:
    ids = FORMULAS + PLAIN
    batch = VideoBatch(ids, torch.zeros(len(ids), 3), torch.zeros(len(ids), 3))
    lines = [f"{row}\n" for row in submission_rows(torch.nn.Identity(), [batch], top=1)]
    cells = list(csv.reader(io.StringIO("".join(lines), newline="")))
    assert cells == [[name, "0 0.5"] for name in [f"'{name}" for name in FORMULAS] + PLAIN]
    assert lines[len(FORMULAS)] == "-Ab_1-.mp4,0 0.5\n"  # the usual ones without quotes


@pytest.fixture
def folders(tmp_path):
    """Class folders of noise, 16 x 16."""
    rng = np.random.default_rng(0)
    for split, name, number in ((split, name, n) for split in ("train", "val") for name in "ab" for n in range(4)):
        path = tmp_path / "folders" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "folders"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_names_of_images_that_follow_skipped_ones(folders: Path, tmp_path: Path, workers: str) -> None:
    model = ensemblenet.convert(CifarResNet(8, 8, num_classes=2), torch.randn(2, 3, 16, 16)).eval()
    saved = ensemblenet.save(model, tmp_path / "saved", {"classes": ["a", "b"]})
    for name in ("0", "1", "3"):  # a whole batch, and one more
        (folders / "val" / "a" / f"{name}.png").write_bytes(b"no image")
    data = ["class_path=ensemblenet.data.ImageData", f"folder={folders}", "image_size=16", "crop_pct=1.0"]
    data += ["batch_size=1", "on_broken=skip", f"num_workers={workers}"]
    path = predict([str(saved), "--output", str(tmp_path / "x.csv"), *(f"--data.{option}" for option in data)])
    rows = read(path)
    assert [(row["id"], row["label"]) for row in rows] == [
        (name, name[0]) for name in ("a/2.png", "b/0.png", "b/1.png", "b/2.png", "b/3.png")
    ]
    x = [np.asarray(Image.open(folders / "val" / row["id"])) / 255 for row in rows]
    normalised = (np.stack(x) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.inference_mode():
        check(rows, model(torch.from_numpy(normalised).float().permute(0, 3, 1, 2), per_head=True), "ab")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_predictions_on_a_full_disk_name_the_file(suffix: str, tmp_path: Path) -> None:
    inputs = Inputs.of(torch.zeros(1, 4))
    restored = Restored(nn.Linear(4, 2), "multiclass", inputs, {"classes": ["cat", "dog"]}, None, Path())
    path = tmp_path / f"predictions{suffix}"

    def write() -> None:
        with PredictionFile(path, restored) as file:
            for place in range(3):
                file.write([str(place)] * 50, torch.zeros(2, 50, 2))

    write()
    whole = path.stat().st_size
    path.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for most in (0, 3, whole // 2, whole - 8, whole - 1):  # at the start, in the middle, and when it is closed
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
            with pytest.raises(OSError, match="File too large") as caught:
                write()
            assert (caught.value.filename, caught.value.strerror) == (str(path), "File too large")
            assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
