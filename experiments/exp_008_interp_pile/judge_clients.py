"""Language models behind one small interface: a prompt goes in, a `Reply` comes out. Nothing is retried or made up.

    tokens          no language model: a rule that reads the same prompts (see `TokenRule`); the offline default
    endpoint:MODEL  an OpenAI-compatible endpoint: key $OPENAI_API_KEY, address $OPENAI_BASE_URL (https://api.openai.com/v1)
    local:FOLDER    a local transformers model: a folder, or the name of one in the cache

A reply that is empty, cut off at `max_tokens`, or not in the format asked for is a failure: `parse_*` gives None, and
the caller counts it. `max_tokens` must leave a reasoning model room to think; what it thinks is dropped.
"""

import json
import os
import re
import urllib.request
from collections import Counter
from typing import NamedTuple, Protocol

import torch

MARKED = re.compile(r"<<(.+?)>>", re.DOTALL)


class Reply(NamedTuple):
    text: str
    cut_off: bool  # stopped at max_tokens


class Client(Protocol):
    def complete(self, prompt: str, max_tokens: int) -> Reply: ...


class Endpoint:
    """Chat completions over HTTP; errors of the server are raised, not scored."""

    def __init__(self, model: str) -> None:
        if "OPENAI_API_KEY" not in os.environ:
            raise SystemExit(f"endpoint:{model} needs a key: export OPENAI_API_KEY, or use --client tokens")
        self.model, self.url = model, os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")

    def complete(self, prompt: str, max_tokens: int) -> Reply:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "max_completion_tokens": max_tokens}
        headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            choice = json.load(response)["choices"][0]
        return Reply(choice["message"]["content"] or "", choice["finish_reason"] == "length")


class Local:
    """Greedy decoding with a causal language model of `transformers`."""

    def __init__(self, name: str, device: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()

    @torch.inference_mode()
    def complete(self, prompt: str, max_tokens: int) -> Reply:
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(self.model.device)
        out = self.model.generate(ids, max_new_tokens=max_tokens, do_sample=False)[0, ids.shape[1] :]
        return Reply(self.tokenizer.decode(out, skip_special_tokens=True), len(out) == max_tokens)


class TokenRule:
    """What a list of tokens can do. Explains by the most frequently marked strings, and judges a text active where one
    of them occurs in it. It reads and answers the very prompts a language model gets."""

    def complete(self, prompt: str, max_tokens: int) -> Reply:
        question, _, examples = prompt.partition("\n---\n")
        if question.startswith("EXPLAIN"):
            marked = Counter(piece.strip() or repr(piece) for piece in MARKED.findall(examples))
            total, kept, covered = sum(marked.values()), [], 0
            for piece, n in marked.most_common(5):
                if covered < 0.8 * total:  # few and frequent strings: a rare one costs more false alarms than it finds
                    kept, covered = [*kept, piece], covered + n
            return Reply("EXPLANATION: " + json.dumps(kept, ensure_ascii=False), False)
        found = re.search(r"^EXPLANATION: (\[.*\])$", question, re.MULTILINE)
        strings = json.loads(found[1]) if found else []
        texts = re.findall(r"^(\d+)\. (\".*\")$", examples, re.MULTILINE)
        active = [number for number, quoted in texts if any(string in json.loads(quoted) for string in strings)]
        return Reply("ANSWER: " + (", ".join(active) or "none"), False)


def make_client(name: str, device: str) -> Client:
    kind, _, model = name.partition(":")
    if kind == "tokens":
        return TokenRule()
    if kind == "endpoint" and model:
        return Endpoint(model)
    if kind == "local" and model:
        return Local(model, device)
    raise SystemExit(f"unknown client {name!r}: use tokens, endpoint:MODEL or local:FOLDER")


def final_line(reply: Reply, label: str) -> str | None:
    """What follows the last `label:` of a complete reply, its thoughts dropped; None where there is nothing."""
    said = re.sub(r"<think>.*?</think>", "", reply.text, flags=re.DOTALL)
    found = re.findall(rf"^\W*{label}:[ \t*]*(\S.*?)\s*$", said, re.MULTILINE)
    return found[-1] if found and not reply.cut_off else None


def parse_explanation(reply: Reply) -> str | None:
    return final_line(reply, "EXPLANATION")


def parse_numbers(reply: Reply, n: int) -> set[int] | None:
    """The numbers of an answer, each in 1…n; `none` is the empty set; anything else a failure (None)."""
    answer = final_line(reply, "ANSWER")
    if answer is None or answer.rstrip(".").lower() == "none":
        return None if answer is None else set()
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*\.?", answer):
        return None
    numbers = {int(number) for number in re.findall(r"\d+", answer)}
    return numbers if numbers <= set(range(1, n + 1)) else None
