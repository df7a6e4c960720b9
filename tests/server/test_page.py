"""The chat page as people use it: a real Chromium, a real server, a tiny model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from page_driver import LONG, Visitor, saying
from server_process import ServerProcess

Visit = Callable[..., Visitor]
ATTACK = '<img src=x onerror="window.hit=1"><script>window.hit=1</script> [link](javascript:window.hit=1) **bold**'


def test_an_answer_streams_and_is_kept(visit: Visit) -> None:
    """Question and answer are shown, with what it took; they are there after a reload."""
    someone = visit()
    someone.ask("Hello")
    assert someone.texts(".question-body") == ["Hello"]
    [answer] = someone.answers()
    assert answer
    [numbers] = someone.texts(".numbers")
    assert [word for word in ("tokens/s", "s to first token", "12 tokens") if word not in numbers] == [], numbers
    assert "Hello" in someone.page.title()
    assert someone.page.locator("#announcer").inner_text().startswith("Answer of tiny: ")
    someone.reload()
    assert someone.texts(".question-body") == ["Hello"]
    assert someone.answers() == [answer]
    assert someone.texts(".conversations [aria-current] .title") == ["Hello"]


def test_an_answer_is_stopped_and_continued(visit: Visit) -> None:
    someone = visit(LONG)
    someone.ask("Go on and on", wait=False)
    text = someone.page.locator(".answer > .markdown")
    someone.until(lambda: len(text.inner_text()) > 20)
    someone.page.press("#message", "Escape")
    someone.wait_for_answers()
    stopped = text.inner_text()
    assert someone.texts(".answer .status") == ["Stopped"]
    time.sleep(0.3)
    assert text.inner_text() == stopped
    someone.page.click("#toggle-settings")
    someone.page.fill("#p-max_tokens", "5")
    someone.page.click("text=Continue")
    someone.wait_for_answers()
    assert len(someone.texts(".answer")) == 1
    assert len(someone.page.evaluate("document.querySelector('.answer > .markdown').textContent")) > len(
        stopped.rstrip()
    )
    assert someone.texts(".answer .status") == ["Cut off at the longest answer"]


def test_editing_makes_a_branch(visit: Visit) -> None:
    """The old question stays, with its answer, and one can go to and fro; a reload shows what was shown."""
    someone = visit(saying("first"))
    someone.ask("One")
    someone.page.press("#message", "ArrowUp")
    box = someone.page.locator(".edit-form textarea")
    assert box.input_value() == "One"
    box.fill("Two")
    box.press("Enter")
    someone.wait_for_answers()
    assert someone.texts(".question-body") == ["Two"]
    assert someone.texts(".question .position") == ["2/2"]
    someone.page.click("[aria-label='Previous version']")
    assert someone.texts(".question-body") == ["One"]
    someone.wait_until_kept()
    someone.reload()
    assert someone.texts(".question-body") == ["One"]
    assert someone.texts(".question .position") == ["1/2"]


def test_answering_again_keeps_the_old_answer(visit: Visit) -> None:
    someone = visit({"max_tokens": 12, "temperature": 1})
    someone.ask("Roll the dice")
    first = someone.answers()
    someone.page.click("[aria-label='Answer again']")
    someone.wait_for_answers()
    assert someone.texts(".answer .position") == ["2/2"]
    assert someone.answers() != first
    someone.page.click(".answer [aria-label='Previous version']")
    assert someone.answers() == first


def test_models_answer_side_by_side(visit: Visit) -> None:
    """Each has its own column and branch; a later question goes to both."""
    someone = visit()
    someone.page.click("[aria-label='Compare with another model']")
    someone.ask("Both of you")
    assert someone.texts(".column .byline") == ["tiny", "other"]
    assert len([text for text in someone.answers() if text]) == 2
    someone.page.locator(".column").nth(1).locator("[aria-label='Answer again']").click()
    someone.wait_for_answers()
    assert someone.texts(".answer .position") == ["2/2"]
    someone.ask("And again")
    someone.reload()
    assert someone.texts(".column .question-body") == ["Both of you", "And again"] * 2
    assert someone.texts(".column .byline") == ["tiny", "tiny", "other", "other"]
    someone.page.click("[aria-label='Remove column 1']")
    assert someone.texts(".column .byline") == ["other", "other"]


@pytest.mark.parametrize("way", ["said", "imported"])
def test_what_a_model_writes_is_text(visit: Visit, keep: Callable[..., str], way: str) -> None:
    """HTML in it is shown as it was written, whether it is said or comes from a file; nothing of it runs."""
    if way == "said":
        someone = visit(saying(ATTACK))
        someone.ask(ATTACK)
    else:
        fields = {
            "reasoning": ATTACK,
            "model": ATTACK,
            "tool_calls": [{"id": "a", "name": ATTACK, "arguments": ATTACK}],
        }
        place = keep(("user", {"content": ATTACK}), ("assistant", {"content": ATTACK, **fields}), title=ATTACK)
        someone = visit()
        someone.open(f"#/c/{place}")
        someone.page.wait_for_selector(".answer")
        someone.page.click("summary")
    assert '<img src=x onerror="window.hit=1"><script>window.hit=1</script>' in someone.answers()[0]
    assert someone.page.locator(".answer > .markdown strong").inner_text() == "bold"
    assert someone.page.locator(".thread :is(img, script, iframe, [onerror])").count() == 0
    assert [a for a in someone.page.locator(".thread a").all() if a.get_attribute("href")] == []
    someone.page.wait_for_timeout(200)
    assert someone.page.evaluate("window.hit") is None
    someone.picture(f"hostile-{way}")


def test_another_language_changes_every_word_and_nothing_else(visit: Visit) -> None:
    someone = visit()
    someone.ask("Hello")
    answers = someone.answers()
    someone.page.fill("#message", "half a message")
    someone.page.select_option("#language", "zh")
    assert someone.page.get_attribute("html", "lang") == "zh-CN"
    assert someone.page.inner_text("#new") == "新对话"
    assert "词元/秒" in someone.texts(".numbers")[0]
    assert someone.page.get_attribute("#message", "placeholder") == "想问什么都可以……"
    assert someone.page.input_value("#message") == "half a message"
    assert someone.answers() == answers
    someone.reload()
    assert someone.page.inner_text("#new") == "新对话"
    assert visit(locale="zh-TW").page.inner_text("#new") == "新对话"


def test_the_theme_is_chosen_or_the_systems(visit: Visit) -> None:
    someone = visit(color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = someone.page.evaluate(paper)
    someone.page.select_option("#theme", "light")
    light = someone.page.evaluate(paper)
    assert light != dark
    someone.reload()
    assert someone.page.evaluate(paper) == light
    someone.page.select_option("#theme", "system")
    assert someone.page.evaluate(paper) == dark


def test_settings_go_into_the_request(visit: Visit) -> None:
    """And what is no number or no JSON holds the message back, with a word about what is wrong."""
    someone = visit({})
    someone.page.click("#toggle-settings")
    someone.page.fill("#p-system", "Be brief.")
    someone.page.fill("#p-temperature", "0.5")
    someone.page.fill("#p-seed", "7")
    someone.page.fill("#p-max_tokens", "many")
    someone.page.fill("#p-stop", "a b\nc")
    someone.page.fill("#p-json_schema", '{"type": "boolean"}')
    someone.page.fill("#message", "Is it?")
    someone.page.press("#message", "Enter")
    assert someone.texts(".answer") == []
    assert "Enter a number from 1 to" in someone.page.inner_text("#p-max_tokens-error")
    assert someone.page.evaluate("document.activeElement.id") == "p-max_tokens"
    someone.page.fill("#p-max_tokens", "9")
    with someone.page.expect_request("**/v1/chat/completions") as sent:
        someone.page.press("#message", "Enter")
    body = sent.value.post_data_json
    someone.wait_for_answers()
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    assert {name: body[name] for name in ("temperature", "seed", "max_tokens", "stop")} == {
        "temperature": 0.5,
        "seed": 7,
        "max_tokens": 9,
        "stop": ["a b", "c"],
    }
    assert json.loads(someone.answers()[0]) in (True, False)
    someone.reload()
    assert someone.page.input_value("#p-seed") == "7"


def test_what_html_drops_is_shown_as_it_is_kept(visit: Visit) -> None:
    """A character 0, which models without training write."""
    someone = visit({"extra": {"structured_outputs": {"regex": r"\x00<i>"}}})
    someone.ask("Say it")
    assert someone.answers() == ["\ufffd<i>"]
    someone.reload()
    assert someone.answers() == ["\ufffd<i>"]


def test_a_call_of_a_tool_is_shown_and_answered(visit: Visit) -> None:
    tool = {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    tools = [{"type": "function", "function": tool}]
    someone = visit({"tools": tools, "extra": {"tool_choice": "required"}, "max_tokens": 200})
    someone.ask("What time is it?")
    assert someone.texts(".call-head") == ["Calls get_time"]
    assert json.loads(someone.texts(".call pre")[0]) == {}
    someone.reload()
    assert someone.page.get_attribute("#message", "placeholder") == "The result of get_time…"
    with someone.page.expect_request("**/v1/chat/completions") as sent:
        someone.ask("12:00")
    roles = [message["role"] for message in sent.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "tool"]


def test_an_error_is_told_and_mended(visit: Visit) -> None:
    """The card says what the server said; "try again" answers the same question."""
    someone = visit({"max_tokens": 12, "extra": {"top_logprobs": 3}})
    someone.expected = ("400", "net::ERR_INTERNET_DISCONNECTED")
    someone.ask("Hello")
    assert "top_logprobs: belongs to logprobs" in someone.texts(".error-card")[0]
    someone.picture("error")
    someone.page.click("#toggle-settings")
    someone.page.fill("#p-extra", "")
    someone.context.set_offline(True)
    someone.page.click(".error-card button")
    someone.page.wait_for_selector("text=The server cannot be reached")
    someone.context.set_offline(False)
    someone.page.click(".error-card button")
    someone.wait_for_answers()
    assert someone.texts(".error-card") == []
    assert someone.answers()[0]
    answers = someone.answers()
    someone.reload()  # what could not be kept meanwhile has been kept since
    assert someone.answers() == answers


def test_a_busy_server_is_asked_again_when_it_says(visit: Visit) -> None:
    """Retry-After is waited for, and Stop ends the waiting."""
    someone = visit()
    someone.expected = ("429",)
    refusal = {"error": {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": None}}
    refused = {"status": 429, "headers": {"Retry-After": "2"}, "body": json.dumps(refusal)}
    place = "**/v1/chat/completions"
    someone.page.route(place, lambda route: route.fulfill(**refused), times=1)
    someone.ask("Hello", wait=False)
    someone.page.wait_for_selector("text=Trying again in")
    assert "the queue is full" in someone.texts(".error-card")[0]
    someone.wait_for_answers()
    assert someone.texts(".error-card") == []
    assert someone.answers()[0]
    someone.page.route(place, lambda route: route.fulfill(**refused))
    someone.ask("Again", wait=False)
    someone.page.wait_for_selector("text=Trying again in")
    someone.page.click("[aria-label=Stop]")
    someone.wait_for_answers()
    someone.page.wait_for_timeout(2500)
    assert "Trying again" not in someone.texts(".error-card")[0]


def test_how_sure_the_model_was(visit: Visit) -> None:
    """Coloured tokens are the answer; each tells its probability and what else might have stood there."""
    someone = visit(saying("probably"))
    someone.page.click("#heat")
    someone.ask("Are you sure?")
    assert "".join(someone.page.locator(".token").all_text_contents()) == "probably"
    someone.page.focus(".tokens")
    someone.page.keyboard.press("ArrowRight")
    someone.page.wait_for_selector(".token-tip")
    someone.picture("tokens")
    first = someone.page.inner_text(".token-tip .chosen")
    assert "%" in first
    assert len(someone.texts(".token-tip .tip-row")) > 1
    someone.page.keyboard.press("ArrowRight")
    assert someone.page.inner_text(".token-tip .chosen") != first
    someone.page.keyboard.press("Escape")
    assert someone.page.locator(".token-tip").is_hidden()
    someone.reload()
    assert "".join(someone.page.locator(".token").all_text_contents()) == "probably"
    someone.page.click("#heat")
    assert someone.answers() == ["probably"]


def test_conversations_are_found_renamed_exported_imported_deleted(
    visit: Visit, keep: Callable[..., str], tmp_path: Path, page_server: ServerProcess
) -> None:
    keep(("user", {"content": "怎样炼丹"}), ("assistant", {"content": "用炉子"}), title="丹炉问答")
    kept = keep(("user", {"content": "a needle"}), ("assistant", {"content": "in a haystack"}), title="Sewing")
    someone = visit()
    titles = ".conversations .title"
    someone.page.keyboard.press("Control+k")
    someone.page.keyboard.type("炼丹")
    someone.until(lambda: someone.page.locator(titles).count() == 1)
    assert someone.texts(titles) == ["丹炉问答"]
    assert someone.texts(".snippet mark") == ["炼丹"]
    someone.page.fill("#search", "haystack")
    someone.page.wait_for_selector("text=Sewing")
    someone.page.click("text=Sewing")
    assert someone.page.wait_for_selector(".answer").inner_text().find("in a haystack") >= 0

    def choose(item: str) -> None:
        someone.page.hover(f"li:has([data-id='{kept}'])")
        someone.page.click(f"[data-id='{kept}'] + .icon-button")
        someone.page.click(f"[role=menuitem]:has-text('{item}')")

    choose("Rename")
    someone.page.fill("#title-input", "Tailoring")
    someone.page.keyboard.press("Enter")
    someone.page.wait_for_selector(f"{titles}:has-text('Tailoring')")
    assert "Tailoring" in someone.page.title()
    exports = []
    for item, ending in (("Export as Markdown", "md"), ("Export as JSON", "json")):
        with someone.page.expect_download() as download:
            choose(item)
        assert download.value.suggested_filename == f"Tailoring.{ending}"
        exports.append(tmp_path / f"export.{ending}")
        download.value.save_as(exports[-1])
    choose("Delete")
    someone.page.click("dialog .danger")
    someone.page.wait_for_selector("#empty")
    assert httpx.get(f"{page_server.url}/api/conversations/{kept}", trust_env=False).status_code == 404
    someone.page.wait_for_selector(".conversations >> text=Nothing found.")
    for export in exports:
        someone.page.set_input_files("#sidebar [type=file]", export)
        someone.page.wait_for_selector(".answer:has-text('in a haystack')")
        someone.page.click("#new")
    someone.until(lambda: someone.page.locator(titles).count() == 2)


def test_files_of_text_go_with_a_message(visit: Visit, tmp_path: Path) -> None:
    """In a fence that is longer than theirs; other files are refused with the reason."""
    someone = visit()
    notes, picture = tmp_path / "notes.md", tmp_path / "photo.png"
    notes.write_text("# Notes\n```\ncode\n```\n")
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    someone.page.set_input_files("#composer [type=file]", [notes, picture])
    assert "photo.png: this model reads text only" in someone.page.wait_for_selector(".notice.error").inner_text()
    assert someone.texts(".chip") == ["notes.md"]
    with someone.page.expect_request("**/v1/chat/completions") as sent:
        someone.ask("Read this")
    content = sent.value.post_data_json["messages"][0]["content"]
    assert content == "Read this\n\nnotes.md:\n````markdown\n# Notes\n```\ncode\n```\n````"
    assert someone.texts(".chip") == []
    assert someone.texts(".question .code pre") == ["# Notes\n```\ncode\n```"]


def test_the_keyboard_is_enough(visit: Visit) -> None:
    someone = visit()
    keyboard = someone.page.keyboard
    assert someone.page.evaluate("document.activeElement.id") == "message"
    keyboard.type("one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    assert someone.page.input_value("#message") == "one\ntwo"
    # Enter that ends the choice of a Chinese word is no Enter.
    someone.page.evaluate(
        "document.querySelector('#message').dispatchEvent(new KeyboardEvent('keydown', "
        "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert someone.texts(".question") == []
    keyboard.press("Enter")
    someone.wait_for_answers()
    assert someone.texts(".question-body") == ["one\ntwo"]
    keyboard.press("Control+Shift+o")
    someone.page.wait_for_selector("#empty")
    keyboard.press("Control+b")
    assert someone.page.locator("#sidebar").is_hidden()
    keyboard.press("Control+k")
    assert someone.page.evaluate("document.activeElement.id") == "search"
    someone.page.evaluate("document.activeElement.blur()")
    keyboard.press("?")
    assert someone.page.locator("dialog").is_visible()
    keyboard.press("Escape")
    someone.page.wait_for_selector("dialog", state="detached")
    keyboard.press("/")
    assert someone.page.evaluate("document.activeElement.id") == "message"


def test_an_answer_goes_on_while_one_looks_elsewhere(visit: Visit) -> None:
    """And whoever comes back sees it grow."""
    someone = visit(LONG)
    someone.ask("A long story", wait=False)
    text = someone.page.locator(".answer > .markdown")
    someone.until(lambda: len(text.inner_text()) > 20)
    before = len(text.inner_text())
    someone.page.click("#new")
    someone.page.wait_for_selector("#empty")
    someone.page.click(".conversations >> text=A long story")
    someone.until(lambda: len(text.inner_text()) > before + 20)
    someone.page.press("#message", "Escape")
    someone.wait_for_answers()


def test_links_to_what_is_not_there_lead_to_a_new_conversation(visit: Visit) -> None:
    someone = visit()
    someone.expected = ("404",)
    someone.open("#/c/none")
    someone.page.wait_for_selector("text=The conversation could not be loaded.")
    someone.page.wait_for_selector("#empty")
