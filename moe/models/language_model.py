"""A decoder for inference: scores and generation.

B rows, T tokens per row, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import ConfigError, ModelFileError
from ..adapters.adapter import Adapter
from ..adapters.rows import adapter_rows
from ..adapters.table import AdapterTable
from ..batch import Batch, batch_of, batch_of_rows
from ..drafts.speculation import Speculation
from .correction import Correction, check_corrected, corrected_row
from .decoder import Decoder
from .describe import describe
from .drafted_rows import drafted_rows
from .generation import Answer, AnswerStream, GenerationLimits, continue_rows, with_given
from .prompts import brief, check_ids, ids_of_row, rows_without_padding
from .sampling import GenerationConfig, SamplingParams
from .text_codec import TextCodec

Prompt = TypeVar("Prompt", str, list[str], Tensor)


class LanguageModel:
    """A model that :func:`moeyard.load` opened, for inference.

    Call it for scores, :meth:`generate` for ids or text, :meth:`stream` for text as it comes.
    ``config`` has its shape, ``decoder`` is the torch module.
    """

    def __init__(
        self,
        decoder: Decoder,
        generation: GenerationConfig,
        codec: TextCodec | None = None,
        adapters: AdapterTable | None = None,
    ) -> None:
        self.decoder = decoder.eval()
        self.config = decoder.config
        self.sampling = generation.sampling
        """The sampling defaults of the model's folder."""
        self.eos_ids = generation.eos_ids
        """Ids that end a text."""
        self.correction: Correction | None = None
        """How answers of a lossy model are corrected; None = they are the model's own."""
        self.speculation: Speculation | None = None
        """Guesses of next tokens that answers check, several a step; None = one token a step."""
        self._codec = codec
        self.adapters = AdapterTable() if adapters is None else adapters
        """The adapters that calls may name; ``load`` and ``unload`` change them."""

    def __repr__(self) -> str:
        """Show layers, widths, experts, parameters, type, device and the share on disk."""
        return f"LanguageModel({describe(self.decoder)}\n)"

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model's folder, opened when it is first used.

        Raises :class:`ModelFileError` if the folder has none that can be used.
        """
        return self._text.tokenizer

    @torch.inference_mode()
    def __call__(
        self,
        ids_BT: Tensor,
        attention_mask: Tensor | None = None,
        adapter: str | None = None,
    ) -> Tensor:
        """Return scores for every position: ``[B, T]`` ids to ``[B, T, V]``.

        ``attention_mask`` ``[B, T]`` is 0 for padding, on either side. Padding is not computed,
        and its scores are 0. ``adapter`` names one of :attr:`adapters`.

        Raises :class:`ConfigError` for ids outside the vocabulary and for
        more than ``config.max_positions`` of them.
        """
        check_ids(ids_BT, self.config)
        if attention_mask is None:
            hidden_TD = self.decoder(self._through(batch_of_rows(ids_BT), adapter)).hidden_TD
            return self.decoder.logits(hidden_TD).unflatten(0, ids_BT.shape)
        rows = rows_without_padding(ids_BT, attention_mask)
        batch = self._through(batch_of(rows), adapter)
        scores_NV = self.decoder.logits(self.decoder(batch).hidden_TD)
        scores_BTV = scores_NV.new_zeros(*ids_BT.shape, scores_NV.shape[-1])
        scores_BTV[attention_mask.bool()] = scores_NV
        return scores_BTV

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 32,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        attention_mask: Tensor | None = None,
        *,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        adapter: str | None = None,
    ) -> Prompt:
        """Continue a text, a list of texts, or rows of ids.

        Text gives the new text alone, without the prompt. Ids ``[B, T]`` give ``[B, T + new]``;
        rows that end early are filled with their end-of-text id, and ``attention_mask``
        ``[B, T]`` is 0 for padding, best on the left.

        ``temperature`` (0 = greedy), ``top_p`` and ``top_k`` (0 = all) default to the folder's
        ``generation_config.json``. Row b draws from its own generator, seeded with ``seed + b``
        (None = at random), so its text does not depend on the other rows. An answer ends with an
        end-of-text id of the model unless ``ignore_eos``, before the first of the ``stop`` texts,
        or after ``max_new_tokens``. ``adapter`` names one of :attr:`adapters`; None = the model
        alone.

        Raises :class:`ConfigError` for prompts that are empty, too long or of another type.
        """
        params = with_given(self.sampling, temperature, top_p, top_k)
        limits = self._limits(max_new_tokens, params, seed, stop, ignore_eos)
        if isinstance(prompt, Tensor):
            return self._continue_ids(prompt, attention_mask, limits, adapter)
        if attention_mask is not None:
            raise ConfigError("attention_mask is given, but the prompt is text; leave it out.")
        if isinstance(prompt, str):
            return self._continue_texts([prompt], limits, adapter)[0]
        if not isinstance(prompt, list) or not all(isinstance(text, str) for text in prompt):
            raise ConfigError(
                f"prompt is {brief(prompt)}; give text, a list of texts, or a tensor of ids [B, T]."
            )
        return self._continue_texts(prompt, limits, adapter)

    def stream(
        self,
        prompt: str | Sequence[int] | Tensor,
        max_new_tokens: int = 32,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        *,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        adapter: str | None = None,
    ) -> AnswerStream:
        """Return an iterator over the text that follows ``prompt``: text, or the ids of one row.

        The pieces join to what :meth:`generate` returns for the same arguments. Afterwards
        ``finish_reason`` says why the answer ended, and ``num_tokens`` how long it is.
        """
        params = with_given(self.sampling, temperature, top_p, top_k)
        limits = self._limits(max_new_tokens, params, seed, stop, ignore_eos)
        ids = self._text.encode(prompt) if isinstance(prompt, str) else ids_of_row(prompt)
        steps = self.steps([self._row(ids, limits)], limits, self._adapter(adapter))
        return AnswerStream(steps, Answer(self._text.decode, ids, limits))

    def steps(
        self, rows: Sequence[Tensor], limits: GenerationLimits, adapter: Adapter | None = None
    ) -> Iterator[list[int]]:
        """Yield the next token of every row of ids, as long as one of them has not ended."""
        if self.speculation is not None:
            return drafted_rows(self.decoder, rows, limits, self.speculation, adapter)
        if self.correction is None:
            return continue_rows(self.decoder, rows, limits, adapter)
        check_corrected(len(rows), None if adapter is None else adapter.name)
        return corrected_row(self.decoder, rows[0], limits, self.correction)

    def _continue_ids(
        self,
        ids_BT: Tensor,
        attention_mask: Tensor | None,
        limits: GenerationLimits,
        adapter: str | None,
    ) -> Tensor:
        if limits.stop:
            raise ConfigError("stop is given, but the prompt is ids; give text, or leave it out.")
        check_ids(ids_BT, self.config, limits.max_new_tokens)
        rows = list(ids_BT)
        if attention_mask is not None:
            rows = rows_without_padding(ids_BT, attention_mask)
        columns = [ids_BT]
        for tokens in self.steps(rows, limits, self._adapter(adapter)):
            columns.append(torch.tensor(tokens, device=ids_BT.device).unsqueeze(1))
        return torch.cat(columns, dim=1)

    def _continue_texts(
        self, prompts: list[str], limits: GenerationLimits, adapter: str | None
    ) -> list[str]:
        prompt_ids = [self._text.encode(prompt) for prompt in prompts]
        rows = [self._row(ids, limits) for ids in prompt_ids]
        answers = [Answer(self._text.decode, ids, limits) for ids in prompt_ids]
        texts = [""] * len(prompts)
        steps = self.steps(rows, limits, self._adapter(adapter))
        for tokens in steps if rows else ():
            for row, token in enumerate(tokens):
                texts[row] += answers[row].push(token)
            if all(answer.finish_reason is not None for answer in answers):
                break
        return texts

    def _row(self, ids: list[int], limits: GenerationLimits) -> Tensor:
        """Return a prompt as ids where the model is."""
        if not ids:
            raise ConfigError("prompt is empty; give at least one token.")
        ids_T = torch.tensor(ids, dtype=torch.int64, device=self.decoder.embed_tokens.weight.device)
        check_ids(ids_T.unsqueeze(0), self.config, limits.max_new_tokens)
        return ids_T

    def _adapter(self, name: str | None) -> Adapter | None:
        return None if name is None else self.adapters.get(name)

    def _through(self, batch: Batch, name: str | None) -> Batch:
        """Return the batch with all its rows in the adapter of a name, if there is a name."""
        of = [self._adapter(name)] * len(batch.lengths)
        return replace(batch, adapters=adapter_rows(of, batch.lengths))

    @property
    def _text(self) -> TextCodec:
        if self._codec is None:
            raise ModelFileError("the model has no tokenizer; load it from a folder that has one.")
        return self._codec

    def _limits(
        self,
        max_new_tokens: int,
        params: SamplingParams,
        seed: int | None,
        stop: str | Sequence[str],
        ignore_eos: bool,
    ) -> GenerationLimits:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        eos_ids = frozenset() if ignore_eos else self.eos_ids
        return GenerationLimits(max_new_tokens, params, seed, eos_ids, stops)
