"""The lines of Python that load a written folder."""

import json
from collections.abc import Mapping

from emp_llm.structure.auto_class import auto_class
from emp_llm.tensors.packed_config import is_packed

__all__ = ["ANY_NAME", "loading_code"]


ANY_NAME = "path or id of this model"
"""What the lines say where the model has no name yet."""


def loading_code(config: Mapping[str, object], name: str, revision: str | None = None) -> list[str]:
    """The lines of Python that load a model.

    Args:
        config: The content of its ``config.json``.
        name: Its folder or Hub id.
        revision: Its branch on the Hub, if that is not the default one.
    """
    loader = auto_class(config)
    arguments = [_literal(name)]
    if revision is not None:
        arguments.append(f"revision={_literal(revision)}")
    needed = ["# needs emp-llm: pip install emp-llm"] if is_packed(config) else []
    return [
        *needed,
        f"from transformers import {loader}",
        f"model = {loader}.from_pretrained({', '.join(arguments)})",
    ]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
