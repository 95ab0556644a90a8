"""Theorems about independent calls side by side, and about memory that is given back."""

import os
import threading
import weakref

import pytest
import torch

from devices import float32_through_onednn, give_back_memory, in_processes, in_threads, onednn_is_exact


@pytest.fixture(params=[1, 2, 4])
def threads(request):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("items", [1, 2, 3, 9])
def test_results_come_in_order_and_the_calls_divide_the_processors(threads: int, items: int) -> None:
    together = threading.Barrier(min(threads, items), timeout=60)  # passes only if that many calls run at once

    def call(i: int) -> tuple[int, int]:
        if i < together.parties:
            together.wait()
        return i * i, torch.get_num_threads()

    results = in_threads(call, range(items))
    assert [square for square, _ in results] == [i * i for i in range(items)]
    share = threads // min(threads, items)
    assert {own for _, own in results} == {share}, f"{threads=} {items=}"
    assert torch.get_num_threads() == threads


def test_calls_within_calls_add_no_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = in_threads(lambda i: in_threads(lambda j: threading.get_ident(), range(3)), range(2))
    torch.set_num_threads(before)
    assert all(len(set(own)) == 1 for own in seen)


def test_calls_within_calls_get_what_processors_are_left() -> None:
    """All four inner calls run at once: a pool that both levels shared would wait for itself."""
    before, together = torch.get_num_threads(), threading.Barrier(4, timeout=60)
    torch.set_num_threads(4)
    seen = in_threads(lambda i: in_threads(lambda j: (together.wait(), 2 * i + j)[1], range(2)), range(2))
    torch.set_num_threads(before)
    assert seen == [[0, 1], [2, 3]]


def test_what_fails_in_a_call_fails_here(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda i: 1 // i, range(3))
    assert torch.get_num_threads() == threads


def test_what_refers_to_itself_is_given_back_at_every_call() -> None:
    class Node:
        own: "Node"

    for _ in range(2):
        node = Node()
        node.own, alive = node, weakref.ref(node)
        del node
        assert alive() is not None
        give_back_memory()
        assert alive() is None


@pytest.mark.parametrize("items", [1, 2, 5])
def test_copies_of_the_process_give_back_tensors_and_values_in_order(threads: int, items: int) -> None:
    def call(i: int) -> tuple[int, torch.Tensor, int]:
        return os.getpid(), torch.full((3,), float(i)), torch.get_num_threads()

    results = list(in_processes(call, range(items), torch.device("cpu")))
    assert [value.tolist() for _, value, _ in results] == [[float(i)] * 3 for i in range(items)]
    here = threads == 1 or items < threads
    assert all((process == os.getpid()) == here for process, _, _ in results)
    assert {own for _, _, own in results} == {threads if here else 1}


def test_an_error_in_a_copy_of_the_process_is_raised_here() -> None:
    def call(i: int) -> int:
        raise ValueError(f"item {i} cannot be measured")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="item 0 cannot be measured"):
        list(in_processes(call, range(2), torch.device("cpu")))
    torch.set_num_threads(before)


def test_float32_products_are_float32s_whoever_makes_them() -> None:
    """Nothing is rounded to bf16, whatever the permission is called; where it would be, that is noticed."""
    through_onednn = float32_through_onednn()
    assert onednn_is_exact()
    assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == through_onednn
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 768, generator=generator), torch.randn(500, 768, generator=generator)
    exact, rounded = x.double() @ weight.double().T, (x.bfloat16() @ weight.bfloat16().T).float()
    assert (x @ weight.T - exact).norm() < 1e-6 * exact.norm() < 1e-3 * (rounded - exact).norm()
