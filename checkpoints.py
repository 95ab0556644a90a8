"""The only reader and writer of checkpoints: a folder with `encoder.pt` (tensors) and `config.json` (what they are).

Wherever a checkpoint is named, a local folder and a W&B artifact `entity/project/name:version` are interchangeable.
Tensors are read with weights_only=True; every file is written to a temporary name and renamed. What a process is about
to write it holds with `held`, so that a second one says so instead of writing into it.
"""

import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from clt import CrossLayerTranscoder
from coder import Coder
from config import (
    CLTConfig,
    CoderConfig,
    EncoderConfig,
    SAEConfig,
    SPDConfig,
    from_fields,
    from_json,
    full_kind,
    to_json,
)
from logs import atomic_path, cache_folder, check_named, download_artifact, load_tensors, write_json
from parallel import gathered, united, wait, whole_tensors, world
from sae import build_sae
from spd_model import ComponentModel
from target_models import TargetModel
from transcoder import build_transcoder

# of experiments and the main job; $NN_CHECKPOINTS puts them on another disk
CHECKPOINTS = Path(os.environ.get("NN_CHECKPOINTS", Path(__file__).parent / "checkpoints"))
ENCODER, CONFIG = "encoder.pt", "config.json"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Where a coder comes from; None: not known, as of a dictionary that another library trained."""

    name: str  # target, method, layers, k, seed, tokens and rate
    target: str
    target_fingerprint: str | None
    train_tokens: int | None
    train_seconds: float  # its share of the group's wall time
    seed: int
    commit: str | None
    recipe: str | None = None  # how it was trained: settings in words
    objectives: tuple[str, ...] = ("local",)  # what it was trained for, one objective after the other
    hooks: tuple[str, ...] = ()  # TransformerLens hook points that a foreign file names as what it reads and writes

    @property
    def variant(self) -> str:
        """What tells its rows from those of a coder trained on its own layers alone: `kl-free`, `kl-free-scratch`."""
        if self.objectives[:1] == ("local",):
            return "-".join(self.objectives[1:])
        return "-".join([*self.objectives, "scratch"])

    @classmethod
    def imported(cls, name: str, target: str, hooks: tuple[str, ...] = ()) -> "TrainingRecord":
        """Of a foreign dictionary, whose file says nothing of its training."""
        return cls(
            name=name, target=target, target_fingerprint=None, train_tokens=None, train_seconds=0.0, seed=0, commit=None,
            hooks=hooks,
        )  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    coder: Coder
    record: TrainingRecord
    path: str


def build_coder(config: CoderConfig, generator: torch.Generator) -> Coder:
    """The coder a configuration describes."""
    return BUILDERS[type(config)](config, generator)  # type: ignore[operator,no-any-return]


BUILDERS = {SAEConfig: build_sae, EncoderConfig: build_transcoder, CLTConfig: CrossLayerTranscoder}


def coder_name(target: str, config: CoderConfig, seed: int) -> str:
    """E.g. `tiny_transcoder_batchtopk_L2_k16_d1536_s0`: what is trained, apart from how.

    A rule is named by its first value, a whole number k of active latents or a coefficient c.
    """
    layers = "-".join(str(layer) for layer in config.layers)
    first = dataclasses.astuple(config.rule)[0]
    sparsity = f"k{first}" if isinstance(first, int) else f"c{first:g}"
    safe = target.replace("/", "--").replace(":", "-")
    return (
        f"{safe}_{full_kind(config)}_{type(config.rule).__name__.lower()}_L{layers}_{sparsity}_d{config.d_dict}_s{seed}"
    )


def run_name(target: str, config: CoderConfig, *, seed: int, tokens: int, lr: float) -> str:
    """E.g. `tiny_transcoder_batchtopk_L2_k16_d1536_s0_n1000000_lr0.00411`: a trial has a name of its own beside the real run."""
    return f"{coder_name(target, config, seed)}_n{tokens}_lr{lr:.3g}"


def save_checkpoint(folder: Path, model: Coder | ComponentModel, record: TrainingRecord) -> None:
    """Write a coder, or a decomposition's components and gates without the target.

    config.json is deleted before and written after the tensors, so a folder that has one is complete.
    """
    check_room(folder / ENCODER, model.state_dict())
    (folder / CONFIG).unlink(missing_ok=True)
    save_tensors(folder / ENCODER, model.state_dict())
    write_json(folder / CONFIG, {"config": to_json(model.config), "record": dataclasses.asdict(record)})


def save_tensors(path: Path, state: object) -> None:
    check_room(path, state)
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def check_room(path: Path, state: object) -> None:
    """Raises ValueError where the disk has no room for a torch file, which torch would say over fifty lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise ValueError(f"the disk is full: {path} takes {needed:,} bytes and {free:,} are free; make room for it")


# ------------------------------------------------------------------------------- the state of an interrupted training


def _part(file: Path, step: int, rank: int) -> Path:
    return file.with_name(f"{file.stem}.step{step}.rank{rank}.pt")


def save_parts(file: Path, step: int, own: dict[str, Any]) -> list[int]:
    """What other processes than 0 add to the state of a step, each in a file beside `file`; returns which of them do."""
    adds = gathered(bool(own))
    if own and not world().leads:
        save_tensors(_part(file, step, world().rank), own)
    wait()
    return [rank for rank, any_of_it in enumerate(adds) if any_of_it and rank]


def with_parts(file: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What all processes added to a state, `file` of which holds what process 0 did."""
    others = [load_tensors(_part(file, state["step"], rank), "cpu") for rank in state["others"]]
    return united([state["trainee"], *others])


def delete_parts(file: Path, *, but: int | None = None) -> None:
    """Of other processes than 0, of all states except that of a step."""
    for part in file.parent.glob(f"{file.stem}.step*.rank*.pt"):
        if f".step{but}." not in part.name:
            part.unlink()


def forget_state(file: Path) -> None:
    """Delete the state of a training whose outcome is on disk."""
    wait()
    if world().leads:
        file.unlink(missing_ok=True)
        delete_parts(file)


def whole_coder(coder: Coder) -> Coder:
    """The coder itself; where its latents are spread over processes, on process 0 one that has them all, on the CPU."""
    if not world().deals("latents"):
        return coder
    state = whole_tensors(coder.state_dict(), coder.config.d_dict)
    whole = build_coder(coder.config, torch.Generator())
    if world().leads:
        whole.load_state_dict(state)
    return whole


# --------------------------------------------------------------------------------------------------------------- locks


@contextmanager
def held(paths: Iterable[Path]) -> Iterator[None]:
    """Within, this process alone writes what stands at the paths; raises ValueError where another one does already.

    Beside each path lies a lock file with the process's number. The lock is the kernel's and ends with the process, so
    that a killed one leaves none behind, whatever its file says.
    """
    with ExitStack() as stack:
        for path in sorted(set(paths)):
            stack.enter_context(_lock(path))
        yield


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    file = path.with_name(f".{path.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = file.read_text().strip() or "unknown"
            raise ValueError(
                f"{path} is being written by process {owner}: wait for its end, or choose another folder"
            ) from None
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        yield


ARTIFACT = r"[\w.-]+/[\w.-]+/[\w.-]+:[\w.-]+"


def resolve(reference: str) -> Path:
    """A local folder as it is, also with a colon in its name; `entity/project/name:version` is fetched from W&B once."""
    if Path(reference).exists() or re.fullmatch(ARTIFACT, reference) is None:
        return Path(reference)
    return download_artifact(reference, cache_folder() / "artifacts")


def is_trained(folder: Path, config: CoderConfig, *, train_tokens: int, fingerprint: str, recipe: str) -> bool:
    """Whether `folder` holds a finished coder; an unknown recipe passes for the same.

    Raises ValueError where it is another one than these settings give: nothing is overwritten that took a training.
    """
    if not (folder / CONFIG).exists():
        return False
    found, record = read_config(folder)
    own = (record.train_tokens, record.target_fingerprint, found, record.recipe or recipe)
    for is_so, asked in zip(own, (train_tokens, fingerprint, config, recipe)):
        if is_so != asked:
            raise ValueError(f"{folder} was trained otherwise ({is_so}, not {asked}): move it away")
    return True


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds, with or without a byte-order mark; raises ValueError for any other file."""
    try:
        blob = json.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} is truncated or no JSON ({reason}): fetch or train it again") from None
    if not isinstance(blob, dict):
        raise ValueError(f"{file} holds a {type(blob).__name__}, not a configuration")
    return blob


def read_config(folder: Path) -> tuple[Any, TrainingRecord]:
    """What a checkpoint's tensors are, and where they come from; raises ValueError where it does not say so."""
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds no {CONFIG}: not a finished checkpoint")
    blob = read_object(folder / CONFIG)
    config, record = blob.get("config"), from_json(blob.get("record"))
    if not (isinstance(config, dict) and isinstance(record, dict)):
        raise ValueError(f"{folder} is no checkpoint of ours: name its --format")
    return from_json(config), from_fields(TrainingRecord, record)


def is_spd(reference: str) -> bool:
    """Whether a checkpoint is a decomposition; False for what is no checkpoint."""
    file = resolve(reference) / CONFIG
    config = read_object(file).get("config") if file.exists() else None
    return isinstance(config, dict) and config.get("class") == SPDConfig.__name__


def load_checkpoint(reference: str, device: str) -> Checkpoint:
    """The coder in eval mode on `device`, whatever device it was saved from."""
    folder = resolve(reference)
    config, record = read_config(folder)
    if type(config) not in BUILDERS:
        raise ValueError(f"{reference} holds a {type(config).__name__}, not a coder")
    state = check_named(folder / ENCODER, load_tensors(folder / ENCODER, "cpu"))
    check_widths(config, state, reference)
    coder = build_coder(config, torch.Generator())
    load_state(coder, state, reference)
    return Checkpoint(coder.to(device).eval(), record, reference)


def check_widths(config: CoderConfig, state: dict[str, torch.Tensor], reference: str) -> None:
    """Raises ValueError where tensors are not as wide as the configuration says, before anything so wide is made."""
    for name, width in (("W_enc", (config.d_dict, config.d_in)), ("b_dec", (config.d_out,))):
        shapes = [tensor.shape for key, tensor in state.items() if key.endswith(name)]
        if not shapes or any(shape[-len(width) :] != width for shape in shapes):
            raise ValueError(f"{reference} does not match its {CONFIG}: tensor {name!r} is missing, extra or misshapen")


def load_spd(reference: str, target: TargetModel) -> tuple[ComponentModel, TrainingRecord]:
    """A decomposition of `target`, in fp32 on its device; raises ValueError where it was trained on another model."""
    folder = resolve(reference)
    config, record = read_config(folder)
    if record.target_fingerprint != target.fingerprint:
        raise ValueError(
            f"{reference} decomposes {record.target!r} ({record.target_fingerprint}), not {target.fingerprint}"
        )
    model = ComponentModel(target.model, config, torch.Generator())
    load_state(model, check_named(folder / ENCODER, load_tensors(folder / ENCODER, "cpu")), reference)
    return model.float().to(target.device).eval(), record


def load_state(module: nn.Module, state: dict[str, torch.Tensor], reference: str) -> None:
    """Load after checking names, shapes and values; raises ValueError naming the first tensor that does not fit.

    A threshold alone may be infinite: that of a coder which was never calibrated.
    """
    expected = module.state_dict()
    wrong = [name for name in expected.keys() | state.keys() if name not in expected or name not in state]
    wrong += [name for name in expected.keys() & state.keys() if not _same_kind(expected[name], state[name])]
    if wrong:
        first = sorted(wrong)[0]
        raise ValueError(f"{reference} does not match its {CONFIG}: tensor {first!r} is missing, extra or misshapen")
    for name, tensor in state.items():
        whole = tensor.isnan().logical_not() if name.endswith("threshold") else tensor.isfinite()
        if not whole.all():
            raise ValueError(f"{reference}: tensor {name!r} holds NaN or infinity: fetch or train it again")
        if name.endswith(("x_scale", "y_scale")) and not (tensor > 0).all():
            raise ValueError(f"{reference}: tensor {name!r} is not positive: fetch or train it again")
    module.load_state_dict(state)


def _same_kind(expected: torch.Tensor, found: torch.Tensor) -> bool:
    same = expected.shape == found.shape and expected.is_floating_point() == found.is_floating_point()
    return same and found.layout == torch.strided and not found.is_complex()


def check_target(checkpoint: Checkpoint, target: TargetModel) -> None:
    """Raises ValueError where the checkpoint was trained on another model."""
    if checkpoint.record.target_fingerprint not in (None, target.fingerprint):
        raise ValueError(
            f"{checkpoint.path} was trained on {checkpoint.record.target!r} with weights "
            f"{checkpoint.record.target_fingerprint}, not on {target.name!r} ({target.fingerprint})"
        )


def checkpoint_folder(target: str) -> Path:
    """Where the experiments keep what they train on a target; they share it, so that nothing is trained twice."""
    return CHECKPOINTS / target.replace("/", "--").replace(":", "-")


class Decomposition(NamedTuple):
    model: ComponentModel
    record: TrainingRecord
