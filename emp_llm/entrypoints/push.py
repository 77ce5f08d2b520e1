"""A written folder to the Hugging Face Hub.

    folder → whole? → repository, branch → the card with the model's name → files that are missing

A folder that is damaged is refused before the first request. Files go up as huggingface_hub sends
them: what the Hub has is not sent again, so that a run after one that broke off goes on there.
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from emp_llm._version import __version__
from emp_llm.checkpoint.checkpoint import open_checkpoint
from emp_llm.checkpoint.small_files import CONFIG_NAME
from emp_llm.checkpoint.weight_files import INDEX_NAME, WEIGHTS_NAME
from emp_llm.hub.destination import Destination, open_destination
from emp_llm.hub.upload_errors import upload_explained
from emp_llm.report.card.card import write_card
from emp_llm.report.card.loading_code import loading_code
from emp_llm.report.evaluation_results import read_results
from emp_llm.report.fields import Report
from emp_llm.report.file import read_report
from emp_llm.report.file_names import CARD_NAME, EVAL_NAME, FIGURE_NAME, REPORT_NAME
from emp_llm.runtime.progress import Progress
from emp_llm.tensors.packed_config import is_packed
from emp_llm.verification.written_folder import check_written

__all__ = ["WholeFolder", "check_folder", "push", "upload"]

# what transformers or emp-llm would take for parts of the new model, were it left of an older one
_REPLACED = (
    *(WEIGHTS_NAME, INDEX_NAME, REPORT_NAME, FIGURE_NAME, EVAL_NAME),
    f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors",
)


@dataclass(frozen=True, kw_only=True)
class WholeFolder:
    """A checkpoint's folder that has been checked.

    Attributes:
        folder: The folder.
        files: Paths of its files, relative to it, without hidden ones.
        config: The content of its ``config.json``.
        report: The content of its ``emp_report.json``; None if it has none.
        edited: Its configuration and small files that are not as the report describes them.
    """

    folder: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    report: Report | None
    edited: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / file).stat().st_size for file in self.files)


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload a checkpoint's folder to the Hugging Face Hub.

    Hidden files stay behind. Weights, index, report and evaluation of an older model in the
    repository go, where the new one has none of that name. The model card that is uploaded names
    the repository; the folder's own is left as it is.

    Args:
        folder: A folder that `prune` or `unpack` wrote, whose checksums are verified first, or
            another checkpoint, whose structure is. Configuration and small files may have been
            edited since.
        repo_id: The repository, ``user/name``; made if it is not there.
        private: Whether it is made private, if it is made; None takes its owner's default.
        revision: The branch; made from the default one if it is not there.
        create_pr: Whether to make a pull request instead.
        token: Token for the Hub; by default the one that is logged in.
        commit_message: What the commit says.
        progress: Told of the verification. The upload shows what huggingface_hub shows.

    Returns:
        What was done: ``repo_id``, ``url`` (of the model or pull request), ``commit``,
        ``revision``, whether a branch was made (``branch_made``), ``files`` and ``bytes`` of the
        model, sent now or before, those of them that were edited since `prune` wrote them
        (``edited_files``), and the lines of Python that load it (``load``).

    Raises:
        CheckpointError: If it is no whole checkpoint; HubError if the Hub refuses.
        FormatError: If anything in it is not as it was written.
        OptionError: If both `revision` and `create_pr` are given.
    """
    return upload(
        check_folder(folder, progress=progress),
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
        commit_message=commit_message,
    )


def check_folder(
    folder: str | os.PathLike[str], *, progress: Progress | None = None
) -> WholeFolder:
    """Prove a folder fit to be uploaded; the first half of `push`, without the network."""
    path = Path(folder)
    checkpoint = open_checkpoint(path)
    has_report = (path / REPORT_NAME).is_file()
    edited: tuple[str, ...] = ()
    if has_report or is_packed(checkpoint.config):
        edited = check_written(path, progress=progress)
    report = read_report(path)
    read_results(path)
    found = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    files = sorted(file for file in found if not any(part.startswith(".") for part in file.parts))
    return WholeFolder(
        folder=path, files=tuple(files), config=checkpoint.config, report=report, edited=edited
    )


def upload(
    model: WholeFolder,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> dict[str, Any]:
    """Upload a folder that has been checked; the second half of `push`, whose arguments it has."""
    options = [] if revision is None else ["--revision", revision]
    options += ["--create-pr"] if create_pr else []
    command = shlex.join(["emp-llm", "push", str(model.folder), repo_id, *options])
    again = f"run `{command}`: what has been sent is kept"
    destination = open_destination(
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
        again=again,
    )
    from huggingface_hub import HfApi, constants

    with upload_explained(destination.repo_id, again), _staged(model, destination) as staged:
        sizes = [file.stat().st_size for file in staged.rglob("*") if file.is_file()]
        done = HfApi(token=token).upload_folder(
            repo_id=destination.repo_id,
            folder_path=staged,
            revision=destination.revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload a model with emp-llm {__version__}",
            delete_patterns=list(_REPLACED),
        )
    revision = done.pr_revision or destination.revision
    place = f"/tree/{revision}" if revision else ""
    return {
        "repo_id": destination.repo_id,
        "url": done.pr_url or f"{constants.ENDPOINT}/{destination.repo_id}{place}",
        "commit": done.oid,
        "revision": revision,
        "branch_made": destination.branch_made,
        "files": len(sizes),
        "bytes": sum(sizes),
        "edited_files": list(model.edited),
        "load": loading_code(model.config, destination.repo_id, revision),
    }


@contextmanager
def _staged(model: WholeFolder, destination: Destination) -> Iterator[Path]:
    """A folder of links to what is uploaded, with a model card that names the repository.

    What the card is made from is copied: links out of a checkpoint are not read.
    """
    with TemporaryDirectory(prefix="emp-llm-push-") as path:
        staged = Path(path)
        for file in model.files:
            (staged / file).parent.mkdir(parents=True, exist_ok=True)
            if str(file) in (CONFIG_NAME, EVAL_NAME):
                copyfile(model.folder / file, staged / file)
            else:
                (staged / file).symlink_to((model.folder / file).resolve())
        if model.report is not None or is_packed(model.config):
            card = staged / CARD_NAME
            card.unlink(missing_ok=True)
            write_card(
                card,
                model.folder / CARD_NAME,
                model.report,
                repo_id=destination.repo_id,
                revision=destination.revision,
            )
        yield staged
