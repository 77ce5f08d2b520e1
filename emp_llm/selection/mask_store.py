"""Masks and repaired weights on disk, from which targets are pruned later.

    KEY.data   the masks, sums of scores and new weights of one unit of the model, as they came
    KEY.json   where in the data file everything lies, and the file's checksum; written last
    notes.json facts for the report

KEY is the checksum of the unit's name; for units see `emp_llm.selection.mask_index`. The index is
written once the data are on disk, so a unit is there whole or not at all: a run that was killed
repeats the unit that it was working on.

Shapes in names: R rows and C columns of a matrix.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from emp_kernels.numbers import numpy_integers
from emp_kernels.rows import Bytes, Patterns

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.source_file import PlainFile
from emp_llm.errors import CheckpointError
from emp_llm.files.atomic import write_json_durably
from emp_llm.report.fields import NoteFields
from emp_llm.report.report import Calibrated
from emp_llm.report.tensor_statistics import Group
from emp_llm.selection.mask_index import (
    INDEX_SUFFIX,
    NOTES_NAME,
    StoredRows,
    StoredTensor,
    UnitIndex,
    file_stem,
    index_paths,
    read_index,
)
from emp_llm.selection.mask_writer import MaskWriter

__all__ = ["MaskStore"]

Floats = npt.NDArray[np.float64]

_DATA_SUFFIX = ".data"
_CHECK_BYTES = 4 << 20  # read and hashed at a time


class MaskStore:
    """Masks in a folder. Any thread may read them.

    Args:
        folder: The folder; made if it is missing.

    Raises:
        OSError: If it cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._lock = threading.Lock()
        self._files: dict[str, PlainFile] = {}
        self._checked: set[str] = set()
        self._indices: dict[str, UnitIndex] = {}
        self._unit_of: dict[str, str] = {}
        for path in index_paths(folder):
            if (index := read_index(path)) is not None:
                self._include(index)
        self._notes: dict[str, Any] = {}
        with suppress(CheckpointError):  # missing or damaged: they are noted again
            self._notes = read_json_object(folder / NOTES_NAME)

    def __enter__(self) -> "MaskStore":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files; a later read opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def has(self, key: str) -> bool:
        """Whether the masks of a unit are there, whole; damaged ones are deleted.

        The first call for a unit reads its data file through to compare the checksum.
        """
        index = self._indices.get(key)
        if index is None:
            return False
        if key not in self._checked and not self._is_sound(index):
            self._discard(key)
            return False
        self._checked.add(key)
        return True

    @contextmanager
    def writer(self, key: str) -> Iterator[MaskWriter]:
        """Write the masks of a unit, in place of those that are there.

        They are on disk when the ``with`` statement is left without an error.

        Args:
            key: The unit's name.

        Raises:
            OSError: If they cannot be written.
        """
        self._discard(key)  # first: an index must never describe data that are being replaced
        path = self._path(key, _DATA_SUFFIX)
        try:
            with path.open("wb") as file:
                writer = MaskWriter(file)
                yield writer
                index = writer.index(key)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        write_json_durably(self._path(key, INDEX_SUFFIX), asdict(index))
        self._include(index)
        self._checked.add(key)

    @property
    def names(self) -> list[str]:
        """The targets that have masks, sorted."""
        return sorted(self._unit_of)

    def __contains__(self, name: str) -> bool:
        """Whether a target has masks."""
        return name in self._unit_of

    def rows(self, name: str) -> int:
        """How many rows of a target have masks."""
        return self._tensor(name).parts[-1].stop_row

    def read_mask(self, name: str, first_row: int, stop_row: int) -> Bytes:
        """The masks of a target's rows, uint8 [R, ⌈C/8⌉].

        Raises:
            CheckpointError: If they cannot be read.
        """
        width = self._tensor(name).parts[0].mask_bytes
        mask = np.empty((stop_row - first_row, width), np.uint8)
        for part, rows, skipped in self._parts(name, first_row, stop_row):
            self._read(name, part.mask, skipped, mask[rows])
        return mask

    def stats(self, name: str, first_row: int, stop_row: int) -> Floats:
        """Σs, Σs² and Σ_kept s of the scores of a target's rows, float64 [R, 3].

        Raises:
            CheckpointError: If they cannot be read.
        """
        stats = np.empty((stop_row - first_row, 3))
        for part, rows, skipped in self._parts(name, first_row, stop_row):
            self._read(name, part.stats, skipped, stats[rows])
        return stats

    def groups(self, name: str) -> Sequence[Group]:
        """The group of each of a target's matrices, in order; empty where each row is a group."""
        return self._tensor(name).groups

    def is_repaired(self, name: str) -> bool:
        """Whether weights of a target that are kept have changed."""
        return self._tensor(name).is_repaired

    def weights(self, name: str, first_row: int, stop_row: int) -> Patterns | None:
        """New weights of rows of one matrix of a target; None if they keep the source's.

        Returns:
            uint16 or uint32 [R, C], bit patterns.

        Raises:
            CheckpointError: If they cannot be read.
        """
        weights = None
        for part, rows, skipped in self._parts(name, first_row, stop_row):
            if part.weights is None:  # of another matrix of the stack
                continue
            if weights is None:
                shape = stop_row - first_row, part.columns
                weights = np.empty(shape, numpy_integers(part.item_bytes))
            self._read(name, part.weights, skipped, weights[rows])
        return weights

    @property
    def replaced_names(self) -> list[str]:
        """Tensors that are not targets and have new bytes, sorted."""
        return sorted(name for index in self._indices.values() for name in index.replaced)

    def replaced(self, name: str) -> bytes | None:
        """New bytes of a tensor that is not a target; None if it keeps the source's.

        Raises:
            CheckpointError: If they cannot be read.
        """
        found = self._replaced(name)
        if found is None:
            return None
        file, at, nbytes = found
        data = np.empty(nbytes, np.uint8)
        file.read_into(at, data.data)
        return data.tobytes()

    def read_replaced(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with new bytes of a tensor that is not a target, from an offset on.

        Raises:
            CheckpointError: If they cannot be read.
            KeyError: If the tensor keeps the source's.
        """
        found = self._replaced(name)
        if found is None:
            raise KeyError(name)
        file, at, _ = found
        file.read_into(at + offset, buffer)

    @property
    def notes(self) -> dict[str, Any]:
        """Facts for the report, of the run and of its units, whose lists are joined and sorted."""
        notes = dict(self._notes)
        for index in self._indices.values():
            for name, value in index.notes.items():
                if isinstance(value, list):
                    notes[name] = sorted([*notes.get(name, []), *value])
                else:
                    notes[name] = value
        return notes

    def note(self, name: str, value: object) -> None:
        """Write down a fact about the whole run for the report, which JSON can hold.

        Raises:
            OSError: If it cannot be written.
        """
        self._notes[name] = value
        write_json_durably(self.folder / NOTES_NAME, self._notes)

    def calibrated(self) -> Calibrated:
        """What the report says of the calibration data and of repaired tensors."""
        known, notes = self.notes, NoteFields()
        if "without_tokens" in known:
            notes["without_tokens"] = known["without_tokens"]
        repaired = {name for name in self.names if self.is_repaired(name)}
        return Calibrated(
            samples=known.get("calibration", {}),
            notes=notes,
            repaired=repaired.union(self.replaced_names),
            betas=known.get("allocation", {}).get("betas", {}),
        )

    def _replaced(self, name: str) -> tuple[PlainFile, int, int] | None:
        """The data file that has new bytes of a tensor, where they begin, and how many they are."""
        for index in self._indices.values():
            if name in index.replaced:
                return self._file(index.key), *index.replaced[name]
        return None

    def _tensor(self, name: str) -> StoredTensor:
        return self._indices[self._unit_of[name]].tensors[name]

    def _parts(
        self, name: str, first_row: int, stop_row: int
    ) -> Iterator[tuple[StoredRows, slice, int]]:
        """The parts that hold rows: which of the rows, and how many of the part precede them."""
        parts = self._tensor(name).parts
        first = bisect_right(parts, first_row, key=lambda part: part.first_row) - 1
        for part in parts[first:]:
            if part.first_row >= stop_row:
                break
            start = max(first_row, part.first_row)
            stop = min(stop_row, part.stop_row)
            if start < stop:
                yield part, slice(start - first_row, stop - first_row), start - part.first_row

    def _read(self, name: str, offset: int, skipped: int, rows: npt.NDArray[Any]) -> None:
        """Fill C-contiguous rows from the data file, past so many rows that lie at an offset."""
        row_bytes = rows.shape[1] * rows.itemsize
        data = rows.reshape(-1).view(np.uint8).data
        self._file(self._unit_of[name]).read_into(offset + skipped * row_bytes, data)

    def _file(self, key: str) -> PlainFile:
        with self._lock:  # threads that read rows come here at the same time
            if key not in self._files:
                self._files[key] = PlainFile(self._path(key, _DATA_SUFFIX))
            return self._files[key]

    def _include(self, index: UnitIndex) -> None:
        self._indices[index.key] = index
        self._unit_of |= dict.fromkeys(index.tensors, index.key)

    def _discard(self, key: str) -> None:
        """Delete a unit's index: without it, its data file counts for nothing."""
        self._path(key, INDEX_SUFFIX).unlink(missing_ok=True)
        self._checked.discard(key)
        if (index := self._indices.pop(key, None)) is not None:
            for name in index.tensors:
                del self._unit_of[name]
        with self._lock:
            if (file := self._files.pop(key, None)) is not None:
                file.close()

    def _is_sound(self, index: UnitIndex) -> bool:
        checksum, data = xxhash.xxh3_128(), np.empty(_CHECK_BYTES, np.uint8)
        try:
            if self._path(index.key, _DATA_SUFFIX).stat().st_size != index.nbytes:
                return False
            file = self._file(index.key)
            for start in range(0, index.nbytes, _CHECK_BYTES):
                part = data[: min(_CHECK_BYTES, index.nbytes - start)]
                file.read_into(start, part.data)
                checksum.update(part.data)
        except (OSError, CheckpointError):
            return False
        return checksum.hexdigest() == index.checksum

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / (file_stem(key) + suffix)
