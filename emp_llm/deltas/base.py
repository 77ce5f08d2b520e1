"""Finds the base of a delta: as the user names it, or as the delta's config.json does."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.checkpoint.shard import Shard
from emp_llm.deltas.survey import survey
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.hub.source import Source, find_source
from emp_llm.messages import encodable, shortened
from emp_llm.output.overlap import check_apart
from emp_llm.report.source_fields import BaseFields, SourceFields
from emp_llm.runtime.progress import SharedProgress
from emp_llm.runtime.workers import Workers

__all__ = ["Base", "check_hash", "find_base", "load_base", "stated_base", "stored_base"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that a delta is added to; all of its files are on disk.

    Attributes:
        name: What errors call it.
        checkpoint: What it holds: dense tensors in safetensors files, which all that loads can
            read in parts.
        place: Its name as a delta's ``config.json`` has it, and the commit.
    """

    name: str
    checkpoint: Checkpoint
    place: SourceFields


def find_base(
    model: str | os.PathLike[str],
    out: Path,
    *,
    token: str | bool | None = None,
    progress: SharedProgress,
) -> Base:
    """Find the base that a delta is to be made to, and download it.

    Args:
        model: A folder, or a model of the Hub by its id or address.
        out: The folder that the delta is written to.
        token: Access token; None for that of the login, False for none.
        progress: Where downloads are reported.

    Raises:
        CheckpointError: If it is not a checkpoint of dense tensors in safetensors files.
        HubError: If it cannot be downloaded.
        OutputError: If `out` overlaps it.
    """
    source = find_source(model, token=token, progress=progress)
    name = os.fspath(model)
    if source.repo_id is not None:
        return _open(name, source, source.repo_id, progress)
    check_apart(out, source.folder)
    path = Path(name).expanduser()
    if not path.is_absolute():
        path = Path(os.path.relpath(path.absolute(), out.resolve()))
    return _open(name, source, encodable(str(path)), progress)


def stated_base(folder: Path, config: Mapping[str, Any]) -> BaseFields:
    """What the ``config.json`` of a delta says of its base.

    Args:
        folder: The delta's folder.
        config: The content of its ``config.json``.

    Raises:
        FormatError: If it does not name one.
    """
    base = config["quantization_config"].get("base")
    fields = base if isinstance(base, dict) else {}
    model, revision, checksum = (fields.get(name) for name in ("model", "revision", "hash"))
    texts = isinstance(model, str) and isinstance(checksum, str)
    if not (texts and (revision is None or isinstance(revision, str))):
        raise FormatError(
            f"{folder}: base in quantization_config of {CONFIG_NAME} is {shortened(base)}; a delta "
            "names model, revision and hash of its base: take the file from where it was written"
        )
    return {"model": str(model), "revision": revision, "hash": str(checksum)}


def stored_base(
    folder: Path,
    config: Mapping[str, Any],
    *,
    token: str | bool | None = None,
    progress: SharedProgress,
) -> Base:
    """Find the base that a delta names, and download it; its checksum is not compared.

    Args:
        folder: The delta's folder; a base named by a relative path lies relative to it.
        config: The content of its ``config.json``.
        token: Access token; None for that of the login, False for none.
        progress: Where downloads are reported.

    Raises:
        CheckpointError: If it is not there, or not a checkpoint that something can be added to.
        FormatError: If the delta names none.
        HubError: If it cannot be downloaded.
    """
    stated = stated_base(folder, config)
    model, revision = stated["model"], stated["revision"]
    if revision is None:
        path = Path(os.path.normpath(folder.resolve() / model))
        if not _is_folder(path):
            raise CheckpointError(
                f"{folder}: is the difference to the model in {path}, which is not there: put "
                f"that folder there, or its path as base.model into {CONFIG_NAME}"
            )
        return _open(str(path), find_source(path, progress=progress), model, progress)
    source = find_source(model, revision=revision, token=token, progress=progress)
    return _open(model, source, model, progress)


def load_base(
    folder: Path, config: Mapping[str, Any], workers: Workers, token: str | bool | None = None
) -> Checkpoint:
    """Open the base that a delta names, to add the delta to it.

    Of a folder all weights are read first, to compare their checksum; a model of the Hub is known
    by its commit.

    Args:
        folder: The delta's folder.
        config: The content of its ``config.json``.
        workers: What reads the base; downloads are reported to its progress.
        token: Access token; None for that of the login, False for none.

    Raises:
        CheckpointError: As `stored_base` does.
        FormatError: If it is another model than the delta was made to, or none is named.
        HubError: If it cannot be downloaded.
    """
    base = stored_base(folder, config, token=token, progress=workers.progress)
    if base.place["revision"] is None:
        check_hash(folder, config, base, survey(base.checkpoint, workers).hash)
    return base.checkpoint


def check_hash(folder: Path, config: Mapping[str, Any], base: Base, found: str) -> None:
    """Check that a base has the weights that a delta was made to.

    Raises:
        FormatError: If it has others.
    """
    stated = stated_base(folder, config)["hash"]
    if found != stated:
        raise FormatError(
            f"{base.name}: is not the base of {folder}: its weights have the checksum {found}, "
            f"those of the base have {shortened(stated)}; put the model there that the delta was "
            "made to"
        )


def _is_folder(path: Path) -> bool:
    with suppress(OSError):  # such as of a name that is too long
        return path.is_dir()
    return False


def _open(name: str, source: Source, model: str, progress: SharedProgress) -> Base:
    checkpoint = source.open_checkpoint()
    if checkpoint.config.get("quantization_config"):
        raise CheckpointError(
            f"{name}: is packed or quantized; a delta is added to dense weights: give the dense "
            "model as base"
        )
    other = next((s.name for s in checkpoint.shards if s.made_from or type(s) is not Shard), None)
    if other is not None:
        raise CheckpointError(
            f"{name}: {other} is not in the safetensors format, which the base of a delta must "
            "have: save it by save_pretrained, and give that folder"
        )
    source.fetch(checkpoint, progress)
    place: SourceFields = {"model": model, "revision": source.revision}
    return Base(name=name, checkpoint=checkpoint, place=place)
