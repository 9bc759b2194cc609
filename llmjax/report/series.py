"""Series of numbers made small, smooth and readable: thinning, averages, ticks, and numbers in words."""

import math

import numpy as np


def thin(y: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most about `most` points of a series that show what all of them show.

    Of each stretch the first, the lowest and the highest point stay, and of all the last: no spike is lost. NaN never
    stays.
    """
    known = np.flatnonzero(np.isfinite(y))
    if known.size <= most:
        return known
    kept = {int(known[-1])}
    for part in np.array_split(known, max(1, most // 3)):
        kept |= {int(part[0]), int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])}
    return np.array(sorted(kept), int)


def smooth(y: np.ndarray, half_life: float) -> np.ndarray:
    """Exponential average whose weights halve every so many points, without the pull of its beginning; NaN is passed
    over.
    """
    keep = 0.5 ** (1 / max(half_life, 1e-9))
    out, total, weight = np.full(y.shape, math.nan), 0.0, 0.0
    for i, value in enumerate(y.tolist()):
        if value == value:
            total, weight = keep * total + value, keep * weight + 1
        if weight:
            out[i] = total / weight
    return out


def domain(values: np.ndarray) -> tuple[float, float]:
    """(low, high) to draw between: all finite values, but for lone ones far from the others."""
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    below, above = (float(q) for q in np.quantile(values, (0.02, 0.98)))
    room = 3 * (above - below)
    if room:
        low, high = max(low, below - room), min(high, above + room)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low, high


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count)
    first = math.ceil(low / step - 1e-9)
    return [
        round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, both positive, for a logarithmic scale."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(found) >= 3 or len(multiples) == 3:
            return found[:: max(1, len(found) // 6)]
    return []


def words(value: float, digits: int = 3) -> str:
    """A number to read: 1.23M, 0.00012, 4.57."""
    if not math.isfinite(value):
        return "–"
    for size, unit in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:.{digits}g}{unit}"
    if value and abs(value) < 1e-3:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def span(seconds: float) -> tuple[float, str]:
    """(seconds of a unit, its name) in which a time like this is read best."""
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, name
    return 1.0, "seconds"
