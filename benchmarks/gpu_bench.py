"""One call of gpu.py: its clock, its table, its log, and the guard that lets a failure cost one measurement alone."""

import argparse
import contextlib
import csv
import hashlib
import itertools
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from floors import PEAKS, Work

from devices import check_device, device_name
from logs import atomic_path

Step = Callable[[], object]
HERE = Path(__file__).parent
MARGIN = 20.0  # seconds kept for saving at the end


class Row(NamedTuple):
    part: str
    what: str
    shape: str = ""
    median_ms: str = ""
    floor_ms: str = ""  # by published peaks of the device; empty where they are not known here
    ratio: str = ""  # median_ms over that of our own step of this shape and rule
    note: str = ""
    device: str = ""
    code: str = ""  # hash of the sources


class Bench:
    """One call: its settings, the rows of gpu.csv, the log, the clock."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch, self.output, self.mini = args, scratch, args.output, args.miniature
        self.device = check_device(args.device)
        self.deadline = time.monotonic() + 60 * args.minutes
        self.output.mkdir(parents=True, exist_ok=True)
        sources = sorted([*HERE.parent.glob("*.py"), *HERE.glob("*.py")])
        self.code = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]
        self.name = device_name(self.device)
        self.peak = next((peak for name, peak in PEAKS.items() if name in self.name), None)
        self.part, self.failures, self.file = "", 0, self.output / "gpu.csv"
        self.log = (self.output / "gpu.log").open("a+", buffering=1)
        self.rows: list[Row] = []
        if self.file.exists():
            with self.file.open() as file:
                self.rows = [Row(*line) for line in list(csv.reader(file))[1:]]

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log)

    def is_mine(self, row: Row, part: str) -> bool:
        return (row.part, row.device, row.code) == (part, self.name, self.code)

    def is_finished(self, part: str) -> bool:
        """Whether gpu.csv holds this part of this code on this device, without a failure."""
        return any(self.is_mine(row, part) and row.what == "whole part" and row.note == "ok" for row in self.rows)

    def begin(self, part: str) -> None:
        """Rows of an earlier try are dropped, but for spd's, each of which goes on from the one before."""
        self.part, self.failures = part, 0
        if part != "spd":
            self.rows = [row for row in self.rows if not self.is_mine(row, part)]

    def row(
        self, what: str, shape: object = "", ms: float | None = None, floor: tuple[Work, str] | None = None,
        reference: float | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """Write a row at once; `floor` is (work, precision), `reference` the milliseconds of our own step."""
        own = f"{floor[0].floor_ms(self.peak, floor[1]):.4g}" if floor and self.peak else ""
        ratio = f"{ms / reference:.3g}" if ms and reference else ""
        median = "" if ms is None else f"{ms:.4g}"
        self.rows.append(Row(self.part, what, str(shape), median, own, ratio, note, self.name, self.code))
        self.say("  ".join(f"{name} {text}" if name.endswith(("ms", "ratio")) else text
                           for name, text in zip(Row._fields[:7], self.rows[-1]) if text))  # fmt: skip
        with atomic_path(self.file) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Row._fields, *self.rows])

    @contextlib.contextmanager
    def guarded(self, what: str, shape: object = "") -> Iterator[None]:
        """What fails inside becomes a row of its own, its traceback goes to the log."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            traceback.print_exc(file=self.log)
            self.row(what, shape, note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def run(self, part: str, function: "Callable[[Bench], None]", seconds: float) -> None:
        """One part, whole: skipped where it is finished or no time is left, ended when its seconds are over."""
        if self.is_finished(part) and part != "spd":
            return self.say(f"{part}: already measured with this code on this device")
        self.begin(part)
        if self.seconds_left < MARGIN:
            return self.row("whole part", note="skipped: no minutes left")
        began = time.monotonic()
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, min(seconds, self.seconds_left - MARGIN / 2)))
        try:
            with self.guarded("this part"):
                function(self)
        except OutOfTime:
            self.failures += 1
            self.row("this part", note=f"failed: its {time.monotonic() - began:.0f} s were over")
        signal.setitimer(signal.ITIMER_REAL, 0)
        note = f"{self.failures} failed: see gpu.log" if self.failures else "ok"
        self.row("whole part", ms=1e3 * (time.monotonic() - began), note=note)

    def milliseconds(self, step: Step) -> float:
        """Median of 5 to 30 calls, about a second in all, after three that compile and allocate."""
        for _ in range(1 if self.mini else 3):
            step()
        repeats = 2 if self.mini else int(min(30, max(5, 1000 / self.spans(step, 1)[0])))
        return statistics.median(self.spans(step, repeats))

    def spans(self, step: Step, n: int) -> list[float]:
        """Milliseconds of n calls: between events on a GPU, else by the clock."""
        if self.device == "cpu":
            ticks = [time.perf_counter()]
            for _ in range(n):
                step()
                ticks.append(time.perf_counter())
            return [1e3 * (end - begin) for begin, end in itertools.pairwise(ticks)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]

    def is_broken(self) -> bool:
        """Whether an error has left the device unusable for this process."""
        if self.device == "cpu":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


class OutOfTime(BaseException):
    """Past every guard but that of a part."""


def _out_of_time(*_: object) -> None:
    raise OutOfTime
