"""Colours: one ramp for the page, the card's figure and figures for papers."""

from collections.abc import Sequence

__all__ = ["GAUSSIAN", "LEAST_SPREAD", "LINES", "RAMP", "ramp_at", "shown_range"]

RAMP = (
    *("#edf4da", "#b7dfb9", "#7ac9ab", "#25b0a6", "#04909d"),
    *("#03708d", "#03527c", "#1d3559", "#161b40"),
)
"""From light to dark in equal steps of OKLCH lightness, so that it can be read in grey."""

LINES = {"sparsity": "#0072B2", "bytes": "#C4500A", "retained mass": "#00805F"}
"""Colours of curves: a blue, a vermilion and a green that colour-blind people can tell apart."""

GAUSSIAN = 0.6366197723675814
"""N_eff / N of Gaussian weights, 2/π."""

LEAST_SPREAD = 0.02
"""The least that a ramp spans, so that nearly equal values look so."""


def shown_range(values: Sequence[float]) -> tuple[float, float]:
    """The values at the light and the dark end of a ramp that shows these."""
    low, high = min(values), max(values)
    more = max(0.0, LEAST_SPREAD - (high - low)) / 2
    return low - more, high + more


def ramp_at(share: float) -> str:
    """The ramp's colour at a share from 0 (light) to 1 (dark), as ``#rrggbb``."""
    at = share * (len(RAMP) - 1)
    start = min(int(at), len(RAMP) - 2)
    part = at - start
    ends = RAMP[start], RAMP[start + 1]
    low, high = (bytes.fromhex(color[1:]) for color in ends)
    mixed = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return "#" + bytes(mixed).hex()
