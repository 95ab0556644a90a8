"""What a run leaves behind: metrics as JSONL and in W&B, a settings file, files that are whole or absent.

The only file that imports wandb. W&B runs online where credentials exist, else offline (one line says so), or not at all
with WANDB_MODE=disabled; nothing in the project needs a server.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from devices import device_name
from parallel import first_to_say, world

REPOSITORY = Path(__file__).parent
STARTED = time.perf_counter()  # about the process' start: every command line imports this file


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block succeeds; a killed writer leaves `path` as it was.

    The block may make a file there, or a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, temporary)
        yield temporary
        temporary.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def git_commit() -> str | None:
    """The checkout's commit, with a + where the working tree differs; None outside a git checkout, or without git."""
    if shutil.which("git") is None:
        return None
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", "*.py"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") or None


def errors_in_one_line() -> None:
    """From here on an uncaught ValueError, which says what was wrong with an input, prints its line without a traceback;
    so does an OSError (a full disk, a refused connection), which leaves nothing half-written.

    Called by command lines; the exit code stays 1. `python -X dev` keeps tracebacks.
    """

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, ValueError | OSError) and not sys.flags.dev_mode:
            if first_to_say(str(error)):
                print(f"error: {error}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def command_line(main: Callable[..., None], name: str, arguments: Sequence[str] | None = None) -> None:
    """`main` with arguments from the command line of a file; what is wrong with them is said in one line."""
    import tyro

    errors_in_one_line()
    tyro.cli(main, args=arguments, prog=name, config=(tyro.conf.PositionalRequiredArgs,))


def load_tensors(path: Path, device: str) -> dict:  # type: ignore[type-arg]
    """A torch file that holds tensors only; raises ValueError in one line for a missing, truncated or pickled one."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: train it first, or check the path")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated or no torch file: fetch or train it again")
    try:
        return torch.load(path, map_location=device, weights_only=True)  # type: ignore[no-any-return]
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds pickled objects, not tensors: it is not opened") from None
    except Exception:  # of a damaged file the unpickler raises anything: KeyError, IndexError, RuntimeError, …
        raise ValueError(f"{path} is truncated or no torch file: fetch or train it again") from None


def check_named(path: Path, state: object) -> dict[str, Tensor]:
    """The tensors of a file by their names; raises ValueError where it holds anything else."""
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):  # type: ignore[attr-defined]
        raise ValueError(f"{path} holds something other than named tensors: it is not opened")
    return state  # type: ignore[return-value]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file by their own names, on the CPU; nothing is unpickled but tensors."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else load_tensors(path, "cpu")
    except SafetensorError:
        raise ValueError(f"{path} is truncated or no safetensors file: fetch it again") from None
    return plain_names(check_named(path, state))


PREFIXES = ("_orig_mod.", "module.")  # of a compiled module, and of one trained on several devices


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a prefix that all names share."""
    while state and (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """A CSV with a line of column names; None is written as an empty cell, a float so that it reads back exactly."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, each from column name to text, in the file's order."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_settings(folder: Path, settings: Any, device: str) -> None:
    """settings.json: the settings dataclass, command, commit, versions, device, date, seconds since the process' start."""
    relative = {k: str(v.relative_to(REPOSITORY)) if isinstance(v, Path) and v.is_relative_to(REPOSITORY) else v
                for k, v in dataclasses.asdict(settings).items()}  # fmt: skip
    write_json(
        folder / "settings.json",
        {
            "settings": relative,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": device_name(device),
            "seconds": round(time.perf_counter() - STARTED, 1),
            "date": time.strftime("%Y-%m-%d"),
        },
    )


class Logger:
    """One run's metrics: `metrics.jsonl` in `folder`, and a W&B run of the same name.

    `writes`: whether it is this process that logs the run; None: process 0 does (`parallel.py`).
    """

    def __init__(self, name: str, folder: Path, config: Any, *, writes: bool | None = None) -> None:
        self.name, self.writes = name, world().leads if writes is None else writes
        if not self.writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("a")
        self._run = _start_wandb(name, config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.writes:
            return
        self._file.write(json.dumps({"step": step} | metrics) + "\n")
        self._file.flush()
        if self._run is not None:
            self._run.log(metrics, step=step)

    def close(self) -> None:
        if not self.writes:
            return
        self._file.close()
        if self._run is not None:
            self._run.finish()


def _wandb_mode() -> str:
    """WANDB_MODE if set; else online with credentials, offline without."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if _has_credentials() else "offline"


def _has_credentials() -> bool:
    netrc = Path.home() / ".netrc"
    return "WANDB_API_KEY" in os.environ or (netrc.exists() and "api.wandb.ai" in netrc.read_text())


def _wandb_api(reference: str) -> Any:
    """The client of W&B; raises ValueError where it could not log in, before it asks anything of the network."""
    if not _has_credentials():
        raise ValueError(f"{reference} lies on W&B, which needs `wandb login`; --target tiny works offline")
    import wandb

    return wandb.Api()


_announced: set[str] = set()


def _start_wandb(name: str, config: Any) -> Any:
    mode = _wandb_mode()
    if mode == "disabled":
        return None
    import wandb

    if mode == "offline" and mode not in _announced:
        _announced.add(mode)
        print(
            "W&B: no credentials found, logging offline to wandb/ (WANDB_MODE=disabled turns it off)", file=sys.stderr
        )
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "nn_decompositions"),
        name=name,
        config=config,
        mode=mode,
        reinit="create_new",
        dir=str(REPOSITORY),
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_save_requirements=False),
    )


def download_artifact(reference: str, folder: Path) -> Path:
    """Fetch W&B artifact `entity/project/name:version` into `folder` (once) and return where it lies."""
    destination = folder / reference.replace("/", "--").replace(":", "--")
    if not destination.exists():
        with atomic_path(destination) as temporary:
            _wandb_api(reference).artifact(reference).download(root=str(temporary))
    return destination


def download_run_files(run: str, names: tuple[str, ...], folder: Path) -> Path:
    """Fetch the files of W&B run `entity/project/id` whose names start with one of `names` (once).

    Of files that differ in their step alone (`model_900.pth`, `model_1000.pth`) the last is fetched.
    """
    destination = folder / run.replace("/", "--")
    if not destination.exists():
        files = {file.name: file for file in _wandb_api(run).run(run).files()}
        with atomic_path(destination) as temporary:
            for name in last_steps(name for name in files if Path(name).name.startswith(names)):
                files[name].download(root=str(temporary))
    return destination


def last_steps(names: Iterable[str]) -> list[str]:
    """Of names that differ in the number before their suffix alone, that of the largest; the others as they are."""
    largest: dict[tuple[str, str], tuple[int, str]] = {}
    for name in names:
        stem, step, suffix = re.fullmatch(r"(.*?)(\d*)(\.\w+)?", name).groups("")  # type: ignore[union-attr]
        largest[stem, suffix] = max(largest.get((stem, suffix), (-1, "")), (int(step or 0), name))
    return [name for _, name in largest.values()]


def cache_folder() -> Path:
    """Where caches live: $NN_CACHE_HOME or ~/.cache/nn_decompositions."""
    return Path(os.environ.get("NN_CACHE_HOME", Path.home() / ".cache" / "nn_decompositions"))


def code_fingerprint() -> str:
    """16 hex digits that change with any module of the project: what a cache is named by that holds what they compute."""
    digest = hashlib.sha256()
    for file in sorted([*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*.c")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
