"""How far a download is, learnt through the progress bar that huggingface_hub would draw."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from emp_llm.hub.download_errors import DownloadStoppedError

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

__all__ = ["DownloadReport", "bar_class"]

# The bars that count bytes; others count files, or what is on the wire, which may be compressed.
_BYTE_BARS = {"snapshot_download", "http_get", "xet_get"}
# The one whose updates may raise: those of others are called by threads of hf_xet.
_STOPPABLE_BAR = "http_get"


class DownloadReport:
    """Counts the bytes that downloads bring, and passes them on.

    Args:
        advance: Called with the bytes that have come.
        stopped: Asked, as bytes come, whether to stop.

    Attributes:
        done: Bytes that came.
        began: Whether any download has begun.
        stopped: As given.
    """

    def __init__(
        self, advance: Callable[[int], None], stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self.done = 0
        self.began = False
        self.stopped = stopped
        self._advance = advance

    def add(self, nbytes: int) -> None:
        """Count bytes that have come."""
        self.done += nbytes
        self._advance(nbytes)


def bar_class(report: DownloadReport) -> "type[tqdm]":
    """A progress bar for huggingface_hub that draws nothing and counts in a report.

    huggingface_hub has no other way to learn how far a download is, or to end one: an update of
    its bar raises DownloadStoppedError once the report's `stopped` says so.
    """
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: object, name: str | None = None, **kwargs: object) -> None:
            kind = (name or "").removeprefix("huggingface_hub.")
            self._counts = kind in _BYTE_BARS
            self._can_raise = kind == _STOPPABLE_BAR
            report.began |= self._counts
            kwargs["disable"] = True
            initialize: Callable[..., None] = super().__init__
            initialize(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts:
                report.add(int(n or 0))
            if self._can_raise and report.stopped():
                raise DownloadStoppedError
            return None

    return Bar
