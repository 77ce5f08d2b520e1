"""The figure of a model card: drawn from the report, beside the card that shows it."""

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.cards import pruned_card, take_apart
from support.pages import BLOCKS, LEAVES, name_of, summed, three_blocks, write_three_blocks

from emp_llm import prune, unpack
from emp_llm.report.card.figure import card_figure
from emp_llm.report.page.colours import RAMP

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_three_blocks(tmp_path / "source")


def cells_of(figure: str) -> dict[tuple[float, float], str]:
    """Colours of the cells by their places, of the two largest sizes of rectangles' the smaller."""
    rectangles = ElementTree.fromstring(figure).findall(f"{SVG}rect")  # noqa: S314
    return {
        (float(r.get("y", "")), float(r.get("x", ""))): r.get("fill", "")
        for r in rectangles
        if r.get("height") == "25"
    }


def lightness(color: str) -> float:
    """Relative luminance of #rrggbb."""
    parts = [(int(color[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    return sum(part * weight for part, weight in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))


def test_cells_are_darker_where_more_is_pruned(source: Path, tmp_path: Path) -> None:
    cells = cells_of(card_figure(prune(source, tmp_path / "out")))
    assert len(cells) == BLOCKS * len(LEAVES)
    tensors = three_blocks()
    fractions = [
        summed([tensors[name_of(block, leaf)]], 1.0).figures["n_eff_fraction_mean"]
        for leaf in LEAVES
        for block in range(BLOCKS)
    ]
    colors = [color for _, color in sorted(cells.items())]
    by_fraction = [color for _, color in sorted(zip(fractions, colors, strict=True))]
    assert by_fraction == sorted(colors, key=lightness)
    assert (by_fraction[0], by_fraction[-1]) == (RAMP[-1], RAMP[0])


def test_the_ramp_grows_darker_in_steps_that_are_alike() -> None:
    roots = [lightness(color) ** (1 / 3) for color in RAMP]  # as the eye sees them
    steps = [a - b for a, b in pairwise(roots)]
    assert all(0.05 < step < 0.13 for step in steps)


def test_the_card_shows_the_figure_that_lies_beside_it(source: Path, tmp_path: Path) -> None:
    card = pruned_card(source, "# A model\n")
    unpack(card.parent, tmp_path / "dense")
    for path in (card, tmp_path / "dense" / "README.md"):
        _, ours, _ = take_apart(path)
        (shown,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", ours)
        assert ElementTree.parse(path.parent / shown).getroot().tag == f"{SVG}svg"  # noqa: S314


def test_a_figure_of_the_source_is_not_taken_along(source: Path, tmp_path: Path) -> None:
    (source / "emp_report.svg").write_text("another model's")
    prune(source, tmp_path / "out")
    assert "another" not in (tmp_path / "out" / "emp_report.svg").read_text()


def test_nothing_of_a_name_breaks_the_figure(source: Path, tmp_path: Path) -> None:
    report = prune(source, tmp_path / "out")
    for fields in report["tensors"].values():
        fields["kind"] = "<script>&\x00\ud800]]>"
    figure = card_figure(report)
    figure.encode()
    root = ElementTree.fromstring(figure)  # noqa: S314
    assert root.findall(f".//{SVG}script") == []
    assert any((text.text or "").startswith("<script>&") for text in root.iter(f"{SVG}text"))
