"""The main job: train transcoders and cross-layer transcoders on one stream, measure everything with one ruler.

The sparsest of each are then trained further, briefly, on the model's output (`kl-mixed`): what the objective buys.

    python main.py                      # the embedded model, offline
    python main.py --tokens 50000 --tune-tokens 8192 --eval-tokens 4096   # to see that it runs
    python main.py --target pile --device cuda --tokens 500000000 --d-dict 4096 --transcoder-k 16 32 64

Writes points.csv, pareto.png, settings.json, README.md and features.html into `output/main`, and so_far.png while it measures;
checkpoints into `checkpoints/main`. Prints what each method costs with all layers replaced; the README has the whole table, and
features.html shows the latents of the sparsest coders. Coders that are already trained with the same settings are not trained
again.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from baselines import baselines
from checkpoints import CHECKPOINTS
from coder_replacements import as_replacements
from config import BatchTopK, Mixed, Output
from evaluation import PROTOCOLS, evaluate, held_out
from features import write_page
from recipes import SPDRecipe, clt_configs, train_coders, train_decomposition, transcoder_configs, tune_coders
from spd_replacement import spd_replacements
from spd_runs import find_spd
from study import CoderStudySettings, Report, check_fits, run_study
from target_models import load_target


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "tiny"  # tiny, pile, pile-32d1bb3b, simplestories, gpt2, smollm2, hf:NAME or tl:NAME
    layers: tuple[int, ...] = (0, 1, 2, 3)
    transcoder_k: tuple[int, ...] = (8, 32)  # active latents per token of the BatchTopK transcoders
    clt_k: tuple[int, ...] = (16,)  # active latents per token and layer of the cross-layer transcoders
    neuron_k: tuple[int, ...] = (16, 128)  # neurons kept per token by the neuron baseline
    d_dict: int = 1536  # latents per layer
    tokens: int = 1_000_000  # training tokens seen by every coder
    batch: int = 2048  # tokens per training batch
    tune_tokens: int = 120_000  # training tokens of the sparsest coder of each kind on the model's output; 0: none
    retrain_spd: bool = False  # decompose afresh, briefly, instead of taking the shipped decomposition of `tiny`
    spd_steps: int = 200  # of four sequences each, where SPD is trained
    eval_tokens: int = 32_768  # held-out tokens the table is measured on
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    output: Path = Path(__file__).parent / "output" / "main"
    checkpoints: Path = CHECKPOINTS / "main"


TEXT = """Every row is one method under one protocol, on held-out text. `single`: one layer replaced. `frozen`: all layers
replaced, each reads the clean stream. `gates`: all layers replaced, a clean pass decides what is active, and what is active
reads the stream. `free`: all layers replaced, everything reads the stream that the replacements produced. `kl-mixed`: trained
further on the KL between the model's output and that with layers replaced, where which layers is drawn anew for each batch."""
REPORT = Report("The main job", TEXT)


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    configs = [
        *transcoder_configs(target, layers=s.layers, rules=[BatchTopK(k) for k in s.transcoder_k], d_dict=s.d_dict),
        *clt_configs(target, layers=s.layers, rules=[BatchTopK(k) for k in s.clt_k], d_dict=s.d_dict),
    ]
    trained = train_coders(
        configs, target, tokens=s.tokens, batch=s.batch, seed=s.seed, harvest=s.harvest, folder=s.checkpoints
    )
    least = {config.kind: min(c.rule.k for c in configs if c.kind == config.kind) for config in configs}
    sparsest = [c for c in trained if c.coder.k == least[c.coder.config.kind]]
    if s.tune_tokens:
        sizes = {"tokens": s.tune_tokens, "batch": s.batch, "seed": s.seed, "folder": s.checkpoints}
        trained += tune_coders(sparsest, target, objective=Output(Mixed()), **sizes)
    replacements = as_replacements(trained) + baselines(target, s.layers, s.neuron_k)
    if s.retrain_spd:
        recipe = SPDRecipe(components=512, gate_hidden=192, steps=s.spd_steps, batch=4, seed=s.seed)
        decomposition = train_decomposition(target, recipe, layers=s.layers, folder=s.checkpoints)
        replacements += spd_replacements(target, decomposition, s.layers, deltas=(False,))
    elif s.target == "tiny":
        replacements += spd_replacements(target, find_spd(target, s.layers), s.layers, deltas=(False,))
    text = held_out(target, s.eval_tokens)
    REPORT.write(s, evaluate(target, replacements, text, PROTOCOLS, so_far=functools.partial(REPORT.show, s)))
    write_page(s.output / "features.html", target, as_replacements(sparsest), text.tokens)
    print(f"What their latents say, to open in a browser: {s.output / 'features.html'}")


if __name__ == "__main__":
    run_study(main, [Settings()], __doc__, redraw=REPORT.redraw)
