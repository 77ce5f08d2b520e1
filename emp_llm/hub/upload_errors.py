"""Why an upload to the Hub failed: one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emp_llm.errors import HubError
from emp_llm.hub.download_errors import refusals
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["upload_explained"]


@contextmanager
def upload_explained(repo_id: str, again: str) -> Iterator[None]:
    """Raise a HubError in place of what huggingface_hub raises.

    Args:
        repo_id: The repository that is uploaded to.
        again: What to do once the cause is gone, for the error: "run the command again".
    """
    try:
        yield
    except refusals(ValueError) as error:  # of a card's metadata
        message = _explain(error, repo_id, again)
        if message is None:
            raise
        raise HubError(message) from error


def _explain(error: BaseException, name: str, again: str) -> str | None:
    """The one line; None for an error that has nothing to do with the Hub."""
    from huggingface_hub import constants, errors

    if type(error) is RuntimeError and error.__cause__:
        error = error.__cause__
    hub = constants.ENDPOINT
    match error:
        case errors.OfflineModeIsEnabled():
            return f"{name}: HF_HUB_OFFLINE forbids to upload: unset it, then {again}"
        case errors.RepositoryNotFoundError():
            return (
                f"{name} does not exist at {hub}, or the token may not see it: check the name, or "
                f"take a token of its owner (`hf auth login`, HF_TOKEN), then {again}"
            )
        case errors.RevisionNotFoundError():
            return f"{name} has no such revision: choose one of {hub}/{name}/tree/main"
        case errors.HfHubHTTPError():
            return f"{name}: {_explain_status(error, hub, again)}"
        case ValueError() if "metadata in README.md" in str(error):
            faults = "; ".join(line.strip("- ") for line in str(error).splitlines()[1:])
            return (
                f"{name}: the Hub refuses the metadata of README.md ({faults}): correct what is "
                f"between its lines of ---, then {again}"
            )
        case ValueError():
            return None
        case OSError(errno=int()) if not isinstance(error, ConnectionError | TimeoutError):
            return f"{error.filename}: {error.strerror}: fix that, then {again}"
    return (
        f"{name}: the connection to {hub} failed ({first_line(error)}): check the network, then "
        f"{again}"
    )


def _explain_status(error: "HfHubHTTPError", hub: str, again: str) -> str:
    status = error.response.status_code
    said = getattr(error, "server_message", None)
    reason = f" ({' '.join(said.split())})" if said else ""
    match status:
        case 401:
            return (
                "the Hub does not accept the token: run `hf auth login` or set HF_TOKEN anew, "
                f"then {again}"
            )
        case 403:
            return (
                f"the token may not write to it{reason}: give it the right at "
                f"{hub}/settings/tokens, take one of its owner, or propose the files with "
                f"`emp-llm push --create-pr`; then {again}"
            )
        case 429:
            return f"the Hub asks for fewer requests (429): wait some minutes, then {again}"
        case _ if status < 500:
            return (
                f"the Hub refuses the upload with status {status}{reason}: fix that, then {again}"
            )
    return f"the Hub answered with status {status}{reason}: wait some minutes, then {again}"
