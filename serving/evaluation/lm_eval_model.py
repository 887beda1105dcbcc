"""lm-eval's interface of a model. Imports lm-eval, which is optional."""

from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ...moe.models.language_model import LanguageModel
from ...progress import Progress


class LmEvalModel(TemplateLM):
    """A loaded model as lm-eval wants it; one request at a time."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self._model = model
        self._longest = model.config.max_positions

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text, which an empty context begins with."""
        return min(self._model.eos_ids, default=0)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self._model.tokenizer(
            string, add_special_tokens=bool(add_special_tokens), verbose=False
        )["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding gives it."""
        answers = []
        with Progress("scoring", len(requests)) as progress:
            for _strings, context, continuation in requests:
                answers.append(self._score(context, continuation))
                progress.advance()
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the longest sequence."""
        answers = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self._longest,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            answers.append(sum(self._score(*pair)[0] for pair in pairs))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context."""
        answers = []
        with Progress("generating", len(requests)) as progress:
            for request in requests:
                context, options = request.args
                most = int(options.get("max_gen_toks", 256))
                ids = self.tok_encode(context)[-max(1, self._longest - most) :]
                until = options.get("until") or ()
                answer = self._model.stream(
                    ids or [self.eot_token_id],
                    max_new_tokens=min(most, self._longest - len(ids)),
                    temperature=options.get("temperature", 0) if options.get("do_sample") else 0,
                    stop=(until,) if isinstance(until, str) else until,
                )
                answers.append("".join(answer))
                progress.advance()
        return answers

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = [*context, *continuation][-(self._longest + 1) :]
        ids_T = torch.tensor(ids, device=self._model.decoder.embed_tokens.weight.device)
        scores_TV = self._model(ids_T[None, :-1])[0, -len(continuation) :].float().log_softmax(-1)
        targets_T = ids_T[-len(continuation) :]
        total = float(scores_TV.gather(1, targets_T[:, None]).sum())
        return total, bool((scores_TV.argmax(-1) == targets_T).all())
