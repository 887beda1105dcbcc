"""The real thing: ``moeyard serve`` and ``serve run`` as processes, called over HTTP."""

import re
import select
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import openai
import pytest

from moeyard.serving.api.connections import MAX_WAITING_PER_CLIENT

from server_process import BIN, Running, free_port, listeners, serving

SECURITY = Path(__file__).parent.parent.parent / "SECURITY.md"
KEY = b"Authorization: Bearer secret\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_folder):
    options = ["--expert-memory", "25%", "--api-key", "secret"]
    with serving(model_folder, tmp_path_factory.mktemp("server"), *options) as running:
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="secret")


@pytest.mark.server
def test_the_openai_client_completes_and_streams(client):
    assert [m.id for m in client.models.list().data] == ["small"]
    options = {"model": "small", "prompt": "def ", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**options)
    pieces = list(client.completions.create(**options, stream=True))
    assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage.prompt_tokens == 4 and whole.usage.completion_tokens == 20


@pytest.mark.server
def test_the_openai_client_understands_refusals(server, client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match=r"token id 300") as caught:
        client.completions.create(model="small", prompt=[300])
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="context length is 256 tokens") as caught:
        client.completions.create(model="small", prompt="x" * 999)
    assert caught.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="wrong")
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        stranger.models.list()
    assert client.completions.create(model="small", prompt="a", max_tokens=2).choices


@pytest.mark.server
def test_metrics_add_up_across_concurrent_requests(server, client):
    import concurrent.futures

    def ask(number):
        return client.completions.create(
            model="small", prompt=f"request {number}", max_tokens=10, temperature=0
        )

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(12)))
    assert all(a.usage.completion_tokens <= 10 for a in answers)
    totals = server.totals("secret")
    assert totals["moeyard_moe_tokens_total"] > 0
    routed = totals["moeyard_expert_tokens_total"]
    print(f"\nrouted rows {routed:.0f}, tokens {totals['moeyard_moe_tokens_total']:.0f}")
    assert routed == totals["moeyard_moe_tokens_total"] * 2 * 2  # top-k, MoE layers
    assert totals["moeyard_requests_running"] == 0 == totals["moeyard_requests_waiting"]


@pytest.mark.server
def test_an_occupied_port_is_refused_at_once(server, model_folder):
    command = [str(BIN / "moeyard"), "serve", str(model_folder), "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: port {server.port} on 127.0.0.1 cannot be used (Address already in use); "
        "choose another with --port or --host.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere does not exist"),
        (["MODEL", "--expert-memory", "lots"], "expert-memory is 'lots'"),
        (["MODEL", "--expert-memory", "1B"], "but one expert takes"),
        (["MODEL", "--max-model-len", "9999"], "max-model-len is 9999, but the model takes 256"),
        (["MODEL", "--max-num-seqs", "0"], "max_num_seqs: it is 0"),
        (["MODEL", "--port", "99999"], "port is 99999; use a number from 1 to 65535"),
        (["MODEL", "--port", "0"], "port is 0"),
        (["MODEL", "--host", "no.such.host.invalid"], "host is 'no.such.host.invalid', which is"),
        (["MODEL", "--api-key", "k "], "api_key: the key is empty or holds blanks"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_ray_starts(model_folder, arguments, message):
    arguments = [str(model_folder) if a == "MODEL" else a for a in arguments]
    command = [str(BIN / "moeyard"), "serve", "--port", str(free_port()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.server
def test_only_the_loopback_is_listened_on_and_only_what_security_md_lists(server):
    members = [server.process.pid, *(int(pid) for pid in server.members())]
    found = listeners(members)
    assert ("ray::ProxyActor", "127.0.0.1", server.port) in found
    assert {address for _, address, _ in found} == {"127.0.0.1"}
    listed = set(re.findall(r"^\| `(\S+)` \|", SECURITY.read_text(), re.MULTILINE))
    assert {name for name, _, _ in found} <= listed, found


@pytest.mark.server
@pytest.mark.parametrize("key", [KEY, b""], ids=["with_key", "without_key"])
def test_requests_that_never_become_whole_stop_no_one(server, client, key):
    """More than there are places: they reach no replica, and the oldest make room."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n" + key
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for sender in clients:
        sender.sendall(head + b"\r\n{")
        sender.settimeout(30)
    assert client.completions.create(model="small", prompt="a", max_tokens=2).choices
    assert urllib.request.urlopen(f"{server.base}/health", timeout=30).status == 200
    answers = select.poll()  # select.select takes no numbers of files above 1023
    for sender in clients:
        answers.register(sender, select.POLLIN)
    refused: list[tuple[int, int]] = []
    while len(refused) < 200 - MAX_WAITING_PER_CLIENT:
        refused = answers.poll(100)
    numbers = {number for number, _ in refused}
    assert all(
        sender.recv(12) == b"HTTP/1.1 429" for sender in clients if sender.fileno() in numbers
    )
    for sender in clients:
        sender.close()


@pytest.mark.server
@pytest.mark.parametrize("after", ["import ray", pytest.param("ray.init", marks=pytest.mark.slow)])
def test_sigterm_while_the_server_starts_ends_it(tmp_path, model_folder, after):
    port = free_port()
    # The command as it is, with a signal to itself at a known moment of its start.
    patches = {
        "import ray": "import moeyard.serving.launch as l, os, signal\n"
        "old = l._on_signals\n"
        "def on(h): old(h); h is l._stop and os.kill(os.getpid(), signal.SIGTERM)\n"
        "l._on_signals = on\n",
        "ray.init": "import moeyard.serving.launch as l, os, signal\n"
        "l._deploy = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n",
    }
    code = patches[after] + "import sys\nfrom moeyard.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(model_folder), "--port", str(port)]
    running = Running(command, tmp_path / "log.txt", port)
    assert running.process.wait(300) == 0, running.log()
    assert running.stop() == 0, running.log()
    assert "Traceback" not in running.log()


@pytest.mark.server
def test_sigterm_ends_the_server_and_everything_it_started_without_a_word(server):
    members = server.members()
    assert len(members) > 3
    assert server.stop() == 0, server.log()
    left = [pid for pid in members if Path(f"/proc/{pid}").exists()]
    assert not left, server.log()
    lines = [line for line in server.log().splitlines() if not line.startswith("starting ")]
    decided = ["Keys", "Memory", "Experts", "The", "Upper"]  # about keys and values, and experts
    words = [line.partition(" ")[0] for line in lines]
    assert words == [*decided, "ready", "draining"], server.log()
