"""Compress or decompress a folder's safetensors files with ZipNN, in ZipNN's own environment.

    python zipnn_files.py pack SOURCE NEW_FOLDER THREADS
    python zipnn_files.py unpack PACKED NEW_FOLDER THREADS

This is what ZipNN's scripts zipnn_compress_safetensors.py and zipnn_decompress_safetensors.py do
with their defaults, tensor by tensor, except that the new files are flushed to the disk in the end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import zipnn
from safetensors import safe_open
from safetensors.torch import save_file
from zipnn.util_safetensors import (
    build_compressed_tensor_info,
    get_compressed_tensors_metadata,
    set_compressed_tensors_metadata,
)

__all__ = ["compress", "decompress"]


def main() -> None:
    """Read the command line, and do file by file what it says."""
    action = {"pack": pack, "unpack": unpack}[sys.argv[1]]
    source, folder, threads = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    folder.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        action(path, folder / path.name, threads)
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def pack(source: Path, new: Path, threads: int) -> None:
    """Compress a file."""
    tensors, infos = {}, {}
    with safe_open(source, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            tensor = file.get_tensor(name)
            info, nbytes = build_compressed_tensor_info(tensor), tensor.nbytes
            # it changes what it compresses, and must not change what then stays as it was
            data = compress(tensor.clone(), threads) if tensor.is_floating_point() else None
            if data is None or len(data) >= nbytes:
                tensors[name] = tensor
                continue
            tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            infos[name] = info
        metadata = file.metadata() or {"format": "pt"}
    set_compressed_tensors_metadata(infos, metadata)
    save_file(tensors, new, metadata)


def unpack(source: Path, new: Path, threads: int) -> None:
    """Decompress a file."""
    tensors = {}
    with safe_open(source, "pt") as file:
        infos = get_compressed_tensors_metadata(file.metadata())
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            tensors[name] = decompress(tensor.numpy(), threads) if name in infos else tensor
    save_file(tensors, new, {"format": "pt"})


def compress(tensor: torch.Tensor, threads: int) -> Any:  # noqa: ANN401 - some buffer
    """The compressed bytes of a tensor, which is changed."""
    return _coder(tensor.dtype, threads).compress(tensor)


def decompress(data: Any, threads: int) -> torch.Tensor:  # noqa: ANN401
    """The tensor that was compressed."""
    tensor: torch.Tensor = _coder(torch.uint8, threads).decompress(data)
    return tensor


def _coder(dtype: torch.dtype, threads: int) -> zipnn.ZipNN:
    return zipnn.ZipNN(
        input_format="torch", bytearray_dtype=dtype, method="HUFFMAN", threads=threads
    )


if __name__ == "__main__":
    main()
