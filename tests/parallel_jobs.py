"""What processes do together for `test_parallel.py`: started by torchrun, each leaves what it found as `rank*.pt`.

torchrun --nproc-per-node N tests/parallel_jobs.py JOB CORPUS FOLDER
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small import make_small_target

import activation_store
import checkpoints
import parallel
import training
from activation_store import ActivationsStore, DataConfig, Harvest
from clt import CrossLayerTranscoder
from coder import Coder, codes_by_layer
from config import (
    BatchTopK,
    CLTConfig,
    EncoderConfig,
    GateConfig,
    Gated,
    JumpReLU,
    Lp,
    Output,
    Recon,
    Relu,
    Rule,
    SAEConfig,
    SPDConfig,
    SPDTrainConfig,
    TopK,
    TrainConfig,
)  # fmt: skip
from logs import errors_in_one_line
from output_training import train_on_output
from parallel import Form, LatentRanks, World, joined, world
from recipes import _OnDevice, untrained
from sae import build_sae
from sparse_encode import _largest
from sparse_ops import to_dense
from spd_model import ComponentModel
from spd_training import SPDTrainer
from target_models import TargetModel
from training import AT_HOME, start_run, train_group, training_step
from transcoder import build_transcoder

DATA = DataConfig(layers=(0, 1), batch_tokens=32, buffer_tokens=256, model_batch=4)
TRAIN = TrainConfig(tokens=32 * 24, lr=3e-3, metrics_every=4, checkpoint_every=8, calibration_tokens=128, dead_after=96)
STEPS = 3  # in step
RULES: tuple[Rule, ...] = (TopK(4), BatchTopK(4), JumpReLU(l0=0.01), Relu(l1=0.01), Gated(l1=0.01))
KINDS = ("transcoder", "skip", "sae", "clt")


def built(kind: str, rule: Rule, seed: int = 0) -> Coder:
    g = torch.Generator().manual_seed(seed)
    if kind == "sae":
        return build_sae(SAEConfig(layer=1, site="mlp_out", d_in=16, d_dict=50, rule=rule), g)
    if kind == "clt":
        return CrossLayerTranscoder(CLTConfig(layers=(0, 1), d_in=16, d_out=16, d_dict=50, rule=rule), g)
    skip = kind == "skip"
    return build_transcoder(EncoderConfig(layer=1, d_in=16, d_out=16, d_dict=50, rule=rule, skip=skip), g)


def group() -> list[Coder]:
    """One of each kind, over the rules."""
    return [built(kind, rule) for kind, rule in zip((*KINDS, "sae"), RULES, strict=True)]


def steps(
    coder: Coder, store: ActivationsStore, batches: list[Any], folder: Path, silent: int = 0
) -> tuple[training.CoderRun, dict[str, Any]]:
    """A coder after a step on each batch, what was read, the first batch's codes and the gradients that its step took.

    The first `silent` latents pass for dead.
    """
    run = start_run("run", coder, store=store, config=TRAIN, folder=folder)
    for encoder in coder.encoders:
        since = torch.zeros(coder.config.d_dict, dtype=torch.int64)
        since[:silent] = TRAIN.dead_after
        encoder.tokens_since_fired.copy_(parallel.own_rows(since) if world().deals("latents") else since)
    codes = coder.encode(coder.view(*batches[0], run.rows)[0])
    found: dict[str, Any] = {"codes": [to_dense(own).detach() for own in codes_by_layer(codes)], "readings": []}

    def keep(*_: Any) -> None:
        given = {name: p.grad.clone() for name, p in coder.named_parameters() if p.grad is not None}
        found.setdefault("gradients", given)

    run.optimiser.register_step_pre_hook(keep)
    for batch in batches:
        coder.count_dead(TRAIN.dead_after)
        found["readings"].append(training_step(run, batch, config=TRAIN, lr=3e-3))
    return run, found


def all_steps(target: TargetModel, folder: Path) -> dict[str, Any]:
    """Every kind under every rule for a few steps, under `latents` with dead latents among them."""
    store, found = ActivationsStore(target, DATA, shared=True), {}
    batches = [next(store) for _ in range(STEPS)]
    for kind in KINDS:
        for rule in RULES:
            silent = 9 if world().form == "latents" else 0
            run, own = steps(built(kind, rule), store, batches, folder / "steps", silent)
            state = run.coder.state_dict()
            if world().form == "latents":
                state = parallel.whole_tensors(state, 50)
                own["gradients"] = parallel.whole_tensors(own["gradients"], 50)
            readings = [parallel.averaged(reading) for reading in own["readings"]]
            found[f"{kind} {type(rule).__name__}"] = own | {"coder": state, "readings": readings}
    stats = {"scales": list(store.stats[:-1]), "n": store.stats.n_tokens}
    return {"steps": found, "batches": [list(batch) for batch in batches], "stats": stats}


class Interrupted(Exception):
    """Where a training was meant to end early."""


def train(
    target: TargetModel, form: Form, folder: Path, *, ends: Callable[[], None] | None = None, harvest: Harvest = AT_HOME
) -> None:
    """A training; with `ends` that is called where a second state would be saved."""
    parallel._joined.append(World(world().rank, world().size, form))
    save = training.save_parts

    def save_or_end(file: Path, step: int, own: dict[str, Any]) -> list[int]:
        if ends is not None and step > TRAIN.checkpoint_every:
            ends()
        return save(file, step, own)

    training.save_parts = save_or_end
    train_group(group(), target, data=DATA, config=TRAIN, folder=folder, harvest=harvest)
    training.save_parts = save


def interrupt() -> None:
    raise Interrupted


def cached(target: TargetModel, folder: Path) -> None:
    """Trainings that fill a cache, and trainings that must not run the target; coders and latents have one for both."""
    os.environ["NN_CACHE_HOME"] = str(folder / "cache")
    harvest = Harvest(cache="fp16")
    for form in ("data", "coders"):
        train(target, form, folder / f"{form}-filling", harvest=harvest)
    parallel.wait()
    capture, activation_store.capture = activation_store.capture, None  # type: ignore[assignment]
    for form in ("data", "coders", "latents"):
        train(target, form, folder / f"{form}-cached", harvest=harvest)
    activation_store.capture = capture


def checks(target: TargetModel, folder: Path) -> None:
    """All forms one after the other: steps, a whole training, and one that is interrupted; `data` goes on with the last."""
    results: dict[str, Any] = {}
    torch.manual_seed(world().rank)  # nothing may depend on it
    for form in ("data", "coders", "latents"):
        train(target, form, folder / form)
        if form != "coders":
            results[form] = all_steps(target, folder / form)
        with contextlib.suppress(Interrupted):
            train(target, form, folder / f"{form}-cut", ends=interrupt)
        training.save_parts = checkpoints.save_parts
    parallel._joined.append(World(world().rank, world().size, "data"))
    tune(target, folder / "tuned")
    stream = _OnDevice(target, 4, 0)
    mine = [next(stream) for _ in range(3)]
    results["spd"] = {"batches": mine, "state": decompose(target, mine)}
    parallel._joined.append(World(world().rank, world().size, "latents"))
    results["selections"] = selections()
    results["said"] = parallel.first_to_say("what all have to say")
    parallel._joined.append(World(world().rank, world().size, "data"))
    with contextlib.suppress(ValueError):
        ActivationsStore(target, replace(DATA, batch_tokens=33), shared=True)
        raise AssertionError("33 tokens were dealt to 2 processes")
    shutil.copytree(folder / "data-cut", folder / "data-again") if world().leads else None
    parallel.wait()
    train(target, "data", folder / "data-again")
    cached(target, folder)
    torch.save(results, folder / f"rank{world().rank}.pt")


OUTPUT = TrainConfig(
    objective=Output("free"), tokens=4 * 15 * 4, lr=1e-3, metrics_every=2, checkpoint_every=2, calibration_tokens=120
)


def tune(target: TargetModel, folder: Path) -> None:
    """Transcoders of both layers on the model's output, from weights as they were built: no statistics enter."""
    d = {"d_in": 16, "d_out": 16, "d_dict": 50, "rule": TopK(4)}
    fresh = [untrained(EncoderConfig(layer=layer, **d), target, 0) for layer in (0, 1)]
    starts = [replace(start, record=replace(start.record, objectives=("local",))) for start in fresh]
    train_on_output(starts, target, batch=64, config=OUTPUT, folder=folder)


SPD = SPDTrainConfig(
    steps=4, lr=1e-3, recon=(Recon(coefficient=1.0, source="importance"),), distance="kl", start="least_squares",
    minimality=Lp(coefficient=1e-3, p=(2.0, 1.0)), clip=1.0, metrics_every=2, checkpoint_every=2,
)  # fmt: skip


def decompose(target: TargetModel, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A decomposition after a step on each batch."""
    gate = GateConfig(kind="shared_mlp", hidden=(8,))
    config = SPDConfig(components=(("h.*.mlp.c_fc", 20), ("h.*.mlp.down_proj", 24)), gate=gate)
    trainer = SPDTrainer(ComponentModel(target.model, config, torch.Generator().manual_seed(0)), SPD, autocast=False)
    trainer.warm_up()
    for batch in batches:
        trainer.step(batch)
    return dict(trainer.model.state_dict())


def resume(target: TargetModel, folder: Path) -> None:
    """More processes go on with what others left."""
    train(target, "coders", folder / "coders-cut")
    train(target, "latents", folder / "latents-cut")
    train(target, "latents", folder / "killed")
    parallel._joined.append(World(world().rank, world().size, "latents"))
    torch.save({"selections": selections()}, folder / f"rank{world().rank}-of-{world().size}.pt")


def killed(target: TargetModel, folder: Path) -> None:
    """The last process is killed where a second state would be saved."""

    def die() -> None:
        if world().rank == world().size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(target, "latents", folder / "killed", ends=die)


def selections() -> dict[str, Any]:
    """What latents of several processes select, of values with many ties."""
    generator, found = torch.Generator().manual_seed(0), {}
    for n, d_dict, k in ((5, 10, 3), (7, 9, 8), (4, 6, 6), (16, 50, 2)):
        pre = torch.randint(-3, 4, (n, d_dict), generator=generator).float()
        begin, end = parallel.bounds(d_dict, world().rank, world().size)
        own = pre[:, begin:end]
        for batch in (False, True):
            some = min(k, end - begin)
            candidates = _largest(own.reshape(1, -1), some * n) if batch else _largest(own, some)
            flat = candidates.flatten().nonzero()[:, 0]
            won = LatentRanks(d_dict).largest(flat, own.flatten()[flat], n_rows=n, k=k, batch=batch)
            mask = torch.zeros(own.numel(), dtype=torch.bool)
            mask[flat[won]] = True
            found[f"{n} {d_dict} {k} {batch}"] = {"pre": pre, "k": k, "batch": batch, "won": mask.view(own.shape)}
    return found


JOBS = {"checks": checks, "resume": resume, "killed": killed}

if __name__ == "__main__":
    errors_in_one_line()
    job, corpus, folder = sys.argv[1:]
    torch.set_num_threads(1)
    with joined("cpu", "data"):
        JOBS[job](make_small_target(Path(corpus)), Path(folder))
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert not any("gloo" in name for name in threads), threads  # one that outlives the interpreter aborts the process
