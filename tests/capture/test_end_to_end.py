"""The main job on every supported architecture: fold exactly, solve, save, reload, generate."""

import pytest
import torch

import llmc
from llmc.compiler.runtime.executor import Runner

JOINT = "smooth,w4:group=8,prune24"
SHAPES = {"mqa": {"num_key_value_heads": 1}, "tied": {"tie_word_embeddings": True}}


def compressed(model, passes):
    ids = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(0))
    return llmc.compile(model, passes, calibration=ids, samples=8, length=16), ids


def dense(model, ids):
    return Runner(llmc.capture(model)).forward(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_smooth_is_exact(arch, dtype, build):
    """On the fp32 upcast; in 16 bits the scales are powers of two, so nothing moves at all."""
    model = build(arch).to(dtype)
    small, ids = compressed(model, "smooth")
    want = dense(model, ids[:2])
    limit = 1e-4 if dtype == torch.float32 else 1e-6
    assert (small(ids[:2]) - want).norm() <= limit * want.norm()
    assert small.solved.folds


def test_joint_solve_saves_and_reloads_bit_for_bit(arch, build, tmp_path):
    model = build(arch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small, ids = compressed(model, JOINT)
    small.save(tmp_path / "a")
    assert torch.equal(llmc.load(tmp_path / "a")(ids[:2]), small(ids[:2]))
    assert small.records
    assert {r["scheme"] for r in small.records} <= {"scaled 2:4 w4 g8", "2:4 w4 g8"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES)
def test_head_layouts_and_ties(shape, build):
    model = build("llama", **SHAPES[shape])
    small, ids = compressed(model, JOINT)
    prompt = ids[:1, :5]
    found = small.generate(prompt, max_new_tokens=4)
    tokens = prompt[0].tolist()
    for _ in range(4):
        tokens.append(int(small(torch.tensor([tokens]))[0, -1].argmax()))
    assert list(found[0])[-4:] == tokens[-4:]
