"""Generation without a server: rows of ids go on, one token a step.

B rows, T tokens of a row, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from ..adapters.adapter import Adapter
from ..batch import batch_of
from ..routers.causal import check_causal
from .decoder import Decoder
from .sampling import SamplingParams, sample
from .text_stream import CONTEXT_IDS, Decode, TextStream


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """How an answer is drawn, and what ends it."""

    max_new_tokens: int
    sampling: SamplingParams
    seed: int | None = None
    """Row b draws from a generator with seed ``seed + b``; None = a random one."""
    eos_ids: Collection[int] = frozenset()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.max_new_tokens, 0 if self.seed is None else self.seed)
        if any(type(number) is not int or number < 0 for number in numbers) or numbers[1] >> 62:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens} and seed {self.seed}; use numbers from 0 "
                "upwards, the seed below 2^62."
            )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop is {list(self.stop)}; give texts that are not empty.")


def with_given(
    defaults: SamplingParams, temperature: float | None, top_p: float | None, top_k: int | None
) -> SamplingParams:
    """Return ``defaults`` with the parameters that are not None."""
    for name, value in {"temperature": temperature, "top_p": top_p, "top_k": top_k}.items():
        kinds = (int,) if name == "top_k" else (int, float)
        if value is not None and type(value) not in kinds:
            raise ConfigError(f"{name} is {value!r}; use a number.")
    return SamplingParams(
        temperature=defaults.temperature if temperature is None else temperature,
        top_p=defaults.top_p if top_p is None else top_p,
        top_k=defaults.top_k if top_k is None else top_k,
    )


@torch.inference_mode()
def continue_rows(
    decoder: Decoder,
    rows: Sequence[Tensor],
    limits: GenerationLimits,
    adapter: Adapter | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of every row, as long as one of them has not ended.

    ``rows`` are 1-D ids, of any lengths. A row that reached an end-of-text id repeats it. All rows
    go through ``adapter``, if there is one.
    """
    for router in decoder.routers():
        check_causal(router.config)
    generators = [torch.Generator() for _ in rows]
    for row, generator in enumerate(generators):
        generator.seed() if limits.seed is None else generator.manual_seed(limits.seed + row)
    caches = [decoder.new_cache(len(ids_T) + limits.max_new_tokens) for ids_T in rows]
    cores = [decoder.new_core(len(ids_T)) for ids_T in rows]
    ended: list[int | None] = [None] * len(rows)
    inputs = list(rows)
    for _ in range(limits.max_new_tokens):
        batch = batch_of(inputs, caches, [adapter] * len(rows), cores)
        ends = torch.tensor(batch.lengths).cumsum(0) - 1
        hidden_TD = decoder(batch).hidden_TD
        logits_BV = decoder.logits(hidden_TD[to_device(ends, hidden_TD.device)]).cpu()
        new = []
        for row, generator in enumerate(generators):
            token = ended[row]
            if token is None:
                token = sample(logits_BV[row], limits.sampling, generator)
                ended[row] = token if token in limits.eos_ids else None
            new.append(token)
        yield new
        if all(token is not None for token in ended):
            return
        inputs = list(to_device(torch.tensor(new), rows[0].device).unsqueeze(1))


class Answer:
    """One row's text as its tokens come."""

    def __init__(self, decode: Decode, prompt: Sequence[int], limits: GenerationLimits) -> None:
        self._limits = limits
        self._text = TextStream(decode, limits.stop, prompt[-CONTEXT_IDS:])
        self.num_tokens = 0
        """Tokens generated so far, with the one that ended the answer."""
        self.finish_reason: Literal["stop", "length"] | None = None
        """``stop``: an end-of-text id or a stop text. ``length``: ``max_new_tokens``. None = not
        finished."""

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now; nothing after the end."""
        if self.finish_reason is not None:
            return ""
        self.num_tokens += 1
        piece = ""
        if token in self._limits.eos_ids:
            self.finish_reason = "stop"
        else:
            piece = self._text.push(token)
            if self._text.is_stopped:
                self.finish_reason = "stop"
            elif self.num_tokens == self._limits.max_new_tokens:
                self.finish_reason = "length"
        return piece if self.finish_reason is None else piece + self._text.finish()


class AnswerStream:
    """An iterator over one answer's text: pieces that join to the whole, none of them empty.

    A token is computed when the next piece is asked for, so a loop that ends early costs nothing
    more.
    """

    def __init__(self, steps: Iterator[list[int]], answer: Answer) -> None:
        self._steps = steps
        self._answer = answer

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, with the one that ended the answer."""
        return self._answer.num_tokens

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """``stop``: an end-of-text id or a stop text. ``length``: ``max_new_tokens``. None = not
        finished."""
        return self._answer.finish_reason

    def __iter__(self) -> "AnswerStream":
        return self

    def __next__(self) -> str:
        while self._answer.finish_reason is None:
            for (token,) in self._steps:
                piece = self._answer.push(token)
                break
            else:
                break  # max_new_tokens is 0
            if piece:
                return piece
        raise StopIteration
