"""The journal: what a run has finished, so that the same command can resume it.

    .run.json               what the run is: options, source and release
    .finished/SHARD.json    what became of the tensors of a shard that is on disk, one file a shard
    .copied/NUMBER.json     a large file that was copied and is on disk, one file each
    .masks/                 masks and repaired weights from data, see `emp_llm.selection.mask_store`
                            the state of a training, see `emp_llm.recovery.saved_state`
    .choices.json           which structures of the model stay, see `emp_llm.shrinking`

Each file appears in one step, after the shard or copy that it records. So processes on many
machines can write to one journal, and one that is killed leaves nothing wrong in it.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.errors import CheckpointError, OutputError
from emp_llm.files.atomic import write_json_durably
from emp_llm.files.checksum import new_hash
from emp_llm.report.fields import FileFields
from emp_llm.report.folder_files import describe_shard
from emp_llm.report.report import Outcome
from emp_llm.report.tensor_statistics import TensorStatistics
from emp_llm.selection.mask_index import NOTES_NAME, count_stored

__all__ = ["TRAINING_NAME", "Journal"]

TRAINING_NAME = "training.safetensors"
"""The state of a training, beside the masks."""

_RUN = ".run.json"
_FINISHED = ".finished"
_COPIED = ".copied"
_MASKS = ".masks"
_CHOICES = ".choices.json"
_SAMPLES_NOTE = "calibration"  # what the samples are, which is found in a moment
_OWN = (_RUN, _FINISHED, _COPIED, _MASKS, _CHOICES)


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
        """How many units, as `emp_llm.selection.mask_index` has them, have their masks already.

        Masks whose weights are still to be changed lie in a folder inside.
        """
        inner = (path for path in self.masks.glob("*") if path.is_dir())
        return max(map(count_stored, (self.masks, *inner)))

    @property
    def trains(self) -> bool:
        """Whether there is the state of a training to go on from."""
        return (self.masks / TRAINING_NAME).exists()

    @property
    def measures(self) -> bool:
        """Whether anything has been measured on the data, such as a loss, and noted."""
        notes = _read(self.masks / NOTES_NAME) or {}
        return bool(notes.keys() - {_SAMPLES_NOTE})

    def run(self) -> dict[str, Any] | None:
        """The description of the run in the folder; None where no journal was begun."""
        return _read(self._folder / _RUN)

    def begin(self, run: Mapping[str, Any]) -> None:
        """Begin the journal of a run.

        Args:
            run: Its description, see `emp_llm.output.run_description.describe_run`.

        Raises:
            OSError: If it cannot be written.
        """
        for folder in (_FINISHED, _COPIED):
            (self._folder / folder).mkdir(exist_ok=True)
        write_json_durably(self._folder / _RUN, run)

    def record(self, shard: str, outcomes: Mapping[str, Outcome]) -> None:
        """Record that a file of the folder is finished and on disk.

        Args:
            shard: The file's name.
            outcomes: What became of its tensors, by name.

        Raises:
            OSError: If that cannot be written.
        """
        content = {
            "file": describe_shard(self._folder / shard),
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
        """What was recorded of a file, by tensor; None where that, or its header, is damaged.

        The tensors' own bytes are not checked.
        """
        content = _read(self._path(shard))
        if content is None:
            return None
        try:
            outcomes = {name: _outcome(fields) for name, fields in content["tensors"].items()}
            sound = content["file"] == describe_shard(self._folder / shard)
        except (KeyError, TypeError, AttributeError, CheckpointError):
            return None
        return outcomes if sound else None

    def finished_outcomes(self, shard: str) -> dict[str, Outcome]:
        """What became of the tensors of a file that is finished, by name.

        Raises:
            OutputError: If that cannot be read.
        """
        outcomes = self.outcomes(shard)
        if outcomes is None:  # such as another machine's, on a file system that shows it late
            raise OutputError(
                f"{shard}: was finished, but its entry in the journal is missing or damaged: run "
                "the command again"
            )
        return outcomes

    def record_copy(self, file: str, fields: FileFields) -> None:
        """Record that a file was copied into the folder and is on disk.

        Args:
            file: Its path in the folder.
            fields: What a report says of it.

        Raises:
            OSError: If that cannot be written.
        """
        number = new_hash(file.encode()).hexdigest()  # since a path is no name of a file
        write_json_durably(
            self._folder / _COPIED / f"{number}.json", {"path": file, "file": fields}
        )

    def copied(self) -> dict[str, FileFields]:
        """What was recorded of the copied files that are there, by path; their bytes may differ."""
        found = {}
        with suppress(FileNotFoundError):
            for path in sorted((self._folder / _COPIED).iterdir()):
                content = _read(path) or {}
                file, fields = content.get("path"), content.get("file")
                if (
                    isinstance(file, str)
                    and isinstance(fields, dict)
                    and isinstance(fields.get("bytes"), int)
                    and (self._folder / file).is_file()
                ):
                    found[file] = cast("FileFields", fields)
        return found

    def record_choices(self, choices: list[dict[str, Any]]) -> None:
        """Record which structures of the model stay, as JSON can hold it.

        Raises:
            OSError: If that cannot be written.
        """
        write_json_durably(self._folder / _CHOICES, {"choices": choices})

    def choices(self) -> list[dict[str, Any]] | None:
        """What `record_choices` has recorded; None if that is nothing, or damaged."""
        content = _read(self._folder / _CHOICES) or {}
        found = content.get("choices")
        return found if isinstance(found, list) else None

    def forget(self, shard: str) -> None:
        """Remove a file that is not finished after all, and its record."""
        self._path(shard).unlink(missing_ok=True)
        (self._folder / shard).unlink(missing_ok=True)

    def holds(self, path: Path) -> bool:
        """Whether a file or folder in the folder is part of the journal itself."""
        return path.relative_to(self._folder).parts[0] in _OWN

    def keeps(self, path: Path) -> bool:
        """Whether a file or folder in the folder is part of the journal, or finished."""
        return self.holds(path) or self._path(path.name).is_file()

    def _path(self, shard: str) -> Path:
        return self._folder / _FINISHED / f"{shard}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path)
    except CheckpointError:  # not there, or damaged: the work that it records is done again
        return None


def _outcome(fields: Mapping[str, Any]) -> Outcome:
    statistics = fields["statistics"]
    if statistics is not None:
        # JSON has no tuples
        lists = {name: tuple(statistics[name]) for name in ("shape", "histogram")}
        statistics = TensorStatistics(**{**statistics, **lists})
    return Outcome(statistics, fields["checksum"], fields["packed_bytes"])
