"""The tokenizer of a Llama in Meta's original format, converted by transformers.

This happens in a process of its own, ``python -m emp_llm.checkpoint.meta_llama.tokenizer``, because
what transformers imports for it is not needed afterwards. It reads its question as JSON on stdin.

tokenizer.model is a model of sentencepiece or, since Llama 3, a list of tiktoken: in each line a
token in base64 and its rank. No file of Meta's lists the 256 special tokens of Llama 3; they are
taken from Meta's code.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.errors import CheckpointError
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PACKAGES", "TOKENIZER_NAME", "check_packages", "convert_tokenizer", "special_tokens"]

TOKENIZER_NAME: Final = "tokenizer.model"

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
PACKAGES = {  # what to install, and what it is imported as
    True: {"tiktoken": "tiktoken"},
    False: {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"},
}
_RESERVED = "<|reserved_special_token_{}|>"
_SPECIAL = 256


def check_packages(folder: Path) -> None:
    """Check that the packages are installed that a conversion needs.

    Args:
        folder: The checkpoint's folder.

    Raises:
        CheckpointError: If a package is missing.
    """
    packages = PACKAGES[_is_tiktoken(folder / TOKENIZER_NAME)]
    missing = [package for package, module in packages.items() if not _is_installed(module)]
    if missing:
        raise CheckpointError(
            f"{TOKENIZER_NAME}: to convert it, transformers needs {' and '.join(missing)}, not "
            f"installed here: pip install {' '.join(missing)}"
        )


def convert_tokenizer(folder: Path, out: Path, *, context: int, scaled_rope: bool) -> None:
    """Convert a tokenizer: write tokenizer.json and tokenizer_config.json.

    Args:
        folder: The folder with tokenizer.model.
        out: The folder to write to.
        context: Positions that the model was trained for.
        scaled_rope: Whether it is a Llama 3.1 or later, whose special tokens differ from 3's.

    Raises:
        CheckpointError: If transformers refuses it.
    """
    question = json.dumps([str(folder), str(out), context, scaled_rope])
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "emp_llm.checkpoint.meta_llama.tokenizer"],
        input=question.encode(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,  # so that Ctrl-C reaches this process only, which reports it
        check=False,
    )
    if answer.returncode:
        lines = answer.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit status {answer.returncode}"
        raise CheckpointError(
            f"{folder / TOKENIZER_NAME}: transformers cannot convert it: {reason:.500}; "
            "download it again"
        )


def special_tokens(*, scaled_rope: bool) -> list[str]:
    """The special tokens of Llama 3, or of 3.1 and later, in the order of their numbers."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
    named |= {9: "eot_id"}
    if scaled_rope:
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    reserved = iter(range(_SPECIAL))
    return [
        f"<|{named[number]}|>" if number in named else _RESERVED.format(next(reserved))
        for number in range(_SPECIAL)
    ]


def _is_tiktoken(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            head = file.read(1024)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from error
    if not head:
        raise CheckpointError(f"{path}: is empty; download it again")
    return _TIKTOKEN_LINE.match(head) is not None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that holds it is there
        return False


def _convert(folder: Path, out: Path, context: int, *, scaled_rope: bool) -> None:
    from transformers import LlamaTokenizer

    if _is_tiktoken(folder / TOKENIZER_NAME):
        tokenizer = _from_tiktoken(folder / TOKENIZER_NAME, context, scaled_rope=scaled_rope)
    else:
        tokenizer = LlamaTokenizer.from_pretrained(
            folder, trust_remote_code=False, add_bos_token=True
        )
    tokenizer.save_pretrained(out)


def _from_tiktoken(path: Path, context: int, *, scaled_rope: bool) -> "PreTrainedTokenizerFast":
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = special_tokens(scaled_rope=scaled_rope)
    make_converter: Any = TikTokenConverter
    make_tokenizer: Any = PreTrainedTokenizerFast
    first, last = special[:2]
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(
        tokenizer_object=make_converter(str(path), extra_special_tokens=special).converted(),
        bos_token=first,
        eos_token=last,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=context,
        clean_up_tokenization_spaces=True,
    )
    begin = processors.TemplateProcessing(
        single=f"{first} $A",
        pair=f"{first}:0 $A:0 {first}:1 $B:1",
        special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))],
    )
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), begin]
    )
    return tokenizer


if __name__ == "__main__":
    _folder, _out, _context, _scaled = json.load(sys.stdin)
    _convert(Path(_folder), Path(_out), _context, scaled_rope=_scaled)
