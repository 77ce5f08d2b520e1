"""What the page shows of a report: every number worked out, so that its script only draws.

Names are made printable here. Tensors, blocks and kinds of layer are given by their places in
lists.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TypedDict

from emp_llm.messages import printable
from emp_llm.options import OutputFormat
from emp_llm.report.fields import (
    CurveTotals,
    GroupTotals,
    OutlierRow,
    PrunedTensor,
    Report,
    ReportTotals,
    TargetTotals,
)
from emp_llm.report.prune_command import prune_words
from emp_llm.report.source_fields import SourceFields
from emp_llm.report.tensor_statistics import ratio
from emp_llm.report.totals import cells, kinds, left_alone, pruned_tensors
from emp_llm.rule_fields import RuleFields

__all__ = [
    "ALL",
    "BlockContent",
    "CellContent",
    "CurveContent",
    "Histogram",
    "KindContent",
    "MapContent",
    "PageContent",
    "map_content",
    "page_content",
]

ALL = "all targets"
"""What all kinds together are called."""

_BLOCK = re.compile(r"(.*)\.(\d+)", re.DOTALL)
_EXAMPLES = 20
_NEARLY_ALL = 0.001  # what is pruned beyond this is not worth the room on the axis


class _PartContent(TypedDict):
    """Statistics of a part of the model."""

    tensors: int
    n_eff_fraction_mean: float
    sparsity: float
    retained_mass: float
    bytes_before: int
    bytes_after: int
    bytes_ratio: float


class Histogram(TypedDict):
    """Groups counted by N_eff / N in equal bins from 0 to 1, and the least and largest of them."""

    counts: list[int]
    min: float
    max: float


class KindContent(_PartContent):
    """One kind of layer."""

    name: str
    histogram: Histogram


class BlockContent(TypedDict):
    """One decoder block: its name, the list it lies in, and its number there if it has one."""

    name: str
    list: str
    number: int | None


class CellContent(_PartContent):
    """What one block has of one kind, both by their places in `MapContent`."""

    block: int
    kind: int


class MapContent(TypedDict):
    """What the heat map and the distributions show."""

    kinds: list[KindContent]
    blocks: list[BlockContent]
    cells: list[CellContent]


class _LineContent(TypedDict):
    """The curve of all targets or of one kind."""

    name: str
    bytes_before: int
    sparsity: list[float]
    retained_mass: list[float]
    bytes: list[int]
    bytes_ratio: list[float]


class CurveContent(TypedDict):
    """Kept weights, bytes, sparsity and mass at each β.

    Attributes:
        beta: Ascending.
        whole_at: The β from which on nothing is pruned.
        parts: All targets first, then each kind.
        model_bytes: Bytes of the whole model at each β.
    """

    beta: list[float]
    whole_at: float
    parts: list[_LineContent]
    model_bytes: list[int]


class _OutlierContent(TypedDict):
    rows: list[OutlierRow]
    counts: dict[str, int]


class _LeftContent(TypedDict):
    reason: str
    tensors: int
    bytes: int
    bytes_after: int
    names: list[str]


class _TableContent(TypedDict):
    """The pruned tensors column by column."""

    name: list[str]
    block: list[int]
    kind: list[int]
    shape: list[int]
    bytes_ratio: list[float]
    n_eff_fraction_mean: list[float]
    n_eff_fraction_min: list[float]
    n_eff_fraction_max: list[float]
    sparsity: list[float]
    retained_mass: list[float]
    bytes_after: list[int]


class PageContent(MapContent):
    """All that the page shows."""

    version: str
    format: OutputFormat
    source: SourceFields
    rule: RuleFields
    totals: ReportTotals
    command: list[str]
    curve: CurveContent | None
    standing_out: _OutlierContent | None
    left: list[_LeftContent]
    shapes: list[str]
    tensors: _TableContent


def page_content(report: Report, *, model: str | None = None) -> PageContent:
    """All that the page shows, as JSON can hold it.

    Args:
        report: What `emp_llm.inspect` returns, or a folder's ``emp_report.json``.
        model: The model as the page's command names it; by default as the report does.
    """
    source = report["source"]
    shapes = sorted({_shape(fields) for fields in pruned_tensors(report).values()})
    return {
        "version": report["emp_llm_version"],
        "format": report["format"],
        "source": {"model": printable(source["model"]), "revision": source["revision"]},
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


def map_content(report: Report) -> MapContent:
    """What the heat map and the distributions show: kinds of layer, blocks, and their cells."""
    by_kind, by_cell = kinds(report), cells(report)
    names, places = list(by_kind), _places(by_cell)
    return {
        "kinds": [
            {"name": printable(name), "histogram": _histogram(part), **_part(part)}
            for name, part in by_kind.items()
        ],
        "blocks": [_block(block) for block in places],
        "cells": [
            {"block": places.index(block), "kind": names.index(kind), **_part(part)}
            for (block, kind), part in by_cell.items()
        ],
    }


def _places(by_cell: Mapping[tuple[str | None, str], GroupTotals]) -> list[str | None]:
    """The blocks, in the order of the model."""
    return list(dict.fromkeys(block for block, _ in by_cell))


def _command(report: Report, model: str | None) -> list[str]:
    """The words of the command that prunes by this report's rule; the page appends a β."""
    name = re.split(r"[/\\]", report["source"]["model"])[-1]
    words = prune_words(report, model=model, out=f"./{name}-emp", beta=False)
    return [shlex.quote(word) for word in words]


def _part(part: GroupTotals) -> _PartContent:
    return {
        "tensors": part["tensors"],
        "n_eff_fraction_mean": part["n_eff_fraction_mean"],
        "sparsity": part["sparsity"],
        "retained_mass": part["retained_mass"],
        "bytes_before": part["bytes_before"],
        "bytes_after": part["bytes_after"],
        "bytes_ratio": part["bytes_ratio"],
    }


def _histogram(part: GroupTotals) -> Histogram:
    return {
        "counts": part["n_eff_fraction_histogram"],
        "min": part["n_eff_fraction_min"],
        "max": part["n_eff_fraction_max"],
    }


def _block(block: str | None) -> BlockContent:
    match = _BLOCK.fullmatch(block or "")
    if match is None:
        name = printable(block or "")
        return {"name": name or "outside the blocks", "list": name, "number": None}
    return {"name": printable(match[0]), "list": printable(match[1]), "number": int(match[2])}


def _curve(report: Report) -> CurveContent | None:
    """Sparsity, bytes and retained mass at each β, of all targets and of each kind.

    The axis ends at the first β that prunes next to nothing.
    """
    curve = report.get("curve")
    if curve is None:
        return None
    by_kind = kinds(report)
    targets, model = report["totals"]["targets"], report["totals"]["model"]
    sparsities = curve["targets"]["sparsity"]
    last = next(i for i, sparsity in enumerate([*sparsities[:-1], 0.0]) if sparsity <= _NEARLY_ALL)
    shown = slice(last + 1)
    parts: dict[str, tuple[TargetTotals, CurveTotals]] = {ALL: (targets, curve["targets"])}
    parts |= {kind: (by_kind[kind], curve["kinds"][kind]) for kind in by_kind}
    rest = model["bytes_after"] - targets["bytes_after"]
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


def _standing_out(report: Report) -> _OutlierContent | None:
    """Rows unlike the others; None if nobody looked for them."""
    if "standing_out" not in report:
        return None
    rows = report["standing_out"]
    return {
        "rows": [{**row, "tensor": printable(row["tensor"])} for row in rows],
        "counts": report["standing_out_counts"],
    }


def _left(report: Report) -> list[_LeftContent]:
    """Why tensors were not pruned: the largest part first, with a few names of each."""
    return [
        {
            "reason": printable(reason),
            "tensors": len(part["names"]),
            "bytes": part["bytes"],
            "bytes_after": part["bytes_after"],
            "names": [printable(name) for name in part["names"][:_EXAMPLES]],
        }
        for reason, part in left_alone(report).items()
    ]


def _shape(fields: PrunedTensor) -> str:
    return " × ".join(map(str, fields["shape"]))


def _table(report: Report, shapes: Sequence[str]) -> _TableContent:
    """The pruned tensors in the order of the model, by columns since models have thousands."""
    pruned = pruned_tensors(report)
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
        "n_eff_fraction_mean": [row["n_eff_fraction_mean"] for row in rows],
        "n_eff_fraction_min": [row["n_eff_fraction_min"] for row in rows],
        "n_eff_fraction_max": [row["n_eff_fraction_max"] for row in rows],
        "sparsity": [row["sparsity"] for row in rows],
        "retained_mass": [row["retained_mass"] for row in rows],
        "bytes_after": [row["bytes_after"] for row in rows],
    }
