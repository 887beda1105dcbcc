"""A server that follows a run: its weights are those of one whole version, whatever happens."""

import asyncio
import random
import re
import shutil

import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.thread import EngineThread
from moeyard.serving.live.open import follow
from moeyard.serving.loading import open_model
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server, check_model

from http_calls import client_of
from live_runs import RandomRun, Receiver, are_equal, copied, decoder_of
from small_model import CONFIG, write_decoder, write_random_model
from test_engine import latin, request

MEMORY = pytest.mark.parametrize("memory", [None, "25%"], ids=["resident", "offloaded"])


@pytest.fixture
def run(model_folder, tmp_path):
    return RandomRun(decoder_of(model_folder), tmp_path / "updates")


def rounded(units):
    """Return units as a bf16 server has them: routers stay in fp32."""
    return {
        key: tensors if ".mlp.gate." in str(key) else [t.bfloat16() for t in tensors]
        for key, tensors in units.items()
    }


@pytest.mark.parametrize(
    ("memory", "dtype"),
    [
        pytest.param(None, None, marks=pytest.mark.slow, id="resident"),
        pytest.param("25%", None, marks=pytest.mark.slow, id="offloaded"),
        pytest.param(None, "bf16", id="resident bf16"),
        pytest.param("25%", "bf16", id="offloaded bf16"),
    ],
)
def test_any_number_of_updates_is_a_full_copy_bit_for_bit(model_folder, run, memory, dtype):
    receiver = Receiver(model_folder, run.updates, memory, dtype)
    for _ in range(4):
        for _ in range(run.draw.randint(1, 3)):  # a receiver may be slower than the publisher
            run.next()
        receiver.say([1, 2, 3], 3)  # some experts are in memory
        receiver.follower.look()
        assert receiver.version == run.version
        expected = copied(run.units())
        assert are_equal(receiver.weights(), rounded(expected) if dtype else expected)


def test_a_model_says_after_an_update_what_a_new_one_says(model_folder, run, tmp_path):
    from live_runs import DecoderWeights  # noqa: F401

    receiver = Receiver(model_folder, run.updates)
    old = receiver.say([5, 6, 7])
    run.change(list(run.units()))
    run.publish(None)
    receiver.follower.look()
    write_decoder(tmp_path / "new", run.decoder, eos_id=256)
    fresh, _ = open_model(tmp_path / "new")
    ids = fresh.generate(torch.tensor([[5, 6, 7]]), 12, temperature=0)[0, 3:].tolist()
    new = receiver.say([5, 6, 7])
    assert new == latin(ids[: ids.index(256)] if 256 in ids else ids) != old


def test_lost_repeated_and_reordered_updates_do_no_harm(model_folder, run, tmp_path):
    for _ in range(9):  # full: 1, 5, 9
        run.next()
    states = {}
    replay = RandomRun(decoder_of(model_folder), tmp_path / "again")
    for version in range(1, 10):
        replay.next()
        states[version] = copied(replay.units())
    there = {version: run.updates.of(version) for version in range(1, 10)}
    for seed in range(2):
        draw = random.Random(seed)
        lossy = tmp_path / f"lossy-{seed}"
        lossy.mkdir()
        receiver = Receiver(model_folder, type(run.updates)(lossy))
        arrivals = [version for version in there if draw.random() < 0.8] * 2
        draw.shuffle(arrivals)
        seen = 0
        for version in arrivals:
            target = receiver.follower._folder.of(version)
            shutil.copytree(there[version], target, dirs_exist_ok=True)
            receiver.follower.look()
            assert receiver.version >= seen
            seen = receiver.version
            if seen:
                assert are_equal(receiver.weights(), states[seen])
        full = max(v for v in set(arrivals) if v % 4 == 1)
        assert seen >= full


@MEMORY
def test_a_damaged_update_leaves_the_old_weights_and_the_next_good_one_is_taken(
    model_folder, run, memory, caplog
):
    receiver = Receiver(model_folder, run.updates, memory)
    run.next()
    receiver.follower.look()
    before = receiver.weights()
    run.next()
    path = run.updates.of(2) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 4]) + whole[-6:])
    for _ in range(3):
        receiver.follower.look()
    assert receiver.version == 1 and are_equal(receiver.weights(), before)
    refused = [r.message for r in caplog.records if "other bytes" in r.message]
    assert len(refused) == 1, "logged once"
    assert run.updates.wants_full()
    run.next()  # its base is the damaged one
    receiver.follower.look()
    assert receiver.version == 1 and are_equal(receiver.weights(), before)
    run.change()
    run.publish(None)
    receiver.follower.look()
    assert receiver.version == 4 and are_equal(receiver.weights(), run.units())
    path.write_bytes(whole)
    receiver.follower.look()
    assert receiver.version == 4, "old ones are never taken"


def test_a_version_whose_files_are_repaired_is_tried_again(model_folder, run):
    receiver = Receiver(model_folder, run.updates)
    run.next()
    path = run.updates.of(1) / "update.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    receiver.follower.look()
    assert receiver.version == 0
    path.write_text(whole)
    receiver.follower.look()
    assert receiver.version == 1 and are_equal(receiver.weights(), run.units())


def test_updates_of_another_model_or_run_are_refused_in_one_sentence(
    model_folder, run, tmp_path, caplog
):
    other = CONFIG.model_copy(update={"num_kv_heads": 2})
    write_random_model(tmp_path / "other", other)
    stranger = RandomRun(decoder_of(tmp_path / "other"), run.updates.path)
    stranger.publish(None)
    receiver = Receiver(model_folder, run.updates)
    receiver.follower.look()
    assert receiver.version == 0
    assert re.search(r"version 1 is of another model \(architecture \w+, this server", caplog.text)
    run.version = 1
    run.publish(None)
    receiver.follower.look()
    assert receiver.version == 2
    run.publish(None, run="another")
    receiver.follower.look()
    assert receiver.version == 2
    assert "version 3 is of run another, and this server follows run r; start" in caplog.text


def test_a_full_snapshot_must_have_every_unit(model_folder, run, caplog):
    receiver = Receiver(model_folder, run.updates)
    units = list(run.units())
    run.version = 0
    keys = [key for key in units if key != (2, 3)]
    run.publish(keys)  # with no base, so it says that it is full
    receiver.follower.look()
    assert receiver.version == 0
    assert "version 1 is a full snapshot without expert 3 of layer 2;" in caplog.text


def test_experts_alone_leave_the_rest_as_it_is(model_folder, run):
    receiver = Receiver(model_folder, run.updates)
    before = receiver.weights()
    run.change(list(run.units()))
    run.publish([key for key in run.units() if not isinstance(key, str)], what="experts")
    receiver.follower.look()
    assert receiver.version == 1
    expected = {k: before[k] if isinstance(k, str) else v for k, v in run.units().items()}
    assert are_equal(receiver.weights(), expected)


@MEMORY
def test_every_step_is_wholly_old_or_wholly_new_and_kept_keys_stay_old(model_folder, run, memory):
    """A request that is running when weights change: each token is that of one version, over keys
    and values of the version at their time."""
    prompt, swap_after = [7, 8, 9, 10], 5
    old, _ = open_model(model_folder)
    run.change(list(run.units()))
    run.publish(None)
    receiver = Receiver(model_folder, run.updates, memory)
    receiver.engine.add(request("a", prompt, max_tokens=12, ignore_eos=True))
    events = []
    while receiver.engine.has_work:
        if len(events) == swap_after:
            receiver.follower.look()
        events += receiver.engine.step()
    expected = greedy(old.decoder, run.decoder, prompt, swap_after, 12)
    assert "".join(event.text for event in events) == latin(expected)
    assert expected != greedy(old.decoder, old.decoder, prompt, swap_after, 12)
    assert expected != greedy(run.decoder, run.decoder, prompt, swap_after, 12)


@torch.inference_mode()
def greedy(old, new, prompt, swap_after, count):
    """Return greedy tokens of ``old``, from the step ``swap_after`` on of ``new``, in one cache."""
    cache, ids, found = old.new_cache(), prompt, []
    for step in range(count):
        decoder = old if step < swap_after else new
        output = decoder(batch_of([torch.tensor(ids)], [cache]))
        ids = [int(decoder.logits(output.hidden_TD[-1:]).argmax())]
        found += ids
    return found


@MEMORY
def test_keys_and_values_of_old_weights_are_never_taken_over(model_folder, run, memory):
    long = list(range(1, 81))
    receiver = Receiver(model_folder, run.updates, memory)
    engine = receiver.engine
    receiver.say(long, 2)
    hits = engine.metrics.kv.hits
    receiver.say(long, 2)
    assert hits._value.get() == 64, "whole blocks of the prompt, but the last token"
    # Two answers to one prompt: the second waits for the first, which reads across the change.
    engine._scheduler._prompt_rows = 32
    other = [200, *long]
    twins = [request(f"twin-{i}", other, group="g", max_tokens=20) for i in range(2)]
    for twin in twins:
        engine.add(twin)
    engine.step()
    run.change(list(run.units()))
    run.publish(None)
    receiver.follower.look()
    while engine.has_work:
        engine.step()
    before = hits._value.get()
    fresh = Receiver(model_folder, run.updates, memory)
    fresh.follower.look()
    for prompt in (other, long, [*other, 9], [*long, 9]):
        assert receiver.say(prompt) == fresh.say(prompt)
    assert hits._value.get() - before == 2 * 80, "of prompts that were read since the change"


def test_experts_that_were_in_memory_come_back_by_themselves(model_folder, run):
    receiver = Receiver(model_folder, run.updates, "50%")
    receiver.say(list(range(30)), 3)
    store = receiver.store
    here = store.counts().resident
    assert here == store.num_slots
    run.change(list(run.units()))
    run.publish(None)
    receiver.follower.look()
    store._reads.wait_for_all(store._slots.all_filling())
    store.missing(0, [])
    assert store.counts().resident == here and store.counts().announced == 0


def test_a_server_follows_and_says_which_version_it_has(model_folder, run):
    run.next()
    run.next()

    async def ask():
        server = Server(ServeArgs(model=str(model_folder), follow=str(run.updates.path)))
        try:
            async with client_of(server.app()) as client:
                models = (await client.get("/v1/models")).json()["data"]
                assert models[0]["weights"] == {"version": 2, "step": 20}
                run.next()
                for _ in range(200):
                    text = (await client.get("/metrics")).text
                    if "moeyard_live_version 3.0" in text:
                        break
                    await asyncio.sleep(0.05)
                values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
                assert values["moeyard_live_step"] == "30.0"
                assert values["moeyard_live_versions_behind"] == "0.0"
                assert 0 <= float(values["moeyard_live_staleness_seconds"]) < 60
                assert values['moeyard_live_updates_total{result="applied"}'] == "3.0"
                body = {"model": model_folder.name, "prompt": "a", "max_tokens": 2}
                assert (await client.post("/v1/completions", json=body)).status_code == 200
        finally:
            server.close()

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_parallel": 2}, "expert-parallel is set, which follow does not offer"),
        ({"host_memory": "1GiB"}, "host-memory is set, which follow does not offer"),
        ({"record_routes": "r"}, "record-routes is set, which follow does not offer"),
        ({"follow": __file__}, "which is not a folder; give the run's publish.folder."),
    ],
)
def test_what_would_keep_old_weights_is_refused(model_folder, options, message):
    values = {"model": str(model_folder), "expert_memory": "50%", "follow": "updates"} | options
    with pytest.raises(ConfigError) as raised:
        check_model(ServeArgs(**values))
    assert message in str(raised.value)


def test_an_engine_that_ends_ends_the_follower(model_folder, run):
    model, store = open_model(model_folder)
    thread = EngineThread(Engine(model, latin, store))
    run.next()
    follower = follow(str(model_folder), str(run.updates.path), model.decoder, thread)
    assert follower.metrics.current.version == 1
    thread.stop()
    run.next()
    follower._thread.join(timeout=20)
    assert not follower._thread.is_alive() and follower.metrics.current.version == 1
