"""What the page shows of a report: every number worked out, so that its script only draws.

Legend: a cell is what one block has of one kind of layer; a block's number is its place in the
list of blocks.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emp_llm.prune_command import prune_words
from emp_llm.report import block_order, cells, kinds
from emp_llm.shown import printable
from emp_llm.tally import ratio

__all__ = ["ALL", "MEASURES", "page_content"]

ALL = "all targets"
"""What all kinds together are called."""

MEASURES = ("n_eff_fraction_mean", "sparsity", "retained_mass", "bytes_ratio")
"""What the heat map can show of a cell."""

_FIGURES = (*MEASURES, "bytes_before", "bytes_after")
_COLUMNS = (
    *("n_eff_fraction_mean", "n_eff_fraction_min", "n_eff_fraction_max", "sparsity"),
    *("retained_mass", "bytes_before", "bytes_after"),
)
_BLOCK = re.compile(r"(.*)\.(\d+)")
_EXAMPLES = 20

Report = Mapping[str, Any]


def page_content(report: Report, *, model: str | None = None) -> dict[str, Any]:
    """All that the page shows, as JSON can hold it.

    Args:
        report: Of `emp_llm.inspect`, or a folder's ``emp_report.json``.
        model: The model as the page's command names it; by default as the report does.
    """
    pruned = {name: fields for name, fields in report["tensors"].items() if fields["pruned"]}
    blocks = _sorted_blocks(pruned.values())
    by_kind = kinds(report)
    return {
        "version": report["emp_llm_version"],
        "format": report["format"],
        "source": report["source"] | {"model": printable(report["source"]["model"])},
        "rule": report["rule"],
        "totals": report["totals"],
        "command": _command(report, model),
        "kinds": [{"name": printable(name), **_figures(part)} for name, part in by_kind.items()],
        "blocks": [_block(block) for block in blocks],
        "cells": [
            {"block": blocks.index(block), "kind": list(by_kind).index(kind), **_figures(part)}
            for (block, kind), part in cells(report).items()
        ],
        "histograms": _histograms(pruned.values(), list(by_kind)),
        "curve": _curve(report, by_kind),
        "standing_out": [
            row | {"tensor": printable(row["tensor"])} for row in report.get("standing_out", ())
        ],
        "left": _left(report),
        "tensors": _table(pruned, blocks, list(by_kind)),
    }


def _command(report: Report, model: str | None) -> list[str]:
    """The words of the command that prunes by this report's rule; the page appends a β."""
    name = re.split(r"[/\\\\]", report["source"]["model"])[-1]
    words = prune_words(report, model=model, out=f"./{name}-emp", beta=False)
    return [shlex.quote(word) for word in words]


def _figures(part: Report) -> dict[str, Any]:
    return {"tensors": part["tensors"]} | {name: part[name] for name in _FIGURES}


def _sorted_blocks(tensors: Iterable[Report]) -> list[str | None]:
    return sorted({fields["block"] for fields in tensors}, key=block_order)


def _block(block: str | None) -> dict[str, Any]:
    """A block's name, the list it lies in and its number there."""
    match = _BLOCK.fullmatch(block or "")
    if match is None:
        name = printable(block or "outside the blocks")
        return {"name": name, "list": printable(block or ""), "number": None}
    return {"name": printable(match[0]), "list": printable(match[1]), "number": int(match[2])}


def _histograms(tensors: Iterable[Report], names: Sequence[str]) -> list[dict[str, Any]] | None:
    """Of each kind the groups per bin of N_eff / N, its least and its largest.

    None where a report was written before these were counted.
    """
    grouped: dict[str, list[Report]] = {name: [] for name in names}
    for fields in tensors:
        if "n_eff_fraction_histogram" not in fields:
            return None
        grouped[fields["kind"]].append(fields)
    return [
        {
            "counts": [
                sum(counts)
                for counts in zip(*(one["n_eff_fraction_histogram"] for one in part), strict=True)
            ],
            "min": min(one["n_eff_fraction_min"] for one in part),
            "max": max(one["n_eff_fraction_max"] for one in part),
        }
        for part in grouped.values()
    ]


def _curve(report: Report, by_kind: Report) -> dict[str, Any] | None:
    """Sparsity, bytes and retained mass at each β, of all targets and of each kind."""
    curve = report.get("curve")
    if curve is None:
        return None
    targets, model = report["totals"]["targets"], report["totals"]["model"]
    parts = {ALL: (targets, curve["targets"])}
    parts |= {kind: (by_kind[kind], curve["kinds"][kind]) for kind in by_kind}
    rest = model["bytes_before"] - targets["bytes_before"]
    return {
        "beta": curve["beta"],
        "parts": [
            {
                "name": printable(name),
                "bytes_before": totals["bytes_before"],
                "sparsity": [ratio(totals["weights"] - k, totals["weights"]) for k in line["kept"]],
                "bytes": line["bytes"],
                "bytes_ratio": [ratio(nbytes, totals["bytes_before"]) for nbytes in line["bytes"]],
                "retained_mass": line["retained_mass"],
            }
            for name, (totals, line) in parts.items()
        ],
        "model_bytes": [rest + nbytes for nbytes in curve["targets"]["bytes"]],
    }


def _left(report: Report) -> list[dict[str, Any]]:
    """Why tensors were left alone: the largest part first, with a few names of each."""
    reasons: dict[str, dict[str, Any]] = {}
    for name, fields in report["tensors"].items():
        if not fields["pruned"]:
            empty = {"reason": printable(fields["reason"]), "tensors": 0, "bytes": 0, "names": []}
            part = reasons.setdefault(fields["reason"], empty)
            part["tensors"] += 1
            part["bytes"] += fields["bytes_before"]
            if len(part["names"]) < _EXAMPLES:
                part["names"].append(printable(name))
    return sorted(reasons.values(), key=lambda part: (-part["bytes"], part["reason"]))


def _table(
    pruned: Mapping[str, Report], blocks: Sequence[str | None], names: Sequence[str]
) -> dict[str, list[Any]]:
    """The pruned tensors column by column, in the order of the model; models have thousands."""
    order = sorted(pruned, key=lambda name: (block_order(pruned[name]["block"]), name))
    numbers = {block: number for number, block in enumerate(blocks)}
    of_kind = {kind: number for number, kind in enumerate(names)}
    table: dict[str, list[Any]] = {
        "name": [printable(name) for name in order],
        "block": [numbers[pruned[name]["block"]] for name in order],
        "kind": [of_kind[pruned[name]["kind"]] for name in order],
        "shape": [" × ".join(map(str, pruned[name]["shape"])) for name in order],
        "bytes_ratio": [
            ratio(pruned[name]["bytes_after"], pruned[name]["bytes_before"]) for name in order
        ],
    }
    return table | {column: [pruned[name].get(column) for name in order] for column in _COLUMNS}
