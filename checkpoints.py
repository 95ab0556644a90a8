"""The only reader and writer of checkpoints: a folder with `encoder.pt` (tensors) and `config.json` (what they are).

Wherever a checkpoint is named, a local folder and a W&B artifact `entity/project/name:version` are interchangeable.
Tensors are read with weights_only=True; every file is written to a temporary name and renamed.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from clt import CrossLayerTranscoder
from coder import Coder
from config import CLTConfig, CoderConfig, EncoderConfig, SAEConfig, from_json, to_json
from logs import atomic_path, cache_folder, download_artifact, load_tensors, write_json
from sae import build_sae
from spd_model import ComponentModel
from target_models import ASSETS, TargetModel, mlp_matrices
from transcoder import build_transcoder

# of experiments and the main job; $NN_CHECKPOINTS puts them on another disk
CHECKPOINTS = Path(os.environ.get("NN_CHECKPOINTS", Path(__file__).parent / "checkpoints"))
ENCODER, CONFIG = "encoder.pt", "config.json"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Where a coder comes from; None: not known, as of a dictionary that another library trained."""

    name: str  # target, method, layers, k and seed
    target: str
    target_fingerprint: str | None
    train_tokens: int | None
    train_seconds: float  # its share of the group's wall time
    seed: int
    commit: str | None
    recipe: str | None = None  # how it was trained: settings in words

    @classmethod
    def imported(cls, name: str, target: str) -> "TrainingRecord":
        """Of a foreign dictionary, whose file says nothing of its training."""
        return cls(
            name=name, target=target, target_fingerprint=None, train_tokens=None, train_seconds=0.0, seed=0, commit=None
        )  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    coder: Coder
    record: TrainingRecord
    path: str


def build_coder(config: CoderConfig, generator: torch.Generator) -> Coder:
    """The coder a configuration describes."""
    builders = {SAEConfig: build_sae, EncoderConfig: build_transcoder, CLTConfig: CrossLayerTranscoder}
    return builders[type(config)](config, generator)  # type: ignore[operator,no-any-return]


def coder_name(target: str, config: CoderConfig, seed: int) -> str:
    """E.g. `tiny_transcoder_batchtopk_L2_k16_d1536_s0`: no two coders of a study share a name.

    A rule is named by its first value, a whole number k of active latents or a coefficient c.
    """
    kind = "-".join(filter(None, [config.kind, config.variant]))
    layers = "-".join(str(layer) for layer in config.layers)
    first = dataclasses.astuple(config.rule)[0]
    sparsity = f"k{first}" if isinstance(first, int) else f"c{first:g}"
    safe = target.replace("/", "--").replace(":", "-")
    return f"{safe}_{kind}_{type(config.rule).__name__.lower()}_L{layers}_{sparsity}_d{config.d_dict}_s{seed}"


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


def resolve(reference: str) -> Path:
    """A local folder as it is; `entity/project/name:version` is fetched from W&B once."""
    if Path(reference).exists() or ":" not in reference:
        return Path(reference)
    return download_artifact(reference, cache_folder() / "artifacts")


def is_trained(folder: Path, config: CoderConfig, *, train_tokens: int, fingerprint: str, recipe: str) -> bool:
    """Whether `folder` holds a finished coder of these settings; an unknown recipe passes for the same."""
    if not (folder / CONFIG).exists():
        return False
    found, record = read_config(folder)
    same = record.train_tokens == train_tokens and record.target_fingerprint == fingerprint
    return same and found == config and record.recipe in (None, recipe)


def read_config(folder: Path) -> tuple[Any, TrainingRecord]:
    """What a checkpoint's tensors are, and where they come from; raises ValueError where it does not say so."""
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds no {CONFIG}: not a finished checkpoint")
    try:
        blob = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is truncated or no JSON ({error}): fetch or train it again") from None
    return from_json(blob["config"]), TrainingRecord(**blob["record"])


def load_checkpoint(reference: str, device: str) -> Checkpoint:
    """The coder in eval mode on `device`, whatever device it was saved from."""
    folder = resolve(reference)
    config, record = read_config(folder)
    coder = build_coder(config, torch.Generator())
    load_state(coder, load_tensors(folder / ENCODER, "cpu"), reference)
    return Checkpoint(coder.to(device).eval(), record, reference)


def load_spd(reference: str, target: TargetModel) -> tuple[ComponentModel, TrainingRecord]:
    """A decomposition of `target`, in fp32 on its device; raises ValueError where it was trained on another model."""
    folder = resolve(reference)
    config, record = read_config(folder)
    if record.target_fingerprint != target.fingerprint:
        raise ValueError(
            f"{reference} decomposes {record.target!r} ({record.target_fingerprint}), not {target.fingerprint}"
        )
    model = ComponentModel(target.model, config, torch.Generator())
    load_state(model, load_tensors(folder / ENCODER, "cpu"), reference)
    return model.float().to(target.device).eval(), record


def load_state(module: nn.Module, state: dict[str, torch.Tensor], reference: str) -> None:
    """Load after checking names and shapes; raises ValueError naming the first tensor that does not fit."""
    expected = module.state_dict()
    wrong = [name for name in expected.keys() | state.keys() if name not in expected or name not in state]
    wrong += [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    if wrong:
        first = sorted(wrong)[0]
        raise ValueError(f"{reference} does not match its {CONFIG}: tensor {first!r} is missing, extra or misshapen")
    module.load_state_dict(state)


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


def find_spd(target: TargetModel, layers: Sequence[int]) -> Decomposition:
    """The decomposition of these layers: the shipped one of `tiny`, else the one that exp_004 left among the checkpoints.

    Raises ValueError where there is none, or more than one.
    """
    shipped = ASSETS / f"spd_{target.name}"
    if shipped.exists():
        return Decomposition(*load_spd(str(shipped), target))
    wanted = {path for layer in layers for path in mlp_matrices(target, layer)}
    folders = sorted(file.parent for file in checkpoint_folder(target.name).glob(f"*_spd_*/{CONFIG}"))
    found = [folder for folder in folders if wanted <= dict(read_config(folder)[0].components).keys()]
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found) or "none"
        raise ValueError(
            f"one SPD of layers {list(layers)} of {target.name!r} is needed, there is {names}: see exp_004"
        )
    return Decomposition(*load_spd(str(found[0]), target))
