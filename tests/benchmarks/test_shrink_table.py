"""The table of shrunken models goes on where it was, and shares what goes one by one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import shrink_table
import torch
from support.calibrated import save_model
from support.checkpoints import bits, load

GONE = [3, 17, 8, 29, 0]


class Table:
    """A table whose models are not made by commands, and that keeps what it was asked for."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, patch
        save_model(folder / "dense", "llama", num_hidden_layers=30, dtype=torch.bfloat16)
        (folder / "train.txt").write_text("train")
        (folder / "test.txt").write_text("test")
        self.measured: list[str] = []
        patch.setattr(shrink_table, "make", self._make)
        patch.setattr(shrink_table, "perplexity", self._perplexity)

    def run(self, *rows: str) -> dict[str, Any]:
        paths = [str(self.folder / name) for name in ("dense", "train.txt", "test.txt")]
        results = self.folder / "shrink.json"
        asked = ["--json", str(results), "--folders", str(self.folder / "models"), "--keep"]
        self._patch.setattr(sys, "argv", ["shrink_table.py", *paths, *asked, "--rows", *rows])
        shrink_table.main()
        found: dict[str, Any] = json.loads(results.read_text())["results"]
        return found

    def _make(self, row: Any, folder: Path, _args: object) -> dict[str, Any]:
        folder.mkdir(parents=True)
        return {"gone": GONE if row.name == "blocks-loss@25" else []}

    def _perplexity(self, folder: Path, _args: object) -> float:
        self.measured.append(folder.name)
        return 20.0 + len(self.measured)


def test_rows_in_which_fewer_blocks_go_take_the_first_of_those_that_go_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(tmp_path, monkeypatch)
    assert table.run("dense", "blocks-loss@28").keys() == {"dense"}
    results = table.run("blocks-loss@*", "blocks-random@29")
    assert table.measured[:3] == ["dense", "blocks-random@29", "blocks-loss@25"]
    assert results["blocks-loss@28"]["options"] == ["without [3, 17]"]
    dense, small = load(tmp_path / "dense"), load(tmp_path / "models" / "blocks-loss@28")
    name = "model.layers.{}.mlp.down_proj.weight"
    assert bits(small[name.format(3)]) == bits(dense[name.format(4)])
    assert bits(small[name.format(27)]) == bits(dense[name.format(29)])
    assert name.format(28) not in small


def test_rows_that_are_there_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(tmp_path, monkeypatch)
    before = table.run("dense", "blocks-random@29")
    assert table.run("dense", "blocks-random@*")["dense"] == before["dense"]
    assert len(table.measured) == len(set(table.measured)) == 5
