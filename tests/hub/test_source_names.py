"""A model's name is a folder, a Hub id or one clear error, before the Hub is asked anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from emp_llm.errors import CheckpointError, OptionError
from emp_llm.hub.source import Source, find_source
from emp_llm.runtime.progress import SharedProgress, Silent


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def find(model: str, **options: object) -> Source:
    return find_source(model, progress=SharedProgress(Silent()), **options)


def refusal(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        find(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_local_folder_is_used_as_it_is(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "me" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find("me/model") == Source(Path("me/model"))


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a local folder"):
        find(str(tmp_path), revision="main")


def test_a_local_folder_is_not_discarded(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a local folder, which is never deleted"):
        find(str(tmp_path), discard=True)


@pytest.mark.parametrize("model", ["./x", "../x", "/none/x", "~/none/x", "a/b/c", ".x", "x/y/"])
def test_what_looks_like_a_path_is_a_folder_that_is_missing(model: str) -> None:
    assert refusal(model) == f"{model}: there is no such folder; check the path"


@pytest.mark.parametrize("model", ["", "two words", "x--y", "me/x.git", "ü"])
def test_what_is_neither_folder_nor_id_is_said_to_be_neither(model: str) -> None:
    message = refusal(model)
    assert message.startswith(f"{model!r} is neither an existing folder nor a possible Hub id")


@pytest.mark.parametrize("model", ["~nobody-of-this-name/x", "x" * 300])
def test_a_path_that_cannot_be_looked_up_is_one_error(model: str) -> None:
    assert "cannot be read" in refusal(model)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert "give the folder" in refusal("model.safetensors")


def test_importing_brings_nothing_heavy_along() -> None:
    program = (
        "import sys, emp_llm.checkpoint.checkpoint, emp_llm.hub.source; "
        "print({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert result == "set()\n"
