"""openai: both endpoints, whole and streamed, log-probabilities, usage, and its errors."""

import openai
from expect import API_KEY, arguments, expect

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import os"}]


def main() -> None:
    base, model, _ = arguments()
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=API_KEY, max_retries=0)
    expect("the list of models", [m.id for m in client.models.list()], [model])
    completions(client, model)
    chat(client, model)
    errors(client, model)


def completions(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "prompt": "import os", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**options, logprobs=2, extra_body={"ignore_eos": True})
    expect("completion_tokens", whole.usage.completion_tokens, 12)
    expect("number of log-probabilities", len(whole.choices[0].logprobs.token_logprobs), 12)
    stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    text = "".join(chunk.choices[0].text for chunk in stream)
    expect("the streamed completion", text, whole.choices[0].text)
    many = client.completions.create(model=model, prompt=["a", "b"], n=2, max_tokens=2)
    expect("indices of answers", [choice.index for choice in many.choices], [0, 1, 2, 3])


def chat(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    usage = {"include_usage": True}
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options=usage))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    expect("the streamed answer", text, whole.choices[0].message.content)
    expect("usage of the stream", chunks[-1].usage, whole.usage)
    # An answer goes back into the history as the client dumps it.
    history = [*MESSAGES, whole.choices[0].message.model_dump(), {"role": "user", "content": "on"}]
    again = client.chat.completions.create(model=model, messages=history, max_completion_tokens=2)
    expect("a longer prompt", again.usage.prompt_tokens > whole.usage.prompt_tokens, True)


def errors(client: openai.OpenAI, model: str) -> None:
    for kind, options in (
        (openai.NotFoundError, {"model": "no-such-model", "prompt": "a"}),
        (openai.BadRequestError, {"model": model, "prompt": "a", "temperature": -1}),
        (openai.BadRequestError, {"model": model, "prompt": "a", "max_tokens": 10**9}),
    ):
        try:
            client.completions.create(**options)
        except kind:
            continue
        raise SystemExit(f"error: {options} was not refused")


if __name__ == "__main__":
    main()
