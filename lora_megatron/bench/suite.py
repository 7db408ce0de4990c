# SPDX-License-Identifier: Apache-2.0
"""The whole bench: which cases are measured, in which order, and the result they come to.

Every case is visited twice, the second time in reverse order (A B | B A), each time built anew: a device that grows
warmer, and so slower, from start to end does the same to all. One visit can be asked for. The matrix products are
timed before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_megatron.bench.gemm import (
    FROZEN_PRODUCTS,
    TRAINED_PRODUCTS,
    Product,
    ceiling,
    linears_of,
    mean_of,
    mean_over_ranks,
    measure_products,
)
from lora_megatron.bench.measurement import Case, Effort, Measured, OutOfMemory, outcome_text, visit
from lora_megatron.bench.plans import config_of, fits, known_of
from lora_megatron.bench.results import Known, Row, Scale, extrapolate, headline, ratios, row_of, row_without_memory
from lora_megatron.bench.slices import most_that_fit, require_equal_layers, two_sizes, unit_of
from lora_megatron.bench.workload import Load, bench_config, method_of, multiplies_in_fp8, tokens_per_step
from lora_megatron.config import Config
from lora_megatron.errors import ConfigError
from lora_megatron.measure.units import show_bytes
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.groups import Ranks
from lora_megatron.training.loop import StepReport

REFERENCE = "full"


@dataclass(frozen=True)
class Question:
    """What is asked."""

    config: Config
    shape: ModelShape
    """The whole model's."""
    methods: Sequence[str]
    effort: Effort
    """Measured steps over all visits, and steps before each visit's."""
    layers: int | None
    """Of the slice asked for, one that can be cut (`slices.check_layers`); None: as many as fit."""
    load: Load | None
    """Fills the whole model from a stored base; None draws random weights, as for every slice."""
    visits: int = 2
    """To each case; 1 where building a model takes longer than all its steps, and the order then counts."""
    ceiling: bool = True
    """Whether the matrix products are timed, which takes a GPU ten seconds."""

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return REFERENCE if REFERENCE in self.methods else self.methods[-1]


def choose_cases(question: Question) -> list[Case]:
    """What is measured, slices first; collective.

    Raises:
        ConfigError: a slice cannot stand for the whole, or nothing fits.
    """
    config, shape, methods = question.config, question.shape, question.methods
    every, unit = shape.num_layers, unit_of(config)
    if question.layers is None:
        whole = [method for method in methods if fits(Case(method, every), config, shape)]
        sizes = {} if len(whole) == len(methods) else _sizes_that_fit(question)
    else:
        whole = list(methods) if question.layers == every else []
        sizes = dict.fromkeys(methods, [] if whole else two_sizes(question.layers, question.layers, unit=unit))
    for method, chosen in sizes.items():
        if chosen:
            require_equal_layers(config, shape, method_of(bench_config(config, method), shape), min(chosen))
    slices = [(size, methods.index(method)) for method, chosen in sizes.items() for size in chosen if size < every]
    return [Case(methods[index], size) for size, index in sorted(slices)] + [Case(method, every) for method in whole]


def _sizes_that_fit(question: Question) -> dict[str, list[int]]:
    """The slices of each method: the same for all, as far as all fit. One that fits nowhere is tried at the least."""
    unit = unit_of(question.config)
    most = {method: _most(method, question) for method in question.methods}
    shared = min((layers for layers in most.values() if layers is not None), default=None)
    if shared is None:
        raise ConfigError(
            f"by the plan not one layer of this model fits this machine with {', '.join(question.methods)}: list other "
            "--methods, lower data.micro_batch_size, or start more processes with a larger parallel.tensor"
        )
    return {
        method: [unit] if layers is None else two_sizes(shared, layers, unit=unit) for method, layers in most.items()
    }


def _most(method: str, question: Question) -> int | None:
    config, shape = question.config, question.shape
    return most_that_fit(
        lambda layers: fits(Case(method, layers), config, shape), all_layers=shape.num_layers, unit=unit_of(config)
    )


@dataclass
class Suite:
    """A bench under way on this rank; every method is collective."""

    question: Question
    cases: Sequence[Case]
    ranks: Ranks
    known: dict[Case, Known]
    configs: dict[Case, Config]
    """How each case is run."""
    visits: dict[Case, list[Measured]] = field(default_factory=dict)
    failed: dict[Case, OutOfMemory] = field(default_factory=dict)
    products: list[list[Product]] = field(default_factory=list)
    """Before and, once they are, after."""
    without_room: list[str] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def start(cls, question: Question, ranks: Ranks) -> Suite:
        """Choose the cases and ask the planner about each."""
        cases = choose_cases(question)
        every = {*cases, *(Case(method, question.shape.num_layers) for method in question.methods)}
        ordered = sorted(every, key=lambda case: (case.layers, case.method))  # the same order on every rank
        configs = {case: config_of(case, question.config, question.shape) for case in ordered}
        known = {case: known_of(case, configs[case], question.shape) for case in ordered}
        return cls(question, cases, ranks, known, configs)

    @property
    def order(self) -> list[tuple[Case, Effort]]:
        """Visits to come, with their steps: forwards, and then backwards with the other half of the steps."""
        effort = self.question.effort
        if self.question.visits == 1:
            return [(case, effort) for case in self.cases]
        halves = effort.steps - effort.steps // 2, effort.steps // 2
        first, second = (replace(effort, steps=half) for half in halves)
        return [(case, first) for case in self.cases] + [(case, second) for case in reversed(self.cases) if halves[1]]

    def run(
        self, *, on_visit: Callable[[Case], None], on_step: Callable[[StepReport], None], on_result: Callable[[], None]
    ) -> None:
        """Measure everything, calling back before a visit, after a measured step, and when there is more to report.

        Raises:
            ConfigError: nothing at all fitted.
            OutOfMemoryAlone: this of several ranks ran out of memory.
            NumericalError: a step made no update.
        """
        self._measure_products()
        for case, effort in self.order:
            if case in self.failed:
                continue
            on_visit(case)
            outcome = self._visit(case, effort, on_step)
            if isinstance(outcome, OutOfMemory):
                self.failed[case] = outcome
            else:
                self.visits.setdefault(case, []).append(outcome)
            on_result()
        if not self.visits:
            raise ConfigError("nothing could be measured: " + outcome_text(next(iter(self.failed.values()))))
        self._measure_products()
        self.complete = True
        on_result()

    def _visit(self, case: Case, effort: Effort, on_step: Callable[[StepReport], None]) -> Measured | OutOfMemory:
        config, shape = self.configs[case], self.question.shape
        planned = max(kinds["peak"] for kinds in self.known[case].planned)
        if self.ranks.world_size > 1 and not fits(case, config, shape):
            # One rank may run out while the others wait for it, which would end the bench for every method.
            return OutOfMemory(case, f"not tried, out of memory by the plan: {show_bytes(planned)}")
        load = self.question.load if case.layers == shape.num_layers else None
        return visit(case, config, shape, effort, load=load, planned_bytes=planned, on_step=on_step)

    def _measure_products(self) -> None:
        config = self.question.config
        if not self.question.ceiling:
            self.products.append([])
            return
        products, without_room = measure_products(
            linears_of(self.question.shape, tensor=config.parallel.tensor),
            m=config.data.micro_batch_size * config.data.sequence_length,
            precision=config.train.precision,
        )
        self.products.append(mean_over_ranks(products))
        self.without_room = sorted({*self.without_room, *without_room})

    def ceiling_of(self, case: Case) -> float | None:
        """FLOP/s of the matrix products that a case needs; None for those in FP8, which are not timed alone."""
        config = bench_config(self.question.config, case.method)
        if multiplies_in_fp8(config):
            return None
        method = method_of(config, self.question.shape)
        products = self.products[0] if len(self.products) == 1 else mean_of(*self.products)
        kinds = TRAINED_PRODUCTS if method.trains_base else FROZEN_PRODUCTS
        return ceiling(products, kinds, layers=case.layers)

    def rows(self) -> list[Row]:
        """A row a case in the order of the cases, and one for every whole model that only slices speak of."""
        scale = Scale(tokens_per_step(self.question.config), self.ranks.world_size)
        rows = []
        for case in self.cases:
            if case in self.visits:
                rows.append(row_of(self.visits[case], self.known[case], scale, ceiling=self.ceiling_of(case)))
            elif case in self.failed:
                rows.append(row_without_memory(self.failed[case], self.known[case]))
        return self._with_whole_models(rows, scale)

    def _with_whole_models(self, rows: Sequence[Row], scale: Scale) -> list[Row]:
        """Add what two slices of a method say of its whole model: as a row, or in the row where that was measured."""
        every, result = self.question.shape.num_layers, list(rows)
        for method in self.question.methods:
            measured = [row for row in rows if row["method"] == method and row["step_seconds"]]
            slices = [row for row in measured if row["layers"] < every]
            if len(slices) != 2:
                continue
            case = Case(method, every)
            limit = self.ceiling_of(case)
            said = extrapolate(slices[0], slices[1], self.known[case], scale, layers=every, ceiling=limit)
            whole = next((row for row in measured if row["layers"] == every), None)
            if whole is not None:
                whole["slices_said"] = said and {key: said[key] for key in ("step_seconds", "peak_bytes")}
            elif said is not None:
                result.append(said)
        return result

    def result(self) -> dict[str, Any]:
        """All that is known so far, in JSON's types; see `bench.results` for the rows."""
        rows = self.rows()
        before, after = self.products[0], self.products[1] if len(self.products) > 1 else []
        rates = [ceiling(found, FROZEN_PRODUCTS, layers=self.question.shape.num_layers) for found in (before, after)]
        return {
            "kind": "bench",
            "complete": self.complete,
            "methods": list(self.question.methods),
            "rows": rows,
            "headline": headline(rows, self.question.methods),
            "ratios": ratios(rows, self.question.reference),
            "gemm": {
                "before": [_product(product) for product in before],
                "after": [_product(product) for product in after],
                "drift": rates[1] / rates[0] - 1 if rates[0] and rates[1] else None,
                "without_room": self.without_room,
            },
        }


def _product(product: Product) -> dict[str, Any]:
    linear = product.linear
    return {
        "linear": linear.name,
        "kind": product.kind,
        "m": product.m,
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "seconds": product.seconds,
        "flops_per_second": product.flops / product.seconds,
    }
