"""The table of methods: rows from the registry, what theorems say of them, resuming, the report."""

import importlib
import json
import sys

import pytest
import torch

from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.pipeline.registry import all_passes

BITS = (4, 3, 2)


@pytest.fixture
def bench(repo, monkeypatch):
    """The scripts of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))

    def load(name):
        return importlib.import_module(name)

    yield load
    for name in [n for n in sys.modules if n.startswith("method")]:
        del sys.modules[name]


class Problem:
    """64 correlated inputs, one of them loud."""

    def __init__(self, loud: float = 20.0):
        self.loud = loud

    def make(self, n):
        g = torch.Generator().manual_seed(0)
        spectrum = torch.arange(1, n + 1, dtype=torch.float32) ** -0.35
        rotation = torch.linalg.qr(torch.randn(n, n, generator=g))[0]
        x = torch.randn(512, n, generator=g) * spectrum @ rotation
        x[:, 3] *= self.loud
        return torch.randn(48, n, generator=g) / n**0.5, x


@pytest.fixture
def lost(bench):
    """Relative output error of a recipe on the layer."""
    layer, rows = bench("method_layer"), bench("method_rows")
    known = {}

    def loss(passes, loud=20.0):
        if loud not in known:
            known[loud] = layer.problem(Problem(loud), 64)
        found = layer.measure(rows.Row("weights", passes), *known[loud])
        assert "refused" not in found, found
        return found["loss"]

    return loss


def test_every_grid_of_the_registry_has_a_row(bench):
    rows = bench("method_rows")
    for of_layer in (True, False):
        keys = [r.key for r in rows.rows(of_layer)]
        assert len(keys) == len(set(keys))
        texts = [r.passes for r in rows.rows(of_layer) if r.passes]
        named = {c.name for text in texts for c in from_strings([text]).calls}
        wanted = {n for n, p in all_passes().items() if p.stage in ("grid", "equivalence")}
        assert wanted <= named
    assert {n for n, p in all_passes().items() if p.stage == "kv"} <= named


def test_every_pass_is_measured_on_the_layer(bench):
    layer, rows = bench("method_layer"), bench("method_rows")
    given = layer.problem(Problem(), 64)
    plain = [r for r in rows.rows(of_layer=True) if not set(":,") & set(r.passes)]
    found = [layer.measure(r, *given) for r in plain]
    # A single layer has no place for some passes; nothing else is a reason.
    assert all("found none" in f["refused"] for f in found if "refused" in f)
    measured = [f for f in found if "refused" not in f]
    assert len(measured) > 20
    assert all(0 < f["loss"] < 1 and 1 < f["bits_per_weight"] < 14 for f in measured)


@pytest.mark.parametrize("bits", BITS)
def test_compensation_and_scales_pay(lost, bits):
    plain = lost(f"w{bits}:solver=rtn")
    assert lost(f"w{bits}") < 0.8 * plain
    # 1 is among the scales that the search tries, and it knows this very loss.
    assert lost(f"awq,w{bits}:solver=rtn") <= 1.001 * plain


@pytest.mark.parametrize("act", ["token", "tensor", "static"])
def test_smoothing_helps_bytes_beside_a_loud_input(lost, act):
    assert lost(f"smooth,w8a8:act={act}") < 0.5 * lost(f"w8a8:act={act}")


def test_a_planted_input_is_worth_splitting_off(lost):
    assert 10 * lost("int8_split", loud=100.0) <= lost("w8a8", loud=100.0)


def test_the_ends_of_spqr(lost):
    assert lost("spqr:threshold=inf") == lost("spqr:threshold=none")
    assert lost("spqr:threshold=0,most=1") < 1e-10


# ** what is kept, and what is made of it **


def test_a_run_goes_on_where_it_was(bench, tmp_path):
    store, path, made = bench("methods").Store, tmp_path / "m.json", []

    def make(key):
        made.append(key)
        return {"loss": 0.5}

    store(path, "layer", {"n": 8}, fresh=False).fill(["a", "b", "c"], ["a", "b"], make)
    rows = store(path, "layer", {"n": 8}, fresh=False).fill(["a", "c"], [], make)
    assert made == ["a", "b", "c"]
    assert [r["key"] for r in rows] == ["a", "c"]
    store(path, "layer", {"n": 9}, fresh=False).fill(["a"], [], make)
    store(path, "layer", {"n": 9}, fresh=True).fill(["a"], [], make)
    assert made[3:] == ["a", "a"]
    assert json.loads(path.read_text())["layer"]["head"] == {"n": 9}


def _row(key, bits, nll, **more):
    return {
        "key": key, "passes": key, "kind": "weights", "bits_per_weight": bits, "nll": nll,
        "perplexity": sum(nll), "code_bits": int(bits), "loss_sum": 1.0, "loss_geomean": 0.1,
        "compile_seconds": 1.0,
    } | more  # fmt: skip


def test_rows_are_held_against_the_dense_model_and_their_bits(bench):
    model, report = bench("method_model"), bench("method_report")
    head = {
        "model": "m", "data": "d", "sha256": "0", "window": 8, "windows": 8, "cache_windows": 8,
        "protocol": "p", "samples": 1, "length": 8, "calibration": "c",
    }  # fmt: skip
    level = [2.0 + i / 10 for i in range(8)]
    rows = [
        _row("dense", 16.0, level, kind="dense"),
        _row("w4", 4.125, [x + 0.1 for x in level]),
        _row("other", 4.5, [x + 0.05 for x in level]),
    ]
    found = {r["key"]: r for r in model.compared(rows, head)}
    assert found["w4"]["against"].keys() == {"dense"}
    other = found["other"]["against"]
    assert other["dense"]["difference"] == pytest.approx(0.05)
    assert other["uniform"]["row"] == "w4"
    assert other["uniform"]["perplexity_ratio"] < 1
    text = report.markdown({"model": {"command": "x", "head": head, "rows": list(found.values())}})
    assert "| `other` | 4.500 |" in text
    fewer = [_row("a", 2.0, [9.0]), _row("b", 3.0, [9.5]), _row("c", 3.0, [5.0])]
    assert [r["key"] for r in report.front(fewer)] == ["a", "c"]


def test_a_plot_without_matplotlib_names_the_extra(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"\[plot\]"):
        bench("method_report").plot([], tmp_path / "p.png")
