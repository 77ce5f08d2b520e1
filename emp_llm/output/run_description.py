"""Describes a run by all that its bytes depend on, to compare it with an earlier one."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from emp_llm._version import __version__
from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.shard import Shard
from emp_llm.errors import CheckpointError
from emp_llm.files.checksum import COPY_BYTES
from emp_llm.options import CalibrationOptions, PruneOptions, packs_rest
from emp_llm.report.folder_files import describe_file
from emp_llm.report.source_fields import SourceFields
from emp_llm.rule_fields import data_fields, rule_fields
from emp_llm.tensors.packed_config import WHOLE_VERSION

__all__ = ["calibration_data", "describe_run", "difference", "pruning_options"]

_STAGING_LAYOUT = 3
"""Version of what the staging folder holds: files that another layout named would be published."""


def describe_run(
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    source: SourceFields,
    base: tuple[Checkpoint, SourceFields] | None = None,
) -> dict[str, Any]:
    """Describe all that the bytes of a result depend on.

    Small files are described by checksums of their content. A shard or another large file, whose
    content is not read here, is described by its header or size and, unless its commit is known, by
    the size and time of change of its files.

    Args:
        checkpoint: The source.
        options: What was asked for, as JSON can hold it.
        source: Name and revision of the model.
        base: Of a delta, the base, and its name and revision.

    Returns:
        ``release``, ``options``, ``source``, ``files``, ``shards`` and of a delta ``base`` and
        ``base shards``, each a dict of what JSON can hold.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    files = [*checkpoint.described_by, *checkpoint.other_files]
    is_commit = source["revision"] is not None
    of_base = {}
    if base is not None:
        base_checkpoint, place = base
        of_base = {
            "base": dict(place),
            "base shards": _shards(base_checkpoint, is_commit=place["revision"] is not None),
        }
    return {
        "release": {
            "emp-llm": __version__,
            "format": WHOLE_VERSION,
            "staging layout": _STAGING_LAYOUT,
        },
        "options": dict(options),
        "source": dict(source),
        "files": {str(file): _content(checkpoint.folder / file, is_commit) for file in files},
        "shards": _shards(checkpoint, is_commit=is_commit),
        **of_base,
    }


def pruning_options(options: PruneOptions) -> dict[str, Any]:
    """The options of a pruning that its bytes depend on, as `describe_run` takes them.

    Raises:
        CheckpointError: If a file of the calibration cannot be read.
    """
    return {
        "command": "prune",
        "target sparsity": options.target_sparsity,
        "max loss increase": options.max_loss_increase,
        "search data": _search_data(options),
        **_rule(options),
        "format": options.output_format,
        "rest": "packed" if packs_rest(options) else "plain",
    }


def difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str | None:
    """How a run differs from an earlier one: the first thing that does, in words.

    Args:
        now: The run, as `describe_run` describes it.
        then: The earlier one, which another release may have described.

    Returns:
        Such as "beta was 1.0, is 0.9"; None if nothing differs.
    """
    for part, of in (("release", ""), ("options", ""), ("source", ""), ("base", "the base's ")):
        was, is_ = then.get(part, {}), now.get(part, {})
        for name in {**is_, **was}:
            if was.get(name) != is_.get(name):
                return f"{of}{name} was {was.get(name)!r}, is {is_.get(name)!r}"
    for part, of in (("files", "source"), ("shards", "source"), ("base shards", "base")):
        was, is_ = then.get(part, {}), now.get(part, {})
        for name in sorted({*is_, *was}):
            if name not in was or name not in is_:
                return f"the {of}'s {name} is {'new' if name not in was else 'gone'}"
            if was[name] != is_[name]:
                return f"the {of}'s {name} has changed"
    return None


def _rule(options: PruneOptions) -> dict[str, Any]:
    """The rule as reports hold it, with what else of its calibration the bytes depend on."""
    rule: dict[str, Any] = {**rule_fields(options)}
    if "calibration" in rule and options.calibration is not None:
        rule["calibration"] = calibration_data(options.calibration)
    return rule


def _search_data(options: PruneOptions) -> dict[str, Any] | None:
    """What the loss is measured on by which β is searched for; a run that goes on keeps its β."""
    if options.max_loss_increase is None or options.calibration is None:
        return None
    return calibration_data(options.calibration)


def calibration_data(calibration: CalibrationOptions) -> dict[str, Any]:
    """The data of a calibration, with the content of a file, as `describe_run` takes them.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    data: dict[str, Any] = {**data_fields(calibration)}
    if calibration.text is None:
        return data
    path = Path(calibration.text)
    content = {"content": describe_file(path)} if path.is_file() else {}
    # a tokenizer's own code may give other tokens than transformers' class of the same name
    trust = {"trust_remote_code": True} if calibration.trust_remote_code else {}
    return {**data, **content, **trust, "device": calibration.device}


def _content(path: Path, is_commit: bool) -> str | dict[str, Any]:
    state = _state([path])
    if state["size"] > [COPY_BYTES]:
        return {"size": state["size"]} if is_commit else state
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _shards(checkpoint: Checkpoint, *, is_commit: bool) -> dict[str, Any]:
    return {
        shard.name: _header(shard) | ({} if is_commit else _state(shard.files))
        for shard in checkpoint.shards
    }


def _header(shard: Shard) -> dict[str, Any]:
    entries = [(e.name, e.dtype, e.shape, e.start, e.end) for e in shard.header.tensors]
    text = json.dumps([shard.header.metadata, entries])
    return {"header": xxhash.xxh3_128_hexdigest(text.encode())}


def _state(paths: Iterable[Path]) -> dict[str, Any]:
    try:
        found = [path.stat() for path in paths]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return {"size": [file.st_size for file in found], "time": [file.st_mtime_ns for file in found]}
