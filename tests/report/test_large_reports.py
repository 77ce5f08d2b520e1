"""A report of as many tensors as any checkpoint has can be read again, and so can an older one."""

import json
from pathlib import Path
from typing import Any

from support.checkpoints import UP

from emp_llm import inspect, prune, unpack, verify
from emp_llm.files.atomic import write_json
from emp_llm.report.file import write_report
from emp_llm.report.schema import read_report_file
from emp_llm.report.totals import kinds

LAYERS, EXPERTS = 61, 384


def test_the_report_of_seventy_thousand_experts_can_be_read(source: Path, tmp_path: Path) -> None:
    report = prune(source, tmp_path / "out")
    fields = report["tensors"][UP] | {
        "reason": "expert of a mixture",
        "block": "model.layers.60",
        "shape": [2048, 7168],
        "rows": 2048,
        "weights": 14680064,
        "kept": 9345678,
        "bytes_before": 29360128,
        "bytes_after": 13123456,
        # of trained weights: N_eff / N from 0.52 to 0.72
        "n_eff_fraction_histogram_start": 26,
        "n_eff_fraction_histogram": [1, 12, 48, 107, 180, 1093, 438, 122, 38, 9],
    }
    report["tensors"] = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj.weight": fields
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for leaf in ("down", "gate", "up")
    }
    write_report(tmp_path, report)
    path = tmp_path / "emp_report.json"
    assert read_report_file(path) == report
    # of the 64 MB that are read there is room for tensors that are not pruned, and longer names
    assert path.stat().st_size < 56_000_000
    assert len(path.read_text(encoding="utf-8").splitlines()) - len(report["tensors"]) < 200


def as_before(report: dict[str, Any]) -> dict[str, Any]:
    """A report as it was written before: histograms with all of their 50 bins."""
    for fields in report["tensors"].values():
        if fields["pruned"]:
            start = fields.pop("n_eff_fraction_histogram_start")
            counts = fields["n_eff_fraction_histogram"]
            fields["n_eff_fraction_histogram"] = [
                *[0] * start,
                *counts,
                *[0] * (50 - start - len(counts)),
            ]
    return report


def test_an_older_report_is_read_as_it_would_be_written_now(source: Path, tmp_path: Path) -> None:
    report = prune(source, tmp_path / "out")
    path = tmp_path / "out" / "emp_report.json"
    write_json(path, as_before(json.loads(path.read_text())))
    assert json.loads(path.read_text()) != report
    assert read_report_file(path) == report
    assert verify(tmp_path / "out", against=source)["kept"] == report["totals"]["targets"]["kept"]
    unpack(tmp_path / "out", tmp_path / "dense")
    dense = read_report_file(tmp_path / "dense" / "emp_report.json")
    assert kinds(dense).keys() == kinds(report).keys()


def test_histograms_of_kinds_have_all_bins(source: Path) -> None:
    report = inspect(source, curve=False)
    for kind, totals in kinds(report).items():
        (fields,) = (f for f in report["tensors"].values() if f["kind"] == kind)
        start, counts = fields["n_eff_fraction_histogram_start"], fields["n_eff_fraction_histogram"]
        assert len(totals["n_eff_fraction_histogram"]) == 50
        assert totals["n_eff_fraction_histogram"][start : start + len(counts)] == counts
        assert sum(totals["n_eff_fraction_histogram"]) == fields["rows"] == sum(counts)
        assert counts[0] > 0 < counts[-1]
