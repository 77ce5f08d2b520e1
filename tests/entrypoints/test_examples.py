"""The examples in the docstrings of the verbs, run on the demo's model."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "demo"


@pytest.mark.parametrize("verb", ["inspect", "prune", "unpack"])
def test_what_an_example_shows_is_what_comes_out(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)

    result = doctest.testmod(import_module(f"emp_llm.entrypoints.{verb}"))

    assert (result.failed, result.attempted > 1) == (0, True)
