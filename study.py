"""What every study shares: which coders to train, what to measure them against, and how the results are written down."""

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from activation_store import ActivationsStore, DataConfig
from checkpoints import (
    CHECKPOINTS,
    CONFIG,
    Checkpoint,
    TrainingRecord,
    build_coder,
    load_spd,
    read_config,
    save_checkpoint,
)
from clt import CrossLayerTranscoder
from config import CLTConfig, EncoderConfig, GateConfig, Recon, Rule, SAEConfig, SPDConfig, SPDTrainConfig, TrainConfig
from devices import bf16_is_fast
from evaluation import Measurement
from logs import REPOSITORY, errors_in_one_line, git_commit, write_settings
from pareto import draw, markdown_table, read_points, write_layers, write_points
from replacement import (
    CLT,
    SAE,
    SPD,
    Affine,
    Identity,
    Mean,
    Neurons,
    Origin,
    Replacement,
    Transcoder,
    Zero,
    fit_affine,
)
from sae import BaseAutoencoder
from sparsity import Coder
from spd_model import ComponentModel
from spd_training import train_spd
from target_models import ASSETS, TargetModel, mlp_matrices
from token_stream import TokenStream, take_tokens
from training import learning_rate, train_group

FIGURE = "![Pareto curves](pareto.png)"  # in a report, the table follows it
BASELINE_TOKENS = 131_072  # training tokens that fit the affine maps and the means


def new_coder(config: SAEConfig | EncoderConfig | CLTConfig, seed: int) -> Coder:
    """A coder whose initial weights depend on its configuration and the seed alone."""
    offset = sum(ord(c) * (i + 1) for i, c in enumerate(repr(config)))
    return build_coder(config, torch.Generator().manual_seed(seed + offset))


def transcoder_configs(
    target: TargetModel, layers: Sequence[int], rules: Sequence[Rule], d_dict: int, skip: bool = False
) -> list[EncoderConfig]:
    """One transcoder per rule and layer."""
    d = target.d_model
    return [EncoderConfig(layer, d, d, d_dict, rule, skip) for rule in rules for layer in layers]


def sae_configs(target: TargetModel, layers: Sequence[int], rules: Sequence[Rule], d_dict: int) -> list[SAEConfig]:
    """One SAE per rule and layer, of the site the target is read at."""
    return [SAEConfig(layer, target.site, target.d_model, d_dict, rule) for rule in rules for layer in layers]


def clt_configs(target: TargetModel, layers: Sequence[int], rules: Sequence[Rule], d_dict: int) -> list[CLTConfig]:
    """One cross-layer transcoder per rule."""
    return [CLTConfig(tuple(layers), target.d_model, target.d_model, d_dict, rule) for rule in rules]


def checkpoint_folder(target: str) -> Path:
    """Where the experiments keep what they train on a target; they share it, so that nothing is trained twice."""
    return CHECKPOINTS / target.replace("/", "--").replace(":", "-")


def held_out_tokens(target: TargetModel, n_tokens: int) -> Int[Tensor, "sequence seq"]:
    """The first tokens of the validation split; every study measures on the same."""
    stream = TokenStream(target.data, target.tokenizer, "val", batch=32, seq=target.context)
    return take_tokens(stream, n_tokens).to(target.device)


def as_replacement(group: Sequence[Checkpoint], top_k: int | None = None) -> Replacement:
    """One CLT, or one coder per layer; `top_k` puts the top_k largest of a token in place of the trained rule."""
    records, coders = [checkpoint.record for checkpoint in group], [checkpoint.coder for checkpoint in group]
    seconds, paths = sum(record.train_seconds for record in records), " ".join(c.path for c in group)
    paths = paths.replace(f"{REPOSITORY}/", "")  # a table means the same on every machine
    origin = Origin(records[0].seed, records[0].train_tokens, seconds, paths)
    if isinstance(coders[0], CrossLayerTranscoder):
        assert len(coders) == 1, f"{len(coders)} cross-layer transcoders cannot stand in one replacement"
        return CLT(coders[0], top_k, origin=origin)
    kind = SAE if isinstance(coders[0], BaseAutoencoder) else Transcoder
    return kind(coders, top_k, origin=origin)  # type: ignore[arg-type]


def as_replacements(checkpoints: Sequence[Checkpoint], top_k: int | None = None) -> list[Replacement]:
    """One replacement per CLT, and one per set of per-layer coders of the same kind, rule, skip, size and seed."""
    groups: dict[object, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        config = checkpoint.coder.config
        own = config.layers if isinstance(config, CLTConfig) else getattr(config, "skip", getattr(config, "site", None))
        groups.setdefault((type(config), config.rule, own, config.d_dict, checkpoint.record.seed), []).append(
            checkpoint
        )
    return [as_replacement(group, top_k) for group in groups.values()]


def baselines(target: TargetModel, layers: Sequence[int], neurons: Sequence[int]) -> list[Replacement]:
    """Neurons at each k, the least-squares affine map, and identity, zero and mean ablation; the last three at any site."""
    data = DataConfig(tuple(layers), batch_tokens=8192, buffer_tokens=16_384, model_batch=32)
    store = ActivationsStore(target, data)
    batches = itertools.islice(store, max(1, BASELINE_TOKENS // data.batch_tokens))
    maps = fit_affine((batch.inputs, batch.targets) for batch in batches)
    ablations = [Identity(layers), Zero(layers), Mean(layers, maps.y_mean)]
    if target.site != "mlp_out":  # x is y there: nothing to map, and no neurons
        return ablations
    return [*(Neurons(target, layers, k) for k in neurons), Affine(layers, maps), *ablations]


def write_report(
    folder: Path, measured: Measurement, settings: Any, title: str, text: str, began: float, device: str
) -> None:
    """points.csv, layers.csv, pareto.png, settings.json and a README with figure and table; prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_points(folder / "points.csv", measured.points)
    write_layers(folder / "layers.csv", measured.layers)
    write_settings(folder, settings, device, time.perf_counter() - began)
    (folder / "README.md").write_text(f"# {title}\n\n{text}\n\n{FIGURE}\n")
    replot(folder)


def replot(folder: Path) -> None:
    """Draw pareto.png and write the README's table from points.csv alone; prints the table."""
    points, readme = read_points(folder / "points.csv"), folder / "README.md"
    draw(points, folder / "pareto.png")
    table = markdown_table(points)
    readme.write_text(f"{readme.read_text().partition(FIGURE)[0]}{FIGURE}\n\n{table}\n")
    print(table)


def settings_for[S](presets: dict[str, S], doc: str | None) -> S:
    """The command line's settings; the preset of the named `--target` (or the first one) gives the defaults."""
    import tyro

    errors_in_one_line()
    named = dict(zip(sys.argv, sys.argv[1:])).get("--target", next(iter(presets)))
    preset = presets.get(named, next(iter(presets.values())))
    return tyro.cli(type(preset), default=preset, description=doc)


def train_coders(
    configs: Sequence[SAEConfig | EncoderConfig | CLTConfig],
    target: TargetModel,
    tokens: int,
    batch: int,
    seed: int,
    folder: Path,
) -> list[Checkpoint]:
    """Train what is not yet in `folder`, all on one stream over all the layers, with the project's default recipe."""
    layers = tuple(sorted({layer for config in configs for layer in config.layers}))
    data = DataConfig(layers, batch, seed=seed)
    dead_after = min(10_000_000, tokens // 5)  # the field's number where the run is long enough for it
    train = TrainConfig(tokens, learning_rate(tokens, configs[0].d_dict), dead_after=dead_after, seed=seed)
    return train_group([new_coder(config, seed) for config in configs], target, data, train, folder)


class Decomposition(NamedTuple):
    model: ComponentModel
    record: TrainingRecord


class _OnDevice:
    """A token stream whose batches lie on the target's device."""

    def __init__(self, target: TargetModel, batch: int, seed: int) -> None:
        self.stream = TokenStream(target.data, target.tokenizer, "train", batch, target.context, seed)
        self.state_dict, self.load_state_dict, self.device = (
            self.stream.state_dict,
            self.stream.load_state_dict,
            target.device,
        )

    def __next__(self) -> Tensor:
        return next(self.stream).to(self.device)


def train_decomposition(
    target: TargetModel,
    layers: Sequence[int],
    components: int,
    gate_hidden: int,
    steps: int,
    batch: int,
    seed: int,
    folder: Path,
    lr: float = 1e-3,
    minimality: float = 5e-4,
) -> Decomposition:
    """SPD of the MLP matrices of `layers`, `components` of each, or what `folder` holds of an equal training.

    KL objective, of half the sequences of a step under stochastic masks of a random subset of the modules, of the other
    half under the masks that the ruler uses (1 where the importance is positive, else 0, without Δ) of all modules: a mask
    drawn evenly never comes near that corner, and components learn to rely on inactive ones being half there. p of
    importance minimality falls from 2 to 0.4, AdamW's rate by a cosine from `lr` to a tenth, `batch` sequences per step, a
    gate per matrix of `gate_hidden` hidden units that reads the module's own input at the same position, a least-squares
    start in place of faithfulness warm-up. Otherwise Goodfire's recipe for language models, scaled down.
    """
    assert batch >= 2, f"{batch=} sequences: each of the two terms needs one"
    patterns = tuple((path, components) for layer in layers for path in mlp_matrices(target, layer))
    config = SPDConfig(patterns, GateConfig("shared_mlp", (gate_hidden,)))
    train = SPDTrainConfig(
        steps, lr, (Recon(0.5, "stochastic", "subset"), Recon(0.5, "deployed", "all")), minimality, "kl", p=(2.0, 0.4),
        split=True, faithfulness=1e4, final=0.1, warmup=0.02, faithful_steps=0, clip=1.0, metrics_every=20,
        checkpoint_every=100, seed=seed,
    )  # fmt: skip
    name = f"{target.name}_spd_L{'-'.join(map(str, layers))}_C{components}_n{steps}x{batch}_s{seed}"
    recipe = f"{config.gate} {train}"
    if (folder / name / CONFIG).exists():
        found = Decomposition(*load_spd(str(folder / name), target))
        if found.record.recipe != recipe:
            raise ValueError(f"{folder / name} was trained otherwise ({found.record.recipe}): move it away")
        print(f"{name} is already trained in {folder}")
        return found
    model = ComponentModel(target.model, config, torch.Generator().manual_seed(seed)).to(target.device)
    stream = _OnDevice(target, batch, seed)
    seconds = train_spd(model, stream, train, folder / name, name, autocast=bf16_is_fast(target.device))
    tokens = steps * batch * target.context
    record = TrainingRecord(name, target.name, target.fingerprint, tokens, seconds, seed, git_commit(), recipe)
    save_checkpoint(folder / name, model, record)
    return Decomposition(model, record)


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


def spd_replacements(
    target: TargetModel, decomposition: Decomposition, layers: Sequence[int], deltas: Sequence[bool] = (False, True)
) -> list[Replacement]:
    """The decomposition at its own thresholds, importance above 0 and above 0.5, without and with the delta component."""
    model, record = decomposition
    origin = Origin(record.seed, record.train_tokens, record.train_seconds, record.name)
    return [SPD(target, model, t, delta=delta, layers=layers, origin=origin) for t in (0.0, 0.5) for delta in deltas]


def spd_sweep(
    target: TargetModel, layers: Sequence[int], top_k: Sequence[int], each_matrix: bool = False
) -> list[Replacement]:
    """Components ranked by pre-sigmoid importance, k of each matrix; `each_matrix` also replaces one matrix at a time."""
    model, record = find_spd(target, layers)
    origin = Origin(record.seed, record.train_tokens, record.train_seconds, record.name)
    names = [path.rpartition(".")[2] for path in mlp_matrices(target, layers[0])]
    groups = [None, *([name] for name in names)] if each_matrix else [None]
    largest = min(model.sizes.values())
    return [
        SPD(target, model, top_k=k, layers=layers, matrices=group, origin=origin)
        for group in groups for k in top_k if k <= largest
    ]  # fmt: skip
