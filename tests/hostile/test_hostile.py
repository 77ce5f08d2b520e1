"""Hostile checkpoints: each is one clear line, in bounded memory and time, and touches nothing.

The corpus stands in `tests/hostile`; the real commands run on it, in this process, with a ceiling
on the memory that they may take besides.
"""

import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from emp_cli.app import app
from hostile.packed import PACKED, REPORTS
from hostile.sources import SOURCES, harmless
from hostile.whole import EMBED, VOCABULARY, WHOLE
from support.checkpoints import F, H, gaussian, llama_config, mlp, write_checkpoint
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from emp_llm import FormatError, prune

PLANES = PACKED | {f"not pruned, {name}": case for name, case in WHOLE.items()}

MEMORY = 1 << 30
SECONDS = 60


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of 5,000 parts are large here: to build 100,000 takes 10 s and 300 MB."""
    monkeypatch.setattr("emp_llm.structure.meta_model._PARTS", 5_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text('{"token": "secret"}')
    (outside / "secret.safetensors").write_bytes(b"secret")
    return write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    """A packed checkpoint of tensors that were pruned and one that was not, beside the source."""
    config = llama_config(H, F) | {"vocab_size": VOCABULARY}
    tensors = mlp(H, F) | {EMBED: gaussian(VOCABULARY, H)}
    prune(write_checkpoint(source.with_name("larger"), config, tensors), tmp_path / "packed")
    return tmp_path / "packed"


@contextmanager
def limits() -> Iterator[None]:
    """Little more memory than there is in use now, and a minute."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def tree(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every file and folder, with what a change of it would change."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent) / name
            state = path.lstat()
            found[str(path.relative_to(folder))] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found


def run(*arguments: object) -> Result:
    """Run a command in this process; what no command foresees is raised."""
    with limits():
        return CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)


def check_refused(root: Path, reason: str, *arguments: object) -> None:
    """A command says why, in one line, and leaves everything as it was."""
    before = tree(root)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    *progress, line = result.stderr.removesuffix("\n").split("\n")
    assert all(
        told.startswith(("measuring", "pruning", "unpacking", "verifying")) for told in progress
    )
    assert line.startswith(("CheckpointError: ", "FormatError: "))
    assert line.isprintable()
    assert reason in line
    assert "secret" not in line.replace("outside/secret.json", "").replace("secret.safetensors", "")
    assert tree(root) == before


@pytest.mark.parametrize("case", SOURCES)
def test_a_hostile_source_is_refused_in_one_line(case: str, source: Path, tmp_path: Path) -> None:
    SOURCES[case].spoil(source)
    check_refused(tmp_path, SOURCES[case].refusal, "prune", source, "--out", tmp_path / "out")


@pytest.mark.parametrize("case", PLANES)
@pytest.mark.parametrize("command", ["unpack", "verify"])
def test_hostile_planes_are_refused_in_one_line(
    case: str, command: str, packed: Path, tmp_path: Path
) -> None:
    PLANES[case].spoil(packed)
    out = ["--out", tmp_path / "out"] if command == "unpack" else []
    check_refused(tmp_path, PLANES[case].refusal, command, packed, *out)


@pytest.mark.parametrize("case", PLANES)
def test_hostile_planes_are_not_loaded(case: str, packed: Path, tmp_path: Path) -> None:
    PLANES[case].spoil(packed)
    before = tree(tmp_path)
    with limits(), pytest.raises(FormatError) as caught:
        AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    assert PLANES[case].refusal in str(caught.value)
    assert str(caught.value).isprintable()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("case", REPORTS)
def test_a_hostile_report_is_refused_in_one_line(case: str, packed: Path, tmp_path: Path) -> None:
    REPORTS[case].spoil(packed)
    for command in (["unpack", packed, "--out", tmp_path / "out"], ["verify", packed]):
        check_refused(tmp_path, REPORTS[case].refusal, *command)


def test_what_only_looks_hostile_is_pruned_and_nothing_of_it_reaches_the_terminal(
    source: Path, tmp_path: Path
) -> None:
    harmless(source)
    before = tree(tmp_path)
    for arguments in (["inspect", source], ["inspect", source, "--json"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert (result.stdout + result.stderr).replace("\n", "").isprintable()
        assert tree(tmp_path) == before
    assert run("prune", source, "--out", tmp_path / "out").exit_code == 0
    assert run("verify", tmp_path / "out").exit_code == 0
    assert run("unpack", tmp_path / "out", "--out", tmp_path / "dense").exit_code == 0
    written = {name for name in tree(tmp_path) if name not in before}
    assert {name.split("/")[0] for name in written} == {"out", "dense"}
    assert not {"pipe.json", "folder"} & {Path(name).name for name in written}
    assert not (tmp_path / "code_was_run").exists()
