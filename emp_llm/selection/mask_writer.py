"""The masks and repaired weights of one unit, written as they are made.

Shapes in names: R rows and C columns of a matrix.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash
from emp_kernels.rows import Bytes, Patterns

from emp_llm.report.tensor_statistics import Group
from emp_llm.selection.mask_index import StoredRows, StoredTensor, UnitIndex

__all__ = ["MaskWriter"]

Floats = npt.NDArray[np.float64]


class MaskWriter:
    """Writes the data file of one unit; `MaskStore.writer` makes it.

    Args:
        file: The data file, empty and opened for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._checksum = xxhash.xxh3_128()
        self._tensors: dict[str, tuple[list[StoredRows], list[Group]]] = {}
        self._replaced: dict[str, tuple[int, int]] = {}
        self._notes: dict[str, object] = {}

    def add(
        self,
        name: str,
        mask: Bytes,
        stats: Floats,
        groups: Sequence[Group] = (),
        weights: Patterns | None = None,
    ) -> None:
        """Write the masks of the next rows of a target.

        The matrices of a stack are added in their order, one or several at once; so are the rows of
        a matrix.

        Args:
            name: The tensor.
            mask: uint8 [R, ⌈C/8⌉], as `emp_kernels.rows.Given` takes it.
            stats: float64 [R, 3], Σs, Σs² and Σ_kept s of the scores.
            groups: With groups larger than a row, that of each matrix whose first row is here.
            weights: uint16 or uint32 [R, C], bit patterns in the checkpoint's format, where kept
                weights have changed; what stands in place of the others is ignored. Either all rows
                of a matrix have new weights or none.

        Raises:
            OSError: If they cannot be written.
            ValueError: If the arrays are not of the same rows.
        """
        rows, mask_bytes = mask.shape
        fits = stats.shape == (rows, 3)
        if weights is not None:
            fits &= len(weights) == rows and -(-weights.shape[1] // 8) == mask_bytes
        if not fits:
            raise ValueError(f"{name!r}: masks, statistics and weights are not of the same rows")
        parts, known_groups = self._tensors.setdefault(name, ([], []))
        part = StoredRows(
            first_row=parts[-1].stop_row if parts else 0,
            rows=rows,
            mask=self._append(mask.astype(np.uint8, copy=False)),
            mask_bytes=mask_bytes,
            stats=self._append(stats.astype(np.float64, copy=False)),
        )
        if weights is not None:
            at, columns = self._append(weights), weights.shape[1]
            part = replace(part, weights=at, columns=columns, item_bytes=weights.itemsize)
        parts.append(part)
        known_groups.extend(groups)

    def replace(self, name: str, data: bytes) -> None:
        """Write the new bytes of a tensor that is not a target, such as a bias.

        Raises:
            OSError: If they cannot be written.
        """
        self._replaced[name] = self._append(np.frombuffer(data, np.uint8)), len(data)

    def note(self, name: str, value: object) -> None:
        """Add a fact for the report, which JSON can hold; `MaskStore.notes` returns it."""
        self._notes[name] = value

    def index(self, key: str) -> UnitIndex:
        """Flush the data file to the disk, and describe what it holds.

        Args:
            key: The unit's name.

        Raises:
            OSError: If it cannot be flushed.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        return UnitIndex(
            key,
            self._file.tell(),
            self._checksum.hexdigest(),
            {n: StoredTensor(tuple(parts), tuple(g)) for n, (parts, g) in self._tensors.items()},
            self._replaced,
            self._notes,
        )

    def _append(self, data: npt.NDArray[Any]) -> int:
        offset = self._file.tell()
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._checksum.update(flat.data)
        self._file.write(flat.data)
        return offset
