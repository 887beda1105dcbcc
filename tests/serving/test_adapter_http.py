"""Adapters over HTTP: named by requests, listed, loaded and unloaded while requests run."""

import asyncio

import pytest

from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server, check_model

from adapter_folders import everything, fused_experts, write_adapter
from http_calls import KEY, call, check_error, chunks, client_of
from small_model import CONFIG

BODY = {"model": "small", "prompt": "ab", "max_tokens": 8, "temperature": 0}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return (
        write_adapter(root / "a", everything(CONFIG)),
        write_adapter(root / "b", everything(CONFIG, seed="b")),
    )


@pytest.fixture
def server(model_folder, folders):
    args = ServeArgs(
        model=str(model_folder),
        api_key="secret",
        expert_memory="50%",
        lora=[f"a={folders[0]}"],
        allow_lora_updates=True,
    )
    check_model(args)
    running = Server(args)
    yield running
    running.close()


def complete(server, **changes):
    return call(server, "POST", "/v1/completions", json={**BODY, **changes})


def test_a_requests_model_chooses_the_adapter(server):
    base, tuned = complete(server).json(), complete(server, model="a").json()
    assert base["model"] == "small" and tuned["model"] == "a"
    assert base["choices"][0]["text"] != tuned["choices"][0]["text"]
    streamed = chunks(complete(server, model="a", stream=True))
    text = "".join(chunk["choices"][0]["text"] for chunk in streamed)
    assert text == tuned["choices"][0]["text"] and {c["model"] for c in streamed} == {"a"}
    error = check_error(complete(server, model="b"), 404, "this server has 'small', 'a'")
    assert error["code"] == "model_not_found"


def test_models_lists_the_model_and_its_adapters(server):
    found = call(server, "GET", "/v1/models").json()["data"]
    assert [(m["id"], m.get("parent")) for m in found] == [("small", None), ("a", "small")]
    assert call(server, "GET", "/v1/models/a").json() == found[1]
    check_error(call(server, "GET", "/v1/models/c"), 404, "does not exist")


def test_adapters_come_and_go_while_a_request_runs(server, folders):
    async def go():
        async with client_of(server.app()) as client:

            async def post(path, **body):
                return await client.post(path, json=body, headers=KEY)

            alone = (
                await post("/v1/completions", **BODY | {"model": "a", "max_tokens": 100})
            ).json()
            running = asyncio.create_task(
                post("/v1/completions", **BODY | {"model": "a", "max_tokens": 100})
            )
            while not server.thread.engine.has_work:
                await asyncio.sleep(0.001)
            gone = await post(UNLOAD, lora_name="a")
            new = await post(LOAD, lora_name="a", lora_path=str(folders[1]))
            assert not running.done(), "the request ended before its adapter was replaced"
            assert gone.status_code == new.status_code == 200 and "Success" in new.text
            other = await post("/v1/completions", **BODY | {"model": "a", "max_tokens": 100})
            return alone, (await running).json(), other.json()

    alone, finished, other = asyncio.run(go())
    assert finished["choices"] == alone["choices"] != other["choices"]


def test_wrong_updates_are_refused_and_change_nothing(server, folders, tmp_path):
    def load(name, path):
        return call(server, "POST", LOAD, json={"lora_name": name, "lora_path": str(path)})

    check_error(load("a", folders[1]), 400, "is there already")
    check_error(load("small", folders[1]), 400, "which is the model")
    check_error(load("c", tmp_path / "none"), 400, "is no folder")
    wrong = write_adapter(tmp_path / "wrong", fused_experts(CONFIG, 0, 3))
    assert check_error(load("c", wrong), 400, "ask for [24, 24]")["param"] == "lora_path"
    check_error(call(server, "POST", LOAD, json={"lora_name": "c"}), 400, "lora_path is None")
    check_error(call(server, "POST", UNLOAD, json={"lora_name": "c"}), 404, "not loaded")
    check_error(call(server, "POST", UNLOAD, json={"lora_name": "a"}, headers={}), 401, "key")
    assert [m["id"] for m in call(server, "GET", "/v1/models").json()["data"]] == ["small", "a"]


def test_updates_are_off_unless_allowed(model_folder):
    plain = Server(ServeArgs(model=str(model_folder), api_key="secret"))
    try:
        check_error(call(plain, "POST", LOAD, json={}), 404, "not offered")
    finally:
        plain.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": ["small={0}"]}, "which is the model"),
        ({"lora": ["a={0}", "a={1}"]}, "is there already"),
        ({"lora": ["a={0}/none"]}, "is no folder"),
        ({"allow_lora_updates": True}, "api-key is not set"),
        ({"allow_lora_updates": True, "api_key": "x", "num_replicas": 2}, "there are 2 replicas"),
    ],
)
def test_a_server_refuses_adapters_before_it_starts(model_folder, folders, changes, says):
    given = {"lora": [], **changes}
    given["lora"] = [text.format(*folders) for text in given["lora"]]
    args = ServeArgs(model=str(model_folder), **given)
    with pytest.raises(ValueError, match=says):
        check_model(args)


def test_an_adapter_needs_a_name_and_a_folder():
    with pytest.raises(ValueError, match="use NAME=FOLDER"):
        ServeArgs(model="m", lora="a=b,c")
    assert ServeArgs(model="m", lora="a=b,c=d").lora == ["a=b", "c=d"]
