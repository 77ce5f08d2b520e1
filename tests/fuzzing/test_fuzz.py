"""The fuzzer for some seconds, shared by all readers, from seeds that are new each time.

A failure prints the seed that makes it again; see `tests/fuzz.py`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import READERS

FUZZER = Path(__file__).parents[1] / "fuzz.py"


@pytest.mark.parametrize("seconds", [8, pytest.param(120, marks=pytest.mark.slow)])
def test_damaged_files_are_taken_as_they_should_be_or_refused(tmp_path: Path, seconds: int) -> None:
    last = tmp_path / "last input"
    arguments = ["--minutes", str(seconds / 60), "--last", str(last)]
    done = subprocess.run(
        [sys.executable, str(FUZZER), *arguments], capture_output=True, text=True, check=False
    )
    told = f"{done.stdout}{done.stderr}the last input: {last.read_text()}"
    assert done.returncode == 0, told
    lines = done.stdout.splitlines()[-len(READERS) :]
    for reader, line in zip(READERS, lines, strict=True):
        assert line.startswith(f"{reader}: "), told
        assert not line.startswith(f"{reader}: 0 inputs"), told
        assert line.endswith(", 0 faults found"), told
