"""The plugin as vLLM finds it, without vLLM: `make vllm` runs it there."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from emp_llm import OptionError
from emp_llm.serving.options import keeps_packed

PROJECT = Path(__file__).parents[2] / "pyproject.toml"

LOAD = """
import sys
from importlib.metadata import EntryPoint
register = EntryPoint("emp", sys.argv[1], "vllm.general_plugins").load()
print(register.__name__, *sys.modules.keys() & {"torch", "numpy", "numba", "transformers", "vllm"})
"""


def test_its_entry_point_imports_nothing_before_it_is_called() -> None:
    groups = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]
    value = groups["vllm.general_plugins"]["emp"]

    done = subprocess.run(
        [sys.executable, "-c", LOAD, value], capture_output=True, text=True, check=True
    )

    assert done.stdout == "register\n"


@pytest.mark.parametrize("said", [{}, None, object(), {"gdn": 1}, {"emp": {}}])
def test_weights_are_unpacked_unless_it_says_otherwise(said: object) -> None:
    assert not keeps_packed(said)
    assert keeps_packed({"gdn": 1, "emp": {"keep_packed": True}})


@pytest.mark.parametrize(
    "said", [True, {"keep_packed": 1}, {"keep_packed": "true"}, {"keep": True}, [], None]
)
def test_other_options_are_refused_in_one_line(said: object) -> None:
    with pytest.raises(OptionError, match="'emp' is ") as caught:
        keeps_packed({"emp": said})
    assert "\n" not in str(caught.value)
    assert '{"emp": {"keep_packed": true}}' in str(caught.value)
