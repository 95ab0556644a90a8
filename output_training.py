"""How coders train on the model's output: sets of them on one stream of text, interrupted and resumed, thresholds at the end.

A set is what replaces its layers together: a cross-layer transcoder, or per-layer coders that differ in their layer alone.
All sets share the clean pass of a batch and the layers that it replaces; each coder has its own optimiser, clipping, logger
and checkpoint. Training starts from checkpoints, of local training as a rule; a coder that was trained for nothing yet starts
from scratch, with scales and biases from the statistics of the text, and k annealed. Thresholds are set, on text that comes
after the last batch, where the trained protocol has coders read: on the clean stream, on the one that they produce together,
or on half of each.
"""

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from activation_store import ActivationsStore, DataConfig, check_layers, check_varies
from checkpoints import (
    Checkpoint,
    TrainingRecord,
    check_target,
    coder_name,
    forget_state,
    held,
    is_trained,
    load_checkpoint,
    save_checkpoint,
)
from coder_replacements import as_replacement, side_by_side
from config import Mixed, Output, TrainConfig, to_json
from logs import Logger, git_commit
from output_objective import CoderSet, Frame, Run, TrainingPass, as_read, backward, frame_of, planned, unembedding
from parallel import ALONE, DataRanks, check_dealt, decided, wait, world
from target_models import TargetModel
from training import (
    CoderRun,
    Progress,
    adam,
    annealed_k,
    descend,
    group_file,
    peak_rate,
    recipe,
    run_training,
    schedule,
)

LOGITS_AT_MOST = 2**29  # of the original model, held for a batch: 2 GiB in float32
STATISTICS_TOKENS = 16_384  # that give scales, means and variances


def train_on_output(
    starts: Sequence[Checkpoint], target: TargetModel, *, batch: int, config: TrainConfig, folder: Path
) -> list[Checkpoint]:
    """Train coders on the model's output, all sets on one stream, `batch` tokens a step; checkpoints land in folder / name.

    What is there already is left as it is, and an interrupted call goes on when made again, bit-identical (on CPU), as
    `training.train_group` does. The starts stay as they are. Raises ValueError for starts of another target or site, sets that do
    not replace the same layers, a target without an output, and a batch that holds no sequence or too many logits;
    RuntimeError when a loss is not finite.
    """
    check_starts(target, starts)
    head, sequences = unembedding(target), sequences_of(target, batch)
    ends = {start: record_after(start, target, batch=batch, config=config) for start in starts}
    names = [ends[start].name for start in starts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} was asked for more than once: name every start once")

    def untrained() -> list[list[Checkpoint]]:
        """The sets that lack a coder."""
        sets = side_by_side(starts)
        return [own for own in sets if not all(_is_done(start, ends[start], folder) for start in own)]

    with held([folder / ends[start].name for own in untrained() for start in own] if world().leads else []):
        left_over = decided(  # now that no other process can be at them
            lambda: [[ends[start].name for start in own] for own in untrained()]
        )
        todo = [own for own in side_by_side(starts) if [ends[start].name for start in own] in left_over]
        if (left := sum(map(len, todo))) < len(starts):
            print(f"{len(starts) - left} of {len(starts)} coders are already trained in {folder}")
        if todo:
            _train(OutputGroup(todo, ends, target, head, sequences=sequences, config=config, folder=folder))
        wait()
    return [load_checkpoint(str(folder / name), str(target.device)) for name in names]


# --------------------------------------------------------------------------------------------------- what is asked for


def check_starts(target: TargetModel, starts: Sequence[Checkpoint]) -> None:
    """Raises ValueError where coders are of another target or site, or sets of them do not replace the same layers."""
    layers = sorted({layer for start in starts for layer in start.coder.config.layers})
    check_layers(target, tuple(layers))
    for start in starts:
        check_target(start, target)
        if (site := start.coder.config.site) != target.site:
            raise ValueError(
                f"{start.record.name} is of {site}, the target is read at {target.site}: use at_site(target, {site!r})"
            )
    for own in side_by_side(starts):
        spanned = {layer for start in own for layer in start.coder.config.layers}
        if lacking := [layer for layer in layers if layer not in spanned]:
            raise ValueError(
                f"{own[0].record.name} has no companion in layer {', '.join(map(str, lacking))}, which others replace: give "
                f"every set a coder of each of the layers {', '.join(map(str, layers))}, or train it by itself"
            )


def sequences_of(target: TargetModel, batch: int) -> int:
    """Sequences in a batch of so many tokens; raises ValueError where it holds none, or too many logits."""
    if batch < target.context:
        raise ValueError(
            f"a batch of {batch} tokens holds no sequence of {target.context}: ask for {target.context} or more"
        )
    if batch * target.vocab_size > LOGITS_AT_MOST:
        raise ValueError(
            f"a batch of {batch:,} tokens has {batch * target.vocab_size * 4 / 2**30:.1f} GiB of logits over a vocabulary of "
            f"{target.vocab_size:,}: ask for {LOGITS_AT_MOST // target.vocab_size:,} tokens or fewer"
        )
    return batch // target.context


def record_after(start: Checkpoint, target: TargetModel, *, batch: int, config: TrainConfig) -> TrainingRecord:
    """What a coder's record will say, but for the seconds that this training adds."""
    assert isinstance(config.objective, Output), f"{config.objective=}"
    old = start.record
    seen = None if old.train_tokens is None else old.train_tokens + config.tokens
    how = f"{recipe(config, batch, lr=peak_rate(start.coder, config))}, seed {config.seed}"
    new = dataclasses.replace(
        old, target=target.name, target_fingerprint=target.fingerprint, train_tokens=seen, commit=git_commit(),
        recipe="; then ".join(filter(None, [old.recipe, how])), objectives=(*old.objectives, config.objective.name),
    )  # fmt: skip
    lr = peak_rate(start.coder, config)
    name = f"{coder_name(target.name, start.coder.config, old.seed)}_{new.variant}_n{config.tokens}_lr{lr:.3g}"
    return dataclasses.replace(new, name=name)


def _is_done(start: Checkpoint, end: TrainingRecord, folder: Path) -> bool:
    known = {"train_tokens": end.train_tokens, "fingerprint": end.target_fingerprint, "recipe": end.recipe}
    return is_trained(folder / end.name, start.coder.config, **known)


# -------------------------------------------------------------------------------------------------------- training


def start_set(
    own: Sequence[Checkpoint], names: Sequence[str], store: ActivationsStore, *, config: TrainConfig, folder: Path
) -> CoderSet:
    """Copies of the coders of a set, in train mode; of those that were trained for nothing yet, initialised."""
    own = [dataclasses.replace(start, coder=copy.deepcopy(start.coder).to(store.device)) for start in own]
    replacement, members = as_replacement(own), []
    order = {start.coder.config.layers: name for start, name in zip(own, names)}
    for coder in replacement.members:
        rows = [store.config.layers.index(layer) for layer in coder.config.layers]
        stats = coder.stats_of(store.stats, rows)
        check_varies(store.target, coder.config.layers, stats)
        coder.train()
        if is_fresh(own[0]):
            coder.initialise(stats)
        coder.join(DataRanks() if world().deals("data") else ALONE)
        lr = peak_rate(coder, config)
        optimiser = adam(coder, config, lr=lr)
        name = order[coder.config.layers]
        logger = Logger(name, folder / name, {"coder": to_json(coder.config), "train": to_json(config)})
        members.append(CoderRun(name, coder, rows, coder.variance(stats), optimiser, logger, lr))
    return CoderSet(replacement, members)


def is_fresh(start: Checkpoint) -> bool:
    """Whether it was trained for nothing yet."""
    return not start.record.objectives


def set_step(
    coders: CoderSet, frame: Frame, plan: Sequence[Run], *, config: TrainConfig, factor: float
) -> Float[Tensor, "4"]:
    """One step of the coders of a set that a plan calls on, each at its rate times `factor`.

    Returns (loss, KL, FVU, L0 per layer), still on the device.
    """
    began = time.perf_counter()
    members, codes, readings = backward(coders, frame, plan, config=config)
    for member in members:
        descend(member, config=config, lr=member.lr * factor)
        for encoder, layer in zip(member.coder.encoders, member.coder.config.layers):
            if layer in codes:
                encoder.update_statistics(codes[layer])
    for member in coders.members:
        member.seconds += (time.perf_counter() - began) / len(coders.members)
    return readings


class OutputGroup:
    """Sets of coders that train on one stream of text."""

    def __init__(
        self, sets: Sequence[Sequence[Checkpoint]], ends: Mapping[Checkpoint, TrainingRecord], target: TargetModel,
        head: nn.Module, *, sequences: int, config: TrainConfig, folder: Path,
    ) -> None:  # fmt: skip
        assert isinstance(config.objective, Output), f"{config.objective=}"
        self.target, self.head, self.config, self.folder, self.objective = (
            target,
            head,
            config,
            folder,
            config.objective,
        )
        self.layers = tuple(sorted({layer for start in sets[0] for layer in start.coder.config.layers}))
        stages = len(sets[0][0].record.objectives)
        self.part, parts = world().part
        if sequences % parts:
            raise ValueError(
                f"{sequences} sequences a batch cannot be dealt evenly to {parts} processes: choose --batch so"
            )
        self.stream = target.stream("train", sequences // parts, config.seed + stages, (self.part, parts))
        data = DataConfig(layers=self.layers, batch_tokens=parts, buffer_tokens=STATISTICS_TOKENS, seed=config.seed)
        store = ActivationsStore(target, data, shared=True)
        self.sets = [
            start_set(own, [ends[start].name for start in own], store, config=config, folder=folder) for own in sets
        ]
        self.fresh = [is_fresh(own[0]) for own in sets]
        self.ends = {end.name: end for start, end in ends.items()}
        self.names = [own.name for own in self.sets]
        self.settings = [to_json(config), sequences, self.names, store.fingerprint()]
        self.seen = sequences * (target.context - 1)  # tokens a step
        self.steps = -(-config.tokens // self.seen)
        self.generator = torch.Generator().manual_seed(config.seed)

    def start(self) -> None:
        """`start_set` initialised what had to be."""

    def frame(self) -> Frame | None:
        """The next batch under the original model; None where the text has ended."""
        tokens = next(self.stream, None)
        return None if tokens is None else frame_of(self.target, self.head, tokens.to(self.target.device), self.layers)

    def step(self, step: int) -> Float[Tensor, "set 4"]:
        frame, config = self.frame(), self.config
        if frame is None:
            seen = f"{step * self.seen:,} of {config.tokens:,} training tokens"
            raise ValueError(f"dataset {self.target.data.path!r} ended after {seen}: ask for fewer")
        plan, factor = planned(self.objective, self.layers, self.generator), schedule(step, self.steps, config)
        for own, fresh in zip(self.sets, self.fresh):
            for member in own.members:
                if fresh and member.coder.k is not None:
                    member.coder.set_k(annealed_k(member.coder.k, step, steps=self.steps, config=config))
        return torch.stack([set_step(own, frame, plan, config=config, factor=factor) for own in self.sets])

    def read(self, readings: list[list[float]], progress: Progress) -> str:
        speed = progress.pace * self.seen
        for own, (loss, kl, error, l0) in zip(self.sets, readings):
            for member in own.members:
                dead = member.count_dead(self.config.dead_after)
                metrics = {"loss": loss, "kl": kl, "fvu": error, "l0": l0, "dead": dead, "tokens_per_second": speed}
                member.logger.log(progress.step, metrics | {"unproven": member.coder.unproven})
        _, kl, error, l0 = (sum(column) / len(column) for column in zip(*readings))
        return f"{speed:,.0f} tokens/s, KL {kl:.3f}, FVU {error:.3f}, L0 {l0:.1f}"

    @property
    def members(self) -> list[CoderRun]:
        return [member for own in self.sets for member in own.members]

    def state_dict(self) -> dict[str, Any]:
        stream = {"stream": {self.part: self.stream.state_dict()}}
        if not world().leads:
            return stream if world().deals("data") else {}
        coders = {member.name: member.state_dict() for member in self.members}
        return stream | {"generator": self.generator.get_state(), "coders": coders}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_dealt(len(state["stream"]))
        self.stream.load_state_dict(state["stream"][self.part])
        self.generator.set_state(state["generator"])
        for member in self.members:
            member.load_state_dict(state["coders"][member.name], self.config.dead_after)


def _train(group: OutputGroup) -> None:
    config, members = group.config, group.members
    file = group_file(group.folder, [member.name for member in members])
    every = {"metrics_every": config.metrics_every, "checkpoint_every": config.checkpoint_every}
    spent = run_training(group, group.steps, file=file, **every)
    overhead = max(0.0, spent - sum(member.seconds for member in members)) / len(members)
    calibrate(group)
    for member in members:
        end = group.ends[member.name]
        record = dataclasses.replace(end, train_seconds=end.train_seconds + member.seconds + overhead)
        if world().leads:
            save_checkpoint(group.folder / member.name, member.coder, record)
        member.logger.close()
    forget_state(file)


# ----------------------------------------------------------------------------------------------------- calibration


def calibrate(group: OutputGroup) -> None:
    """Set what deployment needs on the text after the last batch, where the trained protocol has coders read."""
    frames = (group.frame() for _ in range(max(1, group.config.calibration_tokens // group.seen)))
    inputs = [what_is_read(group, frame, i) for i, frame in enumerate(frames) if frame is not None]
    if not inputs:
        raise ValueError(f"dataset {group.target.data.path!r} leaves no tokens to calibrate on: ask for fewer")
    for i, own in enumerate(group.sets):
        for member in own.members:
            member.coder.calibrate([as_read(member, batch[i]) for batch in inputs])


@torch.no_grad()
def what_is_read(group: OutputGroup, frame: Frame, i: int) -> list[dict[int, Float[Tensor, "token d_in"]]]:
    """What the encoders of each set read of the i-th batch, by layer; of a mixed objective, every other one is clean."""
    protocol, read = group.objective.protocol, []
    follows = i % 2 == 1 if isinstance(protocol, Mixed) else protocol == "free"
    for own in group.sets:
        pass_ = TrainingPass(own.replacement, frame.captured(own.replacement), group.layers if follows else ())
        if follows:
            frame.last_stream(pass_, group.layers)
        for layer in group.layers:
            pass_.encode(layer)
        read.append(pass_.inputs)
    return read
