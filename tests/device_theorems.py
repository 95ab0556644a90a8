"""What must hold on every device: `test_emulated_cuda.py` proves it without a GPU, `test_cuda.py` on a real one.

Both import these tests and give them three fixtures:

    device        the device's name; tensors, generators and modules of another one are refused there
    waiting       a context manager that gives a Counter of what made the host wait for the device inside it
    same_draws    makes random numbers drawn on the device those that a CPU's generator of the same seed draws

On every device the values are the CPU's: the same target, text and seeds, compared at float32's precision.
"""

import base64
import contextlib
import copy
import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import clt, each_by_itself, make_small_target, saes, transcoders
from torch import Tensor
from torch.utils._pytree import tree_map_only

import activation_store
import baselines
import evaluation
import features
import interop
import main
import measure
import study
import training
from activation_cache import Cache
from activation_store import ActivationsStore, DataConfig, Harvest
from baselines import (
    AffineReplacement,
    IdentityReplacement,
    MeanReplacement,
    NeuronsReplacement,
    ZeroReplacement,
    fit_affine,
)
from checkpoints import TrainingRecord, build_coder, save_checkpoint
from coder import Coder, codes_by_layer
from coder_replacements import CLTReplacement, SAEReplacement, TranscoderReplacement
from config import (
    BatchTopK,
    CLTConfig,
    EncoderConfig,
    Frequency,
    GateConfig,
    Gated,
    JumpReLU,
    Locality,
    Lp,
    Merged,
    Recon,
    Relu,
    Rule,
    SAEConfig,
    SPDConfig,
    SPDTrainConfig,
    TopK,
    TrainConfig,
)
from evaluation import PROTOCOLS, evaluate
from pareto import ParetoPoint, read_points
from patching import capture
from replacement import Replacement
from spd_model import ComponentModel
from spd_replacement import SPDReplacement
from spd_training import SPDTrainer
from spd_variants import VARIANTS, SPDVariant, VariantName
from target_models import Loaded, TargetModel, make_target
from token_stream import DatasetSpec
from training import AT_HOME, CoderRun, group_step, start_run, train_group

Waiting = Callable[[], contextlib.AbstractContextManager[Counter[str]]]
D, LATENTS, K, SILENT = 16, 48, 4, 10
RULES = {
    "relu": Relu(0.01),
    "topk": TopK(K),
    "batchtopk": BatchTopK(K),
    "jumprelu": JumpReLU(0.01),
    "gated": Gated(0.01),
}
KINDS: dict[str, Callable[[Rule], Any]] = {
    "sae": lambda rule: SAEConfig(layer=1, site="mlp_out", d_in=D, d_dict=LATENTS, rule=rule),
    "transcoder": lambda rule: EncoderConfig(layer=0, d_in=D, d_out=D, d_dict=LATENTS, rule=rule),
    "transcoder-skip": lambda rule: EncoderConfig(layer=1, d_in=D, d_out=D, d_dict=LATENTS, rule=rule, skip=True),
    "clt": lambda rule: CLTConfig(layers=(0, 1), d_in=D, d_out=D, d_dict=LATENTS, rule=rule),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_rule = pytest.mark.parametrize("rule", RULES)
DATA = DataConfig(layers=(0, 1), batch_tokens=32, buffer_tokens=256, model_batch=4)
TRAIN = TrainConfig(tokens=32 * 12, lr=3e-3, metrics_every=4, checkpoint_every=5, calibration_tokens=128, dead_after=64)


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    """A random model of two layers, on the CPU, and a token folder for its text: a bare machine has no `datasets`."""
    folder, generator = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    for split, documents in (("train", 600), ("val", 150)):
        lengths = generator.integers(5, 60, documents)
        ids = np.concatenate([[0, *generator.integers(2, 62, n)] for n in lengths]).astype(np.uint16)
        np.save(folder / f"{split}.npy", ids)
    return dataclasses.replace(
        make_small_target(folder), data=DatasetSpec(str(folder), tokenised=True, val_split="val")
    )


@pytest.fixture(autouse=True)
def float32_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device may choose between bf16 and float32, it takes float32."""
    monkeypatch.setenv("NN_BF16", "off")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ruler gives memory back after each batch, which takes longer than the batches here."""
    monkeypatch.setattr(evaluation, "give_back_memory", lambda: None)


def on(target: TargetModel, device: str) -> TargetModel:
    """A copy of the target on another device."""
    return make_target(target.name, Loaded(copy.deepcopy(target.model), *_rest(target)), device)


def _rest(target: TargetModel) -> tuple[Any, ...]:
    return target.tokenizer, target.context, target.data


def coder_of(kind: str, rule: str) -> Coder:
    return build_coder(KINDS[kind](RULES[rule]), torch.Generator().manual_seed(0))


def assert_close(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    """Tensors in any nest agree, wherever they lie, to `rtol` of the largest entry of each."""
    found, expected = (tree_map_only(Tensor, lambda x: x.detach().cpu(), tree) for tree in (found, expected))
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=rtol, msg=lambda told: f"on the device (left), on the CPU (right):\n{told}"
    )


# ---------------------------------------------------------------------------------------------------------- one step


def enrolled(target: TargetModel, kind: str, rule: str, folder: Path, store: ActivationsStore) -> CoderRun:
    """A run of a coder some of whose latents cannot fire, so that AuxK has work."""
    run = start_run(kind, coder_of(kind, rule), store=store, config=TRAIN, folder=folder / str(target.device))
    with torch.no_grad():
        for encoder in run.coder.encoders:
            encoder.b_enc[:SILENT] = -8.0
    if run.coder.k is not None:
        run.coder.set_k(K)
    return run


def stepped(
    target: TargetModel, kind: str, rule: str, folder: Path, state: dict[str, Any] | None = None
) -> tuple[list[Tensor], CoderRun]:
    """Readings of four steps, AuxK on from the second, and the run after them."""
    store = ActivationsStore(target, DATA)
    if state is not None:
        store.load_state_dict(tree_map_only(Tensor, lambda x: x.to(target.device), state))
    run = enrolled(target, kind, rule, folder, store)
    readings = []
    for batch in itertools.islice(store, 4):
        readings.append(group_step([run], batch, config=TRAIN, factor=0.5))
        run.coder.count_dead(1)
        assert run.coder.n_dead >= SILENT * len(run.coder.encoders)
    return readings, run


@every_kind
@every_rule
def test_a_step_on_the_device_is_the_cpus(kind: str, rule: str, cpu: TargetModel, device: str, tmp_path: Path) -> None:
    """Loss, FVU and L0 of four steps, all weights and counters after them, and Adam's means of the gradients."""
    state = ActivationsStore(cpu, DATA).state_dict()
    (theirs, there), (ours, here) = (stepped(t, kind, rule, tmp_path, state) for t in (on(cpu, device), cpu))
    assert {p.device for p in there.coder.parameters()} == {torch.device(device)}
    assert_close(theirs, ours)
    assert_close(there.coder.state_dict(), here.coder.state_dict(), 1e-3)
    assert_close(there.optimiser.state_dict()["state"], here.optimiser.state_dict()["state"], 1e-3)


@every_kind
@every_rule
def test_a_step_never_waits_for_the_device(
    kind: str, rule: str, cpu: TargetModel, device: str, waiting: Waiting, tmp_path: Path
) -> None:
    target = on(cpu, device)
    store = ActivationsStore(target, DATA)
    run = enrolled(target, kind, rule, tmp_path, store)
    group_step([run], next(store), config=TRAIN, factor=0.5)
    run.coder.count_dead(1)
    group_step([run], next(store), config=TRAIN, factor=0.5)
    with waiting() as waits:
        group_step([run], next(store), config=TRAIN, factor=0.5)
    assert not waits, waits


# ---------------------------------------------------------------------------------------------------- whole trainings

GROUP = [("transcoder", "batchtopk"), ("transcoder-skip", "topk"), ("sae", "relu"), ("sae", "batchtopk"),
         ("transcoder", "jumprelu"), ("clt", "batchtopk")]  # fmt: skip


def trained(
    target: TargetModel, folder: Path, group: Sequence[tuple[str, str]] = GROUP, harvest: Harvest = AT_HOME
) -> dict[str, Any]:
    """Name → tensors of a group trained together."""
    coders = [coder_of(*pair) for pair in group]
    made = train_group(coders, target, data=DATA, config=TRAIN, folder=folder, harvest=harvest)
    assert {p.device for c in made for p in c.coder.parameters()} == {target.device}, "where the ruler measures"
    return {c.record.name: c.coder.state_dict() for c in made}


def test_a_group_trains_on_the_device_as_on_the_cpu(cpu: TargetModel, device: str, tmp_path: Path) -> None:
    """Annealing, AuxK and calibration included: every tensor of every coder, and every metric but the time."""
    here, there = (trained(target, tmp_path / str(target.device)) for target in (cpu, on(cpu, device)))
    assert_close(there, here, 5e-3)
    for name in here:
        ours, theirs = (
            [json.loads(line) for line in (tmp_path / place / name / "metrics.jsonl").read_text().splitlines()]
            for place in ("cpu", str(torch.device(device)))
        )
        for one, two in zip(ours, theirs, strict=True):
            assert two | {"tokens_per_second": 0} == pytest.approx(one | {"tokens_per_second": 0}, rel=5e-3)


@pytest.mark.parametrize("cache", ["none", "fp16"])
@pytest.mark.parametrize("coders_on_device", [True, False])
def test_coders_train_on_another_device_than_their_target(
    coders_on_device: bool, cache: Cache, cpu: TargetModel, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target on the CPU and buffer and coders on the device, and the other way round; cut off and gone on with, too."""
    monkeypatch.setenv("NN_CACHE_HOME", str(tmp_path / "cache"))
    target, place = (cpu, device) if coders_on_device else (on(cpu, device), "cpu")
    seen, step = [], training.group_step

    def watched(runs: Any, batch: Any, *, config: Any, factor: float) -> Tensor:
        seen.append({batch.inputs.device, *(p.device for run in runs for p in run.coder.parameters())})
        if len(seen) == 8:
            raise KeyboardInterrupt
        return step(runs, batch, config=config, factor=factor)

    harvest, group = Harvest(device=place, cache=cache), GROUP[-3:]
    here = trained(cpu, tmp_path / "here", group)
    straight = trained(target, tmp_path / "straight", group, harvest)
    monkeypatch.setattr(training, "group_step", watched)
    with pytest.raises(KeyboardInterrupt):
        trained(target, tmp_path / "apart", group, harvest)
    apart = trained(target, tmp_path / "apart", group, harvest)
    assert all(places == {torch.device(place)} for places in seen) and len(seen) == 8 + 12 - 5
    assert_close(apart, here, 5e-3)
    for name, tensors in straight.items():
        assert all(torch.equal(apart[name][key], value) for key, value in tensors.items()), name


def test_forwards_beside_the_steps_change_nothing(
    cpu: TargetModel, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor of every coder of a training, to the last bit; some forwards did run between steps."""
    target, group, ahead = on(cpu, device), GROUP[-3:], ActivationsStore._harvest_ahead
    early: list[int] = []

    def counted(store: ActivationsStore) -> None:
        ahead(store)
        early.append(len(store.early))

    monkeypatch.setattr(ActivationsStore, "_harvest_ahead", counted)
    beside = trained(target, tmp_path / "beside", group)
    assert max(early) == 2 * 4 * 15 and 0 in early
    monkeypatch.setattr(activation_store, "harvests_ahead", lambda device: False)
    between = trained(target, tmp_path / "between", group)
    for name, tensors in between.items():
        assert all(torch.equal(beside[name][key], value) for key, value in tensors.items()), name


def test_an_interrupted_run_ends_on_the_device_as_if_it_had_not_been(
    cpu: TargetModel, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-identical: a step is deterministic, and the state holds all that decides the steps to come."""
    target, step = on(cpu, device), training.group_step
    straight = trained(target, tmp_path / "straight", GROUP[-3:])

    def interrupted(runs: Any, batch: Any, *, config: Any, factor: float) -> Tensor:
        if len(steps) == 8:
            raise KeyboardInterrupt
        steps.append(factor)
        return step(runs, batch, config=config, factor=factor)

    steps: list[float] = []
    monkeypatch.setattr(training, "group_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(target, tmp_path / "interrupted", GROUP[-3:])
    monkeypatch.setattr(training, "group_step", step)
    assert list((tmp_path / "interrupted").glob("group_*.pt"))
    resumed = trained(target, tmp_path / "interrupted", GROUP[-3:])
    for name, tensors in straight.items():
        for key, value in tensors.items():
            assert torch.equal(resumed[name][key], value), f"{name} {key}"


@every_kind
def test_a_calibrated_threshold_is_the_cpus(kind: str, cpu: TargetModel, device: str, tmp_path: Path) -> None:
    state = ActivationsStore(cpu, DATA).state_dict()
    found = []
    for target in (on(cpu, device), cpu):
        _, run = stepped(target, kind, "batchtopk", tmp_path, state)
        batches = [
            run.coder.view(*batch, run.rows)[0] for batch in itertools.islice(ActivationsStore(target, DATA, "test"), 4)
        ]
        run.coder.calibrate(batches)
        deployed = run.coder.eval()
        codes = [own for x in batches for own in codes_by_layer(deployed.encode(x))]
        active = sum((own.values > 0).sum().item() for own in codes)
        assert active == pytest.approx(K * 4 * DATA.batch_tokens * len(deployed.encoders), abs=len(deployed.encoders))
        found.append([encoder.threshold for encoder in deployed.encoders])
    assert_close(*found)


# ----------------------------------------------------------------------------------- stochastic parameter decomposition

SOURCES = ("stochastic", "pgd", "persistent", "importance", "deployed", "ones")  # under every routing
OF_TODAY = (Merged(coefficient=0.5, particles=3), Recon(coefficient=0.5, source="running"))
ROUTINGS = ("all", "layerwise", "subset")
GATES = {
    "mlp": GateConfig(kind="mlp", hidden=(5,)),
    "deep-mlp": GateConfig(kind="mlp", hidden=(5, 4)),
    "vector_mlp": GateConfig(kind="vector_mlp", hidden=(5,)),
    "shared_mlp": GateConfig(kind="shared_mlp", hidden=(5,)),
    "global_mlp": GateConfig(kind="global_shared_mlp", hidden=(5,)),
    "causal_transformer": GateConfig(
        kind="global_shared_transformer", hidden=(16,), d_model=8, blocks=2, heads=2, causal=True
    ),
    "tapped_transformer": GateConfig(
        kind="global_shared_transformer", hidden=(16,), d_model=8, blocks=2, heads=2, taps=("*.c_fc",)
    ),
    "transformer": GateConfig(
        kind="global_shared_transformer", hidden=(16,), d_model=8, blocks=2, heads=2, causal=False
    ),
}
TOKENS = torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(1))


def decomposition_of(target: TargetModel, gate: str) -> ComponentModel:
    config = SPDConfig(components=(("h.*.mlp.c_fc", 12), ("h.*.mlp.down_proj", 14)), gate=GATES[gate])
    return ComponentModel(target.model, config, torch.Generator().manual_seed(0)).to(target.device)


def trainer_of(
    target: TargetModel, gate: str, *recon: Recon | Merged, autocast: bool = False, optimiser: str = "adamw"
) -> SPDTrainer:
    """After its warm-up."""
    config = SPDTrainConfig(
        steps=10,
        lr=1e-3,
        recon=recon,
        minimality=Lp(coefficient=1e-3, p=(2.0, 1.0)),
        frequency=Frequency(coefficient=1e-4, positions=100.0),
        locality=Locality(coefficient=1e-3),
        distance="kl",
        optimiser=optimiser,  # type: ignore[arg-type]
        faithfulness=1.0,
        faithful_steps=3,
        clip=1.0,
    )
    trainer = SPDTrainer(decomposition_of(target, gate), config, autocast)
    trainer.warm_up()
    return trainer


def spd_steps(trainer: SPDTrainer, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Readings of two steps, and the state after them without the generator's, of which each device has its own kind."""
    readings = [trainer.step(TOKENS.to(device)) for _ in range(2)]
    state = trainer.state_dict()
    moments = [optimiser["state"] for optimiser in state["optimisers"]]
    return readings, {"moments": moments, **{key: state[key] for key in ("model", "rates")}} | {
        f"adversary {i}": [sources, moments["state"]] for i, (sources, moments) in state["adversaries"].items()
    }


def compare_spd(cpu: TargetModel, device: str, gate: str, recon: Recon) -> None:
    theirs, ours = (spd_steps(trainer_of(on(cpu, place), gate, recon), place) for place in (device, "cpu"))
    assert_close(theirs, ours, 1e-3)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_an_spd_step_on_the_device_is_the_cpus(
    source: str, routing: str, cpu: TargetModel, device: str, same_draws: None
) -> None:
    """Every source of masks, under every routing: losses, weights, gates and adversaries."""
    steps = {"pgd": 3, "persistent": 2}.get(source, 1)
    compare_spd(
        cpu, device, "shared_mlp", Recon(coefficient=1.0, source=source, routing=routing, steps=steps, step_size=0.1)
    )  # type: ignore


def test_a_step_of_todays_terms_on_the_device_is_the_cpus(cpu: TargetModel, device: str, same_draws: None) -> None:
    """Merged masks with their pool of particles, running gates, and Muon, whose products are bf16."""
    steps = [
        spd_steps(trainer_of(on(cpu, place), "shared_mlp", *OF_TODAY, optimiser="muon"), place)
        for place in (device, "cpu")
    ]
    assert_close(*steps, 1e-2)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_steps_on_the_device_as_on_the_cpu(
    gate: str, cpu: TargetModel, device: str, same_draws: None
) -> None:
    compare_spd(cpu, device, gate, Recon(coefficient=1.0, routing="subset"))


def test_a_least_squares_start_on_the_device_is_the_cpus(cpu: TargetModel, device: str) -> None:
    """V U = W as far as the components suffice: the products agree, though their factors need not."""
    products = []
    for target in (on(cpu, device), cpu):
        model = decomposition_of(target, "shared_mlp")
        model.start_faithful()
        products.append({path: part.V @ part.U for path, part in model.components.items()})
    assert_close(*products, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------ the ruler


def every_replacement(target: TargetModel) -> list[Replacement]:
    """Every method with each of its variants, and every baseline."""
    layers, device = range(target.n_layers), target.device
    clean = capture(target, TOKENS, layers)
    x, y = (kept.flatten(1, 2) for kept in clean[:2])
    local, scalar, wide, attending = (
        decomposition_of(target, gate).requires_grad_(False)
        for gate in ("shared_mlp", "mlp", "global_mlp", "causal_transformer")
    )
    plain = [coder.to(device) for coder in transcoders(layers)]
    return [
        SAEReplacement([coder.to(device) for coder in saes(layers)]),
        TranscoderReplacement(plain),
        TranscoderReplacement(plain, top_k=2),
        TranscoderReplacement([coder.to(device) for coder in transcoders(layers, Relu(0.01), skip=True)]),
        TranscoderReplacement([coder.to(device) for coder in transcoders(layers, JumpReLU(0.01))], variant="jumprelu"),
        CLTReplacement(clt(layers).to(device)),
        CLTReplacement(clt(layers, TopK(3)).to(device), variant="topk3"),
        SPDReplacement(target, local),
        SPDReplacement(target, local, threshold=0.5, delta=True),
        SPDReplacement(target, local, top_k=3, matrices=["c_fc"]),
        SPDReplacement(target, scalar, top_k=3),
        SPDReplacement(target, wide, top_k=4),
        SPDReplacement(target, attending, delta=True),
        NeuronsReplacement(target, layers, 5),
        AffineReplacement(layers, fit_affine([(x, y)])),
        IdentityReplacement(layers),
        ZeroReplacement(layers),
        MeanReplacement(layers, y.mean(1)),
    ]


def assert_rows_agree(
    theirs: Sequence[Any], ours: Sequence[Any], rel: float = 1e-3, spd: tuple[float, float] = (1e-3, 1e-4)
) -> None:
    """Every column of every row, to `rel` or 1e-4; rows of decompositions to `spd`, (relative, absolute).

    CE recovered is left out where an ablation costs less than the error allowed to CE: it is a ratio of differences of CEs,
    which are compared themselves, and its denominator is then nothing but rounding.
    """
    assert len(theirs) == len(ours) > 0
    cost = {(row.method, row.layers): row.ce_degradation for row in ours
            if isinstance(row, ParetoPoint) and row.protocol in ("single", "free")}  # fmt: skip
    for one, two in zip(theirs, ours):
        close, least = spd if two.method.startswith("spd") else (rel, 1e-4)
        for column, expected in vars(two).items():
            found, told = getattr(one, column), f"{column} of {two.method}, {two.protocol}, {two.layers}"
            _, recovered, ablation = column.partition("ce_recovered_")
            if recovered and expected is not None and abs(cost[ablation, two.layers]) < close * two.ce:
                assert isinstance(found, float), told
            elif isinstance(expected, float) or (column == "l0_by_layer" and expected):
                assert column == "train_seconds" or found == pytest.approx(expected, rel=close, abs=least), told
            else:
                assert column.endswith("checkpoint") or found == expected, told


@pytest.mark.parametrize("name", VARIANTS)
def test_a_mask_variant_on_the_device_is_the_cpus(name: VariantName, cpu: TargetModel, device: str) -> None:
    """Masks that are drawn are others there, so that they are compared with themselves: the same twice."""
    drawn = VARIANTS[name].source is None
    measured = []
    for place in (device, device if drawn else "cpu"):
        target = on(cpu, place)
        spd = SPDVariant(target, decomposition_of(target, "shared_mlp").requires_grad_(False), name)
        beside = ZeroReplacement(range(target.n_layers))
        measured.append(evaluate(target, [spd, beside], each_by_itself(TOKENS.to(target.device)), batch=3))
    theirs, ours = measured
    assert_rows_agree(theirs.points, ours.points)
    assert_rows_agree(theirs.layers, ours.layers)


def test_the_ruler_on_the_device_reads_what_it_reads_on_the_cpu(cpu: TargetModel, device: str) -> None:
    """Every replacement and baseline under every protocol, every column."""
    measured = [
        evaluate(target, every_replacement(target), each_by_itself(TOKENS.to(target.device)), batch=3)
        for target in (on(cpu, device), cpu)
    ]
    assert {p.protocol for p in measured[0].points} == set(PROTOCOLS)
    for rows in ("points", "layers", "pairs"):
        assert_rows_agree(*(getattr(one, rows) for one in measured))


# ------------------------------------------------------------------------------------------------------- command lines


def test_a_foreign_dictionary_is_measured_on_the_device_as_on_the_cpu(
    cpu: TargetModel, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`measure.main`: an imported transcoder beside all baselines; `features.main`: its latents fire as often."""
    monkeypatch.setattr(baselines, "BASELINE_TOKENS", 8192)
    for module in (measure, interop, features):
        monkeypatch.setattr(module, "load_target", lambda name, place: on(cpu, place))
    record = TrainingRecord(
        name="n",
        target=cpu.name,
        target_fingerprint=cpu.fingerprint,
        train_tokens=512,
        train_seconds=1.0,
        seed=3,
        commit="c",
        hooks=("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"),
    )
    save_checkpoint(tmp_path / "ours", transcoders(range(2))[1], record)
    interop.export("saelens", (str(tmp_path / "ours"),), tmp_path / "foreign")
    for place in (device, "cpu"):
        measure.main(
            (str(tmp_path / "foreign"),), tokens=320, top_k=(2,), neurons=(4,), format="saelens", device=place,
            points=tmp_path / place / "points.csv",
        )  # fmt: skip
        features.main(
            (str(tmp_path / "foreign"),), tokens=320, format="saelens", device=place, output=tmp_path / f"{place}.html"
        )
    assert_rows_agree(*(read_points(tmp_path / place / "points.csv") for place in (device, "cpu")))
    theirs, ours = (fire_counts_of_page((tmp_path / f"{place}.html").read_text()) for place in (device, "cpu"))
    assert ours.sum() > 0 and np.abs(theirs - ours).max() <= 2, "rounding may move a latent over its threshold"


def fire_counts_of_page(html: str) -> np.ndarray:
    packed = re.search(r'"count":\{"type":"[^"]*","base64":"([^"]*)"\}', html)
    assert packed is not None
    return np.frombuffer(base64.b64decode(packed[1]), "<u4").astype(np.int64)


def test_the_main_job_on_the_device_gives_the_cpus_table(
    cpu: TargetModel, device: str, same_draws: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From loading the target to the report: transcoders and a CLT trained, SPD trained, all measured."""
    monkeypatch.setattr(baselines, "BASELINE_TOKENS", 8192)
    monkeypatch.setattr(study, "draw", lambda points, path: None)
    monkeypatch.setattr(main, "load_target", lambda name, place: on(cpu, place))
    for place in (device, "cpu"):
        main.main(
            main.Settings(
                layers=(0, 1), transcoder_k=(8,), clt_k=(8,), neuron_k=(4,), d_dict=64, tokens=2048, tune_tokens=512, batch=512,
                retrain_spd=True, spd_steps=2, eval_tokens=256, device=place, output=tmp_path / place,
                checkpoints=tmp_path / "checkpoints" / place,
            )
        )  # fmt: skip
    tables = [read_points(tmp_path / place / "points.csv") for place in (device, "cpu")]
    assert {
        "transcoder",
        "transcoder-kl-mixed",
        "clt-kl-mixed",
        "clt",
        "spd",
        "spd-0.5",
        "neurons",
        "neurons-joint",
        "affine",
        "identity",
        "zero",
        "mean",
    } == {row.method for row in tables[0]}
    assert_rows_agree(*tables, rel=1e-2, spd=(5e-2, 5e-3))  # it starts from factors that are unique as a product alone
    settings = json.loads((tmp_path / device / "settings.json").read_text())
    assert settings["device"] == torch.cuda.get_device_name(device)
