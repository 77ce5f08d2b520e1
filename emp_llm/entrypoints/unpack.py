"""Packed to dense: an ordinary checkpoint with the same weights, bit for bit."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from emp_kernels.rows import Patterns, Workspace

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.files.checksum import hash_name
from emp_llm.files.direct_file import Flusher
from emp_llm.hub.source import Source, find_source
from emp_llm.output.output_folder import OutputFolder
from emp_llm.output.sidecar_files import copy_small_files, write_config, write_index
from emp_llm.pruning.copy_job import CopyJob, DenseRows
from emp_llm.pruning.shard_plan import file_order, output_name
from emp_llm.pruning.shard_writer import ShardWriter
from emp_llm.report.card.card import write_card
from emp_llm.report.card.figure import write_figure
from emp_llm.report.file import read_report, write_report
from emp_llm.report.file_names import CARD_NAME, REPORT_NAME
from emp_llm.report.folder_files import describe_files
from emp_llm.report.report import dense_report
from emp_llm.runtime.devices import Devices, asked_devices, worthwhile_devices
from emp_llm.runtime.gpu_gain import Work
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.team import Team
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.packed_config import is_packed, quant_method
from emp_llm.tensors.packed_reader import PackedReader, open_shard

__all__ = ["unpack"]


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
) -> dict[str, Any]:
    """Turn a packed checkpoint into an ordinary one: the one that pruning to dense writes.

    Args:
        model: A packed folder, or a packed model of the Hugging Face Hub.
        out: The folder to write; whole afterwards or, after an error, not there.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.
        overwrite: Whether to replace a checkpoint in `out`.
        device: As for `emp_llm.prune`.
        threads: As for `emp_llm.prune`.
        progress: Told how the work goes on.

    Returns:
        What was done: ``packed_tensors`` unpacked of ``tensors``, ``bytes_before`` and
        ``bytes_after`` of all tensors' data.

    Raises:
        CheckpointError: If the source is not a packed checkpoint.
        FormatError: If packed data is damaged or of another version.
        OptionError: If the kernels have no such device to run on.
        OutputError: If `out` cannot be written.
        DeviceError: If a GPU has no room for the work.
    """
    devices, cores = asked_devices(device, Team()), thread_count(threads)
    told = SharedProgress(progress or Silent())
    source = find_source(model, revision=revision, token=token, progress=told)
    checkpoint = source.open_checkpoint()
    _check_packed(checkpoint)
    packed_report = read_report(source.folder)
    with OutputFolder(Path(out), overwrite=overwrite, source=source.folder) as folder:
        if devices is None:
            # as many bytes as its targets have unpacked, roughly: the tensors beside them count
            nbytes = 0 if source.to_come else checkpoint.nbytes
            work = Work(kernel="unpack", nbytes=nbytes, cores=min(cores, thread_count(None)))
            devices = worthwhile_devices(work, Team())
        count = thread_count(threads, gpus=len(devices.gpus))
        jobs = _write_shards(source, checkpoint, folder.staging, count, devices, told)
        write_index(folder.staging, checkpoint)
        write_config(folder.staging, checkpoint, None)
        copy_small_files(folder.staging, checkpoint)
        report = None
        if packed_report is not None:
            _check_told(source.folder, packed_report, jobs)
            hashes = {job.entry.name: hash_name(job.checksum) for job in jobs}
            report = dense_report(packed_report, hashes)
            report["files"] = describe_files(folder.staging)
            write_figure(folder.staging, report)
            write_report(folder.staging, report)
        write_card(folder.staging / CARD_NAME, source.folder / CARD_NAME, report)
        folder.publish()
    return {
        "packed_tensors": sum(isinstance(job, _UnpackJob) for job in jobs),
        "tensors": len(jobs),
        "bytes_before": checkpoint.nbytes,
        "bytes_after": sum(job.entry.nbytes for job in jobs),
    }


def _check_packed(checkpoint: Checkpoint) -> None:
    if not is_packed(checkpoint.config):
        method = quant_method(checkpoint.config)
        found = f"quant_method is {method!r}" if method else "it has no quantization_config"
        raise CheckpointError(
            f"{checkpoint.folder}: is not packed by emp-llm ({found} in config.json); "
            "give a folder that `emp-llm prune` wrote"
        )


def _check_told(
    folder: Path, report: Mapping[str, Any], jobs: "list[_UnpackJob | CopyJob]"
) -> None:
    """See that a report tells of the tensors there are, and which of them are packed."""
    told = {name: fields["pruned"] for name, fields in report["tensors"].items()}
    found = {job.entry.name: isinstance(job, _UnpackJob) for job in jobs}
    odd = sorted(name for name in told | found if told.get(name) != found.get(name))
    if odd or not any(found.values()):
        what = f"tells otherwise of tensor {odd[0]!r} than the shards" if odd else "prunes nothing"
        raise FormatError(
            f"{folder}: {REPORT_NAME} {what}: the folder is not as it was written; download or "
            "prune it again"
        )


def _write_shards(
    source: Source,
    checkpoint: Checkpoint,
    folder: Path,
    threads: int,
    devices: Devices,
    progress: SharedProgress,
) -> "list[_UnpackJob | CopyJob]":
    done: list[_UnpackJob | CopyJob] = []
    with ExitStack() as stack:
        files = stack.enter_context(source.files(checkpoint.shards))
        writers = stack.enter_context(ExitStack())
        flusher = stack.enter_context(Flusher())

        def pieces() -> Iterator[Piece]:
            for shard in checkpoint.shards:
                file = files.file(shard)
                readers, tensors = _dense_tensors(shard, file)
                name = output_name(checkpoint, shard)
                entries = [entry for tensor in tensors for entry in CopyJob.entries(tensor)]
                transposed = any(reader.geometry.transposed for reader in readers.values())
                writer = ShardWriter(
                    folder / name, entries, shard.header.metadata, flusher, in_order=not transposed
                )
                writers.callback(writer.release)
                for tensor in tensors:
                    reader = readers.get(tensor.name)
                    job = _UnpackJob(reader, writer) if reader else CopyJob(tensor, file, writer)
                    done.append(job)
                    yield from job.pieces()
                yield Piece.note(writer.close_when_written)
                yield Piece.note(partial(files.done, shard))

        progress.begin(f"unpacking{devices.told}", checkpoint.nbytes)
        run_pieces(
            pieces(),
            threads=threads,
            devices=devices,
            progress=progress.advance,
            abandon=files.abandon,
        )
    return done


def _dense_tensors(
    shard: Shard, file: SourceFile
) -> tuple[dict[str, PackedReader], list[TensorEntry]]:
    """Readers of the packed tensors by name, and all tensors of the dense file in order."""
    readers, plain = open_shard(shard, file)
    dense = [*plain, *(reader.dense_entry for reader in readers.values())]
    return readers, sorted(dense, key=file_order)


class _UnpackJob:
    """Unpacks one tensor.

    Attributes:
        entry: The tensor as it is in a dense file.
        checksum: Of its weights, row by row, once all are settled.
    """

    def __init__(self, reader: PackedReader, writer: ShardWriter) -> None:
        self.entry = reader.dense_entry
        self._reader = reader
        self._rows = DenseRows(self.entry, reader.geometry, writer)
        self.checksum = self._rows.checksum

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        for block in self._reader.geometry.row_blocks():
            nbytes = self._reader.block_bytes(block)
            yield Piece(nbytes, partial(self._decode, block), partial(self._rows.place, block))

    def _decode(self, block: RowBlock, workspace: Workspace) -> Patterns:
        return self._reader.read(block, workspace).rows
