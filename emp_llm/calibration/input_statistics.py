"""Statistics of the inputs of each target, gathered at the matrix products themselves.

Every layer, ``nn.Linear``, ``Conv1D``, experts one by one or stacked, comes down to a few kinds of
matrix products. So no module has to be known: a product is a target's if one of its factors lies in
the target's memory.

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix, T tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emp_llm.calibration.hessian import add_squares, mirror
from emp_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from emp_llm.calibration.parameter_map import ParameterMatrix
    from emp_llm.calibration.statistics import Need, Statistics

__all__ = [
    "AllObservedError",
    "Gathering",
    "ProductObserver",
    "UnsharedInputsError",
    "UntilAllObserved",
]

_TOKENS = 256
"""Tokens that are converted to float64 at a time."""

_aten = torch.ops.aten
_PRODUCTS: dict[object, int] = {
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.mv.default: 0,
    _aten.addmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten.addmv.default: 1,
}
"""For each kind of product, which argument is the first factor; the second one follows it."""


class ProductObserver(TorchDispatchMode):
    """Within its ``with`` statement, reports every product of a parameter.

    Args:
        parameters: Parameters by name, [R, C] or stacks of such matrices; loaded.
        observe: Called before each product with the matrix and what it is multiplied by, [T, C].
        needed: Asked after it, for a matrix that is multiplied alone: whether anything depends on
            the product. One that nothing does is not computed: zeros take its place.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        observe: Callable[[ParameterMatrix, torch.Tensor], None],
        needed: Callable[[ParameterMatrix], bool] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observe = observe
        self._needed = needed
        self._places: dict[int, list[tuple[str, torch.Tensor]]] = {}
        # by storage, for a layer may multiply by a view of its parameter, or by a part of it
        for name, parameter in parameters.items():
            place = parameter.untyped_storage().data_ptr()
            self._places.setdefault(place, []).append((name, parameter))

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        _types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Look at an operation before it runs."""
        first = _PRODUCTS.get(function)
        if first is not None:
            left, right = args[first : first + 2]
            # the parameter is the second factor in x Wᵀ, as nearly everywhere, the first in W x
            for factor, inputs in ((right, left), (left, right.mT if right.ndim > 1 else right)):
                for place in self._places.get(factor.untyped_storage().data_ptr(), ()):
                    matrix = self._report(*place, factor, inputs)
                    if matrix and self._needed and not self._needed(matrix):
                        shape = (*left.shape[:-1], *right.shape[1:])
                        return left.new_zeros(shape)
        return function(*args, **kwargs or {})

    def _report(
        self, name: str, parameter: torch.Tensor, factor: torch.Tensor, inputs: torch.Tensor
    ) -> ParameterMatrix | None:
        """Report a product with matrices of a parameter; returns the matrix if it is one alone."""
        # which matrices of the parameter the factor is, by where it lies in the parameter's memory
        matrix_size = parameter.stride(0) if parameter.ndim == 3 else parameter.numel()
        first = factor.storage_offset() - parameter.storage_offset()
        if not 0 <= first < parameter.numel():
            return None
        # a matrix that is expanded to a stack has stride 0: all products are with the same one
        step, stack = (factor.stride(0), inputs) if factor.ndim == 3 else (0, inputs.unsqueeze(0))
        for number, x in enumerate(stack):
            matrix = (first + number * step) // matrix_size
            self._observe((name, matrix), x.reshape(-1, x.shape[-1]))
        return (name, first // matrix_size) if factor.ndim == 2 else None


class AllObservedError(BaseException):
    """There is nothing more to observe. It is no `Exception`, so no model's code catches it."""


class UntilAllObserved:
    """Observes products, and ends the run of a sample before the last of them is computed.

    Args:
        observe: Called with each matrix and what it is multiplied by.
        gathering: Tells which matrices there are to observe, and how often a sample multiplies
            each. As long as it does not know that, samples run to the end.

    Attributes:
        last: What the last matrix was multiplied by.
    """

    def __init__(
        self, observe: Callable[[ParameterMatrix, torch.Tensor], None], gathering: Gathering
    ) -> None:
        self.last: torch.Tensor | None = None
        self._observe = observe
        self._gathering = gathering
        self._times = gathering.times_a_sample
        self._left = Counter(self._times)

    def __call__(self, matrix: ParameterMatrix, x_TC: torch.Tensor) -> None:
        """A matrix is multiplied by x_TC.

        Raises:
            AllObservedError: If it is the last one.
        """
        self._observe(matrix, x_TC)
        self._left[matrix] -= 1
        if self._times is not None and all(self._left[one] <= 0 for one in self._times):
            self.last = x_TC
            raise AllObservedError

    def needs(self, matrix: ParameterMatrix) -> bool:
        """Whether anything that is still to be observed can depend on a matrix's product.

        What shares the matrix's inputs does not, and if it does not share them after all, the
        gathering finds out.
        """
        if self._times is None or matrix not in self._times:
            return True
        leader = self._gathering.leader
        return any(self._left[one] > 0 and leader(one) != leader(matrix) for one in self._times)


@dataclass
class _Inputs:
    """Sums over the inputs x of one matrix, so far.

    Attributes:
        tokens: How many inputs there were.
        squares_C: float64 [C], Σ x².
        sums_C: float64 [C], Σ x.
        hessian_CC: float32 [C, C], Σ x xᵀ, as `add_squares` leaves it.
        gap_CC: float32 [C, C], Σ (d - x) xᵀ over inputs of paired samples, where d is the input
            that the dense model has in place of x; None where it is not known for each of them.
        gap_tokens: How many inputs of paired samples there were.
    """

    tokens: int = 0
    squares_C: torch.Tensor | None = None
    sums_C: torch.Tensor | None = None
    hessian_CC: torch.Tensor | None = None
    gap_CC: torch.Tensor | None = None
    gap_tokens: int = 0

    def add(self, x_TC: torch.Tensor, needs: Collection[Need]) -> None:
        """Add inputs, [T, C] of any floating-point dtype."""
        self.tokens += len(x_TC)
        columns = x_TC.shape[1]
        if "norms" in needs or "means" in needs:
            if self.squares_C is None or self.sums_C is None:
                self.squares_C, self.sums_C = x_TC.new_zeros((2, columns), dtype=torch.float64)
            # in float64, so that the sums hardly depend on their order; a few tokens at a time
            for start in range(0, len(x_TC), _TOKENS):
                exact_TC = x_TC[start : start + _TOKENS].double()
                self.sums_C += exact_TC.sum(dim=0)
                self.squares_C += exact_TC.square_().sum(dim=0)
        if "hessian" in needs:
            if self.hessian_CC is None:
                self.hessian_CC = x_TC.new_zeros((columns, columns), dtype=torch.float32)
            add_squares(self.hessian_CC, x_TC.float())

    def add_gap(self, x_TC: torch.Tensor, dense_TC: torch.Tensor | None) -> None:
        """Add inputs of a paired sample and those of the dense model in their place, if known."""
        first = not self.gap_tokens
        self.gap_tokens += len(x_TC)
        if dense_TC is None:
            self.gap_CC = None
        elif first:
            self.gap_CC = _gap(dense_TC, x_TC).float()
        elif self.gap_CC is not None:
            self.gap_CC.add_(_gap(dense_TC, x_TC))


def _gap(dense_TC: torch.Tensor, x_TC: torch.Tensor) -> torch.Tensor:
    """Σ_t (d_t - x_t) x_tᵀ of some tokens, [C, C]: float32, or bfloat16 if the inputs are."""
    if x_TC.dtype == torch.bfloat16:
        # half of the time, and an error of 2⁻⁹ of what is small beside Σ_t x_t x_tᵀ
        return (dense_TC - x_TC).T @ x_TC
    single_TC = x_TC.float()
    return (dense_TC.float() - single_TC).T @ single_TC


class UnsharedInputsError(Exception):
    """Matrices that had the same inputs before have different ones now: gather each by itself."""


class Gathering:
    """Statistics of what each matrix is multiplied by, over all samples.

    Matrices that are multiplied by the very same inputs one after the other, as the gate and up
    projections of an MLP are, share their statistics: those of the first one, their *leader*, are
    gathered. A Hessian of 14,336 inputs is 822 MB, and as much work again.

    Args:
        matrices: The matrices; products of others are ignored.
        needs: Which statistics to gather.
        tokens: Tokens of a sample.
        shared: Whether matrices may share statistics.

    Attributes:
        times_a_sample: How often a sample multiplies each matrix, once the first one has shown it;
            None if that one did not come to all of them, as to experts.
    """

    def __init__(
        self,
        matrices: Collection[ParameterMatrix],
        needs: Collection[Need],
        tokens: int,
        *,
        shared: bool,
    ) -> None:
        self._matrices = frozenset(matrices)
        self._needs = needs
        self._tokens = tokens
        self._shared = shared
        self._inputs: dict[ParameterMatrix, _Inputs] = {}
        self._leaders: dict[ParameterMatrix, ParameterMatrix] = {}
        self.times_a_sample: Counter[ParameterMatrix] | None = None
        self._before: Counter[ParameterMatrix] | None = None
        self._times: Counter[ParameterMatrix] = Counter()
        self._last: tuple[ParameterMatrix, torch.Tensor, bool] | None = None
        self._dense: dict[ParameterMatrix, list[torch.Tensor]] = {}

    def begin(self) -> None:
        """All samples are about to come to the matrices, the first one first."""
        self.times_a_sample, self._before = None, self._times.copy()

    def observe_dense(self, matrix: ParameterMatrix, dense_TC: torch.Tensor) -> None:
        """In the dense model, the matrix is multiplied by dense_TC; called before `observe`."""
        if matrix in self._matrices:
            self._dense.setdefault(matrix, []).append(dense_TC)

    def observe(self, matrix: ParameterMatrix, x_TC: torch.Tensor) -> None:
        """A matrix is multiplied by x_TC; for `ProductObserver`.

        Raises:
            UnsharedInputsError: If statistics cannot be shared any longer.
        """
        if matrix not in self._matrices:
            return
        same = self._shared and self._last is not None and _is_same(self._last[1], x_TC)
        if same and self._last is not None:
            leader, _, fresh = self._last
        else:
            leader, fresh = matrix, matrix not in self._leaders
            # held until the next product, so that no other tensor gets its memory and looks alike
            self._last = leader, x_TC, fresh
        # a matrix shares from its first product on, which is its leader's first as well, or never:
        # otherwise the leader would have inputs that the matrix has not had
        known = self._leaders.get(matrix)
        if known is None and not fresh:
            leader = matrix  # the other one has more inputs already
        elif known is not None and known != leader:
            if leader != matrix and known == matrix:
                leader = matrix
            else:
                raise UnsharedInputsError
        self._leaders[matrix] = leader
        self._times[matrix] += 1
        if leader == matrix:
            inputs = self._inputs.setdefault(matrix, _Inputs())
            inputs.add(x_TC, self._needs)
            # of a sample in one lane only there is no dense input, which says nothing of the others
            if "hessian" in self._needs and (self._dense or len(x_TC) != self._tokens):
                inputs.add_gap(x_TC, self._counterpart(matrix, x_TC))

    def _counterpart(self, matrix: ParameterMatrix, x_TC: torch.Tensor) -> torch.Tensor | None:
        """The dense model's inputs in place of these, if they are known to be of the same tokens.

        For experts, which get some tokens only, they are not: the router may choose others.
        """
        waiting = self._dense.get(matrix)
        dense_TC = waiting.pop(0) if waiting else None
        same = dense_TC is not None and dense_TC.shape == x_TC.shape
        return dense_TC if same and len(x_TC) == self._tokens else None

    def forget_last(self) -> None:
        """Release the inputs that are held; to be called after each sample.

        Raises:
            UnsharedInputsError: If statistics cannot be shared any longer.
        """
        self._last = None
        self._dense.clear()
        if self._before is not None:
            times, self._before = self._times - self._before, None
            self.times_a_sample = times if self._matrices <= times.keys() else None
        # a matrix that was multiplied more often than its leader, or less often, had other inputs
        if any(
            self._times[matrix] != self._times[leader] for matrix, leader in self._leaders.items()
        ):
            raise UnsharedInputsError

    def seen(self) -> list[ParameterMatrix]:
        """The matrices that were multiplied, in the order of their first products."""
        return list(self._times)

    def leader(self, matrix: ParameterMatrix) -> ParameterMatrix:
        """The matrix whose statistics a matrix shares; itself, if it was not multiplied yet."""
        return self._leaders.get(matrix, matrix)

    def tensors(self) -> list[torch.Tensor]:
        """The sums, which can wait elsewhere between two uses of the matrices."""
        sums = (
            (inputs.squares_C, inputs.sums_C, inputs.hessian_CC, inputs.gap_CC)
            for inputs in self._inputs.values()
        )
        return [tensor for some in sums for tensor in some if tensor is not None]

    def statistics(self, matrix: ParameterMatrix, known: Statistics) -> Statistics:
        """The statistics of a matrix, on the device where they were gathered.

        Args:
            matrix: The matrix.
            known: What is known of it without data.

        Raises:
            CheckpointError: If sums of products of inputs are too large for float32.
        """
        inputs = self._inputs.get(self.leader(matrix), _Inputs())
        squares_C, sums_C, needs = inputs.squares_C, inputs.sums_C, self._needs
        for sums_CC in (inputs.hessian_CC, inputs.gap_CC):
            if sums_CC is not None and not torch.isfinite(sums_CC).all():
                raise CheckpointError(
                    f"{known.tensor!r}: inputs of its layer are so large that sums of their "
                    "products overflow float32: choose a criterion and repair that need none, such "
                    "as wanda without repair, or another text"
                )
        if inputs.hessian_CC is not None:
            mirror(inputs.hessian_CC)
        if inputs.gap_CC is not None and inputs.gap_tokens < inputs.tokens:
            inputs.gap_CC.mul_(inputs.tokens / inputs.gap_tokens)  # as if all samples were paired
            inputs.gap_tokens = inputs.tokens
        return replace(
            known,
            tokens=inputs.tokens,
            norms_C=squares_C.sqrt() if squares_C is not None and "norms" in needs else None,
            means_C=sums_C / inputs.tokens if sums_C is not None and "means" in needs else None,
            hessian_CC=inputs.hessian_CC,
            gap_CC=inputs.gap_CC,
        )


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same memory, which nobody has written to in between."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one._version == other._version
    )
