"""Addresses of models on the Hub, as people copy them from a browser, read as ids.

https://huggingface.co/user/name             the id user/name
…/user/name/tree/REVISION                    and a revision; the same for commit and commits
…/user/name/blob/REVISION/config.json        and that of a file; the same for resolve and raw
hf.co/user/name, hf://user/name@REVISION     shorter
"""

import re
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from emp_llm.errors import HubError, OptionError

__all__ = ["read_address"]

_HOSTS: Final = ("huggingface.co", "www.huggingface.co", "hf.co")
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_OTHERS: Final = ("datasets", "spaces", "buckets", "collections", "papers", "docs", "blog")
_TREES: Final = ("tree", "commit", "commits")
_FILES: Final = ("blob", "resolve", "raw", "blame")
_REFS: Final = re.compile(r"refs/(?:pr|convert)/[^/]+")  # a revision, with slashes or with %2F


def read_address(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The id and the revision of a model that is named by its id, or by its address on the Hub.

    >>> read_address("https://huggingface.co/me/model/tree/v1.0/")
    ('me/model', 'v1.0')
    >>> read_address("me/model")
    ('me/model', None)

    Args:
        name: A Hub id, or the address of a page, at huggingface.co or where HF_ENDPOINT says. What
            is no address is returned as it is.
        revision: The revision that is asked for besides.

    Raises:
        HubError: If it is the address of something else.
        OptionError: If it names another revision than `revision`.
    """
    url = _split(name)
    if url is None:
        return name, revision
    repo_id, found = _read_short(url, name) if url.scheme == "hf" else _read_page(url, name)
    if found is not None and revision is not None and found != revision:
        raise OptionError(
            f"revision is {revision!r}, but {name} is at the revision {found!r}: leave one of them "
            "out"
        )
    return repo_id, found or revision


def _split(name: str) -> SplitResult | None:
    """The parts of an address; None for a name that is none."""
    if not _SCHEME.match(name):
        if name.partition("/")[0].lower() not in _HOSTS:
            return None
        name = f"https://{name}"
    try:
        return urlsplit(name)
    except ValueError as error:  # such as brackets around what is no IPv6 address
        raise HubError(f"{name}: is not an address ({error}); {_remedy()}") from error


def _read_page(url: SplitResult, name: str) -> tuple[str, str | None]:
    from huggingface_hub import constants

    endpoint, path = urlsplit(constants.ENDPOINT), url.path
    if url.netloc.lower() == endpoint.netloc.lower():
        path = path.removeprefix(endpoint.path)
    elif url.scheme not in ("http", "https") or url.hostname not in _HOSTS:
        raise HubError(f"{name}: is not an address on the Hub ({constants.ENDPOINT}); {_remedy()}")
    parts = [part for part in path.split("/") if part]
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    places = [i for i, part in enumerate(parts[:3]) if i and part in (*_TREES, *_FILES)]
    end = places[-1] if places else len(parts)
    repo_id = unquote("/".join(parts[:end])).removesuffix(".git")
    if not 1 <= end <= 2 or parts[0] in _OTHERS:
        known = "/".join(parts[:2]) if end > 2 and parts[0] not in _OTHERS else None
        raise HubError(f"{name}: is not the address of a model; {_remedy(known)}")
    revision, inside = _revision("/".join(parts[end + 1 :]))
    files = 1 if places and parts[end] in _FILES else 0
    _check_whole(name, repo_id, inside, files)
    return repo_id, revision


def _read_short(url: SplitResult, name: str) -> tuple[str, str | None]:
    path = (url.netloc + url.path).strip("/").removeprefix("models/")
    repo_id, _, rest = path.partition("@")
    user, _, own = repo_id.partition("/")
    own, _, inside = own.partition("/")
    if user in _OTHERS or not user:
        raise HubError(f"{name}: is not the address of a model; {_remedy()}")
    repo_id = f"{user}/{own}" if own else user
    revision, within = _revision(rest)
    _check_whole(name, repo_id, within or inside, 0)
    return repo_id, revision


def _revision(text: str) -> tuple[str | None, str]:
    """The revision that a text begins with, and the path behind it."""
    refs = _REFS.match(text)
    revision = refs[0] if refs else text.partition("/")[0]
    return unquote(revision) or None, text[len(revision) :].strip("/")


def _check_whole(name: str, repo_id: str, inside: str, files: int) -> None:
    """Refuse a folder inside a repository: the model at its top may be another one."""
    if len([part for part in inside.split("/") if part]) > files:
        raise HubError(
            f"{name}: lies in a folder of {repo_id}, but models are read from the top of a "
            f"repository; {_remedy(repo_id)}, or download that folder and give its path"
        )


def _remedy(repo_id: str | None = None) -> str:
    if repo_id is not None:
        return f"give {repo_id} for the model at its top"
    return "give a folder's path, or an id such as meta-llama/Llama-2-7b-hf"
