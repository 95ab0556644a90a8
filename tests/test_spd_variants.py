"""Theorems about SPD under its mask variants, on small random decompositions."""

import pytest
import torch
from small import C_DOWN, C_FC, LOCAL, D, H, clean, decomposition, each_by_itself, make_tiny, run, some_tokens, the
from torch import Tensor, nn

from checkpoints import Decomposition, TrainingRecord
from config import GateConfig
from evaluation import evaluate
from replacement import Pass
from spd_model import ComponentModel
from spd_replacement import SPDReplacement
from spd_variants import VARIANTS, SPDVariant, VariantName, spd_variants
from target_models import TargetModel

GLOBAL = GateConfig(kind="global_shared_mlp", hidden=(16,))
GATES = [LOCAL, GLOBAL]
LAYERS = [0, 1]
RANDOM: list[VariantName] = ["stochastic", "random"]


def logits(target: TargetModel, replacement: SPDReplacement, tokens: Tensor, protocol: str = "gated") -> Tensor:
    captured = clean(target, tokens, replacement.reads)

    def forward(pass_: Pass) -> Tensor:
        return run(target, tokens, pass_, LAYERS)

    if protocol == "free":
        return forward(replacement.free(captured, forward))
    return forward(getattr(replacement, protocol)(captured))


def with_gates(model: ComponentModel, monkeypatch: pytest.MonkeyPatch, z: float | None) -> None:
    """Every importance becomes clamp(z, 0, 1), or 0 or 1 by the sign of the gate's own logit."""
    own = model.importance_logit
    monkeypatch.setattr(
        model, "importance_logit",
        lambda path, x: 2 * own(path, x).sign() if z is None else torch.full_like(own(path, x), z),
    )  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
def test_unmasked_with_delta_is_the_target(gate: GateConfig) -> None:
    target, tokens = make_tiny(2), some_tokens()
    spd = SPDVariant(target, decomposition(target, gate), "unmasked", delta=True)
    for p in evaluate(target, [spd], each_by_itself(tokens)).points:
        assert p.method == "spd-unmasked-delta"
        assert abs(p.ce_degradation) < 1e-4 and p.fvu == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("protocol", ["frozen", "gated", "free"])
def test_unmasked_is_every_component_at_full_strength(protocol: str) -> None:
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    every = SPDReplacement(target, model, top_k=max(C_FC, C_DOWN))
    got = logits(target, SPDVariant(target, model, "unmasked"), tokens, protocol)
    assert torch.equal(got, logits(target, every, tokens, protocol))


def test_zero_writes_only_biases() -> None:
    target, tokens = make_tiny(2), some_tokens()
    generator = torch.Generator().manual_seed(3)
    for block in target.model.h:
        block.mlp.c_fc.bias = nn.Parameter(torch.randn(H, generator=generator))
        block.mlp.down_proj.bias = nn.Parameter(torch.randn(D, generator=generator))
    captured = clean(target, tokens, LAYERS)
    pass_ = SPDVariant(target, decomposition(target), "zero").gated(captured)
    with torch.inference_mode():
        for layer in LAYERS:
            y_hat = pass_(layer, captured.inputs[layer], captured.outputs[layer])
            bias = target.model.h[layer].mlp.down_proj.bias
            assert torch.equal(y_hat, bias.expand_as(y_hat))


def test_importance_is_rounded_where_every_importance_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    soft, rounded = SPDVariant(target, model, "importance"), SPDReplacement(target, model)
    apart = [logits(target, r, tokens, "free") for r in (soft, rounded)]
    assert not torch.allclose(*apart), "importances of their own lie between"
    with_gates(model, monkeypatch, None)
    for protocol in ("frozen", "gated", "free"):
        assert torch.equal(logits(target, soft, tokens, protocol), logits(target, rounded, tokens, protocol))


def test_stochastic_under_importances_of_1_is_unmasked_with_a_drawn_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its masks are 1; what it adds is a share of Δ, which in a decomposition without Δ is nothing."""
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    with_gates(model, monkeypatch, 1.0)
    stochastic, unmasked = (SPDVariant(target, model, name) for name in ("stochastic", "unmasked"))
    assert not torch.allclose(logits(target, stochastic, tokens), logits(target, unmasked, tokens)), "Δ is not 0"
    for path, delta in model.deltas().items():
        target.model.get_submodule(path).weight.data -= delta.mT
    torch.testing.assert_close(
        logits(target, stochastic, tokens), logits(target, unmasked, tokens), atol=1e-4, rtol=1e-4
    )


def test_stochastic_under_importances_of_0_is_random_but_for_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    with_gates(model, monkeypatch, 0.0)
    stochastic, random = (SPDVariant(target, model, name) for name in RANDOM)
    captured = clean(target, tokens, LAYERS)
    x = torch.ones(*tokens.shape, D)
    masks = [r.gated(captured)._mask(0, "c_fc", "h.0.mlp.c_fc", x) for r in (stochastic, random)]
    assert torch.equal(*masks), "both draw the same u"
    deltas = [r.gated(captured)._deltas(0) for r in (stochastic, random)]
    assert deltas[1] is None and {u.shape for u in deltas[0].values()} == {tokens.shape}


@pytest.mark.parametrize("name", RANDOM)
def test_masks_are_drawn_evenly_between_the_importance_and_1(name: VariantName) -> None:
    target, tokens = make_tiny(2), some_tokens(256)
    model = decomposition(target)
    captured, path = clean(target, tokens, LAYERS), "h.1.mlp.c_fc"
    pass_ = SPDVariant(target, model, name).gated(captured)
    m = pass_._mask(1, "c_fc", path, captured.inputs[1])
    g = model.lower(pass_.z[path]) if name == "stochastic" else torch.zeros_like(m)
    u = ((m - g) / (1 - g))[g < 0.5]
    assert m.min() > 0 and (m >= g).all() and m.max() <= 1 and len(u) > 10_000
    edges = torch.linspace(0, 1, 11)
    torch.testing.assert_close(torch.histogram(u, edges).hist / len(u), torch.full((10,), 0.1), atol=0.01, rtol=0)
    by_component = pass_.noise.uniform(path, 2).flatten(0, 1).T
    assert abs(torch.corrcoef(by_component)[0, 1]) < 0.1, "components are drawn apart"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_batch_has_the_same_numbers_and_another_others(name: VariantName, gate: GateConfig) -> None:
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target, gate)
    first, again, other = (SPDVariant(target, model, name, seed=seed) for seed in (0, 0, 1))
    for protocol in ("frozen", "gated", "free"):
        expected = logits(target, first, tokens, protocol)
        for replacement in (first, again):
            assert torch.equal(logits(target, replacement, tokens, protocol), expected)
        same = torch.equal(logits(target, other, tokens, protocol), expected)
        assert same == (name not in RANDOM)
    one, two = (first.gated(clean(target, some_tokens(seed=seed), LAYERS)).noise for seed in (1, 2))
    assert not torch.equal(one.uniform("a"), two.uniform("a")) and not torch.equal(one.uniform("a"), one.uniform("b"))


def test_every_variant_is_a_row_counted_by_the_components_that_run() -> None:
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    record = TrainingRecord.imported("made up", target.name)
    variants = spd_variants(target, Decomposition(model, record), LAYERS)
    measured = evaluate(target, [SPDReplacement(target, model), *variants], each_by_itself(tokens))
    gates, every = model.importances.n_parameters(model.paths), 2 * (C_FC + C_DOWN) * (D + H)
    for protocol in ("frozen", "gates", "free"):
        rows = {name: the(measured, f"spd-{name}", protocol, (0, 1)) for name in VARIANTS}
        rounded = the(measured, "spd", protocol, (0, 1))
        assert {name: p.l0_per_mlp for name, p in rows.items() if name != "importance"} == {
            "unmasked": C_FC + C_DOWN, "stochastic": C_FC + C_DOWN, "random": C_FC + C_DOWN, "zero": 0,
        }  # fmt: skip
        assert {name: p.active_params for name, p in rows.items() if name != "importance"} == {
            "unmasked": every, "stochastic": every + 2 * 2 * D * H, "random": every, "zero": 0,
        }  # fmt: skip
        if protocol != "free":  # the same clean pass decides
            assert (rows["importance"].l0, rows["importance"].active_params) == (rounded.l0, rounded.active_params)
        assert {name for name, p in rows.items() if p.gate_params == gates} == {"importance", "stochastic"}
        assert {name for name, p in rows.items() if p.gate_params is None} == {"unmasked", "random", "zero"}
    for name in ("unmasked", "random", "zero"):
        assert the(measured, f"spd-{name}", "gates", (0, 1)).ce == the(measured, f"spd-{name}", "free", (0, 1)).ce


def test_what_a_variant_cannot_mean_is_refused() -> None:
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    with pytest.raises(AssertionError, match="stochastic masks draw how much of Δ is open"):
        SPDVariant(target, model, "stochastic", delta=True)
    with pytest.raises(ValueError, match="spd-random: an adversary lets in what a gate keeps out"):
        SPDVariant(target, model, "random").attacked(clean(target, tokens, LAYERS), None)
