"""Jinja for templates from outside: what they reach, how long they run and how much they make is limited.

Jinja's sandbox keeps a template away from Python; this one also keeps it from running for ever and from filling the
memory, without a thread or a process to watch it. The compiled template is instrumented instead: every turn of a loop,
call and filter looks at the clock, and whatever makes text or a list says beforehand how large it will be. In between
there is only work on values of limited size. An ordinary template of a dozen messages takes about 0.1 ms longer.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from danlu.errors import DanluError

SECONDS = 5.0
CHARACTERS = 16 << 20  # of one text, the rendered one included
WORK = 32 * CHARACTERS  # characters of all texts and items of all lists made while rendering, thrown away or not
SOURCE = 1 << 18  # characters of a template
ITEMS = 1 << 17  # of a list, those of the lists within it included
DIGITS = 1000  # of a whole number

# Left out: what takes quadratic time or serves HTML pages only.
NO_FILTERS = (
    "center",
    "filesizeformat",
    "forceescape",
    "pprint",
    "random",
    "striptags",
    "urlize",
    "wordwrap",
    "xmlattr",
)
# Filters whose time or result grows with the text of the whole value, however deep it lies.
DEEP_FILTERS = frozenset(
    ("dictsort", "format", "groupby", "join", "max", "min", "replace", "sort", "string", "tojson", "unique")
)


class _Budget(threading.local):
    """What the rendering that runs in this thread may still use."""

    deadline: float = float("inf")
    seconds: float = SECONDS
    work: int = WORK

    def tick(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self.deadline:
            raise DanluError(f"chat template: runs for more than {self.seconds:g} seconds; mend its loops")

    def spend(self, size: int) -> None:
        """Take the size of what is about to be made from the budget."""
        if size > CHARACTERS:
            raise DanluError(f"chat template: makes a text or list of more than {CHARACTERS} characters or items")
        self.work -= size
        if self.work < 0:
            raise DanluError(f"chat template: makes more than {WORK} characters and items in all")


_budget = _Budget()


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Whatever is rendered inside, in this thread, shares one budget.

    Raises:
        DanluError: it took longer than ``seconds``, made too much, or recursed too deeply.
    """
    before = _budget.deadline, _budget.seconds, _budget.work
    _budget.deadline, _budget.seconds, _budget.work = time.monotonic() + seconds, seconds, WORK
    try:
        yield
    except RecursionError:
        raise DanluError("chat template: its macros or nested expressions recurse too deeply") from None
    except MemoryError:
        raise DanluError("chat template: needs more memory than there is") from None
    finally:
        _budget.deadline, _budget.seconds, _budget.work = before


class _Generator(CodeGenerator):
    """Compiles a template, and looks at the clock on the way."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        _budget.tick()
        return super().visit(node, *args, **kwargs)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment. Templates have to be compiled and rendered inside :func:`limited`.

    Args:
        filters: further ones, which get the limits of all.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(finalize=_printable, **options)
        del self.globals["lipsum"]
        allowed = {name: function for name, function in self.filters.items() if name not in NO_FILTERS} | {**filters}
        self.filters = {name: _limited_filter(name, function) for name, function in allowed.items()}
        self.tests = {name: _limited_test(function) for name, function in dict[str, Any](self.tests).items()}
        self.concat = _concat  # type: ignore[method-assign]
        self.filters |= {
            "__tick": _tick,
            "__join": _join_texts,
            "__made": _made,
            "__compared": _compared,
            "__searched": _searched,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE:
            raise DanluError(f"chat template: has more than {SOURCE} characters")
        tree = super()._parse(source, name, filename)
        return _Instrument().visit(tree)  # type: ignore[no-any-return]

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _budget.tick()
        _check_method(__obj, args, kwargs)
        return _made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if type(left) is str and type(right) is str:
                _budget.spend(len(left) + len(right))
                return left + right
            _budget.spend(_length(left) + _length(right))
        elif operator == "*":
            _check_times(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_number(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, (right,))
        return super().call_binop(context, operator, left, right)


class _Instrument(NodeTransformer):
    """Puts the limits into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_filter("__tick", nodes.Const(None)), node.test)
        node.body.insert(0, nodes.ExprStmt(_filter("__tick", nodes.Const(None))))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("__join", nodes.Tuple(node.nodes, "load"))

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("__made", node) if node.items else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("__made", node) if node.items else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("__made", node) if node.ctx == "load" and node.items else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        node.expr = _compared_node(node.expr)
        for operand in node.ops:
            operand.expr = _compared_node(operand.expr, is_searched=operand.op in ("in", "notin"))
        return node


def _filter(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _compared_node(node: nodes.Expr, is_searched: bool = False) -> nodes.Expr:
    if isinstance(node, nodes.Const):
        return node
    return _filter("__searched" if is_searched else "__compared", node)


@pass_context  # or the compiler would take its value for a constant
def _tick(_context: Context, _value: None) -> bool:
    """A turn of a loop; true, so that it can stand in the loop's condition."""
    _budget.tick()
    return True


# ---- sizes


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0


def _text_size(value: Any) -> int:
    """Upper bound, but for quoting, of the characters that a value is written with; stops counting at the limit."""
    if isinstance(value, str):
        return len(value)
    size, left = 0, [value]
    while left and size <= CHARACTERS:
        item = left.pop()
        if isinstance(item, (str, bytes)):
            size += len(item) + 2
        elif isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
            size += 4 * len(item)
        elif isinstance(item, (list, tuple, set, frozenset)):
            left += item
            size += 2 * len(item)
        elif isinstance(item, Namespace):
            left.append(item._Namespace__attrs)
        else:
            size += 8
    return size


def _is_nest(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, Namespace))


def _made(value: Any) -> Any:
    """A list, or text, that an expression made: counted, with the lists within it, which may be the same many times."""
    if isinstance(value, (str, bytes)):
        _budget.spend(len(value))
    elif _is_nest(value):
        items, left = 0, [value]
        while left:
            _budget.tick()
            item = left.pop()
            if isinstance(item, Namespace):
                item = item._Namespace__attrs
            if isinstance(item, (list, tuple, dict)):
                items += 1 + len(item)
                if items > ITEMS:
                    raise DanluError(f"chat template: makes a list of more than {ITEMS} items")
                left += [inner for inner in (item.values() if isinstance(item, dict) else item) if _is_nest(inner)]
        _budget.spend(items)
    return value


def _printable(value: Any) -> Any:
    """What an expression prints."""
    if not isinstance(value, str):
        _budget.spend(_text_size(value))
    return value


def _compared(value: Any) -> Any:
    """An operand of a comparison: of lists, all their texts may be looked at."""
    if type(value) is not str and isinstance(value, (list, tuple, dict)):
        _budget.spend(_text_size(value))
    return value


def _searched(value: Any) -> Any:
    """The right operand of ``in``: keys are found without looking at the values."""
    return value if isinstance(value, dict) else _compared(value)


def _concat(texts: Iterable[str]) -> str:
    texts = list(texts)
    _budget.spend(sum(map(len, texts)))
    return "".join(texts)


def _join_texts(values: Sequence[Any]) -> str:
    """The operator ``~``."""
    return _concat([value if isinstance(value, str) else str(_printable(value)) for value in values])


# ---- checks made before the work


def _check_number(n_bits: int) -> None:
    if n_bits > DIGITS * 10 // 3:
        raise DanluError(f"chat template: computes a number of more than {DIGITS} digits")


def _check_times(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_number(left.bit_length() + right.bit_length())
    for many, times in ((left, right), (right, left)):
        if isinstance(times, int):
            _budget.spend(_length(many) * max(times, 0))


def _check_format(pattern: str, values: Sequence[Any]) -> None:
    """``%`` and ``format``: widths, given in the pattern or as values, and texts that are put in many times."""
    widths = [int(digits[:9]) for digits in re.findall("[0-9]+", pattern)]
    widths += [abs(value) for value in _flat(values) if isinstance(value, int)]
    largest = max([*widths, _text_size(values)], default=0)
    _budget.spend(len(pattern) + (pattern.count("%") + pattern.count("{")) * largest)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else [value]


def _check_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """No built-in takes a number beyond the limits for a width or a count."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, int):
            _budget.spend(abs(value))


def _check_method(method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Methods of texts, lists and numbers."""
    inner = getattr(method, "__wrapped__", method)  # the sandbox wraps format
    owner, name = getattr(inner, "__self__", None), getattr(inner, "__name__", "")
    if not isinstance(owner, (str, bytes, int, float, list, tuple, dict)):
        return
    _check_arguments(args, kwargs)
    if not isinstance(owner, (str, bytes)):
        return
    if name in ("format", "format_map"):
        _check_format(str(owner), [*args, *kwargs.values()])
    elif name == "replace" and len(args) >= 2:
        _check_replace(owner, args[0], args[1])
    elif name == "join" and args:
        _check_join(args[0], owner)
    elif name in ("expandtabs", "translate"):
        raise DanluError(f"chat template: the method {name} is not allowed")


def _check_replace(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, (str, bytes)) and isinstance(old, type(text)) and isinstance(new, type(text)):
        _budget.spend(len(text) + text.count(old) * len(new))  # type: ignore[arg-type]


def _check_join(values: Any, separator: Any) -> None:
    if isinstance(values, (list, tuple, dict, str)):
        _budget.spend(_text_size(values) + len(values) * _text_size(separator))


def _check_indent(text: Any, width: Any) -> None:
    size = len(width) if isinstance(width, str) else abs(width) if isinstance(width, int) else 0
    _budget.spend(_length(text) + (str(text).count("\n") + 1) * size)


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _budget.tick()
        value, *options = args[skipped:]
        _check_arguments(options, kwargs)
        if name in DEEP_FILTERS and not isinstance(value, (str, Undefined)):
            if not isinstance(value, (list, tuple, dict, int, float, type(None), Namespace)):
                value = list(value)  # a generator, which can be walked through once
                args = (*args[:skipped], value, *options)
            _budget.spend(_text_size(value))
        if name == "replace" and len(options) >= 2:
            _check_replace(str(value), str(options[0]), str(options[1]))
        elif name == "join":
            _check_join(value, options[0] if options else kwargs.get("d", ""))
        elif name == "indent":
            _check_indent(value, options[0] if options else kwargs.get("width", 4))
        elif name == "format":
            _check_format(str(value), [*options, *kwargs.values()])
        elif name == "string":
            _printable(value)
        elif name == "round" and abs(options[0] if options else kwargs.get("precision", 0)) > DIGITS:
            raise DanluError(f"chat template: rounds to more than {DIGITS} digits")
        elif name == "tojson" and (kwargs.get("indent") or 0) not in range(17):
            raise DanluError("chat template: indents JSON by more than 16")
        elif name == "sum" and not isinstance(options[1] if len(options) > 1 else kwargs.get("start", 0), (int, float)):
            raise DanluError("chat template: sums up something other than numbers")
        return _made(function(*args, **kwargs))

    return checked


def _limited_test(function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        for value in args[skipped:]:
            _compared(value)
        return function(*args)

    return checked
