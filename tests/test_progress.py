"""What a run says of itself while it runs: bars in a terminal, lines in a log."""

import io

import pytest

from ekfac_fast.cli import progress
from ekfac_fast.cli.terminal import Terminal


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def console(terminal):
    made = Terminal()
    made.file, made._force_terminal = io.StringIO(), terminal
    return made


def test_a_log_has_a_line_every_half_minute_and_one_at_the_end(clock):
    log = console(False)
    with progress.showing(log) as update:
        update("scan", 1000, 100_000)  # continued: some is done already
        for step in range(1, 12):
            clock.now = 100 + 10 * step
            update("scan", 1000 + 900 * step, 100_000)
        clock.now += 1
        update("scan", 100_000, 100_000)
    lines = log.file.getvalue().splitlines()
    assert lines[0] == "scan: 3,700 of 100,000, 90 tokens/s, 17 min 50 s left"
    assert [line.split(",")[0] for line in lines] == ["scan: 3", "scan: 6", "scan: 9", "scan: 100"]
    assert "left" not in lines[-1]


def test_a_short_stage_is_one_line(clock):
    log = console(False)
    with progress.showing(log) as update:
        for done in range(1, 5):
            clock.now += 0.5
            update("eigendecomposition", done, 4)
    assert log.file.getvalue() == "eigendecomposition: 4 of 4\n"


def test_a_terminal_has_bars():
    shown = console(True)
    with progress.showing(shown) as update:
        update("scan", 5, 10)
        update("scan", 10, 10)
    assert "scan" in shown.file.getvalue()
    assert "10/10" in shown.file.getvalue()
