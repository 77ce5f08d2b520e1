"""The matrices of single experts, read from a checkpoint that has them one by one or fused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from emp_kernels.rows import Workspace

from emp_llm.checkpoint.dtypes import TORCH_NAMES
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.cut_parts import cut_parts
from emp_llm.shrinking.cuts import cut_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.shrinking.choice import KindName
    from emp_llm.shrinking.cuts import Cut
    from emp_llm.shrinking.plan import ShrinkPlan

__all__ = ["ExpertMatrices"]

_EXPERTS: Final = "experts"


class ExpertMatrices:
    """Reads the matrices of experts.

    Args:
        plan: The checkpoint, and how its tensors depend on experts.
        files: The checkpoint's files.
    """

    def __init__(self, plan: ShrinkPlan, files: OpenFiles) -> None:
        self._plan = plan
        self._files = files
        self._workspace = Workspace()
        self._names: dict[str, list[str]] = {}
        for name in plan.found.matrices:
            for axis in plan.found.axes.get(name, ()):
                if axis.kind == _EXPERTS:
                    self._names.setdefault(axis.holder, []).append(name)

    def of(self, holder: str, expert: int) -> Iterator[torch.Tensor]:
        """The matrices of one expert, float32 [R, C], in the order of their tensors' names.

        Args:
            holder: What holds the expert, see `emp_llm.shrinking.choice.Structures.holders`.
            expert: Its number.

        Raises:
            CheckpointError: If they cannot be read.
        """
        alone: dict[KindName, Choice] = {_EXPERTS: Choice(kind=_EXPERTS, kept={holder: (expert,)})}
        for name in sorted(self._names.get(holder, ())):
            _, entry = self._plan.checkpoint.tensors[name]
            cut = cut_tensor(entry, self._plan.found.axes[name], alone)
            if cut is not None:
                yield self._read(name, cut)

    def _read(self, name: str, cut: Cut) -> torch.Tensor:
        shard, entry = self._plan.checkpoint.tensors[name]
        file = self._files.file(shard)
        parts = [part.read(file, self._workspace).copy() for part in cut_parts(cut)]
        items = torch.from_numpy(np.concatenate(parts)).view(
            getattr(torch, TORCH_NAMES[entry.dtype])
        )
        return items.reshape(cut.shape[-2], cut.shape[-1]).float()
