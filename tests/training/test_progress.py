from __future__ import annotations

import io

from fastmeta.training.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_file_gets_plain_lines_now_and_then() -> None:
    stream, clock = io.StringIO(), _Clock()
    progress = Progress(100, stream=stream, every=10, clock=clock)
    assert not progress.due()
    clock.now = 10.0
    assert progress.due()
    progress.show(50, 1234.0, loss=0.5)
    assert not progress.due()
    progress.close()
    assert stream.getvalue() == "step 50/100  loss 0.5  1,234 tasks/s  0m10s left\n"


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    stream, clock = _Terminal(), _Clock()
    progress = Progress(4, stream=stream, clock=clock)
    for step in (1, 2):
        clock.now += 1.0
        assert progress.due()
        progress.show(step, 10.0, loss=0.25)
    progress.say("stopped")
    text = stream.getvalue()
    assert text.count("\r") == 2
    assert "[############............] step 2/4" in text
    assert text.endswith("\nstopped\n")


def test_the_time_left_counts_from_where_a_run_resumed() -> None:
    stream, clock = io.StringIO(), _Clock()
    progress = Progress(100, 90, stream=stream, clock=clock)
    clock.now = 20.0
    progress.show(95, 1.0)
    assert "0m20s left" in stream.getvalue()


def test_it_can_be_silent() -> None:
    stream = io.StringIO()
    progress = Progress(10, stream=stream, enabled=False)
    assert not progress.due()
    progress.show(5, 1.0)
    progress.say("words")
    progress.close()
    assert stream.getvalue() == ""
