"""What a run leaves behind is whole or absent, and what is wrong with an input is said in one line."""

import sys
from pathlib import Path

import pytest

from logs import atomic_path, errors_in_one_line


@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_while_it_is_written_leaves_the_old_and_nothing_else(tmp_path: Path, folder: bool) -> None:
    """And the failure is the one that is told, also where a folder was being made."""
    path = tmp_path / "result"
    for text in ("old", "new"):
        with pytest.raises(ValueError, match="deliberate"), atomic_path(path) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "file" if folder else temporary).write_text(text)
            if text == "old":
                temporary.replace(path)  # as an earlier run left it
            raise ValueError("deliberate")
    assert [p.name for p in tmp_path.iterdir()] == ["result"]
    assert (path / "file" if folder else path).read_text() == "old"


def said(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line prints of an error that nothing catches."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    errors_in_one_line()
    sys.excepthook(type(error), error, error.__traceback__)
    return capsys.readouterr().err


def test_an_input_or_a_disk_that_fails_is_said_in_one_line_and_a_bug_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(ValueError("k=9 is too many"), monkeypatch, capsys) == "error: k=9 is too many\n"
    assert said(OSError(28, "No space left"), monkeypatch, capsys) == "error: [Errno 28] No space left\n"
    with pytest.raises(AssertionError) as bug:
        raise AssertionError("a bug")
    assert "Traceback" in said(bug.value, monkeypatch, capsys)
