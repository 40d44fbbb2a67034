"""Configurations are found by name, and the shell completes what the commands take."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ensemblenet.cli import main
from ensemblenet.cli.options import config_file, configs, with_config
from ensemblenet.cli.settings import check_settings
from ensemblenet.errors import ModelNameError

ROOT = Path(__file__).parents[2]


def test_all_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(configs().values()) == set((ROOT / "configs").rglob("*.yaml"))
    assert main(["configs", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(configs())
    assert main(["configs", "show", "mnist1d/base"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/mnist1d/base.yaml").read_text()


def test_a_copy_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    assert main(["configs", "copy", "mnist1d/base", str(folder)]) == 0
    copy = folder / "base.yaml"
    assert copy.read_bytes() == configs()["mnist1d/base"].read_bytes()
    copy.write_text("changed")
    assert main(["configs", "copy", "youtube8m/base", str(folder)]) == 2
    assert capsys.readouterr().err == f"ensemblenet configs: {copy}: File exists; give another name.\n"
    assert copy.read_text() == "changed"


@pytest.mark.parametrize("command", [["fit"], ["compare", "--config"], ["configs", "show"], ["test", "x", "--config"]])
def test_a_name_that_is_none_is_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "mnist1d/bas"]) == 2
    error = f"{command[0]}: there is neither a file nor a configuration mnist1d/bas: did you mean mnist1d/base?\n"
    assert capsys.readouterr().err == f"ensemblenet {error}"


def test_a_file_of_your_own_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = str(configs()["mnist1d/base"])
    options = ["--name", "mnist1d/base", "--config=mnist1d/base", "mnist1d/base"]
    assert with_config(options) == ["--name", "mnist1d/base", f"--config={shipped}", "--config", shipped]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist1d").mkdir()
    (tmp_path / "mnist1d" / "base").touch()
    assert config_file("mnist1d/base") == Path("mnist1d/base")


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    words = (["ensemblenet", "comp"], ["ensemblenet", "fit", "--num-h"], ["ensemblenet", "compare", "--tuning.t"])
    asked = "".join(f"COMP_WORDS=({' '.join(typed)}); COMP_CWORD={len(typed) - 1}; tried\n" for typed in words)
    tried = "tried() { COMPREPLY=(); _shtab_ensemblenet; echo ${COMPREPLY[*]}; }"
    done = subprocess.run(["bash", "-c", f"source {script}\n{tried}\n{asked}"], capture_output=True, text=True)
    assert done.stdout == "compare completion\n--num-heads\n--tuning.trials\n", done.stderr


@pytest.mark.parametrize("name", sorted(configs()))
def test_what_is_shipped_passes_the_early_checks(name: str, tmp_path: Path) -> None:
    command = "compare" if name.startswith("compare/") else "fit"
    check_settings(command, [name, "--runs", str(tmp_path / "runs")] if command == "fit" else ["--config", name])


def test_a_copy_to_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small_files: None
) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: 20_001 * b"#")
    assert main(["configs", "copy", "mnist1d/base", str(tmp_path)]) == 2
    assert f"{tmp_path / 'base.yaml'}: File too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["--trainer.callbacks", "[{class_path: own_of_mine.Stops, init_args: {stp: 3}}]"],
            "Stops takes no stp. Did you",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.montor", "x"],
            "EarlyStopping takes no montor. Did",
        ),
        (["--trainer.logger.class_path=CSVLogger", "--trainer.logger.init_args.save_dri=x"], "Did you mean save_dir?"),
        (
            ["--data", "own_of_mine.Data", "--data.init_args.num_trian", "3"],
            "own_of_mine.Data takes no num_trian. Did you",
        ),
        (["--data", "own_of_mine.Dta"], "own_of_mine has no Dta. Did you mean Data?"),
        (["--trainer.logger", "{class_path: CSVLogger, init_args: {logger: {class_path: a.B}, dir: x}}"], "takes no "),
    ],
)
def test_arguments_of_any_class_are_checked_before_it_is_imported(
    settings: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_of_mine.py").write_text(
        "from ensemblenet.data import MNIST1D\nfrom lightning.pytorch import Callback\n"
        "class Stops(Callback):\n    def __init__(self, step: int): pass\n"
        "class Data(MNIST1D):\n    def __init__(self, where: str, **more):\n        super().__init__(**more)\n"
        "raise SystemExit\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["mnist1d/base", "--runs", str(tmp_path), *settings]
    with pytest.raises(ModelNameError, match=re.escape(message)):
        check_settings("fit", given)
    check_settings("fit", ["mnist1d/base", "--runs", str(tmp_path), "--data=own_of_mine.Data", "--data.where=val"])
    with_file = tmp_path / "fit.yaml"
    with_file.write_text(
        "model: {}\ntrainer:\n  callbacks:\n  - class_path: own_of_mine.Stops\n    init_args: {stp: 3}"
    )
    with pytest.raises(ModelNameError, match=r"fit.yaml: trainer.callbacks: own_of_mine.Stops takes no stp"):
        check_settings("fit", [str(with_file)])
