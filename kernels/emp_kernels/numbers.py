"""The number formats that are pruned, as bit patterns.

The magnitude of a float is its bit pattern without the sign; as an unsigned integer, the *key*,
it orders as the values do. All selection works on keys.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["BF16", "F16", "F32", "FORMATS", "NumberFormat"]


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A binary floating-point format of 16 or 32 bits with IEEE 754 layout.

    Attributes:
        name: The name that safetensors gives it.
        code: Its number in packed tensors.
        bits: Width of a weight in bits.
        mantissa_bits: Stored bits of the significand.
        to_f32_shift: A key shifted left by this is the key of a float32 ...
        to_f32_scale: ... whose value times this power of two is the weight's magnitude.
    """

    name: str
    code: int
    bits: int
    mantissa_bits: int
    to_f32_shift: int
    to_f32_scale: float

    @property
    def storage(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integer dtype that holds one weight's bits."""
        return np.dtype(np.uint16 if self.bits == 16 else np.uint32)

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
    name="BF16", code=1, bits=16, mantissa_bits=7, to_f32_shift=16, to_f32_scale=1.0
)
F16 = NumberFormat(
    name="F16", code=2, bits=16, mantissa_bits=10, to_f32_shift=13, to_f32_scale=2.0**112
)
F32 = NumberFormat(name="F32", code=3, bits=32, mantissa_bits=23, to_f32_shift=0, to_f32_scale=1.0)

FORMATS = {number_format.name: number_format for number_format in (BF16, F16, F32)}
"""The formats by their safetensors name."""
