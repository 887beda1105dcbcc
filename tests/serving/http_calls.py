"""Call an ASGI application as an HTTP client would, without a network."""

import asyncio
import json

import httpx

KEY = {"Authorization": "Bearer secret"}


def client_of(app) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def call(server, method, path, headers=KEY, **options) -> httpx.Response:
    async def go():
        async with client_of(server.app()) as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(go())


def events(response) -> list[str]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def chunks(response) -> list[dict]:
    *found, done = events(response)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in found]


def check_error(response, status, message) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"] and "\n" not in error["message"]
    return error
