"""Models whose answers are known, and nothing of the machine's own data sets."""

from pathlib import Path

import pytest
from support.word_models import TASKS, TEXT, known_model, save_words, word_model

from emp_llm import prune


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own data sets, and the working folder that the task's data needs."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(TASKS)


@pytest.fixture(autouse=True)
def text(tmp_path: Path) -> str:
    """A text of a few words, short.txt."""
    (tmp_path / "short.txt").write_text(TEXT)
    return str(tmp_path / "short.txt")


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A model whose predictions are known."""
    return save_words(tmp_path / "known", known_model())


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A model of random weights."""
    return save_words(tmp_path / "dense", word_model())


@pytest.fixture
def packed(dense: Path, tmp_path: Path) -> Path:
    """The same, pruned and packed."""
    prune(dense, tmp_path / "packed")
    return tmp_path / "packed"
