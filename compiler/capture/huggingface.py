"""Hugging Face models: found, checked, built without weight memory, and traced."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import CaptureError, ModelError
from ..ir.graph import Program
from . import foreign, interface
from .checkpoint import Checkpoint, read_json
from .export import TRACE_BATCH, TRACE_SEQ, trace, traced
from .importer import import_graph
from .keys import leaves_by_name, unread
from .sources import Leaf
from .twin import live_leaves, weightless_copy

# What attention is built with, best first: one node, then aten's own op, then written out.
_ATTENTION = (interface.NAME, "sdpa", "eager")
_PREFIX = "llmc_model"
_AXES = {"input_ids": ("B", "S"), "position_ids": ("B", "S"), "attention_mask": ("B", "S")}


def find(source: str | Path) -> Path:
    """The local folder of a model: the given one, else the hub's snapshot of that id.

    Raises:
        ModelError: neither a folder nor a hub id that can be had.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if all((path / n).is_file() for n in ("manifest.json", "program.json")):
            raise ModelError(
                f"expected a model, found an artefact at {path}",
                hint="compile the model that it was made from, with all passes in one recipe",
            )
        return path
    text = str(source)
    hub_like = text.count("/") <= 1 and not text.startswith((".", "/", "~")) and not path.exists()
    if not hub_like:
        found = "a file" if path.exists() else "nothing"
        raise ModelError(f"expected a model folder, found {found} at {text!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
        )
    except Exception as e:  # the hub client raises network, auth and lookup errors of many types
        raise ModelError(
            f"expected a model folder or a reachable hub id, found neither for {text!r} "
            f"({type(e).__name__})",
            hint="give a local folder, or check the id and the network",
        ) from None


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder.

    Raises:
        ModelError: no valid config.json, an unknown model type, or code in the repository that was
            not asked for.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelError(
            "expected config.json in the model folder, found none", where=str(folder),
            hint="point at the folder that save_pretrained wrote",
        )  # fmt: skip
    raw = read_json(folder / "config.json")
    if "auto_map" in raw and not trust_remote_code:
        raise ModelError(
            "expected a model of transformers, found one with its own code (auto_map)",
            where="config.json", hint="pass trust_remote_code=True if you trust that code",
        )  # fmt: skip
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as e:  # transformers validates configs with many exception types
        text = " ".join(str(e).split())[:200]
        raise ModelError(
            f"expected a config of a known model, found: {text}", where="config.json"
        ) from None
    # How weights are stored is read in .foreign; the model itself is built dense.
    config.__dict__.pop("quantization_config", None)
    return config


def model_class(config: Any, folder: Path | None = None, trust_remote_code: bool = False) -> Any:
    """The class that ``architectures`` names, else the auto class of the model type.

    Raises:
        ModelError: transformers knows no such model.
    """
    import transformers

    auto = getattr(config, "auto_map", None) or {}
    if trust_remote_code and folder is not None and auto:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        for key in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
            if key in auto:
                return get_class_from_dynamic_module(auto[key], str(folder))
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ModelError(f"expected a model that transformers knows, found {config.model_type!r}")


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters made inside land on the meta device; buffers, being computed, stay real."""
    register = torch.nn.Module.register_parameter

    def on_meta(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            twin = torch.nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            twin.__dict__.update(param.__dict__)
            self._parameters[name] = twin

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def build(config: Any, cls: Any) -> tuple[Any, str]:
    """The model without weight memory in evaluation mode, and its attention implementation.

    Raises:
        ModelError: the model class refuses its config.
    """
    interface.register()
    last: Exception | None = None
    settable = getattr(cls, "_can_set_attn_implementation", lambda: True)()
    for attention in _ATTENTION if settable else _ATTENTION[1:]:
        try:
            with _weightless(), torch.device("cpu"):
                model = cls._from_config(
                    copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention,
                    experts_implementation=interface.NAME,
                )  # fmt: skip
            return model.eval(), attention
        except (KeyError, ValueError, NotImplementedError) as e:
            # A class without the attention interface refuses our name in one of these ways; the
            # next implementation is tried, and the last refusal is what the user is told.
            last = e
    text = " ".join(str(last).split())[:200]
    raise ModelError(f"expected a config that {cls.__name__} accepts, found: {text}") from None


class _Door(torch.nn.Module):
    """The model with the three inputs that llmc uses and its first output."""

    def __init__(self, model: Any, accepts: set[str], session: interface.Session) -> None:
        super().__init__()
        self.llmc_model = model
        self.accepts = accepts
        self.session = session

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        # The tracer names each input's sizes apart; saying that they agree makes them one.
        for other in (position_ids, attention_mask):
            torch._check(other.shape[0] == input_ids.shape[0])
            torch._check(other.shape[1] == input_ids.shape[1])
        given = {"position_ids": position_ids, "attention_mask": attention_mask, "use_cache": False}
        kwargs = {k: v for k, v in given.items() if k in self.accepts}
        with interface.session(position_ids, self.session):
            out = self.llmc_model(input_ids=input_ids, return_dict=True, **kwargs)
        first = out.logits if "logits" in out else out[0]
        result: torch.Tensor = first
        return result


def _accepted(model: Any) -> set[str]:
    """Which optional inputs ``forward`` takes; one that hands everything on is looked through."""
    known = {"position_ids", "attention_mask", "use_cache"}
    for kind in type(model).__mro__:
        if "forward" in kind.__dict__:
            names = inspect.signature(kind.__dict__["forward"]).parameters
            if "input_ids" in names:
                return {
                    n
                    for n in known
                    if n in names or (n == "use_cache" and "past_key_values" in names)
                }
    raise CaptureError("expected a model that takes input_ids", where=type(model).__name__)


def facts_of(config: Any, model: Any, folder: Path | None) -> dict[str, Any]:
    """Small JSON-able facts: vocabulary, context, special tokens, and the config for export."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def number(*names: str) -> int | None:
        for name in names:
            value = getattr(text, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    def tokens(name: str) -> list[int]:
        value = getattr(text, name, None)
        values = value if isinstance(value, (list, tuple)) else [value]
        return [int(v) for v in values if isinstance(v, int)]

    raw = read_json(folder / "config.json") if folder is not None else json_dict(config)
    raw.pop("quantization_config", None)
    return {
        "model_type": str(config.model_type),
        "architecture": type(model).__name__,
        "vocab": number("vocab_size"),
        "context": number("max_position_embeddings", "n_positions", "max_sequence_length"),
        "bos": tokens("bos_token_id"),
        "eos": tokens("eos_token_id"),
        "pad": tokens("pad_token_id"),
        "tokenizer": str(folder) if folder is not None and _has_tokenizer(folder) else None,
        "config": raw,
    }


def json_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON."""
    import json

    out: dict[str, Any] = json.loads(config.to_json_string())
    return out


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    )


def trace_model(
    model: Any, leaves: dict[str, Leaf], facts: dict[str, Any], attention: str
) -> Program:
    """Trace a built model (fake parameters allowed) into a program.

    Args:
        leaves: stored tensors by the model's parameter and buffer names.
        facts: ends up in the program.
        attention: the attention implementation that the model was built with.
    Raises:
        CaptureError: the model does not trace, or its attention cannot be expressed.
    """
    ids = torch.zeros(TRACE_BATCH, TRACE_SEQ, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "position_ids": torch.arange(TRACE_SEQ)[None].expand(TRACE_BATCH, -1).contiguous(),
        "attention_mask": torch.ones(TRACE_BATCH, TRACE_SEQ, dtype=torch.bool),
    }
    session = interface.Session(None)
    door = _Door(model, _accepted(model), session).eval()
    context = facts.get("context")
    limits = {"S": context} if isinstance(context, int) and context > TRACE_SEQ else {}
    with nullcontext() if attention == interface.NAME else interface.written_out():
        exported = trace(door, inputs, _AXES, limits)
    session.check()
    if attention == interface.NAME and session.attentions == 0:
        raise CaptureError("expected attention through transformers' interface, found none")
    names = {n: n for n in exported.graph_signature.user_inputs if n in _AXES}
    return import_graph(traced(exported, leaves, names, _AXES, _PREFIX), facts)


def capture_folder(
    folder: Path, trust_remote_code: bool = False
) -> tuple[Program, foreign.Coded | None]:
    """Capture a model folder; no tensor is read.

    Returns:
        The program with dense weights, and which of them the checkpoint holds as codes.
    Raises:
        ModelError, CaptureError: see :func:`llmc.compiler.capture.capture`.
    """
    checkpoint = Checkpoint(folder)
    config = read_config(folder, trust_remote_code)
    cls = model_class(config, folder, trust_remote_code)
    model, attention = build(config, cls)
    coded = foreign.read(checkpoint, model)
    source = checkpoint if coded is None else coded.view
    leaves = leaves_by_name(model, source)
    facts = facts_of(config, model, folder) | {"unread": unread(model, source)}
    if coded is not None:
        facts["quantised"] = coded.facts()
    fake(model)
    return trace_model(model, leaves, facts, attention), coded


def capture_model(model: Any) -> Program:
    """Capture a live transformers model; it is not modified, its tensors are referred to.

    Raises:
        CaptureError: it cannot be copied, traced or expressed.
    """
    interface.register()
    twin = weightless_copy(model)
    set_attention = getattr(twin, "set_attn_implementation", None)
    if set_attention is not None and twin._can_set_attn_implementation():  # type: ignore[operator]
        set_attention(interface.NAME)
    if twin._can_set_experts_implementation():  # type: ignore[operator]
        twin.set_experts_implementation(interface.NAME)  # type: ignore[operator]
    attention = str(twin.config._attn_implementation)  # type: ignore[union-attr]
    return trace_model(twin, live_leaves(model), facts_of(model.config, model, None), attention)


def fake(model: torch.nn.Module) -> None:
    """Replace meta parameters, and buffers, by fake CPU tensors; ties are kept."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twins: dict[int, Any] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in twins:
                    with mode:
                        empty = torch.empty(param.shape, dtype=param.dtype)
                    twins[id(param)] = torch.nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = twins[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in twins:
                    twins[id(buffer)] = mode.from_tensor(buffer)
                module._buffers[name] = twins[id(buffer)]
