"""Other packages' linears on the CPU, for `cpu_suite.py`: each is left out where it is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

Make = Callable[[torch.Tensor], Callable[[], object]]
"""x fp32 [M, K] -> a call."""


def linears(weight: torch.Tensor) -> tuple[dict[str, Make], list[str]]:
    """Peers over W fp32 [N, K] by name, and why others are missing."""
    found: dict[str, Make] = {"torch fbgemm dynamic int8": _dynamic(weight)}
    missing = []
    for package, made in (("torchao", _torchao), ("onnxruntime", _onnx)):
        if importlib.util.find_spec(package) is None:
            missing.append(f"{package} (not installed)")
            continue
        try:
            found |= made(weight)
        except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            missing.append(f"{package} ({type(error).__name__}: {str(error).splitlines()[0]})")
    return found, missing


def _module(weight: torch.Tensor, dtype: torch.dtype) -> torch.nn.Sequential:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return torch.nn.Sequential(linear).to(dtype).eval()


def _dynamic(weight: torch.Tensor) -> Make:
    made = torch.ao.quantization.quantize_dynamic(_module(weight, torch.float32), dtype=torch.qint8)
    return lambda x: partial(made, x)


def _torchao(weight: torch.Tensor) -> dict[str, Make]:
    """int4 and int8 weights alone, and int8 on both sides, all in bf16."""
    from torchao.prototype.quantization.int4.inference_workflow import (
        PrototypeInt4WeightOnlyConfig,
    )
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    configs: dict[str, Any] = {
        "torchao int4wo g128 (prototype)": PrototypeInt4WeightOnlyConfig(group_size=128),
        "torchao int8wo": Int8WeightOnlyConfig(),
        "torchao int8dyn": Int8DynamicActivationInt8WeightConfig(),
    }
    found: dict[str, Make] = {}
    for name, config in configs.items():
        module = _module(weight, torch.bfloat16)
        quantize_(module, config)
        found[name] = lambda x, module=module: partial(module, x.bfloat16())
    return found


def _onnx(weight: torch.Tensor) -> dict[str, Make]:
    """MatMulNBits: 4-bit codes in groups of 32 and 128, fp32 inputs, int8 inputs where it may."""
    import onnx
    import onnxruntime as ort

    N, K = weight.shape
    found: dict[str, Make] = {}
    for group, level in ((128, 0), (128, 4), (32, 4)):
        w = weight.view(N, K // group, group)
        scale = w.abs().amax(-1) / 7
        q = (torch.round(w / scale[..., None]) + 8).clamp(0, 15).to(torch.uint8)
        q = q.view(N, K // group, group // 2, 2)
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=K, N=N, bits=4,
            block_size=group, accuracy_level=level,
        )  # fmt: skip
        tensors = {"w": q[..., 0] | (q[..., 1] << 4), "s": scale.reshape(-1)}
        kind = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [node], "linear",
            [onnx.helper.make_tensor_value_info("x", kind, ["m", K])],
            [onnx.helper.make_tensor_value_info("y", kind, ["m", N])],
            [onnx.numpy_helper.from_array(t.contiguous().numpy(), n) for n, t in tensors.items()],
        )  # fmt: skip
        domains = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        name = f"onnxruntime int4 g{group}{' int8 inputs' if level == 4 else ''}"
        found[name] = lambda x, s=session: partial(s.run, None, {"x": x.numpy()})
    return found


def inductor_dense(weight: torch.Tensor, x: torch.Tensor) -> Callable[[], object]:
    """A bf16 linear under max-autotune."""
    return _compiled(lambda x, w: torch.nn.functional.linear(x, w), x, weight)


def inductor_int4(tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> Callable[[], object]:
    """torch's int4 kernel under max-autotune, its weight frozen."""
    group = x.shape[1] // len(tensors["scale"])

    def call(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scale)

    return _compiled(call, x, tensors["codes"], tensors["scale"])


def _compiled(call: Callable[..., Any], x: torch.Tensor, *held: torch.Tensor) -> Any:
    """Compiled and called once; held tensors are buffers, which freezing makes constants."""
    import torch._inductor.config as config

    class Held(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, t in enumerate(held):
                self.register_buffer(f"t{i}", t)

        def forward(self, x: torch.Tensor) -> Any:
            return call(x, *self.buffers())

    # Freezing does not guard on which module it froze: start anew for each.
    torch._dynamo.reset()
    tuned = config.patch(freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP,ATEN")
    with tuned, torch.no_grad():
        made = torch.compile(Held(), dynamic=False)
        made(x)
    return partial(made, x)
