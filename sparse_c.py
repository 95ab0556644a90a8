"""The kernels of `sparse_kernels.c` for processors: compiled when they are first asked for, called on tensors.

They do in one pass what torch and numpy do in several: at d 192 and 2,048 tokens a step of a coder is many small operations,
and its products are a third of it (benchmarks/README.md). Their twins stand in `sparse_encode.py`, `sparse_ops.py` and
`losses.py`, and serve wherever `takes` says no: where no C compiler is found ($CC, else cc, gcc or clang; CC=none switches
the kernels off), of other tensors than float32 ones on a CPU, and of such whose rows do not lie together. A call holds no
lock of Python's, so that coders that step side by side do not wait for each other.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from devices import in_threads, processor_description
from logs import atomic_path, cache_folder

SOURCE = Path(__file__).with_name("sparse_kernels.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
         "-fno-math-errno")  # fmt: skip  # sums in any order, NaN and infinities as they are
WIDE = ("-mprefer-vector-width=512",)  # of x86, where compilers prefer half the width
NUMBER, ADDRESS, NOTHING = ctypes.c_int64, ctypes.c_void_p, None
SIGNATURES: dict[str, tuple[Any, str]] = {  # result, and arguments: n a number, f a float, * the address of a table
    "round_rows": (NOTHING, "*nnn*n**"),
    "scan": (NUMBER, "*nnnfnn**"),
    "largest": (NOTHING, "*nn*"),
    "pair_dots": (NOTHING, "n***n*n*n*"),
    "winners_by_token": (NUMBER, "*nnnnf*n*n*nnn**"),
    "locate": (NOTHING, "*nnn***"),
    "order_by_latent": (NOTHING, "*nn**"),
    "residuals": (NOTHING, "nn*****"),
    "residuals_backward": (NOTHING, "nn******"),
}
SHARED_ABOVE = 1 << 26  # multiply-adds of dots from which on they are shared out to threads

switched_on = True  # tests compare with the twins
_one_at_a_time = threading.Lock()  # of coders that step side by side, one compiles


def _compiler() -> Path | None:
    named = os.environ.get("CC")
    found = next(filter(None, map(shutil.which, [named] if named else ["cc", "gcc", "clang"])), None)
    return None if found is None else Path(found).resolve()


def _identity(compiler: Path) -> str:
    """What the compiled file depends on: the source, the compiler and the processor, as sixteen digits."""
    file, lines = compiler.stat(), processor_description().splitlines()
    model = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2] or lines
    parts = [SOURCE.read_bytes(), repr((compiler, file.st_size, file.st_mtime_ns, FLAGS, WIDE, model)).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had."""
    with _one_at_a_time:
        return _compiled()


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    """None where there is no compiler, or no source beside this file; in one line where the compiler fails."""
    compiler = _compiler()
    if compiler is None or not SOURCE.exists():
        return None
    file = cache_folder() / "kernels" / f"sparse_kernels_{_identity(compiler)}.so"
    try:
        if not file.exists():
            wide = WIDE if platform.machine() in ("x86_64", "AMD64") else ()
            with atomic_path(file) as path:
                call = [str(compiler), *FLAGS, *wide, str(SOURCE), "-o", str(path), "-lm"]
                subprocess.run(call, check=True, capture_output=True, text=True)
        library = ctypes.CDLL(str(file))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        print(f"{SOURCE.name} is not compiled by {compiler}, steps on the CPU take longer: {reason}", file=sys.stderr)
        return None
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [{"n": NUMBER, "f": ctypes.c_float, "*": ADDRESS}[kind] for kind in arguments]
    return library


def takes(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels can be called on these: of this type, on a CPU, with rows that lie together."""
    fit = all(t.device.type == "cpu" and t.dtype == dtype and _in_rows(t) for t in tensors)
    return fit and switched_on and _library() is not None


def _in_rows(t: Tensor) -> bool:
    return t.stride(-1) == 1 if t.ndim == 2 else t.is_contiguous()


def _call(name: str, *arguments: Tensor | float | None) -> Any:
    return getattr(_library(), name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


# ----------------------------------------------------------------------------------------------------------- selection


def c_rounded(x: Float[Tensor, "n d"], columns: int) -> tuple[Tensor, Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(x in bf16 beside `columns` that are not yet filled, ‖x‖, ‖x − bf16(x)‖)."""
    n, d = x.shape
    low, norm, rest = x.new_empty(n, d + columns, dtype=torch.bfloat16), x.new_empty(n), x.new_empty(n)
    _call("round_rows", x, x.stride(0), n, d, low, d + columns, norm, rest)
    return low, norm, rest


def c_scan(
    bounds: Float[Tensor, "n d_dict"], floor: float, *, first: int, expected: int
) -> tuple[Int[Tensor, "found"], Float[Tensor, "found"]]:
    """Ascending flat positions, row 0 being token `first`, and values of the bounds ≥ floor; about `expected` of them."""
    assert bounds.is_contiguous() and bounds.dtype in (torch.bfloat16, torch.float32), f"{bounds.dtype=}"
    (n, d_dict), low, found = bounds.shape, bounds.dtype == torch.bfloat16, expected
    while True:  # twice where more are found than expected
        flat, upper = torch.empty(found, dtype=torch.int64), torch.empty(found)
        found = _call("scan", bounds, low, n, d_dict, floor, first, found, flat, upper)
        if found <= len(flat):
            return flat[:found], upper[:found]


def c_largest(values: Float[Tensor, "n"], k: int) -> Int[Tensor, "k"]:
    """Ascending positions of the k largest; ties go to the lowest, NaN counts as infinite."""
    assert 1 <= k <= len(values) < 2**31, f"{k=} {len(values)=}"
    at = torch.empty(k, dtype=torch.int64)
    _call("largest", values, len(values), k, at)
    return at


def c_winners_by_token(
    bounds: Float[Tensor, "n d_dict"], k: int, slack: float, x: Float[Tensor, "n d"], W: Float[Tensor, "d_dict d"],
    b: Float[Tensor, "d_dict"], *, first: int, room: int,
) -> tuple[Int[Tensor, "n_k"], Float[Tensor, "n_k"]] | None:  # fmt: skip
    """(flat positions, pre-activations) of each token's k largest; None where more than `room` are looked at, or one is NaN.

    `bounds` in bf16 are upper ones, pre ≤ u + |u| slack; in float32 they are the pre-activations. Row 0 is token `first`.
    """
    assert bounds.is_contiguous() and bounds.dtype in (torch.bfloat16, torch.float32), f"{bounds.dtype=}"
    (n, d_dict), low = bounds.shape, bounds.dtype == torch.bfloat16
    assert 1 <= k <= d_dict < 2**31, f"{k=} {d_dict=}"
    flat, pre = torch.empty(n * k, dtype=torch.int64), torch.empty(n * k)
    looked_at = _call("winners_by_token", bounds, low, n, d_dict, k, slack, x, x.stride(0), W, W.stride(0), b, x.shape[1],
                      first, room, flat, pre)  # fmt: skip
    return None if looked_at < 0 else (flat, pre)


# -------------------------------------------------------------------------------------------------------------- layout


def c_located(
    flat: Int[Tensor, "active"], n_rows: int, d_dict: int
) -> tuple[Int[Tensor, "active"], Int[Tensor, "active"], Int[Tensor, "n_rows+1"]]:
    """(rows, cols, row_starts) of ascending positions."""
    rows, cols, starts = torch.empty_like(flat), torch.empty_like(flat), flat.new_empty(n_rows + 1)
    _call("locate", flat, len(flat), n_rows, d_dict, rows, cols, starts)
    return rows, cols, starts


def c_by_latent(cols: Int[Tensor, "active"], d_dict: int) -> tuple[Int[Tensor, "active"], Int[Tensor, "d_dict+1"]]:
    """(order, latent_starts): positions of the entries in the order of their latents, stable."""
    order, starts = torch.empty_like(cols), cols.new_empty(d_dict + 1)
    _call("order_by_latent", cols, len(cols), d_dict, order, starts)
    return order, starts


def c_pair_dots(
    x: Float[Tensor, "n d"], rows: Int[Tensor, "pair"], W: Float[Tensor, "m d"], cols: Int[Tensor, "pair"],
    b: Float[Tensor, "m"] | None = None,
) -> Float[Tensor, "pair"]:  # fmt: skip
    """out[e] = x[rows[e]] · W[cols[e]], plus b[cols[e]] where there is a b; many are shared out to threads."""
    out, d = x.new_empty(len(rows)), x.shape[1]
    parts = torch.get_num_threads() if len(rows) * d >= SHARED_ABOVE else 1

    def some(i: int) -> None:
        own = slice(len(rows) * i // parts, len(rows) * (i + 1) // parts)
        _call("pair_dots", own.stop - own.start, rows[own], cols[own], x, x.stride(0), W, W.stride(0), b, d, out[own])

    in_threads(some, range(parts))
    return out


# -------------------------------------------------------------------------------------------------------------- errors


class _SquaredResiduals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e_hat: Tensor, y: Tensor, y_hat: Tensor | None) -> Tensor:
        error = y.new_empty(y.shape[:-1])
        alpha = None if y_hat is None else torch.empty_like(error)
        _call("residuals", error.numel(), y.shape[-1], y, y_hat, e_hat, alpha, error)
        ctx.save_for_backward(e_hat, y, y_hat, alpha)
        return error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (e_hat, y, y_hat, alpha), out = ctx.saved_tensors, torch.empty_like(ctx.saved_tensors[0])
        _call("residuals_backward", grad.numel(), y.shape[-1], y, y_hat, e_hat, alpha, grad.contiguous(), out)
        return out, None, None


def c_squared_residuals(
    y: Float[Tensor, "*layer batch d"], e_hat: Float[Tensor, "*layer batch d"],
    y_hat: Float[Tensor, "*layer batch d"] | None = None,
) -> Float[Tensor, "*layer batch"] | None:  # fmt: skip
    """‖y − ê‖² of each token, or with ŷ the least ‖y − ŷ − αê‖², 0 ≤ α ≤ 1; gradient in ê alone, α a constant.

    None where the kernels cannot be called on these, or y wants a gradient.
    """
    given = [y, e_hat] if y_hat is None else [y, e_hat, y_hat]
    if y.requires_grad or not takes(*given) or any(t.shape != y.shape or not t.is_contiguous() for t in given):
        return None
    return _SquaredResiduals.apply(e_hat, y, None if y_hat is None else y_hat.detach())  # type: ignore[no-any-return]
