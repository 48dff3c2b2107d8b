"""The text of an imported file: an account of the import as comments, what holds in every run, and the sweep."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from core.options import MISSING
from lab.importing.grid import Plan
from lab.importing.translate import Dropped, Translation, tree_of
from lab.reading import default_value
from variations import CATALOGUE

WIDTH = 116


class _Dumper(yaml.SafeDumper):
    """Writes every value out, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def flow(value: Any) -> str:
    """A value on one line."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...").removesuffix("...\n")


def _shortly(values: tuple[Any, ...]) -> str:
    shown = [flow(value) for value in values[:12]]
    text = ", ".join(shown) + (f" and {len(values) - 12} more" if len(values) > 12 else "")
    return text if len(text) <= 200 else f"{text[:197]}..."


def account(source: str, found: Translation, runs: int) -> Iterator[tuple[str, list[str]]]:
    """What there is to say of an import: headings, each with its lines."""
    merged = len(found.kept) - runs
    words = [f"{found.total:,} combinations there, {runs:,} runs here"]
    words += [f"{len(found.left_out):,} left out"] if found.left_out else []
    words += [f"{merged:,} equal to others without what was dropped"] if merged else []
    yield f"Imported from {source}: {', '.join(words)}.", []
    if found.dropped:
        yield "Could not be mapped:", [_dropped(some, found.total) for some in found.dropped]
    if found.left_out:
        reasons: dict[str, int] = {}
        for why in found.left_out.values():
            reasons[why] = reasons.get(why, 0) + 1
        yield (
            "Combinations that could not be mapped:",
            [f"{n:,} of {found.total:,}: {why}" for why, n in reasons.items()],
        )
    if found.remarks:
        yield "Remarks:", found.remarks
    if found.always:
        yield "Given at values that hold here anyway:", [", ".join(found.always)]
    if found.bookkeeping:
        yield "Without influence on what is learned, left out:", [", ".join(found.bookkeeping)]


def _dropped(some: Dropped, total: int) -> str:
    text = f"{_key(some.key)} ({some.place}): {_shortly(some.values)}. {some.why[:1].upper()}{some.why[1:]}."
    if some.different < total:
        text += f" Without it {total:,} combinations become {some.different:,}."
    return text


def _key(key: str) -> str:
    return key if key.isidentifier() else flow(key)


def file_text(name: str, source: str, found: Translation, planned: Plan, runs: int) -> str:
    """The whole file."""
    lines: list[str] = []
    for heading, items in account(source, found, runs):
        lines += [f"# {line}" for line in _wrapped(heading, WIDTH)]
        for item in items:
            wrapped = _wrapped(item, WIDTH - 6)
            lines += [f"#   {'- ' if i == 0 else '  '}{line}" for i, line in enumerate(wrapped)]
    lines += [f"name: {flow(name)}", *_base(planned.base, found)]
    section = planned.section()
    if section:
        dumped = yaml.dump(
            {"sweep": section},
            Dumper=_Dumper,
            default_flow_style=None,
            sort_keys=False,
            width=WIDTH,
            allow_unicode=True,
        )
        lines += dumped.rstrip("\n").split("\n")
    return "\n".join(lines) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    """Text in lines, without characters that would end a comment or may not stand in a file."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(plain, width, break_long_words=False, break_on_hyphens=False)


def _base(base: Mapping[str, Any], found: Translation) -> Iterator[str]:
    """What holds in every run, without what is this project's own default and was not said."""
    tree = tree_of(dict(base))
    kept = {key: value for key, value in base.items() if _said(key, found) or not _usual(key, value, tree)}
    kept |= {key: base[key] for key in base if key.endswith(".variant") and _inside(kept, key.removesuffix(".variant"))}
    for section, body in tree_of({key: base[key] for key in base if key in kept}).items():
        if not isinstance(body, Mapping) or list(body) == ["variant"]:
            value = body["variant"] if isinstance(body, Mapping) else body
            yield f"{section}: {flow(value)}{_whose(section, found)}"
            continue
        yield f"{section}:"
        for key, value in body.items():
            if isinstance(value, Mapping) and list(value) == ["variant"]:
                value = value["variant"]
            yield f"  {key}: {flow(value)}{_whose(f'{section}.{key}', found)}"


def _said(key: str, found: Translation) -> bool:
    """Whether the file names the option that a setting is made of; of several, the one of its name."""
    sources = found.sources.get(key, ())
    return key.rpartition(".")[2] in found.given or (len(sources) == 1 and sources[0] in found.given)


def _usual(key: str, value: Any, tree: Mapping[str, Any]) -> bool:
    """Whether a value is this project's own default; that of an option of a variation is the default of its variant."""
    path = tuple(key.split("."))
    is_node = default_value(CATALOGUE, {}, (*path, "variant")) is not MISSING or path[-1] == "variant"
    usual = default_value(CATALOGUE, {} if is_node else tree, path)
    return json.dumps(usual, default=str) == json.dumps(value)


def _inside(kept: Mapping[str, Any], node: str) -> bool:
    return any(key.startswith(f"{node}.") for key in kept)


def _whose(node: str, found: Translation) -> str:
    """A comment where the file says nothing of what was written."""
    return "" if set(found.made_of(node)) & found.given else "  # ReaLLM-Forge's default"
