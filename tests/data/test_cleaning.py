"""Each filter does what its name says, and leaves alone what it must not touch."""

from __future__ import annotations

import json
import random
import time
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.data import cleaning
from danlu.data.boilerplate import RepeatedLines, strip_banner_lines, strip_licence_header
from danlu.data.chunking import Structure, chunks
from danlu.data.cleaning import FILTER_NAMES, Cleaner, Limits, Removed
from danlu.data.repetition import too_repetitive

LIMITS = Limits()
WORDS = [f"{a}{b}{c}" for a in "bdgklmnprst" for b in "aeiou" for c in ("n", "r", "lo", "mi")]
CJK = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]


def prose(n_words: int, seed: int = 0, words: list[str] = WORDS, glue: str = " ") -> str:
    """Random sentences, eight to the paragraph."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(n_words // 8):
        sentences.append(glue.join(rng.choices(words, k=8)) + ("。" if glue == "" else "."))
    return "\n\n".join(" ".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8))


class TestUnicode:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("donâ€™t", "don’t"),
            ("schÃ¶n", "schön"),
            ("cafe\u0301", "café"),
        ],
    )
    def test_repairs(self, before: str, after: str) -> None:
        assert cleaning.repair_unicode(before, "prose", LIMITS) == after

    @pytest.mark.parametrize(
        "text",
        [
            "“curly” ‘quotes’ – dashes — and … dots",
            "中文，标点。「引号」全角ＡＢＣ１２３！",
            "日本語のテキスト、ｶﾀｶﾅ。한국어 텍스트.",
            "ﬁne ligatures, &amp; entities, <b>tags</b>",
            "naïve Ångström Übergröße à la carte ÉCOLE",
            "emoji 👩‍👩‍👧 ❤️ and Persian می‌خواهم",
            "\x1b[31mred\x1b[0m\r\nline",
        ],
    )
    def test_leaves_alone(self, text: str) -> None:
        assert cleaning.repair_unicode(text, "prose", LIMITS) == text

    def test_source_code_is_not_repaired(self) -> None:
        source = "MOJIBAKE = 'donâ€™t'  # cafe\u0301 is a test of a decoder of characters\n"
        assert Cleaner(["unicode"]).clean(source, "code", "p") == source


class TestControl:
    def test_prose(self) -> None:
        before = "\ufeffa\r\nb\rc\x00\x07d\u200be\u202ef\x0cg\th"
        assert cleaning.strip_control(before, "prose", LIMITS) == "a\nb\ncdef\ng\th"

    def test_code_keeps_form_feeds_and_escapes(self) -> None:
        assert cleaning.strip_control("a = '\x1b'\r\n\x0c\u202eb", "code", LIMITS) == "a = '\x1b'\n\x0cb"

    @given(st.text())
    def test_twice_is_once(self, text: str) -> None:
        once = cleaning.strip_control(text, "prose", LIMITS)
        assert cleaning.strip_control(once, "prose", LIMITS) == once


class TestBoilerplate:
    def test_banner_lines(self) -> None:
        text = "\n".join(
            [
                "Skip to main content",
                "Home > Alchemy > Furnaces",
                "We use cookies to improve your experience.",
                "The furnace must burn for nine days. This website uses cookies is what a banner says, and an article "
                "that explains at length how such banners came about and what the law says about them stays as it is.",
                "上一篇：炼丹",
                "炼丹需要九天九夜的火候。",
                "© 2024 The Alchemist. All rights reserved.",
                "版权所有 某某公司 京ICP备12345678号",
            ]
        )
        assert strip_banner_lines(text).split("\n") == [text.split("\n")[3], text.split("\n")[5]]

    def test_prose_that_speaks_of_copyright_stays(self) -> None:
        text = "Copyright law differs between countries.\nShe wanted to go home. He would log in later, he said."
        assert strip_banner_lines(text) == text

    def test_python_licence(self) -> None:
        source = (
            "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n# Copyright 2007 Google, Inc. All Rights Reserved.\n"
            "# Licensed to PSF under a Contributor Agreement.\n#\n# Reads the furnace's thermometer.\n\nimport os\n"
        )
        assert strip_licence_header(source) == (
            "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n# Reads the furnace's thermometer.\n\nimport os\n"
        )

    def test_c_licence(self) -> None:
        source = "/*\n * Copyright (c) 2020 X\n * Licensed under MIT.\n */\n\n/* Mixes elixirs. */\nint main() {}\n"
        assert strip_licence_header(source) == "\n/* Mixes elixirs. */\nint main() {}\n"

    @pytest.mark.parametrize(
        "source",
        [
            "import os\n# Copyright 2020 X\n",
            '"""Prints the copyright notice and licence."""\nx = 1\n',
            "# Reads files.\n\nimport os\n",
            "",
            "#",
        ],
    )
    def test_what_is_no_licence_header_stays(self, source: str) -> None:
        assert strip_licence_header(source) == source

    @given(st.text("#\n/* aC\"'-"))
    def test_code_behind_the_header_is_never_lost(self, header: str) -> None:
        code = "\nint main() { return 1; }\nx = 2\n"
        assert strip_licence_header(header.replace("/*", "") + code).endswith("int main() { return 1; }\nx = 2\n")

    def test_repeated_lines(self) -> None:
        lines = RepeatedLines()
        pages = [f"Menu of the site\nArticle {i}\n{prose(40, i)}\n---\nShared by {i % 3} people" for i in range(60)]
        for page in pages:
            lines.add(page)
        stripped = lines.strip_from(pages[7])
        assert "Menu of the site" not in stripped
        assert "Shared by" not in stripped
        assert "---" in stripped
        assert prose(40, 7) in stripped
        assert "Menu of the site" in pages[7]

    def test_lines_of_few_documents_stay(self) -> None:
        lines = RepeatedLines()
        for _ in range(19):
            lines.add("the same line")
        assert lines.strip_from("the same line") == "the same line"


class TestRemoval:
    def test_near_empty(self) -> None:
        assert isinstance(cleaning.remove_near_empty("--- *** ___ 12 ab\n", "prose", LIMITS), Removed)
        assert cleaning.remove_near_empty("炼丹需要九天九夜的火候", "prose", LIMITS) == "炼丹需要九天九夜的火候"
        late = "-" * 5000 + "letters at last"
        assert cleaning.remove_near_empty(late, "prose", LIMITS) == late

    def test_length(self) -> None:
        assert isinstance(cleaning.remove_by_length("x" * 39, "prose", LIMITS), Removed)
        assert cleaning.remove_by_length("x" * 40, "prose", LIMITS) == "x" * 40
        long_line = "x = 1\n" * 100 + "y = '" + "a" * 1001 + "'\n"
        assert isinstance(cleaning.remove_by_length(long_line, "code", LIMITS), Removed)
        assert cleaning.remove_by_length(long_line, "prose", LIMITS) == long_line

    @pytest.mark.parametrize(
        "text",
        ["# # # tag # tag # tag\n" * 9, "12 345 6789 0 " * 30 + "total", "- a b\n" * 20, "to be continued...\n" * 5],
    )
    def test_symbols_prose(self, text: str) -> None:
        assert isinstance(cleaning.remove_symbols(text, "prose", LIMITS), Removed)

    def test_symbols_code(self) -> None:
        assert isinstance(cleaning.remove_symbols("+-*/" * 100 + "abc", "code", LIMITS), Removed)
        good = "def f(x):\n    return x + 1\n"
        assert cleaning.remove_symbols(good, "code", LIMITS) == good

    @pytest.mark.parametrize("text", [prose(400), prose(400, words=CJK, glue=""), "# Title\n\n" + prose(200)])
    def test_good_prose_stays(self, text: str) -> None:
        assert Cleaner().clean(text, "prose", "p") == text

    def test_languages(self) -> None:
        limits = Limits(languages=("zh",))
        english = "The furnace must burn for nine days and nine nights before the elixir is ready to be tasted."
        chinese = "炉火必须燃烧九天九夜，丹药才能炼成，然后才可以品尝。"
        assert isinstance(cleaning.remove_other_languages(english, "prose", limits), Removed)
        assert cleaning.remove_other_languages(chinese, "prose", limits) == chinese
        assert "language" not in Cleaner().reports


class TestRepetition:
    @pytest.mark.parametrize("words", [(WORDS, " "), (CJK, "")])
    def test_limits(self, words: tuple[list[str], str]) -> None:
        base = prose(400, 1, *words)
        paragraphs = base.split("\n\n")
        assert too_repetitive(base) is None
        assert "lines are repeated" in str(too_repetitive("\n".join([paragraphs[0]] * 3 + paragraphs[:5])))
        many = "\n\n".join(paragraphs[:4] + [paragraphs[0] + "\n" + paragraphs[1]] * 3)
        assert "repeated" in str(too_repetitive(many))
        phrase = words[1].join(words[0][:5])
        assert "gram" in str(too_repetitive(words[1].join([phrase, *words[0][20:60]] * 3)))

    def test_top_ngram_share_is_exact(self) -> None:
        # 60 words of one letter; "x y" stands 7 times: 14 of 60 characters, over 20 %
        filler = [chr(0x100 + i) for i in range(46)]
        text = " ".join(filler[:4])
        for i in range(7):
            text += f" x y {' '.join(filler[4 + 6 * i : 10 + 6 * i])}"
        assert too_repetitive(text) == "one 2-gram makes up 23% of the characters (limit 20%)"

    def test_short_texts_are_not_judged_by_ngrams(self) -> None:
        assert too_repetitive("row row row your boat gently down the stream") is None

    def test_code_is_not_judged(self) -> None:
        table = "X = [\n" + "    'value',\n" * 50 + "]\n"
        assert Cleaner().clean(table, "code", "p") == table


HOSTILE = [
    "home " + ">" * 150 + "  x\n",
    "-----BEGIN RSA PRIVATE KEY-----\n",
    "/* copyright ",
    "# copyright\n",
    "...",
    "a@",
    "+1 22 ",
    "4012 8888 ",
    "api_key='",
    "eyJaaaaaaaaaa.",
    "â€™",
    "\n ",
    "a",
    "1",
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_takes_no_longer_than_its_length(unit: str) -> None:
    """Regular expressions that go back over and over would take minutes."""
    text = (unit * (200_000 // len(unit)))[:200_000]
    started = time.process_time()
    for each in cleaning.FILTERS:
        for type in each.types:
            if each.run is not None and type != "chat":
                each.run(text, type, LIMITS)
    for structure in get_args(Structure):
        chunks(text, 50_000, structure)
    assert time.process_time() - started < 4


class TestCleaner:
    def test_each_filter_can_be_chosen_and_left_out(self) -> None:
        assert set(Cleaner().reports) == set(FILTER_NAMES) - {"language"}
        assert set(Cleaner(["pii", "length"]).reports) == {"pii", "length"}
        assert set(Cleaner(skipped=["pii"]).reports) == set(FILTER_NAMES) - {"pii", "language"}
        text = "ask ada@engine.org about the furnace and the elixir"
        assert Cleaner(skipped=["pii"]).clean(text, "prose", "p") == text

    def test_reports(self) -> None:
        cleaner = Cleaner()
        cleaner.clean(f"{prose(80, 1)} mail ada@engine.org {prose(80, 2)}", "prose", "a.txt")
        cleaner.clean("too short", "prose", "b.txt")
        pii, empty = cleaner.reports["pii"], cleaner.reports["near_empty"]
        assert (pii.documents_removed, pii.documents_changed, pii.bytes_removed) == (
            0,
            1,
            len("ada@engine.org") - len("<EMAIL>"),
        )
        assert (empty.documents_removed, empty.documents_changed, empty.bytes_removed) == (1, 0, 9)
        (sample,) = pii.samples
        assert sample["path"] == "a.txt"
        assert "ada@engine.org" in sample["before"]
        assert "<EMAIL>" in sample["after"]
        assert len(sample["before"]) <= cleaning.EXCERPT
        assert set(pii.to_dict()) == {
            "name", "help", "documents_removed", "documents_changed", "bytes_removed", "samples"
        }  # fmt: skip

    def test_samples_are_few_and_the_same_every_time(self) -> None:
        def samples() -> list[dict[str, str]]:
            cleaner = Cleaner()
            for i in range(100):
                cleaner.clean("short", "prose", str(i))
            return cleaner.reports["near_empty"].samples

        assert len(samples()) == cleaning.N_SAMPLES
        assert samples() == samples()
        assert {s["path"] for s in samples()} != {"0", "1", "2", "3", "4"}

    def test_chats_are_cleaned_message_by_message(self) -> None:
        chat = {
            "messages": [{"role": "user", "content": "I am ada@engine.org"}, {"role": "assistant", "content": "Hi"}]
        }
        cleaned = Cleaner().clean(json.dumps(chat), "chat", "p")
        assert cleaned is not None
        assert json.loads(cleaned)["messages"] == [
            {"role": "user", "content": "I am <EMAIL>"},
            {"role": "assistant", "content": "Hi"},
        ]
