"""inspect and report: the page, the figures, and reports that strangers wrote."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emp_cli.app import app
from support.checkpoints import files
from support.hub_server import HubServer
from support.pages import LEAVES, Page, write_three_blocks
from typer.testing import CliRunner, Result

from emp_llm import OptionError, inspect, prune
from emp_llm.report.page.page import page_html
from emp_llm.report.page.paper_figures import check_figures, save_figures


def run(*arguments: object) -> Result:
    """Run a command in this process; what no command foresees is raised."""
    return CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_three_blocks(tmp_path_factory.mktemp("commands") / "source")


@pytest.fixture(scope="module")
def pruned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune(source, out)
    return out


# inspect


def test_inspect_writes_the_page_of_what_it_finds(source: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = run("inspect", source, "--html", page)
    assert result.exit_code == 0
    assert page.read_text(encoding="utf-8") == page_html(inspect(source), model=str(source))
    assert f"{page}: " in result.stdout


def test_the_command_on_the_page_prunes_to_what_the_page_says(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("inspect", source, "--targets", "gate|down", "--ignore", "layers.1", "--html", "page.html")
    content = Page(Path("page.html").read_text(encoding="utf-8")).content
    beta = content["curve"]["beta"][9]
    program, *words = shlex.split(" ".join([*content["command"], "--beta", json.dumps(beta)]))
    assert program == "emp-llm"
    assert run(*words).exit_code == 0
    written = json.loads(Path("source-emp/emp_report.json").read_text())
    assert written["rule"]["beta"] == beta
    assert written["totals"]["targets"]["bytes_after"] == content["curve"]["parts"][0]["bytes"][9]
    assert written["totals"]["targets"]["sparsity"] == content["curve"]["parts"][0]["sparsity"][9]


def test_json_stays_one_object_beside_a_page(source: Path, tmp_path: Path) -> None:
    result = run("inspect", source, "--html", tmp_path / "page.html", "--json")
    assert json.loads(result.stdout)["curve"]["beta"]
    assert (tmp_path / "page.html").is_file()


WRONG = {
    "--html page.pdf": "OptionError: html is 'page.pdf'; give the name of an HTML file",
    "--html no/page.html": "OutputError: no/page.html: there is no such folder; make it first",
    "--html folder.html": "OutputError: folder.html: is a folder; give the name of a file in it",
    "--png figures.gif": "OptionError: png is 'figures.gif'; give the name of a PNG or PDF or SVG",
    "--png no/figures.png": "OutputError: no/figures.png: there is no such folder",
}


@pytest.mark.parametrize("command", ["inspect", "report"])
@pytest.mark.parametrize("options", WRONG)
def test_what_cannot_be_written_is_told_before_any_work(
    command: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    result = run(command, "no/such/model", *options.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(WRONG[options])
    assert result.stderr.count("\n") == 1


# report


def test_report_prints_what_inspect_prints(source: Path, pruned: Path) -> None:
    told = run("report", pruned)
    assert told.exit_code == 0
    lines = [line for line in told.stdout.splitlines() if line.strip()]
    assert set(lines) <= set(run("inspect", source).stdout.splitlines())
    assert {line.split()[0] for line in lines} >= {*LEAVES, "all", "sparsity", "norm", "whole"}


def test_report_opens_in_the_same_page(pruned: Path, tmp_path: Path) -> None:
    run("report", pruned, "--html", tmp_path / "page.html")
    content = Page((tmp_path / "page.html").read_text(encoding="utf-8")).content
    report = json.loads((pruned / "emp_report.json").read_text())
    assert content["totals"] == report["totals"]
    assert content["curve"] is None


def test_json_of_report_is_the_report(pruned: Path) -> None:
    found = json.loads(run("report", pruned, "--json").stdout)
    report = json.loads((pruned / "emp_report.json").read_text())
    assert report.items() <= found.items()


def test_of_a_model_of_the_hub_only_the_report_is_fetched(
    hub: HubServer, pruned: Path, source: Path
) -> None:
    hub.commit("me/pruned", files(pruned))
    result = run("report", "me/pruned")
    assert result.exit_code == 0
    assert hub.downloads() == ["emp_report.json"]
    hub.commit("me/dense", files(source))
    missing = run("report", "me/dense")
    assert missing.stderr.startswith("CheckpointError: me/dense: has no emp_report.json; give")
    assert missing.stderr.count("\n") == 1


def test_a_folder_without_a_report_is_one_line(source: Path) -> None:
    result = run("report", source)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"CheckpointError: {source}: has no emp_report.json; give")


def test_a_revision_of_a_local_folder_is_refused(pruned: Path) -> None:
    result = run("report", pruned, "--revision", "v1")
    assert result.stderr.startswith("OptionError: revision is 'v1', but")


Change = Callable[[dict[str, Any]], object]
TENSOR = "model.layers.1.mlp.up_proj.weight"
DAMAGED: dict[str, tuple[Change, str]] = {
    "no version": (lambda r: r.pop("emp_llm_version"), "emp_llm_version is None"),
    "another format": (lambda r: r.update(format=["packed"]), "format is ['packed']"),
    "no rule": (lambda r: r.pop("rule"), "rule is not an object"),
    "no beta": (lambda r: r["rule"].update(beta="1"), "rule.beta is '1'"),
    "a true beta": (lambda r: r["rule"].update(beta=True), "rule.beta is True"),
    "no source": (lambda r: r["source"].update(model=None), "source.model is None"),
    "no revision": (lambda r: r["source"].pop("revision"), "source.revision is missing"),
    "totals of text": (lambda r: r["totals"]["model"].update(kept="9"), "totals.model.kept is '9'"),
    "a list of tensors": (lambda r: r.update(tensors=[]), "tensors is not an object"),
    "no tensors": (lambda r: r.update(tensors={}), "it prunes nothing"),
    "a tensor that is none": (lambda r: r["tensors"].update(x=1), "tensors.x is not an object"),
    "no mass": (lambda r: r["tensors"][TENSOR].pop("mass"), f"tensors.{TENSOR}.mass is None"),
    "no number": (
        lambda r: r["tensors"][TENSOR].update(retained_mass="1"),
        f"tensors.{TENSOR}.retained_mass is '1'",
    ),
    "no list of bins": (
        lambda r: r["tensors"][TENSOR].update(n_eff_fraction_histogram=1),
        f"tensors.{TENSOR}.n_eff_fraction_histogram is 1",
    ),
    "bins past the last": (
        lambda r: r["tensors"][TENSOR].update(
            n_eff_fraction_histogram=[1, 1], n_eff_fraction_histogram_start=49
        ),
        f"tensors.{TENSOR}.n_eff_fraction_histogram is [1, 1]",
    ),
    "bins without a start": (
        lambda r: (
            r["tensors"][TENSOR].update(n_eff_fraction_histogram=[1, 1]),
            r["tensors"][TENSOR].pop("n_eff_fraction_histogram_start"),
        ),
        f"tensors.{TENSOR}.n_eff_fraction_histogram is [1, 1]",
    ),
    "bins before the first": (
        lambda r: r["tensors"][TENSOR].update(n_eff_fraction_histogram_start=-1),
        f"tensors.{TENSOR}.n_eff_fraction_histogram_start is -1",
    ),
    "no hash": (lambda r: r["tensors"][TENSOR].pop("hash"), f"tensors.{TENSOR}.hash is None"),
    "a vector": (
        lambda r: r["tensors"][TENSOR].update(shape=[48]),
        f"tensors.{TENSOR}.shape is [48]",
    ),
    "a file that is none": (lambda r: r["files"].update(x=[]), "files.x is not an object"),
    "a file without a hash": (lambda r: r["files"].update(x={"bytes": 1}), "files.x.hash is None"),
    "a block that is none": (
        lambda r: r["tensors"][TENSOR].update(block=7),
        f"tensors.{TENSOR}.block is 7",
    ),
    "a block of endless number": (
        lambda r: r["tensors"][TENSOR].update(block=f"layers.{'9' * 5000}"),
        f"tensors.{TENSOR}.block is 'layers.999",
    ),
    "a curve": (lambda r: r.update(curve=5), "curve is 5"),
    "rows that stand out": (lambda r: r.update(standing_out=[1]), "standing_out is [1]"),
    "sizes of files": (lambda r: r["totals"].update(files=3), "totals.files is 3"),
    "no weights": (
        lambda r: r["tensors"][TENSOR].update(weights=0),
        f"tensors.{TENSOR}.weights is 0",
    ),
    "a figure whose sums are infinite": (
        lambda r: r["tensors"][TENSOR].update(mass=1e308),
        f"tensors.{TENSOR}.mass is 1e+308",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_report_is_one_line(pruned: Path, tmp_path: Path, damage: str) -> None:
    change, fault = DAMAGED[damage]
    report = json.loads((pruned / "emp_report.json").read_text())
    change(report)
    (tmp_path / "emp_report.json").write_text(json.dumps(report))
    result = run("report", tmp_path, "--html", tmp_path / "page.html")
    assert (result.exit_code, result.stdout) == (1, "")
    path = tmp_path / "emp_report.json"
    expected = f"FormatError: {path}: is not a report that emp-llm wrote: {fault}"
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


# figures


def test_the_figures_are_drawn_beside_each_other(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("inspect", source, "--png", tmp_path / "figures.png")
    assert result.exit_code == 0
    names = [f"figures-{part}.png" for part in ("blocks", "curve", "rows")]
    assert sorted(files(tmp_path)) == names
    for name, data in files(tmp_path).items():
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert name in result.stdout


@pytest.mark.parametrize(("suffix", "begins"), [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_figures_of_lines_and_letters_are_the_same_each_time(
    pruned: Path, tmp_path: Path, suffix: str, begins: bytes
) -> None:
    pytest.importorskip("matplotlib")
    report = json.loads((pruned / "emp_report.json").read_text())
    drawn = []
    for turn in "12":
        (tmp_path / turn).mkdir()
        paths = save_figures(report, tmp_path / turn / f"a{suffix}")
        assert [path.name for path in paths] == [f"a-blocks{suffix}", f"a-rows{suffix}"]
        drawn.append(files(tmp_path / turn))
    assert drawn[0] == drawn[1]
    assert all(data.startswith(begins) for data in drawn[0].values())


def test_without_matplotlib_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=r"matplotlib is not installed.*emp-llm\[report\]"):
        check_figures(tmp_path / "a.png")
