"""Hostile model folders: each is refused in one sentence or served, within seconds.

    python scripts/chaos/folders.py [NAME ...]

Each folder is checked in a child with 40 s of computing and 3 GiB; one that is not refused is
served there and asked for text. A few minutes. Exits with 1 on a fault.
"""

import json
import os
import shutil
import struct
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

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
SETTINGS = "tokenizer_config.json"
Edit = Callable[[Path], Any]


def write(name: str, data: bytes | str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def fifo(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def link(name: str, target: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(target)


def directory(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


def sparse(name: str, num_bytes: int, folder: Path) -> None:
    write(name, "{", folder)
    os.truncate(folder / name, num_bytes)


def change(name: str, values: dict[str, Any], folder: Path) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    write(name, json.dumps({**found, **values}), folder)


def many_keys(name: str, count: int, folder: Path) -> None:
    change(name, {f"key{index}": index for index in range(count)}, folder)


def header(edit: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    """Change the header of the weights."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    values = json.loads(data[8 : 8 + length])
    values = edit(values) or values
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    write(WEIGHTS, struct.pack("<Q", len(text)) + text + data[8 + length :], folder)


def one(**changes: Any) -> Edit:
    """Change the entry of the first tensor."""

    def edit(values: dict[str, Any]) -> None:
        next(value for name, value in values.items() if name != "__metadata__").update(changes)

    return partial(header, edit)


def overlap(values: dict[str, Any]) -> None:
    entries = [value for name, value in values.items() if name != "__metadata__"]
    same = next(e for e in entries[1:] if e["shape"] == entries[0]["shape"])
    same["data_offsets"] = entries[0]["data_offsets"]


def empty_tensors(count: int, values: dict[str, Any]) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    values.update({f"x{index}": entry for index in range(count)})


def added_tokens(count: int, folder: Path) -> None:
    values = json.loads((folder / TOKENIZER).read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"] += [
        {"id": 1000 + index, "content": f"<x{index}>", "special": True, **flags}
        for index in range(count)
    ]
    write(TOKENIZER, json.dumps(values), folder)


def vocabulary(count: int, folder: Path) -> None:
    values = json.loads((folder / TOKENIZER).read_text())
    values["model"]["vocab"].update({f"k{index}": index + 1000 for index in range(count)})
    write(TOKENIZER, json.dumps(values), folder)


def larger_than_memory(folder: Path) -> None:
    """Make experts of 55 GB, in a file without blocks."""
    d_expert = 16_000_000
    change(CONFIG, {"moe_intermediate_size": d_expert}, folder)
    end = 0

    def edit(values: dict[str, Any]) -> None:
        nonlocal end
        end = max(v["data_offsets"][1] for k, v in values.items() if k != "__metadata__")
        for name, value in values.items():
            if ".experts." in name:
                value["shape"] = [d_expert if side == 20 else side for side in value["shape"]]
                size = 4 * value["shape"][0] * value["shape"][1]
                value["data_offsets"] = [end, end + size]
                end += size

    header(edit, folder)
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + end)


def index_of(file: str, name: str = "model.norm.weight") -> Edit:
    return partial(write, INDEX, json.dumps({"weight_map": {name: file}}))


def pickles_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


BIG = 10 << 30
CASES: dict[str, Edit] = {
    "nothing is wrong": lambda folder: None,
    "config: a named pipe": partial(fifo, CONFIG),
    "config: /dev/zero": partial(link, CONFIG, "/dev/zero"),
    "config: /dev/tty": partial(link, CONFIG, "/dev/tty"),
    "config: a folder": partial(directory, CONFIG),
    "config: 10 GiB": partial(sparse, CONFIG, BIG),
    "config: missing": lambda folder: (folder / CONFIG).unlink(),
    "config: empty": partial(write, CONFIG, ""),
    "config: a list": partial(write, CONFIG, "[]"),
    "config: nested 100,000 deep": partial(write, CONFIG, '{"a":' * 100_000),
    "config: not UTF-8": partial(write, CONFIG, b"\xff\xfe{}"),
    "config: a million keys": partial(many_keys, CONFIG, 1_000_000),
    "config: unknown family": partial(change, CONFIG, {"model_type": "mystery"}),
    "config: family is a list": partial(change, CONFIG, {"model_type": ["qwen3_moe"]}),
    "config: 10^9 layers": partial(change, CONFIG, {"num_hidden_layers": 10**9}),
    "config: 10^9 experts": partial(change, CONFIG, {"num_experts": 10**9}),
    "config: width 2^40": partial(change, CONFIG, {"hidden_size": 1 << 40}),
    "config: vocabulary 2^62": partial(change, CONFIG, {"vocab_size": 1 << 62}),
    "config: no heads": partial(change, CONFIG, {"num_attention_heads": 0}),
    "config: NaN": partial(change, CONFIG, {"rms_norm_eps": float("nan")}),
    "config: infinite rope": partial(change, CONFIG, {"rope_theta": float("inf")}),
    "config: text for a number": partial(change, CONFIG, {"hidden_size": "24"}),
    "config: a number of 4,001 digits": partial(change, CONFIG, {"hidden_size": 10**4000}),
    "config: unknown dtype": partial(change, CONFIG, {"dtype": "float7"}),
    "config: quantization is a number": partial(change, CONFIG, {"quantization_config": 3}),
    "generation: a named pipe": partial(fifo, GENERATION),
    "generation: /dev/zero": partial(link, GENERATION, "/dev/zero"),
    "generation: a folder": partial(directory, GENERATION),
    "generation: 10 GiB": partial(sparse, GENERATION, BIG),
    "generation: a million keys": partial(many_keys, GENERATION, 1_000_000),
    "generation: temperature 'hot'": partial(change, GENERATION, {"temperature": "hot"}),
    "generation: eos beyond": partial(change, GENERATION, {"eos_token_id": 10**6}),
    "index: a named pipe": partial(fifo, INDEX),
    "index: /dev/zero": partial(link, INDEX, "/dev/zero"),
    "index: a folder": partial(directory, INDEX),
    "index: 10 GiB": partial(sparse, INDEX, BIG),
    "index: ../": index_of("../x.safetensors"),
    "index: absolute": index_of("/etc/passwd.safetensors"),
    "index: a newline": index_of("a\n.safetensors"),
    "index: no such file": index_of("b.safetensors"),
    "index: no such tensor": index_of(WEIGHTS, "nothing"),
    "index: empty": partial(write, INDEX, '{"weight_map": {}}'),
    "index: numbers": partial(write, INDEX, '{"weight_map": {"a": 3}}'),
    "weights: a named pipe": partial(fifo, WEIGHTS),
    "weights: /dev/zero": partial(link, WEIGHTS, "/dev/zero"),
    "weights: /etc/passwd": partial(link, WEIGHTS, "/etc/passwd"),
    "weights: a folder": partial(directory, WEIGHTS),
    "weights: empty": partial(write, WEIGHTS, ""),
    "weights: half": lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size // 2),
    "weights: pickles only": pickles_only,
    "header: 2^63 bytes": partial(write, WEIGHTS, struct.pack("<Q", 1 << 63) + b"{}"),
    "header: 99 MB of spaces": partial(
        header, lambda values: json.dumps(values).encode().ljust(99 << 20)
    ),
    "header: nested 100,000 deep": partial(header, lambda values: b'{"a":' * 100_000),
    "header: 500,000 tensors": partial(header, partial(empty_tensors, 500_000)),
    "header: a million notes": partial(
        header, lambda v: v.update(__metadata__={f"m{i}": "x" for i in range(1_000_000)})
    ),
    "header: shape 2^40": one(shape=[1 << 40, 1 << 40]),
    "header: negative shape": one(shape=[-24]),
    "header: shape of floats": one(shape=[2.5]),
    "header: offsets beyond": one(data_offsets=[0, 1 << 50]),
    "header: negative offsets": one(data_offsets=[-96, 0]),
    "header: three offsets": one(data_offsets=[0, 1, 2]),
    "header: unknown type": one(dtype="F8_E4M3"),
    "header: type is a list": one(dtype=["F32"]),
    "header: tensors share bytes": partial(header, overlap),
    "experts: larger than memory": larger_than_memory,
    "experts: half still larger": larger_than_memory,
    "tokenizer: a named pipe": partial(fifo, TOKENIZER),
    "tokenizer: /dev/zero": partial(link, TOKENIZER, "/dev/zero"),
    "tokenizer: 10 GiB": partial(sparse, TOKENIZER, BIG),
    "tokenizer: not JSON": partial(write, TOKENIZER, "{"),
    "tokenizer: nested 100,000 deep": partial(write, TOKENIZER, '{"a":' * 100_000),
    "tokenizer: 200,000 added": partial(added_tokens, 200_000),
    "tokenizer: a million entries": partial(vocabulary, 1_000_000),
    "settings: a named pipe": partial(fifo, SETTINGS),
    "settings: /dev/zero": partial(link, SETTINGS, "/dev/zero"),
    "settings: a folder": partial(directory, SETTINGS),
    "settings: a million keys": partial(many_keys, SETTINGS, 1_000_000),
    "special tokens: a named pipe": partial(fifo, "special_tokens_map.json"),
    "added tokens: /dev/zero": partial(link, "added_tokens.json", "/dev/zero"),
    "template: a named pipe": partial(fifo, "chat_template.jinja"),
    "template: /dev/zero": partial(link, "chat_template.jinja", "/dev/zero"),
    "templates: /dev/zero": partial(link, "additional_chat_templates/x.jinja", "/dev/zero"),
}
BUDGETS = {"experts: half still larger": "50%"}


def serve(folder: Path, budget: str | None) -> str:
    """Check a folder as ``moeyard serve`` does; serve it and ask it for text if it passes."""
    args = ServeArgs(model=str(folder), served_model_name="m", expert_memory=budget)
    check_model(args, runs_here=True)
    server = Server(args)
    body = {"model": "m", "prompt": "a", "max_tokens": 4}
    answer = call(server, "POST", "/v1/completions", headers={}, json=body)
    assert answer.status_code in (200, 400), answer.text
    return f"answers with {answer.status_code}"


def main() -> None:
    chosen = {
        name: edit for name, edit in CASES.items() if not sys.argv[1:] or name in sys.argv[1:]
    }
    faults = []
    with scratch() as space:
        write_random_model(space / "base")
        for name, edit in chosen.items():
            folder = space / "folder"
            shutil.copytree(space / "base", folder)
            edit(folder)
            if report(name, bounded(partial(serve, folder, BUDGETS.get(name)))):
                faults.append(name)
            shutil.rmtree(folder)
    finish("hostile folders", faults, len(chosen))


if __name__ == "__main__":
    main()
