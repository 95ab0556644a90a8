"""Experiment 008: judges that are right, silent or babbling; items that are what they claim; known Jacobians."""

import asyncio
import dataclasses
import email
import functools
import json
import runpy
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import baselines
import checkpoints
import recipes
import target_models
from activation_store import DataConfig
from token_stream import DatasetSpec

FOLDER = Path(__file__).parent.parent / "experiments" / "exp_008_interp_pile"
SCRIPTS = ("autointerp", "intruder", "predictability", "faithfulness")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a file of the experiment as its scripts do: from their folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return __import__


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Words:
    """A tokenizer whose token t reads ` w` and two digits."""

    def decode(self, tokens: Any) -> str:
        return "".join(f" w{int(t):02d}" for t in tokens)


def activations(features: ModuleType, sequences: int = 64) -> Any:
    """Latent i of 4 is active exactly on token i; its strength varies."""
    tokens = torch.randint(40, (sequences, 32), generator=generator())
    tokens[:, 0] = 39
    values = torch.rand(tokens.shape, generator=generator()) + 0.5
    parts = [(tokens == i).flatten().nonzero()[:, 0] for i in range(4)]
    latents = torch.cat([torch.full_like(p, i) for i, p in enumerate(parts)])
    places = torch.cat(parts)
    return features.Activations(tokens, latents, places, values.flatten()[places], 4)


class Perfect:
    """Knows that the latent is active on ` w01`."""

    def complete(self, prompt: str, max_tokens: int) -> Any:
        from judge_clients import Reply

        if prompt.startswith("EXPLAIN"):
            return Reply("<think>EXPLANATION: no</think>\nEXPLANATION: the word w01", False)
        lines = [line.partition(". ") for line in prompt.split("---\n")[1].split("\n")]
        numbers = [number for number, _, text in lines if "w01" in json.loads(text).split()]
        return Reply("**ANSWER: " + (", ".join(numbers) or "none"), False)


class Fixed:
    def __init__(self, answer: str, cut_off: bool = False) -> None:
        self.answer, self.cut_off = answer, cut_off

    def complete(self, prompt: str, max_tokens: int) -> Any:
        from judge_clients import Reply

        return Reply("EXPLANATION: words", False) if prompt.startswith("EXPLAIN") else Reply(self.answer, self.cut_off)


def judged(
    autointerp: ModuleType, client: Any, acts: Any, latent: int
) -> tuple[str | None, set[int] | None, list[bool]]:
    return autointerp.judge(client, acts, latent, tokenizer=Words(), max_tokens=100, generator=generator())


def test_perfect_judge_scores_one_and_silent_judge_scores_half(module: Any) -> None:
    autointerp, acts = module("autointerp"), activations(module("latent_activations"))
    for client, expected in ((Perfect(), (1.0, 1.0)), (Fixed("ANSWER: none."), (10 / 14, 0.5))):
        explanation, answer, truth = judged(autointerp, client, acts, 1)
        assert explanation and len(truth) == 14 and sum(truth) == 4
        assert autointerp.score(answer, truth) == pytest.approx(expected)


def test_random_examples_are_inactive_and_none_is_used_twice(module: Any) -> None:
    autointerp, features = module("autointerp"), module("latent_activations")
    peaks = module("example_windows").windows(activations(features).of(2)).amax(1)
    examples = autointerp.pick(peaks, generator())
    used = torch.cat([examples.explain, examples.score])
    assert len(examples.explain) == 15 and len(used.unique()) == len(used)
    assert examples.active == (peaks[examples.score] > 0).tolist()


GARBAGE = ["", "I think 3", "ANSWER:", "ANSWER: 3 and 4", "ANSWER: 99", "<think>ANSWER: 3</think>"]


@pytest.mark.parametrize("said", GARBAGE)
def test_a_reply_without_a_readable_answer_is_a_failure(module: Any, said: str) -> None:
    autointerp, acts = module("autointerp"), activations(module("latent_activations"))
    assert judged(autointerp, Fixed(said), acts, 1)[1] is None
    assert judged(autointerp, Fixed("ANSWER: 1", cut_off=True), acts, 1)[1] is None


def test_token_rule_reads_the_same_prompts(module: Any) -> None:
    autointerp, clients, acts = module("autointerp"), module("judge_clients"), activations(module("latent_activations"))
    explanation, answer, truth = judged(autointerp, clients.TokenRule(), acts, 3)
    assert json.loads(explanation) == ["w03"] and autointerp.score(answer, truth) == (1.0, 1.0)


def test_endpoint_asks_with_key_and_room_to_think(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.headers["Authorization"], json.loads(body)))
            self.send_response(200)
            self.end_headers()
            choice = {"message": {"content": None}, "finish_reason": "length"}
            self.wfile.write(json.dumps({"choices": [choice]}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    reply = module("judge_clients").make_client("endpoint:m", "cpu").complete("hello", 4096)
    server.server_close()
    assert reply == ("", True) and module("judge_clients").parse_numbers(reply, 5) is None
    assert asked[0][0] == "Bearer k" and asked[0][1]["max_completion_tokens"] == 4096


def test_deciles_of_tied_activations_are_equal_parts(module: Any) -> None:
    parts = module("intruder_items").deciles(torch.tensor([1.0] * 57 + [0.0] * 9 + [0.5] * 3), generator())
    assert [len(p) for p in parts] == [6] * 10 and len(torch.cat(parts).unique()) == 60


def test_intruder_is_active_for_its_donor_and_silent_for_the_latent(module: Any) -> None:
    oddity, features = module("intruder_items"), module("latent_activations")
    acts = activations(features, 256)
    found = oddity.items(acts, 0, donors=[1, 2, 3], generator=generator())
    assert len(found) == 10
    for item in found:
        assert item.active[item.intruder].any() and not (item.tokens[item.intruder] == 0).any()
        own = [i for i in range(5) if i != item.intruder]
        assert (item.active[own] == (item.tokens[own] == 0)).all() and item.active[own].any(1).all()


def test_offline_judges_find_the_intruder_and_shuffling_blinds_them(module: Any) -> None:
    from collections import Counter

    oddity, features = module("intruder_items"), module("latent_activations")
    acts = activations(features, 1024)
    embedding = torch.eye(40)
    rates = []
    for case in (acts, features.shuffled(acts, generator())):
        g = generator()
        items = [
            item
            for i in [0, 1, 2, 3] * 3
            for item in oddity.items(case, i, donors=[j for j in range(4) if j != i], generator=g)
        ]
        for judge in ("tfidf", "embedding"):
            extra = (Counter(), 100) if judge == "tfidf" else (embedding,)
            vectors = getattr(oddity, f"{judge}_vectors")
            hits = [oddity.odd_one(vectors(item, *extra), g) == item.intruder for item in items]
            rates.append(sum(hits) / len(hits))
    assert min(rates[:2]) > 0.6 and max(rates[2:]) < 0.4, rates


def test_shuffling_keeps_density_and_avoids_first_positions(module: Any) -> None:
    features = module("latent_activations")
    acts = activations(features)
    dealt = features.shuffled(acts, generator())
    assert torch.equal(dealt.counts, acts.counts) and (dealt.places % 32 != 0).all()
    assert dealt.of(1).sum() == pytest.approx(acts.of(1).sum().item())


def test_tree_learns_a_rule_of_three_tokens_exactly(module: Any) -> None:
    p = module("predictability")
    tokens = torch.randint(5, (400, 12), generator=generator())
    left = torch.nn.functional.pad(tokens, (1, 0), value=5)[:, :-1]
    y = (((tokens == 2) & (left != 3)) | (tokens == 4))[:, 1:]
    features, n = p.context(tokens, 5), 17 * 6
    half = 200 * 11
    rule = y.flatten()
    assert p.predictability(features[:half], rule[:half], features[half:], rule[half:], n_features=n) == pytest.approx(
        1.0
    )
    noise = torch.rand(len(rule), generator=generator()) < 0.3
    assert abs(p.predictability(features[:half], noise[:half], features[half:], noise[half:], n_features=n)) < 0.1


def test_jacobian_of_a_linear_map_is_its_matrix(module: Any) -> None:
    f = module("faithfulness")
    W = torch.randn(5, 7, generator=generator())
    found = f.local_jacobian(lambda x: x @ W.T, torch.randn(3, 1, 7, generator=generator()))
    assert torch.allclose(found, W.expand(3, 5, 7))
    assert f.cosines(found, found) == pytest.approx([1.0] * 3) and f.cosines(found, -found) == pytest.approx([-1.0] * 3)


def test_identity_replacement_is_faithful_and_mean_ablation_is_not(module: Any) -> None:
    from baselines import MeanReplacement, NeuronsReplacement
    from spd_replacement import SPDReplacement
    from spd_runs import find_spd
    from target_models import load_target

    target = load_target("tiny", "cpu")
    tokens = torch.randint(4096, (3, 12), generator=generator())
    model = find_spd(target, (2,)).model
    methods = {
        "all": NeuronsReplacement(target, (2,), target.d_mlp),
        "spd, all": SPDReplacement(target, model, top_k=min(model.sizes.values()), layers=(2,), delta=True),
        "mean": MeanReplacement((2,), torch.zeros(1, target.d_model)),
    }
    rows = module("faithfulness").measure(target, methods, tokens, layer=2)
    for row in rows:
        if row.method in ("all", "spd, all", "mean"):
            assert row.cosine == pytest.approx(float(row.method != "mean"), abs=2e-2), row


def test_latents_without_active_or_silent_examples_are_not_drawn(module: Any, capsys: pytest.CaptureFixture) -> None:
    features = module("latent_activations")
    acts = activations(features)  # 128 windows
    everywhere = torch.arange(acts.tokens.numel()).view(acts.tokens.shape)[:, 1:].flatten()
    more = features.Activations(
        acts.tokens, torch.cat([acts.latents, torch.full_like(everywhere, 4)]), torch.cat([acts.places, everywhere]),
        torch.cat([acts.values, torch.ones(len(everywhere))]), 6,
    )  # fmt: skip
    drawn = features.draw_latents(more, 6, active=1, generator=generator())
    assert sorted(drawn["uniform"]) == sorted(drawn["mass"]) == [0, 1, 2, 3], "4 is active everywhere, 5 nowhere"
    assert (
        features.draw_latents(more, 6, active=129, generator=generator()) == {}
        and "not examined" in capsys.readouterr().out
    )


def test_random_weights_target_shares_no_matrix_and_no_name(module: Any, small_target: Any) -> None:
    null = module("methods_and_nulls").randomised(small_target, 0)
    assert null.name == "small-random" and null.fingerprint != small_target.fingerprint
    for (name, p), q in zip(small_target.model.named_parameters(), null.model.parameters()):
        assert torch.equal(p, q) == (p.ndim < 2), name


SMALL = "--target tiny --layers 3 --d-dict 64 --k 16 --tokens 8192 --batch 512 --eval-tokens 8192 --latents 2".split()
NULLED = ["--methods", "transcoder", "neurons", "transcoder-shuffled"]


def some_python(folder: Path) -> Path:
    """A corpus of two packages, in place of every package there is."""
    folder.mkdir()
    for split, package in (("train", asyncio), ("val", email)):
        files = sorted(Path(package.__file__).parent.glob("*.py"))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": f.read_text()}) + "\n" for f in files))
    return folder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every script once, at a miniature size, through its command line; what one has trained the next one finds."""
    root = tmp_path_factory.mktemp("exp_008")
    extras = {"faithfulness": ["--samples", "2", "--seq", "8", "--no-spd"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setattr(checkpoints, "CHECKPOINTS", root / "checkpoints")
        patch.setattr(baselines, "BASELINE_TOKENS", 8192)
        for user in (baselines, recipes):
            patch.setattr(user, "DataConfig", functools.partial(DataConfig, buffer_tokens=4096, model_batch=8))
        corpus = DatasetSpec(str(some_python(root / "corpus")), val_split="val")
        target = dataclasses.replace(target_models.load_target("tiny", "cpu"), data=corpus)
        patch.setattr(target_models, "load_target", lambda name, device: target)
        for script in SCRIPTS:
            arguments = [*SMALL, *extras.get(script, NULLED), "--output", str(root / script)]
            patch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
        yield root


@pytest.mark.slow
def test_scripts_run_from_the_command_line(outputs: Path) -> None:
    for script in SCRIPTS:
        names = {path.name for path in (outputs / script).iterdir()}
        assert {"settings.json", "results.csv", "README.md"} <= names, names


def test_figures_are_drawn_again_from_the_results_alone(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_models, "load_target", None)
    figures = {"autointerp": "scores", "intruder": "intruder", "predictability": "predictability"}
    for script, figure in figures.items():
        image = outputs / script / f"{figure}.png"
        image.unlink()
        monkeypatch.setattr(sys, "argv", [script, "--target", "tiny", "--replot", "--output", str(outputs / script)])
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
        assert image.exists()
