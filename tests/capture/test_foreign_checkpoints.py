"""Other tools' quantised checkpoints, read as codes: exact, lazy, and refused where they lie."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from foreign_folders import AWQ_ORDER, config, decode_awq, random_gptq, rewrite
from tiny_models import make

from llmc.compiler import api
from llmc.compiler.capture import capture
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import Program

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False,
         "num_hidden_layers": 1}  # fmt: skip
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense llama."""
    folder = tmp_path_factory.mktemp("dense")
    make("llama", **SIZES).save_pretrained(folder)
    return folder


def linears(tensors: Tensors) -> list[str]:
    """Paths of the block's linears."""
    return [n.removesuffix(".weight") for n in sorted(tensors) if "proj.weight" in n]


def expected(folder: Path, weights: Tensors) -> torch.Tensor:
    """Logits of the dense model with these weights, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    state = {f"{path}.weight": w for path, w in weights.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same(folder: Path, want: torch.Tensor) -> Program:
    """What llmc reads computes that, from codes."""
    model = api.open_any(folder)
    assert model.program.weights.loads == 0
    have = model(IDS)
    assert float((have - want).abs().max()) <= 1e-5 * float(want.abs().max())
    return model.program


@pytest.mark.parametrize(
    ("bits", "group", "version", "symmetric", "ordered"),
    [(4, 32, 1, True, False), (4, 16, 2, False, True), (3, 32, 1, False, True),
     (8, 32, 1, True, True), (2, 32, 2, False, False)],
)  # fmt: skip
def test_gptq(
    dense: Path, tmp_path: Path, bits: int, group: int, version: int, symmetric: bool, ordered: bool
) -> None:
    """Both versions, all widths, orders of desc_act: equal to the definition, and packed."""
    folder = tmp_path / "gptq"
    shutil.copytree(dense, folder)
    g, weights = torch.Generator().manual_seed(bits), Tensors()

    def quantise(tensors: Tensors) -> None:
        for path in linears(tensors):
            rows, columns = tensors.pop(f"{path}.weight").shape
            order = torch.randperm(columns, generator=g) if ordered else None
            width = min(group, columns) if columns % group == 0 else 32
            made, weights[path] = random_gptq(
                rows, columns, bits, width, version, symmetric, order, g
            )
            tensors.update({f"{path}.{k}": t for k, t in made.items()})

    rewrite(folder, quantise)
    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
        "desc_act": ordered, "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "dynamic": {"+:.*down_proj": {"bits": bits, "group_size": 32}, "-:.*lm_head": {}},
    }  # fmt: skip
    config(folder, lambda raw: raw.update(quantization_config=settings))
    program = same(folder, expected(dense, weights))
    decodes = list(program.calls("llmc.dequantize"))
    assert len(decodes) == 7
    assert all((len(d.args) == 2) == symmetric for d in decodes)
    assert len(list(program.calls("aten.index_select.default"))) == (7 if ordered else 0)
    assert program.facts["quantised"]["method"] == "gptq"
    assert "quantization_config" not in program.facts["config"]


def test_awq(dense: Path, tmp_path: Path) -> None:
    """The interleaved words of AutoAWQ."""
    folder = tmp_path / "awq"
    shutil.copytree(dense, folder)
    g, weights = torch.Generator().manual_seed(0), Tensors()

    def quantise(tensors: Tensors) -> None:
        for path in linears(tensors):
            rows, columns = tensors.pop(f"{path}.weight").shape
            made = {
                "qweight": _words(torch.randint(16, (columns, rows), generator=g)),
                "qzeros": _words(torch.randint(16, (columns // 32, rows), generator=g)),
                "scales": (torch.rand(columns // 32, rows, generator=g) * 0.05).half(),
            }
            weights[path] = decode_awq(made.__getitem__)
            tensors.update({f"{path}.{k}": t for k, t in made.items()})

    rewrite(folder, quantise)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                "version": "GEMM", "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    config(folder, lambda raw: raw.update(quantization_config=settings))
    same(folder, expected(dense, weights))


def _words(q: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(q.shape[0], q.shape[1] // 8, dtype=torch.int64)
    for k, place in enumerate(AWQ_ORDER):
        out |= q[:, place::8] << (4 * k)
    return torch.where(out >= 1 << 31, out - (1 << 32), out).int()


# ** compressed-tensors, written by its own package **

GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def settings(weights: dict[str, Any], form: str, **more: Any) -> dict[str, Any]:
    """A quantization_config with one group."""
    group = {"targets": ["Linear"], "weights": weights, **more}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["re:.*head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip


def compressed(dense: Path, folder: Path, told: dict[str, Any]) -> Tensors:
    """Write a folder with the package's own compressor; return the weights that it decodes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**told["config_groups"]["group_0"])
    tool = BaseCompressor.get_value_from_registry(told["format"])
    g, weights = torch.Generator().manual_seed(3), Tensors()
    shutil.copytree(dense, folder)

    def quantise(tensors: Tensors) -> None:
        for path in linears(tensors):
            weight = tensors.pop(f"{path}.weight")
            assert scheme.weights is not None
            size = scheme.weights.group_size or weight.shape[1]
            folded = weight.unflatten(1, (-1, size))
            top = 448.0 if scheme.weights.type == "float" else 2.0 ** (scheme.weights.num_bits - 1)
            given = {"weight": weight, "weight_scale": folded.abs().amax(-1) / top}
            if not scheme.weights.symmetric:
                shape = given["weight_scale"].shape
                given["weight_zero_point"] = torch.randint(-7, 8, shape, generator=g).to(torch.int8)
            made = tool.compress(given, scheme)
            weights[path] = tool.decompress(made, scheme)["weight"]
            if scheme.input_activations is not None and not scheme.input_activations.dynamic:
                made["input_scale"] = torch.tensor([0.02])
            tensors.update({f"{path}.{k}": t.contiguous() for k, t in made.items()})

    rewrite(folder, quantise)
    config(folder, lambda raw: raw.update(quantization_config=told))
    return weights


@pytest.mark.parametrize(
    "told",
    [
        settings(GROUP, "pack-quantized"),
        settings(GROUP | {"symmetric": False}, "pack-quantized"),
        settings({"num_bits": 8, "strategy": "channel"}, "int-quantized",
                 input_activations={"num_bits": 8, "strategy": "token", "dynamic": True}),
        settings({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized",
                 input_activations={"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ],
    ids=["packed", "uneven", "bytes", "floats"],
)  # fmt: skip
def test_compressed_tensors(dense: Path, tmp_path: Path, told: dict[str, Any]) -> None:
    """What the package compressed is what it decompresses, and inputs are rounded once."""
    from llmc.compiler.runtime.exporting.codes import without_grids

    weights = compressed(dense, tmp_path / "ct", told)
    program = capture(tmp_path / "ct")
    plain, grids = without_grids(program)
    same_program = api.Model(plain, None, {})
    want = expected(dense, weights)
    assert float((same_program(IDS) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    inputs = told["config_groups"]["group_0"].get("input_activations")
    assert len(grids) == (7 if inputs else 0)
    rounded = len(list(program.calls("llmc.round_input")))
    assert rounded == (0 if not inputs else 4 if inputs.get("dynamic") else 7)
    if inputs:
        assert bool(torch.isfinite(api.Model(program, None, {})(IDS)).all())


# ** what is refused **


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound pack-quantized folder."""
    folder = tmp_path_factory.mktemp("packed") / "ct"
    compressed(dense, folder, settings(GROUP, "pack-quantized"))
    return folder


Q = "model.layers.0.self_attn.q_proj"


def _told(**changes: Any) -> Callable[[Path], None]:
    return lambda f: config(f, lambda raw: raw["quantization_config"].update(changes))


def _weights(**changes: Any) -> Callable[[Path], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return lambda f: config(f, change)


def _gone(name: str) -> Callable[[Path], None]:
    return lambda f: rewrite(f, lambda t: {k: v for k, v in t.items() if k != name})


def _set(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda f: rewrite(f, lambda t: t | {name: value(t[name]).contiguous()})


def _nan(t: torch.Tensor) -> torch.Tensor:
    t[1, 0] = torch.nan
    return t


# The first seven are those that transformers 5.23 loads with other numbers and no error.
CORRUPT = [
    (_gone(f"{Q}.weight_scale"), f"expected a tensor '{Q}.weight_scale' in the checkpoint"),
    (_gone(f"{Q}.weight_packed"), f"expected a tensor '{Q}.weight_packed' in the checkpoint"),
    (_set(f"{Q}.weight_scale", _nan), f"found 1 NaN or infinite in '{Q}.weight_scale'"),
    (_set(f"{Q}.weight_shape", lambda t: t + torch.tensor([0, 4])), f"expected '{Q}.weight"),
    (_told(ignore=[]), "expected lm_head.weight_packed, as config_groups.group_0 says"),
    (_told(quantization_status="frozen"), "quantization_status: expected compressed, found"),
    (lambda f: config(f, lambda raw: raw.pop("quantization_config")), "a quantization_config besi"),
    (_gone(f"{Q}.weight_shape"), f"expected a tensor '{Q}.weight_shape' in the checkpoint"),
    (_set(f"{Q}.weight_scale", lambda t: t[:, :1]), f"expected '{Q}.weight_scale' [64, 2]"),
    (_weights(grup_size=32), "config_groups.group_0.weights: expected fields of"),
    (_weights(group_size=64), "_scale' [64, 1] (config_groups.group_0), found [64, 2]"),
    (_weights(group_size=48), "with inputs in whole groups of 48, found 64"),
    (_weights(num_bits=8), "_packed' [64, 16] (8 bits of the shape"),
    (_weights(symmetric=False), "_proj.weight_zero_point' in the checkpoint, found none"),
    (_weights(actorder="group"), "actorder: expected null, weight or static, found 'group'"),
    (_told(format="pack-quantised"), "format: expected pack-quantized or int-quantized"),
    (_told(format="marlin-24"), "format: expected pack-quantized or int-quantized"),
    (_told(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format: expected de"),
    (_told(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: expected null, found"),
    (_told(transform_config={"R1": {}}), "transform_config: expected null, found 'rotations'"),
    (_told(quant_method="bitsandbytes"), "quant_method: expected one of compressed-tensors, gptq"),
    (_told(ignore=["re:(a+)+b"]), "targets: expected simple patterns of at most 256 characters"),
    (_set(f"{Q}.weight_packed", lambda t: t.float()), "_packed' of int32, found float32"),
    (_told(config_groups={}), "config_groups: expected an object of at least one group"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), CORRUPT)
def test_corrupt_checkpoints_are_refused(
    packed: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    """By name, before a logit is computed: seven of these load silently elsewhere."""
    folder = tmp_path / "bad"
    shutil.copytree(packed, folder)
    damage(folder)
    with pytest.raises(ModelError, match=re.escape(words)) as found:
        api.open_any(folder)(IDS)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("over", "damage", "words"),
    [
        ({"bits": 5}, None, "bits: expected 2 or 3 or 4 or 8, found 5"),
        ({"bits": 8}, None, "of 8 bits, group 32, found qweight [8, 64]"),
        ({"rotation": "hadamard"}, None, "rotation: expected null, found 'hadamard'"),
        ({"format": "marlin"}, None, "checkpoint_format: expected gptq or gptq_v2, found 'marl"),
        ({"checkpoint_format": "gptq_p"}, None, "checkpoint_format: expected gptq or gptq_v2"),
        ({"checkpoint_format": "gptq_v2"}, None, "look like those of checkpoint_format=gptq: is"),
        ({"desc_act": True}, _set(f"{Q}.g_idx", torch.zeros_like), "32 inputs in each group"),
        ({}, _set(f"{Q}.g_idx", lambda t: t.flip(0)), "g_idx' in order, as desc_act=false says"),
        ({"sym": False}, _set(f"{Q}.qzeros", lambda t: t - 1 - t), "found 16, which means 0 to"),
        ({}, _gone(f"{Q}.qzeros"), "qzeros' in the checkpoint, found none"),
        ({"dynamic": "x"}, None, "dynamic: expected an object of rules, found 'x'"),
        ({"group_size": "128"}, None, "group_size: expected a number of inputs, or -1"),
    ],
)  # fmt: skip
def test_corrupt_gptq_is_refused(
    dense: Path, tmp_path: Path, over: dict[str, Any], damage: Callable[[Path], None] | None,
    words: str,
) -> None:  # fmt: skip
    """Wrong labels, zeros of the other version and orders that cannot be sorted are named."""
    folder, g = tmp_path / "gptq", torch.Generator().manual_seed(0)
    shutil.copytree(dense, folder)

    def quantise(tensors: Tensors) -> None:
        tensors.pop(f"{Q}.weight")
        made, _ = random_gptq(64, 64, 4, 32, 1, True, None, g)
        tensors.update({f"{Q}.{k}": t for k, t in made.items()})

    rewrite(folder, quantise)
    told = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, **over}
    config(folder, lambda raw: raw.update(quantization_config=told))
    if damage is not None:
        damage(folder)
    with pytest.raises(ModelError, match=re.escape(words)):
        api.open_any(folder)(IDS)


def test_other_modules_are_refused(tmp_path: Path) -> None:
    """Codes of what is no linear: GPT-2's Conv1D holds its weight the other way round."""
    folder, g = tmp_path / "gpt2", torch.Generator().manual_seed(0)
    path = "transformer.h.0.mlp.c_fc"
    make("gpt2").save_pretrained(folder)
    made, _ = random_gptq(32, 32, 4, 32, 1, True, None, g)
    rewrite(folder, lambda t: {
        **{k: v for k, v in t.items() if k != f"{path}.weight"},
        **{f"{path}.{k}": v for k, v in made.items()},
    })  # fmt: skip
    told = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    config(folder, lambda raw: raw.update(quantization_config=told))
    with pytest.raises(ModelError, match=f"a Linear at '{path}', found a Conv1D"):
        capture(folder)


def test_stacked_experts_stay_codes(tmp_path: Path) -> None:
    """Experts that a checkpoint holds one by one become codes of the stack, row below row."""
    dense, folder = tmp_path / "dense", tmp_path / "gptq"
    make("mixtral", num_hidden_layers=1, intermediate_size=64).save_pretrained(dense)
    shutil.copytree(dense, folder)
    g, weights = torch.Generator().manual_seed(5), Tensors()

    def quantise(tensors: Tensors, only: str = "experts") -> None:
        for name in [n for n in sorted(tensors) if only in n and n.endswith(".weight")]:
            path = name.removesuffix(".weight")
            made, weights[name] = random_gptq(*tensors.pop(name).shape, 4, 32, 2, False, None, g)
            tensors.update({f"{path}.{k}": t for k, t in made.items()})

    rewrite(folder, quantise)
    assert len(weights) == 12
    told = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False,
            "checkpoint_format": "gptq_v2"}  # fmt: skip
    config(folder, lambda raw: raw.update(quantization_config=told))
    rewrite(dense, lambda t: t | weights)
    model, want = api.open_any(folder), api.open_any(dense)(IDS)
    assert float((model(IDS) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    shapes = [n.meta["llmc"].type.shape for n in model.program.calls("llmc.dequantize")]
    assert sorted(shapes) == [(4 * 32, 64), (4 * 2 * 64, 32)]
    some = next(n for n in weights if ".experts.1." in n)
    rewrite(folder, lambda t: {
        **{k: v for k, v in t.items() if not k.startswith(some.removesuffix("weight"))},
        some: weights[some],
    })  # fmt: skip
    with pytest.raises(ModelError, match="expected codes of all experts of a stack, found"):
        capture(folder)


# ** what can be done with it **


def test_codes_stay_codes(packed: Path, tmp_path: Path) -> None:
    """An imported program is compiled on, saved packed, and exported to another format."""
    from llmc.compiler.ir.errors import GateError

    program = capture(packed)
    with pytest.raises(
        GateError, match=r"found none: linear: dequantize_default.* is not a stored"
    ):
        api.compile(program, "w4:solver=rtn", calibration=IDS)
    model = api.compile(program, "kv8", calibration=IDS)
    model.save(tmp_path / "out", command=["test"])
    again = api.load(tmp_path / "out")
    assert len(list(again.program.calls("llmc.dequantize"))) == 7
    assert torch.equal(again(IDS), model(IDS))
    record = api.open_any(packed).export(tmp_path / "awq", format="awq")
    assert record["schemes"] == {"w4 g32": 7}
    assert api.open_any(tmp_path / "awq").program.facts["quantised"]["method"] == "awq"
