"""A repository of the Hugging Face Hub, downloaded to the Hub's own cache.

    config and index → the other files → the headers of shards, and later each shard

Only what a pruned checkpoint is made from is downloaded: the weights that transformers would load
and the files that travel with them, but not the same weights in other formats. Files that are in
the cache are taken from there.
"""

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from emp_llm.checkpoint.header import Header
from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import CONFIG_NAME, BesideWeights, sort_files
from emp_llm.checkpoint.meta_llama.params import PARAMS_NAME
from emp_llm.checkpoint.meta_llama.part_files import is_original, part_names
from emp_llm.checkpoint.other_formats import describe_other_format
from emp_llm.checkpoint.shard import Shard, read_any_header_by
from emp_llm.checkpoint.weight_files import choose_weights, read_index
from emp_llm.errors import CheckpointError, HubError
from emp_llm.hub.download_errors import AGAIN, check_room, explained
from emp_llm.hub.download_report import DownloadReport, bar_class
from emp_llm.hub.remote_file import RemoteFile
from emp_llm.runtime.progress import SharedProgress

__all__ = ["IN_WORK", "Fetched", "Repository"]

IN_WORK = 2
"""Shards on disk at once if they are discarded after use: one in use, one being downloaded."""

_LEADING = [
    *(CONFIG_NAME, "*.safetensors.index.json", "pytorch_model.bin.index.json"),
    PARAMS_NAME,
]


@dataclass(frozen=True)
class Fetched:
    """A checkpoint of a repository, of which the data of shards may still be missing.

    Attributes:
        folder: The snapshot's folder in the cache.
        to_come: The headers of the missing shards, by file name.
        beside: The files beside the weights, downloaded if they travel.
    """

    folder: Path
    to_come: dict[str, Header]
    beside: BesideWeights


class Repository:
    """A repository on the Hub, at one commit.

    Args:
        repo_id: Its name.
        token: Access token; None for that of the login, False for none.
        progress: Where downloads are reported.
    """

    def __init__(self, repo_id: str, token: str | bool | None, progress: SharedProgress) -> None:
        self._repo_id = repo_id
        self._token = token
        self._progress = progress
        self._commit: str | None = None

    def fetch_all_but_data(
        self, revision: str | None, *, discard: bool, whole: bool, beside: bool
    ) -> Fetched:
        """Download all of a checkpoint except for the data of shards that are not in the cache.

        Args:
            revision: Branch, tag or commit; the default branch if None.
            discard: Whether shards are deleted after use, so that the disk needs room for
                `IN_WORK` of them only.
            whole: Whether all shards are wanted on disk.
            beside: Whether the files beside them are, not config and index alone.

        Raises:
            HubError: If the Hub, or the connection to it, refuses, the repository holds no weights
                or damaged ones, or the disk has no room for what is missing.
        """
        folder = self._snapshot(revision, _LEADING)
        self._commit = folder.name
        sizes = self._sizes(folder)
        shards, others, found = self._choose(folder, sizes)
        to_come = [name for name in shards if not (folder / name).is_file()]
        missing = [name for name in others if beside and not (folder / name).is_file()]
        # a shard in Meta's format needs all parts, so discarding saves no room there
        in_work = IN_WORK if discard and CONFIG_NAME in sizes else len(to_come)
        at_once = sorted((sizes[name] for name in to_come), reverse=True)[:in_work]
        nbytes = sum(sizes[name] for name in missing)
        if whole and (missing or to_come):
            check_room(folder, nbytes + sum(at_once))
        if missing:
            report = DownloadReport(self._progress.advance)
            self._progress.begin("downloading", nbytes)
            # by commit: the branch may have moved since its files were listed
            self._snapshot(self._commit, [glob.escape(name) for name in missing], report)
        for name in sorted({*shards, *others}.difference(to_come)):
            if (folder / name).is_file():
                self._check_size(folder, name, sizes[name])
        headers = {name: self._remote_header(name, sizes[name]) for name in to_come}
        return Fetched(folder, headers, found)

    def file(self, name: str, size: int) -> RemoteFile:
        """A file of the repository, of so many bytes, to be read from the Hub in parts."""
        return RemoteFile(self._repo_id, self._commit, self._token, name, size)

    def expect(self, nbytes: int) -> None:
        """Report that so many bytes will be downloaded."""
        self._progress.expect(nbytes)

    def fetched(self, nbytes: int) -> None:
        """Report that so many bytes have been downloaded, otherwise than by `download`."""
        self._progress.fetched(nbytes)

    def download(self, shard: Shard, stopped: Callable[[], bool]) -> bool:
        """Download a shard into the cache.

        Args:
            shard: One that was not in the cache when its header was read.
            stopped: Called again and again; returns whether to stop.

        Returns:
            Whether it was downloaded here; False if another process has put it there meanwhile.

        Raises:
            DownloadStoppedError: If it was stopped.
            HubError: If the Hub, or the connection to it, refuses, or the file is not the one
                whose header was read.
        """
        from huggingface_hub import hf_hub_download

        report = DownloadReport(self._progress.fetched, stopped)
        with explained(self._repo_id, self._commit):
            hf_hub_download(
                self._repo_id,
                shard.name,
                revision=self._commit,
                token=self._token,
                tqdm_class=bar_class(report),
            )
        self._progress.fetched(shard.header.file_size - report.done)
        self._check_size(shard.path.parent, shard.name, shard.header.file_size)
        self._check_header(shard)
        return report.began

    def _snapshot(
        self, revision: str | None, patterns: list[str], report: DownloadReport | None = None
    ) -> Path:
        """Download the files that match and are not in the cache; returns the snapshot's folder."""
        from huggingface_hub import snapshot_download

        with explained(self._repo_id, revision):
            return Path(
                snapshot_download(
                    self._repo_id,
                    revision=revision,
                    token=self._token,
                    allow_patterns=patterns,
                    tqdm_class=bar_class(report or DownloadReport(lambda _nbytes: None)),
                )
            )

    def _sizes(self, folder: Path) -> dict[str, int]:
        """The size in bytes of each file of the repository; offline, of those the cache knows."""
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            tree = get_cached_repo_tree(self._repo_id, revision=self._commit)
        except CachedRepoTreeNotFoundError:
            paths = [path for path in folder.rglob("*") if path.is_file()]
            return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        return {file.path: file.size for file in tree}

    def _choose(
        self, folder: Path, sizes: Mapping[str, int]
    ) -> tuple[list[str], list[str], BesideWeights]:
        """Choose the files that a pruned checkpoint is made from: shards, and others, by path."""
        try:
            names = [name for name in sizes if "/" not in name]
            leads, shards = self._choose_weights(folder, names)
        except CheckpointError as error:
            raise self._named(error) from error
        needed = {*leads, *shards}
        absent = sorted(needed.difference(sizes))
        if absent:
            raise HubError(
                f"{self._repo_id}: {absent[0]} is missing, in the repository or, offline, in the "
                f"cache ({len(absent)} of {len(needed)} files): go online or give another revision"
            )
        beside = sort_files(sizes, needed, meta_llama=CONFIG_NAME not in leads)
        others = leads.union(beside.travelling).difference(shards)
        return sorted(shards), sorted(others), beside

    def _choose_weights(self, folder: Path, names: list[str]) -> tuple[set[str], set[str]]:
        """Choose the files that lead to the weights, and the files of the weights."""
        if CONFIG_NAME in names:
            weights = choose_weights(read_json_object(folder / CONFIG_NAME), names, self._repo_id)
            is_index = weights.endswith(".json")
            shards = set(read_index(folder / weights)[0].values()) if is_index else {weights}
            return {CONFIG_NAME, weights}, shards
        if is_original(names):
            return {PARAMS_NAME}, set(part_names(names, self._repo_id))
        if instead := describe_other_format(names):
            raise HubError(f"{self._repo_id}: holds {instead}")
        raise HubError(
            f"{self._repo_id} has no {CONFIG_NAME}, so it is not a transformers model: "
            "give another repository or revision"
        )

    def _check_size(self, folder: Path, name: str, size: int) -> None:
        """Refuse a file of another size: huggingface_hub takes all files in its cache for whole."""
        found = (folder / name).stat().st_size
        if found != size:
            raise HubError(
                f"{self._repo_id}: {name} is {found:,} bytes in the cache and {size:,} on the "
                f"Hub: delete {(folder / name).resolve()}, then {AGAIN}"
            )

    def _check_header(self, shard: Shard) -> None:
        """Refuse a shard with another header than the one that the work was planned by."""
        try:
            same = shard.read_header() == shard.header
        except CheckpointError:
            same = False
        if not same:
            raise HubError(
                f"{self._repo_id}: {shard.name} has another header in the cache than on the Hub: "
                f"delete {shard.path.resolve()}, then {AGAIN}"
            )

    def _remote_header(self, name: str, size: int) -> Header:
        file = self.file(name, size)
        try:
            return read_any_header_by(file.read, name, size)
        except CheckpointError as error:
            raise self._named(error) from error

    def _named(self, error: CheckpointError) -> HubError:
        """An error about the repository's files as one that names the repository, once."""
        if isinstance(error, HubError):
            return error
        return HubError(f"{self._repo_id}: {str(error).removeprefix(f'{self._repo_id}: ')}")
