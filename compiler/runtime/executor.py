"""Running a program again and again: weights resident once, the node list flattened once.

The graph is walked at construction. A call then runs down a plain list of (callable, arguments),
which keeps the per-node overhead near that of eager torch.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx

from ..ir.caches import load_all
from ..ir.errors import ModelError, UsageError
from ..ir.graph import Program, info, tensor_type
from ..ir.ops import row_of
from ..ir.types import total_bytes
from .cache import Cache, Kept
from .steps import Step, outside, run_steps

INPUTS = ("input_ids", "attention_mask", "position_ids")
# A constant this small (rotary tables, reshaped gains) is computed once whatever the policy.
_SMALL = 1 << 16


@dataclass(frozen=True)
class Memory:
    """Bytes that a runner holds.

    Attributes:
        weights: by parameter, as resident (codes stay packed, dense weights in the compute dtype).
        computed: by node, constants that were computed from weights and kept.
        stored: bytes of all parameters as stored in the artefact.
    """

    weights: dict[str, int]
    computed: dict[str, int]
    stored: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + sum(self.computed.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": self.weights, "computed": self.computed, "stored": self.stored,
            "total": self.total,
        }  # fmt: skip


class Runner:
    """A program ready to run.

    Args:
        program: cached (see ``add_cache``) or not; its inputs are among :data:`INPUTS`.
        implementations: callables by node name, from lowering; other nodes run their reference.
        resident: ``"packed"`` decodes compressed weights in every call; ``"dense"`` decodes them
            once and keeps the result, which counts as memory.
        device: where weights live and calls run.
    Raises:
        ModelError: an input that the executor does not know, or a tensor that does not load.
    """

    def __init__(
        self,
        program: Program,
        implementations: Mapping[str, Callable[..., Any]] | None = None,
        *,
        resident: Literal["packed", "dense"] = "packed",
        device: torch.device | str = "cpu",
    ) -> None:
        if resident not in ("packed", "dense"):
            raise UsageError(f"expected resident 'packed' or 'dense', found {resident!r}")
        unknown = sorted({n.name for n in program.inputs} - set(INPUTS))
        if unknown:
            raise ModelError(f"expected inputs among {list(INPUTS)}, found {unknown}")
        self.program, self.device = program, torch.device(device)
        self._inputs = {n.name: tensor_type(n).dtype for n in program.inputs}
        if "input_ids" not in self._inputs:
            raise ModelError(f"expected an input named input_ids, found {sorted(self._inputs)}")
        self._implementations = dict(implementations or {})
        self._slots: dict[Any, int] = {}
        self._build(resident)

    @property
    def cached(self) -> bool:
        """Whether the program keeps state between calls."""
        return bool(self.program.states)

    def implementation(self, node: str) -> Callable[..., Any] | None:
        """What runs a node of that name instead of its row's reference."""
        return self._implementations.get(node)

    @property
    def vocabulary(self) -> int:
        """Number of logits per token.

        Raises:
            ModelError: the program's output is no tensor of fixed width.
        """
        out = _logits(self.program.output.args[0])
        width = tensor_type(out).shape[-1] if isinstance(out, fx.Node) else None
        if not isinstance(width, int):
            raise ModelError(f"expected logits of a fixed width, found {width}")
        return width

    def start(self, batch: int, capacity: int = 256) -> Cache:
        """Empty state for a batch.

        Raises:
            ModelError: the program has no state.
        """
        if not self.cached:
            raise ModelError("expected a program with state, found none; add_cache makes one")
        states = self.program.states.values()
        return Cache(states, batch, capacity, self.device, self._kept)

    @cached_property
    def _kept(self) -> dict[str, Kept]:
        """Record and tensors of each state that is kept in another way than it comes."""
        tensors = load_all(self.program)
        return {
            name: (scheme, {part: t.to(self.device) for part, t in tensors[name].items()})
            for name, scheme in self.program.caches.items()
        }

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Logits [B, S, vocabulary] of token ids [B, S].

        Args:
            attention_mask: [B, S] of these tokens, 0 or False for padding; default: all real.
            position_ids: [B, S]; default: real tokens counted from the left, after those kept.
            cache: state from :meth:`start`; the tokens are appended to it.
        Raises:
            ModelError: state missing or not wanted, or padding that the program cannot express.
        """
        if (cache is not None) != self.cached:
            found = "none" if cache is None else "one"
            raise ModelError(f"expected {'a' if self.cached else 'no'} cache, found {found}")
        ids = input_ids.to(self.device)
        valid = None if attention_mask is None else attention_mask.to(self.device).bool()
        if valid is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
            padded = False
        else:
            padded = not bool(valid.all())
        if cache is not None:
            cache.begin(*((valid, None) if padded else (None, valid)))
        elif padded and "attention_mask" not in self._inputs:
            raise ModelError(
                "expected rows of one length, found padding and a program without attention_mask",
                hint="run the rows one by one",
            )
        given: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": valid}
        if "position_ids" in self._inputs:
            if position_ids is None:
                position_ids = (valid.long().cumsum(1) - 1).clamp_min(0)
                if cache is not None and cache.length:
                    position_ids = position_ids + cache.tokens()[:, None]
            given["position_ids"] = position_ids.to(self.device)
        return self._run(given, cache)

    __call__ = forward

    def _run(self, given: Mapping[str, torch.Tensor], cache: Cache | None) -> torch.Tensor:
        env = self._start(given, cache)
        run_steps(self._steps, env)
        out: torch.Tensor = self._result.read(env)
        return out

    def _start(self, given: Mapping[str, torch.Tensor], cache: Cache | None) -> list[Any]:
        """The environment before the first step: inputs and states in their slots."""
        env: list[Any] = [None] * len(self._slots)
        for name, dtype in self._inputs.items():
            env[self._slots[name]] = given[name].to(dtype)
        if cache is not None:
            for name, state in cache.states.items():
                env[self._slots["state", name]] = state
        return env

    # ** construction **

    def _build(self, resident: str) -> None:
        limit = _SMALL if resident == "packed" else None
        constants = Constants(self.program, self._implementations, self.device, limit)
        nodes = list(self.program.graph.nodes)
        steps = [n for n in nodes if n.op == "call_function" and n not in constants.folded]
        for node in [*self.program.inputs, *steps]:
            self._slots[node.name] = len(self._slots)
        for name in self.program.states:
            self._slots["state", name] = len(self._slots)
        self._steps = self._listed(steps, constants)
        self._result = _Template.of(_logits(self.program.output.args[0]), self._slots, constants)
        self._prepare(constants)
        self._constants = constants.used()

    def _prepare(self, constants: Constants) -> None:
        """What a kind of runner makes beside the list of all steps."""

    def _listed(
        self, nodes: Sequence[fx.Node], constants: Constants, keep: Container[fx.Node] = ()
    ) -> list[Step]:
        """Steps of nodes in order; what only they read is dropped after its last use."""
        inside = set(nodes)
        last: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            for used in (node, *node.all_input_nodes):
                last[used] = node
        dead: dict[fx.Node, list[int]] = {}
        for value, at in last.items():
            if value not in inside or value in keep:
                continue
            if all(u in inside for u in value.users):
                dead.setdefault(at, []).append(self._slots[value.name])
        return [self._step(n, constants, tuple(dead.get(n, ()))) for n in nodes]

    def _step(self, node: fx.Node, constants: Constants, dead: tuple[int, ...] = ()) -> Step:
        row = row_of(node)
        call = self._implementations.get(node.name, row.reference)
        return self._calling(call, node, node.args, node.kwargs, constants, dead)

    def _calling(
        self, call: Callable[..., Any], node: fx.Node, args: Sequence[Any],
        kwargs: Mapping[str, Any], constants: Constants, dead: tuple[int, ...] = (),
    ) -> Step:  # fmt: skip
        """The step of ``call`` on these arguments; its value goes where ``node``'s goes."""
        given = {k: self.device if k == "device" else v for k, v in kwargs.items()}
        made = [_Template.of(a, self._slots, constants) for a in args]
        named = {k: _Template.of(v, self._slots, constants) for k, v in given.items()}
        if row_of(node).stateful:
            named["state"] = _Template("slot", self._slots["state", str(given["state"])])
        return Step(
            call,
            [a.value if a.kind == "constant" else None for a in made],
            tuple((i, a.compact()) for i, a in enumerate(made) if a.kind != "constant"),
            {k: a.value for k, a in named.items() if a.kind == "constant"},
            tuple((k, a.compact()) for k, a in named.items() if a.kind != "constant"),
            self._slots[node.name], dead, node.name,
        )  # fmt: skip

    def memory_report(self) -> Memory:
        """Bytes held for weights and for what was computed from them."""
        weights, computed = self._constants
        return Memory(weights, computed, self.program.weight_bytes())


def _logits(out: Any) -> Any:
    """The first value of the program's output, which by convention is the logits."""
    return out[0] if isinstance(out, (tuple, list)) else out


@dataclass(frozen=True)
class _Template:
    """How one argument is made: a constant, a slot of the environment, or a list of such."""

    kind: str
    value: Any

    @staticmethod
    def of(value: Any, slots: Mapping[Any, int], constants: Constants) -> _Template:
        if isinstance(value, fx.Node):
            if value.name in slots:
                return _Template("slot", slots[value.name])
            return _Template("constant", constants.value(value))
        if isinstance(value, (list, tuple)):
            parts = [_Template.of(v, slots, constants) for v in value]
            if all(p.kind == "constant" for p in parts):
                return _Template("constant", [p.value for p in parts])
            return _Template("list", parts)
        return _Template("constant", value)

    def compact(self) -> Any:
        """An int for a slot, else the template itself."""
        return self.value if self.kind == "slot" else self

    def read(self, env: list[Any]) -> Any:
        if self.kind == "slot":
            return env[self.value]
        if self.kind == "list":
            return [p.read(env) for p in self.value]
        return self.value


class Constants:
    """Parameters, and nodes that depend on parameters alone and are small enough to keep."""

    def __init__(
        self,
        program: Program,
        implementations: Mapping[str, Callable[..., Any]],
        device: torch.device,
        limit: int | None,
    ) -> None:
        self._program, self._device, self._implementations = program, device, implementations
        self._values: dict[fx.Node, Any] = {}
        self.folded: set[fx.Node] = set()
        output = program.output
        for node in program.graph.nodes:
            if node.op != "call_function" or row_of(node).stateful or output in node.users:
                continue
            if not all(i.op == "get_attr" or i in self.folded for i in node.all_input_nodes):
                continue
            size = total_bytes(info(node).type)
            if not isinstance(size, int) or (limit is not None and size > limit):
                continue
            if limit is None or not any(self._codes(i) for i in node.all_input_nodes):
                self.folded.add(node)
        self._read: set[fx.Node] = set()

    def _codes(self, node: fx.Node) -> bool:
        """Whether a parameter holds integers: what is decoded from it is larger than it is."""
        param = self._program.param_of(node)
        return param is not None and not param.dtype.is_floating_point

    def value(self, node: fx.Node) -> Any:
        """The value of a parameter or a folded node that a step reads, kept from now on."""
        self._read.add(node)
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node in self._values:
            return self._values[node]
        if node.op == "get_attr":
            return self._program.fetch(str(node.target)).to(self._device)
        call = self._implementations.get(node.name, row_of(node).reference)
        args = fx.map_arg(node.args, self._compute)
        kwargs = {k: self._device if k == "device" else v for k, v in node.kwargs.items()}
        named = fx.map_arg(kwargs, self._compute)
        try:
            with torch.no_grad():
                return call(*args, **named)
        except IndexError as e:
            raise outside(node.name, e) from e

    def used(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes by parameter and by folded node of all that steps read; views count once."""
        weights: dict[str, int] = {}
        computed: dict[str, int] = {}
        seen: set[int] = set()
        for node in sorted(self._read, key=lambda n: (n.op != "get_attr", n.name)):
            value = self._values[node]
            if not isinstance(value, torch.Tensor):
                continue
            if value.layout != torch.strided:  # in a layout of a kernel's own, never a view
                weights[str(node.target)] = value.nbytes
                continue
            storage = value.untyped_storage()
            size = value.nbytes if node.op == "get_attr" else storage.nbytes()
            if storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            if node.op == "get_attr":
                weights[str(node.target)] = size
            else:
                computed[node.name] = size
        return weights, computed
