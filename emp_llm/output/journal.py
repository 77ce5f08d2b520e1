"""What a run has finished, written down beside it, so that the same command can go on from there.

    .run.json               what the run is: options, source and release
    .finished/SHARD.json    what is to be reported of a shard that is on disk, one file a shard
    .masks/                 masks and repaired weights from data, see `emp_llm.selection.mask_store`

Each file appears in one step, after the shard that it tells of, so processes on many machines can
write to one journal, and one that is killed leaves nothing wrong in it.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from emp_llm._version import __version__
from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.shard import Shard
from emp_llm.errors import CheckpointError
from emp_llm.files.atomic import write_json_durably
from emp_llm.options import PruneOptions
from emp_llm.report.fields import SourceFields
from emp_llm.report.folder_files import describe_file
from emp_llm.report.report import Outcome
from emp_llm.report.tensor_statistics import TensorStatistics
from emp_llm.rule_fields import rule_fields
from emp_llm.selection.mask_index import count_stored
from emp_llm.tensors.packed_config import FORMAT_VERSION

__all__ = ["Journal", "describe_run", "difference"]

_RUN = ".run.json"
_FINISHED = ".finished"
_MASKS = ".masks"


class Journal:
    """The journal in a folder that is being written.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def masks(self) -> Path:
        """The folder of masks and repaired weights from data."""
        return self._folder / _MASKS

    def masked_units(self) -> int:
        """How many decoder blocks, and other units of the model, have their masks already."""
        return count_stored(self.masks)

    def run(self) -> dict[str, Any] | None:
        """What the run in the folder is, or None where no journal was begun."""
        run = _read(self._folder / _RUN)
        return run if isinstance(run, dict) else None

    def begin(self, run: Mapping[str, Any]) -> None:
        """Begin the journal of a run. OSErrors pass."""
        (self._folder / _FINISHED).mkdir(exist_ok=True)
        write_json_durably(self._folder / _RUN, run)

    def record(self, shard: str, outcomes: Mapping[str, Outcome]) -> None:
        """Write down that a file of the folder is finished, and on disk. OSErrors pass."""
        content = {
            "file": describe_file(self._folder / shard),
            "tensors": {name: asdict(outcome) for name, outcome in outcomes.items()},
        }
        write_json_durably(self._path(shard), content)

    def finished(self) -> list[str]:
        """The names of the files that are finished, sorted."""
        with suppress(FileNotFoundError):
            return sorted(
                path.stem
                for path in (self._folder / _FINISHED).iterdir()
                if path.suffix == ".json" and (self._folder / path.stem).is_file()
            )
        return []

    def outcomes(self, shard: str) -> dict[str, Outcome] | None:
        """What was written down of a file, by tensor; None where that, or its header, is damaged.

        The tensors' own bytes are not looked at.
        """
        content = _read(self._path(shard))
        try:
            outcomes = {name: _outcome(fields) for name, fields in content["tensors"].items()}
            sound = content["file"] == describe_file(self._folder / shard)
        except (KeyError, TypeError, AttributeError, CheckpointError):
            return None
        return outcomes if sound else None

    def forget(self, shard: str) -> None:
        """The file is not finished after all."""
        self._path(shard).unlink(missing_ok=True)
        (self._folder / shard).unlink(missing_ok=True)

    def holds(self, path: Path) -> bool:
        """Whether a file or folder in the folder is part of the journal itself."""
        return path.relative_to(self._folder).parts[0] in (_RUN, _FINISHED, _MASKS)

    def keeps(self, path: Path) -> bool:
        """Whether a file or folder in the folder is part of the journal, or finished."""
        return self.holds(path) or self._path(path.name).is_file()

    def _path(self, shard: str) -> Path:
        return self._folder / _FINISHED / f"{shard}.json"


def _read(path: Path) -> Any:  # noqa: ANN401 (any JSON)
    try:
        return read_json_object(path)
    except CheckpointError:  # not there, or damaged: the work it tells of is done again
        return None


def _outcome(fields: Mapping[str, Any]) -> Outcome:
    statistics = fields["statistics"]
    if statistics is not None:
        lists = {name: tuple(statistics[name]) for name in ("shape", "histogram")}
        statistics = TensorStatistics(**{**statistics, **lists})
    return Outcome(statistics, fields["checksum"])


def describe_run(
    checkpoint: Checkpoint, options: PruneOptions, source: SourceFields
) -> dict[str, Any]:
    """Describe all that the bytes of a result depend on.

    Small files are told by their content. Of a shard, whose content is not read here, it is the
    header, and the size and time of change of its files where they are not those of a commit.

    Args:
        checkpoint: The source.
        options: What was asked for.
        source: Name and revision of the model.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    small = [*checkpoint.told_by, *checkpoint.other_files]
    is_commit = source["revision"] is not None
    return {
        "release": {"emp-llm": __version__, "format": FORMAT_VERSION},
        "options": {
            "target sparsity": options.target_sparsity,
            "max loss increase": options.max_loss_increase,
            **_rule(options),
            "format": options.output_format,
        },
        "source": dict(source),
        "files": {str(file): _content(checkpoint.folder / file) for file in small},
        "shards": {
            shard.name: _header(shard) | ({} if is_commit else _state(shard.files))
            for shard in checkpoint.shards
        },
    }


def _rule(options: PruneOptions) -> dict[str, Any]:
    """The rule, with what of its calibration the bytes depend on and no report says."""
    rule: dict[str, Any] = {**rule_fields(options)}
    data = options.calibration
    if "calibration" in rule and data is not None and data.text is not None:
        path = Path(data.text)
        content = {"content": describe_file(path)} if path.is_file() else {}
        rule["calibration"] = {**rule["calibration"], **content, "device": data.device}
    return rule


def _content(path: Path) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


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


def difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str | None:
    """Say how a run differs from an earlier one, by the first thing that does; None if nothing."""
    for part in ("release", "options", "source"):
        was = then.get(part, {})
        for name in {**now[part], **was}:
            if was.get(name) != now[part].get(name):
                return f"{name} was {was.get(name)!r}, is {now[part].get(name)!r}"
    for part in ("files", "shards"):
        was = then.get(part, {})
        for name in sorted({*now[part], *was}):
            if name not in was or name not in now[part]:
                return f"the source's {name} is {'new' if name not in was else 'gone'}"
            if was[name] != now[part][name]:
                return f"the source's {name} has changed"
    return None
