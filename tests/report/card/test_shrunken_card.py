"""The card and the figure of a smaller model, and what is left of them when it is pruned."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from support.calibrated import save_model
from support.mixtures import make_mixture

from emp_llm import ShrinkOptions, pack, prune, shrink, verify

SOURCE_CARD = "---\nlicense: mit\ntags: [moe]\nmodel-index: []\n---\n# The original\n\nIts text.\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_mixture("mixtral", torch.bfloat16).save_pretrained(folder / "dense")
    (folder / "dense" / "README.md").write_text(SOURCE_CARD)
    shrink(folder / "dense", folder / "small", ShrinkOptions(experts="50%"))
    return folder / "small"


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_the_card_says_what_is_left_how_it_was_made_and_keeps_the_sources(small: Path) -> None:
    text = card(small)
    report = json.loads((small / "emp_shrink.json").read_text())
    assert "license: mit" in text
    assert "- emp\n" in text
    assert "model-index" not in text
    assert "# dense, smaller" in text
    assert "3 of 6 experts (`num_local_experts`) stay, chosen by `aimer`" in text
    assert "Their weights keep every bit." in text
    assert "emp-llm shrink dense --experts 50% --out DIR" in text
    assert "| bytes | 33,312 | 19,296 | 0.579 |" in text
    assert f"| tensors | 53 | {len(report['tensors'])} |" in text
    assert text.index("# dense, smaller") < text.index("# The original")


def test_the_figure_has_a_cell_for_each_expert_and_low_ones_for_those_that_went(
    small: Path,
) -> None:
    report = json.loads((small / "emp_shrink.json").read_text())
    root = ElementTree.fromstring((small / "emp_shrink.svg").read_text())  # noqa: S314
    cells = [one for one in root.iter("{http://www.w3.org/2000/svg}rect") if "rx" not in one.attrib]
    assert len(cells) == 12
    heights = [int(one.attrib["height"]) for one in cells]
    for row, holder in enumerate(report["structures"]["experts"]["holders"].values()):
        tall = [e for e in range(6) if heights[6 * row + e] == max(heights)]
        assert tall == holder["kept"]
    assert "![Scores" in card(small)
    assert "(emp_shrink.svg)" in card(small)


def test_the_figure_shows_what_stays_in_blocks_that_stay(tmp_path: Path) -> None:
    source = save_model(tmp_path / "llama", "llama", num_hidden_layers=4)
    random = ShrinkOptions(
        blocks=2,
        block_score="random",
        neurons=8,
        multiple=2,
        width_score="random",
        repair="none",
    )
    shrink(source, tmp_path / "out", random)
    report = json.loads((tmp_path / "out" / "emp_shrink.json").read_text())
    text = (tmp_path / "out" / "emp_shrink.svg").read_text()
    (kept,) = (one["kept"] for one in report["structures"]["blocks"]["holders"].values())
    for block in range(4):
        assert (f">model.layers.{block}<" in text) == (block in kept)
    assert "neurons by random: 8 of " in text
    assert "blocks by" not in text


def test_shrinking_again_replaces_the_section(small: Path, tmp_path: Path) -> None:
    shrink(small, tmp_path / "out", ShrinkOptions(experts=2))
    text = card(tmp_path / "out")
    assert text.count("<!-- emp-llm shrink -->") == 1
    assert "2 of 3 experts" in text
    assert "3 of 6 experts" not in text
    assert "# The original" in text


@pytest.mark.parametrize("command", [prune, pack])
def test_pruning_and_packing_keep_what_shrinking_said(small: Path, tmp_path: Path, command) -> None:
    command(small, tmp_path / "out")

    text = card(tmp_path / "out")
    assert text.index("<!-- /emp-llm -->") < text.index("<!-- emp-llm shrink -->")
    assert "3 of 6 experts" in text
    for name in ("emp_shrink.json", "emp_shrink.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (small / name).read_bytes()
    found = verify(tmp_path / "out", against=small)
    assert found["structures"] is None
    assert bool(found["pruned_tensors"]) == (command is prune)
