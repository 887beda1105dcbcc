"""Prices of lossy modes: written, read, refused, and said."""

from pathlib import Path

import pytest

from moeyard.errors import ModelFileError
from moeyard.moe.folders.prices import FILE, Measured, Price, read_prices, save_price
from moeyard.serving.planning.lossy import lossy_sentences


def price(mode: str, perplexity: float, speed: float | None = None) -> Price:
    exact = Measured(perplexity=4.0, expert_bytes=1000, tokens_per_s=speed and 10.0)
    lossy = Measured(perplexity=perplexity, expert_bytes=250, tokens_per_s=speed)
    return Price(mode=mode, text="held_out.txt", tokens=5000, exact=exact, lossy=lossy)


def test_a_price_comes_back_and_replaces_only_that_of_its_mode(tmp_path: Path) -> None:
    for one in (price("int4", 4.5), price("int8", 4.01), price("int4", 4.4, 25.0)):
        save_price(tmp_path, one)
    assert read_prices(tmp_path) == {"int4": price("int4", 4.4, 25.0), "int8": price("int8", 4.01)}


def test_a_mode_says_what_it_costs_or_that_no_one_measured_it(tmp_path: Path) -> None:
    save_price(tmp_path, price("int4", 4.4, 25.0))
    known, unknown = lossy_sentences(tmp_path, ["int4", "int8"])
    assert "4.4 instead of 4 (+10.0%) on 5,000 tokens of held_out.txt" in known
    assert "25% of the bytes" in known and "2.50 times the speed" in known
    assert unknown == "int8 is lossy; its price is not known."


@pytest.mark.parametrize("text", ["{", "[]", '{"prices": [{"mode": 1}]}'])
def test_another_file_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelFileError, match="is not a file of prices; delete it"):
        read_prices(tmp_path)
