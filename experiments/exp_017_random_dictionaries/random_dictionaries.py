"""How much of a transcoder's score is learnt? Its encoder or its decoder is kept random, as was done to SAEs alone.

SAEs, transcoders and CLTs at every k, on one stream, from one start: all learnt; decoder rows within cosine τ of random
directions (soft); along random directions (frozen decoder; of a CLT one direction per latent for all targets, with a learnt
scale ≥ 0 for each); encoder rows as drawn (frozen encoder). Directions are even on the sphere. pinned.py has the definitions,
arXiv 2602.14111 the question. The share that is kept of what training recovers,

    (ΔCE − floor) / (ΔCE trained − floor),   floor: the mean of each MLP; but for SAEs, which read what they rebuild, its affine
                                             map too, where the trained dictionary surely beats that
is 1 where nothing had to be learnt and 0 at the floor. Latents of one layer are scored as in exp_008, beside its nulls.

    python experiments/exp_017_random_dictionaries/random_dictionaries.py --target tiny  # offline
    python experiments/exp_017_random_dictionaries/random_dictionaries.py                # pile: GPU, network
    … --replot draws figures and README again from the tables

τ = 0.8 is the paper's. At d = 192 and 768 latents the bound on a random direction within it of a given one is 2e-24 (5e-316
there): small enough, so τ is not raised; it reaches 1 at d = 21.

Expected: soft decoders keep nine tenths, as published of SAEs; frozen decoders and encoders keep half in SAEs and less in
transcoders and CLTs, where two random sides cannot copy; with so little the affine map wins. Intruder and predictability scores
hardly tell a learnt dictionary from a frozen one, as they did not tell a trained target from a random one.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dictionary_report import DictionaryReport, Share
from latent_scores import scored

from baselines import baselines
from checkpoints import Checkpoint, checkpoint_folder
from coder_replacements import as_replacements
from config import BatchTopK, CoderConfig, Pinned
from evaluation import RESAMPLES, Measurement, Protocol, evaluate, held_out
from logs import write_csv
from metrics import Draws, average, document_draws, percentiles, resampled_means
from recipes import clt_configs, sae_configs, train_coders, transcoder_configs
from study import CoderStudySettings, check_fits, run_study
from target_models import TargetModel, load_target

PROTOCOLS: tuple[Protocol, ...] = ("single", "frozen", "free")
BUILD = {"sae": sae_configs, "transcoder": transcoder_configs, "clt": clt_configs}


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (8, 16, 32)  # active latents per token and layer
    repeated_k: tuple[int, ...] = (16,)  # those trained with every seed, and those whose latents are scored
    n_seeds: int = 3  # from `seed` on
    cosine: float = 0.8  # τ, of soft decoders
    layer: int = 3  # whose latents are scored
    latents: int = 40  # scored, of each dictionary
    score_tokens: int = 262_144  # held-out tokens on which they are scored
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(
        target="tiny",
        d_dict=768,
        tokens=102_400,
        batch=1024,
        eval_tokens=10_240,
        n_seeds=1,
        score_tokens=65_536,
        latents=30,
        device="cpu",
    ),
)
REPORT = DictionaryReport("Random dictionaries", __doc__)


def configs(s: Settings, target: TargetModel, kind: str, top_k: tuple[int, ...]) -> list[CoderConfig]:
    """Of every k, all learnt and with a part pinned."""
    plain = BUILD[kind](target, layers=s.layers, rules=[BatchTopK(k) for k in top_k], d_dict=s.d_dict)
    pins = (None, Pinned("decoder", s.cosine), Pinned("decoder"), Pinned("encoder"))
    return [dataclasses.replace(config, pinned=pin) for pin in pins for config in plain]


def train(s: Settings, target: TargetModel, seed: int) -> dict[str, list[Checkpoint]]:
    """Kind → its coders; all of a seed are trained on one stream."""
    top_k = s.top_k if seed == s.seed else s.repeated_k
    asked = {kind: configs(s, target, kind, top_k) for kind in BUILD}
    every = [config for own in asked.values() for config in own]
    folder = checkpoint_folder(s.target) / f"n{s.tokens}"
    trained = train_coders(every, target, tokens=s.tokens, batch=s.batch, seed=seed, harvest=s.harvest, folder=folder)
    return {kind: [c for c in trained if c.coder.config.kind == kind] for kind in BUILD}


def shares(measured: Measurement, draws: Draws) -> list[Share]:
    """What each pinned dictionary keeps of what training recovers over the floor, with an interval over documents.

    `single` is the sum over layers; of several seeds the mean.
    """
    costs, points = {}, {}
    for p, difference in zip(measured.points, measured.differences):
        costs.setdefault((p.method, p.k, p.protocol), {}).setdefault(p.seed, []).append(difference)
        points.setdefault((p.method, p.k, p.protocol), []).append(p)
    totals = {key: [sum(layers) for layers in by_seed.values()] for key, by_seed in costs.items()}
    means = {key: sum(seeds) / len(seeds) for key, seeds in totals.items()}
    found = []
    for (method, k, protocol), seeds in totals.items():
        kind, _, pin = method.partition("-")
        if kind not in BUILD:
            continue
        own, learnt = means[method, k, protocol], means[kind, k, protocol]
        each, of = [seed.mean().item() for seed in seeds], points[method, k, protocol]
        fvu, l0 = (
            average([value for value in column if value is not None]) for column in zip(*((p.fvu, p.l0) for p in of))
        )
        for name in ("mean",) if kind == "sae" else ("mean", "affine"):
            floor = means[name, None, protocol]
            above, whole = (resampled_means(floor - cost, draws) for cost in (own, learnt))
            beaten = percentiles(whole)[0] > 0
            kept = ((floor - own).mean() / (floor - learnt).mean()).item(), *percentiles(above / whole)
            costs_of = len(seeds), own.mean().item(), min(each), max(each), fvu, l0
            share = kept if beaten else (None, None, None)
            found.append(
                Share(method, kind, pin or "trained", k, protocol, *costs_of, name, floor.mean().item(), *share)
            )
    return found


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    text = held_out(target, s.eval_tokens)
    measured = evaluate(target, baselines(target, s.layers, neurons=s.top_k), text, PROTOCOLS)
    scored_coders: list[Checkpoint] = []
    for seed in range(s.seed, s.seed + s.n_seeds):
        for own in train(s, target, seed).values():  # a kind by itself: what is compared in pairs.csv
            rows = evaluate(target, as_replacements(own), text, PROTOCOLS)
            measured = Measurement(*(before + more for before, more in zip(measured, rows)))
            if seed == s.seed:
                scored_coders += [c for c in own if c.coder.k in s.repeated_k[:1]]
    write_csv(s.output / "shares.csv", Share._fields, shares(measured, document_draws(text.documents, RESAMPLES, 0)))
    scored(s, target, as_replacements(scored_coders), s.output / "scores.csv")
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
