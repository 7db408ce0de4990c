# SPDX-License-Identifier: Apache-2.0
"""Two records of `tests.twin` held against each other, up to the rounding of sums taken in another order."""

from __future__ import annotations

from tests.twin import Record


class Mismatch(AssertionError):
    """Two runs that must agree do not."""


def compare(got: Record, want: Record, *, tolerance: float = 1e-4) -> int:
    """Raise Mismatch unless equal up to the rounding of sums taken in another order; return how many tensors were.

    A tensor's error is measured against its own largest value, as a sum over ranks rounds. It may grow by the step:
    AdamW's first updates are lr times the sign of a gradient, so one near zero that rounds to the other side moves its
    weight by a whole update (on one processor 1.1e-4 was seen at the third step).
    """
    if got["complaints"]:
        raise Mismatch("; ".join(got["complaints"][:4]))
    _close("eval", got["eval"], want["eval"], 1e-5)
    for kind, bound in (("loss", 1e-5), ("norm", 1e-4)):
        for step, (g, w) in enumerate(zip(got[kind], want[kind], strict=True)):
            _close(f"{kind} of step {step}", g, w, bound)
    compared = _compare_tensors("born", got["born"], want["born"], 0.0)
    for kind in ("grads", "values"):
        for step, (g, w) in enumerate(zip(got[kind], want[kind], strict=kind == "values")):
            compared += _compare_tensors(f"{kind} of step {step}", g, w, tolerance * (1 + step))
    return compared


def _close(what: str, got: float, want: float, bound: float) -> None:
    if not abs(got - want) <= bound * abs(want) + 1e-7:
        raise Mismatch(f"{what}: {got}, not {want}")


def _compare_tensors(what: str, got: Record, want: Record, tolerance: float) -> int:
    names = {name.removesuffix(" (copy)") for name in got}
    if names != set(want):
        raise Mismatch(f"{what}: other parameters: {names ^ set(want)}")
    for name, tensor in got.items():
        reference = want[name.removesuffix(" (copy)")]
        if tensor.shape != reference.shape:
            raise Mismatch(f"{what}: {name} has shape {tuple(tensor.shape)}, not {tuple(reference.shape)}")
        error, scale = float((tensor - reference).abs().max()), float(reference.abs().max())
        if not error <= tolerance * scale + (1e-8 if tolerance else 0.0):
            raise Mismatch(f"{what}: {name} is off by {error} of {scale}")
    return len(got)


def frobenius(got: Record, want: Record) -> float:
    """||got - want|| / ||want|| over all tensors together."""
    assert set(got) == set(want)
    difference = sum(float((got[name] - want[name]).double().square().sum()) for name in want)
    return (difference / sum(float(tensor.double().square().sum()) for tensor in want.values())) ** 0.5
