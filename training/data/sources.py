"""Open what ``data.source`` names."""

import sys
from pathlib import Path

from ...errors import DataError
from ..formats.text import TextsConfig
from .documents import HUB, RECORD_SUFFIXES, Files, Source, StandardLibrary, TextFile
from .hub import HubSource

MOST_NAMES = 3
"""Skipped files that the log names."""


def open_source(config: TextsConfig, source: str, split: str, field: str) -> Source:
    """Open a source of the kinds that ``data.source`` takes, except shards.

    ``field`` is the configuration key that messages name, ``split`` that of a data set.
    """
    if source == "stdlib":
        return StandardLibrary()
    if source.startswith(HUB):
        return HubSource(config, source, split, field)
    path = Path(source)
    paths = [path]
    if path.is_dir():
        paths = _files_in(path, field, source)
    elif not path.is_file():
        next(iter(TextFile(path, source, field)), "")  # says why it cannot be read
    return Files(paths, source, config.text_key, field)


def _files_in(folder: Path, field: str, source: str) -> list[Path]:
    """Return the files of a folder to read; log the names of the others."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    read = [path for path in files if path.suffix.lower() in (".txt", *RECORD_SUFFIXES)]
    read_ones = set(read)
    skipped = [path.relative_to(folder).as_posix() for path in files if path not in read_ones]
    if not read:
        raise DataError(
            f"{field} is the folder {source!r}, which holds no .txt, .jsonl, .ndjson or .json "
            f"file among its {len(files)} files; give one that does."
        )
    if skipped:
        shown = ", ".join(skipped[:MOST_NAMES]) + (", ..." if len(skipped) > MOST_NAMES else "")
        sys.stderr.write(
            f"event=skipped_files folder={source} count={len(skipped)} files={shown!r}\n"
        )
    return read
