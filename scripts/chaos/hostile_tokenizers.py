"""Hostile tokenizers: refused in one sentence, or the server outlives whatever texts are sent.

    python scripts/chaos/hostile_tokenizers.py [NAME ...]

Each is checked and served in a child with 40 s of computing and 3 GiB; texts that trouble it are
sent as prompt, as chat and with log-probabilities. Answers are 200, 400 or an error that names the
tokenizer; afterwards no place is held and /health says 200. Exits with 1 on a fault.
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server, check_model

from bounded import bounded, finish, report, scratch
from http_calls import call
from small_model import write_random_model

Values = dict[str, Any]
TEXTS = ("a" * 40 + "!", "ab" * 50_000, "a" * 100_000 + "!", "\0\U0010ffff\u2028 \r\n", " " * 9999)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def split(pattern: str) -> Callable[[Values], None]:
    """Put a regular expression in front."""
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    def edit(values: Values) -> None:
        parts = [part, values["pre_tokenizer"]]
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}

    return edit


def normalizer(**part: Any) -> Callable[[Values], None]:
    return lambda values: values.update(normalizer=part)


def replace(pattern: str, content: str) -> Callable[[Values], None]:
    return normalizer(type="Replace", pattern={"Regex": pattern}, content=content)


def decoder(**part: Any) -> Callable[[Values], None]:
    return lambda values: values.update(decoder=part)


def model(**changes: Any) -> Callable[[Values], None]:
    return lambda values: values["model"].update(changes)


def section(name: str, value: Any) -> Callable[[Values], None]:
    return lambda values: values.update({name: value})


def added(*contents: str, **flags: Any) -> Callable[[Values], None]:
    usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)

    def edit(values: Values) -> None:
        values["added_tokens"] += [
            {"id": 300 + index, "content": content, **usual, **flags}
            for index, content in enumerate(contents)
        ]

    return edit


EDITS: dict[str, Callable[[Values], None]] = {
    "plain": lambda values: None,
    "(a+)+$": split("(a+)+$"),
    "(a|aa)+$": split("(a|aa)+$"),
    "(a|a)*b": split("(a|a)*b"),
    "(.*)*x": split("(.*)*x"),
    "look-behind": split("(?<=(a{1,50}))!"),
    "counted 1000 x 1000": split("(a{1,1000}){1,1000}!"),
    "back-reference": split("(a*)*\\1!"),
    "recursion": split("(?<x>a\\g<x>?)!"),
    "no regex": split("("),
    "an empty regex": split(""),
    "replaces (a*)*b": replace("(a*)*b", "x"),
    "replaces by nothing": replace(".", ""),
    "doubles letters": replace("a", "aa"),
    "a null in the text": replace("a", "\0"),
    "decodes by (a+)+$": decoder(type="Replace", pattern={"Regex": "(a+)+$"}, content="x"),
    "strips all": decoder(type="Strip", content="a", start=10**6, stop=10**6),
    "unknown decoder": decoder(type="Mystery"),
    "a precompiled map of junk": normalizer(type="Precompiled", precompiled_charsmap="AAAA"),
    "unknown model": model(type="Mystery"),
    "WordPiece": section("model", {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"a": 0}}),
    "Unigram without unk": section("model", {"type": "Unigram", "vocab": [["a", 0.0]]}),
    "Unigram, unk beyond": section(
        "model", {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0], ["b", -1e308]]}
    ),
    "Unigram, NaN scores": section(
        "model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", float("nan")], ["b", 0.0]]}
    ),
    "ids beyond the model": model(vocab={"a": 10**6, "b": 2**31}),
    "ids below zero": model(vocab={"a": -1}),
    "merges of nothing": model(merges=["q q"]),
    "a vocabulary that is a list": model(vocab=["a"]),
    "byte fallback without bytes": model(byte_fallback=True, vocab={"a": 0}),
    "an empty vocabulary": model(vocab={}),
    "dropout": model(dropout=0.999),
    "dropout of 7": model(dropout=7.0),
    "an empty added token": added(""),
    "a space as special": added(" ", special=True, lstrip=True, rstrip=True),
    "added tokens in each other": added(*("a" * n for n in range(1, 200))),
    "an added token of 1 MB": added("a" * (1 << 20)),
    "truncation to nothing": section(
        "truncation",
        {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0},
    ),
    "truncation, long stride": section(
        "truncation",
        {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 9},
    ),
    "padding to 10^7": section(
        "padding",
        {
            "strategy": {"Fixed": 10**7},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
    ),
    "a post-processor of junk": section(
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ),
    "version 9": section("version", "9.0"),
    "numbers for sections": lambda values: values.update(model=3, decoder=4, normalizer=5),
}


def serve(folder: Path, template: Path) -> str:
    args = ServeArgs(model=str(folder), served_model_name="m", chat_template=str(template))
    check_model(args, runs_here=True)
    server = Server(args)
    found: list[str] = []
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        bodies = {
            "completions": {"prompt": text, "logprobs": 2},
            "chat/completions": {"messages": messages},
        }
        for path, body in bodies.items():
            body = {"model": "m", "max_tokens": 6, "temperature": 1, "seed": 1, **body}
            answer = call(server, "POST", f"/v1/{path}", headers={}, json=body)
            message = "" if answer.status_code == 200 else answer.json()["error"]["message"]
            is_fine = answer.status_code in (200, 400) or "the model's tokenizer" in message
            assert is_fine and "\n" not in message, answer.text
            found.append(f"{answer.status_code} {message}".strip())
    ids = {"model": "m", "prompt": [97, 98], "max_tokens": 6, "echo": True, "logprobs": 1}
    answer = call(server, "POST", "/v1/completions", headers={}, json=ids)
    assert answer.status_code == 200 or "the model's tokenizer" in answer.text, answer.text
    assert server.admission.num_open == 0 and server.thread.problem() is None
    server.close()
    return " | ".join(dict.fromkeys(found))


def main() -> None:
    names = sys.argv[1:] or list(EDITS)
    faults = []
    with scratch() as space:
        write_random_model(space / "base")
        template = space / "template.jinja"
        template.write_text(TEMPLATE)
        for name in names:
            folder = space / "folder"
            shutil.copytree(space / "base", folder)
            values = json.loads((folder / "tokenizer.json").read_text())
            EDITS[name](values)
            (folder / "tokenizer.json").write_text(json.dumps(values))
            if report(name, bounded(partial(serve, folder, template))):
                faults.append(name)
            shutil.rmtree(folder)
    finish("hostile tokenizers", faults, len(names))


if __name__ == "__main__":
    main()
