"""Measures models with fewer structures: written to a temporary folder, loaded, and deleted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from emp_llm.comparison.bench import Bench
from emp_llm.comparison.structures_costs import DENSE, StructuresCost
from emp_llm.evaluation.found_model import find_model
from emp_llm.evaluation.perplexity import Perplexity
from emp_llm.output.carried_files import carry_files
from emp_llm.runtime.workers import Workers
from emp_llm.selection.mask_store import MaskStore
from emp_llm.shrink_options import ShrinkOptions
from emp_llm.shrinking.choice import WIDTHS, KindName
from emp_llm.shrinking.choosing import choose
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.plan import ShrinkPlan
from emp_llm.shrinking.repaired import repaired_files
from emp_llm.shrinking.writing import write_config_and_index, write_shards

__all__ = ["StructuresBench"]


@dataclass(frozen=True, kw_only=True)
class StructuresBench:
    """Measures one smaller model at a time: the one that `shrink` would write.

    Attributes:
        plan: The model, with its structures of one kind found.
        bench: Measures models.
        workers: What writes the smaller ones.
        store: A folder for what is measured to choose blocks, which serves all their numbers.
        scorer: Scores experts, once for all numbers of them.
    """

    plan: ShrinkPlan
    bench: Bench
    workers: Workers
    store: Path
    scorer: ExpertScores

    def dense(self) -> StructuresCost:
        """The model as it is."""
        tensors = self.plan.checkpoint.tensors.values()
        return StructuresCost(
            score=DENSE,
            kept=self.plan.structures[self._kind].number,
            weights=sum(math.prod(entry.shape) for _, entry in tensors),
            runs=(self.bench.measure(DENSE),),
        )

    def cost(self, score: str, kept: int, runs: Sequence[ShrinkOptions]) -> StructuresCost:
        """The model with fewer structures.

        Args:
            score: What chooses them.
            kept: How many stay.
            runs: The options of each run.
        """
        label = f"{score}, {kept} {self._kind}"
        measured = [self._measured(label, options) for options in runs]
        return StructuresCost(
            score=score,
            kept=kept,
            weights=measured[0][0],
            runs=tuple(perplexity for _, perplexity in measured),
        )

    def _measured(self, label: str, options: ShrinkOptions) -> tuple[int, Perplexity]:
        """The weights that are left, and the perplexity."""
        with TemporaryDirectory(prefix="emp-llm-compare-") as name:
            folder = Path(name) / "model"
            folder.mkdir()
            # what is stored of neurons and heads is for one number and one score
            store = Path(name) / "chosen" if self._kind in WIDTHS else self.store
            choices = choose(self.plan, options, self.workers, store, self.scorer)
            shrinkage = self.plan.with_choices(choices)
            carry_files(folder, self.plan.checkpoint, self.workers)
            with MaskStore(store) as found:
                write_shards(shrinkage, self.workers, folder, replaced=repaired_files(found))
            write_config_and_index(shrinkage, folder)
            smaller = find_model(folder, progress=self.workers.progress)
            weights = sum(math.prod(cut.shape) for cut in shrinkage.all_cuts)
            return weights, self.bench.measure(label, found=smaller)

    @property
    def _kind(self) -> KindName:
        (kind,) = self.plan.structures
        return kind
