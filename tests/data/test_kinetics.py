"""Kinetics as downloaders leave it: which videos are found, what a batch holds, and what bad videos do."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_videos import make_sound, make_video

from ensemblenet.data import Kinetics
from ensemblenet.data.video import Video
from ensemblenet.data.video_sets import find_videos
from ensemblenet.errors import DataError
from ensemblenet.training.mixing import Mixing

HEADER = "label,youtube_id,time_start,time_end,split\n"
ROWS = {"train": ["high jump,ID-1,2,12", 'playing "the" drums (loud),ID_2,0,10'], "val": ["high jump,--3,7,17"]}
SMALL = {"num_frames": 4, "stride": 2, "image_size": 16, "batch_size": 2, "num_workers": 0, "seed": 0}
RAW = {**SMALL, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def annotate(folder: Path) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for split, rows in ROWS.items():
        quoted = [row.replace('playing "the" drums (loud)', '"playing ""the"" drums (loud)"') for row in rows]
        (folder / f"{split}.csv").write_text(HEADER + "".join(f"{row},{split}\n" for row in quoted))
    return folder


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def make_set(folder: Path, count: int = 4, **options) -> Path:
    """Videos of two classes; `train.csv` and `val.csv` name all of them."""
    for split in ("train", "val"):
        rows = [f"class {number % 2},v{number:03},0,1,{split}\n" for number in range(count)]
        (folder / f"{split}.csv").write_text(HEADER + "".join(rows))
    for number in range(count):
        make_video(folder / f"class_{number % 2}" / f"v{number:03}.mp4", **options)
    return folder


def data(folder: Path, **options) -> Kinetics:
    made = Kinetics(folder, **{**SMALL, **options})
    made.setup()
    return made


# -- what is found


@pytest.mark.parametrize(
    "names",
    [
        ("ID-1_000002_000012.mp4", "ID_2_000000_000010.mp4"),
        ("train/high jump/ID-1_000002_000012.mp4", 'train/playing "the" drums (loud)/ID_2_000000_000010.mp4'),
        ("train/high_jump/ID-1.mp4", "train/playing_the_drums_loud/ID_2.mp4"),
        ("videos/ID-1.mkv", "videos/ID_2.WEBM"),
    ],
)
def test_annotations_find_what_downloaders_leave(tmp_path: Path, names: tuple[str, ...]) -> None:
    expected = touch(annotate(tmp_path), *names)
    found = find_videos(tmp_path, "train.csv")
    assert found.paths == expected
    assert found.labels == ["high jump", 'playing "the" drums (loud)']
    assert found.spans == [(2, 12), (0, 10)]
    assert found.missing == 0


def test_the_particular_name_and_the_own_class_come_first(tmp_path: Path) -> None:
    annotate(tmp_path)
    touch(tmp_path, "high_jump/ID-1.mp4", "a_class/ID-1.mp4")
    assert find_videos(tmp_path, "train.csv").paths == [tmp_path / "high_jump/ID-1.mp4"]
    touch(tmp_path, "high_jump/ID-1_000002_000012.mp4")
    assert find_videos(tmp_path, "train.csv").paths == [tmp_path / "high_jump/ID-1_000002_000012.mp4"]


def test_videos_may_lie_behind_a_link_and_annotations_elsewhere(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "ID-1.mp4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "videos").symlink_to(tmp_path / "disk")
    annotate(tmp_path / "lists")
    found = find_videos(tmp_path / "data", str(tmp_path / "lists" / "train.csv"))
    assert found.paths == [tmp_path / "data" / "videos" / "ID-1.mp4"]


@pytest.mark.parametrize("line", ["{} {}", "{}\t{}", "{},{}", "{}  {}"])
def test_file_lists(tmp_path: Path, line: str) -> None:
    expected = touch(tmp_path, "some folder/a.mp4", "b.avi")
    pairs = [("some folder/a.mp4", "high_jump"), (str(tmp_path / "b.avi"), "run")]
    (tmp_path / "train.txt").write_text("\n".join(line.format(*pair) for pair in pairs) + "\n\n")
    found = find_videos(tmp_path, "train.txt")
    assert (found.paths, found.labels) == (expected, ["high jump", "run"])


@pytest.mark.parametrize(
    "line",
    ["a b.mp4\thigh jump", "a b.mp4,high jump", "a b.mp4;high jump", "a b.mp4 high jump", '"a b.mp4", "high jump"'],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_as_programs_write_them(tmp_path: Path, line: str, encoding: str, end: str) -> None:
    expected = touch(tmp_path, "a b.mp4", "a b.mp4 c/d, e.mpg.MOV")
    second = line.replace("a b.mp4", "a b.mp4 c/d, e.mpg.MOV").replace("high jump", "h\u00e9 \u2028 2")
    (tmp_path / "train.txt").write_bytes(f"{line}{end}{second}{end}".encode(encoding))
    found = find_videos(tmp_path, "train.txt")
    assert (found.paths, found.labels) == (expected, ["high jump", "h\u00e9 \u2028 2"])


def test_other_suffixes_end_at_a_tab_or_the_last_separator(tmp_path: Path) -> None:
    expected = touch(tmp_path, "a b.mpg", "c,d.flv", "e f.wmv")
    (tmp_path / "train.txt").write_text("a b.mpg\thigh jump\nc,d.flv,run\ne f.wmv run\n")
    found = find_videos(tmp_path, "train.txt")
    assert (found.paths, found.labels) == (expected, ["high jump", "run", "run"])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "header", ["label,youtube_id,time_start,time_end", ' Label, YouTube ID ,"time_start", Time End']
)
def test_annotations_as_spreadsheets_store_them(tmp_path: Path, separator: str, encoding: str, header: str) -> None:
    expected = touch(tmp_path, "ID-1_000002_000012.mp4")
    text = f"{header}\r\n h\u00e9, ID-1 , 2,12\r\n".replace(",", separator)
    (tmp_path / "train.csv").write_bytes(text.encode(encoding))
    found = find_videos(tmp_path, "train.csv")
    assert (found.paths, found.labels, found.spans) == (expected, ["h\u00e9"], [(2, 12)])


@pytest.mark.parametrize("text", [HEADER + "run,a,,,\nh\u00e9,b,,,\n", "x/a.mp4 run\nb.mp4 y\nc.mp4 \u00e9\n"])
def test_text_of_another_encoding_says_where(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv, line 3, column [27]: is no text in UTF-8; store the file in UTF-8"):
        find_videos(tmp_path, "a.csv")


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_with_accents_have_two_spellings(tmp_path: Path, listed: Any, stored: Any) -> None:
    name = "\u00e9clair"
    expected = touch(tmp_path, unicodedata.normalize(stored, f"{name}/{name}.mp4"))
    (tmp_path / "train.txt").write_text(unicodedata.normalize(listed, f"{name}/{name}.mp4 {name}"), "utf-8")
    for split in ("train.txt", "."):
        found = find_videos(tmp_path, split)
        assert (found.paths, found.labels) == (expected, [name])


def test_videos_lie_at_any_depth_of_their_class(tmp_path: Path) -> None:
    expected = touch(tmp_path, "train/run/x/a.mp4", "train/run/y/b.mp4", "train/swim/c.mp4")
    touch(tmp_path, "train/.trash/d.mp4", "train/run/._a.mp4")
    (tmp_path / "train" / "loop").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "swim" / "up").symlink_to(tmp_path)
    found = find_videos(tmp_path, "train")
    assert (found.paths, found.labels) == (expected, ["run", "run", "swim"])


def test_a_folder_with_links_to_itself_is_searched_once(tmp_path: Path) -> None:
    touch(annotate(tmp_path), "ID-1.mp4")
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path)
    begun = time.process_time()
    assert find_videos(tmp_path, "train.csv").paths == [tmp_path / "ID-1.mp4"]
    assert time.process_time() - begun < 2


def test_numbers_as_labels_keep_their_order(tmp_path: Path) -> None:
    for number in range(12):
        make_video(tmp_path / f"{number}.mp4", frames=2)
    for split in ("train", "val"):
        (tmp_path / split).write_text("".join(f"{number}.mp4 {number}\n" for number in range(12)))
    made = data(tmp_path, train="train", val="val", eval_batch_size=12)
    assert made.classes == [str(number) for number in range(12)]
    [(_, labels)] = made.val_dataloader()
    assert labels.tolist() == list(range(12))


def test_class_folders(tmp_path: Path) -> None:
    expected = touch(tmp_path, "train/high_jump/a.mp4", "train/run/b.mov")
    touch(tmp_path, "train/run/notes.txt")
    found = find_videos(tmp_path, "train")
    assert (found.paths, found.labels) == (expected, ["high jump", "run"])


def test_missing_videos_are_counted(tmp_path: Path) -> None:
    touch(annotate(tmp_path), "ID-1.mp4")
    assert find_videos(tmp_path, "train.csv").missing == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "absent is neither a folder of class folders nor a file that lists videos"),
        (
            "a.csv",
            HEADER + "run,ID,0,1,train\n",
            r"None of the 1 videos of .*a\.csv is there: no ID_000000_000001\.mp4 anywhere in",
        ),
        ("a.txt", "b/c.mp4 run", r"None of the 1 videos of .*a\.txt is there: no .*b/c\.mp4\.$"),
        ("a.csv", HEADER + "run,,0,1,train\n", r"a\.csv, line 2: youtube_id is empty"),
        ("a.csv", HEADER + "run,ID,soon,1,train\n", r"a\.csv, line 2: time_start must be seconds, got 'soon'"),
        ("a.csv", HEADER + "run\n", r"a\.csv, line 2: youtube_id is empty"),
        ("a.csv", HEADER + "\n,ID,0,1,train\n", r"a\.csv, line 3: label is empty"),
        ("a.csv", HEADER + "run,ID,9,1,train\n", r"a\.csv, line 2: .* must be ascending seconds, got 9 and 1"),
        ("a.csv", HEADER + "run,ID,0,nan,train\n", r"a\.csv, line 2: .* must be ascending seconds, got 0 and nan"),
        ("a.csv", HEADER + "run,ID,0,1e999,train\n", r"a\.csv, line 2: .* must be ascending seconds, got 0 and inf"),
        (
            "a.csv",
            HEADER + "run, fast,ID,0,1,train\n",
            r"a\.csv, line 2: time_start must be seconds, got 'ID'|6 columns",
        ),
        ("a.csv", HEADER.replace(",", ";") + "run;ID;0,5;1;train\n", r"line 2: time_start must be seconds, got '0,5'"),
        (
            "a.csv",
            "label,video,time_start\nrun,ID,0\n",
            r"a\.csv has no column youtube_id; it has label, video, time_start",
        ),
        ("a.csv", "path,label\na.mp4,run\n", r"a\.csv has no column youtube_id; it has path, label"),
        ("a.csv", "x" * 200000, r"a\.csv cannot be read: field larger than field limit"),
        ("a.txt", "a.mp4 120 5\n", r"a\.txt, line 1 must be a path and a label, got 'a\.mp4 120 5'"),
        ("a.txt", "a.mp4\trun\t5\n", r"a\.txt, line 1 must be a path and a label"),
        ("a.txt", "a.mp4,run,5\n", r"a\.txt, line 1 must be a path and a label"),
        ("a.txt", "a.mp4 1\nb.mp4\n", r"a\.txt, line 2 must be a path and a label, got 'b\.mp4'"),
        ("folder/", "", r"folder holds no class folders with videos \(\.mp4"),
    ],
)
def test_splits_that_make_no_sense(tmp_path: Path, name: str, content: str, message: str) -> None:
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        find_videos(tmp_path, name.strip("/"))


def test_a_class_that_training_lacks(tmp_path: Path) -> None:
    make_set(tmp_path, count=2)
    (tmp_path / "val.csv").write_text(HEADER + "swim,v000,0,1,val\n")
    with pytest.raises(DataError, match=r"val\.csv has the class 'swim', which the training data does not have"):
        data(tmp_path)


def test_evaluation_needs_no_training_data(tmp_path: Path) -> None:
    make_set(tmp_path, count=2)
    (tmp_path / "train.csv").unlink()
    made = Kinetics(tmp_path, **SMALL)
    made.setup("test")
    assert made.classes == ["class 0", "class 1"]
    with pytest.raises(DataError, match=r"train\.csv is neither"):
        made.setup("fit")


# -- what a batch holds


def test_shapes(tmp_path: Path) -> None:
    made = data(make_set(tmp_path), num_clips=2, num_crops=3)
    shapes = [next(iter(load()))[0].shape for load in (made.train_dataloader, made.val_dataloader)]
    assert shapes == [(2, 3, 4, 16, 16)] * 2
    inputs, labels = next(iter(made.test_dataloader()))
    assert inputs.shape == (2, 6, 3, 4, 16, 16)
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize("size", [(48, 32), (32, 48)])
def test_test_views_are_clips_by_crops(tmp_path: Path, size: tuple[int, ...]) -> None:
    made = data(make_set(tmp_path, count=2, size=size), **{**RAW, "num_clips": 3, "crop_pct": 0.8, "batch_size": 1})
    inputs, _ = next(iter(made.test_dataloader()))
    with Video(tmp_path / "class_0" / "v000.mp4", short_side=20) as video:
        frames = video.frames(range(20))
    expected = []
    for start in (0, 7, 13):  # a clip spans 7 of 20 frames
        clip = frames[start : start + 7 : 2] / 255
        for place in (0, 7, 14):  # of the longer side, 30
            top, left = (2, place) if size[0] > size[1] else (place, 2)
            expected.append(clip[:, :, top : top + 16, left : left + 16].transpose(0, 1))
    torch.testing.assert_close(inputs[0], torch.stack(expected))


def test_inputs_are_normalised(tmp_path: Path) -> None:
    raw, normal = (
        next(iter(data(make_set(tmp_path, count=2), **{**RAW, **options}).val_dataloader()))[0]
        for options in ({}, {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)})
    )
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    torch.testing.assert_close(normal, (raw - mean) / std)
    made = data(tmp_path)
    made.setup("fit")
    assert made.examples("train")[0][0].dtype == torch.uint8  # they go to the device as bytes


def test_augmentation_is_the_same_in_all_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = data(make_set(tmp_path, count=2), **{**RAW, "color_jitter": 0.8, "scale": (0.2, 0.5)})
    still = torch.randint(256, (1, 3, 18, 27), dtype=torch.uint8).expand(4, -1, -1, -1)
    monkeypatch.setattr(Video, "frames", lambda self, indices: still)
    clips = torch.cat([inputs for _ in range(3) for inputs, _ in made.train_dataloader()])
    assert torch.equal(clips, clips[:, :, :1].expand_as(clips))
    assert len({clip.mean().item() for clip in clips}) > 1  # but clips differ


def test_half_of_the_clips_are_mirrored_if_asked(tmp_path: Path) -> None:
    make_set(tmp_path, count=2)
    whole = {**RAW, "scale": (1.0, 1.0), "crop_pct": 1.0}
    for flip in (True, False):
        loader = data(tmp_path, flip=flip, **whole).train_dataloader()
        right = []  # whether the brighter quarter is on the right
        for epoch in range(16):
            loader.set_epoch(epoch)
            right += [bool(clip[..., 0].sum() < clip[..., -1].sum()) for inputs, _ in loader for clip in inputs]
        assert (8 <= sum(right) <= 24) if flip else not any(right)


def test_workers_change_nothing_and_epochs_do(tmp_path: Path) -> None:
    make_set(tmp_path, count=6)

    def epoch(number, **options):
        loader = data(tmp_path, **options).train_dataloader()
        loader.set_epoch(number)
        return torch.cat([inputs for inputs, _ in loader])

    first = epoch(0)
    assert torch.equal(first, epoch(0, num_workers=2))
    assert torch.equal(first, epoch(0, cache=True))
    assert not torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(0, seed=1))


def test_whole_videos_are_cut_to_their_span(tmp_path: Path) -> None:
    make_set(tmp_path, count=2, frames=40)
    (tmp_path / "val.csv").write_text(HEADER + "class 0,v000,0.8,1.0,val\n")  # frames 20 to 24
    made = data(tmp_path, untrimmed=True, **{**RAW, "num_frames": 5, "stride": 1})
    inputs, _ = next(iter(made.val_dataloader()))
    levels = (inputs[0, 0, :, -1, -1] * 255 / 4).round()
    assert levels.tolist() == pytest.approx([20, 21, 22, 23, 24], abs=0.6)


def test_a_span_behind_the_end_names_the_video(tmp_path: Path) -> None:
    make_set(tmp_path, count=2)
    (tmp_path / "val.csv").write_text(HEADER + "class 0,v000,5,6,val\n")
    with pytest.raises(DataError, match=r"v000\.mp4 ends before 5 s, where its clip begins"):
        list(data(tmp_path, untrimmed=True).val_dataloader())


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.4), Mixing(cutmix=1.0)])
def test_mixing_takes_clips(mixing: Mixing) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    clips = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 5, 8, 8).clone()
    mixed, shares = mixing.mixer(4)(clips, torch.arange(4))
    assert mixed.shape == (4, 3, 5, 8, 8)
    assert torch.equal(mixed, mixed[:, :, :1].expand_as(mixed))  # all frames alike
    content = mixed.mean((1, 2, 3, 4))
    torch.testing.assert_close(content, shares @ torch.arange(4.0), atol=0.02, rtol=0)


# -- what trained networks are told, and pages show


def test_description_and_names(tmp_path: Path) -> None:
    made = data(make_set(tmp_path))
    described = json.loads(json.dumps(made.description()))
    assert described["classes"] == ["class 0", "class 1"]
    assert described["preprocessing"]["input_shape"] == [3, 4, 16, 16]
    assert described["preprocessing"]["stride"] == 2
    assert made.example_name("val", 1) == "class_1/v001.mp4"


# -- bad videos


def with_bad_videos(folder: Path) -> Path:
    make_set(folder, count=6)
    (folder / "class_1" / "v001.mp4").write_text("no video")
    make_sound(folder / "class_0" / "v004.mp4")
    return folder


def test_a_bad_video_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"class_1/v001\.mp4 cannot be opened as a video"):
        list(data(with_bad_videos(tmp_path)).val_dataloader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_videos_are_skipped_and_counted(tmp_path: Path, num_workers: int) -> None:
    loader = data(with_bad_videos(tmp_path), on_broken="skip", num_workers=num_workers).val_dataloader()
    with pytest.warns(UserWarning, match=r"v004\.mp4 has no video stream"):
        labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [0, 0, 1, 1]
    assert sorted(loader.broken) == [1, 4]


def test_too_many_bad_videos(tmp_path: Path) -> None:
    loader = data(with_bad_videos(tmp_path), on_broken="skip", max_broken=1).val_dataloader()
    several = r"More than max_broken=1 broken examples; the last: .*v004"
    with pytest.warns(UserWarning, match=r"v001\.mp4"), pytest.raises(DataError, match=several):
        list(loader)


def test_no_files_stay_open(tmp_path: Path) -> None:
    loader = data(with_bad_videos(tmp_path), on_broken="skip").train_dataloader()
    list(loader)
    before = len(os.listdir("/proc/self/fd"))
    for epoch in range(5):
        loader.set_epoch(epoch)
        list(loader)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_crops": 2}, "num_crops of 1 or 3.*got num_crops=2"),
        ({"crop_pct": 1.5}, "crop_pct must be above 0 and at most 1, got 1.5"),
        ({"cache": True, "num_workers": 2}, "cache=true needs num_workers=0"),
        ({"num_frames": 0}, "num_frames >= 1"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Kinetics(Path("data"), **options)
