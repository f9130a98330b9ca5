"""Models by their config: built without weights under changed fields, and captured.

A config is a tree of fields; a change is a path and a value. Nothing here knows a field's name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.errors import UsageError
from ..ir.graph import Program
from .huggingface import build, fake, trace_model
from .sources import Leaf, constant

Path = tuple[str, ...]
Changes = tuple[tuple[Path, Any], ...]
Shapes = dict[str, tuple[int, ...]]


@dataclass
class Captured:
    """A model under one config, as a program.

    Attributes:
        program: normalised; its parameters' tensors come from ``store``.
        store: tensors by state-dict name; of the meta device until filled.
        stored: the names that the model's checkpoint holds.
    """

    program: Program
    store: dict[str, torch.Tensor]
    stored: set[str]

    def as_stored(self, param: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which the model stores a value that its graph reads with ``shape``."""
        return shape[::-1] if self._turned(param) else shape

    def _turned(self, param: str) -> bool:
        view, whole = (
            self.program.weights.load(param),
            self.store[self.program.params[param].names[0]],
        )
        return view.dim() == 2 and view.stride() != whole.stride()

    def put(self, param: str, value: torch.Tensor, dtype: torch.dtype) -> None:
        """Fill one parameter, all its tied names; floating values become ``dtype``."""
        names = self.program.params[param].names
        kind = dtype if value.is_floating_point() else value.dtype
        whole = torch.empty(self.as_stored(param, tuple(value.shape)), dtype=kind)
        for name in names:
            self.store[name] = whole
        self.program.weights.load(param).copy_(value)


@dataclass
class Family:
    """One model class with its config, and what was built of it so far.

    Attributes:
        fields: the source's config with every derived field written out.
        written: fields that the source left open and that now say what it did.
        builds, captures: how many models were built and captured.
    """

    kind: Any
    model: Any
    fields: dict[str, Any]
    written: list[str] = field(default_factory=list)
    builds: int = 0
    captures: int = 0
    _shapes: dict[str, Shapes | None] = field(default_factory=dict)
    _errors: dict[str, str] = field(default_factory=dict)
    _captured: dict[str, Captured] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Family:
        """The family that a captured program came from.

        Raises:
            UsageError: it did not come from a model of transformers.
        """
        import transformers

        raw, name = facts.get("config"), str(facts.get("architecture"))
        model = getattr(transformers, name, None)
        kind = getattr(model, "config_class", None)
        if not isinstance(raw, dict) or not raw or kind is None:
            raise UsageError(
                f"expected a model of transformers to write back, found {name}",
                hint="--format hf needs the config that the model was captured with",
            )
        if "auto_map" in raw:
            raise UsageError(
                f"expected a model of transformers to write back, found {name} with its own code",
                hint="its config cannot be changed without running that code",
            )
        with quiet():
            return cls(kind, model, plain(kind.from_dict(copy.deepcopy(raw)).to_dict()))

    def set(self, path: Path, value: Any) -> None:
        """Write one field out for good; what was built before no longer counts."""
        self.fields = _changed(self.fields, ((path, value),))
        self.written += say(((path, value),))
        self._shapes.clear()
        self._captured.clear()

    def config(self, changes: Changes = ()) -> Any:
        """The config with fields changed."""
        return self.kind.from_dict(_changed(self.fields, changes))

    def make(self, changes: Changes = ()) -> tuple[Any, str]:
        """A model without weight memory, and its attention implementation."""
        self.builds += 1
        return build(self.config(changes), self.model)

    def shapes(self, changes: Changes = ()) -> Shapes | None:
        """Shapes by state-dict name, None where the model cannot be built under these fields."""
        key = repr(sorted(changes, key=repr))
        if key not in self._shapes:
            try:
                with quiet():
                    model, _ = self.make(changes)
                self._shapes[key] = {n: tuple(t.shape) for n, t in model.state_dict().items()}
            except Exception as e:  # a constructor raises what it likes at fields that do not agree
                self._shapes[key] = None
                self._errors[key] = _root(e)
        return self._shapes[key]

    def why_not(self, changes: Changes) -> str:
        """What the model's class said to these fields, where it could not be built."""
        return self._errors.get(repr(sorted(changes, key=repr)), "")

    def capture(self, changes: Changes = ()) -> Captured:
        """The model under changed fields as a program; captured once.

        Raises:
            ModelError, CaptureError: it cannot be built or traced.
        """
        from .normalise import normalise

        key = repr(sorted(changes, key=repr))
        if key not in self._captured:
            with quiet():
                model, attention = self.make(changes)
                self.captures += 1
                stored = set(model.state_dict())
                leaves, store = _leaves(model, stored)
                fake(model)
                program = trace_model(model, leaves, {}, attention)
            normalise(program)
            self._captured[key] = Captured(program, store, stored)
        return self._captured[key]

    def numbers(self, kind: type) -> Iterator[tuple[Path, Any]]:
        """The fields that hold a value of exactly that type, outermost first."""
        found = [(p, v) for p, v in walk(self.fields) if type(v) is kind]
        return iter(sorted(found, key=lambda item: len(item[0])))

    def unset(self) -> list[Path]:
        """Fields that are None, and names that the model asks its config for in vain."""
        import transformers

        base: Any = transformers.PretrainedConfig
        asked: dict[str, None] = {}

        def missing(config: Any, name: str) -> Any:
            if type(config) is self.kind and not name.startswith("_"):
                asked[name] = None
            raise AttributeError(name)

        before = base.__dict__.get("__getattr__")
        base.__getattr__ = missing
        try:
            with quiet():
                self.make()
        finally:
            if before is None:
                del base.__getattr__
            else:
                base.__getattr__ = before
        none = [p for p, v in walk(self.fields) if v is None]
        return [*none, *((n,) for n in asked if n not in self.fields)]


def _changed(fields: dict[str, Any], changes: Changes) -> dict[str, Any]:
    raw = copy.deepcopy(fields)
    for path, value in changes:
        at = raw
        for part in path[:-1]:
            at = at[part]
        at[path[-1]] = value
    return raw


def at(fields: Mapping[str, Any], path: Path) -> Any:
    """The value of one field."""
    found: Any = fields
    for part in path:
        found = found[part]
    return found


def say(changes: Changes) -> list[str]:
    """Changes for people: ``field.field = value``."""
    return [f"{'.'.join(path)} = {value}" for path, value in changes]


def walk(fields: Mapping[str, Any], base: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Leaves of a config's tree: (path, value); lists are leaves."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from walk(value, (*base, str(key)))
        else:
            yield (*base, str(key)), value


def plain(value: Any) -> Any:
    """Config values as plain JSON types, so that a change can be made anywhere in the tree."""
    if isinstance(value, dict):
        return {str(k) if not isinstance(k, int) else k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _leaves(model: Any, stored: set[str]) -> tuple[dict[str, Leaf], dict[str, torch.Tensor]]:
    """Leaves by name whose tensors are looked up when asked for, so that they can be filled."""
    store: dict[str, torch.Tensor] = {}
    out: dict[str, Leaf] = {}
    groups: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        groups.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for key, names in groups.items():
        tensor = tensors[key].detach()
        trained = isinstance(tensors[key], torch.nn.Parameter)
        if stored.isdisjoint(names):
            leaf = constant(names[0], tensor)
        else:
            leaf = Leaf(tuple(names), tuple(tensor.shape), tensor.dtype, _lookup(store, names[0]),
                        trained, not tensor.dtype.is_floating_point)  # fmt: skip
            store |= dict.fromkeys(names, tensor)
        out |= dict.fromkeys(names, leaf)
    return out, store


def _lookup(store: dict[str, torch.Tensor], name: str) -> Any:
    return lambda: store[name]


def _root(error: BaseException) -> str:
    """The words of an error's first cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars, and its warnings about configs that are only tried."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
