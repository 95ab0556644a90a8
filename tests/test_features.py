"""`python features.py`: what it says of each unit, against brute force over dense activations."""

import json
import re
from pathlib import Path

import pytest
import torch
from feature_pages import HOSTILE, made_up_page
from small import clean, clt, decomposition, make_tiny, saes, some_tokens, transcoders
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

import features
import units
from coder_replacements import CLTReplacement, SAEReplacement, TranscoderReplacement
from patching import patched
from replacement import CodedPass
from sparse_ops import to_dense
from spd_replacement import SPDReplacement
from target_models import TargetModel, load_target
from unit_activity import BEFORE, BINS, DRAWN, SPAN, TOP, WINDOW, Events, UnitActivity

SEQ, N = 150, 7  # three windows a sequence, the last one short


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    """Signed activations of N units on 40 sequences: one unit rare, one silent, one growing from batch to batch."""
    values = torch.randn(N, 40 * SEQ, generator=generator()) * (torch.rand(N, 40 * SEQ, generator=generator(1)) < 0.05)
    values[1] *= torch.rand(40 * SEQ, generator=generator(2)) < 0.01
    values[2] = 0
    values[3] *= torch.logspace(-4, 4, 40 * SEQ)
    return values


def gathered(dense: torch.Tensor, batch: int = 6 * SEQ) -> UnitActivity:
    activity = UnitActivity(len(dense), SEQ)
    for start in range(0, dense.shape[1], batch):
        some = dense[:, start : start + batch]
        token, unit = some.T.nonzero().unbind(1)
        activity.add(Events.of(unit, token, some[unit, token]), start)
    return activity


def window_peaks(row: torch.Tensor) -> list[int]:
    """The place of the strongest token of each window in which a unit is active."""
    windows = [
        range(start, min(start + WINDOW, first + SEQ))
        for first in range(0, len(row), SEQ)
        for start in range(first, first + SEQ, WINDOW)
    ]
    return [max(window, key=lambda i: row[i].abs().item()) for window in windows if row[list(window)].any()]


def span_at(row: torch.Tensor, place: int) -> torch.Tensor:
    first = place - place % SEQ
    around = range(place - BEFORE, place - BEFORE + SPAN)
    return torch.tensor([row[i].item() if first <= i < first + SEQ else 0.0 for i in around])


def test_counts_sums_and_peaks_are_those_of_all_text(dense: torch.Tensor) -> None:
    activity = gathered(dense)
    assert torch.equal(activity.counts, (dense != 0).sum(1)) and torch.equal(activity.peaks, dense.abs().amax(1))
    torch.testing.assert_close(activity.sums, dense.double().sum(1))
    torch.testing.assert_close(activity.sizes, dense.double().abs().sum(1))


def test_top_examples_are_the_strongest_windows(dense: torch.Tensor) -> None:
    for row, own in zip(dense, gathered(dense).examples()):
        expected = sorted(window_peaks(row), key=lambda place: -row[place].abs().item())[:TOP]
        top = [example for example in own if example.quarter == 0]
        assert [example.place for example in top] == expected
        for example in own:
            assert torch.equal(example.span, span_at(row, example.place))


def test_quarters_hold_windows_between_their_quantiles_once(dense: torch.Tensor) -> None:
    activity = gathered(dense)
    for unit, (row, own) in enumerate(zip(dense, activity.examples())):
        drawn = activity.drawn.places[activity.drawn.units == unit].tolist()
        assert len(drawn) == len(set(drawn)) == min(DRAWN, len(window_peaks(row))) and set(drawn) <= {
            *window_peaks(row)
        }
        ranked = sorted(drawn, key=lambda place: -row[place].abs().item())
        assert len({example.place for example in own}) == len(own)
        for example in own:
            if example.quarter:
                assert ranked.index(example.place) * 4 // len(ranked) == example.quarter - 1
    assert {example.quarter for example in gathered(dense).examples()[0]} == {0, 1, 2, 3, 4}


def test_every_window_is_drawn_as_often_as_any_other() -> None:
    """One event in every window of 600 alike units, in batches of unequal size: each window stays with probability 24/90."""
    row = torch.zeros(30 * SEQ)
    row[[first + start for first in range(0, 30 * SEQ, SEQ) for start in (5, 70, 140)]] = torch.linspace(1, 9, 90)
    places = gathered(row.expand(600, -1), batch=7 * SEQ).drawn.places
    share = torch.bincount(places, minlength=len(row))[row > 0] / 600
    assert (share - DRAWN / 90).abs().max() < 5 * (DRAWN / 90 * (1 - DRAWN / 90) / 600) ** 0.5


def test_histogram_counts_equal_bins_up_to_the_next_power_of_two(dense: torch.Tensor) -> None:
    activity = gathered(dense)
    for row, exponent, counts in zip(dense, activity.exponents.tolist(), activity.histogram):
        size = row[row != 0].abs()
        if len(size):
            assert 2.0 ** (exponent - 1) <= size.max() < 2.0**exponent
            expected = torch.histogram(size.double(), BINS, range=(0.0, 2.0**exponent)).hist
            assert torch.equal(counts, expected.long())
    assert activity.histogram[2].sum() == 0


REPLACED = {
    "transcoder": lambda target: TranscoderReplacement(transcoders(range(3), skip=True)),
    "sae": lambda target: SAEReplacement(saes(range(3))),
    "clt": lambda target: CLTReplacement(clt(range(3))),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_a_latents_activation_times_its_direction_is_what_it_adds(kind: str) -> None:
    target, tokens = make_tiny(), some_tokens()
    replacement = REPLACED[kind](target)
    own = units.units_of(replacement, 1000)
    captured = clean(target, tokens, replacement.reads)

    def written(drop: tuple[int, int, int] | None = None) -> torch.Tensor:
        """What all layers add to each token, without one (layer, token, latent)."""
        pass_ = replacement.frozen(captured)
        total = torch.zeros(tokens.numel(), target.d_model)
        for i, layer in enumerate(replacement.layers):
            codes = pass_.encode(layer)
            if drop is not None and drop[0] == layer:
                kept = ~((codes.rows == drop[1]) & (codes.cols == drop[2]))
                pass_.codes[layer] = codes._replace(values=codes.values * kept)
            x, y = (side[i].flatten(0, 1).float() for side in captured[:2])
            total += replacement.write(pass_, layer, x, y)
        return total.detach()

    with torch.inference_mode():
        whole, found = written(), own.events(captured)
        for group, events in zip(own.groups, found):
            codes = to_dense(CodedPass(replacement, captured).encode(group.layer)).view(*tokens.shape, -1)[:, 1:]
            assert len(events.units) == (codes != 0).sum() > 20
            for unit, place, value in [*zip(*(part.tolist() for part in events))][::17]:
                change = whole - written((group.layer, place, unit))
                torch.testing.assert_close(change[place], value * group.directions[unit], atol=1e-4, rtol=1e-4)
                sizes = group.target_sizes[unit]
                assert group.sizes[unit].item() == pytest.approx(sizes.square().sum().sqrt().item())
                assert sizes.shape == (len(group.targets),) and group.targets[0] == group.layer


def test_a_components_activation_times_its_direction_is_what_it_adds() -> None:
    target, tokens = make_tiny(), some_tokens()
    model = decomposition(target)
    replacement = SPDReplacement(target, model)
    own = units.units_of(replacement, 1000)
    with torch.inference_mode():
        captured = clean(target, tokens, replacement.reads)
        inputs, z = replacement.clean_importances(captured)
        for path, group, events in zip(own.paths, own.groups, own.events(captured)):
            part, on = model.components[path], model.lower(z[path]) > 0
            on[:, 0] = False
            assert len(events.units) == on.sum() > 20
            unit, place = events.units, events.places
            write = (inputs[path].flatten(0, 1) @ part.V)[place, unit][:, None] * part.U[unit]
            if path.endswith("c_fc"):
                write = write @ target.down_weight(group.layer).T
            torch.testing.assert_close(events.values[:, None] * group.directions[unit], write, atol=1e-5, rtol=1e-4)


def test_partners_are_the_components_that_share_neurons() -> None:
    target = make_tiny()
    replacement = SPDReplacement(target, decomposition(target))
    own = units.units_of(replacement, 1000)
    first = 0
    for i, (path, found) in enumerate(zip(own.paths, own.partners(3))):
        other = i + 1 if path.endswith("c_fc") else i - 1
        fc, down = (replacement.model.components[own.paths[j]] for j in sorted((i, other)))
        cosines = normalize(fc.U, dim=1) @ normalize(down.V, dim=0)
        cosines = cosines if other > i else cosines.T
        expected = cosines.abs().topk(3).indices
        start = first + cosines.shape[0] if other > i else first - cosines.shape[1]
        assert torch.equal(found.units, expected + start)
        torch.testing.assert_close(found.cosines, cosines.gather(1, expected))
        first += cosines.shape[0]


def test_a_sample_of_units_says_what_all_say_of_them() -> None:
    target, tokens = make_tiny(), some_tokens()
    with torch.inference_mode():
        for replacement in (CLTReplacement(clt(range(3))), SPDReplacement(target, decomposition(target))):
            captured = clean(target, tokens, replacement.reads)
            whole, some = (units.units_of(replacement, most) for most in (1000, 9))
            for every, few, all_events, events in zip(
                whole.groups, some.groups, whole.events(captured), some.events(captured)
            ):
                assert len(few.numbers) == 9 and few.total == len(every.numbers)
                kept = torch.isin(all_events.units, few.numbers)
                assert torch.equal(few.numbers[events.units], all_events.units[kept])
                torch.testing.assert_close(events.values, all_events.values[kept])
                torch.testing.assert_close(few.directions, every.directions[few.numbers])


def test_logit_effect_is_the_derivative_along_the_direct_path(monkeypatch: pytest.MonkeyPatch) -> None:
    target, tokens = make_tiny(), some_tokens()
    monkeypatch.setattr(units, "CHUNK", tokens.numel() * target.vocab_size * 5)  # 5 of 16 directions at once
    jacobian = units.logit_jacobian(target, tokens)
    streams: list[torch.Tensor] = []
    view = units.at_site(target, "resid")
    with torch.no_grad(), patched(view, {2: lambda x, y: streams.append(y) or y}):
        target.logits(tokens)
    stream, model = streams[0][:, 1:].flatten(0, 1).double(), target.model
    W, norm = model.lm_head.weight.double(), model.ln_f
    scale = stream.square().mean(1, keepdim=True).add(norm.eps).sqrt()
    unit = stream / scale  # d (x / rms) = (dx − unit · (unit · dx) / d) / rms
    gain = norm.weight.double()
    d = target.d_model
    each = (torch.eye(d) - unit[:, :, None] * unit[:, None, :] / d) / scale[:, :, None]
    expected = (each * gain).mean(0) @ W.T
    assert (jacobian - expected).abs().max() < 2e-3 * expected.abs().max()

    writes = torch.randn(11, d, generator=generator())
    monkeypatch.setattr(units, "CHUNK", 3 * target.vocab_size)
    found = units.logit_effects(writes, jacobian, 4)
    change = writes @ jacobian
    change = change - change.mean(1, keepdim=True)
    ranked = change.argsort(1, descending=True)
    assert torch.equal(found.promoted, ranked[:, :4]) and torch.equal(found.suppressed, ranked.flip(1)[:, :4])
    torch.testing.assert_close(found.promotion, change.gather(1, found.promoted))
    torch.testing.assert_close(found.suppression, change.gather(1, found.suppressed))


def test_nearest_units_are_those_of_largest_cosine_that_are_ever_active(monkeypatch: pytest.MonkeyPatch) -> None:
    directions, counts = torch.randn(40, 6, generator=generator()), torch.arange(40) % 4
    monkeypatch.setattr(units, "CHUNK", 40 * 7)
    found = units.nearest(directions, counts, 5)
    for unit in range(40):
        cosine = torch.nn.functional.cosine_similarity(directions[unit], directions, dim=-1)
        others = [i for i in range(40) if i != unit and counts[i] > 0]
        expected = sorted(others, key=lambda i: -cosine[i].item())[:5]
        assert found.units[unit].tolist() == expected
        torch.testing.assert_close(found.cosines[unit], cosine[expected])


def test_a_component_is_shown_with_the_sign_it_mostly_has() -> None:
    """Negating U and V of a component changes nothing on the page."""
    target, tokens = make_tiny(), some_tokens(12)
    said = []
    for sign in (1.0, -1.0):
        model = decomposition(target)
        for part in model.components.values():
            part.V.mul_(sign)
            part.U.mul_(sign)
        said.append(features.find(target, target, [SPDReplacement(target, model)], tokens))
    one, other = said
    sums = torch.tensor([example.span[BEFORE].item() for own in one.examples for example in own])
    assert sums.abs().max() <= 1.0 + 1e-6 and (sums > 0).float().mean() > 0.5
    assert (
        torch.equal(one.effects.promoted, other.effects.promoted) and (one.effects.promotion[one.counts > 0] > 0).all()
    )
    assert torch.equal(one.nearest.units, other.nearest.units)
    for mine, theirs in zip(one.partners, other.partners):
        torch.testing.assert_close(mine.cosines, theirs.cosines)
    for mine, theirs in zip(one.examples, other.examples):
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a.span, b.span)


# ---------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def tiny() -> TargetModel:
    return load_target("tiny", "cpu")


def test_tokens_read_as_the_text_they_were_cut_from(tiny: TargetModel) -> None:
    text = 'def f(x):\n    return {"a": x}  # a b\n'
    assert "".join(features.token_texts(tiny, tiny.tokenizer.encode(text))) == text


def test_a_tokenizer_that_drops_the_first_space_keeps_it_on_the_page(small_target: TargetModel) -> None:
    from dataclasses import replace

    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    target = replace(small_target, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert target.tokenizer.decode([0]) == "a" and features.token_texts(target, [0, 1, 2]) == [" a", " b", "c"]


def test_no_text_ends_the_script_or_begins_a_tag(tiny: TargetModel) -> None:
    data = made_up_page(tiny, n=4, layers=1)
    data["vocabulary"][: len(HOSTILE)] = HOSTILE
    data["title"] = "</title><script>"
    page, template = features.page(data), features.TEMPLATE.read_text(encoding="utf-8")
    assert page.count("<") == template.count("<")
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert inside is not None and json.loads(inside[1])["vocabulary"][: len(HOSTILE)] == HOSTILE


def test_six_thousand_units_are_less_than_15_mb_and_fetch_nothing(tiny: TargetModel, tmp_path: Path) -> None:
    page = features.page(made_up_page(tiny, n=1500, layers=4, tokens=131_072))
    assert 4e6 < len(page.encode()) < 15e6
    template = features.TEMPLATE.read_text(encoding="utf-8")
    assert re.findall(r"https?:|//[\w.]+/|\bimport\b|@import|url\(", template) == []
