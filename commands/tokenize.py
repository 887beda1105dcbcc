"""``moeyard tokenize``: a tokenizer and token shards from text."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .options import Parsers, add_command

if TYPE_CHECKING:
    from ..training.formats.text import TextsConfig


def add(parsers: Parsers) -> None:
    """Add the command."""
    tokenize = add_command(parsers, "tokenize", "make a tokenizer and token shards from text")
    tokenize.add_argument(
        "source",
        metavar="SOURCE",
        help="stdlib, a text, .jsonl or .json file, a folder of these, or hf:NAME_OR_PATH",
    )
    tokenize.add_argument(
        "out_dir", type=Path, nargs="?", metavar="OUT_DIR", help="folder to write"
    )
    tokenize.add_argument(
        "--format", choices=("text", "chat", "preference"), default="text", help="what SOURCE holds"
    )
    tokenize.add_argument(
        "--show",
        type=int,
        metavar="N",
        help="print N conversations or pairs, with what a run trains on marked; write nothing",
    )
    which = tokenize.add_mutually_exclusive_group()
    which.add_argument(
        "--vocab-size", type=int, help="ids of the byte-level BPE to learn; default: 8192"
    )
    which.add_argument("--tokenizer", help="use 'bytes' or a Hugging Face folder instead")
    tokenize.add_argument("--eval-fraction", type=float, help="share held out; default: 0.05")
    tokenize.add_argument(
        "--eval-source", help="separate source of held-out text; same kinds as SOURCE"
    )
    tokenize.add_argument("--text-key", help="key or column of the text; default: text")
    tokenize.add_argument("--hf-config", help="configuration of an hf: data set")
    tokenize.add_argument("--hf-revision", help="commit of an hf: data set")
    tokenize.add_argument("--split", help="split of an hf: data set; default: train")
    tokenize.add_argument("--eval-split", help="held-out split of an hf: data set")
    tokenize.add_argument(
        "--chat-template", type=Path, help="Jinja file to save with the tokenizer, or to show"
    )
    tokenize.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write a tokenizer and token shards."""
    from ..configuration import validate_config
    from ..training.data.tokenize import LEARNT_IDS, tokenize
    from ..training.formats.preference import PreferenceConfig
    from ..training.formats.text import TextConfig
    from ..training.stop import StopRequest

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    values = {name: value for name, value in given.items() if name in TextConfig.model_fields}
    template = values.pop("chat_template", None)
    if template is not None and arguments.format != "text":
        values["chat_template"] = str(template)
    if arguments.format == "preference":
        _show(validate_config(PreferenceConfig, values), arguments)
        return
    config = validate_config(TextConfig, values)
    if arguments.format == "chat":
        _show(config, arguments)
        return
    if arguments.show is not None or arguments.out_dir is None:
        raise ConfigError("OUT_DIR is missing, or --show is given for plain text; give one.")
    stop = StopRequest()
    stop.listen()
    vocab_size = given.get("vocab_size", None if "tokenizer" in given else LEARNT_IDS)
    found = tokenize(config, arguments.out_dir, vocab_size, arguments.chat_template, stop)
    sys.stdout.write(
        f"tokenized folder={arguments.out_dir} vocab_size={found.vocab_size} "
        f"train_tokens={found.train_tokens} eval_tokens={found.eval_tokens}\n"
    )


def _show(config: "TextsConfig", arguments: argparse.Namespace) -> None:
    """Print conversations; raise :class:`ConfigError` where a run does the work itself."""
    from ..training.data.chat_show import show_conversations

    if arguments.show is None or arguments.out_dir is not None:
        raise ConfigError(
            f"--format is {config.format}, which a run tokenizes itself "
            f"(data.format={config.format}); give --show N to look at it, and no OUT_DIR."
        )
    for text in show_conversations(config, arguments.show, sys.stdout.isatty()):
        sys.stdout.write(text)
