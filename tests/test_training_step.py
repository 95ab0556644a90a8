"""Theorems about a training step: all that it does is done again in float64, by plain autograd from the equations.

    loss = mean over targets of FVU + penalty + aux · AuxK
    step = project the gradient (SAE) → clip → Adam at the scheduled rate → renormalise (SAE)

The reference calls nothing of the project: it takes a coder's tensors and the numbers of its configuration.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain import Adam, clipped, norm
from small import F, each_by_itself, make_tiny, some_tokens, transcoders
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sparsity
from activation_store import ActivationBatch, ActivationsStore, DataConfig
from clt import CrossLayerTranscoder
from coder import ActivationStats, Coder
from coder_replacements import TranscoderReplacement
from config import BatchTopK, CLTConfig, EncoderConfig, Gated, JumpReLU, Relu, Rule, SAEConfig, TopK, TrainConfig
from evaluation import evaluate
from replacement import Origin
from sae import build_sae
from sparse_ops import to_dense
from target_models import TargetModel
from training import CoderRun, start_run, train_encoder, train_group, training_step
from transcoder import build_transcoder

D_IN, D_OUT, D_DICT, BATCH, N_LAYERS = 8, 6, 24, 20, 4
SPANNED = (0, 2, 3)  # layers of the CLT, among those of the store
DEAD_AFTER = 10**6

RULES: dict[str, Rule] = {
    "relu": Relu(l1=0.02),
    "topk": TopK(3),
    "batchtopk": BatchTopK(3),
    "jumprelu": JumpReLU(l0=0.03, bandwidth=0.5, preact=0.02),
    "gated": Gated(l1=0.02),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sae(rule: Rule) -> Coder:
    return build_sae(SAEConfig(layer=2, site="mlp_out", d_in=D_OUT, d_dict=D_DICT, rule=rule), generator())


def transcoder(rule: Rule, skip: bool = False) -> Coder:
    config = EncoderConfig(layer=2, d_in=D_IN, d_out=D_OUT, d_dict=D_DICT, rule=rule, skip=skip)
    return build_transcoder(config, generator())


def clt(rule: Rule) -> Coder:
    config = CLTConfig(layers=SPANNED, d_in=D_IN, d_out=D_OUT, d_dict=D_DICT, rule=rule)
    return CrossLayerTranscoder(config, generator())


KINDS: dict[str, Callable[[Rule], Coder]] = {
    "sae": sae, "transcoder": transcoder, "skip": lambda rule: transcoder(rule, skip=True), "clt": clt,
}  # fmt: skip


def activations(tokens: int, seed: int) -> ActivationBatch:
    """Random activations of every layer, of other scales and means in each."""
    g, layer = generator(seed), torch.arange(1.0, N_LAYERS + 1)[:, None, None]
    x = torch.randn(N_LAYERS, tokens, D_IN, generator=g) * layer + 0.5
    return ActivationBatch(x, 3 * torch.randn(N_LAYERS, tokens, D_OUT, generator=g) / layer + x[..., :D_OUT])


def statistics() -> ActivationStats:
    x, y = activations(2000, 100)
    x_scale, y_scale = (v.shape[-1] ** 0.5 / v.norm(dim=-1).mean(1) for v in (x, y))
    return ActivationStats(x.mean(1), x_scale, y.mean(1), y_scale, y.var(1, correction=0).sum(-1), 2000)


def begin(coder: Coder, config: TrainConfig, folder: Path) -> CoderRun:
    """A run as `_train` starts it, with the weights of a coder that has learnt for a while."""
    target = SimpleNamespace(site="mlp_out")
    store = SimpleNamespace(
        target=target, device=torch.device("cpu"), config=SimpleNamespace(layers=range(N_LAYERS)), stats=statistics()
    )
    run, g = start_run("coder", coder, store=store, config=config, folder=folder), generator(1)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in coder.named_parameters():
            p.normal_(-0.7 if name.endswith("log_theta") else 0.1, 0.4, generator=g)
        if coder.config.kind == "sae":
            coder.W_dec /= coder.W_dec.norm(dim=1, keepdim=True)
    return run


@torch.no_grad()
def put_to_sleep(coder: Coder, dead: list[list[int]]) -> None:
    """These have been silent for long, and every other one of them lies far below zero."""
    for encoder, own in zip(coder.encoders, dead):
        encoder.tokens_since_fired.fill_(7)
        encoder.tokens_since_fired[own] = DEAD_AFTER
        if (
            coder.config.kind != "sae"
        ):  # rounding alone would be left of such a row's gradient, which Adam makes a whole step
            encoder.b_enc[own[::2]] -= 5
    coder.count_dead(DEAD_AFTER)


# ----------------------------------------------------------------------------------------------------------- the reference


class Equations:
    """A coder's tensors in float64, one entry per layer spanned, and what the papers say of them."""

    def __init__(self, coder: Coder) -> None:
        self.config, self.n = coder.config, len(coder.encoders)
        self.p = {name: value.detach().double().requires_grad_() for name, value in coder.named_parameters()}
        several = coder.config.kind == "clt"
        self.W_dec = [self.p[f"W_dec.{i}" if several else "W_dec"] for i in range(self.n)]
        self.b_dec = self.p["b_dec"].view(self.n, 1, -1)
        self.prefix = [f"encoders.{i}." if several else "encoder." for i in range(self.n)]
        self.x_scale, self.y_scale = coder.x_scale.double()[:, None, None], coder.y_scale.double()[:, None, None]

    def of_encoder(self, name: str) -> list[Tensor]:
        return [self.p[prefix + name] for prefix in self.prefix]

    def written(self, codes: list[Tensor], W_dec: list[Tensor]) -> Tensor:
        """Σ_{i ≤ j} aⁱ W_dec^{i→j} of every target j, in raw units."""
        wide = [a @ W for a, W in zip(codes, W_dec)]
        parts = [[wide[i][:, (j - i) * D_OUT : (j - i + 1) * D_OUT] for i in range(j + 1)] for j in range(self.n)]
        return torch.stack([sum(part, torch.zeros(())) for part in parts]) / self.y_scale

    def reconstruction(self, codes: list[Tensor], x: Tensor, learns: bool = True) -> Tensor:
        """(Σ aⁱ W_dec^{i→j} + b_decʲ + W_skip x̃) / y_scale; with `learns` False, the decoder and the skip are constants."""
        own = (lambda p: p) if learns else torch.Tensor.detach
        y = self.written(codes, [own(W) for W in self.W_dec]) + own(self.b_dec) / self.y_scale
        return y + x * self.x_scale @ own(self.p["W_skip"]).T / self.y_scale if "W_skip" in self.p else y

    def encoded(self, x: Tensor, b_dec: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(x̃ W_encᵀ, x̃ W_encᵀ + b_enc) of every layer, where an SAE reads x̃ − b_dec."""
        read = x * self.x_scale - b_dec if self.config.kind == "sae" else x * self.x_scale
        linear = [of_layer @ W.T for of_layer, W in zip(read, self.of_encoder("W_enc"))]
        return linear, [own + b for own, b in zip(linear, self.of_encoder("b_enc"))]

    def loss(
        self, x: Tensor, y: Tensor, *, variance: Tensor, k: int, dead: list[list[int]], aux: float
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(loss, mean FVU, codes)."""
        linear, pre = self.encoded(x, self.b_dec)
        norms = [W.norm(dim=1) for W in self.W_dec]
        penalty, rule = torch.zeros((), dtype=torch.float64), self.config.rule
        if isinstance(rule, TopK):
            codes = [p.relu() * (p >= p.topk(k, 1).values[:, -1:]) for p in pre]
        elif isinstance(rule, BatchTopK):
            codes = [p.relu() * (p >= p.flatten().topk(k * BATCH).values[-1]) for p in pre]
        elif isinstance(rule, Relu):
            codes = [p.relu() for p in pre]
            penalty = rule.l1 * mean([(a * norm).sum(1).mean() for a, norm in zip(codes, norms)])
        elif isinstance(rule, JumpReLU):
            theta = [log.exp() for log in self.of_encoder("log_theta")]
            gate = [straight_through(p, t, rule.bandwidth) for p, t in zip(pre, theta)]
            codes = [p * (p > t) + t.detach() * (g - g.detach()) for p, t, g in zip(pre, theta, gate)]
            below = mean([((t - p).relu() * norm).sum(1).mean() for p, t, norm in zip(pre, theta, norms)])
            penalty = rule.l0 * mean([g.sum(1).mean() for g in gate]) + rule.preact * below
        else:
            gates = [p.relu() for p in pre]
            scaled = [
                r.exp() * own + b for r, own, b in zip(self.of_encoder("r_mag"), linear, self.of_encoder("b_mag"))
            ]
            codes = [magnitude.relu() * (g > 0) for magnitude, g in zip(scaled, gates)]
            penalty = rule.l1 * mean([(g * norm).sum(1).mean() for g, norm in zip(gates, norms)])
            penalty = penalty + fvu(y, self.reconstruction(gates, x, learns=False), variance)
        y_hat = self.reconstruction(codes, x)
        error = fvu(y, y_hat, variance)
        term = self.aux_term(x, y - y_hat.detach(), variance=variance, dead=dead)
        return error + penalty + aux * term, error, codes

    def aux_term(self, x: Tensor, e: Tensor, *, variance: Tensor, dead: list[list[int]]) -> Tensor:
        """Mean over targets of Σ‖e − αê‖² / (N · variance), e and α constants, α = e·ê / ‖ê‖² within [0, 1], 1 where ê = 0.

        ê is what the dead latents write, each at the hundredth of the tokens (one) where its pre-activation is largest, lifted
        by a constant, so that the next largest is not below zero. An SAE's b_dec is a constant too.
        """
        codes = []
        for own, latents in zip(self.encoded(x, self.b_dec.detach())[1], dead):
            of_dead, rank = own[:, latents], math.ceil(BATCH / 100)
            theta = of_dead.sort(0, descending=True).values[rank].detach()
            a = (of_dead - theta.clamp(max=0)) * (of_dead > theta)
            codes.append(torch.zeros_like(own).index_add(1, torch.tensor(latents), a))
        e_hat = self.written(codes, self.W_dec)
        square = e_hat.square().sum(2, keepdim=True)
        alpha = torch.where(square > 0, (e * e_hat).sum(2, keepdim=True) / square, 1.0).clamp(0, 1).detach()
        return fvu(e, alpha * e_hat, variance)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def fvu(y: Tensor, y_hat: Tensor, variance: Tensor) -> Tensor:
    return ((y - y_hat).square().sum((1, 2)) / (y.shape[1] * variance)).mean()


def straight_through(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """[pre > θ], with −1/ε as its derivative in θ within ε/2 of it."""
    kernel = ((pre - theta).abs() < bandwidth / 2).double().detach()
    return (pre > theta).double() - kernel * (theta - theta.detach()) / bandwidth


# ------------------------------------------------------------------------------------------------------------ a whole step


CONFIG = TrainConfig(tokens=1, lr=0.5, aux=0.25, betas=(0.8, 0.95), dead_after=DEAD_AFTER)
STEPS = [  # (rate, k, longest gradient, dead latents of each layer): few, then many
    (3e-3, 5, 0.01, [[2, 5, 11], [7], [1, 3]]),
    (1e-3, 2, 1e3, [[2, 5, 6, 11, 13, 17], [0, 7, 8, 9, 10, 20], [1, 3, 4, 19, 21]]),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_equations(kind: str, rule: str, tmp_path: Path) -> None:
    """Readings, the gradient and the rate that the optimiser got, and the parameters after it, in two steps."""
    run = begin(KINDS[kind](RULES[rule]), CONFIG, tmp_path)
    coder, reference, got = run.coder, Adam(CONFIG.betas), []
    run.optimiser.register_step_pre_hook(
        lambda optimiser, *_: got.append(
            ([p.grad.clone() for p in coder.parameters()], optimiser.param_groups[0]["lr"])
        )
    )
    for t, (lr, k, longest, dead) in enumerate(STEPS):
        batch, dead = activations(BATCH, t), dead[: len(coder.encoders)]
        put_to_sleep(coder, dead)
        if coder.k is not None:
            coder.set_k(k)
        rows = list(SPANNED) if kind == "clt" else [2]
        y = batch.targets[rows].double()
        x, variance = y if kind == "sae" else batch.inputs[rows].double(), statistics().y_variance[rows].double()
        equations = Equations(coder)
        loss, error, codes = equations.loss(x, y, variance=variance, k=k, dead=dead, aux=CONFIG.aux)
        g = dict(zip(equations.p, torch.autograd.grad(loss, list(equations.p.values()))))
        if kind == "sae":
            W = equations.W_dec[0].detach()
            g["W_dec"] = g["W_dec"] - (g["W_dec"] * W).sum(1, keepdim=True) * W
        assert (norm(g) > longest) == (t == 0), f"{norm(g)=} {longest=}"
        g = clipped(g, longest)
        after = reference(equations.p, g, lr)
        if kind == "sae":
            after["W_dec"] = after["W_dec"] / after["W_dec"].norm(dim=1, keepdim=True)
        readings = training_step(run, batch, config=dataclasses.replace(CONFIG, max_grad_norm=longest), lr=lr)
        l0 = mean([(a > 0).double().sum(1).mean() for a in codes])
        torch.testing.assert_close(readings.double(), torch.stack([loss, error, l0]).detach(), rtol=1e-5, atol=1e-6)
        assert len(got) == t + 1, "the optimiser takes one step"
        gradients, rate = got[t]
        assert rate == lr
        for (name, p), gradient in zip(coder.named_parameters(), gradients):
            size = g[name].abs().max().item()
            torch.testing.assert_close(gradient.double(), g[name], rtol=1e-4, atol=1e-5 * size, msg=f"gradient {name}")
            torch.testing.assert_close(p.detach().double(), after[name], rtol=1e-5, atol=1e-3 * lr, msg=name)
        for encoder, a, own in zip(coder.encoders, codes, dead):
            silent = torch.full((D_DICT,), 7).index_fill(0, torch.tensor(own), DEAD_AFTER) + BATCH
            assert torch.equal(encoder.tokens_since_fired, silent * (a <= 0).all(0))


# --------------------------------------------------------------------------------------------------- three steps of a run


DATA = DataConfig(layers=(0, 1), batch_tokens=32, buffer_tokens=256, model_batch=4)
RUN = TrainConfig(
    tokens=32 * 40, lr=8e-3, warmup=0.1, decay=0.2, anneal=0.25, metrics_every=5, calibration_tokens=96, dead_after=64
)  # 40 steps: the rate rises over 4 and falls over 8, k falls over 10


def wide(rule: Rule) -> Coder:
    return build_transcoder(EncoderConfig(layer=1, d_in=16, d_out=16, d_dict=48, rule=rule), generator())


class Seen:
    """What a run's encoder and optimiser were really given, step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encode: str) -> None:
        self.ks: list[int] = []
        self.inputs: list[Tensor] = []
        self.rates: list[float] = []
        original = getattr(sparsity, encode)

        def spy(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *rest: Tensor) -> object:
            self.ks.append(k)
            self.inputs.append(x.detach().clone())
            return original(x, W_enc, b_enc, k, *rest)

        monkeypatch.setattr(sparsity, encode, spy)

    def __enter__(self) -> "Seen":
        def keep(optimiser: torch.optim.Optimizer, *_: object) -> None:
            self.rates.append(optimiser.param_groups[0]["lr"])

        self.handle = register_optimizer_step_pre_hook(keep)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("rule", [TopK(4), BatchTopK(4)], ids=["topk", "batchtopk"])
def test_rate_and_k_of_a_run_rise_stay_and_fall(
    rule: TopK | BatchTopK, small_target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up, plateau and decay of the rate that Adam used; k from 4k to k as the encoder got it."""
    with Seen(monkeypatch, "encode_topk" if isinstance(rule, TopK) else "encode_batch_topk") as seen:
        train_encoder(wide(rule), small_target, data=DATA, config=RUN, folder=tmp_path)
    assert len(seen.rates) == 40
    assert [seen.rates[step] for step in (0, 3, 20, 39)] == pytest.approx([2e-3, 8e-3, 8e-3, 1e-3])
    assert [seen.ks[step] for step in (0, 5, 10, 39)] == [16, 10, 4, 4]


def test_the_threshold_is_set_on_the_text_after_the_last_batch(
    small_target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder is given 40 batches in training, then the next three, on which k latents are active on average."""
    with Seen(monkeypatch, "encode_batch_topk") as seen:
        checkpoint = train_encoder(wide(BatchTopK(4)), small_target, data=DATA, config=RUN, folder=tmp_path)
    store = ActivationsStore(small_target, DATA)
    batches = [next(store).inputs[1] for _ in range(43)]
    assert len(seen.inputs) == 43
    for step, (x, given) in enumerate(zip(batches, seen.inputs)):
        assert torch.equal(x * checkpoint.coder.x_scale, given), f"{step=}"
    active = to_dense(checkpoint.coder.encode(torch.cat(batches[40:]))) > 0
    assert active.sum() == pytest.approx(4 * 96, abs=1)


def test_a_run_counts_the_dead_while_it_trains(small_target: TargetModel, tmp_path: Path) -> None:
    """The share that a run logs is that of the latents AuxK works on: none before `dead_after`, some after."""
    config = dataclasses.replace(RUN, metrics_every=1)
    (checkpoint,) = train_group([wide(TopK(1))], small_target, data=DATA, config=config, folder=tmp_path)
    lines = (tmp_path / checkpoint.record.name / "metrics.jsonl").read_text().splitlines()
    dead = [json.loads(line)["dead"] for line in lines]
    assert len(dead) == 40 and dead[0] == 0 < dead[-1] < 1
    assert dead[-1] == pytest.approx(checkpoint.coder.dead_fraction(config.dead_after))


def test_latents_silent_at_the_end_of_training_are_the_tables_dead() -> None:
    coders = transcoders(range(2))
    for coder, silent in zip(coders, (8, 24)):
        coder.encoder.tokens_since_fired[:silent] = 200_000
    replacement = TranscoderReplacement(coders, origin=Origin(train_tokens=2_000_000))
    (point,) = evaluate(make_tiny(2), [replacement], each_by_itself(some_tokens()), ["free"]).points
    assert point.dead == pytest.approx((8 + 24) / (2 * F))
