"""``moeyard chat``: a conversation in the terminal."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MoeyardError
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
    from ..moe.models.language_model import LanguageModel
    from ..serving.engine.tokenizer import ServingTokenizer

HELP = "Ctrl-C ends an answer, Ctrl-D the chat; /new begins again, /help shows this."


def add(parsers: Parsers) -> None:
    """Add the command."""
    chat = add_command(parsers, "chat", "talk to a model in the terminal")
    add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="system message; default: none")
    chat.add_argument(
        "--chat-template",
        metavar="FILE|NAME",
        help="Jinja file, or name of one of the folder's templates; default: the folder's own",
    )
    add_sampling(chat, max_new_tokens=512)
    add_loading(chat)
    add_correction(chat)
    add_speculation(chat)
    chat.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read messages from standard input until it ends."""
    from ..moe.folders.hub import local_folder
    from ..serving.engine.tokenizer import ServingTokenizer
    from .model_folder import model_folder, open_model

    if sys.stdin.isatty():
        import readline  # noqa: F401 - input() then edits lines and has a history

    check_speculation(arguments)
    arguments.model = model_folder(arguments.model)
    model = open_model(arguments)
    speculate(model, arguments)
    tokenizer = ServingTokenizer(local_folder(arguments.model), arguments.chat_template)
    try:
        if not tokenizer.has_template:
            raise ConfigError(
                f"{arguments.model} has no chat template; give one with --chat-template FILE, such "
                "as configs/serve/chatml.jinja of the source, or use moeyard generate."
            )
        _talk(model, tokenizer, arguments)
    finally:
        tokenizer.close()


def _talk(
    model: "LanguageModel", tokenizer: "ServingTokenizer", arguments: argparse.Namespace
) -> None:
    beginning = []
    if arguments.system is not None:
        beginning.append({"role": "system", "content": arguments.system})
    messages = list(beginning)
    sys.stderr.write(f"{HELP}\n")
    while True:
        text = _read_message()
        if text is None:
            return
        if text == "/new":
            messages = list(beginning)
        elif text == "/help":
            sys.stderr.write(f"{HELP}\n")
        elif text.strip():
            messages.append({"role": "user", "content": text})
            try:
                said = _answer(model, tokenizer, messages, arguments)
            except MoeyardError as error:
                messages.pop()
                sys.stderr.write(f"error: {error}\n")
            else:
                messages.append({"role": "assistant", "content": said})


def _read_message() -> str | None:
    """Return the next line, None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _answer(
    model: "LanguageModel",
    tokenizer: "ServingTokenizer",
    messages: list[dict[str, Any]],
    arguments: argparse.Namespace,
) -> str:
    """Print an answer as it comes and return it; Ctrl-C ends it early."""
    ids = tokenizer.encode_rendered(tokenizer.render_chat(messages))
    room = model.config.max_positions - len(ids)
    if room < 1:
        raise MoeyardError(
            f"the conversation has {len(ids)} tokens, but the model takes "
            f"{model.config.max_positions}; begin again with /new."
        )
    answer = model.stream(
        ids,
        max_new_tokens=min(room, arguments.max_new_tokens),
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    said = ""
    try:
        for piece in answer:
            said += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
    sys.stdout.flush()
    if answer.finish_reason == "length":
        sys.stderr.write(
            f"the answer ends after {answer.num_tokens} tokens; --max-new-tokens allows more, as "
            f"long as the conversation stays within {model.config.max_positions}.\n"
        )
    return said
