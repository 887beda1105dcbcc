"""The budget for keys and values: what a server decides, says and refuses."""

import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.kv_blocks import BLOCK, bytes_per_block
from moeyard.serving.engine.kv_memory import most_blocks
from moeyard.serving.planning.budget import Demand, demand_of_server
from moeyard.serving.planning.kv import describe_kv, free_kv_bytes
from moeyard.serving.planning.sizes import kv_specs, sizes_of
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server
from moeyard.serving.server_budgets import with_budgets

from http_calls import call, check_error, chunks


@pytest.fixture(scope="module")
def folder(model_folder):
    return ModelFolder(model_folder)


def block_bytes(folder):
    return bytes_per_block(kv_specs(folder, torch.float32))


def test_a_machine_with_room_gives_what_a_full_batch_can_use(folder, model_folder):
    args, _ = with_budgets(ServeArgs(model=str(model_folder), max_num_seqs=3, max_model_len=100))
    most = most_blocks(3, 100)
    assert most * BLOCK >= 3 * 100
    assert args.kv_memory == f"{most * block_bytes(folder)}B"
    assert with_budgets(args)[0] == args


def test_a_share_is_one_of_a_full_batch(folder, model_folder):
    args, _ = with_budgets(ServeArgs(model=str(model_folder), kv_memory="50%"))
    assert args.kv_memory == f"{most_blocks(8, 256) * block_bytes(folder) // 2}B"


def test_what_is_free_next_to_the_weights_is_the_bound(folder):
    sizes = sizes_of(folder, torch.float32)
    weights = sizes.dense_bytes + sizes.all_experts_bytes
    each = block_bytes(folder)

    def blocks_of(replicas, spare_blocks):
        demand = Demand(max_num_seqs=100, num_replicas=replicas, other_bytes=0)
        available = replicas * (weights + spare_blocks * each)
        return free_kv_bytes(folder, torch.float32, None, demand, int(available / 0.95) + 64) / each

    assert blocks_of(1, 200) == blocks_of(2, 200) == 200
    assert blocks_of(1, 10**6) == most_blocks(100, 256)
    assert blocks_of(1, -50) == 1024 / BLOCK


@pytest.mark.parametrize(
    ("budget", "message"),
    [("1B", "kv-memory is 1 bytes, but one block of 16"), ("much", "kv-memory is 'much'; write")],
)
def test_a_budget_that_makes_no_sense_is_one_sentence(model_folder, budget, message):
    with pytest.raises(ConfigError, match=message):
        with_budgets(ServeArgs(model=str(model_folder), kv_memory=budget))


def test_the_start_says_what_a_budget_holds(folder):
    demand = demand_of_server(8, None, 2, 0)
    small = describe_kv(folder, torch.float32, 4 * block_bytes(folder), demand)
    assert "in each replica: 64 tokens of all requests together" in small
    assert "A full batch of the longest texts would take" in small
    assert "a request may have 64 tokens and not 256" in small
    whole = describe_kv(folder, torch.float32, 1 << 40, Demand(max_num_seqs=8))
    assert f"{most_blocks(8, 256) * BLOCK:,} tokens" in whole and "would take" not in whole


@pytest.fixture(scope="module")
def server(model_folder):
    running = Server(ServeArgs(model=str(model_folder), kv_memory="12KiB"))
    yield running
    running.close()


def complete(server, **changes):
    body = {"model": "small", "prompt": "a prompt of more than one block", "max_tokens": 4}
    return call(server, "POST", "/v1/completions", json={**body, "temperature": 0, **changes})


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_usage_has_the_tokens_that_were_taken_over(server):
    first, second = complete(server).json(), complete(server).json()
    assert (cached(first), cached(second)) == (0, 16)
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    *_, last = chunks(complete(server, stream=True, stream_options={"include_usage": True}))
    assert cached(last) == 16
    salted = complete(server, cache_salt="mine", n=2).json()
    assert cached(salted) == 0 and cached(complete(server, cache_salt="mine").json()) == 16
    metrics = call(server, "GET", "/metrics").text
    assert "moeyard_prefix_cache_hits_total" in metrics
    assert 'moeyard_kv_blocks{state="used"} 0.0' in metrics


def test_a_small_budget_is_the_limit_that_clients_see(server):
    found = call(server, "GET", "/v1/models").json()["data"][0]
    assert found["max_model_len"] == 64
    check_error(complete(server, max_tokens=50), 400, "which is what kv-memory holds")


@pytest.mark.parametrize(
    "changes", [{"cache_salt": ""}, {"cache_salt": 3}, {"priority": 1.5}, {"priority": "high"}]
)
def test_wrong_salts_and_priorities_are_refused(server, changes):
    check_error(complete(server, **changes), 400, next(iter(changes)))


def test_reuse_can_be_switched_off(model_folder):
    running = Server(ServeArgs(model=str(model_folder), no_prefix_reuse=True))
    assert [cached(complete(running).json()) for _ in range(2)] == [0, 0]
    running.close()
