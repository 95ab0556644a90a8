"""Theorems about trainings that several processes share (gloo, on the CPU): what one process gives, they give.

torchrun starts the processes, twice two and once four; what they leave is compared here with one process.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_jobs import DATA, KINDS, RULES, STEPS, TRAIN, built, decompose, group, steps, tune
from small import make_small_target, write_corpus

import token_stream
from activation_store import ActivationBatch, ActivationsStore, measure, pooled
from coder import ActivationStats, codes_by_layer
from losses import fvu
from parallel import World, bounds, dealt, joined, united, world
from sparse_encode import _largest
from sparse_ops import fire_counts
from sparsity import BatchTopKEncoder, smallest_positive
from target_models import TargetModel
from training import descend, start_run, train_group

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parent.parent
CASES = [f"{kind} {type(rule).__name__}" for kind in KINDS for rule in RULES]


def together(n: int, job: str, corpus: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    script = [str(REPOSITORY / "tests" / "parallel_jobs.py"), job, str(corpus), str(folder)]
    return subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def once(mark: Path) -> Iterator[bool]:
    """Whether it is for us to do what is marked: of several test processes one does it, and the others wait."""
    with mark.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not mark.exists()
        mark.touch()


class Left:
    """What two processes left, and what one does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, folder / "corpus"
        with once(folder / "checks") as first:
            if first:
                self.corpus.mkdir()
                done = together(2, "checks", write_corpus(self.corpus), folder)
                assert done.returncode == 0, done.stderr
                train_group(group(), make_small_target(self.corpus), data=DATA, config=TRAIN, folder=folder / "alone")
        self.target: TargetModel = make_small_target(self.corpus)
        self.ranks: list[dict[str, Any]] = [torch.load(folder / f"rank{i}.pt") for i in range(2)]

    def coders(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        files = sorted((self.folder / name).glob("*/encoder.pt"))
        return {file.parent.name: torch.load(file) for file in files}

    def names(self, name: str) -> list[str]:
        return sorted(str(file.relative_to(self.folder / name)) for file in (self.folder / name).glob("small*/*"))

    def of_form(self, form: str, name: str) -> tuple[ActivationsStore, list[ActivationBatch], list[dict[str, Any]]]:
        """A store with the statistics that the processes agreed on, the batches of each, what each found."""
        store, ranks = ActivationsStore(self.target, DATA), [rank[form] for rank in self.ranks]
        store.stats = ActivationStats(*ranks[0]["stats"]["scales"], ranks[0]["stats"]["n"])
        return store, [rank["batches"] for rank in ranks], [rank["steps"][name] for rank in ranks]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "parallel"
    folder.mkdir(exist_ok=True)
    return Left(folder)


@pytest.fixture(scope="module")
def resumed(left: Left) -> Left:
    """After four processes went on with trainings of two, one of which was killed."""
    with once(left.folder / "resumed") as first:
        if first:
            done = together(2, "killed", left.corpus, left.folder)
            assert done.returncode != 0
            (left.folder / "said.txt").write_text(done.stderr.replace("\r", "\n"))
            for name in ("coders-cut", "latents-cut", "data-cut"):
                shutil.copytree(left.folder / name, left.folder / f"{name}-alone")
            done = together(4, "resume", left.corpus, left.folder)
            assert done.returncode == 0, done.stderr
    return left


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------------------------------------- data


def test_parts_of_a_stream_are_the_whole_of_it_and_share_no_piece(small_target: TargetModel) -> None:
    whole = list(ActivationsStore(small_target, DATA).stream._documents)
    parts = []
    for i in range(3):
        stream = ActivationsStore(small_target, DATA).stream
        stream.part, stream.n_read = (i, 3), 0
        stream._open()
        parts.append(list(stream._documents))
    assert [piece for row in itertools.zip_longest(*parts) for piece in row if piece is not None][
        -len(whole) :
    ] == whole


def test_processes_take_tokens_of_their_own(left: Left) -> None:
    inputs = [torch.cat([batch[0][1] for batch in rank["data"]["batches"]]) for rank in left.ranks]
    assert [len(own) for own in inputs] == [DATA.batch_tokens // 2 * STEPS] * 2
    assert torch.cdist(*inputs).min() > 0


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    buffer, scales = torch.randn(2, 3, 50, 8, generator=g).half() + 2, torch.tensor([[1.0, 2.0, 4.0]] * 2)
    parts = [measure(buffer, torch.arange(*ends), scales) for ends in ((0, 11), (11, 30), (30, 50))]
    for own, whole in zip(pooled(parts), measure(buffer, torch.arange(50), scales), strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if "BatchTopK" not in case])
def test_a_step_of_all_is_one_process_step_on_the_global_batch(left: Left, case: str) -> None:
    store, batches, found = left.of_form("data", case)
    assert same(found[0]["coder"], found[1]["coder"])
    kind, rule = case.split()
    whole = [ActivationBatch(*(torch.cat(side, 1) for side in zip(*of_step))) for of_step in zip(*batches)]
    coder = built(kind, next(r for r in RULES if type(r).__name__ == rule))
    run, own = steps(coder, store, whole, left.folder / "one")
    close(found[0]["gradients"], own["gradients"], 1e-6)
    close(found[0]["coder"], run.coder.state_dict())
    torch.testing.assert_close(torch.stack(found[0]["readings"]), torch.stack(own["readings"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_topk_selects_the_largest_of_each_process_part(left: Left, kind: str) -> None:
    """One process whose batch is selected in parts; the running threshold follows the mean of the parts' smallest winners."""
    store, batches, found = left.of_form("data", f"{kind} BatchTopK")
    assert same(found[0]["coder"], found[1]["coder"])
    run = start_run("run", built(kind, RULES[1]), store=store, config=TRAIN, folder=left.folder / "one")
    coder = run.coder
    for of_step in zip(*batches):
        losses, codes = [], []
        for batch in of_step:
            x, y = coder.view(*(side.clone() for side in batch), run.rows)
            of_part, penalty = coder.encode_with_penalty(x, y, run.variance)
            losses.append(fvu(y, coder.reconstruct(of_part, x), run.variance).mean() + penalty)
            codes.append(codes_by_layer(of_part))
        torch.stack(losses).mean().backward()
        descend(run, config=TRAIN, lr=3e-3)
        for encoder, *of_parts in zip(coder.encoders, *codes):
            assert isinstance(encoder, BatchTopKEncoder)
            smallest = torch.stack([smallest_positive(own) for own in of_parts]).mean()
            first = not encoder.threshold.isfinite()
            encoder.threshold.copy_(smallest if first else encoder.threshold.lerp(smallest, 0.01))
            fired = torch.stack([fire_counts(own) for own in of_parts]).sum(0) > 0
            encoder.tokens_since_fired.add_(DATA.batch_tokens).masked_fill_(fired, 0)
    close(found[0]["coder"], coder.state_dict())


def test_process_0_alone_logs_and_writes_the_same_files_as_one_process(left: Left) -> None:
    for form in ("data", "coders", "latents"):
        assert left.names(form) == left.names("alone")
        assert not list((left.folder / form).glob("group_*"))
        for file in (left.folder / form).glob("small*/metrics.jsonl"):
            assert [json.loads(line)["step"] for line in file.open()] == [3, 7, 11, 15, 19, 23], file
    for name, coder in left.coders("data").items():
        assert {key: value.shape for key, value in coder.items()} == {
            key: value.shape for key, value in left.coders("alone")[name].items()
        }


def test_an_interrupted_training_on_shared_data_ends_bit_identical(left: Left) -> None:
    straight, again = left.coders("data"), left.coders("data-again")
    assert len(straight) == 5 and all(same(again[name], coder) for name, coder in straight.items())


@pytest.mark.parametrize("form", ["data", "coders", "latents"])
def test_processes_train_from_a_cache_as_from_the_target(left: Left, form: str) -> None:
    """Bit for bit, and the target did not run: each has its part of the data there, or all read the same shards."""
    expected, names = left.coders(form), [f"{form}-cached", *([f"{form}-filling"] if form != "latents" else [])]
    assert len(expected) == 5 and len(list((left.folder / "cache" / "activations").iterdir())) == 3
    for name in names:
        found = left.coders(name)
        assert found.keys() == expected.keys() and all(same(found[coder], expected[coder]) for coder in found), name


def test_shared_data_goes_on_with_as_many_processes_alone(resumed: Left) -> None:
    with pytest.raises(ValueError, match=r"is dealt to 2 process\(es\), not to 1: start it again with 2$"):
        train_group(group(), resumed.target, data=DATA, config=TRAIN, folder=resumed.folder / "data-cut-alone")


def test_what_all_processes_have_to_say_is_said_once(left: Left) -> None:
    assert sorted(rank["said"] for rank in left.ranks) == [False, True]


def test_training_on_the_output_is_one_process_training_on_the_global_batch(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process is given the sequences of both, batch by batch."""
    read = token_stream.TokenStream.__next__

    def of_both(self: token_stream.TokenStream) -> torch.Tensor:
        if self.part == (0, 1) and not hasattr(self, "parts"):
            given = (self.spec, self.tokenizer, self.split, self.batch // 2, self.seq, self.seed, self.vocab_size)
            self.parts = [token_stream.TokenStream(*given, (i, 2)) for i in range(2)]
        return torch.cat([read(part) for part in self.parts]) if self.part == (0, 1) else read(self)

    monkeypatch.setattr(token_stream.TokenStream, "__next__", of_both)
    tune(left.target, left.folder / "tuned-alone")
    found, alone = left.coders("tuned"), left.coders("tuned-alone")
    assert len(alone) == 2 and left.names("tuned") == left.names("tuned-alone")
    for name, coder in alone.items():
        close(found[name], coder, 1e-4)


def test_a_decomposition_on_shared_data_is_one_process_on_the_global_batch(left: Left) -> None:
    own = [rank["spd"] for rank in left.ranks]
    assert same(own[0]["state"], own[1]["state"]) and not torch.equal(own[0]["batches"][0], own[1]["batches"][0])
    whole = [torch.cat(parts) for parts in zip(*(rank["batches"] for rank in own))]
    close(own[0]["state"], decompose(left.target, whole), 1e-4)


# -------------------------------------------------------------------------------------------------------------- coders


def test_coders_spread_over_processes_are_bit_equal_to_those_of_one(left: Left) -> None:
    spread, alone = left.coders("coders"), left.coders("alone")
    assert len(alone) == 5 and all(same(spread[name], coder) for name, coder in alone.items())


@pytest.mark.parametrize("processes", [1, 4])
def test_spread_coders_go_on_bit_equal_with_any_number_of_processes(resumed: Left, processes: int) -> None:
    folder = "coders-cut" if processes == 4 else "coders-cut-alone"
    if processes == 1:
        train_group(group(), resumed.target, data=DATA, config=TRAIN, folder=resumed.folder / folder)
    own, alone = resumed.coders(folder), resumed.coders("alone")
    assert len(own) == 5 and all(same(own[name], coder) for name, coder in alone.items())


def test_coders_are_dealt_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    import parallel

    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "_joined", [parallel.World(rank, 3, "coders")])
        shares.append(dealt([5, 1, 4, 3, 2], float))
    assert shares == [[5], [1, 4], [3, 2]]


# ------------------------------------------------------------------------------------------------------------- latents


@pytest.mark.parametrize("n", [2, 4])
def test_processes_select_what_one_selects_of_ties_too(resumed: Left, n: int) -> None:
    files = [f"rank{i}.pt" if n == 2 else f"rank{i}-of-4.pt" for i in range(n)]
    ranks = [torch.load(resumed.folder / file)["selections"] for file in files]
    for name, own in ranks[0].items():
        pre, k = own["pre"], own["k"]
        whole = _largest(pre.view(1, -1), k * len(pre)).view_as(pre) if own["batch"] else _largest(pre, k)
        assert torch.equal(torch.cat([rank[name]["won"] for rank in ranks], 1), whole), name


@pytest.mark.parametrize("case", CASES)
def test_spread_latents_step_as_those_of_one_process(left: Left, case: str) -> None:
    """The same codes bit for bit, dead latents among them; the same counters, and weights within float tolerance."""
    store, batches, found = left.of_form("latents", case)
    assert all(torch.equal(a, b) for pair in zip(*batches) for a, b in zip(*pair))
    kind, rule = case.split()
    coder = built(kind, next(r for r in RULES if type(r).__name__ == rule))
    whole = [ActivationBatch(*batch) for batch in batches[0]]
    run, own = steps(coder, store, whole, left.folder / "one", silent=9)
    for layers in zip(own["codes"], *(rank["codes"] for rank in found), strict=True):
        assert torch.equal(torch.cat(layers[1:], 1), layers[0])
    state = run.coder.state_dict()
    counters = [name for name in state if name.endswith("tokens_since_fired")]
    assert all(torch.equal(found[0]["coder"][name], state[name]) for name in counters) and not found[1]["coder"]
    close(found[0]["gradients"], own["gradients"], 1e-6)
    close(found[0]["coder"], state)
    torch.testing.assert_close(torch.stack(found[0]["readings"]), torch.stack(own["readings"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", ["latents", "latents-cut", "latents-cut-alone", "killed"])
def test_a_training_of_spread_latents_ends_where_one_process_ends(resumed: Left, folder: str) -> None:
    """Straight, and interrupted with two processes and gone on with four or one."""
    if folder == "latents-cut-alone":
        train_group(group(), resumed.target, data=DATA, config=TRAIN, folder=resumed.folder / folder)
    for name, coder in resumed.coders("alone").items():
        close(resumed.coders(folder)[name], coder, 2e-3)


def test_parts_of_latents_are_all_of_them() -> None:
    for n, parts in itertools.product((1, 5, 8, 50), (1, 2, 3, 4)):
        ends = [bounds(n, part, parts) for part in range(parts)]
        assert [i for begin, end in ends for i in range(begin, end)] == list(range(n))
        assert max(end - begin for begin, end in ends) - min(end - begin for begin, end in ends) <= 1


def test_states_unite_to_the_last_level() -> None:
    assert united([{"a": {0: 1}, "b": {"c": {0: 2}}}, {"a": {1: 3}, "b": {"c": {1: 4}, "d": 5}}]) == {
        "a": {0: 1, 1: 3}, "b": {"c": {0: 2, 1: 4}, "d": 5},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- failure


def test_a_killed_process_ends_the_training_in_one_line(resumed: Left) -> None:
    """What torchrun itself reports comes after it."""
    before_its = (resumed.folder / "said.txt").read_text().partition("Traceback")[0]
    (line,) = [line for line in before_its.splitlines() if "error:" in line]
    assert line.endswith("start the same command again, it goes on from the last saved state")


def test_processes_on_gpus_have_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts the second of two on one machine; NCCL between GPUs, gloo between what stays on the CPU."""
    asked: dict[str, Any] = {}
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda own: asked.update(device=own))
    monkeypatch.setattr(dist, "init_process_group", lambda backend: asked.update(backend=backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with joined("cuda", "coders") as own:
        assert own == asked["device"] == "cuda:1" and asked["backend"] == "cpu:gloo,cuda:nccl"
        assert world() == World(1, 2, "coders") and not world().leads
    assert world() == World()
    with joined("cpu", "data") as own:
        assert own == "cpu" and asked["backend"] == "gloo"
    with pytest.raises(ValueError, match="^2 processes were started on cuda:0: use --device cuda, which gives each"):
        with joined("cuda:0", "data"):
            pass
