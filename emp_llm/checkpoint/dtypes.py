"""The dtypes of tensors, by the names that safetensors files use."""

from collections.abc import Mapping
from typing import Final

__all__ = ["ITEM_BITS", "PRUNABLE", "TORCH_NAMES", "item_bytes"]

ITEM_BITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of one item of every dtype that safetensors 0.8 knows. F4 and F6 pack several to a byte."""

PRUNABLE: Final = ("BF16", "F16", "F32")
"""Those that weights are pruned and packed in: `emp_kernels.numbers.FORMATS`, without numpy."""

TORCH_NAMES: Final[Mapping[str, str]] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""What torch calls them, without the ``torch.``; it has none that is shorter than a byte."""


def item_bytes(dtype: str) -> int:
    """Bytes of one item of a dtype that is not shorter than a byte.

    >>> item_bytes("BF16")
    2
    """
    return ITEM_BITS[dtype] // 8
