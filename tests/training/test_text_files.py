"""Text as people have it: JSON of several shapes, byte order marks, files that are no text."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.errors import DataError
from moeyard.training.data.records import NotJson, read_records
from moeyard.training.data.sources import open_source
from moeyard.training.formats.text import TextConfig

ROWS = [{"text": f"document {n} café \u2028 \r\n [", "n": [n]} for n in range(9)]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
BOM = b"\xef\xbb\xbf"


def read(source, field="data.source", **options):
    config = TextConfig(source=str(source), **options)
    return ["".join(document) for document in open_source(config, str(source), "train", field)]


JSON_FILES = {
    "lines.jsonl": LINES.encode(),
    "lines.NDJSON": LINES.encode(),
    "lines.json": LINES.replace("\n", "\r\n").encode(),
    "LINES.JSONL": b"\n\n" + LINES.encode(),
    "bom.jsonl": BOM + LINES.encode(),
    "list.json": json.dumps(ROWS).encode(),
    "pretty.Json": b" \n" + json.dumps(ROWS, indent=3).encode() + b"\n\n",
    "list.jsonl": BOM + json.dumps(ROWS, separators=(",", ":")).encode(),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_is_read_as_its_objects_whatever_its_shape(tmp_path, name):
    (tmp_path / name).write_bytes(JSON_FILES[name])
    assert read(tmp_path / name) == read(tmp_path) == TEXTS
    if name != "pretty.Json":  # the datasets library wants no blanks before a list
        assert read(f"hf:{tmp_path / name}") == TEXTS


@pytest.mark.parametrize("name", ["lines.jsonl.gz", "LINES.NDJSON.GZ"])
def test_a_compressed_file_is_read_by_the_datasets_library_alone(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES.encode()))
    assert read(f"hf:{tmp_path / name}") == TEXTS
    with pytest.raises(DataError, match=r"is compressed \(gzip\); unpack it first"):
        read(tmp_path / name)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.TXT").write_bytes(BOM + "one\r\ntwo \ufeff".encode())
    assert read(tmp_path / "a.TXT") == ["one\ntwo \ufeff"]


values = st.lists(st.none() | st.text(max_size=4), max_size=2) | st.text(max_size=5)
rows = st.lists(st.dictionaries(st.text(max_size=3), values, max_size=2), max_size=4)


@settings(deadline=None, max_examples=25)
@given(rows, st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 9))
def test_a_list_is_read_wherever_its_blocks_end(rows, indent, is_ascii, size):
    text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii)
    blocks = [text[at : at + size] for at in range(0, len(text), size)]
    assert [value for _, value in read_records(iter(blocks))] == rows
    whole = text.rstrip()
    if rows:
        with pytest.raises(NotJson):
            list(read_records(iter([whole[:-1]])))
        with pytest.raises(NotJson, match=f"what follows object {len(rows)}"):
            list(read_records(iter([whole, " {}"])))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"t": "b"}]', "a.json object 2 is not a JSON object with"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "object 2"),
        ("a.json", b'["a"]', "object 1"),
        ("a.json", b'[{"text": "\\ud83d"}]', "object 1"),
        ("a.json", b'[{"text": "a"},]', "object 2"),
        ("a.json", b'{\n "text": "a"\n}', "line 1"),
        ("a.json", b"[" * 100_000, "object 1"),
        ("a.ndjson", b'{"text": "a"}\n7\n', "line 2"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16; convert it to UTF-8 first"),
        ("a.txt", ("text " * 50).encode("utf-16-le"), "is full of NUL bytes, as UTF-16"),
        ("a.jsonl", LINES.encode("utf-16-be"), "NUL bytes|is not UTF-8"),
        ("a.txt", b"\x28\xb5\x2f\xfd...", r"is compressed \(zstd\)"),
        ("a.parquet", b"PAR1...", "is a Parquet file; give hf:/"),
        ("a.CSV", b"text\na\n", "is a table; give hf:/"),
    ],
)
def test_what_is_not_text_is_called_by_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name, "data.eval_source")
    assert "\n" not in str(error.value)


def test_a_table_is_read_by_the_column_that_is_asked_for(tmp_path):
    (tmp_path / "a.csv").write_bytes(BOM + b"id,words\n1,one\n2,two\n")
    assert read(f"hf:{tmp_path / 'a.csv'}", text_key="words") == ["one", "two"]
