"""Chooses neurons and groups of heads as samples reach them, and repairs what reads them.

A *reader* is the matrix whose inputs are the outputs of a holder's structures: the down projection
reads neurons, the output projection reads heads. A structure is gone once its columns there are
zero: so the rest of the model gets the smaller model's outputs before any tensor is cut.

Shapes in names: R rows (outputs) and C columns (inputs) of a reader, S structures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from emp_llm.calibration.freed_memory import give_back
from emp_llm.calibration.repair import LeastSquares
from emp_llm.calibration.sinks import is_stored, stage_key
from emp_llm.calibration.target_pruner import read_matrix
from emp_llm.errors import CheckpointError
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.columns import columns_of, contributions, least_error, refitted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emp_llm.calibration.statistics import Statistics, StatisticsOf
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.selection.mask_writer import MaskWriter
    from emp_llm.shrink_options import WidthScore
    from emp_llm.shrinking.choice import KindName
    from emp_llm.tensors.target import Target

__all__ = ["ColumnSink", "Reader"]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The matrix that reads the structures of one holder.

    Attributes:
        target: The matrix.
        kind: What the structures are.
        holder: What holds them, see `emp_llm.shrinking.choice.Structures.holders`.
        number: S, how many there are; each one's outputs are as many columns, in order.
    """

    target: Target
    kind: KindName
    holder: str
    number: int

    @property
    def width(self) -> int:
        """Columns of a structure."""
        return self.target.geometry.columns // self.number


class ColumnSink:
    """Chooses structures, and repairs their readers; both go to a store.

    Args:
        store: The store.
        readers: All readers, by the names of their tensors.
        units: The targets of each unit.
        files: The checkpoint's files.
        device: Where scores and repairs are computed.
        keep: How many structures of each kind stay in each holder.
        score: How structures are ranked.
        repair: Whether readers are fitted anew to what stays.
    """

    def __init__(
        self,
        store: MaskStore,
        readers: Mapping[str, Reader],
        units: Mapping[str, Sequence[Target]],
        files: OpenFiles,
        device: torch.device,
        *,
        keep: Mapping[KindName, int],
        score: WidthScore,
        repair: bool,
    ) -> None:
        self._store = store
        self._readers = readers
        self._units = units
        self._files = files
        self._device = device
        self._keep = keep
        self._score = score
        self._repair = repair

    def has(self, unit: str, stage: int | None = None) -> bool:
        """Whether the choices of a unit, or of one stage of it, are stored, whole."""
        return is_stored(
            self._store,
            unit,
            stage,
            lambda: all(self._found(target.name) for target in self._units[unit]),
        )

    def process(
        self,
        unit: str,
        targets: Sequence[Target],
        statistics_of: StatisticsOf,
        stage: int | None = None,
    ) -> None:
        """Choose the structures of some readers, and store the choices and repaired weights.

        Raises:
            CheckpointError: If a reader cannot be read or fitted.
            OSError: If the result cannot be written.
        """
        with self._store.writer(unit if stage is None else stage_key(unit, stage)) as writer:
            for target in targets:
                self._choose(self._readers[target.name], statistics_of(target, 0), writer)
                give_back()

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint as it is by now; the given one may be changed in place.

        Of a reader, columns of structures that are gone are zero.
        """
        if (found := self._found(name)) is None:
            return tensor
        reader = self._readers[name]
        stays_S = torch.zeros(reader.number, dtype=torch.bool)
        stays_S[found["kept"]] = True
        stays_C = columns_of(stays_S, reader.width)
        # rows are those of the file if it has them [out, in]
        tensor_RC = tensor.mT if reader.target.geometry.transposed else tensor
        tensor_RC.masked_fill_(~stays_C, 0)
        if (data := self._store.replaced(name)) is not None:
            cut = torch.frombuffer(data, dtype=tensor.dtype)
            shape = tensor_RC[:, stays_C].shape
            turned = reader.target.geometry.transposed
            tensor_RC[:, stays_C] = cut.view(shape[::-1]).mT if turned else cut.view(shape)
        return tensor

    def choices(self) -> list[Choice]:
        """The choice of each kind, once all readers are processed."""
        by_kind: dict[KindName, list[Reader]] = {}
        for reader in self._readers.values():
            by_kind.setdefault(reader.kind, []).append(reader)
        return [self._choice(kind, readers) for kind, readers in by_kind.items()]

    def _choice(self, kind: KindName, readers: Sequence[Reader]) -> Choice:
        found = {reader.holder: self._store.notes[_note(reader)] for reader in readers}
        return Choice(
            kind=kind,
            kept={holder: tuple(one["kept"]) for holder, one in found.items()},
            score=self._score,
            scores={holder: tuple(one["scores"]) for holder, one in found.items()},
        )

    def _found(self, name: str) -> dict[str, list[int]] | None:
        reader = self._readers.get(name)
        return None if reader is None else self._store.notes.get(_note(reader))

    def _choose(self, reader: Reader, statistics: Statistics, writer: MaskWriter) -> None:
        _, weight_RC = read_matrix(reader.target, 0, self._files, self._device)
        kept_S, scores_S = self._ranked(reader, weight_RC, statistics)
        kept = kept_S.nonzero()[:, 0].tolist()
        writer.note(_note(reader), {"kept": kept, "scores": scores_S.tolist()})
        if not self._repair or len(kept) == reader.number:
            return
        squares = _squares(reader, weight_RC, statistics, statistics.tokens)
        kept_C = columns_of(kept_S, reader.width)
        repaired_RK = refitted(squares, kept_C)[:, kept_C]
        # an overflow in float16 leaves the weights as they are
        if (data := _stored(reader.target, repaired_RK)) is not None:
            writer.replace(reader.target.name, data)

    def _ranked(
        self, reader: Reader, weight_RC: torch.Tensor, statistics: Statistics
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which structures stay, bool [S], and their scores, float64 [S]."""
        keep = self._keep[reader.kind]
        if self._score == "obs":
            # damped as little with few tokens as with many: what would go is not fitted to them,
            # and a larger λ ranks columns that are seldom active by their weights alone
            squares = _squares(reader, weight_RC, statistics, None)
            return least_error(squares, reader.number, keep)
        scores_S = self._scores(reader, weight_RC, statistics)
        kept_S = torch.zeros(reader.number, dtype=torch.bool)
        # between equal scores the first ones stay
        kept_S[scores_S.argsort(descending=True, stable=True)[:keep]] = True
        return kept_S, scores_S

    def _scores(
        self, reader: Reader, weight_RC: torch.Tensor, statistics: Statistics
    ) -> torch.Tensor:
        if self._score == "activation":
            return contributions(weight_RC, _hessian(reader, statistics), reader.number)
        if self._score == "magnitude":
            norms_C = weight_RC.square().sum(0, dtype=torch.float64)
            return norms_C.view(reader.number, -1).sum(1).sqrt()
        generator = np.random.default_rng([statistics.seed, *reader.target.name.encode()])
        return torch.from_numpy(generator.random(reader.number))


def _hessian(reader: Reader, statistics: Statistics) -> torch.Tensor:
    """The Hessian of a reader.

    Raises:
        CheckpointError: If no token has come to the reader.
    """
    if statistics.hessian_CC is None:
        raise CheckpointError(
            f"{reader.target.name!r}: no token of the calibration text comes to it, so nothing is "
            f"known of its {reader.kind}: give more samples"
        )
    return statistics.hessian_CC


def _squares(
    reader: Reader, weight_RC: torch.Tensor, statistics: Statistics, tokens: int | None
) -> LeastSquares:
    """What the rows of a reader are to minimize.

    Raises:
        CheckpointError: If no token has come to the reader.
    """
    hessian_CC = _hessian(reader, statistics)
    return LeastSquares.of(weight_RC, hessian_CC, statistics.gap_CC, tokens=tokens)


def _note(reader: Reader) -> str:
    return f"kept, {reader.target.name}"


def _stored(target: Target, weight_RK: torch.Tensor) -> bytes | None:
    """New weights as they would lie in the target's file; None if some would not be finite."""
    stored_RK = weight_RK.cpu().to(target.geometry.number_format.torch_dtype)
    if not torch.isfinite(stored_RK).all():
        return None
    stored = stored_RK.mT if target.geometry.transposed else stored_RK
    return stored.contiguous().view(torch.uint8).numpy().tobytes()
