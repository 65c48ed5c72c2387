"""The numbers of the low-precision formats: largest value, smallest normal, smallest subnormal.

Knows no tensor library: casts live where the tensors live.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FORMATS", "GRANULARITIES", "Format", "format_named"]


@dataclass(frozen=True, slots=True)
class Format:
    """One number format.

    Attributes:
        name: The name in records.
        largest: M, the largest finite magnitude.
        smallest_normal: Magnitudes below it (times the scale) lose precision.
        smallest_subnormal: Under round-to-nearest-even a scaled magnitude of at most half of it
            becomes zero.
        scaled: Whether operands in this format are multiplied by a scale before the cast; only
            then do headroom, overflow and underflow mean anything in a record.
    """

    name: str
    largest: float
    smallest_normal: float
    smallest_subnormal: float
    scaled: bool

    @property
    def flush_threshold(self) -> float:
        """Largest scaled magnitude that rounds to zero (the tie goes to even, hence to zero)."""
        return self.smallest_subnormal / 2


# OCP OFP8 1.0 (E4M3 without infinities, E5M2), OCP MX 1.0, NVFP4 elements are E2M1; IEEE 754 for
# fp16 and fp32; bfloat16 has the exponent range of fp32.
_E4M3 = (448.0, 2.0**-6, 2.0**-9)
_E5M2 = (57344.0, 2.0**-14, 2.0**-16)
_E2M1 = (6.0, 1.0, 0.5)

FORMATS: Final[dict[str, Format]] = {
    f.name: f
    for f in (
        Format("e4m3", *_E4M3, scaled=True),
        Format("e5m2", *_E5M2, scaled=True),
        Format("mxfp8_e4m3", *_E4M3, scaled=True),
        Format("block128_e4m3", *_E4M3, scaled=True),
        Format("nvfp4", *_E2M1, scaled=True),
        Format("bf16", 3.3895313892515355e38, 2.0**-126, 2.0**-133, scaled=False),
        Format("fp16", 65504.0, 2.0**-14, 2.0**-24, scaled=False),
        Format("fp32", 3.4028234663852886e38, 2.0**-126, 2.0**-149, scaled=False),
    )
}

GRANULARITIES: Final = ("tensor", "row", "block")


def format_named(name: str) -> Format:
    """Look a format up.

    Raises:
        ValueError: The name is unknown; the message lists the known ones.
    """
    try:
        return FORMATS[name]
    except KeyError:
        known = ", ".join(FORMATS)
        raise ValueError(f"unknown format {name!r}; known formats: {known}") from None
