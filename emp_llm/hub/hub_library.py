"""What is used of huggingface_hub beyond the names that its types declare.

It exports these names when they are asked for, without declaring them, and it brings the errors and
answers of httpx2, of httpx before its release 2.0. Here they have types that hold for both.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Protocol

__all__ = ["Response", "abort_xet", "connection_error", "get_stream", "repo_id_fault"]


class Response(Protocol):
    """An answer, of which the body is still to be read."""

    @property
    def status_code(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers; their names are found however they are written."""

    @property
    def url(self) -> object:
        """The address that answered, after all redirections."""

    def iter_bytes(self) -> Iterator[bytes]:
        """The body, in chunks."""


def connection_error() -> type[Exception]:
    """The class of what is raised where a connection breaks, or the Hub answers with an error."""
    error: type[Exception] = import_module("huggingface_hub.errors").HTTPError
    return error


def repo_id_fault(repo_id: str) -> ValueError | None:
    """Why a name cannot be that of a repository; None if it can."""
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
    """Ask for a file as huggingface_hub does, which waits and asks again where the Hub is busy.

    Args:
        url: Its address.
        token: Access token; None takes the one logged in with, False none.
        headers: To be sent beside the token.

    Raises:
        HfHubHTTPError: If the answer is an error.
    """
    from huggingface_hub import constants

    utils = import_module("huggingface_hub.utils")
    with utils.http_stream_backoff(
        "GET",
        url,
        headers=utils.build_hf_headers(token=token) | headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),  # what breaks off in the middle cannot be retried there
    ) as response:
        utils.hf_raise_for_status(response)
        yield response


def abort_xet() -> None:
    """End what hf_xet downloads, which takes no notice of anything else."""
    from huggingface_hub.utils import _xet

    abort: Callable[[], None] = _xet.abort_xet_session
    abort()
