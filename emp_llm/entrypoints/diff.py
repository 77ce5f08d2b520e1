"""How two checkpoints differ, packed or dense: in one pass over both, in bounded memory.

A, B → headers → tensors of both: pairs of blocks, counted → kinds of layers, totals
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from emp_kernels.dispatch import load_backend

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.errors import CheckpointError
from emp_llm.hub.source import Source, find_source
from emp_llm.report.fields import Report
from emp_llm.report.file import read_report
from emp_llm.rule_fields import rule_part
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.structure.targets import module_name
from emp_llm.structure.targets_process import TargetsQuestion
from emp_llm.tensors.packed_config import is_packed
from emp_llm.tensors.stored_tensors import StoredTensor, stored_tensors
from emp_llm.verification.weight_differences import Counts, compare, kinds_in_words

__all__ = ["diff"]

_NO_MATTER = ("quantization_config", "transformers_version")
"""Fields of a config whose difference is told otherwise, or none."""


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    revision_a: str | None = None,
    revision_b: str | None = None,
    token: str | bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tell how two checkpoints differ, of which each may be packed, dense with zeros, or unpruned.

    A weight counts as kept if it is not zero, so that masks can be compared whichever way they are
    stored. Tensors of different dtype or shape are named, not compared.

    Args:
        a: A folder, or a model of the Hugging Face Hub.
        b: Another one.
        revision_a: Branch, tag or commit of `a` on the Hub.
        revision_b: The same of `b`.
        token: Token for the Hub; by default the one that is logged in.
        threads: Threads that read and compare; all cores by default.
        progress: Told how the work goes on.

    Returns:
        ``same_weights`` (whether both hold the same tensors, to the bit); of each side, ``a`` and
        ``b``, its ``model``, ``revision``, ``format``, ``rule`` (None if it tells of none),
        ``tensors`` and ``bytes``; ``only_in_a`` and ``only_in_b``, names; ``other_kind``, names of
        tensors of different dtype or shape, with both; ``rule`` and ``config``, the fields that
        differ, with both values; and ``totals``, ``kinds`` and ``tensors``: the counts of
        `emp_llm.verification.weight_differences.Counts` over all tensors of both, by kind of
        layer, by name.
        A kind is what the report or the structure of one of the models calls it; if neither
        tells, it is the name of the module.

    Raises:
        CheckpointError: If one is no checkpoint; HubError if it cannot be fetched.
        FormatError: If packed data is damaged, or a report is none.
        OptionError: If a revision is given for a local folder.
    """
    told, count = SharedProgress(progress or Silent()), thread_count(threads)
    side_a = _Side.find(a, revision_a, token, told)
    side_b = _Side.find(b, revision_b, token, told)
    with _Kinds(side_a, side_b) as kinds:
        load_backend()
        found = _compare(side_a, side_b, count, told)
        named = kinds.answer([*found.counts])
    totals, by_kind = Counts(), dict[str, Counts]()
    for name, counts in found.counts.items():
        totals.add(counts)
        by_kind.setdefault(named[name], Counts()).add(counts)
    only_in_a = [name for name in side_a.tensors if name not in side_b.tensors]
    only_in_b = [name for name in side_b.tensors if name not in side_a.tensors]
    return {
        "same_weights": totals.same == len(side_a.tensors) == len(side_b.tensors),
        "a": side_a.to_dict(),
        "b": side_b.to_dict(),
        "only_in_a": sorted(only_in_a),
        "only_in_b": sorted(only_in_b),
        "other_kind": found.other_kind,
        "rule": _differing(side_a.rule or {}, side_b.rule or {}),
        "config": _differing(side_a.config, side_b.config),
        "totals": totals.to_dict(),
        "kinds": {kind: counts.to_dict() for kind, counts in sorted(by_kind.items())},
        "tensors": {
            name: {"kind": named[name]} | counts.to_dict()
            for name, counts in sorted(found.counts.items())
        },
    }


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields that differ, with both values; None where a side has no such field."""
    names = sorted(a.keys() | b.keys())
    return {
        name: {"a": a.get(name), "b": b.get(name)} for name in names if a.get(name) != b.get(name)
    }


@dataclass(frozen=True)
class _Side:
    """One of the two checkpoints."""

    model: str
    source: Source
    checkpoint: Checkpoint
    tensors: Mapping[str, StoredTensor]
    report: Report | None

    @classmethod
    def find(
        cls,
        model: str | os.PathLike[str],
        revision: str | None,
        token: str | bool | None,
        progress: SharedProgress,
    ) -> "_Side":
        source = find_source(model, revision=revision, token=token, progress=progress)
        checkpoint = source.open_checkpoint()
        report = read_report(source.folder)
        return cls(os.fspath(model), source, checkpoint, stored_tensors(checkpoint), report)

    @property
    def packed(self) -> bool:
        return is_packed(self.checkpoint.config)

    @property
    def rule(self) -> dict[str, object] | None:
        """The rule that it was pruned by, as far as it tells."""
        told: Mapping[str, object] = {}
        if self.report is not None:
            told = self.report["rule"]
        elif self.packed:
            told = self.checkpoint.config["quantization_config"]
        return rule_part(told) if told else None

    @property
    def config(self) -> dict[str, Any]:
        config = self.checkpoint.config
        return {name: value for name, value in config.items() if name not in _NO_MATTER}

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "revision": self.source.revision,
            "format": "packed" if self.packed else "dense",
            "rule": self.rule,
            "tensors": len(self.tensors),
            "bytes": self.checkpoint.nbytes,
        }


class _Found:
    """What was found of the tensors that both have."""

    def __init__(self) -> None:
        self.counts: dict[str, Counts] = {}
        self.other_kind: dict[str, dict[str, str]] = {}


def _compare(a: _Side, b: _Side, threads: int, progress: SharedProgress) -> _Found:
    found = _Found()
    both = [name for name in a.tensors if name in b.tensors]
    with ExitStack() as stack:
        files_a = stack.enter_context(a.source.files(a.checkpoint.shards))
        files_b = stack.enter_context(b.source.files(b.checkpoint.shards))

        def pieces() -> Iterator[Piece]:
            for name in both:
                here, there = a.tensors[name].open(files_a), b.tensors[name].open(files_b)
                kinds = kinds_in_words(here, there)
                if kinds is not None:
                    found.other_kind[name] = dict(zip("ab", kinds, strict=True))
                    continue
                nbytes = a.tensors[name].nbytes, b.tensors[name].nbytes
                counts = found.counts[name] = Counts(bytes_a=nbytes[0], bytes_b=nbytes[1])
                yield from compare(here, there, counts)

        def abandon() -> None:
            files_a.abandon()
            files_b.abandon()

        progress.begin("comparing", sum(s.tensors[name].nbytes for s in (a, b) for name in both))
        run_pieces(pieces(), threads=threads, progress=progress.advance, abandon=abandon)
    return found


class _Kinds:
    """What the layers of two checkpoints are called; to be used as a context manager.

    Two reports tell at once. Else the structure of the one that is not packed is read meanwhile.
    """

    def __init__(self, *sides: _Side) -> None:
        self._told = {
            name: str(fields["kind"])
            for side in sides
            if side.report is not None
            for name, fields in side.report["tensors"].items()
        }
        self._question: TargetsQuestion | None = None
        unknown = any(name not in self._told for side in sides for name in side.tensors)
        plain = next((side.checkpoint for side in sides if not side.packed), None)
        if unknown and plain is not None:
            entries = [entry for _, entry in plain.tensors.values()]
            tensors = {entry.name: (entry.dtype, entry.shape) for entry in entries}
            config = plain.config if plain.original else None
            self._question = TargetsQuestion(
                plain.folder, tensors, targets="all-linear", ignore=(), config=config
            )

    def __enter__(self) -> "_Kinds":
        return self

    def __exit__(self, *error: object) -> None:
        if self._question is not None:
            self._question.__exit__(*error)

    def answer(self, names: Iterable[str]) -> dict[str, str]:
        """The kinds of tensors."""
        told = dict(self._told)
        if self._question is not None:
            # a model whose structure is not known can be compared all the same
            with suppress(CheckpointError):
                decisions = self._question.answer()
                told |= {name: decision.kind for name, decision in decisions.items()}
        return {name: told.get(name) or module_name(name) for name in names}
