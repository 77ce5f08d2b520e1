"""What a report says of the models that the folder was made from."""

from typing import TypedDict

__all__ = ["BaseFields", "SourceFields", "TensorCount"]


class SourceFields(TypedDict):
    """Where the pruned model came from.

    Attributes:
        model: Its Hub id, or the name of its folder.
        revision: The commit on the Hub; None for a folder.
    """

    model: str
    revision: str | None


class BaseFields(SourceFields):
    """The model that a delta is added to, as ``config.json`` names it too.

    `model` is a Hub id, or a path: absolute, or relative to the delta's folder.

    Attributes:
        hash: Checksum of all its tensors, with the name of the algorithm; see
            `emp_llm.deltas.survey.survey`.
    """

    hash: str


class TensorCount(TypedDict):
    """Some tensors together.

    Attributes:
        tensors: How many.
        bytes: Bytes of their data.
    """

    tensors: int
    bytes: int
