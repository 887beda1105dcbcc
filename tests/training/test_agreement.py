"""Ranks start only when they agree: configuration, code, data, weights, and one run folder."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeyard.errors import ConfigError
from moeyard.parallel.watch.watch import Watch
from moeyard.training.read_config import read_run_config
from moeyard.training.run import agreement, shared_folder
from moeyard.training.run.agreement import check_same, check_same_start
from moeyard.training.run.shared_folder import check_shared_folder

from launch import environment, free_port

ROOT = Path(__file__).parent.parent.parent
VICTIM = str(ROOT / "scripts" / "chaos" / "victim.py")


@pytest.fixture
def pair():
    """Two ranks that have joined, in this process."""
    watches = [Watch(rank, 2, "token", 60) for rank in range(2)]
    watches[1].connect("127.0.0.1", watches[0].listen("127.0.0.1"))
    for member in watches:
        member.wait_for_all()
    yield watches
    for member in watches:
        member.close()


def on_both(watches, act) -> list[str | None]:
    """Run ``act`` as both ranks together and return the sentences of their errors."""

    def sentence(member) -> str | None:
        try:
            act(member)
        except ConfigError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(sentence, watches))


def test_a_key_that_differs_is_named_with_both_values_on_all_ranks(pair, config_file):
    def start(member) -> None:
        own = "optimizer.lr=0.25" if member.rank else "optimizer.lr=0.5"
        overrides = ["run_dir=/anywhere", own, f"run_dir=/{member.rank}"]  # which may be spelt so
        check_same_start(read_run_config(config_file, overrides), member)

    first, second = on_both(pair, start)
    assert first == second
    assert first is not None and first.startswith("optimizer.lr is 0.25 on rank 1 on ")
    assert ", but 0.5 on rank 0 on " in first and "(" not in first.split("but")[1]


def test_equal_starts_pass(pair, config_file):
    config = read_run_config(config_file)
    assert on_both(pair, lambda member: check_same_start(config, member)) == [None, None]


def test_another_source_file_is_named(pair, config_file, monkeypatch):
    seen = []

    def check(facts, remedy, member):
        if member.rank == 1 and "torch" in facts:
            seen.append(len(facts))
            facts = facts | {"moeyard/training/step.py": "0123"}
        check_same(facts, remedy, member)

    monkeypatch.setattr(agreement, "check_same", check)
    config = read_run_config(config_file)
    sentences = on_both(pair, lambda member: check_same_start(config, member))
    assert all("moeyard/training/step.py is '0123' on rank 1" in str(s) for s in sentences)
    assert seen[0] > 100


def test_a_fact_that_one_rank_lacks_is_a_difference(pair):
    def check(member) -> None:
        check_same({"a": None} if member.rank else {"a": None, "b": 1}, "correct it", member)

    assert all("b is absent on rank 1" in str(sentence) for sentence in on_both(pair, check))


def test_run_folders_of_their_own_are_refused_and_left_clean(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "SEEN_WITHIN_S", 0.2)
    folders = [tmp_path / "zero", tmp_path / "one"]
    for folder in folders:
        folder.mkdir()
    apart = on_both(pair, lambda member: check_shared_folder(folders[member.rank], member))
    assert all(
        "rank 1 on" in str(s) and "does not see there what rank 0 wrote" in str(s) for s in apart
    )
    assert on_both(pair, lambda member: check_shared_folder(folders[0], member)) == [None, None]
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_folder_that_one_rank_only_reads_is_refused(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "SEEN_WITHIN_S", 0.2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    reply = shared_folder._reply
    monkeypatch.setattr(
        shared_folder,
        "_reply",
        lambda folder, question, rank: reply(elsewhere / "gone", question, rank),
    )
    sentences = on_both(pair, lambda member: check_shared_folder(tmp_path, member))
    assert all("rank 1 on" in str(s) and "cannot write there" in str(s) for s in sentences)


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_rank_ends_in_one_sentence_that_names_it_over_gloo_too(tmp_path, config_file):
    """Dense engine fsdp, whose collectives are gloo's; the sentence closes torchrun's table."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", VICTIM, str(config_file), f"run_dir={tmp_path}/run"]
    done = subprocess.run(
        [*command, "parallel.dense=fsdp"],
        env=environment(CHAOS="1 step kill"),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert said[0].startswith("error: rank 1 on ") and "ended without a word" in said[0]
    assert "training/step.py" not in done.stderr, "a worker's traceback"


@pytest.mark.chaos
def test_two_nodes_with_disks_of_their_own_are_refused(tmp_path, config_file):
    """Two agents, each with another working folder, and a run_dir that is relative to it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    command += ["-m", "moeyard.training", str(config_file), "run_dir=runs/own"]
    env = environment(GLOO_SOCKET_IFNAME="lo")
    agents, logs = [], []
    for number in range(2):
        node = tmp_path / f"node{number}"
        node.mkdir()
        logs.append(node / "log.txt")
        with logs[-1].open("w") as log:
            agents.append(subprocess.Popen(command, env=env, cwd=node, stdout=log, stderr=log))
    assert all(agent.wait(timeout=240) != 0 for agent in agents)
    for log in logs:  # each host's own log says it
        assert "does not see there what rank 0 wrote" in log.read_text(), log.read_text()
    assert not list(tmp_path.glob("node*/runs/own/checkpoints"))
