"""Strangers that connect to an owner of experts and say nothing keep no leader out."""

import select
import threading

import pytest
from test_owner_connections import FACTS, HOSTS, SECRET, raw

from moeyard.serving.expert_parallel import connecting, lobby
from moeyard.serving.expert_parallel.channel import LostPeerError
from moeyard.serving.expert_parallel.connecting import Listener, connect
from moeyard.serving.expert_parallel.frames import HEAD_BYTES, Head, Kind, pack
from moeyard.serving.expert_parallel.shared_channel import PREFIX


@pytest.fixture
def listen():
    """Return a function that starts a listener, whose leaders come into a list."""
    started = []

    def start(host):
        listener, accepted = Listener(SECRET, host), []
        thread = threading.Thread(target=lambda: accepted.append(listener.accept(FACTS)))
        thread.start()
        started.append((listener, accepted, thread))
        return listener.address, accepted, thread

    yield start
    for listener, accepted, thread in started:
        thread.join(10)
        assert not thread.is_alive()
        listener.close()
        for channel in accepted:
            channel.close()


def hello(address):
    """Return the bytes of a handshake's first frame."""
    gap = bytes(PREFIX - HEAD_BYTES) if address.name else b""
    return pack(Head(Kind.HELLO, payload=64)) + gap + bytes(64)


@HOSTS
def test_a_leader_comes_in_while_strangers_are_silent(listen, host, monkeypatch):
    monkeypatch.setattr(lobby, "HANDSHAKE_S", 600.0)
    monkeypatch.setattr(connecting, "HANDSHAKE_S", 10.0)  # the leader's patience
    address, accepted, thread = listen(host)
    silent = [raw(address) for _ in range(6)]
    silent[1].sendall(hello(address))
    assert silent[1].recv(4096), "the second one gets a challenge, and does not answer it"
    if not address.name:
        silent[2].sendall(hello(address)[:20])  # a part of a frame
    channel, facts = connect(address, SECRET)
    thread.join(10)
    assert facts == b'{"some": "facts"}' and len(accepted) == 1
    assert all(stranger.recv(4096) == b"" for stranger in silent), "they are turned away then"
    channel.close()


@HOSTS
def test_the_oldest_stranger_gives_way_when_there_are_too_many(listen, host, monkeypatch):
    monkeypatch.setattr(lobby, "HANDSHAKE_S", 600.0)
    monkeypatch.setattr(lobby, "MOST_GUESTS", 3)
    address, accepted, thread = listen(host)
    first, *others = [raw(address) for _ in range(4)]
    assert first.recv(4096) == b""
    assert not accepted
    others[0].sendall(hello(address))
    assert others[0].recv(4096), "the second one is still asked"
    channel, _ = connect(address, SECRET)
    thread.join(10)
    assert len(accepted) == 1
    channel.close()


@HOSTS
def test_a_stranger_that_takes_too_long_is_turned_away(listen, host, monkeypatch):
    monkeypatch.setattr(lobby, "HANDSHAKE_S", 0.1)
    address, _, _ = listen(host)
    stranger = raw(address)
    assert stranger.recv(4096) == b""
    monkeypatch.setattr(lobby, "HANDSHAKE_S", 10.0)
    connect(address, SECRET)[0].close()


@HOSTS
def test_closing_a_listener_ends_a_wait_with_strangers(host):
    listener, ended = Listener(SECRET, host), []

    def wait():
        try:
            listener.accept(FACTS)
        except OSError as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    stranger = raw(listener.address)
    stranger.sendall(hello(listener.address))
    assert stranger.recv(4096)
    listener.close()
    thread.join(10)
    assert len(ended) == 1 and not isinstance(ended[0], LostPeerError)
    assert stranger.recv(4096) == b""


@HOSTS
def test_a_listener_that_is_closed_at_any_moment_ends_a_wait_with_an_oserror(host, monkeypatch):
    """Here it is closed between two looks at it."""
    listener = Listener(SECRET, host)
    poll = select.poll

    def closed_first():
        listener.close()
        return poll()

    monkeypatch.setattr(select, "poll", closed_first)
    with pytest.raises(OSError, match=r"Bad file descriptor|Invalid argument"):
        listener.accept(FACTS)
