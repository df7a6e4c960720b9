"""Modules of the chat page, each against its rule, in the browser that runs them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from page_driver import Visitor

from danlu.server.page import FOLDER

Visit = Callable[..., Visitor]

MARKDOWN = r"""# Title

Some *emphasis* and [a link][ref], $a^2$ and \(b\), but $5 and $6 are prices.

1. one

   more of one
2. two
   - deep

| a | b |
|:--|--:|
| 1 | $x$ |

```python
def f():
    return "<b>"
```

$$
\frac{a}{b}
$$

> quoted
> lines

\[ x = 1 \]
Setext
------
- [x] done
- [ ] open

<b onclick=x>html</b>

[ref]: https://example.org
"""


@pytest.fixture
def run(visit: Visit) -> Callable[[str, Any], Any]:
    """Runs the body of an async function with one argument, beside the page's own modules."""
    page = visit().page
    return lambda body, argument=None: page.evaluate(f"async (given) => {{ {body} }}", argument)


def test_growing_markdown_ends_as_the_whole(run: Callable[..., Any]) -> None:
    """However the text is cut into pieces; and what was settled keeps its elements."""
    ends = run(
        """
        const { MarkdownView } = await import("/page/js/markdown.js");
        const rendered = (cuts) => {
          const element = document.createElement("div");
          const view = new MarkdownView(element);
          let firstBlock = null;
          for (const cut of cuts) {
            view.update(given.slice(0, cut), false);
            if (cut > 40) firstBlock ??= element.firstChild;
          }
          view.update(given, true);
          return [element.innerHTML, firstBlock === null || firstBlock === element.firstChild];
        };
        const all = Array.from(given, (_, at) => at);
        return [[], all, ...[3, 7, 31].map((step) => all.filter((at) => at % step === 0))].map(rendered);
        """,
        MARKDOWN,
    )
    whole = ends[0][0]
    assert [end for end, _ in ends] == [whole] * len(ends)
    assert all(kept for _, kept in ends)
    for part in (
        '<a href="https://example.org"',
        'align="right"',
        "<mfrac>",
        "hljs-keyword",
        "&lt;b onclick",
        "$5 and $6",
    ):
        assert part in whole, part
    assert whole.count("<math") == 5
    assert 'display="block"' in whole


def test_a_long_answer_costs_no_more_for_each_token(run: Callable[..., Any]) -> None:
    """Only the last block is read again: the tenth thousand letters take about the time of the first."""
    first, last = run(
        """
        const { MarkdownView } = await import("/page/js/markdown.js");
        const text = "A paragraph with *some* words in it, as models write them.\\n\\n".repeat(1500);
        const view = new MarkdownView(document.createElement("div"));
        const medianOf = (from) => {
          const times = [];
          for (let at = from; at < from + 3000; at += 6) {
            const start = performance.now();
            view.update(text.slice(0, at), false);
            times.push(performance.now() - start);
          }
          return times.sort((a, b) => a - b)[times.length >> 1];
        };
        const first = medianOf(600);
        for (let at = 3600; at < 80000; at += 600) view.update(text.slice(0, at), false);
        return [first, medianOf(80000)];
        """
    )
    assert last < 8 * first + 0.5


def test_events_do_not_depend_on_how_they_arrive(run: Callable[..., Any]) -> None:
    """Server-sent events cut anywhere, with every end of line; what has no empty line behind it is none."""
    events = run(
        """
        const { serverSentEvents } = await import("/page/js/stream.js");
        const bytes = new TextEncoder().encode(given);
        const read = async (size) => {
          const body = new ReadableStream({
            start(controller) {
              for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
              controller.close();
            },
          });
          const found = [];
          for await (const event of serverSentEvents(body)) found.push(event);
          return found;
        };
        return Promise.all([1, 2, 3, 5, 1000].map(read));
        """,
        ": ping\n\ndata: 丹炉\r\n\r\nevent: x\ndata:1\ndata: 2\n\ndata\r\rid: 7\n\ndata: cut off",
    )
    expected = [{"event": "message", "data": "丹炉"}, {"event": "x", "data": "1\n2"}, {"event": "message", "data": ""}]
    assert events == [expected] * 5


def test_tokens_are_joined_to_characters(run: Callable[..., Any]) -> None:
    """A token may be a part of a character: its log-probabilities add up. Bytes that are no text do not hold it up."""
    tokens = run(
        """
        const { TokenReader, heatOf } = await import("/page/js/tokens.js");
        const token = (bytes, logprob) => ({ token: "�", bytes, logprob, top_logprobs: [] });
        const reader = new TokenReader([]);
        reader.read([token([0xe4, 0xb8], -1), token([0xb9], -2)]);
        const found = reader.read([token([255, 255, 255, 255], -1), token([65], 0)]);
        return [...found, [-0.01, -0.2, -0.6, -1, -2, -9].map(heatOf)];
        """
    )
    assert tokens[0] == ["丹", -3, []]
    assert tokens[2][0] == "A"
    assert tokens[3] == [0, 1, 2, 3, 4, 5]


def test_requests_are_what_chat_templates_take(run: Callable[..., Any]) -> None:
    """Roles in turns, although a question got no answer; calls with their results."""
    call = {"id": "c1", "name": "f", "arguments": "{}"}
    path = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "result"},
    ]
    messages = run(
        'return (await import("/page/js/completion.js")).requestMessages("be kind", given)',
        path,
    )
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert messages[1]["content"] == "one\n\ntwo"
    assert messages[3] == {"role": "tool", "tool_call_id": "c1", "content": "result"}


def test_both_languages_say_everything(run: Callable[..., Any]) -> None:
    """Every text that is used is there in both, with the same places to fill in; and none that nobody uses."""
    english, chinese = run('const { STRINGS } = await import("/page/js/i18n.js"); return [STRINGS.en, STRINGS.zh]')
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key
        assert text.strip()
        assert chinese[key].strip()
    sources = "".join(
        path.read_text("utf-8")
        for path in [FOLDER / "index.html", *(FOLDER / "js").glob("*.js")]
        if path.name != "i18n.js"
    )
    assert set(re.findall(r'data-(?:i18n(?:-\w+)?|text)="([\w.]+)"', sources)) <= english.keys()
    made = [
        r"error\.\d+",
        r"list\.(today|week|earlier)",
        r"p\.\w+",
        r"p\.\w+\.help",
    ]  # put together where they are used
    for key in english:
        assert f'"{key}"' in sources or any(re.fullmatch(pattern, key) for pattern in made), f"{key} is not used"
