"""The project on emulated CUDA devices: what holds on every device, how often the host waits, and the emulation itself."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from device_theorems import (  # noqa: F401  # fixtures and tests: collected here, with this file's devices
    OF_TODAY,
    TOKENS,
    Waiting,
    assert_close,
    coder_of,
    cpu,
    every_kind,
    every_replacement,
    every_rule,
    float32_everywhere,
    no_collection,
    on,
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
from small import each_by_itself
from test_cuda import (  # noqa: F401
    test_a_coders_products_are_float32,
    test_a_product_of_pairs_is_plain_indexing,
    test_a_step_taken_twice_is_the_same_to_the_last_bit,
    test_a_sum_over_segments_is_plain_indexing,
    test_activations_are_harvested_in_bf16_where_it_is_fast,
    test_an_spd_step_never_waits_for_the_device,
    test_readings_stay_on_the_device_until_they_are_read,
    test_selection_by_bounds_is_that_of_float64,
    test_selection_by_bounds_never_waits_and_sees_what_is_not_finite,
    test_sparse_codes_and_gradients_are_the_dense_twins,
    test_spd_trains_in_bf16_where_asked_and_keeps_its_weights_in_float32,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from coder import ActivationStats
from config import Recon
from evaluation import evaluate
from losses import fvu
from patching import capture
from target_models import TargetModel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device is here: test_cuda.py proves the same")
sparse_triton = pytest.importorskip("sparse_triton", reason="Triton is not installed: there is no CUDA path to emulate")
from emulated_cuda import Emulation, _Kernel, emulated_cuda  # noqa: E402
from kernel_twins import TWINS  # noqa: E402

REAL_KERNELS = {name: getattr(sparse_triton, name) for name in TWINS}

RULER_WAITS = {"_to_copy": 131, "bincount": 147, "index": 97, "nonzero": 40}


@pytest.fixture
def emulation() -> Iterator[Emulation]:
    with emulated_cuda() as own:
        yield own


@pytest.fixture
def device(emulation: Emulation) -> str:
    """Not the current device, which is cuda:0: what is put on "cuda" without an index is refused here."""
    return "cuda:1"


@pytest.fixture
def waiting(emulation: Emulation) -> Waiting:
    return emulation.counted


@pytest.fixture
def same_draws() -> None:
    """The emulated generator is the CPU's."""


# ---------------------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize(("source", "waits"), [("stochastic", 0), ("pgd", 0), ("persistent", 0), ("deployed", 0)])
def test_an_spd_step_waits_for_the_device_this_often(
    source: str, waits: int, cpu: TargetModel, device: str, waiting: Waiting
) -> None:
    """Never, whatever the source of its masks."""
    trainer = trainer_of(
        on(cpu, device), "causal_transformer", Recon(coefficient=1.0, source=source, routing="subset", steps=3)
    )  # type: ignore
    tokens = TOKENS.to(device)
    trainer.step(tokens)
    with waiting() as found:
        trainer.step(tokens)
    assert found.total() == waits, found


def test_an_spd_step_of_todays_terms_never_waits_for_the_device(
    cpu: TargetModel, device: str, waiting: Waiting
) -> None:
    trainer, tokens = trainer_of(on(cpu, device), "shared_mlp", *OF_TODAY, optimiser="muon"), TOKENS.to(device)
    trainer.step(tokens)
    with waiting() as found:
        trainer.step(tokens)
    assert not found.total(), found


def test_the_ruler_waits_for_the_device_this_often(cpu: TargetModel, device: str, waiting: Waiting) -> None:
    """415 times for one more batch of six replacements of two layers under four protocols: twelve times a pass."""
    target, counts = on(cpu, device), []
    for n in (2, 4):
        with waiting() as waits:
            evaluate(target, every_replacement(target)[::3], each_by_itself(TOKENS[:n].to(device)), batch=2)
        counts.append(waits)
    more = counts[1] - counts[0]
    by_operation = {name: sum(n for key, n in more.items() if key.startswith(name + " ")) for name in RULER_WAITS}
    assert by_operation == RULER_WAITS and sum(RULER_WAITS.values()) == more.total() == 415, more


# --------------------------------------------------------------------------------------------------------- fake tensors


@every_kind
@every_rule
def test_all_of_a_coder_lies_on_one_device(kind: str, rule: str) -> None:
    """Fake tensors have no values but CUDA's devices and shapes: from the statistics to the loss, nothing is elsewhere."""
    with FakeTensorMode():
        ones: Callable[..., torch.Tensor] = lambda *shape: torch.ones(shape, device="cuda")  # noqa: E731
        with torch.device("cuda"):
            coder = coder_of(kind, rule)
        n, d = len(coder.encoders), coder.config.d_in
        coder.initialise(ActivationStats(ones(n, d), ones(n), ones(n, d), ones(n), ones(n), 100))
        x, variance = (ones(n, 32, d), ones(n)) if kind == "clt" else (ones(32, d), ones())
        codes, penalty = coder.encode_with_penalty(x, x, variance)
        loss = fvu(x, coder.reconstruct(codes, x), variance).mean() + penalty
        assert loss.device == penalty.device == torch.device("cuda:0") and loss.shape == ()


# -------------------------------------------------------------------------------------------------- the emulation itself


def test_what_cuda_refuses_is_refused(emulation: Emulation) -> None:
    x, y = torch.randn(3, 4).to("cuda:1"), torch.randn(3, 4)
    assert x.device == torch.device("cuda:1") and x.is_cuda and not x.is_cpu
    generators = [torch.Generator(place) for place in ("cpu", "cuda:0", "cuda:1")]
    mixed = [
        lambda: x + y, lambda: x @ y.T, lambda: torch.cat([x, y]), lambda: x + x.to("cuda"), lambda: y * x.sum(),
        lambda: torch.stack([x.sum(), y.sum()]), lambda: x.index_select(0, torch.tensor([0])),
        lambda: torch.rand(3, generator=generators[2]), lambda: torch.rand(3, device="cuda:1", generator=generators[0]),
        lambda: torch.rand(3, device="cuda:1", generator=generators[1]), lambda: x.clone().normal_(generator=generators[0]),
        lambda: torch.zeros(1, device="cuda:2"), lambda: y.pin_memory().to("cuda").pin_memory(),
    ]  # fmt: skip
    for refused in mixed:
        with pytest.raises(RuntimeError):
            refused()
    with pytest.raises(TypeError, match="can't convert cuda:1 device type tensor to numpy"):
        x.numpy()
    allowed = (
        x + y.sum(),
        torch.where(x > 0, x, 0.0),
        x.masked_fill(x > 0, y.sum()),
        x[torch.tensor([0])],
        x.new_zeros(1),
    )
    assert {made.device for made in allowed} == {x.device}
    assert torch.tensor([1.0], device="cuda").device == torch.device("cuda:0")
    with torch.cuda.device(1):
        assert torch.zeros(1, device="cuda").device == x.device


def test_a_kernel_is_launched_on_the_current_device(emulation: Emulation) -> None:
    launched: list[torch.Tensor] = []
    kernel = _Kernel(lambda x: launched.append(x))
    x = torch.ones(2, device="cuda:1")
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        kernel[(1,)](x)
    with torch.cuda.device_of(x):
        kernel[(1,)](x)
    assert launched == [x] and torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", REAL_KERNELS)
def test_the_kernels_that_stand_in_take_the_same_arguments(name: str, emulation: Emulation) -> None:
    real = REAL_KERNELS[name]
    code = getattr(sparse_triton, name).function.__code__
    assert tuple(real.arg_names) == code.co_varnames[: code.co_argcount]


def test_what_makes_the_host_wait_is_counted(emulation: Emulation) -> None:
    x = torch.randn(3, 4).to("cuda:1")
    mask, ones = x > 0, torch.ones(3, dtype=torch.int64, device="cuda:1")
    waits: list[Callable[[], Any]] = [
        lambda: x.sum().item(), lambda: bool(x.sum()), lambda: float(x.sum()), x.tolist, x.cpu, x.nonzero, ones.bincount,
        lambda: x[mask], lambda: torch.equal(x, x), lambda: torch.unique(x), lambda: x.masked_select(mask),
        lambda: x[torch.tensor([0, 1])], lambda: x[[0, 1]], lambda: torch.repeat_interleave(ones),
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.tensor(1.0, device="cuda"), lambda: torch.ones(3).pin_memory().to("cuda"), torch.cuda.synchronize,
        lambda: torch.ones(3).to("cuda", non_blocking=True), lambda: x.clone().copy_(torch.ones(4)),
    ]  # fmt: skip
    goes_on: list[Callable[[], Any]] = [
        lambda: x @ x.T, lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True), lambda: x.masked_fill(mask, 0.0),
        lambda: torch.full((2,), 1.0, device="cuda"), lambda: x.to("cuda:1"), lambda: x[1:, None], lambda: x[ones],
        lambda: torch.repeat_interleave(ones, output_size=3), lambda: x.clone().__setitem__(mask, 1.0),
        lambda: torch.nonzero_static(mask, size=4), lambda: x.clone().copy_(x), lambda: x.topk(2),
        lambda: torch.ones(3).sum().item(),
    ]  # fmt: skip
    for expected, operations in ((1, waits), (0, goes_on)):
        for i, operation in enumerate(operations):
            with emulation.counted() as found:
                operation()
            assert found.total() == expected, f"{i}: {found}"


def test_gradients_optimisers_and_autocast_are_the_cpus(emulation: Emulation) -> None:
    """A parameter that moves stays the same object, as on CUDA."""
    both = []
    for place in ("cpu", "cuda:1"):
        torch.manual_seed(0)
        linear = torch.nn.Linear(4, 5)
        weight = linear.weight
        assert linear.to(place).weight is weight and weight.device == torch.device(place)
        optimiser = torch.optim.Adam(linear.parameters(), lr=0.1, fused=True)
        with torch.autocast(torch.device(place).type, torch.bfloat16):
            y = linear(torch.ones(3, 4, device=place))
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(linear.parameters(), 0.01)
        optimiser.step()
        both.append([*linear.state_dict().values(), weight.grad])
    assert_close(*both[::-1])


def test_memory_that_was_not_written_holds_no_number_to_rely_on(emulation: Emulation) -> None:
    assert torch.empty(3, device="cuda").isnan().all() and (torch.empty(3, dtype=torch.int64, device="cuda") < 0).all()


def test_everything_is_put_back(cpu: TargetModel) -> None:
    names = [(torch, "Generator"), (torch, "inference_mode"), (torch, "load"), (torch.Tensor, "pin_memory"),
             (torch.cuda, "is_available"), (torch.cuda, "_exchange_device"), (sparse_triton, "_pair_dots")]  # fmt: skip
    before = [getattr(*name) for name in names]
    with contextlib.suppress(KeyboardInterrupt), emulated_cuda():
        torch.cuda.set_device(1)
        raise KeyboardInterrupt
    assert [getattr(*name) for name in names] == before and torch.device("cuda", 0) == torch.device("cuda:0")
    with emulated_cuda():
        assert torch.cuda.current_device() == 0
    x = torch.ones(3, requires_grad=True)
    x.sum().backward()
    capture(cpu, TOKENS, (0,))
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(3, device="cuda")
