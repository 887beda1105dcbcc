"""Arguments mean the same on our command line, on Ray's, and in YAML."""

import asyncio
from pathlib import Path

import pytest
import yaml
from click import ClickException
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from moeyard.cli import build_parser
from moeyard.serving import app as app_module
from moeyard.serving.api.gate import Gate
from moeyard.serving.app import Refused, build
from moeyard.serving.proxy_guard import CALLBACK, CALLBACK_VARIABLE
from moeyard.serving.serve_args import ServeArgs

LOCAL = Path(__file__).parent.parent.parent / "configs" / "serve" / "local.yaml"
TWO_MODELS = LOCAL.parent / "two_models.yaml"


def test_the_shipped_deployment_is_valid_for_ray_and_for_us(model_folder):
    values = yaml.safe_load(LOCAL.read_text())
    schema = ServeDeploySchema.model_validate(values)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    (deployment,) = application.deployments
    assert deployment.name == app_module.MoeyardServer.name and deployment.num_replicas == 2
    args = ServeArgs(**{**application.args, "model": str(model_folder)})
    defaults = ServeArgs(model=str(model_folder))
    assert args.max_queued_requests == defaults.max_queued_requests
    assert args.drain_timeout == defaults.drain_timeout
    assert f"{CALLBACK_VARIABLE}={CALLBACK}" in LOCAL.read_text()


def test_every_key_in_the_shipped_deployment_is_known():
    text = LOCAL.read_text().partition("args:")[2].partition("deployments:")[0]
    keys = {line.strip(" #").partition(":")[0] for line in text.splitlines() if ":" in line}
    assert keys <= set(ServeArgs.model_fields) and len(keys) > 8


def test_the_command_has_every_argument_with_the_same_default():
    parsed = vars(build_parser().parse_args(["serve", "folder"]))
    args = ServeArgs(model="folder")
    for name in set(ServeArgs.model_fields) - {"prefill_chunk", "api_key"}:
        assert parsed[name] == getattr(args, name), name


def test_ray_gets_what_the_arguments_say(model_folder):
    values = {"model": str(model_folder), "num_replicas": "3", "drain_timeout": 7}
    deployment = build(values)._bound_deployment
    assert deployment.num_replicas == 3  # Ray's command line hands strings over
    config = deployment._deployment_config
    assert config.graceful_shutdown_timeout_s == 7
    assert config.max_ongoing_requests > 8 + 64


def test_the_key_comes_from_the_environment_where_the_file_has_none(model_folder, monkeypatch):
    monkeypatch.setenv("MOEYARD_API_KEY", "of-the-environment")
    values = {"model": str(model_folder)}
    (args,) = build(values)._bound_deployment.init_args
    assert args.api_key == "of-the-environment"
    (args,) = build(values | {"api_key": "of-the-file"})._bound_deployment.init_args
    assert args.api_key == "of-the-file"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model is missing"),
        ({"model": "MODEL", "max_num_seq": 3}, "max_num_seq is not a known key; did you mean max"),
        ({"model": "MODEL", "num_replicas": 0}, "num_replicas: it is 0"),
        ({"model": "/nowhere"}, "/nowhere does not exist; give a Hugging Face model folder"),
        ({"model": "MODEL", "chat_template": "/nowhere"}, "chat-template /nowhere cannot be read"),
    ],
    ids=["missing", "misspelt", "zero", "folder", "template"],
)
def test_what_cannot_be_served_is_one_sentence_wherever_ray_shows_it(model_folder, values, message):
    if values.get("model") == "MODEL":
        values = {**values, "model": str(model_folder)}
    with pytest.raises(Refused) as caught:
        build(values)
    # Ray's controller prints the first kind without a traceback, its command line the second.
    assert isinstance(caught.value, RayServeException) and isinstance(caught.value, ClickException)
    assert message in str(caught.value) == caught.value.format_message()
    assert "\n" not in str(caught.value)


def test_two_models_in_one_file_have_separate_prefixes_and_known_arguments(model_folder):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(TWO_MODELS.read_text()))
    one, two = schema.applications
    assert (one.route_prefix, two.route_prefix) == ("/one", "/two") and one.name != two.name
    for application in (one, two):
        values = {**application.args, "model": str(model_folder)}
        assert build(values)._bound_deployment.name == application.deployments[0].name


@pytest.mark.parametrize("path", ["/health", "/two/health", "/two/v1/models", "/health/two"])
def test_behind_a_prefix_health_needs_no_key_and_the_rest_does(path):
    sent = []

    async def app(scope, receive, send):
        sent.append({"status": 200})

    async def send(message):
        sent.append(message)

    root = "/two" if path.startswith("/two") else ""
    scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": []}
    asyncio.run(Gate(app, "secret")(scope, None, send))
    assert sent[0]["status"] == (200 if path.endswith("/health") else 401)
