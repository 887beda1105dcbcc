"""Prompts of 1 MB of many shapes, and how long others wait meanwhile.

    python scripts/chaos/long_prompts.py

A server with a BPE of 1,500 ids, in this process, without a network. For each shape one client
sends it as a prompt and as a chat, while another asks for short texts and a third for /health, one
after the other. Long ones are 413 or 400; the others must all get what they get alone. Bounded by
60 s a shape. Exits with 1 on a fault; latencies are printed, not judged.
"""

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server
from moeyard.training.data.tokenizer import write_tokenizer_files

from bounded import finish, scratch
from http_calls import client_of
from small_model import CONFIG, write_random_model

SEED, NUM_IDS, LIMIT_S = 1, 1500, 60
SIZE = (1 << 20) - 300
END = "<|endoftext|>"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def shapes() -> dict[str, Any]:
    """Return prompts of just under 1 MiB."""
    draw = random.Random(SEED)
    words = ["the", "def", "x", "return", "1234", "'", "(", "naïve", "\n"]
    return {
        "one letter": "a" * SIZE,
        "spaces": " " * SIZE,
        "newlines": "\n" * (SIZE // 2),
        "digits": "".join(draw.choices("0123456789", k=SIZE)),
        "random letters": "".join(draw.choices("abcdefgh ", k=SIZE)),
        "words": " ".join(draw.choices(words, k=SIZE // 6)),
        "Chinese": "".join(draw.choices("的一是不了人我在有他", k=SIZE // 6)),
        "emoji": "🙂" * (SIZE // 12),
        "special tokens": END * (SIZE // len(END)),
        "ids": [7] * (SIZE // 3),
        "larger than 1 MiB": "a" * (SIZE + 1000),
    }


def train_tokenizer(folder: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_IDS - 1, initial_alphabet=alphabet, show_progress=False
    )
    lines = [f"def f_{n}(a): return 'the {n * n} naïve words' + str(a)\n" for n in range(4000)]
    bpe.train_from_iterator(lines, trainer)
    bpe.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    write_tokenizer_files(bpe, folder)


async def keep_asking(send: Any, latencies: list[float], done: asyncio.Event) -> set[str]:
    """Ask until told to stop; return the different answers."""
    found: set[str] = set()
    while True:
        started = time.perf_counter()
        found.add(await send())
        latencies.append(time.perf_counter() - started)
        await asyncio.sleep(0.002)  # an answer that waits for nothing would let no one else run
        if done.is_set():
            return found


async def one_shape(
    server: Server, prompt: Any, expected: tuple[int, ...]
) -> tuple[list[str], list[float], list[float]]:
    """Send one prompt; return the answers to it, and what others waited for texts and health."""
    texts: list[float] = []
    healths: list[float] = []
    done = asyncio.Event()
    async with client_of(server.app()) as client:

        async def short() -> str:
            body = {"model": "m", "prompt": "def", "max_tokens": 2, "temperature": 0}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        async def health() -> str:
            return str((await client.get("/health")).status_code)

        others = [
            asyncio.create_task(keep_asking(short, texts, done)),
            asyncio.create_task(keep_asking(health, healths, done)),
        ]
        await asyncio.sleep(0.2)
        bodies: dict[str, Any] = {"completions": {"prompt": prompt}}
        if isinstance(prompt, str):
            bodies["chat/completions"] = {"messages": [{"role": "user", "content": prompt}]}
        found = []
        for path, body in bodies.items():
            content = json.dumps({"model": "m", "max_tokens": 2, **body}, ensure_ascii=False)
            started = time.perf_counter()
            answer = await client.post(f"/v1/{path}", content=content.encode())
            found.append(f"{answer.status_code} in {time.perf_counter() - started:.2f} s")
            assert answer.status_code in expected, answer.text[:200]
        done.set()
        answers = [await other for other in others]
    assert len(answers[0]) == 1 and answers[1] == {"200"}, answers
    return found, texts, healths


def milliseconds(latencies: list[float]) -> str:
    ordered = sorted(1000 * value for value in latencies)
    middle, late = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return f"p50 {middle:6.1f} p99 {late:6.1f} max {ordered[-1]:6.1f} of {len(ordered)}"


def main() -> None:
    print(f"seed {SEED}; milliseconds that others waited for a text, and for /health")
    faults = []
    with scratch() as space:
        folder, template = space / "m", space / "template.jinja"
        write_random_model(folder, CONFIG.model_copy(update={"vocab_size": NUM_IDS}))
        train_tokenizer(folder)
        template.write_text(TEMPLATE)
        server = Server(ServeArgs(model=str(folder), chat_template=str(template)))
        for name, prompt in {"nothing long": "def" * 50, **shapes()}.items():
            try:
                expected = (400, 413) if len(prompt) > 1000 else (200,)
                work = asyncio.wait_for(one_shape(server, prompt, expected), LIMIT_S)
                found, texts, healths = asyncio.run(work)
            except (AssertionError, TimeoutError) as error:
                faults.append(name)
                print(f"{name:18} FAULT {type(error).__name__} {str(error)[:200]}", flush=True)
                continue
            waits = f"texts {milliseconds(texts)}  health {milliseconds(healths)}"
            print(f"{name:18} {', '.join(found):36} {waits}", flush=True)
        if server.admission.num_open or server.thread.problem() is not None:
            faults.append("the server is not idle afterwards")
        server.close()
    finish("prompts of 1 MB", faults, len(shapes()) + 1)


if __name__ == "__main__":
    main()
