"""How many weights each control leaves to each group, when all together keep a given number."""

from collections.abc import Callable, Sequence

import numpy as np

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.comparison.allocation import Counts, apportion, spread
from emp_llm.comparison.control_model import Choice, Scope
from emp_llm.comparison.costs import Control
from emp_llm.comparison.pq_index import power_sums, retained_bound
from emp_llm.runtime.pipeline import Advance
from emp_llm.tensors.target import Target

__all__ = ["Choices"]


class Choices:
    """How many weights of each group of some targets the controls keep.

    Args:
        targets: All of them.
        files: The files they are in; every target is read once.
        threads: Threads that read.
        progress: Called with the bytes that were read.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        files: OpenFiles,
        *,
        threads: int,
        progress: Advance | None = None,
    ) -> None:
        self._targets = sorted(targets, key=lambda target: target.name)
        sums = power_sums(self._targets, files, threads=threads, progress=progress)
        self._shares = np.concatenate(
            [retained_bound(*sums[target.name]) for target in self._targets]
        )

    def choose(self, control: Control, kept: int, seed: int | None = None) -> Choice:
        """What a control keeps.

        Args:
            control: Which one.
            kept: How many weights stay, of all targets together.
            seed: Seed of a random one.
        """
        if control == "magnitude-layer":
            return self._choice("matrix", lambda sizes: spread(kept, sizes))
        if control == "pq-index":
            return self._choice("row", lambda sizes: apportion(kept, self._shares, sizes))
        return self._choice("row", lambda sizes: spread(kept, sizes), seed)

    def _choice(
        self, scope: Scope, allot: Callable[[Counts], Counts], seed: int | None = None
    ) -> Choice:
        shapes = [target.geometry for target in self._targets]
        numbers = [shape.rows if scope == "row" else shape.matrices for shape in shapes]
        sizes = [shape.rows * shape.columns // n for shape, n in zip(shapes, numbers, strict=True)]
        counts = np.split(allot(np.repeat(sizes, numbers)), np.cumsum(numbers)[:-1])
        names = [target.name for target in self._targets]
        return Choice(scope, dict(zip(names, counts, strict=True)), seed)
