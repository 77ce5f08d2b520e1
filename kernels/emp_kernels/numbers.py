"""The number formats that are pruned, as bit patterns, and the integers that hold these.

A weight's *key* is its bit pattern without the sign bit, as an unsigned integer. IEEE 754 puts the
exponent above the mantissa, so that of two finite magnitudes the larger one has the larger key
(subnormals and zero included), and the keys of infinity and NaN are larger than all of them. So all
selection compares integers, and nothing is ever rounded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = [
    "BF16",
    "BINS",
    "F16",
    "F32",
    "FORMATS",
    "LOW_PARTS",
    "NumberFormat",
    "numpy_integers",
    "patterns_of_tensor",
    "tensor_of_patterns",
    "torch_integers",
]

BINS = 1 << 15
LOW_PARTS = 1 << 16
"""The upper 15 bits of a float32's key are its *bin*, the lower 16 bits its *low part*."""


def numpy_integers(item_bytes: int) -> np.dtype[np.unsignedinteger]:
    """The dtype of bit patterns in numpy: uint16 for weights of 2 bytes, uint32 for those of 4."""
    return np.dtype(np.uint16 if item_bytes == 2 else np.uint32)


def torch_integers(item_bytes: int) -> "torch.dtype":
    """The dtype of bit patterns in torch: int16 for weights of 2 bytes, int32 for those of 4.

    Signed, for torch has few operations on unsigned integers of more than 8 bits.
    """
    import torch

    return torch.int16 if item_bytes == 2 else torch.int32


def tensor_of_patterns(patterns: npt.NDArray[np.unsignedinteger]) -> "torch.Tensor":
    """Bit patterns, uint16 or uint32, as an int16 or int32 tensor over the same memory."""
    import torch

    return torch.from_numpy(patterns.view(f"i{patterns.itemsize}"))


def patterns_of_tensor(tensor: "torch.Tensor") -> npt.NDArray[np.unsignedinteger]:
    """The bit patterns, uint16 or uint32, of a tensor of the CPU, of a dtype of 2 or 4 bytes.

    They are views of the tensor's memory.
    """
    integers = tensor.detach().view(torch_integers(tensor.itemsize))
    patterns: npt.NDArray[np.unsignedinteger] = integers.numpy()
    return patterns.view(numpy_integers(tensor.itemsize))


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A binary floating-point format of 16 or 32 bits with IEEE 754 layout.

    Attributes:
        name: The name that safetensors gives it.
        torch_name: The name that torch and config.json give it.
        code: Its number in packed tensors.
        bits: Width of a weight in bits.
        mantissa_bits: Stored bits of the significand.
        to_f32_shift: A key shifted left by this is the key of a float32 ...
        to_f32_scale: ... whose value times this power of two is the weight's magnitude.
    """

    name: str
    torch_name: str
    code: int
    bits: int
    mantissa_bits: int
    to_f32_shift: int
    to_f32_scale: float

    @property
    def storage(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integer dtype that holds one weight's bits in numpy."""
        return numpy_integers(self.item_bytes)

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The format as a dtype of torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    @property
    def item_bytes(self) -> int:
        """Bytes of one weight."""
        return self.bits // 8

    @property
    def key_mask(self) -> int:
        """All bits but the sign."""
        return (1 << (self.bits - 1)) - 1

    @property
    def infinity(self) -> int:
        """The key of infinity: finite weights have smaller keys."""
        return self.key_mask >> self.mantissa_bits << self.mantissa_bits

    def magnitudes(self, bits: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.float64]:
        """The exact magnitudes of weights given as bit patterns, any shape, as float64."""
        keys = (bits & self.storage.type(self.key_mask)).astype(np.uint32)
        floats = (keys << np.uint32(self.to_f32_shift)).view(np.float32)
        return floats.astype(np.float64) * self.to_f32_scale

    def significand(self, key: int) -> tuple[int, int]:
        """A magnitude as integers (m, e): its value is m · 2**e, exactly."""
        exponent, mantissa = key >> self.mantissa_bits, key & ((1 << self.mantissa_bits) - 1)
        bias = (self.key_mask >> self.mantissa_bits) // 2 + self.mantissa_bits
        if exponent == 0:
            return mantissa, 1 - bias
        return mantissa | 1 << self.mantissa_bits, exponent - bias


BF16 = NumberFormat(
    name="BF16",
    torch_name="bfloat16",
    code=1,
    bits=16,
    mantissa_bits=7,
    to_f32_shift=16,
    to_f32_scale=1.0,
)
# fp16's exponent bias is 15, that of float32 is 127: moved there, its bits mean 2**-112 as much
F16 = NumberFormat(
    name="F16",
    torch_name="float16",
    code=2,
    bits=16,
    mantissa_bits=10,
    to_f32_shift=13,
    to_f32_scale=2.0**112,
)
F32 = NumberFormat(
    name="F32",
    torch_name="float32",
    code=3,
    bits=32,
    mantissa_bits=23,
    to_f32_shift=0,
    to_f32_scale=1.0,
)

FORMATS = {number_format.name: number_format for number_format in (BF16, F16, F32)}
"""The formats by their safetensors name."""
