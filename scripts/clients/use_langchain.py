"""LangChain's ChatOpenAI: invoke, stream, batch, async, usage, and a conversation that goes on."""

import asyncio

from expect import API_KEY, arguments, expect
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

MESSAGES = [SystemMessage("Be brief."), HumanMessage("import os")]


def main() -> None:
    base, name, _ = arguments()
    model = ChatOpenAI(
        base_url=f"{base}/v1",
        api_key=API_KEY,
        model=name,
        temperature=0,
        max_tokens=12,
        max_retries=0,
    )
    answer = model.invoke(MESSAGES)
    expect("the kind of tokens", answer.usage_metadata["output_tokens"] <= 12, True)
    expect("the streamed answer", "".join(c.text for c in model.stream(MESSAGES)), answer.text)
    expect("the batch", [a.text for a in model.batch([MESSAGES] * 3)], [answer.text] * 3)
    expect("the awaited answer", asyncio.run(model.ainvoke(MESSAGES)).text, answer.text)
    longer = model.invoke([*MESSAGES, answer, HumanMessage("go on")])
    grown = longer.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]
    expect("a longer prompt", grown, True)


if __name__ == "__main__":
    main()
