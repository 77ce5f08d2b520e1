"""Finds a model by its name: a local folder, or a repository of the Hugging Face Hub.

    name → is it a folder? → yes: that folder
                           → no: the snapshot in the Hub's cache; shards may still be missing

Either way all headers are known, and files are opened by `Source.files`, which waits for those that
are being downloaded. ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` work as in
huggingface_hub.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from emp_llm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from emp_llm.checkpoint.header import Header
from emp_llm.checkpoint.left_behind import BesideWeights
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.errors import CheckpointError, OptionError
from emp_llm.hub.address import read_address
from emp_llm.hub.arrivals import Arrivals
from emp_llm.hub.download_errors import explained
from emp_llm.hub.hub_library import repo_id_fault
from emp_llm.hub.repository import Repository
from emp_llm.messages import encodable, first_line
from emp_llm.runtime.progress import SharedProgress

if TYPE_CHECKING:
    from emp_llm.tensors.read_order import Span

__all__ = ["Source", "find_file", "find_source"]


@dataclass(frozen=True)
class Source:
    """The model that is read.

    Attributes:
        folder: Its local folder.
        repo_id: Its name on the Hub, such as ``meta-llama/Llama-2-7b-hf``; None for a local model.
        revision: The commit, 40 hexadecimal digits; None for a local model.
        to_come: Headers, by file name, of the shards that are still to be downloaded.
    """

    folder: Path
    repo_id: str | None = None
    revision: str | None = None
    to_come: Mapping[str, Header] = field(default_factory=dict, compare=False)
    _beside: BesideWeights | None = field(default=None, compare=False, repr=False)
    _repository: Repository | None = field(default=None, compare=False, repr=False)
    _discard: bool = field(default=False, compare=False, repr=False)

    def open_checkpoint(self) -> Checkpoint:
        """The checkpoint, including its shards that are still to be downloaded.

        Raises:
            CheckpointError: As `emp_llm.checkpoint.checkpoint.open_checkpoint` does.
        """
        checkpoint = open_checkpoint(self.folder, self.to_come)
        # the folder has only what was downloaded
        return checkpoint if self._beside is None else replace(checkpoint, beside=self._beside)

    def ranges(self, shards: Sequence[Shard], spans: "Iterable[Span]") -> OpenFiles:
        """The files of these shards, to read only some spans of them, in this order.

        From shards that are not in the cache only the spans are downloaded, and nothing is kept.
        Shards that ``torch.save`` wrote cannot be read in parts; if there are any, this is `files`.
        """
        from emp_llm.hub.ranges import RangeFiles
        from emp_llm.tensors.read_order import has_ranges

        if not all(has_ranges(shard) for shard in shards):
            return self.files(shards)
        awaited = [span for span in spans if span.shard.name in self.to_come]
        if self._repository is None or not awaited:
            return OpenFiles()
        return RangeFiles(self._repository, awaited)

    def files(self, shards: Iterable[Shard]) -> OpenFiles:
        """The files of these shards, to use in this order.

        Missing ones are downloaded one after the other once the first is asked for.
        """
        awaited = [
            shard for shard in shards if any(part.name in self.to_come for part in shard.parts)
        ]
        if self._repository is None or not awaited:
            return OpenFiles()
        return Arrivals(self._repository, awaited, self.to_come, discard=self._discard)

    def fetch(self, checkpoint: Checkpoint, progress: SharedProgress) -> None:
        """Wait until all shards of the checkpoint are on disk.

        Raises:
            HubError: If one cannot be downloaded.
        """
        if not self.to_come:
            return
        with self.files(checkpoint.shards) as files:
            progress.begin("reading", 0)
            for shard in checkpoint.shards:
                files.file(shard)


def find_source(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    discard: bool = False,
    whole: bool = True,
    beside: bool = True,
    progress: SharedProgress,
) -> Source:
    """Find a model: its folder, or its repository, which is downloaded except for shards' data.

    Args:
        model: A local folder, or a Hub id (``name`` or ``user/name``) or address, see
            `emp_llm.hub.address.read_address`. A folder of that name comes first.
        revision: Branch, tag or commit on the Hub; the default branch if None.
        token: Access token; None for that of the login, False for none.
        discard: Whether each shard that is downloaded is deleted after use.
        whole: Whether all shards are wanted on disk; `Source.ranges` puts none there.
        beside: Whether the files beside the weights are wanted; they are downloaded now.
        progress: Where downloads are reported, now and when shards are downloaded.

    Returns:
        The folder, with its repository and commit if it comes from the Hub. Whether its content
        is a valid checkpoint, `Source.open_checkpoint` checks.

    Raises:
        OptionError: If a revision is given for a local folder, or one is to be discarded; or if an
            address names another revision than `revision`.
        CheckpointError: If ``model`` is neither an existing folder nor a possible Hub id.
        HubError: If the Hub, or the connection to it, refuses, or the repository has no weights.
    """
    model = os.fspath(model)
    if folder := _local_folder(model):  # before the Hub is asked anything
        _check_no_revision(model, revision)
        if discard:
            raise OptionError(
                f"discard_source: {model} is a local folder, which is never deleted: leave it "
                "out, or give a Hub id"
            )
        return Source(folder)
    model, revision = read_address(model, revision)
    _check_repo_id(model, revision)
    repository = Repository(model, token, progress)
    found = repository.fetch_all_but_data(revision, discard=discard, whole=whole, beside=beside)
    commit = found.folder.name
    return Source(found.folder, model, commit, found.to_come, found.beside, repository, discard)


def find_file(
    model: str | os.PathLike[str],
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path | None:
    """Find one small file of a model; nothing else is downloaded.

    Args:
        model: As for `find_source`.
        name: The file's name.
        revision: As for `find_source`.
        token: As for `find_source`.

    Returns:
        Its path; None if the model has no such file.

    Raises:
        OptionError: As `find_source` does.
        CheckpointError: As `find_source` does.
        HubError: As `find_source` does.
    """
    model = os.fspath(model)
    if folder := _local_folder(model):
        _check_no_revision(model, revision)
        return folder / name if (folder / name).is_file() else None
    model, revision = read_address(model, revision)
    _check_repo_id(model, revision)
    from huggingface_hub import errors, hf_hub_download

    with explained(model, revision):
        try:
            return Path(hf_hub_download(model, name, revision=revision, token=token))
        except errors.LocalEntryNotFoundError:  # a subclass of the next: it is offline
            raise
        except errors.EntryNotFoundError:
            return None


def _check_no_revision(folder: str, revision: str | None) -> None:
    if revision is not None:
        raise OptionError(
            f"revision is {revision!r}, but {folder} is a local folder, which has none: "
            "leave it out, or give a Hub id"
        )


def _local_folder(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user for an unknown user
        raise CheckpointError(
            f"{model}: cannot be read: {first_line(error)}; check the path"
        ) from error
    if is_file:
        raise CheckpointError(f"{model}: is a file; give the folder of the checkpoint instead")
    return path if is_folder and model else None


def _check_repo_id(model: str, revision: str | None) -> None:
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: there is no such folder; check the path")
    if fault := repo_id_fault(model):
        raise CheckpointError(
            f"{model!r} is neither an existing folder nor a possible Hub id "
            f"({first_line(fault)}); give a folder, or an id such as 'meta-llama/Llama-2-7b-hf'"
        ) from fault
    if revision is not None and encodable(revision) != revision:
        raise OptionError(f"revision is {revision!r}, which is not UTF-8: check the name")
