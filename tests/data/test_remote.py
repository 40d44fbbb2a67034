"""Data on servers: the same batches as from a disk, whatever the server does, or one line."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_images import CLASSES, encoded, make_parquet, make_shards, make_tars
from made_videos import make_video
from servers import FailingServer, HubServer, http_server, upload, upload_to_gcs
from shards import AUDIO, RGB, framed, serialized, videos

from ensemblenet.cli.main import main
from ensemblenet.data import ImageData, Kinetics, ParquetImages, YouTube8M, remote
from ensemblenet.data.module import DataModule
from ensemblenet.data.remote import cache_folder
from ensemblenet.errors import DataError, FetchError, without_secrets
from ensemblenet.storage.trust import read_config

Make = Callable[[Any], DataModule]


pytestmark = pytest.mark.usefixtures("s3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of images, one of them broken, as tars and as Parquet, and shards of videos."""
    root = tmp_path / "data"
    root.mkdir()
    make_shards(root, train=8, val=3, shards=3)
    make_parquet(root, train=8, val=3, shards=3)
    data = bytearray((root / "train-0001.tar").read_bytes())
    at = data.index(b"PNG")
    data[at : at + 3] = b"GNP"
    (root / "train-0001.tar").write_bytes(data)
    rows = pq.read_table(root / PARQUET)
    images = rows["image"].to_pylist()
    images[2]["bytes"] = images[2]["bytes"].replace(b"PNG", b"GNP")
    pq.write_table(rows.set_column(0, "image", [images]), root / PARQUET)
    for split, count in (("train", 3), ("validate", 2)):
        for number in range(count):
            records = [framed(serialized(video)) for video in videos(9, seed=number)]
            if number == 1:
                records[4] = records[4][:-1] + bytes([records[4][-1] ^ 1])
            (root / f"{split}{number}.tfrecord").write_bytes(b"".join(records))
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[FailingServer]:
    with http_server(folder) as server:
        yield server


@pytest.fixture
def gs(folder: Path, google: str) -> str:
    return upload_to_gcs(folder, google)


@pytest.fixture
def hf(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from huggingface_hub import constants

    with HubServer(folder) as server:
        # what HF_ENDPOINT sets when the library is imported
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield "hf://datasets/owner/name"
        server.shutdown()


PARQUET = "train-00001-of-00003.parquet"
BUCKETS = (f"bucket-{number}" for number in itertools.count())


def images(folder: Any, workers: int = 0, **settings: Any) -> ImageData:
    known = {"dataset": "wds/", "train": "train-{0000..0002}.tar", "val": "val-*.tar"}
    small = {"image_size": 8, "batch_size": 5, "seed": 1}
    return ImageData(folder, num_workers=workers, on_broken="skip", **{**known, **small, **settings})


def tables(folder: Any, workers: int = 0, **settings: Any) -> ImageData:
    known = {"dataset": "hfds/", "train": "train-{00000..00002}-of-00003.parquet", "val": "validation-*.parquet"}
    return images(folder, workers, **{**known, "shuffle_buffer": 9, **settings})


def tagged(folder: Any, workers: int = 0, **settings: Any) -> YouTube8M:
    sizes = {"mean_rgb": RGB, "mean_audio": AUDIO}
    return YouTube8M(
        str(folder), features=sizes, batch_size=4, num_workers=workers, on_broken="skip", seed=1, **settings
    )


def batches(data: DataModule, epochs: int = 2) -> list[Any]:
    data.setup("fit")
    loader = data.train_dataloader()
    read = [batch for _ in range(epochs) for batch in loader]
    assert (loader.skipped, len(loader.broken)) == (epochs, 1)
    return [*read, *data.val_dataloader()]


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


# -- the same as from a disk


@pytest.mark.filterwarnings("ignore:.*Skipped")
@pytest.mark.parametrize("make", [images, tables, tagged])
@pytest.mark.parametrize("kind", ["http", "s3", "gs", "hf"])
def test_batches_and_places_are_those_of_a_disk(
    make: Make, kind: str, folder: Path, server: FailingServer, request: pytest.FixtureRequest
) -> None:
    if kind in ("http", "s3"):
        url = server.url if kind == "http" else upload(folder, next(BUCKETS))
    else:
        url = request.getfixturevalue(kind)
    expected = batches(make(folder))
    assert same(batches(make(url)), expected)

    data = make(url)
    data.setup("fit")
    begun = iter(data.train_dataloader())
    first = [next(begun), next(begun)]
    resumed = make(url)
    resumed.setup("fit")
    resumed.load_state_dict(data.state_dict())
    rest = list(resumed.train_dataloader())
    assert same([*first, *rest], expected[: len(first) + len(rest)])
    assert len(first) + len(rest) == len(resumed.train_dataloader())


@pytest.mark.filterwarnings("ignore:.*Skipped")
def test_workers_read_what_one_process_reads_and_ranks_share_an_epoch(folder: Path, server: FailingServer) -> None:
    expected = batches(images(folder), epochs=1)
    assert same(batches(images(server.url, workers=2), epochs=1), expected)

    data = images(server.url, batch_size=3)
    data.setup("fit")
    seen = [
        x[0].sum().item()
        for rank in (0, 1)
        for inputs, _ in data.make_loader("val", seed=1, rank=rank, world_size=2)
        for x in inputs
    ]
    assert len(seen) == len(set(seen)) == 3 * len(CLASSES)
    fetched = [path for path in server.requests if path.endswith(".tar")]
    assert sorted(fetched) == sorted(set(fetched))  # each once, for all loaders and workers


def test_the_names_of_classes_and_class_folders_in_tars_come_along(tmp_path: Path, server: FailingServer) -> None:
    data = images(server.url)
    data.setup("fit")
    assert data.classes == list(CLASSES)
    root = make_tars(tmp_path / "tars")
    with http_server(root) as other:
        one, two = (ImageData(place, image_size=8, batch_size=6, num_workers=0, seed=1) for place in (root, other.url))
        one.setup("fit")
        two.setup("fit")
        assert two.classes == one.classes == list(CLASSES)
        assert same(list(two.train_dataloader()), list(one.train_dataloader()))
        assert two.example_name("train", 0) == one.example_name("train", 0)


@pytest.mark.filterwarnings("ignore:.*Skipped")
def test_files_make_room_for_others_and_are_fetched_again(
    folder: Path, server: FailingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "train0.tfrecord").stat().st_size
    monkeypatch.setenv("ENSEMBLENET_CACHE_GB", str(1.5 * size / 1e9))
    assert same(batches(tagged(server.url)), batches(tagged(folder)))
    assert len(list((tmp_path / "cache").glob("*.file"))) == 1


@pytest.mark.filterwarnings("ignore:.*Skipped")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("make", "make_files", "pattern"),
    [
        (images, make_shards, "train-{0000..0005}.tar"),
        (tables, make_parquet, "train-{00000..00005}-of-00006.parquet"),
    ],
)
def test_shards_that_do_not_all_fit_are_read_one_after_another(
    workers: int,
    make: Callable[..., ImageData],
    make_files: Callable[..., Path],
    pattern: str,
    folder: Path,
    server: FailingServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in (*folder.glob("*.tar"), *folder.glob("*.parquet")):
        path.unlink()
    make_files(folder, train=12, val=6, shards=6)  # 6 images in a shard
    sizes = [path.stat().st_size for path in folder.glob("train-*")]
    settings = {"train": pattern, "batch_size": 3, "shuffle_buffer": 7}

    def opened(place: Any, workers: int = 0) -> ImageData:
        data = make(place, workers, **settings)
        data.setup("fit")
        return data

    expected = list(opened(folder).train_dataloader())
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    monkeypatch.setenv("ENSEMBLENET_CACHE_GB", str(2.5 * max(sizes) / 1e9))
    data = opened(server.url, workers)
    server.requests.clear()
    begun = iter(data.train_dataloader())
    first = [next(begun) for _ in range(5)]
    resumed = opened(server.url, workers)
    resumed.load_state_dict(data.state_dict())
    rest = list(resumed.train_dataloader())
    assert same([*first, *rest], expected)
    assert len(expected) == 12
    assert not list((tmp_path / "cache").glob("*.parquet"))  # what was fetched, and is Arrow now
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.file"))
    assert held <= (2.5 + workers) * max(sizes)  # one may come while another is read
    assert len([path for path in server.requests if "train-" in path]) >= 6 - 2  # fetched again, as room was made

    seen = [image.sum().item() for x, _ in data.val_dataloader() for image in x]
    assert len(seen) == len(set(seen)) == 6 * len(CLASSES)
    other = make(server.url, **{**settings, "shuffle_buffer": 6})
    other.setup("fit")
    other.load_state_dict(data.state_dict())
    with pytest.raises(DataError, match=r"cannot go on .*: shuffle_buffer was 7 and is 6\.$"):
        other.train_dataloader()
    large = make(server.url, **{**settings, "shuffle_buffer": 36})
    large.setup("fit")
    with pytest.raises(
        DataError, match=r"^Two times shuffle_buffer=36 examples lie in files of .*set ENSEMBLENET_CACHE_GB"
    ):
        list(large.train_dataloader())


def test_parquet_files_are_read_from_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    root = tmp_path / "parquet"
    root.mkdir()
    for split, first in (("train", 0), ("test", 50)):
        rows = [{"image": {"bytes": encoded(n % 3, first + n)}, "label": n % 3} for n in range(12)]
        pq.write_table(pa.Table.from_pylist(rows), root / f"{split}.parquet")
    url = upload(root, next(BUCKETS))
    small = {"image_size": 8, "batch_size": 4, "seed": 1, "num_workers": 0}
    for make in (
        lambda place: ParquetImages(place, image_size=8, batch_size=4, num_val=4),
        lambda place: ImageData(place, "hfds/", "train", "test", **small),
    ):
        one, two = make(root), make(url)
        for data in (one, two):
            data.reseed(3)
            data.setup("fit")
        assert same([*one.train_dataloader(), *one.val_dataloader()], [*two.train_dataloader(), *two.val_dataloader()])
    with pytest.raises(FetchError, match=r"s3://.*/nothing/train\.parquet is not there"):
        ParquetImages(f"{url}/nothing").setup("fit")


@pytest.mark.filterwarnings("ignore:.*Skipped")
def test_of_parquet_shards_labels_alone_are_fetched_at_the_start(folder: Path, tmp_path: Path) -> None:
    data = tables(upload(folder, next(BUCKETS)))
    data.setup("fit")
    assert len(data.examples("train")) == 8 * len(CLASSES)
    assert not list((tmp_path / "cache").glob("*.file"))
    next(iter(data.train_dataloader()))
    assert list((tmp_path / "cache").glob("*.file"))


def clips(folder: Any, split: str, workers: int = 0, **settings: Any) -> list[Any]:
    small = {"num_frames": 4, "stride": 2, "image_size": 16, "batch_size": 2, "num_workers": workers, "seed": 0}
    data = Kinetics(folder, split, split, **small, **settings)
    data.setup("fit")
    assert data.classes == ["high jump", "run"]
    return [*data.train_dataloader(), *data.val_dataloader()]


def test_videos_in_tars_and_at_urls_are_those_of_class_folders(tmp_path: Path) -> None:
    root, served = tmp_path / "disk", tmp_path / "served"
    served.mkdir()
    videos = [f"{name}/{number}.mp4" for name in ("high_jump", "run") for number in (0, 1)]
    for number, name in enumerate(videos):
        make_video(root / "train" / name, frames=10 + number)
    expected = clips(root, "train")
    for number in (0, 1):
        with tarfile.open(served / f"train-{number}.tar", "w") as folders:
            for name in videos[2 * number : 2 * number + 2]:
                folders.add(root / "train" / name, f"train/{name}")
    for number in (0, 1):
        with tarfile.open(served / f"wds-{number}.tar", "w") as samples:
            for name in videos[2 * number : 2 * number + 2]:
                samples.add(root / "train" / name, f"{name.replace('/', '-')}")
                label = tarfile.TarInfo(name.replace("/", "-").replace(".mp4", ".cls"))
                text = name.partition("/")[0].encode() + b"\n"
                label.size = len(text)
                samples.addfile(label, io.BytesIO(text))
    (served / "train.csv").write_text(
        "label,youtube_id\n" + "".join(f"{name.partition('/')[0]},{Path(name).stem}\n" for name in videos)
    )
    shutil.copytree(root / "train", served / "single")
    (served / "list.txt").write_text("".join(f"single/{name} {name.partition('/')[0]}\n" for name in videos))
    with http_server(served) as server:
        lines = "".join(f"{server.url}/single/{name},{name.partition('/')[0]}\n" for name in videos)
        (served / "urls.csv").write_text(f"{lines}{server.url}/single/gone.mp4,run\n")
        for place in (served, server.url):
            for split in ("train-{0..1}.tar", "wds-*.tar", "list.txt", "urls.csv", "train.csv"):
                assert same(clips(place, split), expected), (place, split)
        assert same(clips(server.url, "train-{0..1}.tar", workers=1), expected)
        near = [clips(place, "train-{0..1}.tar", shuffle_buffer=2) for place in (served, server.url)]
        assert same(*near)
        assert not same(near[0], expected)

        data = Kinetics(server.url, "urls.csv", "urls.csv", num_workers=0, on_broken="skip")
        data.setup("fit")
        for path in cache_folder().glob("*.file"):
            path.unlink()
        server.faults["/single/run/1.mp4"] = [503] * 1000
        with pytest.warns(UserWarning, match="tried again"), pytest.raises(DataError, match=r"run/1\.mp4 cannot be"):
            list(data.val_dataloader())
    shutil.rmtree(served / "single")  # an annotation finds its videos in tars of a disk, too
    assert same(clips(served, "train.csv"), expected)
    with tarfile.open(served / "bare.tar", "w") as bare:
        bare.add(root / "train" / videos[0], "a.mp4")
    with pytest.raises(DataError, match=r"bare\.tar holds neither class folders with videos nor videos with labels"):
        clips(served, "bare.tar")
    with pytest.raises(DataError, match=r"No shards match none-\*\.tar in .*served"):
        clips(served, "none-*.tar")


def test_a_file_that_has_changed_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "a.tar"
    with http_server(path.parent) as server:
        for time, content in enumerate((b"one", b"two", b"three")):
            path.write_bytes(content)
            os.utime(path, (time, time))
            assert remote.remote_file(f"{server.url}/a.tar").open().read() == content


# -- a server that fails


@pytest.mark.parametrize("fault", [503, 429, "cut", "stall"])
def test_what_fails_for_a_while_is_read_at_last(
    fault: Any, folder: Path, server: FailingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults["/train-0000.tar"] = [fault, fault] if fault != "stall" else [fault]
    monkeypatch.setattr(remote, "DEADLINE", 300.0)
    monkeypatch.setattr(remote, "SILENCE", 0.3 if fault == "stall" else 60.0)
    with pytest.warns(UserWarning, match=r"http://.*/train-0000\.tar fails \(.*\); it is tried again"):
        file = remote.remote_file(f"{server.url}/train-0000.tar").open()
    assert file.read() == (folder / "train-0000.tar").read_bytes()


@pytest.mark.filterwarnings("ignore:.*tried again")
@pytest.mark.parametrize("fault", [503, "cut"])
def test_what_fails_for_long_is_one_line_and_leaves_nothing(
    fault: Any, tmp_path: Path, folder: Path, server: FailingServer
) -> None:
    server.faults["/train-0001.tar"] = [fault] * 100
    with pytest.raises(FetchError, match=r"^http://.*/train-0001\.tar cannot be read: .*start again; .*--resume\.$"):
        images(server.url).setup("fit")
    kept = {path.read_bytes() for path in (tmp_path / "cache").glob("*.file")}
    assert kept <= {(folder / f"train-000{number}.tar").read_bytes() for number in (0, 2)}


@pytest.mark.filterwarnings("ignore:.*tried again")
def test_examples_of_a_server_that_fails_are_never_skipped(tmp_path: Path, server: FailingServer) -> None:
    data = images(server.url)
    data.setup("fit")
    for path in (tmp_path / "cache").glob("*.file"):
        path.unlink()
    for number in range(3):
        server.faults[f"/train-000{number}.tar"] = [503] * 1000
    loader = data.train_dataloader()
    with pytest.raises(DataError, match=r"http://.*train-000\d\.tar cannot be read: 503"):
        list(loader)
    assert loader.skipped == 0


def test_waiting_for_a_server_draws_no_random_numbers(server: FailingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = remote.remote_file(f"{server.url}/train-0000.tar")
    system = remote.system_of
    monkeypatch.setattr(remote, "system_of", lambda url: (random.random(), system(url))[1])
    before = random.getstate()
    file.fetch()
    assert random.getstate() == before


# -- bad input


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s3://no-such-bucket/train-*.tar", "is not there .*bucket does not exist"),
        ("s3://{bucket}/nothing/*.tar", r"s3://.*/nothing/\*\.tar is not there"),
        ("s3://{bucket}/data/x*.tar", r"No files match s3://.*x\*\.tar"),
        ("{http}/x*.tar", r"No files match http://.*x\*\.tar"),
        ("{http}/missing.tar", r"http://.*/missing\.tar is not there"),
        ("{http}/train-{{0001..0009}}.tar", r"http://.*/train-0003\.tar is not there"),
        ("{http}/train-{{0..99999999}}.tar", "stands for over 1,000,000 files"),
        ("nosuch://x/a.tar", "nosuch:// is not known; give https://"),
        ("http://127.0.0.1:1/a.tar", "http://127.0.0.1:1/a.tar cannot be read: Cannot connect"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tried again")
def test_what_is_not_there_is_one_line(pattern: str, message: str, folder: Path, server: FailingServer) -> None:
    bucket = next(BUCKETS)
    upload(folder, bucket)
    with pytest.raises(DataError, match=message) as caught:
        images(folder, train=pattern.format(bucket=bucket, http=server.url)).setup("fit")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [401, 403])
def test_missing_rights_are_said_at_once(code: int, server: FailingServer) -> None:
    server.faults["/train-0000.tar"] = [code]
    with pytest.raises(FetchError, match=r"/train-0000\.tar may not be read \(.*\): rights come from"):
        remote.remote_file(f"{server.url}/train-0000.tar").fetch()
    assert server.requests.count("/train-0000.tar") == 1


def test_a_bucket_without_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        FetchError, match=r"^s3://bucket/a\.tar may not be read \(.*\): rights come from `aws configure`"
    ):
        remote.remote_file("s3://bucket/a.tar")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"].__dict__["_registry"], "s3", raising=False)
    with pytest.raises(FetchError, match=r"^s3://x/a\.tar needs a library: pip install 'ensemblenet\[s3\]'\.$"):
        remote.remote_file("s3://x/a.tar")


def test_a_shard_that_was_stored_in_part(folder: Path, server: FailingServer) -> None:
    whole = (folder / "train-0002.tar").read_bytes()
    (folder / "train-0002.tar").write_bytes(whole[:1300])
    with pytest.raises(DataError, match=r"http://.*/train-0002\.tar is not a readable tar"):
        images(server.url).setup("fit")
    (folder / "train2.tfrecord").write_bytes((folder / "train2.tfrecord").read_bytes()[:-9])
    data = tagged(server.url)
    data.on_broken = "error"
    with pytest.raises(DataError, match=r"http://.*/train2\.tfrecord: the record at byte [\d,]+ is truncated"):
        data.setup("fit")


def test_images_want_room_for_all_of_their_files(server: FailingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSEMBLENET_CACHE_GB", "1e-5")
    with pytest.raises(DataError, match=r"The files of http://.* may hold 1e-05 GB: set ENSEMBLENET_CACHE_GB"):
        images(server.url).setup("fit")
    monkeypatch.setenv("ENSEMBLENET_CACHE_GB", "much")
    with pytest.raises(DataError, match="ENSEMBLENET_CACHE_GB must be a positive number of gigabytes, got 'much'"):
        images(server.url).setup("fit")


def test_single_images_are_read_from_a_disk_only(server: FailingServer) -> None:
    with pytest.raises(DataError, match=r"holds no train\.tar: at a URL, images lie in a tar"):
        ImageData(server.url).setup("fit")


@pytest.mark.parametrize(
    "url",
    [
        "https://me:S3CRET@host/data",
        "s3://AKIA:S3CRET@bucket/data",
        "https://host/a.tar?X-Amz-Credential=AKIA&X-Amz-Signature=S3CRET",
        "https://host/a.tar?sv=2024&sig=S3CRET",
    ],
)
@pytest.mark.parametrize("command", ["fit", "compare"])
def test_secrets_come_into_no_folder_and_no_message(
    command: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data", "ImageData", "--data.dataset", "wds/", "--data.folder", url, "--runs", "runs"]
    base = {"fit": "--model.base", "compare": "--base"}[command]
    assert main([command, base, "MNIST1DNet", *options]) == 2
    said = capsys.readouterr()
    assert "password, key or signature" in said.err
    assert "S3CRET" not in said.err + said.out
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and b"S3CRET" in path.read_bytes()]
    assert kept == []
    with pytest.raises(DataError, match="password, key or signature"):
        ImageData("data", "wds/", train=url)
    with pytest.raises(DataError, match="password, key or signature"):
        YouTube8M("data", train=["a*", url])


def test_messages_of_libraries_lose_signatures() -> None:
    said = "403, message='Forbidden', url='https://me:S3CRET@cdn/x?a=1&X-Amz-Signature=S3CRET'"
    assert without_secrets(said) == "403, message='Forbidden', url='https://cdn/x'"


def test_stored_configurations_may_name_urls(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    text = "{data: {class_path: ensemblenet.data.ImageData, init_args: {folder: %s, train: '%s', dataset: wds/}}}"
    for scheme in ("https", "s3", "gs", "hf"):
        file.write_text(text % (f"{scheme}://bucket/data", f"{scheme}://other/train-{{0000..0009}}.tar"))
        assert read_config(file)["data"]["init_args"]["folder"] == f"{scheme}://bucket/data"
