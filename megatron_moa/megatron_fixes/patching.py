"""Changes Megatron and torch in place through one door, so that every change has a reason and an end.

    STOCK_COUNT = patch(
        "megatron.training.training.num_floating_point_operations",
        _with_mixture,
        why="it counts the stock model alone",
        version="0.19.2",
        remove_when="Megatron lets a model add to the count",
    )
    STOCK_COUNT.install(args, mixture)

:func:`patch` registers a change when a module is imported, and changes nothing.  :meth:`Patch.install` makes it.
``python -m megatron_moa.doctor --patches`` lists what is registered.

This module needs the standard library alone, of Python 3.8 and later: one change is made when megatron_moa is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

ANY_MACHINE = "any machine"
NO_GPU = "without a GPU"
NO_TE = "without Transformer Engine"
NO_TE_NO_APEX = "without Transformer Engine and Apex"
RECORDING = "recordings of a training"

_PATCHES: dict[tuple[str, str], Patch] = {}


class Patch:
    """One change of something of Megatron's or torch's; made by :func:`patch`, whose arguments it keeps."""

    def __init__(
        self,
        path: str,
        wrapper: Callable[..., Any],
        why: str,
        version: str,
        remove_when: str,
        where: str,
        also_sets: Callable[[], Iterable[tuple[Any, str, Any]]],
    ) -> None:
        self.path = path
        self.wrapper = wrapper
        self.why = why
        self.version = version
        self.remove_when = remove_when
        self.where = where
        self.was_installed = False  # ever, in this process
        self._also_sets = also_sets
        self._original: Any = None
        self._replacement: Any = None
        self._context: tuple[Any, ...] = ()

    def install(self, *context: Any) -> None:
        """Makes the change; again with the same context changes nothing, with another one replaces the change.

        Args:
            context: what the wrapper needs to know besides the original.

        Raises:
            RuntimeError: the change is there with another context, under a change of somebody else.
        """
        owner, name = self.place()
        current = getattr(owner, name, None)
        if self.was_installed and any(layer is self._replacement for layer in _layers(current)):
            if len(context) == len(self._context) and all(map(_is, context, self._context)):
                return
            if current is not self._replacement:
                raise RuntimeError(f"{self.path} has been changed again since: its change cannot be replaced")
            current = self._original
        self._original, self._context = current, context
        self._replacement = self.wrapper(current, *context)
        setattr(owner, name, self._replacement)
        for other_owner, other_name, value in self._also_sets():
            setattr(other_owner, other_name, value)
        self.was_installed = True

    def remove(self) -> None:
        """Puts back the original at ``path``; what ``also_sets`` set stays."""
        owner, name = self.place()
        setattr(owner, name, self._original)

    @contextmanager
    def installed(self, *context: Any) -> Iterator[None]:
        """Makes the change for the time inside."""
        self.install(*context)
        try:
            yield
        finally:
            self.remove()

    def described(self) -> dict[str, str]:
        """Returns the change as it is listed: target, where, version, why, and when to remove it."""
        return {
            "target": self.path,
            "where": self.where,
            "version": self.version,
            "why": self.why,
            "remove_when": self.remove_when,
        }

    def place(self) -> tuple[Any, str]:
        """Returns the module, class or function that has the attribute, and the attribute's name."""
        first, *parts, name = self.path.split(".")
        owner = importlib.import_module(first)
        imported = first
        for part in parts:
            imported += f".{part}"
            try:
                owner = getattr(owner, part)
            except AttributeError:
                owner = importlib.import_module(imported)
        return owner, name


def patch(
    path: str,
    wrapper: Callable[..., Any],
    *,
    why: str,
    version: str,
    remove_when: str,
    where: str = ANY_MACHINE,
    also_sets: Callable[[], Iterable[tuple[Any, str, Any]]] = tuple,
) -> Patch:
    """Registers a change, without making it.

    Args:
        path: dotted, to the attribute that is replaced.
        wrapper: is given the original and the context of :meth:`Patch.install`, and returns what replaces the original.
            A function that it returns has ``__wrapped__`` (functools.wraps), by which the change is found again.
        why: what is wrong with the original, in a few words.
        version: the Megatron that the change was made for, and tried with.
        remove_when: what must hold for the change to go.
        where: a condition in words: on which machines, or in which runs, the change is made.
        also_sets: called once the change is made; gives what else to set: an owner, an attribute, its new value.
    """
    made = Patch(path, wrapper, why, version, remove_when, where, also_sets)
    _PATCHES[path, why] = made
    return made


def constant(value: Any) -> Callable[[Any], Any]:
    """Returns a wrapper that puts ``value`` in the original's place."""
    return lambda original: value


def patches() -> tuple[Patch, ...]:
    """Returns every change that the modules imported so far have registered."""
    return tuple(_PATCHES.values())


def _layers(value: Any) -> Iterator[Any]:
    """The value, what it wraps, what that wraps, and so on."""
    while value is not None:
        yield value
        value = getattr(value, "__wrapped__", None)


def _is(one: Any, other: Any) -> bool:
    return one is other
