"""Each kernel of `sparse_kernels.c` says what its twin in torch and numpy says, and is only called on what it takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_c
import sparse_encode
import sparse_ops as ops
from losses import auxk, fvu

REPOSITORY = Path(__file__).parents[1]
quick = settings(max_examples=60, deadline=None)
needs_compiler = pytest.mark.skipif(sparse_c._library() is None, reason="no C compiler: the twins serve")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def values_with_ties(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(values, k): few different numbers, both zeros, infinities, NaN; k up to all of them."""
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-42, -3e38, torch.inf, -torch.inf, torch.nan])
    values = draw(st.lists(numbers | st.floats(width=32), min_size=1, max_size=60))
    return torch.tensor(values, dtype=torch.float32), draw(st.integers(1, len(values)))


@needs_compiler
@quick
@given(values_with_ties())
def test_the_largest_are_those_of_a_stable_descending_sort(problem: tuple[Tensor, int]) -> None:
    values, k = problem
    wanted = values.nan_to_num(torch.inf, torch.inf, -torch.inf).sort(descending=True, stable=True).indices[:k]
    assert torch.equal(sparse_c.c_largest(values, k), wanted.sort().values)


@needs_compiler
@quick
@given(values_with_ties(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_of_a_token_the_largest_are_those_of_a_stable_descending_sort(
    problem: tuple[Tensor, int], dtype: torch.dtype
) -> None:
    """Of pre-activations, and of bounds in bf16 that are the pre-activations (the biases) themselves."""
    row, k = problem
    bounds = row.nan_to_num(2.0).clamp(-1e38, 1e38).to(dtype)[None].repeat(3, 1)
    bounds[1] = bounds[1].flip(0)
    bounds[2] = 0  # all ties
    x, W = torch.ones(1, 1), torch.zeros(len(row), 1)
    for t in range(3):
        b = bounds[t].float()
        found = sparse_c.c_winners_by_token(bounds[t : t + 1], k, 0.0, x, W, b, first=5, room=2 * len(row))
        wanted = b.sort(descending=True, stable=True).indices[:k].sort().values
        assert found is not None and torch.equal(found[0], wanted + 5 * len(row)) and torch.equal(found[1], b[wanted])


@needs_compiler
def test_a_token_with_a_number_that_is_none_or_too_much_to_look_at_is_left_to_the_twin() -> None:
    bounds, x, W, b = normal(4, 64), normal(4, 3), normal(64, 3), torch.zeros(64)
    assert sparse_c.c_winners_by_token(bounds, 40, 0.0, x, W, b, first=0, room=4 * 64) is not None
    assert sparse_c.c_winners_by_token(bounds, 40, 0.0, x, W, b, first=0, room=4 * 64 - 1) is None
    bounds[2] = torch.nan
    assert sparse_c.c_winners_by_token(bounds, 40, 0.0, x, W, b, first=0, room=4 * 64) is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_dict", [1, 15, 16, 100])
@pytest.mark.parametrize("floor", [-torch.inf, -0.5, 0.0, 1.0, 100.0])
@pytest.mark.parametrize("expected", [0, 1000])  # less than there are, and more
def test_a_scan_finds_what_a_comparison_finds(dtype: torch.dtype, d_dict: int, floor: float, expected: int) -> None:
    bounds = normal(7, d_dict).to(dtype)
    bounds[3, 0] = torch.nan
    flat, upper = sparse_c.c_scan(bounds, floor, first=2, expected=expected)
    wanted = ops.nonzero_positions(bounds >= floor)
    assert torch.equal(flat, wanted + 2 * d_dict) and torch.equal(upper, bounds.flatten()[wanted].float())


@needs_compiler
@pytest.mark.parametrize("d", [1, 16, 37, 192])
def test_rows_are_rounded_to_nearest_and_even(d: int) -> None:
    x = normal(50, d + 3)[:, :d] * torch.logspace(-30, 30, 50)[:, None]  # rows lie apart
    x[0, 0], x[1, 0] = 1 + 2.0**-8, 1 + 3 * 2.0**-8  # between two: to the even one
    low, norm, rest = sparse_c.c_rounded(x, 3)
    assert low.shape == (50, d + 3) and torch.equal(low[:, :d], x.bfloat16())
    finite = slice(16, 34)  # where squares neither vanish nor overflow
    torch.testing.assert_close(norm[finite], x.norm(dim=1)[finite])
    torch.testing.assert_close(rest[finite], (x - x.bfloat16()).norm(dim=1)[finite])
    for bad in (torch.nan, torch.inf):
        x[20, 0] = bad
        assert not sparse_c.c_rounded(x, 0)[1][20].isfinite()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("d", [1, 15, 16, 192, 213])
def test_dots_of_pairs_are_those_of_the_matrices(d: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_c, "SHARED_ABOVE", 1 if threads > 1 else 1 << 40)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, W, b = normal(20, d + 5)[:, 2 : d + 2], normal(30, 2 * d)[:, d:], normal(30)  # columns of wider tables
    rows, cols = torch.arange(20).repeat_interleave(3), torch.arange(60) * 7 % 30
    wanted = (x.double()[rows] * W.double()[cols]).sum(1)
    torch.testing.assert_close(sparse_c.c_pair_dots(x, rows, W, cols).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sparse_c.c_pair_dots(x, rows, W, cols, b).double(), wanted + b[cols], rtol=1e-5, atol=1e-5
    )
    assert len(sparse_c.c_pair_dots(x, rows[:0], W, cols[:0])) == 0
    torch.set_num_threads(before)


@needs_compiler
@quick
@given(st.integers(1, 9), st.integers(1, 30), st.data())
def test_a_layout_is_that_of_sorting_and_searching(n: int, d_dict: int, data: st.DataObject) -> None:
    """Of tokens and latents without an entry, and of none at all, too."""
    flat = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n * d_dict - 1)))), dtype=torch.int64)
    compiled = ops.layout_of(flat, n, d_dict)
    compiled.by_latent  # noqa: B018
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_c, "switched_on", False)
        twin = ops.layout_of(flat, n, d_dict)
        for name in ("rows", "cols", "row_starts", "by_latent", "latent_starts", "rows_by_latent", "cols_by_latent"):
            assert torch.equal(getattr(compiled, name), getattr(twin, name)), name


@needs_compiler
@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize("d", [1, 13, 192])
def test_errors_and_their_gradients_are_those_of_their_twins(
    layers: tuple[int, ...], d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what helps, what is too long, what points away, and what writes nothing."""
    y, y_hat, noise = normal(*layers, 40, d), normal(*layers, 40, d, seed=1), normal(*layers, 40, d, seed=2)
    e_hat = noise + (y - y_hat) * torch.tensor([0.5, 4.0, -1.0, 0.0]).repeat(10)[:, None]
    e_hat[..., ::5, :] = 0
    variance, found = torch.rand(layers, generator=torch.Generator().manual_seed(3)) + 1, []
    for compiled in (True, False):
        monkeypatch.setattr(sparse_c, "switched_on", compiled)
        one, other = y_hat.clone().requires_grad_(), e_hat.clone().requires_grad_()
        losses = fvu(y, one, variance), auxk(y, one, e_hat=other, variance=variance)
        (losses[0].sum() + 3 * losses[1].mean()).backward()
        found.append((*losses, one.grad, other.grad))
    for compiled, twin in zip(*found):
        torch.testing.assert_close(compiled, twin, rtol=1e-5, atol=1e-7)
    y[..., 7, 0] = torch.nan
    monkeypatch.setattr(sparse_c, "switched_on", True)
    assert fvu(y, y_hat, variance).isnan().all() and auxk(y, y_hat, e_hat=e_hat, variance=variance).isnan().all()
    assert sparse_c.c_squared_residuals(y.requires_grad_(), y_hat) is None


# ------------------------------------------------------------------------------------------------------ what is taken


@needs_compiler
def test_what_the_kernels_cannot_read_is_left_to_the_twins() -> None:
    x = normal(6, 8)
    assert sparse_c.takes(x, x[::2], x[:, 2:5], x[0])
    assert not sparse_c.takes(x, x.double()) and not sparse_c.takes(x.bfloat16())
    assert not sparse_c.takes(x.T) and not sparse_c.takes(x[:, ::2]) and not sparse_c.takes(x[:, 0])
    assert not sparse_c.takes(x.to("meta")) and sparse_c.takes(x.long(), dtype=torch.int64)
    with pytest.raises(AssertionError, match="k=9"):
        sparse_c.c_largest(x[0], 9)
    with pytest.raises(AssertionError, match="dtype"):
        sparse_c.c_scan(x.double(), 0.0, first=0, expected=1)


ASKED = "import sparse_c, torch; print(sparse_c.takes(torch.zeros(3, 4)))"


def asked(compiler: str, cache: Path) -> tuple[str, str]:
    """What a process with this compiler says of a tensor that the kernels can read, and its complaints."""
    env = {"PATH": "/usr/bin:/bin:/usr/local/bin", "CC": compiler, "NN_CACHE_HOME": str(cache), "HOME": str(cache)}
    call = subprocess.run([sys.executable, "-c", ASKED], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert call.returncode == 0, call.stderr
    return call.stdout.strip(), call.stderr.strip()


def test_without_a_compiler_the_twins_serve(tmp_path: Path) -> None:
    """Silently where there is none, in one line where it fails, which leaves nothing behind."""
    assert asked("none", tmp_path) == ("False", "")
    said, complaint = asked("false", tmp_path)
    assert said == "False" and complaint.count("\n") == 0 and "take longer" in complaint
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.tmp"))


@needs_compiler
def test_a_compiled_file_serves_until_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NN_CACHE_HOME", str(tmp_path))
    assert sparse_c._compiled.__wrapped__() is not None
    (file,) = tmp_path.rglob("*.so")
    written = file.stat().st_mtime_ns
    assert sparse_c._compiled.__wrapped__() is not None and file.stat().st_mtime_ns == written
    changed = tmp_path / "changed.c"
    changed.write_text(sparse_c.SOURCE.read_text() + "\n")
    monkeypatch.setattr(sparse_c, "SOURCE", changed)
    assert sparse_c._compiled.__wrapped__() is not None and len(list(tmp_path.rglob("*.so"))) == 2


@needs_compiler
@pytest.mark.parametrize("rule", ["topk", "batch", "threshold"])
def test_the_kernels_and_their_twins_select_alike(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bf16 bounds, at a size of training: the same latents, values that differ in the order of their sums alone."""
    monkeypatch.setenv("NN_BF16", "on")
    x, W, b = normal(512, 64), normal(1536, 64, seed=1) / 8, normal(1536, seed=2) / 3

    def codes() -> ops.Codes:
        if rule == "topk":
            return sparse_encode.encode_topk(x, W, b, 8)
        if rule == "batch":
            return sparse_encode.encode_batch_topk(x, W, b, 8, torch.tensor(2.6))
        return sparse_encode.encode_threshold(x, W, b, torch.tensor(2.6))

    compiled = codes()
    monkeypatch.setattr(sparse_c, "switched_on", False)
    twin = codes()
    assert torch.equal(compiled.rows, twin.rows) and torch.equal(compiled.cols, twin.cols) and len(twin.rows) > 1000
    torch.testing.assert_close(compiled.values, twin.values, rtol=1e-5, atol=1e-5)
