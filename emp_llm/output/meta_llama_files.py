"""Config and tokenizer in Hugging Face's layout, made from a checkpoint in Meta's format."""

from pathlib import Path
from typing import Final

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.meta_llama.tokenizer import (
    TOKENIZER_NAME,
    check_packages,
    convert_tokenizer,
)
from emp_llm.files.atomic import write_json

__all__ = ["write_original_files"]

_GENERATION_NAME: Final = "generation_config.json"
_CONVERTED: Final = "tokenizer.json"


def write_original_files(folder: Path, source: Checkpoint) -> None:
    """Write the generation config and, where there is a tokenizer.model, the tokenizer.

    Nothing is written for a checkpoint in another format, and no file that the source has.

    Raises:
        CheckpointError: If the tokenizer cannot be converted, or a package that it takes is not
            installed.
    """
    if source.original is None:
        return
    present = {str(file) for file in source.other_files}
    if _GENERATION_NAME not in present:
        write_json(folder / _GENERATION_NAME, source.original.generation_config())
    if TOKENIZER_NAME in present and _CONVERTED not in present:
        check_packages(source.folder)
        convert_tokenizer(
            source.folder,
            folder,
            context=source.original.context,
            scaled_rope=source.original.scaled_rope,
        )
