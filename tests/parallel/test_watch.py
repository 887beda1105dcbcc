"""Ranks that watch each other: who is missed is named, and nothing that was said is lost."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from moeyard.errors import ConfigError, LostRankError
from moeyard.parallel.watch import peers as peers_module
from moeyard.parallel.watch import verdicts, watch
from moeyard.parallel.watch.link import Link
from moeyard.parallel.watch.pulse import pulse
from moeyard.parallel.watch.watch import Watch

TOKEN = "token"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Beats every 50 ms; and no verdict may end the process that runs the tests."""
    monkeypatch.setattr(peers_module, "BEAT_S", 0.05)
    monkeypatch.setattr(watch, "BEAT_S", 0.05)
    monkeypatch.setattr(verdicts, "SILENT_S", 0.25)
    monkeypatch.setattr(watch, "WINDOW_S", 0.3)
    monkeypatch.setattr(watch, "GRACE_S", 3600)


def joined(ranks: int, timeout_s: float = 60) -> list[Watch]:
    watches = [Watch(rank, ranks, TOKEN, timeout_s) for rank in range(ranks)]
    port = watches[0].listen("127.0.0.1")
    for member in watches[1:]:
        member.connect("127.0.0.1", port)
    for member in watches:
        member.wait_for_all()
    return watches


@pytest.fixture
def ranks():
    """Return a function that makes watches, which are closed in the end."""
    made: list[Watch] = []

    def make(count: int, timeout_s: float = 60) -> list[Watch]:
        made.extend(joined(count, timeout_s))
        return made

    yield make
    for member in made:
        member.close()


def on_all(watches: list[Watch], act: Callable[[Watch], object]) -> list[object]:
    """Run ``act`` for every rank concurrently; return results, or the errors that ended it."""

    def caught(member: Watch) -> object:
        try:
            return act(member)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(watches)) as pool:
        return list(pool.map(caught, watches))


def test_what_rank_0_finds_arrives_everywhere_in_order(ranks):
    watches = ranks(3)

    def three_turns(member: Watch) -> list[object]:
        found = [member.on_rank_0(partial(pow, 2, turn)) for turn in range(2)]
        return [*found, member.gather({"rank": member.rank})]

    first, *others = on_all(watches, three_turns)
    assert first == [1, 2, [{"rank": rank} for rank in range(3)]]
    assert others == [[1, 2, []]] * 2


def test_an_error_of_rank_0_is_raised_with_its_kind_and_words_on_every_rank(ranks):
    def refuse() -> None:
        raise ConfigError("seed is 3, which is odd; choose another.")

    errors = on_all(ranks(3), lambda member: member.on_rank_0(refuse))
    assert [type(error) for error in errors] == [ConfigError] * 3
    assert {str(error) for error in errors} == {"seed is 3, which is odd; choose another."}


def test_the_last_word_of_rank_0_is_heard_although_it_leaves_at_once(ranks):
    watches = ranks(4)

    def last_turn(member: Watch) -> object:
        if member.rank:
            time.sleep(0.1 * member.rank)
        found = member.on_rank_0(lambda: "saved")
        member.leave()
        member.close()
        return found

    assert on_all(watches, last_turn) == ["saved"] * 4


def test_a_rank_that_ends_is_named_to_all_while_they_wait(ranks):
    watches = ranks(3)
    watches[1].close()  # the kernel closes a dead process's connections likewise
    errors = on_all(
        [watches[0], watches[2]], lambda member: member.gather(member.rank) or wait(member)
    )
    assert [type(error) for error in errors] == [LostRankError] * 2
    assert all("rank 1 on" in str(e) and "ended without a word" in str(e) for e in errors)


def wait(member: Watch) -> object:
    return member.on_rank_0(lambda: None)


def test_rank_0_that_ends_is_named_by_the_others(ranks):
    watches = ranks(3)
    watches[0].close()
    errors = on_all(watches[1:], wait)
    assert all("rank 0 on" in str(e) and "ended without a word" in str(e) for e in errors)


def silent_member(port: int, rank: int) -> Link:
    """Join as a process that is stopped then: its connection stays, and says nothing."""
    link = Link(socket.create_connection(("127.0.0.1", port)))
    link.send({"kind": "hello", "token": TOKEN, "rank": rank, "host": "far", "pid": 7})
    return link


def test_a_stopped_rank_is_named_after_the_limit_and_not_those_that_live():
    hub, member = (Watch(rank, 3, TOKEN, timeout_s=1.5) for rank in range(2))
    port = hub.listen("127.0.0.1")
    member.connect("127.0.0.1", port)
    link = silent_member(port, 2)
    hub.wait_for_all()
    member.wait_for_all()
    try:
        with pulse.in_collective("the sum of gradients"):
            errors = on_all([hub, member], lambda w: (w.gather(w.rank), wait(w)))
        assert len({str(error) for error in errors}) == 1
        assert "rank 2 on far (process 7) fell silent" in str(errors[0])
        assert "while rank 0 waited in the sum of gradients: it is stopped" in str(errors[0])
    finally:
        link.close()
        member.close()
        hub.close()


def test_who_waits_for_rank_0_waits_as_long_as_it_moves(ranks, monkeypatch):
    watches = ranks(2, 1)

    def long_work() -> str:
        for _ in range(20):
            watch.pulse.note()
            time.sleep(0.1)
        return "done"

    assert on_all(watches, lambda member: member.on_rank_0(long_work)) == ["done"] * 2


def test_rank_0_that_lives_but_does_not_move_is_named(ranks):
    watches = ranks(2, 0.5)
    release = threading.Event()
    watch.pulse.begin("saving step 7")
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(watches[0].on_rank_0, release.wait)
        with pytest.raises(LostRankError, match=r"rank 0 .* has not moved .* saving step 7"):
            wait(watches[1])
        release.set()
        stuck.result()


def test_the_rank_whose_collective_does_not_give_up_is_the_one_that_is_named(ranks):
    watches = ranks(3)
    gloo = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 8000ms")
    found = on_all([watches[0], watches[2]], lambda member: member.explain(gloo))
    assert len({str(error) for error in found}) == 1
    assert "rank 1 on" in str(found[0]) and "has not moved" in str(found[0])


def test_an_error_of_this_rank_is_no_other_ranks_fault(ranks):
    assert ranks(2)[0].explain(RuntimeError("shapes do not match")) is None


def test_a_failing_rank_gives_the_others_its_reason(ranks):
    watches = ranks(2)
    watches[1].fail(ConfigError("the disk of this host is gone."))
    with pytest.raises(LostRankError, match=r"rank 1 on .*: the disk of this host is gone\."):
        watches[0].gather(0)


def test_ranks_that_do_not_come_are_named():
    hub = Watch(0, 3, TOKEN, timeout_s=0.3)
    hub.listen("127.0.0.1")
    try:
        with pytest.raises(LostRankError, match="ranks 1, 2 did not appear within"):
            hub.wait_for_all()
    finally:
        hub.close()


def test_a_stranger_without_the_token_is_not_a_rank(ranks):
    hub = Watch(0, 2, TOKEN, timeout_s=0.5)
    port = hub.listen("127.0.0.1")
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    strangers[0].sendall(b'{"kind": "hello", "token": "guess", "rank": 1}\n')
    strangers[1].sendall(b"x" * 100_000)
    strangers[2].sendall(b"GET / HTTP/1.1\r\n\r\n")
    try:
        with pytest.raises(LostRankError, match="rank 1 did not appear"):
            hub.wait_for_all()
    finally:
        hub.close()
        for stranger in strangers:
            stranger.close()


def test_a_stopped_rank_is_named_although_no_one_waits_for_it_here():
    """Ranks may be in a collective that does not give up, as on a GPU."""
    hub = Watch(0, 2, TOKEN, timeout_s=0.5)
    link = silent_member(hub.listen("127.0.0.1"), 1)
    try:
        hub.wait_for_all()
        deadline = time.monotonic() + 30
        while hub._verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "rank 1 on far (process 7) fell silent" in str(hub._verdict)
    finally:
        link.close()
        hub.close()
