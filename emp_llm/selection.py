"""Which weights of each block stay: at once for rows, from streamed histograms for larger groups.

`row`     every block decides by itself.
`layer`   each matrix is a group: a pass of exact histograms gives its count and threshold.
`model`   all targets are one group: their histograms are added up.

Where not all weights that equal the threshold stay, another pass counts them block by block, for
the first ones stay: within a tensor in row-major order, among tensors in the order of their names.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from emp_kernels.counting import exact_count
from emp_kernels.dispatch import PerRow, Threshold, Workspace
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.histogram import (
    BlockHistogram,
    MagnitudeHistogram,
    count_equal,
    count_low_parts,
    native_threshold,
)
from emp_kernels.numbers import F32

from emp_llm.files import OpenFiles
from emp_llm.geometry import Block
from emp_llm.options import PruneOptions
from emp_llm.pipeline import Advance, Piece, run_pieces
from emp_llm.source_file import SourceFile
from emp_llm.tally import Group
from emp_llm.target import Target

__all__ = ["Selection", "passes", "select"]

Counts = npt.NDArray[np.int64]
Matrix = tuple[str, int]
"""A tensor's name and the number of a matrix in it."""


@dataclass(frozen=True)
class Selection:
    """The decisions for all targets.

    Attributes:
        beta: The rule's multiplier.
        groups: The groups that each tensor's matrices belong to, in order; empty with `row`.
        thresholds: Threshold and the ties it keeps of each block, by tensor; empty with `row`.
    """

    beta: float
    groups: Mapping[str, Sequence[Group]]
    thresholds: Mapping[str, Sequence[Threshold]]

    def rule(self, name: str, number: int) -> PerRow | Threshold:
        """What to keep of a tensor's block with this number."""
        return self.thresholds[name][number] if self.thresholds else PerRow(self.beta)


def passes(options: PruneOptions) -> int:
    """How many times the targets are read before they are pruned, at most, float32 aside."""
    return 0 if options.granularity == "row" else 2


def select(
    targets: Iterable[Target],
    options: PruneOptions,
    files: OpenFiles,
    *,
    threads: int,
    progress: Advance | None = None,
) -> Selection:
    """Decide what to keep, reading the targets as often as the granularity asks for.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
    """
    if options.granularity == "row":
        return Selection(options.beta, {}, {})
    ordered = sorted(targets, key=lambda target: target.name)
    matrices = [(target.name, m) for target in ordered for m in range(target.geometry.matrices)]
    together = options.granularity == "model"
    group_of = {matrix: matrices[0] if together else matrix for matrix in matrices}
    survey = _Survey(ordered, group_of, files, threads, progress)
    searches = survey.histograms(options.beta)
    survey.low_parts(searches)
    ties = survey.ties(searches)
    return Selection(
        options.beta,
        {
            target.name: [
                searches[group_of[target.name, m]].group for m in range(target.geometry.matrices)
            ]
            for target in ordered
        },
        ties,
    )


class _Search:
    """The threshold of one group, narrowed down pass by pass.

    Attributes:
        group: The group's figures.
        bin: The bin that its threshold lies in.
        found: Float32 key of the k-th largest magnitude, how many ties it keeps, and of how many;
            None while float32 weights of the bin are still to be added.
    """

    def __init__(self, histogram: MagnitudeHistogram, beta: float) -> None:
        size = histogram.size
        s1, s2 = histogram.sums()
        kept = exact_count(s1, s2, size, beta)
        self.group = Group(float(s1 * s1 / s2) if s2 else 0.0, size, float(s1))
        self.bin = F32.infinity >> 16
        self.found: tuple[int, int, int] | None = None
        if not kept:
            self.found = F32.infinity, 0, 0
            return
        self.bin, self._rank = histogram.find_bin(kept)
        known, incomplete = histogram.low_parts(self.bin)
        # thousands of groups are searched at once: what is all zeros need not be held
        self._counts: Counts | None = known if known.any() or not incomplete else None
        if not incomplete:
            self.conclude()

    def add(self, counts: Counts) -> None:
        """Add the low parts of float32 weights in the bin."""
        self._counts = counts if self._counts is None else self._counts + counts

    def conclude(self) -> None:
        """All weights of the bin are known: find the threshold among them."""
        assert self._counts is not None  # noqa: S101 (the bin was chosen for its weights)
        reaching = np.cumsum(self._counts[::-1])
        place = int(np.searchsorted(reaching, self._rank))
        low = len(reaching) - 1 - place
        tied = int(self._counts[low])
        above = int(reaching[place]) - tied
        self.found = self.bin << 16 | low, self._rank - above, tied
        self._counts = None


class _Survey:
    """Passes over all targets that gather something of every block."""

    def __init__(
        self,
        targets: Sequence[Target],
        group_of: Mapping[Matrix, Matrix],
        files: OpenFiles,
        threads: int,
        progress: Advance | None,
    ) -> None:
        self._targets = targets
        self._group_of = group_of
        self._files = files
        self._threads = threads
        self._progress = progress

    def histograms(self, beta: float) -> dict[Matrix, _Search]:
        """The first pass: counts and bins of all groups."""
        open_groups: dict[Matrix, MagnitudeHistogram] = {}
        searches: dict[Matrix, _Search] = {}
        last = {group: matrix for matrix, group in self._group_of.items()}

        def gather(target: Target, block: Block, counted: BlockHistogram) -> None:
            matrix = (target.name, block.matrix)
            group = self._group_of[matrix]
            open_groups.setdefault(group, MagnitudeHistogram()).add(counted)
            if last[group] == matrix and block.stop == target.geometry.matrix_rows:
                searches[group] = _Search(open_groups.pop(group), beta)

        self._run(
            self._targets, lambda t, _, w: BlockHistogram(w, t.geometry.number_format), gather
        )
        return searches

    def low_parts(self, searches: Mapping[Matrix, _Search]) -> None:
        """For float32 weights: the lower bits of those in each group's bin."""
        targets = [t for t in self._targets if t.geometry.number_format is F32]
        matrices = [(t.name, m) for t in targets for m in range(t.geometry.matrices)]
        last = {self._group_of[matrix]: matrix for matrix in matrices}

        def search(target: Target, block: Block) -> _Search:
            return searches[self._group_of[target.name, block.matrix]]

        def gather(target: Target, block: Block, counts: Counts | None) -> None:
            if counts is None:
                return
            sought, matrix = search(target, block), (target.name, block.matrix)
            sought.add(counts)
            if last[self._group_of[matrix]] == matrix and block.stop == target.geometry.matrix_rows:
                sought.conclude()

        self._run(
            targets,
            lambda t, b, w: count_low_parts(w, search(t, b).bin),
            gather,
            unless=lambda t, b: search(t, b).found is not None,
        )

    def ties(self, searches: Mapping[Matrix, _Search]) -> dict[str, list[Threshold]]:
        """The last pass: how many of the weights that equal the threshold stay in each block."""
        found = {group: search.found for group, search in searches.items() if search.found}
        left = {group: ties for group, (_, ties, _) in found.items()}
        thresholds: dict[str, list[Threshold]] = {target.name: [] for target in self._targets}

        def native(target: Target, block: Block) -> tuple[Matrix, int, bool]:
            group = self._group_of[target.name, block.matrix]
            return group, *native_threshold(target.geometry.number_format, found[group][0])

        def needless(target: Target, block: Block) -> bool:
            group, _, exact = native(target, block)
            _, ties, tied = found[group]
            return not exact or ties in (0, tied)

        def gather(target: Target, block: Block, equal: int | None) -> None:
            group, key, exact = native(target, block)
            if equal is None:  # all of the ties stay, or none
                stay = target.geometry.block_bytes(block) if exact and left[group] else 0
            else:
                stay = min(equal, left[group])
                left[group] -= stay
            thresholds[target.name].append(Threshold(key, stay))

        self._run(
            self._targets,
            lambda t, b, w: count_equal(w, t.geometry.number_format, native(t, b)[1]),
            gather,
            unless=needless,
        )
        return thresholds

    def _run(
        self,
        targets: Iterable[Target],
        examine: Callable[[Target, Block, Any], Any],
        gather: Callable[[Target, Block, Any], None],
        unless: Callable[[Target, Block], bool] = lambda _t, _b: False,
    ) -> None:
        def look(target: Target, block: Block, file: SourceFile, workspace: Workspace) -> Any:  # noqa: ANN401
            weights = target.read(file, block, workspace)
            try:
                return examine(target, block, weights)
            except NonFiniteRowError as error:
                raise target.not_finite(block, error) from error

        def pieces() -> Iterator[Piece]:
            for target in targets:
                file = self._files.file(target.shard)
                for block in target.geometry.blocks():
                    settle = partial(gather, target, block)
                    if unless(target, block):
                        yield Piece.note(partial(settle, None))
                    else:
                        nbytes = target.geometry.block_bytes(block)
                        yield Piece(nbytes, partial(look, target, block, file), settle)

        run_pieces(
            pieces(),
            threads=self._threads,
            progress=self._progress,
            abandon=self._files.abandon,
        )
