"""What llmc's kernels are timed beside, where it is installed; why it is not, where it is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_clock
import torch
from gpu_work import Task, told
from torch import nn

Linear = Callable[[torch.Tensor], object]
Made = tuple[list[Linear], int]
"""Linears of one shape, each with a weight of its own, and the bytes of one weight."""

GROUP = 128


def _rotating(make: Callable[[], Linear], nbytes: int) -> Made:
    return [make() for _ in range(gpu_clock.copies(nbytes))], nbytes


def _dense(N: int, K: int) -> torch.Tensor:
    return torch.randn(N, K, device=gpu_clock.device(), dtype=torch.bfloat16) / K**0.5


def _module(N: int, K: int) -> nn.Linear:
    return nn.Linear(K, N, bias=False, device=gpu_clock.device(), dtype=torch.bfloat16)


def torch_bf16(N: int, K: int) -> Made:
    """cuBLAS."""

    def make() -> Linear:
        w = _dense(N, K)
        return lambda x: torch.nn.functional.linear(x, w)

    return _rotating(make, 2 * N * K)


def torch_int4(N: int, K: int) -> Made:
    """tinygemm's 4-bit product, which torch carries."""

    def make() -> Linear:
        q = torch.randint(0, 256, (N, K // 2), device="cuda", dtype=torch.int32).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(q, 8)
        scales = torch.rand(K // GROUP, N, 2, device="cuda").to(torch.bfloat16)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)

    return _rotating(make, N * K // 2 + 4 * N * K // GROUP)


def torch_int8(N: int, K: int) -> Made:
    """cuBLAS int8, inputs rounded before; it takes more than 16 tokens."""

    def make() -> Linear:
        w = torch.randint(-128, 128, (N, K), device="cuda", dtype=torch.int8).t()

        def call(x: torch.Tensor) -> object:
            return torch._int_mm((x * 16).to(torch.int8), w)

        return call

    return _rotating(make, N * K)


def torch_fp8(N: int, K: int) -> Made:
    """cuBLAS e4m3 with scales of rows, inputs rounded before."""

    def make() -> Linear:
        w = _dense(N, K).to(torch.float8_e4m3fn).t()
        scale = torch.ones(1, N, device="cuda")

        def call(x: torch.Tensor) -> object:
            top = x.abs().amax(-1, keepdim=True).float() / 448
            codes = (x / top).to(torch.float8_e4m3fn)
            return torch._scaled_mm(codes, w, top, scale, out_dtype=torch.bfloat16)

        return call

    return _rotating(make, N * K)


def torchao_int4(N: int, K: int) -> Made:
    """torchao's weight-only int4 in tinygemm's layout."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")

    def make() -> Linear:
        m = _module(N, K)
        quantize_(m, config)
        return m

    return _rotating(make, N * K // 2 + 4 * N * K // GROUP)


def torchao_int8(N: int, K: int) -> Made:
    """torchao's weight-only int8."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def make() -> Linear:
        m = _module(N, K)
        quantize_(m, Int8WeightOnlyConfig())
        return m

    return _rotating(make, N * K)


def gemlite_int4(N: int, K: int) -> Made:
    """gemlite's Triton kernels, 4 bits, one scale per 128."""
    import gemlite
    from gemlite.core import DType, GemLiteLinear

    # What it ships is by the device's name; an H200 is the H100's chip with other memory.
    if "h200" in torch.cuda.get_device_name().lower():
        GemLiteLinear.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))

    def make() -> Linear:
        q = torch.randint(0, 16, (N, K), device="cuda", dtype=torch.uint8)
        scales = torch.rand(N * K // GROUP, 1, device="cuda").to(torch.bfloat16)
        zeros = torch.full_like(scales, 8)
        m = GemLiteLinear(4, GROUP, K, N, input_dtype=DType.BF16, output_dtype=DType.BF16)
        m.pack(q, scales, zeros, None)
        return m

    return _rotating(make, N * K // 2 + 4 * N * K // GROUP)


def hqq_int4(N: int, K: int) -> Made:
    """hqq's own linear."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def make() -> Linear:
        config = BaseQuantizeConfig(nbits=4, group_size=64)
        return HQQLinear(_module(N, K), config, compute_dtype=torch.bfloat16, device="cuda")

    return _rotating(make, N * K // 2 + 4 * N * K // 64)


def bitsandbytes_nf4(N: int, K: int) -> Made:
    """bitsandbytes' NF4."""
    import bitsandbytes

    def make() -> Linear:
        m = bitsandbytes.nn.Linear4bit(
            K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        m.load_state_dict({"weight": _dense(N, K).cpu()})
        return m.cuda()

    return _rotating(make, N * K // 2 + 4 * N * K // 64)


# Name: what makes it, the package that it needs, and whether it needs a GPU to run at all.
PEERS: dict[str, tuple[Callable[[int, int], Made], str, bool]] = {
    "torch bf16": (torch_bf16, "torch", False),
    "torch int4 tinygemm": (torch_int4, "torch", True),
    "torch int8": (torch_int8, "torch", True),
    "torch fp8": (torch_fp8, "torch", True),
    "torchao int4": (torchao_int4, "torchao", True),
    "torchao int8": (torchao_int8, "torchao", True),
    "gemlite int4": (gemlite_int4, "gemlite", True),
    "hqq int4": (hqq_int4, "hqq", True),
    "bitsandbytes nf4": (bitsandbytes_nf4, "bitsandbytes", True),
}


def present() -> dict[str, str]:
    """Version of each peer's package, or why it is left out."""
    found = {}
    for name, (_, package, gpu) in PEERS.items():
        try:
            found[name] = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            found[name] = f"left out: {package} is not installed"
            continue
        if gpu and not gpu_clock.on_gpu():
            found[name] = "left out: needs a GPU"
    return found


def tasks(N: int, K: int, tokens: list[int]) -> list[Task]:
    """Every peer that is here at one shape."""
    here = [name for name, how in present().items() if not how.startswith("left out")]
    return [Task(f"{name} {N}x{K}", page, (name, N, K, tokens), 60.0,
                 (("peer", name), ("N", N), ("K", K))) for name in here]  # fmt: skip


def page(name: str, N: int, K: int, tokens: list[int]) -> list[dict[str, Any]]:
    """One peer at one shape; a number of tokens that it refuses is a row with its error.

    Whatever a peer raises is caught, as peers raise what they like: `ValueError` and assertions
    where tiles do not fit, errors of their compilers, `RuntimeError` of the device.
    """
    rows: list[dict[str, Any]] = []
    linears, nbytes = PEERS[name][0](N, K)
    for m in tokens:
        about = {"peer": name, "N": N, "K": K, "tokens": m}
        x = torch.randn(m, K, device=gpu_clock.device(), dtype=torch.bfloat16)
        try:
            us = gpu_clock.microseconds(lambda linear, x=x: linear(x), linears)
            rows.append(about | {"us": us, "weight_bytes": nbytes})
        except Exception as error:
            rows.append(about | {"error": told(error)})
    return rows


def liger(tokens: int, width: int) -> list[dict[str, Any]]:
    """Liger's norm and gate beside torch's, as llmc has both inside its linears."""
    if not gpu_clock.on_gpu():
        return []
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    gain = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Callable[[Any], object]] = {
        "torch rms_norm": lambda _: torch.nn.functional.rms_norm(x, (width,), gain, 1e-6),
        "torch silu gate": lambda _: torch.nn.functional.silu(x) * x,
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        calls["liger rms_norm"] = lambda _: LigerRMSNormFunction.apply(x, gain, 1e-6)
        calls["liger silu gate"] = lambda _: LigerSiLUMulFunction.apply(x, x)
    return [
        {"peer": name, "tokens": tokens, "width": width,
         "us": gpu_clock.microseconds(call, range(4))}
        for name, call in calls.items()
    ]  # fmt: skip
