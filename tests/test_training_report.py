"""Report and model card of a run: what is drawn lies where it belongs, and no text can break out."""

from __future__ import annotations

import ast
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from umr_plugins.st_files import add_to
from umr_plugins.training.card import MOST_STEPS, write_card
from umr_plugins.training.curves import (
    MOST_POINTS,
    Series,
    curve,
    decimate,
    kept,
    linear_axis,
    log_axis,
    number,
    series,
    smooth,
    step_axis,
    window,
)
from umr_plugins.training.facts import circumstances, data_rows, duration, flat, loss_ends, openings
from umr_plugins.training.report import write_report

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<script>alert(1)</script> | `x` ```\n--- \"q\" 'q' & [a](b) \x1b[31m \ud800 ]]> # {{"
VOID = {"meta", "br", "img"}

FACTS: dict[str, Any] = {
    "model": "owner/base-2b",
    "base_fingerprint": "9f" * 32,
    "recipe": {"batch": 64, "loss": {"temperature": 0.03, "dims": [64, 256]}, "data": [{"path": "a.jsonl"}]},
    "data": [
        {"name": "notes", "path": "notes.jsonl", "format": "rows", "rows": 1200, "sha256": "ab" * 32,
         "classes": {"single": 1200, "cross": 0, "fused": 0}, "pictures": 0},
        {"name": "pages", "path": "pages.jsonl", "format": "pages", "rows": 345, "sha256": "cd" * 32,
         "classes": {"single": 5, "cross": 300, "fused": 40}, "pictures": 340},
    ],
    "data_sha256": "0a" * 32,
    "trainable_parameters": 9_232_384,
    "parameters": 2_208_985_600,
    "steps": 1500,
    "versions": {"umr-plugins": "0.9", "torch": "2.13.0"},
    "git": "af12e8b",
    "device": "cpu",
    "dtype": "float32",
    "seconds": 3725.0,
    "resumed": [],
    "skipped_steps": 0,
    "demo": False,
    "license": "apache-2.0",
    "lora": {"rank": 8},
    "surprise": {"kept": "yes"},
}  # fmt: skip


class Page(HTMLParser):
    """A page as a tree that must be closed properly: tags with attributes, texts, and what could load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def within(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    def drawn(self, kind: str) -> list[list[tuple[float, float]]]:
        """Points of every path of a class."""
        paths = [given["d"] for tag, given in self.tags if tag == "path" and given.get("class") == kind]
        return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)] for path in paths]

    def ticks(self, kind: str) -> list[tuple[float, float]]:
        """Place and value of every number on an axis; one curve on the page."""
        places = [float(given[kind]) for tag, given in self.tags if given.get("class") == kind]
        return list(zip(places, [float(text.replace(",", "")) for text in self.axis(kind)], strict=True))

    def axis(self, kind: str) -> list[str]:
        kinds = [given["class"] for tag, given in self.tags if tag == "text"]
        return [text for text, each in zip(self.within("text"), kinds, strict=True) if each == kind]


def history(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"step": step, "loss": 2.0 / math.sqrt(step) + rng.random() / 10, "learning_rate": 1e-4 / step,
         "grad_norm": 1 + rng.random(), "samples_per_second": 100 + rng.random(), "tokens_per_second": 3e4,
         "skipped": 0, "masked": 2, "seconds": step * 0.5}
        for step in range(1, count + 1)
    ]  # fmt: skip


def page_of(tmp_path: Path, lines: list[dict[str, Any]], facts: dict[str, Any]) -> tuple[str, Page]:
    text = write_report(tmp_path / "run-7" / "report.html", lines, facts).read_text(encoding="utf-8")
    return text, Page(text)


def card_of(tmp_path: Path, lines: list[dict[str, Any]], facts: dict[str, Any]) -> tuple[dict[str, Any], str]:
    path = write_card(tmp_path / "run-7", lines, facts)
    assert path == tmp_path / "run-7" / "README.md"
    start, front, text = re.split(r"^---\n", path.read_text(encoding="utf-8"), maxsplit=2, flags=re.M)
    assert start == ""
    values = yaml.safe_load(front)
    assert isinstance(values, dict)
    return values, text


def interpolated(ticks: list[tuple[float, float]], value: float) -> float:
    """Where a value lies by the numbers on a linear axis."""
    (start, low), (end, high) = ticks[0], ticks[-1]
    return start + (value - low) / (high - low) * (end - start)


# --- curves -------------------------------------------------------------------------------------------


def test_points_lie_where_the_numbers_on_the_axes_say() -> None:
    points = [(100.0, 2.75), (250.0, 1.5), (700.0, 0.4), (1000.0, 0.1)]
    page = Page(curve("Loss", Series(points)))
    [line] = page.drawn("line")
    across, up = page.ticks("x"), page.ticks("y")
    assert len(across) >= 3
    assert len(up) >= 4
    for (x, y), (step, value) in zip(line, points, strict=True):
        assert x == pytest.approx(interpolated(across, step), abs=0.15)
        assert y == pytest.approx(interpolated(up, value), abs=0.15)
    assert up[0][0] > up[-1][0], "greater values are higher up"


def test_points_on_a_logarithmic_axis_lie_between_their_powers_of_ten() -> None:
    points = [(1.0, 0.5), (2.0, 0.5), (3.0, 0.5), (4.0, 500.0)]
    page = Page(curve("Norm", Series(points)))
    ticks = [(place, math.log10(value)) for place, value in page.ticks("y")]
    assert [value for _, value in ticks] == pytest.approx([-1, 0, 1, 2, 3])
    [line] = page.drawn("line")
    assert [y for _, y in line] == pytest.approx(
        [interpolated(ticks, math.log10(value)) for _, value in points], abs=0.15
    )
    assert "log scale" in "".join(page.within("span"))


def test_values_of_one_size_get_a_linear_axis() -> None:
    page = Page(curve("Norm", Series([(1.0, 0.5), (2.0, 0.7), (3.0, 5.0)])))
    values = [value for _, value in page.ticks("y")]
    assert values == pytest.approx([place * values[1] for place in range(len(values))])
    assert page.within("span") == []


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (0.3, 0.9), (2.25, 2.31), (-3.0, 4.0), (1e-9, 1e-4), (7.0, 7.0), (-7.0, -7.0), (0.0, 0.0),
     (1e6, 3e6), (1.0, 1.0 + 1e-13), (0.0, 5e-324)],
)  # fmt: skip
def test_linear_axes_enclose_their_values_with_a_few_round_ticks(low: float, high: float) -> None:
    axis = linear_axis(low, high)
    slack = 1e-9 * max(abs(low), abs(high))
    assert axis.low - slack <= low <= high <= axis.high + slack
    assert 2 <= len(axis.ticks) <= 7
    assert axis.at(axis.low) == 0
    assert axis.at(axis.high) == 1
    steps = [after - before for before, after in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_neighbouring_ticks_never_read_the_same() -> None:
    for low, high in ((2.25, 2.31), (1000.1, 1000.6), (0.99995, 1.00001)):
        page = Page(curve("Loss", Series([(1.0, low), (2.0, high)])))
        assert len(set(page.axis("y"))) == len(page.axis("y"))


@pytest.mark.parametrize(("low", "high"), [(0.5, 500.0), (1e-12, 1e9), (3.0, 900.0)])
def test_logarithmic_axes_enclose_their_values(low: float, high: float) -> None:
    axis = log_axis(low, high)
    assert axis.low <= low < high <= axis.high
    assert 3 <= len(axis.ticks) <= 7


def test_the_axis_of_steps_has_whole_numbers_among_the_steps() -> None:
    assert step_axis(1, 4).ticks == (1, 2, 3, 4)
    axis = step_axis(10, 3000)
    assert (axis.low, axis.high) == (10, 3000)
    assert axis.ticks == (1000, 2000, 3000)


def test_the_running_mean_is_the_mean_of_its_window() -> None:
    points = [(float(step), random.Random(step).random()) for step in range(203)]
    half = window(len(points)) // 2
    assert half == 5
    for at, (step, mean) in enumerate(smooth(points)):
        around = [value for _, value in points[max(at - half, 0) : at + half + 1]]
        assert step == points[at][0]
        assert mean == pytest.approx(sum(around) / len(around))


def test_few_points_are_not_smoothed() -> None:
    points = [(1.0, 3.0), (2.0, 1.0), (3.0, 5.0)]
    assert smooth(points) == points


def test_decimation_keeps_extremes_and_ends_in_order() -> None:
    rng = random.Random(1)
    points = [(float(step), rng.random()) for step in range(100_000)]
    points[31_415] = (31_415.0, 9.0)
    points[27_182] = (27_182.0, -9.0)
    drawn = decimate(points)
    assert MOST_POINTS - 10 <= len(drawn) <= MOST_POINTS
    assert {points[31_415], points[27_182], points[0], points[-1]} <= set(drawn)
    assert drawn == sorted(set(drawn))
    assert decimate(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_a_spike_among_very_many_steps_is_drawn_where_it_was() -> None:
    lines = [{"step": step, "samples_per_second": 100.0} for step in range(1, 100_001)]
    lines[40_000]["samples_per_second"] = 190.0
    page = Page(curve("Speed", series(lines, "samples_per_second"), running=True))
    [raw], [mean] = page.drawn("span"), page.drawn("line")
    assert max(len(raw), len(mean)) <= MOST_POINTS
    x, y = min(raw, key=lambda point: point[1])
    assert x == pytest.approx(interpolated(page.ticks("x"), 40_001), abs=0.15)
    assert y == pytest.approx(interpolated(page.ticks("y"), 190), abs=0.15)
    assert "600 of 100,000 points" in "".join(page.within("span"))


def test_raw_values_are_points_under_the_line_of_their_mean() -> None:
    lines = history(80)
    page = Page(curve("Loss", series(lines, "loss"), running=True))
    [dots], [line] = page.drawn("dots"), page.drawn("line")
    assert len(dots) == len(line) == 80
    assert [x for x, _ in dots] == [x for x, _ in line]
    assert dots != line
    for (_, y), each in zip(dots, lines, strict=True):
        assert y == pytest.approx(interpolated(page.ticks("y"), each["loss"]), abs=0.15)


def test_one_point_is_a_point() -> None:
    page = Page(curve("Loss", Series([(10.0, 2.0)]), running=True))
    [[(x, y)]] = page.drawn("dots one")
    assert page.drawn("line") == []
    assert x == page.ticks("x")[0][0]
    assert y == pytest.approx(interpolated(page.ticks("y"), 2.0), abs=0.15)


def test_values_that_are_missing_are_no_points_and_those_not_finite_are_counted() -> None:
    lines: list[dict[str, Any]] = [{"step": 1, "loss": 1.0}, {"step": 2}, {"step": 3, "loss": None}]
    lines += [{"step": 4, "loss": value} for value in (math.nan, math.inf, "nan", True)]
    found = series(lines, "loss")
    assert found == Series([(1.0, 1.0)], lost=4)
    assert "not finite, not drawn: 4" in curve("Loss", found)
    assert "none of 4 logged values" in curve("Loss", series(lines[3:], "loss"))
    assert "not logged" in curve("Loss", series(lines, "grad_norm"))


def test_steps_done_again_after_a_resume_count_once_with_their_later_values() -> None:
    steps = [(10, 5.0), (20, 4.0), (30, 9.0), (40, 9.0), (30, 3.0), (40, 2.0), (50, 1.0)]
    lines = [{"step": step, "loss": loss} for step, loss in steps]
    assert [line["loss"] for line in kept(lines)] == [5.0, 4.0, 3.0, 2.0, 1.0]


def test_a_resume_is_marked_at_its_step_if_it_is_on_the_axis() -> None:
    points = [(0.0, 1.0), (100.0, 0.0)]
    page = Page(curve("Loss", Series(points), marks=[(25.0, "resumed at step 25"), (500.0, "later")]))
    [[(x, _)]] = page.drawn("mark")
    assert x == pytest.approx(interpolated(page.ticks("x"), 25), abs=0.15)
    assert page.within("title") == ["resumed at step 25"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.5, "0.5"), (0.35678, "0.357"), (2.0, "2"), (999.99, "1,000"), (9.999, "10"),
     (12500, "12,500"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (9.9999e-4, "1e-3"), (-0.04, "-0.04"),
     (1234567, "1,234,567"), (5e12, "5e12")],
)  # fmt: skip
def test_numbers_are_short(value: float, shown: str) -> None:
    assert number(value) == shown


# --- facts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (4.25, "4.25 s"), (60, "1 min"), (3599.9, "1 h"), (3725, "1 h 2 min"), (90_000, "1 d 1 h")],
)
def test_times_are_in_their_two_greatest_units(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_every_setting_is_listed_by_its_dotted_name() -> None:
    nested = {"a": {"b": 1, "c": {}}, "d": [1, "x"], "e": [{"f": None}, [True]], "g": []}
    assert list(flat(nested)) == [
        ("a.b", "1"), ("a.c", "{}"), ("d", "1, x"), ("e.0.f", "null"), ("e.1", "true"), ("g", "none")
    ]  # fmt: skip


def test_unknown_facts_are_listed_and_absent_ones_left_out() -> None:
    rows = dict(circumstances(FACTS))
    assert rows["surprise.kept"] == "yes"
    assert rows["parameters"] == "2,208,985,600"
    assert rows["torch"] == "2.13.0"
    assert rows["time"] == "1 h 2 min"
    assert circumstances({}) == []
    assert dict(circumstances({"lora": None, "git": None})) == {
        "LoRA": "none: the weights themselves were trained",
        "git revision of the working folder": "not known",
    }


def test_several_sources_are_summed_and_one_is_not() -> None:
    *_, total = data_rows(FACTS)
    assert total == {
        "name": "2 sources", "rows": 1545, "pictures": 340,
        "classes": {"single": 1205, "cross": 300, "fused": 40},
    }  # fmt: skip
    assert data_rows({"data": FACTS["data"][:1]}) == FACTS["data"][:1]


def test_first_and_last_loss_are_those_of_the_running_mean() -> None:
    lines = [{"step": step, "loss": float(step)} for step in range(100)]
    assert loss_ends(lines) == "1 → 98"
    assert loss_ends(lines[:1]) == "0"
    assert loss_ends([]) == "not logged"
    assert loss_ends([{"step": 1, "loss": math.nan}]) == "not finite"


# --- the page -----------------------------------------------------------------------------------------


def test_the_page_shows_what_ran(tmp_path: Path) -> None:
    text, page = page_of(tmp_path, history(50), FACTS)
    assert page.within("h1") == ["Training of owner/base-2b"]
    assert page.within("h2") == ["Curves", "Data", "Recipe", "What ran", "Open the model"]
    tiles = dict(zip(page.within("span"), page.within("b"), strict=False))
    assert tiles["steps"] == "1,500"
    assert tiles["time"] == "1 h 2 min"
    assert [tag for tag, _ in page.tags].count("svg") == 4
    terms = dict(zip(page.within("dt"), page.within("dd"), strict=True))
    assert terms["loss.temperature"] == "0.03"
    assert terms["loss.dims"] == "64, 256"
    assert terms["data.0.path"] == "a.jsonl"
    assert terms["LoRA.rank"] == "8"
    cells = page.within("td")
    assert cells[cells.index("pages") :][:7] == ["pages", "pages.jsonl", "pages", "345", "5", "300", "40"]
    assert {given.get("title") for tag, given in page.tags if tag == "code"} >= {"ab" * 32, "cd" * 32}
    assert "Not evaluated" in text
    assert "demonstration" not in text
    assert "skipped" not in "".join(page.within("p"))


def test_the_page_loads_and_runs_nothing(tmp_path: Path) -> None:
    text, page = page_of(tmp_path, history(50), FACTS)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    assert not [given for _, given in page.tags if {"src", "href", "onload"} & set(given)]
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")


def test_resumes_repeats_skips_and_demonstrations_are_told(tmp_path: Path) -> None:
    lines = history(50)
    facts = {**FACTS, "resumed": [40], "skipped_steps": 3, "demo": True}
    _, page = page_of(tmp_path, lines + lines[40:], facts)
    said = " ".join(page.within("p"))
    assert "resumed at step 40" in said
    assert "10 logged steps were done again" in said
    assert "skipped and changed no weights: 3." in said
    assert "A demonstration model" in said
    assert "2 documents on average" in said


def test_texts_from_outside_can_not_become_markup(tmp_path: Path) -> None:
    facts = {
        **FACTS,
        "model": EVIL,
        "recipe": {EVIL: EVIL, "list": [EVIL, {EVIL: [EVIL]}]},
        "data": [{"name": EVIL, "path": EVIL, "format": EVIL, "rows": 1, "sha256": EVIL}] * 2,
        "data_sha256": EVIL,
        "versions": {EVIL: EVIL},
        "device": EVIL,
        "resumed": [5],
        EVIL: {EVIL: EVIL},
        "folder": EVIL,
    }
    text, page = page_of(tmp_path, history(10), facts)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\ud800" not in text
    assert page.within("h1")[0].startswith("Training of <script>alert(1)</script> | `x`")


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_page_of_almost_nothing_is_still_a_page(tmp_path: Path, count: int) -> None:
    _, page = page_of(tmp_path, history(count), {})
    assert page.within("h1") == ["Training of a model"]
    assert [tag for tag, _ in page.tags].count("svg") == (4 if count else 0)
    assert page.within("p").count("not logged") == (0 if count else 4)
    assert page.within("p").count("Not recorded.") == 3
    assert dict(zip(page.within("span"), page.within("b"), strict=False))["steps"] == "–"


def test_a_page_of_very_many_steps_stays_small(tmp_path: Path) -> None:
    text, page = page_of(tmp_path, history(20_000), FACTS)
    assert len(text) < 150_000
    assert all(len(points) <= MOST_POINTS for kind in ("line", "span", "dots") for points in page.drawn(kind))


@pytest.mark.parametrize("lora", [{"rank": 8}, None])
def test_the_snippets_are_python_that_names_the_model(tmp_path: Path, lora: dict[str, int] | None) -> None:
    name = 'a "b" \\ folder'
    _, page = page_of(tmp_path, [], {**FACTS, "lora": lora, "folder": name})
    codes = page.within("pre")
    assert len(codes) == 3
    constants = [
        {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)} for code in codes
    ]
    assert all(name in each for each in constants)


def test_the_snippets_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers")
    shutil.copytree(ROOT / "umr_plugins" / "demo" / "umr-tiny", tmp_path / "trained")
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    add_to("trained", dim=256)
    for title, code in openings("trained"):
        exec(compile(code, title, "exec"), {})


# --- the card -----------------------------------------------------------------------------------------


def test_the_front_matter_holds_the_facts(tmp_path: Path) -> None:
    front, text = card_of(tmp_path, history(50), {**FACTS, "languages": ["en", "no"]})
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "owner/base-2b"
    assert front["base_model_relation"] == "finetune"
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "feature-extraction"
    assert front["language"] == ["en", "no"]
    assert {"umr-plugins", "lora"} <= set(front["tags"])
    assert "the adapter alone is in the folder adapter" in text
    assert "demonstration" not in front["tags"]


def test_without_lora_no_adapter_is_named(tmp_path: Path) -> None:
    facts = {**FACTS, "lora": None}
    front, text = card_of(tmp_path, [], facts)
    assert front["library_name"] == "transformers"
    assert front["base_model_relation"] == "finetune"
    assert "lora" not in front["tags"]
    assert "adapter" not in text
    (tmp_path / "run-7" / "modules.json").write_text("[]")
    front, _ = card_of(tmp_path, [], facts)
    assert front["library_name"] == "sentence-transformers"


@pytest.mark.parametrize("base", ["/models/gme 2b", "../base", EVIL, ""])
def test_a_base_that_is_no_hub_id_stands_in_the_text_alone(tmp_path: Path, base: str) -> None:
    front, text = card_of(tmp_path, [], {**FACTS, "model": base})
    assert "base_model" not in front
    assert (base or "an unnamed model").split()[0].replace("<", "&lt;").replace(">", "&gt;") in text


def test_an_unknown_licence_stays_unknown(tmp_path: Path) -> None:
    for given in ({}, {"license": None}, {"license": "unknown"}):
        assert card_of(tmp_path, [], given)[0]["license"] == "unknown"


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M)
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        for table in found
    ]


def test_the_card_says_what_ran(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, history(500), FACTS)
    data, ran, losses = tables(text)
    assert ["pages", "pages.jsonl", "pages", "345", "5", "300", "40", "340", "cd" * 32] in data
    assert data[-1][:4] == ["2 sources", "", "", "1,545"]
    assert ["git revision of the working folder", "af12e8b"] in ran
    assert ["torch", "2.13.0"] in ran
    assert FACTS["data_sha256"] in text
    assert len(losses) == 2 + MOST_STEPS
    assert [losses[2][0], losses[-1][0]] == ["1", "500"]
    assert losses[2][2] == number(history(500)[0]["loss"])
    assert losses[-1][3] == number(1e-4 / 500)
    recipe = re.search(r"```yaml\n(.*?)\n```", text, flags=re.S)
    assert recipe is not None
    assert yaml.safe_load(recipe[1]) == FACTS["recipe"]
    assert "Not evaluated" in text
    assert "demonstration" not in text


def test_a_card_of_a_demonstration_model_says_so(tmp_path: Path) -> None:
    front, text = card_of(tmp_path, history(3), {**FACTS, "demo": True, "skipped_steps": 4})
    assert "demonstration" in front["tags"]
    assert "**A demonstration model:" in text
    assert "skipped and changed no weights: 4." in text
    assert len(tables(text)[-1]) == 2 + 3


def test_a_card_of_nothing_invents_nothing(tmp_path: Path) -> None:
    front, text = card_of(tmp_path, [], {})
    assert "base_model" not in front
    assert "Training loss: not logged." in text
    assert text.count("ot recorded.") == 3
    assert tables(text) == []


def test_texts_from_outside_can_not_break_the_card(tmp_path: Path) -> None:
    source = {"name": EVIL, "path": EVIL, "format": "a|b\\|c", "rows": 1, "sha256": EVIL}
    facts = {
        **FACTS,
        "model": EVIL,
        "license": EVIL,
        "languages": [EVIL],
        "recipe": {EVIL: EVIL, "fence": "a\n```\nb"},
        "data": [source, source],
        "data_sha256": EVIL,
        EVIL: EVIL,
    }
    front, text = card_of(tmp_path, history(3), facts)
    assert front["license"] == EVIL.lower()
    assert front["language"] == [EVIL]
    data, ran, _ = tables(text)
    assert {len(row) for row in data} == {9}
    assert {len(row) for row in ran} == {2}
    assert "\x1b" not in text
    fences = [line for line in text.splitlines() if re.match(r" {0,3}```", line)]
    assert len(fences) == 6 + 2 + 1, "three snippets, the recipe, and the fence inside it"
    recipe = re.search(r"^````+yaml\n(.*?)\n````+$", text, flags=re.S | re.M)
    assert recipe is not None
    assert yaml.safe_load(recipe[1]) == facts["recipe"]
    outside = re.sub(r"^(```+)\w+\n.*?\n\1$", "", text, flags=re.S | re.M)
    assert "<" not in outside
    assert re.search(r"(?<!\\)[`\[]", outside) is None


def test_a_card_that_is_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run-7").mkdir()
    (tmp_path / "run-7" / "README.md").write_text("from another tool")
    _, text = card_of(tmp_path, [], FACTS)
    assert "another tool" not in text


def test_neither_needs_torch() -> None:
    code = "import sys, umr_plugins.training.report, umr_plugins.training.card; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
