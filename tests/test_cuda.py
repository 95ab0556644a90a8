"""On a real CUDA device: what holds on every device, and what only a real one can show; skipped where there is none.

Without one `test_emulated_cuda.py` runs these tests too, on emulated devices: none is run for the first time on a GPU.
"""

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_theorems import (  # noqa: F401  # fixtures and tests: collected here, with a real device
    DATA,
    RULES,
    TOKENS,
    TRAIN,
    Waiting,
    assert_close,
    coder_of,
    cpu,
    every_kind,
    every_rule,
    float32_everywhere,
    no_collection,
    on,
    stepped,
    test_a_calibrated_threshold_is_the_cpus,
    test_a_foreign_dictionary_is_measured_on_the_device_as_on_the_cpu,
    test_a_group_trains_on_the_device_as_on_the_cpu,
    test_a_least_squares_start_on_the_device_is_the_cpus,
    test_a_mask_variant_on_the_device_is_the_cpus,
    test_a_step_never_waits_for_the_device,
    test_a_step_of_todays_terms_on_the_device_is_the_cpus,
    test_a_step_on_the_device_is_the_cpus,
    test_an_interrupted_run_ends_on_the_device_as_if_it_had_not_been,
    test_an_spd_step_on_the_device_is_the_cpus,
    test_coders_train_on_another_device_than_their_target,
    test_every_gate_steps_on_the_device_as_on_the_cpu,
    test_forwards_beside_the_steps_change_nothing,
    test_the_main_job_on_the_device_gives_the_cpus_table,
    test_the_ruler_on_the_device_reads_what_it_reads_on_the_cpu,
    trainer_of,
)
from torch import Tensor

import training
from activation_store import ActivationBatch, ActivationsStore
from checkpoints import build_coder
from coder import ActivationStats
from config import EncoderConfig, Recon
from patching import capture
from sparse_encode import (
    _bounds_pay,
    _select_by_bounds,
    dense_encode_batch_topk,
    dense_encode_threshold,
    dense_encode_topk,
    encode_batch_topk,
    encode_threshold,
    encode_topk,
)
from sparse_ops import decode, dense_decode
from target_models import TargetModel
from training import group_step, start_run

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here: test_emulated_cuda.py stands in"),
]
N_DEVICES = torch.cuda.device_count()


@pytest.fixture(params=["cuda:0"] if N_DEVICES < 2 else ["cuda:0", f"cuda:{N_DEVICES - 1}"])
def device(request: pytest.FixtureRequest) -> str:
    """The current device, and the last one of the machine, which is not."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def waiting() -> Waiting:
    """Torch raises RuntimeError where the host waits; nothing is counted."""

    @contextlib.contextmanager
    def refused() -> Iterator[Counter[str]]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        with contextlib.ExitStack() as stack:
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
            yield Counter()

    return refused


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every generator of a device gets a twin on the CPU, of the same seed, which draws in its place."""
    twins: dict[int, torch.Generator] = {}

    def drawn(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw(*args: Any, generator: torch.Generator | None = None, device: Any = None, **kwargs: Any) -> Tensor:
            if generator is None or generator.device.type == "cpu":
                return function(*args, generator=generator, device=device, **kwargs)
            twin = twins.setdefault(id(generator), torch.Generator().manual_seed(generator.initial_seed()))
            return function(*args, generator=twin, **kwargs).to(device)

        return draw

    for name in ("rand", "randint"):
        monkeypatch.setattr(torch, name, drawn(getattr(torch, name)))


# ------------------------------------------------------------------------------------------------------------- kernels


def random(device: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=dtype).to(device) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "d", "lengths"), [(5, 3, [0, 2, 0, 40, 1, 0]), (900, 300, [17, 0, 700] * 9), (1, 1, [0])]
)
def test_a_sum_over_segments_is_plain_indexing(
    n: int, d: int, lengths: list[int], dtype: torch.dtype, device: str
) -> None:
    """Also of a table whose rows lie apart; summed in float32, rounded once."""
    from sparse_triton import triton_segment_sums

    starts = torch.tensor([0, *lengths]).cumsum(0).to(device)
    index = torch.randint(n, (sum(lengths),), generator=torch.Generator().manual_seed(1)).to(device)
    weights, wide = random(device, (sum(lengths),), (n, d + 4))
    for table in (wide[:, :d].contiguous(), wide[:, 2 : d + 2], wide.T.contiguous().T[:, :d]):
        table = table.to(dtype)
        rows = weights[:, None].double() * table[index].double()
        slow = torch.stack([rows[a:b].sum(0) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist())])
        fast = triton_segment_sums(index, starts, weights, table)
        assert fast.device == torch.device(device) and fast.dtype == dtype
        torch.testing.assert_close(fast.double(), slow, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "m", "d", "pairs"), [(4, 6, 5, 37), (300, 200, 300, 1600), (1, 1, 1, 0)])
def test_a_product_of_pairs_is_plain_indexing(n: int, m: int, d: int, pairs: int, device: str) -> None:
    from sparse_triton import triton_pair_dots

    a, b = random(device, (n, d), (m, d + 1))
    b, g = b[:, 1:], torch.Generator().manual_seed(1)
    rows, cols = (torch.randint(size, (pairs,), generator=g).to(device) for size in (n, m))
    fast = triton_pair_dots(a, rows, b, cols)
    torch.testing.assert_close(fast.double(), (a[rows].double() * b[cols].double()).sum(1), rtol=1e-4, atol=1e-4)


ENCODERS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "topk": (lambda x, W, b: encode_topk(x, W, b, 8), lambda x, W, b: dense_encode_topk(x, W, b, 8)),
    "batchtopk": (
        lambda x, W, b: encode_batch_topk(x, W, b, 8, torch.tensor(-torch.inf, device=x.device)),
        lambda x, W, b: dense_encode_batch_topk(x, W, b, 8),
    ),
    "threshold": (
        lambda x, W, b: encode_threshold(x, W, b, torch.tensor(2.0, device=x.device)),
        lambda x, W, b: dense_encode_threshold(x, W, b, torch.tensor(2.0, device=x.device)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bf16", ["off", "on"])  # on: float32 of 1,024 latents is selected by bounds
@pytest.mark.parametrize("d_dict", [96, 1024])  # so many active that sums are dense, and so few that they are not
@pytest.mark.parametrize("rule", ENCODERS)
def test_sparse_codes_and_gradients_are_the_dense_twins(
    rule: str, d_dict: int, bf16: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over active entries are float32's at best, in float64 too."""
    monkeypatch.setenv("NN_BF16", bf16)
    sparse, dense = ENCODERS[rule]
    tensors = random(device, (130, 48), (d_dict, 48), (d_dict,), (d_dict, 56), dtype=dtype)
    results = []
    for encode, reconstruct in ((sparse, decode), (dense, dense_decode)):
        x, W, b, D = (tensor.clone().requires_grad_() for tensor in tensors)
        y = reconstruct(encode(x, W / 48**0.5, b), D)
        (y * torch.linspace(-1, 1, y.numel(), device=device, dtype=dtype).view_as(y)).sum().backward()
        results.append([y.detach(), x.grad, W.grad, b.grad, D.grad])
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4 * slow.abs().max().item())


@pytest.mark.parametrize(
    ("n", "d", "d_dict", "k"),
    [(4096, 768, 16_384, 32), (300, 768, 40_000, 128), (1, 24, 1024, 16), (64, 100, 5000, 1)] if N_DEVICES
    else [(40, 24, 1024, 16), (1, 24, 1500, 16), (64, 100, 2000, 1)],
)  # fmt: skip
@pytest.mark.parametrize("flat", [False, True])
def test_selection_by_bounds_is_that_of_float64(
    flat: bool, n: int, d: int, d_dict: int, k: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly every token is proven; who is selected reaches the smallest winner, but for float32's rounding, and no other.

    Of 32 of 16,384 normal pre-activations 46 ± 4 bounds reach the smallest, of 64 that there is room for.
    """
    monkeypatch.setenv("NN_BF16", "on")
    x, W, b = random(device, (n, d), (d_dict, d), (d_dict,))
    W, b = W / d**0.5, b / 10
    assert _bounds_pay(x, W, k)
    layout, pre = _select_by_bounds(x, W, b, k, flat)
    exact = x.double() @ W.double().T + b.double()
    chosen = torch.zeros_like(exact, dtype=torch.bool)
    chosen[layout.rows, layout.cols] = True
    assert layout.unproven <= n // 200 and chosen.sum() == len(pre) == k * n
    torch.testing.assert_close(pre.double(), exact[layout.rows, layout.cols], rtol=1e-5, atol=1e-5)
    assert ((layout.rows * d_dict + layout.cols).diff() > 0).all()
    if not flat:
        assert (layout.rows == torch.arange(n, device=device).repeat_interleave(k)).all()
    groups = (exact.flatten()[None], chosen.flatten()[None]) if flat else (exact, chosen)
    least = groups[0].masked_fill(~groups[1], torch.inf).amin(1)
    most = groups[0].masked_fill(groups[1], -torch.inf).amax(1)
    assert (most - least).max() < 1e-5


@pytest.mark.parametrize("flat", [False, True])
def test_selection_by_bounds_never_waits_and_sees_what_is_not_finite(flat: bool, device: str, waiting: Waiting) -> None:
    x, W, b = random(device, (64, 48), (2048, 48), (2048,))
    _select_by_bounds(x, W, b, 8, flat)
    with waiting() as waits:
        layout, pre = _select_by_bounds(x, W, b, 8, flat)
    assert not waits, waits
    W[-1, 0] = torch.nan
    assert _select_by_bounds(x, W, b, 8, flat)[1].isnan().any()
    layout, _ = _select_by_bounds(x, torch.zeros_like(W), torch.zeros_like(b), 8, flat)
    flat_places = layout.rows * 2048 + layout.cols
    lowest = torch.arange(8 * 64, device=device)
    assert layout.unproven == 64 and (flat_places == (lowest if flat else lowest // 8 * 2048 + lowest % 8)).all()


# ------------------------------------------------------------------------------------------------------- whole steps


def large_steps(kind: str, rule: str, device: str, folder: Path) -> list[Tensor]:
    """All tensors after three steps at sizes at which CUDA's kernels use many blocks."""
    d, n = 128, 2048 if N_DEVICES else 64
    config = coder_of(kind, rule).config
    config = type(config)(**{**config.__dict__, "d_in": d, "d_dict": 1024} | ({} if kind == "sae" else {"d_out": d}))
    coder = build_coder(config, torch.Generator().manual_seed(0))
    ones = torch.ones(2, device=device)
    stats = ActivationStats(torch.zeros(2, d, device=device), ones, torch.zeros(2, d, device=device), ones, ones * d, n)
    target = SimpleNamespace(site="mlp_out")
    store: Any = SimpleNamespace(target=target, device=torch.device(device), stats=stats, config=DATA)
    run = start_run(kind, coder, store=store, config=TRAIN, folder=folder)
    for _ in range(3):
        run.coder.count_dead(1)
        group_step([run], ActivationBatch(*random(device, (2, n, d), (2, n, d))), config=TRAIN, factor=0.5)
    return list(run.coder.state_dict().values())


def test_what_was_dropped_is_not_written_to(cpu: TargetModel, device: str) -> None:
    """A forward still runs beside the steps when its store goes, and whoever comes next is given the store's memory."""
    store = ActivationsStore(on(cpu, device), DATA)
    torch.cuda.synchronize()
    with store.aside.begun():
        torch.cuda._sleep(10**9)  # half a second
        store.buffer.fill_(1)
    place, n_bytes, like = store.buffer.data_ptr(), store.buffer.nbytes, torch.zeros_like(store.buffer, device="cpu")
    del store
    gc.collect()
    zeros = torch.zeros_like(like, device=device)
    assert abs(zeros.data_ptr() - place) < n_bytes, "the test shows nothing: other memory was given"
    torch.cuda.synchronize()
    assert not zeros.any()


@every_kind
@every_rule
def test_a_step_taken_twice_is_the_same_to_the_last_bit(
    kind: str, rule: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selected by bounds where a rule counts its active latents."""
    monkeypatch.delenv("NN_BF16")
    first, again = (large_steps(kind, rule, device, tmp_path / str(i)) for i in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@every_kind
@every_rule
def test_a_recorded_step_is_the_step_itself(
    kind: str, rule: str, cpu: TargetModel, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ten steps, most of them replayed, while k, the rate and the number of dead latents change in between."""
    target, ends = on(cpu, device), []
    for i, recorded in enumerate((True, False)):
        if not recorded:
            monkeypatch.setattr(training, "records_graphs", lambda _device: False)
        store = ActivationsStore(target, DATA)
        run = start_run(kind, coder_of(kind, rule), store=store, config=TRAIN, folder=tmp_path / str(i))
        for step in range(10):
            if run.coder.k is not None:
                run.coder.set_k(8 if step < 4 else 6)
            if step == 7:
                run.coder.count_dead(1)
            readings = group_step([run], next(store), config=TRAIN, factor=1 / (1 + step))
            assert readings.isfinite().all()
        assert recorded == (run.recorded.graph is not None) or not N_DEVICES
        ends.append([*run.coder.state_dict().values(), readings])
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("source", ["stochastic", "pgd", "persistent"])
def test_an_spd_step_never_waits_for_the_device(source: str, cpu: TargetModel, device: str, waiting: Waiting) -> None:
    """With random numbers of the device's own generator, and products in bf16."""
    recon = Recon(coefficient=1.0, source=source, routing="subset", steps=2)  # type: ignore[arg-type]
    trainer, tokens = trainer_of(on(cpu, device), "causal_transformer", recon, autocast=True), TOKENS.to(device)
    trainer.step(tokens)
    with waiting():
        readings = trainer.step(tokens)
    assert readings.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- precision


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_a_coders_products_are_float32(device: str) -> None:
    """TF32 would err by 3e-4, bf16 by 3e-3."""
    coder = build_coder(
        EncoderConfig(layer=0, d_in=512, d_out=512, d_dict=1024, rule=RULES["relu"]), torch.Generator().manual_seed(0)
    ).to(device)
    x, W_dec = random(device, (256, 512), (1024, 512))
    coder.W_dec.data.copy_(W_dec)
    pre = x.double() @ coder.encoder.W_enc.double().T
    assert relative_error(coder.encoder.pre_activations(x).detach(), pre) < 1e-6
    assert relative_error(coder(x).y_hat.detach(), pre.relu() @ W_dec.double()) < 1e-6


def test_activations_are_harvested_in_bf16_where_it_is_fast(
    cpu: TargetModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, exact = on(cpu, device), capture(cpu, TOKENS, (0, 1)).outputs.double()
    low, high = 1e-3, 1e-2
    assert relative_error(capture(target, TOKENS, (0, 1)).outputs.cpu(), exact) < 1e-5  # NN_BF16 is off
    monkeypatch.delenv("NN_BF16")
    assert low < relative_error(capture(target, TOKENS, (0, 1)).outputs.cpu(), exact) < high
    store = ActivationsStore(target, DATA)
    assert store.buffer.dtype == torch.float16 and next(store).inputs.dtype == torch.float32


def test_spd_trains_in_bf16_where_asked_and_keeps_its_weights_in_float32(cpu: TargetModel, device: str) -> None:
    losses = []
    for autocast in (False, True):
        trainer = trainer_of(
            on(cpu, device), "shared_mlp", Recon(coefficient=1.0, source="deployed"), autocast=autocast
        )
        losses.append(trainer.step(TOKENS.to(device))[0])
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[0] != losses[1] and relative_error(losses[1], losses[0].double()) < 0.05


@every_kind
def test_readings_stay_on_the_device_until_they_are_read(
    kind: str, cpu: TargetModel, device: str, tmp_path: Path
) -> None:
    readings, _ = stepped(on(cpu, device), kind, "batchtopk", tmp_path)
    assert {reading.device for reading in readings} == {torch.device(device)}
    assert_close(torch.stack(readings).isfinite().all(), torch.tensor(True))
