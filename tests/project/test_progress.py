"""Progress is a bar on a terminal and lines elsewhere, and short work says nothing."""

import pytest

from moeyard import progress
from moeyard.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_short_work_says_nothing(clock, capsys):
    with Progress("reading", 10, in_bytes=True) as work:
        for _ in range(10):
            clock(0.19)
            work.advance()
    assert capsys.readouterr() == ("", "")


def test_long_work_says_how_far_it_is_every_few_seconds(clock, capsys):
    with Progress("writing the model", 100 << 20, in_bytes=True) as work:
        for _ in range(10):
            clock(1)
            work.advance(10 << 20, tensors=3)
    assert capsys.readouterr().err.splitlines() == [
        "event=writing_the_model state=running mib=30 tensors=3 share=0.30 seconds=3.0",
        "event=writing_the_model state=running mib=90 tensors=3 share=0.90 seconds=9.0",
        "event=writing_the_model state=done mib=100 tensors=3 share=1.00 seconds=10.0",
    ]


def test_work_that_fails_is_not_said_to_be_done(clock, capsys):
    with pytest.raises(KeyError), Progress("reading") as work:
        clock(3)
        work.advance()
        raise KeyError
    assert capsys.readouterr().err == "event=reading state=running seconds=3.0\n"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("writing", 4 << 20, in_bytes=True) as work:
        work.advance(3 << 20)
    shown = capsys.readouterr().err
    assert "writing" in shown and "3.0/4.0 MiB" in shown and "event=" not in shown
