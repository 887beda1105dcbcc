"""Text comes out whole: no half characters, no half stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.moe.models.text_stream import TextStream


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def feed(text: str, stop=()) -> tuple[list[str], TextStream]:
    stream = TextStream(decode, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()], stream


@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_never_hold_half_a_character(text):
    pieces, _ = feed(text)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(
    st.text(alphabet="abé", max_size=30),
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text, stop):
    pieces, stream = feed(text, stop)
    out = "".join(pieces)
    assert not any(s in out for s in stop)
    if any(s in text for s in stop):
        assert stream.is_stopped and text.startswith(out)
        # Nothing was withheld but what belongs to a stop string.
        assert any(text[len(out) :].startswith(s) for s in stop)
    else:
        assert out == text and not stream.is_stopped


@given(st.binary(max_size=24))
def test_bytes_that_are_no_text_come_out_as_decoding_all_of_them(data):
    stream = TextStream(decode, [])
    pieces = [stream.push(byte) for byte in data] + [stream.finish()]
    assert "".join(pieces) == decode(list(data))


def test_the_first_piece_keeps_the_space_that_the_prompt_gives_it():
    words = {1: "the", 2: "cat", 3: "sat", 4: "on"}

    def decode_words(ids):  # like SentencePiece: the text's first word loses its space
        return "".join(f" {words[i]}" for i in ids).removeprefix(" ")

    stream = TextStream(decode_words, [], context=[1, 2])
    assert [stream.push(3), stream.push(4)] == [" sat", " on"]


def test_holds_back_what_may_become_a_stop_string():
    stream = TextStream(decode, ["\n\n"])
    assert stream.push(ord("a")) == "a"
    assert stream.push(ord("\n")) == ""
    assert stream.push(ord("b")) == "\nb"


@pytest.mark.parametrize("tail", [b"\xe6", b"\xe6\x97", b"\xf0\x9f\x98"])
def test_an_unfinished_character_at_the_end_becomes_a_replacement(tail):
    stream = TextStream(decode, [])
    assert all(stream.push(byte) == "" for byte in tail)
    assert stream.finish() == tail.decode(errors="replace")
