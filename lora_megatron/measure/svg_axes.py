# SPDX-License-Identifier: Apache-2.0
"""What all charts share: scales, ticks at round numbers, units that fit the size of the values, the frame around them.

A chart is 560 units wide; the page scales it. Colours and letters come from the page's style (`measure.html_style`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_megatron.measure.html_page import Html, escape
from lora_megatron.measure.units import show_bytes

WIDTH = 560
_LADDERS = {
    "bytes": ((1, "B"), (2**10, "KiB"), (2**20, "MiB"), (2**30, "GiB"), (2**40, "TiB"), (2**50, "PiB")),
    "s": ((1e-9, "ns"), (1e-6, "µs"), (1e-3, "ms"), (1, "s"), (180, "min"), (3 * 3600, "h")),
}
_SECONDS = {"min": 60.0, "h": 3600.0}
_SUFFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """Values between low and high onto pixels between first and last; logarithmic if `log` (then low > 0)."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of `value`, to a tenth."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.first + (self.last - self.first) * share, 1)


def fitting(unit: str, largest: float) -> tuple[float, str]:
    """(divisor, name) of the unit in which `largest` reads well: (1048576, "MiB") for 3e6 "bytes", (0.001, "ms") for
    0.02 "s". A unit that has no others is itself."""
    ladder = _LADDERS.get(unit)
    if ladder is None:
        return 1.0, unit
    start, name = next((step for step in reversed(ladder) if abs(largest) >= step[0]), ladder[0])
    return _SECONDS.get(name, float(start)), name


def round_step(span: float, count: int, *, whole: bool = False) -> float:
    """The smallest of .., 1, 2, 2.5, 5, 10, .. that cuts `span` into at most `count` parts; `whole`: an integer."""
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= raw * (1 - 1e-9)), 10 * power)
    return max(1.0, math.ceil(step)) if whole else step


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers between low and high, at most `count` + 1."""
    step = round_step(high - low, count, whole=whole)
    digits = 1 - math.floor(math.log10(step))  # all that a step has: 0.1 + 0.2 is 0.3 here
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, digits) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high, at most seven; with their 2- and 5-fold where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    factors = (1.0, 2.0, 5.0) if last - first <= 3 else (1.0,)
    values = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def tick_text(value: float) -> str:
    """A tick's number: 0.05, 1,200, 40k, 2e-6."""
    size = abs(value)
    if size >= 1e4:
        divisor, suffix = next(pair for pair in _SUFFIXES if size >= pair[0])
        return f"{value / divisor:.6g}{suffix}" if size < 1e18 else _exponent(value)
    return _exponent(value) if 0 < size < 1e-3 else f"{value:,.6g}"


def _exponent(value: float) -> str:
    digits, power = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def value_text(value: float, unit: str) -> str:
    """A value in the unit that fits it: `1.23 MiB`, `111 ms`, `0.5314 nats per token`."""
    if unit == "bytes":
        return show_bytes(value)
    divisor, name = fitting(unit, value)
    scaled = value / divisor
    grouped = f"{scaled:,.0f}" if 1e3 <= abs(scaled) < 1e15 else f"{scaled:.{3 if unit == 's' else 4}g}"
    return f"{grouped} {name}".strip()


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line of the style's class `kind`."""
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def label(x: float, y: float, text: str, *, anchor: str = "middle", kind: str = "") -> str:
    """A text at (x, y)."""
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def figure(title: str, keys: Sequence[str], body: Sequence[str], *, height: float, description: str) -> Html:
    """A chart under its title and the keys of its series; `description` is read out instead of the picture."""
    names = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    shape = ' class="tall"' if height > WIDTH else ""
    return Html(
        f"<figure{shape}><figcaption><b>{escape(title)}</b>{''.join(keys)}</figcaption>\n"
        f'<svg role="img" viewBox="0 0 {WIDTH} {height:g}">{names}\n' + "\n".join(body) + "\n</svg></figure>"
    )


def key(name: str, symbol: str) -> str:
    """A series' name beside what it is drawn as (in a box of 22 x 10)."""
    return f'<span class="key"><svg viewBox="0 0 22 10" aria-hidden="true">{symbol}</svg>{escape(name)}</span>'
