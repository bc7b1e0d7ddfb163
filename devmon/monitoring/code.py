"""What a function or a class of the user's computes, as a digest: its code, and what that refers to. Needs no torch."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

PLAIN = (bool, int, float, complex, str, bytes, tuple)  # values by which two functions of one source may differ
_KNOWN: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # identities are asked for at every observation


def callables(value: Any) -> Iterator[Any]:
    """The functions, classes and partial functions in the configuration of an instrument."""
    if isinstance(value, functools.partial):
        yield from callables([value.func, value.args, value.keywords])
    elif inspect.isfunction(value) or inspect.isclass(value):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from callables([getattr(value, entry.name) for entry in dataclasses.fields(value)])
    elif isinstance(value, Mapping):
        yield from callables([*value.keys(), *value.values()])
    elif isinstance(value, Sequence | Set) and not isinstance(value, str | bytes | range):
        for item in value:
            yield from callables(item)


def code_digest(thing: Any, describe: Callable[[Any], str]) -> str:
    """Sixteen hex digits over the source of a function or class (docstrings, comments and layout left out), its
    defaults and closure, and what of its own module it uses.

    The same code in another module has the same digest, as long as what it calls there is the same too.
    """
    if thing not in _KNOWN:
        _KNOWN[thing] = hashlib.sha256("\n".join(_texts(thing, describe, set())).encode()).hexdigest()[:16]
    return _KNOWN[thing]


def _texts(thing: Any, describe: Callable[[Any], str], seen: set[int]) -> Iterator[str]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield _source(thing)
    functions = [thing]
    if inspect.isclass(thing):
        functions = [inspect.unwrap(f) for f in vars(thing).values() if inspect.isfunction(f)]
    for function in functions:
        # Values that come with the function, and those that it looks up by name in its module.
        values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                values.append(cell.cell_contents)
        held = function.__globals__
        values += [held[name] for name in sorted(_names(function.__code__)) if name in held]
        for value in values:
            own = inspect.isfunction(value) or inspect.isclass(value)
            if own and value.__module__ == function.__module__:
                yield from _texts(value, describe, seen)
            elif inspect.ismodule(value):
                yield value.__name__
            elif own or value is None or isinstance(value, PLAIN):
                yield describe(value)
            else:  # what a script holds may be large
                yield type(value).__name__


def _source(thing: Any) -> str:
    """The code as Python writes it, whatever its comments; its bytecode where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except Exception:  # no file, a file that changed, code that was made by code
        code = getattr(thing, "__code__", None)
        return thing.__name__ if code is None else f"{code.co_code!r}{code.co_consts!r}{code.co_names!r}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            documented = ast.get_docstring(node, clean=False) is not None
            node.body = (node.body[1:] or [ast.Pass()]) if documented else node.body
    return ast.unparse(tree)


def _names(code: CodeType) -> set[str]:
    """The global names that a function uses, in functions within it too."""
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(_names, inner))
