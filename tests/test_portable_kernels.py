"""The portable kernels compile for Ampere, Ada, Hopper and Blackwell GPUs."""

import json
import sys
from importlib.util import find_spec

import pytest
from conftest import execute

# Not imported here: test_ops.py sets TRITON_INTERPRET before the first import of triton.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton exists for Linux only")

# Compiles kernels, with the arguments that a step of GPT-2 124M gives them, to machine code; prints shared memory and
# size by kernel and compute capability.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from core.ops import kernels, loss_kernels

kernels_, capabilities = json.loads(sys.argv[1])
found = {}
for name, (signature, constants, warps) in kernels_.items():
    signature |= dict.fromkeys(constants, "constexpr")
    function, module = name.split()[0], loss_kernels if name.startswith("cross") else kernels
    source = ASTSource(fn=getattr(module, function), signature=signature, constexprs=constants)
    for capability in capabilities:
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        found[f"{name} {capability}"] = compiled.metadata.shared, len(compiled.asm["cubin"])
print(json.dumps(found))
"""
NORM = {"x": "*bf16", "mean": "*fp32", "rstd": "*fp32", "gain": "*fp32", "d_norm": "*bf16", "d_stream": "*bf16"}
NORM |= {"dx": "*bf16", "sums": "*fp32", "rows": "i32"}
PACK = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "stride_b": "i32", "stride_h": "i32", "stride_t": "i32"}
PACK |= {"packed": "*bf16", "sums": "*fp32", "rows": "i32", "T": "i32"}
LOSS = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "scale": "fp32"}
SAMPLED = LOSS | {"offsets": "*fp32"}
KERNELS = {  # signature, constants, warps
    "cross_entropy_kernel": (LOSS, {"offsets": None, "VOCAB": 50257, "PADDED": 50304, "BLOCK": 8192}, 32),
    "cross_entropy_kernel sampled": (SAMPLED, {"VOCAB": 16384, "PADDED": 16384, "BLOCK": 8192}, 32),
    "norm_backward_kernel": (NORM, {"C": 768, "BLOCK": 1024}, 4),
    "pack_kernel": (PACK, {"H": 12, "D": 64, "ROWS": 64, "BLOCK_D": 64}, 2),
}
SHARED_MEMORY = 99 * 1024  # bytes per block on compute capability 8.6, 8.9 and 12.0, the smallest of these


CAPABILITIES = (80, 86, 89, 90, 120)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", COMPILE, json.dumps([KERNELS, CAPABILITIES])]
    return json.loads(execute(command, folder, True, env).stdout)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_the_portable_kernels_compile(compiled, name, capability):
    shared, size = compiled[f"{name} {capability}"]
    assert size > 1000
    assert shared <= SHARED_MEMORY
