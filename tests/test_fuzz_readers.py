"""A file of any format that is changed in some way is read as its library reads it, or refused in one line.

NN_FUZZ=200 tries that many changes of every format, at random, and `pytest -s` prints what came of them.
"""

import functools
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from interop_cases import (
    GATED,
    RULES,
    B,
    D,
    F,
    N,
    clt,
    exported,
    sae,
    save,
    transcoder,
    upstream_folder,
    write_crosslayer_coding,
)  # fmt: skip
from restated import RESTATED
from safetensors.torch import load_file, save_file
from torch import Tensor

import interop
from checkpoints import load_checkpoint
from config import CLTConfig
from sparse_ops import to_dense

EXAMPLES = int(os.environ.get("NN_FUZZ", 25))
FUZZ = settings(
    max_examples=EXAMPLES, derandomize=EXAMPLES == 25, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip
RELU, TOPK, BATCH_TOPK, JUMPRELU = RULES

Folders = list[Callable[[Path], Path]]
VALID: dict[str, Folders] = {
    "upstream": [lambda p: upstream_folder(p), lambda p: upstream_folder(p, "jumprelu"),
                 lambda p: exported("upstream", p, clt(JUMPRELU))],
    "saelens": [lambda p: exported("saelens", p, sae(TOPK)), lambda p: exported("saelens", p, sae(GATED)),
                lambda p: exported("saelens", p, sae(JUMPRELU)),
                lambda p: exported("saelens", p, transcoder(JUMPRELU, skip=True))],
    "sparsify": [lambda p: exported("sparsify", p, sae(TOPK)) / "layers.1",
                 lambda p: exported("sparsify", p, transcoder(TOPK, skip=True)) / "layers.1.mlp"],
    "dictionary_learning": [lambda p, rule=rule: exported("dictionary_learning", p, sae(rule)) / "trainer_0"
                            for rule in RULES],
    "circuit-tracer": [lambda p: exported("circuit-tracer", p, *(transcoder(JUMPRELU, True, i) for i in range(N))),
                       lambda p: exported("circuit-tracer", p, clt(JUMPRELU))],
    "crosslayer-coding": [lambda p: write_crosslayer_coding(p / "cc", clt(JUMPRELU)),
                          lambda p: write_crosslayer_coding(p / "cc", clt(RELU))],
    "nn_decompositions": [lambda p: Path(save(p, sae(TOPK))), lambda p: Path(save(p, sae(GATED))),
                          lambda p: Path(save(p, transcoder(JUMPRELU, skip=True))), lambda p: Path(save(p, clt(BATCH_TOPK)))],
}  # fmt: skip

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 7, 2.5, 1e400, 10**12, "", "none", "relu", "topk", "jumprelu", "standard", "transcoder",
    "hook_resid_post", "blocks.2.hook_mlp_out", "mlp.hook_in", "ln2.hook_normalized", "x\ny", [], [1], {}, {"class": "TopK"},
]  # fmt: skip
ADDED = [
    "signed", "apply_b_dec_to_input", "finetuning_scaling_factor", "rescale_acts_by_decoder_norm", "transcode", "k", "theta",
    "skip_connection", "normalize_activations", "pre_enc_bias", "activation_fn", "hook_name_out", "hook_head_index", "io",
    "decoder_tying", "layers", "transcoders", "scale", "class", "rule",
]  # fmt: skip
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@functools.cache
def valid_files(format: str) -> list[tuple[str, dict[str, bytes]]]:
    """Name of every valid folder of a format, and the content of its files by their names."""
    found = []
    for make in VALID[format]:
        with tempfile.TemporaryDirectory() as folder:
            made = make(Path(folder))
            found.append((made.name, {path.name: path.read_bytes() for path in made.iterdir() if path.suffix != ".md"}))
    return found


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


# ------------------------------------------------------------------------------------------------------------ one change


def change_bytes(draw: Callable[..., Any], path: Path) -> str:
    content = path.read_bytes()
    how = draw(st.sampled_from(["truncate", "flip a byte", "byte-order mark", "UTF-16", "delete"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    match how:
        case "truncate":
            path.write_bytes(content[:at])
        case "flip a byte":
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :])
        case "byte-order mark":
            path.write_bytes(b"\xef\xbb\xbf" + content)
        case "UTF-16":
            path.write_bytes(content.decode("latin-1").encode("utf-16"))
        case "delete":
            path.unlink()
    return how


def change_tensors(draw: Callable[..., Any], path: Path) -> str:
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if not state:
        return "nothing is left"
    name = draw(st.sampled_from(sorted(state)))
    tensor = state[name]
    how = draw(
        st.sampled_from(["drop", "add", "rename", "prefix", "retype", "reshape", "a value", "zero a row", "scale"])
    )
    match how:
        case "drop":
            del state[name]
        case "add":
            state[draw(st.sampled_from(["W_skip", "b_gate", "threshold", "threshold_0", "k", "scaling_factor"]))] = (
                tensor.clone()
            )
        case "rename":
            state[draw(st.sampled_from(["W", *sorted(state)]))] = state.pop(name)
        case "prefix":
            prefix = draw(st.sampled_from(["_orig_mod.", "module.", "module._orig_mod."]))
            one = draw(st.booleans())
            state = {prefix + key if not one or key == name else key: value for key, value in state.items()}
        case "retype":
            state[name] = tensor.to(draw(st.sampled_from(DTYPES)))
        case "reshape":
            options = [tensor.flatten(), tensor[None], tensor[:0] if tensor.ndim else tensor[None]]
            options += [tensor.T] if tensor.ndim == 2 else []
            state[name] = draw(st.sampled_from(options))
        case "a value":
            state[name] = tensor.clone()
            value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 200.0, -200.0]))
            if tensor.is_floating_point() and tensor.numel():
                state[name].view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
        case "zero a row":
            state[name] = tensor.clone()
            (state[name][:1] if tensor.ndim else state[name]).zero_()
        case "scale":
            state[name] = tensor * draw(st.sampled_from([-1, 2, 100]))
    state = {key: value.contiguous().clone() for key, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return f"{how} {name}"


def change_config(draw: Callable[..., Any], path: Path) -> str:
    blob = yaml.safe_load(path.read_text())
    sections = [blob, *(value for value in blob.values() if isinstance(value, dict))]
    sections += [value for inner in sections[1:] for value in inner.values() if isinstance(value, dict)]
    section = draw(st.sampled_from(range(len(sections))))
    where = sections[section]
    how = draw(st.sampled_from(["flip", "flip", "drop", "add"])) if where else "add"
    if how == "add":
        key = draw(st.sampled_from(ADDED))
        where[key] = draw(st.sampled_from(VALUES))
    else:
        key = draw(st.sampled_from(sorted(where)))
        value = where.pop(key)
        if how == "flip":
            others = [option for option in [*VALUES, str(value), [value]] if option != value]
            where[key] = not value if isinstance(value, bool) else draw(st.sampled_from(others))
    path.write_text(json.dumps(blob))
    return f"{how} {key}"


def changed(draw: Callable[..., Any], folder: Path) -> list[str]:
    """Change one or two things in a folder's files, or some bytes; says what was done."""
    said = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        path = draw(st.sampled_from(sorted(folder.iterdir())))
        change = change_config if path.suffix in (".json", ".yaml") else change_tensors
        said.append(f"{path.name}: {change(draw, path)}")
    if not said:
        path = draw(st.sampled_from(sorted(folder.iterdir())))
        said.append(f"{path.name}: {change_bytes(draw, path)}")
    return said


# ---------------------------------------------------------------------------------------------------- what comes of it


def read(format: str, folder: Path, destination: Path) -> list[Any]:
    """Our coders of a folder, through the files that an import writes."""
    if format == "nn_decompositions":
        return [load_checkpoint(str(folder), "cpu").coder]
    config = folder / "config.json"
    is_plt = format == "upstream" and not (config.exists() and "layers" in config.read_text("latin-1"))
    interop.import_(format, str(folder), destination, layer=1 if is_plt else None)
    configs = sorted(destination.rglob("config.json"))
    return [load_checkpoint(str(config.parent), "cpu").coder for config in configs]


def ours(coders: list[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if isinstance(coders[0].config, CLTConfig):
            out = coders[0](x)
            return torch.stack([to_dense(codes) for codes in out.codes]), out.y_hat
        outs = [coder(own) for coder, own in zip(coders, x)]
    return torch.stack([to_dense(out.codes) for out in outs]), torch.stack([out.y_hat for out in outs])


def assert_same_but_for_a_token(got: Tensor, expected: Tensor, what: str) -> None:
    """Up to rounding, which may take a pre-activation over its threshold in one token or two."""
    got, expected = got.flatten(0, -2).double(), expected.flatten(0, -2)
    size = expected.abs().amax(1).clamp_min(1.0)
    same = (got - expected).abs().amax(1) <= 1e-3 * size
    assert (~same).sum() <= 2, f"{what}: {(~same).sum()} of {len(same)} tokens differ"


COUNTS: dict[str, Counter[str]] = defaultdict(Counter)


@pytest.fixture(scope="module", autouse=True)
def counts() -> Iterator[None]:
    yield
    for format, counter in COUNTS.items():
        print(
            f"{format}: {counter.total()} changes, {counter['same']} read as the library does, {counter['refused']} refused"
        )


@pytest.mark.parametrize("format", VALID)
@FUZZ
@given(data=st.data())
def test_a_changed_file_is_read_as_its_library_does_or_refused_in_one_line(format: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        name, files = data.draw(st.sampled_from(valid_files(format)))
        folder, destination = Path(directory) / "theirs" / name, Path(directory) / "ours"
        put(folder, files)
        changes = changed(data.draw, folder)
        try:
            coders = read(format, folder, destination)
        except ValueError as refusal:
            assert "\n" not in str(refusal), f"{changes}: {refusal}"
            assert not destination.exists(), f"{changes}: refused, and yet something was written"
            COUNTS[format]["refused"] += 1
            return
        whole = isinstance(coders[0].config, CLTConfig) or format == "circuit-tracer"
        n = len(coders[0].config.layers) if isinstance(coders[0].config, CLTConfig) else len(coders)
        x = 2 * torch.randn(n, B, D, generator=torch.Generator().manual_seed(9)) + 0.5
        acts, y = RESTATED[format](folder, (x if whole else x[0]).double())
        for got, expected in zip(ours(coders, x), (acts, y)):
            assert_same_but_for_a_token(got, expected if whole else expected[None], str(changes))
        COUNTS[format]["same"] += 1


@pytest.mark.parametrize("format", VALID)
def test_what_is_not_changed_is_read_as_its_library_reads_it(format: str, tmp_path: Path) -> None:
    for i, (name, files) in enumerate(valid_files(format)):
        folder = tmp_path / f"theirs_{i}" / name
        put(folder, files)
        coders = read(format, folder, tmp_path / f"ours_{i}")
        whole = isinstance(coders[0].config, CLTConfig) or format == "circuit-tracer"
        x = torch.randn(N if whole else 1, B, D, generator=torch.Generator().manual_seed(9))
        expected = RESTATED[format](folder, (x if whole else x[0]).double())
        assert expected[0].shape[-1] == F
        for got, right in zip(ours(coders, x), expected):
            assert_same_but_for_a_token(got, right if whole else right[None], format)
