"""Writes the shards, index and config of a smaller model.

Each shard of which something stays gives one of the same name.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.atomic import write_json
from emp_llm.output.sidecar_files import write_index
from emp_llm.pruning.copy_job import CopyJob
from emp_llm.pruning.shard_output import NewFile, WriteJob, shard_output
from emp_llm.pruning.shard_plan import output_name
from emp_llm.pruning.shard_writer import ShardWriter
from emp_llm.runtime.pipeline import Piece
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.cut_job import CutJob
from emp_llm.shrinking.plan import Shrinkage

__all__ = ["write_config_and_index", "write_shards"]


def write_shards(
    shrinkage: Shrinkage,
    workers: Workers,
    folder: Path,
    *,
    finished: Collection[str] = (),
    replaced: Mapping[str, SourceFile] = MappingProxyType({}),
    record: Callable[[str, Sequence[WriteJob]], None] = lambda _name, _jobs: None,
) -> None:
    """Write the shards of a smaller model; memory does not grow with the model.

    Args:
        shrinkage: What is written.
        workers: What does the work.
        folder: The folder to write to.
        finished: Names of files that are there already.
        replaced: Tensors that have other weights than the source's, by their names in the result:
            files that hold nothing but the whole tensor, cut already, in the dtype that it has in
            the source.
        record: Called with the name of a file and the jobs on its tensors, from another thread,
            when it is on disk.

    Raises:
        CheckpointError: If the source cannot be read.
        OSError: If a file cannot be written.
    """
    source, checkpoint = shrinkage.plan.source, shrinkage.plan.checkpoint
    left = [s for s in shrinkage.shards if output_name(checkpoint, s) not in finished]
    with source.files(left) as files, shard_output(folder, files) as output:

        def pieces() -> Iterator[Piece]:
            for shard in left:
                name = output_name(checkpoint, shard)
                new = _new_file(shrinkage, shard, files.file(shard), replaced)
                yield from output.pieces(shard, new, partial(record, name))

        nbytes = sum(cut.new_entry.nbytes for s in left for cut in shrinkage.cuts[s.name])
        workers.progress.begin("shrinking", nbytes)
        workers.run(pieces(), files.abandon)


def _new_file(
    shrinkage: Shrinkage, shard: Shard, file: SourceFile, replaced: Mapping[str, SourceFile]
) -> NewFile:
    cuts = shrinkage.cuts[shard.name]

    def jobs(writer: ShardWriter) -> Iterator[WriteJob]:
        for cut in cuts:
            if cut.name in replaced:
                yield CopyJob(cut.new_entry, replaced[cut.name], writer)
            else:
                yield CutJob(cut, file, writer)

    return NewFile(
        name=output_name(shrinkage.plan.checkpoint, shard),
        entries_at_most=[entry for cut in cuts for entry in CopyJob.entries(cut.new_entry)],
        in_order=True,
        jobs=jobs,
    )


def write_config_and_index(shrinkage: Shrinkage, folder: Path) -> None:
    """Write config.json and, where the source has one, the index of the shards in a folder."""
    write_index(folder, shrinkage.written)
    write_json(folder / CONFIG_NAME, shrinkage.config)
