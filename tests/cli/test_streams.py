"""Standard streams that are closed, full or not read: no traceback and the right exit status."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emp_cli.console import print_json

_MAIN = [sys.executable, "-c", "from emp_cli import main; main()"]


def _run(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command whose streams a shell redirects."""
    command = ["bash", "-c", f'exec "$@" {redirection}', "bash", *_MAIN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("arguments", [["--version"], ["prune", "--help"]], ids=str)
def test_a_full_stdout_is_one_line(arguments: list[str]) -> None:
    done = _run(">/dev/full", *arguments)

    assert done.returncode == 1
    assert done.stderr == (
        "OutputError: stdout cannot be written: No space left on device: direct it elsewhere; "
        "files that the command has written are whole\n"
    )


@pytest.mark.parametrize("arguments", [["--version"], ["prune", "--help"]], ids=str)
def test_a_command_whose_output_nobody_reads_ends_silently(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [*_MAIN, *arguments], stdout=writing, stderr=subprocess.PIPE, check=False, timeout=60
    )

    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_slow_reader_gets_all_of_a_pipe_that_is_set_not_to_wait() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = "from emp_cli.streams import open_streams; open_streams(); print('x' * 500_000)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=writing) as process:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            assert pipe.read() == b"x" * 500_000 + b"\n"
    assert process.returncode == 0


def test_a_closed_stdout_takes_everything() -> None:
    done = _run(">&-", "--version")

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&- <&-"])
def test_a_run_does_not_fail_because_its_progress_cannot_be_shown(
    packed_folder: Path, redirection: str
) -> None:
    done = _run(redirection, "verify", packed_folder)

    assert done.returncode == 0
    assert done.stdout.startswith(f"{packed_folder}: whole")


def test_an_error_has_its_status_where_it_cannot_be_shown(tmp_path: Path) -> None:
    assert _run("2>&-", "report", tmp_path / "none").returncode == 1
    assert _run("2>/dev/full", "report").returncode == 2


def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    """Otherwise what a library prints would be written into them."""
    code = (
        "import os\n"
        "for number in range(3): os.close(number)\n"
        "from emp_cli.streams import open_streams\n"
        "open_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "file.write(str(file.fileno()))\n"
        "print('lost'); os.write(2, b'lost, too')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    assert int((tmp_path / "file").read_text()) > 2


def test_json_escapes_what_the_encoding_of_stdout_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="replace"))

    print_json({"folder": "größe"})

    assert json.loads(raw.getvalue()) == {"folder": "größe"}
