"""litellm: chat and completion, streamed and awaited, and its errors."""

import asyncio
import os

from expect import API_KEY, arguments, expect

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"  # otherwise the import downloads prices
import litellm


def main() -> None:
    base, name, _ = arguments()
    server = {"api_base": f"{base}/v1", "api_key": API_KEY, "temperature": 0, "max_tokens": 12}
    asked = {
        "model": f"openai/{name}",
        "messages": [{"role": "user", "content": "import os"}],
        **server,
    }
    answer = litellm.completion(**asked)
    text = answer.choices[0].message.content
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    expect("the streamed answer", "".join(deltas), text)
    rebuilt = litellm.stream_chunk_builder(chunks)
    expect("usage of the stream", rebuilt.usage.total_tokens, answer.usage.total_tokens)
    awaited = asyncio.run(litellm.acompletion(**asked))
    expect("the awaited answer", awaited.choices[0].message.content, text)
    model = f"text-completion-openai/{name}"
    completion = litellm.text_completion(model=model, prompt="import os", **server)
    expect("tokens of the completion", completion.usage.completion_tokens <= 12, True)
    try:
        litellm.completion(**{**asked, "messages": [{"role": "user", "content": "a" * 10**5}]})
    except litellm.ContextWindowExceededError:
        return
    raise SystemExit("error: a prompt that is too long was not refused")


if __name__ == "__main__":
    main()
