"""A model card taken apart: its metadata (YAML between two lines of ---) and its text.

Nothing of a card is lost but the comments and the layout of its metadata. Metadata that cannot be
read goes on as text, in a block of code.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_llm.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

__all__ = ["read_card"]

_METADATA = re.compile(r"\A\s*---[ \t]*\n(?:(.*?)\n)??---[ \t]*(?:\n|\Z)", re.DOTALL)
_MOST_METADATA = 2_000_000
_MOST_BYTES = 16_000_000
_UNREADABLE_NOTE = "The metadata of this card could not be read:"

# what PyYAML and ModelCardData raise on a block that is no mapping of plain values
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def read_card(path: Path) -> "ModelCard":
    """Read a card, with line ends as Linux has them.

    Args:
        path: The file; a card without metadata and text if there is none.

    Returns:
        The card. Its ``data`` holds every key but ``model-index``, which is ``data["model-index"]``
        as it stands in the file.

    Raises:
        CheckpointError: If the file is far larger than a card.
    """
    from yaml import YAMLError  # type: ignore[import-untyped]

    text = _decode(_read(path)) if path.is_file() else ""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    found = _METADATA.match(text)
    if found is None:
        return _make_card({}, text)
    try:
        if len(found[1] or "") > _MOST_METADATA:  # PyYAML takes a minute for each megabyte
            raise ValueError(f"more than {_MOST_METADATA:,} characters of metadata")
        return _make_card(_load(found[1] or ""), text[found.end() :])
    except (YAMLError, *_REFUSALS):
        return _make_card({}, f"{_quote(found[1])}\n{text[found.end() :]}")


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise CheckpointError(f"{path}: has {size:,} bytes; no model card is as long: remove it")
    return path.read_bytes()


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _load(block: str) -> dict[str, Any]:
    """Load YAML as the Hub does: only true and false are booleans, ``no`` is Norwegian."""
    import yaml

    boolean = "tag:yaml.org,2002:bool"

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers = {  # noqa: RUF012 (as PyYAML has it)
            first: [resolver for resolver in resolvers if resolver[0] != boolean]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    values = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
    Loader.add_implicit_resolver(boolean, values, "tTfF")
    fields = yaml.load(block, Loader)  # noqa: S506 (it is a SafeLoader)
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise TypeError(f"a card's metadata is a mapping, not a {type(fields).__name__}")
    return {str(key): value for key, value in fields.items()}


def _make_card(fields: Mapping[str, Any], text: str) -> "ModelCard":
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

    # ModelCardData would refuse a model-index that is not as it should be
    others = {key: value for key, value in fields.items() if key != "model-index"}
    if isinstance(others.get("tags"), str):  # which huggingface_hub 1.33 takes for its letters
        others["tags"] = [others["tags"]]
    card = ModelCard(f"---\n{yaml_dump(others, sort_keys=False)}---\n")
    if "model-index" in fields:
        card.data["model-index"] = fields["model-index"]
    card.text = text
    return card


def _quote(block: str) -> str:
    longest = max((len(run) for run in re.findall("`+", block)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{_UNREADABLE_NOTE}\n\n{fence}yaml\n{block}\n{fence}\n"
