"""The training loop of every method, which can be interrupted and goes on exactly where it was, and how coders train in it.

Any number of SAEs, transcoders and cross-layer transcoders train on one stream of activations.

    loss = mean over targets of FVU + penalty of the rule + aux · AuxK
    step = project the gradient (SAE) → clip → Adam → renormalise (SAE)

One forward of the target feeds all coders; each has its own optimiser, schedule, metrics and checkpoint. On a CPU they
step side by side; on CUDA each replays its step as a recorded graph (`step_graphs.py`). What differs between kinds of
coders is asked of the coder. Nothing in a step synchronises the device: metrics are read, dead latents counted and NaN
looked for every `metrics_every` steps.
k falls from 4k to k over the first `anneal` of the steps (linear). The learning rate rises over `warmup`, stays, and
falls linearly to zero over the last `decay`. The deployed threshold is set on tokens of the stream that come after the
last training batch, so that neither training nor evaluation has seen them.
"""

import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from activation_store import AT_HOME, ActivationBatch, ActivationsStore, DataConfig, Harvest, check_varies
from checkpoints import (
    Checkpoint,
    TrainingRecord,
    delete_parts,
    forget_state,
    held,
    is_trained,
    load_checkpoint,
    load_tensors,
    run_name,
    save_checkpoint,
    save_parts,
    save_tensors,
    whole_coder,
    with_parts,
)
from coder import ActivationStats, Coder, codes_by_layer
from config import LOCAL, CoderConfig, TrainConfig, full_kind, to_json
from devices import in_threads, keep_freed_memory
from logs import Logger, git_commit
from losses import auxk, fvu
from parallel import ALONE, averaged, check_dealt, dealt, decided, own_state, ranks_of, spread, wait, world
from step_graphs import RecordedStep, records_graphs
from target_models import TargetModel

RECORDED_UP_TO = 1 << 28  # pre-activations of an encoder in a batch: a recording holds the memory of its own step
ANNEAL_FROM = 4  # times k; the field starts at 10k, whose first steps cost more than all the others together


SHORT, LONG = 2e6, 1e8  # tokens of a run
RATE_FACTOR = {"sae": 43.0, "transcoder": 15.0, "transcoder-skip": 12.0, "clt": 10.0}  # of a short run


def default_learning_rate(tokens: int, coder: CoderConfig) -> float:
    """Default peak learning rate of Adam: 2e-4 / √(d_dict / 2¹⁴) · c^t, c a factor of the kind of coder.

        t = log(10⁸ / tokens) / log(10⁸ / 2·10⁶), at least 0 and at most 1

    The first factor is the field's rule for runs of 10⁸ tokens and more (sparsify, dictionary_learning); for short runs it is
    ten and more times too low. Swept by ΔCE on the tuning text (`tiny`, k 16, 1,536 latents; benchmarks/learning_rate.py):
    up to 10⁶ tokens the best rate of a kind stays where it is, at 3·10⁶ it begins to fall; an SAE's is four times a CLT's.
    """
    if min(tokens, coder.d_dict) < 1:
        raise ValueError(f"{tokens} training tokens, {coder.d_dict} latents: ask for 1 or more (--tokens, --d-dict)")
    factor = RATE_FACTOR.get(full_kind(coder), RATE_FACTOR[coder.kind])
    t = min(1.0, max(0.0, math.log(LONG / tokens) / math.log(LONG / SHORT)))
    return 2e-4 / math.sqrt(coder.d_dict / 2**14) * factor**t


def default_tuning_rate(tokens: int) -> float:
    """Default peak learning rate of Adam where the objective is the model's output: 4e-4."""
    if tokens < 1:
        raise ValueError(f"{tokens} training tokens: ask for 1 or more (--tokens)")
    return 4e-4


def peak_rate(coder: Coder, config: TrainConfig) -> float:
    """The rate a configuration gives, or the default of its objective, the coder's kind and the run's length."""
    if config.lr is not None:
        return config.lr
    return (
        default_learning_rate(config.tokens, coder.config)
        if config.objective == LOCAL
        else default_tuning_rate(config.tokens)
    )


def dead_after(tokens: int) -> int:
    """Tokens of silence after which a latent of a run counts as dead: the field's 10⁷, a tenth of a shorter run.

    In a tenth of 3·10⁵ tokens a latent of mean rate (k 16 of 1,536) fires 300 times. Of BatchTopK transcoders of `tiny` after
    as many tokens, 6 and 11 % never fire on held-out text where dead means silent for a fifth and for half of the run, 1 %
    at a twentieth; their FVU is the same within .0015 (benchmarks/auxk.py and its results).
    """
    return min(10_000_000, tokens // 10)


def schedule(step: int, steps: int, config: TrainConfig) -> float:
    """Factor of the learning rate at a step: warm-up, plateau, linear decay to zero."""
    rise = (step + 1) / max(1.0, config.warmup * steps)
    fall = (steps - step) / max(1.0, config.decay * steps)
    return min(1.0, rise, fall)


def annealed_k(k: int, step: int, *, steps: int, config: TrainConfig) -> int:
    """ANNEAL_FROM · k at the first step, k from `anneal` of the steps on, linear between."""
    progress = min(1.0, step / max(1.0, config.anneal * steps))
    return round(k * (ANNEAL_FROM - (ANNEAL_FROM - 1) * progress))


def recipe(config: TrainConfig, batch_tokens: int, *, lr: float, harvest: Harvest = AT_HOME) -> str:
    """Training settings that change the result, as text; two coders with equal recipes are interchangeable."""
    c = config
    objective = "" if c.objective == LOCAL else f"{c.objective}, "
    rounded = "int8 activations, " if harvest.cache == "int8" else ""
    return (
        f"{objective}{rounded}lr {lr:.6g}, warmup {c.warmup:g}, decay {c.decay:g}, anneal {ANNEAL_FROM}k over {c.anneal:g}, "
        f"clip {c.max_grad_norm:g}, aux {c.aux:g} after {c.dead_after}, betas {c.betas}, batch {batch_tokens}"
    )


@dataclass
class CoderRun:
    """A coder with all that its training owns."""

    name: str
    coder: Coder
    rows: list[int]  # its layers' positions in the store's batches
    variance: Float[Tensor, "*layer"]  # E‖y − ȳ‖² of its targets
    optimiser: torch.optim.Adam
    logger: Logger
    lr: float  # peak learning rate
    seconds: float = 0.0  # wall-clock seconds attributed to this coder
    recorded: RecordedStep = field(default_factory=RecordedStep)  # its step, where steps are recorded

    def count_dead(self, dead_after: int) -> float:
        """The share of latents that were silent for `dead_after` tokens, which AuxK works on from now on."""
        self.coder.count_dead(dead_after)
        return self.coder.n_dead / (self.coder.config.d_dict * len(self.coder.encoders))

    def state_dict(self) -> dict[str, Any]:
        return {"coder": self.coder.state_dict(), "optimiser": self.optimiser.state_dict(), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any], dead_after: int) -> None:
        self.coder.load_state_dict(state["coder"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.seconds = state["seconds"]
        self.count_dead(dead_after)


def training_step(
    run: CoderRun, batch: ActivationBatch, *, config: TrainConfig, lr: float | Float[Tensor, ""]
) -> Float[Tensor, "3"]:
    """One step of one coder; returns (loss, FVU, L0 per layer), still on the device.

    Memory on a CPU beyond parameters and Adam's moments, of a TopK or BatchTopK transcoder without silent latents: gradients,
    as large as the parameters, and B · (4 (d_in + d_out) + c k + 16) + 20 d_dict bytes, and blocks of `sparse_encode.BLOCK`
    pre-activations; c is 60, and 140 where bf16 selects. Nothing is as large as B · d_dict, which Relu, JumpReLU and Gated hold.
    """
    coder = run.coder
    x, y = coder.view(*batch, run.rows)
    codes, penalty = coder.encode_with_penalty(x, y, run.variance)
    y_hat = coder.reconstruct(codes, x)
    error = fvu(y, y_hat, run.variance).mean()
    loss = error + penalty
    if coder.n_dead:
        e_hat = coder.aux_reconstruction(x, config.dead_after)
        loss = loss + config.aux * auxk(y, y_hat, e_hat=e_hat, variance=run.variance).mean()
    loss.backward()
    descend(run, config=config, lr=lr)
    coder.update_statistics(codes)
    layers = codes_by_layer(codes)
    l0 = coder.ranks.sum(sum((own.values > 0).sum() / own.n_rows for own in layers) / len(layers))
    return torch.stack([loss.detach(), error.detach(), l0])


def descend(run: CoderRun, *, config: TrainConfig, lr: float | Float[Tensor, ""]) -> None:
    """The step that a coder's gradient asks for, which is used up."""
    coder, optimiser = run.coder, run.optimiser
    coder.ranks.average(coder.parameters())
    coder.constrain_gradients()
    coder.clip_gradients(config.max_grad_norm)
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    coder.constrain_weights()


def _side_by_side[B](function: Callable[[CoderRun], B], runs: Sequence[CoderRun], device: torch.device) -> list[B]:
    """[function(run) for run in runs]; on a CPU at once, beginning with those that took longest so far."""
    together = any(run.coder.ranks is not ALONE for run in runs)
    if device.type != "cpu" or together:  # one queue, or one order for all processes
        return [function(run) for run in runs]
    order = sorted(range(len(runs)), key=lambda i: -runs[i].seconds)
    results = dict(zip(order, in_threads(function, [runs[i] for i in order])))
    return [results[i] for i in range(len(runs))]


def recorded_step(run: CoderRun, batch: ActivationBatch, *, config: TrainConfig, lr: float) -> Float[Tensor, "3"]:
    """`training_step`, recorded where launching kernels takes longer than running them."""
    device, n_tokens = batch.inputs.device, batch.inputs.shape[1]
    largest = n_tokens * max(encoder.d_dict for encoder in run.coder.encoders)
    if not records_graphs(device) or largest > RECORDED_UP_TO or run.coder.ranks is not ALONE:
        return training_step(run, batch, config=config, lr=lr)

    def step(x: Tensor, y: Tensor, lr: Tensor) -> Tensor:
        return training_step(run, ActivationBatch(x, y), config=config, lr=lr)

    return run.recorded(step, run.coder.step_shape, *batch, torch.full((), lr, device=device))


def group_step(
    runs: Sequence[CoderRun], batch: ActivationBatch, *, config: TrainConfig, factor: float
) -> Float[Tensor, "run 3"]:
    """`training_step` of every run at `factor` times its peak rate, on a CPU side by side; their seconds share the clock's."""

    def timed(run: CoderRun) -> tuple[Tensor, float]:
        begin = time.perf_counter()
        return recorded_step(run, batch, config=config, lr=run.lr * factor), time.perf_counter() - begin

    began = time.perf_counter()
    readings, spent = zip(*_side_by_side(timed, runs, batch.inputs.device))
    shared = (time.perf_counter() - began) / sum(spent)
    for run, seconds in zip(runs, spent):
        run.seconds += seconds * shared
    return torch.stack(readings)


def train_group(
    coders: Sequence[Coder], target: TargetModel, *, data: DataConfig, config: TrainConfig, folder: Path,
    harvest: Harvest = AT_HOME,
) -> list[Checkpoint]:  # fmt: skip
    """Train all coders on one pass over one stream; checkpoints land in folder / name, what is returned on the target's device.

    Coders already trained there with the same settings are left as they are. An interrupted call goes on from its last
    state when made again, and ends bit-identical (on CPU) to one that was never interrupted.
    Raises ValueError for settings that do not fit the state found, or where another process trains one of the coders in
    the same folder; RuntimeError when a loss is not finite.
    """
    names = [
        run_name(target.name, coder.config, seed=config.seed, tokens=config.tokens, lr=peak_rate(coder, config))
        for coder in coders
    ]
    fingerprint = target.fingerprint
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} was asked for more than once: name every layer and k once")

    def untrained() -> list[tuple[str, Coder]]:
        return [
            (name, coder) for name, coder in zip(names, coders)
            if not is_trained(
                folder / name, coder.config, train_tokens=config.tokens, fingerprint=fingerprint,
                recipe=recipe(config, data.batch_tokens, lr=peak_rate(coder, config), harvest=harvest),
            )
        ]  # fmt: skip

    with held([folder / name for name, _ in untrained()] if world().leads else []):
        left = decided(lambda: [name for name, _ in untrained()])  # now that no other process can be at them
        todo = [(name, coder) for name, coder in zip(names, coders) if name in left]
        if len(todo) < len(coders):
            print(f"{len(coders) - len(todo)} of {len(coders)} coders are already trained in {folder}")
        if todo:
            _train(todo, target, data=data, config=config, folder=folder, harvest=harvest)
        wait()
    return [load_checkpoint(str(folder / name), str(target.device)) for name in names]


def train_encoder(
    coder: Coder,
    target: TargetModel,
    *,
    data: DataConfig,
    config: TrainConfig,
    folder: Path,
    harvest: Harvest = AT_HOME,
) -> Checkpoint:
    """A group of one."""
    return train_group([coder], target, data=data, config=config, folder=folder, harvest=harvest)[0]


class Progress(NamedTuple):
    """How far a training has come when its metrics are read."""

    step: int  # the step just made, counted from 0
    seconds: float  # of training, interruptions left out
    pace: float  # steps per second since this call began


class Trainee(Protocol):
    """What `run_training` trains: one model, or several side by side, with all that decides their steps to come."""

    names: list[str]  # of the models, as an error names them
    settings: object  # a saved state belongs to a training whose settings are written alike

    def start(self) -> None:
        """What precedes the first step; a training that goes on from a saved state has it behind it."""

    def step(self, step: int) -> Float[Tensor, "model reading"]:
        """One optimiser step of each model; returns its readings, the loss first, still on the device."""

    def read(self, readings: list[list[float]], progress: Progress) -> str:
        """Log the readings; returns what the progress bar shows of them."""

    def state_dict(self) -> dict[str, Any]:
        """What this process adds to the state; nothing where another one adds the same."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From what all processes added, `united`."""


def run_training(trainee: Trainee, steps: int, *, file: Path, metrics_every: int, checkpoint_every: int) -> float:
    """Make the steps up to `steps`; returns the seconds they took, interruptions left out.

    Metrics are read every `metrics_every` steps; every `checkpoint_every` steps the state is saved in `file`, from which an
    interrupted call goes on when made again. The caller deletes the file once the outcome is on disk. Raises ValueError where
    the file is of a training with other settings, RuntimeError when a loss is not finite.
    """
    keep_freed_memory()
    start, earlier = 0, 0.0
    if file.exists():
        state = load_tensors(file, "cpu")
        if state.get("settings") != repr(trainee.settings):
            raise ValueError(f"{file} is the state of a run with other settings: delete it or choose another folder")
        trainee.load_state_dict(with_parts(file, state))
        start, earlier = state["step"], state["seconds"]
    else:
        trainee.start()
    title = trainee.names[0] if len(trainee.names) == 1 else f"{len(trainee.names)} models"
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=title, unit="step", mininterval=1.0,
               disable=not world().leads)  # fmt: skip
    began, last_good = time.perf_counter(), start
    for step in bar:
        readings = trainee.step(step)
        reads, saves = (step + 1) % metrics_every == 0, (step + 1) % checkpoint_every == 0
        if reads or saves or step + 1 == steps:
            rows, seconds = averaged(readings).tolist(), time.perf_counter() - began
            for name, (loss, *_) in zip(trainee.names, rows, strict=True):
                if not math.isfinite(loss):
                    good = f"the last good state is step {last_good}"
                    raise RuntimeError(f"loss of {name} is {loss} at step {step}: lower the learning rate; {good}")
            progress = Progress(step, earlier + seconds, (step + 1 - start) / seconds)
            bar.set_postfix_str(trainee.read(rows, progress))
        if saves:
            seconds, last_good = earlier + time.perf_counter() - began, step + 1
            state = {"settings": repr(trainee.settings), "step": last_good, "seconds": seconds}
            own = trainee.state_dict()
            others = save_parts(file, last_good, own)
            if world().leads:
                save_tensors(file, state | {"others": others, "trainee": own})
                delete_parts(file, but=last_good)
    return earlier + time.perf_counter() - began


def group_file(folder: Path, names: Sequence[str]) -> Path:
    """Where the state of coders that train together is kept until all of them are done."""
    return folder / f"group_{hashlib.sha256(' '.join(names).encode()).hexdigest()[:12]}.pt"


def _train(
    todo: list[tuple[str, Coder]], target: TargetModel, *, data: DataConfig, config: TrainConfig, folder: Path,
    harvest: Harvest,
) -> None:  # fmt: skip
    if config.tokens < data.batch_tokens:
        raise ValueError(f"{config.tokens} training tokens are less than a batch of {data.batch_tokens}: ask for more")
    store, names = ActivationsStore(target, data, shared=True, harvest=harvest), [name for name, _ in todo]
    own = dealt(todo, lambda item: _work(item[1])) if world().deals("coders") else todo
    runs = [start_run(name, coder, store=store, config=config, folder=folder) for name, coder in own]
    group = _Group(names, runs, store, config)
    state_file = group_file(folder, names)
    every = {"metrics_every": config.metrics_every, "checkpoint_every": config.checkpoint_every}
    spent = run_training(group, group.steps, file=state_file, **every)
    overhead = (spent - sum(run.seconds for run in runs)) / max(1, len(runs))
    held_out = list(itertools.islice(store, max(1, config.calibration_tokens // data.batch_tokens)))
    if not held_out:
        raise ValueError(f"dataset {target.data.path!r} leaves no tokens to calibrate on: ask for fewer")

    def calibrate(run: CoderRun) -> None:
        run.coder.calibrate([run.coder.view(*batch, run.rows)[0] for batch in held_out])

    _side_by_side(calibrate, runs, store.device)
    for run in runs:
        record = TrainingRecord(
            name=run.name, target=target.name, target_fingerprint=target.fingerprint, train_tokens=config.tokens,
            train_seconds=run.seconds + max(overhead, 0.0), seed=config.seed, commit=git_commit(),
            recipe=recipe(config, data.batch_tokens, lr=run.lr, harvest=harvest),
        )  # fmt: skip
        whole = whole_coder(run.coder)
        if run.logger.writes:
            save_checkpoint(folder / run.name, whole, record)
        run.logger.close()
    forget_state(state_file)


def _work(coder: Coder) -> float:
    """About what a step costs, where coders are dealt out: what is multiplied for every token."""
    return float(coder.gate_parameters)


def adam(coder: Coder, config: TrainConfig, *, lr: float) -> torch.optim.Adam:
    """The optimiser of a coder that lies where it will be trained."""
    parameters = list(coder.parameters())
    capturable = records_graphs(parameters[0].device)
    return torch.optim.Adam(parameters, lr=lr, betas=config.betas, fused=True, capturable=capturable)


def start_run(name: str, coder: Coder, *, store: ActivationsStore, config: TrainConfig, folder: Path) -> CoderRun:
    site = coder.config.site
    if site != store.target.site:
        raise ValueError(
            f"{name} is of {site}, the target is read at {store.target.site}: use at_site(target, {site!r})"
        )
    rows = [store.config.layers.index(layer) for layer in coder.config.layers]
    stats = coder.stats_of(store.stats, rows)
    check_varies(store.target, coder.config.layers, stats)
    if world().deals("latents"):  # whole on the host alone
        coder.initialise(ActivationStats(*(value.cpu() for value in stats[:-1]), stats.n_tokens))
        spread(coder)
        coder.to(store.device).train()
    else:
        coder.to(store.device).train()
        coder.initialise(stats)
    coder.join(ranks_of(coder.config.d_dict))
    lr = peak_rate(coder, config)
    optimiser = adam(coder, config, lr=lr)
    writes = world().leads or world().deals("coders")
    logger = Logger(name, folder / name, {"coder": to_json(coder.config), "train": to_json(config)}, writes=writes)
    return CoderRun(name, coder, rows, coder.variance(stats), optimiser, logger, lr)


class _Group:
    """Coders that train side by side on one stream of activations."""

    def __init__(self, names: list[str], runs: list[CoderRun], store: ActivationsStore, config: TrainConfig) -> None:
        self.runs, self.store, self.config = runs, store, config
        self.steps = -(-config.tokens // store.config.batch_tokens)  # at least the tokens asked for
        self.names = [run.name for run in runs]
        self.settings = [to_json(config), dataclasses.asdict(store.config), names, store.fingerprint()]

    def start(self) -> None:
        """`start_run` initialised each coder."""

    def step(self, step: int) -> Float[Tensor, "run 3"]:
        batch, config = next(self.store, None), self.config
        if batch is None:
            seen = f"{step * self.store.config.batch_tokens:,} of {config.tokens:,} training tokens"
            raise ValueError(f"dataset {self.store.target.data.path!r} ended after {seen}: ask for fewer")
        for run in self.runs:
            if run.coder.k is not None:
                run.coder.set_k(annealed_k(run.coder.k, step, steps=self.steps, config=config))
        if not self.runs:  # more processes than coders
            return torch.zeros(0, 3)
        return group_step(self.runs, batch, config=config, factor=schedule(step, self.steps, config))

    def read(self, readings: list[list[float]], progress: Progress) -> str:
        speed = progress.pace * self.store.config.batch_tokens
        for run, (loss, error, l0) in zip(self.runs, readings):
            dead = run.count_dead(self.config.dead_after)
            metrics = {"loss": loss, "fvu": error, "l0": l0, "dead": dead, "unproven": run.coder.unproven}
            run.logger.log(progress.step, metrics | {"tokens_per_second": speed})
        if not readings:
            return ""
        loss, error, l0 = (sum(column) / len(column) for column in zip(*readings))
        return f"{speed:,.0f} tokens/s, loss {loss:.3f}, FVU {error:.3f}, L0 {l0:.1f}, dead {dead:.1%}"

    def state_dict(self) -> dict[str, Any]:
        part, own = world().rank, {}
        if world().leads or world().deals("data"):
            own["store"] = {part: self.store.state_dict()}
        if world().leads or not world().deals("data"):
            own["coders"] = {run.name: {part: run.state_dict()} for run in self.runs}
        return own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_dealt(len(state["store"]))
        self.store.load_state_dict(state["store"][world().part[0]])
        for run in self.runs:
            shards = [shard for _, shard in sorted(state["coders"][run.name].items())]
            names = [name for name, _ in run.coder.named_parameters()]
            run.load_state_dict(own_state(shards, names), self.config.dead_after)
