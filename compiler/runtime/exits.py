"""Running a program with early exits: segment by segment, and no further block once a token left.

Decoding token by token, each row leaves on its own. The rows that stay run whole blocks; for those
that left, a block runs only the nodes that make its keys and values, from the stream with which the
row left, so that every state gets one entry per token. A prompt runs at full depth.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import fx

from ..analysis.exits import exit_spans, head_nodes
from ..analysis.ties import constants as constant_nodes
from ..ir.errors import ModelError
from ..ir.exits import classified, classifier_of, features, similarity, sure_enough
from ..ir.graph import Program
from ..ir.ops import row_of
from ..ir.ops.heads import GAINS, K_LAST, Before, joined, ready, turn_of
from ..ir.refusal import Refusal
from .cache import Cache, KVState
from .executor import Constants, Runner
from .rows import Rows
from .steps import Step, run_steps

_CACHED, _K_GAIN = "llmc.cached_attention", GAINS[1]
_BEFORE = ("state", *Before.__annotations__)


def _kept(node: fx.Node) -> list[Any]:
    """What goes into its state: keys, values, positions, validity; what makes keys of these."""
    args = [*node.args, *[None] * (K_LAST + 1)]
    return [*args[1:5], *args[7:11], args[_K_GAIN], args[K_LAST]]


@dataclass(frozen=True)
class Block:
    """One block as steps.

    Attributes:
        steps: all of it; fill: only what makes keys and values, and keeps them.
        reads, gives: slots of the stream that flows in and out.
        states: names of its states.
        exit: which exit lies behind it, None where a token may not leave.
    """

    name: str
    steps: list[Step]
    fill: list[Step]
    reads: int
    gives: int
    states: tuple[str, ...]
    exit: int | None


def _keep(
    k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor, valid: torch.Tensor | None = None,
    cos: torch.Tensor | None = None, sin: torch.Tensor | None = None,
    up: torch.Tensor | None = None, up_bias: torch.Tensor | None = None,
    gain: torch.Tensor | None = None, k_last: torch.Tensor | None = None, *, state: KVState,
    **before: Unpack[Before],
) -> None:  # fmt: skip
    """Keep keys and values of tokens that nobody attends from here."""
    k, turn = ready(joined(k, k_last), gain, cos, sin, **before), turn_of(cos, sin, before)
    state.append(k, v, pos, valid, turn, None if up is None else (up, up_bias))


@dataclass
class _Part:
    """Rows that go the same way, and the environment in which they run."""

    rows: list[int]
    env: list[Any]


class ExitRunner(Runner):
    """A cached program whose exits are taken.

    Attributes:
        exits: where and when a token leaves.
        depth: blocks in all.
        used: blocks that the last call executed for each row; all of them for a prompt.
    Raises:
        ModelError: no exits or no state, a stream that cannot be left, or a broken classifier.
    """

    def __init__(
        self,
        program: Program,
        implementations: Mapping[str, Callable[..., Any]] | None = None,
        *,
        resident: Literal["packed", "dense"] = "packed",
        device: torch.device | str = "cpu",
    ) -> None:
        if program.exits is None or not program.states:
            raise ModelError("expected a program with exits and a KV cache, found another")
        self.exits = program.exits
        made = classifier_of(self.exits, program.weights)
        self.classifier = None if made is None else made.to(device)
        self.used: list[int] = []
        super().__init__(program, implementations, resident=resident, device=device)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    # ** construction **

    def _prepare(self, constants: Constants) -> None:
        program = self.program
        found = exit_spans(program)
        if isinstance(found, Refusal):
            raise ModelError(f"expected blocks that can be left early: {found}")
        free = constant_nodes(program.graph)
        first, *middle, _ = program.segments
        # The prologue is run anew for some rows, and then reads its constants again.
        self._prologue = self._named(first.nodes, constants, free)
        varying = [n for n in first.nodes if program.node(n) not in free]
        self._again = self._named(varying, constants)
        self._head = self._listed([n for n in head_nodes(program) if self._runs(n)], constants)
        exit_of = {name: i for i, name in enumerate(self.exits.blocks)}
        self.blocks = tuple(
            Block(
                s.name, self._named(s.nodes, constants), self._filling(s.nodes, constants),
                self._slots[span.enters], self._slots[span.leaves],
                tuple(str(n.kwargs["state"]) for n in self._stateful(s.nodes)),
                # Behind the last block there is nothing to save.
                exit_of.get(s.name) if s is not middle[-1] else None,
            )
            for s, span in zip(middle, found, strict=True)
        )  # fmt: skip

    def _runs(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.name in self._slots

    def _named(
        self, names: Iterable[str], constants: Constants, keep: Container[fx.Node] = ()
    ) -> list[Step]:
        nodes = [self.program.node(n) for n in names]
        return self._listed([n for n in nodes if self._runs(n)], constants, keep)

    def _stateful(self, names: Iterable[str]) -> list[fx.Node]:
        nodes = [self.program.node(n) for n in names]
        return [n for n in nodes if self._runs(n) and row_of(n).stateful]

    def _filling(self, names: tuple[str, ...], constants: Constants) -> list[Step]:
        """Steps that make a block's keys and values and keep them, and nothing else."""
        inside = {self.program.node(n) for n in names}
        keeping = self._stateful(names)
        needed: set[fx.Node] = set()
        for node in keeping:
            if row_of(node).name != _CACHED:
                raise ModelError(f"expected {_CACHED}, found {row_of(node).name}", where=node.name)
            needed.update(n for n in _kept(node) if isinstance(n, fx.Node))
        steps: list[Step] = []
        for node in reversed([self.program.node(n) for n in names]):
            if node in needed and self._runs(node):
                needed.update(i for i in node.all_input_nodes if i in inside)
                steps.append(self._step(node, constants))
            elif node in keeping:
                kwargs: dict[str, Any] = {n: node.kwargs[n] for n in _BEFORE if n in node.kwargs}
                steps.append(self._calling(_keep, node, _kept(node), kwargs, constants))
        return steps[::-1]

    # ** running **

    def _run(self, given: Mapping[str, torch.Tensor], cache: Cache | None) -> torch.Tensor:
        assert cache is not None
        ids = given["input_ids"]
        decoding = cache.length > 0 and ids.shape[1] == 1
        if decoding and not self.exits.never:
            return self._decode(given, cache)
        out = super()._run(given, cache)
        self.used = [self.depth] * len(ids)
        if not decoding:
            cache.prompt = cache.length
        return out

    def _decode(self, given: Mapping[str, torch.Tensor], cache: Cache) -> torch.Tensor:
        batch = len(given["input_ids"])
        used, threshold = [0] * batch, float(self.exits.at(cache.length - cache.prompt))
        stay = _Part(list(range(batch)), self._start(given, cache))
        run_steps(self._prologue, stay.env)
        gone = _Part([], stay.env)
        logits: torch.Tensor | None = None
        left: torch.Tensor | None = None
        for block in self.blocks:
            self._advance(block, stay, gone, left, cache)
            for row in stay.rows:
                used[row] += 1
            if block.exit is None or not stay.rows:
                continue
            leave, said = self._judge(block, stay, threshold)
            if not any(leave):
                continue
            stream = stay.env[block.gives]
            if left is None or logits is None:
                left = stream.new_empty(batch, *stream.shape[1:])
                logits = said.new_empty(batch, *said.shape[1:])
            rows = [r for r, go in zip(stay.rows, leave, strict=True) if go]
            picked = [i for i, go in enumerate(leave) if go]
            left[rows], logits[rows] = stream[picked], said[picked]
            stay, gone = self._part(block, given, cache, stay, gone, leave)
        self.used = used
        if not stay.rows:
            assert logits is not None
            return logits
        said = self._says(stay.env, stay.env[self.blocks[-1].gives])
        if logits is None:
            return said
        logits[stay.rows] = said
        return logits

    def _advance(
        self, block: Block, stay: _Part, gone: _Part, left: torch.Tensor | None, cache: Cache
    ) -> None:
        """Run a block for the rows that stay; keep keys and values for those that left."""
        states = [cache.states[name] for name in block.states]
        both = bool(stay.rows and gone.rows)
        for part, steps in ((gone, block.fill), (stay, block.steps)):
            if not part.rows:
                continue
            for state in states:
                state.rows = Rows.of(part.rows, self.device) if both else None
            if part is gone:
                assert left is not None
                part.env[block.reads] = left[part.rows]
            run_steps(steps, part.env)
        if both:
            for state in states:
                state.advance(1)

    def _judge(
        self, block: Block, stay: _Part, threshold: float
    ) -> tuple[list[bool], torch.Tensor]:
        """Which rows are sure enough to leave, and their logits [rows, 1, V] if any is."""
        stream, said = stay.env[block.gives], None
        if self.exits.rule == "cosine":
            sure = similarity(stay.env[block.reads], stream)
        else:
            said = self._says(stay.env, stream)
            if self.exits.rule == "softmax":
                sure = features(said)[..., 0]
            else:
                assert self.classifier is not None
                assert block.exit is not None
                sure = classified(said, self.classifier[block.exit])
        leave = sure_enough(sure.reshape(len(stay.rows)), threshold).tolist()
        if said is None and any(leave):
            said = self._says(stay.env, stream)
        return leave, stream if said is None else said

    def _says(self, env: list[Any], stream: torch.Tensor) -> torch.Tensor:
        """Logits [rows, 1, V] of the head on a stream."""
        at = self.blocks[-1].gives
        kept, env[at] = env[at], stream
        run_steps(self._head, env)
        out: torch.Tensor = self._result.read(env)
        env[at] = kept
        return out

    def _part(
        self, block: Block, given: Mapping[str, torch.Tensor], cache: Cache, stay: _Part,
        gone: _Part, leave: list[bool],
    ) -> tuple[_Part, _Part]:  # fmt: skip
        """Part the rows that leave from those that stay, each with a prologue of its own."""
        out = sorted([*gone.rows, *(r for r, go in zip(stay.rows, leave, strict=True) if go)])
        rest = [r for r, go in zip(stay.rows, leave, strict=True) if not go]
        if not rest and not gone.rows:
            return _Part([], stay.env), _Part(out, stay.env)
        left = _Part(out, self._for(out, given, cache, stay.env))
        if not rest:
            return _Part([], stay.env), left
        env = self._for(rest, given, cache, stay.env)
        env[block.gives] = stay.env[block.gives][[i for i, go in enumerate(leave) if not go]]
        return _Part(rest, env), left

    def _for(
        self, rows: list[int], given: Mapping[str, torch.Tensor], cache: Cache, like: list[Any]
    ) -> list[Any]:
        """An environment for some rows: constants as they are, the prologue run anew."""
        env = like.copy()
        for name, dtype in self._inputs.items():
            env[self._slots[name]] = given[name][rows].to(dtype)
        run_steps(self._again, env)
        return env
