"""Unpack: a packed checkpoint in, an ordinary one with the same weights out, bit for bit.

    source → shards: unpack and copy → index, config, report, card

Every shard of the source becomes one shard of the same name. A delta is added to its base, whose
shards give theirs the names.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, TypedDict

from emp_kernels.rows import Patterns, Workspace

from emp_llm.checkpoint.checkpoint import Checkpoint, check_all_listed
from emp_llm.checkpoint.left_behind import LeftBehind
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.deltas.base import load_base
from emp_llm.deltas.sum_reader import with_base
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.files.checksum import hash_name
from emp_llm.hub.source import Source, find_source
from emp_llm.output.carried_files import carry_files, count_files
from emp_llm.output.output_folder import OutputFolder
from emp_llm.output.overlap import check_apart
from emp_llm.output.sidecar_files import write_config, write_index
from emp_llm.pruning.copy_job import CopyJob
from emp_llm.pruning.dense_job import DenseRows
from emp_llm.pruning.shard_output import NewFile, WriteJob, shard_output
from emp_llm.pruning.shard_plan import file_order, output_name
from emp_llm.pruning.shard_writer import ShardWriter
from emp_llm.report.card.card import write_card
from emp_llm.report.card.figure import write_figure
from emp_llm.report.fields import FileCount, FileFields, Report
from emp_llm.report.file import read_report, write_report
from emp_llm.report.file_names import CARD_NAME, NOT_AS_WRITTEN, REPORT_NAME
from emp_llm.report.folder_files import check_described, describe_files
from emp_llm.report.report import dense_report
from emp_llm.runtime.device_choice import asked_devices
from emp_llm.runtime.pipeline import Piece, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.team import Team
from emp_llm.runtime.workers import Workers
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.packed_config import is_delta, is_packed, quant_method
from emp_llm.tensors.packed_reader import PackedReader, open_shard
from emp_llm.tensors.planes import holds_planes
from emp_llm.tensors.stored_tensors import OpenTensor, PlainTensor
from emp_llm.tensors.whole_reader import WholeReader

__all__ = ["Unpacked", "unpack"]


class Unpacked(TypedDict):
    """What `unpack` wrote.

    Attributes:
        packed_tensors: How many of the `tensors` were packed.
        tensors: How many tensors there are.
        bytes_before: Bytes of all tensors' data in the source.
        bytes_after: Bytes of all tensors' data in the result.
        carried: The files that were copied from the source, byte for byte.
        left_behind: The files of the source that were not, and why.
    """

    packed_tensors: int
    tensors: int
    bytes_before: int
    bytes_after: int
    carried: FileCount
    left_behind: list[LeftBehind]


def unpack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Unpacked:
    """Turn a packed checkpoint into an ordinary one: the one that pruning to dense writes.

    A delta becomes the whole model, its base and the differences added up. Its weights are not
    zero, so the result has no report.

    >>> from emp_llm import prune, unpack
    >>> report = prune("demo/model", "packed")
    >>> report["totals"]["model"]["bytes_after"]
    2128704
    >>> unpacked = unpack("packed", "unpacked")
    >>> unpacked["packed_tensors"], unpacked["tensors"]
    (21, 38)
    >>> unpacked["bytes_before"], unpacked["bytes_after"]
    (2128704, 3788160)

    Args:
        model: A packed folder, or a packed model of the Hugging Face Hub.
        out: The folder to write. It holds a whole checkpoint afterwards or, after an error, what it
            held before.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.
        overwrite: Whether to replace a checkpoint in `out`.
        device: Where the kernels run: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, see `prune`.
        threads: Threads that compute and write; by default all cores, or 3 to 8 for each GPU.
        progress: Shows how far the work is.

    Returns:
        What was written.

    Raises:
        CheckpointError: If the source is not a packed checkpoint.
        HubError: If it cannot be downloaded.
        FormatError: If packed data is damaged or of another version.
        OptionError: If the kernels have no such device to run on.
        OutputError: If `out` cannot be written, or overlaps the source.
        DeviceError: If a GPU has no room for the work.
    """
    devices = asked_devices(device, Team())
    thread_count(threads)  # raises before anything is read if there can be no such number
    shared = SharedProgress(progress or Silent())
    source = find_source(model, revision=revision, token=token, progress=shared)
    checkpoint = source.open_checkpoint()
    _check_packed(checkpoint)
    check_all_listed(checkpoint.absent)  # as it was written, it has a correct index
    base = None
    if is_delta(checkpoint.config):
        reading = Workers(threads=thread_count(threads), progress=shared)
        base = load_base(source.folder, checkpoint.config, reading, token)
        check_apart(Path(out), base.folder)
    whole = _whole(checkpoint, base)
    packed_report = None if base else read_report(source.folder)
    with OutputFolder(Path(out), overwrite=overwrite, source=source.folder) as folder:
        workers = Workers.find(
            "unpack",
            # roughly what its targets have unpacked, since the tensors beside them count too
            0 if source.to_come else checkpoint.nbytes,
            devices=devices,
            threads=threads,
            progress=shared,
            team=Team(),
        )
        jobs = _write_shards(source, checkpoint, base, folder.staging, workers)
        copied = carry_files(folder.staging, checkpoint, workers)
        write_index(folder.staging, whole)
        write_config(folder.staging, checkpoint, None)
        report = _write_report(folder.staging, checkpoint, packed_report, jobs, copied)
        write_card(folder.staging / CARD_NAME, source.folder / CARD_NAME, report)
        folder.publish()
    return {
        "packed_tensors": sum(isinstance(job, _UnpackJob) for job in jobs),
        "tensors": len(jobs),
        "bytes_before": checkpoint.nbytes,
        "bytes_after": sum(job.entry.nbytes for job in jobs),
        "carried": count_files(checkpoint),
        "left_behind": list(checkpoint.beside.left_behind),
    }


def _check_packed(checkpoint: Checkpoint) -> None:
    method = quant_method(checkpoint.config)
    unsaid = method is None and holds_planes(checkpoint.tensors)
    if not is_packed(checkpoint.config) and not unsaid:
        found = f"quant_method is {method!r}" if method else "it has no quantization_config"
        raise CheckpointError(
            f"{checkpoint.folder}: is not packed by emp-llm ({found} in config.json); "
            "give a folder that `emp-llm prune` wrote"
        )


def _whole(checkpoint: Checkpoint, base: Checkpoint | None) -> Checkpoint:
    """The checkpoint with the shards that it is written in: of a delta these are the base's."""
    if base is None:
        return checkpoint
    return replace(
        checkpoint,
        shards=base.shards,
        index_name=base.index_name,
        index_metadata=base.index_metadata,
    )


def _write_report(
    staging: Path,
    source: Checkpoint,
    packed_report: Report | None,
    jobs: Sequence[WriteJob],
    copied: Mapping[str, FileFields],
) -> Report | None:
    """Write the report of the dense folder, and its figure, if the packed folder has one."""
    if packed_report is None:
        return None
    check_described(source.folder, packed_report)
    _check_report(source.folder, packed_report, jobs)
    report = dense_report(packed_report, {job.entry.name: job.checksum for job in jobs})
    shards = [output_name(source, shard) for shard in source.shards]
    report["files"] = describe_files(staging, shards, copied)
    report["carried"] = count_files(source)
    write_figure(staging, report)
    write_report(staging, report)
    return report


def _check_report(folder: Path, report: Report, jobs: Sequence[WriteJob]) -> None:
    """Check that a report lists the tensors there are, and as pruned those that are packed so."""
    listed = {name: fields["pruned"] for name, fields in report["tensors"].items()}
    found = {job.entry.name: isinstance(job, _UnpackJob) and job.is_pruned for job in jobs}
    odd = sorted(name for name in listed | found if listed.get(name) != found.get(name))
    if odd:
        raise FormatError(
            f"{folder}: {REPORT_NAME} and the shards differ on tensor {odd[0]!r}: {NOT_AS_WRITTEN}"
        )


def _write_shards(
    source: Source, checkpoint: Checkpoint, base: Checkpoint | None, folder: Path, workers: Workers
) -> list[WriteJob]:
    """Write all shards.

    Returns:
        The jobs on their tensors, done.
    """
    done: list[WriteJob] = []
    whole = _whole(checkpoint, base)
    with source.files(checkpoint.shards) as files, OpenFiles() as base_files:
        if base is None:
            contents = _packed_contents(checkpoint, files)
        else:
            contents = _delta_contents(checkpoint, files, base, base_files)
        with shard_output(folder, files if base is None else base_files) as output:

            def pieces() -> Iterator[Piece]:
                for shard, tensors in contents:
                    new = _dense_file(output_name(whole, shard), tensors, done)
                    yield from output.pieces(shard, new)

            workers.progress.begin(f"unpacking{workers.devices.where}", checkpoint.nbytes)
            workers.run(pieces(), files.abandon)
    return done


Contents = Iterator[tuple[Shard, Sequence[OpenTensor]]]
"""Shards that are read, each with what the shard that it gives will hold."""


def _packed_contents(checkpoint: Checkpoint, files: OpenFiles) -> Contents:
    for shard in checkpoint.shards:
        file = files.file(shard)
        packed, plain = open_shard(shard, file)
        yield shard, [*packed.values(), *(PlainTensor(file, entry) for entry in plain)]


def _delta_contents(
    checkpoint: Checkpoint, files: OpenFiles, base: Checkpoint, base_files: OpenFiles
) -> Contents:
    """The base's shards with what the delta changes; the last has what the base lacks, too."""
    left: dict[str, OpenTensor] = {}
    for shard in checkpoint.shards:
        file = files.file(shard)
        packed, plain = open_shard(shard, file)
        left |= with_base(packed, file, base, base_files)
        left |= {entry.name: PlainTensor(file, entry) for entry in plain}
    for shard in base.shards:
        file = base_files.file(shard)
        tensors: list[OpenTensor] = [
            left.pop(entry.name, PlainTensor(file, entry)) for entry in shard.header.tensors
        ]
        last = shard is base.shards[-1]
        yield shard, [*tensors, *(left.values() if last else ())]


def _dense_file(name: str, tensors: Sequence[OpenTensor], done: list[WriteJob]) -> NewFile:
    """The dense file that will hold some tensors; its jobs are added to the others."""
    by_entry = sorted(
        ((t.entry if isinstance(t, PlainTensor) else t.dense_entry, t) for t in tensors),
        key=lambda pair: file_order(pair[0]),
    )

    def jobs(writer: ShardWriter) -> Iterator[WriteJob]:
        for entry, tensor in by_entry:
            if isinstance(tensor, PlainTensor):
                job: WriteJob = CopyJob(entry, tensor.file, writer)
            else:
                job = _UnpackJob(tensor, writer)
            done.append(job)
            yield job

    return NewFile(
        name=name,
        entries_at_most=[entry for tensor, _ in by_entry for entry in CopyJob.entries(tensor)],
        in_order=not any(t.geometry.transposed for t in tensors if not isinstance(t, PlainTensor)),
        jobs=jobs,
    )


class _UnpackJob:
    """Unpacks one tensor.

    Attributes:
        entry: The tensor as it is in a dense file.
        statistics: None; nothing is pruned.
        packed_bytes: None; nothing is packed.
    """

    statistics: Final = None
    packed_bytes: Final = None

    def __init__(self, reader: PackedReader | WholeReader, writer: ShardWriter) -> None:
        self.entry = reader.dense_entry
        self._reader = reader
        self._rows = DenseRows(self.entry, reader.geometry, writer)

    @property
    def is_pruned(self) -> bool:
        """Whether the packed tensor was pruned."""
        return isinstance(self._reader, PackedReader)

    @property
    def checksum(self) -> str:
        """Checksum of its weights in the order of rows, once all pieces are settled."""
        return hash_name(self._rows.hash)

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        for block in self._reader.geometry.row_blocks():
            nbytes = self._reader.block_bytes(block)
            yield Piece(nbytes, partial(self._decode, block), partial(self._rows.place, block))

    def _decode(self, block: RowBlock, workspace: Workspace) -> Patterns:
        return self._reader.read(block, workspace).rows
