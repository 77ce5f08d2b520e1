"""The examples in docstrings give what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module", ["calibration.criteria", "calibration.beta_search", "selection.ranking"]
)
def test_the_examples_in_docstrings_give_what_they_say(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"emp_llm.{module}"))
    assert result.attempted
    assert not result.failed
