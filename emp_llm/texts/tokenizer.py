"""Loads a checkpoint's tokenizer; transformers logs nothing but errors meanwhile."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from emp_llm.errors import CheckpointError, EmpError
from emp_llm.messages import first_line
from emp_llm.runtime.quiet import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


__all__ = ["TRUST_REMEDY", "load_errors", "load_tokenizer"]

TRUST_REMEDY: Final = (
    "read it and, if you trust it, give --trust-remote-code (trust_remote_code=True)"
)
"""What to do where the code of a checkpoint would have to be run."""


def load_tokenizer(name: str, folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Args:
        name: What the user called the model.
        folder: Where its tokenizer lies.
        trust_remote_code: Whether code that comes with it may be run.

    Raises:
        CheckpointError: If there is none that transformers loads, or it needs code from the folder
            that may not be run.
    """
    from transformers import AutoTokenizer

    remedy = "; put the model's own (tokenizer.json, tokenizer_config.json) in its folder"
    with quiet_transformers(), load_errors(name, "its tokenizer", remedy):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    return tokenizer


@contextmanager
def load_errors(name: str, what: str, remedy: str = "") -> Iterator[None]:
    """Make what transformers raises while it loads something a CheckpointError.

    Where transformers refuses to run code of the checkpoint, the remedy is `TRUST_REMEDY`.

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
        if isinstance(error, UnicodeEncodeError):
            raise CheckpointError(
                f"{name}: transformers does not load {what} from a path that is not UTF-8: rename "
                "the folder, or make a link with another name to it"
            ) from error
        if isinstance(error, ValueError) and "`trust_remote_code=True`" in str(error):
            raise CheckpointError(
                f"{name}: loading {what} would run code from the checkpoint, which emp-llm does "
                f"only if it is told to: {TRUST_REMEDY}"
            ) from error
        raise CheckpointError(
            f"{name}: transformers does not load {what}: {first_line(error).rstrip(' :.')}{remedy}"
        ) from error
