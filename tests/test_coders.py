"""Theorems about rules, SAEs, transcoders and cross-layer transcoders, on small random coders."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import clt
import config as c
import sparse_encode
from activation_store import ActivationBatch
from checkpoints import build_coder
from coder import ActivationStats, Coder, LayerCoder, codes_by_layer
from config import BatchTopK, CLTConfig, EncoderConfig, Gated, JumpReLU, Relu, SAEConfig, TopK, TrainConfig
from logs import Logger
from losses import fvu
from sae import SAES, BaseAutoencoder, BatchTopKSAE, VanillaSAE, build_sae
from sparse_ops import to_dense
from sparsity import jumprelu, new_encoder
from training import CoderRun, training_step
from transcoder import (
    TRANSCODERS,
    BatchTopKTranscoder,
    GatedTranscoder,
    JumpReLUTranscoder,
    TopKTranscoder,
    VanillaTranscoder,
    build_transcoder,
)

RULES = [Relu(l1=0.1), TopK(k=3), BatchTopK(k=3), JumpReLU(l0=0.01), Gated(l1=0.1)]
D, F, B = 8, 24, 32


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stats_of(x: Tensor, y: Tensor) -> ActivationStats:
    """Statistics of Float["layer batch d"] activations."""
    return ActivationStats(
        x_mean=x.mean(1),
        x_scale=D**0.5 / x.norm(dim=2).mean(1),
        y_mean=y.mean(1),
        y_scale=D**0.5 / y.norm(dim=2).mean(1),
        y_variance=(y - y.mean(1, keepdim=True)).square().sum(2).mean(1),
        n_tokens=x.shape[1],
    )


def data(layers: int = 1) -> tuple[Tensor, Tensor]:
    g = generator(1)
    return 3 * torch.randn(layers, B, D, generator=g) + 1, torch.randn(layers, B, D, generator=g) - 2


def transcoder(rule: c.Rule, skip: bool = False) -> torch.nn.Module:
    coder = build_transcoder(EncoderConfig(layer=0, d_in=D, d_out=D, d_dict=F, rule=rule, skip=skip), generator())
    coder.initialise(stats_of(*data()))
    return away_from_the_start(coder)


@torch.no_grad()
def away_from_the_start(coder: Coder) -> Coder:
    """Decoders that write something, gates and magnitudes that differ."""
    for W_dec in coder.decoders:
        W_dec.normal_(generator=generator(2))
    for name, parameter in coder.named_parameters():
        if name.endswith("_mag"):
            parameter.normal_(std=0.5, generator=generator(3))
    return coder


NAMES = [VanillaTranscoder, TopKTranscoder, BatchTopKTranscoder, JumpReLUTranscoder, GatedTranscoder]


@pytest.mark.parametrize(("rule", "cls"), list(zip(RULES, NAMES, strict=True)))
def test_the_class_bears_the_name_of_the_rule(rule: c.Rule, cls: type) -> None:
    assert type(build_transcoder(EncoderConfig(layer=0, d_in=D, d_out=D, d_dict=F, rule=rule), generator())) is cls


@pytest.mark.parametrize("rule", RULES)
def test_a_name_takes_no_other_rule(rule: c.Rule) -> None:
    sae = SAEConfig(layer=0, site="mlp_out", d_in=D, d_dict=F, rule=rule)
    transcoder = EncoderConfig(layer=0, d_in=D, d_out=D, d_dict=F, rule=rule)
    for config, classes in ((sae, SAES), (transcoder, TRANSCODERS)):
        others = [cls for rule_type, cls in classes.items() if rule_type is not type(rule)]
        assert len(others) == len(RULES) - 1 and issubclass(classes[type(rule)], LayerCoder)
        for cls in others:
            with pytest.raises(AssertionError, match=rf"{cls.__name__} is no coder of {type(rule).__name__}\("):
                cls(config, generator())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("training", [True, False])
def test_codes_are_what_the_rule_says(rule: c.Rule, training: bool) -> None:
    x, _ = data()
    coder = transcoder(rule).train(training)
    if isinstance(rule, BatchTopK):
        coder.calibrate([x[0]])
    pre = coder.encoder.pre_activations(x[0] * coder.x_scale)
    match rule:
        case Relu():
            expected = pre.relu()
        case JumpReLU(theta=theta):
            expected = pre * (pre > theta)
        case TopK(k):
            expected = pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1)
        case BatchTopK(k):
            smallest = pre.flatten().topk(k * B).values[-1]
            expected = pre.relu() * ((pre >= smallest) if training else (pre > coder.encoder.threshold))
        case Gated():
            encoder = coder.encoder
            W_mag = encoder.r_mag.exp()[:, None] * encoder.W_enc
            expected = (pre > 0) * (x[0] * coder.x_scale @ W_mag.T + encoder.b_mag).relu()
            assert ((pre > 0) != (expected > 0)).any() and not torch.equal(expected, pre.relu())
    dense = to_dense(coder.encode(x[0]))
    torch.testing.assert_close(dense, expected)


@pytest.mark.parametrize("rule", RULES)
def test_codes_are_the_same_with_their_penalty_and_without(rule: c.Rule) -> None:
    x, y = data()
    coder = transcoder(rule).train()
    codes, _ = coder.encode_with_penalty(x[0], y[0], torch.tensor(1.0))
    torch.testing.assert_close(to_dense(codes), to_dense(coder.encode(x[0])))


def test_threshold_code_ignores_neighbours() -> None:
    x, _ = data()
    coder = transcoder(BatchTopK(k=3))
    coder.calibrate([x[0]])
    coder.eval()
    together = to_dense(coder.encode(x[0]))
    alone = torch.cat([to_dense(coder.encode(row[None])) for row in x[0]])
    torch.testing.assert_close(together, alone)


def test_calibration_gives_the_trained_l0() -> None:
    x, _ = data()
    coder = transcoder(BatchTopK(k=3))
    coder.calibrate(list(x[0].split(8)))
    coder.eval()
    active = (to_dense(coder.encode(x[0])) > 0).sum().item()
    assert active == 3 * B - 1, f"{active=}: all the winners but the one that is the threshold itself"


@pytest.mark.parametrize("drift", [0.98, 1.02])
def test_one_batch_tells_where_the_next_has_its_winners(drift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-activations that shrink or grow by 2 % a batch, as in training: hardly a batch is multiplied out twice."""
    scans: list[int] = []
    scan = sparse_encode._UpperBounds.scan

    def counted(*args: object, **kwargs: object) -> object:
        scans.append(1)
        return scan(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(sparse_encode._UpperBounds, "scan", counted)
    encoder = new_encoder(16, 512, rule=BatchTopK(8), generator=generator()).train()
    for step in range(60):
        codes = encoder.encode(drift**step * torch.randn(512, 16, generator=generator(step)))
        encoder.update_statistics(codes)
    assert 60 <= len(scans) <= 66, f"{len(scans)} products for 60 batches"


def test_jumprelu_gradients_are_the_published_ones() -> None:
    pre = torch.tensor([[0.5], [1.02], [0.99], [2.0]], dtype=torch.float64, requires_grad=True)
    log_theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)  # θ = 1
    bandwidth = 0.1
    a, gate = jumprelu(pre, log_theta, bandwidth)
    grad_a = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    grad_gate = torch.full_like(grad_a, 7.0)
    torch.autograd.backward([a, gate], [grad_a, grad_gate])
    assert pre.grad is not None and log_theta.grad is not None
    torch.testing.assert_close(pre.grad, grad_a * torch.tensor([[0.0], [1], [0], [1]], dtype=torch.float64))
    inside = (2 + 7) + (3 + 7)  # the two pre-activations within ε/2 of θ; θ ∂/∂θ with θ = 1
    torch.testing.assert_close(log_theta.grad, torch.tensor([-inside / bandwidth], dtype=torch.float64))


@pytest.mark.parametrize("theta", [0.4, 0.1])  # ε/2 above zero, and below
def test_jumprelu_codes_carry_the_gradient_of_their_dense_twin(theta: float) -> None:
    """Also through entries just below θ: they write nothing, and yet the loss would change if θ fell below them."""
    x, y = data()
    rule = JumpReLU(l0=0.01, bandwidth=0.5, theta=theta)
    sparse, dense = transcoder(rule), transcoder(rule)
    codes, penalty = sparse.encode_with_penalty(x[0], y[0], torch.tensor(1.0))
    ((sparse.decode(codes) - y[0]).square().mean() + penalty).backward()
    encoder = dense.encoder
    pre = encoder.pre_activations(x[0] * dense.x_scale)
    a, gate = jumprelu(pre, encoder.log_theta, rule.bandwidth)
    below = ((encoder.log_theta.exp() - pre).relu() @ dense.W_dec.norm(dim=1)).mean()
    y_hat = (a @ dense.W_dec + dense.b_dec) / dense.y_scale
    ((y_hat - y[0]).square().mean() + rule.l0 * gate.sum(1).mean() + rule.preact * below).backward()
    assert ((pre < encoder.log_theta.exp()) & (pre > encoder.log_theta.exp() - rule.bandwidth / 2)).any()
    for (name, p), q in zip(sparse.named_parameters(), dense.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


def random_sae(rule: c.Rule) -> BaseAutoencoder:
    coder = build_sae(SAEConfig(layer=0, site="mlp_out", d_in=D, d_dict=F, rule=rule), generator())
    x, _ = data()
    coder.initialise(stats_of(x, x))
    return away_from_the_start(coder)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
def test_a_gated_coder_starts_as_a_relu_coder(kind: str) -> None:
    """Where magnitudes are the gates, a gated code is a rectified one."""
    outputs = []
    for rule in (Gated(l1=0.1), Relu(l1=0.1)):
        x, y = data(2 if kind == "clt" else 1)
        shape = {"d_in": D, "d_dict": F, "rule": rule}
        configs = {
            "sae": SAEConfig(layer=0, site="mlp_out", **shape),
            "transcoder": EncoderConfig(layer=0, d_out=D, **shape),
            "clt": CLTConfig(layers=(0, 1), d_out=D, **shape),
        }
        coder = build_coder(configs[kind], generator())
        coder.initialise(stats_of(x, y))
        outputs.append([to_dense(own) for own in codes_by_layer(coder.encode(x if kind == "clt" else x[0]))])
    assert all((a > 0).any() for a in outputs[0])
    torch.testing.assert_close(*outputs)


def published_gated_loss(p: dict[str, Tensor], x: Tensor, scale: Tensor, variance: float, l1: float) -> Tensor:
    """Gated SAEs (arXiv 2404.16014), appendix's pseudo-code, with our weights: FVU, and ‖W_dec‖ inside the penalty."""
    W_gate, b_gate, W_dec, b_dec = p["encoder.W_enc"], p["encoder.b_enc"], p["W_dec"], p["b_dec"]
    centred = x * scale - b_dec
    gate = centred @ W_gate.T + b_gate
    W_mag = p["encoder.r_mag"].exp()[:, None] * W_gate
    f = (gate > 0) * (centred @ W_mag.T + p["encoder.b_mag"]).relu()

    def unexplained(x_hat: Tensor) -> Tensor:
        return (x_hat / scale - x).square().sum(1).mean() / variance

    via_gate = unexplained(gate.relu() @ W_dec.detach() + b_dec.detach())
    sparsity = (gate.relu() * W_dec.norm(dim=1)).sum(1).mean()
    return unexplained(f @ W_dec + b_dec) + l1 * sparsity + via_gate


def test_a_gated_training_step_is_the_published_one(tmp_path: Path) -> None:
    """Loss, gradients, and the weights after a step, against plain autograd in float64."""
    x, _ = data()
    coder = random_sae(Gated(l1=0.03)).train()
    coder.constrain_weights()
    twin = {name: p.detach().double().requires_grad_() for name, p in coder.named_parameters()}
    expected = published_gated_loss(twin, x[0].double(), coder.x_scale.double(), 5.0, 0.03)
    expected.backward()
    codes, penalty = coder.encode_with_penalty(x[0], x[0], torch.tensor(5.0))
    (fvu(x[0], coder.reconstruct(codes, x[0]), torch.tensor(5.0)) + penalty).backward()
    for name, parameter in coder.named_parameters():
        says = lambda m, name=name: f"{name}: {m}"  # noqa: E731
        torch.testing.assert_close(parameter.grad.double(), twin[name].grad, rtol=1e-4, atol=1e-5, msg=says)
    coder.zero_grad()
    optimiser = torch.optim.Adam(coder.parameters(), lr=1e-2)
    student = CoderRun("", coder, [0], torch.tensor(5.0), optimiser, Logger("gated", tmp_path, {}), 1e-2)
    loss, _, _ = training_step(student, ActivationBatch(x, x), config=TrainConfig(tokens=1, lr=1e-2), lr=1e-2)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    W_dec = twin["W_dec"]
    W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec.detach()
    torch.nn.utils.clip_grad_norm_(twin.values(), 1.0)
    torch.optim.Adam(twin.values(), lr=1e-2).step()
    W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
    for name, parameter in coder.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), twin[name].detach(), rtol=1e-4, atol=1e-5)


def test_the_frozen_decoder_learns_nothing_from_the_gates() -> None:
    """Nor a skip, nor magnitudes; an SAE's b_dec takes part in its input alone. What was trained is trained again after."""
    (x, y), (x3, y3), gated = data(), data(3), Gated(l1=0.0)
    one, three = torch.tensor(2.0), torch.full((3,), 2.0)
    for coder, inputs, targets, variance in (
        (transcoder(gated), x[0], y[0], one),
        (transcoder(gated, skip=True), x[0], y[0], one),
        (random_sae(gated), x[0], x[0], one),
        (random_clt(gated), x3, y3, three),
    ):
        coder.encode_with_penalty(inputs, targets, variance)[1].backward()
        taught = {
            name.rpartition(".")[2] for name, p in coder.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert taught == {"W_enc", "b_enc"} | ({"b_dec"} if coder.config.kind == "sae" else set()), f"{taught=}"
        assert all(p.requires_grad for p in coder.parameters())


def test_a_gates_step_passes_no_gradient() -> None:
    x, y = data()
    coder = transcoder(Gated(l1=0.1)).train()
    codes, _ = coder.encode_with_penalty(x[0], y[0], torch.tensor(1.0))
    fvu(y[0], coder.decode(codes), torch.tensor(1.0)).backward()
    assert coder.encoder.b_enc.grad is None and coder.encoder.b_mag.grad.abs().sum() > 0


def test_transcoder_starts_at_the_mean() -> None:
    x, y = data()
    coder = build_transcoder(EncoderConfig(layer=0, d_in=D, d_out=D, d_dict=F, rule=TopK(3), skip=True), generator())
    coder.initialise(stats_of(x, y))
    torch.testing.assert_close(coder(x[0]).y_hat, y.mean(1).expand(B, D))


def test_transcoder_sees_scaled_inputs() -> None:
    """Training on data in other units gives the same coder but for the scales."""
    x, y = data()
    plain, scaled = (
        build_transcoder(EncoderConfig(layer=0, d_in=D, d_out=D, d_dict=F, rule=TopK(3)), generator()) for _ in range(2)
    )
    plain.initialise(stats_of(x, y))
    scaled.initialise(stats_of(x * 100, y / 7))
    for coder in (plain, scaled):
        with torch.no_grad():
            coder.W_dec.normal_(generator=generator(2))
    torch.testing.assert_close(scaled(x[0] * 100).y_hat, plain(x[0]).y_hat / 7)


def test_skip_adds_an_affine_map() -> None:
    x, _ = data()
    coder, bare = transcoder(TopK(3), skip=True), transcoder(TopK(3))
    with torch.no_grad():
        coder.W_skip.normal_(generator=generator(3))
    expected = bare(x[0]).y_hat + (x[0] * coder.x_scale) @ coder.W_skip.T / coder.y_scale
    torch.testing.assert_close(coder(x[0]).y_hat, expected)


@pytest.mark.parametrize("rule", RULES)
def test_one_layer_clt_is_a_transcoder(rule: c.Rule) -> None:
    x, y = data()
    one = clt.CrossLayerTranscoder(CLTConfig(layers=(5,), d_in=D, d_out=D, d_dict=F, rule=rule), generator())
    one.initialise(stats_of(x, y))
    away_from_the_start(one)
    coder = transcoder(rule)
    torch.testing.assert_close(one(x).y_hat[0], coder(x[0]).y_hat)
    variance = torch.full((1,), 2.0)
    penalties = [
        one.encode_with_penalty(x, y, variance)[1],
        coder.encode_with_penalty(x[0], y[0], variance[0])[1],
    ]
    torch.testing.assert_close(*penalties)


def random_clt(rule: c.Rule, layers: int = 3) -> clt.CrossLayerTranscoder:
    coder = clt.CrossLayerTranscoder(
        CLTConfig(layers=tuple(range(layers)), d_in=D, d_out=D, d_dict=F, rule=rule), generator()
    )
    coder.initialise(stats_of(*data(layers)))
    return away_from_the_start(coder)


@pytest.mark.parametrize("rule", RULES)
def test_clt_decodes_layer_by_layer_as_it_does_at_once(rule: c.Rule) -> None:
    x, _ = data(3)
    coder = random_clt(rule)
    codes = coder.encode(x)
    by_layer = torch.stack([coder.decode_layer(j, codes[: j + 1]) for j in range(3)])
    torch.testing.assert_close(by_layer, coder.decode(codes))


def test_clt_never_writes_backwards() -> None:
    x, _ = data(3)
    coder = random_clt(TopK(3))
    before = coder(x).y_hat
    x[2] += torch.randn(B, D, generator=generator(4))
    after = coder(x).y_hat
    assert torch.equal(before[:2], after[:2]) and not torch.allclose(before[2], after[2])


def test_constrained_sae_step_keeps_unit_rows_and_moves_tangentially() -> None:
    x, _ = data()
    sae = build_sae(SAEConfig(layer=0, site="mlp_out", d_in=D, d_dict=F, rule=BatchTopK(3)), generator())
    assert type(sae) is BatchTopKSAE
    sae.initialise(stats_of(x, x))
    before = sae.W_dec.detach().clone()
    optimiser = torch.optim.SGD(sae.parameters(), lr=10.0)
    (sae(x[0]).y_hat - x[0]).square().mean().backward()
    sae.constrain_gradients()
    along = (sae.W_dec.grad * before).sum(1)
    torch.testing.assert_close(along, torch.zeros(F), atol=1e-6, rtol=0)
    optimiser.step()
    sae.constrain_weights()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    assert not torch.equal(sae.W_dec, before)


def test_sae_starts_tied() -> None:
    sae = build_sae(SAEConfig(layer=0, site="mlp_out", d_in=D, d_dict=F, rule=Relu(0.1)), generator())
    assert type(sae) is VanillaSAE and torch.equal(sae.W_dec, sae.encoder.W_enc)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))


def test_counters_tell_the_dead_and_survive_a_round_trip() -> None:
    x, _ = data()
    coder = transcoder(TopK(1))
    for _ in range(3):
        coder.encoder.update_statistics(coder.encode(x[0]))
    fired = (to_dense(coder.encode(x[0])) > 0).any(0)
    assert torch.equal(coder.encoder.tokens_since_fired, torch.where(fired, 0, 3 * B))
    coder.count_dead(3 * B)
    assert coder.n_dead == (~fired).sum() and coder.dead_fraction(3 * B) == pytest.approx((~fired).float().mean())
    other = build_transcoder(coder.config, generator(9))
    other.load_state_dict(coder.state_dict())
    assert torch.equal(other.encoder.tokens_since_fired, coder.encoder.tokens_since_fired)


def test_forward_leaves_statistics_alone() -> None:
    x, _ = data()
    coder = transcoder(BatchTopK(3))
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    coder(x[0])
    assert all(torch.equal(value, before[name]) for name, value in coder.state_dict().items())


@pytest.mark.parametrize("make", [lambda: transcoder(TopK(3)), lambda: random_clt(TopK(3), 1)])
def test_aux_reaches_dead_latents_with_negative_pre_activations(make: object) -> None:
    x, _ = data()
    coder = make()  # type: ignore[operator]
    encoder = coder.encoders[0]
    with torch.no_grad():
        encoder.b_enc[:4] -= 1000
    encoder.tokens_since_fired[:4] = 10
    coder.count_dead(10)
    inputs = x if isinstance(coder, clt.CrossLayerTranscoder) else x[0]
    coder.aux_reconstruction(inputs, 10).square().sum().backward()
    assert (encoder.W_enc.grad[:4].norm(dim=1) > 0).all() and (encoder.W_enc.grad[4:] == 0).all()


def test_l1_is_weighted_by_decoder_norms() -> None:
    x, y = data()
    coder = transcoder(Relu(l1=0.1))
    codes, penalty = coder.encode_with_penalty(x[0], y[0], torch.tensor(1.0))
    torch.testing.assert_close(penalty, 0.1 * (to_dense(codes) @ coder.W_dec.norm(dim=1)).mean())


def test_k_above_the_dictionary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k=99 exceeds d_dict=24"):
        build_transcoder(EncoderConfig(layer=0, d_in=D, d_out=D, d_dict=F, rule=BatchTopK(k=99)), generator())


@pytest.mark.parametrize("rule", RULES)
def test_configurations_round_trip(rule: c.Rule) -> None:
    for config in (
        EncoderConfig(layer=1, d_in=D, d_out=D, d_dict=F, rule=rule),
        SAEConfig(layer=0, site="mlp_out", d_in=D, d_dict=F, rule=rule),
        CLTConfig(layers=(0, 1), d_in=D, d_out=D, d_dict=F, rule=rule),
    ):
        assert c.from_json(c.to_json(config)) == config
