"""Sparsity, bytes and retained mass at many β, from one pass over the weights.

A row's N_eff does not depend on β, so the sums of a row give its counts at all β; sorting it once
gives the bytes that it would have, packed, at each of them.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import count_rows, sweep_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Patterns, RowStatistics, Workspace

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.pruning.target_job import TargetJob
from emp_llm.report.fields import Curve
from emp_llm.report.tensor_statistics import digits
from emp_llm.report.totals import TargetCurve, curve_totals
from emp_llm.runtime.pipeline import Write
from emp_llm.selection.selection import Selection
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.layout_choice import choose_layouts, sample_rows
from emp_llm.tensors.packed import PackedTensor, padding
from emp_llm.tensors.target import Target

__all__ = ["CurveJob", "CurveRows", "build_curve", "grid"]

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_STEPS = (
    *(0.05, 0.1, 0.2, 0.25, 0.3, 0.4),
    *(i / 20 for i in range(10, 27)),
    *(1.4, 1.5, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0),
)
"""Close together where β is usually chosen; Gaussian weights are all kept from π/2 on."""


def grid(beta: float) -> tuple[float, ...]:
    """The values of β that a curve is computed for: usual ones and this one, then infinity.

    They ascend. Infinity stands for the least β that keeps all rows whole, which is not known yet.
    """
    return (*sorted({*_STEPS, beta}), math.inf)


@dataclass(frozen=True)
class CurveRows(RowStatistics):
    """What was decided for a row block at one β, and its totals at P values of β.

    Attributes:
        kept: int64 [P], weights that stay.
        kept_mass: float64 [P], Σ|w| of them.
        record_bytes: int64 [P], bytes of the rows' records.
    """

    kept: Counts
    kept_mass: Floats
    record_bytes: Counts


class CurveJob(TargetJob[CurveRows]):
    """Finds what packing a target would give at every β, and writes nothing; rows are groups.

    Args:
        target: The tensor.
        file: Its file.
        selection: What to keep.

    Attributes:
        betas: The values of β.
        kept: int64 [P], weights that stay at each.
        kept_mass: float64 [P], Σ|w| of them.
        nbytes: int64 [P], bytes of all planes, once all is settled.
        least_fraction: The smallest N_eff / N of any row that is not all zeros; infinity if there
            is none.
    """

    def __init__(self, target: Target, file: SourceFile, selection: Selection) -> None:
        super().__init__(target, file, selection)
        self.betas = grid(selection.beta)
        self.kept = np.zeros(len(self.betas), np.int64)
        self.kept_mass = np.zeros(len(self.betas))
        self.nbytes = np.zeros(len(self.betas), np.int64)
        self.least_fraction = math.inf
        self._asked = self.betas.index(selection.beta)
        self._layouts: list[RowLayout] = []
        self._deciding = threading.Lock()

    def compute(self, _block: RowBlock, weights: Patterns, _workspace: Workspace) -> CurveRows:
        """Counts of a row block at every β, and their totals."""
        layouts = self._decide_layouts()
        counts = count_rows(weights, self.target.geometry.number_format, self.betas)
        swept = sweep_rows(weights, counts.kept, layouts)
        asked = counts.kept[:, self._asked], swept.escaped[:, self._asked]
        return CurveRows(
            # the bases of the windows, which nobody asks a curve for, are left 0
            table=np.stack([*asked, np.zeros_like(asked[0])], axis=1),
            stats=np.column_stack([counts.stats, swept.kept_mass[:, self._asked]]),
            kept=counts.kept.sum(axis=0),
            kept_mass=swept.kept_mass.sum(axis=0),
            record_bytes=swept.record_bytes,
        )

    def settle(self, _block: RowBlock, rows: CurveRows) -> Write | None:
        """Add a row block up."""
        self.kept += rows.kept
        self.kept_mass += rows.kept_mass
        self.nbytes += rows.record_bytes
        s1, s2 = rows.stats[:, 0], rows.stats[:, 1]
        with_mass = s2 > 0
        if with_mass.any():
            n_eff = s1[with_mass] ** 2 / s2[with_mass]
            least = float(n_eff.min()) / self.target.geometry.columns
            self.least_fraction = min(self.least_fraction, least)
        return None

    def settle_end(self) -> tuple[int, Write | None]:
        """Bytes of all planes at the β that was asked for."""
        packed = PackedTensor(self.target.geometry, self._layouts[self._asked])
        # row table and meta have the same size in every layout
        ends = [len(padding(records)) for records in self.nbytes.tolist()]
        self.nbytes += np.array(ends) + packed.table_bytes + len(packed.encode_meta())
        return int(self.nbytes[self._asked]), None

    def curve(self, points: Sequence[int]) -> TargetCurve:
        """The target at some of the values of β, once all is settled."""
        at = list(points)
        return TargetCurve(self.statistics, self.kept[at], self.kept_mass[at], self.nbytes[at])

    def _decide_layouts(self) -> Sequence[RowLayout]:
        """The layout of the whole tensor at each β; decided once."""
        with self._deciding:
            if not self._layouts:
                geometry, workspace = self.target.geometry, Workspace()
                sample = sample_rows(
                    geometry, lambda block: self.target.read(self.file, block, workspace)
                )
                try:
                    kept = count_rows(sample, geometry.number_format, self.betas).kept
                except NonFiniteRowError:  # its own row block raises the error
                    kept = np.zeros((len(sample), len(self.betas)), np.int64)
                self._layouts = choose_layouts(sample, geometry, kept)
            return self._layouts


def build_curve(jobs: Sequence[CurveJob], kinds: Mapping[str, str]) -> Curve:
    """The curve of a report.

    Args:
        jobs: Done, one for each target.
        kinds: The kind of layer of each, by its name.

    Returns:
        ``beta``, ascending; the last one is the least, rounded up to six digits, that keeps every
        row whole that is not all zeros. For all ``targets`` and for each of ``kinds``, one number
        for each β: ``kept`` (weights), ``bytes`` (packed, as `prune` would write them),
        ``sparsity`` and ``retained_mass``.
    """
    least = min((job.least_fraction for job in jobs), default=math.inf)
    end = _rounded_up(1 / least)
    points = [p for p, beta in enumerate(jobs[0].betas) if beta < end or beta == math.inf]
    curves: list[TargetCurve] = []
    grouped: dict[str, list[TargetCurve]] = {}
    for job in jobs:
        curve = job.curve(points)
        curves.append(curve)
        grouped.setdefault(kinds[job.target.name], []).append(curve)
    return {
        "beta": [*(jobs[0].betas[p] for p in points[:-1]), end],
        "targets": curve_totals(curves),
        "kinds": {kind: curve_totals(part) for kind, part in sorted(grouped.items())},
    }


def _rounded_up(value: float) -> float:
    """A number rounded up to six significant digits."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 5)
    # a number that has six digits, but for the error of its division by unit, stays what it is
    return digits(math.ceil(value / unit * (1 - 1e-12)) * unit)
