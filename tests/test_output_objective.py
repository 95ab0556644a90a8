"""Theorems about the loss on the model's output: its gradient is that of the equations, by plain autograd in float64.

The reference runs the blocks of a small model one after another and knows nothing of hooks, passes or sparse codes.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from small import D, H, each_by_itself, make_tiny, randomise, some_tokens
from torch import Tensor

from coder import Coder
from coder_replacements import CLTReplacement, CoderReplacement, SAEReplacement, TranscoderReplacement
from config import (
    BatchTopK,
    CLTConfig,
    EncoderConfig,
    Gated,
    JumpReLU,
    Mixed,
    Output,
    Relu,
    Rule,
    SAEConfig,
    TopK,
    TrainConfig,
    from_json,
    to_json,
)
from evaluation import evaluate
from losses import kl_divergence, kl_through_head, log_probabilities
from output_objective import CoderSet, Frame, Run, TrainingPass, backward, frame_of, planned, unembedding
from recipes import new_coder
from replacement import CodedPass
from sparse_ops import Codes
from target_models import TargetModel
from training import CoderRun

LAYERS, F_DICT, AUX, DEAD_AFTER = (0, 1), 24, 0.25, 10**6
RULES: dict[str, Rule] = {
    "relu": Relu(l1=0.02),
    "topk": TopK(3),
    "batchtopk": BatchTopK(3),
    "jumprelu": JumpReLU(l0=0.03, bandwidth=0.5, preact=0.02),
    "gated": Gated(l1=0.02),
}
ALL: dict[str, list[Run]] = {
    "single": [Run((0,), False), Run((1,), False)], "frozen": [Run((0, 1), False)], "free": [Run((0, 1), True)],
}  # fmt: skip
PARTS: dict[str, list[Run]] = {  # what a mixed objective may draw of three layers
    "one": [Run((1,), False)], "two": [Run((0, 2), False)], "two that follow": [Run((1, 2), True)],
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_float32_or_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NN_BF16", "off")


def sae(layer: int, rule: Rule) -> Coder:
    return new_coder(SAEConfig(layer=layer, site="mlp_out", d_in=D, d_dict=F_DICT, rule=rule), 0)


def transcoder(layer: int, rule: Rule, skip: bool = False) -> Coder:
    return new_coder(EncoderConfig(layer=layer, d_in=D, d_out=D, d_dict=F_DICT, rule=rule, skip=skip), 0)


KINDS: dict[str, Callable[[Rule, Sequence[int]], CoderReplacement]] = {
    "sae": lambda rule, layers: SAEReplacement([randomise(sae(i, rule), i) for i in layers]),
    "transcoder": lambda rule, layers: TranscoderReplacement([randomise(transcoder(i, rule), i) for i in layers]),
    "skip": lambda rule, layers: TranscoderReplacement([randomise(transcoder(i, rule, skip=True), i) for i in layers]),
    "clt": lambda rule, layers: CLTReplacement(
        randomise(new_coder(CLTConfig(layers=tuple(layers), d_in=D, d_out=D, d_dict=F_DICT, rule=rule), 0))
    ),
}


def in_double(kind: str, rule: str, layers: Sequence[int]) -> tuple[TargetModel, CoderSet, Frame]:
    """Scales unlike 1, and what a coder writes about as large as an MLP's output."""
    target = make_tiny(len(layers))
    target.model.double()
    replacement = KINDS[kind](RULES[rule], layers)
    frame = frame_of(target, unembedding(target), some_tokens(3), tuple(layers))
    for coder in replacement.members:
        coder.double().train()
        with torch.no_grad():
            coder.x_scale.fill_(0.7)
            coder.y_scale.fill_(0.7 if kind == "sae" else 1.9)
    return target, set_of(replacement, frame), frame


def set_of(replacement: CoderReplacement, frame: Frame) -> CoderSet:
    variance = frame.clean.activations.outputs[:, :, 1:].flatten(1, 2).var(1, correction=0).sum(-1)
    runs = []
    for coder in replacement.members:
        rows = [frame.layers.index(layer) for layer in coder.config.layers]
        own = variance[rows] if len(rows) > 1 else variance[rows[0]]
        runs.append(CoderRun("", coder, rows, own, None, None, 0.0))  # type: ignore[arg-type]
    return CoderSet(replacement, runs)


# ----------------------------------------------------------------------------------------------------------- the reference


class Reference:
    """The loss of a plan, from the model's weights and the coders' parameters alone."""

    def __init__(self, target: TargetModel, coders: CoderSet, tokens: Tensor, local: float) -> None:
        self.model, self.coders, self.tokens, self.local = target.model, coders, tokens, local
        self.replacement = coders.replacement
        with torch.no_grad():
            self.clean: dict[int, tuple[Tensor, Tensor]] = {}
            self.p = self.logits(lambda layer, x, y: self.clean.__setitem__(layer, (x[:, 1:], y[:, 1:])) or y).softmax(
                -1
            )
        self.codes: dict[int, Tensor] = {}
        self.dead: dict[int, Tensor] = {}  # what the dead latents would do
        self.penalty: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}

    def logits(self, function: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        h = self.model.wte(self.tokens)
        for layer, block in enumerate(self.model.h):
            h = h + block.attn(block.rms_1(h))
            x = block.rms_2(h)
            h = h + function(layer, x, block.mlp(x))
        return self.model.lm_head(self.model.ln_f(h))

    def loss(self, plan: Sequence[Run]) -> Tensor:
        """Σ KL + Σ over coders of (local · FVU + FVU of the gates + penalty + AuxK)."""
        self.fvu: dict[int, Tensor] = {}
        total = torch.zeros((), dtype=torch.float64)
        for run in plan:

            def function(layer: int, x: Tensor, y: Tensor, run: Run = run) -> Tensor:
                if layer not in run.layers:
                    return y
                own = (x[:, 1:], y[:, 1:]) if run.follows else self.clean[layer]
                y_hat, rebuilt, e_hat = self.written(layer, *own)
                variance = next(m.variance for m in self.coders.members if layer in m.coder.config.layers)
                variance = variance[layer] if variance.ndim else variance
                n = y_hat.shape[:2].numel()
                error = [(out - self.clean[layer][1]).square().sum() / n / variance for out in (y_hat, rebuilt)]
                self.fvu[layer] = self.local * error[0] + (error[1] if layer in self.gates else 0)
                if self.dead:
                    e, square = (self.clean[layer][1] - y_hat).detach(), e_hat.square().sum(2, keepdim=True)
                    alpha = torch.where(square > 0, (e * e_hat).sum(2, keepdim=True) / square, 1.0).clamp(0, 1).detach()
                    self.fvu[layer] = self.fvu[layer] + AUX * (e - alpha * e_hat).square().sum() / n / variance
                return torch.cat([y[:, :1], y_hat], 1)

            q = self.logits(function).log_softmax(-1)
            total = total + (self.p * (self.p.log() - q)).sum(-1).mean()
        for member in self.coders.members:
            own = [layer for layer in member.coder.config.layers if layer in self.fvu]
            if own:
                total = total + torch.stack([self.fvu[layer] for layer in own]).mean()
                encoded = [layer for layer in member.coder.config.layers if layer in self.codes]
                total = total + torch.stack([self.penalty[layer] for layer in encoded]).mean()
        return total

    def written(self, layer: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What codes write, what gates would, the decoder then being a constant, and what dead latents would, without bias."""
        coder, i, _ = self.replacement.reading(layer, x, y)
        sources = coder.config.layers[: i + 1]
        for source in sources:
            self.encode(source, *((x, y) if source == layer else self.clean[source]))
        out = []
        for codes, hold in ((self.codes, lambda p: p), (self.gates or self.codes, torch.Tensor.detach)):
            wide = [
                codes[source] @ hold(coder.decoders[j])[:, (i - j) * D : (i - j + 1) * D]
                for j, source in enumerate(sources)
            ]
            b_dec, scale = coder.b_dec.view(-1, D)[i], coder.y_scale[min(i, len(coder.y_scale) - 1)]
            y_hat = (sum(wide) + hold(b_dec)) / scale
            out.append(y_hat + x * coder.x_scale @ hold(coder.skip).T / scale if coder.skip is not None else y_hat)
        dead = [
            self.dead[source] @ coder.decoders[j][:, (i - j) * D : (i - j + 1) * D]
            for j, source in enumerate(sources)
            if self.dead
        ]
        return out[0], out[1], sum(dead, torch.zeros(())) / scale

    def encode(self, layer: int, x: Tensor, y: Tensor) -> None:
        if layer in self.codes:
            return
        coder, i, read = self.replacement.reading(layer, x, y)
        encoder, rule = coder.encoders[i], coder.config.rule
        scaled = read * coder.x_scale[min(i, len(coder.x_scale) - 1)] - (
            coder.b_dec if coder.config.kind == "sae" else 0
        )
        linear, norms = scaled @ encoder.W_enc.T, coder.decoders[i].norm(dim=1)
        pre, self.penalty[layer] = linear + encoder.b_enc, torch.zeros((), dtype=torch.float64)
        if len(dead := (encoder.tokens_since_fired >= DEAD_AFTER).nonzero()[:, 0]):
            held = coder.b_dec.detach() if coder.config.kind == "sae" else 0
            alone = (read.detach() * coder.x_scale[0] - held) @ encoder.W_enc[dead].T + encoder.b_enc[dead]
            theta = (
                alone.flatten(0, 1).sort(0, descending=True).values[math.ceil(alone.shape[:2].numel() / 100)].detach()
            )
            a = (alone - theta.clamp(max=0)) * (alone > theta)
            self.dead[layer] = torch.zeros_like(pre).index_add(2, dead, a)
        match rule:
            case TopK(k):
                a = pre.relu() * (pre >= pre.topk(k, -1).values[..., -1:])
            case BatchTopK(k):
                a = pre.relu() * (pre >= pre.flatten().topk(k * pre.shape[:2].numel()).values[-1])
            case Relu(l1):
                a = pre.relu()
                self.penalty[layer] = l1 * (a * norms).sum(-1).mean()
            case JumpReLU():
                theta = encoder.log_theta.exp()
                gate = straight_through(pre, theta, rule.bandwidth)
                a = pre * (pre > theta) + theta.detach() * (gate - gate.detach())
                below = ((theta - pre).relu() * norms).sum(-1).mean()
                self.penalty[layer] = rule.l0 * gate.sum(-1).mean() + rule.preact * below
            case Gated(l1):
                self.gates[layer] = pre.relu()
                a = (encoder.r_mag.exp() * linear + encoder.b_mag).relu() * (pre > 0)
                self.penalty[layer] = l1 * (self.gates[layer] * norms).sum(-1).mean()
        self.codes[layer] = a


def straight_through(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """[pre > θ], with −1/ε as its derivative in θ within ε/2 of it."""
    kernel = ((pre - theta).abs() < bandwidth / 2).double().detach()
    return (pre > theta).double() - kernel * (theta - theta.detach()) / bandwidth


def check_gradient(
    kind: str, rule: str, layers: Sequence[int], plan: list[Run], local: float, dead: Sequence[int] = ()
) -> None:
    target, coders, frame = in_double(kind, rule, layers)
    for member in coders.members:
        for encoder in member.coder.encoders:
            encoder.tokens_since_fired[list(dead)] = DEAD_AFTER
        for decoder in member.coder.decoders if dead else ():  # some write along the residual, others against it
            decoder.data[list(dead)[::2]] *= -1
        member.coder.count_dead(DEAD_AFTER)
    parameters = {f"{i}.{n}": p for i, m in enumerate(coders.members) for n, p in m.coder.named_parameters()}
    config = TrainConfig(tokens=1, lr=1.0, objective=Output("free", local), aux=AUX, dead_after=DEAD_AFTER)
    readings = backward(coders, frame, plan, config=config).readings
    loss = Reference(target, coders, frame.tokens, local).loss(plan)
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    torch.testing.assert_close(readings[0], loss.detach(), rtol=1e-9, atol=1e-12)
    for (name, p), g in zip(parameters.items(), expected):
        if p.grad is None or g is None:
            assert (p.grad is None or not p.grad.any()) and (g is None or not g.any()), f"{name}: {p.grad=} {g=}"
        else:
            torch.testing.assert_close(
                p.grad, g, rtol=1e-7, atol=1e-10 * float(g.abs().max()), msg=lambda m, name=name: f"{name}: {m}"
            )
    assert sum(g is not None and bool(g.any()) for g in expected) >= 4


@pytest.mark.parametrize("local", [0.0, 0.5])
@pytest.mark.parametrize("protocol", ALL)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_equations(kind: str, rule: str, protocol: str, local: float) -> None:
    check_gradient(kind, rule, LAYERS, ALL[protocol], local)


@pytest.mark.parametrize("protocol", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_auxk_is_that_of_the_equations(kind: str, protocol: str) -> None:
    check_gradient(kind, "topk", LAYERS, ALL[protocol], 0.5, dead=range(16))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_some_layers_is_that_of_the_equations(kind: str, part: str) -> None:
    check_gradient(kind, "jumprelu", (0, 1, 2), PARTS[part], 0.5)


# ---------------------------------------------------------------------------------------------- what it is at the minimum


class ReLUMLP(torch.nn.Module):
    """An MLP that a ReLU coder can be."""

    def __init__(self, c_fc: torch.nn.Linear, down_proj: torch.nn.Linear) -> None:
        super().__init__()
        self.c_fc, self.down_proj = c_fc, down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.c_fc(x).relu())


@torch.no_grad()
def exact(kind: str, target: TargetModel) -> CoderReplacement:
    """Coders that write what the MLPs of a target of ReLUMLPs write."""
    n = H if kind != "sae" else 2 * D
    rule, layers = Relu(l1=0.0), range(target.n_layers)
    shape = {"d_in": D, "d_dict": n, "rule": rule}
    if kind == "clt":
        coders = [new_coder(CLTConfig(layers=tuple(layers), d_out=D, **shape), 0)]
    elif kind == "sae":
        coders = [new_coder(SAEConfig(layer=i, site="mlp_out", **shape), 0) for i in layers]
    else:
        coders = [new_coder(EncoderConfig(layer=i, d_out=D, skip=kind == "skip", **shape), 0) for i in layers]
    for coder in coders:
        coder.double()
        for encoder, decoder, layer in zip(coder.encoders, coder.decoders, coder.config.layers):
            mlp, both_signs = target.model.h[layer].mlp, torch.cat([torch.eye(D), -torch.eye(D)]).double()
            encoder.W_enc.copy_(both_signs if kind == "sae" else mlp.c_fc.weight)
            decoder.zero_()
            decoder[:, :D] = both_signs if kind == "sae" else mlp.down_proj.weight.T
    return {"sae": SAEReplacement, "clt": lambda own: CLTReplacement(own[0])}.get(kind, TranscoderReplacement)(coders)


@pytest.mark.parametrize("protocol", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_where_coders_are_the_mlps_kl_is_zero_and_so_is_its_gradient(kind: str, protocol: str) -> None:
    """And neither is where one of them is a little off."""
    target = make_tiny(2)
    for block in target.model.h:
        block.mlp = ReLUMLP(block.mlp.c_fc, block.mlp.down_proj)
    target.model.double()
    frame = frame_of(target, unembedding(target), some_tokens(3), LAYERS)
    coders = set_of(exact(kind, target), frame)
    config, sizes = TrainConfig(tokens=1, lr=1.0, objective=Output("free", local=0.5)), []
    parameters = [p for member in coders.members for p in member.coder.parameters()]
    for noise in (0.0, 1e-2):
        for member in coders.members:
            member.coder.train()
        with torch.no_grad():
            parameters[0].add_(noise * torch.randn(parameters[0].shape, generator=torch.Generator().manual_seed(0)))
        readings = backward(coders, frame, ALL[protocol], config=config).readings
        sizes.append((float(readings[1]), max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)))
        for p in parameters:
            p.grad = None
    (kl, gradient), (kl_off, gradient_off) = sizes
    assert abs(kl) < 1e-14 and gradient < 1e-12, f"{sizes=}"
    assert kl_off > 1e-7 and gradient_off > 1e-5, f"{sizes=}"


# ----------------------------------------------------------------------------------------------------------------- faces


@torch.no_grad()
def deploy_at_the_smallest_winner(replacement: CoderReplacement, pass_: TrainingPass) -> None:
    for layer, codes in pass_.codes.items():
        coder, i, _ = replacement.reading(layer, *pass_.original(layer))
        coder.encoders[i].threshold.fill_(codes.values[codes.values > 0].min() * (1 - 1e-9))


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_face_that_trains_writes_what_the_deployed_one_writes(kind: str, rule: str, follows: bool) -> None:
    """Of BatchTopK, where the threshold is the smallest of what the batch selected."""
    target, coders, frame = in_double(kind, rule, LAYERS)
    replacement, captured = coders.replacement, frame.captured(coders.replacement)
    training = TrainingPass(replacement, captured, LAYERS if follows else ())
    with torch.no_grad():
        stream = frame.last_stream(training, LAYERS)
        if rule == "batchtopk":
            deploy_at_the_smallest_winner(replacement, training)
        for coder in replacement.members:
            coder.eval()
        deployed = InDouble(replacement, None if follows else captured)
        torch.testing.assert_close(frame.last_stream(deployed, LAYERS), stream, rtol=1e-10, atol=1e-10)
    for layer in LAYERS:
        positions = deployed.codes[layer].rows % frame.tokens.shape[1] > 0
        assert int((deployed.codes[layer].values[positions] > 0).sum()) == int((training.codes[layer].values > 0).sum())


class InDouble(CodedPass):
    """The ruler's pass, in the precision of its coders."""

    def __call__(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.read(layer, x, y)
        return self.replacement.write(self, layer, x.flatten(0, 1), y.flatten(0, 1)).view(*x.shape[:-1], -1)

    def encode(self, layer: int, x: Tensor | None = None, y: Tensor | None = None) -> Codes:
        if layer not in self.codes:
            if self.clean is not None:
                x, y = (kept.flatten(0, 1) for kept in self._at(self.clean, layer))
            self.codes[layer] = self.replacement.encode(layer, x, y)
        return self.codes[layer]


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_that_trains_is_the_rulers(kind: str) -> None:
    """Under every protocol, on the same tokens: one layer alone, all on clean codes, all following the stream."""
    target, tokens = make_tiny(2), some_tokens(3)
    replacement = KINDS[kind](TopK(3), LAYERS)
    points = evaluate(target, [replacement], each_by_itself(tokens), tuple(ALL)).points
    frame = frame_of(target, unembedding(target), tokens, LAYERS)
    runs = [run for plan in ALL.values() for run in plan]
    assert [(p.protocol, p.layers) for p in points] == [
        ("single", (0,)), ("single", (1,)), ("frozen", (0, 1)), ("free", (0, 1)),
    ]  # fmt: skip
    for point, run in zip(points, runs):
        pass_ = TrainingPass(replacement, frame.captured(replacement), run.layers if run.follows else ())
        assert frame.kl(pass_, run.layers).item() == pytest.approx(point.kl, rel=1e-5, abs=1e-7), f"{run}"
        fvu = torch.stack([m.variance for m in set_of(replacement, frame).members]).flatten()
        errors = [
            (pass_.written[i] - pass_.original(i)[1]).square().sum() / len(pass_.written[i]) / fvu[i]
            for i in run.layers
        ]
        assert torch.stack(errors).mean().item() == pytest.approx(point.fvu, rel=1e-5), f"{run}"


# ----------------------------------------------------------------------------------------------------------------- plans


def test_each_protocol_is_the_rulers() -> None:
    g, layers = torch.Generator(), (1, 2, 5)
    assert planned(Output("single"), layers, g) == [Run((i,), False) for i in layers]
    assert planned(Output("frozen"), layers, g) == [Run(layers, False)]
    assert planned(Output("free"), layers, g) == [Run(layers, True)]


def test_a_mixed_objective_draws_what_it_says() -> None:
    layers, mixed, n = (0, 2, 3, 7), Mixed(alone=0.3, some=0.5, running=0.25), 6000
    g = torch.Generator().manual_seed(0)
    plans = [planned(Output(mixed), layers, g) for _ in range(n)]
    assert all(len(plan) == 1 for plan in plans)
    drawn = [plan[0] for plan in plans]
    sizes = [len(run.layers) for run in drawn]
    shares = [sum(size == k for size in sizes) / n for k in (1, 2, 3, 4)]
    assert shares == pytest.approx([0.3, 0.25, 0.25, 0.2], abs=0.025)
    subsets = {run.layers for run in drawn}
    assert len(subsets) == 15 and all(tuple(sorted(set(s))) == s and set(s) <= set(layers) for s in subsets)
    for size in (1, 2, 3):
        of_size = [run.layers for run in drawn if len(run.layers) == size]
        counts = [of_size.count(s) / len(of_size) for s in set(of_size)]
        assert max(counts) - min(counts) < 0.06, f"{counts=}"
    together = [run for run in drawn if len(run.layers) > 1]
    assert sum(run.follows for run in together) / len(together) == pytest.approx(0.25, abs=0.025)
    assert not any(run.follows for run in drawn if len(run.layers) == 1)


def test_of_two_layers_there_are_no_some() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = [planned(Output(Mixed(alone=0.25, some=0.5)), (0, 1), g)[0] for _ in range(2000)]
    assert sum(run.layers == (0, 1) for run in drawn) / 2000 == pytest.approx(0.75, abs=0.03)
    assert {run.layers for run in drawn} == {(0,), (1,), (0, 1)}


# ----------------------------------------------------------------------------------------------------- what is computed


def counted(target: TargetModel, module: torch.nn.Module) -> list[int]:
    """Positions that a module computes, call by call."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("protocol", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_an_mlp_is_computed_where_its_output_is_read_alone(kind: str, protocol: str) -> None:
    target, tokens = make_tiny(2), some_tokens(3)
    coders = KINDS[kind](TopK(3), LAYERS)
    seen = counted(target, target.model.h[1].mlp.c_fc)
    frame = frame_of(target, unembedding(target), tokens, LAYERS)
    everywhere, first = tokens.numel(), len(tokens)
    assert seen[-1] == everywhere
    seen.clear()
    backward(
        set_of(coders, frame), frame, ALL[protocol], config=TrainConfig(tokens=1, lr=1.0, objective=Output("free"))
    )
    reads_y = everywhere if kind == "sae" and protocol == "free" else first
    assert seen == [
        *[everywhere] * (protocol == "single"),
        reads_y,
    ]  # alone, layer 0 leaves the MLP of layer 1 as it is


def test_a_run_begins_with_the_first_layer_it_replaces() -> None:
    target, layers = make_tiny(3), (0, 1, 2)
    head, seen = unembedding(target), [counted(target, block.attn) for block in target.model.h]
    frame = frame_of(target, head, some_tokens(3), layers)
    assert [len(own) for own in seen] == [1, 1, 1]
    coders = set_of(KINDS["clt"](TopK(3), layers), frame)
    plan = planned(Output("single"), layers, torch.Generator())
    backward(coders, frame, plan, config=TrainConfig(tokens=1, lr=1.0, objective=Output("single")))
    assert [len(own) for own in seen] == [2, 3, 4]


def test_codes_of_a_clean_pass_are_computed_once_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    _, coders, frame = in_double("clt", "jumprelu", LAYERS)
    calls: list[int] = []
    own = type(coders.replacement).training_codes
    monkeypatch.setattr(
        type(coders.replacement),
        "training_codes",
        lambda self, layer, x, y: calls.append(layer) or own(self, layer, x, y),
    )
    backward(coders, frame, ALL["single"], config=TrainConfig(tokens=1, lr=1.0, objective=Output("single")))
    assert calls == [0, 1]


# -------------------------------------------------------------------------------------------------------------------- KL


def test_kl_through_the_head_is_the_plain_one_and_so_is_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(6, 5000, bias=True, dtype=torch.float64)
    p, q = (torch.randn(3, 111, 6, generator=g, dtype=torch.float64) for _ in range(2))
    log_p = log_probabilities(p, head)
    torch.testing.assert_close(log_p, head(p).flatten(0, 1).log_softmax(-1))
    own, plain = q.clone().requires_grad_(), q.clone().requires_grad_()
    kl, expected = kl_through_head(log_p, own, head), kl_divergence(head(p), head(plain)).mean()
    (3 * kl).backward()
    (3 * expected).backward()
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-10, atol=1e-15)
    head.weight.grad = None
    same = kl_through_head(log_p, p.clone().requires_grad_(), head)
    same.backward()
    assert abs(same.item()) < 1e-14 and head.weight.grad is None


def test_logits_over_a_large_vocabulary_exist_for_a_few_tokens_at_a_time() -> None:
    """What is as wide as the vocabulary: log p once, and a chunk of logits."""
    vocab, tokens, widths = 50_000, 512, []
    head = torch.nn.Linear(4, vocab, bias=False).requires_grad_(False)

    def watched(h: Tensor) -> Tensor:
        widths.append(len(h))
        return head(h)

    hidden = torch.randn(2, tokens // 2, 4)
    log_p = log_probabilities(hidden, watched)
    kl_through_head(log_p, hidden.clone().requires_grad_(), watched).backward()
    assert max(widths) * vocab * 8 <= tokens * vocab, f"{max(widths)=}"
    assert sum(widths) == 2 * tokens + 1  # and one token that tells the width


def test_the_unembedding_is_found_by_what_it_writes() -> None:
    target = make_tiny(2)
    assert unembedding(target) is target.model.lm_head
    capped, forward = make_tiny(2), type(target.model).forward
    capped.model.forward = lambda tokens: 5 * torch.tanh(forward(capped.model, tokens)[0] / 5)
    head = unembedding(capped)
    assert isinstance(head, torch.nn.Identity)
    frames = [frame_of(t, unembedding(t), some_tokens(2), LAYERS) for t in (target, capped)]
    for t, frame in zip((target, capped), frames):
        with torch.no_grad():
            torch.testing.assert_close(frame.log_p, t.logits(some_tokens(2)).flatten(0, 1).log_softmax(-1))


# ---------------------------------------------------------------------------------------------------------------- values


def test_objectives_round_trip_and_name_themselves() -> None:
    for objective in (Output("free"), Output("single", 0.5), Output(Mixed(0.1, 0.2, 0.3))):
        config = TrainConfig(tokens=1, lr=1.0, objective=objective)
        assert from_json(to_json(config)) == config
    assert [o.name for o in (Output("free"), Output("single", 0.5), Output(Mixed()))] == [
        "kl-free", "kl-single-fvu0.5", "kl-mixed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Output("together"), "^unknown protocol 'together' of an objective: use single, frozen, free or Mixed"),  # type: ignore[arg-type]
        (lambda: Output("free", -1.0), "^the weight of the local loss must not be negative, but is -1"),
        (lambda: Mixed(alone=0.7, some=0.7), "^the shares of mixed must lie between 0 and 1, and so their sum"),
        (lambda: Mixed(running=-0.1), "^the shares of mixed must lie between 0 and 1"),
    ],
)
def test_an_objective_that_cannot_be_meant_is_refused_in_one_line(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        make()
    assert "\n" not in str(refusal.value)
