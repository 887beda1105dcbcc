"""``moeyard generate``: the text that follows a prompt."""

import argparse
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .options import (
    Parsers,
    add_command,
    add_correction,
    add_loading,
    add_model,
    add_sampling,
)
from .speculation import add_speculation, check_speculation, speculate

if TYPE_CHECKING:
    from ..moe.drafts.tally import DraftCounts
    from ..moe.models.language_model import LanguageModel
    from ..serving.experts.store import ExpertStore


def add(parsers: Parsers) -> None:
    """Add the command."""
    generate = add_command(parsers, "generate", "print the text that follows a prompt")
    add_model(generate)
    generate.add_argument("prompt", metavar="PROMPT", help="a text, or - to read it from stdin")
    add_sampling(generate, max_new_tokens=128)
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    generate.add_argument("--ignore-eos", action="store_true", help="go on after an end of text")
    generate.add_argument(
        "--record-routes",
        type=Path,
        metavar="FILE",
        help="write which experts each token visited into FILE, which is replaced",
    )
    generate.add_argument(
        "--lora", type=Path, metavar="FOLDER", help="an adapter folder to go through"
    )
    add_loading(generate)
    add_correction(generate)
    add_speculation(generate)
    generate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the text as it comes, and figures on standard error."""
    from .model_folder import open_model

    routes = arguments.record_routes
    check_speculation(arguments, routes)
    if routes is not None and arguments.expert_correction is not None:
        raise ConfigError(
            f"record-routes is {str(routes)!r}, but expert-correction computes tokens twice; leave "
            "one out."
        )
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    model = open_model(arguments)
    counts = speculate(model, arguments)
    adapter = None
    if arguments.lora is not None:
        adapter = str(arguments.lora)
        model.adapters.load(adapter, arguments.lora)
    answer = model.stream(
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
        adapter=adapter,
    )
    started = time.monotonic()
    with _recording(model, routes):
        for piece in answer:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    seconds = time.monotonic() - started
    sys.stderr.write(
        f"generated tokens={answer.num_tokens} seconds={seconds:.2f} "
        f"tokens_per_s={answer.num_tokens / seconds:.1f} finish_reason={answer.finish_reason}"
        f"{_lossy_facts(model)}{_draft_facts(counts)}\n"
    )


def _lossy_facts(model: "LanguageModel") -> str:
    """Return what was computed from copies of experts, and how often the exact model checked."""
    store, text = _store(model), ""
    copied = store.statistics.layers.values() if store is not None else ()
    pairs = sum(traffic.copied_rows for traffic in copied)
    if store is not None and pairs:
        text = f" tokens_with_copies={store.statistics.copied_tokens} copied_pairs={pairs}"
    if model.correction is not None:
        advance = model.correction.mean_advance
        text += f" checks={model.correction.num_periods} tokens_per_check={advance:.2f}"
    return text


def _draft_facts(counts: "DraftCounts") -> str:
    """Return how many guesses of next tokens ran and how many were right, if some ran."""
    return f" drafted={counts.drafted} accepted={counts.accepted}" if counts.drafted else ""


def _store(model: "LanguageModel") -> "ExpertStore | None":
    from ..serving.experts.offloaded import OffloadedExperts

    for _, layer in model.decoder.moe_layers():
        if isinstance(layer.experts, OffloadedExperts):
            return layer.experts.store
    return None


def _recording(model: "LanguageModel", path: Path | None) -> AbstractContextManager[object]:
    if path is None:
        return nullcontext()
    from ..moe.routes.recorder import recording

    store = _store(model)
    own = None if store is None else store.hint_column()
    return recording(model.decoder, path, written_by="generate", own=own)
