"""``torch.compile(model, backend="llmc")``: same passes, codes by parameter identity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llmc
from llmc.compiler.backend import compressed, read_options
from llmc.compiler.ir.errors import UsageError

RTN = "w8:solver=rtn,group=32"


@pytest.fixture
def model(tiny: Path) -> Iterator[Any]:
    """A fresh tiny model; Dynamo forgets everything before and after."""
    from transformers import AutoModelForCausalLM

    torch._dynamo.reset()
    yield AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    torch._dynamo.reset()


def ids_of(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 2048, (rows, length), generator=generator)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def flat(held: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": t.clone() for n, parts in held.items() for k, t in parts.items()}


def test_recompiles_leave_the_codes_unchanged(model: Any) -> None:
    """Other shapes make Dynamo compile again; the tensors are the very same objects."""
    tokens = ids_of(6, 24)
    fast = torch.compile(
        model, backend="llmc",
        options={"passes": "smooth,w4:group=32,prune24", "calibration": tokens},
    )  # fmt: skip
    with torch.no_grad():
        fast(ids_of(2, 24), use_cache=False)
        first = compressed(model)
        before = flat(first)
        assert len(first) == 14 + 2 * 2 + 2  # linears, norms of blocks, last norm and head
        for rows, length in ((1, 17), (3, 31)):
            out = fast(ids_of(rows, length), use_cache=False).logits
            assert out.shape == (rows, length, 2048)
        again = compressed(model)
    assert all(torch.equal(flat(again)[k], v) for k, v in before.items())
    for name, parts in again.items():
        assert all(parts[k] is first[name][k] for k in parts)


def test_equals_the_python_door(model: Any, tiny: Path) -> None:
    """One graph through either door: nearest codes give the same logits."""
    fast = torch.compile(model, backend="llmc", options={"passes": RTN})
    made = llmc.compile(tiny, passes=RTN)
    ids = ids_of(2, 20)
    with torch.no_grad():
        ours = fast(ids, use_cache=False).logits
        assert 0 < error(ours, model(ids, use_cache=False).logits) < 0.05
    torch.testing.assert_close(ours, made(ids), rtol=1e-4, atol=1e-4)


def test_weights_of_the_model_stay(model: Any) -> None:
    """The module is not changed: its eager logits are the same bits afterwards."""
    ids = ids_of(1, 12)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        torch.compile(model, backend="llmc", options={"passes": RTN})(ids, use_cache=False)
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_changed_weights_are_solved_anew(model: Any) -> None:
    """Codes belong to one version of a parameter: after an in-place change they are made again."""
    fast = torch.compile(model, backend="llmc", options={"passes": RTN})
    ids = ids_of(1, 12)
    with torch.no_grad():
        fast(ids, use_cache=False)
        name = "model.layers.0.mlp.down_proj.weight"
        old = compressed(model)[name]["scale"].clone()
        model.get_parameter(name).mul_(2.0)
        fast(ids_of(1, 15), use_cache=False)
    torch.testing.assert_close(compressed(model)[name]["scale"].float(), 2 * old.float())


def test_kv_cache_graphs_share_the_codes(model: Any) -> None:
    """Prefill and decode with transformers' own cache, step by step, near eager."""
    fast = torch.compile(model, backend="llmc", options={"passes": RTN})
    with torch.no_grad():
        ours, theirs = fast(ids_of(2, 12)), model(ids_of(2, 12))
        first = compressed(model)
        for step in range(3):
            token = ids_of(2, 1) + step
            ours = fast(token, past_key_values=ours.past_key_values)
            theirs = model(token, past_key_values=theirs.past_key_values)
            assert error(ours.logits, theirs.logits) < 0.05
        again = compressed(model)
    assert all(again[n]["codes"] is first[n]["codes"] for n in first)


def test_artefact_as_source(model: Any, artefact: Path) -> None:
    """``artifact=`` runs the codes of ``llmc compile`` without calibrating again."""
    fast = torch.compile(model, backend="llmc", options={"artifact": artefact})
    ids = ids_of(2, 20)
    with torch.no_grad():
        ours = fast(ids, use_cache=False).logits
    torch.testing.assert_close(ours, llmc.load(artefact)(ids), rtol=1e-4, atol=1e-4)


def test_artefact_of_another_model(model: Any, artefact: Path) -> None:
    """Codes of other weights are refused, though every shape fits."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(9)))
    fast = torch.compile(model, backend="llmc", options={"artifact": artefact})
    with torch.no_grad(), pytest.raises(Exception, match="of these very weights"):
        fast(ids_of(1, 12), use_cache=False)


def test_statistics_without_data_are_refused(model: Any) -> None:
    """A pass that measures needs calibration or an artefact; the message says so."""
    fast = torch.compile(model, backend="llmc", options={"passes": "w4:group=32"})
    with torch.no_grad(), pytest.raises(Exception, match="expected calibration or artifact for w4"):
        fast(ids_of(1, 12), use_cache=False)


def test_graph_for_training_is_refused(model: Any) -> None:
    """A graph that requires grad is refused, with what to do."""
    fast = torch.compile(model, backend="llmc", options={"passes": RTN})
    with pytest.raises(Exception, match=r"requires grad.*no_grad"):
        fast(ids_of(1, 12), use_cache=False)


def test_fixed_length_and_other_windows(model: Any) -> None:
    """Windows that a graph of fixed length cannot read are refused; a dynamic axis reads them."""
    options = {"passes": "w4:group=32", "calibration": ids_of(4, 16)}
    with torch.no_grad():
        fast = torch.compile(model, backend="llmc", options=options, dynamic=False)
        with pytest.raises(Exception, match="mark_dynamic"):
            fast(ids_of(1, 12), use_cache=False)
        torch._dynamo.reset()
        fast = torch.compile(model, backend="llmc", options=options)
        ids = ids_of(2, 12)
        torch._dynamo.mark_dynamic(ids, 0)
        torch._dynamo.mark_dynamic(ids, 1)
        assert fast(ids, use_cache=False).logits.shape == (2, 12, 2048)
        first = compressed(model)
        fast(ids_of(3, 20), use_cache=False)
        again = compressed(model)
        assert all(again[n]["codes"] is first[n]["codes"] for n in first)


def test_plain_module_with_data_free_passes() -> None:
    """Any module runs: what is not a language model takes passes that need no text."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, 8),
    )  # fmt: skip
    fast = torch.compile(net, backend="llmc", options={"passes": RTN})
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert 0 < error(fast(x), net(x)) < 0.05
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "passes or a recipe"),
        ({"passes": "w4", "calibraton": []}, "did you mean 'calibration'?"),
        ({"passes": "w4", "artifact": "x"}, "artifact alone"),
        ({"passes": "w44"}, "did you mean 'w4'?"),
    ],
)
def test_wrong_options(given: dict[str, Any], says: str) -> None:
    """Options are checked by name."""
    with pytest.raises(UsageError, match=says.replace("?", r"\?")):
        read_options(given)


def test_registered_by_entry_point() -> None:
    """torch finds the backend without an import of llmc."""
    assert "llmc" in torch._dynamo.list_backends()


def test_sixteen_bit_models_are_calibrated(model: Any) -> None:
    """A bf16 model runs in bf16 throughout; its solves see fp32 weights."""
    model = model.to(torch.bfloat16)
    tokens = ids_of(4, 24)
    fast = torch.compile(
        model, backend="llmc", options={"passes": "w8:group=32", "calibration": tokens}
    )
    with torch.no_grad():
        ours = fast(tokens, use_cache=False).logits
        assert ours.dtype == torch.bfloat16
        assert error(ours.float(), model(tokens, use_cache=False).logits.float()) < 0.05


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_mode_compiles_around_our_kernels(model: Any, target: str) -> None:
    """Inductor and plain calls give one result, for other shapes too, without a graph break."""
    outs = []
    for more in ({}, {"mode": "default"}):
        torch._dynamo.reset()
        options = {"passes": RTN, "target": target, **more}
        fast = torch.compile(model, backend="llmc", options=options, fullgraph=True)
        with torch.no_grad():
            shapes = (ids_of(2, 9), ids_of(1, 5))
            outs.append([fast(ids, use_cache=False).logits for ids in shapes])
    for plain, compiled in zip(*outs, strict=True):
        assert error(compiled, plain) < 1e-2


def test_a_mode_that_inductor_does_not_have_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="did you mean 'max-autotune'"):
        read_options({"passes": RTN, "mode": "max-autotun"})
    with pytest.raises(Exception, match="expected no mode for backend llmc"):
        torch.compile(model, backend="llmc", mode="max-autotune")(ids_of(1, 4), use_cache=False)
