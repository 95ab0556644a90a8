"""How the experiments train: which coders of a target, with which settings, and an SPD of its MLP matrices.

A recipe is the project's default. What is already trained in a folder with equal settings is loaded and not trained again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from activation_store import AT_HOME, DataConfig, Harvest
from checkpoints import (
    CONFIG,
    Checkpoint,
    Decomposition,
    TrainingRecord,
    build_coder,
    coder_name,
    held,
    load_spd,
    save_checkpoint,
)
from coder import Coder
from config import (
    LOCAL,
    CLTConfig,
    CoderConfig,
    CoderObjective,
    EncoderConfig,
    GateConfig,
    Lp,
    Output,
    Recon,
    Rule,
    SAEConfig,
    SPDConfig,
    SPDTrainConfig,
    TrainConfig,
    require,
)
from devices import bf16_is_fast
from logs import git_commit
from output_training import train_on_output
from parallel import decided, wait, world
from spd_model import ComponentModel
from spd_training import train_spd
from target_models import TargetModel, mlp_matrices
from training import dead_after, train_group


def new_coder(config: CoderConfig, seed: int) -> Coder:
    """A coder whose initial weights depend on its configuration and the seed alone."""
    offset = sum(ord(c) * (i + 1) for i, c in enumerate(repr(config)))
    return build_coder(config, torch.Generator().manual_seed(seed + offset))


def transcoder_configs(
    target: TargetModel, *, layers: Sequence[int], rules: Sequence[Rule], d_dict: int, skip: bool = False
) -> list[EncoderConfig]:
    """One transcoder per rule and layer."""
    d = target.d_model
    return [
        EncoderConfig(layer=layer, d_in=d, d_out=d, d_dict=d_dict, rule=rule, skip=skip)
        for rule in rules
        for layer in layers
    ]


def sae_configs(target: TargetModel, *, layers: Sequence[int], rules: Sequence[Rule], d_dict: int) -> list[SAEConfig]:
    """One SAE per rule and layer, of the site the target is read at."""
    return [
        SAEConfig(layer=layer, site=target.site, d_in=target.d_model, d_dict=d_dict, rule=rule)
        for rule in rules
        for layer in layers
    ]


def clt_configs(target: TargetModel, *, layers: Sequence[int], rules: Sequence[Rule], d_dict: int) -> list[CLTConfig]:
    """One cross-layer transcoder per rule."""
    return [
        CLTConfig(layers=tuple(layers), d_in=target.d_model, d_out=target.d_model, d_dict=d_dict, rule=rule)
        for rule in rules
    ]


def train_coders(
    configs: Sequence[CoderConfig], target: TargetModel, *, tokens: int, batch: int, seed: int, folder: Path,
    objective: CoderObjective = LOCAL, harvest: Harvest = AT_HOME,
) -> list[Checkpoint]:  # fmt: skip
    """Train from scratch what is not yet in `folder`, on one stream over all the layers, with the project's default recipe.

    Raises ValueError for an objective on the model's output with a harvest of its own: it runs the target at every step.
    """
    if not configs:
        raise ValueError("no coder was asked for: name at least one layer and one k")
    if isinstance(objective, Output):
        require(
            harvest == AT_HOME, "training on the model's output runs the target: leave out --cache and --target-device"
        )
        starts = [untrained(config, target, seed) for config in configs]
        train = TrainConfig(objective=objective, tokens=tokens, dead_after=dead_after(tokens), seed=seed)
        return train_on_output(starts, target, batch=batch, config=train, folder=folder)
    layers = tuple(sorted({layer for config in configs for layer in config.layers}))
    data = DataConfig(layers=layers, batch_tokens=batch, seed=seed)
    calibration = min(TrainConfig.calibration_tokens, max(batch, tokens // 4))
    train = TrainConfig(tokens=tokens, dead_after=dead_after(tokens), calibration_tokens=calibration, seed=seed)
    return train_group(
        [new_coder(config, seed) for config in configs], target, data=data, config=train, folder=folder, harvest=harvest
    )


def tune_coders(
    checkpoints: Sequence[Checkpoint], target: TargetModel, *, tokens: int, objective: CoderObjective, batch: int, seed: int,
    folder: Path,
) -> list[Checkpoint]:  # fmt: skip
    """Train coders further, on the model's output: what is not yet in `folder`, on one stream, with the default recipe.

    Raises ValueError for `Local()`, for which `train_coders` is there.
    """
    require(isinstance(objective, Output), f"{objective} asks nothing of the model's output: use train_coders")
    seen = tokens + max(checkpoint.record.train_tokens or 0 for checkpoint in checkpoints)
    train = TrainConfig(
        objective=objective,
        tokens=tokens,
        anneal=0.0,
        dead_after=dead_after(seen),
        calibration_tokens=32_768,
        seed=seed,
    )
    return train_on_output(checkpoints, target, batch=batch, config=train, folder=folder)


def untrained(config: CoderConfig, target: TargetModel, seed: int) -> Checkpoint:
    """A coder as `new_coder` makes it, with nothing in its record."""
    name = coder_name(target.name, config, seed)
    record = TrainingRecord(
        name=name, target=target.name, target_fingerprint=target.fingerprint, train_tokens=0, train_seconds=0.0, seed=seed,
        commit=None, objectives=(),
    )  # fmt: skip
    return Checkpoint(new_coder(config, seed), record, name)


@dataclass(frozen=True, kw_only=True)
class SPDRecipe:
    """How large a decomposition is and how long it is trained; `train_decomposition` says the rest."""

    components: int  # of every matrix
    gate_hidden: int  # hidden units of every matrix' gate
    steps: int
    batch: int  # sequences per step
    lr: float = 1e-3  # peak of AdamW, cosine to a tenth
    minimality: float = 5e-4  # weight of importance minimality
    seed: int = 0


class _OnDevice:
    """A token stream whose batches lie on the target's device, and this process' part of it where data are shared out."""

    def __init__(self, target: TargetModel, batch: int, seed: int) -> None:
        part = world().part
        require(batch % part[1] == 0, f"{batch} sequences a step cannot be dealt evenly to {part[1]} processes")
        self.stream = target.stream("train", batch // part[1], seed, part)
        self.state_dict, self.load_state_dict, self.device = (
            self.stream.state_dict,
            self.stream.load_state_dict,
            target.device,
        )

    def __next__(self) -> Tensor:
        return next(self.stream).to(self.device)


def train_decomposition(
    target: TargetModel, recipe: SPDRecipe, *, layers: Sequence[int], folder: Path
) -> Decomposition:
    """SPD of the MLP matrices of `layers`, or what `folder` holds of an equal training; ValueError for an unequal one.

    KL objective, of half the sequences of a step under stochastic masks of a random subset of the modules, of the other
    half under the masks that the ruler uses (1 where the importance is positive, else 0, without Δ) of all modules: a mask
    drawn evenly never comes near that corner, and components learn to rely on inactive ones being half there. p of
    importance minimality falls from 2 to 0.4, AdamW's rate by a cosine to a tenth; a gate per matrix reads the module's own
    input at the same position; a least-squares start stands in place of faithfulness warm-up. Otherwise Goodfire's recipe
    for language models, scaled down.
    """
    r = recipe
    assert r.batch >= 2, f"{r.batch=} sequences: each of the two terms needs one"
    patterns = tuple((path, r.components) for layer in layers for path in mlp_matrices(target, layer))
    config = SPDConfig(components=patterns, gate=GateConfig(kind="shared_mlp", hidden=(r.gate_hidden,)))
    random_masks = Recon(coefficient=0.5, source="stochastic", routing="subset")
    the_rulers = Recon(coefficient=0.5, source="deployed", routing="all")
    train = SPDTrainConfig(
        steps=r.steps, lr=r.lr, recon=(random_masks, the_rulers), distance="kl",
        minimality=Lp(coefficient=r.minimality, p=(2.0, 0.4)), split=True, faithfulness=1e4, final=0.1, warmup=0.02,
        start="least_squares", clip=1.0, metrics_every=20,
        checkpoint_every=100, seed=r.seed,
    )  # fmt: skip
    name = f"{target.name}_spd_L{'-'.join(map(str, layers))}_C{r.components}_n{r.steps}x{r.batch}_s{r.seed}"
    in_words = f"{config.gate} {train}"

    def finished() -> Decomposition | None:
        if not (folder / name / CONFIG).exists():
            return None
        found = Decomposition(*load_spd(str(folder / name), target))
        if found.record.recipe != in_words:
            raise ValueError(f"{folder / name} was trained otherwise ({found.record.recipe}): move it away")
        print(f"{name} is already trained in {folder}")
        return found

    if decided(lambda: finished() is not None):
        return finished()  # type: ignore[return-value]
    with held([folder / name] if world().leads else []):
        if decided(lambda: finished() is not None):  # by the process that held it until now
            return finished()  # type: ignore[return-value]
        model = ComponentModel(target.model, config, torch.Generator().manual_seed(r.seed)).to(target.device)
        stream = _OnDevice(target, r.batch, r.seed)
        seconds = train_spd(model, stream, train, folder / name, name, autocast=bf16_is_fast(target.device))
        record = TrainingRecord(
            name=name, target=target.name, target_fingerprint=target.fingerprint,
            train_tokens=r.steps * r.batch * target.context, train_seconds=seconds, seed=r.seed, commit=git_commit(),
            recipe=in_words,
        )  # fmt: skip
        if world().leads:
            save_checkpoint(folder / name, model, record)
        wait()
        return Decomposition(model, record)
