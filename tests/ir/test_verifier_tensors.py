"""Broken packed tensors and interfaces, each refused by the rule that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmc.compiler.ir import packing
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.errors import VerifierError
from llmc.compiler.ir.graph import Program, info
from llmc.compiler.ir.tensors import TENSOR_RULES
from llmc.compiler.ir.types import TensorType
from llmc.compiler.ir.verifier import verify, verify_interface, verify_tensors


def retype(node: Any, t: Any) -> None:
    node.meta["llmc"] = replace(info(node), type=t)


# ** packed tensors **


def put(p: Program, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a stored tensor without touching the parameter's row."""
    p.weights.tensors[name] = change(p.weights.load(name).clone())  # type: ignore[attr-defined]


def equal_positions(meta: torch.Tensor) -> torch.Tensor:
    where = packing.unpack(meta, 2, 32).to(torch.int64)
    where[0, 1] = where[0, 0]
    return packing.pack(where, 2)


def infinite(scale: torch.Tensor) -> torch.Tensor:
    scale[0, 0] = float("inf")
    return scale


def sixteen(zero: torch.Tensor) -> torch.Tensor:
    zero[0, 0] = 16
    return zero


TENSORS: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("stored", "codes", lambda t: t[:, :3]),
    ("stored", "codes", lambda t: t.to(torch.int64)),
    ("stored", "scale", lambda t: t.float()),
    ("scale", "scale", infinite),
    ("zero", "zero", sixteen),
    ("mask", "meta", equal_positions),
    ("mask", "meta", lambda t: packing.pack(packing.unpack(t, 2, 32).flip(-1), 2)),
]


@pytest.mark.parametrize(("rule", "name", "change"), TENSORS)
def test_broken_packed_tensor_is_refused(
    rule: str, name: str, change: Any, packed: Callable[[], Program]
) -> None:
    program = packed()
    verify(program)
    verify_tensors(program)
    put(program, name, change)
    with pytest.raises(VerifierError) as e:
        verify_tensors(program)
    assert e.value.rule == rule


def test_missing_tensor_is_refused(packed: Callable[[], Program]) -> None:
    program = packed()
    del program.weights.tensors["codes"]  # type: ignore[attr-defined]
    with pytest.raises(VerifierError, match=r"\[stored\]"):
        verify_tensors(program)


@pytest.mark.parametrize(
    ("rule", "name", "change"),
    [
        ("words", "bitmap", lambda t: t | torch.tensor([0, 1 << 20], dtype=torch.int32)),
        ("count", "bitmap", lambda t: t ^ torch.tensor([1, 0], dtype=torch.int32)),
    ],
)
def test_broken_bitmap_is_refused(
    rule: str, name: str, change: Any, bitmap: Callable[[], Program]
) -> None:
    program = bitmap()
    verify(program)
    verify_tensors(program)
    put(program, name, change)
    with pytest.raises(VerifierError) as e:
        verify_tensors(program)
    assert e.value.rule == rule


def at(place: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of one element."""

    def change(t: torch.Tensor) -> torch.Tensor:
        t[place] = value
        return t

    return change


SPARSE: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("stored", "index", lambda t: t[:-1]),
    ("stored", "index", lambda t: t.to(torch.int32)),
    ("stored", "starts", lambda t: t[:-1]),
    ("rows", "starts", at(0, 1)),
    ("rows", "starts", at(1, -1)),
    ("rows", "starts", at(2, 0)),
    ("rows", "starts", at(2, 5)),
    ("rows", "starts", at(-1, 1 << 30)),
    ("index", "index", at(0, 8)),
    ("index", "index", at(0, -1)),
    ("index", "index", at(1, 0)),
    ("index", "index", lambda t: t.flip(0)),
    ("disjoint", "index", at(0, 1)),
]


@pytest.mark.parametrize(("rule", "name", "change"), SPARSE)
def test_broken_sparse_rows_are_refused(
    rule: str, name: str, change: Any, sparse: Callable[[], Program]
) -> None:
    program = sparse()
    verify(program)
    verify_tensors(program)
    put(program, name, change)
    with pytest.raises(VerifierError) as e:
        verify_tensors(program)
    assert e.value.rule == rule


def test_every_tensor_rule_is_broken_once() -> None:
    # Levels: test_levels; input grids: test_rounding; trains: test_train; turns: test_rotation.
    elsewhere = {"words", "count", "level", "rounding", "train", "turns"}
    broken = {r for r, _, _ in TENSORS + SPARSE} | elsewhere
    assert {name for name, _ in TENSOR_RULES} == broken


# ** interface **


def test_interface_lets_a_literal_result_size_change(toy: Callable[..., Program]) -> None:
    before, after = toy(), toy()
    retype(after.output, TensorType((BATCH, SEQ, 9), torch.float32))
    verify_interface(before, after)


@pytest.mark.parametrize(
    "shape", [(BATCH, SEQ - 1, 11), (BATCH, 16, 11), (SEQ, BATCH, 11), (BATCH * SEQ, 11)]
)
def test_interface_refuses_another_batch_or_sequence(
    shape: Any, toy: Callable[..., Program]
) -> None:
    before, after = toy(), toy()
    retype(after.output, TensorType(shape, torch.float32))
    with pytest.raises(VerifierError, match=r"\[interface\]"):
        verify_interface(before, after)


def test_interface_refuses_other_inputs(toy: Callable[..., Program]) -> None:
    before, after = toy(), toy()
    retype(after.inputs[0], TensorType((BATCH, SEQ), torch.int32))
    with pytest.raises(VerifierError, match=r"\[interface\]"):
        verify_interface(before, after)
    renamed = toy()
    renamed.inputs[0].name = "tokens"
    with pytest.raises(VerifierError, match=r"\[interface\]"):
        verify_interface(before, renamed)
