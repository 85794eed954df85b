"""Splitting: nothing is lost, nothing is too long, headings are known, the counter is called little."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umr_plugins.errors import InputError
from umr_plugins.media.split import split_text


def words(text: str) -> int:
    """Tokens as a tokenizer has them: short pieces of words, and marks."""
    return len(re.findall(r"\w{1,5}|[^\w\s]", text))


COUNTERS = {"words": words, "characters": len, "bytes": lambda text: len(text.encode())}


def squeezed(text: str) -> str:
    return "".join(text.split())


def texts(source: str, most: int = 1000, markdown: bool = True) -> list[str]:
    return [chunk.text for chunk in split_text(source, words, max_tokens=most, markdown=markdown)]


MARKUP = st.lists(
    st.sampled_from(
        [
            "# One\n",
            "## Two ##\n",
            "###### Six\n",
            "Title\n=====\n",
            "Sub\n---\n",
            "---\n",
            "```\n",
            "~~~~\n",
            "\n",
            "\n\n",
            "| a | b |\n",
            "|---|\n",
            "- item\n",
            "Some words. And more! Yes?\n",
            "日本語。文章。\n",
            "x" * 90 + "\n",
            "    indented\n",
            "#nospace\n",
            "# \n",
            " \t\n",
            "`code` and more\n",
            "e\u0301" * 20,
            "🎉🎉 ",
            "a b c ",
        ]
    ),
    max_size=40,
).map("".join)


@pytest.mark.parametrize("counter", COUNTERS)
@pytest.mark.parametrize("markdown", [True, False])
@settings(max_examples=150, deadline=None)
@given(source=MARKUP | st.text(max_size=300), most=st.integers(8, 60))
def test_nothing_is_lost_and_nothing_is_too_long(counter, markdown, source, most):
    count = COUNTERS[counter]
    chunks = split_text(source, count, max_tokens=most, markdown=markdown)
    assert squeezed("".join(chunk.text for chunk in chunks)) == squeezed(source)
    for chunk in chunks:
        assert chunk.text.strip()
        assert chunk.passage.endswith(chunk.text)
        assert count(chunk.passage) <= most or len(chunk.text) == 1


def test_headings_are_known_and_told_once():
    source = "# Guide\n\nIntro.\n\n## Install\n\nRun it.\n\n### Linux\n\nEasy.\n\n## Use\n\nGo.\n\n"
    source += "Title\n=====\n\nEnd."
    chunks = split_text(source, words, markdown=True)
    assert [(chunk.headings, chunk.passage) for chunk in chunks] == [
        (("Guide",), "# Guide\n\nIntro."),
        (("Guide", "Install"), "Guide\n\n## Install\n\nRun it."),
        (("Guide", "Install", "Linux"), "Guide > Install\n\n### Linux\n\nEasy."),
        (("Guide", "Use"), "Guide\n\n## Use\n\nGo."),
        (("Title",), "Title\n=====\n\nEnd."),
    ]


def test_a_long_section_repeats_its_headings():
    source = "# Guide\n## Install\n" + "Run it now. " * 60
    chunks = split_text(source, words, max_tokens=40, markdown=True)
    assert len(chunks) > 4
    assert chunks[0].passage.startswith("# Guide\n\n## Install\n\nRun")
    assert all(chunk.passage.startswith("Guide > Install\n\nRun it now.") for chunk in chunks[1:])
    assert {chunk.headings for chunk in chunks} == {("Guide", "Install")}


def test_bare_headings_join_the_next_text():
    chunks = split_text("# A\n\n## B\n\ntext\n\n## C\n\n# D\n", words, markdown=True)
    assert [(chunk.text, chunk.headings) for chunk in chunks] == [
        ("# A\n\n## B\n\ntext", ("A", "B")),
        ("## C", ("A", "C")),
        ("# D", ("D",)),
    ]


def test_long_headings_leave_room_for_the_text():
    source = "# " + "outer " * 20 + "\n## " + "inner " * 5 + "\n" + "word " * 200
    chunks = split_text(source, words, max_tokens=30, markdown=True)
    assert all(words(chunk.passage) <= 30 for chunk in chunks)
    assert chunks[-1].passage.startswith("inner inner inner inner inner\n\nword")
    assert len(chunks[-1].headings) == 2


def test_code_is_not_searched_for_headings():
    source = "# Real\n\n```sh\n# comment\n\nTitle\n===\n```\n\n~~~\n# also\n```\n~~~\n\n    # indented\n"
    source += "\n- ```\n  # in a list\n  ```\n\n> # quoted\n"
    chunks = split_text(source, words, markdown=True)
    assert {chunk.headings for chunk in chunks} == {("Real",)}


def test_an_unclosed_fence_runs_to_the_end():
    assert len(split_text("```\n# a\n\n# b\n", words, markdown=True)) == 1


@pytest.mark.parametrize(
    "source", ["a\n\n---\n\nb", "- a\n---\nb", "| a |\n---\nb", "#hash\n\nb", "# \n\nb", "a\nb\n---"]
)
def test_what_is_no_heading(source):
    assert {chunk.headings for chunk in split_text(source, words, markdown=True)} == {()}


def test_front_matter_is_no_heading():
    chunks = split_text("---\ntitle: x\n---\n# A\n\ntext", words, markdown=True)
    assert [chunk.headings for chunk in chunks] == [(), ("A",)]


def test_plain_text_has_no_headings():
    assert texts("# a\n\n# b", markdown=False) == ["# a\n\n# b"]


def test_paragraphs_are_joined_while_they_fit():
    source = "\n\n".join(f"para graph {number}" for number in range(10))
    parts = texts(source, most=10, markdown=False)
    assert [words(part) for part in parts] == [6, 6, 6, 6, 6]
    assert parts[0] == "para graph 0\n\npara graph 1"


def test_windows_line_ends():
    parts = texts("one\r\n\r\ntwo\r\n", most=1, markdown=False)
    assert [part.strip() for part in parts] == ["one", "two"]


def test_long_paragraphs_are_cut_after_sentences():
    parts = texts("One two three. Four five six! Seven 8 nine? " * 20, most=30, markdown=False)
    assert len(parts) > 2
    assert all(part.rstrip()[-1] in ".!?" for part in parts)
    parts = texts("短い文です。もう一つの文です。" * 40, most=30, markdown=False)
    assert all(part.endswith("。") for part in parts)


def test_then_after_words_then_anywhere():
    parts = texts("alpha beta gamma " * 100, most=30, markdown=False)
    assert all(re.fullmatch(r"((alpha|beta|gamma)\s*)+", part) for part in parts)
    parts = texts("e\u0301" * 500, most=30, markdown=False)
    assert len(parts) > 2
    assert all(part.startswith("e") for part in parts)


def test_tables_and_code_are_cut_at_lines():
    table = "".join(f"| row {number}. Of it. | cell |\n" for number in range(60))
    assert all(part.startswith("| row") for part in texts(table, most=50))


@pytest.mark.parametrize(
    "line", ["so many words in one line " * 200_000, "x" * 5_000_000, "日本" * 800_000, "# " * 2_500_000]
)
def test_a_huge_line_is_counted_about_once(line):
    counted = 0

    def count(text: str) -> int:
        nonlocal counted
        counted += len(text)
        return len(text) // 3

    chunks = split_text(line, count, markdown=True)
    assert squeezed("".join(chunk.text for chunk in chunks)) == squeezed(line)
    assert counted < 2.5 * len(line)


def test_many_short_paragraphs_are_counted_about_twice():
    source = "short one\n\n" * 20_000
    counted = 0

    def count(text: str) -> int:
        nonlocal counted
        counted += len(text)
        return words(text)

    split_text(source, count, markdown=False)
    assert counted < 2.5 * len(source)


def test_a_counter_that_does_not_add_up():
    """Joined text can have more tokens than its parts."""

    def count(text: str) -> int:
        return words(text) + 5 * text.count("\n\n")

    chunks = split_text("a b c\n\n" * 30, count, max_tokens=20, markdown=False)
    assert all(count(chunk.passage) <= 20 for chunk in chunks)


def test_one_character_of_too_many_tokens_stays():
    chunks = split_text("🎉🎉", lambda text: 3 * len(text), max_tokens=1, markdown=False)
    assert [chunk.text for chunk in chunks] == ["🎉", "🎉"]


def test_most_tokens_must_be_positive():
    with pytest.raises(InputError, match="at least 1, got 0"):
        split_text("a", len, max_tokens=0, markdown=False)
    assert split_text(" \n\n ", len, markdown=True) == []
