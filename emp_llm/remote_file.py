"""Ranges of one file on the Hub: its header, without the data behind it."""

import time

from emp_llm.hub_errors import explained

__all__ = ["RemoteFile"]

_FIRST_LOOK = 128 << 10  # the headers of most shards are shorter
_TRIES = 5


class RemoteFile:
    """A file on the Hub, of which little is to be read.

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
        data = self._fetch(first, end)
        self._known.append((first, data))
        return data[start - first : stop - first]

    def _fetch(self, start: int, stop: int) -> bytes:
        """A range of the file, as often tried as a download is."""
        from huggingface_hub import errors

        with explained(self._repo_id, self._commit):
            for _ in range(_TRIES - 1):
                try:
                    return self._get(start, stop)
                except errors.HfHubHTTPError:
                    raise
                except errors.HTTPError:  # type: ignore[attr-defined]  # the connection broke
                    time.sleep(1)
            return self._get(start, stop)

    def _get(self, start: int, stop: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        with http_stream_backoff(
            "GET",
            hf_hub_url(self._repo_id, self._name, revision=self._commit),
            headers=build_hf_headers(token=self._token) | wanted,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),  # what breaks off in the middle cannot be retried there
        ) as response:
            hf_raise_for_status(response)
            # a mirror that knows no ranges sends the whole file
            before = start if response.status_code == 200 else 0
            for chunk in response.iter_bytes():
                data += chunk[before:]
                before = max(0, before - len(chunk))
                if len(data) >= stop - start:
                    break
        return bytes(data[: stop - start])
