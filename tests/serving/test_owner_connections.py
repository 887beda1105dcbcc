"""How leaders and owners meet: only with the secret, on one address, unharmed by strangers."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from thread_owners import ELSEWHERE

from moeyard.errors import ConfigError
from moeyard.serving.expert_parallel.channel import LostPeerError
from moeyard.serving.expert_parallel.connecting import Listener, connect, host_identity
from moeyard.serving.expert_parallel.facts import Facts
from moeyard.serving.expert_parallel.frames import ALIGNMENT, HEAD_BYTES, Head, Kind, offsets, pack
from moeyard.serving.expert_parallel.owner_spec import OwnerSpec
from moeyard.serving.expert_parallel.shared_channel import PREFIX

SECRET = b"a secret of the test"
FACTS = torch.frombuffer(bytearray(b'{"some": "facts"}'), dtype=torch.uint8)
HOSTS = pytest.mark.parametrize("host", [host_identity(), ELSEWHERE], ids=["unix", "tcp"])


def pair(host, secret=SECRET):
    """Return a leader's channel, an owner's and the facts that were told."""
    listener, accepted = Listener(SECRET, host), []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(FACTS)), daemon=True)
    thread.start()
    channel, facts = connect(listener.address, secret)
    thread.join()
    listener.close()
    return channel, accepted[0], facts


@HOSTS
def test_frames_arrive_whole_whatever_their_size(host):
    leader, owner, facts = pair(host)
    assert facts == b'{"some": "facts"}'
    generator, pool = torch.Generator().manual_seed(0), ThreadPoolExecutor(1)
    for size in (0, 1, 63, 5000, 40_000, 3_000_000, 40_000, 2_500_000, 10):
        first = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
        second = torch.arange(7, dtype=torch.int32)
        receiving = pool.submit(owner.receive)
        (_, at), total = offsets([size, 28])
        assert leader.send(Head(Kind.COMPUTE, size, 3), [first, second]) == total
        head, payload = receiving.result()
        assert (head.kind, head.number, head.layer, head.payload) == (Kind.COMPUTE, size, 3, total)
        assert torch.equal(payload[:size], first) and at % ALIGNMENT == 0
        assert torch.equal(payload[at : at + 28].view(torch.int32), second)
        assert size == 0 or payload.data_ptr() % ALIGNMENT == 0
    leader.close()
    with pytest.raises(LostPeerError, match="ended"):
        owner.receive()
    pool.shutdown()


@HOSTS
def test_a_leader_without_the_secret_is_turned_away_and_the_next_is_served(host):
    listener, accepted = Listener(SECRET, host), []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(FACTS)), daemon=True)
    thread.start()
    with pytest.raises(LostPeerError, match="does not know the secret"):
        connect(listener.address, b"another")  # it finds out itself: the owner proves first
    stranger = raw(listener.address)
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(HEAD_BYTES))
    stranger.close()
    forger = raw(listener.address)
    hello = Head(Kind.HELLO, payload=64)
    gap = bytes(PREFIX - HEAD_BYTES) if listener.address.name else b""
    forger.sendall(pack(hello) + gap + bytes(64))
    forger.recv(4096)
    forger.sendall(pack(hello._replace(kind=Kind.PROOF)) + gap + bytes(64))
    assert forger.recv(4096) == b"", "a forged proof was taken"
    forger.close()
    assert not accepted
    channel, _ = connect(listener.address, SECRET)
    thread.join()
    assert len(accepted) == 1
    channel.close()
    listener.close()


def raw(address):
    if address.name:
        found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        found.connect(f"\0{address.name}")
        return found
    return socket.create_connection((address.host, address.port))


def test_an_owner_of_another_host_listens_on_one_address_and_of_this_host_on_no_port():
    far, near = Listener(SECRET, ELSEWHERE), Listener(SECRET, host_identity())
    assert far.address.host == "127.0.0.1" and far.address.port
    assert far._socket.getsockname()[0] == "127.0.0.1"
    assert near.address.port == 0 and near._socket.family == socket.AF_UNIX
    far.close()
    near.close()


@HOSTS
def test_an_owner_that_does_not_answer_counts_as_lost(host):
    leader, owner, _ = pair(host)
    leader.limit(0.05)
    with pytest.raises(LostPeerError, match="has not answered in time"):
        leader.receive()
    leader.close()
    owner.close()


@HOSTS
def test_a_payload_that_is_too_large_is_refused(host):
    leader, owner, _ = pair(host)
    leader.send(Head(Kind.FACTS), [torch.zeros(10_000, dtype=torch.uint8)])
    with pytest.raises(LostPeerError, match="too large"):
        owner.receive(most_bytes=100)
    leader.close()
    owner.close()


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("architecture", "another model"),
        ("weights", "other files of the model"),
        ("dtype", "another dtype"),
        ("kernels", "other kernels"),
    ],
)
def test_an_owner_that_would_compute_other_bits_is_refused(field, words):
    own = Facts("a", "w", "bf16", "avx2", os.getpid(), 3)
    with pytest.raises(ConfigError, match=f"owner 2 of the experts has {words}"):
        own.check_same(own._replace(**{field: "x"}), 2)
    own.check_same(own._replace(pid=1, num_slots=9), 2)


def test_a_spec_does_not_show_its_secret():
    spec = OwnerSpec(1, "m", "bfloat16", 9, {2: [1]}, "lru", "auto", ("a",), 1, "h", "c0ffee")
    assert OwnerSpec.from_json(spec.to_json()) == spec
    assert "c0ffee" not in repr(spec) and "c0ffee" not in f"{spec}"
