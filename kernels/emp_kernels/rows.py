"""Row blocks: what is asked of a backend, and what it returns.

A row block is some consecutive rows of a tensor, R rows of C weights, that are worked on together.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = [
    "Bytes",
    "Counts",
    "Given",
    "MagnitudeCounts",
    "PackedRows",
    "Patterns",
    "PerRow",
    "PrunedRows",
    "RowCounts",
    "RowStatistics",
    "Rule",
    "SelectedRows",
    "SweptRows",
    "Table",
    "Threshold",
    "WholeRecords",
    "Workspace",
]

Bytes = npt.NDArray[np.uint8]
Patterns = npt.NDArray[np.unsignedinteger]
"""Bit patterns of weights: uint16 or uint32."""
Counts = npt.NDArray[np.int64]
Table = npt.NDArray[np.int64]
"""Lines of a row table, [R, 3]: weights kept, how many of them escape, base of the window."""


@dataclass(frozen=True)
class PerRow:
    """Each row is a group: keep floor(beta · N_eff) of it.

    Attributes:
        beta: Multiplier of the effective number, finite and above 0.
    """

    beta: float


@dataclass(frozen=True)
class Threshold:
    """The group is larger than the row block, and its threshold is known.

    Attributes:
        key: Keys above it are kept ...
        ties: ... and the first so many that equal it, in row-major order.
    """

    key: int
    ties: int


@dataclass(frozen=True, eq=False)
class Given:
    """What stays was decided elsewhere.

    Attributes:
        mask: uint8 [R, ⌈C/8⌉], bit i of byte b for column 8b + i; bits past the last column are 0.
    """

    mask: Bytes


Rule = PerRow | Threshold | Given
"""What is kept of a row block."""


@dataclass(frozen=True)
class RowStatistics:
    """What was decided for a row block.

    Attributes:
        table: int64 [R, 3]: weights kept, how many of them escape, base of the window. The latter
            two are 0 where rows are not packed.
        stats: float64 [R, 3]: Σs, Σs² and Σ_kept s of each row.
    """

    table: npt.NDArray[np.int64]
    stats: npt.NDArray[np.float64]


@dataclass(frozen=True)
class PackedRows(RowStatistics):
    """A packed row block.

    Attributes:
        payload: uint8 [bytes], the records, one after the other; a view of the workspace.
            Empty where nothing was emitted.
    """

    payload: Bytes


@dataclass(frozen=True)
class PrunedRows(RowStatistics):
    """A row block with +0.0 in place of the weights that go.

    Attributes:
        weights: uint16 or uint32 [R, C], bit patterns.
    """

    weights: Patterns


@dataclass(frozen=True)
class SelectedRows(RowStatistics):
    """Which scores of a row block stay.

    Attributes:
        mask: uint8 [R, ⌈C/8⌉], as `Given` takes it.
    """

    mask: Bytes


@dataclass(frozen=True)
class RowCounts:
    """How many weights of a row block stay at each of B β.

    Attributes:
        stats: float64 [R, 2]: Σs and Σs² of each row.
        kept: int64 [R, B].
    """

    stats: npt.NDArray[np.float64]
    kept: npt.NDArray[np.int64]


@dataclass(frozen=True)
class SweptRows:
    """What a row block would come to, packed, at P points, each a count a row and a layout.

    Attributes:
        escaped: int64 [R, P], kept weights that escape.
        kept_mass: float64 [R, P], Σ_kept s.
        record_bytes: int64 [P], bytes of the records of all rows.
    """

    escaped: npt.NDArray[np.int64]
    kept_mass: npt.NDArray[np.float64]
    record_bytes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class MagnitudeCounts:
    """How many weights of a row block have which magnitude.

    Attributes:
        counts: int64 [BINS], by key for 16-bit formats, by bin for float32.
        low_sums: uint64 [BINS]: sums of the low parts of each bin; 0 for 16-bit formats.
        low_squares: uint64 [BINS]: sums of their squares; 0 for 16-bit formats.
    """

    counts: Counts
    low_sums: npt.NDArray[np.uint64]
    low_squares: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class WholeRecords:
    """Packed weights that all stay.

    Attributes:
        lengths: int64 [records], bytes of each record.
        payload: uint8 [bytes], the records, one after the other; a view of the workspace. Empty
            where nothing was emitted.
    """

    lengths: Counts
    payload: Bytes


class Workspace:
    """Buffers that one thread uses again for row block after row block; not thread-safe.

    Attributes:
        device: The GPU that the thread's kernels run on; None for the CPU. See `DeviceWorkspace`.
    """

    device: "torch.device | None" = None

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}

    def take(self, name: str, nbytes: int) -> Bytes:
        """A uint8 buffer of at least that size; what it holds is unspecified."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < nbytes:
            buffer = self._buffers[name] = self._make(nbytes)
        return buffer

    def _make(self, nbytes: int) -> Bytes:
        return np.empty(nbytes, np.uint8)
