"""Progress of a download, taken from the progress bar that huggingface_hub would draw."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from emp_llm.hub.download_errors import DownloadStoppedError

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

__all__ = ["DownloadReport", "bar_class"]

# The bars that count bytes of files. Others count files, or bytes of transfers, which may be
# compressed.
_BYTE_BARS = {"snapshot_download", "http_get", "xet_get"}
# The bar whose updates may raise an exception; the others are called by threads of hf_xet.
_STOPPABLE_BAR = "http_get"


class DownloadReport:
    """Counts the bytes that downloads bring, and passes the numbers on.

    Args:
        advance: Called with the number of bytes that have arrived since the last call.
        stopped: Called as bytes arrive; returns whether the download is to stop.

    Attributes:
        done: Bytes that have arrived.
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
        """Count bytes that have arrived."""
        self.done += nbytes
        self._advance(nbytes)


def bar_class(report: DownloadReport) -> "type[tqdm]":
    """The class of a progress bar that draws nothing and passes its updates on to a report.

    huggingface_hub offers no other way to see how far a download is, or to end one. An update of
    the bar raises DownloadStoppedError once `stopped` of the report returns True.
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
