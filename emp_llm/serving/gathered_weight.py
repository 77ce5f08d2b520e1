"""A weight that loaders fill part by part, and that stays packed where its parts are.

A server merges matrices (queries, keys and values; gate and up), pads the vocabulary, and gives
each of several processes its rows. Its loaders do so by narrowing a parameter and copying to it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from emp_llm.errors import OutputError
from emp_llm.resident.content import Content
from emp_llm.resident.packing import PackedBefore, pack_rest, pack_tensor
from emp_llm.resident.weight import PackedWeight

__all__ = ["GatheredWeight"]

aten = torch.ops.aten


class GatheredWeight(Tensor):
    """A matrix on the CPU to be filled, or some rows of one; dense to look at.

    What `copy_` puts into whole rows of it stays packed if it is. All other that is done with it
    happens in dense memory, which takes none before it is written to.

    Args:
        rows: The number of rows.
        columns: The number of columns.
        dtype: The dtype of its weights, one that can be packed.
    """

    @staticmethod
    def __new__(
        cls: type["GatheredWeight"], rows: int, columns: int, dtype: torch.dtype
    ) -> "GatheredWeight":
        """Make the tensor."""
        return Tensor._make_wrapper_subclass(cls, (rows, columns), dtype=dtype)

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._of = _Gathered(torch.empty(rows, columns, dtype=dtype, device="cpu"))
        self._first = 0

    def whole(self) -> Tensor:
        """The filled matrix: a `PackedWeight` if any part of it is packed; otherwise dense.

        Rows that are dense among packed ones are packed, too.
        """
        return self._of.whole()

    def _rows(self, first: int, rows: int) -> "GatheredWeight":
        """Some rows of it, to be filled."""
        view = GatheredWeight.__new__(GatheredWeight, rows, self.shape[1], self.dtype)
        view._of, view._first = self._of, self._first + first
        return view

    def _in_memory(self) -> Tensor:
        """Its rows in dense memory, with all that is there."""
        return self._of.settled()[self._first : self._first + self.shape[0]]

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: OpOverload,
        _types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """What torch asks of it below autograd."""
        handler = _HANDLERS.get(func.overloadpacket)
        if handler is not None and isinstance(args[0], GatheredWeight):
            made = handler(*args, **(kwargs or {}))
            if made is not None:
                return made
        dense = tree_map_only(GatheredWeight, GatheredWeight._in_memory, (args, dict(kwargs or {})))
        return func(*dense[0], **dense[1])


@dataclass(frozen=True)
class _Part:
    """Packed rows, and the first of the rows that they fill."""

    first: int
    weight: PackedWeight

    @property
    def stop(self) -> int:
        return self.first + self.weight.shape[0]


class _Gathered:
    """What all views of one gathered weight fill."""

    def __init__(self, dense: Tensor) -> None:
        self._dense = dense
        self._parts: list[_Part] = []

    def fill(self, first: int, rows: Tensor) -> None:
        """Fill rows from `first` on."""
        rows = rows.to(self._dense.dtype)
        into = self.cleared(first, first + rows.shape[0])
        if isinstance(rows, PackedWeight):
            self._parts.append(_Part(first, rows))
        else:
            into.copy_(rows)

    def cleared(self, first: int, stop: int) -> Tensor:
        """Rows in dense memory that are to be written to, whatever is there."""
        for part in [it for it in self._parts if it.first < stop and first < it.stop]:
            self._settle(part)
        return self._dense[first:stop]

    def settled(self) -> Tensor:
        """All rows in dense memory."""
        for part in tuple(self._parts):
            self._settle(part)
        return self._dense

    def _settle(self, part: _Part) -> None:
        self._parts.remove(part)
        self._dense[part.first : part.stop].copy_(part.weight.unpacked())

    def whole(self) -> Tensor:
        """All rows; see `GatheredWeight.whole`."""
        if not self._parts:
            return self._dense
        pieces: list[Tensor] = []
        at = 0
        try:
            for part in sorted(self._parts, key=lambda it: it.first):
                pieces += [*_packed(self._dense[at : part.first]), part.weight]
                at = part.stop
            pieces += _packed(self._dense[at:])
        except OutputError:  # what is not finite cannot be packed
            return self.settled()
        return torch.cat(pieces)


def _packed(rows: Tensor) -> list[PackedWeight]:
    """Dense rows, packed, as a list of one; of none if there are no rows.

    Raises:
        OutputError: If they hold NaN or infinity.
    """
    if not rows.numel():
        return []
    planes = pack_rest(rows) or pack_tensor("a weight", rows, PackedBefore(transposed=False))
    return [PackedWeight(Content.of(planes))]


def _same(weight: GatheredWeight) -> GatheredWeight:
    return weight._rows(0, weight.shape[0])


def _slice(
    weight: GatheredWeight,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> GatheredWeight | None:
    places = range(weight.shape[dim])[start:end:step]
    if dim % weight.ndim:
        return _same(weight) if places == range(weight.shape[dim]) else None
    return weight._rows(places.start, len(places)) if step == 1 else None


def _copy(weight: GatheredWeight, source: Tensor, *_: object) -> GatheredWeight | None:
    if source.shape != weight.shape:
        return None
    weight._of.fill(weight._first, source)
    return weight


def _fill(weight: GatheredWeight, value: float) -> GatheredWeight:
    weight._of.cleared(weight._first, weight._first + weight.shape[0]).fill_(value)
    return weight


def _zero(weight: GatheredWeight) -> GatheredWeight:
    return _fill(weight, 0)


def _to_copy(weight: GatheredWeight, **options: object) -> Tensor | None:
    """A twin on the meta device, which nothing is read for."""
    if options.get("device") != torch.device("meta"):
        return None
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


_HANDLERS: Final[dict[Any, Callable[..., Tensor | None]]] = {
    aten.detach: _same,
    aten.alias: _same,
    aten.slice: _slice,
    aten.copy_: _copy,
    aten.fill_: _fill,
    aten.zero_: _zero,
    aten._to_copy: _to_copy,
}
"""What fills a gathered weight or chooses rows of it; None where that needs dense memory."""
