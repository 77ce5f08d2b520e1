"""Cards of pruned models, made and taken apart."""

from pathlib import Path
from typing import Any

import yaml

from emp_llm import PruneOptions, prune

BEGIN, END = "<!-- emp-llm -->\n", "<!-- /emp-llm -->\n"


def take_apart(card: Path) -> tuple[dict[str, Any], str, str]:
    """Metadata, our section and the rest."""
    data = card.read_bytes()
    assert b"\r" not in data
    opening, front, text = data.decode().split("---\n", 2)
    assert opening == ""
    before, _, after = text.partition(BEGIN)
    ours, _, rest = after.partition(END)
    assert before == "\n"
    return yaml.safe_load(front), ours, rest


def pruned_card(source: Path, card: str | bytes | None, **options: Any) -> Path:
    """The card of a source that has this one."""
    if card is not None:
        (source / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    out = source.with_name(f"out {len(list(source.parent.iterdir()))}")
    prune(source, out, PruneOptions(**options))
    return out / "README.md"
