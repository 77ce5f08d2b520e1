"""The backend of Triton's kernels for GPUs: arrays go to a GPU, and what it found comes back."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from emp_kernels import gpu_devices
from emp_kernels.cpu_backend import CpuCounting
from emp_kernels.gpu import histogram
from emp_kernels.gpu import pack as packing
from emp_kernels.gpu import prune as pruning
from emp_kernels.gpu import unpack as unpacking
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BINS, F32, NumberFormat, torch_integers
from emp_kernels.rows import (
    Bytes,
    Counts,
    MagnitudeCounts,
    PackedRows,
    Patterns,
    PerRow,
    PrunedRows,
    Rule,
    SelectedRows,
    Table,
    Threshold,
    Workspace,
)

__all__ = ["GpuBackend"]


class GpuBackend(CpuCounting):
    """Triton's kernels for GPUs, see `emp_kernels.backend.Backend`.

    Args:
        workspace: Of the GPU.
        tile: Weights of a row that are handled at a time, a power of two; chosen if None.
    """

    def __init__(self, workspace: DeviceWorkspace, *, tile: int | None = None) -> None:
        super().__init__(workspace, simd=True)
        self._workspace: DeviceWorkspace = workspace
        self._tile = tile

    @classmethod
    def over(cls, workspace: Workspace | None) -> "GpuBackend":
        """The backend on a workspace's GPU, or else on the first one.

        Raises:
            NoDeviceError: If there is no GPU.
        """
        if not isinstance(workspace, DeviceWorkspace):
            workspace = DeviceWorkspace(gpu_devices.find_devices()[0])
        return cls(workspace)

    def pack(self, weights: Patterns, layout: RowLayout, rule: Rule, *, emit: bool) -> PackedRows:
        """See `emp_kernels.dispatch.pack_rows`."""
        workspace = self._workspace
        with workspace.active():
            there = self._upload(weights)
            rows = packing.pack(
                there, layout, rule, workspace=workspace, emit=emit, tile=self._tile
            )
            payload = workspace.download("records", rows.payload)
            workspace.wait()
        return PackedRows(rows.table, rows.stats, payload)

    def prune(
        self, weights: Patterns, number_format: NumberFormat, rule: Rule, out: Patterns
    ) -> PrunedRows:
        """See `emp_kernels.dispatch.prune_rows`."""
        workspace = self._workspace
        with workspace.active():
            there = self._upload(weights)
            rows = pruning.prune(
                there, number_format, rule, out=there, workspace=workspace, tile=self._tile
            )
            workspace.fetch(there, out)
            workspace.wait()
        return PrunedRows(rows.table, rows.stats, out)

    def select(
        self, scores: Patterns, rule: PerRow | Threshold, kept: Counts | None
    ) -> SelectedRows:
        """See `emp_kernels.dispatch.select_rows`."""
        workspace = self._workspace
        with workspace.active():
            there = self._upload(scores)
            rows, mask = pruning.select(
                there, rule, kept=kept, workspace=workspace, tile=self._tile
            )
            bits = workspace.download("mask", mask).reshape(mask.shape)
            workspace.wait()
        return SelectedRows(rows.table, rows.stats, bits.copy())

    def unpack(
        self,
        payload: Bytes,
        sections: npt.NDArray[np.int64],
        table: Table,
        layout: RowLayout,
        out: Patterns,
    ) -> None:
        """See `emp_kernels.dispatch.unpack_rows`."""
        workspace = self._workspace
        with workspace.active():
            records = unpacking.upload_records(payload, workspace)
            there = _patterns(workspace.on_device("weights", out.nbytes), out)
            unpacking.unpack(records, sections, table, layout, there, workspace, tile=self._tile)
            workspace.fetch(there, out)
            workspace.wait()

    def count_magnitudes(self, weights: Patterns, number_format: NumberFormat) -> MagnitudeCounts:
        """See `emp_kernels.histogram.BlockHistogram`."""
        if number_format is not F32:
            counts = self._counted(
                weights,
                lambda there: histogram.count_keys(there, number_format, self._workspace),
            )
            return MagnitudeCounts(counts, np.zeros(BINS, np.uint64), np.zeros(BINS, np.uint64))
        found = self._counted(weights, lambda there: histogram.count_bins(there, self._workspace))
        counts, *low = found.reshape(3, BINS)
        low_sums, low_squares = (each.view(np.uint64) for each in low)
        return MagnitudeCounts(counts, low_sums, low_squares)

    def count_low_parts(self, weights: Patterns, chosen_bin: int) -> Counts:
        """See `emp_kernels.histogram.count_low_parts`."""
        return self._counted(
            weights, lambda there: histogram.count_low_parts(there, chosen_bin, self._workspace)
        )

    def count_equal(self, weights: Patterns, number_format: NumberFormat, key: int) -> int:
        """See `emp_kernels.histogram.count_equal`."""
        by_row = self._counted(
            weights,
            lambda there: histogram.count_equal_rows(there, number_format, key, self._workspace),
        )
        return int(by_row.sum())

    def _counted(self, weights: Patterns, count: Callable[[torch.Tensor], torch.Tensor]) -> Counts:
        """What is counted of weights on the device, int64, flat."""
        workspace = self._workspace
        with workspace.active():
            found = workspace.download("counts", count(self._upload(weights)))
            workspace.wait()
        return found.view(np.int64).copy()  # the buffer is used again

    def _upload(self, weights: Patterns) -> torch.Tensor:
        """Patterns of rows on the device, int16 or int32 [R, C]."""
        return _patterns(self._workspace.upload("weights", weights), weights)


def _patterns(there: torch.Tensor, like: Patterns) -> torch.Tensor:
    """Memory of the device, uint8, as patterns of an array's width and shape."""
    return there.view(torch_integers(like.itemsize)).view(like.shape)
