"""Does any body or any bytes on the wire make the server answer with a 5xx?

    python scripts/chaos/fuzz_http.py [BASE_URL --api-key KEY] [--seed 1] [--bodies 400] [--raw 400]

Bodies by hypothesis, to every route with every method: valid requests with some fields replaced or
added, other JSON, and bytes. Then raw HTTP messages with broken request lines, headers, lengths and
chunks. A 5xx is a fault, as are an error that is not OpenAI's object and a server that does not
answer afterwards. Ray's proxy answers some raw messages itself; there only a 5xx counts.
"""

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from served import Target, arguments, end, target_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
PATHS = ["/health", "/metrics", "/v1/models", "/v1/models/small", COMPLETIONS, CHAT]
PATHS += ["/", "/v1", "/docs", "/v1/models/%00", "/v1/completions/"]
RAW_TIMEOUT_S = 5
"""Some messages say that they are longer than they are; a server waits for the rest."""
RAW_AT_ONCE = 16

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(), max_size=20),  # halves of surrogate pairs too
    st.sampled_from(["", "text", "user", "json_object", -1, 0, 1, 1e308, 2**63, "\ud83d"]),
)
junk = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["type", "text", "role"]), inner)
    ),
    max_leaves=10,
)
part = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=9)})
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
        "content": st.text(max_size=9) | st.lists(part, max_size=3) | junk,
    },
    optional={"name": junk, "tool_calls": junk, "refusal": junk},
)
OPTIONS = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(0, 300),
    "n": st.integers(1, 8),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "stop": st.text(max_size=4) | st.lists(st.text(max_size=4), max_size=5),
    "seed": st.integers(-(2**63), 2**63),
    "logprobs": st.booleans() | st.integers(0, 21),
    "top_logprobs": st.integers(0, 21),
    "echo": st.booleans(),
    "logit_bias": junk,
    "response_format": junk,
    "tools": junk,
    "user": junk,
}
completion = st.fixed_dictionaries(
    {
        "prompt": st.text(max_size=20)
        | st.lists(st.integers(0, 260), max_size=9)
        | st.lists(st.text(max_size=5), max_size=4),
        "max_tokens": st.integers(1, 6),
    },
    optional=OPTIONS,
)
chat = st.fixed_dictionaries(
    {"messages": st.lists(message, max_size=4), "max_tokens": st.integers(1, 6)}, optional=OPTIONS
)


@st.composite
def near_valid(draw) -> tuple[str, bytes]:
    """Draw a path and a body for it that has something wrong, or nothing."""
    path, options = draw(st.sampled_from([(COMPLETIONS, completion), (CHAT, chat)]))
    body = {"model": "MODEL", **draw(options)}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*body, "best_of", "suffix", "\ud83d", "max_tokens"]))
        body[name] = draw(junk)
    return path, json.dumps(body).encode()


@st.composite
def far_from_valid(draw) -> bytes:
    """Draw a body of other JSON, of text that is nearly JSON, or of bytes."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        return json.dumps(draw(junk)).encode()
    if kind == 2:
        depth = draw(st.integers(1, 200_000))
        return b'{"model": ' + b"[" * depth + b"]" * draw(st.sampled_from([0, depth]))
    text = json.dumps({"model": "MODEL", **draw(completion)})
    at = draw(st.integers(0, len(text)))
    text = text[:at] + draw(st.sampled_from(["", "\0", "NaN", "1" * 5000, "\ufeff", "}"]))
    return text.encode(draw(st.sampled_from(["utf-8", "utf-16", "utf-32"])))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--bodies", type=int, default=400)
    parser.add_argument("--raw", type=int, default=400)
    asked = parser.parse_args()
    print(f"seed {asked.seed}")
    with target_of(asked) as target:
        fuzz_bodies(target, asked.seed, asked.bodies)
        fuzz_raw(target, random.Random(asked.seed), asked.raw)
        target.show_counts("raw messages")
        target.check_alive()
    end(target)


def fuzz_bodies(target: Target, seed: int, count: int) -> None:
    """Send what hypothesis draws; a fault is written down and does not end the search."""
    drawn = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )

    def send(method: str, path: str, body: bytes) -> None:
        body = body.replace(b"MODEL", target.model.encode())
        headers = {"Content-Type": "application/json"}
        answer = target.client.request(method, path, content=body, headers=headers)
        target.check_answer(f"{method} {path} {body[:300]!r}", answer)
        if b"the server failed" in answer.content and answer.status_code == 200:
            target.fault(f"{method} {path} {body[:300]!r}: a stream failed: {answer.text[-200:]}")

    @hypothesis.seed(seed)
    @drawn
    @given(near_valid())
    def send_near(message: tuple[str, bytes]) -> None:
        send("POST", *message)

    @hypothesis.seed(seed)
    @drawn
    @given(st.sampled_from(METHODS), st.sampled_from(PATHS), far_from_valid())
    def send_far(method: str, path: str, body: bytes) -> None:
        send(method, path, body)
        send("POST", COMPLETIONS, body)

    send_near()
    target.show_counts("bodies near valid ones")
    send_far()
    target.show_counts("other bodies")


def fuzz_raw(target: Target, numbers: random.Random, count: int) -> None:
    """Send messages that a parser of HTTP may stumble over."""
    messages = [raw_message(numbers, target) for _ in range(count)]
    with ThreadPoolExecutor(RAW_AT_ONCE) as pool:  # many are answered by waiting for the rest
        answers = list(pool.map(lambda message: exchange(target, message), messages))
    for message, status in zip(messages, answers, strict=True):
        target.counts[status] += 1
        if status.startswith("5"):
            target.fault(f"raw {message[:300]!r}: {status}")


PARTS = ["method", "path", "version", "host", "length", "header", "ending"]
ODD_HEADERS = [
    [b"Expect: 100-continue"],
    [b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Key: a"],
    [b"X: " + b"y" * 70_000],
    [b"X%d: y" % number for number in range(300)],
    [b"No colon"],
    [b" folded"],
    [b": no name"],
    [b"A\x00B: c"],
    [b"Authorization: Bearer \xff"],
    [b"Content-Encoding: gzip"],
    [b"Cookie: \x00\xff\x7f;=;"],
]
ODD_LENGTHS = [
    [b"Content-Length: -1"],
    [b"Content-Length: 1e3"],
    [b"Content-Length: " + b"9" * 30],
    [b"Content-Length: 5"],
    [b"Content-Length: 5", b"Content-Length: 6"],
    [b"Content-Length: 70", b"Transfer-Encoding: chunked"],
    [b"Transfer-Encoding: chunked"],
    [b"Transfer-Encoding: chunked"],
    [b"Transfer-Encoding: gzip, chunked"],
    [],
]


def raw_message(numbers: random.Random, target: Target) -> bytes:
    """Return a message with up to two things wrong."""
    pick = numbers.choice
    wrong = set(numbers.sample(PARTS, pick([0, 1, 1, 1, 2])))

    def part(name, usual, odd):
        return pick(odd) if name in wrong else usual

    body = json.dumps({"model": target.model, "prompt": "a", "max_tokens": 1}).encode()
    odd_methods = [b"GET", b"post", b"P\xffST", b"", b"CONNECT", b"PRI", b"A" * 9000]
    odd_paths = [p.encode() for p in PATHS] + [b"*", b"/\xff", b"/%", b"/" + b"a" * 70_000]
    odd_versions = [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"", b"\x00"]
    first = [
        part("method", b"POST", odd_methods),
        part("path", COMPLETIONS.encode(), [*odd_paths, b"//a:b@"]),
        part("version", b"HTTP/1.1", odd_versions),
    ]
    odd_hosts = [b"[", b"", b"a" * 300, b"\xff", b"a:b:c", b"[::1]:99999999"]
    lines = [b"Host: " + part("host", b"127.0.0.1", odd_hosts)]
    lines += [f"{name}: {value}".encode() for name, value in target.headers.items()]
    lengths = part("length", [f"Content-Length: {len(body)}".encode()], ODD_LENGTHS)
    lines += lengths + part("header", [], ODD_HEADERS)
    if any(b"chunked" in line for line in lengths):
        size = pick([b"%x" % len(body), b"-1", b"zz", b"f" * 20, b"%x;a=b" % len(body)])
        end_of_body = pick([b"\r\n0\r\n\r\n", b"0\r\n\r\n", b"\r\n0\r\nA: b\r\n\r\n"])
        body = size + b"\r\n" + body + end_of_body
    end_of_line = part("ending", b"\r\n", [b"\n", b"\r"])
    return end_of_line.join([b" ".join(first), *lines, b"", body])


def exchange(target: Target, message: bytes) -> str:
    """Return the status of the first answer to a message, or what came instead."""
    address = urlsplit(target.base)
    with socket.create_connection((address.hostname, address.port), RAW_TIMEOUT_S) as connection:
        try:
            connection.sendall(message)
            answer = connection.recv(65536)
        except TimeoutError:
            return "none in time"
        except OSError:
            return "closed"
    words = answer.split(maxsplit=2)
    return words[1].decode("latin1") if len(words) > 1 else "closed"


if __name__ == "__main__":
    main()
