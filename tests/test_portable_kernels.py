"""The portable kernels compile for Ampere, Ada, Hopper and Blackwell GPUs."""

import json
import sys
from importlib.util import find_spec

import pytest
from conftest import execute

# Not imported here: test_ops.py sets TRITON_INTERPRET before the first import of triton.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton exists for Linux only")

# Compiles a kernel, with the arguments that a step of GPT-2 124M gives it, to machine code; prints its size.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from core.ops import kernels

name, capability, signature, constants, warps = json.loads(sys.argv[1])
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(fn=getattr(kernels, name), signature=signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
print(compiled.metadata.shared, len(compiled.asm["cubin"]))
"""
NORM = {"x": "*bf16", "mean": "*fp32", "rstd": "*fp32", "gain": "*fp32", "d_norm": "*bf16", "d_stream": "*bf16"}
NORM |= {"dx": "*bf16", "sums": "*fp32", "rows": "i32"}
PACK = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "stride_b": "i32", "stride_h": "i32", "stride_t": "i32"}
PACK |= {"packed": "*bf16", "sums": "*fp32", "rows": "i32", "T": "i32"}
LOSS = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "scale": "fp32"}
KERNELS = {  # signature, constants, warps
    "cross_entropy_kernel": (LOSS, {"VOCAB": 50257, "PADDED": 50304, "BLOCK": 8192}, 32),
    "norm_backward_kernel": (NORM, {"C": 768, "BLOCK": 1024}, 4),
    "pack_kernel": (PACK, {"H": 12, "D": 64, "ROWS": 64, "BLOCK_D": 64}, 2),
}
SHARED_MEMORY = 99 * 1024  # bytes per block on compute capability 8.6, 8.9 and 12.0, the smallest of these


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("name", KERNELS)
def test_the_portable_kernels_compile(tmp_path, name, capability):
    signature, constants, warps = KERNELS[name]
    argument = json.dumps([name, capability, signature, constants, warps])
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    printed = execute([sys.executable, "-c", COMPILE, argument], tmp_path, True, env).stdout
    shared, size = map(int, printed.split())
    assert size > 1000
    assert shared <= SHARED_MEMORY
