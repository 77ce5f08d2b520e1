"""For `bench_gpu.py`: the kernels on weights of one shape, proven right, then timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from common import DTYPES, GB
from emp_kernels import dispatch
from emp_kernels.gpu.histogram import count_bins, count_keys
from emp_kernels.gpu.pack import PackLaunch, pack
from emp_kernels.gpu.prune import PruneLaunch, prune
from emp_kernels.gpu.unpack import UnpackLaunch, unpack
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.numbers import F32, patterns_of_tensor, torch_integers
from emp_kernels.reference import keep_mask
from kernel_basics import RULE, agree, authors_way, check_authors_counts, row_layout

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Case", "Clock", "Timed", "free_bytes", "random_patterns"]

SIGMA = 0.02
SAMPLED_ROWS = 48
STEP = 1 << 26  # weights that are made, or counted plainly, at a time
AUTHORS_WEIGHTS = 1 << 26  # their way takes forty bytes of memory a weight


def random_patterns(dtype: str, count: int, device: torch.device) -> torch.Tensor:
    """Gaussian weights, int16 or int32 [count], made on the device from torch's seed."""
    number_format = DTYPES[dtype]
    integers = torch_integers(number_format.item_bytes)
    out = torch.empty(count, dtype=integers, device=device)
    for part in out.split(STEP):
        values = torch.randn(part.numel(), device=device) * SIGMA
        part.copy_(values.to(number_format.torch_dtype).view(integers))
    return out


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nothing is in."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


class Clock:
    """Times what is put on the stream of a workspace, which must be active.

    Args:
        workspace: Of a GPU; of the CPU where the interpreter stands in for one: then times mean
            nothing.
        rounds: How often each is timed.
    """

    def __init__(self, workspace: DeviceWorkspace, rounds: int) -> None:
        self.workspace = workspace
        self._rounds = rounds

    def seconds(
        self,
        work: Callable[[], object],
        *,
        before: Callable[[], object] = lambda: None,
        replayed: bool = True,
    ) -> list[float]:
        """Seconds that the device takes for some work, each time.

        Args:
            work: Puts it on the stream; not to wait for it.
            before: Puts on the stream what is to be done before each time, and is not timed.
            replayed: Whether it is recorded once and replayed, so that nothing waits for Python.
        """
        if self.workspace.device.type != "cuda":
            return [self._seconds_here(work, before) for _ in range(self._rounds)]
        before()
        work()  # compiles, and gets memory
        if replayed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                work()
            work = graph.replay
        return [self._seconds_there(work, before) for _ in range(self._rounds)]

    @staticmethod
    def _seconds_here(work: Callable[[], object], before: Callable[[], object]) -> float:
        before()
        start = perf_counter()
        work()
        return perf_counter() - start

    @staticmethod
    def _seconds_there(work: Callable[[], object], before: Callable[[], object]) -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        begun.record()
        work()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3


@dataclass(frozen=True)
class Timed:
    """What the same weights took, in the order of the rounds.

    Attributes:
        dense_bytes: Of the weights.
        moved_bytes: Read and written at the least.
        seconds: Of each round.
    """

    dense_bytes: int
    moved_bytes: int
    seconds: list[float]

    @property
    def rate(self) -> float:
        """GB/s of dense weights, of the median round."""
        return self.dense_bytes / GB / median(self.seconds)

    def copies(self, copy: Timed) -> float:
        """Its time as a multiple of a copy's that reads and writes as many bytes."""
        copy_rate = copy.moved_bytes / median(copy.seconds)
        return median(self.seconds) * copy_rate / self.moved_bytes


@dataclass
class Case:
    """Weights of one dtype and shape, as many sets as there is memory for.

    Attributes:
        dtype: A key of `DTYPES`.
        shape: [R, C] or [E, R, C], of one set.
        pool: int16 or int32, all weights; more of them than a cache holds.
        work: As much memory, for what is pruned in place and for what is unpacked.
        workspace: Active.
    """

    dtype: str
    shape: tuple[int, ...]
    pool: torch.Tensor
    work: torch.Tensor
    workspace: DeviceWorkspace
    inputs: list[torch.Tensor] = field(init=False)
    outputs: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        columns = self.shape[-1]
        size = torch.Size(self.shape).numel()
        count = self.pool.numel() // size
        self.number_format = DTYPES[self.dtype]
        self.layout = row_layout(self.number_format, columns)
        self.inputs = [each.view(-1, columns) for each in self.pool[: count * size].split(size)]
        self.outputs = [each.view(-1, columns) for each in self.work[: count * size].split(size)]
        # each set's records lie in a place of their own, which no cache holds either
        self._spaces = [DeviceWorkspace(self.workspace.device) for _ in self.inputs]

    @property
    def nbytes(self) -> int:
        """Dense bytes of all sets."""
        return sum(each.nbytes for each in self.inputs)

    def restore(self) -> None:
        """Put the weights where they are to be pruned."""
        for here, there in zip(self.inputs, self.outputs, strict=True):
            there.copy_(here)

    # --- the proof -------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove all kernels right on the first set, whatever the memory held before.

        Rows, among them the first and the last, are compared with what the CPU's kernels make of
        them, and some with the reference. All that was unpacked is compared with all that was
        pruned, and the histogram with plain counts.
        """
        weights, out, space = self.inputs[0], self.outputs[0], self._spaces[0]
        rows = _sample(len(weights))
        samples = self._patterns(weights, rows)
        impl = dispatch.resolve("auto")

        self._room(space).fill_(0xA5)
        packed = pack(weights, self.layout, RULE, workspace=space)
        expected = dispatch.pack_rows(samples, self.layout, RULE, impl=impl)
        agree("pack", self.dtype, packed.table[rows], expected.table)
        here = self.layout.offsets(packed.table[:, 0], packed.table[:, 1])
        there = self.layout.offsets(expected.table[:, 0], expected.table[:, 1])
        agree("pack", self.dtype, packed.payload.numel(), here[-1])
        for i, row in enumerate(rows):
            record = packed.payload[here[row] : here[row + 1]].cpu().numpy()
            agree("pack", self.dtype, record, expected.payload[there[i] : there[i + 1]])

        out.copy_(weights)
        prune(out, self.number_format, RULE, out=out, workspace=self.workspace)
        pruned = self._patterns(out, rows)
        plain = dispatch.prune_rows(samples, self.number_format, RULE, impl=impl)
        agree("prune", self.dtype, pruned, plain.weights)
        for i in (0, len(rows) // 2, len(rows) - 1):
            keep = keep_mask(self.number_format.magnitudes(samples[i]), RULE.beta)
            agree("prune", f"{self.dtype}, reference", pruned[i], np.where(keep, samples[i], 0))

        unpacked = torch.full_like(out, -1)  # NaN
        unpack(
            self._room(space),
            self._sections(packed.table),
            packed.table,
            self.layout,
            unpacked,
            self.workspace,
        )
        if not torch.equal(unpacked, out):
            raise AssertionError(f"unpack {self.dtype} differs from prune")
        found = self._count(weights)
        agree("histogram", self.dtype, found.cpu().numpy(), self._plain_counts(weights))

    def _patterns(self, weights: torch.Tensor, rows: list[int]) -> np.ndarray:
        chosen = weights[torch.tensor(rows, device=weights.device)]
        return patterns_of_tensor(chosen.cpu())

    def _room(self, space: DeviceWorkspace) -> torch.Tensor:
        """All of a workspace's room for a set's records: more than they take."""
        nbytes = len(self.inputs[0]) * self.layout.longest_record
        return space.on_device("records", nbytes // 4 * 4)

    def _sections(self, table: np.ndarray) -> np.ndarray:
        return self.layout.sections(table[:, 0], table[:, 1])

    def _count(self, weights: torch.Tensor) -> torch.Tensor:
        if self.number_format is F32:
            return count_bins(weights, self.workspace)
        return count_keys(weights, self.number_format, self.workspace)[None]

    def _plain_counts(self, weights: torch.Tensor) -> np.ndarray:
        low_bits = self.number_format.bits - 16
        sums = torch.zeros(3, 1 << 15, dtype=torch.int64, device=weights.device)
        for part in weights.view(-1).split(STEP):
            keys = part.to(torch.int64) & self.number_format.key_mask
            low = keys & ((1 << low_bits) - 1)
            for line, values in zip(sums, (torch.ones_like(low), low, low * low), strict=True):
                line.index_add_(0, keys >> low_bits, values)
        return sums[: 3 if low_bits else 1].cpu().numpy()

    # --- the clock -------------------------------------------------------------------------------

    def measure(self, clock: Clock) -> dict[str, Timed]:
        """Time every kernel over all sets, and a copy of them."""
        packs = [
            PackLaunch(each, self.layout, space)
            for each, space in zip(self.inputs, self._spaces, strict=True)
        ]
        prunes = [PruneLaunch(e, self.number_format, e, self.workspace) for e in self.outputs]
        rule = prunes[0].rows.tensors_of(RULE)
        seconds = clock.seconds(self.restore, replayed=False)
        timed = {"copy": Timed(self.nbytes, 2 * self.nbytes, seconds)}
        seconds = clock.seconds(lambda: [launch(rule) for launch in packs])
        tables = [launch.rows.table.cpu().numpy() for launch in packs]
        packed_bytes = sum(
            table.nbytes + int(self.layout.offsets(table[:, 0], table[:, 1])[-1])
            for table in tables
        )
        timed["pack"] = Timed(self.nbytes, self.nbytes + packed_bytes, seconds)
        seconds = clock.seconds(lambda: [launch(rule) for launch in prunes], before=self.restore)
        timed["prune"] = Timed(self.nbytes, 2 * self.nbytes, seconds)
        seconds = clock.seconds(lambda: [self._count(each) for each in self.inputs])
        timed["hist"] = Timed(self.nbytes, self.nbytes, seconds)
        unpacks = [
            UnpackLaunch(self._room(space), self._sections(table), table, self.layout, out, space)
            for table, out, space in zip(tables, self.outputs, self._spaces, strict=True)
        ]
        seconds = clock.seconds(lambda: [launch() for launch in unpacks])
        timed["unpack"] = Timed(self.nbytes, self.nbytes + packed_bytes, seconds)
        timed["torch"] = self._measure_authors(clock)
        return timed

    def _measure_authors(self, clock: Clock) -> Timed:
        """The authors' way, on as many rows as fit."""
        some = max(1, AUTHORS_WEIGHTS // self.shape[-1])
        weights = self.inputs[0][:some].view(self.number_format.torch_dtype)
        ours = self.outputs[0][:some].view(self.number_format.torch_dtype)  # unpacked
        check_authors_counts(authors_way(weights), ours)
        seconds = clock.seconds(lambda: authors_way(weights), replayed=False)
        return Timed(weights.nbytes, 2 * weights.nbytes, seconds)


def _sample(rows: int) -> list[int]:
    """Numbers of some rows, in order, the first and the last among them."""
    chosen = np.random.default_rng().integers(0, rows, SAMPLED_ROWS).tolist()
    return sorted({0, rows - 1, *chosen})
