"""Running a program over calibration tokens, segment by segment: statistics, the stream, the loss.

Memory is that of one segment's weights and of what flows between two segments, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.depth import spans
from ..ir.errors import ModelError, UsageError
from ..ir.events import Event, Listener, silent
from ..ir.graph import Program, Segment, tensor_type
from ..ir.interpret import Fetch, Observe, run_nodes
from ..ir.types import show_type
from .statistics import Collection

# What one batch knows between two segments: the values that later segments read.
Env = dict[fx.Node, object]
# Bytes that the logits of one batch and their softmax may take together in fp32.
LOGITS = 256 << 20


@dataclass(frozen=True)
class Options:
    """How calibration runs.

    Attributes:
        batch: samples that run at once.
        propagate: what feeds the next block: ``compressed`` or ``dense`` outputs.
        true_sequential: solve a block in waves, each seeing its compressed predecessors.
        budget: bytes for the Hessians of one wave; more waves are made to fit.
        device: where blocks run and are solved.
    """

    batch: int = 8
    propagate: str = "compressed"
    true_sequential: bool = False
    budget: int = 4 << 30
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.propagate not in ("compressed", "dense"):
            raise UsageError(f"propagate: expected compressed or dense, found {self.propagate!r}")


def model_inputs(ids: Tensor) -> dict[str, Tensor]:
    """The named inputs of a language model for full windows of token ids int64 [B, S]."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(*ids.shape)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
    }


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of token t+1 given tokens up to t: logits [B, S, V], ids int64 [B, S]."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(flat.float(), ids[:, 1:].reshape(-1))


def logits_of(program: Program) -> fx.Node:
    """The one value that the program gives.

    Raises:
        ModelError: several values.
    """
    out = program.output.args[0]
    out = out[0] if isinstance(out, (tuple, list)) and len(out) == 1 else out
    if not isinstance(out, fx.Node):
        raise ModelError("expected one output of logits, found several")
    return out


def batches(program: Program, tokens: Tensor, options: Options) -> list[Env]:
    """Input environments of the calibration batches.

    Raises:
        UsageError: the program reads something else than token ids.
    """
    nodes = {n.name: n for n in program.inputs}
    out: list[Env] = []
    for ids in tokens.split(options.batch):
        made = model_inputs(ids.to(options.device))
        unknown = sorted(set(nodes) - set(made))
        if unknown:
            raise UsageError(
                f"expected a model that reads token ids, found inputs {unknown}",
                hint="calibrate in Python and pass the statistics' inputs yourself",
            )
        out.append({nodes[k]: v for k, v in made.items() if k in nodes})
    return out


def check_finite(node: fx.Node, value: Tensor) -> None:
    """Raises ModelError where an activation on calibration data is not finite."""
    # NaN and Inf survive a sum, which is one pass and no temporary; in 16 bits it could overflow.
    total = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
    if not bool(torch.isfinite(total)):
        raise ModelError(
            "expected finite activations on calibration data, found NaN or Inf",
            where=f"node {node.name}", hint="check the checkpoint and the calibration tokens",
        )  # fmt: skip


class Walk:
    """A segmented program that runs one segment at a time, its weights loaded once per segment.

    Attributes:
        segments: in order.
        implementations: replacement callables by node name, see `run_nodes`.
    """

    def __init__(
        self, program: Program, fetch: Fetch | None = None, device: str = "cpu",
        implementations: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:  # fmt: skip
        if not program.segments:
            raise ModelError("expected a segmented program, found none", hint="call apply_segments")
        self.program, self.segments = program, program.segments
        self.device = torch.device(device)
        self.implementations = implementations
        self._nodes = {n.name: n for n in program.graph.nodes}
        self._loaded: dict[str, Tensor] = {}
        self.fetch: Fetch = fetch or self._load
        self._later: dict[str, set[str]] = {}
        later: set[str] = set()
        for segment in reversed(program.segments):
            self._later[segment.name] = set(later)
            later |= set(segment.live_in)

    def calls(self, segment: Segment) -> list[fx.Node]:
        """The segment's nodes in order, without the program's output."""
        return [self._nodes[n] for n in segment.nodes if self._nodes[n].op != "output"]

    def is_read_after(self, segment: Segment) -> bool:
        """Whether any later segment computes something from what this one leaves."""
        return any(n != "output" for n in self._later[segment.name])

    def outputs(
        self, segment: Segment, env: Env, *, fetch: Fetch | None = None,
        observe: Observe | None = None,
    ) -> Env:  # fmt: skip
        """What the segment gives to others, from a batch's environment, which stays as it is."""
        keep = [self._nodes[n] for n in segment.live_out if self._nodes[n].op != "output"]
        get = fetch or self.fetch
        done = run_nodes(
            self.calls(segment), dict(env), get, implementations=self.implementations,
            observe=observe, keep=keep,
        )  # fmt: skip
        return {n: done[n] for n in keep if n in done}

    def advanced(self, segment: Segment, env: Env, new: Env) -> Env:
        """The environment behind the segment: what later segments read, and the inputs."""
        later = self._later[segment.name]
        kept = {n: v for n, v in env.items() if n.name in later or n.op == "placeholder"}
        return {**kept, **{n: v for n, v in new.items() if n.name in later}}

    def step(self, segment: Segment, envs: list[Env], observe: Observe | None = None) -> list[Env]:
        """Every batch's environment behind the segment."""
        out = [
            self.advanced(segment, env, self.outputs(segment, env, observe=observe))
            for env in envs
        ]  # fmt: skip
        self.forget()
        return out

    def forget(self) -> None:
        """Let go of the weights that were loaded."""
        self._loaded.clear()

    def _load(self, name: str) -> Tensor:
        if name not in self._loaded:
            self._loaded[name] = self.program.fetch(name).to(self.device)
        return self._loaded[name]


def collect(
    program: Program,
    tokens: Tensor,
    wants: Mapping[str, Sequence[str]],
    options: Options,
    listener: Listener = silent,
) -> Collection:
    """Statistics of values of the program as it is, over all calibration tokens.

    Args:
        tokens: int64 [samples, length].
        wants: names of statistics by name of the value's node, see :mod:`.statistics`.
    Raises:
        ModelError: no such node, or an activation that is not finite.
        UsageError: an unknown statistic, or a program that reads something else than token ids.
    """
    stats = Collection()
    for value, names in wants.items():
        for name in names:
            stats.want(program.node(value).name, name)
    wanted = stats.values()

    def observe(node: fx.Node, value: object) -> None:
        if node.name in wanted:
            assert isinstance(value, Tensor)
            check_finite(node, value)
            stats.update(node.name, value)

    walk = Walk(program, device=options.device)
    last = max((i for i, s in enumerate(walk.segments) if wanted & set(s.nodes)), default=-1)
    with torch.no_grad():
        envs = batches(program, tokens, options)
        for segment in walk.segments[: last + 1]:
            listener(Event("tick", {"where": segment.name}))
            envs = walk.step(segment, envs, observe)
    return stats


@dataclass(frozen=True)
class Passed:
    """One batch behind one block: the stream before and after it, [B, S, hidden]."""

    block: str
    batch: int
    enters: Tensor
    leaves: Tensor


def stream(
    program: Program, tokens: Tensor, options: Options, listener: Listener = silent
) -> Iterator[Passed]:
    """The residual stream around every block, block after block, batch after batch.

    Raises:
        UsageError: a program that reads something else than token ids.
        ModelError: an activation that is not finite.
    """
    walk = Walk(program, device=options.device)
    around = {s.block: s for s in spans(program)}
    with torch.no_grad():
        envs = batches(program, tokens, options)
        for segment in walk.segments:
            listener(Event("tick", {"where": segment.name}))
            span = around.get(segment.name)
            if span is None:
                envs = walk.step(segment, envs) if walk.is_read_after(segment) else []
                continue
            enters, leaves = program.node(span.enters), program.node(span.leaves)
            for i, env in enumerate(envs):
                new = walk.outputs(segment, env)
                before, after = env[enters], new[leaves]
                assert isinstance(before, Tensor)
                assert isinstance(after, Tensor)
                check_finite(leaves, after)
                yield Passed(segment.name, i, before, after)
                envs[i] = walk.advanced(segment, env, new)
            walk.forget()


def loss(program: Program, tokens: Tensor, options: Options, listener: Listener = silent) -> float:
    """Mean cross-entropy of the next token over all windows, int64 [samples, length].

    Raises:
        ModelError: the program gives more than logits, or they are not finite.
    """
    walk = Walk(program, device=options.device)
    options, meter = for_logits(program, tokens, options), Meter(program, tokens)
    with torch.no_grad():
        envs = batches(program, tokens, options)
        for segment in walk.segments:
            listener(Event("tick", {"where": segment.name}))
            envs = walk.step(segment, envs, meter)
    return meter.mean()


def gives_logits(program: Program, top: int) -> bool:
    """Whether the program's one value is [B, S, vocabulary], with ``top`` among its tokens.

    A width that is not the vocabulary the model tells of is that of hidden states.
    """
    try:
        shape = tensor_type(logits_of(program)).shape
    except ModelError:
        return False
    width, vocab = shape[-1] if len(shape) == 3 else None, program.facts.get("vocab")
    return isinstance(width, int) and width > top and vocab in (None, width)


def for_logits(program: Program, tokens: Tensor, options: Options) -> Options:
    """The options with batches small enough that logits and their softmax stay within memory."""
    width = tensor_type(logits_of(program)).shape[-1]
    window = tokens.shape[1] * (width if isinstance(width, int) else 1) * 8
    return replace(options, batch=max(1, min(options.batch, LOGITS // window)))


class Meter:
    """Observes the logits of batch after batch and keeps each window's loss.

    Raises:
        ModelError: the program gives something else than logits [B, S, vocabulary].
    """

    def __init__(self, program: Program, tokens: Tensor) -> None:
        self.logits, self.tokens = logits_of(program), tokens
        top = int(tokens.max())
        if not gives_logits(program, top):
            raise ModelError(
                f"expected logits over more than {top} tokens to take a loss of, found "
                f"{show_type(tensor_type(self.logits))}", where=f"node {self.logits.name}",
                hint=f"the vocabulary that the model tells of is {program.facts.get('vocab')}",
            )  # fmt: skip
        self._found: list[Tensor] = []

    def __call__(self, node: fx.Node, value: object) -> None:
        if node is not self.logits:
            return
        assert isinstance(value, Tensor)
        done = sum(map(len, self._found))
        ids = self.tokens[done : done + len(value)].to(value.device)
        one = next_token_loss(value, ids)
        check_finite(node, one)
        self._found.append(one.double().expand(len(ids)))

    def mean(self) -> float:
        """Mean cross-entropy over the windows seen, which all have one length."""
        return float(torch.cat(self._found).mean())
