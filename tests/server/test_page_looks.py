"""Whether everybody can use the chat page: contrast, names, small screens. Pictures of it go to DANLU_SCREENSHOTS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from page_driver import LONG, Visitor

Visit = Callable[..., Visitor]

ANSWER = r"""Attention lets every token look at the others.

## The formula

$$
\operatorname{Attention}(Q, K, V) = \operatorname{softmax}\left(\frac{QK^\top}{\sqrt{d_k}}\right) V
$$

The division by \(\sqrt{d_k}\) keeps the logits near variance 1; see [the paper](https://example.org).

| Part | Shape | Role |
|:-----|:-----:|:-----|
| query | $(t, d_k)$ | what is looked for |

```python
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    "Scaled dot-product attention"
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
    return weights @ v  # (b, t, d)
```

> Attention is all you need, with `code`.
"""

CONVERSATION = (
    ("user", {"content": "怎样解释注意力机制？ Explain attention."}),
    (
        "assistant",
        {
            "content": ANSWER,
            "reasoning": "The user wants a clear answer.",
            "reasoning_seconds": 1.5,
            "stats": {"first_token_seconds": 0.2, "tokens_per_second": 87.4, "completion_tokens": 200},
            "tool_calls": [{"id": "c1", "name": "look_up", "arguments": '{"word": "attention"}'}],
        },
    ),
    ("user", {"content": "And how sure are you?\n```python\nprint(1)\n```"}),
    (
        "assistant",
        {
            "content": "Quite sure, I think.",
            "finish_reason": "length",
            "logprobs": [["Quite", -0.01], [" sure", -0.3], [",", -0.5], [" I", -1.0], [" think", -1.8], [".", -5.0]],
        },
    ),
)

CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const parse = (text) => {
    if (!known.has(text)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = text;
      canvas.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
      known.set(text, [r, g, b, a / 255]);
    }
    return known.get(text);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((value, at) => value * a + below[at] * (1 - a));
  const light = (color) => {
    const [r, g, b] = color.map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  // What is behind an element: one color, or several where there is a gradient.
  const behind = (element) => {
    if (!element) return [[255, 255, 255]];
    const style = getComputedStyle(element);
    const below = behind(element.parentElement);
    const stops = style.backgroundImage.match(/(?:rgb|color)a?\\([^)]*\\)/g) ?? [];
    const own = [style.backgroundColor, ...stops].map(parse).filter(([, , , alpha]) => alpha > 0);
    const solid = below.map((color) => over(parse(style.backgroundColor), color));
    return [...solid, ...stops.map(parse).flatMap((stop) => solid.map((color) => over(stop, color)))];
  };
  const found = [];
  const check = (element, color, least, what) => {
    if (element.matches(":disabled") || element.closest("[inert]")) return;
    let opacity = 1;
    for (let each = element; each; each = each.parentElement) opacity *= Number(getComputedStyle(each).opacity);
    if (opacity === 0) return;
    for (const back of behind(element)) {
      const [r, g, b, a] = parse(color);
      const value = ratio(over([r, g, b, a * opacity], back), back);
      if (value < least) found.push(`${what}: ${value.toFixed(2)} (${color} on ${back.map(Math.round)})`);
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest(".spoken, .skip, option")) continue;
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    check(element, style.color, large ? 3 : 4.5, `"${walker.currentNode.data.trim().slice(0, 30)}"`);
  }
  for (const box of document.querySelectorAll("input, textarea, select")) {
    if (!box.checkVisibility()) continue;
    check(box, getComputedStyle(box).color, 4.5, `text of ${box.id}`);
    if (box.placeholder) check(box, getComputedStyle(box, "::placeholder").color, 4.5, `placeholder of ${box.id}`);
  }
  for (const icon of document.querySelectorAll("button .icon")) {
    if (!icon.checkVisibility() || icon.closest(":disabled")) continue;
    check(icon.parentElement, getComputedStyle(icon).color, 3, "icon");
  }
  return [...new Set(found)];
}
"""

NAMES = """
() => {
  const found = [];
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  found.push(...ids.filter((id, at) => ids.indexOf(id) !== at).map((id) => `two elements are called ${id}`));
  for (const element of document.querySelectorAll("[aria-controls], [aria-labelledby], [aria-describedby]")) {
    for (const name of ["aria-controls", "aria-labelledby", "aria-describedby"]) {
      for (const id of (element.getAttribute(name) ?? "").split(" ").filter(Boolean)) {
        if (!document.getElementById(id)) found.push(`${name} of ${element.outerHTML.slice(0, 80)} leads nowhere`);
      }
    }
  }
  const named = "button, a[href], input:not([type=file]), textarea, select, [role=group]";
  for (const element of document.querySelectorAll(named)) {
    const label = element.getAttribute("aria-label") || element.labels?.[0]?.innerText || element.innerText;
    if (!label?.trim()) found.push(`no name: ${element.outerHTML.slice(0, 120)}`);
  }
  for (const image of document.querySelectorAll("img:not([alt]), svg:not([aria-hidden])")) found.push(image.outerHTML);
  if (document.querySelectorAll("main").length !== 1) found.push("not one main part");
  return found;
}
"""

STATES: dict[str, Callable[[Visitor], None]] = {}


def state(step: Callable[[Visitor], None]) -> Callable[[Visitor], None]:
    """A state of the page with the conversation above, each reached from the one before."""
    STATES[step.__name__] = step
    return step


@state
def answers(someone: Visitor) -> None:
    someone.page.click("summary")


@state
def heat(someone: Visitor) -> None:
    someone.page.click("#heat")
    someone.page.locator(".token").last.click()


@state
def settings(someone: Visitor) -> None:
    someone.page.click("#heat")
    someone.page.click("#toggle-settings")
    someone.page.fill("#p-top_p", "7")


@state
def menu(someone: Visitor) -> None:
    someone.page.click("#settings .close-drawer")
    someone.page.locator(".conversations .icon-button").first.click()


@state
def editing(someone: Visitor) -> None:
    someone.page.keyboard.press("Escape")
    someone.page.locator(".question").last.hover()
    someone.page.locator(".question [aria-label=Edit], .question [aria-label=编辑]").last.click()


@state
def shortcuts(someone: Visitor) -> None:
    someone.page.locator(".edit-form .quiet").click()
    someone.page.click("#help")


@pytest.mark.parametrize(("theme", "language"), [("light", "en-US"), ("dark", "zh-CN")])
def test_everything_can_be_read_and_has_a_name(
    visit: Visit, keep: Callable[..., str], theme: str, language: str
) -> None:
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for large text and pictures that mean something."""
    someone = visit(color_scheme=theme, locale=language, reduced_motion="reduce")
    name = f"{theme}-{language[:2]}"
    look(someone, f"desktop-empty-{name}")
    someone.open(f"#/c/{keep(*CONVERSATION, title='Attention 注意力')}")
    someone.page.wait_for_selector(".answer")
    for state_name, reach in STATES.items():
        reach(someone)
        look(someone, f"desktop-{state_name}-{name}")


def look(someone: Visitor, name: str) -> None:
    someone.picture(name)
    assert someone.page.evaluate(CONTRAST) == [], name
    assert someone.page.evaluate(NAMES) == [], name


@pytest.mark.parametrize(("theme", "language"), [("light", "en-US"), ("dark", "zh-CN")])
def test_a_phone_is_enough(visit: Visit, keep: Callable[..., str], theme: str, language: str) -> None:
    """Nothing sticks out sideways; fields are not so small that the browser zooms into them, nor buttons too small for
    a finger; models are swiped through."""
    phone: dict[str, Any] = {"viewport": {"width": 375, "height": 812}, "has_touch": True, "is_mobile": True}
    someone = visit(color_scheme=theme, locale=language, device_scale_factor=2, reduced_motion="reduce", **phone)
    name = f"{theme}-{language[:2]}"
    fits(someone, f"phone-empty-{name}")
    someone.open(f"#/c/{keep(*CONVERSATION, models=2)}")
    someone.page.wait_for_selector(".answer")
    fits(someone, f"phone-answers-{name}")
    someone.page.locator(".tab").nth(1).click()
    someone.until(lambda: someone.page.locator(".tab").nth(1).get_attribute("aria-current") == "true")
    assert someone.page.locator(".picker select:visible").input_value() == "other"
    fits(someone, f"phone-other-{name}")
    for button, panel in (("#toggle-sidebar", "#sidebar"), ("#toggle-settings", "#settings")):
        someone.page.click(button)
        assert someone.page.locator(panel).is_visible()
        assert someone.page.evaluate("document.getElementById('main').inert")
        assert someone.page.evaluate(f"document.querySelector('{panel}').contains(document.activeElement)")
        fits(someone, f"phone-{panel[1:]}-{name}")
        someone.page.keyboard.press("Escape")
        assert someone.page.locator(panel).is_hidden()
        assert not someone.page.evaluate("document.getElementById('main').inert")


def fits(someone: Visitor, name: str) -> None:
    look(someone, name)
    assert someone.page.evaluate("document.documentElement.scrollWidth") <= 375, name
    too_small = """() => [...document.querySelectorAll("input, textarea, select")]
        .filter((box) => box.checkVisibility() && parseFloat(getComputedStyle(box).fontSize) < 16)
        .map((box) => box.id)"""
    assert someone.page.evaluate(too_small) == [], name
    # WCAG 2.5.8: 24 pixels at least.
    narrow = """() => [...document.querySelectorAll("button, select, summary")]
        .filter((part) => part.checkVisibility())
        .filter((part) => Math.min(part.offsetWidth, part.offsetHeight) < 24)
        .map((part) => part.outerHTML.slice(0, 99))"""
    assert someone.page.evaluate(narrow) == [], name


def test_motion_is_left_out_for_those_who_wish_so(visit: Visit) -> None:
    someone = visit(LONG, reduced_motion="reduce")
    someone.ask("Go on", wait=False)
    assert someone.page.evaluate("getComputedStyle(document.querySelector('.seal')).animationName") == "none"
    someone.page.press("#message", "Escape")
    someone.wait_for_answers()
