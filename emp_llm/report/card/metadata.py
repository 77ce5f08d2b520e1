"""A model card split into its metadata (YAML between two lines of ---) and its text.

Metadata loses nothing but its comments and layout. If it cannot be parsed, it is kept in the text
as a fenced code block.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from emp_llm.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

__all__ = ["read_card"]

_METADATA = re.compile(r"\A\s*---[ \t]*\n(?:(.*?)\n)??---[ \t]*(?:\n|\Z)", re.DOTALL)
_MOST_METADATA = 2_000_000
_MOST_BYTES = 16_000_000
_UNREADABLE_NOTE = "The metadata of this card could not be read:"

# what PyYAML and ModelCardData raise on metadata that is not a mapping of plain values
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def read_card(path: Path) -> "ModelCard":
    """Read a card; its line ends become those of Linux.

    Args:
        path: The file; where there is none, the card has neither metadata nor text.

    Returns:
        The card. ``data`` holds every key; ``model-index`` in it is as the file has it, unparsed.

    Raises:
        CheckpointError: If the file is far larger than a card.
    """
    text = _decode(_read(path)) if path.is_file() else ""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    found = _METADATA.match(text)
    if found is None:
        return _make_card({}, text)
    try:
        if len(found[1] or "") > _MOST_METADATA:  # PyYAML takes a minute for each megabyte
            raise ValueError(f"more than {_MOST_METADATA:,} characters of metadata")
        return _make_card(_load(found[1] or ""), text[found.end() :])
    except (_yaml().YAMLError, *_REFUSALS):
        return _make_card({}, f"{_quote(found[1])}\n{text[found.end() :]}")


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise CheckpointError(f"{path}: has {size:,} bytes, too many for a model card: remove it")
    return path.read_bytes()


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _yaml() -> ModuleType:
    """PyYAML, whose package declares no types; imported when a card is first read."""
    return import_module("yaml")


def _load(block: str) -> dict[str, object]:
    """Load YAML as the Hub does.

    Only true and false are booleans: by PyYAML's own rules ``language: no``, Norwegian, is False.
    """
    safe = _yaml().SafeLoader
    boolean = "tag:yaml.org,2002:bool"
    resolvers = {
        first: [resolver for resolver in resolvers if resolver[0] != boolean]
        for first, resolvers in safe.yaml_implicit_resolvers.items()
    }
    values = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
    for first in "tTfF":
        resolvers.setdefault(first, []).append((boolean, values))
    loader = type("Loader", (safe,), {"yaml_implicit_resolvers": resolvers})(block)
    try:
        fields = loader.get_single_data()
    finally:
        loader.dispose()
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise TypeError(f"a card's metadata is a mapping, not a {type(fields).__name__}")
    return {str(key): value for key, value in fields.items()}


def _make_card(fields: Mapping[str, object], text: str) -> "ModelCard":
    from huggingface_hub import ModelCard

    # ModelCardData refuses a malformed model-index
    others = {key: value for key, value in fields.items() if key != "model-index"}
    if isinstance(others.get("tags"), str):  # huggingface_hub 1.33 makes a tag of each letter
        others["tags"] = [others["tags"]]
    metadata = _yaml().dump(others, allow_unicode=True, sort_keys=False)
    card = ModelCard(f"---\n{metadata}---\n")
    if "model-index" in fields:
        card.data["model-index"] = fields["model-index"]
    card.text = text
    return card


def _quote(block: str) -> str:
    longest = max((len(run) for run in re.findall("`+", block)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{_UNREADABLE_NOTE}\n\n{fence}yaml\n{block}\n{fence}\n"
