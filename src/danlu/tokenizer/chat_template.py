"""Chat turns as the text a model reads: Jinja templates, rendered in a sandbox.

``CHATML`` is the template of models made here. It keeps three promises that training and serving rest on:

- A conversation's text begins with the text of any shorter one it continues (nothing of an earlier turn is dropped
  later on, the reasoning included), so a key-value cache stays valid and a mask can be laid over whole conversations.
- What the model has to write begins right behind the generation prompt: an answer is stripped of white space, since a
  leading newline would melt into the newline of the header when it is split into tokens.
- What is written in a message cannot forge a turn: see :class:`Disguise`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from danlu.errors import DanluError
from danlu.tokenizer.sandbox import SECONDS, TemplateSandbox, limited
from danlu.tokenizer.special import THINK

Message = Mapping[str, Any]
"""``role``, ``content`` and, where it applies, ``reasoning_content``, ``tool_calls`` (as in the OpenAI API)."""

CHATML = """\
{%- set ns = namespace(system='') %}
{%- if messages and messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content %}
{%- endif %}
{%- if tools %}
    {%- set ns.system = (ns.system ~ '\\n\\n') if ns.system else '' %}
    {%- set ns.system = ns.system ~ 'You may call these functions (one JSON signature a line):\\n<tools>\\n' %}
    {%- for tool in tools %}
        {%- set ns.system = ns.system ~ (tool | tojson) ~ '\\n' %}
    {%- endfor %}
    {%- set ns.system = ns.system ~ '</tools>\\nA call is written as ' %}
    {%- set ns.system = ns.system ~ '<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>.' %}
{%- endif %}
{%- if ns.system %}
    {{- '<|im_start|>system\\n' ~ ns.system ~ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if content is not string %}
        {{- raise_exception('the content of message ' ~ loop.index ~ ' is not text') }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' ~ (message.reasoning_content | trim) ~ '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content | trim }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- set arguments = function.arguments if function.arguments is string else function.arguments | tojson %}
            {{- '\\n' if content | trim or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": ' ~ (function.name | tojson) }}
            {{- ', "arguments": ' ~ arguments ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\\n<tool_response>\\n' ~ content ~ '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' ~ content ~ '<|im_end|>\\n' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {%- set expected = 'expected user, assistant or tool (system comes first)' %}
        {{- raise_exception('message ' ~ loop.index ~ ' has the role "' ~ message.role ~ '"; ' ~ expected) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source, with the functions and filters that Hugging Face templates may use.
        variables: what the template may read besides the conversation, such as ``bos_token``.

    Raises:
        DanluError: the source is not a Jinja template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self.variables = dict(variables)
        try:
            with limited():
                self._template = _environment().from_string(source)
        except (jinja2.TemplateError, SyntaxError) as error:
            raise DanluError(
                f"chat template: is not valid Jinja ({error}); mend it in tokenizer_config.json"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        seconds: float = SECONDS,
    ) -> str:
        """The text of a conversation.

        Args:
            options: further variables: ``documents``, ``enable_thinking`` and whatever else this template reads.
            seconds: the longest it may take.

        Raises:
            DanluError: the template refuses the conversation, reaches for what the sandbox forbids, or exceeds a limit.
        """
        own = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        taken = own.keys() & (options or {}).keys()
        if taken:
            raise DanluError(f"template_options: {sorted(taken)[0]!r} is not an option of its own; pass it as argument")
        try:
            with limited(seconds):
                return self._template.render({**self.variables, "documents": None, **(options or {}), **own})
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise DanluError(f"chat template: cannot render this conversation ({error})") from error


class Disguise:
    """Makes the special tokens that occur *inside* messages unrecognisable while a template is rendered.

    A message may quote ``<|im_end|>``; rendered as it is, it would end the turn. So each such quotation is replaced by
    a private-use character that occurs nowhere else, followed by its number and the character again. The rendered text
    is cut at these; what lies between is the template's, whose special tokens are real, and the quotations themselves
    are encoded as plain text. A conversation without quotations is rendered untouched.

    Args:
        specials: pattern that matches the special tokens.
        source: the template's own text, in which the mark must not occur either.
    """

    def __init__(self, specials: re.Pattern[str], source: str) -> None:
        self._specials = specials
        self._source = source
        self._mark = ""
        self._quotations: list[str] = []

    def put_on(self, value: Any) -> Any:
        """A copy of messages or tools (any nest of lists, mappings and strings) with every special token disguised."""
        texts = list(_strings(value))
        if not any(map(self._specials.search, texts)):
            return value
        used = set(self._source).union(*texts)
        self._mark = next(c for c in map(chr, range(0x100000, 0x10FFFE)) if c not in used)
        return self._replace(value)

    def cut(self, rendered: str) -> list[tuple[str, bool]]:
        """The rendered text in pieces ``(text, is_quotation)``, quotations with their own text again."""
        if not self._mark:
            return [(rendered, False)]
        pieces = re.split(f"{self._mark}([0-9]+){self._mark}", rendered)  # template, number, template, ..., template
        return [(self._quotations[int(p)], True) if i % 2 else (p, False) for i, p in enumerate(pieces) if p]

    def _quote(self, found: re.Match[str]) -> str:
        self._quotations.append(found[0])
        return f"{self._mark}{len(self._quotations) - 1}{self._mark}"

    def _replace(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._specials.sub(self._quote, value)
        if isinstance(value, Mapping):
            return {self._replace(key): self._replace(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._replace(item) for item in value]
        return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def template_of(config: Mapping[str, Any]) -> str | None:
    """The chat template: one text, or the one named "default" of a list."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def plain_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text parts joined, reasoning apart from the answer."""
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        plain["content"] = content = "".join(p["text"] for p in content)
    if plain.get("role") == "assistant" and isinstance(content, str) and not plain.get("reasoning_content"):
        opening, closing = THINK
        head, found, answer = content.partition(closing)
        if found and head.lstrip().startswith(opening):
            plain["reasoning_content"] = head.lstrip().removeprefix(opening).strip()
            plain["content"] = answer.lstrip()
    return plain


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``, by which some templates mark what the model writes: its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> TemplateSandbox:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})  # Jinja's own would escape <, > and & for HTML

    environment = TemplateSandbox(
        {"tojson": tojson}, trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form[:200])
    return environment
