"""``moeyard report``: the page says what the run's files say, and loads nothing from elsewhere."""

import base64
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moeyard.cli import main as moeyard
from moeyard.training.__main__ import main as train
from moeyard.training.report.charts import short, smooth, stacked_chart, thin, ticks
from moeyard.training.report.heat import choose_cap, encode
from moeyard.training.report.read import _stride, read_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config_file) -> Path:
    """A run of six steps, resumed for two more."""
    run = tmp_path_factory.mktemp("report") / "run"
    assert train([str(config_file), f"run_dir={run}"]) == 0
    assert train([str(config_file), f"run_dir={run}", "train.steps=8"]) == 0
    return run


@pytest.fixture
def run(tmp_path, trained) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def page_of(run) -> str:
    assert moeyard(["report", str(run)]) == 0
    return (run / "report.html").read_text()


class Chart:
    """A chart of the page, with its lines turned back into data."""

    def __init__(self, page: str, title: str) -> None:
        (text,) = re.findall(rf'<svg [^>]*aria-label="{re.escape(title)}".*?</svg>', page)
        root = ElementTree.fromstring(text.replace(" data-stacked>", ">"))
        x0, x1, y0, y1 = map(float, root.get("data-scale").split(","))
        self.lines = {}
        for line in root.iter("polyline"):
            pairs = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
            self.lines[line.get("data-name")] = [
                (x0 + (x - 48) / 340 * (x1 - x0), y0 + (204 - y) / 182 * (y1 - y0))
                for x, y in pairs
            ]
        self.marks = [line for line in root.iter("line") if line.get("class") == "mark"]

    def values(self, name) -> list[float]:
        return [y for _, y in self.lines[name]]


def test_curves_show_the_recorded_values(run):
    page, written = page_of(run), records(run)
    steps = [record["step"] for record in written]
    for title, name, key in (
        ("Loss", "training", "loss"),
        ("Gradient norm", "gradient norm", "grad_norm"),
        ("Learning rate", "learning rate", "lr"),
        ("Speed", "all ranks together", "tokens_per_s"),
    ):
        chart = Chart(page, title)
        assert [x for x, _ in chart.lines[name]] == pytest.approx(steps, abs=0.01)
        expected = [record[key] for record in written]
        assert chart.values(name) == pytest.approx(expected, abs=2e-4 * max(expected)), title
    held_out = [record["eval_loss"] for record in written if "eval_loss" in record]
    assert Chart(page, "Loss").values("held out") == pytest.approx(held_out, rel=1e-3)
    assert len(held_out) == 2 and len(Chart(page, "Loss").marks) == 1  # resumed at step 6
    for layer in range(2):
        expected = [record["load"][layer]["max_over_mean"] for record in written]
        shown = Chart(page, "Largest over mean load").values(f"layer {layer}")
        assert shown == pytest.approx(expected, abs=1e-3)


def test_phases_are_stacked_up_to_the_whole_step(run):
    chart = Chart(page_of(run), "Where a step's time goes".replace("'", "&#x27;"))
    totals = [1000 * sum(record["phases_s"].values()) for record in records(run)]
    assert chart.values("checkpoint") == pytest.approx(totals, rel=2e-3)
    forward = [1000 * record["phases_s"]["forward"] for record in records(run)]
    below, top = chart.values("data"), chart.values("forward")
    shown = [b - a for a, b in zip(below, top, strict=True)]
    assert shown == pytest.approx(forward, abs=1e-3 * max(totals))


def test_each_area_lies_between_its_line_and_the_one_below():
    svg = stacked_chart("T", "ms", [1, 2], [("a", [1.0, 2.0], ""), ("b", [3.0, 1.0], "")])
    areas = re.findall(r'<polygon class="area c\d" points="(.*?)"', svg)
    edges = [edge.split() for edge in re.findall(r'<polyline [^>]*points="(.*?)"', svg)]
    assert areas[1].split() == edges[1] + edges[0][::-1]
    assert areas[0].split() == [*edges[0], "388.0,204.0", "48.0,204.0"]


def test_experts_on_ranks_are_shown_where_records_have_them(run):
    assert "Experts on ranks" not in page_of(run)
    written = records(run)
    for number, record in enumerate(written, start=1):
        times = {"predicted_s": 0.001 * number, "measured_s": 0.002 * number}
        record["schedule"] = {
            "path": "hierarchical",
            "chunks": 4,
            "backward_chunks": 2,
            "r2": {"gather": 0.9},
            "phases": {"forward": times, "backward": times},
        }
        record["copies"] = {"number": number, "moved": 0, "share_without": 1.5, "share": 1.1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in written))
    page, numbers = page_of(run), list(range(1, 9))
    chunks = Chart(page, "Chunks of a layer's rows".replace("'", "&#x27;"))
    assert chunks.values("forward") == pytest.approx([4] * 8, abs=0.01)
    assert chunks.values("backward") == pytest.approx([2] * 8, abs=0.01)
    seconds = Chart(page, "Time of a layer")
    assert seconds.values("backward, measured") == pytest.approx([2 * n for n in numbers], abs=0.01)
    assert seconds.values("forward, predicted") == pytest.approx(numbers, abs=0.01)
    assert Chart(page, "Fit of the cost model").values("gather") == pytest.approx([0.9] * 8)
    shares = Chart(page, "Largest rank's share of rows".replace("'", "&#x27;"))
    assert shares.values("without copies") == pytest.approx([1.5] * 8, abs=0.01)
    assert shares.values("with copies") == pytest.approx([1.1] * 8, abs=0.01)
    assert Chart(page, "Copies of experts").values("copies") == pytest.approx(numbers, abs=0.02)


def test_the_heat_map_holds_every_expert_at_every_step(run):
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page_of(run))
    facts, written = json.loads(text), records(run)
    assert facts["steps"] == [record["step"] for record in written]
    assert facts["layers"] == [0, 1] and facts["experts"] == 4
    cells = iter(base64.b64decode(facts["cells"]))
    for record in written:
        for layer in record["expert_tokens"]:
            for rows in layer:
                shown = facts["cap"] ** ((next(cells) - 1) / 127 - 1)
                ratio = min(facts["cap"], max(1 / facts["cap"], rows * 4 / sum(layer)))
                assert shown == pytest.approx(ratio, rel=0.01)
    assert next(cells, None) is None


def test_the_table_and_the_cards_say_how_it_stands(run):
    page, last = page_of(run), records(run)[-1]
    for layer, load in enumerate(last["load"]):
        row = f"<tr><td>{layer}</td><td>{load['max_over_mean']:.3f}</td>"
        assert row in page
    assert f"<dd>{short(last['loss'])}<" in page
    assert "<dd>step-00000008</dd>" in page
    assert "starts so far: 2" in page and "4 experts, k = 2" in page
    assert f"of {math.log(4):.3f}" in page


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.found.append((tag, dict(attributes)))


def test_the_page_is_whole_and_loads_nothing(run):
    config = run / "config.yaml"
    config.write_text(config.read_text() + "# </pre><script src=http://a.example/x.js></script>\n")
    run = run.rename(run.with_name("a<img src=x>"))
    page = page_of(run)
    tags = Tags()
    tags.feed(page)
    assert not [tag for tag, attributes in tags.found if "src" in attributes]
    assert [a["href"] for _, a in tags.found if "href" in a] == ["data:,"]
    policy = next(a["content"] for _, a in tags.found if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert "url(" not in page and "@import" not in page
    assert {tag for tag, _ in tags.found} >= {"svg", "canvas", "table", "details"}
    for svg in re.findall(r"<svg .*?</svg>", page):
        ElementTree.fromstring(svg.replace(" data-stacked>", ">"))


def test_one_record_still_gives_a_page(run):
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (run / "metrics.jsonl").write_text(first + "\n")
    page = page_of(run)
    assert Chart(page, "Loss").values("training") == pytest.approx(
        [json.loads(first)["loss"]], 1e-3
    )
    assert "Step 1 of 8, one record." in page


def test_a_dense_model_has_no_expert_section(tmp_path, config_file):
    options = ["model.moe=null", "model.d_ff=16", "train.steps=2"]
    assert train([str(config_file), f"run_dir={tmp_path}/run", *options]) == 0
    page = page_of(tmp_path / "run")
    assert "Expert load" not in page and "Largest over mean" not in page
    assert len(Chart(page, "Loss").values("training")) == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (-1, "Line 8 of 8 in metrics.jsonl is half-written; the page ends there."),
        (4, "Line 5 of 8 in metrics.jsonl cannot be read; the page ends there."),
    ],
)
def test_a_damaged_line_ends_the_page_with_a_sentence(run, capsys, line, sentence):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[line] = lines[line][:100]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = page_of(run)
    assert sentence in page
    assert capsys.readouterr().err == f"warning: {sentence}\n"
    assert len(Chart(page, "Loss").values("training")) == lines.index(lines[line])


def test_what_is_no_run_gets_one_sentence(tmp_path, run, capsys):
    def refusal(*arguments) -> str:
        assert moeyard(["report", *map(str, arguments)]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and shown.count("\n") == 1
        return shown

    assert "nowhere is not a run folder (it has no config.yaml)" in refusal(tmp_path / "nowhere")
    assert "cannot be written (No such file" in refusal(run, "-o", tmp_path / "none" / "r.html")
    (run / "metrics.jsonl").write_text("{\n")
    assert "has no line that can be read" in refusal(run)
    (run / "metrics.jsonl").write_text("")
    assert "has no metrics yet; wait for the first logged step" in refusal(run)
    (run / "metrics.jsonl").unlink()
    assert "has no metrics yet" in refusal(run)
    (run / "config.yaml").write_text("a: [")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "config.yaml is not YAML" in refusal(run)


def test_a_long_run_is_thinned_says_so_and_keeps_its_peaks(run):
    record = records(run)[-1] | {"expert_tokens": [[1] * 64] * 8, "moe_layers": list(range(8))}
    record |= {"load": record["load"] * 4}
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 3001):
            loss = 90.0 if step == 1234 else 2.0
            file.write(json.dumps(record | {"step": step, "loss": loss}) + "\n")
    page = page_of(run)
    assert len(page) < 2_000_000
    assert "Long curves are thinned" in page and "The heat map has 121 moments." in page
    faint = Chart(page, "Loss").lines["training, each record"]
    assert len(faint) <= 602
    (peak,) = [x for x, y in faint if y > 50]
    assert peak == pytest.approx(1234, abs=0.1)


def test_the_heat_map_has_a_budget():
    for lines, cells in ((100_000, 48 * 128), (100_000, 61 * 256), (50, 32), (3, 10**6)):
        assert -(-lines // _stride(lines, cells)) * cells <= max(600_000, 2 * cells)
    assert _stride(50, 32) == 1


def test_thinning_keeps_both_extremes_and_both_ends():
    points = [(float(i), math.sin(i / 50) + (i == 777) * 9 - (i == 1500) * 9) for i in range(5000)]
    kept = thin(points)
    assert len(kept) <= 602
    assert {points[0], points[-1], points[777], points[1500]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(points[:600]) == points[:600]


def test_areas_are_thinned_by_their_mean():
    steps = list(range(1, 901))
    values = [float(step % 3) for step in steps]
    svg = stacked_chart("T", "ms", steps, [("a", values, ""), ("b", [1.0] * 900, "")])
    chart = Chart(svg, "T")
    assert len(chart.lines["a"]) == 300
    assert chart.values("a") == pytest.approx([1.0] * 300, abs=1e-3)
    assert chart.values("b") == pytest.approx([2.0] * 300, abs=1e-3)


def test_smoothing_is_unbiased_at_the_start():
    constant = smooth([(float(i), 3.0) for i in range(200)])
    assert [y for _, y in constant] == pytest.approx([3.0] * 200)
    assert smooth([(1.0, 5.0), (2.0, 7.0)]) == [(1.0, 5.0), (2.0, 7.0)]


def test_ticks_are_round_and_cover():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(1.9, 5.2) == [1, 2, 3, 4, 5, 6]
    assert ticks(0.0, 0.004) == [0, 0.001, 0.002, 0.003, 0.004]
    for low, high in ((3, 3), (0, 0), (-2, 7), (1e-9, 2e-9), (5e8, 9e8)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9


def test_cells_span_the_scale_and_idle_is_its_own():
    assert [encode(r, 4.0) for r in (0, 0.01, 0.25, 1.0, 4.0, 99.0)] == [0, 1, 1, 128, 255, 255]
    assert choose_cap([1.0] * 100) == 1.5
    assert choose_cap([1.0] * 80 + [1.9] * 20) == 2.0
    assert choose_cap([1.0] * 95 + [40.0] * 5) == 1.5
    assert choose_cap([0.26] * 50 + [0.0] * 50) == 4.0
    assert choose_cap([0.0]) == 1.5


def test_numbers_are_short():
    shown = [short(v) for v in (0, 0.0004, 0.5, 6023.4, 16384, 3413632, 2.5e9, -12345)]
    assert shown == ["0", "0.0004", "0.5", "6023", "16.38k", "3.414M", "2.5G", "-12.35k"]


def test_a_record_of_an_older_version_is_read(run):
    stripped = [
        {k: v for k, v in r.items() if k not in ("phases_s", "moe_layers")} for r in records(run)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in stripped))
    (run / "starts.jsonl").unlink()
    assert read_run(run).layers == [0, 1]
    assert "Where a step" not in page_of(run)
