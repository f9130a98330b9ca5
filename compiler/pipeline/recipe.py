"""What the user asked for: ``--passes`` strings and YAML recipes, validated with the field named.

    smooth:alpha=0.6,w4:group=64,solver=rtn,prune24

An item with ``=`` and no ``:`` continues the pass before it. Order inside one string is free;
several strings (stages of a recipe) are barriers whose order is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..ir.errors import UsageError, nearest
from . import order
from .base import Pass
from .registry import all_passes, find
from .structure import Structural

# Recipes that come with llmc; --recipe takes their names.
SHIPPED = Path(__file__).parents[2] / "spec" / "recipes"


@dataclass(frozen=True)
class Override:
    """Per-site changes: which sites, which passes are skipped or replaced, which knobs differ.

    Sites are chosen by what the graph proves about them, never by module names: their role in the
    data flow, their block's index (negative counts from the end), or their canonical id.
    """

    roles: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    knobs: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    # (pass of the recipe, the pass of the same stage that stands in for it, its knobs)
    use: tuple[tuple[str, str, tuple[tuple[str, Any], ...]], ...] = ()

    def covers(self, site: str, role: str, block: int, blocks: int) -> bool:
        """Whether the override speaks about that site."""
        wanted = {b + blocks if b < 0 else b for b in self.blocks}
        return (
            (not self.roles or role in self.roles)
            and (not self.blocks or block in wanted)
            and (not self.sites or site in self.sites)
        )

    def to_mapping(self) -> dict[str, Any]:
        """As a recipe file says it."""
        where = {"role": self.roles, "block": self.blocks, "site": self.sites}
        out: dict[str, Any] = {"where": {k: list(v) for k, v in where.items() if v}}
        out |= {"skip": list(self.skip)} if self.skip else {}
        out |= {"set": {n: dict(given) for n, given in self.knobs}} if self.knobs else {}
        return out | ({"use": _used(self)} if self.use else {})


@dataclass(frozen=True)
class Call:
    """One pass as asked for: its name and the built pass."""

    name: str
    made: Pass

    @property
    def named(self) -> order.Named:
        return order.Named(self.name, self.made.stage)

    def adjusted(self, given: Mapping[str, Any]) -> Call:
        """The same pass with other knobs."""
        known = {k: v for k, v in self.made.values().items() if self.made.explicit(k)}
        return Call(self.name, type(self.made).build(self.name, {**known, **given}))

    @property
    def preset(self) -> dict[str, Any]:
        return type(self.made).variants[self.name]


@dataclass(frozen=True)
class Recipe:
    """Stages of passes in applied order, and overrides."""

    stages: tuple[tuple[Call, ...], ...]
    overrides: tuple[Override, ...] = ()

    @cached_property
    def calls(self) -> list[Call]:
        return [c for stage in self.stages for c in stage]

    def text(self) -> str:
        """The canonical text: passes in applied order with every knob that is not its default."""
        return " | ".join(",".join(call_text(c) for c in stage) for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Stages with every knob's value, and the overrides."""
        stages = [{c.name: c.made.values() for c in stage} for stage in self.stages]
        rows = [
            {k: v for k, v in vars(o).items() if v not in ((), None)}
            | {"knobs": dict(o.knobs)}
            | ({"use": _used(o)} if o.use else {})
            for o in self.overrides
        ]
        return {"stages": stages, "overrides": rows}

    def to_mapping(self) -> dict[str, Any]:
        """What a recipe file holds that asks for the same; :func:`from_mapping` reads it."""
        given = [
            {c.name: {k: v for k, v in c.made.values().items() if c.made.explicit(k)} for c in s}
            for s in self.stages
        ]
        return {
            "version": 1, "stages": given, "overrides": [o.to_mapping() for o in self.overrides]
        }  # fmt: skip


def _used(o: Override) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: {other: dict(given)} for name, other, given in o.use}


def call_text(call: Call) -> str:
    knobs, preset = type(call.made).knobs(), call.preset
    shown = [
        f"{k}={str(v).lower()}"
        for k, v in call.made.values().items()
        if k not in preset and v != knobs[k].default
    ]
    return call.name + (":" + ",".join(shown) if shown else "")


def parse_passes(text: str) -> list[tuple[str, dict[str, str]]]:
    """Split one ``--passes`` string into (pass name, raw knobs).

    Raises:
        UsageError: an empty item, a knob before any pass, or a repeated knob.
    """
    out: list[tuple[str, dict[str, str]]] = []
    for item in text.split(","):
        item = item.strip()
        if not item:
            raise UsageError(f"--passes: expected pass names separated by commas, found {text!r}")
        name, colon, rest = item.partition(":")
        if colon:
            out.append((name.strip(), {}))
            item = rest.strip()
        elif "=" not in item:
            out.append((item, {}))
            continue
        if not out:
            raise UsageError(f"--passes: expected a pass before the knob {item!r}, found none")
        key, equals, value = item.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UsageError(f"--passes: expected {out[-1][0]}:knob=value, found {item!r}")
        if key.strip() in out[-1][1]:
            raise UsageError(f"--passes: expected knob {key.strip()!r} of {out[-1][0]} once")
        out[-1][1][key.strip()] = value.strip()
    return out


def from_strings(strings: Sequence[str]) -> Recipe:
    """A recipe from ``--passes`` strings; each string is one stage.

    Raises:
        UsageError: unknown pass or knob, bad value, or an order without meaning.
    """
    stages = [
        [Call(name, find(name).build(name, dict(raw))) for name, raw in parse_passes(text)]
        for text in strings
    ]
    return _ordered(stages)


def _ordered(stages: Sequence[Sequence[Call]], overrides: tuple[Override, ...] = ()) -> Recipe:
    if not stages or not any(stages):
        raise UsageError("expected at least one pass, found none", hint="see: llmc passes")
    sorted_stages = []
    for calls in stages:
        names = [c.named for c in calls]
        sorted_stages.append(tuple(calls[i] for i in order.resolve(names)))
    order.check_barriers([[c.named for c in s] for s in sorted_stages])
    return Recipe(tuple(sorted_stages), overrides)


class _Where(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: list[str] = Field(default_factory=list)
    block: list[int] = Field(default_factory=list)
    site: list[str] = Field(default_factory=list)


class _OverrideModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    where: _Where
    skip: list[str] = Field(default_factory=list)
    set: dict[str, dict[str, Any]] = Field(default_factory=dict)
    use: dict[str, dict[str, dict[str, Any] | None]] = Field(default_factory=dict)


class RecipeModel(BaseModel):
    """The schema of a recipe file; ``spec/recipes/schema.json`` is generated from it."""

    model_config = ConfigDict(extra="forbid")
    version: int = Field(ge=1, le=1)
    stages: list[dict[str, dict[str, Any] | None]] = Field(min_length=1)
    overrides: list[_OverrideModel] = Field(default_factory=list)


def schema_text() -> str:
    """JSON Schema of recipe files, for editors; ``spec/recipes/schema.json`` holds it."""
    return json.dumps(RecipeModel.model_json_schema(), indent=1, sort_keys=True) + "\n"


def from_file(path: str | Path) -> Recipe:
    """A recipe from a YAML file (see ``spec/recipes``).

    Raises:
        UsageError: unreadable file, or a wrong field, named by its path.
    """
    import yaml

    path = _named(path)
    try:
        text = path.read_text(encoding="utf-8")
        _check_keys(yaml.compose(text, yaml.SafeLoader), str(path))
        data = yaml.safe_load(text)
    except OSError as e:
        raise UsageError(
            f"expected a recipe file, found {e.strerror or e}", where=str(path)
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        first = str(e).splitlines()[0]
        raise UsageError(f"expected YAML, found {first}", where=str(path)) from None
    if not isinstance(data, dict):
        raise UsageError("expected a mapping with 'version' and 'stages'", where=str(path))
    return from_mapping(data, where=str(path))


def _check_keys(node: Any, where: str) -> None:
    """YAML keeps the last of two equal keys in silence; a recipe that says two things is refused.

    Raises:
        UsageError: naming key and line.
    """
    for entry in node.value if node is not None and not isinstance(node.value, str) else ():
        if isinstance(entry, tuple):
            keys = [k.value for k, _ in node.value]
            key = entry[0]
            if keys.count(key.value) > 1:
                line = key.start_mark.line + 1
                raise UsageError(f"line {line}: expected {key.value!r} once", where=where)
        for child in entry if isinstance(entry, tuple) else (entry,):
            _check_keys(child, where)


def _named(given: str | Path) -> Path:
    """The file that is meant: the given path, else the shipped recipe of that name.

    Raises:
        UsageError: neither exists.
    """
    path = Path(given).expanduser()
    if path.exists():
        return path
    shipped = {p.stem: p for p in sorted(SHIPPED.glob("*.yaml"))}
    if path.parent == Path() and path.stem in shipped and path.suffix in ("", ".yaml"):
        return shipped[path.stem]
    if path.parent != Path():
        raise UsageError(f"expected a recipe file, found none at {given}")
    raise UsageError(
        f"expected a recipe file or one of {', '.join(shipped)}, found none at {given}",
        hint=nearest(path.stem, shipped),
    )


def _field_error(error: Any, where: str) -> UsageError:
    """One finding of pydantic in our words, with the fields that there are."""
    spot = error["loc"]
    place = ".".join(str(p) for p in spot)
    levels: dict[int, type[BaseModel]] = {1: RecipeModel, 3: _OverrideModel, 4: _Where}
    known = levels[len(spot)].model_fields if len(spot) in levels else ()
    if error["type"] == "missing":
        return UsageError(f"{place}: expected this field, found none", where=where)
    if error["type"] == "extra_forbidden":
        return UsageError(
            f"{place}: expected a field of {', '.join(known)}, found {str(spot[-1])!r}",
            where=where, hint=nearest(str(spot[-1]), known),
        )  # fmt: skip
    return UsageError(f"{place}: {error['msg']}", where=where)


def from_mapping(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from a mapping of the file's shape."""
    try:
        model = RecipeModel.model_validate(dict(data))
    except ValidationError as e:
        # An unknown field first: a misspelt one is missing too, and its own name says more.
        errors = sorted(e.errors(), key=lambda one: one["type"] != "extra_forbidden")
        raise _field_error(errors[0], where) from None
    stages = [
        [Call(name, find(name).build(name, dict(raw or {}))) for name, raw in stage.items()]
        for stage in model.stages
    ]
    used = {c.name for s in stages for c in s}
    overrides = []
    for i, o in enumerate(model.overrides):
        for name in [*o.skip, *o.set, *o.use]:
            if name not in used:
                raise UsageError(
                    f"overrides.{i}: expected a pass of this recipe, found {name!r}",
                    where=where, hint=nearest(name, used),
                )  # fmt: skip
        recipe = _ordered(stages)
        for name, given in o.set.items():
            call = next(c for c in recipe.calls if c.name == name)
            if isinstance(call.made, Structural):
                raise UsageError(
                    f"overrides.{i}.set: expected a pass that is solved site by site, found "
                    f"{name!r}, which decides about all its sites together",
                    where=where, hint="skip: leaves sites out; knobs go into the stage",
                )  # fmt: skip
            call.adjusted(given)
        stands_in = []
        for name, other in o.use.items():
            call = next(c for c in recipe.calls if c.name == name)
            stands_in.append(_stand_in(call, other, f"overrides.{i}.use.{name}", where))
        overrides.append(
            Override(
                tuple(o.where.role),
                tuple(o.where.block),
                tuple(o.where.site),
                tuple(o.skip),
                tuple((n, tuple(sorted(g.items()))) for n, g in o.set.items()),
                tuple(stands_in),
            )
        )
    return _ordered(stages, tuple(overrides))


def _stand_in(
    call: Call, given: Mapping[str, Mapping[str, Any] | None], field: str, where: str
) -> tuple[str, str, tuple[tuple[str, Any], ...]]:
    """What stands in for a pass at some sites, checked: (its name, the other's, its knobs).

    Raises:
        UsageError: not one pass, or one of another stage, or a wrong knob.
    """
    if len(given) != 1:
        raise UsageError(f"{field}: expected one pass, found {len(given)}", where=where)
    ((other, knobs),) = given.items()
    made = find(other).build(other, dict(knobs or {}))
    if made.stage != call.made.stage or isinstance(made, Structural):
        raise UsageError(
            f"{field}: expected a pass of stage {call.made.stage!r} that is solved site by site, "
            f"found {other!r} of stage {made.stage!r}", where=where,
        )  # fmt: skip
    return call.name, other, tuple(sorted((knobs or {}).items()))


def at_site(
    call: Call, overrides: Sequence[Override], site: str, role: str, block: int, blocks: int
) -> Call | None:
    """The call as it stands at one site after overrides, None when it is skipped there."""
    asked = call.name
    for o in overrides:
        if not o.covers(site, role, block, blocks):
            continue
        if asked in o.skip:
            return None
        for name, other, knobs in o.use:
            if name == asked:
                call = Call(other, find(other).build(other, dict(knobs)))
        given = dict(dict(o.knobs).get(call.name, ()))
        if given:
            call = call.adjusted(given)
    return call


__all__ = [
    "Call", "Override", "Recipe", "RecipeModel", "all_passes", "at_site", "from_file",
    "from_mapping", "from_strings", "parse_passes",
]  # fmt: skip
