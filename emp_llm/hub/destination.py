"""Where an upload goes: a repository on the Hub and a branch, created if they are not there."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emp_llm.errors import HubError, OptionError
from emp_llm.hub.address import read_address
from emp_llm.hub.hub_library import repo_id_fault
from emp_llm.hub.upload_errors import upload_explained
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Destination", "open_destination"]

_MAIN = "main"
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A place on the Hub that can be written to.

    Attributes:
        repo_id: The repository, with its owner.
        revision: The branch; None for the default branch.
        create_pr: Whether a pull request is opened instead of a commit made.
        branch_made: Whether the branch was created just now.
    """

    repo_id: str
    revision: str | None
    create_pr: bool
    branch_made: bool


def open_destination(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    again: str = "run the command again",
) -> Destination:
    """Make sure that there is a repository that the token may write to.

    Args:
        repo_id: Its name, ``user/name``, or its address; ``name`` alone belongs to the token's
            owner.
        private: Whether a repository that is created is private; None for its owner's default.
        revision: A branch; it is created from the default branch if it is not there.
        create_pr: Whether a pull request will be opened; then the repository must exist.
        token: Access token; None for that of the login.
        again: What to do once the cause is gone, for errors.

    Raises:
        OptionError: If `create_pr` is given together with a branch.
        HubError: If the name is impossible, there is no token, it is not accepted or may not
            write, `revision` is not a branch, or the repository exists and is public where a
            private one is asked for.
    """
    repo_id, revision = read_address(repo_id, revision)
    _check_name(repo_id)
    if revision == _MAIN:
        revision = None
    if create_pr and revision is not None:
        raise OptionError(
            f"revision is {revision!r} and create_pr is asked for, but a pull request goes to the "
            "default branch: leave one of them out"
        )
    _check_token(repo_id, token)
    from huggingface_hub import HfApi

    token = None if isinstance(token, bool) else token
    api, made = HfApi(token=token), False
    with upload_explained(repo_id, again):
        if create_pr:
            repo_id = api.repo_info(repo_id).id
        else:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and api.repo_info(repo_id).private is False:
            raise HubError(
                f"{repo_id} exists and is public; only a new repository can be created private: "
                "give another name, change its settings, or leave --private out"
            )
        if revision is not None:
            made = _open_branch(api, repo_id, revision)
    return Destination(repo_id=repo_id, revision=revision, create_pr=create_pr, branch_made=made)


def _check_name(repo_id: str) -> None:
    if fault := repo_id_fault(repo_id):
        raise HubError(
            f"{repo_id!r} cannot be the name of a repository ({first_line(fault)}); give one such "
            "as 'user/llama-2-7b-emp'"
        ) from fault


def _check_token(repo_id: str, token: str | bool | None) -> None:
    from huggingface_hub import constants, get_token

    if token is False or (not isinstance(token, str) and get_token() is None):
        raise HubError(
            f"{repo_id}: there is no token to write to {constants.ENDPOINT} with: run "
            "`hf auth login` or set HF_TOKEN"
        )


def _open_branch(api: "HfApi", repo_id: str, revision: str) -> bool:
    """Create a branch if it is not there; returns whether it was created."""
    refs = api.list_repo_refs(repo_id)
    if revision in {branch.name for branch in refs.branches}:
        return False
    if revision.startswith("refs/"):  # an open pull request
        api.repo_info(repo_id, revision=revision)
        return False
    is_tag = revision in {tag.name for tag in refs.tags}
    if is_tag or _COMMIT.fullmatch(revision):
        raise HubError(
            f"{repo_id}: {revision!r} is a {'tag' if is_tag else 'commit'}, which cannot be "
            "written to: give a branch, it is created if it is not there"
        )
    api.create_branch(repo_id, branch=revision)
    return True
