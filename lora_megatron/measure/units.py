# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them. Every function answers "-" for None and for values that are not finite."""

from __future__ import annotations

import math

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
MISSING = "-"


def _absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def show_bytes(value: float | None) -> str:
    """1536 -> `1.50 KiB`; three significant digits, whole bytes below 1 KiB."""
    if value is None or _absent(value):
        return MISSING
    power = 0
    while abs(value) >= 1024 and power < len(_BINARY) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.0f} B" if power == 0 else f"{_three_digits(value)} {_BINARY[power]}"


def show_count(value: float | None) -> str:
    """1234567 -> `1,234,567`."""
    return MISSING if value is None or _absent(value) else f"{value:,.0f}"


def show_loss(value: float | None) -> str:
    """0.123456 -> `0.1235`."""
    return MISSING if value is None or _absent(value) else f"{value:.4f}"


def show_ratio(part: float | None, whole: float | None) -> str:
    """part / whole: `0.0123x`, `1.05x`; "-" where it does not exist."""
    if part is None or whole is None or _absent(part) or _absent(whole) or whole == 0:
        return MISSING
    return f"{part / whole:.3g}x"


def show_seconds(value: float | None) -> str:
    """0.0123 -> `12.3 ms`, 12.3 -> `12.3 s`, 754 -> `12 min 34 s`."""
    if value is None or _absent(value):
        return MISSING
    if value < 1:
        return f"{_three_digits(value * 1000)} ms"
    if value < 100:
        return f"{_three_digits(value)} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"
