"""What the page shows of a report: every number worked out, so that its script only draws.

Names are made printable here. Tensors, blocks and kinds of layer are told by their places in lists.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from emp_llm.messages import printable
from emp_llm.report.prune_command import prune_words
from emp_llm.report.tensor_statistics import ratio
from emp_llm.report.totals import cells, kinds

__all__ = ["ALL", "map_content", "page_content"]

ALL = "all targets"
"""What all kinds together are called."""

_FIGURES = (
    *("tensors", "n_eff_fraction_mean", "sparsity", "retained_mass"),
    *("bytes_before", "bytes_after", "bytes_ratio"),
)
_COLUMNS = (
    *("n_eff_fraction_mean", "n_eff_fraction_min", "n_eff_fraction_max", "sparsity"),
    *("retained_mass", "bytes_after"),
)
_BLOCK = re.compile(r"(.*)\.(\d+)", re.DOTALL)
_EXAMPLES = 20
_NEARLY_ALL = 0.001  # what is pruned beyond this is not worth the room on the axis

Report = Mapping[str, Any]


def page_content(report: Report, *, model: str | None = None) -> dict[str, Any]:
    """All that the page shows, as JSON can hold it.

    Args:
        report: Of `emp_llm.inspect`, or a folder's ``emp_report.json``.
        model: The model as the page's command names it; by default as the report does.
    """
    shapes = sorted({_shape(f) for f in report["tensors"].values() if f["pruned"]})
    return {
        "version": report["emp_llm_version"],
        "format": report["format"],
        "source": report["source"] | {"model": printable(report["source"]["model"])},
        "rule": report["rule"],
        "totals": report["totals"],
        "command": _command(report, model),
        **map_content(report),
        "curve": _curve(report),
        "standing_out": _standing_out(report),
        "left": _left(report),
        "shapes": shapes,
        "tensors": _table(report, shapes),
    }


def map_content(report: Report) -> dict[str, Any]:
    """What the heat map and the distributions show: kinds of layer, blocks, and their cells."""
    by_kind, by_cell = kinds(report), cells(report)
    names, places = list(by_kind), _places(by_cell)
    return {
        "kinds": [
            {"name": printable(name), "histogram": _histogram(part), **_figures(part)}
            for name, part in by_kind.items()
        ],
        "blocks": [_block(block) for block in places],
        "cells": [
            {"block": places.index(block), "kind": names.index(kind), **_figures(part)}
            for (block, kind), part in by_cell.items()
        ],
    }


def _places(by_cell: Mapping[tuple[str | None, str], Report]) -> list[str | None]:
    """The blocks, in the order of the model."""
    return list(dict.fromkeys(block for block, _ in by_cell))


def _command(report: Report, model: str | None) -> list[str]:
    """The words of the command that prunes by this report's rule; the page appends a β."""
    name = re.split(r"[/\\]", report["source"]["model"])[-1]
    words = prune_words(report, model=model, out=f"./{name}-emp", beta=False)
    return [shlex.quote(word) for word in words]


def _figures(part: Report) -> dict[str, Any]:
    return {name: part[name] for name in _FIGURES}


def _histogram(part: Report) -> dict[str, Any]:
    """The groups of a kind counted by N_eff / N, and its least and largest."""
    fields = {"counts": "histogram", "min": "min", "max": "max"}
    return {name: part[f"n_eff_fraction_{field}"] for name, field in fields.items()}


def _block(block: str | None) -> dict[str, Any]:
    """A block's name, the list it lies in and its number there."""
    match = _BLOCK.fullmatch(block or "")
    if match is None:
        name = printable(block or "")
        return {"name": name or "outside the blocks", "list": name, "number": None}
    return {"name": printable(match[0]), "list": printable(match[1]), "number": int(match[2])}


def _curve(report: Report) -> dict[str, Any] | None:
    """Sparsity, bytes and retained mass at each β, of all targets and of each kind.

    Past the first β that prunes next to nothing, the axis ends.
    """
    curve = report.get("curve")
    if curve is None:
        return None
    by_kind = kinds(report)
    targets, model = report["totals"]["targets"], report["totals"]["model"]
    sparsities = curve["targets"]["sparsity"]
    last = next(i for i, sparsity in enumerate([*sparsities[:-1], 0.0]) if sparsity <= _NEARLY_ALL)
    shown = slice(last + 1)
    parts = {ALL: (targets, curve["targets"])}
    parts |= {kind: (by_kind[kind], curve["kinds"][kind]) for kind in by_kind}
    rest = model["bytes_before"] - targets["bytes_before"]
    return {
        "beta": curve["beta"][shown],
        "whole_at": curve["beta"][-1],
        "parts": [
            {
                "name": printable(name),
                "bytes_before": totals["bytes_before"],
                "sparsity": line["sparsity"][shown],
                "retained_mass": line["retained_mass"][shown],
                "bytes": line["bytes"][shown],
                "bytes_ratio": [ratio(n, totals["bytes_before"]) for n in line["bytes"][shown]],
            }
            for name, (totals, line) in parts.items()
        ],
        "model_bytes": [rest + nbytes for nbytes in curve["targets"]["bytes"][shown]],
    }


def _standing_out(report: Report) -> dict[str, Any] | None:
    """Rows unlike the others, and how many there are in all; None if nobody looked for them."""
    if "standing_out" not in report:
        return None
    rows = [row | {"tensor": printable(row["tensor"])} for row in report["standing_out"]]
    return {"rows": rows, "counts": report["standing_out_counts"]}


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


def _shape(fields: Report) -> str:
    return " × ".join(map(str, fields["shape"]))


def _table(report: Report, shapes: Sequence[str]) -> dict[str, list[Any]]:
    """The pruned tensors column by column, in the order of the model; models have thousands."""
    pruned = {name: fields for name, fields in report["tensors"].items() if fields["pruned"]}
    by_cell = cells(report)
    of_block = {block: place for place, block in enumerate(_places(by_cell))}
    of_kind = {kind: place for place, kind in enumerate(sorted({kind for _, kind in by_cell}))}
    order = sorted(pruned, key=lambda name: (of_block[pruned[name]["block"]], name))
    rows = [pruned[name] for name in order]
    return {
        "name": [printable(name) for name in order],
        "block": [of_block[row["block"]] for row in rows],
        "kind": [of_kind[row["kind"]] for row in rows],
        "shape": [shapes.index(_shape(row)) for row in rows],
        "bytes_ratio": [ratio(row["bytes_after"], row["bytes_before"]) for row in rows],
        **{column: [row[column] for row in rows] for column in _COLUMNS},
    }
