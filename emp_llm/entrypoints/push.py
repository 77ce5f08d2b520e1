"""Push: uploads a written folder to the Hugging Face Hub.

    folder → whole? → repository, branch → the card with the model's name → files that are missing

A damaged folder is refused before the first request. huggingface_hub does not send what the Hub
already has, so that a second run continues an upload that broke off.
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

from emp_llm._version import __version__
from emp_llm.checkpoint.checkpoint import open_checkpoint
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.checkpoint.weight_files import INDEX_NAME, WEIGHTS_NAME
from emp_llm.deltas.base import stated_base
from emp_llm.errors import CheckpointError
from emp_llm.hub.destination import Destination, open_destination
from emp_llm.hub.upload_errors import upload_explained
from emp_llm.report.card.card import write_card
from emp_llm.report.card.loading_code import loading_code
from emp_llm.report.evaluation_results import read_results
from emp_llm.report.fields import Report
from emp_llm.report.file import read_report
from emp_llm.report.file_names import (
    CARD_NAME,
    EVAL_NAME,
    FIGURE_NAME,
    REPORT_NAME,
    SHRINK_FIGURE_NAME,
    SHRINK_REPORT_NAME,
)
from emp_llm.runtime.progress import Progress
from emp_llm.tensors.packed_config import is_delta, is_packed
from emp_llm.tensors.planes import holds_planes
from emp_llm.verification.shrunken_folder import check_shrunken, is_shrunken
from emp_llm.verification.written_folder import check_written

__all__ = ["Pushed", "WholeFolder", "check_folder", "push", "upload"]

# files of an older model that transformers or emp-llm would take for parts of the new one
_REPLACED = (
    *(WEIGHTS_NAME, INDEX_NAME, REPORT_NAME, FIGURE_NAME, EVAL_NAME),
    *(SHRINK_REPORT_NAME, SHRINK_FIGURE_NAME),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
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
        edited: Paths of files without weights that are not as the report describes them.
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


class Pushed(TypedDict):
    """What was uploaded, and where it is.

    Attributes:
        repo_id: The repository.
        url: Address of the model or the pull request.
        commit: The commit's hash.
        revision: The branch, or that of the pull request; None for the default one.
        branch_made: Whether the branch was created by this call.
        files: How many files the model has there, including those that an earlier call uploaded.
        bytes: Total size of these files.
        edited_files: Paths of those that were edited since `prune` wrote them.
        load: Lines of Python that load the model.
    """

    repo_id: str
    url: str
    commit: str
    revision: str | None
    branch_made: bool
    files: int
    bytes: int
    edited_files: list[str]
    load: list[str]


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
) -> Pushed:
    """Upload a checkpoint's folder to the Hugging Face Hub.

    Hidden files are not uploaded. Weights, index, report and evaluation of an older model in the
    repository are deleted where the new one has no file of that name. The model card that is
    uploaded names the repository; the folder's own card is not changed.

    >>> from emp_llm import prune, push
    >>> report = prune("demo/model", "sparse")
    >>> pushed = push("sparse", "me/sparse", private=True)  # doctest: +SKIP
    >>> pushed["url"], pushed["load"][-1]  # doctest: +SKIP
    ('https://huggingface.co/me/sparse',
     'model = AutoModelForCausalLM.from_pretrained("me/sparse")')

    Args:
        folder: A folder that `prune`, `pack`, `shrink` or `unpack` wrote, whose checksums are
            verified first, or another checkpoint, whose structure is. Files that hold no weights
            may have been edited since.
        repo_id: The repository, ``user/name`` or its address; made if it is not there.
        private: Whether it is made private, if it is made; None takes its owner's default.
        revision: The branch; made from the default one if it is not there.
        create_pr: Whether to make a pull request instead.
        token: Token for the Hub; by default the one that is logged in.
        commit_message: The commit's message; by default it names the release of emp-llm.
        progress: Reports the verification. The upload shows huggingface_hub's own bars.

    Returns:
        What was uploaded, and where it is.

    Raises:
        CheckpointError: If the folder is not a whole checkpoint.
        FormatError: If anything in it is not as it was written.
        HubError: If the Hub cannot be reached or refuses the upload.
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
    """Check a folder before it is uploaded; the first half of `push`, without the network.

    Raises:
        CheckpointError: If it is not a whole checkpoint.
        FormatError: If anything in it is not as it was written.
    """
    path = Path(folder)
    checkpoint = open_checkpoint(path)
    has_report = (path / REPORT_NAME).is_file()
    edited: tuple[str, ...] = ()
    if is_delta(checkpoint.config) and stated_base(path, checkpoint.config)["revision"] is None:
        raise CheckpointError(
            f"{path}: is a delta to a base in a folder, which nobody else has: push the base, and "
            "make the delta with `emp-llm prune --base` and the base's Hub id"
        )
    if is_shrunken(path):
        edited = check_shrunken(path, progress=progress)
    elif has_report or is_packed(checkpoint.config) or holds_planes(checkpoint.tensors):
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
) -> Pushed:
    """Upload a folder that has been checked; the second half of `push`, with its arguments."""
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

    What the card is made from is copied, since links that lead out of a checkpoint are not read.
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
