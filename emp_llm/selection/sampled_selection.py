"""Weights sampled so that their sums are kept on average, as many as the rule keeps.

What a difference to a base does to a model is a sum over all its weights. Keeping the largest ones
makes that sum too small; keeping some at random, divided by their share (DARE, arXiv 2311.03099),
is right on average, and far off for a few large ones. Priority sampling (Duffield, Lund, Thorup,
"Priority sampling for estimation of arbitrary subset sums", J. ACM 54(6), 2007) keeps exactly k of
N, is right on average, and errs about as little as any k can:

    q_i = |w_i| / u_i, u_i uniform in (0, 1];  τ = the (k + 1)-th largest q
    kept: q_i > τ, as sign(w_i) · max(|w_i|, τ)

u_i is a hash of the tensor's name, the row and the column, so that it depends on nothing else.
"""

import threading
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import xxhash
from emp_kernels.dispatch import count_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.rows import Patterns, Rule, Threshold, Workspace

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.selection.selection import Rows, Selection
from emp_llm.tensors.bit_patterns import as_float32, from_float32
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["SampledSelection", "sample_row_block"]

_AT_ONCE = 1 << 16  # weights, whose hashes stay in one core's cache
_ALL_BUT_ZEROS = Threshold(0, 0)


class SampledSelection(Selection):
    """As many weights of each row as the rule keeps, sampled.

    Args:
        beta: The rule's multiplier.
    """

    def __init__(self, beta: float) -> None:
        super().__init__(beta, {}, {})
        self._sums: dict[tuple[str, RowBlock], npt.NDArray[np.float64]] = {}
        self._lock = threading.Lock()

    @property
    def is_bounded(self) -> bool:
        """No: others than the largest weights may be kept."""
        return False

    def rule(self, _target: Target, _block: RowBlock) -> Rule:
        """What to keep of rows that were read: those that are sampled are not zero."""
        return _ALL_BUT_ZEROS

    def read(
        self, target: Target, file: SourceFile, block: RowBlock, workspace: Workspace
    ) -> Patterns:
        """Read a row block and sample from it: what is not kept is +0.0.

        Raises:
            CheckpointError: If it cannot be read or holds NaN or infinity.
        """
        weights = super().read(target, file, block, workspace)
        number_format = target.geometry.number_format
        try:
            kept_R = count_rows(weights, number_format, [self.beta]).kept[:, 0]
        except NonFiniteRowError as error:
            raise target.not_finite(block, error) from error
        values_RC = as_float32(weights, number_format)
        sums = sample_row_block(values_RC, kept_R, target.name, target.geometry.first_row(block))
        with self._lock:
            self._sums[target.name, block] = sums
        weights[:] = from_float32(values_RC, number_format)
        return weights

    def with_score_sums(self, target: Target, block: RowBlock, rows: Rows) -> Rows:
        """The statistics of a row block, with sums of the weights before they were sampled."""
        with self._lock:
            return replace(rows, stats=self._sums.pop((target.name, block)))


def sample_row_block(
    values_RC: npt.NDArray[np.float32], kept_R: npt.NDArray[np.int64], name: str, first_row: int
) -> npt.NDArray[np.float64]:
    """Sample from rows, in their place.

    Args:
        values_RC: The weights; those that are not kept become +0.0.
        kept_R: How many of each row to keep.
        name: The tensor's name.
        first_row: The number of the first row in it.

    Returns:
        Σ|w|, Σw² and Σ|w| of what is kept, of each row before sampling, float64 [R, 3].
    """
    rows, columns = values_RC.shape
    sums = np.empty((rows, 3))
    step = max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        uniform = _uniform(name, first_row + start, (part.stop - start, columns))
        sums[part] = _sample(values_RC[part], kept_R[part], uniform)
    return sums


def _sample(
    values_RC: npt.NDArray[np.float32],
    kept_R: npt.NDArray[np.int64],
    uniform_RC: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    magnitudes_RC = np.abs(values_RC)
    priorities_RC = magnitudes_RC / uniform_RC
    sorted_RC = np.sort(priorities_RC, axis=1)
    rows, columns = values_RC.shape
    # of a row that is kept whole no weight has to stand for others
    behind_R = np.maximum(columns - 1 - kept_R, 0)
    tau_R = np.where(kept_R < columns, sorted_RC[np.arange(rows), behind_R], np.float32(0))
    tau_R1 = tau_R[:, None]
    kept_RC = priorities_RC > tau_R1
    scores_RC = magnitudes_RC.astype(np.float64)
    sums = [scores_RC.sum(1), (scores_RC**2).sum(1), (scores_RC * kept_RC).sum(1)]
    standing_RC = np.copysign(np.maximum(magnitudes_RC, tau_R1), values_RC)
    values_RC[:] = np.where(kept_RC, standing_RC, np.float32(0))
    return np.stack(sums, axis=1)


def _uniform(name: str, first_row: int, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Numbers in (0, 1] that depend on name, row and column: SplitMix64, its upper 24 bits."""
    start = xxhash.xxh3_64_intdigest(name.encode()) + first_row * shape[1]
    bits = np.arange(shape[0] * shape[1], dtype=np.uint64) + np.uint64(start % 2**64)
    bits *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    upper = (bits >> np.uint64(40)).astype(np.float32) + np.float32(1)
    return (upper * np.float32(2**-24)).reshape(shape)
