"""Loads a checkpoint's tokenizer; transformers logs nothing but errors meanwhile."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from emp_llm.errors import CheckpointError, EmpError
from emp_llm.messages import first_line
from emp_llm.runtime.quiet import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


__all__ = ["load_errors", "load_tokenizer"]


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
    with quiet_transformers(), load_errors(name, "its tokenizer", remedy):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@contextmanager
def load_errors(name: str, what: str, remedy: str = "") -> Iterator[None]:
    """Make what transformers raises while it loads something a CheckpointError.

    Args:
        name: What the user called the model.
        what: What is loaded, for the message.
        remedy: The end of the message: what to do.
    """
    try:
        yield
    except EmpError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise CheckpointError(
            f"{name}: transformers does not load {what}: {first_line(error).rstrip(' :.')}{remedy}"
        ) from error
