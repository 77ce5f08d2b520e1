"""A tensor in memory, packed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import numpy as np
import torch
from emp_kernels.dispatch import pack_rows, pack_whole
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.rows import (
    Bytes,
    Counts,
    PackedRows,
    Patterns,
    Table,
    Threshold,
    WholeRecords,
    Workspace,
)

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.errors import OutputError
from emp_llm.pruning.rest_job import rest_geometry
from emp_llm.resident.dense_weights import NUMBER_FORMATS, DenseWeights
from emp_llm.resident.held_planes import HeldPlanes
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count
from emp_llm.tensors.code_choice import SMALLEST_PACKED, choose_code, read_sample
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.layout_choice import choose_layout, packed_bytes, sample_rows
from emp_llm.tensors.packed import PackedTensor, padding
from emp_llm.tensors.whole import WholeTensor

__all__ = ["PackedBefore", "is_large", "pack_rest", "pack_tensor"]

Packed = TypeVar("Packed")

_WORSE: Final = 1.01
"""The layout from before is kept if a sample packed in it is at most this times the best size."""


@dataclass(frozen=True)
class PackedBefore:
    """How a tensor of the checkpoint was packed, or how it lies if it was pruned on loading.

    Attributes:
        transposed: Whether its rows run along the last dimension but one.
        layout: Its layout; None if it was not packed.
    """

    transposed: bool
    layout: RowLayout | None = None


def pack_tensor(name: str, tensor: torch.Tensor, before: PackedBefore) -> HeldPlanes:
    """Pack a tensor, in its layout from before if that is still a good one.

    Args:
        name: The tensor's name, for errors.
        tensor: Of a dtype in `NUMBER_FORMATS`, on any device; it is not changed.
        before: How it was packed when it was loaded, or how it lies.

    Returns:
        Its planes, on the CPU.

    Raises:
        OutputError: If it holds NaN or infinity, or is on the meta device.
    """
    if tensor.is_meta:
        raise OutputError(
            f"{name!r} is on the meta device, where there are no weights to save: load the model "
            "again"
        )
    geometry = Geometry(
        number_format=NUMBER_FORMATS[tensor.dtype],
        shape=tuple(tensor.shape),
        transposed=before.transposed,
    )
    weights = DenseWeights(tensor.detach().cpu().contiguous(), geometry)
    try:
        layout = _layout(weights, before.layout)
        tables, records = _pack_blocks(weights, layout)
    except NonFiniteRowError as error:
        raise OutputError(
            f"{name!r} holds NaN or infinity, which are not packed: call emp_llm.densify(model) "
            "first to save the model as it is"
        ) from error
    packed = PackedTensor(geometry, layout)
    table = packed.encode_table(np.concatenate(tables))
    return _planes(records, table, packed.encode_meta())


def _layout(weights: DenseWeights, before: RowLayout | None) -> RowLayout:
    """The layout from before, or the best one if training has changed the weights too much."""
    geometry = weights.geometry
    workspace = Workspace()
    sample = sample_rows(geometry, lambda block: weights.rows(block, workspace))
    rule = _what_is_there(sample, geometry)
    best = choose_layout(sample, geometry, rule)
    if before is None or before.number_format is not best.number_format:
        return best
    sizes = [packed_bytes(sample, layout, rule) for layout in (before, best)]
    return before if sizes[0] <= sizes[1] * _WORSE else best


def _what_is_there(rows: Patterns, geometry: Geometry) -> Threshold:
    """The rule that keeps every weight but +0.0.

    -0.0 has the same magnitude, and ties are kept from the first on; so if there is a -0.0, all
    zeros up to the last one are kept, +0.0 too.
    """
    key_mask = geometry.number_format.key_mask
    negative = np.flatnonzero(rows.reshape(-1) == rows.dtype.type(key_mask + 1))
    if not negative.size:
        return Threshold(0, 0)
    zeros = rows.reshape(-1)[: negative[-1] + 1] & rows.dtype.type(key_mask) == 0
    return Threshold(0, int(np.count_nonzero(zeros)))


def is_large(tensor: torch.Tensor) -> bool:
    """Whether a tensor that is not pruned is packed, if its dtype can be."""
    return tensor.ndim > 1 and tensor.nbytes >= SMALLEST_PACKED


def pack_rest(tensor: torch.Tensor) -> HeldPlanes | None:
    """Pack a tensor that is not pruned, as `emp_llm.prune` does.

    Args:
        tensor: Of a dtype in `NUMBER_FORMATS`, on any device; it is not changed.

    Returns:
        Its planes, on the CPU; None if `emp_llm.prune` leaves such a tensor plain.
    """
    number_format = NUMBER_FORMATS[tensor.dtype]
    entry = TensorEntry("", number_format.name, tuple(tensor.shape), 0, tensor.nbytes)
    geometry = rest_geometry(entry)
    if geometry is None or tensor.is_meta:
        return None
    weights = DenseWeights(tensor.detach().cpu().contiguous(), geometry)
    workspace = Workspace()
    sample = read_sample(geometry, lambda block: weights.rows(block, workspace))
    layout = choose_code(sample, geometry)
    if layout is None:
        return None
    lengths: list[Counts] = []
    records: list[Bytes] = []

    def compute(block: RowBlock, workspace: Workspace) -> WholeRecords:
        return pack_whole(weights.rows(block, workspace), layout, workspace=workspace)

    def settle(packed: WholeRecords) -> None:
        lengths.append(packed.lengths)
        records.append(packed.payload.copy())

    _run(weights, compute, settle)
    whole = WholeTensor(geometry, layout)
    table = whole.encode_table(np.concatenate(lengths))
    return _planes(records, table, whole.encode_meta())


def _pack_blocks(weights: DenseWeights, layout: RowLayout) -> tuple[list[Table], list[Bytes]]:
    geometry = weights.geometry
    tables: list[Table] = []
    records: list[Bytes] = []

    def compute(block: RowBlock, workspace: Workspace) -> PackedRows:
        rows = weights.rows(block, workspace)
        return pack_rows(rows, layout, _what_is_there(rows, geometry), workspace=workspace)

    def settle(packed: PackedRows) -> None:
        tables.append(packed.table)
        records.append(packed.payload.copy())

    _run(weights, compute, settle)
    return tables, records


def _run(
    weights: DenseWeights,
    compute: Callable[[RowBlock, Workspace], Packed],
    settle: Callable[[Packed], None],
) -> None:
    """Compute each row block of a tensor on any thread, and settle what comes of it in order."""
    geometry = weights.geometry
    pieces = (
        Piece(geometry.block_bytes(block), partial(compute, block), settle)
        for block in geometry.row_blocks()
    )
    run_pieces(pieces, threads=thread_count(None))


def _planes(records: list[Bytes], table: bytes, meta: bytes) -> HeldPlanes:
    used = sum(part.size for part in records)
    tail = np.frombuffer(padding(used) + table + meta, np.uint8)
    buffer = torch.empty(used + tail.size, dtype=torch.uint8)
    np.concatenate([*records, tail], out=buffer.numpy())
    return HeldPlanes(buffer, meta)
