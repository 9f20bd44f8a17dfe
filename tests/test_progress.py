"""Progress of long work, on a terminal and elsewhere."""

from ntm_jax import progress


def test_without_a_terminal_there_are_lines_once_work_is_long(monkeypatch, capsys):
    assert list(progress.track([1, 2], "evaluate", "batches")) == [1, 2]
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e-9)
    assert list(progress.track([1, 2], "evaluate", "batches", show=False)) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress.track(iter("abc"), "evaluate", "batches", 3)) == list("abc")
    assert "evaluate: 2/3 batches, 00:00 left\n" in capsys.readouterr().err
