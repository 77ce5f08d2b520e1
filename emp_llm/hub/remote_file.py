"""Ranges of one file on the Hub: its header without the data behind it, or parts of the data."""

import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

from emp_llm.errors import HubError
from emp_llm.hub.download_errors import DownloadStoppedError, explained
from emp_llm.hub.hub_library import Response, connection_error, get_stream

__all__ = ["RemoteFile"]

_FIRST_LOOK = 128 << 10  # the headers of most shards are shorter
_TRIES = 5
_WHOLE = 200
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)", re.IGNORECASE)


class RemoteFile:
    """A file on the Hub, of which not all is to be read. `read_into` is for any thread.

    Args:
        repo_id: The repository's name.
        commit: The commit.
        token: Access token; None takes the one logged in with, False none.
        name: The file's path in the repository.
        size: Its bytes.
    """

    def __init__(
        self, repo_id: str, commit: str | None, token: str | bool | None, name: str, size: int
    ) -> None:
        self._repo_id = repo_id
        self._commit = commit
        self._token = token
        self._name = name
        self._size = size
        self._known: list[tuple[int, bytes]] = []
        # where the Hub has sent us; to ask it for each range would use up the requests it allows
        self._place: str | None = None
        self._place_holds = True

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from an offset up to another, or those of them that the file has.

        More than is asked for is fetched and kept: what is read next is mostly beside it.

        Raises:
            HubError: If the Hub or the way to it refuses.
        """
        stop = min(stop, self._size)
        for first, data in self._known:
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        if start >= stop:
            return b""
        end = min(max(stop, start + _FIRST_LOOK), self._size)
        first = max(0, min(start, end - _FIRST_LOOK))
        buffer = bytearray(end - first)
        self.read_into(first, memoryview(buffer), any_server=True)
        data = bytes(buffer)
        self._known.append((first, data))
        return data[start - first : stop - first]

    def read_into(
        self,
        start: int,
        buffer: memoryview,
        *,
        stopped: Callable[[], bool] = lambda: False,
        any_server: bool = False,
    ) -> None:
        """Fill a buffer with the file's bytes from `start` on.

        Where the connection breaks, reading goes on there, up to so many times in a row.

        Args:
            start: The first byte.
            buffer: Not empty.
            stopped: Asked now and then whether to stop.
            any_server: Whether to read up to there where whole files are sent only.

        Raises:
            HubError: If the Hub or the way to it refuses, or sends whole files only or other
                bytes.
            DownloadStoppedError: If it was stopped.
        """
        from huggingface_hub import errors

        done = failures = 0
        with explained(self._repo_id, self._commit):
            while done < len(buffer):
                if stopped():
                    raise DownloadStoppedError
                place, before = self._place, done
                try:
                    parts = self._parts(place, start + done, start + len(buffer), any_server)
                    with closing(parts):
                        for part in parts:
                            if stopped():
                                raise DownloadStoppedError
                            buffer[done : done + len(part)] = part
                            done += len(part)
                except errors.HfHubHTTPError:
                    if place is None:
                        raise
                    self._place, self._place_holds = None, False  # expired: ask the Hub itself
                except connection_error():
                    failures = 1 if done > before else failures + 1
                    if failures == _TRIES:
                        raise
                    time.sleep(1)

    def _parts(
        self, place: str | None, start: int, stop: int, any_server: bool
    ) -> Generator[bytes]:
        """What one request brings of the bytes from `start` to `stop`."""
        left = stop - start
        with self._request(place, start, stop) as response:
            skipped = self._bytes_before(response, start)
            if skipped and not any_server:
                raise self._no_ranges()
            for chunk in response.iter_bytes():
                part = chunk[skipped:][:left]
                skipped = max(0, skipped - len(chunk))
                left -= len(part)
                yield part
                if not left:
                    return  # a server that knows no ranges would go on
        raise connection_error()("its answer ended early")

    @contextmanager
    def _request(self, place: str | None, start: int, stop: int) -> Iterator[Response]:
        from huggingface_hub import hf_hub_url

        home = hf_hub_url(self._repo_id, self._name, revision=self._commit)
        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        elsewhere = place is not None and urlsplit(place).netloc != urlsplit(home).netloc
        token = False if elsewhere else self._token  # such an address tells by itself who may read
        with get_stream(place or home, token=token, headers=wanted) as response:
            if self._place_holds and str(response.url) != home:
                self._place = str(response.url)
            yield response

    def _bytes_before(self, response: Response, start: int) -> int:
        """How many bytes of an answer come before the one that was asked for.

        Raises:
            HubError: If it is a part that was not asked for, or of a file of another size.
        """
        if response.status_code == _WHOLE:
            length = response.headers.get("Content-Length", str(self._size))
            encoded = "Content-Encoding" in response.headers
            if encoded or length == str(self._size):
                return start
        else:
            told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if told and int(told[1]) == start and told[2] in ("*", str(self._size)):
                return 0
        raise HubError(
            f"{self._repo_id}: {urlsplit(str(response.url)).netloc} sends other bytes of "
            f"{self._name} than were asked for: download the model first (emp-llm inspect "
            "--download)"
        )

    def _no_ranges(self) -> HubError:
        from huggingface_hub import constants

        return HubError(
            f"{self._repo_id}: {constants.ENDPOINT} sends whole files only, no parts of them: "
            "download the model first (emp-llm inspect --download)"
        )
