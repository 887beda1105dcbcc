"""Two nodes of a Ray cluster on this machine, two models in one file, and a change under load."""

import json
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import yaml
from ray_nodes import nodes

from small_model import CONFIG, write_random_model

pytestmark = pytest.mark.slow
TWO_MODELS = Path(__file__).parent.parent.parent / "configs" / "serve" / "two_models.yaml"
WAIT_S = 240.0


def read(url, body=None, timeout=60):
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=timeout) as got:
            return got.status, got.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, repr(error).encode()


def ask(base, model, tokens=4, **more):
    body = {"model": model, "prompt": "hello 1", "max_tokens": tokens, "temperature": 0}
    return read(f"{base}/v1/completions", body | {"ignore_eos": True} | more)


def wait_for(condition, what):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} has not happened"
        time.sleep(0.3)


class Load:
    """Clients of one application that never stop asking, and what they got."""

    def __init__(self, bases, model, retries):
        self._bases, self._model, self._retries = bases, model, retries
        self.outcomes = Counter()
        self.problems = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(6)]
        for thread in self._threads:
            thread.start()

    def _run(self, number):
        while not self._stop.is_set():
            for attempt in range(self._retries + 1):
                base = self._bases[(number + attempt) % len(self._bases)]
                status, content = ask(base, self._model, 40)
                if status == 200:
                    break
                time.sleep(0.2)
            self.outcomes[status] += 1
            if status != 200:
                self.problems.append(content[:200])

    def end(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def deployment(folder):
    """Return the shipped file with two small models, of which the first has two replicas."""
    values = yaml.safe_load(TWO_MODELS.read_text())
    for application, name in zip(values["applications"], ("long", "other"), strict=True):
        write_random_model(folder / name, CONFIG.model_copy(update={"max_positions": 8192}))
        application["args"]["model"] = str(folder / name)
    first, second = (application["deployments"][0] for application in values["applications"])
    first |= {"num_replicas": 2, "max_replicas_per_node": 1}
    second |= {"ray_actor_options": {"num_cpus": 0.5}}
    del values["applications"][1]["args"]["max_replicas"]
    return values


def deploy(cluster, folder, values):
    path = folder / "deployment.yaml"
    path.write_text(yaml.safe_dump(values))
    cluster.serve("deploy", str(path))


def generated(base):
    """Return the tokens that an application's metrics tell of."""
    text = read(f"{base}/metrics")[1].decode()
    lines = [line for line in text.splitlines() if line.startswith("moeyard_generation_tokens_t")]
    return float(lines[0].split()[1])


def test_two_models_on_two_nodes_are_changed_and_lose_a_node_without_a_lost_answer():
    with tempfile.TemporaryDirectory(prefix="nodes-") as short:
        folder = Path(short)
        with nodes(folder, 2, 2) as cluster:
            values = deployment(folder)
            values["http_options"]["port"] = cluster.http_ports[0]
            prefixes = [application["route_prefix"] for application in values["applications"]]
            deploy(cluster, folder, values)
            head, other = (f"http://127.0.0.1:{port}" for port in cluster.http_ports)
            first, second = (head + prefix for prefix in prefixes)
            for base, model in ((first, "long"), (second, "other")):
                wait_for(lambda base=base, model=model: ask(base, model)[0] == 200, base)
            wait_for(lambda: cluster.replicas(0, "one") and cluster.replicas(1, "one"), "spread")
            check_apart(first, second)
            check_both_nodes(cluster, [head + prefixes[0], other + prefixes[0]])
            check_change(cluster, folder, values, first)
            check_lost_node(cluster, [other + prefixes[0], first])


def check_apart(first, second):
    """Each model answers under its prefix, by its name, with separate metrics."""
    assert ask(first, "other")[0] == 404 == ask(second, "long")[0]
    for base, name in ((first, "long"), (second, "other")):
        listed = json.loads(read(f"{base}/v1/models")[1])["data"]
        assert [model["id"] for model in listed] == [name]
        assert read(f"{base}/health")[0] == 200
    before = generated(first), generated(second)
    assert ask(first, "long", 50)[0] == 200
    wait_for(lambda: generated(first) >= before[0] + 50, "counting")
    assert generated(second) == before[1]


def check_both_nodes(cluster, bases):
    """Both nodes' proxies answer alike."""
    answers = [json.loads(ask(base, "long", 30)[1])["choices"][0]["text"] for base in bases]
    assert answers[0] == answers[1]


def check_change(cluster, folder, values, base):
    """Another batch size in the file replaces both replicas, and no request fails."""
    old = cluster.replicas(0, "one") | cluster.replicas(1, "one")
    load = Load([base], "long", retries=0)
    try:
        wait_for(lambda: load.outcomes[200] > 10, "load")
        values["applications"][0]["args"]["max_num_seqs"] = 5
        deploy(cluster, folder, values)

        def is_changed():
            now = cluster.replicas(0, "one") | cluster.replicas(1, "one")
            return len(now) == 2 and not now & old

        wait_for(is_changed, "the change")
        answered = load.outcomes[200]
        wait_for(lambda: load.outcomes[200] > answered + 10, "answers of the new replicas")
    finally:
        load.end()
    print(f"\nchange under load: {dict(load.outcomes)}")
    assert set(load.outcomes) == {200}, load.problems


def check_lost_node(cluster, bases):
    """The answers go on where they can when a node dies; clients try the other proxy."""
    load = Load(bases, "long", retries=40)
    try:
        wait_for(lambda: load.outcomes[200] > 10, "load")
        cluster.kill(1)
        died = time.monotonic()
        answered = load.outcomes[200]
        wait_for(lambda: load.outcomes[200] > answered + 6, "answers of the other node")
        print(f"\n6 clients answered {time.monotonic() - died:.1f} s after a node died")
        answered = load.outcomes[200]
        wait_for(lambda: load.outcomes[200] > answered + 20, "further answers")
    finally:
        load.end()
    assert set(load.outcomes) == {200}, load.problems
