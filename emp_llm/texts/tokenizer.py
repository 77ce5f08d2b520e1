"""A checkpoint's tokenizer, loaded without a word from transformers."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from emp_llm.errors import CheckpointError, EmpError
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


__all__ = ["load_tokenizer"]


def load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Args:
        name: What the user called the model.
        folder: Where its tokenizer lies.

    Raises:
        CheckpointError: If there is none that transformers loads.
    """
    from transformers import AutoTokenizer

    remedy = "; put the model's own (tokenizer.json, tokenizer_config.json) in its folder"
    with _silent_transformers(), _explained(name, "its tokenizer", remedy):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@contextmanager
def _explained(name: str, what: str, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except EmpError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise CheckpointError(
            f"{name}: transformers does not load {what}: {first_line(error).rstrip(' :.')}{remedy}"
        ) from error


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Log errors only, and draw the bar of loading on a terminal only."""
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    level, drawn = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if drawn:
            logging.enable_progress_bar()
