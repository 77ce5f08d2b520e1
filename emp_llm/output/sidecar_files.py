"""The files beside the weights of a written checkpoint: index, configuration and others."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.checkpoint.small_files import CONFIG_NAME
from emp_llm.errors import CheckpointError
from emp_llm.files.atomic import write_json
from emp_llm.report.file_names import OF_THEIR_OWN

__all__ = ["copy_small_files", "small_files", "write_config", "write_index"]


def write_index(folder: Path, source: Checkpoint) -> None:
    """Write the index of the shards in a folder, if the source has one."""
    if source.index_name is None:
        return
    weight_map, total = {}, 0
    for shard in source.shards:
        for entry in read_header(folder / shard.safetensors_name).tensors:
            weight_map[entry.name] = shard.safetensors_name
            total += entry.nbytes
    metadata = {**source.index_metadata, "total_size": total}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / source.index_name, index)


def write_config(
    folder: Path, source: Checkpoint, quantization_config: Mapping[str, object] | None
) -> None:
    """Write the source's configuration.

    Args:
        folder: The folder to write to.
        source: The checkpoint that the configuration is taken from.
        quantization_config: The one to put in; None to leave it out.
    """
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    write_json(folder / CONFIG_NAME, config)


def small_files(source: Checkpoint) -> Iterator[Path]:
    """Paths, relative to a source's folder, of the small files that are copied from it.

    They are tokenizer, generation configuration, licence and the like.
    """
    return (relative for relative in source.other_files if str(relative) not in OF_THEIR_OWN)


def copy_small_files(folder: Path, source: Checkpoint) -> None:
    """Copy the source's `small_files`.

    Raises:
        CheckpointError: If one cannot be read.
    """
    for relative in small_files(source):
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            data = open_regular(source.folder / relative)
        except OSError as error:
            raise CheckpointError(f"{relative}: cannot be read: {error.strerror}") from error
        with data, target.open("xb") as copy:
            shutil.copyfileobj(data, copy)
