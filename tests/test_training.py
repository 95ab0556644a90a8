"""Theorems about the activation store, checkpoints and the training loop, on a small random target."""

import copy
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import make_small_target

import activation_store
import checkpoints
import recipes
from activation_store import ActivationsStore, DataConfig
from baselines import IdentityReplacement, ZeroReplacement, baselines
from checkpoints import TrainingRecord, check_target, held, load_checkpoint, run_name, save_checkpoint
from clt import CrossLayerTranscoder
from config import BatchTopK, CLTConfig, EncoderConfig, Gated, JumpReLU, Relu, SAEConfig, TopK, TrainConfig
from evaluation import evaluate, held_out
from pareto import markdown_table
from patching import capture
from sae import build_sae
from sparse_ops import to_dense
from target_models import Loaded, TargetModel, make_target
from training import (
    Progress,
    annealed_k,
    default_learning_rate,
    group_step,
    run_training,
    schedule,
    start_run,
    train_encoder,
    train_group,
)
from transcoder import build_transcoder

DATA = DataConfig(layers=(0, 1), batch_tokens=32, buffer_tokens=256, model_batch=4)
TRAIN = TrainConfig(
    tokens=32 * 30, lr=3e-3, metrics_every=5, checkpoint_every=10, calibration_tokens=128, dead_after=200
)
FIRST_NAME = "small_transcoder_batchtopk_L0_k4_d48_s0_n960_lr0.003"


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coders() -> list:
    return [
        build_transcoder(EncoderConfig(layer=0, d_in=16, d_out=16, d_dict=48, rule=BatchTopK(4)), g()),
        build_transcoder(EncoderConfig(layer=1, d_in=16, d_out=16, d_dict=48, rule=TopK(4), skip=True), g()),
        build_transcoder(EncoderConfig(layer=1, d_in=16, d_out=16, d_dict=48, rule=JumpReLU(l0=0.01)), g()),
        build_sae(SAEConfig(layer=1, site="mlp_out", d_in=16, d_dict=48, rule=Relu(l1=0.01)), g()),
        CrossLayerTranscoder(CLTConfig(layers=(0, 1), d_in=16, d_out=16, d_dict=48, rule=BatchTopK(4)), g()),
        build_sae(SAEConfig(layer=1, site="mlp_out", d_in=16, d_dict=48, rule=Gated(l1=0.01)), g()),
    ]


# --------------------------------------------------------------------------------------------------------------- store


def test_inputs_and_outputs_are_aligned_by_token(small_target: TargetModel) -> None:
    """The captured MLP on a batch's inputs gives the batch's targets, in every layer."""
    batch = next(ActivationsStore(small_target, DATA))
    for layer in range(2):
        y = small_target.mlp(layer, batch.inputs[layer])
        torch.testing.assert_close(y, batch.targets[layer], atol=0.02, rtol=0.02)  # bf16 and fp16 in between


def test_no_token_is_lost_or_repeated_and_batches_mix_sequences(small_target: TargetModel) -> None:
    store = ActivationsStore(small_target, DATA)
    seen = torch.cat([batch.inputs[0] for batch in (next(store) for _ in range(20))])
    stream = store.stream.__class__(small_target.data, small_target.tokenizer, "train", 4, 16)
    captured = [capture(small_target, next(stream), (0,)).inputs[0] for _ in range(store.forwards)]
    expected = torch.cat([inputs[:, 1:].flatten(0, 1).half().float() for inputs in captured])
    position = {row.numpy().tobytes(): i for i, row in enumerate(expected)}
    found = [position[row.numpy().tobytes()] for row in seen]
    assert len(set(found)) >= 0.95 * len(found), "only tokens in identical contexts may look the same"
    first = torch.tensor(found[:32]) // 15
    assert len(first.unique()) >= 10, f"a batch should mix many sequences: {first.unique()=}"


def test_a_store_resumes_exactly(small_target: TargetModel) -> None:
    store = ActivationsStore(small_target, DATA)
    for _ in range(7):
        next(store)
    state = copy.deepcopy(store.state_dict())
    expected = [next(store) for _ in range(12)]
    other = ActivationsStore(small_target, DATA)
    other.load_state_dict(state)
    for batch in expected:
        again = next(other)
        assert torch.equal(again.inputs, batch.inputs) and torch.equal(again.targets, batch.targets)


@pytest.mark.parametrize("batch", [32, 128])
def test_forwards_before_a_refill_give_the_batches_of_forwards_in_it(
    batch: int, small_target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, to the end of the text, in as much memory; resumed after any step."""
    data = dataclasses.replace(DATA, batch_tokens=batch)
    plain = list(ActivationsStore(small_target, data))
    monkeypatch.setattr(activation_store, "harvests_ahead", lambda device: True)
    store, other, early = ActivationsStore(small_target, data), ActivationsStore(small_target, data), 0
    for i, expected in enumerate(plain):
        if i % 3 == 0:
            other.load_state_dict(copy.deepcopy(store.state_dict()))
        ours, again = next(store), next(other)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, ours, again)), f"batch {i}"
        early += len(store.early) > 0
        held = torch.cat([store.free, store.order])
        assert torch.equal(held.sort().values, torch.arange(store.buffer.shape[2])), "every slot is there once"
    assert next(store, None) is None and early > len(plain) // 4


def test_an_activation_out_of_range_that_came_early_is_named(
    small_target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_store, "harvests_ahead", lambda device: True)
    store, last = ActivationsStore(small_target, DATA), small_target.model.h[1].mlp.down_proj
    with torch.no_grad():
        last.weight.mul_(1e6)
        while not len(store.early):
            next(store)
        last.weight.mul_(1e-6)
    other = ActivationsStore(make_small_target(Path(small_target.data.path)), DATA)
    other.load_state_dict(copy.deepcopy(store.state_dict()))
    for resumed in (store, other):
        with pytest.raises(ValueError, match="^an activation of layer 1 of 'small' is not finite, or over 16 times"):
            list(resumed)


def test_the_buffer_keeps_to_its_stated_memory(small_target: TargetModel) -> None:
    store = ActivationsStore(small_target, DATA)
    stated = 2 * 2 * 2 * (256 + 4 * 15) * 16  # bytes · sides · layers · (buffer + one forward) · d
    for _ in range(20):
        next(store)
        assert store.buffer.nbytes == store.bytes == stated, f"{store.bytes=} {stated=}"


def test_a_text_that_ends_is_served_to_its_end(small_target: TargetModel) -> None:
    """All tokens but a last part of a batch are given out once, then the store stops; too little text is refused."""
    store = ActivationsStore(small_target, DATA, split="test")
    batches = list(store)
    n = store.forwards * 4 * 15
    assert len(batches) == n // 32, f"{len(batches)=} {n=}"
    assert next(store, None) is None
    with pytest.raises(ValueError, match="less than a batch of 100000"):
        ActivationsStore(small_target, dataclasses.replace(DATA, batch_tokens=100_000, buffer_tokens=200_000))


def test_a_batch_larger_than_the_buffer_or_than_the_training_is_refused(
    small_target: TargetModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="a batch of 40000 tokens is more than half of the buffer of 65536"):
        DataConfig(layers=(0,), batch_tokens=40_000)
    with pytest.raises(ValueError, match="31 training tokens are less than a batch of 32"):
        train_encoder(
            coders()[0], small_target, data=DATA, config=dataclasses.replace(TRAIN, tokens=31), folder=tmp_path
        )
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("factor", [2.0**5, 2.0**24])
def test_activations_beyond_fp16_are_kept_exactly(small_target: TargetModel, factor: float) -> None:
    """Within its range a model is served as ever; with outputs 2²⁴ times as large, beyond 65,504 as Gemma 3's, 2²⁴ times that."""
    plain = list(itertools.islice(ActivationsStore(small_target, DATA), 20))
    assert (factor * max(batch.targets[1].abs().max() for batch in plain) > torch.finfo(torch.float16).max) == (
        factor > 2**5
    )
    with torch.no_grad():
        small_target.model.h[1].mlp.down_proj.weight.mul_(factor)
    store, other = ActivationsStore(small_target, DATA), ActivationsStore(small_target, DATA)
    assert store.scaled == (factor > 2.0**12)
    for a, b in zip(plain, itertools.islice(store, 20)):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets[0], b.targets[0])
        assert torch.equal(a.targets[1] * factor, b.targets[1])
    other.load_state_dict(copy.deepcopy(store.state_dict()))
    assert torch.equal(next(other).targets, next(store).targets)
    same = ActivationsStore(make_small_target(Path(small_target.data.path)), DATA).stats.y_variance
    torch.testing.assert_close(
        ActivationsStore(small_target, DATA).stats.y_variance, same * torch.tensor([1, factor**2])
    )


def test_an_activation_that_is_not_finite_is_named(small_target: TargetModel) -> None:
    with torch.no_grad():
        small_target.model.h[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="^layer 1 of 'small' writes or is given NaN or infinity$"):
        ActivationsStore(small_target, DATA)


def test_an_activation_that_outgrows_the_first_forwards_is_named(small_target: TargetModel) -> None:
    store, last = ActivationsStore(small_target, DATA), small_target.model.h[1].mlp.down_proj
    with torch.no_grad():
        last.weight.mul_(1e6)
    with pytest.raises(ValueError, match="^an activation of layer 1 of 'small' is not finite, or over 16 times"):
        list(store)


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_a_layer_that_writes_a_constant_is_named_in_training_and_has_no_fvu(
    small_target: TargetModel, tmp_path: Path, bias: float
) -> None:
    model = small_target.model
    with torch.no_grad():
        model.h[1].mlp.down_proj.weight.zero_()
    model.h[1].mlp.down_proj.bias = torch.nn.Parameter(torch.full((16,), bias), requires_grad=False)
    target = make_target("pruned", Loaded(model, small_target.tokenizer, 16, small_target.data), "cpu")
    with pytest.raises(ValueError, match="^layer 1 of 'pruned' writes the same on every token: leave it out"):
        train_group(coders(), target, data=DATA, config=TRAIN, folder=tmp_path)
    replacements = [IdentityReplacement((0, 1)), ZeroReplacement((0, 1)), *baselines(target, (0, 1), (4,))]
    measured = evaluate(target, replacements, held_out(target, 160))
    for point in measured.points:
        assert (point.fvu is None) == (1 in point.layers) and point.mse is not None and math.isfinite(point.mse)
        assert (point.tail_max is None) == (1 in point.layers and bias == 0)
    assert "nan" not in markdown_table(measured.points)


def test_a_short_training_sets_its_thresholds_on_a_quarter_of_its_tokens(
    small_target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        recipes, "train_group", lambda *_, config, **_others: asked.append(config.calibration_tokens) or []
    )
    configs = recipes.transcoder_configs(small_target, layers=(0,), rules=[BatchTopK(4)], d_dict=32)
    for tokens in (4_000, 40_000, 1_000_000):
        recipes.train_coders(configs, small_target, tokens=tokens, batch=2048, seed=0, folder=tmp_path)
    assert asked == [2_048, 10_000, 65_536]


def test_numbers_that_cannot_be_meant_are_refused_in_one_line(small_target: TargetModel, tmp_path: Path) -> None:
    sizes = {"d_in": 16, "d_out": 16, "d_dict": 32}
    for layers in ((2, 0), (0, 0), ()):
        with pytest.raises(
            ValueError, match=r"^layers \([^\n]*\) of a cross-layer transcoder must ascend, each named once$"
        ):
            CLTConfig(layers=layers, rule=TopK(4), **sizes)
    for rule in (TopK, BatchTopK):
        for k in (0, -1):
            with pytest.raises(ValueError, match=f"^k={k}: a token needs at least one active latent$"):
                rule(k)
    twice = [build_transcoder(EncoderConfig(layer=0, rule=TopK(4), **sizes), torch.Generator()) for _ in range(2)]
    with pytest.raises(
        ValueError, match="^small_transcoder_[^\n]* was asked for more than once: name every layer and k once$"
    ):
        train_group(twice, small_target, data=DATA, config=TRAIN, folder=tmp_path)
    for tokens, d_dict in ((0, 32), (-5, 32), (100, 0)):
        with pytest.raises(ValueError, match=f"^{tokens} training tokens, {d_dict} latents: ask for 1 or more"):
            default_learning_rate(tokens, a_transcoder(d_dict))
    for wrong in ({"batch_tokens": 0}, {"batch_tokens": -32}, {"model_batch": 0}):
        with pytest.raises(ValueError, match=r"^a batch of [^\n]*: choose 1 or more$"):
            dataclasses.replace(DATA, **wrong)
    for n in (0, -5):
        with pytest.raises(ValueError, match=rf"^{n} held-out tokens were asked for \(--tokens, --eval-tokens\)"):
            held_out(small_target, n)


def test_a_layer_out_of_range_is_refused(small_target: TargetModel) -> None:
    with pytest.raises(ValueError, match=r"layer \[7\] is not among the layers 0…1"):
        ActivationsStore(small_target, dataclasses.replace(DATA, layers=(0, 7)))


# ------------------------------------------------------------------------------------------------------------ schedule


def test_schedule_rises_stays_and_falls_to_zero() -> None:
    config = TrainConfig(tokens=1, lr=1.0, warmup=0.1, decay=0.2)
    factors = [schedule(step, 100, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9:81] == [1.0] * 72 and factors[100] == 0
    assert factors[90] == pytest.approx(0.5)


def test_k_anneals_from_four_k_to_k() -> None:
    ks = [annealed_k(8, step, steps=100, config=TrainConfig(tokens=1, lr=1.0, anneal=0.2)) for step in range(100)]
    assert ks[0] == 32 and ks[20:] == [8] * 80 and sorted(ks, reverse=True) == ks


def a_transcoder(d_dict: int) -> EncoderConfig:
    return EncoderConfig(layer=0, d_in=16, d_out=16, d_dict=d_dict, rule=TopK(1))


def test_learning_rate_is_the_fields_rule_in_long_runs() -> None:
    for tokens in (10**8, 10**9):
        assert default_learning_rate(tokens, a_transcoder(2**14)) == 2e-4
    short, shorter, between = (default_learning_rate(n, a_transcoder(2**14)) for n in (2 * 10**6, 10**5, 14_142_136))
    assert short == shorter == pytest.approx(15 * 2e-4) and between == pytest.approx((short * 2e-4) ** 0.5)


def test_coders_of_one_group_step_at_their_kinds_rates_and_say_so(small_target: TargetModel, tmp_path: Path) -> None:
    config = dataclasses.replace(TRAIN, lr=None, warmup=0.1, decay=0.2, checkpoint_every=29)
    for checkpoint in train_group(coders(), small_target, data=DATA, config=config, folder=tmp_path / "whole"):
        expected = default_learning_rate(config.tokens, checkpoint.coder.config)
        assert f"lr {expected:.6g}, " in checkpoint.record.recipe
    store = ActivationsStore(small_target, DATA)
    runs = [start_run(str(i), coder, store=store, config=config, folder=tmp_path) for i, coder in enumerate(coders())]
    group_step(runs, next(store), config=config, factor=0.25)
    used = [run.optimiser.param_groups[0]["lr"] for run in runs]
    assert used == [0.25 * default_learning_rate(config.tokens, run.coder.config) for run in runs]
    assert len(set(used)) > 2, "SAE, transcoder and CLT have rates of their own"


# ------------------------------------------------------------------------------------------------------------ training


def test_every_kind_of_coder_learns_in_one_group(small_target: TargetModel, tmp_path: Path) -> None:
    """Each kind ends well below the mean's FVU of 1, with its own checkpoint and metrics."""
    config = dataclasses.replace(TRAIN, tokens=32 * 120)
    for checkpoint in train_group(coders(), small_target, data=DATA, config=config, folder=tmp_path):
        lines = (tmp_path / checkpoint.record.name / "metrics.jsonl").read_text().splitlines()
        first, last = json.loads(lines[0]), json.loads(lines[-1])
        assert last["fvu"] < 0.8 * min(first["fvu"], 1), f"{checkpoint.record.name}: {first=} {last=}"
        assert checkpoint.record.train_tokens == config.tokens and not checkpoint.coder.training


def test_each_kind_of_coder_sees_its_own_part_of_a_batch(small_target: TargetModel) -> None:
    """A transcoder an MLP's input and output, an SAE its output twice, a CLT all its layers; and statistics alike."""
    store = ActivationsStore(small_target, DATA)
    batch, stats = next(store), store.stats
    transcoder, sae, clt = coders()[1], coders()[3], coders()[4]
    for coder, inputs, targets in (
        (transcoder, batch.inputs[1], batch.targets[1]),
        (sae, batch.targets[1], batch.targets[1]),
        (clt, batch.inputs, batch.targets),
    ):
        rows = list(coder.config.layers)
        x, y = coder.view(*batch, rows)
        assert torch.equal(x, inputs) and torch.equal(y, targets)
        own = coder.stats_of(stats, rows)
        side = (stats.y_mean, stats.y_scale) if coder is sae else (stats.x_mean, stats.x_scale)
        assert torch.equal(own.x_mean, side[0][rows]) and torch.equal(own.x_scale, side[1][rows])
        assert torch.equal(own.y_mean, stats.y_mean[rows]) and coder.variance(own).shape == y.shape[:-2]


def test_a_group_trains_each_coder_as_it_would_alone(small_target: TargetModel, tmp_path: Path) -> None:
    together = train_group(coders(), small_target, data=DATA, config=TRAIN, folder=tmp_path / "group")[0]
    alone = train_encoder(coders()[0], small_target, data=DATA, config=TRAIN, folder=tmp_path / "alone")
    for name, value in alone.coder.state_dict().items():
        assert torch.equal(value, together.coder.state_dict()[name]), name


def test_coders_side_by_side_step_as_one_after_another(small_target: TargetModel, tmp_path: Path) -> None:
    """Equal to the last bit, readings in the order of the coders; their seconds add up to what the clock showed."""
    store, threads, runs = ActivationsStore(small_target, DATA), torch.get_num_threads(), []
    batches = list(itertools.islice(store, 4))
    for side_by_side in (False, True):
        torch.set_num_threads(2 if side_by_side else 1)
        coder_runs = [
            start_run(str(i), coder, store=store, config=TRAIN, folder=tmp_path) for i, coder in enumerate(coders())
        ]
        began = time.perf_counter()
        readings = torch.stack([group_step(coder_runs, batch, config=TRAIN, factor=0.5) for batch in batches])
        clock = time.perf_counter() - began
        spent = sum(coder_run.seconds for coder_run in coder_runs)
        assert 0.5 * clock < spent <= clock and min(coder_run.seconds for coder_run in coder_runs) > 0
        runs.append((readings, [value for s in coder_runs for value in s.coder.state_dict().values()]))
    torch.set_num_threads(threads)
    assert torch.equal(runs[0][0], runs[1][0]) and readings.shape == (4, 6, 3)
    assert all(torch.equal(*pair) for pair in zip(runs[0][1], runs[1][1], strict=True))


def test_trained_coders_are_not_trained_again(small_target: TargetModel, tmp_path: Path, capsys: object) -> None:
    train_group(coders(), small_target, data=DATA, config=TRAIN, folder=tmp_path)
    file = tmp_path / FIRST_NAME / "encoder.pt"
    before = file.stat().st_mtime_ns
    train_group(coders(), small_target, data=DATA, config=TRAIN, folder=tmp_path)
    assert file.stat().st_mtime_ns == before and "6 of 6 coders are already trained" in capsys.readouterr().out


def test_a_trial_has_a_folder_of_its_own_beside_the_real_run(small_target: TargetModel, tmp_path: Path) -> None:
    first = train_encoder(coders()[0], small_target, data=DATA, config=TRAIN, folder=tmp_path)
    for trial in (dataclasses.replace(TRAIN, lr=1e-3), dataclasses.replace(TRAIN, tokens=TRAIN.tokens // 2)):
        second = train_encoder(coders()[0], small_target, data=DATA, config=trial, folder=tmp_path)
        assert first.record.name != second.record.name and not torch.equal(first.coder.W_dec, second.coder.W_dec)
    again = load_checkpoint(first.path, "cpu")
    assert torch.equal(again.coder.W_dec, first.coder.W_dec) and "lr 0.003" in again.record.recipe


def test_what_was_trained_otherwise_is_not_overwritten(small_target: TargetModel, tmp_path: Path) -> None:
    train_encoder(coders()[0], small_target, data=DATA, config=TRAIN, folder=tmp_path)
    other = dataclasses.replace(TRAIN, warmup=0.5)
    with pytest.raises(
        ValueError, match="^.*small_.* was trained otherwise .*warmup 0.05.*, not .*warmup 0.5.*: move it away"
    ):
        train_encoder(coders()[0], small_target, data=DATA, config=other, folder=tmp_path)


def test_a_text_shorter_than_the_training_is_named(small_target: TargetModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ended after [0-9,]+ of 32,000,000 training tokens: ask for fewer"):
        train_encoder(
            coders()[0], small_target, data=DATA, config=dataclasses.replace(TRAIN, tokens=32_000_000), folder=tmp_path
        )


def test_a_loss_that_is_not_finite_stops_the_run(small_target: TargetModel, tmp_path: Path) -> None:
    broken = coders()[1]
    torch.nn.init.constant_(broken.W_skip, torch.nan)
    with pytest.raises(
        RuntimeError, match=r"loss of small_transcoder-skip_topk_L1_k4_d48_s0_n[0-9]+_lr0.003 is nan at step 4"
    ):
        train_encoder(broken, small_target, data=DATA, config=TRAIN, folder=tmp_path)
    assert not list(tmp_path.rglob("encoder.pt"))


def test_the_deployed_coder_has_the_trained_sparsity(small_target: TargetModel, tmp_path: Path) -> None:
    checkpoint = train_encoder(
        coders()[0], small_target, data=DATA, config=dataclasses.replace(TRAIN, tokens=32 * 100), folder=tmp_path
    )
    store = ActivationsStore(small_target, DATA, split="test")
    x = torch.cat([next(store).inputs[0] for _ in range(8)])
    l0 = (to_dense(checkpoint.coder.encode(x)) > 0).sum(1).float().mean().item()
    assert 3 < l0 < 5, f"{l0=} for k=4"


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from small import make_small_target
from test_training import DATA, TRAIN, coders
from training import train_group
train_group(coders(), make_small_target(Path({corpus!r})), data=DATA, config=TRAIN, folder=Path({folder!r}))
"""


def test_a_killed_run_ends_bit_identical(small_target: TargetModel, tmp_path: Path) -> None:
    """SIGKILL after a saved state, then the same call again: every tensor equals the uninterrupted run's."""
    corpus, folder, tests = small_target.data.path, tmp_path / "killed", str(Path(__file__).parent)
    script = KILLED.format(tests=tests, corpus=corpus, folder=str(folder))
    script = script.replace("from training import train_group", "import training, time\n"
        "save = training.save_tensors\ndef save_and_wait(*a, **k):\n    save(*a, **k)\n    time.sleep(60)\n"
        "training.save_tensors = save_and_wait\nfrom training import train_group")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(Path(tests).parent)})
    while not list(folder.glob("group_*.pt")):
        assert process.poll() is None, "the run to be killed ended by itself"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(folder.rglob("encoder.pt"))
    resumed = train_group(coders(), small_target, data=DATA, config=TRAIN, folder=folder)
    straight = train_group(coders(), small_target, data=DATA, config=TRAIN, folder=tmp_path / "straight")
    for a, b in zip(resumed, straight):
        for name, value in b.coder.state_dict().items():
            assert torch.equal(a.coder.state_dict()[name], value), f"{b.record.name} {name}"
    assert not list(folder.glob("group_*.pt"))


class Counts:
    """The least that can be trained: it counts its steps, and is cut off before the step `ends`."""

    names, settings = ["counter"], "these"

    def __init__(self, ends: int = 99) -> None:
        self.total, self.ends, self.log = 0, ends, list[str]()

    def start(self) -> None:
        self.log.append("start")

    def step(self, step: int) -> torch.Tensor:
        if step == self.ends:
            raise KeyboardInterrupt
        self.total += step
        return torch.tensor([[float(self.total)]])

    def read(self, readings: list[list[float]], progress: Progress) -> str:
        self.log.append(f"{progress.step}: {readings[0][0]:g}")
        return ""

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]


def test_an_interrupted_loop_goes_on_from_its_last_state(tmp_path: Path) -> None:
    """Started once, read every third step, at every state and at the end, no step made twice in what is kept."""
    file, every = tmp_path / "state.pt", {"metrics_every": 3, "checkpoint_every": 4}
    cut, again = Counts(ends=7), Counts()
    with pytest.raises(KeyboardInterrupt):
        run_training(cut, 10, file=file, **every)
    assert cut.log == ["start", "2: 3", "3: 6", "5: 15"]
    seconds = run_training(again, 10, file=file, **every)
    assert again.log == ["5: 15", "7: 28", "8: 36", "9: 45"] and again.total == sum(range(10))
    assert seconds > torch.load(file)["seconds"] > 0 and torch.load(file)["step"] == 8


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    file, every = tmp_path / "state.pt", {"metrics_every": 1, "checkpoint_every": 1}
    run_training(Counts(), 1, file=file, **every)
    other = Counts()
    other.settings = "those"
    with pytest.raises(ValueError, match="a run with other settings"):
        run_training(other, 2, file=file, **every)


# --------------------------------------------------------------------------------------------------------- checkpoints


RECORD = TrainingRecord(
    name="name",
    target="small",
    target_fingerprint="fingerprint",
    train_tokens=10,
    train_seconds=1.0,
    seed=0,
    commit="abc",
)


@pytest.mark.parametrize("coder", coders(), ids=lambda c: type(c).__name__)
def test_checkpoints_round_trip(coder: torch.nn.Module, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, coder, RECORD)
    found = load_checkpoint(str(tmp_path), "cpu")
    assert found.coder.config == coder.config and found.record == RECORD and type(found.coder) is type(coder)
    for name, value in coder.state_dict().items():
        assert torch.equal(found.coder.state_dict()[name], value), name


def test_a_killed_writer_leaves_no_checkpoint_of_two_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of one training beside the record of another would pass for either."""
    save_checkpoint(tmp_path, coders()[0], RECORD)
    monkeypatch.setattr(checkpoints, "write_json", None)  # what fails comes after the tensors
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, coders()[0], dataclasses.replace(RECORD, train_tokens=20))
    with pytest.raises(ValueError, match="not a finished checkpoint"):
        load_checkpoint(str(tmp_path), "cpu")


def test_bad_checkpoints_are_refused_in_one_line(tmp_path: Path, small_target: TargetModel) -> None:
    with pytest.raises(ValueError, match="holds no config.json"):
        load_checkpoint(str(tmp_path / "nowhere"), "cpu")
    coder = coders()[0]
    save_checkpoint(tmp_path, coder, RECORD)
    with pytest.raises(ValueError, match="was trained on 'small' with weights fingerprint"):
        check_target(load_checkpoint(str(tmp_path), "cpu"), small_target)
    state = coder.state_dict()
    del state["b_dec"]
    torch.save(state, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="tensor 'b_dec' is missing, extra or misshapen"):
        load_checkpoint(str(tmp_path), "cpu")
    torch.save({"coder": Path("an object")}, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="pickled objects"):
        load_checkpoint(str(tmp_path), "cpu")
    (tmp_path / "encoder.pt").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(ValueError, match="truncated"):
        load_checkpoint(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text()[:100])
    with pytest.raises(ValueError, match="config.json is truncated or no JSON"):
        load_checkpoint(str(tmp_path), "cpu")


def edited(folder: Path, section: str, **changes: object) -> str:
    """A checkpoint whose configuration was changed by hand; None deletes."""
    save_checkpoint(folder, coders()[0], RECORD)
    blob = json.loads((folder / "config.json").read_text())
    inner = {key: value for key, value in (blob[section] | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(blob | {section: inner}))
    return str(folder)


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        (
            "record",
            {"hardware": "H100"},
            r"TrainingRecord has no field \['hardware'\]: is the checkpoint from another version",
        ),
        ("record", {"seed": None}, r"TrainingRecord lacks \['seed'\]"),
        ("record", {"train_seconds": "long"}, "train_seconds of TrainingRecord is 'long'"),
        ("config", {"d_in": "16"}, "d_in of EncoderConfig is '16'"),
        ("config", {"d_dict": 10**12}, "does not match its config.json"),
        ("config", {"rule": {"class": "TopK", "k": 0}}, "k=0: a token needs at least one active latent"),
        ("config", {"rule": {"class": "TopK", "k": True}}, "k of TopK is True"),
        ("config", {"class": "Any"}, "unknown configuration class 'Any'"),
        ("config", {"class": "TrainConfig"}, "TrainConfig has no field"),
    ],
)
def test_a_configuration_of_another_version_is_refused_in_one_line(
    tmp_path: Path, section: str, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        load_checkpoint(edited(tmp_path, section, **changes), "cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("blob", [{}, [], {"trainer": {"dict_class": "AutoEncoder"}}, {"config": 1, "record": {}}])
def test_a_foreign_folder_asks_for_its_format(tmp_path: Path, blob: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(blob))
    with pytest.raises(ValueError, match="is no checkpoint of ours: name its --format|holds a list") as refusal:
        load_checkpoint(str(tmp_path), "cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    save_checkpoint(tmp_path, coder := coders()[0], RECORD)
    torch.save(coder.state_dict() | {"b_dec": torch.full_like(coder.b_dec, value)}, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="tensor 'b_dec' holds NaN or infinity"):
        load_checkpoint(str(tmp_path), "cpu")


@pytest.mark.parametrize("name", ["a:b", "entity/project/name:version", "/tmp/x/y:z", "runs/today/12:30/coder"])
def test_a_path_with_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where it exists, or cannot be an artifact's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "download_artifact", lambda reference, folder: Path("fetched"))
    expected = Path("fetched") if name.startswith("entity") else Path(name)
    assert checkpoints.resolve(name) == expected
    if not name.startswith("/"):
        Path(name).mkdir(parents=True)
        assert checkpoints.resolve(name) == Path(name)


# ------------------------------------------------------------------------------------------- two processes, one folder


def test_a_second_training_in_one_folder_says_who_is_at_it(small_target: TargetModel, tmp_path: Path) -> None:
    """And a killed one is in nobody's way."""
    name = FIRST_NAME
    folder = str(tmp_path / "runs" / name)
    code = "import time; from pathlib import Path; from checkpoints import held\n"
    code += f"with held([Path({folder!r})]): print(1, flush=True); time.sleep(99)"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(checkpoints.__file__).parent
    )
    assert other.stdout is not None and other.stdout.readline() == b"1\n"
    with pytest.raises(ValueError, match=f"is being written by process {other.pid}: wait for its end") as refusal:
        train_group(coders()[:1], small_target, data=DATA, config=TRAIN, folder=tmp_path / "runs")
    assert "\n" not in str(refusal.value) and not (tmp_path / "runs" / name).exists()
    other.kill()
    other.wait()
    train_group(coders()[:1], small_target, data=DATA, config=TRAIN, folder=tmp_path / "runs")
    with held([tmp_path / "runs" / name]):  # what is trained is loaded also while somebody holds it
        train_group(coders()[:1], small_target, data=DATA, config=TRAIN, folder=tmp_path / "runs")
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), held([tmp_path / "runs" / name]):
            pass


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coder, usage = coders()[0], checkpoints.shutil.disk_usage(tmp_path)
    nbytes = sum(value.nbytes for value in coder.state_dict().values())
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=nbytes - 1))
    with pytest.raises(
        ValueError, match=rf"the disk is full: .*encoder.pt takes {nbytes:,} bytes and {nbytes - 1:,} are free"
    ):
        save_checkpoint(tmp_path / "new", coder, RECORD)
    assert not list((tmp_path / "new").iterdir())


def test_names_tell_coders_apart() -> None:
    trainings = [{"seed": seed, "tokens": 32, "lr": lr} for seed in (0, 1) for lr in (1e-3, 2e-3)]
    names = {run_name("hf:a/b", coder.config, **training) for coder in coders() for training in trainings}
    assert run_name("small", coders()[0].config, seed=0, tokens=960, lr=3e-3) == FIRST_NAME
    assert len(names) == 24 and all("/" not in name and ":" not in name for name in names)
