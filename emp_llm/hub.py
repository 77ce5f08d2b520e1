"""A model by name: a local folder as it is, or a repository of the Hugging Face Hub, fetched.

    name → folder? → yes: that folder
                   → no: config and index → the files they lead to → the cache's snapshot

Only what a pruned checkpoint is made from is downloaded: the safetensors that transformers would
load and the small files, not the same weights in other formats. Files come from the Hub's own
cache where they are there; ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean
what they mean to huggingface_hub.
"""

import errno
import glob
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from emp_llm.checkpoint import (
    CONFIG_NAME,
    choose_weights,
    is_small_file,
    read_index,
    read_json_object,
)
from emp_llm.errors import CheckpointError, HubError, OptionError
from emp_llm.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

__all__ = ["Downloaded", "Source", "fetch", "fetch_model"]

Downloaded = Callable[[int, int], None]
"""Told the bytes that are there and the bytes to download in all."""

_AGAIN = "run the command again, files that are complete are kept"


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies and where it came from.

    Attributes:
        folder: The local folder.
        repo_id: The Hub's name of it, such as ``meta-llama/Llama-2-7b-hf``; None if it was local.
        revision: The commit, as 40 hexadecimal digits; None if it was local.
    """

    folder: Path
    repo_id: str | None = None
    revision: str | None = None


def fetch(
    model: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: Downloaded | None = None,
) -> Source:
    """Find a model's folder, downloading it from the Hub if need be.

    Args:
        model: A local folder, which comes first, or a Hub id (``name`` or ``user/name``).
        revision: Branch, tag or commit on the Hub; the default branch if None.
        token: Access token; None takes the one logged in with, False none.
        progress: Called with the bytes done and the bytes to download in all, from several
            threads but never from two at once. Not called where nothing is to be downloaded.

    Returns:
        The folder; with its repository and commit where it comes from the Hub. That its content
        is a sound checkpoint is for `open_checkpoint` to check.

    Raises:
        OptionError: If a revision is given for a local folder.
        CheckpointError: If ``model`` is neither an existing folder nor a name the Hub could have.
        HubError: If the Hub or the way to it refuses, or the repository holds no safetensors.
    """
    if folder := _local_folder(model):
        if revision is not None:
            raise OptionError(
                f"revision is {revision!r}, but {model} is a local folder, which has none: "
                "leave it out, or give a Hub id"
            )
        return Source(folder)
    _check_repo_id(model)
    return _Repository(model, token, progress).fetch(revision)


def _local_folder(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: a home of nobody
        raise CheckpointError(f"{model}: cannot be read: {_line(error)}; check the path") from error
    if is_file:
        raise CheckpointError(f"{model}: is a file; give the folder of the checkpoint instead")
    return path if is_folder and model else None


def _check_repo_id(model: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: there is no such folder; check the path")
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise CheckpointError(
            f"{model!r} is neither an existing folder nor a possible Hub id ({_line(error)}); "
            "give a folder, or an id such as 'meta-llama/Llama-2-7b-hf'"
        ) from error


def fetch_model(
    model: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | bool | None,
    progress: Progress,
) -> Source:
    """`fetch`, telling its progress as every long work does; arguments and errors are its."""
    done = 0

    def advance(now: int, total: int) -> None:
        nonlocal done
        if not done:
            progress.begin("downloading", total)
        progress.advance(now - done)
        done = now

    return fetch(os.fspath(model), revision=revision, token=token, progress=advance)


class _Repository:
    """One repository of the Hub, and the way to it."""

    def __init__(self, repo_id: str, token: str | bool | None, progress: Downloaded | None) -> None:
        self.repo_id = repo_id
        self.token = token
        self.progress = progress

    def fetch(self, revision: str | None) -> Source:
        folder = self._download(revision, [CONFIG_NAME, "*.safetensors.index.json"])
        commit = folder.name
        sizes = self._sizes(folder, commit)
        wanted = self._choose(folder, sizes)
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            nbytes = sum(sizes[name] for name in missing)
            _check_room(folder, nbytes)
            patterns = [glob.escape(name) for name in missing]
            self._download(commit, patterns, _Report(self.progress, nbytes))
        self._check_sizes(folder, {name: sizes[name] for name in wanted})
        return Source(folder, self.repo_id, commit)

    def _download(
        self, revision: str | None, patterns: list[str], report: "_Report | None" = None
    ) -> Path:
        """Download what matches and is not in the cache; return the snapshot's folder in it."""
        from huggingface_hub import errors, snapshot_download

        refusals = (
            OSError,
            RuntimeError,  # of hf_xet
            errors.HTTPError,  # type: ignore[attr-defined]  # httpx2's, or httpx's before 2.0
        )
        try:
            return Path(
                snapshot_download(
                    self.repo_id,
                    revision=revision,
                    token=self.token,
                    allow_patterns=patterns,
                    tqdm_class=_bar_class(report),
                )
            )
        except refusals as error:
            raise HubError(self._explain(error, revision)) from error

    def _sizes(self, folder: Path, commit: str) -> dict[str, int]:
        """Every file of the repository with its bytes; offline, as far as the cache knows them."""
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            tree = get_cached_repo_tree(self.repo_id, revision=commit)
        except CachedRepoTreeNotFoundError:
            paths = [path for path in folder.rglob("*") if path.is_file()]
            return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        return {file.path: file.size for file in tree}

    def _choose(self, folder: Path, names: Collection[str]) -> list[str]:
        """Choose the files that a pruned checkpoint is made from, by their paths."""
        if CONFIG_NAME not in names:
            raise HubError(
                f"{self.repo_id} has no {CONFIG_NAME}, so it is no transformers model: "
                "give another repository or revision"
            )
        try:
            config = read_json_object(folder / CONFIG_NAME)
            beside = [name for name in names if "/" not in name]
            weights = choose_weights(config, beside, self.repo_id)
            is_index = weights.endswith(".json")
            shards = set(read_index(folder / weights)[0].values()) if is_index else set()
        except CheckpointError as error:
            raise HubError(f"{self.repo_id}: {error}") from error
        needed = {CONFIG_NAME, weights, *shards}
        absent = sorted(needed.difference(names))
        if absent:
            raise HubError(
                f"{self.repo_id}: {absent[0]} is missing, in the repository or, offline, in the "
                f"cache ({len(absent)} of {len(needed)} files): go online or give another revision"
            )
        return sorted(needed.union(name for name in names if is_small_file(PurePosixPath(name))))

    def _check_sizes(self, folder: Path, sizes: Mapping[str, int]) -> None:
        """Refuse damaged files: huggingface_hub takes what is in its cache for whole."""
        for name, size in sizes.items():
            found = (folder / name).stat().st_size
            if found != size:
                raise HubError(
                    f"{self.repo_id}: {name} is {found:,} bytes in the cache and {size:,} on the "
                    f"Hub: delete {(folder / name).resolve()}, then {_AGAIN}"
                )

    def _explain(self, error: BaseException, revision: str | None) -> str:
        """Say in one line what the Hub refused and what to do."""
        from huggingface_hub import constants, errors

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__
        name, page = self.repo_id, f"{constants.ENDPOINT}/{self.repo_id}"
        match error:
            case errors.OfflineModeIsEnabled():
                return (
                    f"{name} is not whole in the cache ({constants.HF_HUB_CACHE}), and "
                    "HF_HUB_OFFLINE forbids to fetch it: unset that, or give a local folder"
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
                return f"{name} cannot be fetched without a token: run `hf auth login`"
            case errors.HfHubHTTPError():
                return f"{name}: {_explain_status(error.response.status_code)}"
            case OSError(errno=errno.ENOSPC | errno.EDQUOT):
                return _no_room(constants.HF_HUB_CACHE, "is full")
            case OSError(errno=int()) if not isinstance(error, ConnectionError | TimeoutError):
                return f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}; set HF_HOME"
        return (
            f"{name}: the connection to {constants.ENDPOINT} failed ({_line(error)}): "
            f"check the network, then {_AGAIN}"
        )


def _explain_status(status: int) -> str:
    match status:
        case 401:
            return "the Hub does not accept the token: run `hf auth login` or set HF_TOKEN anew"
        case 403:
            return "the token does not allow this: give it the right to read the repository"
        case 429:
            return f"the Hub asks for fewer requests (429): wait some minutes, then {_AGAIN}"
    return f"the Hub answered with status {status}: wait some minutes, then {_AGAIN}"


def _line(error: BaseException) -> str:
    """The first line of an error's text; its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HubError(_no_room(folder, f"has {free:,} bytes left, {needed:,} are needed"))


def _no_room(where: object, state: str) -> str:
    return (
        f"the disk of the Hub's cache {state} ({where}): free some space or set HF_HOME to a "
        f"folder on a larger disk, then {_AGAIN}"
    )


class _Report:
    """Adds up what several downloads have done, and passes it on."""

    def __init__(self, progress: Downloaded | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0
        self.lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
            if self.progress:
                self.progress(self.done, self.total)


def _bar_class(report: _Report | None) -> "type[tqdm]":
    """Make a progress bar for huggingface_hub that draws nothing and tells the report."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: object, name: str | None = None, **kwargs: object) -> None:
            # of several bars, this one counts the bytes of all files
            self._counts = name == "huggingface_hub.snapshot_download"
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if report and self._counts:
                report.add(int(n or 0))
            return None

    return Bar
