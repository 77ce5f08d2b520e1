"""Files written out of order by many threads."""

import errno
import os
import threading
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from emp_llm.files import direct_file as disk_file
from emp_llm.files.direct_file import Flusher, open_disk_file

BLOCK = 4096  # direct I/O needs chunks of whole blocks; the smallest keep the tests small


@pytest.fixture(params=["direct", "cached"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the disk, with chunks of one block and a flush every few bytes."""
    monkeypatch.setattr(disk_file, "CHUNK_BYTES", BLOCK)
    monkeypatch.setattr(disk_file, "_FLUSH_EVERY", 1000)
    if request.param == "cached":
        monkeypatch.setattr(disk_file, "_O_DIRECT", 0)
    return str(request.param)


def random_bytes(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def write_in_pieces(path: Path, head: bytes, data: np.ndarray, cuts: list[int]) -> None:
    """Write data behind a head, in pieces between cuts, the pieces shuffled over three threads."""
    edges = [0, *cuts, data.size]
    pieces = [(a, data[a:b]) for a, b in pairwise(edges)]
    order = np.random.default_rng(0).permutation(len(pieces))
    with Flusher() as flusher:
        file = open_disk_file(path, flusher, head_bytes=len(head), in_order=True)

        def work(first: int) -> None:
            for index in order[first::3]:
                start, piece = pieces[index]
                file.write(len(head) + start, piece)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        flusher.submit(lambda: file.finish(head))


@pytest.mark.parametrize("head_size", [0, 16, BLOCK - 16, BLOCK, BLOCK + 16, 3 * BLOCK + 32])
@pytest.mark.parametrize(
    "size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 16, 10 * BLOCK + 7]
)
@pytest.mark.usefixtures("way")
def test_a_file_holds_its_head_and_then_its_data(tmp_path: Path, head_size: int, size: int) -> None:
    head, data = random_bytes(head_size).tobytes(), random_bytes(size)
    cuts = sorted({min(cut, size) for cut in range(37, size, 1017)})
    write_in_pieces(tmp_path / "file", head, data, cuts)
    assert (tmp_path / "file").read_bytes() == head + data.tobytes()


@pytest.mark.usefixtures("way")
def test_a_piece_may_span_many_chunks(tmp_path: Path) -> None:
    data = random_bytes(20 * BLOCK + 5)
    write_in_pieces(tmp_path / "file", b"head", data, [3, 19 * BLOCK])
    assert (tmp_path / "file").read_bytes() == b"head" + data.tobytes()


def test_chunks_of_the_real_size_reach_the_disk(tmp_path: Path) -> None:
    data = random_bytes(2 * disk_file.CHUNK_BYTES + 12345)
    write_in_pieces(tmp_path / "file", bytes(48), data, [1 << 20, 3 << 20, 5 << 20])
    assert (tmp_path / "file").read_bytes() == bytes(48) + data.tobytes()


def test_direct_chunks_are_on_disk_before_the_file_is_finished(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_in_pieces(tmp_path / "file", b"", random_bytes(3 * BLOCK), [])
    # the last one is finish(); what goes through the cache is flushed on the way as well
    assert len(synced) == (1 if way == "direct" else 2)


def test_a_file_system_without_direct_io_is_written_by_way_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & disk_file._O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    data = random_bytes(10 * BLOCK)
    write_in_pieces(tmp_path / "file", b"head", data, [100])
    assert (tmp_path / "file").read_bytes() == b"head" + data.tobytes()


def test_a_device_that_refuses_a_direct_write_gets_it_by_way_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_file, "CHUNK_BYTES", 1000)  # no multiple of any block
    data = random_bytes(12345)
    write_in_pieces(tmp_path / "file", b"head", data, [100])
    assert (tmp_path / "file").read_bytes() == b"head" + data.tobytes()


@pytest.mark.usefixtures("way")
def test_a_full_disk_is_told_by_the_thread_that_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(stack: ExitStack) -> None:
        with Flusher() as flusher:
            file = open_disk_file(tmp_path / "file", flusher, head_bytes=0, in_order=True)
            stack.callback(file.close)
            monkeypatch.setattr(os, "pwrite", full)
            for number in range(100):
                file.write(number * BLOCK, random_bytes(BLOCK))

    with ExitStack() as stack, pytest.raises(OSError, match="No space left"):
        fill(stack)
