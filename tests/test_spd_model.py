"""Theorems about components, gates, masks, routing and adversaries."""

import dataclasses
import sys
from collections import Counter

import pytest
import torch
from recovered import dense_error, identity_error, importance_errors, permute_to_identity, recovery
from torch import nn
from transformers.pytorch_utils import Conv1D

import spd_gates
from config import (
    GateConfig,
    Lp,
    Recon,
    SPDConfig,
    SPDTrainConfig,
    from_json,
    to_json,
)
from losses import annealed, faithfulness, importance_cost, kl_divergence, mean_kl
from spd_gates import lower, upper
from spd_masks import Mask, PersistentSources, pgd_sources, route_subset, routed, source_masks, stochastic_masks
from spd_model import ComponentModel
from spd_training import SPDTrainer, train_spd
from toy_models import TMS, TOYS, ToyBatches

C = 12
KINDS = [
    GateConfig(kind="mlp", hidden=(5,)),
    GateConfig(kind="mlp", hidden=(5, 4)),
    GateConfig(kind="vector_mlp", hidden=(5,)),
    GateConfig(kind="shared_mlp", hidden=(5,)),
    GateConfig(kind="global_shared_mlp", hidden=(5,)),
    GateConfig(kind="global_shared_transformer", hidden=(16,), d_model=8, blocks=2, heads=2, causal=True),
    GateConfig(kind="global_shared_transformer", hidden=(16,), d_model=8, blocks=2, heads=2, causal=False),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Small(nn.Module):
    """An embedding, a linear map with bias, and transformers' transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.fc, self.proj = nn.Embedding(11, 6), nn.Linear(6, 10), Conv1D(7, 10)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator(7))
            p.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.relu(self.fc(self.wte(tokens))))


def small(gate: GateConfig = KINDS[3]) -> ComponentModel:
    return ComponentModel(Small(), SPDConfig(components=(("wte", C), ("fc", C), ("pr*", C)), gate=gate), generator())


TOKENS = torch.arange(20).view(2, 10) % 11


@pytest.mark.parametrize("gate", KINDS, ids=lambda g: f"{g.kind}{len(g.hidden)}{'c' if g.causal else 'b'}")
def test_all_masks_one_and_delta_one_are_the_target(gate: GateConfig) -> None:
    model = small(gate)
    inputs, clean = model.inputs_capture(TOKENS)
    z = model.importance_logits(inputs)
    assert {path: t.shape for path, t in z.items()} == dict.fromkeys(model.paths, (2, 10, C))
    ones = {path: Mask(torch.ones_like(t), torch.ones(2, 10)) for path, t in z.items()}
    torch.testing.assert_close(model.run_masked(ones, TOKENS), clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.target_model(TOKENS), clean, atol=0, rtol=0)  # hooks are gone
    model.start_faithful()
    closed = {path: Mask(t.components, None) for path, t in ones.items()}
    torch.testing.assert_close(model.run_masked(closed, TOKENS), clean, atol=1e-3, rtol=1e-3)


def test_masked_linear_is_its_definition() -> None:
    """y = (h ⊙ m) U + m_Δ · x Δ + b, with Δ formed."""
    model = small()
    inputs, _ = model.inputs_capture(TOKENS)
    for path in ("fc", "proj"):
        x, part, delta = inputs[path], model.components[path], model.deltas()[path]
        m, d = torch.rand(2, 10, C), torch.rand(2, 10)
        slow = (x @ part.V * m) @ part.U + d[..., None] * (x @ delta) + part.bias
        module = model.target_model.get_submodule(path)
        with model.masked({path: m}, {path: d}):
            torch.testing.assert_close(module(x), slow, atol=1e-5, rtol=1e-5)
        with model.masked({path: m}):
            torch.testing.assert_close(module(x), (x @ part.V * m) @ part.U + part.bias)


def test_causal_gates_cannot_see_the_future_and_bidirectional_ones_do() -> None:
    changed = TOKENS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    for gate in KINDS:
        model = small(gate)
        before, after = (model.importance_logits(model.inputs_capture(t)[0])["fc"][:, :-1] for t in (TOKENS, changed))
        sees = not torch.allclose(before, after, atol=1e-6)
        assert sees == (gate.kind == "global_shared_transformer" and not gate.causal), gate


def test_lower_sigmoid_gradients_are_those_of_the_table() -> None:
    z = torch.tensor([-1.0, -1.0, 0.5, 0.5, 2.0, 2.0], requires_grad=True)
    g = lower(z)
    g.backward(torch.tensor([3.0, -3.0, 3.0, -3.0, 3.0, -3.0]))
    assert g.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    torch.testing.assert_close(z.grad, torch.tensor([0.0, -0.03, 3.0, -3.0, 0.0, 0.0]))
    z = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    upper(z).sum().backward()
    torch.testing.assert_close(upper(z).detach(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.01]))
    torch.testing.assert_close(z.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.01]))
    z = torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True)
    lower(z).backward(torch.tensor([3.0, -3.0, 3.0, -3.0]))
    torch.testing.assert_close(z.grad, torch.tensor([0.0, -0.03, 3.0, -3.0]))


def test_masks_stay_between_importance_and_one_and_follow_their_generator() -> None:
    g = {"a": torch.rand(3, 50, C), "b": torch.zeros(3, 50, C)}
    one, two = stochastic_masks(g, generator(1)), stochastic_masks(g, generator(1))
    for path, mask in one.items():
        assert (mask.components >= g[path] - 1e-7).all() and (mask.components <= 1 + 1e-7).all()
        assert torch.equal(mask.components, two[path].components) and torch.equal(mask.delta, two[path].delta)
    assert abs(one["b"].components.mean() - 0.5) < 0.02
    given = source_masks(g, {path: torch.ones(1, 1, C + 1) for path in g})
    torch.testing.assert_close(given["a"].components, torch.ones(3, 50, C))


def test_subset_routing_draws_every_count_equally_and_unrouted_positions_are_original() -> None:
    paths = ["a", "b", "c"]
    routing = route_subset(paths, (6000,), generator())
    counts = Counter(sum(routing.values()).int().tolist())
    assert set(counts) == {1, 2, 3} and all(abs(n - 2000) < 150 for n in counts.values())
    assert all(abs(r.mean() - 2 / 3) < 0.03 for r in routing.values())
    model = small()
    inputs, clean = model.inputs_capture(TOKENS)
    g = {path: model.lower(z) for path, z in model.importance_logits(inputs).items()}
    nowhere = routed(stochastic_masks(g, generator()), {path: torch.zeros(2, 10) for path in g})
    torch.testing.assert_close(model.run_masked(nowhere, TOKENS), clean, atol=1e-5, rtol=1e-5)


def test_pgd_never_lowers_its_objective() -> None:
    model = small()
    inputs, clean = model.inputs_capture(TOKENS)
    g = {path: model.lower(z).detach() for path, z in model.importance_logits(inputs).items()}

    def objective(r: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model.run_masked(source_masks(g, r), TOKENS) - clean).square().mean()

    for seed in range(5):
        start = {path: torch.rand(1, 1, C + 1, generator=generator(seed)) for path in g}
        for steps, size in ((1, 1.0), (5, 0.3)):
            best = pgd_sources(objective, start, steps, size)
            assert objective(best) >= objective(start)
            assert all((r >= 0).all() and (r <= 1).all() for r in best.values())
    persistent = PersistentSources(model.sizes, (), 0.01, (0.5, 0.99), generator())
    before = objective(persistent.sources()).item()
    for _ in range(20):
        persistent.ascend(objective(persistent.sources()))
    assert objective(persistent.sources()).item() > before


@pytest.mark.parametrize("neighbour", [0.0, 1.0, 100.0])
def test_each_seed_of_a_stack_keeps_its_own_best_iterate(neighbour: float) -> None:
    """Seed 0 starts nearest to its best, 0.5, and can only step over it; seed 1 rises with each step, however loudly."""

    def objective(r: dict[str, torch.Tensor]) -> torch.Tensor:
        first, second = r["a"][:, 0, 0]
        return torch.stack([-((first - 0.5) ** 2), neighbour * second])

    best = pgd_sources(objective, {"a": torch.full((2, 1, 1), 0.45)}, 3, 0.2)
    expected = [0.45, 1.0 if neighbour else 0.45]
    torch.testing.assert_close(best["a"].flatten(), torch.tensor(expected))


@pytest.mark.parametrize("source", ["pgd", "persistent"])
def test_adversaries_of_a_seed_ignore_its_neighbour(source: str) -> None:
    """Seed 0's masks are the same beside a neighbour whose weights, gates and data are a hundred times larger."""
    term = Recon(coefficient=1.0, source=source, steps=3, step_size=0.9)
    config = SPDTrainConfig(steps=10, lr=1e-3, recon=(term,), minimality=Lp(coefficient=0.0))
    masks = []
    for loud in (False, True):
        model, x = toy_model(), next(ToyBatches(TOYS["tms_5-2"], 2, 64, 0))
        if loud:
            x[1] *= 100
            for p in [*model.parameters(), *model.target_model.parameters()]:
                p.data[1] *= 100
        trainer = SPDTrainer(model, config, False)
        z, clean = trainer.importances(x)
        g_lo = {path: model.lower(logit) for path, logit in z.items()}
        masks.append(trainer.masks(0, term, g_lo, clean, x))
    for path, quiet in masks[0].items():
        torch.testing.assert_close(masks[1][path].components[0], quiet.components[0])
        torch.testing.assert_close(masks[1][path].delta[0], quiet.delta[0])
        assert not torch.equal(masks[1][path].components[1], quiet.components[1])


def test_chunked_kl_is_kl_with_its_gradient() -> None:
    p, q = torch.randn(3, 7, 13), torch.randn(3, 7, 13, requires_grad=True)
    slow = kl_divergence(p, q).mean()
    (slow_grad,) = torch.autograd.grad(slow, q)
    fast = mean_kl(p, q, rows=4)
    (2 * fast).backward()
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(q.grad, 2 * slow_grad)


def test_losses_on_numbers() -> None:
    assert faithfulness({"a": torch.full((2, 3), 2.0), "b": torch.zeros(4, 1)}).item() == pytest.approx(24 / 10)
    g = torch.tensor([[0.0, 1.0], [0.0, 0.25]])
    at_half = importance_cost(g, Lp(coefficient=1.0, p=(0.5, 0.5)), 0.3)
    assert at_half.mean(0).tolist() == pytest.approx([0.0, 0.75], abs=1e-4)
    assert [annealed((2, 0.4), (0.25, 0.75), t) for t in (0, 0.25, 0.5, 1)] == pytest.approx([2, 2, 1.2, 0.4])


@pytest.mark.parametrize("patterns, tied, says", [
    ((("nothing.*", 4),), (), "matches no module"),
    ((("fc", 4), ("f*", 4)), (), "matched twice"),
    ((("fc", 4), ("proj", 5)), (("fc", "proj"),), "same C"),
    ((("fc", 4), ("proj", 4)), (("fc", "proj"),), "not transposes"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(patterns: tuple, tied: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        ComponentModel(Small(), SPDConfig(components=patterns, gate=KINDS[3], tied=tied), generator())
    assert "\n" not in str(error.value)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="C=0"):
        SPDConfig(components=(("fc", 0),), gate=KINDS[0])
    with pytest.raises(ValueError, match="LayerNorm"):
        ComponentModel(nn.Sequential(nn.LayerNorm(3)), SPDConfig(components=(("0", 2),), gate=KINDS[0]), generator())
    with pytest.raises(ValueError, match="unknown gate"):
        GateConfig(kind="oracle", hidden=(3,))  # type: ignore[arg-type]


def test_configurations_round_trip() -> None:
    config = SPDConfig(components=(("fc", C),), gate=KINDS[5], tied=(("a", "b"),))
    train = SPDTrainConfig(
        steps=5,
        lr=1e-3,
        recon=(Recon(coefficient=1.0, source="pgd", routing="subset", steps=2, step_size=0.1),),
        minimality=Lp(coefficient=1e-3, p=(2.0, 0.4)),
        clip=0.01,
    )
    assert from_json(to_json(config)) == config and from_json(to_json(train)) == train


# ------------------------------------------------------------------------------------------------------------- toys


def toy_model(stack: int = 2, kind: GateConfig = KINDS[0]) -> ComponentModel:
    W = torch.randn(stack, 2, 5, generator=generator(3))
    target = TMS(W, torch.zeros(stack, 5), 0).requires_grad_(False)
    config = SPDConfig(components=(("linear1", 8), ("linear2", 8)), gate=kind, tied=(("linear1", "linear2"),))
    return ComponentModel(target, config, generator(4))


def test_stacked_seeds_train_as_each_would_alone() -> None:
    """Gradients of a stack of two are those of its members."""
    both = toy_model()
    x = next(ToyBatches(TOYS["tms_5-2"], 2, 64, 0))
    config = SPDTrainConfig(
        steps=10,
        lr=1e-3,
        recon=(Recon(coefficient=1.0, source="ones"), Recon(coefficient=1.0, source="importance", routing="layerwise")),
        minimality=Lp(coefficient=1e-2, p=(1.0, 1.0)),
    )

    def gradients(model: ComponentModel, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        trainer, kept = SPDTrainer(model, config, False), {}
        trainer.optimiser.step = lambda: kept.update({n: p.grad.clone() for n, p in model.named_parameters()})
        trainer.step(batch)
        return kept

    stacked = gradients(both, x)
    for i in range(2):
        one = toy_model()
        target = TMS(both.target_model.linear1.weight[i : i + 1], torch.zeros(1, 5), 0).requires_grad_(False)
        one = ComponentModel(target, both.config, generator())
        one.load_state_dict({k: v[i : i + 1] for k, v in both.state_dict().items()})
        for name, grad in gradients(one, x[i : i + 1]).items():
            torch.testing.assert_close(grad[0], stacked[name][i], atol=1e-6, rtol=1e-4)


def test_rational_gelu_and_its_slope() -> None:
    u = torch.linspace(-20, 20, 40_001, dtype=torch.float64).requires_grad_()
    exact = torch.nn.functional.gelu(u)
    (exact_slope,) = torch.autograd.grad(exact.sum(), u)
    gelu, slope = spd_gates._gelu_and_slope(u.detach().float())
    assert ((gelu - exact).abs() / (1 + u.abs())).max() < 3e-7  # a few roundings of u
    assert (slope - exact_slope).abs().max() < 5e-7


def test_compiled_gate_is_the_eager_one_with_its_gradients(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Its two passes, uncompiled here to save the compiler's seconds, on a stack and on (batch, position)."""
    monkeypatch.setattr(spd_gates, "_compiled", lambda function: function)
    for model, inputs in ((toy_model(), (torch.randn(2, 7, 5),)), (small(KINDS[0]), (TOKENS,))):
        grads = []
        for compiled in (False, True):
            if compiled:
                model.importances.compile_gates()
            model.zero_grad()
            z = model.importance_logits(model.inputs_capture(*inputs)[0])
            sum((t * t.detach().sin()).sum() for t in z.values()).backward()
            grads.append({**z, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
        assert grads[0].keys() == grads[1].keys()
        for name in grads[0]:
            torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-5, rtol=1e-4)


def test_gates_run_uncompiled_where_there_is_no_compiler(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    model = toy_model()
    monkeypatch.setenv("CXX", "no-such-compiler")
    model.importances.compile_gates()
    assert not any(gate.compiled for gate in model._ci_fns.values())
    said = capsys.readouterr().err
    assert "no C++ compiler 'no-such-compiler'" in said and said.count("\n") == 1
    monkeypatch.setenv("CXX", sys.executable)
    model.importances.compile_gates()
    assert all(gate.compiled for gate in model._ci_fns.values())


@pytest.mark.parametrize("gate", KINDS, ids=lambda g: f"{g.kind}{len(g.hidden)}{'c' if g.causal else 'b'}")
def test_a_decompositions_tensors_are_its_components_and_its_gates(gate: GateConfig) -> None:
    """Under the names that Goodfire's checkpoints know; the gates are those of `importances`."""
    model = small(gate)
    prefix = "_ci_fns." if gate.local else "_global_ci_fn."
    gates = {name: value for name, value in model.state_dict().items() if not name.startswith("_components.")}
    assert gates.keys() == model.importances.state_dict().keys() and all(name.startswith(prefix) for name in gates)
    assert sum(value.numel() for value in gates.values()) == model.importances.n_parameters(model.paths)
    if gate.local:
        assert {name.split(".")[1] for name in gates} == {"wte", "fc", "proj"}
    shapes = [p.data_ptr() for p in model.double().importances.parameters()]
    assert shapes == [p.data_ptr() for name, p in model.named_parameters() if name in gates]


def test_another_gate_serves_the_same_components() -> None:
    """Tensors shared, not copied; as from the start with that gate."""
    own, gate = small(KINDS[3]), KINDS[5]
    other = own.with_gate(gate, generator())
    assert other.config == dataclasses.replace(own.config, gate=gate)
    for path, part in own.components.items():
        assert other.components[path] is part
    fresh = small(gate)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in other.state_dict().items())


def test_tied_components_share_their_tensors() -> None:
    model = toy_model()
    parts = model.components
    assert torch.equal(parts["linear2"].V, parts["linear1"].U.mT)
    assert torch.equal(parts["linear2"].U, parts["linear1"].V.mT)
    torch.testing.assert_close(model.deltas()["linear2"], model.deltas()["linear1"].mT)


def test_resumed_training_ends_bit_identical(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recon = (
        Recon(coefficient=1.0),
        Recon(coefficient=0.5, source="pgd", routing="subset", steps=1, step_size=0.5),
        Recon(coefficient=0.5, source="persistent", routing="all", steps=1, step_size=0.01),
    )
    config = SPDTrainConfig(
        steps=6,
        lr=1e-2,
        recon=recon,
        minimality=Lp(coefficient=1e-3),
        faithful_steps=3,
        checkpoint_every=3,
        metrics_every=2,
    )

    def batches() -> ToyBatches:
        return ToyBatches(TOYS["tms_5-2"], 2, 16, 0)

    straight = toy_model()
    train_spd(straight, batches(), config, tmp_path / "a", "a")

    class Cut(ToyBatches):
        left = 4

        def __next__(self) -> torch.Tensor:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().__next__()

    interrupted = toy_model()
    with pytest.raises(KeyboardInterrupt):
        train_spd(interrupted, Cut(TOYS["tms_5-2"], 2, 16, 0), config, tmp_path / "b", "b")
    resumed = toy_model()
    train_spd(resumed, batches(), config, tmp_path / "b", "b")
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    (tmp_path / "b" / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated"):
        train_spd(toy_model(), batches(), config, tmp_path / "b", "b")


def test_minimality_and_reconstruction_fall_in_training() -> None:
    """Both fall, from gates that stand half open; without its term, minimality would rise."""
    model = toy_model()
    for gate in (model.importances.gate(path) for path in model.paths):
        nn.init.constant_(gate.layers[-1].b, 0.5)
    config = SPDTrainConfig(
        steps=60, lr=1e-2, recon=(Recon(coefficient=1.0),), minimality=Lp(coefficient=0.01, p=(1.0, 1.0))
    )
    trainer = SPDTrainer(model, config, False)
    trainer.warm_up()
    batches = ToyBatches(TOYS["tms_5-2"], 2, 256, 0)
    first, *_, last = [trainer.step(next(batches)) for _ in range(60)]
    (_, recon, minimality), (_, recon_last, minimality_last) = first[:3].tolist(), last[:3].tolist()
    assert recon_last < 0.5 * recon, f"{recon=} {recon_last=}"
    assert minimality_last < 0.4 * minimality, f"{minimality=} {minimality_last=}"


def test_perfect_decompositions_score_perfectly() -> None:
    """Component c holds feature c's weights: MMCS = ML2R = 1; an identity of importances has no error."""
    model = toy_model()
    with torch.no_grad():
        part, W = model.components["linear1"], model.target_model.linear1.weight
        part.V.zero_()
        part.V[:, :, :5] = torch.eye(5)
        part.U[:, :5] = W.mT
    on = torch.zeros(2, 5, model.sizes["linear1"])
    on[:, torch.arange(5), torch.arange(5)] = 1
    for importances in ({"linear1": on}, None):
        for score in recovery(TOYS["tms_5-2"], model, importances):
            torch.testing.assert_close(score, torch.ones(2))
    g = torch.zeros(5, 8)
    g[torch.arange(5), torch.tensor([3, 1, 7, 0, 2])] = 1
    assert identity_error(g, 0.1) == 0 and torch.equal(permute_to_identity(g)[:, :5], torch.eye(5))
    g[0, 5], g[4, 2] = 0.15, 0.85
    assert identity_error(g, 0.1) == 2 and identity_error(g, 0.2) == 0
    dense = torch.zeros(5, 8)
    dense[:, [2, 6]] = 0.95
    assert dense_error(dense, 2, 0.1) == 0 and dense_error(dense, 1, 0.1) == 5 and dense_error(dense, 3, 0.1) == 1
    assert importance_errors(TOYS["tms_5-2"], {"linear1": g[None], "linear2": g[None]}, 0.1) == [4]


def test_a_component_without_importance_counts_for_nothing() -> None:
    """A feature's own direction at a component that is never used: 0 for that feature, though it lies there."""
    model = toy_model()
    with torch.no_grad():
        part, W = model.components["linear1"], model.target_model.linear1.weight
        part.V.zero_()
        part.V[:, :, :5] = torch.eye(5)
        part.U[:, :5] = W.mT
    on = torch.zeros(2, 5, model.sizes["linear1"])
    on[0, torch.arange(4), torch.arange(4)] = 1  # of the first seed, all features but the last
    mmcs, ml2r = recovery(TOYS["tms_5-2"], model, {"linear1": on})
    torch.testing.assert_close(mmcs, torch.tensor([0.8, 0.0]))
    torch.testing.assert_close(ml2r, torch.tensor([0.8, 0.0]))


def test_random_directions_in_two_dimensions_are_near_to_any() -> None:
    """The null of MMCS is high where there are few dimensions; that of ML2R is not."""
    mmcs, ml2r = recovery(TOYS["tms_5-2"], toy_model(), None)
    assert mmcs.max() > 0.9 and (mmcs > 0.5).all() and (ml2r < 0.5).all()


def test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    model = toy_model()
    with torch.no_grad():
        model.components["linear1"].V.fill_(torch.nan)
    config = dataclasses.replace(
        SPDTrainConfig(steps=3, lr=1e-2, recon=(Recon(coefficient=1.0),), minimality=Lp(coefficient=3e-3)),
        metrics_every=1,
        faithful_steps=1,
    )
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        train_spd(model, ToyBatches(TOYS["tms_5-2"], 2, 16, 0), config, tmp_path, "nan")
