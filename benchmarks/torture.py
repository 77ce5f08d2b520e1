"""Kill `emp-llm prune`, fill its disk, fail its reads and kill its ranks: it must recover.

    python benchmarks/torture.py --folder SOME_FOLDER --json result.json [--seed 0]

Each trial breaks a run off at a random point and then checks three things: that the run ended with
a clear message, that its folder does not look like a model unless it is complete, and that the same
command then writes the bytes of an undisturbed run. Full disks are file systems in memory and on a
loop device, which only root may mount. It ends with status 1 at the first trial that fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import emp_cli
import psutil
from common import MB, make_checkpoint, say, write_json

from emp_llm import verify
from emp_llm.output.output_folder import STAGING_NAME

# a program that is emp-llm, but whose n-th read fails
FAILING = """
import errno, os, sys
left, preadv = int(sys.argv.pop(1)), os.preadv
def failing(*args):
    global left
    left -= 1
    if left == 0:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return preadv(*args)
os.preadv = failing
from emp_cli import main
main()
"""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["emp_cli.prune", "emp_llm.entrypoints.prune", "transformers"])

Hashes = dict[str, str]


def main() -> None:
    """Run all trials and report how many there were."""
    args = parse()
    chance = random.Random(args.seed)  # noqa: S311 (nothing here is secret)
    folder = args.folder / "torture"
    folder.mkdir(parents=True, exist_ok=True)
    make_checkpoint(folder / "source", layers=1, dtype="bf16", shard_bytes=150 * MB, room=3)
    ground = Ground(folder / "source", folder / "out")
    try:
        counts = {
            "kills": kills(ground, chance, args.kills),
            "full_disks": full_disks(ground, chance, args.disks, folder),
            "failed_reads": failed_reads(ground, chance, args.reads),
            "killed_ranks": killed_ranks(ground, chance, args.ranks),
        }
    finally:
        shutil.rmtree(ground.out, ignore_errors=True)
    say(json.dumps(counts))
    if args.json:
        write_json(args.json, "torture", {"seed": args.seed, "layers": 1}, counts)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; needs 4 GB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for name, number in (("kills", 100), ("disks", 20), ("reads", 20), ("ranks", 12)):
        parser.add_argument(f"--{name}", type=int, default=number, help="how many trials")
    return parser.parse_args()


class Ground:
    """What trials work on: a source, an output folder, and what must be in it at the end.

    Attributes:
        source: The checkpoint.
        out: The output folder.
        expected: The hashes of the files that an undisturbed run writes.
        nbytes: Bytes of their weights.
    """

    def __init__(self, source: Path, out: Path) -> None:
        self.source = source
        self.out = out
        shutil.rmtree(out, ignore_errors=True)
        run_command(self.command())
        verify(out)
        self.expected = hashes(out)
        self.nbytes = written(out)

    def command(self, out: Path | None = None) -> list[str]:
        """The arguments of emp-llm."""
        return ["prune", str(self.source), "--out", str(out or self.out)]

    def check_broken(self, out: Path | None = None) -> int:
        """Check that a folder whose run broke off does not look like a model.

        Returns:
            How many finished shards it holds; -1 if the run had completed it.
        """
        out = out or self.out
        if (out / "config.json").exists():
            verify(out)
            assert hashes(out) == self.expected
            return -1
        return len(list((out / STAGING_NAME).glob("*.safetensors")))

    def check_completed(self, out: Path | None = None, *launcher: str) -> None:
        """Run the same command again unless the folder is complete, and check the bytes."""
        out = out or self.out
        if not (out / "config.json").exists():
            if launcher:
                void([sys.executable, "-m", *launcher, *self.command(out)])
            else:
                run_command(self.command(out))
        assert hashes(out) == self.expected
        shutil.rmtree(out)


def run_command(arguments: list[str], *, kill: Callable[[], bool] = lambda: False) -> int:
    """Run emp-llm in a process forked from one that has imported everything.

    Args:
        arguments: Arguments of the command line.
        kill: Called again and again; returns whether to kill the process.

    Returns:
        The exit status; negative if it was killed.
    """
    process = CONTEXT.Process(target=emp_llm_main, args=(arguments,))
    process.start()
    while process.is_alive():
        if kill():
            process.kill()
        process.join(0.0005)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def emp_llm_main(arguments: list[str]) -> None:
    """Run the command line in this process, without output."""
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        sys.argv = ["emp-llm", *arguments]
        emp_cli.main()


def written(folder: Path) -> int:
    """Bytes in all files of a folder, finished or not."""
    nbytes = 0
    with suppress(FileNotFoundError):  # files are renamed meanwhile
        for path in folder.rglob("*.safetensors*"):
            nbytes += path.stat().st_size
    return nbytes


def hashes(folder: Path) -> Hashes:
    """The hash of every file in a folder, except for those of an unfinished run."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and STAGING_NAME not in path.parts
    }


def check_line(errors: str, *parts: str) -> None:
    """Check that a run ended with a line that has one of these parts, and no traceback."""
    assert "Traceback" not in errors, errors
    last = errors.strip().splitlines()[-1]
    assert any(part in last for part in parts), errors


def kills(ground: Ground, chance: random.Random, trials: int) -> dict[str, int]:
    """Kill runs once they have written a random number of bytes."""
    found = {"trials": 0, "with_shards_kept": 0, "shards_kept": 0}
    shutil.rmtree(ground.out)
    while found["trials"] < trials:
        reached = chance.uniform(0, ground.nbytes)
        if not run_command(ground.command(), kill=lambda: written(ground.out) >= reached):  # noqa: B023
            ground.check_completed()
            continue
        kept = ground.check_broken()
        found["trials"] += 1
        found["with_shards_kept"] += kept > 0
        found["shards_kept"] += max(kept, 0)
        ground.check_completed()
        say(f"kill {found['trials']} of {trials}: {kept} shards kept")
    return found


def full_disks(
    ground: Ground, chance: random.Random, trials: int, folder: Path
) -> dict[str, int | str]:
    """Fill the disk after a random number of bytes."""
    if os.geteuid() != 0:
        return {"trials": 0, "why": "only root may mount file systems"}
    needed = sum(path.stat().st_size for path in (folder / "source").iterdir()) * 7 // 10
    for trial in range(trials):
        mount = (tmpfs, loop)[trial % 2]
        size = chance.randrange(1 * MB, needed)
        with mount(folder, size) as (disk, grow):
            out = disk / "out"
            command = [sys.executable, "-m", "emp_cli", *ground.command(out)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 1, result.stderr
            check_line(result.stderr, "the disk is full")
            kept = ground.check_broken(out)
            grow()
            ground.check_completed(out)
        say(
            f"{mount.__name__} full at {size // MB} MB, {trial + 1} of {trials}: {kept} shards kept"
        )
    return {"trials": trials}


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system in memory of so many bytes, and a function that enlarges it."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    mounting = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mounting, f"size={size}", "tmpfs", str(disk)], check=True)
    try:
        yield disk, lambda: void([*mounting, "remount,size=4G", "tmpfs", str(disk)])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def loop(folder: Path, size: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An ext4 file system with so many bytes free, and a function that frees the others."""
    disk, image = folder / "disk", folder / "disk.img"
    disk.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(2000 * MB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
    try:
        ballast = disk / "ballast"
        subprocess.run(
            ["fallocate", "-l", str(shutil.disk_usage(disk).free - size), str(ballast)], check=True
        )
        yield disk, ballast.unlink
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        image.unlink()


def void(command: list[str]) -> None:
    """Run a command that must succeed, without output."""
    subprocess.run(command, check=True, capture_output=True)


def failed_reads(ground: Ground, chance: random.Random, trials: int) -> dict[str, int]:
    """Have one read of the source fail."""
    reads = sum(path.stat().st_size for path in ground.source.iterdir()) // (4 << 20)
    for trial in range(trials):
        command = [sys.executable, "-c", FAILING, str(chance.randrange(1, reads))]
        result = subprocess.run(
            [*command, *ground.command()], capture_output=True, text=True, check=False
        )
        assert result.returncode == 1, result.stderr
        check_line(result.stderr, "failed: Input/output error")
        kept = ground.check_broken()
        ground.check_completed()
        say(f"read {trial + 1} of {trials}: {kept} shards kept")
    return {"trials": trials}


def killed_ranks(ground: Ground, chance: random.Random, trials: int) -> dict[str, Any]:
    """Kill one of several ranks, then resume with another number of ranks."""

    def launcher(size: int) -> tuple[str, ...]:
        return "torch.distributed.run", "--nproc-per-node", str(size), "-m", "emp_cli"

    for size in range(1, 5):
        ground.check_completed(None, *launcher(size))
        say(f"{size} ranks wrote the same bytes")
    for trial in range(trials):
        size = chance.randint(2, 4)
        reached = chance.uniform(0, ground.nbytes)
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher(size), *ground.command()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and written(ground.out) < reached:
            time.sleep(0.001)
        if ranks := ranks_of(process):
            chance.choice(ranks).kill()
        assert process.wait(timeout=60) != 0 or (ground.out / "config.json").exists()
        kept = ground.check_broken()
        again = chance.randint(1, 4)
        ground.check_completed(None, *launcher(again))
        say(f"{size} ranks, one killed, then {again}: {trial + 1} of {trials}, {kept} shards kept")
    return {"trials": trials, "same_bytes_with": [1, 2, 3, 4]}


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The running processes that a launcher has started."""
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    main()
