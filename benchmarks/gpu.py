"""All that is to be learnt on a GPU, in one command of at most eight minutes: does it run, is it right, how fast is it?

    python benchmarks/gpu.py --prepare                  # beforehand, on any machine: writes the token folder
    python benchmarks/gpu.py --output RESULTS           # on the GPU machine; called again, it goes on where it stopped
    python benchmarks/gpu.py --device cpu --miniature   # every part at toy sizes, in seconds: what the tests run

It needs torch, transformers and what they bring, jaxtyping, einops, pytest and hypothesis: none of this project's other
packages. einops is taken from a wheel in wheels/ where it is not installed.
A failure costs its own measurement alone: this is the one place of the project where every exception is caught, its
traceback written to the log, and the next measurement begun. The parts, in their order:

    device    names, versions, and what the device reaches: a copy in its memory, a product in each precision
    tests     pytest -m cuda
    steps     loss and gradients of every kind of coder under every rule against those of its dense twin, and their times
    engine    a step of ours, of the dense twin and of sparsify; one encoder product in each precision; the gathers; the
              pieces of the selection by bounds
    clt       a 4-layer cross-layer transcoder against its dense twin
    training  main.py's coders, trained as main.py trains them, harvest included
    profile   the kernels of a step
    spd       what is left of the minutes: the decomposition of `tiny` is trained from its start
"""

import argparse
import contextlib
import csv
import importlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # nothing is installed on a bare machine
sys.path.extend(map(str, Path(__file__).parent.glob("wheels/einops-*.whl")))  # pure Python, imported as it lies

import numpy as np
import torch
import transformers
from floors import Size, gather_work, product_work, step_work
from gpu_bench import MARGIN, Bench, Step
from gpu_steps import adam_step, batches, clt_config, coder_configs, dense_step, largest_error, our_step
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from activation_store import ActivationBatch, DataConfig
from checkpoints import build_coder
from config import BatchTopK, CoderConfig, EncoderConfig, JumpReLU, Relu, TopK, TrainConfig
from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise
from logs import atomic_path, errors_in_one_line, git_commit
from sparse_encode import _select_by_bounds
from sparse_ops import Layout
from target_loaders import ASSETS, load_tokenizer
from target_models import Loaded, TargetModel, load_target, make_target
from token_stream import DatasetSpec, TokenStream
from training import dead_after, train_group

HERE = Path(__file__).parent
ROW = 2**12  # tokens that are written at a time
TOLERANCE = 1e-2  # of loss and gradients, relative: room for TF32, and for winners that rounding exchanges


def device(bench: Bench) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda,
                "transformers": transformers.__version__, "triton": _version("triton")}  # fmt: skip
    bench.row("versions", note=", ".join(f"{name} {version}" for name, version in versions.items()))
    bench.row("commit", note=git_commit() or "unknown")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        bench.row("driver", note=subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    n = 64 if bench.mini else 8192
    source = torch.randn(n * n * 4, device=bench.device)
    copied = torch.empty_like(source)
    ms = bench.milliseconds(lambda: copied.copy_(source))
    bench.row("copy", f"{source.nbytes} bytes", ms, note=f"{2 * source.nbytes / ms / 1e6:.0f} GB/s, read and written")
    for name, ms in products(bench, *torch.randn(2, n, n, device=bench.device)):
        bench.row(f"product, {name}", f"{n}³", ms, note=f"{2 * n**3 / ms / 1e9:.0f} TFLOP/s")


def _version(module: str) -> str:
    with contextlib.suppress(ImportError):
        return importlib.import_module(module).__version__  # type: ignore[no-any-return]
    return "absent"


def products(bench: Bench, x: Tensor, W: Tensor) -> Iterator[tuple[str, float]]:
    """(precision, milliseconds of x Wᵀ); TF32 on a GPU alone."""
    low_x, low_W = x.bfloat16(), W.bfloat16()
    yield "bf16", bench.milliseconds(lambda: low_x @ low_W.T)
    on_cuda = torch.backends.cuda.matmul
    before = on_cuda.fp32_precision
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, on_cuda, "fp32_precision", before)
        for name, precision in (("tf32", "tf32"), ("fp32", "ieee")):
            if name == "tf32" and bench.device == "cpu":
                bench.row("product, tf32", note="skipped: needs CUDA")
                continue
            on_cuda.fp32_precision = precision
            yield name, bench.milliseconds(lambda: x @ W.T)


def tests(bench: Bench) -> None:
    if bench.device == "cpu":
        return bench.row("pytest -m cuda", note="skipped: needs CUDA")
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    began, out = time.monotonic(), {"stdout": bench.log, "stderr": subprocess.STDOUT}
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = subprocess.run(command, cwd=HERE.parent, env=env, timeout=100, **out).returncode
    last = (bench.output / "gpu.log").read_text().splitlines()[-1]
    assert code == 0, f"pytest ended with {code}: {last}"
    bench.row("pytest -m cuda", ms=1e3 * (time.monotonic() - began), note=last)


def steps(bench: Bench) -> None:
    size = Size(16, 64, 4, 32) if bench.mini else Size(768, 4096, 32, 4096)
    for rule in (Relu(1e-3), TopK(size.k), BatchTopK(size.k), JumpReLU(1e-4)):
        for kind, config in coder_configs(size, rule).items():
            what = f"{kind}, {type(rule).__name__}"
            with bench.guarded(what, size):
                given = batches(size, len(config.layers), bench.device)
                error = largest_error(config, next(given), bench.device)
                assert error < TOLERANCE, f"loss or gradients differ from the dense twin's by {error:.1e}"
                ours = bench.milliseconds(our_step(config, given, bench.device))
                work = (step_work(size, len(config.layers)), "bf16") if isinstance(rule, TopK | BatchTopK) else None
                bench.row(f"{what}: ours", size, ours, work, ours, f"largest relative error {error:.1e}")
                dense = bench.milliseconds(dense_step(config, given, bench.device))
                bench.row(f"{what}: dense twin", size, dense, None, ours)


def engine(bench: Bench) -> None:
    sparse_coder = None
    with bench.guarded("import of sparsify"):
        sparse_coder = import_sparsify(bench)
    sizes = [Size(768, d_dict, 32, batch) for batch in (4096, 8192) for d_dict in (4096, 16_384, 32_768)]
    for size in [Size(16, 64, 4, 32)] if bench.mini else sizes:
        ours = {}
        given = batches(size, 1, bench.device)
        for rule in (TopK(size.k), BatchTopK(size.k)):
            config, name = (
                EncoderConfig(layer=0, d_in=size.d, d_out=size.d, d_dict=size.d_dict, rule=rule),
                type(rule).__name__,
            )
            with bench.guarded(f"{name}: ours", size):
                ours[name] = bench.milliseconds(our_step(config, given, bench.device))
                bench.row(f"{name}: ours", size, ours[name], (step_work(size), "bf16"), ours[name])
            with bench.guarded(f"{name}: dense twin", size):
                ms = bench.milliseconds(dense_step(config, given, bench.device))
                bench.row(f"{name}: dense twin", size, ms, None, ours.get(name))
        if sparse_coder is not None:
            with bench.guarded("TopK: sparsify", size):
                ms = bench.milliseconds(sparsify_step(sparse_coder, size, given, bench.device))
                bench.row("TopK: sparsify", size, ms, None, ours.get("TopK"))
        with bench.guarded("encoder products", size):
            W = torch.randn(size.d_dict, size.d, device=bench.device)
            for name, ms in products(bench, next(given).inputs[0], W):
                work = product_work(size, 2 if name == "bf16" else 4)
                bench.row(f"encoder product, {name}", size, ms, (work, name), ours.get("BatchTopK"))
        with bench.guarded("gathers", size):
            ms = bench.milliseconds(gathers(size, next(given), bench.device))
            bench.row("gathers of a step", size, ms, (gather_work(size), "fp32"), ours.get("BatchTopK"))
        with bench.guarded("pieces of the selection", size):
            if bench.device == "cpu":
                bench.row("pieces of the selection", note="skipped: needs CUDA")
                continue
            for name, rule, piece in pieces(size, next(given).inputs[0]):
                ms = bench.milliseconds(piece)
                bench.row(f"{rule}: {name}", size, ms, None, ours.get(rule), unproven(piece()))


def pieces(size: Size, x: Tensor) -> Iterator[tuple[str, str, Step]]:
    """(name, rule, call) of each piece of a selection by bounds, and of the whole, on random weights."""
    import sparse_triton as kernels

    k, W = size.k, torch.randn(size.d_dict, size.d, device=x.device) / size.d**0.5
    b = torch.zeros(size.d_dict, device=x.device)
    bounds = kernels.triton_upper_bounds(x, W, b)
    found = {
        "TopK": kernels.triton_candidates_by_token(bounds, k),
        "BatchTopK": kernels.triton_candidates_in_batch(bounds, k),
    }
    exact = {rule: kernels.triton_pre_activations(x, W, b, candidates) for rule, candidates in found.items()}
    yield "rounding and bounds", "TopK", lambda: kernels.triton_upper_bounds(x, W, b)
    yield "candidates", "TopK", lambda: kernels.triton_candidates_by_token(bounds, k)
    yield "candidates", "BatchTopK", lambda: kernels.triton_candidates_in_batch(bounds, k)
    yield "float32 values", "TopK", lambda: kernels.triton_pre_activations(x, W, b, found["TopK"])
    yield "float32 values", "BatchTopK", lambda: kernels.triton_pre_activations(x, W, b, found["BatchTopK"])
    yield "winners", "TopK", lambda: kernels.triton_winners_by_token(found["TopK"], exact["TopK"], k)
    winners = lambda pre: pre.sort(descending=True, stable=True).indices[: k * size.batch].sort()  # noqa: E731
    yield "winners", "BatchTopK", lambda: winners(exact["BatchTopK"])
    yield "selection", "TopK", lambda: _select_by_bounds(x, W, b, k, flat=False)
    yield "selection", "BatchTopK", lambda: _select_by_bounds(x, W, b, k, flat=True)


def unproven(made: Any) -> str:
    """A note on a whole selection; empty for a piece."""
    layout = made[0] if isinstance(made, tuple) and isinstance(made[0], Layout) else None
    return (
        ""
        if layout is None or layout.unproven is None
        else f"{int(layout.unproven)} of {layout.n_rows} tokens unproven"
    )


def import_sparsify(bench: Bench) -> Any:
    """sparsify's sparse_coder module out of the wheels that were brought along; None, and a row, where there are none.

    The package itself is left out: it imports its trainer, and that needs `datasets`.
    """
    wheels = sorted(bench.args.wheels.glob("*.whl"))
    if not any("sparsify" in wheel.name for wheel in wheels):
        bench.row("TopK: sparsify", note=f"skipped: no wheel of it in {bench.args.wheels.name}/")
        return None
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(bench.scratch / "wheels")
    sys.path.append(str(bench.scratch / "wheels"))
    if bench.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    package = types.ModuleType("sparsify")
    package.__path__ = [str(bench.scratch / "wheels" / "sparsify")]
    sys.modules["sparsify"] = package
    return importlib.import_module("sparsify.sparse_coder")


def sparsify_step(module: Any, size: Size, given: Iterator[ActivationBatch], device: str) -> Step:
    config = module.SparseCoderConfig(num_latents=size.d_dict, k=size.k, transcode=True)
    coder = module.SparseCoder(size.d, config, device=device)

    def loss() -> Tensor:
        batch = next(given)
        return coder(batch.inputs[0], batch.targets[0]).fvu  # type: ignore[no-any-return]

    return adam_step(list(coder.parameters()), loss)


def gathers(size: Size, batch: ActivationBatch, device: str) -> Step:
    """The sparse passes of a step on random codes whose order is known: decoder, its two gradients, the encoder's."""
    d, d_dict, k, n = size
    rows = torch.arange(n, device=device).repeat_interleave(k)
    layout = Layout(rows, torch.randint(d_dict, (n * k,), device=device), n, d_dict)
    values, W, x, grad = torch.rand(n * k, device=device), torch.randn(d_dict, d, device=device), *batch
    return lambda: (layout.sum_by_row(values, W), layout.dots(grad[0], W), layout.sum_by_latent(values, grad[0]),
                    layout.sum_by_latent(values, x[0]))  # fmt: skip


def clt(bench: Bench) -> None:
    sizes = [Size(768, 4096, 16, 4096), Size(768, 16_384, 16, 4096)]
    for size in [Size(16, 64, 4, 32)] if bench.mini else sizes:
        given, config = batches(size, 4, bench.device), clt_config(size, 4)
        ours = None
        with bench.guarded("4 layers: ours", size):
            ours = bench.milliseconds(our_step(config, given, bench.device))
            bench.row("4 layers: ours", size, ours, (step_work(size, 4), "bf16"), ours)
        with bench.guarded("4 layers: dense twin", size):
            ms = bench.milliseconds(dense_step(config, given, bench.device))
            bench.row("4 layers: dense twin", size, ms, None, ours)


def text(bench: Bench) -> tuple[DatasetSpec, str]:
    """(the token folder, ""); random tokens in its place where it was not prepared."""
    if (bench.args.tokens / "train.npy").exists():
        return DatasetSpec(str(bench.args.tokens), tokenised=True), ""
    ids = np.random.default_rng(0).integers(1, 4096, 2_000_000).astype(np.uint16)
    ids[::100] = 0
    for split in ("train", "val"):
        np.save(bench.scratch / f"{split}.npy", ids)
    return DatasetSpec(str(bench.scratch), tokenised=True), "random tokens; "


def target_of(bench: Bench) -> TargetModel:
    target = replace(load_target("tiny", bench.device), data=text(bench)[0])
    return replace(target, context=32) if bench.mini else target


def random_target(bench: Bench, d: int) -> TargetModel:
    """Four layers of random weights in `tiny`'s vocabulary."""
    tiny = target_of(bench)
    heads = max(2, d // 64)
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(tiny.context, tiny.vocab_size, 4, heads, d, 4 * d, heads))
    initialise(model, torch.Generator().manual_seed(0))
    return make_target("random", Loaded(model, tiny.tokenizer, tiny.context, tiny.data), bench.device)


def training(bench: Bench) -> None:
    note = text(bench)[1]
    sizes = [Size(192, 1536, 0, 2048), Size(768, 4096, 0, 8192), Size(768, 16_384, 0, 8192)]
    for size in [Size(32, 64, 0, 64)] if bench.mini else sizes:
        what = "nine coders on tiny" if size.d == 192 else f"nine coders on a random target of d {size.d}"
        with bench.guarded(what, size):
            target = target_of(bench) if size.d == 192 else random_target(bench, size.d)
            coders = [
                EncoderConfig(layer=i, d_in=size.d, d_out=size.d, d_dict=size.d_dict, rule=BatchTopK(k))
                for i in range(4) for k in (8, 32)
            ]  # fmt: skip
            configs = [*coders, clt_config(size._replace(k=16), 4)]
            tokens = size.batch * (4 if bench.mini else 100)
            data = DataConfig(layers=(0, 1, 2, 3), batch_tokens=size.batch)
            data = replace(data, buffer_tokens=256, model_batch=4) if bench.mini else data
            train = TrainConfig(
                tokens=tokens,
                dead_after=dead_after(tokens),
                calibration_tokens=size.batch,
            )
            folder = bench.scratch / str(size)
            built = [build_coder(config, torch.Generator().manual_seed(0)) for config in configs]
            trained = train_group(built, target, data=data, config=train, folder=folder)
            last = metrics(Path(trained[0].path))[-1]
            speed = last["tokens_per_second"]
            bench.row(what, size, 1e3 * size.batch / speed, note=f"{note}{speed:.0f} tokens/s, FVU {last['fvu']:.3f}")
            shutil.rmtree(folder)


def profile(bench: Bench) -> None:
    size = Size(16, 64, 4, 32) if bench.mini else Size(768, 32_768, 32, 8192)
    small = size if bench.mini else Size(768, 4096, 16, 4096)
    wide = EncoderConfig(layer=0, d_in=size.d, d_out=size.d, d_dict=size.d_dict, rule=TopK(size.k))
    cases: dict[str, tuple[CoderConfig, Size]] = {
        "TopK": (wide, size), "BatchTopK": (replace(wide, rule=BatchTopK(size.k)), size),
        "CLT, 4 layers": (clt_config(small, 4), small),
    }  # fmt: skip
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    on = torch.autograd.DeviceType
    clock, place = ("cpu", on.CPU) if bench.device == "cpu" else ("device", on.CUDA)
    tables = []
    for what, (config, shape) in cases.items():
        with bench.guarded(what, shape):
            step = our_step(config, batches(shape, len(config.layers), bench.device), bench.device)
            ms = bench.milliseconds(step)
            with torch.profiler.profile(activities=activities if place == on.CUDA else activities[:1]) as profiler:
                step()
            found = profiler.key_averages()
            own = [event for event in found if event.device_type == place and not event.is_user_annotation]
            busy = sum(getattr(event, f"self_{clock}_time_total") for event in own) / 1e3
            waits = sum(e.count for e in found if e.key in ("aten::_local_scalar_dense", "aten::nonzero"))
            bench.row(what, shape, ms, note=f"kernels {busy:.3g} ms, {waits} items and nonzeros read")
            orders = dict.fromkeys((f"self_{clock}_time_total", "self_cpu_time_total"))  # the device's, then the host's
            tables.extend(f"{what}, {shape}\n{found.table(sort_by=order, row_limit=25)}" for order in orders)
    (bench.output / "profile.txt").write_text("\n".join(tables))


def spd(bench: Bench) -> None:
    """The decomposition of `tiny` from its start, in what is left of the minutes; what was cut off goes on when called again."""
    if text(bench)[1]:
        return bench.row("tiny", note=f"skipped: no token folder {bench.args.tokens}: call with --prepare first")
    table, out = bench.output / "spd.csv", {"stdout": bench.log, "stderr": subprocess.STDOUT}
    size = "--batch 3 --tokens 1536 --eval-tokens 512" if bench.mini else f"--batch 32 --tokens {10**9}"
    command = [
        sys.executable, str(HERE / "spd_recipes.py"), "--train", "best", *size.split(), "--device", bench.device,
        "--minutes", f"{(bench.seconds_left - MARGIN) / 60:.2f}", "--text", str(bench.args.tokens), "--table", str(table),
        "--output", str(bench.output / "spd"),
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = subprocess.run(command, cwd=HERE.parent, env=env, **out).returncode
    assert code == 0, f"spd_recipes.py ended with {code}"
    with table.open() as file:
        last = list(csv.DictReader(file))[-1]
    note = ", ".join(f"{name} {last[name]}" for name in ("tokens", "l0_frozen", "dce_frozen", "l0_free", "dce_free"))
    bench.row(
        "tiny", f"batch {last['batch']}", 1e3 * float(last["seconds_per_step"]), note=f"{last['steps']} steps, {note}"
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {  # in their order, each with the seconds it may take
    "device": (device, 30), "tests": (tests, 110), "steps": (steps, 60), "engine": (engine, 90), "clt": (clt, 30),
    "training": (training, 90), "profile": (profile, 30), "spd": (spd, 3600),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ command line


def prepare(folder: Path, n_tokens: int, text: DatasetSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """train.npy, and val.npy of a twentieth: the packed streams of a text, two bytes a token."""
    folder.mkdir(parents=True, exist_ok=True)
    assert len(tokenizer) <= 2**16, f"{len(tokenizer)} tokens do not fit into two bytes"
    for name, split, n in (("train", "train", n_tokens), ("val", "test", n_tokens // 20)):
        stream, pieces = TokenStream(text, tokenizer, split, 1, ROW), []  # type: ignore[arg-type]
        with tqdm(total=n, desc=name, unit="token", unit_scale=True) as bar:
            for row in itertools.islice(stream, -(-n // ROW)):
                pieces.append(row[0].numpy().astype(np.uint16))
                bar.update(ROW)
        with atomic_path(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(pieces))
    print(f"{folder}: " + ", ".join(f"{file.name} {file.stat().st_size:,} bytes" for file in folder.glob("*.npy")))


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("OUT", HERE / "results" / "gpu"))
    add = parser.add_argument
    add("--output", type=Path, default=out, help="folder of gpu.csv and the other files; $OUT where that is set")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--minutes", type=float, default=8.0, help="of the whole call; what other parts leave of them is spd's")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--tokens", type=Path, default=HERE / "tokens", help="the token folder")
    add("--wheels", type=Path, default=HERE / "wheels", help="folder of sparsify's wheel and those it needs")
    add("--miniature", action="store_true", help="toy sizes")
    add("--prepare", type=int, nargs="?", const=20_000_000, help="write so many tokens into the token folder, and stop")
    return parser.parse_args()


def main() -> None:
    errors_in_one_line()
    args = settings()
    if args.prepare:
        return prepare(
            args.tokens, args.prepare, DatasetSpec("python"), load_tokenizer(ASSETS / "tiny" / "tokenizer.json")
        )
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        for i, part in enumerate(args.parts):
            bench.run(part, *PARTS[part])
            rest = args.parts[i + 1 :]
            if rest and bench.is_broken():  # no later measurement would run in this process
                minutes = ["--minutes", str(bench.seconds_left / 60)]
                os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:], *minutes, "--parts", *rest])


if __name__ == "__main__":
    main()
