import io

import pytest

from megatron_policysplit.logs import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def pass_seconds(seconds):
        now[0] += seconds

    return pass_seconds


def test_quick_work_shows_nothing(clock, capsys):
    with progress.show_progress("prompts", 3000) as advance:
        for _ in range(3):
            clock(0.6)
            advance(1000)
    assert capsys.readouterr() == ("", "")


def test_slow_work_on_a_pipe_tells_how_far_it_is(clock, capsys):
    with progress.show_progress("questions of q.jsonl have their prompts", 20000) as advance:
        for _ in range(20):
            clock(1.0)
            advance(1000)
    assert capsys.readouterr() == (
        "",
        "2,000 of 20,000 questions of q.jsonl have their prompts\n"
        "12,000 of 20,000 questions of q.jsonl have their prompts\n",
    )


def test_other_ranks_are_silent(clock, capsys):
    with progress.show_progress("prompts", 10, is_shown=False) as advance:
        clock(60)
        advance(5)
    assert capsys.readouterr() == ("", "")


def test_slow_work_on_a_terminal_has_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.0)
    with progress.show_progress("prompts", 10) as advance:
        advance(4)
        advance(6)
    assert "prompts" in terminal.getvalue() and "10/10" in terminal.getvalue()
