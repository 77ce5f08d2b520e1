"""The examples in docstrings run, and give what stands below them."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(folder).with_suffix("").parts)
    for folder in (ROOT, ROOT / "kernels", ROOT / "cli")
    for package in ("emp_llm", "emp_kernels", "emp_cli")
    for path in sorted((folder / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the model that examples name, and as much of the text as is read in a moment
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "model").symlink_to(ROOT / "demo" / "model")
    (demo / "text.txt").write_text((ROOT / "demo" / "text.txt").read_text("utf-8")[:8_000])
    monkeypatch.chdir(tmp_path)
    outer = {"torch": torch, "np": np}
    result = doctest.testmod(importlib.import_module(name), extraglobs=outer)
    assert result.attempted >= 1
    assert result.failed == 0
