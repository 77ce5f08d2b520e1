"""Measures a mixture with fewer experts: written to a temporary folder, loaded, and deleted."""

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from emp_llm.comparison.bench import Bench
from emp_llm.comparison.expert_costs import DENSE, ExpertsCost
from emp_llm.evaluation.found_model import find_model
from emp_llm.evaluation.perplexity import Perplexity
from emp_llm.output.carried_files import carry_files
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.amounts import best
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.expert_criteria import ExpertCriterion
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.plan import Shrinkage, ShrinkPlan
from emp_llm.shrinking.writing import write_config_and_index, write_shards

__all__ = ["ExpertBench"]


class ExpertBench:
    """Measures one smaller model at a time.

    Args:
        plan: The model, with its experts found.
        scores: Scores its experts.
        bench: Measures models.
        workers: What writes the smaller ones.
    """

    def __init__(
        self, plan: ShrinkPlan, scores: ExpertScores, bench: Bench, workers: Workers
    ) -> None:
        self._plan = plan
        self._scores = scores
        self._bench = bench
        self._workers = workers

    def dense(self) -> ExpertsCost:
        """The model as it is."""
        tensors = self._plan.checkpoint.tensors.values()
        return ExpertsCost(
            score=DENSE,
            experts=self._plan.structures["experts"].number,
            weights=sum(math.prod(entry.shape) for _, entry in tensors),
            runs=(self._bench.measure(DENSE),),
        )

    def cost(
        self, criterion: ExpertCriterion, number: int, seeds: Sequence[int | None] = (None,)
    ) -> ExpertsCost:
        """The model with the experts that a criterion ranks best.

        Args:
            criterion: The criterion.
            number: How many experts stay in each layer.
            seeds: A run for each; None for the usual seed.
        """
        shrinkages = [self._shrinkage(criterion, number, seed) for seed in seeds]
        label = f"{criterion.name}, {number} experts"
        return ExpertsCost(
            score=criterion.name,
            experts=number,
            weights=sum(math.prod(cut.shape) for cut in shrinkages[0].all_cuts),
            runs=tuple(self._measured(shrinkage, label) for shrinkage in shrinkages),
        )

    def _shrinkage(self, criterion: ExpertCriterion, number: int, seed: int | None) -> Shrinkage:
        structures = self._plan.structures["experts"]
        choice: Choice = best(
            structures,
            number,
            self._scores.by(criterion, seed),
            score=criterion.name,
            prefers=criterion.prefers,
        )
        return self._plan.with_choices([choice])

    def _measured(self, shrinkage: Shrinkage, label: str) -> Perplexity:
        with TemporaryDirectory(prefix="emp-llm-compare-") as name:
            folder, progress = Path(name), self._workers.progress
            carry_files(folder, shrinkage.plan.checkpoint, self._workers)
            write_shards(shrinkage, self._workers, folder)
            write_config_and_index(shrinkage, folder)
            return self._bench.measure(label, found=find_model(folder, progress=progress))
