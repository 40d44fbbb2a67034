"""The report: its figures' numbers against slow direct ones, and the page itself."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from sklearn.metrics import average_precision_score, confusion_matrix

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.cli.report import report
from ensemblenet.errors import LoadError
from ensemblenet.evaluation.findings import Findings, agreeing, early_stopping, paired_difference, reliability, stopping
from ensemblenet.functional import combine_heads, divergence
from ensemblenet.heads.anytime import confident, heads_agree, predict_anytime
from ensemblenet.metrics.diversity import same_class
from ensemblenet.reports.curves import read_curves
from ensemblenet.reports.names import readable_names
from ensemblenet.reports.network_figures import choose_looks
from ensemblenet.reports.networks import write_report
from ensemblenet.reports.thumbnails import glimpse, thumbnail
from ensemblenet.storage.restore import data_module, restore
from ensemblenet.training.fit import fit

K, N, C = 3, 60, 5
Z = 2 * torch.randn(K, N, C, generator=torch.Generator().manual_seed(0))
Y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))
TAGS = (torch.rand(N, C, generator=torch.Generator().manual_seed(2)) < 0.3).to(torch.int8)
X = torch.arange(N * 2.0).view(N, 2)


def findings_of(z, y, combine="logits", task="multiclass", batches=1, **options):
    findings = Findings(combine, task, **options)
    for x_batch, z_batch, y_batch in zip(X.chunk(batches), z.chunk(batches, 1), y.chunk(batches), strict=True):
        findings.update(x_batch, z_batch, y_batch)
    return findings


# -- the numbers


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("batches", [1, 4])
def test_heads_and_first_heads(combine: str, batches: int) -> None:
    findings = findings_of(Z, Y, combine, batches=batches)
    for k in range(K):
        for best, z in ((findings.heads, Z[k]), (findings.firsts, combine_heads(Z[: k + 1], combine))):
            p = z.softmax(1)
            assert torch.equal(best.classes[k], p.argmax(1))
            assert torch.equal(best.hits[k], p.argmax(1) == Y)
            assert torch.allclose(best.confidence[k], p.amax(1))
    assert findings.count == N


def test_scores_of_classes() -> None:
    scores, counts = findings_of(Z, Y, batches=3).class_scores(C + 1)
    table = confusion_matrix(Y, Z.mean(0).argmax(1), labels=range(C))
    assert scores.tolist() == pytest.approx([*(table.diagonal() / table.sum(1)), 0])
    assert counts.tolist() == [*table.sum(1), 0]


def test_scores_of_labels() -> None:
    scores, counts = findings_of(Z, TAGS, task="multilabel", batches=3).class_scores(C)
    expected = [average_precision_score(TAGS[:, c], Z.mean(0)[:, c]) for c in range(C)]
    assert scores.tolist() == pytest.approx(expected)  # of so few classes all are among the 20 best
    assert counts.tolist() == TAGS.sum(0).tolist()


def test_labels_that_nobody_looked_for_are_nobodys_best() -> None:
    unknown = TAGS.clone()
    unknown[:, 2] = -1
    findings = findings_of(Z, unknown, task="multilabel")
    assert not (findings.heads.classes == 2).any()
    assert findings.class_scores(C)[1][2] == 0


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_examples_on_which_heads_differ_most(task: str) -> None:
    y = Y if task == "multiclass" else TAGS
    findings = findings_of(Z, y, task=task, batches=4, most=7)
    apart = [divergence(Z[:, n : n + 1], task).item() for n in range(N)]
    assert [example.place for example in findings.examples] == np.argsort(apart)[::-1][:7].tolist()
    for example in findings.examples:
        assert example.divergence == pytest.approx(apart[example.place], rel=1e-4)
        assert torch.equal(example.inputs, X[example.place])
        assert example.labels == (
            [Y[example.place]] if task == "multiclass" else TAGS[example.place].nonzero()[:, 0].tolist()
        )
        assert [best for best, _ in example.heads] == Z[:, example.place].argmax(1).tolist()


def test_reliability() -> None:
    confidence, hits = torch.rand(500, generator=torch.Generator().manual_seed(3)), Y.repeat(9)[:500] > 2
    bins = reliability(confidence, hits, bins=10, fewest=45)
    which = [[n for n in range(500) if b / 10 <= confidence[n] < (b + 1) / 10] for b in range(10)]
    full = [some for some in which if len(some) >= 45]
    assert 0 < len(full) < 10
    assert bins.accuracy == pytest.approx([hits[some].float().mean().item() for some in full])
    assert bins.confidence == pytest.approx([confidence[some].mean().item() for some in full])
    assert bins.share == pytest.approx([len(some) / 500 for some in full])


def test_pairs() -> None:
    votes = Z.argmax(2)
    expected = [[np.mean([votes[i, n] == votes[j, n] for n in range(N)]) for j in range(K)] for i in range(K)]
    assert np.allclose(same_class(votes), expected)


@pytest.mark.parametrize("fewest", [1, 2, 3])
def test_agreeing(fewest: int) -> None:
    votes = torch.randint(2, (4, 50), generator=torch.Generator().manual_seed(5))
    expected = [[len(set(votes[:k, n].tolist())) == 1 and k >= fewest for n in range(50)] for k in range(1, 5)]
    assert agreeing(votes, fewest).tolist() == expected


@pytest.mark.parametrize("rule", ["agree", "confident"])
def test_stopping_is_what_a_model_does_that_stops(rule: str) -> None:
    """The same rules, run head by head."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, C))
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(4))
    model = ensemblenet.convert(base, x, num_heads=K, seed=0, init="inherit").eval()
    with torch.no_grad():
        findings = findings_of(model(x, per_head=True), Y)
    threshold = float(findings.firsts.confidence.median())
    stops = agreeing(findings.heads.classes, 2) if rule == "agree" else findings.firsts.confidence >= threshold
    used, right = stopping(stops, findings.firsts.hits)
    ran = predict_anytime(model, x, heads_agree() if rule == "agree" else confident(threshold))
    assert used == pytest.approx(ran.heads_used.double().mean().item())
    assert right == pytest.approx((ran.outputs.argmax(1) == Y).double().mean().item())
    assert 1 < used < K


# -- pictures of inputs


def pixels(pictures):
    return np.asarray(Image.open(io.BytesIO(pictures["light"])))


def test_pictures_undo_the_preprocessing() -> None:
    image = torch.randint(256, (3, 12, 10))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    x = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    shown = pixels(thumbnail(x, {"mean": mean, "std": std}, "red"))
    assert np.array_equal(shown, image.permute(1, 2, 0))
    stretched = pixels(thumbnail(x, None, "red"))
    assert (stretched.min(), stretched.max()) == (0, 255)


def test_pictures_of_other_inputs() -> None:
    clips = torch.zeros(1, 5, 3, 7, 6, 8)
    clips[:, 2, :, 6] = 1  # the last frame of the middle view is white
    [clip] = glimpse(clips, ndim=4)
    assert pixels(thumbnail(clip, None, "red"))[6:, 8:].min() == 255
    assert pixels(thumbnail(clip, None, "red"))[:6].max() == 0
    assert pixels(thumbnail(torch.rand(1, 900, 450), None, "red")).shape == (160, 80, 3)
    assert sorted(thumbnail(torch.rand(40), None, "red")) == ["dark", "light"]
    assert thumbnail(torch.rand(300, 1152), None, "red") == thumbnail(torch.rand(1152), None, "red") == {}


# -- the page


def train(folder, name, conversion):
    base = {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}}
    sizes = {"num_train": 60, "num_val": 40, "num_test": 50, "batch_size": 20}
    settings = {
        "name": name,
        "model": {"base": base, "conversion": conversion, "heads": "looped"},
        "data": {"class_path": "ensemblenet.data.MNIST1D", "init_args": sizes},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return fit(["--config", str(folder / f"{name}.yaml"), "--runs", str(folder / "runs")])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return train(folder, "plain", None), train(folder, "several", {"num_heads": 3})


class Page(HTMLParser):
    """What a page holds, and whether its elements close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text, self.count = [], [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_of_two_runs(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = report([*map(str, runs), "--output", str(tmp_path / "new" / "page.html")])
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    page = Page(path.read_text())
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    text = " ".join(page.text)
    assert "http" not in path.read_text()
    for heading in ("Training, calibration and classes", "Heads", "Where heads disagree most"):
        assert heading in text
    assert page.count["tr"] == 1 + 1 + 1 + 3 + 1  # heading, base, ensemble, heads, first 2
    assert page.count["source"] == page.count["img"] == 7 + 12  # figures, and examples: signals, drawn for each theme
    assert "50 examples of the test split" in text
    assert "Report:" in capsys.readouterr().out
    assert main(["report", str(runs[0]), "--output", str(path)]) == 2
    assert "exists; --output needs a new file" in capsys.readouterr().err


def test_a_page_of_a_base_alone_on_validation_data(runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = report([str(runs[0]), "--output", str(tmp_path / "page.html"), "--split", "val"])
    text = " ".join(Page(path.read_text()).text)
    assert "40 examples of the val split" in text
    assert "Where heads disagree" not in text


def test_the_first_sentences_name_the_winner_and_say_whether_it_is_noise(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    right = {}
    for run in runs:
        restored = restore(run)
        data = data_module(restored)
        data.prepare_data()
        data.setup("test")
        with torch.no_grad():
            batches = [restored.network(x).argmax(1) == y for x, y in data.test_dataloader()]
        right[run.name.split("-")[0]] = torch.cat(batches).numpy().astype(float)
    best, worse = sorted(right, key=lambda name: -right[name].sum())
    apart = right[best] - right[worse]
    one_side, other_side = int((apart > 0).sum()), int((apart < 0).sum())
    both = one_side + other_side
    p = min(1, 2 * sum(math.comb(both, k) for k in range(min(one_side, other_side) + 1)) / 2**both)
    noise = "is more than noise (p" if p < 0.05 else f"may be noise (p = {p:.3f})"
    points = f"{100 * apart.mean():.2f} ± {100 * apart.std(ddof=1) / len(apart) ** 0.5:.2f} points behind"
    report([*map(str, runs), "--output", str(tmp_path / "page.html")])
    assert (
        f"{best} is best, with {100 - 100 * right[best].mean():.2f} % error. "
        f"{worse} has {100 - 100 * right[worse].mean():.2f} %: {points}, which {noise}"
    ) in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("won", "lost", "noise"), [(4, 0, True), (6, 0, False), (30, 20, True), (40, 20, False)])
def test_a_difference_of_pairs(won: int, lost: int, noise: bool) -> None:
    hits = torch.tensor([True] * won + [False] * lost + [True] * 50 + [False] * 50)
    other = torch.tensor([False] * won + [True] * lost + [True] * 50 + [False] * 50)
    found = paired_difference(hits, other)
    apart = hits.numpy().astype(float) - other.numpy()
    assert found.mean == pytest.approx(apart.mean())
    assert found.error == pytest.approx(stats.sem(apart))
    assert (found.p > 0.05) == noise
    assert paired_difference(hits, hits) == (0, 0, 1)
    assert paired_difference(other, hits).p == pytest.approx(found.p)


def test_other_examples_are_no_pairs() -> None:
    assert findings_of(Z, Y).same_examples(findings_of(Z[:1], Y, batches=3))
    assert not findings_of(Z, Y).same_examples(findings_of(Z, Y.flip(0)))
    assert not findings_of(Z, TAGS, task="multilabel").same_examples(findings_of(Z, 1 - TAGS, task="multilabel"))


def test_a_page_of_one_run_says_what_it_can(runs: tuple[Path, Path], tmp_path: Path) -> None:
    report([str(runs[1]), "--output", str(tmp_path / "page.html")])
    text = " ".join(Page((tmp_path / "page.html").read_text()).text)
    assert re.search(r"several has [\d.]+ % error \(± [\d.]+ by the choice of examples\)\. A page of several", text)
    assert re.search(
        r"It has .* parameters and .* MACs \([\d.]+ of its base's, [\d.]+ of its estimated time\); one", text
    )
    assert "noise" not in text


def test_stopping_goes_from_one_head_to_all() -> None:
    findings = findings_of(Z, Y)
    macs, percent = {1: 10.0, 2: 15.0, 3: 20.0}, lambda share: 100 * share
    by_confidence, by_agreement, whole = early_stopping(findings.heads, findings.firsts, macs, percent)
    right = {k: pytest.approx(100 * findings.firsts.hits[k - 1].double().mean().item()) for k in (1, 3)}
    assert by_confidence[0] == (10, right[1])
    assert by_confidence[-1] == whole == (20, right[3])
    [(mean, _)] = by_agreement  # of two heads that agree
    assert 15 <= mean <= 20
    alone = findings_of(Z[:1], Y)
    assert early_stopping(alone.heads, alone.firsts, macs, percent) == ([], [], (10, right[1]))


def test_the_figure_of_stopping_gets_the_scores_of_the_table(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "ensemblenet.reports.networks.draw_stopping", lambda lines, label: drawn.extend(lines) or Figure()
    )
    report([str(runs[1]), "--output", str(tmp_path / "page.html")])
    rows = re.findall('<th scope="row">(.*?)</th>(.*?)</tr>', (tmp_path / "page.html").read_text(), re.DOTALL)
    top1 = {name: float(re.findall('<td data-label="error">(.*?)</td>', rest)[0]) for name, rest in rows}
    _, by_confidence, _, whole = drawn[0]
    assert by_confidence[0][1] == pytest.approx(top1["head 0"], abs=0.005)
    assert whole[1] == pytest.approx(top1[next(iter(top1))], abs=0.005)


def test_names_from_outside_are_text(runs: tuple[Path, Path], tmp_path: Path) -> None:
    classes = [f"<script>{c}</script>" for c in range(10)]
    restored = restore(runs[1])
    restored = replace(restored, description=dict(restored.description) | {"classes": classes})
    data = data_module(restored)
    data.description = lambda: {"classes": classes}  # pyright: ignore
    write_report(tmp_path / "page.html", [restored], [data])
    page = Page((tmp_path / "page.html").read_text())
    assert "script" not in page.count
    assert any("<script>" in text for text in page.text)


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    for version, lines in {0: "0,5.0,\n1,4.0,\n", 1: "1,3.0,\n2,,0.5\n", 10: "2,2.0,\n"}.items():
        folder = tmp_path / "csv" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,train/loss,val/accuracy\n{lines}")
    curves = read_curves(tmp_path)
    assert curves == {"train/loss": [(0, 5.0), (1, 3.0), (2, 2.0)], "val/accuracy": [(2, 0.5)]}


def test_names_and_colours_tell_runs_apart(runs: tuple[Path, Path]) -> None:
    base, ours = runs
    looks = choose_looks([base.name, ours.name, ours.name], [False, True, True])
    assert looks[0].name == "plain"
    assert looks[1].name == looks[2].name == ours.name
    assert len({one.colour for one in looks}) == 3


def test_a_page_names_runs_without_the_time(runs: tuple[Path, Path], tmp_path: Path) -> None:
    report([str(runs[0]), "--output", str(tmp_path / "page.html")])
    assert (
        Page((tmp_path / "page.html").read_text()).text.count("plain on MNIST-1D: test examples") == 2
    )  # title and heading


def test_runs_of_other_classes_do_not_go_on_one_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    restored = restore(runs[0])
    other = replace(restored, network=base, description={})
    with pytest.raises(LoadError, match=re.escape("does not belong on one page with")):
        write_report(tmp_path / "page.html", [restored, other], [data_module(restored)] * 2)
    assert not (tmp_path / "page.html").exists()


def test_class_folders_of_imagenet_have_english_names() -> None:
    assert readable_names(["n01440764", "n02102040"]) == ["tench", "English springer"]
    assert readable_names(["n02012849", "n03126707"]) == ["crane, n02012849", "crane, n03126707"]
    assert readable_names(["n01440764", "cat"]) == ["n01440764", "cat"]
    assert readable_names(["n99999999"]) == ["n99999999"]
