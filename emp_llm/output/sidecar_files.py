"""Index and configuration of a written checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.files.atomic import write_json

__all__ = ["write_config", "write_index"]


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
