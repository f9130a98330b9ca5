"""GGUF: blocks by definition, files by transformers' own loader, refusals by layer and field."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make

from llmc.compiler import api
from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.runtime.exporting import gguf as exporting
from llmc.compiler.runtime.exporting.gguf_blocks import KINDS, blocks

gguf = pytest.importorskip("gguf")

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


@pytest.mark.parametrize(("bits", "symmetric"), list(KINDS))
def test_blocks_decode_to_the_codes(bits: int, symmetric: bool) -> None:
    """The gguf package reads each kind of block as scale times distance from the zero point."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (5, 192), generator=g).to(torch.uint8)
    scale = (torch.rand(5, 3, generator=g) + 0.1).half()
    zero = None if symmetric else torch.randint(0, 1 << bits, (5, 3), generator=g).to(torch.uint8)
    kind, size = KINDS[bits, symmetric]
    data = blocks(codes, scale, zero, bits)
    assert data.shape == (5, 6 * size)
    have = torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    offset = torch.full((5, 3), 1 << (bits - 1)) if zero is None else zero
    distance = codes.float() - offset.repeat_interleave(64, 1).float()
    want = distance * scale.float().repeat_interleave(64, 1)
    # m is fp16: a half of its last place at most.
    slack = 0.0 if symmetric else float((offset.float() * scale.float()).max()) * 2.0**-11
    assert (have - want).abs().max() <= slack + 1e-6


def logits(folder: Path) -> torch.Tensor:
    """What transformers computes from the file, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "over", "passes", "scheme"),
    [
        ("llama", {"num_key_value_heads": 1}, "prune24:solver=magnitude,w4:group=32,solver=rtn",
         "Q4_0"),
        ("qwen2", {"tie_word_embeddings": True}, "w8:group=row,solver=rtn", "Q8_0"),
        ("qwen3", {"head_dim": 128}, "w4:group=32,solver=rtn", "Q4_0"),
    ],
)  # fmt: skip
def test_transformers_computes_the_same(
    name: str, over: dict[str, Any], passes: str, scheme: str, tmp_path: Path
) -> None:
    """Codes are repacked exactly and rotary rows put in order, so logits are equal to the bit."""
    model = api.compile(make(name, **SIZES, **over), passes, calibration=IDS)
    record = model.export(tmp_path / "out", format="gguf", dtype=torch.float32)
    assert record["schemes"] == {scheme: 7}
    assert record["difference"] <= 1e-6
    want = model(IDS)
    assert (logits(tmp_path / "out") - want).abs().max() <= 1e-6 * want.abs().max()


def test_a_dense_model_and_its_tokenizer(tmp_path: Path) -> None:
    """F16 matrices, F32 vectors, and a byte-level BPE whose tokens and merges come with them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.train_from_iterator(["def main(): return 0"] * 3, trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<end>"], initial_alphabet=["a", "b"]))  # fmt: skip
    folder = tmp_path / "model"
    make("llama", **SIZES).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(folder)
    record = api.open_any(folder).export(tmp_path / "out", format="gguf", dtype=torch.float16)
    assert record["quantised"] == 0
    fields = gguf.GGUFReader(str(tmp_path / "out" / "model.gguf")).fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: own.get_vocab_size()] == [
        own.id_to_token(i) for i in range(own.get_vocab_size())
    ]
    assert fields["tokenizer.ggml.token_type"].contents()[0] == 3
    assert fields["tokenizer.ggml.merges"].contents()
    assert fields["general.file_type"].contents() == int(gguf.LlamaFileType.MOSTLY_F16)


@pytest.mark.parametrize(
    ("name", "passes", "words"),
    [
        ("llama", "w3:solver=rtn", "bits: expected 4 or 5, or 8 symmetric, found 3"),
        ("llama", "w4:group=16,solver=rtn", "group: expected a divisor of"),
        ("llama", "w8a8:solver=rtn", "inputs: expected inputs as they come"),
        ("llama", "nf4", "codes: expected integers or 8-bit floats"),
        ("qwen3", "w4:group=32,solver=rtn", "head_dim: expected 128, found 8"),
        ("gpt2", "w4:group=32,solver=rtn", "model_type: expected one of llama, mistral"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    name: str, passes: str, words: str, tmp_path: Path
) -> None:
    """One line that names the layer and the field; nothing is written."""
    sizes = {} if name == "gpt2" else SIZES
    model = api.compile(make(name, **sizes), passes, calibration=IDS)
    with pytest.raises(UsageError, match=words):
        model.export(tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_file_that_reads_back_otherwise_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that is off by one code is found."""
    model = api.compile(make("llama", **SIZES), "w4:group=32,solver=rtn", calibration=IDS)
    monkeypatch.setattr(exporting, "blocks", lambda *given: blocks(*given) ^ 1)
    with pytest.raises(GateError, match="expected the values that were written"):
        model.export(tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_without_accelerate_tensors_alone_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers cannot read the file then; the record says that logits were not compared."""
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    model = api.compile(make("llama", **SIZES), "w4:group=32,solver=rtn", calibration=IDS)
    record = model.export(tmp_path / "out", format="gguf")
    assert record["difference"] is None
    assert any("accelerate" in note for note in record["notes"])
