"""Lifts of attention that models write themselves: aten's own op, or softmax of masked scores."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...ir.dims import dim, divide, same, same_shape
from ...ir.graph import Program, tensor_type
from ...ir.ops import row_of
from .matching import Either, Last, Lift, Match, Number, Var, call
from .rules import Lengths, MaskRule, additive_rule, rule_of

_MADE_BY = "normalise.attention"
_SDPA = "scaled_dot_product_attention.default"
_DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def _sdpa(program: Program, found: Match) -> fx.Node | str:
    node = found.root
    q, k, v, *rest = node.args
    names = list(_DEFAULTS)
    given = {**_DEFAULTS, **dict(zip(names, rest, strict=False)), **node.kwargs}
    if given["dropout_p"]:
        return f"expected no dropout, found {given['dropout_p']}"
    scale, mask = given["scale"], given["attn_mask"]
    bias: Any = None
    rule: MaskRule | str = MaskRule(bool(given["is_causal"]))
    if isinstance(mask, fx.Node):
        if tensor_type(mask).dtype.is_floating_point:
            rule = additive_rule(program, mask, _lengths(q, k))
            if isinstance(rule, str):
                # Whatever it holds, an additive mask is a bias.
                rule, bias = MaskRule(False), mask
        else:
            rule = rule_of(program, mask, _lengths(q, k))
    if isinstance(rule, str):
        return rule
    return _emit(program, found, q, k, v, scale, rule, bias)


def _lengths(q: Any, k: Any) -> Lengths:
    return tensor_type(q).shape[-2], tensor_type(k).shape[-2]


def _emit(
    program: Program, found: Match, q: Any, k: Any, v: Any, scale: Any, rule: MaskRule, bias: Any
) -> fx.Node | str:
    """The attention node and the transpose back to [B, H, S, D]."""
    if any(tensor_type(t).rank != 4 for t in (q, k, v)):
        return f"expected q, k, v [B, H, S, D], found {tensor_type(q)}"
    k, v = _unrepeated(k, v)
    size, heads = tensor_type(q).shape[-1], tensor_type(q).shape[1]
    if not isinstance(size, int) or not same(size, tensor_type(k).shape[-1]):
        return f"expected one head size, found {tensor_type(q)} and {tensor_type(k)}"
    if not same(tensor_type(k).shape[1], tensor_type(v).shape[1]):
        return "expected as many key heads as value heads"
    if divide(heads, tensor_type(k).shape[1]) is None:
        return f"expected query heads divisible by key heads, found {tensor_type(q)}"
    if rule.causal and not same(tensor_type(q).shape[2], tensor_type(k).shape[2]):
        return "expected self attention, found keys of another length"
    attrs: dict[str, Any] = {"scale": float(size**-0.5 if scale is None else scale)}
    if not rule.causal:
        attrs["causal"] = False
    if rule.window is not None:
        attrs["window"] = rule.window
    args = [q, k, v, rule.q_pos, rule.k_pos, rule.k_valid, bias]
    while args[-1] is None:
        args.pop()
    root = found.root
    new = program.emit("llmc.attention", *args, before=root, made_by=_MADE_BY, like=root, **attrs)
    return program.emit("aten.transpose.int", new, 1, 2, before=root, made_by=_MADE_BY, like=root)


def _unrepeated(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """k and v before their heads were repeated for the query groups, where both were, alike."""
    one, two = _before_repeat(k), _before_repeat(v)
    if one is None or two is None:
        return k, v
    if not same(tensor_type(one).shape[1], tensor_type(two).shape[1]):
        return k, v
    return one, two


def _before_repeat(node: fx.Node) -> fx.Node | None:
    """x [B, KV, S, D] of reshape(expand(unsqueeze(x, 2), groups in axis 2)): repeated in place."""
    if node.op != "call_function" or row_of(node).name != "aten.reshape.default":
        return None
    wide = node.args[0]
    if not isinstance(wide, fx.Node) or wide.op != "call_function":
        return None
    if row_of(wide).name == "aten.clone.default":
        wide = wide.args[0]
    assert isinstance(wide, fx.Node)
    if wide.op != "call_function" or row_of(wide).name != "aten.expand.default":
        return None
    narrow = wide.args[0]
    if not isinstance(narrow, fx.Node) or narrow.op != "call_function":
        return None
    if row_of(narrow).name != "aten.unsqueeze.default" or narrow.args[1] not in (2, -3):
        return None
    x = narrow.args[0]
    assert isinstance(x, fx.Node)
    b, kv, g, s, d = tensor_type(wide).shape
    ok = tensor_type(x).rank == 4 and all(
        same(p, q) for p, q in zip(tensor_type(node).shape, (b, kv * g, s, d), strict=True)
    )
    return x if ok else None


SDPA = Lift("attention", (call(_SDPA, Var("q")),), _sdpa, anchors=(f"aten.{_SDPA}",))

_TURNED_K = Either((call("transpose.int", Var("k"), 2, 3), call("transpose.int", Var("k"), -2, -1)))
_DOT = Either(
    (
        call("mul.Tensor", call("matmul.default", Var("q"), _TURNED_K), Number("scale")),
        call("div.Tensor", call("matmul.default", Var("q"), _TURNED_K), Number("divisor")),
        call("matmul.default", Var("q"), _TURNED_K),
    )
)
_SCORES = Either(
    (
        call("masked_fill.Scalar", _DOT, Var("masked"), Number("low")),
        call("add.Tensor", _DOT, Var("added")),
        _DOT,
    )
)
_SOFTMAX = Either((call("softmax.int", _SCORES, Last()), call("_softmax.default", _SCORES, Last())))


def _eager(program: Program, found: Match) -> fx.Node | str:
    b = found.bound
    scale = float(b["scale"]) if "scale" in b else 1.0 / float(b.get("divisor", 1.0))
    rule: MaskRule | str = MaskRule(False)
    bias = None
    if "masked" in b:
        if b["low"] > -1e4:
            return f"expected a very low fill, found {b['low']}"
        rule = rule_of(program, b["masked"], _lengths(b["q"], b["k"]), inverted=True)
    elif "added" in b:
        if not isinstance(b["added"], fx.Node):
            return "expected a mask tensor"
        rule = additive_rule(program, b["added"], _lengths(b["q"], b["k"]))
        if isinstance(rule, str):
            rule, bias = MaskRule(False), b["added"]
    if isinstance(rule, str):
        return rule
    return _emit(program, found, b["q"], b["k"], b["v"], scale, rule, bias)


EAGER = Lift("attention", (call("matmul.default", _SOFTMAX, Var("v")),), _eager)


def _flat(name: str, *, free: bool = False) -> Any:
    """A value [B, H, …] viewed as [B·H, …]."""
    return call("reshape.default", Var(name), Var(f"{name}_to"), bind=f"{name}_flat", free=free)


# Heads folded into the batch for a batched product, the bias added by it (bloom).
_FOLDED_SCORES = call(
    "baddbmm.default", _flat("bias", free=True), _flat("q"),
    call("transpose.int", _flat("k"), 1, 2), bind="core",
)  # fmt: skip
_FOLDED_SOFTMAX = call(
    "softmax.int",
    call("add.Tensor", call("reshape.default", _FOLDED_SCORES, Var("scores_to")), Var("added")),
    Last(),
)


def _folded(program: Program, found: Match) -> fx.Node | str:
    b = found.bound
    q, k, v, bias, core = (b[key] for key in ("q", "k", "v", "bias", "core"))
    if core.kwargs.get("beta", 1) != 1:
        return f"expected a bias that is added whole, found {core.kwargs['beta']} of it"
    wide = tensor_type(found.root).shape
    for name, t in (("q", q), ("k", k), ("v", v)):
        kept = tensor_type(t).shape
        want = (dim(kept[0] * kept[1]), *kept[2:])
        if len(kept) != 4 or not same_shape(tensor_type(b[f"{name}_flat"]).shape, want):
            return f"expected heads folded into the batch, found {tensor_type(t)}"
    if not same_shape(tensor_type(q).shape, wide):
        return f"expected heads unfolded again, found {tensor_type(found.root)}"
    each_key = (dim(wide[0] * wide[1]), 1, tensor_type(k).shape[2])
    if not same_shape(tensor_type(bias).shape, (*wide[:2], each_key[2])):
        return f"expected a bias [B, H, S], found {tensor_type(bias)}"
    if not same_shape(tensor_type(b["bias_flat"]).shape, each_key):
        return f"expected one bias of each key, found {tensor_type(b['bias_flat'])}"
    if not isinstance(b["added"], fx.Node):
        return "expected a mask tensor"
    rule = additive_rule(program, b["added"], _lengths(q, k))
    if isinstance(rule, str):
        return rule
    each = program.emit(
        "aten.unsqueeze.default", bias, 2, before=found.root, made_by=_MADE_BY, like=found.root
    )
    return _emit(program, found, q, k, v, core.kwargs.get("alpha", 1.0), rule, each)


FOLDED = Lift(
    "attention",
    (
        call(
            "reshape.default",
            call(
                "bmm.default",
                call("reshape.default", _FOLDED_SOFTMAX, Var("weights_to")),
                _flat("v"),
            ),
            Var("back"),
        ),
    ),
    _folded,
    anchors=("aten.baddbmm.default",),
)
