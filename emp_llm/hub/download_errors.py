"""Why a download from the Hub failed: one line that says what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emp_llm.errors import HubError
from emp_llm.hub.hub_library import connection_error
from emp_llm.messages import first_line

__all__ = ["AGAIN", "DownloadStoppedError", "check_room", "explained", "refusals"]


AGAIN = "run the command again, files that are complete are kept"


class DownloadStoppedError(Exception):
    """A download has been stopped, because nobody needs it any more."""


@contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Raise a HubError in place of what huggingface_hub raises.

    Args:
        repo_id: The repository that is downloaded from.
        revision: The branch, tag or commit; None for the default branch.
    """
    try:
        yield
    except refusals() as error:
        raise HubError(_explain(error, repo_id, revision)) from error


def refusals(*more: type[BaseException]) -> tuple[type[BaseException], ...]:
    """The classes of errors that huggingface_hub raises if a request fails, and more."""
    # RuntimeError: raised by hf_xet, and around errors in a thread that uploads
    return (OSError, RuntimeError, connection_error(), *more)


def _explain(error: BaseException, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    page = f"{constants.ENDPOINT}/{name}"
    match error:
        case errors.OfflineModeIsEnabled():
            return (
                f"{name} is not complete in the cache ({constants.HF_HUB_CACHE}), and "
                "HF_HUB_OFFLINE forbids to download it: unset that, or give a local folder"
            )
        case errors.GatedRepoError():
            return (
                f"{name} is gated: accept its terms at {page}, then run `hf auth login` "
                "or set HF_TOKEN"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"{name} is neither a local folder nor a model at {constants.ENDPOINT} that "
                "you may see: check the name or, if it is private, run `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            return f"{name} has no revision {revision!r}: choose one of {page}/tree/main"
        case errors.LocalTokenNotFoundError():
            return f"{name} cannot be downloaded without a token: run `hf auth login`"
        case errors.HfHubHTTPError():
            return f"{name}: {_explain_status(error.response.status_code)}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return _no_room(constants.HF_HUB_CACHE, "is full")
        case OSError(errno=int()) if not isinstance(error, ConnectionError | TimeoutError):
            return f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}; set HF_HOME"
    return (
        f"{name}: the connection to {constants.ENDPOINT} failed ({first_line(error)}): "
        f"check the network, or the path if a folder is meant, then {AGAIN}"
    )


def _explain_status(status: int) -> str:
    match status:
        case 401:
            return "the Hub does not accept the token: run `hf auth login` or set HF_TOKEN anew"
        case 403:
            return "the token does not allow this: give it the right to read the repository"
        case 429:
            return f"the Hub asks for fewer requests (429): wait some minutes, then {AGAIN}"
    return f"the Hub answered with status {status}: wait some minutes, then {AGAIN}"


def check_room(folder: Path, needed: int) -> None:
    """Refuse a download that the disk of the cache has no room for.

    Args:
        folder: A folder of the cache.
        needed: Bytes that will be on its disk at once, beyond those that are there.

    Raises:
        HubError: If fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HubError(_no_room(folder, f"has {free:,} bytes free, {needed:,} are needed"))


def _no_room(where: object, state: str) -> str:
    return (
        f"the disk of the Hub's cache {state} ({where}): free some space or set HF_HOME to a "
        f"folder on a larger disk, then {AGAIN}"
    )
