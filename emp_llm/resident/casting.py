"""A packed weight in another dtype: decoded, cast and packed again."""

import torch

from emp_llm.errors import OutputError
from emp_llm.resident.content import Content
from emp_llm.resident.dense_weights import NUMBER_FORMATS
from emp_llm.resident.held_planes import HeldPlanes
from emp_llm.resident.packing import PackedBefore, pack_rest, pack_tensor
from emp_llm.tensors.packed import PackedTensor

__all__ = ["cast"]


def cast(content: Content, dtype: torch.dtype) -> Content | torch.Tensor:
    """What the dense weight would be in another dtype.

    Args:
        content: The weight.
        dtype: Any.

    Returns:
        The weight, packed; dense if it cannot be packed in that dtype, or gets no smaller.
    """
    planes = [_cast(each.on_cpu(), dtype) for each in content.planes]
    packed = [each for each in planes if each is not None]
    if len(packed) < len(planes):
        return content.dense().to(dtype)
    return Content(packed, content.form).moved(content.device)


def _cast(planes: HeldPlanes, dtype: torch.dtype) -> HeldPlanes | None:
    if dtype not in NUMBER_FORMATS:
        return None
    weights, packed = planes.weights().to(dtype), planes.packed
    if not isinstance(packed, PackedTensor):
        return pack_rest(weights)
    try:
        before = PackedBefore(packed.geometry.transposed, packed.layout)
        return pack_tensor("a weight", weights, before)
    except OutputError:  # what is too large for the new dtype has become infinity
        return None
