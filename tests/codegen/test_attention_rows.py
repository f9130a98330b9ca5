"""Rows of cached attention as data: what serves what, what is refused by which field, bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.codegen.attention.lower import attention_implementations, problem_of
from llmc.codegen.attention.problem import AttentionProblem
from llmc.codegen.attention.render import render, render_stated
from llmc.codegen.attention.row import SplitConfig
from llmc.codegen.attention.rows import ROWS, choose, row
from llmc.codegen.attention.write import bytes_written, render_write
from llmc.compiler.ir.caches import CacheScheme
from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.ir.ops.attention import cached_attention
from llmc.compiler.ir.ops.heads import rotated
from llmc.compiler.runtime.cache import add_cache

PLAIN = AttentionProblem(32, 8, 128, 128, x_dtype="bf16")
INT8 = dataclasses.replace(PLAIN, cache="int8", bits=8, keys="token")
KIVI = dataclasses.replace(PLAIN, cache="kivi", bits=4, group=32, residual=128, keys="group")


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (PLAIN, "attention_kv"), (INT8, "attention_int8"), (KIVI, "attention_kivi"),
        (dataclasses.replace(INT8, cache="fp8", keys="channel"), "attention_fp8"),
        (dataclasses.replace(PLAIN, window=4096, softcap=50.0, sinks=True), "attention_kv"),
    ],
)  # fmt: skip
def test_each_cache_has_a_row(problem: AttentionProblem, name: str) -> None:
    found, misfits = choose(problem)
    assert found is not None
    assert (found.name, misfits) == (name, [])
    assert row(name) is found


@pytest.mark.parametrize(
    ("problem", "changes", "said"),
    [
        (PLAIN, {"bias": True}, "attention_kv: bias=True, expected False"),
        (PLAIN, {"turned": True}, "attention_kv: turned=True, expected False"),
        (PLAIN, {"latent": True}, "attention_kv: latent=True, expected False"),
        (PLAIN, {"x_dtype": "float64"}, "attention_kv: x_dtype=float64, expected fp16 or"),
        (PLAIN, {"D": 160, "x_dtype": "fp32"}, "attention_kv: D=160, expected at most 256"),
        (PLAIN, {"D": 257}, "attention_kv: D=257, expected 1 to 256"),
        (PLAIN, {"E": 512}, "attention_kv: E=512, expected 1 to 256"),
        (PLAIN, {"queries": 17}, "attention_kv: queries=17, expected 1 to 16"),
        (PLAIN, {"heads": 33}, "attention_kv: heads=33, expected a multiple of kv_heads"),
        (INT8, {"D": 126}, "attention_int8: D=126, expected a multiple of 4"),
        (KIVI, {"group": 24, "E": 24}, "attention_kivi: group=24, expected a multiple of 16"),
        (KIVI, {"group": 48}, "attention_kivi: E=128, expected whole groups of channels"),
        (KIVI, {"bits": 3}, "attention_kivi: bits=3, expected 2 or 4 or 8"),
        (PLAIN, {"cache": "kvquant"}, "attention: cache=kvquant, expected kv or int8"),
    ],
)
def test_what_just_misses_is_refused_by_its_field(
    problem: AttentionProblem, changes: dict[str, Any], said: str
) -> None:
    changed = dataclasses.replace(problem, **changes)
    found, misfits = choose(changed)
    assert found is None
    assert str(misfits[0]).startswith(said)
    if problem.cache == changed.cache:
        with pytest.raises(UsageError, match=changed.cache):
            render(next(r for r in ROWS if changed.cache in r.choices["cache"]), changed)


def test_bytes_are_counted_by_hand() -> None:
    """At 32k tokens the cache is nearly all: int8 about half of bf16, KIVI's four bits 0.31."""
    T, sides = 32768, 2 * 32 * 256 + 8 * (32768 + 1)
    kv = ROWS[0].bytes_moved(PLAIN, 1, T)
    assert kv == 2 * 8 * T * 256 + sides
    assert ROWS[1].bytes_moved(INT8, 1, T) == 8 * T * (256 + 4) + 2 * 8 * 256 + sides
    kivi = ROWS[3].bytes_moved(KIVI, 1, T)
    assert kivi == 8 * T * (128 + 16 + 16) + 2 * 8 * 128 * 256 + 2 * 8 * 256 + sides
    assert ROWS[0].floor_us(PLAIN, 1, T, 4.3e12) == pytest.approx(kv / 4.3e6)
    written = 2 * 2 * 8 * 256 + 17
    assert bytes_written(PLAIN, 2, 3) == 6 * written
    # Queries go through it where they are normed; gains are read once, however many tokens.
    for norm, gains in (("head", 2 * 128), ("row", (32 + 8) * 128)):
        normed = dataclasses.replace(PLAIN, norm=norm, gains=True)
        assert bytes_written(normed, 2, 3) == 6 * (written + 2 * 2 * 32 * 128) + 2 * gains


@given(st.integers(1, 8), st.integers(1, 16), st.integers(0, 70000))
def test_runs_cover_all_tokens(batch: int, queries: int, tokens: int) -> None:
    """No token is left out, and no run begins inside of a step."""
    for problem in (PLAIN, KIVI, dataclasses.replace(PLAIN, x_dtype="fp32", kv_heads=32)):
        found, _ = choose(problem)
        assert found is not None
        config = found.config(problem, batch, tokens, queries)
        assert config.chunk(tokens) % config.BT == 0
        assert config.chunk(tokens) * config.splits >= tokens
        assert 1 <= config.splits <= 32
        assert problem.cache != "kivi" or problem.group % config.BT == 0
    assert SplitConfig(16, 64, 4).chunk(0) == 64


def test_long_contexts_fill_the_machine() -> None:
    """At batch 1 one program per key head would leave most multiprocessors idle."""
    config = ROWS[0].config(PLAIN, 1, 32768, 1)
    assert 8 * config.splits >= 132
    assert ROWS[0].config(PLAIN, 64, 32768, 1).splits == 1


def test_templates_state_their_constants() -> None:
    """Rendering is StrictUndefined, and constants that are not stated are refused."""
    source = render(ROWS[3], KIVI).source
    compile(source, "kernel", "exec")
    assert "{{" not in source
    compile(render_write(INT8, True).source, "kernel", "exec")
    normed = dataclasses.replace(INT8, norm="row", gains=True, turn="half", rotary=128, eps=1e-5)
    names = {render_write(p, v).name for p in (INT8, normed) for v in (False, True)}
    assert names == {
        "cache_write_int8_token_bf16", "cache_write_int8_token_bf16_valid",
        "cache_write_int8_token_rownorm_half_bf16_gains",
        "cache_write_int8_token_rownorm_half_bf16_gains_valid",
    }  # fmt: skip
    with pytest.raises(UsageError, match="states"):
        render_stated("cache_write.py.j2", "cache_write", {"name": "x"})


def test_a_coded_cache_is_placed_by_its_record() -> None:
    """Kinds that no row serves are refused; the op's reference runs them."""
    from tiny_models import capture_tiny

    program = capture_tiny("llama")
    names = [n.name for n in program.calls("llmc.attention")]
    program.caches = {
        names[0]: CacheScheme("int8", 8, keys="token"), names[1]: CacheScheme("kvquant", 4, slot=1)
    }  # fmt: skip
    cached = add_cache(program)
    made, placed, refused = attention_implementations(cached)
    assert [p.row.name for p in placed] == ["attention_int8"]
    assert placed[0].json(batch=1, tokens=8192, speed=1e12)["bytes"] > 8192 * 2 * (16 + 4)
    assert len(made) == 1
    assert [r.predicate for r in refused] == ["cache"]
    node = next(iter(cached.calls("llmc.cached_attention")))
    assert problem_of(cached, node).keys == "token"


def test_rotation_wants_angles() -> None:
    """The op row says so at once, and so does its reference."""
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ModelError, match="cosines"):
        rotated(x, None, None, False)
    with pytest.raises(ModelError, match="cosines"):
        cached_attention(x, x, x, torch.zeros(1, 3), scale=1.0, rotate=True, state=object())
