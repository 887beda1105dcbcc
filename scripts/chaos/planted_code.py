"""Code planted in a model folder, a template or a configuration is never run.

    python scripts/chaos/planted_code.py

Every payload would make a file; none may appear. Each row is checked, served and asked for text
in a child with 40 s of computing and 3 GiB. Exits with 1 on a fault.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from moeyard.errors import MoeyardError
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server, check_model
from moeyard.training.data.tokenizer import open_tokenizer

from bounded import ROOT, Outcome, bounded, finish, report, scratch
from http_calls import call
from small_model import write_random_model


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


def pickled(command: str) -> bytes:
    return pickle.dumps(Payload(command))


def archive(path: Path, command: str) -> None:
    """Write what ``torch.save`` makes: a pickle in a ZIP file."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled(command))
        file.writestr("archive/version", "3")


def change(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **values}))


def module(folder: Path, name: str, command: str) -> None:
    code = f"import os\nos.system({command!r})\nclass Thing:\n    pass\n"
    (folder / name).write_text(code)


def as_weights(name: str, folder: Path, command: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickled(command))


def archive_as_weights(name: str, folder: Path, command: str) -> None:
    (folder / "model.safetensors").unlink()
    archive(folder / name, command)


def beside(name: str, folder: Path, command: str) -> None:
    (folder / name).write_bytes(pickled(command))


def model_code(folder: Path, command: str) -> None:
    module(folder, "modeling_x.py", command)
    keys = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    change(folder / "config.json", auto_map=dict.fromkeys(keys, "modeling_x.Thing"))


def tokenizer_code(folder: Path, command: str) -> None:
    module(folder, "tokenization_x.py", command)
    names = ["tokenization_x.Thing", "tokenization_x.Thing"]
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": names})


def tokenizer_class(name: str, folder: Path, command: str) -> None:
    module(folder, "tokenization_x.py", command)
    change(folder / "tokenizer_config.json", tokenizer_class=name)


def only_tokenizer_class(name: str, folder: Path, command: str) -> None:
    tokenizer_class(name, folder, command)
    change(folder / "config.json", tokenizer_class=name)
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "tokenizer.json").unlink()


def generation_code(folder: Path, command: str) -> None:
    (folder / "custom_generate").mkdir()
    module(folder / "custom_generate", "generate.py", command)


def python_files(folder: Path, command: str) -> None:
    for name in ("sitecustomize.py", "usercustomize.py", "conftest.py", "json.py", "torch.py"):
        module(folder, name, command)


def template(text: str, folder: Path, command: str) -> None:
    (folder / "chat_template.jinja").write_text(text.replace("COMMAND", command))


GLOBALS = "{{ %s.__globals__['os'].popen('COMMAND').read() }}"
SUBCLASSES = (
    "{% for c in ''.__class__.__base__.__subclasses__() %}"
    "{% if c.__name__ == 'Popen' %}{{ c('COMMAND', shell=True) }}{% endif %}{% endfor %}"
)
FOLDERS: dict[str, Callable[[Path, str], None]] = {
    "pytorch_model.bin, a pickle": partial(as_weights, "pytorch_model.bin"),
    "pytorch_model.bin, an archive": partial(archive_as_weights, "pytorch_model.bin"),
    "model.pt": partial(as_weights, "model.pt"),
    "model.safetensors is a pickle": partial(as_weights, "model.safetensors"),
    "model.safetensors is an archive": partial(archive_as_weights, "model.safetensors"),
    "a pickle next to the weights": partial(beside, "pytorch_model.bin"),
    "vocab.pkl": partial(beside, "vocab.pkl"),
    "tokenizer.pickle": partial(beside, "tokenizer.pickle"),
    "vocab_file.bin": partial(beside, "vocab_file.bin"),
    "tokenizer.model is a pickle": partial(beside, "tokenizer.model"),
    "training_args.bin": partial(beside, "training_args.bin"),
    "auto_map of the model": model_code,
    "auto_map of the tokenizer": tokenizer_code,
    "tokenizer_class os.system": partial(tokenizer_class, "os.system"),
    "tokenizer_class of a file": partial(tokenizer_class, "tokenization_x.Thing"),
    "tokenizer_class alone": partial(only_tokenizer_class, "tokenization_x.Thing"),
    "TransfoXLTokenizer": partial(only_tokenizer_class, "TransfoXLTokenizer"),
    "RagTokenizer": partial(only_tokenizer_class, "RagTokenizer"),
    "custom_generate": generation_code,
    "Python files": python_files,
    "template: cycler": partial(template, GLOBALS % "cycler.__init__"),
    "template: joiner": partial(template, GLOBALS % "joiner.__init__"),
    "template: namespace": partial(template, GLOBALS % "namespace.__init__"),
    "template: lipsum": partial(template, GLOBALS % "lipsum"),
    "template: raise_exception": partial(template, GLOBALS % "raise_exception"),
    "template: tojson": partial(template, GLOBALS % "self._TemplateReference__context.eval_ctx"),
    "template: subclasses": partial(template, SUBCLASSES),
    "template: attr": partial(
        template, "{{ (lipsum | attr('__globals__'))['os'].system('COMMAND') }}"
    ),
    "template: map": partial(
        template, "{{ [lipsum] | map(attribute='__globals__.os') | map('string') | list }}"
    ),
    "template: format": partial(template, "{{ '{0.__globals__[os]}'.format(lipsum) }}"),
    "template: import": partial(template, "{% import 'os' as os %}{{ os.system('COMMAND') }}"),
    "template: loop": partial(
        template, "{% for x in [1] %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}"
    ),
}
YAML = {
    "YAML: object/apply": "model: !!python/object/apply:os.system ['COMMAND']",
    "YAML: object/new": "model: !!python/object/new:os.system ['COMMAND']",
    "YAML: name": "model: !!python/name:os.system",
    "YAML: module": "model: !!python/module:os",
}


def use(folder: Path) -> str:
    """Check, serve and ask; train's tokenizer is opened too."""
    args = ServeArgs(model=str(folder), served_model_name="m")
    with suppress(MoeyardError):  # the check below says why
        open_tokenizer(str(folder))
    check_model(args, runs_here=True)
    server = Server(args)
    messages = [{"role": "user", "content": "a"}]
    bodies = {"completions": {"prompt": "a"}, "chat/completions": {"messages": messages}}
    found = []
    for path, body in bodies.items():
        body = {"model": "m", "max_tokens": 2, **body}
        answer = call(server, "POST", f"/v1/{path}", headers={}, json=body)
        assert answer.status_code in (200, 400), answer.text
        found.append(str(answer.status_code))
    return f"answers with {' and '.join(found)}"


def print_config(path: Path) -> str:
    command = [sys.executable, "-m", "moeyard.training", str(path), "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    return f"rc {done.returncode} {done.stderr.strip()}"


def main() -> None:
    faults: list[str] = []
    with scratch() as space:
        write_random_model(space / "base")
        canary, folder = space / "canary", space / "folder"
        command = f"touch {canary}"

        def note(name: str, outcome: Outcome) -> None:
            if report(name, outcome) or canary.exists():
                faults.append(name + (": the code was run" if canary.exists() else ""))
                canary.unlink(missing_ok=True)

        subprocess.run(command, shell=True, check=True)
        assert canary.exists(), "the payload does nothing"
        canary.unlink()
        pickle.loads(pickled(command))
        assert canary.exists(), "the pickled payload does nothing"
        canary.unlink()
        for name, plant in FOLDERS.items():
            shutil.copytree(space / "base", folder)
            plant(folder, command)
            note(name, bounded(partial(use, folder)))
            shutil.rmtree(folder)
        for name, text in YAML.items():
            path = space / "train.yaml"
            path.write_text(text.replace("COMMAND", command))
            note(name, bounded(partial(print_config, path)))
    finish("planted code", faults, len(FOLDERS) + len(YAML))


if __name__ == "__main__":
    main()
