"""Exports of codes, loaded by other people's packages or decoded by the formats' definitions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from foreign_folders import decode_awq, decode_gptq
from tiny_models import make

from llmc.compiler import api
from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.model import Model

IDS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
FRESH = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False,
         "num_hidden_layers": 1}  # fmt: skip
Compile = Callable[..., Model]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """``compiled(passes)``: a tiny llama, rounded to the nearest; made once per string."""
    folder = tmp_path_factory.mktemp("source")
    make("llama", **SIZES).save_pretrained(folder)
    program, made = api.capture(folder), dict[str, Model]()

    def get(passes: str, **more: Any) -> Model:
        key = f"{passes} {more}"
        if key not in made:
            given = more or {"passes": passes}
            made[key] = api.compile(program, calibration=IDS, **given)
        return made[key]

    return get


def logits(folder: Path, **more: Any) -> torch.Tensor:
    """What transformers and compressed-tensors load and compute, in fp32."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if more.pop("dense", False):
        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **more).eval()
    with torch.no_grad():
        return model(input_ids=FRESH).logits


def apart(have: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((have - want).abs().max() / want.abs().max())


def quantization(folder: Path) -> dict[str, Any]:
    """The written quantization_config."""
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


# ** compressed-tensors **


@pytest.mark.parametrize("passes", ["w4:group=32,prune24", "fp8"])
def test_transformers_computes_the_same(compiled: Compile, tmp_path: Path, passes: str) -> None:
    """Packed codes, zeros of a mask among them, and floats with inputs on a grid of their own."""
    model = compiled(passes)
    record = model.export(tmp_path / "out", format="compressed-tensors")
    assert record["quantised"] == 7
    assert record["difference"] <= 1e-6
    assert apart(logits(tmp_path / "out"), model(FRESH)) <= 1e-5
    assert quantization(tmp_path / "out")["ignore"] == ["lm_head"]
    again = api.open_any(tmp_path / "out")
    assert apart(again(FRESH), model(FRESH)) <= 1e-6
    assert again.program.facts["quantised"]["schemes"] == {next(iter(record["schemes"])): 7}
    assert again.program.weight_bytes() < sum(4 * w.numel() for w in weights(model).values())
    assert ("prune24" in passes) == ("zeros of the n:m mask" in " ".join(record["notes"]))


def test_asymmetric_codes_load_only_dense(compiled: Compile, tmp_path: Path) -> None:
    """As the note says: by default transformers raises, with dequantize=True all is equal."""
    model = compiled("w4:group=32,symmetric=false")
    record = model.export(tmp_path / "out", format="compressed-tensors")
    assert "dequantize=True" in record["notes"][0]
    assert apart(logits(tmp_path / "out", dense=True), model(FRESH)) <= 1e-5
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        logits(tmp_path / "out")


def test_bytes_beside_rounded_inputs(compiled: Compile, tmp_path: Path) -> None:
    """int-quantized: weights are exact; inputs keep their own conventions (127.5 against 127)."""
    from llmc.compiler.ir.interpret import run
    from llmc.compiler.runtime.exporting.codes import without_grids

    model = compiled("w8a8:act=static")
    model.export(tmp_path / "out", format="compressed-tensors")
    plain, grids = without_grids(model.program)
    assert {g.grid.short for g in grids.values()} == {"a8 static"}
    inputs = {"input_ids": FRESH, "position_ids": torch.arange(12).expand(2, -1),
              "attention_mask": torch.ones(2, 12, dtype=torch.bool)}  # fmt: skip
    want = run(plain, {n.name: inputs[n.name] for n in plain.inputs})
    assert apart(logits(tmp_path / "out", dense=True), want) <= 1e-5
    assert apart(logits(tmp_path / "out"), model(FRESH)) <= 0.1
    assert quantization(tmp_path / "out")["format"] == "int-quantized"


def test_several_schemes_and_dense_layers(compiled: Compile, tmp_path: Path) -> None:
    """Each scheme is a group of names; what was left dense is ignored, and stays exact."""
    recipe = {
        "version": 1,
        "stages": [{"w4": {"group": 32, "solver": "rtn"}}],
        "overrides": [
            {"where": {"role": ["down"]}, "set": {"w4": {"group": 16}}},
            {"where": {"role": ["o"]}, "skip": ["w4"]},
        ],
    }
    model = compiled("", recipe=recipe)
    model.export(tmp_path / "out", format="compressed-tensors")
    assert apart(logits(tmp_path / "out"), model(FRESH)) <= 1e-5
    told = quantization(tmp_path / "out")
    assert sorted(told["ignore"]) == ["lm_head", "model.layers.0.self_attn.o_proj"]
    targets = [g["targets"] for g in told["config_groups"].values()]
    assert ["model.layers.0.mlp.down_proj"] in targets
    model.export(tmp_path / "gptq", format="gptq")
    rules = quantization(tmp_path / "gptq")["dynamic"]
    assert rules["+:^model\\.layers\\.0\\.mlp\\.down_proj$"]["group_size"] == 16
    assert rules["-:^model\\.layers\\.0\\.self_attn\\.o_proj$"] == {}
    with pytest.raises(UsageError, match=r"group: expected 32 as in .*found 16 at .*down_proj"):
        model.export(tmp_path / "awq", format="awq")


# ** GPTQ and AWQ **


@pytest.mark.parametrize(
    ("passes", "bits", "version"),
    [("w4:group=32", 4, 1), ("w3:group=32,symmetric=false", 3, 2), ("w8:group=row", 8, 1)],
)
def test_gptq_decodes_as_it_is_defined(
    compiled: Compile, tmp_path: Path, passes: str, bits: int, version: int
) -> None:
    """Every code, zero point and scale, by a decoder that knows the definition alone."""
    from safetensors.torch import load_file

    model = compiled(passes)
    record = model.export(tmp_path / "out", format="gptq")
    told = quantization(tmp_path / "out")
    assert told["checkpoint_format"] == ("gptq" if version == 1 else "gptq_v2")
    assert told["bits"] == bits
    assert bool(record["notes"]) == (version == 2)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for path, weight in weights(model).items():
        found = decode_gptq(lambda part, p=path: tensors[f"{p}.{part}"], bits, version,
                            *weight.shape)  # fmt: skip
        assert torch.equal(found, weight)


@pytest.mark.parametrize("passes", ["w4:group=32", "w4:group=32,symmetric=false,prune24"])
def test_awq_is_converted_by_compressed_tensors(
    compiled: Compile, tmp_path: Path, passes: str
) -> None:
    """Their converter reads it exactly, and so does a decoder that knows the definition alone."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from safetensors.torch import load_file

    model = compiled(passes)
    model.export(tmp_path / "out", format="awq")
    told = quantization(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    converted = AutoAWQConverter.from_autoawq_config(told).process(dict(tensors))
    for path, weight in weights(model).items():
        assert torch.equal(decode_awq(lambda part, p=path: tensors[f"{p}.{part}"]), weight)
        rows, columns = converted[f"{path}.weight_shape"].tolist()
        q = unpack_from_int32(converted[f"{path}.weight_packed"], 4, (rows, columns))
        scale = converted[f"{path}.weight_scale"].float()
        shape = (rows, scale.shape[1])
        zero = unpack_from_int32(converted[f"{path}.weight_zero_point"], 4, shape, packed_dim=0)
        which = torch.arange(columns) // 32
        theirs = (q - zero[:, which].to(torch.int16)) * scale[:, which]
        assert torch.equal(theirs, weight)


def weights(model: Model) -> dict[str, torch.Tensor]:
    """The decoded weights fp32 [N, K] by module."""
    from llmc.compiler.capture.bisimulate import evaluate

    out = {}
    for linear in model.program.calls("aten.linear.default"):
        at: Any = linear.args[1]
        while at.op == "call_function":
            at = at.all_input_nodes[0]
        name = model.program.params[str(at.target)].names[0]
        if name.endswith(".codes"):
            path = name.removesuffix(".weight.codes")
            out[path] = evaluate(model.program, linear.args[1])
    assert len(out) == 7
    return out


# ** refusals **

REFUSED = [
    ("w3", "compressed-tensors", r"bits: expected 4 or 8, found 3 at model\.layers\.0\."),
    ("w8:group=32", "awq", r"bits: expected 4, found 8 at model\.layers\.0\."),
    ("w4:double=true", "compressed-tensors", r"found scales that are codes themselves .* at model"),
    ("nf4", "awq", r"codes: expected integers or 8-bit floats .* found nf levels at model"),
    ("spqr", "compressed-tensors", r"found weights kept beside the codes at model\.layers\.0"),
    ("int8_split", "compressed-tensors", r"columns: .* found outlier columns kept apart at model"),
    ("w4a8", "compressed-tensors", r"inputs: expected 8-bit .* found w4 .* a8 token at model"),
    ("w8a8", "gptq", r"inputs: expected inputs as they come, found a8 token at model\.layers\.0"),
    ("w4,lorc", "compressed-tensors", r"found aten\.add\.Tensor, made by lorc .* at model"),
    ("kv8", "awq", r"expected a program with a plain KV cache, found int8: awq has no place"),
    ("prune24", "compressed-tensors", r"expected weights that are codes, found none"),
]


@pytest.mark.parametrize(("passes", "form", "words"), REFUSED)
def test_what_a_format_cannot_hold_is_refused(
    compiled: Compile, tmp_path: Path, passes: str, form: str, words: str
) -> None:
    """In one line with the layer and the field, and nothing is written."""
    with pytest.raises(UsageError, match=words):
        compiled(passes).export(tmp_path / "out", format=form)
    assert not list(tmp_path.iterdir())


def test_fused_linears_share_a_scheme(compiled: Compile, tmp_path: Path) -> None:
    """Engines stack query, key and value, and gate and up: the odd one is named."""
    recipe = {
        "version": 1,
        "stages": [{"w4": {"group": 32, "solver": "rtn"}}],
        "overrides": [{"where": {"role": ["k"]}, "skip": ["w4"]}],
    }
    words = r"linears that serving engines fuse, found .*q_proj.*w4 g32; .*layers\.0.*k_proj: dense"
    with pytest.raises(UsageError, match=words):
        compiled("", recipe=recipe).export(tmp_path / "out", format="compressed-tensors")


def test_other_codes_read_back_leave_nothing(
    compiled: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One code that differs after writing is a failed gate; the layer is named."""
    from foreign_folders import rewrite

    from llmc.compiler.capture import write_back

    real = write_back.write

    def damaged(fitted: Any, folder: Path, *rest: Any) -> None:
        real(fitted, folder, *rest)
        rewrite(folder, lambda t: t["model.layers.0.mlp.up_proj.weight_packed"][3].bitwise_xor_(1))

    monkeypatch.setattr(write_back, "write", damaged)
    with pytest.raises(GateError, match=r"codes that were written, found others .*0\.mlp\.up_proj"):
        compiled("w4:group=32").export(tmp_path / "out", format="compressed-tensors")
    assert not list(tmp_path.iterdir())
