"""What a study's page says."""

from __future__ import annotations

import json
import re
from io import StringIO
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from rich.console import Console

from ensemblenet.reports.comparison import comparison_table, summary, write_comparison
from ensemblenet.reports.comparison_figures import draw_against_cost, spread_labels
from ensemblenet.reports.names import data_name, network_name

STORED = Path(__file__).parents[2] / "benchmarks" / "results"


def row(method, error, kind="other", p=0.01, **more):
    values = {"method": method, "kind": kind, "error_mean": error, "error_std": 0.1, "seeds": 3, "p": p}
    return values | {"difference": error - 2.0} | more


def test_the_summary_says_who_wins_and_by_how_much() -> None:
    base = row("base", 2.0, "base")
    rows = [base, row("a", 1.5), row("b", 1.0, p=0.2), row("c", 3.0), row("large", 0.5, "larger")]
    assert summary(rows) == (
        "Best at no more than the base's cost is b with test error 1.00 ± 0.10 % instead of 2.00 ± 0.10 % (50 % less); "
        "that may be noise (3 seeds, p = 0.200). Next is a with 1.50 ± 0.10 %. Of 3 methods at that cost 2 are better "
        "on average than the base, 1 by more than noise."
    )
    assert summary([base, row("a", 1.5, p=1e-4)]).startswith(
        "Best at no more than the base's cost is a with test error 1.50 ± 0.10 % instead of 2.00 ± 0.10 % (25 % less); "
        "that is more than noise (3 seeds, p < 0.001)."
    )
    assert "Nothing at no more than the base's cost beats it. Closest is c with test error 3.00" in summary(
        [base, rows[3]]
    )
    alone = row("a", 1.5, p=None) | {"seeds": 1}
    assert "(25 % less); one seed, so nobody knows whether that is noise." in summary([base, alone])
    assert "nothing of at most its cost" in summary([base])


def test_of_tagging_gap_is_shown_and_higher_is_better() -> None:
    cost = {"parameters": 5, "macs": 6.0, "num_heads": 2, "head_error_mean": 40.0}
    base, good, bad = (
        row(name, error, kind) | cost | {"difference": error - 36}
        for name, error, kind in (("base", 36.0, "base"), ("good", 35.0, "ours"), ("bad", 38.0, "other"))
    )
    assert summary([base, bad, good], "multilabel") == (
        "Best at no more than the base's cost is good with GAP@20 65.00 ± 0.10 % instead of 64.00 ± 0.10 % (1.00 "
        "points more); that is more than noise (3 seeds, p = 0.010). Next is bad with 62.00 ± 0.10 %. Of 2 methods at "
        "that cost 1 is better on average than the base, 1 by more than noise."
    )
    table = comparison_table([base, bad, good], task="multilabel")
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns][1] == "GAP@20, %"
    assert cells[0] == ["base", "good", "bad"]
    assert cells[1] == ["64.00 ± 0.10", "65.00 ± 0.10", "62.00 ± 0.10"]
    assert cells[2] == ["", "+1.00", "−2.00"]
    assert cells[-1] == ["60.00"] * 3


def test_a_terminal_shows_time_beside_macs() -> None:
    results = json.loads((STORED / "compare_mnist1d_residual" / "results.json").read_text())
    printed = Console(width=80, file=StringIO())
    printed.print(comparison_table(results["rows"]))
    assert isinstance(printed.file, StringIO)
    lines = printed.file.getvalue().splitlines()
    [ours] = [line for line in lines if "co-distillation" in line]
    assert ours.split()[-4:] == ["0.93", "0.89", "0.84", "1.04"]
    assert not any("…" in line for line in lines)


# -- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a stored study, with one method whose one seed has no p."""
    results = json.loads((STORED / "compare_kinetics" / "results.json").read_text())
    results["rows"].append(results["rows"][1] | {"method": "once", "p": None, "seeds": 1})
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_comparison(path, results, {})
    return path.read_text()


def test_every_cell_names_its_column_for_screens_that_show_cards(page: str) -> None:
    tables = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    assert len(tables) == 2
    for table in tables:
        _, *headings = re.findall(r'<th scope="col">(.*?)</th>', table)
        rows = re.findall(r"<tr class=.*?</tr>", table, re.DOTALL)
        assert len(rows) == 3
        assert all(re.findall(r'<td data-label="(.*?)">', row) == headings for row in rows)
    assert {"error, %", "vs base", "p", "MACs", "one head, %", "NLL, nats"} <= set(
        re.findall(r'data-label="(.*?)"', tables[0])
    )
    assert {"learning rate", "CPU s", "MB"} <= set(re.findall(r'data-label="(.*?)"', tables[1]))


def test_the_page_reads_as_a_person_would_write(page: str) -> None:
    assert "<h1>S3D on jhmdb: 3 methods compared, the same effort for each</h1>" in page
    assert re.search(r'once</th>.*?<td data-label="p">1 seed</td>', page, re.DOTALL)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"class_path": "ensemblenet.models.create", "init_args": {"name": "resnet18"}}, "resnet18"),
        ({"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}}, "convolutional network"),
        ({"class_path": "mine.S3D"}, "S3D"),
        ({"class_path": "mine.MLPTagger"}, "MLPTagger"),
    ],
)
def test_networks_have_readable_names(spec: dict, name: str) -> None:
    assert network_name(spec) == name


def test_data_is_called_by_its_folder_or_its_name() -> None:
    assert data_name("ParquetImages", Path("data/cifar10/")) == "cifar10"
    assert data_name("YouTube8M", "shards") == "YouTube-8M"
    assert data_name("Own", ".") == "Own"


# -- names of points


@given(
    st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=30),
    st.floats(0.001, 0.2),
)
def test_labels_do_not_overlap_and_keep_their_order(wanted: list[float], gap: float) -> None:
    places = spread_labels(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    assert all(places[b] - places[a] >= gap - 1e-9 for a, b in pairwise(order))
    if gap * (len(wanted) - 1) <= 1:
        assert min(places) >= -1e-9
        assert max(places) <= 1 + 1e-9
    else:
        assert min(places) + max(places) == pytest.approx(1)


@given(st.lists(st.integers(0, 10), min_size=1, max_size=8, unique=True))
def test_labels_that_do_not_overlap_stay_where_they_belong(tenths: list[int]) -> None:
    wanted = [k / 10 for k in tenths]
    assert spread_labels(wanted, 0.1) == pytest.approx(wanted)


@pytest.mark.parametrize("study", ["compare_mnist1d", "compare_cifar10"])
def test_every_point_has_a_name_that_covers_no_other(study: str) -> None:
    rows = json.loads((STORED / study / "results.json").read_text())["rows"]
    drawing = draw_against_cost(rows, {"macs": "MACs", "parameters": "parameters"}, "error, %", lower_is_better=True)
    drawing.draw_without_rendering()
    for panel in drawing.axes:
        names = [text for text in panel.texts if text.get_text() in {row["method"] for row in rows}]
        assert len(names) == len(rows)
        boxes = [Text.get_window_extent(text) for text in names]  # without their lines
        assert all(
            a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 0.5 or b.y1 <= a.y0 + 0.5 for a, b in combinations(boxes, 2)
        )
        for ticks, (low, high) in ((panel.get_xticks(), panel.get_xlim()), (panel.get_yticks(), panel.get_ylim())):
            assert sum(low <= tick <= high for tick in ticks) > 1
