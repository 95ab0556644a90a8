"""Theorems about AuxK: it is bounded, it reaches dead latents alone, and it wakes those that sleep."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from activation_store import ActivationBatch
from clt import CrossLayerTranscoder
from coder import ActivationStats, Coder
from config import BatchTopK, CLTConfig, EncoderConfig, Gated, JumpReLU, Relu, Rule, SAEConfig, TopK, TrainConfig
from losses import auxk, fvu
from sae import build_sae
from sparsity import SparseEncoder, new_encoder
from training import CoderRun, dead_after, schedule, training_step
from transcoder import build_transcoder

D, F, B, SILENT = 16, 64, 256, 1000
KINDS = ["transcoder", "skip", "sae", "clt"]
RULES = [Relu(l1=0.02), TopK(4), BatchTopK(4), JumpReLU(l0=0.01, theta=0.5), Gated(l1=0.02)]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n: int = B, seed: int = 1) -> ActivationBatch:
    """x = 2 z + 1 of two layers and y = relu(x M), with the same M for every seed."""
    M = torch.randn(2, D, D, generator=g(0))
    x = 2 * torch.randn(2, n, D, generator=g(seed)) + 1
    return ActivationBatch(x, (x @ M).relu())


def coder_of(kind: str, rule: Rule, d_dict: int) -> Coder:
    """Of layer 0; a CLT of both layers."""
    if kind == "sae":
        return build_sae(SAEConfig(layer=0, site="mlp_out", d_in=D, d_dict=d_dict, rule=rule), g())
    if kind == "clt":
        return CrossLayerTranscoder(CLTConfig(layers=(0, 1), d_in=D, d_out=D, d_dict=d_dict, rule=rule), g())
    config = EncoderConfig(layer=0, d_in=D, d_out=D, d_dict=d_dict, rule=rule, skip=kind == "skip")
    return build_transcoder(config, g())


def run_of(kind: str, rule: Rule, d_dict: int = F) -> CoderRun:
    """A fresh coder with what its training owns, but for a logger."""
    coder, (x, y) = coder_of(kind, rule, d_dict), batch_of(4096)
    rows = [0, 1] if kind == "clt" else [0]
    x_scale, y_scale = (D**0.5 / side.norm(dim=2).mean(1) for side in (x, y))
    variance = (y - y.mean(1, keepdim=True)).square().sum(-1).mean(1)
    stats = coder.stats_of(ActivationStats(x.mean(1), x_scale, y.mean(1), y_scale, variance, 4096), rows)
    coder.initialise(stats)
    optimiser = torch.optim.Adam(coder.parameters(), lr=0.0, fused=True)
    return CoderRun("", coder.train(), rows, coder.variance(stats), optimiser, None, 1e-2)  # type: ignore[arg-type]


@torch.no_grad()
def put_to_sleep(coder: Coder, n: int, *, depth: float, decoder: float) -> None:
    """The first n latents of every encoder far below zero and silent, with decoder rows of a length (an SAE's keep 1)."""
    for encoder, W_dec in zip(coder.encoders, coder.decoders):
        encoder.b_enc[:n] -= depth
        encoder.tokens_since_fired[:n] = SILENT
        if coder.config.kind != "sae":
            W_dec[:n] = decoder * torch.randn(W_dec[:n].shape, generator=g(3)) / W_dec.shape[1] ** 0.5
    coder.count_dead(SILENT)


def gradients_of_a_step(run: CoderRun, aux: float) -> dict[str, Tensor]:
    """Of training_step's whole loss, as the optimiser gets them; the coder stays as it was."""
    found: dict[str, Tensor] = {}
    state = {name: value.clone() for name, value in run.coder.state_dict().items()}
    handle = run.optimiser.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in run.coder.named_parameters()})
    )
    config = TrainConfig(tokens=1, lr=0.0, aux=aux, dead_after=SILENT, max_grad_norm=1e9)
    training_step(run, batch_of(), config=config, lr=0.0)
    handle.remove()
    run.coder.load_state_dict(state)
    return found


def total_norm(gradients: dict[str, Tensor]) -> float:
    return torch.cat([grad.flatten() for grad in gradients.values()]).norm().item()


# ------------------------------------------------------------------------------------------------------------ the loss


class Case(NamedTuple):
    y: Tensor
    y_hat: Tensor
    e_hat: Tensor


def cases() -> list[Case]:
    """ê of any length and direction: none, short, many times the residual, along it, against it."""
    y, y_hat, noise = torch.randn(3, 2, B, D, generator=g(5))
    e = y - y_hat
    return [Case(y, y_hat, e_hat) for e_hat in (0 * e, 0.1 * noise, 100 * noise, 0.5 * e, 7 * e, -3 * e)]


VARIANCE = torch.tensor([0.5, 4.0])


@pytest.mark.parametrize("case", cases())
def test_auxk_lies_between_zero_and_the_fvu(case: Case) -> None:
    aux = auxk(case.y, case.y_hat, e_hat=case.e_hat, variance=VARIANCE)
    error = fvu(case.y, case.y_hat, VARIANCE)
    assert aux.shape == (2,) and (aux >= 0).all() and (aux <= error * (1 + 1e-6)).all(), f"{aux=} {error=}"


@pytest.mark.parametrize("case", cases())
def test_at_no_token_does_auxk_pull_harder_at_e_hat_than_the_fvu_at_y_hat(case: Case) -> None:
    y_hat, e_hat = case.y_hat.clone().requires_grad_(), case.e_hat.clone().requires_grad_()
    (pull,) = torch.autograd.grad(auxk(case.y, y_hat, e_hat=e_hat, variance=VARIANCE).sum(), e_hat)
    (main,) = torch.autograd.grad(fvu(case.y, y_hat, VARIANCE).sum(), y_hat)
    assert (pull.norm(dim=-1) <= main.norm(dim=-1) * (1 + 1e-5)).all()


def test_auxk_is_the_least_error_over_all_shortenings() -> None:
    """Against a grid of α, token by token; the gradient is that of the least error (envelope theorem)."""
    y, y_hat, noise = torch.randn(3, 1, B, D, generator=g(5)).double()
    e_hat, one = (2 * noise + (y - y_hat)).requires_grad_(), torch.ones(1).double()
    alphas = torch.linspace(0, 1, 2001).double()[:, None, None, None]
    grid = (y - y_hat - alphas * e_hat.detach()).square().sum(-1).amin(0).sum()
    aux = auxk(y, y_hat, e_hat=e_hat, variance=one).sum()
    torch.testing.assert_close(aux.detach() * B, grid, atol=0, rtol=1e-5, check_dtype=False)
    (pull,) = torch.autograd.grad(aux, e_hat)
    direction = torch.randn(e_hat.shape, generator=g(6)).double()
    moved = [auxk(y, y_hat, e_hat=e_hat + step * direction, variance=one).sum() for step in (1e-2, -1e-2)]
    torch.testing.assert_close((moved[0] - moved[1]) / 2e-2, (pull * direction).sum(), rtol=0.02, atol=1e-3)


def test_what_already_helps_best_is_not_pushed_further() -> None:
    """The gradient along ê is zero where α < 1: no dead latent is made longer, or shorter, than it helps."""
    y, y_hat, noise = torch.randn(3, 1, B, D, generator=g(5))
    e_hat = (5 * noise).requires_grad_()
    (pull,) = torch.autograd.grad(auxk(y, y_hat, e_hat=e_hat, variance=torch.ones(1)).sum(), e_hat)
    torch.testing.assert_close((pull * e_hat).sum(-1), torch.zeros(1, B), atol=1e-4, rtol=0)
    assert (pull.norm(dim=-1) > 0).any()


def test_auxk_with_nothing_written_is_the_fvu_and_pulls_towards_the_residual() -> None:
    y, y_hat = torch.randn(2, 1, B, D, generator=g(5))
    e_hat, variance = torch.zeros_like(y, requires_grad=True), torch.tensor([3.0])
    aux = auxk(y, y_hat, e_hat=e_hat, variance=variance)
    torch.testing.assert_close(aux, fvu(y, y_hat, variance))
    (pull,) = torch.autograd.grad(aux.sum(), e_hat)
    torch.testing.assert_close(pull, -2 * (y - y_hat) / (B * variance))


# ------------------------------------------------------------------------------------------------ what is held active


def sleeper(depth: float) -> SparseEncoder:
    """An encoder whose seven first latents are dead, all of them moved down by `depth`."""
    encoder = new_encoder(D, F, rule=TopK(4), generator=g())
    with torch.no_grad():
        encoder.b_enc -= depth
    encoder.tokens_since_fired[:7] = SILENT
    encoder.count_dead(SILENT)
    return encoder


X = torch.randn(500, D, generator=g(1))


@pytest.mark.parametrize("depth", [1000.0, 5.0, 0.0, -5.0])
def test_a_dead_latent_is_active_at_its_own_largest_tokens_and_never_negative(depth: float) -> None:
    encoder = sleeper(depth)
    a, dead = encoder.aux_activations(X, SILENT)
    assert sorted(dead.tolist()) == list(range(7)) and a.shape == (500, 7)
    pre = encoder.pre_activations(X)[:, dead]
    largest = pre.topk(6, dim=0)  # a hundredth of the tokens, and the next, which is lifted to zero
    assert (a >= 0).all() and (a > 0).sum(0).tolist() == [5] * 7
    lift = (-largest.values[-1]).clamp_min(0)
    expected = torch.zeros_like(pre).scatter(0, largest.indices[:-1], largest.values[:-1] + lift)
    torch.testing.assert_close(a, expected, atol=1e-3 if depth > 10 else 1e-5, rtol=0)


def test_the_lift_carries_no_gradient() -> None:
    """∂Σa/∂b_enc counts the tokens at which a latent is held active, however far it was lifted."""
    encoder = sleeper(20)
    encoder.aux_activations(X, SILENT)[0].sum().backward()
    assert encoder.b_enc.grad.tolist() == [5.0] * 7 + [0.0] * (F - 7)


def test_who_has_fired_since_the_last_count_is_left_out() -> None:
    encoder = sleeper(0)
    encoder.tokens_since_fired[3] = 0
    a, dead = encoder.aux_activations(X, SILENT)
    assert len(dead) == 7 and sorted(dead[(a > 0).any(0)].tolist()) == [0, 1, 2, 4, 5, 6]


def test_dead_means_a_tenth_of_a_short_run_and_ten_million_tokens_of_a_long_one() -> None:
    assert [dead_after(n) for n in (300_000, 100_000_000, 500_000_000)] == [30_000, 10_000_000, 10_000_000]


def test_in_a_clt_only_the_layers_that_have_dead_latents_are_taught() -> None:
    run = run_of("clt", TopK(4))
    run.coder.encoders[1].tokens_since_fired[:6] = SILENT
    run.coder.count_dead(SILENT)
    assert run.coder.n_dead == 6 and run.coder.aux_reconstruction(batch_of().inputs, SILENT).shape == (2, B, D)
    without, taught = (gradients_of_a_step(run, aux) for aux in (0.0, 1.0))
    added = {name: taught[name] - without[name] for name in ("W_dec.0", "W_dec.1")}
    assert (added["W_dec.1"][:6].norm(dim=1) > 0).all()
    assert (added["W_dec.1"][6:] == 0).all() and (added["W_dec.0"] == 0).all()


# ------------------------------------------------------------------------------------------------------- a whole step


@every_kind
@every_rule
def test_a_step_adds_auxk_to_the_dead_and_leaves_all_else_alone(kind: str, rule: Rule) -> None:
    """gradient(aux) − gradient(0) = aux · ∂ FVU(y, ŷ + αê), by plain autograd, and zero for all but dead latents."""
    run = run_of(kind, rule)
    coder, (x, y) = run.coder, run.coder.view(*batch_of(), run.rows)
    with torch.no_grad():
        for encoder in coder.encoders:
            encoder.b_enc -= 2  # under every rule a fresh SAE writes too little and not too much
    put_to_sleep(coder, 6, depth=20, decoder=0.3)
    without, once, twice = (gradients_of_a_step(run, aux) for aux in (0.0, 0.7, 1.4))
    codes, _ = coder.encode_with_penalty(x, y, run.variance)
    e, e_hat = (y - coder.reconstruct(codes, x)).detach(), coder.aux_reconstruction(x, SILENT)
    square = e_hat.square().sum(-1, keepdim=True)
    alpha = torch.where(square > 0, (e * e_hat).sum(-1, keepdim=True) / square, 1.0).clamp(0, 1).detach()
    coder.zero_grad()
    ((e - alpha * e_hat).square().sum(-1).mean(-1) / run.variance).mean().backward()
    coder.constrain_gradients()
    reached = 0.0
    for name, parameter in coder.named_parameters():
        added = once[name] - without[name]
        expected = 0.7 * (torch.zeros_like(added) if parameter.grad is None else parameter.grad)
        torch.testing.assert_close(added, expected, atol=2e-6, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(twice[name] - without[name], 2 * added, atol=4e-6, rtol=1e-3)
        of_latents = "b_dec" not in name and "W_skip" not in name
        assert added[6 if of_latents else 0 :].abs().max() == 0, name
        reached += added.norm().item()
    assert reached > 0


@every_kind
@pytest.mark.parametrize("depth", [0.5, 20.0, 1000.0])
def test_latents_that_fell_silent_with_grown_decoders_do_not_rule_the_step(kind: str, depth: float) -> None:
    """The failing case: with signed pre-activations the term was up to depth² times the FVU."""
    run = run_of(kind, BatchTopK(4))
    put_to_sleep(run.coder, 16, depth=depth, decoder=4.0)
    without, with_aux = (gradients_of_a_step(run, aux) for aux in (0.0, 1.0))
    assert total_norm(with_aux) < 4 * total_norm(without)
    loss, error, _ = training_step(run, batch_of(), config=TrainConfig(tokens=1, lr=0.0, dead_after=SILENT), lr=0.0)
    assert loss <= 2 * error * (1 + 1e-5), "loss exceeds twice the FVU"


def awake_after_training(kind: str, rule: Rule, aux: float) -> list[int]:
    """Of 64 latents five standard deviations below zero, decoders zero where norms are free, those that fired since."""
    run, steps = run_of(kind, rule, d_dict=128), 90
    config = TrainConfig(tokens=1, lr=0.0, aux=aux, dead_after=SILENT)
    put_to_sleep(run.coder, 64, depth=5, decoder=0.0)
    for step in range(steps):
        rate = 1e-2 * schedule(step, steps, config)
        training_step(run, batch_of(seed=10 + step), config=config, lr=rate)
        run.coder.count_dead(SILENT)
    return [int((encoder.tokens_since_fired[:64] < steps * B).sum()) for encoder in run.coder.encoders]


@every_kind
def test_sleeping_latents_wake(kind: str) -> None:
    """Nearly all do, and next to none without AuxK."""
    alone, taught = (awake_after_training(kind, BatchTopK(4), aux) for aux in (0.0, 1.0))
    assert max(alone) <= 8 and min(taught) >= 56, f"{alone=} {taught=}"


@every_rule
def test_sleeping_latents_wake_under_every_rule(rule: Rule) -> None:
    alone, taught = (awake_after_training("transcoder", rule, aux) for aux in (0.0, 1.0))
    assert max(alone) <= 8 and min(taught) >= 56, f"{alone=} {taught=}"
