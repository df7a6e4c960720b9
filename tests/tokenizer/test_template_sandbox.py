"""Templates from outside: what they may use is limited in time, memory and length, in any thread."""

import contextlib
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.tokenizer.chat_template import CHATML, ChatTemplate

MESSAGES = [{"role": "user", "content": "hello " * 20}] * 20

ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='a' * 10000) %}{% for i in range(99999) %}{{ ns.x is string }}{% for j in ns.x %}"
    "{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for m in messages | sort(attribute='content') %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
]
HUGE = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 9**999999 }}",
    "{{ ('9' * 4000) | int * ('9' * 4000) | int }}",
    "{% set ns = namespace(x='a') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(30) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=1) %}{% for i in range(30) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=1) %}{% for i in range(30) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}",
    "{% set big = 'a' * 10000000 %}{% set y %}{% for i in range(9999) %}{{ big }}{% endfor %}{% endset %}",
    "{% set big = 'a' * 10000000 %}{{ big }}{{ big }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000) }}",
    "{{ ('a' * 1000000).replace('', 'b' * 1000) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ ('{0}' * 100000).format('b' * 100000) }}",
    "{{ '%*d' | format(1000000000, 1) }}",
    "{{ ('a\\n' * 1000000) | indent(1000) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ 1 | round(-1000000) }}",
    "{{ (5).to_bytes(10000000000, 'big') }}",
    "{{ ([[1] * 1000] * 100) | sum(start=[]) }}",
    "{{ [1] | batch(10000000000, 'x') | list }}",
    "{{ (['a' * 100000] * 100000) | join }}",
    "{{ ('a' * 100000).join('b' * 100000) }}",
    "{% set a = ['a' * 1000000] * 100000 %}{% set b = [('a' * 1000000) ~ ''] * 100000 %}{{ a == b }}",
    "{{ (['a' * 1000000] * 50000) | unique | list }}",
    "{{ ('\\t' * 1000).expandtabs(1000000) }}",
]
DEEP = [
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
]


@pytest.mark.parametrize("source", ENDLESS)
def test_time_is_limited(source: str) -> None:
    template = ChatTemplate(source, {})
    before, begin = threading.active_count(), time.monotonic()
    with pytest.raises(DanluError, match=r"runs for more than 0\.2 seconds"):
        template.render(MESSAGES, seconds=0.2)
    assert time.monotonic() - begin < 5
    assert threading.active_count() == before


@pytest.mark.parametrize("source", HUGE)
def test_memory_and_length_are_limited(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DanluError, match=r"chat template: (makes|computes|rounds|indents|sums|the method|runs)"):
            ChatTemplate(source, {}).render(MESSAGES, seconds=1)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", DEEP)
def test_recursion_is_limited(source: str) -> None:
    with pytest.raises(DanluError, match="recurse too deeply"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_all_that_is_made_counts() -> None:
    hoard = "{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% set ns.x = ns.x + ['a' * 9999999] %}{% endfor %}"
    with pytest.raises(DanluError, match="in all"):
        ChatTemplate(hoard, {}).render(MESSAGES)


def test_long_sources_are_refused() -> None:
    with pytest.raises(DanluError, match="has more than"):
        ChatTemplate("x" * (1 << 20), {})


def test_threads_have_their_own_limits() -> None:
    """A rendering that is stopped in one thread leaves those of others alone, and the next one in the same thread."""
    endless, ordinary = ChatTemplate(ENDLESS[0], {}), ChatTemplate(CHATML, {})
    expected = ordinary.render(MESSAGES)

    def both(_: int) -> str:
        with pytest.raises(DanluError, match="seconds"):
            endless.render(MESSAGES, seconds=0.1)
        return ordinary.render(MESSAGES)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(both, range(8))) == [expected] * 8


ORDINARY = """\
{%- set ns = namespace(found=false, text='') -%}
{%- for m in messages if m.role in ['user', 'assistant'] and 'content' in m -%}
{{ loop.index }}/{{ loop.length }}{{ ' last' if loop.last }} {{ m['role'] | upper ~ ': ' ~ m.content | trim }}
{% set ns.found = true %}{% set ns.text = ns.text + m.content[:3] %}
{%- if loop.index0 > 3 %}{% break %}{% endif -%}
{%- endfor -%}
{%- macro show(x, y=2) %}<{{ x }} {{ y }}>{% endmacro -%}
{{ show(ns.found) }}{{ ns.text }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ {'a': [1, 'é', none]} | tojson }} {{ (1, 2) | join(', ') }} {{ '%s-%d' % ('a', 3) }} {{ '{}!'.format('x') }}
{{ messages | map(attribute='role') | unique | join('|') }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ 1.5 * 2 }} {{ 'ab' * 3 }}
{{ messages[-1].content.split(' ')[0] if messages else '' }} {{ [3, 1, 2] | sort }} {{ undefined_thing | default('d') }}
{%- for key, value in {'b': 1, 'a': 2} | dictsort %} {{ key }}={{ value }}{% endfor %}
"""


def test_ordinary_templates_render_as_without_the_limits() -> None:
    import jinja2.sandbox

    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    plain.filters["tojson"] = ChatTemplate("", {})._template.environment.filters["tojson"]
    expected = plain.from_string(ORDINARY).render(messages=MESSAGES)
    assert ChatTemplate(ORDINARY, {}).render(MESSAGES) == expected
    assert "é" in expected


PARTS = (
    "'a' * n", "X ~ X", "X + X", "[X, X]", "{'k': X}", "(X, X)", "range(n)", "X | string", "X | list", "X | join(',')",
    "X | replace('a', 'aaaa')", "X | tojson", "X | sort", "X | length", "X == X", "X in [X]", "n ** n", "X | indent(n)",
    "X.upper()", "X | batch(n, 'y') | list", "'%s%s' | format(X, X)", "X | reverse | list", "X | unique | list",
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=5), n=st.sampled_from([0, 3, 999, 10**6, 10**12]))
def test_any_template_ends_soon(parts: list[str], n: int) -> None:
    steps = "".join(f"{{% set ns.x = {part.replace('X', 'ns.x')} %}}" for part in parts)
    head = f"{{% set n = {n} %}}{{% set ns = namespace(x='a') %}}"
    source = f"{head}{{% for i in range(50) %}}{steps}{{% endfor %}}{{{{ ns.x }}}}"
    begin = time.monotonic()
    with contextlib.suppress(DanluError):
        assert len(ChatTemplate(source, {}).render(MESSAGES, seconds=0.2)) <= 16 << 20
    assert time.monotonic() - begin < 8


def test_options_reach_the_template() -> None:
    template = ChatTemplate("{{ documents | length }}{{ enable_thinking }}{{ documents is defined }}", {})
    assert template.render([], options={"documents": ["a"], "enable_thinking": False}) == "1FalseTrue"
    assert ChatTemplate("{{ documents is none }}", {}).render([]) == "True"
    with pytest.raises(DanluError, match="'tools' is not an option"):
        template.render([], options={"tools": []})
