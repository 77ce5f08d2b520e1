"""Feed damaged files to the readers, for as long as you like.

    python tests/fuzz.py --minutes 60
    python tests/fuzz.py --minutes 10 --only packed --bounds-check
    python tests/fuzz.py --only header --seed 123 --once

Each reader has a file in `tests/fuzzing` that makes inputs for it and checks the result. An input
is either accepted, and then what was read is checked in an independent way, or it is refused by an
EmpError in one printable line. Anything else is a fault: another exception, more than a minute,
more than a gigabyte of memory, the end of the process. The first fault at each place in the code is
printed with the seed that reproduces it; `--once` shows its traceback. All readers get the same
time, in turn.

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


READERS = ("header", "checkpoint", "packed", "whole", "torch", "config")


def reader(name: str, folder: Path) -> Callable[[int], bool]:
    """A function that makes an input from a seed and returns whether the reader accepts it."""
    from fuzzing.choices import Choices

    if name == "header":
        from fuzzing import headers

        return lambda seed: headers.check_header(headers.make_header(Choices(seed)))
    if name == "packed":
        from fuzzing import packed_files

        packed_files.compile_kernels()
        return lambda seed: packed_files.check_packed(packed_files.make_packed(Choices(seed)))
    if name == "whole":
        from fuzzing import packed_files, whole_files

        whole_files.compile_kernels()
        return lambda seed: packed_files.check_packed(whole_files.make_whole(Choices(seed)))
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
        # numba's cache does not distinguish code with checks from code without
        os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "emp-fuzz-bounds-check")
    faulthandler.enable()
    with tempfile.TemporaryDirectory(prefix="emp-fuzz-", dir=_fast_folder()) as folder:
        names = options.only or READERS
        chosen = {name: reader(name, Path(folder)) for name in names}
        if options.once:
            for check in chosen.values():
                print("accepted" if check(options.seed) else "refused with an EmpError")
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
        "--last", default=os.devnull, help="a file to note each input in before it is tried"
    )
    return parser.parse_args()


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 (a folder in it)


def _fuzz(chosen: dict[str, Callable[[int], bool]], seed: int, seconds: float, last: Path) -> int:
    print(f"seeds from {seed}", flush=True)
    for check in chosen.values():
        check(seed)  # so that imports do not count as the time of the first input
    tried, accepted, faults = Counter[str](), Counter[str](), Counter[str]()
    printed = set[str]()
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
                    accepted[name] += _in_time(chosen[name], number)
                except KeyboardInterrupt:
                    raise
                except BaseException as fault:  # whatever it is
                    faults[name] += 1
                    printed.add(_print_fault(name, number, fault, printed))
    for name in chosen:
        print(
            f"{name}: {tried[name]:,} inputs tried, {accepted[name]:,} of them accepted, "
            f"{faults[name]:,} faults found",
            flush=True,
        )
    return 1 if faults.total() else 0


def _turns(names: list[str], end: float) -> Iterator[tuple[str, float]]:
    """The reader that is next, and until when; all get the same time."""
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
    """An alarm for inputs that take too long, and a limit on memory."""

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


def _print_fault(name: str, seed: int, fault: BaseException, printed: set[str]) -> str:
    """Print a fault, unless one at the same place was printed; returns its place."""
    where = traceback.extract_tb(fault.__traceback__)[-1]
    place = f"{name}: {type(fault).__name__} at {Path(where.filename).name}:{where.lineno}"
    if place not in printed:
        text = (str(fault).splitlines() or [""])[0][:300]
        print(f"FAULT --only {name} --seed {seed} --once: {text}\n    {place}", flush=True)
    return place


if __name__ == "__main__":
    sys.exit(main())
