"""Names of modules as PEFT reads them: the keys of ``rank_pattern`` and ``alpha_pattern``, and a string as
``target_modules``, are regular expressions.

An adapter may be a stranger's, and a regular expression can take time that doubles with each character of a name, so
matching here is bounded: in time by the package regex, which the standard library's matching cannot be, and in what it
may repeat. Apart from that the answers are PEFT's (``get_pattern_key`` and ``check_target_module_exists``).
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import regex

from ..core.errors import ConfigError

SECONDS = 2.0  # for all names under all keys of one pattern
LONGEST = 1000  # characters of a regular expression
_REPEATS = 10_000  # the package regex writes counted repetitions out when it compiles: (a{1000}){1000} is a million
_READABLE = re.compile(r"[\w.-]*")


def as_keys(names: Iterable[str]) -> dict[str, str]:
    """name -> its key in a pattern, in an order in which PEFT's first match is the module itself.

    A key matches whatever ends with it, so longer names come first; its dots match any character, so a name that would
    catch another one of its length, or that holds other characters with a meaning, is written escaped and from its
    beginning. All others stay readable.
    """
    ordered = sorted(names, key=len, reverse=True)
    as_long: dict[int, list[str]] = defaultdict(list)
    for name in ordered:
        as_long[len(name)].append(name)
    keys = {}
    for name in ordered:
        clear = bool(_READABLE.fullmatch(name))
        if clear:
            matches = re.compile(name).fullmatch
            clear = not any(other != name and matches(other) for other in as_long[len(name)])
        keys[name] = name if clear else f"^{re.escape(name)}"
    return keys


class Patterns:
    """A ``rank_pattern`` or ``alpha_pattern``, asked for one module after the other.

    Raises:
        ConfigError: a key that is no regular expression, or whose matching takes too long.
    """

    def __init__(self, pattern: Mapping[str, Any] | None, field: str = "rank_pattern") -> None:
        self._values = dict(pattern or {})
        self._readable: dict[int, list[tuple[int, str]]] = defaultdict(list)  # by length, with their places
        self._others: list[tuple[int, str, _Bounded]] = []
        clock = _Clock()
        for place, key in enumerate(self._values):
            if _READABLE.fullmatch(key):
                self._readable[len(key)].append((place, key))
            else:
                self._others.append((place, key, _Bounded(rf"(.*\.)?({key})$", key, field, clock)))

    def get(self, name: str, otherwise: Any) -> Any:
        """The value of the first key that matches the module."""
        found: tuple[int, str] | None = None
        starts = [0, *(index + 1 for index, letter in enumerate(name) if letter == ".")]
        for start in starts:
            end = name[start:]
            for place, key in self._readable.get(len(end), ()):
                if (found is None or place < found[0]) and (key == end or _is_like(key, end)):
                    found = place, key
        for place, key, bounded in self._others:
            if found is not None and place > found[0]:
                break
            if bounded.match(name):
                found = place, key
                break
        return otherwise if found is None else self._values[found[1]]


def _is_like(key: str, end: str) -> bool:
    """Whether a readable key matches a text of its length: its dots match any character."""
    return all(letter in (".", other) for letter, other in zip(key, end, strict=True))


class Chosen:
    """Which modules a configuration adapts, by ``target_modules`` and all that narrows them.

    Args:
        config: of LoRA; ``target_modules`` is not ``all-linear``, which takes the model to answer.

    Raises:
        ConfigError: a regular expression that is none, or whose matching takes too long.
    """

    def __init__(self, config: Any) -> None:
        clock = _Clock()
        self._targets = self._names_or_pattern(config.target_modules, "target_modules", clock)
        self._excluded = self._names_or_pattern(config.exclude_modules, "exclude_modules", clock)
        self._whole = [
            _Bounded(rf"(^|.*\.){name}($|\..*)", name, "modules_to_save", clock)
            for name in config.modules_to_save or ()
        ]
        layers = config.layers_to_transform
        self._layers = [layers] if isinstance(layers, int) else list(layers or ())
        patterns = config.layers_pattern
        self._stacks = [
            _Bounded(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", name, "layers_pattern", clock)
            for name in ([patterns] if isinstance(patterns, str) else patterns) or ()
        ] or [_Bounded(r".*?\.[^.]*\.(?P<idx>\d+)\.", "", "layers_pattern", clock)]

    @staticmethod
    def _names_or_pattern(value: Any, field: str, clock: _Clock) -> Any:
        return _Bounded(value, value, field, clock) if isinstance(value, str) else frozenset(value or ())

    def __contains__(self, name: str) -> bool:
        if _is_named(self._excluded, name) or any(pattern.match(name) for pattern in self._whole):
            return False
        if not _is_named(self._targets, name):
            return False
        if isinstance(self._targets, _Bounded) or name in self._targets or not self._layers:
            return True
        found = next((match for stack in self._stacks if (match := stack.match(name))), None)
        return found is not None and int(found["idx"]) in self._layers


def _is_named(names: Any, name: str) -> bool:
    if isinstance(names, _Bounded):
        return bool(names.fullmatch(name))
    return any(name[start:] in names for start in [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")])


class _Clock:
    """The time that several regular expressions share."""

    def __init__(self) -> None:
        self.left = SECONDS


class _Bounded:
    """A regular expression that cannot take longer than its clock has left."""

    def __init__(self, pattern: str, shown: str, field: str, clock: _Clock) -> None:
        self._said = f"{field} has {_short(shown)!r}, which"
        self._clock = clock
        counts = [
            int(number) for braces in re.findall(r"\{([\d,\s]*)\}", shown) for number in re.findall(r"\d+", braces)
        ]
        if len(shown) > LONGEST or math.prod(max(count, 1) for count in counts) > _REPEATS:
            raise ConfigError(f"{self._said} is too long to be a regular expression for names of modules.")
        try:
            re.compile(pattern)  # what PEFT will do
            self._compiled = regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
            raise ConfigError(f"{self._said} is no regular expression: {error}.") from error

    def match(self, name: str) -> Any:
        return self._timed(self._compiled.match, name)

    def fullmatch(self, name: str) -> Any:
        return self._timed(self._compiled.fullmatch, name)

    def _timed(self, match: Any, name: str) -> Any:
        start = time.monotonic()
        try:
            return match(name, timeout=max(self._clock.left, 1e-6))
        except TimeoutError as error:
            raise ConfigError(
                f"{self._said} takes too long to match against {_short(name)}: write the names of modules instead."
            ) from error
        finally:
            self._clock.left -= time.monotonic() - start


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_exactly(names: Collection[str]) -> str:
    """A regular expression for ``target_modules`` that matches these modules and no others."""
    return "|".join(map(re.escape, sorted(names)))
