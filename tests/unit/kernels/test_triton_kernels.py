"""The kernels of Triton, compiled for a GPU that need not be there: their roundings are those that are written down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="no Triton, which comes with PyTorch for CUDA")

FUSED = {"sgd_kernel": 1, "heavy_ball_kernel": 1, "ormo_kernel": 3, "adamw_kernel": 3}
"""Fused multiply-adds for each element: in a loop of `ormo_kernel` one, in `adamw_kernel` two of which one is selected."""
POINTERS = ("grad", "u", "v", "w", "out", "out_16bit")


def compiled(name: str, grad: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the assembly of a kernel for float32 parameters, as `TritonSteps` has it compiled, for an H100."""
    from ormo_rpc.kernels import triton_kernels

    monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
    kernel: Any = getattr(triton_kernels, name)
    signature: dict[str, str] = {}
    for parameter in kernel.params:
        pointer = {"grad": f"*{grad}", "out_16bit": "*bf16"}.get(parameter.name, "*fp32")
        signature[parameter.name] = pointer if parameter.name in POINTERS else parameter.annotation_type or "constexpr"
    places = {parameter.name: (number,) for number, parameter in enumerate(kernel.params)}
    aligned = {places[each]: [["tt.divisibility", 16]] for each in POINTERS if each in places}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs={places["BLOCK"]: 1024}, attrs=aligned)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": False, "num_warps": 4})
    text: str = made.asm["ptx"]
    return text


@pytest.mark.slow
@pytest.mark.parametrize("grad", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FUSED)
def test_only_what_is_written_as_fused_is(name: str, grad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = compiled(name, grad, tmp_path, monkeypatch)
    # Eight elements for each thread, in a block that is whole and in one that is not.
    assert len(re.findall(r"\bfma\.rn\.f32\b", assembly)) == 2 * 8 * FUSED[name]
    for operation in ("mul", "add", "sub", "div", "sqrt"):
        assert set(re.findall(rf"\b{operation}\.(?:\w+\.)*f32\b", assembly)) <= {f"{operation}.rn.f32"}
    assert "ld.global.v4.b32" in assembly
    assert "cvt.rn.bf16" in assembly
