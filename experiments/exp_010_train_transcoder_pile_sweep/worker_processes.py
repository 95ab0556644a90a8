"""Independent jobs in worker processes, in batches of one per device. A worker that dies costs its own job alone."""

import multiprocessing as mp
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Job(NamedTuple):
    name: str
    function: Callable[..., None]  # called as function(*args, device) in a fresh process
    args: tuple[Any, ...]


class Outcome(NamedTuple):
    name: str
    device: str
    exit_code: int  # 0: done; negative: the signal that killed it
    seconds: float


def run_jobs(jobs: Sequence[Job], devices: Sequence[str]) -> list[Outcome]:
    """Run all jobs, `len(devices)` at a time; prints a table of outcomes. Raises SystemExit(1) if any failed."""
    context = mp.get_context("spawn")
    outcomes = []
    for first in range(0, len(jobs), len(devices)):
        running = []
        for job, device in zip(jobs[first:], devices):
            process = context.Process(target=job.function, args=(*job.args, device), name=job.name)
            process.start()
            running.append((job, device, process, time.perf_counter()))
        for job, device, process, began in running:
            process.join()
            outcomes.append(Outcome(job.name, device, process.exitcode, time.perf_counter() - began))
    for outcome in outcomes:
        state = "done" if outcome.exit_code == 0 else f"FAILED (exit code {outcome.exit_code})"
        print(f"{outcome.name:30} {outcome.device:10} {outcome.seconds:8.1f} s  {state}")
    if any(outcome.exit_code for outcome in outcomes):
        raise SystemExit(1)
    return outcomes
