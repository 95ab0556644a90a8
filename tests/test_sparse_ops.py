"""The sparse operations say what their dense twins say, in values and in gradients, whatever path the engine takes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_c
import sparse_encode
import sparse_ops as ops

LOW = [torch.bfloat16, torch.float32]
DTYPES = [torch.float32, torch.float64]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True, scope="module", params=[True, False], ids=["c", "torch"])
def kernels(request):  # type: ignore[no-untyped-def]
    """The kernels of processors, and their twins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_c, "switched_on", request.param)
        yield


@pytest.fixture(autouse=True, scope="module", params=[True, False], ids=["threads", "one_thread"])
def selection_in_threads(request):  # type: ignore[no-untyped-def]
    """Small problems are selected by one thread, unless they are made to be shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(sparse_encode, "THREADS_ABOVE", 0)
            patch.setattr(sparse_c, "SHARED_ABOVE", 0)
        yield
    torch.set_num_threads(threads)


@st.composite
def problems(draw: st.DrawFn, whole: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """(x, W_enc, b_enc, W_dec, k). Small whole numbers are exact in every precision, and full of ties."""
    batch, d_in, d_out = draw(st.integers(1, 12)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    d_dict = draw(st.integers(1, 80))
    k = draw(st.integers(1, d_dict if draw(st.booleans()) else max(1, d_dict // 16)))
    dtype = draw(st.sampled_from(DTYPES))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, W_enc, b_enc, W_dec = (
        torch.randint(-3, 4, shape, generator=g).to(dtype) if whole else torch.randn(shape, generator=g, dtype=dtype)
        for shape in ((batch, d_in), (d_dict, d_in), (d_dict,), (d_dict, d_out))
    )
    x[torch.rand(batch, generator=g) < 0.2] = 0.0  # all-zero rows
    b_enc -= draw(st.sampled_from([0, 2, 20])) * torch.ones(())  # fewer than k·B positive pre-activations, or none
    b_enc[torch.rand(d_dict, generator=g) < 0.2] = -100.0  # dead latents
    return x, W_enc, b_enc, W_dec, k


def guesses(dense: Tensor) -> list[Tensor]:
    """Bounds that are unknown, right, too low and too high."""
    smallest = dense[dense > 0].amin() if (dense > 0).any() else dense.new_zeros(())
    return [smallest * 0 - torch.inf, smallest, smallest * 0.9, smallest * 1.5 + 1]


@quick
@given(problems(whole=True), st.sampled_from(LOW))
def test_indices_are_those_of_a_stable_descending_sort(problem: tuple, low: torch.dtype) -> None:
    """All arithmetic is exact here, so that ties are ties: the lowest index wins them."""
    x, W, b, _, k = problem
    pre = torch.addmm(b, x, W.T)
    by_token = pre.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    assert torch.equal(sparse_encode.encode_topk(x, W, b, k).cols, by_token.flatten())
    flat = pre.flatten().sort(descending=True, stable=True).indices[: k * len(x)].sort().values
    for bound in guesses(pre.flatten()[flat].relu()):
        codes = sparse_encode.encode_batch_topk(x, W, b, k, bound)
        assert torch.equal(codes.rows * len(W) + codes.cols, flat), f"{bound=}"
        if k * sparse_encode.GROUP <= len(W):  # the machinery of processors with, and without, bf16 products
            found = sparse_encode._select_in_batch(x, W, b, k, bound, low)
            assert found is None or torch.equal(found.flat, flat), f"{bound=}"
    if k * sparse_encode.GROUP <= len(W):
        found = sparse_encode._select_by_token(x, W, b, k, low)
        offsets = torch.arange(len(x))[:, None] * len(W)
        assert found is None or torch.equal(found.flat, (by_token + offsets).flatten())
    assert torch.equal(sparse_encode._select_static(x, W, b, k, flat=True).flat, flat)  # what CUDA runs
    assert torch.equal(sparse_encode._select_static(x, W, b, k, flat=False).flat % len(W), by_token.flatten())


@quick
@given(problems(), st.sampled_from(["topk", "batch", "threshold"]))
def test_values_and_gradients_are_those_of_the_dense_twin(problem: tuple, rule: str) -> None:
    x, W, b, D, k = problem
    cut = torch.tensor(0.3, dtype=x.dtype)
    sparse = [t.clone().requires_grad_() for t in (x, W, b, D)]
    dense = [t.clone().requires_grad_() for t in (x, W, b, D)]
    match rule:
        case "topk":
            codes, acts = sparse_encode.encode_topk(*sparse[:3], k), sparse_encode.dense_encode_topk(*dense[:3], k)
        case "batch":
            acts = sparse_encode.dense_encode_batch_topk(*dense[:3], k)
            codes = sparse_encode.encode_batch_topk(*sparse[:3], k, guesses(acts.detach())[1])
        case _:
            codes, acts = (
                sparse_encode.encode_threshold(*sparse[:3], cut),
                sparse_encode.dense_encode_threshold(*dense[:3], cut),
            )
    y, twin = ops.decode(codes, sparse[3]), ops.dense_decode(acts, dense[3])
    torch.testing.assert_close(ops.to_dense(codes), acts)
    torch.testing.assert_close(y, twin, rtol=1e-4, atol=1e-5)
    assert (codes.rows.diff() >= 0).all() and (codes.values >= 0).all()
    if rule != "threshold":
        assert len(codes.values) == k * len(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    ((y * weight).sum() + codes.values.square().sum()).backward()
    ((twin * weight).sum() + acts.square().sum()).backward()
    for name, one, other in zip(("x", "W_enc", "b_enc", "W_dec"), sparse, dense):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("spread", [0.0, 2.0])  # of the latents' norms, as powers of e
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_upper_bounds_are_upper_and_not_far(low: torch.dtype, spread: float, scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(64, 96, generator=g) * scale, torch.randn(512, 96, generator=g) / 96**0.5
    W *= (torch.randn(512, 1, generator=g) * spread).exp()
    b = torch.randn(512, generator=g) * scale
    if low == torch.float32:  # a bound of float64's pre-activations
        x, W, b = x.double(), W.double(), b.double()
    bounds = sparse_encode._UpperBounds(x, W, b, low)
    pre = x.double() @ W.double().T + b.double()
    floor = pre.flatten().topk(1000).values[-1]
    scan = bounds.scan(floor)
    assert scan is not None and (scan.upper >= pre.flatten()[scan.flat]).all()
    missed = torch.ones(pre.numel(), dtype=torch.bool)
    missed[scan.flat] = False
    assert pre.flatten()[missed].max() < floor, "an entry above the floor was missed"
    excess = (scan.upper - pre.flatten()[scan.flat]) / (
        x.norm(dim=1)[scan.flat // 512] * W.norm(dim=1)[scan.flat % 512]
    )
    assert excess.max() < (0.02 if low == torch.bfloat16 else 1e-4), f"{excess.max()=}"


def test_bounds_in_the_precision_of_x_are_its_pre_activations() -> None:
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(64, 96, generator=g), torch.randn(512, 96, generator=g), torch.randn(512, generator=g)
    pre = torch.addmm(b, x, W.T).flatten()
    floor = pre.topk(1001).values[-2:].mean()  # between two entries
    scan = sparse_encode._UpperBounds(x, W, b, torch.float32).scan(floor)
    assert scan is not None and torch.equal(scan.flat, (pre > floor).nonzero()[:, 0])
    torch.testing.assert_close(scan.upper, pre[scan.flat], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("bound", [-torch.inf, 0.0, 1.5, 2.0, 50.0])
def test_low_precision_selects_what_float64_selects(low: torch.dtype, bound: float) -> None:
    g = torch.Generator().manual_seed(1)
    x, W = torch.randn(200, 64, generator=g).double(), torch.randn(1024, 64, generator=g).double() / 8
    b, k = torch.randn(1024, generator=g).double() * 0.1, 8
    pre = x @ W.T + b
    in_batch = sparse_encode._select_in_batch(x, W, b, k, torch.tensor(bound), low)
    by_token = sparse_encode._select_by_token(x, W, b, k, low)
    assert in_batch is not None and by_token is not None
    assert torch.equal(in_batch.flat, pre.flatten().topk(k * 200).indices.sort().values)
    assert torch.equal(by_token.flat % 1024, pre.topk(k, dim=1).indices.sort(1).values.flatten())
    torch.testing.assert_close(in_batch.pre, pre.flatten()[in_batch.flat])


@pytest.mark.parametrize("k", [2, 40])
@pytest.mark.parametrize("d_dict", [64, 640])  # fewer latents than tokens, and more
def test_one_layout_serves_strided_decoders(k: int, d_dict: int) -> None:
    """A cross-layer decoder's columns for one target are a view."""
    g = torch.Generator().manual_seed(2)
    x, W = torch.randn(100, 8, generator=g), torch.randn(d_dict, 8, generator=g)
    wide = torch.randn(d_dict, 12, generator=g, requires_grad=True)
    codes = sparse_encode.encode_topk(x, W, torch.zeros(d_dict), k)
    ops.decode(codes, wide[:, 4:8]).square().sum().backward()
    grad, wide.grad = wide.grad, None
    (ops.to_dense(codes) @ wide[:, 4:8]).square().sum().backward()
    torch.testing.assert_close(grad, wide.grad, rtol=1e-4, atol=1e-4)
    own = ops.Codes(codes.values, ops.Layout(codes.rows, codes.cols, codes.n_rows, codes.d_dict))  # made by hand
    torch.testing.assert_close(ops.decode(own, wide), ops.decode(codes, wide))


@pytest.mark.parametrize("rule", ["topk", "batch"])
def test_not_a_number_reaches_the_loss(rule: str) -> None:
    x, W, b = torch.randn(32, 4), torch.full((64, 4), torch.nan), torch.zeros(64)
    codes = (
        sparse_encode.encode_topk(x, W, b, 2)
        if rule == "topk"
        else sparse_encode.encode_batch_topk(x, W, b, 2, torch.tensor(1.0))
    )
    assert codes.values.isnan().any()


def test_dense_and_sparse_codes_are_inverse() -> None:
    acts = torch.randn(10, 20).relu().requires_grad_()
    codes = ops.from_dense(acts, acts.detach() > 0)
    assert torch.equal(ops.to_dense(codes), acts)
    codes.values.sum().backward()
    assert torch.equal(acts.grad, (acts > 0).float())
    assert torch.equal(ops.fire_counts(codes), (acts > 0).sum(0))


@quick
@given(problems())
def test_a_full_layout_says_what_a_sparse_one_says(problem: tuple) -> None:
    """What CUDA keeps of a dense matrix, every entry, gives the sums of its positive entries."""
    x, W_enc, b_enc, W_dec, _ = problem
    acts = torch.addmm(b_enc, x, W_enc.T).relu()
    sparse, full = ops.from_dense(acts, acts > 0), ops.Codes(acts.flatten(), ops.FullLayout(*acts.shape, acts.device))
    at = sparse.rows * sparse.d_dict + sparse.cols
    assert torch.equal(full.rows * full.d_dict + full.cols, torch.arange(acts.numel()))
    assert torch.equal(ops.to_dense(full), acts) and torch.equal(ops.fire_counts(full), ops.fire_counts(sparse))
    torch.testing.assert_close(ops.decode(full, W_dec), ops.decode(sparse, W_dec))
    y = ops.decode(sparse, W_dec)
    for of in (lambda c: c.layout.totals(c.values), lambda c: c.layout.sum_by_latent(c.values, y)):
        torch.testing.assert_close(of(full), of(sparse), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full.layout.dots(y, W_dec)[at], sparse.layout.dots(y, W_dec), rtol=1e-4, atol=1e-4)
