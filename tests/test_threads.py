"""Theorems about independent calls side by side, and about memory that is given back."""

import threading
import weakref

import pytest
import torch

from devices import give_back_memory, in_threads


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
