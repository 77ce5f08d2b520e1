"""The state dict that a torch checkpoint must be: its tensors by name."""

from emp_llm.checkpoint.header import MAX_NAME, METADATA_KEY, UnreadableError
from emp_llm.checkpoint.torch_save.pickled_tensors import (
    NamedObject,
    OtherObject,
    StoredTensor,
)
from emp_llm.messages import shortened

__all__ = ["tensors_of"]


def tensors_of(content: object) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name.

    Args:
        content: What the pickle of a checkpoint holds.

    Raises:
        UnreadableError: If it is not a state dict, or has a name that safetensors cannot hold.
    """
    if not isinstance(content, dict):
        raise UnreadableError(
            f"holds {_kind(content)}, not a state dict; save the model's state_dict() instead"
        )
    for name, value in content.items():
        if isinstance(value, dict) and any(isinstance(v, StoredTensor) for v in value.values()):
            raise UnreadableError(
                f"holds tensors under {shortened(name)}, as a training checkpoint does: save that "
                f"state dict alone, torch.load(FILE)[{shortened(name)}]"
            )
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise UnreadableError(
                f"holds {_kind(value)} as {shortened(name)}, where a state dict has tensors; "
                "save the model's state_dict() alone"
            )
        _check_name(name)
    return content


def _check_name(name: str) -> None:
    """Refuse a name that safetensors cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UnreadableError(f"has a tensor with an invalid name: {shortened(name)}") from error
    if len(name) > MAX_NAME or name == METADATA_KEY:
        raise UnreadableError(
            f"has a tensor {shortened(name)}, a name that safetensors cannot hold: rename it"
        )


def _kind(value: object) -> str:
    if isinstance(value, OtherObject | NamedObject):
        return value.name
    return f"a {'tensor' if isinstance(value, StoredTensor) else type(value).__name__}"
