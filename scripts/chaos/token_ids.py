"""Are token ids and numbers that cannot be answered refused with a sentence, and never with a 5xx?

    python scripts/chaos/token_ids.py [BASE_URL --api-key KEY] [--seed 1]

Prompts of ids below 0, at and beyond the vocabulary, at the ends of machine integers and up to
2**70, booleans, floats, nested and mixed lists; then the same numbers in every field that takes a
number, of both endpoints. What must be refused gets 400; nothing may get a 5xx.
"""

import random

from served import Target, arguments, end, target_of

VOCABULARY = 257
"""Of the server that is started here; also a token id that it refuses."""
EDGES = [2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 2**70]
BAD_NUMBERS = [-1, VOCABULARY, *EDGES, *(-edge for edge in EDGES)]
NOT_IDS = [True, False, 0.0, 1.0, 1.5, -0.5, 1e308, "1", None, {}, [], [[1]], {"a": 1}]
FIELDS = ["max_tokens", "n", "seed", "top_k", "top_p", "temperature", "logprobs"]
FIELDS += ["presence_penalty", "frequency_penalty"]
CHAT_FIELDS = [*FIELDS, "max_completion_tokens", "top_logprobs"]
RANDOM_PROMPTS = 200


def main() -> None:
    given = arguments(__doc__).parse_args()
    numbers = random.Random(given.seed)
    print(f"seed {given.seed}")
    with target_of(given) as target:
        for prompt in refused_prompts(numbers):
            ask(target, {"prompt": prompt}, {400})
        for ids in ([0], [VOCABULARY - 1], [[1, 2], [3]], [5] * 40):
            ask(target, {"prompt": ids}, {200})
        chat = {"messages": [{"role": "user", "content": "a"}]}
        for body, names in (({"prompt": [1]}, FIELDS), (chat, CHAT_FIELDS)):
            for name in names:
                for value in (*BAD_NUMBERS, *NOT_IDS):
                    ask(target, {**body, name: value}, {200, 400})
        target.show_counts("bodies")
        target.check_alive()
    end(target)


def refused_prompts(numbers: random.Random) -> list[object]:
    """Return prompts that no vocabulary has."""
    bad: list[object] = [*BAD_NUMBERS, *(x for x in NOT_IDS if not isinstance(x, str))]
    bad.remove([[1]])  # a list of one prompt
    bad.remove(None)
    prompts: list[object] = [0, 1, VOCABULARY - 1, None]
    for value in bad:
        prompts += [value, [value], [1, value], [[1, value]], [[1], [value]], [["a"], value]]
    for _ in range(RANDOM_PROMPTS):
        ids: list[object] = [numbers.randrange(VOCABULARY) for _ in range(numbers.randrange(1, 9))]
        ids.insert(numbers.randrange(len(ids) + 1), numbers.choice(bad))
        prompts.append(numbers.choice([ids, [ids], [[1], ids]]))
    return prompts


def ask(target: Target, body: dict[str, object], expected: set[int]) -> None:
    """Send one body and check its status."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = target.client.post(path, json={"model": target.model, "max_tokens": 2, **body})
    target.check_answer(f"{path} {body}", answer)
    if answer.status_code < 500 and answer.status_code not in expected:
        target.fault(f"{path} {body}: {answer.status_code}, not one of {expected}")


if __name__ == "__main__":
    main()
