"""Theorems about a training step of an SPD: all its terms are done again in float64, by plain autograd from the equations.

    loss = Σ_terms coefficient · D(target, target under masks × routing)
         + coefficients · (minimality, frequency, locality, faithfulness)
    step = clip the components' gradient → AdamW without decay at the scheduled rate

The reference calls nothing of the project: it takes the model's tensors, the numbers of the configuration, and random
numbers drawn from an equal generator in the order of the terms.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Adam, clipped, norm
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import losses
from config import Aim, Frequency, GateConfig, Locality, Lp, Merged, Recon, SmoothL0, SPDConfig, SPDTrainConfig
from spd_model import ComponentModel
from spd_training import SPDTrainer, train_spd

SIZES, COMPONENTS, ALPHA = (5, 7, 6), {"first": 9, "second": 11}, 0.03
SEQUENCES, LENGTH = 16, 3
TERMS = (
    Recon(coefficient=1.0, source="stochastic", routing="layerwise"),
    Recon(coefficient=0.5, source="stochastic", routing="subset"),
    Recon(coefficient=0.7, source="pgd", routing="all", steps=2, step_size=0.3),
    Recon(coefficient=0.4, source="pgd", routing="subset", steps=1, step_size=0.2),
    Recon(coefficient=0.9, source="persistent", routing="subset", steps=2, step_size=0.05),
    Recon(coefficient=0.6, source="importance", routing="all"),
    Recon(coefficient=0.8, source="deployed", routing="subset"),
    Recon(coefficient=0.3, source="ones", routing="all"),
)
CONFIG = SPDTrainConfig(
    steps=20, lr=2e-2, recon=TERMS, minimality=Lp(coefficient=0.02, p=(2.0, 0.5), between=(0.2, 0.8)), distance="kl",
    faithfulness=3.0, schedule="cosine", final=0.1, warmup=0.2, clip=1.0,
)  # fmt: skip
OF_TODAY = dataclasses.replace(
    CONFIG, minimality=SmoothL0(coefficient=0.02, gamma=(1.0, 0.1), between=(0.2, 0.8)), relative=True,
    aim=Aim(l0=(3.0, 1.5), between=(0.1, 0.7)),
    frequency=Frequency(coefficient=0.01, positions=500.0, half_life=3.0), locality=Locality(coefficient=0.2),
    recon=(
        Merged(coefficient=0.7, adversarial=0.6, particles=5, steps=2, step_size=0.05),
        Recon(coefficient=0.4, source="running", straight_through=True),
        Recon(coefficient=0.3, source="deployed", straight_through=True),
    ),
)  # fmt: skip


class Target(nn.Module):
    """x ↦ relu(x W₁ + b₁) W₂ + b₂."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(*SIZES[:2]), nn.Linear(*SIZES[1:])
        for p in self.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(3))
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def gated(gate: GateConfig, components: dict[str, int] = COMPONENTS) -> ComponentModel:
    config = SPDConfig(components=tuple(components.items()), gate=gate, alpha=ALPHA)
    return ComponentModel(Target(), config, torch.Generator().manual_seed(0))


def component_model() -> ComponentModel:
    model = gated(GateConfig(kind="mlp", hidden=(4,)))
    with torch.no_grad():  # importances below 0, within and above 1
        for gate in (model.importances.gate(path) for path in model.paths):
            gate.layers[2].W.mul_(2)
            gate.layers[2].b.fill_(0.4)
    return model


def batch(seed: int) -> Tensor:
    return torch.randn(SEQUENCES, LENGTH, SIZES[0], generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- the reference


Masks = dict[str, tuple[Tensor, Tensor]]  # m and m_Δ of each module


class Equations:
    """A model's tensors in float64, and what the papers say of them."""

    def __init__(self, trainer: SPDTrainer) -> None:
        model, self.config = trainer.model, trainer.config
        self.p = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
        target = {path: model.target_model.get_submodule(path) for path in COMPONENTS}
        self.rates = {path: rate.double() for path, rate in trainer.rates.items()}
        self.steps_done, self.pull = trainer.steps_done, trainer.pull.double()
        self.W = {path: module.weight.double().T for path, module in target.items()}
        self.b = {path: module.bias.double() for path, module in target.items()}
        self.generator = torch.Generator()
        self.generator.set_state(trainer.generator.get_state())

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).double()

    def V_U(self, path: str) -> tuple[Tensor, Tensor]:
        return self.p[f"_components.{path}.V"], self.p[f"_components.{path}.U"]

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        """Each module as (h ⊙ m) U + m_Δ · x (W − V U) + b, or as it was where there is no mask."""
        for path in COMPONENTS:
            V, U = self.V_U(path)
            m, delta = masks.get(path, (torch.ones(len(U)), torch.ones(())))
            y = (x @ V * m) @ U + delta[..., None] * (x @ (self.W[path] - V @ U)) + self.b[path]
            x = y.relu() if path == "first" else y
        return x

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """z_c = Σ_k w2_ck gelu(w1_ck h_c + b1_ck) + b2_c with h = x V, x the module's input in a clean pass."""
        inputs = {"first": x, "second": (x @ self.W["first"] + self.b["first"]).relu()}
        return {path: self.gate(path, inputs[path] @ self.V_U(path)[0]) for path in COMPONENTS}

    def gate(self, path: str, h: Tensor) -> Tensor:
        w1, b1, w2, b2 = (self.p[f"_ci_fns.{path}.layers.{name}"] for name in ("0.W", "0.b", "2.W", "2.b"))
        u = h[..., None] * w1[:, 0] + b1
        return (0.5 * u * (1 + torch.erf(u / 2**0.5)) * w2[..., 0]).sum(-1) + b2[:, 0]

    def distance(self, x: Tensor, masks: Masks) -> Tensor:
        clean, own = self.forward(x, {}).detach(), self.forward(x, masks)
        if self.config.distance == "mse":
            return (clean - own).square().mean()
        return (clean.softmax(-1) * (clean.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean()

    def merged(self, term: Merged, x: Tensor, g: dict[str, Tensor], r: dict[str, Tensor], ascend: Adam) -> Tensor:
        """Sequence by sequence: the adversary's particle on all modules, or fresh sources on a random subset of them."""
        shape, constant = x.shape[:-1], {path: own.detach() for path, own in g.items()}
        which = torch.randint(term.particles, (len(x), 1), generator=self.generator)[:, 0].tolist()
        hostile = (self.uniform(len(x), 1) < term.adversarial)[:, 0].tolist()
        assert 0 < sum(hostile) < len(x) and len(set(which)) > 2

        def under(g: dict[str, Tensor], sources: dict[str, Tensor]) -> Masks:
            return {p: (g[p] + (1 - g[p]) * own[..., :-1], own[..., -1]) for p, own in sources.items()}

        def particles(r: dict[str, Tensor]) -> dict[str, Tensor]:
            return {path: torch.stack([own[i].expand(LENGTH, -1) for i in which]) for path, own in r.items()}

        def move(value: Callable[[dict[str, Tensor]], Tensor]) -> None:
            moved = ascend(r, {path: -up for path, up in gradient(value, r).items()}, term.step_size)
            r.update({path: own.clamp(0, 1) for path, own in moved.items()})

        for _ in range(term.steps):
            move(lambda r: self.distance(x, under(constant, particles(r))))
        fresh = {path: self.uniform(*shape, n + 1) for path, n in COMPONENTS.items()}
        subset = self.routing(shape)

        def masks(g: dict[str, Tensor], r: dict[str, Tensor]) -> Masks:
            own = particles(r)
            mixed = {
                path: torch.stack([own[path][i] if h else fresh[path][i] for i, h in enumerate(hostile)]) for path in g
            }
            on = {
                p: torch.stack([r[i] * 0 + 1 if h else r[i] for i, h in enumerate(hostile)]) for p, r in subset.items()
            }
            return routed(under(g, mixed), on)

        loss = self.distance(x, masks(g, {path: own.detach() for path, own in r.items()}))
        move(lambda r: self.distance(x, masks(constant, r)))
        return loss

    def running(self, x: Tensor) -> Tensor:
        """D where every gate reads what its module is given, and components are on or off."""
        clean, own = self.forward(x, {}).detach(), {}
        for path in COMPONENTS:
            V, U = self.V_U(path)
            own[path] = self.gate(path, x @ V)
            g = leaky(own[path])
            y = (x @ V * (g + ((g > 0).double() - g).detach())) @ U + self.b[path]
            x = y.relu() if path == "first" else y
        self.followed.append(own)
        return (clean.softmax(-1) * (clean.log_softmax(-1) - x.log_softmax(-1))).sum(-1).mean()

    def cost(self, up: Tensor) -> Tensor:
        """What an importance costs at this step: g^p, or (1 + γ²) g²/(g² + γ²)."""
        m, progress = self.config.minimality, self.steps_done / self.config.steps
        share = min(1.0, max(0.0, (progress - m.between[0]) / (m.between[1] - m.between[0])))
        if isinstance(m, Lp):
            return (up + 1e-12).pow(m.p[0] + (m.p[1] - m.p[0]) * share)
        gamma = m.gamma[0] + (m.gamma[1] - m.gamma[0]) * share
        return (1 + gamma**2) * up**2 / (up**2 + gamma**2)

    def frequency(self, path: str, f: Tensor) -> Tensor:
        """A function of value Φ(f̄) and gradient Φ′(f̄) ∂f: Φ itself, by autograd, where f̄ is a leaf."""
        term = self.config.frequency
        kept = 0.5 ** (1 / term.half_life)
        self.rates[path] = kept * self.rates[path] + (1 - kept) * f.detach()
        mean = (self.rates[path] / (1 - kept ** (self.steps_done + 1))).requires_grad_()
        phi = (mean * torch.log2(1 + term.positions * mean)).sum()
        (slope,) = torch.autograd.grad(phi, mean)
        return phi.detach() + (slope * (f - f.detach())).sum()

    def locality(self) -> Tensor:
        """The first matrix writes the seven neurons, the second reads them."""
        term = self.config.locality
        t = term.t[0] + (term.t[1] - term.t[0]) * min(1.0, self.steps_done / self.config.steps / 0.25)
        counts = []
        for w in [*self.V_U("first")[1], *self.V_U("second")[0].T]:
            f = w**2 / (w**2).sum()
            counts.append((f / (f + t / SIZES[1])).sum())
        return torch.stack(counts).mean()

    def term(self, term: Recon | Merged, x: Tensor, g: dict[str, Tensor], r: dict[str, Tensor], ascend: Adam) -> Tensor:
        """One reconstruction term; r, the persistent sources, moves in place."""
        if isinstance(term, Merged):
            return self.merged(term, x, g, r, ascend)
        if term.source == "running":
            return self.running(x)
        routing, shape = self.routing(x.shape[:-1]) if term.routing == "subset" else None, x.shape[:-1]
        constant = {path: own.detach() for path, own in g.items()}

        def under(g: dict[str, Tensor], r: dict[str, Tensor]) -> Masks:
            return routed(
                {path: (g[path] + (1 - g[path]) * r[path][..., :-1], r[path][..., -1]) for path in g}, routing
            )

        if term.source == "stochastic":
            drawn = {path: (self.uniform(*own.shape), self.uniform(*shape)) for path, own in g.items()}
            masks = under(g, {path: torch.cat([own, delta[..., None]], -1) for path, (own, delta) in drawn.items()})
        elif term.source == "pgd":
            tried = [{path: self.uniform(*[1] * len(shape), n + 1) for path, n in COMPONENTS.items()}]
            for _ in range(term.steps):
                up = gradient(lambda r: self.distance(x, under(constant, r)), tried[-1])
                tried.append(
                    {path: (own + term.step_size * up[path].sign()).clamp(0, 1) for path, own in tried[-1].items()}
                )
            masks = under(g, max(tried, key=lambda r: self.distance(x, under(constant, r)).item()))
        elif term.source == "persistent":
            for _ in range(term.steps):
                up = gradient(lambda r: self.distance(x, under(constant, r)), r)
                moved = ascend(r, {path: -own for path, own in up.items()}, term.step_size)
                r.update({path: own.clamp(0, 1) for path, own in moved.items()})
            masks = under(g, r)
        else:
            on: Callable[[Tensor], Tensor] = lambda g: g + ((g > 0).double() - g).detach()  # noqa: E731
            m = {
                "importance": lambda g: g,
                "deployed": on if term.straight_through else lambda g: on(g) * (g <= 0) + (g > 0),
                "ones": torch.ones_like,
            }
            masks = routed({path: (m[term.source](own), torch.zeros(shape)) for path, own in g.items()}, routing)
        if term.routing == "layerwise":
            return torch.stack([self.distance(x, {path: mask}) for path, mask in masks.items()]).mean()
        return self.distance(x, masks)

    def routing(self, shape: torch.Size) -> dict[str, Tensor]:
        """k ~ U{1, 2} per position, then k of the two modules: 1 where one goes through the decomposition."""
        k = torch.randint(1, 3, shape, generator=self.generator)
        first = self.uniform(2, *shape).argsort(0)[0]  # the module drawn first
        return {path: ((k == 2) | (first == i)).double() for i, path in enumerate(COMPONENTS)}

    def loss(self, x: Tensor, *, r: dict[int, dict[str, Tensor]], ascend: dict[int, Adam]) -> list[Tensor]:
        """[loss, Σ of the reconstruction terms, minimality, L0 of each module]."""
        c, z, self.followed = self.config, self.logits(x), []
        g = {path: leaky(own) for path, own in z.items()}
        n, recon = len(c.recon) if c.split else 1, torch.zeros(())
        for i, term in enumerate(c.recon):
            share = {path: own[i % n :: n] for path, own in g.items()}
            recon = recon + term.coefficient * self.term(
                term, x[i % n :: n], share, r.get(i, {}), ascend.get(i, Adam((0, 0)))
            )
        minimality = frequency = torch.zeros(())
        for path in z:
            each = [logits[path] for logits in (z, *self.followed)]
            up = [torch.where(own > 1, 1 + ALPHA * (own - 1), own.relu()) for own in each]
            f = sum(self.cost(own).flatten(0, -2).mean(0) for own in up) / len(up)
            minimality = minimality + f.sum()
            frequency = frequency + (self.frequency(path, f) if c.frequency else 0)
        deltas = {path: W - torch.matmul(*self.V_U(path)) for path, W in self.W.items()}
        faithfulness = sum(d.square().sum() for d in deltas.values()) / sum(d.numel() for d in deltas.values())
        if c.relative:
            faithfulness = sum((d.norm() / self.W[path].norm()) ** 2 for path, d in deltas.items()) / 2
        loss = recon + c.minimality.coefficient * self.pull * minimality + c.faithfulness * faithfulness
        if c.frequency:
            loss = loss + c.frequency.coefficient * frequency + c.locality.coefficient * self.locality()
        return [loss, recon, minimality, *((own > 0).double().sum(-1).mean() for own in g.values())]


def leaky(z: Tensor) -> Tensor:
    """clamp(z, 0, 1); the gradient is G within, nothing above, and α · min(G, 0) below."""
    g = z + (z.clamp(0, 1) - z).detach()
    g.register_hook(lambda G: torch.where(z <= 0, ALPHA * G.clamp(max=0), G * (z <= 1)))
    return g


def routed(masks: Masks, routing: dict[str, Tensor] | None) -> Masks:
    """m = m_Δ = 1 where a module is not routed."""
    if routing is None:
        return masks
    return {
        path: (1 - routing[path][..., None] * (1 - m), 1 - routing[path] * (1 - delta))
        for path, (m, delta) in masks.items()
    }


def gradient(value: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {path: own.detach().requires_grad_() for path, own in at.items()}
    return dict(zip(leaves, torch.autograd.grad(value(leaves), list(leaves.values()))))


# ------------------------------------------------------------------------------------------------------------ a whole step


def rate(step: int) -> float:
    """Of CONFIG: a rise over 4 of 20 steps, times half a cosine down to a tenth."""
    return 2e-2 * min(1.0, (step + 1) / 4) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 20)))


STEPS = (0, 10, 19)
assert [round(rate(step), 6) for step in STEPS] == [0.005, 0.011, 0.002111]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        OF_TODAY,
        dataclasses.replace(CONFIG, distance="mse", split=True, clip=None),
        dataclasses.replace(CONFIG, recon=TERMS[:1], faithfulness=0.0, clip=1e3, gate_lr=5e-3),
    ],
    ids=["all", "today", "split", "one"],
)
def test_a_step_is_that_of_the_equations(config: SPDTrainConfig) -> None:
    """Readings, gradient, rate, parameters, persistent sources and firing rates, at the first step, in the middle and at the
    last."""
    trainer, got = SPDTrainer(component_model(), config, False), []
    references = [(True, config.lr, Adam((0.9, 0.999))), (False, config.gate_lr or config.lr, Adam((0.9, 0.999)))]
    ascend = {
        i: Adam((0.01, 0.99) if isinstance(config.recon[i], Merged) else (0.5, 0.99)) for i in trainer.adversaries
    }
    trainer.optimiser.register_step_pre_hook(
        lambda optimiser, *_: got.append(
            ({name: p.grad.double() for name, p in trainer.model.named_parameters()},
             [group["lr"] for group in optimiser.param_groups])
        )
    )  # fmt: skip
    for t, step in enumerate(STEPS):
        trainer.steps_done, x = step, batch(t)
        equations = Equations(trainer)
        r = {
            i: {path: own.detach().double() for path, own in a.sources().items()}
            for i, a in trainer.adversaries.items()
        }
        readings = equations.loss(x.double(), r=r, ascend=ascend)
        g = dict(zip(equations.p, torch.autograd.grad(readings[0], list(equations.p.values()))))
        if config.clip is not None:
            weights = {name: own for name, own in g.items() if name.startswith("_components")}
            assert (norm(weights) > config.clip) == (config.clip == 1), f"{norm(weights)=}"
            g |= clipped(weights, config.clip)
        after = {}
        for of_components, peak, reference in references:
            own = {name: part for name, part in g.items() if name.startswith("_components") == of_components}
            after |= reference(equations.p, own, rate(step) * peak / config.lr)
        torch.testing.assert_close(trainer.step(x).double(), torch.stack(readings).detach(), rtol=1e-5, atol=1e-6)
        assert len(got) == t + 1, "the optimiser takes one step"
        gradients, rates = got[t]
        assert rates == pytest.approx([rate(step) * peak / config.lr for _, peak, _ in references])
        for name, own in trainer.model.named_parameters():
            size = g[name].abs().max().item()
            torch.testing.assert_close(gradients[name], g[name], rtol=1e-4, atol=1e-5 * size, msg=f"gradient {name}")
            torch.testing.assert_close(own.detach().double(), after[name], rtol=1e-5, atol=1e-3 * rate(step), msg=name)
        for i, adversary in trainer.adversaries.items():
            for path, own in adversary.sources().items():
                torch.testing.assert_close(own.detach().double(), r[i][path], rtol=0, atol=1e-5)
        for path, rate_of in trainer.rates.items():
            torch.testing.assert_close(rate_of.double(), equations.rates[path])
        assert torch.equal(trainer.generator.get_state(), equations.generator.get_state())
        assert trainer.steps_done == step + 1
        aimed = 3.0 * 0.5 ** min(1.0, max(0.0, (step / config.steps - 0.1) / 0.6))
        moved = 0.0 if config.aim is None else max(-1.0, min(1.0, math.log(sum(readings[3:]) / 2 / aimed)))
        assert trainer.pull.item() == pytest.approx(equations.pull.item() * math.exp(moved * 12 / config.steps))
        assert config.aim is None or moved != 0


def test_warm_up_is_faithfulness_alone_with_decay() -> None:
    """Two steps of AdamW on Σ‖W − V U‖² / Σ numel(W), gates left alone."""
    config = dataclasses.replace(CONFIG, faithful_steps=2, faithful_lr=0.03, faithful_decay=0.2)
    trainer, reference = SPDTrainer(component_model(), config, False), Adam((0.9, 0.999), 0.2)
    W, expected = Equations(trainer).W, dict(Equations(trainer).p)
    for _ in range(2):
        p = {name: own.detach().requires_grad_() for name, own in expected.items() if name.startswith("_components")}
        deltas = [own - p[f"_components.{path}.V"] @ p[f"_components.{path}.U"] for path, own in W.items()]
        loss = sum(d.square().sum() for d in deltas) / sum(d.numel() for d in deltas)
        expected |= reference(p, dict(zip(p, torch.autograd.grad(loss, list(p.values())))), 0.03)
    trainer.warm_up()
    for name, own in trainer.model.named_parameters():
        torch.testing.assert_close(own.detach().double(), expected[name].detach(), rtol=1e-5, atol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------------------------- a whole run


class Batches:
    """Endless, each another one."""

    def __init__(self) -> None:
        self.served = 0

    def __next__(self) -> Tensor:
        self.served += 1
        return batch(self.served)

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_rate_and_p_of_a_run_are_the_schedules(schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of warm-up at its own rate, then 20 whose rate AdamW used and whose p the minimality had."""
    ps: list[float] = []
    rates: list[float] = []
    original = losses.annealed

    def spy(*given: Any) -> float:
        ps.append(original(*given))
        return ps[-1]

    monkeypatch.setattr(losses, "annealed", spy)
    config = dataclasses.replace(CONFIG, recon=TERMS[:1], schedule=schedule, faithful_steps=3, faithful_lr=0.03)
    handle = register_optimizer_step_pre_hook(lambda optimiser, *_: rates.append(optimiser.param_groups[-1]["lr"]))
    train_spd(component_model(), Batches(), config, tmp_path, "run")
    handle.remove()
    own = rate if schedule == "cosine" else lambda step: 2e-2 * min(1.0, (step + 1) / 4)
    assert rates == pytest.approx([0.03] * 3 + [own(step) for step in range(20)])
    expected = [2.0 - 1.5 * min(1.0, max(0.0, (step / 20 - 0.2) / 0.6)) for step in range(20) for _ in COMPONENTS]
    assert ps == pytest.approx(expected)


MUON = dataclasses.replace(OF_TODAY, optimiser="muon", start="neurons", clip=None)


def orthogonal(g: Tensor) -> Tensor:
    """Five steps of Newton–Schulz towards the nearest matrix of singular values 1, in float64."""
    x = g.double() / g.double().norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_matrices_move_by_muon_and_vectors_by_adamw() -> None:
    """momentum ← 0.95 momentum + 0.05 g; matrices move by lr · 0.2 √max(sides) · NS(0.05 g + 0.95 momentum), up to
    bf16, whose errors grow where singular values are small."""
    trainer, got = SPDTrainer(gated(GateConfig(kind="shared_mlp", hidden=(4,))), MUON, False), []
    matrices = {name: p for name, p in trainer.model.named_parameters() if p.ndim == 2}
    vectors = {name: p for name, p in trainer.model.named_parameters() if p.ndim == 1}
    assert len(matrices) == 8 and len(vectors) == 4 and len(trainer.optimisers) == 2
    trainer.optimiser.register_step_pre_hook(
        lambda *_: got.append({name: p.grad.double() for name, p in trainer.model.named_parameters()})
    )
    adam, momentum = Adam((0.9, 0.999)), dict.fromkeys(matrices, 0.0)
    for t in range(2):
        before = {name: p.detach().clone().double() for name, p in trainer.model.named_parameters()}
        trainer.step(batch(t))
        after = adam({name: before[name] for name in vectors}, {name: got[t][name] for name in vectors}, rate(t))
        for name, p in vectors.items():
            torch.testing.assert_close(p.detach().double(), after[name], rtol=1e-5, atol=1e-3 * rate(t), msg=name)
        for name, p in matrices.items():
            g = got[t][name]
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            expected = -rate(t) * 0.2 * max(p.shape) ** 0.5 * orthogonal(0.05 * g + 0.95 * momentum[name])
            moved = p.detach().double() - before[name]
            assert (moved - expected).norm() < 0.15 * expected.norm(), name


@pytest.mark.parametrize("components", [{"first": 7, "second": 7}, {"first": 9, "second": 24}])
def test_a_neuron_start_is_exact_and_each_component_lies_on_one_neuron(components: dict[str, int]) -> None:
    """Also where neurons are repeated; then a neuron's components share its weights out, coordinate by coordinate."""
    model = gated(GateConfig(kind="shared_mlp", hidden=(4,)), components)
    model.start_neurons(torch.Generator().manual_seed(1))
    for path, delta in model.deltas().items():
        assert not delta.any(), path
        part, on = model.components[path], model.neuron_weights()[path]
        assert on.shape == (components[path], 7) and torch.equal(on.sort(-1).values[:, -1], torch.ones(len(on)))
        assert (on != 0).sum() == len(on), "each component has one neuron"
        counts = on.sum(0)
        assert counts.min() >= len(on) // 7 and counts.max() <= len(on) // 7 + 1
        other = part.V.mT if path == "first" else part.U
        assert (other != 0).sum() == other.shape[-1] * 7, "every weight belongs to one component"
    few = gated(GateConfig(kind="shared_mlp", hidden=(4,)), {"first": 6, "second": 7})
    with pytest.raises(AssertionError, match="6 components of 'first' for 7 neurons"):
        few.start_neurons(torch.Generator())


def test_a_gate_with_taps_reads_these_alone() -> None:
    model = gated(GateConfig(kind="global_shared_mlp", hidden=(4,), taps=("fir*",)))
    inputs, _ = model.inputs_capture(batch(0))
    z = model.importance_logits(inputs)
    assert {path: own.shape[-1] for path, own in z.items()} == COMPONENTS
    other = model.importance_logits({"first": inputs["first"], "second": inputs["second"] + 1})
    assert all(torch.equal(z[path], other[path]) for path in z)
    assert not torch.equal(z["second"], model.importance_logits({"first": inputs["first"] + 1})["second"])
    with pytest.raises(ValueError, match="match none"):
        gated(GateConfig(kind="global_shared_mlp", hidden=(4,), taps=("h.*",)))
    with pytest.raises(ValueError, match="own module alone"):
        GateConfig(kind="mlp", hidden=(4,), taps=("first",))


def test_smooth_l0_and_locality_on_numbers() -> None:
    """Importance 1 costs 1 at every γ, a half-open gate at γ → 0 too; m equal shares of N units count m / (1 + t m/N)."""
    smooth, g = SmoothL0(coefficient=1.0), torch.tensor([0.0, 0.5, 1.0])
    for progress, gamma in ((0.0, 1.0), (0.45, 0.505), (0.9, 0.01), (1.0, 0.01)):
        cost = losses.importance_cost(g, smooth, progress).tolist()
        assert cost == pytest.approx([0.0, 0.25 * (1 + gamma**2) / (0.25 + gamma**2), 1.0])
    plain = losses.importance_cost(g, dataclasses.replace(smooth, normalise_at_one=False), 0.0)
    assert plain.tolist() == pytest.approx([0.0, 0.2, 0.5])
    weights = torch.tensor([[2.0, 0, 0, 0], [1.0, -1, 0, 0], [1.0, 1, 1, -1]])
    assert losses.locality(weights, 2.0).tolist() == pytest.approx([m / (1 + 2 * m / 4) for m in (1, 2, 4)])


def test_all_of_today_resumes_bit_identically(tmp_path: Path) -> None:
    """Muon's momenta, AdamW's moments, the pool of particles and the firing rates travel."""
    config = dataclasses.replace(MUON, steps=6, checkpoint_every=3, metrics_every=2)
    straight, resumed = (gated(GateConfig(kind="shared_mlp", hidden=(4,))) for _ in range(2))
    train_spd(straight, Batches(), config, tmp_path / "a", "a")

    class Cut(Batches):
        def __next__(self) -> Tensor:
            if self.served == 4:
                raise KeyboardInterrupt
            return super().__next__()

    with pytest.raises(KeyboardInterrupt):
        train_spd(gated(GateConfig(kind="shared_mlp", hidden=(4,))), Cut(), config, tmp_path / "b", "b")
    train_spd(resumed, Batches(), config, tmp_path / "b", "b")
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
