"""A comparison that is interrupted goes on from the rows that it saved, and from no others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emp_cli.app import app
from safetensors.torch import save_file
from support.calibrated import calibration, save_model, save_text
from support.checkpoints import load
from support.processes import start
from typer.testing import CliRunner

from emp_llm import EmpError, OptionError, OutputError, compare
from emp_llm.comparison.bench import Bench
from emp_llm.comparison.costs import Comparison

TEXT = " ".join(f"w{number * number % 31}" for number in range(90))
ROWS = 11
"""The dense model, and for each of two β EMP and four controls."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("of all") / "model", "llama")
    large = {name: tensor * 30 for name, tensor in load(folder).items()}
    save_file(large, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.json"


def compared(model: Path, **options: Any) -> Comparison:
    asked = {"betas": [0.4, 1.0], "context": 16, "random_runs": 2, **options}
    return compare(model, asked.pop("text", TEXT), **asked)


def measuring(
    monkeypatch: pytest.MonkeyPatch, stop: int | None = None, error: BaseException | None = None
) -> list[str]:
    """What is measured from now on, by its label; an error in place of the one of some number."""
    labels: list[str] = []
    measure = Bench.measure

    def listed(bench: Bench, label: str, *args: Any, **options: Any) -> Any:
        if error is not None and len(labels) == stop:
            raise error
        labels.append(label)
        return measure(bench, label, *args, **options)

    monkeypatch.setattr(Bench, "measure", listed)
    return labels


def test_an_interrupted_run_goes_on_to_the_rows_of_one_that_was_not(
    model: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compared(model)
    with monkeypatch.context() as patch:
        measuring(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt) as caught:
            compared(model, save=file)
    note = f"3 rows are kept in {file}: the same command goes on from there"
    assert caught.value.__notes__ == [note]
    saved = json.loads(file.read_text())["results"]
    assert saved == json.loads(json.dumps(expected.to_dict()["results"][:3]))

    labels = measuring(monkeypatch)
    found = compared(model, save=file)

    assert labels[0] == "magnitude-layer, β = 0.4"
    assert len(labels) == 10  # those of random pruning are two for a row
    assert found.to_dict() == expected.to_dict()
    assert (len(found.costs), found.taken) == (ROWS, 3)
    content = json.loads(file.read_text())
    assert {name: content[name] for name in expected.to_dict()} == expected.to_dict()


def killed(model: Path, file: Path) -> None:
    torch.set_num_threads(1)
    compared(model, save=file)


def test_a_run_that_is_killed_while_it_saves_leaves_whole_rows(model: Path, file: Path) -> None:
    run = start(killed, model, file, killed_at=7)  # saving a row takes three steps
    run.join()
    assert run.exitcode == -9
    assert len(json.loads(file.read_text())["results"]) == 2
    assert compared(model, save=file).taken == 2
    assert [path.name for path in file.parent.iterdir() if path.is_file()] == [file.name]


def test_rows_with_data_are_kept_too(
    model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = calibration(save_text(tmp_path / "words.txt"))
    asked = {"betas": [0.4], "random_runs": 0, "calibration": data, "save": file}
    with monkeypatch.context() as patch:
        measuring(patch, 7, OutputError("the disk is full"))
        with pytest.raises(OutputError):
            compared(model, **asked)
    saved = json.loads(file.read_text())["results"]
    labels = measuring(monkeypatch)
    results = compared(model, **asked).to_dict()["results"]
    assert labels == ["emp-repaired, β = 0.4", "obs-repaired, β = 0.4"]
    assert [row["method"] for row in saved[5:]] == ["wanda", "obs"]
    assert results[:7] == saved


def test_what_is_kept_in_a_folder_that_is_deleted_is_not_told_of(
    model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        error = KeyboardInterrupt()
        error.add_note("the masks of 2 parts of the model are kept in /tmp/none")
        raise error

    monkeypatch.setattr("emp_llm.entrypoints.compare.prune", interrupt)
    data = calibration(save_text(tmp_path / "words.txt"))
    with pytest.raises(KeyboardInterrupt) as caught:
        compared(model, betas=[0.4], random_runs=0, calibration=data, save=file)
    note = f"5 rows are kept in {file}: the same command goes on from there"
    assert caught.value.__notes__ == [note]


@pytest.fixture(scope="module")
def finished(model: Path) -> Path:
    """The file of a run with β = 1 that has come to its end."""
    compared(model, betas=[1.0], random_runs=1, save=model.with_name("rows.json"))
    return model.with_name("rows.json")


def test_a_finished_run_is_shown_again_without_a_measurement(
    model: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = measuring(monkeypatch)
    found = compared(model, betas=[1.0], random_runs=1, save=finished)
    assert (found.taken, labels) == (6, [])


def embed_more(model: Path) -> None:
    tensors = load(model)
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def configure(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("options", "change", "told"),
    [
        ({"betas": [0.9]}, None, r"betas was \[1.0\], is \[0.9\]"),
        ({"context": 8}, None, "context was 16, is 8"),
        ({"ignore": "up_proj"}, None, r"ignore was \[\], is \['up_proj'\]"),
        ({"random_runs": 2}, None, r"seeds was \[0\], is \[0, 1\]"),
        ({"text": TEXT[:-1]}, None, "content of the text was '"),
        ({}, embed_more, "the source's model.safetensors has changed"),
        ({}, configure, "the source's config.json has changed"),
    ],
)
def test_another_run_is_refused_in_one_line_and_the_file_stays(
    model: Path,
    finished: Path,
    tmp_path: Path,
    options: dict[str, Any],
    change: Callable[[Path], None] | None,
    told: str,
) -> None:
    before = finished.read_bytes()
    if change is not None:
        model = shutil.copytree(model, tmp_path / model.name)
        change(model)
    with pytest.raises(OptionError, match=f"differs from this one .{told}") as caught:
        compared(model, **{"betas": [1.0], "random_runs": 1, "save": finished, **options})
    assert str(caught.value).endswith("repeat the command that began it, or give another file")
    assert "\n" not in str(caught.value)
    assert finished.read_bytes() == before


def test_another_text_to_calibrate_on_is_refused(
    model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = save_text(tmp_path / "words.txt")
    measuring(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compared(model, betas=[1.0], calibration=calibration(text), save=file)
    for change, told in (
        ({"samples": 3}, "calibration samples was 4, is 3"),
        ({}, "content of the calibration text was '"),
    ):
        if not change:
            save_text(text, 100)
        asked = calibration(text, **change)
        with pytest.raises(OptionError, match=told):
            compared(model, betas=[1.0], calibration=asked, save=file)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"run": {}, "results": 3}', "not json"])
def test_a_file_of_something_else_is_refused_and_stays(
    model: Path, file: Path, content: str
) -> None:
    file.write_text(content)
    with pytest.raises(OptionError, match="is not a file that compare has saved: give the name of"):
        compared(model, save=file)
    assert file.read_text() == content


def test_a_file_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no such folder; make it first"):
        compared(tmp_path / "no model", save=tmp_path / "none" / "rows.json")


def test_a_run_that_saves_nothing_says_how_to_keep_rows(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring(monkeypatch, 1, EmpError("no"))
    with pytest.raises(EmpError) as caught:
        compared(model)
    note = "1 row is measured and lost: --save FILE keeps what is measured"
    assert caught.value.__notes__ == [note]


def test_the_command_says_how_many_rows_it_took(model: Path, file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["compare", model, "--perplexity", tmp_path / "text.txt", "--context", 16]
    options = ["--betas", 1, "--random-runs", 0, "--save", file]
    first, second = (
        CliRunner().invoke(app, list(map(str, [*command, *options])), catch_exceptions=False)
        for _ in range(2)
    )
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert second.stdout == first.stdout
    assert f"5 of 5 rows were in {file} already" in second.stderr
    assert "already" not in first.stderr
