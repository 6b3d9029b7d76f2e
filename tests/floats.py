"""Binary floating-point formats from their definition: values of bits, and exact rounding."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch


@dataclass(frozen=True)
class Format:
    """A sign, `exponent` bits and `mantissa` bits; `only_nan`: no infinities, as E4M3FN."""

    dtype: torch.dtype
    exponent: int
    mantissa: int
    only_nan: bool = False

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def special(self) -> int:
        """The first pattern, without sign, that is no number."""
        return (1 << (self.bits - 1)) - 1 if self.only_nan else self.infinity

    @property
    def infinity(self) -> int:
        """What a number becomes that is too large: infinity, or NaN where there is none."""
        all_ones = ((1 << self.exponent) - 1) << self.mantissa
        return all_ones + ((1 << self.mantissa) - 1 if self.only_nan else 0)

    def value(self, pattern: int) -> Fraction:
        """What a pattern without sign stands for; beyond the largest, the number next in line."""
        power, rest = divmod(pattern, 1 << self.mantissa)
        if not power:
            return Fraction(rest) * self.power(1 - self.bias - self.mantissa)
        whole = (1 << self.mantissa) + rest
        return Fraction(whole) * self.power(power - self.bias - self.mantissa)

    @staticmethod
    def power(exponent: int) -> Fraction:
        return Fraction(2) ** exponent

    def nearest(self, value: Fraction, negative: bool = False) -> int:
        """The pattern nearest to a number; of two as near, the even one (IEEE 754, 4.3.1)."""
        size = abs(value)
        low, high = 0, self.special
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.value(middle) <= size else (low, middle)
        below, above = size - self.value(low), self.value(low + 1) - size
        up = above < below or (above == below and low % 2 == 1)
        found = low + up if low + up < self.special else self.infinity
        signed = (negative or value < 0) and not (self.only_nan and found == self.infinity)
        return found | signed << (self.bits - 1)


FORMATS = {
    f.dtype: f
    for f in (
        Format(torch.bfloat16, 8, 7),
        Format(torch.float16, 5, 10),
        Format(torch.float8_e4m3fn, 4, 3, only_nan=True),
        Format(torch.float8_e5m2, 5, 2),
        Format(torch.float32, 8, 23),
        Format(torch.float64, 11, 52),
    )
}


def patterns(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor as whole numbers."""
    if not tensor.numel():
        return np.zeros(tensor.shape, f"<u{tensor.dtype.itemsize}")
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(f"<u{tensor.dtype.itemsize}").reshape(tensor.shape)


def exact(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's finite values in float64, decoded from its bits."""
    form = FORMATS[tensor.dtype]
    found = patterns(tensor).astype(np.uint64)
    sign = np.where(found >> np.uint64(form.bits - 1), -1.0, 1.0)
    size = found & np.uint64((1 << (form.bits - 1)) - 1)
    assert (size < form.special).all(), "only finite values"
    power = (size >> np.uint64(form.mantissa)).astype(np.int64)
    rest = (size & np.uint64((1 << form.mantissa) - 1)).astype(np.float64)
    whole = np.where(power > 0, float(1 << form.mantissa), 0.0) + rest
    scale = np.maximum(power, 1) - form.bias - form.mantissa
    return sign * np.ldexp(whole, scale.astype(np.int32))
