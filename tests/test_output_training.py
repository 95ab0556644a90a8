"""Theorems about training on the model's output: sets on one stream, resumed exactly, named for what they were trained for."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small import make_small_target, write_corpus

import output_training
from activation_store import DataConfig
from checkpoints import Checkpoint, TrainingRecord
from coder_replacements import as_replacements, side_by_side
from config import (
    LOCAL,
    BatchTopK,
    CLTConfig,
    CoderConfig,
    EncoderConfig,
    Gated,
    JumpReLU,
    Mixed,
    Output,
    Rule,
    SAEConfig,
    TopK,
    TrainConfig,
)
from evaluation import evaluate, held_out
from output_objective import Run, unembedding
from output_training import OutputGroup, calibrate, record_after, train_on_output, what_is_read
from recipes import new_coder, train_coders, tune_coders, untrained
from sparse_ops import to_dense
from target_models import TargetModel, at_site, weights_fingerprint
from training import train_group

BATCH = 4 * 16
TRAIN = TrainConfig(
    objective=Output("free"), tokens=60 * 12, lr=3e-3, anneal=0.0, metrics_every=5, checkpoint_every=4,
    calibration_tokens=480, dead_after=10**6,
)  # fmt: skip
SHAPE = {"d_in": 16, "d_dict": 48}


@pytest.fixture(autouse=True)
def small_and_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NN_BF16", "off")
    monkeypatch.setattr(output_training, "STATISTICS_TOKENS", 512)


@pytest.fixture
def target(small_target: TargetModel) -> TargetModel:
    """What its MLPs write decides its output."""
    return louder(small_target)


@torch.no_grad()
def louder(target: TargetModel) -> TargetModel:
    target.model.wte.weight.mul_(20)
    return dataclasses.replace(target, fingerprint=weights_fingerprint(target.model))


def transcoders(rule: Rule, skip: bool = False) -> list[CoderConfig]:
    return [EncoderConfig(layer=i, d_out=16, rule=rule, skip=skip, **SHAPE) for i in (0, 1)]


def saes(rule: Rule) -> list[CoderConfig]:
    return [SAEConfig(layer=i, site="mlp_out", rule=rule, **SHAPE) for i in (0, 1)]


def clt(rule: Rule) -> list[CoderConfig]:
    return [CLTConfig(layers=(0, 1), d_out=16, rule=rule, **SHAPE)]


def every_kind() -> list[CoderConfig]:
    return [
        *transcoders(BatchTopK(4)), *transcoders(JumpReLU(l0=0.001), skip=True), *saes(Gated(l1=0.001)), *clt(TopK(4)),
    ]  # fmt: skip


def local(configs: Sequence[CoderConfig], target: TargetModel, folder: Path) -> list[Checkpoint]:
    """Coders that were trained on what their layers write."""
    data = DataConfig(layers=(0, 1), batch_tokens=32, buffer_tokens=512, model_batch=8)
    config = TrainConfig(tokens=32 * 40, lr=1e-2, calibration_tokens=128)
    return train_group([new_coder(c, 0) for c in configs], target, data=data, config=config, folder=folder)


def equal(a: Sequence[Checkpoint], b: Sequence[Checkpoint]) -> None:
    for one, other in zip(a, b, strict=True):
        for name, value in one.coder.state_dict().items():
            assert torch.equal(value, other.coder.state_dict()[name]), f"{one.record.name}: {name}"


def test_every_kind_of_coder_learns_in_one_group(target: TargetModel, tmp_path: Path) -> None:
    """The ruler's KL falls under the trained protocol, and each coder has its own checkpoint, metrics and record."""
    starts = local(every_kind(), target, tmp_path)
    config = dataclasses.replace(TRAIN, tokens=60 * 24)
    ends = train_on_output(starts, target, batch=BATCH, config=config, folder=tmp_path)
    text = held_out(target, 480)
    before, after = (evaluate(target, as_replacements(own), text, ["free"]).points for own in (starts, ends))
    for old, new in zip(before, after):
        assert new.kl < old.kl, f"{new.method}: {old.kl} {new.kl}"
        assert new.method == f"{old.method}-kl-free" and new.train_tokens == old.train_tokens + config.tokens
        assert new.train_seconds > old.train_seconds
    for start, end in zip(starts, ends):
        lines = (tmp_path / end.record.name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["kl"] < json.loads(lines[0])["kl"], end.record.name
        assert end.record.objectives == ("local", "kl-free") and not end.coder.training
        assert end.record.recipe.startswith(f"{start.record.recipe}; then Output(protocol='free'")


def test_the_starts_stay_as_they_are(target: TargetModel, tmp_path: Path) -> None:
    starts = local(transcoders(BatchTopK(4)), target, tmp_path)
    before = copy.deepcopy([start.coder.state_dict() for start in starts])
    train_on_output(starts, target, batch=BATCH, config=TRAIN, folder=tmp_path)
    for start, state in zip(starts, before):
        assert all(torch.equal(value, state[name]) for name, value in start.coder.state_dict().items())


def test_a_group_trains_each_set_as_it_would_alone(target: TargetModel, tmp_path: Path) -> None:
    for objective in (Output("single"), Output(Mixed(), local=0.5)):
        config = dataclasses.replace(TRAIN, objective=objective)
        starts = local([*transcoders(BatchTopK(4)), *clt(TopK(3))], target, tmp_path)
        together = train_on_output(starts, target, batch=BATCH, config=config, folder=tmp_path / "group")
        for own in side_by_side(starts):
            alone = train_on_output(own, target, batch=BATCH, config=config, folder=tmp_path / "alone")
            equal(alone, [end for start, end in zip(starts, together) if start in own])


@pytest.mark.parametrize(
    ("protocol", "scratch"), [("single", False), ("frozen", True), ("free", False), (Mixed(), True)]
)
def test_an_interrupted_training_ends_bit_identical(
    target: TargetModel, tmp_path: Path, protocol: object, scratch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [*transcoders(BatchTopK(4)), *clt(JumpReLU(l0=0.01))]
    starts = [untrained(c, target, 0) for c in configs] if scratch else local(configs, target, tmp_path)
    config = dataclasses.replace(
        TRAIN, objective=Output(protocol, local=0.1), tokens=60 * 8, anneal=0.3 * scratch, dead_after=100
    )
    whole = train_on_output(starts, target, batch=BATCH, config=config, folder=tmp_path / "whole")
    step = OutputGroup.step

    def interrupted(group: OutputGroup, i: int) -> torch.Tensor:
        if i == 5:
            raise KeyboardInterrupt
        return step(group, i)

    monkeypatch.setattr(OutputGroup, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_on_output(starts, target, batch=BATCH, config=config, folder=tmp_path / "cut")
    made: list[int] = []
    monkeypatch.setattr(OutputGroup, "step", lambda group, i: made.append(i) or step(group, i))
    again = louder(make_small_target(Path(target.data.path)))
    equal(whole, train_on_output(starts, again, batch=BATCH, config=config, folder=tmp_path / "cut"))
    assert made == list(range(4, 8)) and not list((tmp_path / "cut").glob("group_*.pt"))


def test_what_is_trained_is_not_trained_again(target: TargetModel, tmp_path: Path, capsys: object) -> None:
    """Also where one coder of a set is gone: a set trains as a whole, the others stay."""
    starts = local([*transcoders(BatchTopK(4)), *clt(TopK(4))], target, tmp_path)
    ends = train_on_output(starts, target, batch=BATCH, config=TRAIN, folder=tmp_path)
    files = [tmp_path / end.record.name / "encoder.pt" for end in ends]
    before = [file.stat().st_mtime_ns for file in files]
    train_on_output(starts, target, batch=BATCH, config=TRAIN, folder=tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert "3 of 3 coders are already trained" in capsys.readouterr().out
    (tmp_path / ends[0].record.name / "config.json").unlink()
    equal(train_on_output(starts, target, batch=BATCH, config=TRAIN, folder=tmp_path), ends)
    assert [file.stat().st_mtime_ns == t for file, t in zip(files, before)] == [False, False, True]


def test_rows_say_what_coders_were_trained_for(
    target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And coders of different objectives never stand in one replacement."""
    monkeypatch.setattr(output_training, "calibrate", lambda group: None)
    configs = transcoders(TopK(4), skip=True)
    starts = local(configs, target, tmp_path)
    sizes = {"tokens": 120, "batch": BATCH, "seed": 0, "folder": tmp_path}
    tuned = tune_coders(starts, target, objective=Output("single", 0.5), **sizes)
    twice = tune_coders(tuned, target, objective=Output(Mixed()), **sizes)
    scratch = train_coders(configs, target, objective=Output("free"), **sizes)
    replacements = as_replacements([*starts, *tuned, *twice, *scratch])
    assert [(r.method, r.layers) for r in replacements] == [
        (name, (0, 1))
        for name in (
            "transcoder-skip-per_token", "transcoder-skip-per_token-kl-single-fvu0.5",
            "transcoder-skip-per_token-kl-single-fvu0.5-kl-mixed", "transcoder-skip-per_token-kl-free-scratch",
        )
    ]  # fmt: skip
    assert [r.origin.train_tokens for r in replacements] == [1280, 1400, 1520, 120]
    assert len({checkpoint.path for checkpoint in [*starts, *tuned, *twice, *scratch]}) == 8


def test_old_records_are_of_local_training() -> None:
    record = TrainingRecord.imported("name", "target")
    assert record.objectives == ("local",) and record.variant == ""


def test_training_from_scratch_starts_where_local_training_does(
    target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the mean of the text with a decoder of zeros, k annealed from 4k; a tuning keeps its k."""
    monkeypatch.setattr(output_training, "calibrate", lambda group: None)
    ks, step = [], OutputGroup.step

    def watched(group: OutputGroup, i: int) -> torch.Tensor:
        readings = step(group, i)
        ks.append([member.coder.encoder.k_now for member in group.members])
        return readings

    starts = [untrained(config, target, 0) for config in transcoders(TopK(4))]
    config = dataclasses.replace(TRAIN, anneal=0.5, lr=0.0)
    monkeypatch.setattr(OutputGroup, "step", watched)
    ends = train_on_output(starts, target, batch=BATCH, config=config, folder=tmp_path)
    assert ks[0] == [16, 16] and ks[6:] == [[4, 4]] * 6
    assert all(not end.coder.W_dec.any() and end.coder.b_dec.any() for end in ends)
    ks.clear()
    train_on_output(ends, target, batch=BATCH, config=config, folder=tmp_path)
    assert ks == [[4, 4]] * 12


def test_the_rate_rises_stays_and_falls_and_latents_are_counted(
    target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a coder that a plan does not call on, nothing moves."""
    monkeypatch.setattr(output_training, "calibrate", lambda group: None)
    seen, step = [], OutputGroup.step

    def watched(group: OutputGroup, i: int) -> torch.Tensor:
        readings = step(group, i)
        seen.append([member.optimiser.param_groups[0]["lr"] for member in group.members])
        silent = [member.coder.encoder.tokens_since_fired.tolist() for member in group.members]
        assert set(silent[0]) <= {*range(0, 60 * i + 1, 60), 10**9 + 60 * (i + 1)} and 0 in silent[0], f"{silent=}"
        assert silent[1] == [10**9] * 48, f"{silent=}"
        return readings

    starts = local(transcoders(TopK(4)), target, tmp_path)
    for start in starts:
        start.coder.encoder.tokens_since_fired.fill_(10**9)
    monkeypatch.setattr(OutputGroup, "step", watched)
    monkeypatch.setattr(output_training, "planned", lambda *_: [Run((0,), False)])
    config = dataclasses.replace(TRAIN, tokens=60 * 10, lr=1e-3, warmup=0.3, decay=0.4)
    ends = train_on_output(starts, target, batch=BATCH, config=config, folder=tmp_path)
    expected = [1e-3 * factor for factor in (1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4)]
    assert [of_first for of_first, _ in seen] == pytest.approx(expected)
    equal(starts[1:], ends[1:])
    assert not torch.equal(starts[0].coder.W_dec, ends[0].coder.W_dec)


def test_every_stage_reads_the_text_in_an_order_of_its_own(
    target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_training, "calibrate", lambda group: None)
    read: list[torch.Tensor] = []
    monkeypatch.setattr(OutputGroup, "step", lambda group, i: read.append(next(group.stream)) or torch.zeros(1, 4))
    starts = [untrained(c, target, 0) for c in clt(TopK(4))]
    once = train_on_output(starts, target, batch=BATCH, config=TRAIN, folder=tmp_path)
    first, read = torch.cat(read), read
    read.clear()
    train_on_output(once, target, batch=BATCH, config=TRAIN, folder=tmp_path)
    assert not torch.equal(first, torch.cat(read))


@pytest.mark.parametrize("protocol", ["single", "frozen", "free", Mixed()])
def test_thresholds_are_set_where_the_trained_protocol_has_coders_read(
    target: TargetModel, tmp_path: Path, protocol: object
) -> None:
    """On that text every encoder has k active latents a token."""
    starts = local([*transcoders(BatchTopK(4)), *clt(BatchTopK(4))], target, tmp_path)
    config = dataclasses.replace(TRAIN, objective=Output(protocol))
    ends = {start: record_after(start, target, batch=BATCH, config=config) for start in starts}
    head, sets = unembedding(target), side_by_side(starts)
    group = OutputGroup(sets, ends, target, head, sequences=4, config=config, folder=tmp_path)
    state = group.stream.state_dict()
    calibrate(group)
    group.stream.load_state_dict(state)
    inputs = [what_is_read(group, group.frame(), i) for i in range(8)]
    group.stream.load_state_dict(state)
    clean = [group.frame().clean.activations.inputs[:, :, 1:].flatten(1, 2) for _ in range(8)]
    for s, own in enumerate(group.sets):
        for layer in (0, 1):
            read = torch.cat([batch[s][layer] for batch in inputs])
            own.replacement.reading(layer, read, read).coder.eval()
            active = (to_dense(own.replacement.encode(layer, read, read)) > 0).sum()
            assert int(active) == pytest.approx(4 * len(read), abs=3), f"{layer=}"
            same = [torch.equal(batch[s][layer], x[layer]) for batch, x in zip(inputs, clean)]
            expected = {"free": [False] * 8, Mixed(): [True, False] * 4}.get(protocol, [True] * 8)
            assert same == (expected if layer else [True] * 8)


# ------------------------------------------------------------------------------------------------------------- bad input


def one_line(says: str):
    return pytest.raises(ValueError, match=f"^{says}[^\n]*$")


def test_sets_that_do_not_replace_the_same_layers_are_refused(target: TargetModel, tmp_path: Path) -> None:
    starts = [untrained(c, target, 0) for c in [*transcoders(TopK(4)), *transcoders(TopK(8))[:1]]]
    says = (
        "small_transcoder_topk_L0_k8_d48_s0 has no companion in layer 1, which others replace: give every set a coder"
    )
    with one_line(says):
        train_on_output(starts, target, batch=BATCH, config=TRAIN, folder=tmp_path)
    assert not list(tmp_path.glob("small_*"))


def test_a_checkpoint_of_another_target_is_refused(target: TargetModel, tmp_path: Path) -> None:
    starts = [untrained(c, target, 0) for c in transcoders(TopK(4))]
    other = make_small_target(Path(target.data.path), seed=1)
    with one_line("small_transcoder_topk_L0_k4_d48_s0 was trained on 'small' with weights"):
        tune_coders(starts, other, tokens=120, objective=Output("free"), batch=BATCH, seed=0, folder=tmp_path)


def test_a_target_that_was_cut_before_its_output_is_refused(target: TargetModel, tmp_path: Path) -> None:
    starts = [untrained(c, target, 0) for c in transcoders(TopK(4))]
    target.model.lm_head = torch.nn.Identity()
    with one_line("'small' gives no logits over its vocabulary of 62, as if it were cut before its output"):
        train_on_output(starts, target, batch=BATCH, config=TRAIN, folder=tmp_path)


def test_a_batch_of_too_many_logits_or_no_sequence_is_refused(target: TargetModel, tmp_path: Path) -> None:
    starts = [untrained(c, target, 0) for c in transcoders(TopK(4))]
    large = dataclasses.replace(target, vocab_size=256_000)
    with one_line(
        r"a batch of 4,096 tokens has 3.9 GiB of logits over a vocabulary of 256,000: ask for 2,097 tokens or fewer"
    ):
        output_training.sequences_of(large, 4096)
    with one_line("a batch of 15 tokens holds no sequence of 16: ask for 16 or more"):
        train_on_output(starts, target, batch=15, config=TRAIN, folder=tmp_path)


def test_a_coder_of_another_site_is_refused(target: TargetModel, tmp_path: Path) -> None:
    starts = [untrained(c, target, 0) for c in saes(TopK(4))]
    with one_line("small_sae_topk_L0_k4_d48_s0 is of mlp_out, the target is read at resid: use at_site"):
        train_on_output(starts, at_site(target, "resid"), batch=BATCH, config=TRAIN, folder=tmp_path)


def test_what_cannot_be_meant_is_refused(target: TargetModel, tmp_path: Path) -> None:
    starts = [untrained(c, target, 0) for c in transcoders(TopK(4))]
    sizes = {"batch": BATCH, "seed": 0, "folder": tmp_path}
    with one_line(r"Local\(\) asks nothing of the model's output: use train_coders"):
        tune_coders(starts, target, tokens=120, objective=LOCAL, **sizes)
    with one_line("0 training tokens: ask for 1 or more"):
        tune_coders(starts, target, tokens=0, objective=Output("free"), **sizes)
    with one_line(
        "small_transcoder_topk_L0_k4_d48_s0_kl-free-scratch_n120_lr0.0004, [^\n]* was asked for more than once"
    ):
        tune_coders([*starts, *starts], target, tokens=120, objective=Output("free"), **sizes)


def test_a_text_shorter_than_the_training_is_named(tmp_path: Path) -> None:
    target = make_small_target(write_corpus(tmp_path, documents=60))
    starts = [untrained(c, target, 0) for c in transcoders(TopK(4))]
    with one_line("dataset [^\n]* ended after [0-9,]+ of 10,000,000 training tokens: ask for fewer"):
        tune_coders(
            starts, target, tokens=10_000_000, objective=Output("frozen"), batch=BATCH, seed=0, folder=tmp_path / "runs"
        )


@pytest.mark.parametrize("site", ["resid", "attn_out"])
def test_saes_of_other_sites_train_on_the_output_too(target: TargetModel, tmp_path: Path, site: str) -> None:
    target = at_site(target, site)
    starts = local([dataclasses.replace(c, site=site) for c in saes(TopK(4))], target, tmp_path)
    config = dataclasses.replace(TRAIN, tokens=60 * 24)
    ends = train_on_output(starts, target, batch=BATCH, config=config, folder=tmp_path)
    before, after = (
        evaluate(target, as_replacements(own), held_out(target, 480), ["free"]).points for own in (starts, ends)
    )
    assert after[0].kl < before[0].kl and after[0].method == f"sae-{site}-per_token-kl-free"
