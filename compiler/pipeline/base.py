"""What a pass is: one declarative record with knobs, pattern, preconditions, rewrite and effect.

A pass never sees data files or the order of work: it finds sites, states facts about them, and
rewrites the graph; the engine collects the statistics it asked for and solves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..ir.errors import UsageError, nearest
from ..ir.graph import Program
from ..ir.refusal import Refusal

if TYPE_CHECKING:
    from .analysis import Analysis


@dataclass(frozen=True)
class Exact:
    """The rewrite keeps the function; asserted to ``rtol`` on the fp32 upcast."""

    rtol: float

    def __str__(self) -> str:
        return f"exact (rtol {self.rtol:g})"


@dataclass(frozen=True)
class Lossy:
    """The rewrite changes the function; ``metric`` is the number it is judged by."""

    metric: str

    def __str__(self) -> str:
        return f"lossy ({self.metric})"


def knob(
    default: Any,
    help: str,
    *,
    lo: float | None = None,
    hi: float | None = None,
    choices: Sequence[str] = (),
    words: Sequence[str] = (),
) -> Any:
    """A dataclass field that becomes a CLI option, a recipe key and a row of ``llmc passes``.

    words: texts that are values as they are, beside those of the field's type.
    """
    told = {"help": help, "lo": lo, "hi": hi, "choices": choices, "words": words}
    return field(default=default, metadata=told)


@dataclass(frozen=True)
class Knob:
    """One option of a pass, as declared."""

    name: str
    type: type
    default: Any
    optional: bool
    help: str
    lo: float | None
    hi: float | None
    choices: tuple[str, ...]
    words: tuple[str, ...] = ()

    def range_text(self) -> str:
        if self.choices:
            return "|".join(self.choices)
        if self.lo is None and self.hi is None:
            return "|".join((self.type.__name__, *self.words))
        low, high = ("" if x is None else f"{x:g}" for x in (self.lo, self.hi))
        return "|".join((f"{low}..{high}", *self.words))

    def parse(self, raw: Any, owner: str) -> Any:
        """A value from text or YAML, checked.

        Raises:
            UsageError: wrong type, out of range, or not a choice; names pass and knob.
        """
        where = f"{owner}:{self.name}"
        if raw in self.words:
            return raw
        empty = raw is None or (isinstance(raw, str) and raw.lower() in ("none", "row", "null"))
        if empty and raw not in self.choices:
            if self.optional:
                return None
            raise UsageError(f"{where}: expected {self.range_text()}, found {raw!r}")
        value = self._convert(raw, where)
        if self.choices and value not in self.choices:
            raise UsageError(
                f"{where}: expected one of {', '.join(self.choices)}, found {value!r}",
                hint=nearest(str(value), self.choices),
            )
        low = self.lo is not None and value < self.lo
        if low or (self.hi is not None and value > self.hi):
            raise UsageError(f"{where}: expected {self.range_text()}, found {value!r}")
        return value

    def _convert(self, raw: Any, where: str) -> Any:
        if self.type is bool:
            table = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            text = str(raw).lower()
            if text not in table:
                raise UsageError(f"{where}: expected true or false, found {raw!r}")
            return table[text]
        try:
            if isinstance(raw, bool) or (self.type is int and float(raw) != int(float(raw))):
                raise ValueError
            value = self.type(float(raw)) if self.type is int else self.type(raw)
            if value != value:
                raise ValueError
            return value
        except (TypeError, ValueError, OverflowError):
            name = {"int": "a whole number", "float": "a number", "str": "text"}[self.type.__name__]
            name = " or ".join((name, *self.words))
            raise UsageError(f"{where}: expected {name}, found {raw!r}") from None


@dataclass(frozen=True)
class Precondition:
    """A named test of a site; ``check`` returns None when it holds, else the reason with values."""

    name: str
    check: Callable[[Any, Any], str | None]


@dataclass(frozen=True)
class Example:
    """A hit or a miss that a pass must supply: a named tiny model and what is expected of it.

    ``model`` names a builder of :mod:`llmc.compiler.pipeline.zoo`; for a miss ``predicate`` is the
    failing condition that the refusal must carry.
    """

    model: str
    predicate: str = ""


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses whose fields are their knobs.

    Class attributes that a pass file states:
        variants: names under which the pass is called, each with preset knobs.
        stage: its place in the pass algebra (see :mod:`.order`).
        effect: :class:`Exact` or :class:`Lossy`.
        needs: statistics by name (see :mod:`.statistics`).
        source: the paper.
        pattern: finds candidate sites; preconditions decide.
        hits, misses: examples that the generic tests run.

    An instance knows under which variant it was ``called`` and which knobs were ``given``.
    """

    variants: ClassVar[dict[str, dict[str, Any]]]
    stage: ClassVar[str]
    effect: ClassVar[Exact | Lossy]
    needs: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str]
    pattern: ClassVar[Callable[[Analysis], Iterable[Any]]]
    preconditions: ClassVar[tuple[Precondition, ...]] = ()
    hits: ClassVar[tuple[Example, ...]] = ()
    misses: ClassVar[tuple[Example, ...]] = ()

    def check(self) -> None:
        """Cross-knob conditions; raises UsageError."""

    def facts(self, site: Any) -> dict[str, Any]:
        """Scheme fields that this pass states about the site's weights."""
        return {}

    def solving(self, site: Any) -> dict[str, Any]:
        """Options for the solver at this site."""
        return {}

    def rewrite(self, program: Program, site: Any) -> list[str]:
        """Rewrite the graph at one site; return the names of parameters that get new tensors."""
        raise UsageError(f"{type(self).__name__} has no rewrite")

    called: str = field(default="", kw_only=True, compare=False, repr=False)
    given: frozenset[str] = field(default=frozenset(), kw_only=True, compare=False, repr=False)

    def prepare(self, program: Program, sites: Sequence[Any]) -> list[str]:
        """Give the program parameters that the pass will need and that change nothing yet.

        Returns their names; it is done before anything is planned or measured.
        """
        return []

    # ** derived **

    @classmethod
    def law(cls) -> str:
        """First paragraph of the docstring."""
        return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())

    @classmethod
    def knobs(cls) -> dict[str, Knob]:
        """The declared options by name."""
        return {f.name: _knob(f) for f in fields(cls) if "help" in f.metadata}

    @classmethod
    def build(cls, name: str, given: dict[str, Any]) -> Pass:
        """An instance from a variant's name and given knobs.

        Raises:
            UsageError: unknown knob (nearest suggested), bad value, or preset knob overridden.
        """
        known, preset = cls.knobs(), cls.variants[name]
        values: dict[str, Any] = dict(preset)
        for key, raw in given.items():
            if key not in known or key in preset:
                free = [k for k in known if k not in preset]
                raise UsageError(
                    f"{name}: expected a knob of {', '.join(free)}, found {key!r}",
                    hint=nearest(key, free),
                )
            values[key] = known[key].parse(raw, name)
        made = cls(**values, called=name, given=frozenset(given))
        made.check()
        return made

    def explicit(self, name: str) -> bool:
        """Whether the user gave that knob (a default may bend where an explicit value refuses)."""
        return name in self.given

    def values(self) -> dict[str, Any]:
        """Every knob's value."""
        return {k: getattr(self, k) for k in self.knobs()}

    def sites(self, analysis: Analysis) -> tuple[list[Any], list[Refusal]]:
        """Where the pass applies and where it nearly did."""
        found: list[Any] = []
        refused: list[Refusal] = []
        for candidate in type(self).pattern(analysis):
            if isinstance(candidate, Refusal):
                refused.append(candidate)
                continue
            reason = self.test(candidate)
            if reason is None:
                found.append(candidate)
            else:
                refused.append(reason)
        return found, refused

    def test(self, site: Any) -> Refusal | None:
        """The first failing precondition of a site, else None."""
        for condition in self.preconditions:
            why = condition.check(self, site)
            if why is not None:
                by = next(iter(self.variants))
                return Refusal(by, getattr(site, "node", site.id), why, condition.name)
        return None


_KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


def _knob(f: Field[Any]) -> Knob:
    # Without ``from __future__ import annotations`` a plain class stands here, not its name.
    text = f.type.__name__ if isinstance(f.type, type) else str(f.type)
    written = [part.strip() for part in text.split("|")]
    m = f.metadata
    default = None if f.default is MISSING else f.default
    return Knob(
        f.name, _KINDS[written[0]], default, "None" in written,
        m["help"], m["lo"], m["hi"], tuple(m["choices"]), tuple(m["words"]),
    )  # fmt: skip
