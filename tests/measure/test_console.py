# SPDX-License-Identifier: Apache-2.0
"""Progress with and without a terminal, and tables."""

from __future__ import annotations

import io

from lora_megatron.measure.console import TrainingProgress, print_table
from lora_megatron.measure.units import show_bytes, show_count, show_loss, show_ratio, show_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(stream: io.StringIO, clock: Clock, *, enabled: bool = True, first_step: int = 0) -> list[str]:
    with TrainingProgress(100, enabled=enabled, stream=stream, clock=clock, first_step=first_step) as progress:
        for step in range(first_step + 1, 101):
            clock.now += 0.5
            progress.update(step, loss=1 / step, lr=1e-4, tokens_per_second=12345.6)
    return stream.getvalue().splitlines()


def test_without_a_terminal_a_plain_line_comes_every_few_seconds() -> None:
    lines = run(io.StringIO(), Clock())
    assert len(lines) == 11  # 50 seconds: the first step, one every 5 s, the last step
    assert lines[0] == "train  step 1/100  loss 1.0000  lr 1.00e-04  12,346 tokens/s"
    assert lines[1].endswith("12,346 tokens/s  44.5 s left")
    assert lines[-1] == "train  step 100/100  loss 0.0100  lr 1.00e-04  12,346 tokens/s"
    assert not any("\x1b" in line for line in lines)


def test_time_left_counts_steps_of_this_run_and_no_start_up() -> None:
    stream, clock = io.StringIO(), Clock()
    with TrainingProgress(100, first_step=60, stream=stream, clock=clock) as progress:
        clock.now = 1000.0  # imports, building the model, the first evaluation
        for step in range(61, 100):
            clock.now += 0.5
            progress.update(step)
    assert stream.getvalue().splitlines()[1].endswith("step 71/100  loss -  lr -  - tokens/s  14.5 s left")


def test_a_terminal_gets_a_bar(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    text = "\n".join(run(Terminal(), Clock()))
    assert "━" in text
    assert "100/100" in text
    assert "loss 0.0100" in text


def test_other_ranks_are_silent() -> None:
    for stream in (io.StringIO(), Terminal()):
        assert run(stream, Clock(), enabled=False) == []
    silent = io.StringIO()
    TrainingProgress(1, enabled=False, stream=silent).note("nothing")
    assert silent.getvalue() == ""


def test_a_loss_that_is_not_finite_and_markup_are_shown_as_they_are() -> None:
    stream = io.StringIO()
    with TrainingProgress(2, stream=stream) as progress:
        progress.update(1, loss=float("nan"))
        progress.note("[bold]saved[/bold] checkpoints/2")
    assert "loss -" in stream.getvalue()
    assert "[bold]saved[/bold] checkpoints/2" in stream.getvalue()


def test_a_table_without_a_terminal_is_plain_text_with_whole_cells() -> None:
    stream = io.StringIO()
    print_table("Title [x]", ("", "LoRA", "full"), [["a row of words", "1,024", "[red]2[/red]"]], stream=stream)
    text = stream.getvalue()
    assert "Title [x]" in text
    assert "a row of words" in text
    assert "[red]2[/red]" in text
    assert "\x1b" not in text


def test_numbers_as_people_read_them() -> None:
    assert [show_bytes(n) for n in (0, 1023, 1024, 1536, 36 * 2**20, 100 * 2**30)] == [
        *("0 B", "1023 B", "1.00 KiB", "1.50 KiB", "36.0 MiB", "100 GiB")
    ]
    assert [show_seconds(s) for s in (0.0123, 0.5, 12.34, 99.9, 754)] == [
        *("12.3 ms", "500 ms", "12.3 s", "99.9 s", "12 min 34 s")
    ]
    assert show_count(1234567) == "1,234,567"
    assert show_ratio(1, 400) == "0.0025x"
    for show in (show_bytes, show_seconds, show_count, show_loss):
        assert show(None) == show(float("nan")) == show(float("inf")) == "-"
    assert show_ratio(1, 0) == show_ratio(None, 1) == "-"
