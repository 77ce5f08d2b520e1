"""Throw damaged files at the readers, for as long as you like.

    python tests/fuzz.py --minutes 60
    python tests/fuzz.py --minutes 10 --only packed --bounds-check
    python tests/fuzz.py --only header --seed 123 --once

What is made and what must hold of it stands in `tests/fuzzing`, one file a reader: an input is
either taken, and then what was read is checked in an independent way, or refused by an EmpError
in one printable line. Anything else is a fault: another exception, more than a few seconds, more
than a gigabyte, the end of the process. The first fault at each place is printed with the seed
that makes it again, `--once` shows its traceback. All readers get the same time, in turn.

`--bounds-check` compiles the kernels with numba's bounds checks (20 s, into a cache of its own).
"""

import argparse
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

INPUT_SECONDS = 60
MORE_MEMORY = 1 << 30
TURN = 1.0


class TookTooLongError(BaseException):
    """An input took longer than INPUT_SECONDS. No reader may catch it."""


READERS = ("header", "checkpoint", "packed", "torch", "config")


def reader(name: str, folder: Path) -> Callable[[int], bool]:
    """What is fuzzed: by its name, a function of a seed that tells whether the input was taken."""
    from fuzzing.choices import Choices

    if name == "header":
        from fuzzing import headers

        return lambda seed: headers.check_header(headers.make_header(Choices(seed)))
    if name == "packed":
        from fuzzing import packed_files

        packed_files.compile_kernels()
        return lambda seed: packed_files.check_packed(packed_files.make_packed(Choices(seed)))
    from fuzzing import checkpoints_on_disk

    model = folder / "model"
    checkpoints_on_disk.put_outside(checkpoints_on_disk.fresh(model))
    if name == "checkpoint":

        def checkpoint(seed: int) -> bool:
            checkpoints_on_disk.make_folder(Choices(seed), checkpoints_on_disk.fresh(model))
            return checkpoints_on_disk.check_folder(model)

        return checkpoint
    if name == "torch":
        from fuzzing import torch_files

        def torch_file(seed: int) -> bool:
            path = torch_files.make_torch_file(Choices(seed), checkpoints_on_disk.fresh(model))
            return torch_files.check_torch_file(path)

        return torch_file
    from fuzzing import configs

    def config(seed: int) -> bool:
        checkpoints_on_disk.fresh(model)
        return configs.check_config(
            folder, model, configs.make_config(Choices(seed), folder, model)
        )

    return config


def main() -> int:
    """Fuzz as the arguments say; returns 1 if there was a fault."""
    options = _arguments()
    if options.bounds_check:
        os.environ["NUMBA_BOUNDSCHECK"] = "1"
        # numba's cache does not tell code with checks from code without
        os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "emp-fuzz-bounds-check")
    faulthandler.enable()
    with tempfile.TemporaryDirectory(prefix="emp-fuzz-", dir=_fast_folder()) as folder:
        names = options.only or READERS
        chosen = {name: reader(name, Path(folder)) for name in names}
        if options.once:
            for check in chosen.values():
                print("taken" if check(options.seed) else "refused, as it should be")
            return 0
        return _fuzz(chosen, options.seed, 60 * options.minutes, Path(options.last))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--only", choices=READERS, action="append", help="repeatable")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big") << 24)
    parser.add_argument("--once", action="store_true", help="only this seed, with its traceback")
    parser.add_argument("--bounds-check", action="store_true")
    parser.add_argument(
        "--last", default=os.devnull, help="a file that is told each input before it is tried"
    )
    return parser.parse_args()


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 (a folder in it)


def _fuzz(chosen: dict[str, Callable[[int], bool]], seed: int, seconds: float, last: Path) -> int:
    print(f"seeds from {seed}", flush=True)
    for check in chosen.values():
        check(seed)  # what is imported only now shall not count as one input's time
    tried, taken, faults = Counter[str](), Counter[str](), Counter[str]()
    told = set[str]()
    end = time.monotonic() + seconds
    with _limits(), last.open("w") as note:
        for name, stop in _turns(list(chosen), end):
            while time.monotonic() < stop:
                number = seed + tried[name]
                note.seek(0)
                note.write(f"{name} {number:<30}")
                note.flush()
                tried[name] += 1
                try:
                    taken[name] += _in_time(chosen[name], number)
                except KeyboardInterrupt:
                    raise
                except BaseException as fault:  # every kind of it is a find
                    faults[name] += 1
                    told.add(_tell(name, number, fault, told))
    for name in chosen:
        print(
            f"{name}: {tried[name]:,} inputs tried, {taken[name]:,} of them taken, "
            f"{faults[name]:,} faults found",
            flush=True,
        )
    return 1 if faults.total() else 0


def _turns(names: list[str], end: float) -> Iterator[tuple[str, float]]:
    """Which reader has its turn, and until when; all get the same time."""
    spent = dict.fromkeys(names, 0.0)
    while (now := time.monotonic()) < end:
        name = min(names, key=spent.__getitem__)
        yield name, min(now + TURN, end)
        spent[name] += time.monotonic() - now


def _in_time(check: Callable[[int], bool], seed: int) -> bool:
    signal.setitimer(signal.ITIMER_REAL, INPUT_SECONDS)
    try:
        return check(seed)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _limits() -> Iterator[None]:
    """An alarm for what takes too long, and a ceiling on memory."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TookTooLongError(f"took more than {INPUT_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _tell(name: str, seed: int, fault: BaseException, told: set[str]) -> str:
    """Print a fault, unless one of its place was told of; returns its place."""
    where = traceback.extract_tb(fault.__traceback__)[-1]
    place = f"{name}: {type(fault).__name__} at {Path(where.filename).name}:{where.lineno}"
    if place not in told:
        text = (str(fault).splitlines() or [""])[0][:300]
        print(f"FAULT --only {name} --seed {seed} --once: {text}\n    {place}", flush=True)
    return place


if __name__ == "__main__":
    sys.exit(main())
