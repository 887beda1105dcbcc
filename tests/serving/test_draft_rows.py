"""Drafted rows have the bits of single steps, in every kind of attention, and over HTTP."""

import pytest
import torch
from decode_steps import prompts
from drafters import draft_counts
from test_decode_families import FAMILIES, decoder

from moeyard.kernels.cpu import library
from moeyard.moe.config.attention import LatentConfig
from moeyard.moe.drafts import speculation
from moeyard.moe.models.draft_rows import TextRows, run_rows
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import call, chunks

LATENT = {"qk_norm": None, "latent": LatentConfig(kv_rank=16, nope_dim=8, rope_dim=4, v_dim=6)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "latent"])
def test_rows_after_one_another_have_the_bits_of_single_steps(family, dtype):
    if library.load().functions is None and dtype == torch.float32:
        pytest.skip("torch's fp32 products depend on the number of rows")
    model = decoder(LATENT if family == "latent" else FAMILIES[family], dtype=dtype)
    (ids, other), start = prompts(40, 30), 20

    def read(*pieces):
        """Read ids in forwards of a first row and drafted ones, next to another text's rows."""
        caches, found, at, beside = [model.new_cache(), model.new_cache()], [], start, 9
        with torch.inference_mode():
            for cache, text, length in zip(caches, (ids, other), (start, beside), strict=True):
                run_rows(model, [TextRows(cache, tuple(text[:length].tolist()), None)])
            for length in pieces:
                new, more = ids[at : at + length].tolist(), other[beside : beside + 1].tolist()
                caches[0].reserve(length)
                rows = TextRows(caches[0], tuple(new), None, length - 1)
                output = run_rows(model, [TextRows(caches[1], tuple(more), None), rows])
                found.append(output.hidden_TD[1:])
                at, beside = at + length, beside + 1
        return torch.cat(found)

    single = read(*[1] * 20)
    assert torch.equal(read(1, 6, 3, 9, 1), single)


def answers(server, **options):
    """Return a completion, the same as a stream, and their pieces."""
    body = {"model": "small", "prompt": "some prompt", "max_tokens": 40, "logprobs": 2, "seed": 3}
    body |= options
    whole = call(server, "POST", "/v1/completions", json=body).json()
    usage = {"include_usage": True, "continuous_usage_stats": True}
    body |= {"stream": True, "stream_options": usage}
    *pieces, last = chunks(call(server, "POST", "/v1/completions", json=body))
    return whole, pieces, last["usage"]


@pytest.mark.parametrize("temperature", [0, 0.3])
def test_a_stream_of_several_tokens_an_event_says_what_single_ones_say(
    model_folder, monkeypatch, temperature
):
    monkeypatch.setattr(
        speculation, "share_rows", lambda chances, *_: [min(3, len(own)) for own in chances]
    )
    found = {}
    for name in ("none", "suffix"):
        server = Server(ServeArgs(model=str(model_folder), speculative=name))
        whole, pieces, usage = answers(server, temperature=temperature)
        choice = whole["choices"][0]
        streamed = [piece["choices"][0] for piece in pieces]
        assert "".join(piece["text"] for piece in streamed) == choice["text"]
        for key, values in choice["logprobs"].items():
            assert [v for piece in streamed for v in piece["logprobs"][key]] == values
        counted = [piece["usage"]["completion_tokens"] for piece in pieces]
        assert counted == sorted(counted) and counted[-1] == 40
        assert usage == whole["usage"] and usage["completion_tokens"] == 40
        found[name] = (choice, usage, len(pieces))
        if name == "suffix":
            assert draft_counts(server.thread.engine)[1] > 5
        server.close()
    assert found["none"][:2] == found["suffix"][:2]
    assert found["suffix"][2] < found["none"][2]
