"""Finds a model that is to be run: downloads it if need be, verifies it if it is packed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.errors import CheckpointError
from emp_llm.hub.source import Source, find_source
from emp_llm.report.file_names import REPORT_NAME
from emp_llm.runtime.progress import SharedProgress
from emp_llm.structure.auto_class import auto_class
from emp_llm.tensors.packed_config import is_packed
from emp_llm.verification.written_folder import check_written

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emp_llm.runtime.progress import Progress

__all__ = ["Found", "find_model"]

_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model that was found.

    Attributes:
        name: Its Hub id, or the folder that the user gave.
        source: Where its files are; all of them have been downloaded.
        config: The content of its ``config.json``.
        packed: Whether it is packed.
    """

    name: str
    source: Source
    config: Mapping[str, object]
    packed: bool


def find_model(
    model: str | os.PathLike[str], *, revision: str | None = None, progress: Progress
) -> Found:
    """Find a model, download it if it is on the Hub, and verify it if it is packed.

    A packed folder without a report, as `save_pretrained` writes it, is checked when it is loaded.

    Args:
        model: A folder, or a model of the Hub.
        revision: Branch, tag or commit of a model of the Hub.
        progress: Reports what is downloaded and verified.

    Raises:
        CheckpointError: If it is not a causal language model that can be loaded.
        HubError: If the Hub refuses.
        FormatError: If it is packed and not as it was written.
        OptionError: If a revision is given for a local folder.
    """
    shared = SharedProgress(progress)
    source = find_source(model, revision=revision, progress=shared)
    if not (source.folder / CONFIG_NAME).is_file():
        source.open_checkpoint()  # says what it is instead, if it is not a checkpoint
        raise CheckpointError(
            f"{os.fspath(model)}: is in Meta's original format, which transformers does not load: "
            "give what `emp-llm prune` makes of it, or the model in Hugging Face's layout"
        )
    config = read_json_object(source.folder / CONFIG_NAME)
    if config.get("architectures") and not _predicts(config):
        raise CheckpointError(
            f"{os.fspath(model)}: is a {config['architectures'][0]}; emp-llm runs models that "
            "predict the next token: give one of those"
        )
    if source.to_come:
        source.fetch(source.open_checkpoint(), shared)
    packed = is_packed(config)
    if packed and (source.folder / REPORT_NAME).is_file():
        check_written(source.folder, progress=progress)
    return Found(
        name=source.repo_id or os.fspath(model), source=source, config=config, packed=packed
    )


def _predicts(config: Mapping[str, object]) -> bool:
    """Whether a class that predicts the next token loads a model: transformers', or its own."""
    own = config.get("auto_map")
    return auto_class(config) in _CLASSES or (
        isinstance(own, dict) and not own.keys().isdisjoint(_CLASSES)
    )
