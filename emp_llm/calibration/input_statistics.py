"""Statistics of what each target is multiplied by, taken off the products themselves.

Every layer comes down to a few kinds of products of matrices, whoever writes it: ``nn.Linear``,
``Conv1D``, experts one by one or stacked. So no module need be known: a product is a target's if
one of its factors lies in the target's memory.

Shapes in names: T tokens, C inputs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emp_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from emp_llm.calibration.statistics import Need, Statistics
    from emp_llm.calibration.streamed_model import Fed

__all__ = ["Gathering", "PartedError", "Products"]

_TOKENS = 256
"""Tokens that are made float64 at a time."""

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.mv.default: 0,
    _aten.addmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten.addmv.default: 1,
}
"""Of each kind of product, which argument is the first factor; the second follows it."""


class Products(TorchDispatchMode):
    """Within its ``with`` block, tells of every product with a parameter.

    Args:
        parameters: Parameters by name, [R, C] or stacks of such matrices; loaded.
        observe: Told the parameter and the number of the matrix in it, and what it is multiplied
            by, [T, C], before the product is taken.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        observe: Callable[[Fed, torch.Tensor], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observe = observe
        self._places: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, parameter in parameters.items():  # parts of one tensor have the same storage
            place = parameter.untyped_storage().data_ptr()
            self._places.setdefault(place, []).append((name, parameter))

    def __torch_dispatch__(
        self,
        function: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Look at a product before it is taken."""
        first = _PRODUCTS.get(function)
        if first is not None:
            left, right = args[first : first + 2]
            # x Wᵀ, as nearly everywhere, or W x
            for factor, inputs in ((right, left), (left, right.mT if right.ndim > 1 else right)):
                for place in self._places.get(factor.untyped_storage().data_ptr(), ()):
                    self._note(*place, factor, inputs)
        return function(*args, **kwargs or {})

    def _note(
        self, name: str, parameter: torch.Tensor, factor: torch.Tensor, inputs: torch.Tensor
    ) -> None:
        matrix_size = parameter.stride(0) if parameter.ndim == 3 else parameter.numel()
        first = factor.storage_offset() - parameter.storage_offset()
        if not 0 <= first < parameter.numel():
            return
        # of a matrix that is expanded to a stack, all are the same one
        step, stack = (factor.stride(0), inputs) if factor.ndim == 3 else (0, inputs.unsqueeze(0))
        for number, x in enumerate(stack):
            matrix = (first + number * step) // matrix_size
            self._observe((name, matrix), x.reshape(-1, x.shape[-1]))


@dataclass
class _Inputs:
    """What one matrix was multiplied by, so far.

    Attributes:
        tokens: How many inputs.
        squares_C: float64 [C], Σx².
        sums_C: float64 [C], Σx.
        hessian_CC: float32 [C, C], Σ x xᵀ.
        cross_CC: float32 [C, C], Σ d xᵀ, d being what the dense model has in x's place; None where
            that is not known of every x.
    """

    tokens: int = 0
    squares_C: torch.Tensor | None = None
    sums_C: torch.Tensor | None = None
    hessian_CC: torch.Tensor | None = None
    cross_CC: torch.Tensor | None = None

    def add(
        self, x_TC: torch.Tensor, needs: Collection[Need], dense_TC: torch.Tensor | None
    ) -> None:
        """Take in some inputs, [T, C] of any floating-point dtype, and what stood for them."""
        first = not self.tokens
        self.tokens += len(x_TC)
        columns = x_TC.shape[1]
        if "norms" in needs or "means" in needs:
            if self.squares_C is None or self.sums_C is None:
                self.squares_C, self.sums_C = x_TC.new_zeros((2, columns), dtype=torch.float64)
            for start in range(0, len(x_TC), _TOKENS):
                exact_TC = x_TC[start : start + _TOKENS].double()
                self.sums_C += exact_TC.sum(dim=0)
                self.squares_C += exact_TC.square_().sum(dim=0)
        if "hessian" in needs:
            if self.hessian_CC is None:
                self.hessian_CC = x_TC.new_zeros((columns, columns), dtype=torch.float32)
            single_TC = x_TC.float()
            self.hessian_CC.addmm_(single_TC.T, single_TC)
            if dense_TC is None:
                self.cross_CC = None
            elif first:
                self.cross_CC = dense_TC.float().T @ single_TC
            elif self.cross_CC is not None:
                self.cross_CC.addmm_(dense_TC.float().T, single_TC)


class PartedError(Exception):
    """Two matrices that had the same inputs have different ones now: gather again, unshared."""


class Gathering:
    """Gathers what each matrix is multiplied by, over all samples.

    Matrices that are multiplied by the very same inputs one after the other, as gate and up are,
    share what is gathered.

    Args:
        feeds: The matrices; others are passed over.
        needs: What is to be known of them.
        tokens: Tokens of a sample.
        shared: Whether matrices may share.
    """

    def __init__(
        self, feeds: Collection[Fed], needs: Collection[Need], tokens: int, *, shared: bool
    ) -> None:
        self._feeds = frozenset(feeds)
        self._needs = needs
        self._tokens = tokens
        self._shared = shared
        self._inputs: dict[Fed, _Inputs] = {}
        self._leaders: dict[Fed, Fed] = {}
        self._times: Counter[Fed] = Counter()
        self._last: tuple[Fed, torch.Tensor, bool] | None = None
        self._expected: dict[Fed, list[torch.Tensor]] = {}

    def expect(self, fed: Fed, dense_TC: torch.Tensor) -> None:
        """In the dense model the matrix is multiplied by this, when its turn comes."""
        if fed in self._feeds:
            self._expected.setdefault(fed, []).append(dense_TC)

    def observe(self, fed: Fed, x_TC: torch.Tensor) -> None:
        """A matrix is multiplied by x_TC; see `Products`.

        Raises:
            PartedError: If what is gathered cannot be shared any longer.
        """
        if fed not in self._feeds:
            return
        same = self._shared and self._last is not None and _is_same(self._last[1], x_TC)
        if same and self._last is not None:
            leader, _, fresh = self._last
        else:
            leader, fresh = fed, fed not in self._leaders
            # held until the next one, so that its memory is not another's meanwhile
            self._last = leader, x_TC, fresh
        known = self._leaders.get(fed)
        if known is None and not fresh:
            leader = fed  # the other one has seen more already
        elif known is not None and known != leader:
            if leader != fed and known == fed:
                leader = fed
            else:
                raise PartedError
        self._leaders[fed] = leader
        self._times[fed] += 1
        if leader == fed:
            dense_TC = self._counterpart(fed, x_TC)
            self._inputs.setdefault(fed, _Inputs()).add(x_TC, self._needs, dense_TC)

    def _counterpart(self, fed: Fed, x_TC: torch.Tensor) -> torch.Tensor | None:
        """What the dense model has in the place of inputs, if it is known to be of the same tokens.

        Of experts, which see some tokens only, it is not.
        """
        expected = self._expected.get(fed)
        dense_TC = expected.pop(0) if expected else None
        same = dense_TC is not None and dense_TC.shape == x_TC.shape
        return dense_TC if same and len(x_TC) == self._tokens else None

    def forget_last(self) -> None:
        """A sample is through: what it was given is held no longer.

        Raises:
            PartedError: If what is gathered cannot be shared any longer.
        """
        self._last = None
        self._expected.clear()
        if any(self._times[fed] != self._times[leader] for fed, leader in self._leaders.items()):
            raise PartedError

    def seen(self) -> list[Fed]:
        """The matrices that have come, in the order in which they came first."""
        return list(self._times)

    def leader(self, fed: Fed) -> Fed:
        """The matrix that a matrix shares with; itself, if it has not come yet."""
        return self._leaders.get(fed, fed)

    def statistics(self, fed: Fed, known: Statistics) -> Statistics:
        """What was found of a matrix, on the device where it was gathered.

        Args:
            fed: The matrix.
            known: What is known of it already.

        Raises:
            CheckpointError: If sums of products of inputs are too large for float32.
        """
        found = self._inputs.get(self.leader(fed), _Inputs())
        squares_C, sums_C, needs = found.squares_C, found.sums_C, self._needs
        for sums_CC in (found.hessian_CC, found.cross_CC):
            if sums_CC is not None and not torch.isfinite(sums_CC).all():
                raise CheckpointError(
                    f"{known.tensor!r}: inputs of its layer are so large that sums of their "
                    "products overflow float32: choose a criterion and repair that need none, such "
                    "as wanda without repair, or another text"
                )
        return replace(
            known,
            tokens=found.tokens,
            norms_C=squares_C.sqrt() if squares_C is not None and "norms" in needs else None,
            means_C=sums_C / found.tokens if sums_C is not None and "means" in needs else None,
            hessian_CC=found.hessian_CC,
            cross_CC=found.cross_CC,
        )


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one._version == other._version
    )
