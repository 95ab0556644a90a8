"""Theorems about SPD under the ruler's protocols, on small random decompositions."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from small import (
    C_DOWN,
    C_FC,
    LOCAL,
    VOCAB,
    D,
    H,
    clean,
    decomposition,
    each_by_itself,
    make_tiny,
    run,
    some_tokens,
    the,
)
from torch import Tensor

from adversary import Attack, prepared
from config import GateConfig, SPDConfig
from evaluation import evaluate
from patching import after
from spd_model import ComponentModel
from spd_replacement import SPDReplacement
from target_models import TargetModel

SCALAR = GateConfig(kind="mlp", hidden=(4,))
GLOBAL = GateConfig(kind="global_shared_mlp", hidden=(16,))
ATTENDING = GateConfig(kind="global_shared_transformer", hidden=(16,), d_model=16, blocks=1, heads=2, causal=True)
GATES = [LOCAL, SCALAR, GLOBAL, ATTENDING]


@pytest.mark.parametrize("gate", GATES)
def test_all_components_with_delta_are_the_target(gate: GateConfig) -> None:
    target, tokens = make_tiny(2), some_tokens()
    spd = SPDReplacement(target, decomposition(target, gate), top_k=max(C_FC, C_DOWN), delta=True)
    for p in evaluate(target, [spd], each_by_itself(tokens)).points:
        assert abs(p.ce_degradation) < 1e-4 and p.fvu == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_axes_of_spd_are_those_of_the_table(gate: GateConfig) -> None:
    """Per MLP L0_fc + L0_down; parameters Σ L0_fc (d_in + d_h) + L0_down (d_h + d_out); the gate's beside them."""
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target, gate)
    measured = evaluate(target, [SPDReplacement(target, model, top_k=5)], each_by_itself(tokens))
    for protocol in ("frozen", "free"):
        p = the(measured, "spd-topk", protocol, (0, 1))
        assert (p.l0, p.l0_p95, p.l0_per_mlp, p.active_params) == (5, 5, 10, 2 * 2 * 5 * (D + H))
        assert p.gate_params == model.importances.n_parameters(model.paths) and p.k == 5
    single = the(measured, "spd-topk", "single", (1,))
    assert single.active_params == 2 * 5 * (D + H)
    own = sum(p.numel() for name, p in model.named_parameters() if "_ci_fns.h-1" in name)
    assert single.gate_params == (own if gate.local else model.importances.n_parameters(model.paths))
    assert {d.module for d in measured.layers} == {"c_fc", "down_proj"}


def test_thresholds_and_variants_are_named_and_counted() -> None:
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    variants = [
        SPDReplacement(target, model), SPDReplacement(target, model, threshold=0.5), SPDReplacement(target, model, delta=True),
        SPDReplacement(target, model, top_k=3, matrices=["c_fc"]),
    ]  # fmt: skip
    all_on, half, delta, fc = evaluate(target, variants, each_by_itself(tokens), ["frozen"]).points
    assert [p.method for p in (all_on, half, delta, fc)] == ["spd", "spd-0.5", "spd-delta", "spd-c_fc-topk"]
    assert half.l0 < all_on.l0 == delta.l0
    assert delta.active_params == pytest.approx(all_on.active_params + 2 * 2 * D * H)
    assert fc.active_params == 2 * (3 * (D + H) + D * H)  # down_proj stays whole
    assert (fc.l0, fc.l0_per_mlp) == (3, 3)


@pytest.mark.parametrize("gate", GATES)
def test_frozen_gates_come_from_the_clean_pass_and_free_ones_from_the_masked_stream(gate: GateConfig) -> None:
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target, gate)
    spd = SPDReplacement(target, model, top_k=4)
    with torch.inference_mode():
        inputs, _ = model.inputs_capture(tokens)
        z = model.importance_logits(inputs)
        captured = clean(target, tokens, [0, 1])
        frozen = spd.frozen(captured)
        masks = {path: spd.on(path, z[path]).float() for path in model.paths}
        with model.masked(masks):
            own = target.logits(tokens)
        got = run(target, tokens, frozen, [0, 1])
        free = spd.free(captured, lambda pass_: run(target, tokens, pass_, [0, 1]))
        run(target, tokens, free, [0, 1])
    # the ruler leaves first positions to the model, so compare what the masks are, then that they act
    for (layer, name), active in frozen.active.items():
        on = torch.zeros(tokens.numel(), model.sizes[f"h.{layer}.mlp.{name}"])
        on[active.rows, active.cols] = 1
        assert torch.equal(on.view(*tokens.shape, -1), masks[f"h.{layer}.mlp.{name}"])
    assert got.shape == own.shape == (*tokens.shape, VOCAB)
    if gate.local:  # no attention between positions: what follows differs through the model's attention alone
        z_free = model.importance_logits(free.inputs)
        for (layer, name), active in free.active.items():
            path = f"h.{layer}.mlp.{name}"
            on = spd.on(path, z_free[path]).flatten(0, 1).nonzero()
            assert torch.equal(on, torch.stack([active.rows, active.cols], 1))
    assert any(not torch.equal(free.active[key].cols, frozen.active[key].cols) for key in free.active)


def test_a_component_alone_writes_its_rank_one_map() -> None:
    target, tokens = make_tiny(1), some_tokens()
    model = decomposition(target)
    spd = SPDReplacement(target, model, top_k=1, matrices=["down_proj"])
    captured = clean(target, tokens, [0])
    pass_ = spd.frozen(captured)
    with torch.inference_mode():
        y_hat = pass_(0, captured.inputs[0], captured.outputs[0]).flatten(0, 1)
    h = target.hidden(0, captured.inputs[0]).flatten(0, 1)
    part = model.components["h.0.mlp.down_proj"]
    cols = pass_.active[0, "down_proj"].cols
    expected = (h * part.V.T[cols]).sum(1, keepdim=True) * part.U[cols]
    torch.testing.assert_close(y_hat, expected, atol=1e-5, rtol=1e-4)


def test_a_single_layer_of_a_decomposition_is_measured_with_a_gate_that_reads_all() -> None:
    target, tokens = make_tiny(3), some_tokens()
    for gate in (LOCAL, GLOBAL):
        spd = SPDReplacement(target, decomposition(target, gate), layers=[1])
        single, frozen, *_ = evaluate(target, [spd], each_by_itself(tokens)).points
        assert single.layers == (1,) and single.ce == frozen.ce


def test_bad_requests_are_refused() -> None:
    target, other = make_tiny(2), make_tiny(2)
    model = decomposition(target)
    with pytest.raises(AssertionError, match="another model"):
        SPDReplacement(other, model)
    with pytest.raises(ValueError, match="no matrix named"):
        SPDReplacement(target, model, matrices=["gate_proj"])


def decomposed_beyond(target: TargetModel, gate: GateConfig) -> ComponentModel:
    """Attention and embedding are decomposed too, as in Goodfire's runs, and a global gate reads them."""
    patterns = (("h.*.mlp.c_fc", C_FC), ("h.*.mlp.down_proj", C_DOWN), ("h.*.attn.?_proj", 6), ("wte", 5))
    config = SPDConfig(components=patterns, gate=gate)
    return ComponentModel(target.model, config, torch.Generator().manual_seed(0)).requires_grad_(False)


@pytest.mark.parametrize("gate", [GLOBAL, ATTENDING])
@torch.inference_mode()
def test_what_a_global_gate_reads_of_attention_follows_the_stream_in_free_alone(gate: GateConfig) -> None:
    target, tokens, layers = make_tiny(3), some_tokens(), range(3)
    model = decomposed_beyond(target, gate)
    spd = SPDReplacement(target, model, top_k=4)
    assert set(spd.watches) == {path for path in model.paths if ".mlp." not in path}
    captured = clean(target, tokens, layers, spd.watches)
    z = model.importance_logits(model.inputs_capture(tokens)[0])
    for opened in (spd.frozen(captured), spd.gated(captured)):
        for path in model.paths:
            torch.testing.assert_close(opened.z[path], z[path])
    own = {layer: captured.outputs[layer][:, :1] for layer in layers}  # first positions are left to the model

    def first_own(layer: int) -> Callable[..., Tensor]:
        return lambda _args, y: torch.cat([own[layer], y[:, 1:]], 1)

    masks = {path: spd.on(path, z[path]).float() for path in model.paths if ".mlp." in path}
    with model.masked(masks), contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(after(target.model.get_submodule(f"h.{layer}.mlp"), first_own(layer)))
        masked_inputs, _ = model.inputs_capture(tokens)
    expected = model.importance_logits(masked_inputs)
    free = spd.free(captured, lambda pass_: run(target, tokens, pass_, layers))
    for path in model.paths:
        torch.testing.assert_close(free.z[path], expected[path], atol=1e-4, rtol=1e-4)
    clean_attention = model.importance_logits(masked_inputs | {p: captured.modules[p] for p in spd.watches})
    assert any(not torch.allclose(clean_attention[path], expected[path], atol=1e-2) for path in masks)


def test_a_gate_that_reads_attention_is_measured_under_every_protocol_and_attacked() -> None:
    target, tokens = make_tiny(2), some_tokens()
    model = decomposed_beyond(target, ATTENDING)
    whole = SPDReplacement(target, model, top_k=max(C_FC, C_DOWN), delta=True)
    spd = SPDReplacement(target, model, top_k=3)
    exact, *_ = evaluate(target, [whole], each_by_itself(tokens), ["free"]).points
    assert abs(exact.ce_degradation) < 1e-4
    points = evaluate(target, [spd], each_by_itself(tokens)).points
    assert [p.protocol for p in points] == ["single", "single", "frozen", "gates", "free"]
    assert {p.gate_params for p in points} == {model.importances.n_parameters([])}
    rungs, _ = Attack(target, spd, tokens, deltas=False).run(prepared(target, spd, tokens), ladder=(0, 2))
    assert rungs[1].attacked.kl.mean() >= rungs[0].attacked.kl.mean() > 0
