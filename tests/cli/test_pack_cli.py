"""The pack command, and what the others print of what it writes, in 80 columns."""

import json
from pathlib import Path

import pytest
from emp_cli.app import app
from support.checkpoints import files
from support.wide_models import WideModel
from typer.testing import CliRunner, Result

from emp_llm import verify

NOTHING = "every weight keeps every bit"


def run(*arguments: object) -> Result:
    """Run a command; what no command foresees is raised."""
    return CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)


@pytest.fixture
def folder(wide_model: WideModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model beside which results are written."""
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(wide_model("llama"))
    return tmp_path


def lines(result: Result) -> list[str]:
    """What was printed, in lines that fit."""
    assert result.exit_code == 0
    found = result.stdout.splitlines()
    assert [line for line in found if len(line) > 80] == []
    return found


def test_pack_says_what_it_wrote(folder: Path) -> None:
    result = run("pack", "model", "--out", "out")
    sizes, written = lines(result)
    assert sizes == f"whole model: 543 kB → 411 kB (0.757); {NOTHING}"
    assert written.startswith("out: written in ")
    assert "packing 543 kB" in result.stderr
    assert verify(folder / "out", against=folder / "model")["pruned_tensors"] == 0


@pytest.mark.usefixtures("folder")
def test_prune_of_no_targets_says_the_same() -> None:
    sizes, written = lines(run("prune", "model", "--targets", "none", "--out", "out"))
    assert sizes.endswith(NOTHING)
    assert written.startswith("out: written in ")


@pytest.mark.usefixtures("folder")
def test_json_is_one_object() -> None:
    content = json.loads(run("pack", "model", "--out", "out", "--json").stdout)
    assert content["out"] == "out"
    assert content["rule"]["targets"] == "none"
    assert content["format_version"] == 2
    assert content["totals"]["model"]["bytes_after"] == 411_296
    assert content["seconds"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack"],
        ["pack", "model"],
        ["pack", "model", "--out", "out", "--beta", "2"],
        ["pack", "model", "--out", "out", "--threads", "0"],
        ["prune", "model", "--out", "out", "--rest", "dense"],
        ["inspect", "model", "--rest", "dense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_refused(folder: Path, arguments: list[str]) -> None:
    before = files(folder)
    assert run(*arguments).exit_code == 2
    assert files(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "packed", "--out", "x"], "the checkpoint is packed; run 'emp-llm unpack' on it"),
        (["pack", "model", "--out", "packed"], "packed: is not empty"),
        (["prune", "model", "--out", "x", "--targets", "none", "--beta", "2"], "beta is 2.0, but"),
        (
            ["prune", "model", "--out", "x", "--targets", "none", "--rest", "plain"],
            "rest is 'plain'",
        ),
        (
            ["report", "packed", "--html", "x.html"],
            "nothing is pruned, so there is nothing to draw",
        ),
        (["report", "packed", "--png", "x.png"], "nothing is pruned, so there is nothing to draw"),
        (["inspect", "model", "--targets", "none", "--html", "x.html"], "there is nothing to draw"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_what_cannot_be_done_ends_in_one_line(
    folder: Path, arguments: list[str], message: str
) -> None:
    run("pack", "model", "--out", "packed")
    before = files(folder)
    result = run(*arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert message in line
    assert files(folder) == before


@pytest.mark.usefixtures("folder")
def test_the_other_commands_say_that_nothing_is_pruned() -> None:
    run("pack", "model", "--out", "packed")
    report = lines(run("report", "packed"))
    assert report == lines(run("inspect", "model", "--targets", "none"))[: len(report)]
    assert report[0].endswith("  packed without loss")
    assert report[-1].endswith(NOTHING)
    assert run("verify", "packed").stdout.endswith("none of them is pruned\n")
    assert lines(run("verify", "packed", "--against", "model"))[0].endswith("bit for bit")
    differences = lines(run("diff", "packed", "model"))
    assert differences[0] == "A  packed  packed without loss, 21 tensors, 411 kB"
    assert differences[-1] == "the same weights: all 21 tensors, bit for bit"
    assert "6 of 21 tensors unpacked" in lines(run("unpack", "packed", "--out", "dense"))[0]


@pytest.mark.usefixtures("folder")
def test_tables_tell_how_large_the_rest_is() -> None:
    packed = lines(run("prune", "model", "--out", "packed"))
    plain = lines(run("prune", "model", "--rest", "plain", "--out", "plain"))
    (of_packed,), (of_plain,) = (
        [line.split() for line in printed if "the rest" in line] for printed in (packed, plain)
    )
    assert of_packed[2:] == ["15", "262", "k", "393", "kB", "0.748"]
    assert of_plain[2:] == ["15", "262", "k", "525", "kB", "1.000"]
    expected = [line for line in lines(run("report", "packed")) if "embedding" in line]
    assert expected[0].split() == ["embedding", "1", "65.5", "kB", "43.5", "kB", "0.664"]
