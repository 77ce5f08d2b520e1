"""diff of models with fewer blocks, which have other numbers than in their source."""

import json
from pathlib import Path

import pytest
from emp_cli.app import app
from support.calibrated import save_model
from typer.testing import CliRunner

from emp_llm import CalibrationOptions, ShrinkOptions, diff, prune, shrink


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 5 blocks, two with fewer of its blocks, one of these pruned and one less still."""
    folder = tmp_path_factory.mktemp("smaller")
    save_model(folder / "llama", "llama", num_hidden_layers=5)

    def shrunken(source: str, name: str, blocks: int) -> None:
        data = CalibrationOptions(seed=4)
        options = ShrinkOptions(blocks=blocks, block_score="random", calibration=data)
        shrink(folder / source, folder / name, options)

    shrunken("llama", "three", 3)
    shrunken("llama", "four", 4)
    shrunken("four", "two of four", 2)
    prune(folder / "three", folder / "pruned")
    return {path.name: path for path in folder.iterdir()}


def blocks_of(folder: Path) -> list[int]:
    report = json.loads((folder / "emp_shrink.json").read_text())
    return list(report["structures"]["blocks"]["holders"]["model.layers"]["kept"])


def test_blocks_of_a_smaller_model_are_compared_with_what_they_were_in_its_source(
    smaller: dict[str, Path],
) -> None:
    found = diff(smaller["llama"], smaller["three"])

    assert blocks_of(smaller["three"]) == [0, 2, 4]
    gone = {1, 3}
    assert found["only_in_b"] == []
    assert {int(name.split(".")[2]) for name in found["only_in_a"]} == gone
    assert found["totals"]["same"] == found["b"]["tensors"]
    assert (found["a"]["by_source"], found["b"]["by_source"]) == (False, True)
    assert "down_proj" in found["kinds"]
    other_way = diff(smaller["three"], smaller["llama"])
    assert other_way["kinds"].keys() == found["kinds"].keys()

    pruned = diff(smaller["llama"], smaller["pruned"])
    assert pruned["totals"]["changed"] == 0
    assert pruned["kinds"]["q_proj"]["same"] == 3
    assert pruned["kinds"]["down_proj"]["same_masks"] == 0


def test_two_smaller_models_of_one_source_are_compared_by_its_numbers(
    smaller: dict[str, Path],
) -> None:
    found = diff(smaller["three"], smaller["four"])
    assert found["totals"]["same"] == found["totals"]["tensors"]
    both = set(blocks_of(smaller["three"])) & set(blocks_of(smaller["four"]))
    assert {int(n.split(".")[2]) for n in found["tensors"] if "layers" in n} == both


def shown(a: Path, b: Path) -> str:
    return CliRunner().invoke(app, ["diff", str(a), str(b)]).stdout


def test_a_line_says_which_numbers_blocks_have(smaller: dict[str, Path]) -> None:
    text = shown(smaller["llama"], smaller["three"])
    assert "B is smaller: blocks and experts have the numbers of its source here" in text
    text = shown(smaller["three"], smaller["two of four"])
    for side in "AB":
        assert f"{side} is smaller: blocks and experts have their new numbers here" in text
