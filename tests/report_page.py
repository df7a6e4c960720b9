"""A report as a browser would take it."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser would take them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.styles = ""
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "style":
            self.styles += data
        else:
            self.text += data

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def assert_self_contained(page: Page) -> None:
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "img", "image", "style/"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value is not None
                assert value.startswith("#"), (tag, name, value)
            if name == "style" and "url(" in (value or ""):
                assert "url(#" in (value or "")
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    assert "@font-face" not in page.styles
    policies = [
        a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
