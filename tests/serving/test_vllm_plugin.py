"""The plugin as vLLM finds it, without vLLM: `make vllm` runs it there."""

import subprocess
import sys
import tomllib
from pathlib import Path

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
