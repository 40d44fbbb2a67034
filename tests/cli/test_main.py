"""The command line: what it prints, its exit codes, and that it starts fast."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ensemblenet
from ensemblenet.cli import main
from ensemblenet.data.mnist1d import generate_mnist1d
from ensemblenet.models import MNIST1DNet

NET = "ensemblenet.models:MNIST1DNet"


def test_help_lists_the_commands_without_loading_torch() -> None:
    code = "import sys; from ensemblenet.cli.main import main\n"
    code += "try: main(['--help'])\nfinally: print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("demo", "info", "convert", "compare", "fit"):
        assert f"\n  {command} " in printed
    assert printed.endswith("False\n")


@pytest.mark.parametrize("command", ["demo", "info", "convert", "compare", "fit"])
def test_each_help_says_what_the_command_needs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "need" in capsys.readouterr().out.lower()


def test_info_shows_cost_split_points_and_widths(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info", NET, "--num-heads", "3", "--budget", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert "24,746 parameters, 232,320 MACs" in printed
    assert "conv2" in printed
    assert "flop_counter" in printed
    assert "does not fit" in printed
    chosen = ensemblenet.convert(MNIST1DNet(), torch.randn(2, 40), 3, 0.9).recipe
    assert chosen is not None
    [row] = [line.split("│") for line in printed.splitlines() if f" {chosen.split_at} * " in line]
    assert [cell.strip() for cell in row[3:5]] == [f"{chosen.head.width:.2f}", f"{chosen.head.depth:.2f}"]


def test_info_shows_shares_of_activations_and_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info", NET, "--num-heads", "2", "--budget", "macs=0.9,activations=1.3"]) == 0
    printed = capsys.readouterr().out
    assert "1 of the base's parameters, 0.9 of its MACs and 1.3 of its activations" in printed
    rows = [line.split("│")[3:9] for line in printed.splitlines() if line.count("│") == 9]
    shares = [[int(cell) for cell in row[2:]] for row in rows if row[0].strip() != "-"]
    assert shares
    assert max(row[0] for row in shares) <= 100
    assert max(row[1] for row in shares) <= 90
    assert 100 < max(row[2] for row in shares) <= 130


def test_info_measures_the_plans_that_come_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("ensemblenet.cli.info.time_share", lambda *_, training: 1.25 if training else 0.75)
    assert main(["info", NET, "--measure", "--batch-size", "4", "--bf16"]) == 0
    printed = capsys.readouterr().out
    assert "Time of 4 examples on cpu, bfloat16, of the base's" in " ".join(printed.split())
    rows = [line for line in printed.splitlines() if re.search(r"1\.25 \((looped|fused)\) │ +0\.75 \(", line)]
    assert len(rows) == 4
    chosen = ensemblenet.convert(MNIST1DNet(), torch.randn(2, 40)).recipe
    assert chosen is not None
    assert f" {chosen.split_at} " in rows[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "must be a number, or shares by name such as") for text in ("much", "speed=1", "time", "time=fast")),
        ("-1", "budget must be a positive number"),
        ("95", "got 95: did you mean 0.95?"),
        ("time=120", "got 120: did you mean 1.2?"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["info", NET, "--budget", text])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"ensemblenet {ensemblenet.__version__}\n"


@pytest.mark.parametrize(("rank", "status"), [("0", 2), ("1", 0)])
def test_of_torchruns_processes_the_first_one_does_what_takes_one(
    rank: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", rank)
    assert main(["test", str(tmp_path / "no run")]) == status


def test_options_may_have_underscores_and_unknown_ones_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", NET, "--num_heads", "3", "--input_shape=40"]) == 0
    assert "3 heads" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["info", NET, "--num-haeds", "3"])
    assert "Did you mean --num-heads?" in capsys.readouterr().err


def test_info_takes_timm_names_and_an_input_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "test_resnet", "--input-shape", "3,64,64", "--num-classes", "5"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_convert_saves_what_load_reads_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "models" / "net"
    arguments = ["convert", NET, "--num-heads", "4", "--budget", "0.95", "--output", str(output)]
    assert main(arguments) == 0
    assert "24,746" in capsys.readouterr().out
    assert ensemblenet.load(output).num_heads == 4

    assert main(arguments) == 2
    assert "exists; --output needs a new folder" in capsys.readouterr().err


def test_info_and_benchmark_take_what_convert_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "net"
    assert main(["convert", NET, "--num-heads", "3", "--min-width", "0.1", "--output", str(folder)]) == 0
    capsys.readouterr()
    assert main(["info", str(folder)]) == 0
    assert "24,746 parameters" in " ".join(capsys.readouterr().out.split())
    assert main(["benchmark", str(folder), "--batch-size", "2", "--repeats", "1"]) == 0
    assert "3 heads" in " ".join(capsys.readouterr().out.split())


def trained_network() -> torch.nn.Module:
    """What the command below imports: a network that has been trained for a moment."""
    torch.manual_seed(0)
    ((x, y),) = generate_mnist1d((1000,))
    network = MNIST1DNet(16)
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    for places in [part for _ in range(6) for part in torch.randperm(1000).split(50)]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[places]), y[places]).backward()
        optimizer.step()
    return network


def test_convert_inherits_and_says_what_heads_reach_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "my_networks", SimpleNamespace(trained=trained_network))  # type: ignore[arg-type]
    output = tmp_path / "model"
    arguments = ["convert", "my_networks:trained", "--num-heads", "2", "--init", "inherit", "--output", str(output)]
    data = ["--calibrate", "ensemblenet.data.MNIST1D", "--data.num_val", "300"]
    data += ["--data.num_train", "2000", "--data.num_test", "100"]
    assert main([*arguments, *data]) == 0
    shown = capsys.readouterr().out
    errors = {
        name: float(found[1])
        for name in ("base", "ensemble", "head 0", "head 1")
        if (found := re.search(rf"^ {name} +\S+ +\S+ +(\S+)", shown, re.MULTILINE))
    }
    assert errors["base"] < errors["ensemble"] < min(errors["head 0"], errors["head 1"]) < 90
    model = ensemblenet.load(output, MNIST1DNet(16))
    x, y = generate_mnist1d((2000, 300, 100))[1]
    assert 100 * (model.eval()(x).argmax(1) != y).float().mean().item() == pytest.approx(errors["ensemble"], abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "resnet81"], "timm has no model 'resnet81'. Did you mean"),
        (["info", "torchvision:resnet81"], "torchvision has no classification model 'resnet81'. Did you mean"),
        (["info", "no.such.module:Net"], "No module named 'no'"),
        (["info", "ensemblenet.models:Nothing"], "ensemblenet.models has no callable 'Nothing'"),
        (["info", "torchvision.models:resnet81"], "has no callable 'resnet81'. Did you mean resnet18,"),
        (["info", "builtins:dict"], "builtins:dict must return an nn.Module, got dict"),
        (["info", "torch.nn:Linear"], "torch.nn:Linear cannot be called with no arguments"),
        (["info", "torch.nn:ReLU"], "torch.nn:ReLU does not say what inputs it takes: give --input-shape"),
        (["convert", NET, "--budget", "0.001", "--output", "never"], "do not fit a budget"),
        (["convert", NET, "--split-at", "conv9", "--output", "never"], "`ensemblenet info` lists them all"),
        (["convert", NET, "--importance", "scale", "--output", "never"], "use --init inherit"),
        (
            ["convert", NET, "--init", "inherit", "--importance", "taylor", "--output", "never"],
            "name it by --calibrate",
        ),
        (["convert", NET, "--init", "inherit", "--calibrate", "no.yaml", "--output", "never"], "no.yaml"),
        (["convert", NET, "--output", "s3://bucket/model"], "Results are written to a disk, not to s3://"),
        (["demo", "--runs", "gs://bucket"], "Results are written to a disk, not to gs://"),
        (["fit", "mnist1d/base", "--runs", "https://host/runs"], "Runs are kept in a folder, or at s3://BUCKET/PATH"),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        (
            ["fit", "--resume", "missing"],
            "missing has no config.yaml, so nothing there can go on: give --resume a folder under runs/ or auto.",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"ensemblenet {arguments[0]}: ")
    assert captured.count("\n") == 1
    assert message in captured
    assert not Path("never").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["info"],
        ["info", NET, "--input-shape", "3,x"],
        ["convert", NET],
        ["demo", "--seeds", "0"],
        ["info", NET, "--num-heads", "0"],
    ],
)
def test_wrong_usage_exits_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblenet.cli.info.base_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info", NET])
