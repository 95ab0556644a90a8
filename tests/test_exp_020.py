"""Experiment 020: edits leave the model as it is at strength 0, take away what they say, and the script runs in miniature."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from control_edits import Means, gradient_vectors, planted_ablation
from edit_costs import Cost, cost, general_kl, matched, summary, text_of
from edited_units import CodedUnits, SPDUnits, Units
from edits import ablation, steering
from small import (
    D,
    all_methods,
    clean,
    clt,
    decomposition,
    make_small_target,
    make_tiny,
    run,
    some_tokens,
    write_corpus,
)
from topics import TOPICS, Labelled, Windows, halves, vocabularies, windows_of
from torch import Tensor
from unit_scores import auroc, of_like_effect

import baselines
import checkpoints
import target_models
from coder_replacements import CLTReplacement
from logs import read_csv
from metrics import document_draws
from recipes import SPDRecipe, train_decomposition
from replacement import Coded
from spd_replacement import SPDReplacement
from target_models import TargetModel

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_020_steering_and_ablation" / "steering_and_ablation.py"
LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return make_tiny()


def units_of_all(target: TargetModel) -> list[Units]:
    coded = [CodedUnits(target, own) for own in all_methods(target, LAYERS) if isinstance(own, Coded)]
    spd = SPDReplacement(target, decomposition(target), threshold=-1.0, layers=LAYERS)  # all components are active
    return [*coded, SPDUnits(target, spd)]


@torch.no_grad()
def test_at_strength_zero_every_edit_is_the_original_model_exactly(target: TargetModel) -> None:
    tokens = some_tokens()
    original = target.logits(tokens)
    for units in units_of_all(target):
        none = torch.zeros(sum(units.groups.values()))
        assert torch.equal(run(target, tokens, units.ablated(none), LAYERS), original), units.name
        assert all(not v.any() for v in units.written(none).values()), units.name
        off = ablation(units, [3, 1])(0.0)(tokens, tokens)
        assert torch.equal(off, original), units.name


@torch.no_grad()
def test_a_unit_that_is_taken_away_takes_what_it_wrote(target: TargetModel) -> None:
    """In the last layer of all, where nothing follows but the norm: y less value · d; for half of it, half."""
    layer = LAYERS[-1]
    captured = clean(target, some_tokens(), LAYERS)
    for units in units_of_all(target):
        if isinstance(units, SPDUnits):
            continue
        key = next(key for key in units.groups if key[0] == layer)
        values = units.values(captured)[key]
        unit = int(values[:, 1:].abs().sum((0, 1)).argmax())
        w = {k: torch.zeros(n) for k, n in units.groups.items()}
        s = {k: torch.zeros(n) for k, n in units.groups.items()}
        w[key][unit], s[key][unit] = 0.5, 1.0
        pass_ = units.ablated(torch.cat(list(w.values())))
        x, y = captured.inputs, captured.outputs
        wrote = [pass_(i, x[j], y[j]) for j, i in enumerate(LAYERS)]
        d = units.written(torch.cat(list(s.values())))[target.mlps[layer].write]
        expected = y[-1] - 0.5 * values[..., unit, None] * d
        assert torch.allclose(wrote[-1], expected, atol=1e-4), units.name
        assert torch.equal(wrote[0], y[0])
        assert d.norm() == pytest.approx(units.sizes()[key][unit].item(), rel=1e-4)


@torch.no_grad()
def test_a_clt_latent_is_taken_from_all_its_targets(target: TargetModel) -> None:
    units = CodedUnits(target, CLTReplacement(clt(LAYERS)))
    captured = clean(target, some_tokens(), LAYERS)
    values = units.values(captured)[0, "latents"]
    unit = int(values[:, 1:].sum((0, 1)).argmax())
    row = torch.zeros(sum(units.groups.values()))
    row[unit] = 1.0
    d, pass_ = units.written(row), units.ablated(row)
    for j, layer in enumerate(LAYERS):
        wrote = pass_(layer, captured.inputs[j], captured.outputs[j])
        v = d[target.mlps[layer].write]
        assert v.any() and torch.allclose(wrote, captured.outputs[j] - values[..., unit, None] * v, atol=1e-4)


@torch.no_grad()
def test_a_component_is_taken_from_its_matrix(target: TargetModel) -> None:
    """All of a matrix' components with weight 1: what is left of it is Δ alone."""
    model = decomposition(target)
    units = SPDUnits(target, SPDReplacement(target, model, threshold=-1.0, layers=LAYERS))
    w = {key: torch.full((n,), float(key == (2, "down_proj"))) for key, n in units.groups.items()}
    tokens, captured = some_tokens(), clean(target, some_tokens(), LAYERS)
    wrote = units.ablated(torch.cat(list(w.values())))(2, captured.inputs[2], captured.outputs[2])
    h, part = target.hidden(2, captured.inputs[2]), model.components["h.2.mlp.down_proj"]
    assert torch.allclose(wrote, captured.outputs[2] - h @ part.V @ part.U, atol=1e-3)
    assert tokens.shape == wrote.shape[:2]


def test_tied_scores_count_one_half() -> None:
    labels = torch.tensor([[1, 1, 0, 0, 0, 0]]).bool()
    scores = torch.tensor([[0.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0, 0, 3.0], [0, 0, 0], [0, 0, 0]])
    assert auroc(scores, labels)[0].tolist() == pytest.approx([0.5, 1.0, 3 / 8])
    g = torch.Generator().manual_seed(0)
    rare = (torch.rand(4000, 50, generator=g) < 0.01) * torch.rand(4000, 50, generator=g)
    of_rare = auroc(rare, (torch.arange(4000) < 1000)[None])[0]
    assert of_rare.mean() == pytest.approx(0.5, abs=0.002)  # where positives come first in a tie it would be above .9


def test_random_units_are_of_like_effect_and_all_different() -> None:
    effect = torch.linspace(1, 2, 200)
    ranked = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    other = of_like_effect(ranked, effect, seed=0)
    assert sorted(other) == sorted(ranked) and other != ranked
    assert max(abs(effect[a] - effect[b]) for a, b in zip(ranked, other)) <= 20 / 199 + 1e-6


def test_halves_share_no_document_and_windows_are_spread_over_documents() -> None:
    documents = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])
    spans = torch.tensor([[[1], [1], [1], [1], [0], [1], [0], [0]]]).bool()
    text = Labelled(torch.arange(8)[:, None].expand(8, 32), documents, spans)
    selection, test = halves(text)
    assert selection.documents.tolist() == [0, 0, 0, 2, 2, 4] and test.documents.tolist() == [1, 3]
    own, neutral = windows_of(selection, 0, 2, 5)
    assert own.tokens[:, 0].tolist() == [0, 5] and neutral.tokens[:, 0].tolist() == [4, 7]


def test_patterns_tell_their_topic() -> None:
    texts = {
        "docstrings": '    """Say it."""', "imports": "import os\n", "tests": "    assert x == 1", "numeric": "np.zeros(3)",
        "formatting": '"{}".format(x)', "licences": "# Copyright 2020", "decorators": "    @property\n",
        "exceptions": "raise ValueError(x)", "typing": "def f() -> int:", "dunders": "def __len__(self):",
    }  # fmt: skip
    assert texts.keys() == TOPICS.keys()
    for name, text in texts.items():
        found = [other for other, pattern in TOPICS.items() if re.search(pattern, text, re.MULTILINE)]
        assert found == [name]


@torch.no_grad()
def test_the_strength_is_that_whose_kl_was_asked_for(target: TargetModel) -> None:
    tokens = some_tokens()
    windows = Labelled(tokens, torch.arange(len(tokens)), torch.zeros(1, len(tokens), 1, dtype=torch.bool))
    text = text_of(target, Windows(windows, windows))
    edit = steering(target, {target.mlps[0].write: torch.linspace(-1, 1, D)})
    strength = matched(edit, text, 0.05)
    assert general_kl(text, edit(strength)) == pytest.approx(0.05, rel=0.1)


@torch.no_grad()
def test_the_controls_win_on_the_text_that_they_were_made_from(target: TargetModel) -> None:
    labels = (torch.full((2, 8, 1), on) for on in (True, False))
    windows = Windows(*(OfOneSpan(some_tokens(8, 3 + i), torch.arange(8), own) for i, own in enumerate(labels)))
    text, words = text_of(target, windows), torch.tensor([[1, 2, 3], [4, 5, 6]])
    g = torch.Generator().manual_seed(0)
    vectors = [
        gradient_vectors(target, windows.neutral, words, 0),
        *({target.mlps[-1].write: torch.randn(D, generator=g)} for _ in range(5)),
    ]
    found = []
    for vector in vectors:
        edit = steering(target, vector)
        found.append(cost(text, edit(matched(edit, text, 0.01)), 0, words).mass.sum().item())
    assert found[0] > 1.2 * max(found[1:]) > 0
    means = Means({layer: torch.ones(D) for layer in LAYERS}, {layer: torch.zeros(D) for layer in LAYERS})
    knows = cost(text, planted_ablation(target, means)(1.0), 0, words)
    assert knows.kl == 0 and not knows.general.any() and not knows.mass.any() and knows.topic.abs().sum() > 0.1


def test_a_vocabulary_is_what_its_spans_hold_and_others_do_not() -> None:
    tokens = torch.tensor([[7] * 6 + [1] * 26, [7, 7] + [9] * 4 + [2] * 26])
    half = Labelled(tokens, torch.tensor([0, 1]), torch.tensor([[[1], [0]], [[0], [1]]]).bool())
    assert vocabularies(half, 12, words=2).tolist() == [[1, 7], [2, 9]]


class OfOneSpan(Labelled):
    """Windows of one span each, however short."""

    @property
    def on(self) -> Tensor:
        return self.spans.expand(-1, -1, self.tokens.shape[1])


def test_intervals_are_of_sums_not_of_ratios() -> None:
    def of(topic: list[float], general: list[float]) -> Cost:
        one, two = torch.tensor([10.0, 10.0]), torch.tensor([20.0, 20.0])
        numbers = torch.tensor([0, 1])
        return Cost(torch.tensor(topic), one, numbers, torch.tensor(general), two, numbers + 2, one, 0.0)

    draws = document_draws(torch.arange(4), 200, 0)
    both = summary([of([1.0, 3.0], [2.0, 2.0]), of([4.0, 0.0], [0.4, 0.0])], draws)
    assert both.topic == pytest.approx((0.2 + 0.2) / 2) and both.general == pytest.approx((0.1 + 0.01) / 2)
    assert both.quotient == pytest.approx(0.2 / 0.055) and both.difference == pytest.approx(0.2 - 0.055)
    assert both.topic_low <= both.topic <= both.topic_high


@pytest.mark.slow
def test_it_runs_from_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(baselines, "BASELINE_TOKENS", 8192)
    (tmp_path / "corpus").mkdir()
    target, output = make_small_target(write_corpus(tmp_path / "corpus")), tmp_path / "output"
    recipe = SPDRecipe(components=8, gate_hidden=4, steps=1, batch=2)
    train_decomposition(target, recipe, layers=(0, 1), folder=tmp_path / "checkpoints" / target.name)
    monkeypatch.setattr(target_models, "load_target", lambda name, device: target)
    monkeypatch.setattr("topics.SPAN", 8)
    monkeypatch.setattr("unit_scores.SPAN", 8)
    monkeypatch.setitem(TOPICS, "one", r"\bw1\b")
    monkeypatch.setitem(TOPICS, "two", r"\bw2\b")
    small = "--target tiny --layers 0 1 --k 4 --d-dict 48 --tokens 2048 --batch 512 --eval-tokens 1024 --topics one two".split()
    for more in ([], ["--replot"]):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *small, "--output", str(output), *more])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = read_csv(output / "points.csv")
    methods = {"transcoder", "clt", "sae", "neurons", "spd"}
    for mode, controls in (("ablation", {"means", "planted"}), ("steering", {"means", "gradient"})):
        for topic in ("one", "two", "all"):
            own = [(r["method"], r["units"]) for r in rows if (r["mode"], r["topic"]) == (mode, topic)]
            expected = {(m, units) for m in methods for units in ("own", "random")} | {(m, "control") for m in controls}
            assert set(own) == expected and len(own) == len(expected)
    assert all(float(r["difference_low"]) <= float(r["difference_high"]) for r in rows)
    assert (output / "README.md").read_text().count("| transcoder, random |") == 2 and (
        output / "selectivity.png"
    ).exists()
