"""Names of files that are not UTF-8, which Python reads as halves of characters."""

import json
import os
from pathlib import Path

import pytest
from support.checkpoints import files, refusal
from support.word_models import TEXT, known_model, save_words

from emp_llm import (
    CalibrationOptions,
    CheckpointError,
    EvalOptions,
    OptionError,
    PruneOptions,
    evaluate,
    inspect,
    prune,
    unpack,
    verify,
)
from emp_llm.output.journal import Journal
from emp_llm.report.page.page import write_page

_NAME = os.fsdecode(b"caf\xe9")
_SHOWN = r"caf\udce9"


@pytest.fixture
def odd(source: Path) -> Path:
    """A source whose folder has such a name."""
    return source.rename(source.with_name(_NAME))


def test_a_folder_of_such_a_name_is_pruned_and_its_report_shows_the_bytes(
    odd: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"out {_NAME}"

    report = prune(odd, out)

    assert report["source"]["model"] == _SHOWN
    assert json.loads((out / "emp_report.json").read_bytes())["source"]["model"] == _SHOWN
    assert _SHOWN in (out / "README.md").read_text()
    verify(out, against=odd)
    unpack(out, tmp_path / "dense")
    assert files(tmp_path / "dense").keys() >= {"config.json", "model.safetensors"}


def test_a_page_shows_the_bytes(odd: Path, tmp_path: Path) -> None:
    write_page(inspect(odd), tmp_path / f"{_NAME}.html", model=str(odd))

    assert _SHOWN in (tmp_path / f"{_NAME}.html").read_text()


def test_a_text_of_such_a_name_is_calibrated_on(tmp_path: Path) -> None:
    folder = save_words(tmp_path / "model", known_model())
    text = tmp_path / f"{_NAME}.txt"
    text.write_text(TEXT)
    data = CalibrationOptions(text=str(text), samples=1, length=4)

    report = prune(folder, tmp_path / "out", PruneOptions(criterion="wanda", calibration=data))

    assert report["rule"]["calibration"]["text"] == f"{_SHOWN}.txt"


def test_what_transformers_cannot_open_is_refused_and_opened_by_a_link(tmp_path: Path) -> None:
    folder = save_words(tmp_path / "model", known_model()).rename(tmp_path / _NAME)
    (tmp_path / "short.txt").write_text(TEXT)
    (tmp_path / "link").symlink_to(folder)
    options = EvalOptions(texts=(str(tmp_path / "short.txt"),), context=4)

    with pytest.raises(CheckpointError, match="from a path that is not UTF-8: rename the folder"):
        evaluate(folder, options)

    assert evaluate(tmp_path / "link", options).model.texts["short.txt"].perplexity > 1


def test_a_file_of_such_a_name_is_refused_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    (source / "notes").mkdir()
    (source / "notes" / _NAME).write_text("a note")

    message = refusal(source, tmp_path / "out")

    assert (
        message == f"{source / 'notes'}/{_SHOWN}: has a name that is not UTF-8: rename it, or "
        "move it away"
    )


def test_options_that_no_name_of_a_tensor_can_match_are_refused() -> None:
    for options in ({"targets": _NAME}, {"ignore": (_NAME,)}):
        with pytest.raises(OptionError, match="is not UTF-8, as the names of all tensors are"):
            PruneOptions(**options)


def test_a_revision_that_no_repository_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not UTF-8"):
        prune("me/model", tmp_path / "out", revision=_NAME)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UnicodeError])
def test_a_run_that_ends_before_it_has_begun_leaves_no_hidden_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Journal, "begin", fail)
    with pytest.raises(error):
        prune(source, tmp_path / "a" / "out")

    assert not (tmp_path / "a").exists()
