"""A decoder for inference: scores and generation.

B rows, T tokens per row, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..batch import batch_of, batch_of_rows
from .decoder import Decoder
from .sampling import GenerationConfig, sample


class LanguageModel:
    """A loaded model for inference."""

    def __init__(self, decoder: Decoder, generation: GenerationConfig) -> None:
        self.decoder = decoder.eval()
        self.config = decoder.config
        self.sampling = generation.sampling
        """The sampling defaults of the model's folder."""
        self.eos_ids = generation.eos_ids

    @torch.inference_mode()
    def __call__(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return scores for every position: ``[B, T]`` ids to ``[B, T, V]``.

        ``attention_mask`` ``[B, T]`` is 0 for padding, on either side. Padding is not computed,
        and its scores are 0.
        """
        self._check(ids_BT, ids_BT.shape[-1])
        if attention_mask is None:
            hidden_TD = self.decoder(batch_of_rows(ids_BT)).hidden_TD
            return self.decoder.logits(hidden_TD).unflatten(0, ids_BT.shape)
        is_real_BT = _check_mask(attention_mask, ids_BT)
        rows = [ids_T[is_real_T] for ids_T, is_real_T in zip(ids_BT, is_real_BT, strict=True)]
        scores_NV = self.decoder.logits(self.decoder(batch_of(rows)).hidden_TD)
        scores_BTV = scores_NV.new_zeros(*ids_BT.shape, scores_NV.shape[-1])
        scores_BTV[is_real_BT] = scores_NV
        return scores_BTV

    @torch.inference_mode()
    def generate(
        self,
        ids_BT: Tensor,
        max_new_tokens: int = 32,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Continue every row: ``[B, T]`` ids to ``[B, T + new]``.

        Sampling parameters default to the folder's ``generation_config.json``.
        ``attention_mask`` ``[B, T]`` is 0 for padding, best on the left. Rows that reach an
        end-of-text id are filled with it. Row b draws from its own generator, seeded with
        ``seed + b``, so its text does not depend on the other rows.
        """
        self._check(ids_BT, ids_BT.shape[-1] + max_new_tokens)
        num_rows, length = ids_BT.shape
        if max_new_tokens < 0 or not 0 <= (seed or 0) < 1 << 62:
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens} and seed {seed}; use numbers from 0 upwards, "
                "the seed below 2^62."
            )
        given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        params = replace(self.sampling, **{k: v for k, v in given.items() if v is not None})
        generators = [torch.Generator() for _ in range(num_rows)]
        for row, generator in enumerate(generators):
            generator.seed() if seed is None else generator.manual_seed(seed + row)
        caches = [self.decoder.new_cache(length + max_new_tokens) for _ in range(num_rows)]
        ended: list[int | None] = [None] * num_rows
        columns = [ids_BT]
        inputs = list(ids_BT)
        if attention_mask is not None:
            is_real_BT = _check_mask(attention_mask, ids_BT)
            inputs = [ids_T[real_T] for ids_T, real_T in zip(ids_BT, is_real_BT, strict=True)]
        for _ in range(max_new_tokens):
            batch = batch_of(inputs, caches)
            ends = torch.tensor(batch.lengths).cumsum(0) - 1
            logits_BV = self.decoder.logits(self.decoder(batch).hidden_TD[ends]).cpu()
            new = []
            for row in range(num_rows):
                token = ended[row]
                if token is None:
                    token = sample(logits_BV[row], params, generators[row])
                    ended[row] = token if token in self.eos_ids else None
                new.append(token)
            new_B1 = torch.tensor(new, device=ids_BT.device).unsqueeze(1)
            columns.append(new_B1)
            if all(token is not None for token in ended):
                break
            inputs = list(new_B1)
        return torch.cat(columns, dim=1)

    def _check(self, ids_BT: Tensor, length: int) -> None:
        if ids_BT.ndim != 2 or ids_BT.numel() == 0:
            raise ConfigError(f"ids have shape {list(ids_BT.shape)}; give [B, T], both above 0.")
        if length > self.config.max_positions:
            raise ConfigError(
                f"the sequence would have {length} tokens, but the model takes "
                f"{self.config.max_positions}; shorten it."
            )
        lowest, highest = (int(bound) for bound in ids_BT.aminmax())
        if lowest < 0 or highest >= self.config.vocabulary:
            raise ConfigError(
                f"ids range from {lowest} to {highest}; "
                f"they must be in [0, {self.config.vocabulary})."
            )


def _check_mask(attention_mask: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the mask as bool ``[B, T]``."""
    if attention_mask.shape != ids_BT.shape:
        raise ConfigError(
            f"attention_mask has shape {list(attention_mask.shape)}, ids have "
            f"{list(ids_BT.shape)}; give one of the same shape."
        )
    is_real_BT = attention_mask.bool()
    if not is_real_BT.any(dim=1).all():
        raise ConfigError("attention_mask hides all of a row; leave the row out.")
    return is_real_BT
