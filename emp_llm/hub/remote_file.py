"""Byte ranges of a file on the Hub: its header without the data, or parts of the data."""

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
_WHOLE_FILE = 200  # the status of a response with the whole file; that of a range has 206
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)", re.IGNORECASE)


class RemoteFile:
    """A file on the Hub that is read in parts. `read_into` is for any thread.

    Args:
        repo_id: The repository's name.
        commit: The commit.
        token: Access token; None for that of the login, False for none.
        name: The file's path in the repository.
        size: Its size in bytes.
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
        # The Hub redirects to the server that stores a file. Its address is used again, because one
        # request to the Hub for each range would soon exceed the rate that it allows. The address
        # expires; from then on the Hub is asked each time.
        self._address: str | None = None
        self._keeps_address = True

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from an offset up to another, or those of them that the file has.

        At least 128 KiB are downloaded at a time and kept, because what is read next is usually
        close by.

        Raises:
            HubError: If the Hub, or the connection to it, refuses.
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

        If the connection breaks, reading resumes at the first missing byte. Only after five breaks
        in a row without a single byte in between does it fail.

        Args:
            start: Offset of the first byte.
            buffer: Not empty.
            stopped: Called again and again; returns whether to stop.
            any_server: Whether to read from a server that only sends whole files, and to drop what
                comes before `start`; otherwise that is an error.

        Raises:
            HubError: If the Hub, or the connection to it, refuses, sends whole files only, or
                sends other bytes than those asked for.
            DownloadStoppedError: If it was stopped.
        """
        from huggingface_hub import errors

        done = failures = 0
        with explained(self._repo_id, self._commit):
            while done < len(buffer):
                if stopped():
                    raise DownloadStoppedError
                address, before = self._address, done
                try:
                    parts = self._parts(address, start + done, start + len(buffer), any_server)
                    with closing(parts):
                        for part in parts:
                            if stopped():
                                raise DownloadStoppedError
                            buffer[done : done + len(part)] = part
                            done += len(part)
                except errors.HfHubHTTPError:
                    if address is None:
                        raise
                    self._address, self._keeps_address = None, False  # expired: ask the Hub
                except connection_error():
                    failures = 1 if done > before else failures + 1
                    if failures == _TRIES:
                        raise
                    time.sleep(1)

    def _parts(
        self, address: str | None, start: int, stop: int, any_server: bool
    ) -> Generator[bytes]:
        """The bytes from `start` to `stop`, as far as one request brings them."""
        left = stop - start
        with self._request(address, start, stop) as response:
            skipped = self._bytes_before(response, start)
            if skipped and not any_server:
                raise self._no_ranges()
            for chunk in response.iter_bytes():
                part = chunk[skipped:][:left]
                skipped = max(0, skipped - len(chunk))
                left -= len(part)
                yield part
                if not left:
                    return  # a server that does not know ranges would go on to the end
        raise connection_error()("its answer ended early")

    @contextmanager
    def _request(self, address: str | None, start: int, stop: int) -> Iterator[Response]:
        from huggingface_hub import hf_hub_url

        home = hf_hub_url(self._repo_id, self._name, revision=self._commit)
        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        elsewhere = address is not None and urlsplit(address).netloc != urlsplit(home).netloc
        # the address of another server holds a signature; the token is for the Hub alone
        token = False if elsewhere else self._token
        with get_stream(address or home, token=token, headers=wanted) as response:
            if self._keeps_address and str(response.url) != home:
                self._address = str(response.url)
            yield response

    def _bytes_before(self, response: Response, start: int) -> int:
        """How many bytes of a response come before the first that was asked for.

        Raises:
            HubError: If it is another range, or of a file of another size.
        """
        if response.status_code == _WHOLE_FILE:
            length = response.headers.get("Content-Length", str(self._size))
            encoded = "Content-Encoding" in response.headers
            if encoded or length == str(self._size):
                return start
        else:
            sent = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if sent and int(sent[1]) == start and sent[2] in ("*", str(self._size)):
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
