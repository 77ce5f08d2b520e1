"""The memory that this process takes."""

import resource
from pathlib import Path

__all__ = ["peak_bytes", "resident_bytes"]

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Bytes of this process that are in memory now, pages of files that it has mapped included."""
    return _field("VmRSS")


def peak_bytes() -> int:
    """The most bytes that it has had in memory; getrusage includes the process it came from."""
    if _STATUS.is_file():
        return _field("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _field(name: str) -> int:
    """A field of Linux's status of this process, which counts in KiB."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
