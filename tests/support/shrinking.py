"""Checkpoints with their structures found, and choices written."""

from collections.abc import Mapping
from pathlib import Path

from emp_llm.hub.source import find_source
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.choice import Choice, KindName
from emp_llm.shrinking.plan import ShrinkPlan, open_source
from emp_llm.shrinking.writing import write_config_and_index, write_shards


def workers(threads: int = 2) -> Workers:
    return Workers(threads=threads, progress=SharedProgress(Silent()))


def found_plan(folder: Path, kind: KindName = "experts") -> ShrinkPlan:
    """A checkpoint with its structures of one kind found."""
    source = find_source(folder, progress=SharedProgress(Silent()))
    return ShrinkPlan.make(source, open_source(source), [kind])


def write_choice(
    folder: Path, out: Path, kept: Mapping[str, tuple[int, ...]], kind: KindName = "experts"
) -> Path:
    """Write the smaller model in which these structures stay, by the names of their holders."""
    shrinkage = found_plan(folder, kind).with_choices([Choice(kind=kind, kept=kept)])
    out.mkdir()
    write_shards(shrinkage, workers(), out)
    write_config_and_index(shrinkage, out)
    return out
