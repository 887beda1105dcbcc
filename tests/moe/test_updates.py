"""Updates on disk: which versions lead where, and what damage is found."""

import random
import shutil

import pytest
import torch

from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.updates.chain import path_to_newest
from moeyard.moe.updates.folder import UpdatesFolder
from moeyard.moe.updates.manifest import UpdateError
from moeyard.moe.updates.read import OpenUpdate

from live_runs import RandomRun, decoder_of


@pytest.mark.parametrize(
    ("current", "base_of", "path"),
    [
        (None, {}, []),
        (None, {1: None}, [1]),
        (None, {1: None, 2: 1, 3: 2}, [1, 2, 3]),
        (None, {2: 1, 3: 2}, []),
        (2, {1: None, 2: 1, 3: 2, 4: 3}, [3, 4]),
        (2, {3: 2, 4: 3, 5: None, 6: 5}, [5, 6]),
        (2, {5: None, 7: 6}, [5]),  # 6 is lost
        (2, {4: 3, 6: 5}, []),
        (6, {1: None, 5: None, 6: 5}, []),
        (1, {3: 3, 4: 5, 5: 4}, []),  # no version changes itself, or a later one
    ],
)
def test_a_receiver_takes_the_shortest_way_to_the_newest_version_it_can_reach(
    current, base_of, path
):
    assert path_to_newest(current, base_of) == path
    shuffled = list(base_of.items())
    random.Random(0).shuffle(shuffled)
    assert path_to_newest(current, dict(shuffled)) == path


@pytest.fixture
def update(model_folder, tmp_path):
    run = RandomRun(decoder_of(model_folder), tmp_path / "updates")
    run.publish(None)
    return run.updates.of(1)


def read_all(folder):
    """Read every unit, as a server does before it changes anything."""
    manifest = UpdatesFolder(folder.parent).manifest(1)
    opened = OpenUpdate(folder, manifest, FAMILIES["qwen3_moe"])
    shapes = {"gate": (20, 24), "up": (20, 24), "down": (24, 20)}
    for key in manifest.units:
        if isinstance(key, str):
            opened.dense(key)
        else:
            opened.read_expert(key, {part: torch.empty(s) for part, s in shapes.items()})
    opened.close()


def test_no_changed_byte_of_an_update_is_read(update):
    read_all(update)
    draw = random.Random(3)
    for name in ("update.json", "model.safetensors"):
        whole = (update / name).read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        places = draw.sample(range(len(whole)), 40)
        places += draw.sample(range(min(header, len(whole))), 20)  # which may be padding
        for place in places:
            data = bytearray(whole)
            data[place] ^= 1 << draw.randrange(8)
            (update / name).write_bytes(data)
            if name == "update.json" and data[place : place + 1].isspace():
                continue  # JSON does not see which blank it is
            with pytest.raises(UpdateError) as raised:
                read_all(update)
            assert str(update) in str(raised.value) and raised.value.version == 1
        (update / name).write_bytes(whole)
    read_all(update)


@pytest.mark.parametrize("name", ["update.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["cut", "empty", "missing"])
def test_a_torn_update_is_one_sentence(update, name, how):
    path = update / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if how == "cut" else 0])
    with pytest.raises(UpdateError) as raised:
        read_all(update)
    message = str(raised.value)
    assert message.startswith(str(update)) and message.count("\n") == 0 and message.endswith(".")
    assert "the version before stays until the next whole one" in message


def test_old_versions_go_when_newer_full_snapshots_are_there(model_folder, tmp_path):
    run = RandomRun(decoder_of(model_folder), tmp_path / "updates")
    for _ in range(9):  # full: 1, 5, 9
        run.next(full_every=4)
    run.updates.prune(keep=2)
    assert run.updates.versions() == [5, 6, 7, 8, 9]
    (run.updates.of(9) / "update.json").unlink()  # damaged, so it counts for nothing
    run.updates.prune(keep=1)
    assert run.updates.versions() == [5, 6, 7, 8, 9]
    shutil.rmtree(run.updates.of(9))
    run.version = 8
    run.publish(None)
    run.updates.prune(keep=1)
    assert run.updates.versions() == [9]
