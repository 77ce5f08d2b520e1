"""Names of huggingface_hub that type checkers do not see, with types.

It exports them at run time only. Its errors and responses are httpx2's, and httpx's before its
release 2.0; the types here hold for both.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Protocol

__all__ = ["Response", "abort_xet", "connection_error", "get_stream", "repo_id_fault"]


class Response(Protocol):
    """A response to a request, of which the body is still to be read."""

    @property
    def status_code(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers; upper and lower case in their names make no difference."""

    @property
    def url(self) -> object:
        """The address that responded, after all redirections."""

    def iter_bytes(self) -> Iterator[bytes]:
        """The body, in chunks."""


def connection_error() -> type[Exception]:
    """The class of the errors for a broken connection and for an error from the Hub."""
    error: type[Exception] = import_module("huggingface_hub.errors").HTTPError
    return error


def repo_id_fault(repo_id: str) -> ValueError | None:
    """Why a name cannot be a repository's; None if it can."""
    from huggingface_hub.errors import HFValidationError

    try:
        import_module("huggingface_hub.utils").validate_repo_id(repo_id)
    except HFValidationError as error:
        return error
    return None


@contextmanager
def get_stream(
    url: str, *, token: str | bool | None, headers: Mapping[str, str]
) -> Iterator[Response]:
    """Request a file as huggingface_hub does, which waits and tries again if the Hub is busy.

    Args:
        url: Its address.
        token: Access token; None for that of the login, False for none.
        headers: Headers to send beside the token.

    Raises:
        HfHubHTTPError: If the response is an error.
    """
    from huggingface_hub import constants

    utils = import_module("huggingface_hub.utils")
    with utils.http_stream_backoff(
        "GET",
        url,
        headers=utils.build_hf_headers(token=token) | headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),  # a transfer that breaks off is resumed by the caller
    ) as response:
        utils.hf_raise_for_status(response)
        yield response


def abort_xet() -> None:
    """End the downloads of hf_xet, which no exception ends."""
    from huggingface_hub.utils import _xet

    abort: Callable[[], None] = _xet.abort_xet_session
    abort()
