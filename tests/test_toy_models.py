"""A folded ResidMLP is the unfolded one: outputs, losses and gradients, in float64."""

import dataclasses

import pytest
import torch
from folded import FoldedDecomposition

from config import GateConfig, Lp, Recon, SPDConfig, SPDTrainConfig
from spd_masks import stochastic_masks
from spd_model import ComponentModel
from spd_training import SPDTrainer
from toy_models import TOYS, ToyBatches, train_target


@pytest.fixture(autouse=True)
def float64():  # type: ignore[no-untyped-def]
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pair(layers: int, gate: GateConfig) -> tuple[ComponentModel, ComponentModel, torch.Tensor]:
    """(unfolded, folded, batch) of one small ResidMLP: the same initial parameters."""
    toy = dataclasses.replace(TOYS["resid_2"], features=6, width=4, layers=layers, steps=2, batch=8)
    target, config = (
        train_target(toy, 2, 0),
        SPDConfig(components=(("layers.*.mlp_in", 5), ("layers.*.mlp_out", 5)), gate=gate),
    )
    plain, folded = (
        cls(target, config, torch.Generator().manual_seed(1)) for cls in (ComponentModel, FoldedDecomposition)
    )
    return plain, folded, next(ToyBatches(toy, 2, 300, 3))


def test_a_folded_target_is_the_unfolded_one() -> None:
    plain, _, x = pair(3, GateConfig(kind="mlp", hidden=(3,)))
    torch.testing.assert_close(plain.target_model.folded(x), plain.target_model(x))


@pytest.mark.parametrize("kind", ["mlp", "shared_mlp"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_folded_decomposition_is_the_unfolded_one(layers: int, kind: str) -> None:
    """Clean outputs, importances, outputs under any subset of masks with Δ open or closed, losses, gradients, steps."""
    plain, folded, x = pair(layers, GateConfig(kind=kind, hidden=(3,)))
    (inputs, clean), (folded_inputs, folded_clean) = plain.inputs_capture(x), folded.inputs_capture(x)
    torch.testing.assert_close(folded_clean, clean)
    z, folded_z = plain.importance_logits(inputs), folded.importance_logits(folded_inputs)
    for path in plain.paths:
        torch.testing.assert_close(folded_z[path], z[path])
    masks = stochastic_masks({path: plain.lower(t) for path, t in z.items()}, torch.Generator())
    for chosen in (plain.paths, *[[path] for path in plain.paths], plain.paths[1:]):
        for some in (
            {path: masks[path] for path in chosen},
            {path: masks[path]._replace(delta=None) for path in chosen},
        ):
            torch.testing.assert_close(folded.run_masked(some, x), plain.run_masked(some, x))
    recon = (
        Recon(coefficient=1.0),
        Recon(coefficient=0.7, routing="layerwise"),
        Recon(coefficient=2.0, source="pgd", routing="subset", steps=1, step_size=1.0),
    )
    config, steps = SPDTrainConfig(steps=9, lr=1e-3, recon=recon, minimality=Lp(coefficient=1e-3)), []
    for model in (plain, folded):
        trainer = SPDTrainer(model, config, False)
        trainer.optimiser.step = lambda: None
        trainer.optimiser.zero_grad = lambda set_to_none: None
        readings = trainer.step(x)
        steps.append({"readings": readings, **{name: p.grad for name, p in model.named_parameters()}})
    assert steps[0].keys() == steps[1].keys()
    for name, value in steps[0].items():
        torch.testing.assert_close(steps[1][name], value, atol=1e-12, rtol=1e-8)


def test_two_steps_of_a_folded_decomposition_are_those_of_the_unfolded_one() -> None:
    """What a step multiplied out is forgotten by the next."""
    plain, folded, x = pair(2, GateConfig(kind="mlp", hidden=(3,)))
    losses = []
    for model in (plain, folded):
        trainer = SPDTrainer(
            model,
            SPDTrainConfig(
                steps=9,
                lr=1e-2,
                recon=(Recon(coefficient=1.0), Recon(coefficient=1.0, routing="layerwise")),
                minimality=Lp(coefficient=1e-3),
            ),
            False,
        )
        losses.append(torch.stack([trainer.step(x)[:3] for _ in range(3)]))
    torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=1e-7)


@pytest.mark.parametrize("name", ["tms_5-2", "resid_1"])
def test_active_draws_are_all_draws_without_the_empty_ones(name: str) -> None:
    """How often each feature fires, and pairs of neighbours: p / P and p² / P, P = 1 − (1 − p)ⁿ the share of active draws."""
    toy, n = TOYS[name], 400_000 if name == "tms_5-2" else 100_000
    on = next(ToyBatches(toy, 2, n, 3, active=True)) != 0
    assert on.any(-1).all()
    p, draws = toy.probability, 2 * n
    share = 1 - (1 - p) ** toy.features
    for found, expected in ((on, p / share), (on[..., 1:] & on[..., :-1], p * p / share)):
        spread = (expected / draws) ** 0.5
        assert (found.double().mean((0, 1)) - expected).abs().max() < 5 * spread
