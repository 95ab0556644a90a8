"""Theorems about activations on disk: what is read is what was made, the target does not run again, nothing half is read."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import make_small_target
from test_training import DATA, TRAIN, coders
from torch import Tensor

import activation_cache
import activation_store
import parallel
import training
from activation_cache import ActivationCache, Cache, Shard, quantised, restored
from activation_store import ActivationBatch, ActivationsStore, Harvest
from checkpoints import Checkpoint
from config import Output
from logs import read_tensors
from parallel import World
from recipes import train_coders
from study import CoderStudySettings
from target_models import TargetModel
from training import train_group

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of a test are its own."""
    monkeypatch.setenv("NN_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "activations"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As many entries as the target made forwards for a store."""
    made: list[int] = []
    capture = activation_store.capture
    monkeypatch.setattr(activation_store, "capture", lambda *a: made.append(1) or capture(*a))
    yield made


def batches(target: TargetModel, n: int, cache: Cache = "none") -> list[ActivationBatch]:
    return list(itertools.islice(ActivationsStore(target, DATA, harvest=Harvest(cache=cache)), n))


def same(ours: list[ActivationBatch], theirs: list[ActivationBatch]) -> bool:
    assert len(ours) == len(theirs)
    return all(torch.equal(a, b) for one, two in zip(ours, theirs) for a, b in zip(one, two))


def tensors(trained: list[Checkpoint]) -> list[Tensor]:
    return [value for checkpoint in trained for value in checkpoint.coder.state_dict().values()]


# ------------------------------------------------------------------------------------------------------------- int8


def test_int8_errs_by_at_most_half_a_step_and_keeps_the_largest_of_each_token() -> None:
    """|a − s q| ≤ s / 2, but for fp16's rounding; zeros stay zeros; scale an own one of each token, layer and side."""
    g = torch.Generator().manual_seed(0)
    a = (torch.randn(2, 3, 50, 24, generator=g) * torch.logspace(-3, 4, 50)[:, None]).half()
    a[1, 2, 7] = 0
    q, s = quantised(a)
    assert q.dtype == torch.int8 and s.dtype == torch.float32 and q.shape == a.shape and s.shape == a.shape[:-1]
    assert (q.int().abs().amax(-1)[s > 0] == 127).all() and not restored(q, s)[1, 2, 7].any()
    torch.testing.assert_close(s, a.float().abs().amax(-1) / 127)
    error, back = (restored(q, s).double() - a.double()).abs(), restored(q, s)
    assert (error <= 0.5 * s[..., None] + a.double().abs() * 2.0**-10 + 1e-7).all() and back.dtype == torch.float16
    assert error.max() > 0


def test_what_is_not_finite_stays_not_finite_in_int8() -> None:
    a = torch.ones(2, 1, 2, 4, dtype=torch.float16)
    a[0, 0, 0, 1], a[1, 0, 1, 2] = torch.inf, torch.nan
    finite = restored(*quantised(a)).isfinite()
    assert not finite[0, 0, 0].any() and not finite[1, 0, 1].any() and finite[0, 0, 1].all() and finite[1, 0, 0].all()


@pytest.mark.parametrize(("cache", "per_number", "per_token"), [("fp16", 2, 0), ("int8", 1, 4)])
def test_a_token_takes_the_stated_bytes(
    cache: Cache, per_number: int, per_token: int, small_target: TargetModel, own_folder: Path
) -> None:
    """2 · L · 2 d and 2 · L · (d + 4) a token, beside names and the text's position in each shard."""
    batches(small_target, 3, cache)
    for file in own_folder.rglob("*.safetensors"):
        parts = read_tensors(file)
        own = sum(parts[name].nbytes for name in ("kept", "s") if name in parts)
        assert own == 4 * 15 * 2 * 2 * (per_number * 16 + per_token)
        assert file.stat().st_size < own + parts["leftover"].nbytes + 1024


# -------------------------------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_a_second_store_reads_what_the_first_served_and_does_not_run_the_target(
    cache: Cache, small_target: TargetModel, runs: list[int]
) -> None:
    """Also past the end of what is there: the text goes on where it was."""
    plain = batches(small_target, 40)
    first = batches(small_target, 20, cache)
    runs.clear()
    again = batches(small_target, 20, cache)
    assert not runs and same(again, first)
    longer = batches(small_target, 40, cache)
    assert runs and same(longer[:20], first)
    runs.clear()
    assert same(batches(small_target, 40, cache), longer) and not runs
    if cache == "fp16":
        assert same(longer, plain)
    else:
        error = (longer[0].targets - plain[0].targets).abs().amax(-1) / plain[0].targets.abs().amax(-1)
        assert 0 < error.max() < 0.5 / 127 + 2.0**-10, "half a step, and fp16's rounding"


def test_a_scaled_layer_is_cached_scaled(small_target: TargetModel, runs: list[int]) -> None:
    """Outputs of 2²⁴ times the size, beyond fp16: read back exactly, with their scales."""
    with torch.no_grad():
        small_target.model.h[1].mlp.down_proj.weight.mul_(2.0**24)
    target = make_small_target(Path(small_target.data.path))
    target.model.load_state_dict(small_target.model.state_dict())
    plain, first = batches(target, 10), batches(target, 10, "fp16")
    assert plain[0].targets[1].abs().max() > 2.0**16, "beyond fp16's 65,504"
    runs.clear()
    assert same(first, plain) and same(batches(target, 10, "fp16"), plain) and not runs


@pytest.mark.parametrize("there", [0, 20])
@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_a_cached_store_resumes_exactly(cache: Cache, there: int, small_target: TargetModel, own_folder: Path) -> None:
    """From a cache that holds all, a part or (deleted since) none of it."""
    batches(small_target, there, cache)
    store = ActivationsStore(small_target, DATA, harvest=Harvest(cache=cache))
    for _ in range(13):
        next(store)
    state = copy.deepcopy(store.state_dict())
    expected = [next(store) for _ in range(20)]
    other = ActivationsStore(small_target, DATA, harvest=Harvest(cache=cache))
    other.load_state_dict(copy.deepcopy(state))
    assert same([next(other) for _ in range(20)], expected)
    for file in own_folder.rglob("*.*"):
        file.unlink()
    without = ActivationsStore(small_target, DATA, harvest=Harvest(cache=cache))
    for file in own_folder.rglob("*.*"):
        file.unlink()
    without.cache.whole = 0  # type: ignore[union-attr]
    without.load_state_dict(state)
    assert same([next(without) for _ in range(20)], expected)
    assert without.cache.whole == 0, "no shard is written behind a gap"  # type: ignore[union-attr]


def test_what_decides_the_values_decides_the_folder(small_target: TargetModel, own_folder: Path) -> None:
    """Another seed, another layer, other weights, another form, other products: each has a folder of its own."""

    def made(target: TargetModel = small_target, cache: Cache = "fp16", **changed: object) -> str:
        store = ActivationsStore(target, dataclasses.replace(DATA, **changed), harvest=Harvest(cache=cache))
        return store.cache.folder.name  # type: ignore[union-attr]

    other = make_small_target(Path(small_target.data.path), seed=1)
    names = [made(), made(seed=1), made(layers=(1,)), made(model_batch=2), made(other), made(cache="int8")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NN_BF16", "off" if activation_store.bf16_is_fast(small_target.device) else "on")
        names.append(made())
    assert len(set(names)) == len(names) == len(list(own_folder.iterdir()))
    assert made(batch_tokens=64, buffer_tokens=512) == names[0], "how batches are mixed decides nothing"


def test_a_folder_of_other_settings_and_a_damaged_shard_are_refused_in_one_line(
    small_target: TargetModel, own_folder: Path
) -> None:
    batches(small_target, 5, "fp16")
    (index,) = own_folder.rglob("index.json")
    shard = index.with_name("00001.safetensors")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"^\S*00001.safetensors is truncated or no safetensors file[^\n]*$"):
        batches(small_target, 5, "fp16")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"settings": ["fp16", "others"]}))
    with pytest.raises(ValueError, match=r"^\S* holds activations of other settings: delete it$"):
        batches(small_target, 5, "fp16")


@pytest.mark.parametrize("moment", ["shard", "index"])
def test_a_writer_that_dies_leaves_what_is_gone_on_with(
    moment: str, small_target: TargetModel, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead while it writes the fourth shard, or between it and the index: three are whole, and the rest is made again."""
    plain = batches(small_target, 20)
    written: list[Path] = []
    save, note = activation_cache.save_file, activation_cache.write_json

    def dying(parts: dict[str, Tensor], path: Path) -> None:
        written.append(path)
        if moment == "shard" and len(written) == 4:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(parts, path)

    def dying_note(path: Path, value: object) -> None:
        if moment == "index" and len(written) == 4:
            raise KeyboardInterrupt
        note(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(activation_cache, "save_file", dying)
        patch.setattr(activation_cache, "write_json", dying_note)
        batches(small_target, 20, "fp16")
    (index,) = own_folder.rglob("index.json")
    assert json.loads(index.read_text())["forwards"] == 3
    if moment == "index":  # what lies beyond the index is not looked at
        index.with_name("00003.safetensors").write_bytes(b"nothing that opens")
    assert same(batches(small_target, 20, "fp16"), plain) and same(batches(small_target, 20, "fp16"), plain)


def test_a_cache_without_a_folder_writes_nothing_behind_a_gap(tmp_path: Path) -> None:
    cache, kept = ActivationCache("fp16", ["a"]), torch.ones(2, 1, 3, 4, dtype=torch.float16)
    shard = Shard(kept, torch.ones(2, 1), 5, torch.arange(3))
    cache.write(2, shard, leads=True)
    assert cache.whole == 0 and not cache.folder.exists()
    cache.write(0, shard, leads=True)
    back = ActivationCache("fp16", ["a"]).read(0)
    assert back.read == 5 and all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(back, shard))
    with pytest.raises(AssertionError, match="forward=1 self.whole=1"):
        cache.read(1)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_a_training_from_a_cache_is_the_training_that_made_it(
    cache: Cache, small_target: TargetModel, runs: list[int], tmp_path: Path
) -> None:
    """Bit for bit, calibration included, without a forward; in fp16 also the one without a cache. The recipe names int8."""

    def trained(name: str, harvest: Harvest) -> list[Checkpoint]:
        return train_group(
            coders(), small_target, data=DATA, config=TRAIN, folder=tmp_path / name, harvest=harvest
        )  # fmt: skip

    plain, first = trained("plain", Harvest()), trained("first", Harvest(cache=cache))
    runs.clear()
    second = trained("second", Harvest(cache=cache))
    assert not runs and all(map(torch.equal, tensors(first), tensors(second)))
    assert all(map(torch.equal, tensors(first), tensors(plain))) == (cache == "fp16")
    assert all(("int8" in c.record.recipe) == (cache == "int8") for c in second)
    if cache == "int8":
        with pytest.raises(ValueError, match="was trained otherwise .*, not int8 activations, lr .*: move it away"):
            trained("plain", Harvest(cache=cache))


def test_a_training_from_a_cache_that_is_cut_off_ends_bit_identical(
    small_target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str) -> list[Checkpoint]:
        sizes = {"data": DATA, "config": TRAIN, "folder": tmp_path / name}
        return train_group(coders(), small_target, harvest=Harvest(cache="int8"), **sizes)  # type: ignore[arg-type]

    straight, step, steps = trained("straight"), training.group_step, []

    def cut_off(*args: object, **kwargs: object) -> Tensor:
        steps.append(1)
        if len(steps) == 25:
            raise KeyboardInterrupt
        return step(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "group_step", cut_off)
        trained("cut")
    assert all(map(torch.equal, tensors(trained("cut")), tensors(straight)))


def test_training_on_the_output_has_nothing_to_read(small_target: TargetModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^training on the model's output runs the target: leave out --cache and"):
        train_coders(
            [coders()[0].config], small_target, tokens=100, batch=32, seed=0, folder=tmp_path,
            objective=Output("free"), harvest=Harvest(cache="fp16"),
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- settings


def test_settings_say_where_things_lie_and_every_study_passes_them_on() -> None:
    here = CoderStudySettings(target="tiny", device="cuda:0", output=Path("output"))
    assert here.home == "cuda:0" and here.harvest == Harvest()
    apart = dataclasses.replace(here, target_device="cuda:1", cache="int8")
    assert apart.home == "cuda:1" and apart.harvest == Harvest(cache="int8", device="cuda:0")
    for file in [REPOSITORY / "main.py", REPOSITORY / "study.py", *(REPOSITORY / "experiments").glob("*/*.py")]:
        text = file.read_text()
        if "recipes import" in text and "train_coders(" in text:
            assert "harvest=s.harvest" in text, f"{file} trains without --cache and --target-device"


def test_processes_that_share_a_training_have_no_second_device(
    small_target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_store, "check_device", lambda device: device)
    monkeypatch.setattr(parallel, "_joined", [World(0, 2, "coders")])
    with pytest.raises(ValueError, match="^several processes have a device each for all they do: leave out --target-"):
        ActivationsStore(small_target, DATA, harvest=Harvest(device="meta"))
