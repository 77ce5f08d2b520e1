"""The masks and changed weights on disk, which the straight line prunes by.

    KEY.data   what was decided on one block of the model, as it came
    KEY.json   where in it everything lies, and its checksum; written last

Where KEY is the checksum of the block's name. A block is whole or not there: a run that was killed
decides again on the block that it was at.
"""

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash
from emp_kernels.rows import Bytes, Patterns

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.source_file import PlainFile
from emp_llm.errors import CheckpointError
from emp_llm.files.atomic import write_json_durably
from emp_llm.report.report import Calibrated
from emp_llm.report.tensor_statistics import Group

__all__ = ["BlockWriter", "MaskStore", "count_stored"]


Floats = npt.NDArray[np.float64]

_DATA, _INDEX = ".data", ".json"
_NOTES = "notes.json"
_CHECK_BYTES = 4 << 20


@dataclass(frozen=True)
class _Part:
    """Rows of a tensor that were decided on together.

    Attributes:
        first_row: Number of the first among the tensor's.
        rows: How many.
        mask: Where their masks begin in the file.
        mask_bytes: Bytes of a row's mask.
        stats: Where their figures begin.
        weights: Where their new weights do; None if they are the source's.
        columns: Weights in a row, if there are any.
        item_bytes: Bytes of one.
    """

    first_row: int
    rows: int
    mask: int
    mask_bytes: int
    stats: int
    weights: int | None = None
    columns: int = 0
    item_bytes: int = 0


@dataclass(frozen=True)
class _Tensor:
    """What was decided on a tensor: its parts in order, and groups larger than a row."""

    parts: tuple[_Part, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class _Index:
    """What is in a block's file."""

    key: str
    nbytes: int
    checksum: str
    tensors: Mapping[str, _Tensor]
    replaced: Mapping[str, tuple[int, int]]
    notes: Mapping[str, Any]


class BlockWriter:
    """The decisions on one block of the model, being written; `MaskStore.writer` makes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._checksum = xxhash.xxh3_128()
        self._tensors: dict[str, tuple[list[_Part], list[Group]]] = {}
        self._replaced: dict[str, tuple[int, int]] = {}
        self._notes: dict[str, Any] = {}

    def add(
        self,
        name: str,
        mask: Bytes,
        stats: Floats,
        groups: Sequence[Group] = (),
        weights: Patterns | None = None,
    ) -> None:
        """Write what was decided on rows of a target, which follow those added before.

        So the matrices of a stack are added in their order, one by one or several at once, and
        rows of a matrix may be, too.

        Args:
            name: The tensor.
            mask: uint8 [R, ⌈C/8⌉], as `emp_kernels.rows.Given` takes it.
            stats: float64 [R, 3], Σs, Σs² and Σ_kept s of the scores.
            groups: With groups larger than a row, that of each matrix whose first row is here.
            weights: uint16 or uint32 [R, C], bit patterns in the checkpoint's format, where weights
                that are kept have changed; the others of them are not looked at. Of a matrix all
                rows have changed, or none.

        Raises:
            OSError: If it cannot be written.
        """
        parts, known = self._tensors.setdefault(name, ([], []))
        rows, mask_bytes = mask.shape
        fits = stats.shape == (rows, 3)
        if weights is not None:
            fits &= len(weights) == rows and -(-weights.shape[1] // 8) == mask_bytes
        if not fits:
            raise ValueError(f"{name!r}: masks, figures and weights are not of the same rows")
        part = _Part(
            first_row=parts[-1].first_row + parts[-1].rows if parts else 0,
            rows=rows,
            mask=self._append(mask.astype(np.uint8, copy=False)),
            mask_bytes=mask_bytes,
            stats=self._append(stats.astype(np.float64, copy=False)),
        )
        if weights is not None:
            at, columns = self._append(weights), weights.shape[1]
            part = replace(part, weights=at, columns=columns, item_bytes=weights.itemsize)
        parts.append(part)
        known.extend(groups)

    def replace(self, name: str, data: bytes) -> None:
        """Write the new bytes of a tensor that is no target, such as a bias. OSErrors pass."""
        self._replaced[name] = self._append(np.frombuffer(data, np.uint8)), len(data)

    def note(self, name: str, value: Any) -> None:  # noqa: ANN401 (any JSON)
        """Take down a fact for the report; `MaskStore.notes` has it."""
        self._notes[name] = value

    def index(self, key: str) -> _Index:
        """What was written; now on disk. OSErrors pass."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return _Index(
            key,
            self._file.tell(),
            self._checksum.hexdigest(),
            {n: _Tensor(tuple(parts), tuple(g)) for n, (parts, g) in self._tensors.items()},
            self._replaced,
            self._notes,
        )

    def _append(self, data: npt.NDArray[Any]) -> int:
        at = self._file.tell()
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._checksum.update(flat.data)
        self._file.write(flat.data)
        return at


def count_stored(folder: Path) -> int:
    """How many blocks a folder of decisions has, whole or damaged."""
    return sum(path.name != _NOTES for path in folder.glob(f"*{_INDEX}"))


class MaskStore:
    """Decisions in a folder. Reading is for any thread.

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
        self._indices: dict[str, _Index] = {}
        self._block_of: dict[str, str] = {}
        for path in sorted(folder.glob(f"*{_INDEX}")):
            if path.name != _NOTES and (index := _read_index(path)) is not None:
                self._know(index)
        self._notes: dict[str, Any] = {}
        with suppress(CheckpointError):  # not there, or damaged: taken down again
            self._notes = read_json_object(folder / _NOTES)

    def __enter__(self) -> "MaskStore":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files; what is read later opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def has(self, key: str) -> bool:
        """Whether a block's decisions are there, whole; if they are damaged they are forgotten.

        They are read through when it is first asked.
        """
        index = self._indices.get(key)
        if index is None:
            return False
        if key not in self._checked and not self._is_sound(index):
            self._forget(key)
            return False
        self._checked.add(key)
        return True

    @contextmanager
    def writer(self, key: str) -> Iterator[BlockWriter]:
        """Write the decisions on a block, in place of those that are there.

        They are there, on disk, when the ``with`` block is left without an error.

        Args:
            key: The block's name.

        Raises:
            OSError: If they cannot be written.
        """
        self._forget(key)
        path = self._path(key, _DATA)
        try:
            with path.open("wb") as file:
                writer = BlockWriter(file)
                yield writer
                index = writer.index(key)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        write_json_durably(self._path(key, _INDEX), asdict(index))
        self._know(index)
        self._checked.add(key)

    @property
    def names(self) -> list[str]:
        """The targets that were decided on, sorted."""
        return sorted(name for index in self._indices.values() for name in index.tensors)

    def knows(self, name: str) -> bool:
        """Whether a target was decided on."""
        return name in self._block_of

    def rows(self, name: str) -> int:
        """Rows of a target that were decided on."""
        last = self._tensor(name).parts[-1]
        return last.first_row + last.rows

    def read_mask(self, name: str, first_row: int, stop_row: int) -> Bytes:
        """Masks of a target's rows, uint8 [R, ⌈C/8⌉].

        Raises:
            CheckpointError: If they cannot be read.
        """
        width = self._tensor(name).parts[0].mask_bytes
        mask = np.empty((stop_row - first_row, width), np.uint8)
        for part, rows, skipped in self._parts(name, first_row, stop_row):
            self._read(name, part.mask, skipped, mask[rows])
        return mask

    def stats(self, name: str, first_row: int, stop_row: int) -> Floats:
        """Σs, Σs² and Σ_kept s of a target's rows, float64 [R, 3].

        Raises:
            CheckpointError: If they cannot be read.
        """
        stats = np.empty((stop_row - first_row, 3))
        for part, rows, skipped in self._parts(name, first_row, stop_row):
            self._read(name, part.stats, skipped, stats[rows])
        return stats

    def groups(self, name: str) -> Sequence[Group]:
        """The groups that a target's matrices belong to, in order; empty where each row is one."""
        return self._tensor(name).groups

    def is_repaired(self, name: str) -> bool:
        """Whether weights of a target that are kept have changed."""
        return any(part.weights is not None for part in self._tensor(name).parts)

    def weights(self, name: str, first_row: int, stop_row: int) -> Patterns | None:
        """New weights of rows of one matrix of a target; None if they are the source's.

        Returns:
            uint16 or uint32 [R, C], bit patterns.

        Raises:
            CheckpointError: If they cannot be read.
        """
        found = None
        for part, rows, skipped in self._parts(name, first_row, stop_row):
            if part.weights is None:
                continue
            if found is None:
                dtype = np.uint16 if part.item_bytes == 2 else np.uint32
                found = np.empty((stop_row - first_row, part.columns), dtype)
            self._read(name, part.weights, skipped, found[rows])
        return found

    @property
    def replaced_names(self) -> list[str]:
        """Tensors that are no targets, and have new bytes; sorted."""
        return sorted(name for index in self._indices.values() for name in index.replaced)

    def replaced(self, name: str) -> bytes | None:
        """New bytes of a tensor that is no target; None if they are the source's.

        Raises:
            CheckpointError: If they cannot be read.
        """
        for index in self._indices.values():
            if name in index.replaced:
                at, nbytes = index.replaced[name]
                data = np.empty(nbytes, np.uint8)
                self._file(index.key).read_into(at, data.data)
                return data.tobytes()
        return None

    @property
    def notes(self) -> dict[str, Any]:
        """Facts for the report: of the whole, and of blocks, whose lists are joined and sorted."""
        notes = dict(self._notes)
        for index in self._indices.values():
            for name, value in index.notes.items():
                if isinstance(value, list):
                    notes[name] = sorted([*notes.get(name, []), *value])
                else:
                    notes[name] = value
        return notes

    def note(self, name: str, value: Any) -> None:  # noqa: ANN401 (any JSON)
        """Take down a fact about the whole for the report, on disk. OSErrors pass."""
        self._notes[name] = value
        write_json_durably(self.folder / _NOTES, self._notes)

    def calibrated(self) -> Calibrated:
        """What the report is to tell of the data and of what was repaired."""
        notes = {name: v for name, v in self.notes.items() if name not in ("beta", "search")}
        repaired = {name for name in self.names if self.is_repaired(name)}
        return Calibrated(
            data=notes.pop("calibration", {}),
            notes=notes,
            repaired=repaired.union(self.replaced_names),
        )

    def _tensor(self, name: str) -> _Tensor:
        return self._indices[self._block_of[name]].tensors[name]

    def _parts(
        self, name: str, first_row: int, stop_row: int
    ) -> Iterator[tuple[_Part, slice, int]]:
        """The parts that some rows lie in, which of the rows, and how many come before them."""
        parts = self._tensor(name).parts
        first = bisect_right(parts, first_row, key=lambda part: part.first_row) - 1
        for part in parts[first:]:
            if part.first_row >= stop_row:
                break
            start = max(first_row, part.first_row)
            stop = min(stop_row, part.first_row + part.rows)
            if start < stop:
                yield part, slice(start - first_row, stop - first_row), start - part.first_row

    def _read(self, name: str, at: int, skipped: int, rows: npt.NDArray[Any]) -> None:
        """Fill rows, C-contiguous, with what lies at a place in the file behind so many others."""
        row_bytes = rows.shape[1] * rows.itemsize
        data = rows.reshape(-1).view(np.uint8).data
        self._file(self._block_of[name]).read_into(at + skipped * row_bytes, data)

    def _file(self, key: str) -> PlainFile:
        with self._lock:
            if key not in self._files:
                self._files[key] = PlainFile(self._path(key, _DATA))
            return self._files[key]

    def _know(self, index: _Index) -> None:
        self._indices[index.key] = index
        self._block_of |= dict.fromkeys(index.tensors, index.key)

    def _forget(self, key: str) -> None:
        """A block is not decided on after all."""
        self._path(key, _INDEX).unlink(missing_ok=True)
        self._checked.discard(key)
        if (index := self._indices.pop(key, None)) is not None:
            for name in index.tensors:
                del self._block_of[name]
        with self._lock:
            if (file := self._files.pop(key, None)) is not None:
                file.close()

    def _is_sound(self, index: _Index) -> bool:
        checksum, data = xxhash.xxh3_128(), np.empty(_CHECK_BYTES, np.uint8)
        try:
            if self._path(index.key, _DATA).stat().st_size != index.nbytes:
                return False
            file = self._file(index.key)
            for start in range(0, index.nbytes, _CHECK_BYTES):
                part = data[: min(_CHECK_BYTES, index.nbytes - start)]
                file.read_into(start, part.data)
                checksum.update(part.data)
        except (OSError, CheckpointError):
            return False
        return checksum.hexdigest() == index.checksum

    def _path(self, key: str, ending: str) -> Path:
        return self.folder / (xxhash.xxh3_128_hexdigest(key.encode()) + ending)


def _read_index(path: Path) -> _Index | None:
    """A block's index; None if it is damaged."""
    try:
        content = read_json_object(path)
        index = _Index(
            **{
                **content,
                "tensors": {
                    name: _Tensor(
                        tuple(_Part(**part) for part in tensor["parts"]),
                        tuple(Group(**group) for group in tensor["groups"]),
                    )
                    for name, tensor in content["tensors"].items()
                },
            }
        )
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
    named = xxhash.xxh3_128_hexdigest(str(index.key).encode()) == path.stem
    return index if named and all(tensor.parts for tensor in index.tensors.values()) else None
