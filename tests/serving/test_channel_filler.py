"""Reads of channels that are interrupted or fail: nothing writes later, and what came counts."""

from threading import Event

import pytest
import torch

from moeyard.errors import ExpertReadError
from moeyard.kernels.trust import cpp
from moeyard.moe.folders.channel_reads import ChannelReads
from moeyard.moe.folders.convert import convert
from moeyard.serving.experts import offloaded
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.loading import load, open_model

from small_model import CONFIG, write_random_model

MOE = CONFIG.moe.model_copy(update={"activation": "reglu"})
WIDE = CONFIG.model_copy(update={"d_model": 264, "moe": MOE})
"""A group is one channel, so an expert has many runs."""
TEXT, OTHER = torch.tensor([[1, 2, 3]]), torch.tensor([[70]])
EXACT = StoreOptions(sparsity="exact")
needs_cpp = pytest.mark.skipif(cpp().functions is None, reason="torch needs all channels at once")
GIVE_UP_S = 10.0
"""For a thread that would otherwise hold up the tests."""


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    home = tmp_path_factory.mktemp("filler")
    write_random_model(home / "plain", WIDE)
    convert(home / "plain", home / "laid", by_channel=True)
    return home / "laid"


@pytest.fixture
def opened(laid):
    model, store = open_model(laid, "float32", expert_memory="100%", options=EXACT)
    store.channels.gap = 0
    yield model, store
    store.close()


@pytest.fixture
def came(monkeypatch):
    """The bytes of the runs that came, in a list."""
    found, read = [], ChannelReads.read

    def note(self, key, run, views):
        read(self, key, run, views)
        found.append(self.num_bytes(run))

    monkeypatch.setattr(ChannelReads, "read", note)
    return found


def counted(store):
    return sum(layer.channel_bytes for layer in store.statistics.layers.values())


def test_channels_that_an_interrupt_left_running_are_waited_for(opened, laid, monkeypatch):
    """They could write into the slot of another expert, to which that slot was given since."""
    (model, store), go, left = opened, Event(), []
    read, wait = ChannelReads.read, store._reads.wait_for_all

    def held(self, *arguments):
        go.wait(GIVE_UP_S)
        read(self, *arguments)

    def interrupted(reads):
        of_channels = [one for one in reads if one.slot < 0]
        if of_channels and not left:
            left.extend(of_channels)
            raise KeyboardInterrupt
        if any(one in reads for one in left):
            go.set()
        wait(reads)

    monkeypatch.setattr(ChannelReads, "read", held)
    monkeypatch.setattr(store._reads, "wait_for_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(TEXT)
    assert left and not all(one.is_done for one in left)
    with torch.inference_mode():
        assert list(store.channels.waves(0, [], None, None)) == []
    assert all(one.is_done for one in left)
    resident = load(laid)
    assert torch.equal(model(OTHER), resident(OTHER)) and torch.equal(model(TEXT), resident(TEXT))


@needs_cpp
def test_channels_that_came_count_although_others_failed(opened, laid, came, monkeypatch):
    """Also those of the same expert; none is read twice."""
    (model, store), asked, read = opened, [], ChannelReads.read

    def fails(self, key, run, views):
        asked.append(key)
        if key == asked[0] and asked.count(key) > 1:
            raise OSError("no")
        read(self, key, run, views)

    with monkeypatch.context() as broken:
        broken.setattr(ChannelReads, "read", fails)
        broken.setattr("moeyard.serving.experts.tiers.disk.RETRY_PAUSE_S", 0)
        with pytest.raises(ExpertReadError, match=r"could not be read \(no\)"):
            model(TEXT)
    assert came and counted(store) == sum(came)
    assert torch.equal(model(TEXT), load(laid)(TEXT))
    fresh, untouched = open_model(laid, "float32", expert_memory="100%", options=EXACT)
    untouched.channels.gap = 0
    fresh(TEXT)
    assert counted(store) == counted(untouched)
    untouched.close()


@needs_cpp
def test_channels_that_came_while_computing_failed_count(opened, came, monkeypatch):
    """Those of some experts are read while others, which lack nothing, are computed."""
    model, store = opened
    model(TEXT)
    before = len(came)

    class Fails:
        def add(self, *_, **__):
            raise RuntimeError("computing failed")

    with monkeypatch.context() as broken:
        broken.setattr(offloaded, "start_waves", lambda *_: Fails())
        with pytest.raises(RuntimeError, match="computing failed"):
            model(torch.cat((TEXT, OTHER), dim=1))
    assert len(came) > before and counted(store) == sum(came)
