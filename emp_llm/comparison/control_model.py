"""A model loaded with the weights that a control keeps, and no others.

A control differs from EMP only in which weights stay. So it is loaded as EMP's models are, by
`emp_llm.integration`: transformers asks for the targets, and each is read from its file, pruned,
cast and placed. No copy of the dense weights is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from emp_kernels.rows import Patterns
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers import auto

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.comparison.allocation import Counts
from emp_llm.integration.configs import EmpConfig
from emp_llm.integration.quantizers import PruningQuantizer
from emp_llm.loading.tensor_readers import TargetReader, TensorReader
from emp_llm.selection.ranking import keep_largest, magnitude_keys, random_keys
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["Choice", "ChoiceConfig", "Scope"]

Scope = Literal["row", "matrix"]

_METHOD = "emp_control"


@dataclass(frozen=True, eq=False)
class Choice:
    """Which weights stay.

    Attributes:
        scope: What a group is.
        counts: How many weights each group of a target keeps, by the target's name.
        seed: Seed of a random order to rank them by; None to rank them by magnitude.
    """

    scope: Scope
    counts: Mapping[str, Counts]
    seed: int | None = None

    def __deepcopy__(self, _memo: object) -> "Choice":
        return self


class ChoiceConfig(EmpConfig):
    """Prunes a model as a control does, while it is loaded; for `from_pretrained`, as `EmpConfig`.

    Args:
        choice: Which weights stay.
        targets: As for `EmpConfig`.
        ignore: As for `EmpConfig`.
    """

    def __init__(self, choice: Choice, *, targets: str, ignore: Sequence[str]) -> None:
        super().__init__(targets=targets, ignore=ignore)
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.choice = choice

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it: all but the counts."""
        return {name: value for name, value in self.__dict__.items() if name != "choice"}


class _ChoiceQuantizer(PruningQuantizer):
    quantization_config: ChoiceConfig

    def _open_readers(
        self, model: PreTrainedModel, conversions: list[WeightTransform]
    ) -> tuple[dict[str, TensorReader], list[str]]:
        _, planes = super()._open_readers(model, conversions)
        reader = partial(_ChoosingReader, choice=self.quantization_config.choice)
        return {
            name: reader(target, self._files.file(target.shard))
            for name, target in self._targets.items()
        }, planes


class _ChoosingReader(TargetReader):
    """A target that is pruned as a control does while it is read."""

    def __init__(self, target: Target, file: SourceFile, choice: Choice) -> None:
        super().__init__(target, file)
        self._choice = choice

    def row_blocks(self) -> Sequence[RowBlock]:
        """Row blocks, or whole matrices where these are the groups."""
        if self._choice.scope == "row":
            return super().row_blocks()
        rows = self.geometry.matrix_rows
        return [RowBlock(matrix, 0, rows) for matrix in range(self.geometry.matrices)]

    def _prune(self, rows: Patterns, block: RowBlock, *_: object, **__: object) -> None:
        by_row = self._choice.scope == "row"
        groups = rows if by_row else rows.reshape(1, -1)
        first = self.geometry.first_row(block) if by_row else block.matrix
        counts, seed = self._choice.counts[self._target.name], self._choice.seed
        for group, weights_N in enumerate(groups, start=first):
            keys = (
                magnitude_keys(weights_N, self.geometry.number_format)
                if seed is None
                else random_keys(seed, self._target.name, group, weights_N.size)
            )
            weights_N[~keep_largest(keys, int(counts[group]))] = 0


auto.register_quantization_config(_METHOD)(ChoiceConfig)
auto.register_quantizer(_METHOD)(_ChoiceQuantizer)
