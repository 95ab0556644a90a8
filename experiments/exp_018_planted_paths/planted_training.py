"""Training on the planted circuit: the project's coders with the project's step, and SPD of all seeds side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from path_methods import CoderMethod, Method, SPDMethod
from planted_circuit import D_MODEL, LAYERS, OUTPUT, PlantedBatches, PlantedStack, activity

from activation_store import ActivationBatch, measure
from clt import CrossLayerTranscoder
from coder import ActivationStats, Coder
from coder_replacements import CLTReplacement, TranscoderReplacement
from config import (
    BatchTopK,
    CLTConfig,
    EncoderConfig,
    GateConfig,
    JumpReLU,
    Lp,
    Recon,
    SPDConfig,
    SPDTrainConfig,
    TrainConfig,
)
from spd_model import ComponentModel
from spd_training import SPDTrainer
from training import CoderRun, adam, annealed_k, schedule, training_step
from transcoder import build_transcoder

STATISTICS = 16_384  # inputs that scales, means and variances are taken from
ALL = tuple(range(LAYERS))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every coder gets."""

    d_dict: int = 48  # latents per layer
    steps: int
    batch: int = 256
    lr: float = 4e-3


class OwnLayerCLT(CrossLayerTranscoder):
    """A CLT whose decoders to later layers are held at zero: transcoders, by another road."""

    @torch.no_grad()
    def constrain_weights(self) -> None:
        for W_dec in self.W_dec:
            W_dec[:, self.config.d_out :] = 0


def transcoders(rule: BatchTopK | JumpReLU, b: Budget, seed: int, skip: bool) -> list[Coder]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"d_in": D_MODEL, "d_out": D_MODEL, "d_dict": b.d_dict, "rule": rule, "skip": skip}
    return [build_transcoder(EncoderConfig(layer=layer, **sizes), generator) for layer in ALL]


def clt(rule: BatchTopK | JumpReLU, b: Budget, seed: int, kind: type[CrossLayerTranscoder]) -> list[Coder]:
    config = CLTConfig(layers=ALL, d_in=D_MODEL, d_out=D_MODEL, d_dict=b.d_dict, rule=rule)
    return [kind(config, torch.Generator().manual_seed(seed))]


def frozen_encoders(coders: list[Coder]) -> list[Coder]:
    """Coders whose encoder directions stay what they were drawn as; biases, thresholds and decoders are trained."""
    for coder in coders:
        for encoder in coder.encoders:
            encoder.W_enc.requires_grad_(False)
    return coders


CODERS: dict[str, Callable[[BatchTopK | JumpReLU, Budget, int], list[Coder]]] = {
    "transcoder": lambda rule, b, seed: transcoders(rule, b, seed, skip=False),
    "transcoder-skip": lambda rule, b, seed: transcoders(rule, b, seed, skip=True),
    "clt": lambda rule, b, seed: clt(rule, b, seed, CrossLayerTranscoder),
    "clt-own_layer": lambda rule, b, seed: clt(rule, b, seed, OwnLayerCLT),
    "transcoder-frozen_encoder": lambda rule, b, seed: frozen_encoders(transcoders(rule, b, seed, skip=False)),
    "clt-frozen_encoder": lambda rule, b, seed: frozen_encoders(clt(rule, b, seed, CrossLayerTranscoder)),
}


def train_coders(kind: str, rule: BatchTopK | JumpReLU, target: PlantedStack, b: Budget, seed: int) -> Method:
    """The project's training step on fresh inputs, for the stack of one seed."""
    coders = CODERS[kind](rule, b, seed)
    large = activity(target, next(PlantedBatches(target, STATISTICS, seed + 1000)))
    stats = measure(torch.stack(large), torch.arange(STATISTICS), torch.ones(2, LAYERS))
    config = TrainConfig(tokens=b.steps * b.batch, lr=b.lr, dead_after=b.steps * b.batch // 10, seed=seed)
    runs = [start(coder, stats, config) for coder in coders]
    batches = PlantedBatches(target, b.batch, seed + 2000)
    for step in range(b.steps):
        batch = ActivationBatch(*activity(target, next(batches)))
        for run in runs:
            if run.coder.k is not None:
                run.coder.set_k(annealed_k(run.coder.k, step, steps=b.steps, config=config))
            training_step(run, batch, config=config, lr=run.lr * schedule(step, b.steps, config))
            if step % config.metrics_every == 0:
                run.count_dead(config.dead_after)
    held_out = [activity(target, next(batches)) for _ in range(16)]
    for run in runs:
        run.coder.calibrate([run.coder.view(*batch, run.rows)[0] for batch in held_out])
    replacement = TranscoderReplacement(coders) if len(coders) == LAYERS else CLTReplacement(coders[0])
    return CoderMethod(replacement, target.basis[0, OUTPUT])


def start(coder: Coder, stats: ActivationStats, config: TrainConfig) -> CoderRun:
    rows = list(coder.config.layers)
    own = coder.stats_of(stats, rows)
    coder.train().initialise(own)
    assert config.lr is not None
    return CoderRun("", coder, rows, coder.variance(own), adam(coder, config, lr=config.lr), None, config.lr)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SPDBudget:
    components: int = 20  # of every matrix
    hidden: int = 64  # units of every matrix' gate
    steps: int
    batch: int = 256
    lr: float = 2e-3


def train_spd(minimality: float, seeds: Sequence[int], b: SPDBudget) -> list[Method]:
    """The terms of `recipes.train_decomposition`, with squared error of the last stream; a method for every seed."""
    target = PlantedStack(seeds).requires_grad_(False)
    gate = GateConfig(kind="shared_mlp", hidden=(b.hidden,))
    config = SPDConfig(components=(("layers.*.mlp_*", b.components),), gate=gate)
    model = ComponentModel(target, config, torch.Generator().manual_seed(seeds[0]))
    random_masks = Recon(coefficient=0.5, source="stochastic", routing="subset")
    the_scores = Recon(coefficient=0.5, source="deployed", routing="all")
    train = SPDTrainConfig(
        steps=b.steps, lr=b.lr, recon=(random_masks, the_scores), minimality=Lp(coefficient=minimality, p=(2.0, 0.4)),
        faithfulness=1.0, final=0.1, warmup=0.02, start="least_squares", clip=1.0, seed=seeds[0],
    )  # fmt: skip
    trainer, batches = SPDTrainer(model, train, autocast=False), PlantedBatches(target, b.batch, seeds[0] + 3000)
    trainer.warm_up()
    for _ in range(b.steps):
        trainer.step(next(batches))
    return [SPDMethod(model, i, target.basis[i, OUTPUT]) for i in range(len(seeds))]
