import os
import re
import sys

import pytest

from models.training import progress
from models.training.progress import Progress, silent


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    time = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: time[0])
    return time


def show(clock, epochs=10, done=0, eval_every=2):
    """Compiling takes 20 seconds, and an epoch 3."""
    with Progress("adamw", epochs=epochs, done=done) as shown:
        for number in range(done + 1, epochs + 1):
            seconds = 23 if number == done + 1 else 3
            clock[0] += seconds
            evaluated = number % eval_every == 0
            values = {"validation": number / 100, "best": number / 100} if evaluated else {}
            shown.epoch(number, loss=1 / number, seconds=seconds, tokens=600, **values)
        shown.note("stopped early")


def test_without_a_terminal_an_evaluated_epoch_is_a_line(clock, capsys):
    show(clock)
    out, err = capsys.readouterr()
    assert out == "stopped early\n"
    lines = err.splitlines()
    assert lines[0] == "adamw: epoch 2 of 10, loss 0.5000, validation NDCG@10 0.0200, 3.00 s an epoch, 24 s left"
    assert lines[3] == "adamw: epoch 8 of 10, loss 0.1250, validation NDCG@10 0.0800, 3.00 s an epoch, 6 s left"
    assert len(lines) == 5
    assert "\r" not in err


def test_compiling_is_not_called_training(clock, capsys):
    show(clock, epochs=4, done=2, eval_every=1)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "adamw: epoch 3 of 4, loss 0.3333, validation NDCG@10 0.0300, 23.0 s with compiling",
        "adamw: epoch 4 of 4, loss 0.2500, validation NDCG@10 0.0400, 3.00 s an epoch, 0 s left",
    ]


def test_a_terminal_gets_a_bar_with_the_speed_behind_the_first_epoch(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with Progress("adamw", epochs=3) as shown:
        posts = []
        for number in (1, 2, 3):
            shown.epoch(number, loss=1.0, seconds=20.0 if number == 1 else 0.5, tokens=600, best=0.25)
            posts.append(shown._bar.postfix)
    assert posts == [
        "loss 1.0000, best NDCG@10 0.2500",
        *["loss 1.0000, 1,200 tokens/s, best NDCG@10 0.2500"] * 2,
    ]
    assert re.search(r"adamw.*compiling", capsys.readouterr().err)


def test_silence(clock, capsys, monkeypatch):
    with silent():
        assert os.environ["TQDM_DISABLE"] == "1"  # for the processes that are started meanwhile
        show(clock)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        show(clock)
    assert "TQDM_DISABLE" not in os.environ
    with silent(False):
        assert "TQDM_DISABLE" not in os.environ
    assert capsys.readouterr() == ("stopped early\n" * 2, "")
