"""A model in a process of its own: the same text, and what becomes of a process that fails."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.word_models import known_model, save_words

from emp_llm import CheckpointError, GenerateOptions, OptionError, generate
from emp_llm.evaluation.found_model import find_model
from emp_llm.generation import apart
from emp_llm.generation.listener import Deaf
from emp_llm.generation.run import generate_with
from emp_llm.runtime.progress import Silent

OPTIONS = GenerateOptions(max_new_tokens=5)


class Heard(Deaf):
    """A listener that keeps the texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def hear(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def known(tmp_path: Path) -> Path:
    return save_words(tmp_path / "known", known_model())


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Have a shell script run in the place of Python."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(apart.sys, "executable", str(program))


def test_two_models_generate_each_in_a_process_of_its_own(known: Path, tmp_path: Path) -> None:
    other = save_words(tmp_path / "other", known_model())
    heard = Heard()

    found = generate(known, "the sky", OPTIONS, against=other, listener=heard)

    assert found.against is not None
    assert heard.texts == ["blue", "blue"]
    alone = generate(known, "the sky", OPTIONS).model
    for one in found.model, found.against:
        assert (one.new_ids, one.text, one.ended) == (alone.new_ids, "blue", "text")
        assert one.bytes_before < alone.bytes_before  # nothing of the tests is in it
    assert found.agreement is not None
    assert found.agreement.same


def test_an_error_of_ours_is_raised_here(
    known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = json.dumps({"kind": "error", "error": "OptionError", "message": "too long"})
    pretend(monkeypatch, tmp_path, f"echo '{event}'")
    with pytest.raises(OptionError, match="too long"):
        generate(known, "the sky", OPTIONS, against=known)


def test_a_process_that_is_killed_is_one_line(
    known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, "kill -KILL $$")
    with pytest.raises(CheckpointError, match="ended by SIGKILL: check that enough memory"):
        generate(known, "the sky", OPTIONS, against=known)


def test_a_process_that_fails_otherwise_is_a_bug(
    known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, "exit 3")
    with pytest.raises(RuntimeError, match="known failed"):
        generate(known, "the sky", OPTIONS, against=known)


def test_an_interruption_ends_the_process(
    known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Deaf):
        def hear(self, _text: str) -> None:
            raise KeyboardInterrupt

    pid = tmp_path / "pid"
    event = json.dumps({"kind": "hear", "text": "blue"})
    pretend(monkeypatch, tmp_path, f"echo $$ >{pid}; echo '{event}'; exec sleep 60")
    start = time.monotonic()

    with pytest.raises(KeyboardInterrupt):
        generate(known, "the sky", OPTIONS, against=known, listener=Interrupted())

    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_is_sent_gives_the_same_result_as_here(
    known: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All fields come through JSON unchanged."""
    result = generate_with(find_model(known, progress=Silent()), "the sky", OPTIONS, Deaf())
    fields = {"kind": "result", "fields": vars(result)}
    (tmp_path / "answer").write_text(json.dumps(fields) + "\n")
    pretend(monkeypatch, tmp_path, f"cat {tmp_path / 'answer'}")

    found = generate(known, "the sky", OPTIONS, against=known)

    assert found.model == found.against == replace(result)
