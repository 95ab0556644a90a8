"""The attack: its box has the deployed replacement in one corner and the original model in another, whatever the method."""

import functools

import pytest
import torch
from small import C_DOWN, C_FC, all_methods, clean, clt, decomposition, make_tiny, run, saes, some_tokens, transcoders

from adversary import Attack, Rung, constant_sources, copied, prepared, with_tensors
from coder_replacements import CLTReplacement, SAEReplacement, TranscoderReplacement
from config import Gated, JumpReLU
from evaluation import ignore
from losses import mean_kl
from replacement import Coded, Replacement, Sources, replaced_logits
from spd_masks import source_masks
from spd_replacement import SPDReplacement
from target_models import TargetModel

LAYERS = (0, 1)


def methods(target: TargetModel) -> list[Replacement]:
    """Every method and baseline that writes MLP outputs, and two more rules."""
    found = [*all_methods(target, LAYERS), SPDReplacement(target, decomposition(target))]
    rules = [TranscoderReplacement(transcoders(LAYERS, rule, skip=True)) for rule in (JumpReLU(1e-3), Gated(1e-2))]
    return [*found, *rules]


N_METHODS = len(methods(make_tiny(2)))


@pytest.mark.parametrize("i", range(N_METHODS))
def test_the_corners_of_the_box_are_the_deployed_replacement_and_the_original_model(i: int) -> None:
    target, tokens = make_tiny(2), some_tokens()
    replacement, captured = methods(target)[i], clean(target, tokens, LAYERS)
    with torch.inference_mode():
        for value, expected in (
            (0.0, run(target, tokens, replacement.gated(captured), LAYERS)),
            (1.0, target.logits(tokens)),
        ):
            pass_ = replacement.attacked(captured, constant_sources(replacement, value, target.device))
            found = run(target, tokens, pass_, LAYERS)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=f"{replacement.method} at {value}")


CODED = {
    "transcoder": lambda: TranscoderReplacement(transcoders(LAYERS)),
    "skip": lambda: TranscoderReplacement(transcoders(LAYERS, skip=True)),
    "sae": lambda: SAEReplacement(saes(LAYERS)),
    "clt": lambda: CLTReplacement(clt(LAYERS)),
}


def random_sources(replacement: Replacement, seed: int = 3) -> Sources:
    generator = torch.Generator().manual_seed(seed)
    surface = replacement.surface(LAYERS)
    return Sources(
        {key: torch.rand(n, generator=generator) for key, n in surface.items()},
        {key: torch.rand((), generator=generator) for key in surface},
    )


@pytest.mark.parametrize("name", CODED)
def test_what_an_attacked_layer_writes_is_what_the_definition_says(name: str) -> None:
    """out = b + Σ m c + m_Δ (y − b − Σ c), each c written as a coder of its own would, by parts."""
    target, tokens = make_tiny(2), some_tokens()
    replacement: Coded = CODED[name]()
    captured, sources = clean(target, tokens, LAYERS), random_sources(replacement)
    pass_, gates = replacement.attacked(captured, sources), replacement.gated(captured)
    with torch.inference_mode():
        x, y = captured.inputs[1] + 0.1, captured.outputs[1] - 0.1  # a stream that is not the clean one
        for layer in LAYERS:
            found, opened = pass_(layer, x, y), gates(layer, x, y)
        members = replacement.members
        total, everything = torch.zeros_like(y), torch.zeros_like(y)
        for layer in LAYERS if name == "clt" else [1]:
            coder, i, read = replacement.reading(layer, x.flatten(0, 1), y.flatten(0, 1))
            dense = coder.encoders[i].pre_activations(coder.encoder_inputs(i, read)).relu()
            on = torch.zeros_like(dense)
            codes = gates.codes[layer]
            on[codes.rows, codes.cols] = (codes.values != 0).float()
            on = torch.zeros_like(dense)
            kept = pass_.gates.codes[layer]
            on[kept.rows, kept.cols] = (kept.values != 0).float()
            m = on + (1 - on) * sources.parts[layer, "latents"]
            W = coder.decoders[i]
            W = W.view(len(W), -1, y.shape[-1])[:, 1 - layer] if name == "clt" else W
            total += ((m * dense) @ W).view_as(y)
            everything += (dense @ W).view_as(y)
        last = members[-1]
        scale = last.y_scale[1] if name == "clt" else last.y_scale
        bias = last.b_dec[1] if name == "clt" else last.b_dec
        skip = last.skip_output(x.flatten(0, 1)).view_as(y) if last.skip is not None else 0.0
        rest = y - ((everything + bias) / scale + skip)
        expected = (total + bias) / scale + skip + sources.deltas[1, "latents"] * rest
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, opened, atol=1e-3)


def test_an_attacked_decomposition_is_masked_as_in_its_training() -> None:
    """m = g + (1 − g) s with gates of 0 and 1, and m_Δ: `spd_masks.source_masks`, on the same model."""
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    spd = SPDReplacement(target, model)
    sources = random_sources(spd)
    with torch.inference_mode():
        captured = clean(target, tokens, LAYERS)
        found = run(target, tokens, spd.attacked(captured, sources), LAYERS)
        gates = {path: (model.lower(z) > 0).float() for path, z in spd.clean_importances(captured).z.items()}
        for g in gates.values():
            g[:, :1] = 1.0  # the first position is left to the model
        channels = {
            path: torch.cat([sources.parts[layer, name], sources.deltas[layer, name][None]])
            for layer in LAYERS for name, path in spd.paths[layer].items()
        }  # fmt: skip
        masks = source_masks(gates, channels)
        masks = {path: mask._replace(delta=torch.cat([torch.ones_like(mask.delta[:, :1]), mask.delta[:, 1:]], 1))
                 for path, mask in masks.items()}  # fmt: skip
        expected = model.run_masked(masks, tokens)
        expected = expected[0] if isinstance(expected, tuple) else expected
    assert {len(s) for s in sources.parts.values()} == {C_FC, C_DOWN}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@functools.cache
def rungs(name: str, deltas: bool) -> tuple[Attack, list[Rung]]:
    target = make_tiny(2)
    replacement = SPDReplacement(target, decomposition(target)) if name == "spd" else CODED[name]()
    attack = Attack(target, replacement, some_tokens(20), deltas=deltas)
    return attack, attack.run(prepared(target, replacement, some_tokens(3, seed=9)), ladder=(1, 4, 8))[0]


@pytest.mark.parametrize("deltas", [True, False])
@pytest.mark.parametrize("name", [*CODED, "spd"])
def test_an_attack_climbs_and_a_later_rung_is_never_better_for_the_method(name: str, deltas: bool) -> None:
    attack, found = rungs(name, deltas)
    kl = [rung.attacked.kl.mean() for rung in found]
    start = attack.costs(attack.start, attack.batches).kl.mean()
    assert [rung.steps for rung in found] == [1, 4, 8]
    assert start <= kl[0] <= kl[1] <= kl[2] and kl[2] > start
    assert all((0 <= s).all() and (s <= 1).all() for rung in found for s in copied(rung.sources))
    assert deltas or all(m == 0 for rung in found for m in rung.sources.deltas.values())
    assert len(found[0].attacked.kl) == 20 and len(found[0].transferred.kl) == 3


def test_the_gradient_is_that_of_the_mean_kl_of_all_batches() -> None:
    target, tokens = make_tiny(2), some_tokens(20)
    attack = Attack(target, CODED["transcoder"](), tokens, deltas=True)
    kl, gradient = attack.ascent(attack.start)
    clean_logits = target.logits(tokens).detach()

    def objective(sources: Sources) -> torch.Tensor:
        captured = clean(target, tokens, LAYERS)
        pass_ = attack.replacement.attacked(captured, sources)
        return mean_kl(clean_logits, replaced_logits(target, tokens, pass_, LAYERS, ignore))

    leaves = [leaf.requires_grad_() for leaf in copied(attack.start)]
    own = with_tensors(attack.start, leaves)
    value = objective(own)
    assert len(attack.batches) == 2 and kl == pytest.approx(value.item(), rel=1e-5)
    for found, expected in zip(gradient, torch.autograd.grad(value, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_neurons_have_no_remainder_and_all_of_them_cannot_be_attacked() -> None:
    target = make_tiny(2)
    everything = next(r for r in all_methods(target, LAYERS) if r.method == "neurons")
    everything.k = target.d_mlp
    attack = Attack(target, everything, some_tokens(2), deltas=True)
    assert attack.ascent(attack.start)[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["transcoder", "clt", "spd"])
def test_dealt_gates_open_as_many_parts_as_before_among_those_alive(name: str) -> None:
    target = make_tiny(2)
    replacement = SPDReplacement(target, decomposition(target)) if name == "spd" else CODED[name]()
    own, dealt = (Attack(target, replacement, some_tokens(4), deltas=False, dealt=dealt) for dealt in (False, True))
    fired = own.firing()
    for key, order in dealt.start.dealt.items():
        assert order.sort().values.equal(torch.arange(len(order))) and not order.equal(torch.arange(len(order)))
        assert (fired[key][order] > 0).equal(fired[key] > 0)
        on = (torch.rand(5, len(order)) > 0.5).float()
        assert dealt.start.gates(key, on).sum(1).equal(on.sum(1)) and own.start.gates(key, on) is on
    assert dealt.ascent(dealt.start)[0] != own.ascent(own.start)[0]
