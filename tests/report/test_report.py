"""The report: complete, true to the cards, self-contained, and deaf to what the texts in it would like to be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.formats.card import Card
from danlu.report.build import build_report
from danlu.report.config import ReportConfig
from danlu.report.lineage import find_evaluations, read_lineage
from report_page import Page, assert_self_contained


def page_of(life: Path, **options: object) -> Page:
    return Page(build_report(ReportConfig(model=life / "chat", **options)).read_text())  # type: ignore[arg-type]


def test_nothing_is_loaded_from_elsewhere(life: Path) -> None:
    assert_self_contained(page_of(life))


def test_figures_are_those_of_the_cards(life: Path) -> None:
    text = " ".join(page_of(life).text.split())
    for shown in (
        "1.183", "0 % untrained", "xz with the training text: 1.264",  # key figures
        "1.931", "1.591", "3.912", "1.201",  # bars
        "1,612 documents (11.8 MB)", "1,540 (11.4 MB)", "96.8 %",  # data
        "Masks e-mail addresses", "3 exact, 28 near-duplicates", "lib/cp437.py", "# by jo@example.org", "language",
        "3.413", "bytes per token, held out", "NotImplementedError",  # tokenizer
        "9,783", "42.7 %", "560 GFLOP/s", "bf16", "1.31 TFLOP/s",  # training
        "✓ parses and compiles", "✗ does not parse", "a.insert(bisect(a, x), x)",  # samples
        "danlu finetune", "torch 2.13.0",
    ):  # fmt: skip
        assert shown in text, shown


def test_bars_are_as_long_as_their_numbers(life: Path) -> None:
    html = build_report(ReportConfig(model=life / "chat")).read_text()
    bars = re.findall(r'style="width: ([\d.]+)%"></span><span class="number">([\d.]+)<', html)
    assert [number for _, number in bars] == ["1.931", "1.591", "1.264", "3.912", "1.183", "1.201"]
    for share, number in bars:
        assert float(share) == pytest.approx(100 * float(number) / 3.9121, abs=0.05)


def test_stages_stand_in_the_order_they_were_made(life: Path) -> None:
    evaluations = find_evaluations([life / "chat"], read_lineage(life / "chat"))
    assert [e.label for e in evaluations] == ["untrained", "pre-trained", "fine-tuned"]
    base = find_evaluations([life / "base"], read_lineage(life / "base"))
    assert [e.label for e in base] == ["untrained", "pre-trained"], (
        "what was made later is no part of a model's own story"
    )


def test_hostile_text_stays_text(life: Path) -> None:
    evil = "</code></pre></style><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload=alert(3) {{ 7*7 }}"
    for folder in life.iterdir():
        card = Card.load(folder)
        card.verb = card.verb if folder.name in ("base", "chat", "untrained") else card.verb + evil
        card.versions[evil] = evil
        card.config = {**card.config, evil: evil, "corpus": [evil]}
        card.details = json.loads(json.dumps(card.details).replace("naïve", json.dumps(evil)[1:-1]))
        for sample in card.details.get("samples", []):
            sample.update(prompt=evil, completion=evil, reference=evil, path=evil, name=evil)
        card.details |= {"longest_tokens": [evil], "special_tokens": [evil], "device": evil, "precision": evil}
        for item in card.inputs:
            item.path = evil
            if item.card:
                item.card = {**item.card, "config": card.config, "details": {**item.card["details"], **card.details}}
        card.save(folder)
    page = page_of(life, title=evil, evaluations=tuple(sorted(life.glob("eval-*"))))
    assert_self_contained(page)
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "49" not in re.findall(r"onload=alert\(3\) (\S+)", page.text)


def test_lineage_is_told_when_the_other_folders_are_gone(life: Path) -> None:
    whole = page_of(life)
    assert sum(tag == "figure" for tag, _ in whole.elements) == 8
    for name in ("data", "tok", "base", "instructions", "untrained"):
        shutil.rmtree(life / name)
    page = page_of(life)
    assert sum(tag == "figure" for tag, _ in page.elements) == 4, "those of chat are left"
    assert page.text.count("NotImplementedError") == whole.text.count("NotImplementedError")
    assert "1,612 documents" in page.text


def test_curves_are_found_after_the_folders_have_moved_together(life: Path) -> None:
    moved = life.rename(life.parent / "elsewhere")
    assert sum(tag == "figure" for tag, _ in page_of(moved).elements) == 8


def test_evaluations_of_other_models_are_left_out(life: Path) -> None:
    stranger = Card.load(life / "eval-base")
    stranger.inputs[0].fingerprint = "0" * 64
    assert stranger.inputs[0].card is not None
    stranger.inputs[0].card["fingerprint"] = "0" * 64
    stranger.metrics["bits_per_byte"] = 0.4242
    stranger.save(life / "eval-base")
    assert "0.424" not in page_of(life).text
    assert "0.424" in page_of(life, evaluations=(life / "eval-base",)).text, "unless they are asked for by name"


def test_of_two_evaluations_of_one_model_the_newest_counts(life: Path) -> None:
    shutil.copytree(life / "eval-base", life / "a-newer-one")
    newer = Card.load(life / "a-newer-one")
    newer.created, newer.metrics["bits_per_byte"] = "2026-02-02T03:04:05+0000", 1.0501
    newer.save(life / "a-newer-one")
    text = page_of(life).text
    assert "1.0501" in text
    assert text.count("pre-trained") == page_of(life).text.count("pre-trained")
    assert [e.label for e in find_evaluations([life / "chat"], read_lineage(life / "chat"))].count("pre-trained") == 1


def test_stages_measured_on_different_texts_are_marked(life: Path) -> None:
    assert "not measured on the same" not in page_of(life).text
    other = Card.load(life / "eval-base")
    other.inputs[1].fingerprint = "1" * 64
    other.save(life / "eval-base")
    assert "not measured on the same" in page_of(life).text


def test_a_model_without_evaluations_and_logs_has_a_report(life: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("eval-untrained", "eval-base", "eval-chat"):
        shutil.rmtree(life / name)
    (life / "chat" / "metrics.jsonl").unlink()
    text = page_of(life).text
    assert "Held-out scores" not in text
    assert "4.2 M" in text
    assert "danlu evaluate" in capsys.readouterr().err


def test_what_is_no_model_folder_is_told_and_nothing_written(life: Path, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="was not made by danlu"):
        build_report(ReportConfig(model=tmp_path, out=tmp_path / "r.html"))
    with pytest.raises(DanluError, match="is not an evaluation"):
        build_report(ReportConfig(model=life / "chat", evaluations=(life / "data",), out=tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def test_same_cards_give_the_same_page(life: Path) -> None:
    config = ReportConfig(model=life / "chat")
    first = build_report(config).read_bytes()
    assert build_report(config).read_bytes() == first


def browser() -> str:
    """Chromium, which CI must have; elsewhere the test is skipped without it."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium; CI has to install it")
        pytest.skip("no chromium on this machine")
    return found


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_the_page_fits_the_screen(life: Path, tmp_path: Path, width: int) -> None:
    """Nothing sticks out sideways: only tables and code scroll, inside themselves."""
    report = build_report(ReportConfig(model=life / "chat", out=tmp_path / "r.html"))
    html = report.read_text().replace("<details>", "<details open>")
    report.write_text(html)
    (
        tmp_path / "frame.html"
    ).write_text(f"""<!doctype html><iframe id=f src=r.html width={width} height=800 style="border:0"></iframe>
        <script>f.onload = () => {{ const e = f.contentDocument.documentElement;
        const [inner, scroll, letters] = [e.clientWidth, e.scrollWidth, e.innerText.length];
        document.title = `inner ${{inner}} scroll ${{scroll}} text ${{letters}}`; }}</script>""")
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    measured = re.search(r"<title>inner (\d+) scroll (\d+) text (\d+)</title>", dom)
    assert measured is not None, dom[:500]
    inner, scroll, letters = map(int, measured.groups())
    assert inner > width - 20
    assert scroll <= inner
    assert letters > 3000
