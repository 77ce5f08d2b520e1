"""How the weights of a tensor differ between two checkpoints, in pieces of work for the pipeline.

A weight is *kept* if it is not zero, of whichever sign. Of dtypes that are not pruned every item
counts as kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import numpy as np
from emp_kernels.numbers import FORMATS, NumberFormat
from emp_kernels.rows import Patterns, Workspace

from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.files.checksum import COPY_BYTES
from emp_llm.report.tensor_statistics import digits, ratio
from emp_llm.runtime.pipeline import Piece
from emp_llm.tensors.bit_patterns import as_float32
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.packed_reader import PackedReader
from emp_llm.tensors.row_reader import PlainReader, RowReader, block_memory
from emp_llm.tensors.stored_tensors import OpenTensor, PlainTensor
from emp_llm.tensors.whole_reader import UnpackedBytes, WholeReader

__all__ = ["CountFields", "Counts", "compare", "count_differences", "kinds_in_words"]

_SLICE = 1 << 16
"""Weights that are counted at a time, few enough for the processor's cache."""


class CountFields(TypedDict):
    """How some weights differ between two checkpoints, A and B.

    Attributes:
        weights: How many weights there are.
        kept_a: How many of them A keeps.
        kept_b: How many B keeps.
        kept_both: How many both keep.
        changed: Of those that both keep, how many have different bits.
        largest_change: The largest difference between two finite ones of these.
        not_finite: Of those that differ, how many are NaN or infinite in A or in B.
        zero_signs: How many are +0.0 on one side and -0.0 on the other.
        bytes_a: Bytes that they take in A.
        bytes_b: Bytes that they take in B.
        tensors: How many tensors they are in.
        same: How many of these are the same to the bit.
        same_masks: In how many of them both keep the same weights.
        overlap: Of the weights that A or B keeps, the share that both keep; 1 if there is none.
        a_in_b: The share of A's kept weights that B keeps.
        b_in_a: The share of B's kept weights that A keeps.
    """

    weights: int
    kept_a: int
    kept_b: int
    kept_both: int
    changed: int
    largest_change: float
    not_finite: int
    zero_signs: int
    bytes_a: int
    bytes_b: int
    tensors: int
    same: int
    same_masks: int
    overlap: float
    a_in_b: float
    b_in_a: float


@dataclass
class Counts:
    """The counts of `CountFields`, while weights are compared."""

    weights: int = 0
    kept_a: int = 0
    kept_b: int = 0
    kept_both: int = 0
    changed: int = 0
    largest_change: float = 0.0
    not_finite: int = 0
    zero_signs: int = 0
    bytes_a: int = 0
    bytes_b: int = 0
    tensors: int = 0
    same: int = 0
    same_masks: int = 0

    def add(self, other: "Counts") -> None:
        """Add the counts of other weights."""
        largest = max(self.largest_change, other.largest_change)
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.largest_change = largest

    def end_tensor(self) -> None:
        """Note whether a tensor, all of whose weights are counted, is the same on both sides."""
        alike = self.kept_a == self.kept_both == self.kept_b
        self.tensors, self.same_masks = 1, int(alike)
        self.same = int(alike and not self.changed and not self.zero_signs)

    def to_dict(self) -> CountFields:
        """The counts as JSON can hold them, shares and the change to six digits."""
        both = self.kept_both
        return {
            "weights": self.weights,
            "kept_a": self.kept_a,
            "kept_b": self.kept_b,
            "kept_both": both,
            "changed": self.changed,
            "largest_change": digits(self.largest_change),
            "not_finite": self.not_finite,
            "zero_signs": self.zero_signs,
            "bytes_a": self.bytes_a,
            "bytes_b": self.bytes_b,
            "tensors": self.tensors,
            "same": self.same,
            "same_masks": self.same_masks,
            "overlap": ratio(both, self.kept_a + self.kept_b - both, empty=1.0),
            "a_in_b": ratio(both, self.kept_a, empty=1.0),
            "b_in_a": ratio(both, self.kept_b, empty=1.0),
        }


def kinds_in_words(a: OpenTensor, b: OpenTensor) -> tuple[str, str] | None:
    """Dtype and shape of two tensors that cannot be compared; None if they can be."""
    (words_a, turned_a), (words_b, turned_b) = _kind(a), _kind(b)
    if words_a != words_b:
        return words_a, words_b
    if {turned_a, turned_b} == {True, False}:
        turned = {True: "packed by columns", False: "packed by rows"}
        return f"{words_a} {turned[turned_a is True]}", f"{words_b} {turned[turned_b is True]}"
    return None


def _kind(tensor: OpenTensor) -> tuple[str, bool | None]:
    """Dtype and shape in words, and whether rows are columns; None if nothing says so."""
    if isinstance(tensor, PlainTensor):
        return f"{tensor.entry.dtype} {list(tensor.entry.shape)}", None
    geometry = tensor.geometry
    # the rows of a tensor that is not pruned say nothing of its neurons
    turned = geometry.transposed if isinstance(tensor, PackedReader) else None
    return f"{geometry.number_format.name} {list(geometry.shape)}", turned


def compare(a: OpenTensor, b: OpenTensor, total: Counts) -> Iterator[Piece]:
    """The work of comparing two tensors that can be compared.

    Args:
        a: The one.
        b: The other.
        total: The counts that differences are added to, as pieces are settled.
    """
    if isinstance(a, PlainTensor) and isinstance(b, PlainTensor):
        for start in range(0, a.entry.nbytes, COPY_BYTES):
            nbytes = min(COPY_BYTES, a.entry.nbytes - start)
            yield Piece(2 * nbytes, partial(_compare_stretch, a, b, start, nbytes), total.add)
    else:
        pruned = [side.geometry for side in (a, b) if isinstance(side, PackedReader)]
        whole = [side.geometry for side in (a, b) if isinstance(side, WholeReader)]
        geometry = (*pruned, *whole)[0]
        rows_a, rows_b = (_rows(side, geometry) for side in (a, b))
        for block in geometry.row_blocks():
            nbytes = rows_a.block_bytes(block) + rows_b.block_bytes(block)
            yield Piece(nbytes, partial(_compare_block, rows_a, rows_b, block), total.add)
    yield Piece.note(total.end_tensor)


def _rows(tensor: OpenTensor, geometry: Geometry) -> RowReader:
    """The rows of a tensor by the row blocks of a geometry, that of one of the two compared."""
    if isinstance(tensor, PlainTensor):
        return PlainReader(tensor.file, tensor.entry, geometry)
    if tensor.geometry == geometry:
        return tensor
    if isinstance(tensor, PackedReader):
        raise TypeError(f"{tensor.name!r} is pruned, so its rows are what is compared")
    return PlainReader(UnpackedBytes(tensor), tensor.dense_entry, geometry)


def _compare_block(a: RowReader, b: RowReader, block: RowBlock, workspace: Workspace) -> Counts:
    rows_a = a.read(block, workspace).rows
    memory = block_memory(b.geometry, block, workspace, "stored")
    rows_b = b.read(block, workspace, memory).rows
    return count_differences(rows_a, rows_b, a.geometry.number_format)


def _compare_stretch(
    a: PlainTensor, b: PlainTensor, start: int, nbytes: int, workspace: Workspace
) -> Counts:
    data_a, data_b = (workspace.take(name, nbytes)[:nbytes] for name in ("weights", "stored"))
    a.file.read_into(a.entry.start + start, data_a.data)
    b.file.read_into(b.entry.start + start, data_b.data)
    number_format = FORMATS.get(a.entry.dtype)
    if number_format is not None:
        storage = number_format.storage
        return count_differences(data_a.view(storage), data_b.view(storage), number_format)
    item = max(1, ITEM_BITS[a.entry.dtype] // 8)  # of items smaller than a byte, bytes are counted
    unequal = (data_a != data_b).reshape(-1, item).any(axis=1)
    count, changed = unequal.size, int(np.count_nonzero(unequal))
    return Counts(weights=count, kept_a=count, kept_b=count, kept_both=count, changed=changed)


def count_differences(a: Patterns, b: Patterns, number_format: NumberFormat) -> Counts:
    """Count how weights given as bit patterns differ.

    Args:
        a: uint16 or uint32, of any shape.
        b: As many.
        number_format: The format of both.
    """
    counts = Counts()
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.size, _SLICE):
        stop = start + _SLICE
        counts.add(_count_slice(flat_a[start:stop], flat_b[start:stop], number_format))
    return counts


def _count_slice(a: Patterns, b: Patterns, number_format: NumberFormat) -> Counts:
    key_mask = number_format.storage.type(number_format.key_mask)
    unequal, keys_a = a != b, a & key_mask
    if not unequal.any():
        kept = int(np.count_nonzero(keys_a))
        return Counts(weights=a.size, kept_a=kept, kept_b=kept, kept_both=kept)
    keys_b = b & key_mask
    keeps_a, keeps_b = keys_a != 0, keys_b != 0
    keeps_both = keeps_a & keeps_b
    changed = unequal & keeps_both
    counts = Counts(
        weights=a.size,
        kept_a=int(np.count_nonzero(keeps_a)),
        kept_b=int(np.count_nonzero(keeps_b)),
        kept_both=int(np.count_nonzero(keeps_both)),
        changed=int(np.count_nonzero(changed)),
    )
    # what differs is kept by both, or by one, or is zero on both sides
    by_one = counts.kept_a + counts.kept_b - 2 * counts.kept_both
    counts.zero_signs = int(np.count_nonzero(unequal)) - counts.changed - by_one
    infinity = number_format.infinity
    if max(keys_a.max(), keys_b.max()) >= infinity:
        wild = unequal & ((keys_a >= infinity) | (keys_b >= infinity))
        counts.not_finite = int(np.count_nonzero(wild))
        changed &= ~wild
    if changed.any():
        with np.errstate(invalid="ignore"):  # infinity − infinity, which is not counted
            change = as_float32(a, number_format).astype(np.float64)
            change -= as_float32(b, number_format)
        counts.largest_change = float(np.abs(change).max(where=changed, initial=0.0))
    return counts
