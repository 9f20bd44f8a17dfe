"""Progress of long work, on a terminal and elsewhere."""

from ntm_jax import progress


def test_lines_without_a_terminal_come_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 8))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.track(iter("abcdefg"), "evaluate", "batches", 7)) == list("abcdefg")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["evaluate: 2/7 batches, 60 s left", "evaluate: 5/7 batches, 19 s left"]


def test_nothing_is_shown_where_nothing_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert list(progress.track([1, 2, 3], "evaluate", "batches", show=False)) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress.track([1, 2, 3], "evaluate", "batches")) == [1, 2, 3]
    assert "evaluate" in capsys.readouterr().err
