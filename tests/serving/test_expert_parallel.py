"""Experts divided between owners: the bits of one process, on any division."""

import os
import signal
import time

import pytest
import torch
from mixed_model import write_mixed_model
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from thread_owners import ELSEWHERE, ThreadOwners, open_sharded

from moeyard.errors import ConfigError, DataError, ExpertReadError
from moeyard.kernels.cpu import library
from moeyard.moe.models.sampling import SamplingParams
from moeyard.moe.routers.hash import Hash
from moeyard.moe.routers.topk import TopK
from moeyard.moe.routes.recorder import recording
from moeyard.parallel.planning.placement import Placement
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.expert_parallel import connecting, link, question
from moeyard.serving.expert_parallel.local_owners import LocalOwners
from moeyard.serving.experts.tiers import disk
from moeyard.serving.loading import open_model

from small_model import slots, with_router, write_random_model


@pytest.fixture(autouse=True)
def owners(monkeypatch):
    """End what a test has opened."""
    opened = []

    def open_it(*args, **options):
        opened.append(open_sharded(*args, **options))
        return opened[-1]

    yield open_it
    for _, store, sharding in opened:
        sharding.close()
        store.close()


def some_ids(rows, batch=2):
    return torch.randint(0, 257, (batch, rows), generator=torch.Generator().manual_seed(rows))


def same_bits(expected, found, rows=(1, 40)):
    for count in rows:
        logits = expected(some_ids(count))
        for _ in range(2):  # a cold and a warm cache
            assert torch.equal(logits, found(some_ids(count)))
    prompt = some_ids(9, 1)
    answer = expected.generate(prompt, 8, temperature=0)
    assert torch.equal(found.generate(prompt, 8, temperature=0), answer)


@pytest.mark.parametrize(
    ("num_owners", "memory", "host", "dtype"),
    [
        (2, None, None, "float32"),
        (2, 3, None, "bfloat16"),
        (2, 6, ELSEWHERE, "bfloat16"),
        (3, "100%", None, "bfloat16"),
        (3, 1, ELSEWHERE, "float32"),
    ],
)
def test_logits_are_those_of_one_process_bit_for_bit(
    model_folder, owners, num_owners, memory, host, dtype
):
    resident, _ = open_model(model_folder, dtype)
    budget = slots(memory, dtype) if isinstance(memory, int) else memory
    where = {} if host is None else {"leaders_host": host}
    sharded, store, sharding = owners(model_folder, num_owners, dtype, budget, **where)
    same_bits(resident, sharded)
    each = memory if isinstance(memory, int) else 12 // num_owners
    assert store.num_slots == each and sharding.team.num_slots == each * (num_owners - 1)


def test_torch_computes_the_same_bits_on_owners(model_folder, owners, monkeypatch):
    monkeypatch.setattr(library, "_loaded", library.Library(None, "no C++ compiler"))
    for dtype in ("float32", "bfloat16"):
        alone, _ = open_model(model_folder, dtype, expert_memory="50%")
        sharded, _, _ = owners(model_folder, 3, dtype, slots(2, dtype))
        same_bits(alone, sharded, rows=(7,))


def test_experts_in_few_bits_and_of_several_widths(tmp_path, owners):
    folder = write_mixed_model(tmp_path)
    resident, _ = open_model(folder)
    sharded, _, _ = owners(folder, 2, None, "60%")
    same_bits(resident, sharded, rows=(3,))


def test_large_payloads_go_through_memory_that_grows(model_folder, owners):
    resident, _ = open_model(model_folder)
    sharded, _, sharding = owners(model_folder, 2)
    for rows in (1, 200, 20, 256):
        ids = some_ids(rows, batch=20 if rows > 100 else 1)
        assert torch.equal(resident(ids), sharded(ids))
    sent = sharding.team.metrics.owners[1].sent._value.get()
    assert sent > 20 * 256 * 24 * 4 / 2, "no payload was large"


@pytest.mark.parametrize(
    "router", [Hash(k=2), TopK(k=2, lookahead="previous_block")], ids=["hash", "pregated"]
)
def test_owners_read_ahead_what_a_router_chose_early(tmp_path, owners, router):
    write_random_model(tmp_path / "m", with_router(router))
    resident, _ = open_model(tmp_path / "m")
    hiring = ThreadOwners()
    sharded, _, _ = owners(tmp_path / "m", 2, None, slots(2), hiring=hiring)
    same_bits(resident, sharded, rows=(3,))
    layers = hiring.owners[1]._store.statistics.layers.values()
    assert sum(traffic.prefetch_issued for traffic in layers) > 0


def greedy(model, store, folder_prompts, max_tokens=12):
    """Return the texts and errors of requests that run together."""
    engine = Engine(
        model, lambda ids: "".join(chr(0x100 + i) for i in ids), store, prefill_chunk=16
    )
    for name, prompt in enumerate(folder_prompts):
        engine.add(
            GenerationRequest(
                str(name),
                tuple(prompt),
                max_tokens=max_tokens,
                sampling=SamplingParams(temperature=0),
            )
        )
    texts, errors = {}, {}
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] = texts.get(event.request_id, "") + event.text
            if event.error is not None:
                errors[event.request_id] = event.error
    return texts, errors


PROMPTS = [[65, 66, 67], list(range(40)), [200], list(range(100, 130))]


def test_several_requests_together_get_their_answers(model_folder, owners):
    expected = greedy(*open_model(model_folder, "bfloat16"), PROMPTS)
    sharded, store, _ = owners(model_folder, 3, "bfloat16", slots(2, "bfloat16"))
    assert greedy(sharded, store, PROMPTS) == expected and not expected[1]


def test_an_owner_lost_between_and_in_steps_is_replaced_and_nothing_is_seen(
    model_folder, owners, monkeypatch
):
    expected = greedy(*open_model(model_folder), PROMPTS)
    hiring = ThreadOwners()
    sharded, store, sharding = owners(model_folder, 3, None, slots(2), hiring=hiring)
    calls = 0
    lines = type(hiring.owners[1])._lines

    def die_now_and_then(owner, head, payload):
        nonlocal calls
        calls += 1
        if calls % 25 == 0:
            index = next(i for i, o in hiring.owners.items() if o is owner)
            hiring.kill(index)
        return lines(owner, head, payload)

    monkeypatch.setattr(type(hiring.owners[1]), "_lines", die_now_and_then)
    assert greedy(sharded, store, PROMPTS) == expected
    losses = [o.losses._value.get() for o in sharding.team.metrics.owners]
    assert hiring.starts >= 4 and sum(losses) == hiring.starts - 2


def test_requests_fail_with_a_sentence_while_an_owner_is_away_and_others_go_on(
    model_folder, owners, monkeypatch
):
    expected, _ = greedy(*open_model(model_folder), PROMPTS)
    hiring = ThreadOwners()
    sharded, store, _ = owners(model_folder, 2, None, slots(3), hiring=hiring)
    monkeypatch.setattr(link, "PATIENCE_S", 0.0)
    monkeypatch.setattr(question, "PATIENCE_S", 0.0)
    monkeypatch.setattr(link, "LONGEST_PAUSE_S", 0.05)
    is_away = True
    address = hiring.address

    def maybe(index, timeout_s):
        if is_away:
            raise link.LostPeerError("it is away")
        return address(index, timeout_s)

    monkeypatch.setattr(hiring, "address", maybe)
    hiring.kill(1)
    _, errors = greedy(sharded, store, PROMPTS)
    assert errors, "no request needed the lost owner"
    for error in errors.values():
        assert error.status == 503 and error.retry_after_s
        assert str(error).startswith("owner 1 of the experts is lost, and no other has taken its")
    is_away = False
    deadline = time.monotonic() + 30
    texts, errors = greedy(sharded, store, PROMPTS)
    while errors and time.monotonic() < deadline:
        time.sleep(0.05)
        texts, errors = greedy(sharded, store, PROMPTS)
    assert texts == expected and not errors


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_process_is_replaced_and_answers_are_right_again(
    model_folder, owners, monkeypatch
):
    monkeypatch.setattr(link, "PATIENCE_S", 120.0)  # a busy machine takes long to start a process
    resident, _ = open_model(model_folder, "bfloat16")
    hiring = LocalOwners()
    memory = slots(2, "bfloat16")
    sharded, _, sharding = owners(model_folder, 2, "bfloat16", memory, hiring=hiring)
    same_bits(resident, sharded, rows=(3,))
    first = hiring.pid(1)
    os.kill(first, signal.SIGKILL)
    same_bits(resident, sharded, rows=(3,))
    second = hiring.pid(1)
    assert second != first
    assert sharding.team.metrics.owners[1].losses._value.get() == 1
    # One that stands still is noticed by its silence, and ended.
    monkeypatch.setattr(link, "HANDSHAKE_S", 0.5)
    monkeypatch.setattr(connecting, "HANDSHAKE_S", 0.5)
    sharding.team._links[0]._channel.limit(0.5)
    os.kill(second, signal.SIGSTOP)
    same_bits(resident, sharded, rows=(3,))
    assert hiring.pid(1) not in (first, second)


@pytest.mark.usefixtures("reads_by_parts")
def test_an_expert_that_an_owner_cannot_read_ends_only_the_rows_that_chose_it(
    model_folder, owners, monkeypatch
):
    hiring = ThreadOwners()
    sharded, _, _ = owners(model_folder, 2, None, slots(3), hiring=hiring)
    resident, _ = open_model(model_folder)
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0.0)
    tier = hiring.owners[1]._store._filler._tier
    reads = tier.reads

    def fail(key, views):
        if key == (0, 5):
            raise_it = lambda: (_ for _ in ()).throw(OSError(5, "Input/output error"))  # noqa: E731
            return [raise_it]
        return reads(key, views)

    monkeypatch.setattr(tier, "reads", fail)
    ids = some_ids(12, 1)
    with torch.inference_mode(), pytest.raises(ExpertReadError) as raised:
        sharded(ids)
    chosen_NK = routes_of(resident, ids)[0]
    rows = (chosen_NK == 5).any(axis=1).nonzero()[0].tolist()
    assert raised.value.rows == tuple(rows) and 0 < len(rows) < 12
    monkeypatch.setattr(tier, "reads", reads)
    assert torch.equal(sharded(ids), resident(ids))


def routes_of(model, ids):
    """Return the choices of the first forward's MoE layers."""
    found = []
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args: found.append(args[1].numpy()))
        for _, layer in model.decoder.moe_layers()
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_experts_change_owners_between_steps_and_no_bit_changes(model_folder, owners):
    resident, _ = open_model(model_folder, "bfloat16")
    sharded, _, sharding = owners(
        model_folder, 2, "bfloat16", slots(4, "bfloat16"), rebalance_every=2
    )
    team = sharding.team
    before = {layer: p.owner_E for layer, p in team.ownership.placements.items()}
    prompt = torch.full((1, 4), 65)  # few experts, again and again
    expected = resident.generate(prompt, 20, temperature=0)
    deadline = time.monotonic() + 60
    while team._rebalancer.num_moved == 0 and time.monotonic() < deadline:
        assert torch.equal(sharded.generate(prompt, 20, temperature=0), expected)
    after = {layer: p.owner_E for layer, p in team.ownership.placements.items()}
    assert after != before and team._rebalancer.num_moved > 0
    same_bits(resident, sharded)
    text = metrics_of(team)
    assert 'moeyard_expert_owner_experts{owner="0"} 6.0' in text
    assert 'moeyard_expert_owner_experts{owner="1"} 6.0' in text


def metrics_of(team):
    registry = CollectorRegistry()
    registry.register(team.metrics)
    return generate_latest(registry).decode()


def test_metrics_add_up(model_folder, owners):
    sharded, _, sharding = owners(model_folder, 2, None, slots(3))
    ids = some_ids(30)
    for _ in range(3):
        sharded(ids)
    values = dict(
        line.rsplit(" ", 1) for line in metrics_of(sharding.team).splitlines() if line[0] != "#"
    )
    name = 'moeyard_expert_owner_{}{{owner="{}"}}'
    rows = [float(values[name.format("rows_total", owner)]) for owner in (0, 1)]
    assert sum(rows) == 3 * 2 * 60 * 2 and min(rows) > 0  # forwards, layers, rows, K
    # What goes there: 24 numbers for each row and 2 ids. What comes back: a line for each choice.
    assert float(values[name.format("received_bytes_total", 1)]) >= rows[1] * 24 * 4
    count = float(values[name.format("round_trip_seconds_count", 1)])
    assert count == 3 * 2 and float(values[name.format("cache_misses_total", 1)]) > 0
    assert values[name.format("up", 1)] == "1.0"


def test_a_plan_and_routes_say_who_has_which_expert(model_folder, owners, tmp_path):
    from moeyard.parallel.planning.plan_file import LayerPlan, PlanFile, write_plan

    resident, _ = open_model(model_folder)
    with recording(resident.decoder, tmp_path / "text.routes", written_by="test"):
        resident.generate(some_ids(20, 1), 30, temperature=0)
    sharded, _, sharding = owners(model_folder, 2, placement=tmp_path / "text.routes")
    same_bits(resident, sharded, rows=(3,))
    for placement in sharding.team.ownership.placements.values():
        assert placement.owner_E.count(0) == placement.owner_E.count(1) == 3

    from moeyard.moe.routes.identity import identity_of

    owner = (1, 0, 1, 0, 1, 1)
    layers = [LayerPlan(layer=i, owner=owner, holders=tuple((o,) for o in owner)) for i in (0, 2)]
    plan = PlanFile(
        architecture=identity_of(resident.config).architecture,
        num_experts=6,
        ranks=2,
        ranks_per_node=2,
        kind="hecate",
        layers=tuple(layers),
    )
    write_plan(tmp_path / "plan.json", plan)
    sharded, _, sharding = owners(model_folder, 2, placement=tmp_path / "plan.json")
    same_bits(resident, sharded, rows=(3,))
    assert sharding.team.ownership.placements[2] == Placement.owned(2, owner)


def test_owners_that_do_not_fit_are_refused(model_folder, owners, tmp_path):
    with pytest.raises(ConfigError) as raised:
        owners(model_folder, 7)
    assert str(raised.value) == ("expert-parallel is 7, but a layer has 6 experts; use 1 to 6.")
    write_random_model(tmp_path / "other", with_router(TopK(k=3)))
    other, _ = open_model(tmp_path / "other")
    with recording(other.decoder, tmp_path / "other.routes", written_by="test"):
        other(some_ids(4))
    with pytest.raises(DataError, match="belongs to another model"):
        owners(model_folder, 2, placement=tmp_path / "other.routes")
    with pytest.raises(ConfigError, match=r"bytes for each of 2 owners, but one expert takes 5760"):
        owners(model_folder, 2, None, "100B")
