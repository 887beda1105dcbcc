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
from urllib.parse import urlsplit

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from served import Target, arguments, end, target_of

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
PATHS = ["/health", "/metrics", "/v1/models", "/v1/models/small", "/v1/completions"]
PATHS += ["/v1/chat/completions", "/", "/v1", "/docs", "/v1/models/%00", "/v1/completions/"]
RAW_TIMEOUT_S = 5

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
def bodies(draw) -> bytes:
    """Draw the bytes of a body, mostly near a valid one."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        return json.dumps(draw(junk)).encode()
    if kind == 2:
        depth = draw(st.integers(1, 200_000))
        return b'{"model": ' + b"[" * depth + b"]" * draw(st.sampled_from([0, depth]))
    body = {"model": "MODEL", **draw(completion if kind < 6 else chat)}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*body, "best_of", "suffix", "\ud83d", "max_tokens"]))
        body[name] = draw(junk)
    if draw(st.integers(0, 9)) == 0:
        del body[draw(st.sampled_from(list(body)))]
    text = json.dumps(body)
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", "\0", "NaN", "1" * 5000, "\ufeff", "}"]))
    return text.encode(draw(st.sampled_from(["utf-8"] * 6 + ["utf-16", "utf-32"])))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--bodies", type=int, default=400)
    parser.add_argument("--raw", type=int, default=400)
    asked = parser.parse_args()
    print(f"seed {asked.seed}")
    with target_of(asked) as target:
        fuzz_bodies(target, asked.seed, asked.bodies)
        target.show_counts("bodies")
        fuzz_raw(target, random.Random(asked.seed), asked.raw)
        target.show_counts("raw messages")
        target.check_alive()
    end(target)


def fuzz_bodies(target: Target, seed: int, count: int) -> None:
    """Send what hypothesis draws; a fault is written down and does not end the search."""
    methods = st.sampled_from(["POST"] * 12 + METHODS)
    paths = st.sampled_from(["/v1/completions"] * 8 + ["/v1/chat/completions"] * 8 + PATHS)

    @hypothesis.seed(seed)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(methods, paths, bodies())
    def send(method: str, path: str, body: bytes) -> None:
        body = body.replace(b"MODEL", target.model.encode())
        headers = {"Content-Type": "application/json"}
        answer = target.client.request(method, path, content=body, headers=headers)
        target.check_answer(f"{method} {path} {body[:300]!r}", answer)
        if b'"error"' in answer.content and b"the server failed" in answer.content:
            target.fault(f"{method} {path} {body[:300]!r}: a stream failed: {answer.text[-200:]}")

    send()


def fuzz_raw(target: Target, numbers: random.Random, count: int) -> None:
    """Send messages that a parser of HTTP may stumble over."""
    for _ in range(count):
        message = raw_message(numbers, target)
        status = exchange(target, message)
        target.counts[status] += 1
        if status.startswith("5"):
            target.fault(f"raw {message[:300]!r}: {status}")


def raw_message(numbers: random.Random, target: Target) -> bytes:
    """Return a message, mostly with one thing wrong."""
    pick = numbers.choice
    body = json.dumps({"model": target.model, "prompt": "a", "max_tokens": 1}).encode()
    odd_methods = [b"GET", b"post", b"P\xffST", b"", b"CONNECT", b"PRI", b"A" * 9000]
    method = pick([b"POST"] * 6 + odd_methods)
    odd_paths = [b"*", b"/\xff", b"/%", b"/" + b"a" * 70_000, b"//a:b@"]
    path = pick([b"/v1/completions"] * 12 + [p.encode() for p in PATHS] + odd_paths)
    version = pick([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"", b"\x00"])
    length = str(len(body)).encode()
    host = pick([b"127.0.0.1"] * 4 + [b"[", b"", b"a" * 300, b"\xff", b"a:b:c", b"[::1]:99999999"])
    lines = [b"Host: " + host]
    lines += [f"{name}: {value}".encode() for name, value in target.headers.items()]
    lines += pick(
        [
            [b"Content-Length: " + length],
            [b"Content-Length: " + length] * 2,
            [b"Content-Length: " + length, b"Transfer-Encoding: chunked"],
            [b"Content-Length: -1"],
            [b"Content-Length: 1e3"],
            [b"Content-Length: " + b"9" * 30],
            [b"Content-Length: 5"],
            [b"Transfer-Encoding: chunked"],
            [b"Transfer-Encoding: gzip, chunked"],
            [],
        ]
    )
    if any(b"chunked" in line for line in lines):
        size = pick([b"%x" % len(body), b"-1", b"zz", b"f" * 20, b"%x;a=b" % len(body)])
        ending = pick([b"\r\n0\r\n\r\n", b"0\r\n\r\n", b"\r\n0\r\nA: b\r\n\r\n"])
        body = size + b"\r\n" + body + ending
    lines += pick(
        [
            [],
            [b"Expect: 100-continue"],
            [b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Key: a"],
            [b"X: " + b"y" * numbers.randrange(1, 70_000)],
            [b"X%d: y" % i for i in range(numbers.randrange(1, 300))],
            [b"No colon"],
            [b" folded"],
            [b": no name"],
            [b"A\x00B: c"],
            [b"Authorization: Bearer \xff"],
            [b"Content-Encoding: gzip"],
            [b"Cookie: " + bytes(numbers.randrange(256) for _ in range(30))],
        ]
    )
    end_of_line = pick([b"\r\n"] * 8 + [b"\n", b"\r"])
    return end_of_line.join([b" ".join([method, path, version]), *lines, b"", body])


def exchange(target: Target, message: bytes) -> str:
    """Return the status of the first answer to a message, or what came instead."""
    address = urlsplit(target.base)
    with socket.create_connection((address.hostname, address.port), RAW_TIMEOUT_S) as connection:
        try:
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        except TimeoutError:
            return "none in time"
        except OSError:
            return "closed"
    words = answer.split(maxsplit=2)
    return words[1].decode("latin1") if len(words) > 1 else "closed"


if __name__ == "__main__":
    main()
