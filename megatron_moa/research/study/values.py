"""Checks what a study's files say, TOML and JSON, against the types of dataclasses."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from megatron_moa.errors import UserError, printable


class Bound(NamedTuple):
    """What a number must be beside its type, and what to do where it is not."""

    fits: Callable[[float], bool]
    remedy: str


Count = Annotated[int, Bound(lambda number: number >= 1, "give 1 or more")]
Natural = Annotated[int, Bound(lambda number: number >= 0, "give 0 or more")]
Positive = Annotated[float, Bound(lambda number: number > 0, "give a positive number")]
NotNegative = Annotated[float, Bound(lambda number: number >= 0, "give 0 or more")]


def filled(kind: type, where: str, table: Mapping[str, Any]) -> Any:
    """A dataclass from a table, each value as :func:`fitting` returns it.

    A field's ``metadata["key"]`` is its key in the table where that is not the field's name.

    Raises:
        UserError: a key that is unknown or missing, or a value that does not fit.
    """
    hints = get_type_hints(kind, include_extras=True)
    keys = {field.metadata.get("key", field.name): field for field in fields(kind)}
    for key in table:
        if key not in keys:
            raise UserError(f"{where}: {printable(key)}: unknown key; there are {', '.join(sorted(keys))}")
    for key, field in keys.items():
        if key not in table and field.default is MISSING:
            raise UserError(f"{where}: {key}: is missing")
    return kind(
        **{
            keys[key].name: fitting(f"{where}: {key}", value, hints[keys[key].name], f"[[{key}]]")
            for key, value in table.items()
        }
    )


def fitting(where: str, value: Any, hint: Any, head: str = "[[…]]") -> Any:
    """A value as the type that it should be: ``2.0`` and ``1e5`` are whole numbers.

    Args:
        where: file and key, for messages.
        hint: a dataclass (of a table), a number, str, bool or Any; ``Annotated`` with a :class:`Bound`; ``… | None``;
            ``dict[str, …]``, ``list[…]``, or a tuple; for one of texts a text is split at blanks.
        head: of each table where several are wanted.

    Raises:
        UserError: it is of another type, not finite or out of bounds.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or (is_dataclass(hint) and isinstance(value, hint)):
        return value
    if origin is UnionType:
        return None if value is None else fitting(where, value, inner[0])
    if origin is Annotated:
        return _bounded(where, fitting(where, value, inner[0]), inner[1])
    if is_dataclass(hint) or origin is dict:
        return _table(where, value, hint)
    if origin in (list, tuple):
        return _list(where, value, hint, head)
    if hint in (int, float):
        return _number(where, value, hint)
    if not isinstance(value, hint):
        raise _wrong(where, value, "a text" if hint is str else "true or false")
    return value


def _wrong(where: str, value: Any, wanted: str) -> UserError:
    return UserError(f"{where} {reprlib.repr(value)}: must be {wanted}")


def _bounded(where: str, number: float, bound: Bound) -> float:
    if not bound.fits(number):
        raise UserError(f"{where} {number:g}: {bound.remedy}")
    return number


def _table(where: str, value: Any, hint: Any) -> Any:
    """Checks a table as a dataclass, or as a dictionary whose values are all of one type."""
    if not isinstance(value, dict):
        raise _wrong(where, value, "a table of keys and values")
    if is_dataclass(hint):
        return filled(hint, where, value)
    kind = get_args(hint)[1]
    return {key: fitting(f"{where}.{printable(key)}", entry, kind) for key, entry in value.items()}


def _list(where: str, value: Any, hint: Any, head: str) -> Any:
    """Checks a list or tuple, each entry by its type."""
    origin, inner = get_origin(hint), get_args(hint)
    tables = is_dataclass(inner[0]) or get_origin(inner[0]) is dict
    if isinstance(value, dict) and tables:
        raise UserError(f"{where}: must be a list of tables, each with the head {head}")
    values = value.split() if isinstance(value, str) and hint == tuple[str, ...] else value
    if not isinstance(values, list | tuple):
        is_number = inner[0] is not str and re.fullmatch(r"[-+\d][-+.\de]*", str(value))
        raise _wrong(where, value, "a list" + (f", such as [{value}]" if is_number else ""))
    one_kind = origin is list or inner[-1] is ...
    if not one_kind and len(inner) != len(values):
        raise _wrong(where, value, f"a list of {len(inner)}")
    kinds = [inner[0]] * len(values) if one_kind else inner
    places = [f"{where} {number}" if tables else where for number in range(1, len(values) + 1)]
    return origin(map(fitting, places, values, kinds))


def _number(where: str, value: Any, kind: type) -> float:
    """Checks a finite number, a whole one where the type is int."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(where, value, "a number")
    finite = abs(value) <= sys.float_info.max  # NaN is not
    if kind is int and not (finite and value == int(value)):
        raise _wrong(where, value, "a whole number")
    if not finite:
        raise _wrong(where, value, "a finite number")
    return kind(value)
