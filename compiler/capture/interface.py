"""The functions that llmc registers with transformers: attention and experts arrive as one node.

A mask function hands over the two-dimensional validity mask and records which rule (causal, window)
the model asked for; the attention function emits ``llmc.attention`` with that rule. After tracing,
each recorded rule is compared with the model's own mask function, entry by entry
(:meth:`Session.check`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.errors import CaptureError
from ..ir.ops.attention import allowed

NAME = "llmc"
# Queries and keys on which a recorded rule is compared with the model's mask function.
_PROBE = 24


@dataclass(frozen=True)
class Rule:
    """What a mask allows beside validity."""

    causal: bool
    window: int | None


@dataclass
class Session:
    """One capture: the positions that attention reads, and what the mask function was asked for."""

    positions: torch.Tensor | None
    rules: dict[int, Rule] = field(default_factory=dict)
    held: list[torch.Tensor] = field(default_factory=list)
    asked: list[tuple[Rule, Callable[..., Any]]] = field(default_factory=list)
    attentions: int = 0

    def check(self) -> None:
        """Compare every recorded rule with the model's own mask function; call it outside tracing.

        Raises:
            CaptureError: they differ, or the function needs more than indices.
        """
        for rule, function in self.asked:
            reach = _PROBE if rule.window is None else max(_PROBE, 2 * rule.window + 2)
            last = reach - 1
            # Every key for a few queries, the last one far beyond the window.
            for q in sorted({0, 1, reach // 2, last}):
                try:
                    found = [bool(function(_ZERO, _ZERO, torch.tensor(q), k)) for k in _keys(reach)]
                except (RuntimeError, TypeError, IndexError, AttributeError) as e:
                    raise CaptureError(
                        f"expected a mask that depends on positions only, found {type(e).__name__}",
                        where="attention mask",
                    ) from None
                at = torch.tensor([[q]])
                want = allowed(at, torch.arange(reach)[None], None, rule.causal, rule.window)
                if found != want.flatten().tolist():
                    raise CaptureError(
                        "expected a causal, windowed or two-sided mask, found another one "
                        f"(query {q} differs from {rule})",
                        where="attention mask",
                    )


_ZERO = torch.tensor(0)


def _keys(n: int) -> Iterator[torch.Tensor]:
    return iter(torch.arange(n))


_session: ContextVar[Session | None] = ContextVar("llmc_capture_session", default=None)


@contextmanager
def session(positions: torch.Tensor | None, into: Session | None = None) -> Iterator[Session]:
    """Make a session current, for the traced forward."""
    current = into if into is not None else Session(positions)
    current.positions = positions
    token = _session.set(current)
    try:
        yield current
    finally:
        _session.reset(token)


def _current() -> Session:
    found = _session.get()
    if found is None:
        raise CaptureError(
            "expected attn_implementation 'llmc' inside llmc.capture only", hint="use eager or sdpa"
        )
    return found


def mask(
    *args: Any,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function: the validity mask [B, T] under a fresh identity, its rule recorded.

    Raises:
        CaptureError: no mask, a mask of another rank, or one over cached tokens.
    """
    current = _current()
    if attention_mask is None or attention_mask.ndim != 2 or mask_function is None:
        found = "none" if attention_mask is None else f"rank {attention_mask.ndim}"
        raise CaptureError(f"expected an attention mask [B, T], found {found}")
    if kwargs.get("q_offset", 0) != 0 or kwargs.get("kv_offset", 0) != 0:
        raise CaptureError("expected a mask over one whole sequence, found one with an offset")
    causal = "allow_is_bidirectional_skip" not in kwargs
    window = None if local_size is None else int(local_size) + (not causal)
    rule = Rule(causal, window)
    current.asked.append((rule, mask_function))
    fresh = torch.ops.aten.alias(attention_mask)
    current.rules[id(fresh)] = rule
    current.held.append(fresh)
    out: torch.Tensor = fresh
    return out


def _written_out(float_mask: bool) -> Callable[..., torch.Tensor]:
    def function(*args: Any, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        valid = mask(*args, **kwargs)
        current = _current()
        rule = current.rules[id(valid)]
        ok: torch.Tensor = torch.ops.llmc.may_read(
            current.positions, current.positions, valid, causal=rule.causal, window=rule.window
        )
        if not float_mask:
            return ok
        low = torch.finfo(dtype or torch.float32).min
        return torch.where(ok, torch.zeros((), dtype=dtype or torch.float32), low)

    return function


@contextmanager
def written_out() -> Iterator[None]:
    """For models with attention code of their own: their masks arrive as one ``llmc.may_read``."""
    from transformers.masking_utils import AttentionMaskInterface

    table = AttentionMaskInterface._global_mapping
    before = {name: table[name] for name in ("sdpa", "eager") if name in table}
    AttentionMaskInterface.register("sdpa", _written_out(False))
    AttentionMaskInterface.register("eager", _written_out(True))
    try:
        yield
    finally:
        table.update(before)


_UNSUPPORTED = (
    "head_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cache",
    "block_table",
)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: one ``llmc.attention`` node.

    The mask decides what may be read (as in transformers' own eager function); without one, the
    module's ``is_causal`` must be False.

    Args:
        query: [B, H, S, D]; key, value: [B, KV, S, D]; KV heads are not repeated.
        s_aux: attention sinks [H].
        position_bias: added to the scores, [B or 1, H, S, S].
    Raises:
        CaptureError: cross attention, a custom mask, dropout, or an argument that the op lacks.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    current = _current()
    where = type(module).__name__
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise CaptureError(f"expected plain attention, found {name}", where=where)
    if dropout:
        raise CaptureError(f"expected no dropout, found {dropout}", where=where, hint="call eval()")
    if not statically_known_true(query.shape[2] == key.shape[2]):
        raise CaptureError("expected self attention, found keys of another length", where=where)
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if causal or sliding_window is not None:
            raise CaptureError("expected a mask from the mask function, found none", where=where)
        rule = Rule(False, None)
    else:
        known = current.rules.get(id(attention_mask))
        if known is None:
            shape = tuple(attention_mask.shape)
            raise CaptureError(f"expected llmc's own mask, found a custom one {shape}", where=where)
        rule = known
    current.attentions += 1
    out = torch.ops.llmc.attention(
        query, key, value, current.positions, current.positions, attention_mask, position_bias,
        s_aux, scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        causal=rule.causal, window=rule.window, softcap=None if softcap is None else float(softcap),
    )  # fmt: skip
    return out, None


def _activation(module: Any) -> str:
    from transformers import activations

    known: dict[type, str] = {
        torch.nn.SiLU: "silu", torch.nn.ReLU: "relu", torch.nn.Sigmoid: "sigmoid",
        torch.nn.Tanh: "tanh",
    }  # fmt: skip
    for name, act in (
        ("SiLUActivation", "silu"), ("GELUActivation", "gelu"), ("GELUTanh", "gelu_tanh"),
        ("NewGELUActivation", "gelu_tanh"), ("PytorchGELUTanh", "gelu_tanh"),
        ("ReLUSquaredActivation", "relu2"),
    ):  # fmt: skip
        if hasattr(activations, name):
            known[getattr(activations, name)] = act
    if isinstance(module, torch.nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    found = known.get(type(module))
    if found is None:
        raise CaptureError(
            f"expected a known activation in the experts, found {type(module).__name__}"
        )
    return found


def experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function: one ``llmc.experts`` node.

    Raises:
        CaptureError: biases, transposed or interleaved weights, or a gate unlike act(gate) · up.
    """
    from transformers.integrations import moe

    where = type(module).__name__
    odd = [
        name
        for name, want in (
            ("has_gate", True), ("has_bias", False), ("is_transposed", False),
            ("is_concatenated", True), ("has_post_expert_norm", False),
            ("_is_expert_parallel", False),
        )
        if getattr(module, name, want) != want
    ]  # fmt: skip
    default = getattr(moe, "_default_apply_gate", None)
    if getattr(type(module), "_apply_gate", None) is not default:
        odd.append("_apply_gate")
    if odd:
        raise CaptureError(f"expected plain gated experts, found {', '.join(odd)}", where=where)
    out: torch.Tensor = torch.ops.llmc.experts(
        hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj,
        act=_activation(module.act_fn),
    )  # fmt: skip
    return out


def register() -> None:
    """Register the three functions under the name ``llmc``; again is harmless."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    ExpertsInterface.register(NAME, experts)
