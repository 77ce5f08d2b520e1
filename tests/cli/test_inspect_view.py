"""What inspect prints: figures of the report, in 80 columns, with and without colour and UTF-8."""

import io
import re
from pathlib import Path

import pytest
from emp_cli.inspect_view import show_report
from emp_cli.tables import pruned_kinds
from support.checkpoints import gaussian, llama_config, write_checkpoint

from emp_llm import PruneOptions, inspect
from emp_llm.report.totals import kinds

DEMO = Path(__file__).parents[2] / "demo" / "model"
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def report() -> dict:
    return inspect(DEMO)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def show(report: dict) -> list[str]:
        show_report(report)
        return capsys.readouterr().out.splitlines()

    return show


def layers(folder: Path, number: int, rows: int = 4, columns: int = 16) -> Path:
    """A Llama of so many layers with one target each, of which the last third has zeros."""
    tensors = {UP.format(i): gaussian(rows, columns, seed=i) for i in range(number)}
    for i in range(number - number // 3, number):
        tensors[UP.format(i)][:, ::2] = 0
    return write_checkpoint(folder, llama_config(columns, rows, layers=number), tensors)


def line_of(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.split()[: len(name.split())] == name.split()]
    return line.split()


def test_each_kind_has_its_figures(report: dict, printed) -> None:
    lines = printed(report)
    for kind, part in kinds(report).items():
        (words,) = [line.split() for line in lines if re.match(rf"{kind} +0\.\d{{4}}", line)]
        assert words[1] == f"{part['n_eff_fraction_mean']:.4f}"
        assert words[2] == f"{part['n_eff_fraction_min']:.2f}"
        assert words[4] == f"{part['n_eff_fraction_max']:.2f}"
        assert words[5] == f"{part['sparsity']:.2%}"
        assert words[6] == f"{part['retained_mass']:.3f}"
        assert words[7] == f"{part['retained_mass_bound']:.3f}"
        assert words[-1] == f"{part['bytes_ratio']:.3f}"


def test_n_eff_of_scores_is_not_shown_where_magnitudes_were_counted(
    report: dict, printed, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = {**report, "rule": {**report["rule"], "criterion": "obs", "count_by": "magnitude"}}
    rows = [printed(counted)]
    pruned_kinds(counted)
    rows.append(capsys.readouterr().out.splitlines())
    for lines in rows:
        assert "row groups, obs, counted by magnitude" in lines[0]
        assert not any("N_eff/N" in line for line in lines[:5])
        part = kinds(report)["up_proj"]
        words = line_of(lines[:9], "up_proj")
        assert f"{part['n_eff_fraction_mean']:.4f}" not in words
        assert f"{part['sparsity']:.2%}" in words


def test_the_curve_has_a_bar_for_each_beta_and_ends_where_all_is_kept(
    report: dict, printed
) -> None:
    lines = printed(report)
    start = next(
        i for i, line in enumerate(lines) if line.startswith("sparsity and size at each β")
    )
    rows = [line.split() for line in lines[start + 3 : start + 10]]
    betas = ["0.25", "0.5", "0.75", "1", "1.25", "1.5", f"{report['curve']['beta'][-1]:g}"]
    assert [row[0] for row in rows] == betas
    assert rows[-1][1] == "0.00%"
    at = report["curve"]["beta"].index(0.5)
    assert rows[1][1] == f"{report['curve']['targets']['sparsity'][at]:.2%}"
    full = [row[-1].count("█") for row in rows]
    assert full == sorted(full)
    assert full[0] < full[-1]


@pytest.mark.parametrize(("blocks", "cells"), [(5, 10), (40, 40), (80, 40)])
def test_the_blocks_of_any_model_fit_a_line(
    tmp_path: Path, printed, blocks: int, cells: int
) -> None:
    lines = printed(inspect(layers(tmp_path / "model", blocks)))
    (line,) = [line for line in lines if re.fullmatch(r" up_proj +[▁▂▃▄▅▆▇█]+", line)]
    marks = line.split()[1]
    assert len(marks) == cells
    assert marks[0] < "▅"
    assert marks[-1] > "▅"
    assert max(marks) == "█"
    assert max(map(len, lines)) <= 80


def test_on_a_terminal_without_utf8_nothing_but_ascii_is_printed(
    report: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        show_report(report)
        stream.flush()
        text = stream.buffer.getvalue().decode()
    assert "\x1b" not in text
    assert "beta = 1" in text
    assert re.search(r" up_proj +[0-7]{8}\n", text)
    assert max(map(len, text.splitlines())) <= 80


def test_colors_are_for_terminals_that_want_them(
    report: dict, printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b" not in "".join(printed(report))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[38;5;" in "".join(printed(report))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[38;5;" not in "".join(printed(report))


def test_rows_that_stand_out_are_told_with_their_number(tmp_path: Path, printed) -> None:
    tensors = {UP.format(0): gaussian(40, 64)}
    tensors[UP.format(0)][7] = 0
    source = write_checkpoint(tmp_path / "model", llama_config(64, 40), tensors)
    lines = printed(inspect(source))
    assert "1 row stands out (1 dead):" in lines
    assert line_of(lines, UP.format(0)) == [UP.format(0), "7", "0.0000", "0", "dead"]


def test_a_model_whose_rows_are_alike_says_so(report: dict, printed) -> None:
    assert "no row stands out: none is dead, uniform or dominated by a few weights" in printed(
        report
    )


def test_groups_larger_than_rows_say_why_there_is_no_curve(tmp_path: Path, printed) -> None:
    lines = printed(inspect(layers(tmp_path / "model", 2), PruneOptions(granularity="layer")))
    assert "other β: counted for row groups only (--granularity row)" in lines


def test_the_bytes_of_the_files_are_told_to_the_last_one(report: dict, printed) -> None:
    files = report["totals"]["files"]
    assert printed(report)[-1] == (
        f"files of weights: {files['bytes_before']:,} bytes → {files['bytes_after']:,} packed, "
        f"{files['bytes_dense']:,} dense"
    )
