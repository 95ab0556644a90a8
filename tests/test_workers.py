"""A worker that dies costs its own job alone."""

import os
import signal
from pathlib import Path

import pytest
from worker_processes import Job, run_jobs


def write(path: Path, device: str) -> None:
    path.write_text(device)


def die(path: Path, device: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_costs_its_own_job_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in "abc"]
    jobs = [Job("first", write, (files[0],)), Job("second", die, (files[1],)), Job("third", write, (files[2],))]
    with pytest.raises(SystemExit) as stop:
        run_jobs(jobs, ("cpu", "other"))
    assert stop.value.code == 1
    assert files[0].read_text() == "cpu" and not files[1].exists() and files[2].read_text() == "cpu"
    table = capsys.readouterr().out
    assert "FAILED (exit code -9)" in table and table.count("done") == 2
