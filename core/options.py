"""Options are frozen dataclasses; this reads them from plain trees and collects every mistake instead of stopping at one.

A variation is a class in a plain dictionary with an `Options` dataclass of its own. A field of kind `norm` holds a `Variant`: the
name in that dictionary and its options, read. The dataclasses are the only list of options: files, the command line, `--list` and
the identity of a run are views of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

Path = tuple[str, ...]
Catalogue = Mapping[str, Mapping[str, type]]


@dataclass(frozen=True)
class NoOptions:
    """The options of a variation that has none."""


MISSING: Any = object()  # where nothing is, as null is a value
EMPTY: Mapping[str, Any] = {}  # one object, so that what is read from it is read once


def is_off(value: Any) -> bool:
    """Whether a value is one of the ways to write off: null, the word, or the boolean that YAML makes of it."""
    return value is None or value is False or (isinstance(value, str) and value == "off")


@dataclass(frozen=True)
class Variant:
    """A chosen variation: `name` is a key of its kind's dictionary, `options` an instance of that class's `Options`."""

    name: str
    options: Any = NoOptions()


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a configuration. `path` is where it stands in the tree; the sentence is text, place, advice."""

    path: Path
    text: str
    advice: str = ""
    at: Path | None = None  # where the value was written, if that is not at the path (an axis of a sweep)

    def sentence(self, place: str | None) -> str:
        where = f" ({place})" if place else ""
        head = ".".join(self.path)
        return f"{head + ': ' if head else ''}{self.text}{where}.{' ' + self.advice if self.advice else ''}"


class Invalid(ValueError):
    """Raised by `__post_init__` of options: pairs of a field (or '' for the whole) and a sentence about it."""

    def __init__(self, *wrong: tuple[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {text}" if name else text for name, text in wrong))
        self.wrong = wrong


def opt(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    identity: bool = True,
    knob: bool = False,
    key: str | None = None,
) -> Any:
    """A field of an options dataclass: its default, a sentence, its bounds.

    `key` is what files call it where Python cannot (`except`). `identity=False`: the field cannot change a result and is
    no part of a run's identity. `knob=True`: a number in which runs of one pack may differ; no shape or graph depends on it.
    """
    bounds = {">=": ge, ">": gt, "<=": le, "<": lt}
    meta = {
        "doc": doc,
        "bounds": {k: v for k, v in bounds.items() if v is not None},
        "identity": identity,
        "knob": knob,
        "key": key,
    }
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def variant(kind: str, default: str, doc: str, **flags: Any) -> Any:
    """A field that holds a `Variant` of `kind`. Its default is only a name until a `Reader` has read it."""
    return field(default=Variant(default, None), metadata={"doc": doc, "kind": kind, "identity": True, **flags})


def said(doc: str, *, kind: str | None = None, usual: str | None = None, **bounds: Any) -> Any:
    """A field of a table's entry that may be left unsaid: None is then its value. Null in a file is not that: it means off.
    usual: the variation that a mapping without a name is about."""
    meta = {**opt(None, doc, **bounds).metadata, "absent": Variant(usual, None) if usual else None}
    return field(default=None, metadata={**meta, "kind": kind} if kind else meta)


def node(cls: type, doc: str, *, identity: bool = True) -> Any:
    """A field that holds a nested options dataclass."""
    return field(default_factory=cls, metadata={"doc": doc, "identity": identity})


def options_of(cls: type) -> type:
    """The `Options` dataclass of a variation's class."""
    return getattr(cls, "Options", NoOptions)


def nearest(given: str, known: Iterable[str]) -> str:
    """Advice for a name that does not exist: the nearest one, and all of them (the nearest twelve of a long list)."""
    names = sorted(str(k) for k in known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    shown = names if len(names) <= 40 else difflib.get_close_matches(given, names, n=12, cutoff=0.0)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(shown)}." if names else f"{hint}There are none."


@cache
def hints(cls: Any) -> dict[str, Any]:
    """Resolved type annotations of a dataclass."""
    return typing.get_type_hints(cls)


@cache
def fields_of(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass by the name that files give them."""
    return {f.metadata.get("key") or f.name: f for f in fields(cls)}


def describe(tp: Any) -> str:
    """A type in words, for messages and option tables."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null (off)"}
    if tp in names or tp is Any:
        return names.get(tp, "anything")
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is typing.Literal:
        return " or ".join(f"'{a}'" for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin in (tuple, list):
        return "a list"
    if isinstance(tp, type) and is_dataclass(tp) and len(fields_of(tp)) == 1:
        return f"a mapping with {next(iter(fields_of(tp)))}"
    return "a mapping"


class Reader:
    """Reads trees into options. Mistakes gather in `mistakes`; a section that was read once without any is not read again.

    `catalogue` maps a kind to its dictionary of variations.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.mistakes: list[Mistake] = []
        self._seen: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def wrong(self, path: Path, text: str, advice: str = "") -> None:
        self.mistakes.append(Mistake(path, text, advice))

    def known(self, cls: type, tree: Any) -> Any:
        """What a section was read as, or None where it held mistakes or was not read."""
        return self._seen.get((id(tree), cls), (None, None))[1]

    def read(self, cls: type, tree: Any, path: Path = ()) -> Any:
        """An instance of the dataclass `cls`, or None where `tree` holds mistakes (they are then in `mistakes`)."""
        known = self._seen.get((id(tree), cls))
        if known is not None:
            return known[1]
        before = len(self.mistakes)
        if not isinstance(tree, Mapping):
            self.wrong(path, f"{tree!r} is not a mapping")
            return None
        names = fields_of(cls)
        for key in tree:
            if key not in names:
                dotted = f"Keys are nested, as in {key.replace('.', ': {', 1)}: ...}}. " if "." in key else ""
                self.wrong((*path, key), "unknown key", dotted + nearest(key, names))
        values = {}
        for name, spec in names.items():
            if name not in tree and "absent" in spec.metadata:
                continue
            if name in tree or "kind" in spec.metadata:
                values[spec.name] = self._field(cls, spec, tree.get(name, spec.default), (*path, name))
            elif is_dataclass(hints(cls)[spec.name]):
                values[spec.name] = self.read(typing.cast(type, hints(cls)[spec.name]), EMPTY, (*path, name))
        if len(self.mistakes) > before:
            return None
        return self._construct(cls, values, path, tree)

    def _construct(self, cls: type, values: dict[str, Any], path: Path, tree: Any) -> Any:
        try:
            made = cls(**values)
        except Invalid as error:
            for name, text in error.wrong:
                self.wrong((*path, name) if name else path, text)
            return None
        except ValueError as error:
            self.wrong(path, str(error).rstrip("."))
            return None
        self._seen[(id(tree), cls)] = (tree, made)  # the tree is kept, so its id stays its own
        return made

    def _field(self, cls: type, spec: dataclasses.Field[Any], value: Any, path: Path) -> Any:
        kind = spec.metadata.get("kind")
        if kind is not None:
            return self.variant(kind, value, path, spec.metadata.get("absent", spec.default))
        tp = hints(cls)[spec.name]
        if "absent" in spec.metadata:
            arms = tuple(arm for arm in typing.get_args(tp) if arm is not type(None))
            tp = typing.Union[arms]  # noqa: UP007
            value = False if is_off(value) and value is not None and bool in arms else value
            if value is None or (is_off(value) and bool not in arms):
                self.wrong(path, "null (off) is not possible here", "Leave it out to say nothing.")
                return None
        value = self.value(tp, value, path)
        for sign, bound in spec.metadata.get("bounds", {}).items():
            for number in value if isinstance(value, tuple) else (value,):
                counts = isinstance(number, (int, float)) and not isinstance(number, bool)
                if counts and not _holds(number, sign, bound):
                    self.wrong(path, f"{number!r} is not {sign} {bound}")
        return value

    def variant(self, kind: str, value: Any, path: Path, default: Any = None) -> Variant | None:
        """Reads a name or a mapping into a Variant of `kind`; a mapping without `variant:` is about the default one."""
        known, ident = self.catalogue[kind], (id(value), kind, id(default))
        if ident in self._seen:
            return typing.cast(Variant, self._seen[ident][1])
        node = value if isinstance(value, Mapping) else {"variant": value.name if isinstance(value, Variant) else value}
        if "variant" not in node and isinstance(default, Variant):
            node = {"variant": default.name, **node}
        name = node.get("variant", MISSING)
        name = "none" if is_off(name) and "none" in known else name
        if not isinstance(name, str) or name not in known:
            told = f"no variant '{name}'" if isinstance(name, str) else f"{name!r} is not possible here"
            told = "null (off) is not possible here" if name is None else told
            told = "a mapping here needs 'variant:'" if name is MISSING else told
            self.wrong(path, told, nearest(name if isinstance(name, str) else "", known))
            return None
        rest = {k: v for k, v in node.items() if k != "variant"}
        options = self.read(options_of(known[name]), rest or EMPTY, path)
        if options is None:
            return None
        made = Variant(name, options)
        self._seen[ident] = ((value, default), made)  # both are kept, so their ids stay their own
        return made

    def value(self, tp: Any, value: Any, path: Path) -> Any:
        """`value` as type `tp`; a mistake is noted where it is none."""
        origin, args = typing.get_origin(tp), typing.get_args(tp)
        if tp is Any:
            return value
        if origin in (typing.Union, types.UnionType):
            return self._union(tp, args, value, path)
        if origin is typing.Literal:
            word = {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value
            if word in args:
                return word
            self.wrong(path, f"{value!r} is not allowed", nearest(str(value), args))
            return None
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(self.value(args[0], v, (*path, str(i))) for i, v in enumerate(value))
        if origin is dict and isinstance(value, Mapping):
            known = self._seen.get((id(value), "dict"))
            if known is None:
                before = len(self.mistakes)
                known = (value, {str(k): self.value(args[1], v, (*path, str(k))) for k, v in value.items()})
                if len(self.mistakes) == before:
                    self._seen[(id(value), "dict")] = known
            return known[1]
        if isinstance(tp, type) and is_dataclass(tp) and value is not None:
            return self.read(tp, value, path)
        if isinstance(tp, type) and _is(value, tp):
            return float(value) if tp is float else value
        self._refuse(tp, value, path)
        return None

    def _union(self, tp: Any, args: tuple[Any, ...], value: Any, path: Path) -> Any:
        nullable = type(None) in args
        if value is None and nullable:
            return None
        for arm in args:
            if (
                isinstance(arm, type)
                and not is_dataclass(arm)
                and typing.get_origin(arm) is None
                and _is(value, arm, exact=True)
            ):
                return value
        for arm in args:
            trial = Reader(self.catalogue)
            got = trial.value(arm, value, path)
            if not trial.mistakes:
                return got
            if isinstance(arm, type) and is_dataclass(arm) and isinstance(value, Mapping):
                self.mistakes += trial.mistakes
                return None
        if nullable and is_off(value):
            return None  # null by its other names
        self._refuse(tp, value, path)
        return None

    def _refuse(self, tp: Any, value: Any, path: Path) -> None:
        if value is None:
            self.wrong(path, "null (off) is not possible here", f"It takes {describe(tp)}.")
        elif isinstance(value, (int, float)) and not abs(value) < LARGEST:
            self.wrong(path, f"{value!r:.40} is not a finite number")
        else:
            whole = isinstance(value, float) and value.is_integer() and "integer" in describe(tp)
            quotes = "Put it in quotes." if tp is str and isinstance(value, (int, float)) else ""
            self.wrong(path, f"{value!r} is not {describe(tp)}", f"Write {value:.0f}." if whole else quotes)


def _holds(number: float, sign: str, bound: float) -> bool:
    return {">=": number >= bound, ">": number > bound, "<=": number <= bound, "<": number < bound}[sign]


LARGEST = 1e300  # what no option needs, and what integers can exceed


def _is(value: Any, tp: type, exact: bool = False) -> bool:
    """Whether a YAML scalar is of a type: true is no number, an integer is a float (unless `exact`), nan and inf are nothing."""
    if isinstance(value, bool):
        return tp is bool
    if isinstance(value, (int, float)) and not abs(value) < LARGEST:
        return False
    if tp is float and not exact:
        return isinstance(value, (int, float))
    return tp in (int, float, str) and isinstance(value, tp)


def plain(value: Any) -> Any:
    """Options as nested dicts, lists and scalars: what a file would say."""
    if isinstance(value, Variant):
        return {"variant": value.name, **plain(value.options)}
    if is_dataclass(value) and not isinstance(value, type):
        known = ((name, spec, getattr(value, spec.name)) for name, spec in fields_of(type(value)).items())
        return {name: plain(got) for name, spec, got in known if got is not None or "absent" not in spec.metadata}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value


def differences(value: Any) -> dict[str, Any]:
    """What of an options instance differs from its defaults and is part of the identity. A value equal to a default of another
    type (1 and true) differs."""
    changed: dict[str, Any] = {}
    cls: Any = type(value)
    for name, spec in fields_of(cls).items():
        if not spec.metadata.get("identity", True):
            continue
        got = getattr(value, spec.name)
        if isinstance(got, Variant):
            inner = differences(got.options)
            if inner or not isinstance(spec.default, Variant) or got.name != spec.default.name:
                changed[name] = {"variant": got.name, **inner}
        elif is_dataclass(got):
            if inner := differences(got):
                changed[name] = inner
        elif isinstance(got, Mapping) and got and all(is_dataclass(v) for v in got.values()):
            changed[name] = [[k, differences(v)] for k, v in got.items()]  # a list: in a named table the order counts
        else:
            default: Any = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
            if got != default or type(got) is not type(default):
                changed[name] = plain(got)
    return changed


def key_of(value: Any) -> Any:
    """A hashable key of options: equal for equal options, order of tables included."""
    if isinstance(value, Variant):
        return (value.name, key_of(value.options))
    if is_dataclass(value) and not isinstance(value, type):
        return tuple(key_of(getattr(value, spec.name)) for spec in fields_of(type(value)).values())
    if isinstance(value, Mapping):
        return tuple((k, key_of(v)) for k, v in value.items())
    return tuple(key_of(v) for v in value) if isinstance(value, (tuple, list)) else value


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every option of a dataclass and those nested in it: dotted name, field, type."""
    for name, spec in fields_of(cls).items():
        tp = hints(cls)[spec.name]
        if isinstance(tp, type) and is_dataclass(tp) and tp is not Variant:
            yield from walk(tp, f"{prefix}{name}.")
        else:
            yield prefix + name, spec, tp
