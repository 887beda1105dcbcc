"""``moeyard price``: what a lossy way to run a model costs, next to the exact model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .options import Parsers, add_command, add_correction, add_loading, add_model, read_text

if TYPE_CHECKING:
    from ..moe.folders.prices import Price
    from ..serving.evaluation.price import Arm
    from ..serving.experts.options import StoreOptions


def add(parsers: Parsers) -> None:
    """Add the command."""
    price = add_command(
        parsers,
        "price",
        "measure perplexity, bytes and speed of a lossy way to run a model, next to the exact one",
    )
    add_model(price)
    price.add_argument(
        "--text", type=Path, metavar="FILE", required=True, help="UTF-8 text to predict"
    )
    price.add_argument(
        "--exact",
        metavar="DIR",
        help="the model that a quantized MODEL was made from; default: MODEL without lossy options",
    )
    price.add_argument(
        "--length", type=int, metavar="N", help="tokens of a window of the text, as for eval"
    )
    price.add_argument(
        "--steps",
        type=int,
        default=2048,
        metavar="N",
        help="tokens that are scored one by one, where what is in memory decides",
    )
    price.add_argument("--answers", type=int, default=4, metavar="N", help="answers of each model")
    price.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of an answer")
    price.add_argument("--json", action="store_true", help="print JSON")
    add_loading(price)
    add_correction(price)
    price.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print a table, and save the price in the model's folder."""
    from ..moe.folders.hub import local_folder
    from ..moe.folders.prices import Price, save_price
    from ..moe.routers.own_code import allow
    from ..serving.evaluation.price import Plan, measure
    from .model_folder import model_folder, store_options

    text = read_text(arguments.text)
    plan = Plan(
        length=arguments.length,
        steps=arguments.steps,
        answers=arguments.answers,
        tokens=arguments.tokens,
    )
    allow(arguments.allow_code)
    options = store_options(arguments)
    name = model_folder(arguments.model)
    mode, exact_name, is_lossy = _way(name, arguments.exact, options)
    exact = _open(arguments, exact_name, options.exact())
    lossy = _open(arguments, name, options)
    depends_on_memory = options.fallback is not None
    figures = measure(exact, lossy, text, plan, depends_on_memory=depends_on_memory)
    price = Price(
        mode=mode,
        text=_text_name(arguments.text, lossy),
        tokens=figures[2],
        exact=figures[0],
        lossy=figures[1],
    )
    sys.stdout.write(price.model_dump_json(indent=1) + "\n" if arguments.json else _table(price))
    if is_lossy:
        save_price(local_folder(name), price)
    else:
        sys.stderr.write("the answers are those of the exact model, so no price is saved.\n")


def _way(name: str, exact: str | None, options: "StoreOptions") -> tuple[str, str, bool]:
    """Return the name of what is measured, the folder of the exact model, and whether it is lossy.

    Raises :class:`ConfigError` where there is nothing to measure, or more than one way.
    """
    from ..moe.folders.folder import ModelFolder
    from ..moe.folders.hub import local_folder
    from ..moe.routes.identity import identity_of
    from ..serving.experts.options import StoreOptions
    from ..serving.planning.lossy import lossy_modes

    folder = ModelFolder(local_folder(name))
    stored = lossy_modes(folder, StoreOptions())
    modes = lossy_modes(folder, options)[len(stored) :]
    if len(modes) > 1:
        raise ConfigError(
            f"the options are lossy in {len(modes)} ways: {', '.join(modes)}; measure one by one."
        )
    if modes or options.correction is not None:
        if exact is not None:
            raise ConfigError(
                f"exact is {exact!r}, but these options are compared with {name} without them; "
                "leave exact out."
            )
        mode = modes[0] if modes else f"expert-fallback correction {options.correction}"
        return mode, name, bool(modes)
    if not stored:
        raise ConfigError(
            f"{name} runs exactly with these options, so there is no price; give a lossy option "
            "such as --expert-fallback, or a folder of moeyard convert --dtype int8."
        )
    if exact is None:
        raise ConfigError(f"{name} is {stored[0]}; name the model it was made from with --exact.")
    other = ModelFolder(local_folder(exact))
    if other.packed is not None or identity_of(other.config) != identity_of(folder.config):
        raise ConfigError(
            f"exact is {exact!r}, which is not what {name} was made from: it is quantized, or of "
            "another architecture; name that model."
        )
    return stored[0], exact, True


def _open(arguments: argparse.Namespace, name: str, options: "StoreOptions") -> "Arm":
    from ..moe.folders.expert_slots import expert_bytes
    from ..moe.folders.folder import ModelFolder
    from ..moe.folders.hub import local_folder
    from ..serving.evaluation.price import Arm
    from ..serving.loading import pick_dtype
    from .model_folder import open_with

    model, store = open_with(arguments, name, options)
    folder = ModelFolder(local_folder(name))
    size = expert_bytes(folder.config, pick_dtype(folder, arguments.dtype), folder.packed)
    return Arm(model=model, store=store, expert_bytes=size)


def _text_name(path: Path, lossy: "Arm") -> str:
    is_corrected = lossy.model.correction is not None
    return f"answers to prompts of {path.name}" if is_corrected else path.name


def _table(price: "Price") -> str:
    """Return a line for each of the two models."""
    width = max(len(price.mode), 5)
    lines = [f"{'':{width}} {'perplexity':>11} {'bytes of an expert':>19} {'tokens/s':>9}"]
    for name, figures in (("exact", price.exact), (price.mode, price.lossy)):
        lines.append(
            f"{name:{width}} {figures.perplexity:11.5g} {figures.expert_bytes:19,.0f} "
            f"{figures.tokens_per_s or 0:9.1f}"
        )
    lines.append(f"{price.tokens:,} tokens of {price.text}")
    return "\n".join(lines) + "\n"
