"""What is left of a job that is killed at a random moment, and does it end as if it had never been?

Each job runs once without a kill. Then it is started again and again in a folder of its own, each time killed (SIGKILL) at a
moment drawn evenly from the time that it takes, until it ends before its moment. After every kill

    nothing half-written is read as whole:  whatever the project's reader accepts of the folder equals that of the whole run
    every file with a name of its own opens

and at the end the folder reads, tensor by tensor and bit by bit, as the one that was never killed.

    python benchmarks/kills.py --kills 50

Writes results/kills.csv, a row per kill, and prints their counts. A job is a row of `JOBS`.
"""

import hashlib
import itertools
import json
import multiprocessing as mp
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
import yaml
from gpu import prepare
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import python_corpus
from activation_store import DataConfig
from checkpoints import CONFIG, TrainingRecord, load_checkpoint, load_spd, save_checkpoint
from config import (
    BatchTopK,
    CLTConfig,
    EncoderConfig,
    Gated,
    JumpReLU,
    Mixed,
    Output,
    Relu,
    SAEConfig,
    TopK,
    TrainConfig,
)
from foreign_files import Place, hook_points
from foreign_formats import import_dictionaries
from interop import export, import_
from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise
from logs import load_tensors, write_csv
from output_training import train_on_output
from recipes import SPDRecipe, new_coder, train_decomposition, untrained
from target_loaders import ASSETS, load_tokenizer
from target_models import Loaded, TargetModel, make_target
from token_stream import DatasetSpec
from training import train_group

D, D_DICT = 16, 48
Readable = dict[str, str]  # what a folder's readers accept: name → digest of what they read


@dataclass(frozen=True)
class Settings:
    kills: int = 50
    jobs: tuple[str, ...] = ()  # rows of JOBS; empty: all, in turn
    seed: int = 0
    output: Path = Path(__file__).parent / "results" / "kills.csv"


class Material(NamedTuple):
    """What the jobs work on, made beforehand."""

    target: TargetModel
    coders: dict[str, tuple[str, ...]]  # kind → checkpoints, one per layer
    saelens: Path  # one of the kinds in SAELens' files
    sources: list[python_corpus.SourceFile]


class Job(NamedTuple):
    run: Callable[[Material, Path], object]  # the work in a folder; called again after a kill
    read: Callable[[Material, Path], Readable]  # what a user can read of the folder, finished or not


@dataclass
class Straight:
    """A run without a kill."""

    whole: Readable  # what it leaves
    seconds: float  # that it takes, as last seen


class Kill(NamedTuple):
    job: str
    trial: int
    kill: int  # in this trial, from 1
    second: float  # since the start, when it was killed
    of: float  # seconds that the whole job takes
    found: str  # "state": something to go on from; "nothing"; "finished": all was done
    opened: int  # files that open whole
    broken: int  # files that do not
    wrong: int  # results that are read and differ from the whole run's
    then: str  # "killed again", or what the end was: "identical", "different", "failed"


# ------------------------------------------------------------------------------------------------------------- the jobs


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits that change with any name, shape, type or bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def train_some_coders(made: Material, folder: Path) -> None:
    """Five kinds of coders on one stream; a state every four of 120 steps."""
    per_layer = {"d_in": D, "d_out": D, "d_dict": D_DICT}
    configs = [
        SAEConfig(layer=0, site="mlp_out", d_in=D, d_dict=D_DICT, rule=TopK(4)),
        SAEConfig(layer=1, site="mlp_out", d_in=D, d_dict=D_DICT, rule=Gated(l1=1e-3)),
        EncoderConfig(layer=1, rule=BatchTopK(4), skip=True, **per_layer),
        EncoderConfig(layer=0, rule=JumpReLU(l0=1e-3), **per_layer),
        CLTConfig(layers=(0, 1), rule=Relu(l1=1e-3), **per_layer),
    ]
    data = DataConfig(layers=(0, 1), batch_tokens=64, buffer_tokens=512, model_batch=8)
    config = TrainConfig(tokens=64 * 120, lr=1e-2, dead_after=1000, calibration_tokens=64, checkpoint_every=4)
    train_group([new_coder(c, 0) for c in configs], made.target, data=data, config=config, folder=folder)


def train_on_the_output(made: Material, folder: Path) -> None:
    """Transcoders and a CLT on the KL under drawn replacements; a state every four of 80 steps."""
    sizes = {"d_in": D, "d_out": D, "d_dict": D_DICT}
    configs = [
        *(EncoderConfig(layer=layer, rule=BatchTopK(4), skip=True, **sizes) for layer in (0, 1)),
        CLTConfig(layers=(0, 1), rule=TopK(4), **sizes),
    ]
    starts = [untrained(config, made.target, seed=0) for config in configs]
    config = TrainConfig(
        objective=Output(Mixed(), local=0.1),
        tokens=15 * 80,
        lr=1e-2,
        dead_after=300,
        calibration_tokens=64,
        checkpoint_every=4,
    )
    train_on_output(starts, made.target, batch=16, config=config, folder=folder)


def train_an_spd(made: Material, folder: Path) -> None:
    """A state every 100 of 350 steps."""
    recipe = SPDRecipe(components=8, gate_hidden=4, steps=350, batch=2)
    train_decomposition(made.target, recipe, layers=(0, 1), folder=folder)


def read_checkpoints(made: Material, folder: Path) -> Readable:
    """Every coder whose folder is finished."""
    found = [config.parent for config in folder.rglob(CONFIG) if not hidden(config.relative_to(folder))]
    states = {str(f.relative_to(folder)): load_checkpoint(str(f), "cpu").coder.state_dict() for f in found}
    return {name: digest(state.items()) for name, state in states.items()}


def read_decompositions(made: Material, folder: Path) -> Readable:
    found = [config.parent for config in folder.rglob(CONFIG)]
    return {f.name: digest(load_spd(str(f), made.target)[0].state_dict().items()) for f in found}


def write_tokens(made: Material, folder: Path) -> None:
    """The token folder of benchmarks/gpu.py, of random words."""
    texts = folder.parent / "texts"
    texts.mkdir(exist_ok=True)
    if not (file := texts / "words.jsonl").exists():
        words = random.Random(0)
        lines = (" ".join(f"word{words.randrange(999)}" for _ in range(60)) for _ in range(4000))
        file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare(folder, 100_000, DatasetSpec(str(file)), made.target.tokenizer)


def read_arrays(made: Material, folder: Path) -> Readable:
    return {f.name: digest([("", torch.from_numpy(np.load(f).astype(np.int32)))]) for f in folder.glob("*.npy")}


def list_the_corpus(made: Material, folder: Path) -> None:
    """The cached list of the environment's source files, of 400 of them."""
    os.environ["NN_CACHE_HOME"] = str(folder)
    python_corpus.environment_files = lambda: made.sources
    python_corpus.environment_corpus("train")


def read_lists(made: Material, folder: Path) -> Readable:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in folder.glob("corpus/[!.]*.json")}


def exports(format: str, kind: str) -> Job:
    """Coders of all layers written as another library's files; a destination is read as one thing."""

    def run(made: Material, folder: Path) -> None:
        if not (folder / "theirs").exists():
            export(format, made.coders[kind], folder / "theirs")

    def read(made: Material, folder: Path) -> Readable:
        if not (folder / "theirs").exists():
            return {}
        found = import_dictionaries(format, str(folder / "theirs"), Place())
        tensors = [(f"{i} {name}", t) for i, d in enumerate(found) for name, t in d.coder.state_dict().items()]
        return {"theirs": digest(tensors)}

    return Job(run, read)


def import_some(made: Material, folder: Path) -> None:
    if not (folder / "ours").exists():
        import_("saelens", str(made.saelens), folder / "ours")


def read_imported(made: Material, folder: Path) -> Readable:
    """All dictionaries of the destination as one thing."""
    found = read_checkpoints(made, folder)
    return {"ours": hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]} if found else {}


JOBS: dict[str, Job] = {
    "train coders": Job(train_some_coders, read_checkpoints),
    "train on the output": Job(train_on_the_output, read_checkpoints),
    "train an SPD": Job(train_an_spd, read_decompositions),
    "token folder": Job(write_tokens, read_arrays),
    "corpus list": Job(list_the_corpus, read_lists),
    "export saelens": exports("saelens", "transcoder"),
    "export sparsify": exports("sparsify", "topk"),
    "export dictionary_learning": exports("dictionary_learning", "sae"),
    "export circuit-tracer": exports("circuit-tracer", "transcoder"),
    "import": Job(import_some, read_imported),
}


# ------------------------------------------------------------------------------------------------------------ the kills


def material(folder: Path) -> Material:
    """A random model of two layers on random tokens, and trained-looking coders of it, large enough to take a while."""
    tokenizer, generator = load_tokenizer(ASSETS / "tiny" / "tokenizer.json"), torch.Generator().manual_seed(0)
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(16, len(tokenizer), 2, 2, D, 32, 1))
    initialise(model, generator)
    (folder / "tokens").mkdir()
    for split, n in (("train", 200_000), ("val", 20_000)):
        ids = torch.randint(len(tokenizer), (n,), generator=generator)
        ids[::50] = 0
        np.save(folder / "tokens" / f"{split}.npy", ids.numpy().astype(np.uint16))
    text = DatasetSpec(str(folder / "tokens"), tokenised=True)
    target = make_target("random", Loaded(model, tokenizer, 16, text), "cpu")
    rules = {"transcoder": JumpReLU(l0=1e-3), "topk": TopK(8), "sae": JumpReLU(l0=1e-3)}
    coders: dict[str, tuple[str, ...]] = {}
    for kind, rule in rules.items():
        coders[kind] = tuple(str(folder / "coders" / f"{kind}_{layer}") for layer in range(4))
        for layer, path in enumerate(coders[kind]):
            sizes = {"layer": layer, "d_in": 256, "d_dict": 4096, "rule": rule}
            config = SAEConfig(site="resid", **sizes) if kind == "sae" else EncoderConfig(d_out=256, **sizes)
            record = TrainingRecord.imported(Path(path).name, "random", hook_points(config))
            save_checkpoint(Path(path), new_coder(config, 0), record)
    export("saelens", coders["transcoder"], folder / "saelens")
    return Material(target, coders, folder / "saelens", python_corpus.environment_files()[:400])


def begin(job: Job, made: Material, folder: Path) -> mp.process.BaseProcess:
    """The job in a process of its own, which has all that this one has loaded."""

    def quiet() -> None:
        silent = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        job.run(made, folder)

    folder.mkdir(parents=True, exist_ok=True)
    process = mp.get_context("fork").Process(target=quiet)
    process.start()
    return process


def opened_and_broken(folder: Path) -> tuple[int, int]:
    """How many files open whole, and how many do not; temporary ones, whose names are hidden, are nobody's to open."""
    counts = Counter(opens(f) for f in folder.rglob("*") if f.is_file() and not hidden(f.relative_to(folder)))
    return counts[True], counts[False]


def hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def opens(file: Path) -> bool:
    try:
        match file.suffix:
            case ".pt":
                load_tensors(file, "cpu")
            case ".safetensors":
                load_file(file)
            case ".npy":
                np.load(file)
            case ".yaml":
                yaml.safe_load(file.read_text())
            case ".json":
                json.loads(file.read_text())
            case ".jsonl":
                [json.loads(line) for line in file.read_text().splitlines()]
    except (ValueError, EOFError, SafetensorError):
        return False
    return True


def has_state(folder: Path) -> bool:
    """Whether a training left something to go on from."""
    return any([*folder.rglob("state.pt"), *folder.glob("group_*.pt")])


def readable(job: Job, made: Material, folder: Path) -> Readable:
    """What a user can read of a folder; nothing where that is refused."""
    try:
        return job.read(made, folder)
    except ValueError:
        return {}


def kill_until_it_ends(
    name: str, trial: int, made: Material, folder: Path, straight: Straight, draw: random.Random
) -> list[Kill]:
    """One trial: the job killed at random moments in one folder, until it ends before the next one."""
    job, kills = JOBS[name], list[Kill]()
    while True:
        began, process, moment = time.perf_counter(), begin(job, made, folder), draw.uniform(0, straight.seconds)
        process.join(moment)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        found = readable(job, made, folder)
        opened, broken = opened_and_broken(folder)
        kill = Kill(
            job=name, trial=trial, kill=len(kills) + 1, second=round(moment, 3), of=round(straight.seconds, 3),
            found="finished" if found == straight.whole else "state" if has_state(folder) else "nothing", opened=opened,
            broken=broken, wrong=len(found.items() - straight.whole.items()), then="killed again",
        )  # fmt: skip
        kills.append(kill)
    if not kills:  # all of it was done in less than the moment: the machine has more time for it now
        straight.seconds = time.perf_counter() - began
    end = "failed" if process.exitcode else "identical" if job.read(made, folder) == straight.whole else "different"
    if not kills:
        assert end == "identical", f"{name} is {end} without a kill, too"
        return []
    return [*kills[:-1], kills[-1]._replace(then=end)]


def run_straight(name: str, made: Material, scratch: Path) -> Straight:
    """What a run without a kill leaves, and the seconds it takes."""
    began, folder = time.perf_counter(), scratch / f"{name} straight"
    process = begin(JOBS[name], made, folder)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{name} fails also when it is not killed: {folder.with_suffix('.log').read_text()[-2000:]}")
    return Straight(JOBS[name].read(made, folder), time.perf_counter() - began)


def table(kills: list[Kill]) -> str:
    """Counts per job, as Markdown."""
    heads = ("job", "seconds", "kills", "ended after", "of these identical", "nothing to go on from", "a state", "finished",
             "files opened", "files broken", "wrong results read")  # fmt: skip
    rows = []
    for name in dict.fromkeys(kill.job for kill in kills):
        own = [kill for kill in kills if kill.job == name]
        found, then = Counter(kill.found for kill in own), Counter(kill.then for kill in own)
        counts = [len(own), len(own) - then["killed again"], then["identical"]]
        counts += [found[state] for state in ("nothing", "state", "finished")]
        counts += [sum(kill[i] for kill in own) for i in map(Kill._fields.index, ("opened", "broken", "wrong"))]  # type: ignore[misc]
        rows.append([name, f"{own[0].of:.1f}", *counts])
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(s: Settings) -> None:
    torch.set_num_threads(1)  # a process that has threads cannot be copied
    os.environ |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    draw, kills, names = random.Random(s.seed), list[Kill](), s.jobs or tuple(JOBS)
    with tempfile.TemporaryDirectory() as directory:
        (scratch := Path(directory) / "made").mkdir()
        made = material(scratch)
        straight = {name: run_straight(name, made, Path(directory)) for name in names}
        for trial, name in enumerate(itertools.cycle(names)):
            kills += kill_until_it_ends(name, trial, made, Path(directory) / f"{name} {trial}", straight[name], draw)
            write_csv(s.output, Kill._fields, kills)
            print(f"{len(kills)} of {s.kills} kills", flush=True)
            if len(kills) >= s.kills:
                break
    print(table(kills))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
