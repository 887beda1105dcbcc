"""Reliability, row 5: a checkpoint that was changed is passed over or refused with a sentence.

    python scripts/chaos/mutated_checkpoints.py [--mutations 1000] [--forgeries 250] [--seed 0]

Mutations leave the manifest's hashes as they are: the one before must be chosen, or the bytes be
unchanged. Forgeries make the hashes fit. Those may load, since nothing signs a checkpoint; they
must not run what a pickle says, and must not end in anything but a sentence. Each is resumed as
training does and read as an export does.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import pickle
import random
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from moeyard.errors import MoeyardError
from moeyard.files import sha256_of
from moeyard.parallel.mesh import Mesh
from moeyard.training.__main__ import main as train
from moeyard.training.checkpoints.checkpoint import Checkpoints, StoredTensors
from moeyard.training.checkpoints.files import read_state
from moeyard.training.config import RunConfig
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

from small_runs import work_folder
from verdict import Verdict

Change = Callable[[Path, random.Random], None]


def some_file(step: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(path for path in step.iterdir() if path.is_file()))


def truncate(step: Path, chance: random.Random) -> None:
    path = some_file(step, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))


def change_bytes(
    path: Path, chance: random.Random, width: int, make: Callable[[bytes], bytes]
) -> None:
    data = bytearray(path.read_bytes())
    at = chance.randrange(max(1, len(data) - width))
    data[at : at + width] = make(bytes(data[at : at + width]))
    path.write_bytes(data)


def flip(step: Path, chance: random.Random) -> None:
    bit = 1 << chance.randrange(8)
    change_bytes(some_file(step, chance), chance, 1, lambda old: bytes([old[0] ^ bit]))


def zero_block(step: Path, chance: random.Random) -> None:
    change_bytes(
        some_file(step, chance), chance, chance.randint(1, 64), lambda old: bytes(len(old))
    )


def random_block(step: Path, chance: random.Random) -> None:
    change_bytes(some_file(step, chance), chance, 64, lambda old: chance.randbytes(len(old)))


def delete(step: Path, chance: random.Random) -> None:
    some_file(step, chance).unlink()


def append(step: Path, chance: random.Random) -> None:
    with some_file(step, chance).open("ab") as file:
        file.write(chance.randbytes(chance.randint(1, 100)))


def swap(step: Path, chance: random.Random) -> None:
    one, two = chance.sample(sorted(step.iterdir()), 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def folder_in_place(step: Path, chance: random.Random) -> None:
    path = some_file(step, chance)
    path.unlink()
    path.mkdir()


def from_older(step: Path, chance: random.Random) -> None:
    path = some_file(step, chance)
    shutil.copyfile(step.parent / "step-00000004" / path.name, path)


def extra_file(step: Path, chance: random.Random) -> None:
    (step / f"extra-{chance.random()}").write_bytes(chance.randbytes(10))


def path_out(step: Path, chance: random.Random) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    name = chance.choice(sorted(manifest["files"]))
    manifest["files"][f"../{step.name}/{name}"] = manifest["files"].pop(name)
    (step / "manifest.json").write_text(json.dumps(manifest))


MUTATIONS: list[Change] = [truncate, flip, zero_block, random_block, delete, append, swap]
MUTATIONS += [folder_in_place, from_older, extra_file, path_out]


def forged_pickle(step: Path, payload: bytes) -> None:
    (step / ".metadata").write_bytes(payload)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def calls(step: Path, chance: random.Random) -> None:
    forged_pickle(step, pickle.dumps(_Canary(step.parent.parent / "canary")))


def deep_pickle(step: Path, chance: random.Random) -> None:
    forged_pickle(step, b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".")


def long_pickle(step: Path, chance: random.Random) -> None:
    forged_pickle(step, b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.")


def other_object(step: Path, chance: random.Random) -> None:
    forged_pickle(
        step, pickle.dumps(chance.choice([None, 7, [], {}, {"storage_data": {}}, "text"]))
    )


def edited_metadata(step: Path, chance: random.Random) -> None:
    """Keep a pickle that is well formed and says other sizes, places or names."""
    with (step / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    key = chance.choice(sorted(metadata.state_dict_metadata))
    entry = metadata.state_dict_metadata[key]
    index = chance.choice(list(metadata.storage_data))
    info = metadata.storage_data[index]
    kind = chance.randrange(10)
    if kind == 0:
        entry.size = torch.Size([1 << 40, 1 << 20])
    elif kind == 1:
        entry.chunks[0].sizes = torch.Size([1 << 45])
    elif kind == 2:
        info.offset = -5
    elif kind == 3:
        info.length = 1 << 50
    elif kind == 4:
        info.relative_path = "../../../../etc/passwd"
    elif kind == 5:
        info.relative_path = "/dev/zero"
    elif kind == 6:
        entry.properties.dtype = "float"
    elif kind == 7:
        del metadata.state_dict_metadata[key]
    elif kind == 8:
        entry.chunks.clear()
    else:
        info.offset += 17
    forged_pickle(step, pickle.dumps(metadata))


def edited_state(step: Path, chance: random.Random) -> None:
    """Keep JSON, with a value that no run writes."""
    state = json.loads((step / "state.json").read_text())
    key = chance.choice(sorted(state))
    odd = [None, -1, 10**30, "x" * 1000, [], {}, {"a": {"b": []}}, True, 1.5, float("nan")]
    state[key] = chance.choice(odd)
    if chance.random() < 0.2:
        del state[key]
    (step / "state.json").write_text(json.dumps(state))


def deep_state(step: Path, chance: random.Random) -> None:
    (step / "state.json").write_text("[" * 200_000)


def bent(name: str) -> Change:
    def change(step: Path, chance: random.Random) -> None:
        files = sorted(step.glob(name))
        for _ in range(chance.randint(1, 4)):
            change_bytes(
                chance.choice(files),
                chance,
                chance.randint(1, 8),
                lambda old: chance.randbytes(len(old)),
            )

    change.__name__ = f"bent {name}"
    return change


FORGERIES: list[Change] = [
    calls,
    deep_pickle,
    long_pickle,
    other_object,
    edited_metadata,
    edited_metadata,
]
FORGERIES += [
    edited_metadata,
    edited_state,
    edited_state,
    deep_state,
    bent(".metadata"),
    bent(".metadata"),
]
FORGERIES += [bent("*.distcp"), bent("state.json")]


def make_hashes_fit(step: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in step.iterdir()
        if path.is_file() and path.name != "manifest.json"
    }
    (step / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))


def contents(step: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in step.iterdir()
        if path.is_file() and not path.name.startswith("extra-")
    }


def mutated(run: Path, newest: Path, before: dict[str, bytes], older: dict[str, bytes]) -> str:
    """Return what came of a mutation; "WRONG" or an error's name is a fault."""
    try:
        chosen = Checkpoints(run, Mesh(), 2).newest_whole()
        assert chosen is not None
        read_state(chosen)
    except MoeyardError:
        return "sentence"
    except BaseException as error:
        return f"CRASH {type(error).__name__}: {error}"
    if chosen == newest:
        listed = {name: data for name, data in contents(newest).items() if name != "manifest.json"}
        wanted = {name: data for name, data in before.items() if name != "manifest.json"}
        return "unchanged" if listed == wanted else "WRONG newest"
    return "previous" if contents(chosen) == older else "WRONG previous"


def forged(config: RunConfig, run: Path) -> str:
    """Resume and read everything; return "loaded" or "sentence", anything else is a fault."""
    outcome = "loaded"
    for read in (resume, read_all):
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                read(config, run)
        except MoeyardError as error:
            outcome = "sentence" if len(str(error)) < 3000 else "CRASH a sentence of 3000 letters"
        except BaseException as error:
            return f"CRASH {type(error).__name__} in {read.__name__}: {str(error)[:200]}"
    return outcome


def resume(config: RunConfig, run: Path) -> None:
    Trainer(config, run, Mesh()).saves.resume()


def read_all(config: RunConfig, run: Path) -> None:
    newest = Checkpoints(run, Mesh(), 2).newest_whole()
    if newest is not None:
        for _ in StoredTensors(newest).values():
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--forgeries", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    verdict, folder = Verdict(), work_folder()
    print(f"seed {chosen.seed}")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    good, run = folder / "good", folder / "run"
    with contextlib.redirect_stderr(io.StringIO()):
        assert train([str(folder / "run.yaml"), f"run_dir={good}", "train.steps=6"]) == 0
    newest = run / "checkpoints" / "step-00000006"
    before = contents(good / "checkpoints" / "step-00000006")
    older = contents(good / "checkpoints" / "step-00000004")
    chance = random.Random(chosen.seed)

    def fresh() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(good, run)

    found: Counter[str] = Counter()
    for number in range(chosen.mutations):
        change = MUTATIONS[number % len(MUTATIONS)]
        fresh()
        change(newest, chance)
        outcome = mutated(run, newest, before, older)
        found[outcome] += 1
        if "WRONG" in outcome or "CRASH" in outcome:
            verdict.check(f"mutation {number} {change.__name__}", False, outcome)
    bad = sum(
        n for outcome, n in found.items() if outcome not in ("previous", "unchanged", "sentence")
    )
    verdict.check(f"{chosen.mutations} mutations", bad == 0, dict(found))

    found.clear()
    config = read_run_config(folder / "run.yaml", [f"run_dir={run}", "train.steps=6"])
    for number in range(chosen.forgeries):
        change = FORGERIES[number % len(FORGERIES)]
        fresh()
        change(newest, chance)
        make_hashes_fit(newest)
        outcome = forged(config, run)
        found[outcome.split(":")[0]] += 1
        if (run / "canary").exists():
            outcome = "CRASH the pickle was run"
        if outcome not in ("loaded", "sentence"):
            verdict.check(f"forgery {number} {change.__name__}", False, outcome)
    bad = sum(n for outcome, n in found.items() if outcome not in ("loaded", "sentence"))
    verdict.check(f"{chosen.forgeries} forgeries", bad == 0, dict(found))
    shutil.rmtree(folder)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
