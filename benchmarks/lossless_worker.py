"""One coder of `bench_lossless.py` in a process of its own, from memory to memory.

    python lossless_worker.py emp-llm MODEL THREADS

It reads "encode" and "decode" from standard input, a line each, and answers each with a line of
JSON: seconds, CPU seconds, and the bytes of each tensor. What is decoded is compared with the
source before the answer, off the clock. The process of ZipNN runs in ZipNN's own environment, so
nothing of emp-llm is imported for it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Answer line by line."""
    coder = CODERS[sys.argv[1]](int(sys.argv[3]))
    source = read_tensors(Path(sys.argv[2]))
    for line in sys.stdin:
        if line.strip() == "encode":
            # ZipNN changes what it compresses
            copies = {name: tensor.clone() for name, tensor in source.items()}
            seconds = clocked(partial(coder.encode, copies))
            print(json.dumps(seconds | {"bytes": coder.sizes()}), flush=True)
        else:
            decoded: Tensors = {}
            seconds = clocked(partial(coder.decode, decoded))
            check_same(decoded, source)
            print(json.dumps(seconds), flush=True)


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder's files, in memory."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors


def clocked(action: Any) -> dict[str, float]:  # noqa: ANN401
    """Seconds and CPU seconds, of all threads, that an action takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def check_same(found: Tensors, source: Tensors) -> None:
    """Compare tensors byte for byte.

    Raises:
        AssertionError: If one differs or is missing.
    """
    if found.keys() != source.keys():
        raise AssertionError("other tensors came back")
    for name, tensor in found.items():
        if not torch.equal(as_bytes(tensor), as_bytes(source[name])):
            raise AssertionError(f"{name!r} came back changed")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8 [bytes]."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class EmpLlm:
    """The kernels of `emp-llm pack`, called on row blocks as it calls them.

    Args:
        threads: Threads to use.
    """

    def __init__(self, threads: int) -> None:
        import lossless_code
        from emp_kernels.rows import Workspace

        torch.set_num_threads(1)
        self._choose, self._new_workspace = lossless_code.choose, Workspace
        self._pool = ThreadPoolExecutor(threads)
        self._own = threading.local()
        self._encoded: dict[str, Any] = {}

    def encode(self, tensors: Tensors) -> None:
        """Choose a code for each tensor, then pack its row blocks."""
        names = list(tensors)
        codes = list(self._pool.map(self._choose, names, tensors.values()))
        pieces = [(code, block) for code in codes if code for block in code.blocks]
        records = self._pool.map(lambda piece: piece[0].pack(piece[1], self._workspace), pieces)
        self._encoded = {
            name: (code, [next(records) for _ in code.blocks]) if code else tensors[name]
            for name, code in zip(names, codes, strict=True)
        }

    def decode(self, decoded: Tensors) -> None:
        """Unpack the row blocks of all tensors."""
        tasks = []
        for name, found in self._encoded.items():
            if isinstance(found, torch.Tensor):
                decoded[name] = found
                continue
            code, records = found
            rows = code.new_rows()
            decoded[name] = code.tensor(rows)
            tasks += [
                (code, rows[block.start : block.stop], packed)
                for block, packed in zip(code.blocks, records, strict=True)
            ]
        list(self._pool.map(lambda task: task[0].unpack(*task[1:], self._workspace), tasks))

    def sizes(self) -> dict[str, int]:
        """Bytes that each tensor takes, with its table and parameters."""
        return {
            name: found.nbytes
            if isinstance(found, torch.Tensor)
            else found[0].extra_bytes + sum(payload.nbytes for payload, _ in found[1])
            for name, found in self._encoded.items()
        }

    @property
    def _workspace(self) -> Any:  # noqa: ANN401 - imported only for this coder
        if not hasattr(self._own, "workspace"):
            self._own.workspace = self._new_workspace()
        return self._own.workspace


class ZipNN:
    """ZipNN, tensor by tensor.

    Args:
        threads: Threads to use.
    """

    def __init__(self, threads: int) -> None:
        import zipnn_files

        torch.set_num_threads(threads)
        self._files, self._threads = zipnn_files, threads
        self._encoded: dict[str, tuple[Any, int]] = {}

    def encode(self, tensors: Tensors) -> None:
        """Compress tensor by tensor; the tensors are changed."""
        self._encoded = {
            name: (self._files.compress(tensor, self._threads), tensor.nbytes)
            for name, tensor in tensors.items()
        }

    def decode(self, decoded: Tensors) -> None:
        """Decompress tensor by tensor."""
        for name, (data, _) in self._encoded.items():
            decoded[name] = self._files.decompress(data, self._threads)

    def sizes(self) -> dict[str, int]:
        """Bytes that each tensor takes; no more than before, for it would be left as it was."""
        return {name: min(len(data), nbytes) for name, (data, nbytes) in self._encoded.items()}


CODERS = {"emp-llm": EmpLlm, "zipnn": ZipNN}


if __name__ == "__main__":
    main()
