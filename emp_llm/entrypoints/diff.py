"""Diff: how two checkpoints differ, packed or dense, in one pass over both, in bounded memory.

A, B → headers → tensors of both: pairs of row blocks, counted → kinds of layers, totals
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TypedDict

from emp_kernels.dispatch import load_backend

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.errors import CheckpointError
from emp_llm.hub.source import Source, find_source
from emp_llm.options import OutputFormat
from emp_llm.report.fields import Report
from emp_llm.report.file import read_report
from emp_llm.report.folder_files import not_described
from emp_llm.report.shrink_report import ShrinkReport, read_shrink_report
from emp_llm.report.source_fields import SourceFields
from emp_llm.rule_fields import rule_part, with_defaults
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.structure.targets import module_name
from emp_llm.structure.targets_process import TargetsQuestion
from emp_llm.tensors.packed_config import is_delta, is_packed
from emp_llm.tensors.stored_tensors import StoredTensor, stored_tensors
from emp_llm.verification.weight_differences import CountFields, Counts, compare, kinds_in_words

__all__ = ["Difference", "diff"]

_NO_MATTER = ("quantization_config", "transformers_version")
"""Fields of a config that are not compared: the first is compared as the rule."""


class SideFields(TypedDict):
    """One of two checkpoints.

    Attributes:
        model: The folder or Hub id as it was given.
        revision: The commit on the Hub; None for a folder.
        format: ``packed`` or ``dense``.
        rule: The rule that it was pruned by, with None for what is not known; None if neither
            report nor config states one.
        tensors: How many tensors it has.
        bytes: Bytes of their data.
        renumbered: Whether it was shrunken, and blocks or experts have got other numbers by that.
        by_source: Whether its tensors are called as in the model that it was shrunken from.
    """

    model: str
    revision: str | None
    format: OutputFormat
    rule: dict[str, object] | None
    tensors: int
    bytes: int
    renumbered: bool
    by_source: bool


class TensorDifference(CountFields):
    """How one tensor differs, and the kind of layer that it belongs to."""

    kind: str


class Both(TypedDict):
    """A value of A beside that of B."""

    a: object
    b: object


class Difference(TypedDict):
    """How two checkpoints differ.

    Attributes:
        same_weights: Whether both hold the same tensors, to the bit.
        a: The first checkpoint.
        b: The second checkpoint.
        only_in_a: Names of tensors that B lacks.
        only_in_b: Names of tensors that A lacks.
        other_kind: By name, dtype and shape of tensors that differ in these between A and B; they
            are not compared.
        rule: Fields of the rule that differ.
        config: Fields of the configuration that differ.
        totals: Counts over all tensors that were compared.
        kinds: The same by kind of layer, as the report or the structure of one of the models calls
            it; the name of the module if neither is known.
        tensors: The same by name.
    """

    same_weights: bool
    a: SideFields
    b: SideFields
    only_in_a: list[str]
    only_in_b: list[str]
    other_kind: dict[str, Both]
    rule: dict[str, Both]
    config: dict[str, Both]
    totals: CountFields
    kinds: dict[str, CountFields]
    tensors: dict[str, TensorDifference]


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    revision_a: str | None = None,
    revision_b: str | None = None,
    token: str | bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Compare two checkpoints, each of which may be packed, dense with zeros, or not pruned.

    A weight counts as kept if it is not zero, so that masks can be compared whichever way they are
    stored. Tensors of different dtype or shape are listed, not compared.

    Of a model that `shrink` wrote, blocks and experts have other numbers than in its source. Its
    tensors are compared by the names that they have there, as its ``emp_shrink.json`` tells; not if
    both are such models, and of different sources.

    >>> from emp_llm import PruneOptions, diff, prune
    >>> for name, beta in (("sparse", 1.0), ("sparser", 0.5)):
    ...     _ = prune("demo/model", name, PruneOptions(beta=beta))
    >>> found = diff("sparse", "sparser")
    >>> found["same_weights"], found["rule"]
    (False, {'beta': {'a': 1.0, 'b': 0.5}})
    >>> totals = found["totals"]  # what the smaller β keeps, the larger one keeps too
    >>> totals["b_in_a"], totals["a_in_b"], totals["changed"]
    (1.0, 0.7635, 0)
    >>> {kind: counts["overlap"] for kind, counts in found["kinds"].items() if "proj" in kind}
    ... # doctest: +ELLIPSIS
    {'down_proj': 0.499151, 'gate_proj': 0.497916, 'k_proj': 1.0, ...}

    Args:
        a: A folder, or a model of the Hugging Face Hub.
        b: Another one.
        revision_a: Branch, tag or commit of `a` on the Hub.
        revision_b: The same of `b`.
        token: Token for the Hub; by default the one that is logged in.
        threads: Threads that read and compare; all cores by default.
        progress: Reports how the work goes on.

    Returns:
        How they differ.

    Raises:
        CheckpointError: If one is not a checkpoint.
        HubError: If one cannot be fetched.
        FormatError: If packed data is damaged, or a report is invalid.
        OptionError: If a revision is given for a local folder.
    """
    progress, count = SharedProgress(progress or Silent()), thread_count(threads)
    side_a = _Side.find(a, revision_a, token, progress)
    side_b = _Side.find(b, revision_b, token, progress)
    if side_a.origin is None or side_b.origin in (None, side_a.origin):
        side_a, side_b = side_a.named_as_in_source(), side_b.named_as_in_source()
    with _Kinds(side_a, side_b) as kinds:
        load_backend()
        found = _compare(side_a, side_b, count, progress)
        named = kinds.answer([*found.counts])
    totals, by_kind = Counts(), dict[str, Counts]()
    for name, counts in found.counts.items():
        totals.add(counts)
        by_kind.setdefault(named[name], Counts()).add(counts)
    sides = (side_a, side_b)
    only_in_a = [name for name in side_a.tensors if name not in side_b.tensors]
    only_in_b = [name for name in side_b.tensors if name not in side_a.tensors]
    return {
        "same_weights": totals.same == len(side_a.tensors) == len(side_b.tensors),
        "a": side_a.to_dict(),
        "b": side_b.to_dict(),
        "only_in_a": sorted(only_in_a),
        "only_in_b": sorted(only_in_b),
        "other_kind": found.other_kind,
        "rule": _differing(*(with_defaults(side.rule) if side.rule else {} for side in sides)),
        "config": _differing(side_a.config, side_b.config),
        "totals": totals.to_dict(),
        "kinds": {kind: counts.to_dict() for kind, counts in sorted(by_kind.items())},
        "tensors": {
            name: {"kind": named[name], **counts.to_dict()}
            for name, counts in sorted(found.counts.items())
        },
    }


def _differing(a: Mapping[str, object], b: Mapping[str, object]) -> dict[str, Both]:
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
    shrunken: ShrinkReport | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """What tensors are called where they are not called as in its files."""

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
        if is_delta(checkpoint.config):
            raise CheckpointError(
                f"{os.fspath(model)}: is a delta, whose tensors are differences to its base: "
                "compare what `emp-llm unpack` makes of it"
            )
        report = read_report(source.folder)
        if report is not None and not_described(source.folder, report) is not None:
            report = None  # of a model that another one was saved over
        tensors, shrunken = stored_tensors(checkpoint), read_shrink_report(source.folder)
        if shrunken is not None and not _renumbers(shrunken, tensors):
            shrunken = None
        return cls(os.fspath(model), source, checkpoint, tensors, report, shrunken)

    @property
    def origin(self) -> SourceFields | None:
        """The model that blocks or experts had other numbers in; None if there is none."""
        return None if self.shrunken is None else self.shrunken["source"]

    def named_as_in_source(self) -> "_Side":
        """The same with its tensors called as in the model that it was shrunken from, if it was."""
        if self.shrunken is None:
            return self
        names = {name: fields["source"] for name, fields in self.shrunken["tensors"].items()}
        tensors = {names[name]: tensor for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, names=names)

    @property
    def packed(self) -> bool:
        return is_packed(self.checkpoint.config)

    @property
    def rule(self) -> dict[str, object] | None:
        """The rule that it was pruned by, as far as report or config states one."""
        stated: Mapping[str, object] = {}
        if self.report is not None:
            stated = self.report["rule"]
        elif self.packed:
            stated = self.checkpoint.config["quantization_config"]
        return rule_part(stated) if stated else None

    @property
    def config(self) -> dict[str, object]:
        config = self.checkpoint.config
        return {name: value for name, value in config.items() if name not in _NO_MATTER}

    def to_dict(self) -> SideFields:
        return {
            "model": self.model,
            "revision": self.source.revision,
            "format": "packed" if self.packed else "dense",
            "rule": self.rule,
            "tensors": len(self.tensors),
            "bytes": self.checkpoint.nbytes,
            "renumbered": self.shrunken is not None,
            "by_source": bool(self.names),
        }


def _renumbers(report: ShrinkReport, tensors: Collection[str]) -> bool:
    """Whether some of a model's tensors have other names in its source, by its report."""
    sources = {name: fields["source"] for name, fields in report["tensors"].items()}
    one_each = len(set(sources.values())) == len(sources)
    # another model may have been saved over it
    return one_each and sources.keys() == set(tensors) and any(n != s for n, s in sources.items())


class _Found:
    """How the tensors that both have differ."""

    def __init__(self) -> None:
        self.counts: dict[str, Counts] = {}
        self.other_kind: dict[str, Both] = {}


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
                    found.other_kind[name] = {"a": kinds[0], "b": kinds[1]}
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
    """What the layers of two checkpoints are called; a context manager.

    Reports say so. Without them, another process reads the structure of a checkpoint that is not
    packed, while tensors are compared.
    """

    def __init__(self, *sides: _Side) -> None:
        self._reported = {
            side.names.get(name, name): str(fields["kind"])
            for side in sides
            if side.report is not None
            for name, fields in side.report["tensors"].items()
        }
        self._question: TargetsQuestion | None = None
        self._names: Mapping[str, str] = {}
        unknown = any(name not in self._reported for side in sides for name in side.tensors)
        side = next((side for side in sides if not side.packed), None)
        if unknown and side is not None:
            plain, self._names = side.checkpoint, side.names
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
        kinds = dict(self._reported)
        if self._question is not None:
            # a model of unknown structure can be compared, too
            with suppress(CheckpointError):
                decisions = self._question.answer().tensors
                kinds |= {self._names.get(n, n): one.kind for n, one in decisions.items()}
        return {name: kinds.get(name) or module_name(name) for name in names}
