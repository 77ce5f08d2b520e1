"""The fuzzer's minute: ten seconds for each reader, from seeds that are new each time.

A failure prints the seed that makes it again; see `tests/fuzz.py`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import READERS

SECONDS = 10
FUZZER = Path(__file__).with_name("fuzz.py")


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_taken_as_they_should_be_or_refused(reader: str, tmp_path: Path) -> None:
    last = tmp_path / "last input"
    arguments = ["--only", reader, "--minutes", str(SECONDS / 60), "--last", str(last)]
    done = subprocess.run(
        [sys.executable, str(FUZZER), *arguments], capture_output=True, text=True, check=False
    )
    told = f"{done.stdout}{done.stderr}the last input: {last.read_text()}"
    assert done.returncode == 0, told
    assert f"{reader}: " in done.stdout
    assert ", 0 faults found" in done.stdout
