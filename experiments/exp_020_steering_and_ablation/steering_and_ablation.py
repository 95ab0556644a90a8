"""Do units that tell a topic change the model on that topic alone, when they are taken away or added?

Topics of Python code, labelled by patterns in spans of 32 tokens (topics.py). On one half of the documents every unit of every
method is ranked by AUROC (ties ½), live units of all layers as candidates; on the other half the best are ablated, and the best
five added to all tokens, always in the original model (edited_units.py). Strengths match in KL on neutral text (edit_costs.py):
as many units are ablated, or as much is added, as cost it. Ablation is told by ΔCE of the topic and of text without it, steering
also by how much likelier the topic's vocabulary becomes on text without the topic, against other topics' vocabularies: a model
that reads a topic's text knows the topic already. Beside them random units of like mean effect; the difference of the topic's
mean MLP outputs from the others', taken away along its direction or added; and positive controls: a unit that knows the labels
(ablation), the natural gradient of what is measured, at the last MLP (steering).

    python experiments/exp_020_steering_and_ablation/steering_and_ablation.py --target tiny  # offline
    python experiments/exp_020_steering_and_ablation/steering_and_ablation.py                # pile: GPU, network
    … --replot draws figure and README again from points.csv

Expected: every method's units beat random ones of like effect; latents and neurons are alike at equal KL, SPD's components the
least selective; none comes near the positive controls; steering by latents is weaker than by the difference of means.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from control_edits import Means, class_means, directional_ablation, gradient_vectors, planted_ablation
from edit_costs import Cost, cost, matched, summary, text_of
from edited_units import CodedUnits, SPDUnits, Units, Vectors
from edits import Edit, ablation, steering, typical_vectors
from steering_figure import Row, redraw
from topics import TOPICS, halves, labelled, topics, vocabularies, windows_of
from tqdm import tqdm
from unit_scores import Scored, of_like_effect, ranking, scored

from baselines import NeuronsReplacement
from coder_replacements import as_replacements
from config import BatchTopK
from evaluation import held_out
from logs import git_commit, write_csv, write_settings
from metrics import document_draws
from recipes import clt_configs, sae_configs, transcoder_configs
from spd_replacement import spd_replacements
from spd_runs import find_spd
from study import CoderStudySettings, check_fits, run_study, train_for
from target_models import TargetModel, load_target


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    k: int = 32  # active latents or neurons per token and layer
    topics: tuple[str, ...] = tuple(TOPICS)
    kl: float = 0.05  # nats per token on neutral text, that every edit costs
    steered: int = 5  # units that are added together
    own_windows: int = 12  # of each topic and half, at most; as many neutral ones of the test half
    neutral_windows: int = 4  # of the selection half, that strengths are matched on
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(target="tiny", d_dict=1536, tokens=300_000, batch=2048, eval_tokens=98_304, device="cpu"),
)


def all_units(s: Settings, target: TargetModel) -> list[Units]:
    sizes = {"layers": s.layers, "rules": [BatchTopK(s.k)], "d_dict": s.d_dict}
    configs = [c for build in (transcoder_configs, clt_configs, sae_configs) for c in build(target, **sizes)]
    trained = train_for(s, target, configs)
    spd = spd_replacements(target, find_spd(target, s.layers), s.layers, deltas=(False,))[0]
    coded = [*as_replacements(trained), NeuronsReplacement(target, s.layers, s.k)]
    return [*(CodedUnits(target, own) for own in coded), SPDUnits(target, spd)]


class Named(NamedTuple):
    """An edit as the table names it."""

    method: str
    units: str  # own, random or control
    mode: str  # ablation or steering
    edit: Edit
    strength: float | None = None  # None: to be matched
    auroc: float | None = None  # of the best unit
    null: float | None = None


def unit_edits(s: Settings, units: Units, own: Scored, topic: int) -> Iterator[Named]:
    ranked, best = ranking(own, topic), (own.auroc[topic].max().item(), own.null[topic].item())
    for name, order in (("own", ranked), ("random", of_like_effect(ranked, own.effect, s.seed + topic))):
        yield Named(units.name, name, "ablation", ablation(units, order), None, *best)
        vectors = typical_vectors(units, own, topic, order[: s.steered])
        yield Named(units.name, name, "steering", steering(units.target, vectors), None, *best)


def control_edits(target: TargetModel, means: Means, gradient: Vectors) -> Iterator[Named]:
    vectors = {target.mlps[layer].write: v for layer, v in means.difference.items()}
    yield Named("means", "control", "ablation", directional_ablation(target, means))
    yield Named("means", "control", "steering", steering(target, vectors))
    yield Named("planted", "control", "ablation", planted_ablation(target, means), 1.0)
    yield Named("gradient", "control", "steering", steering(target, gradient))


@torch.no_grad()
def measured(s: Settings, target: TargetModel, methods: list[Units]) -> Iterator[Row]:
    """Every edit of each topic as it is done, then their means."""
    asked = topics(s.topics)
    selection, test = halves(labelled(target, held_out(target, s.eval_tokens), asked))
    draws = document_draws(torch.arange(int(test.documents.max()) + 1), 1000, s.seed)
    by_method = [(units, scored(units, selection, s.seed)) for units in methods]
    means, words = class_means(target, selection, s.layers), vocabularies(selection, target.vocab_size)
    commit = git_commit() or ""
    costs: dict[tuple[str, ...], list[Cost]] = {}
    for t, topic in enumerate(tqdm(asked, unit="topic")):
        chosen = windows_of(selection, t, s.own_windows, s.neutral_windows)
        here, there = text_of(target, chosen), text_of(target, windows_of(test, t, s.own_windows, s.own_windows))
        edits = [named for units, own in by_method for named in unit_edits(s, units, own, t)]
        gradient = gradient_vectors(target, chosen.neutral, words, t)
        for named in [*edits, *control_edits(target, means[t], gradient)]:
            strength = named.strength or matched(named.edit, here, s.kl)
            found = cost(there, named.edit(strength), t, words)
            costs.setdefault(named[:3], []).append(found)
            told = (found.kl, strength, named.auroc, named.null, commit)
            yield Row(*named[:3], topic.name, *summary([found], draws), *told)
    for key, own in costs.items():
        kl = sum(c.kl for c in own) / len(own)
        yield Row(*key, "all", *summary(own, draws), kl, None, None, None, commit)


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    write_csv(s.output / "points.csv", Row._fields, measured(s, target, all_units(s, target)))
    write_settings(s.output, s, s.device)
    redraw(s.output, __doc__)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=lambda folder: redraw(folder, __doc__))
