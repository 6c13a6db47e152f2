"""The Triton kernels of core/ops, each registered as an operator for torch.compile. LOG.md has their speedups.

linear_gelu and matmul_times use TMA: they need NVIDIA Hopper or B200. The others run from compute capability 8.0 on.
With TRITON_INTERPRET=1 they run on the CPU, where tests compare each with plain PyTorch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Output tile of a program and depth of its loop; GROUP_M row tiles that share weights in the L2 cache run together.
TILE_M, TILE_N, TILE_K = 128, 128, 64
PRODUCT = {"TILE_M": TILE_M, "TILE_N": TILE_N, "TILE_K": TILE_K, "GROUP_M": 8, "num_warps": 4, "num_stages": 2}
NORM_PROGRAMS = 792  # six per multiprocessor of an H200


@triton.jit
def tile_of(rows, columns, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile indices (m, n) of this program in an output (rows, columns)."""
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(columns, TILE_N)
    program = tl.program_id(0)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@triton.jit
def halves(tile, TILE_M: tl.constexpr, HALF_N: tl.constexpr):
    """The left and right half of a tile: shared memory can stage one half for two outputs."""
    return tl.split(tl.permute(tl.reshape(tile, (TILE_M, 2, HALF_N)), (0, 2, 1)))


@triton.jit
def linear_gelu_kernel(
    x,  # (rows, K)
    weight,  # (N, K)
    bias,  # (N,)
    activation,  # (rows, N)
    slope,  # (rows, N)
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_of(rows, N, TILE_M, TILE_N, GROUP_M)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for k in range(0, K, TILE_K):
        total = tl.dot(x.load([tile_m * TILE_M, k]), weight.load([tile_n * TILE_N, k]).T, total)
    HALF_N: tl.constexpr = TILE_N // 2
    left, right = halves(total, TILE_M, HALF_N)
    for i in tl.static_range(2):
        first = tile_n * TILE_N + i * HALF_N
        column = first + tl.arange(0, HALF_N)
        u = (left if i == 0 else right) + tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        # tanh-GELU is u s with s = sigmoid(2 sqrt(2/pi) (u + 0.044715 u^3)); here with exp2, a hardware instruction.
        s = 1.0 / (1.0 + tl.exp2(u * (-2.302208198 - 0.1029432397 * u * u)))
        activation.store([tile_m * TILE_M, first], (u * s).to(activation.dtype))
        ds = s * (1.0 - s) * (1.5957691216 + 0.2140644488 * u * u)
        slope.store([tile_m * TILE_M, first], (s + u * ds).to(slope.dtype))


@triton.jit
def matmul_times_kernel(
    x,  # (rows, K)
    weight,  # (K, N)
    factor,  # (rows, N)
    out,  # (rows, N)
    sums,  # (tiles of rows, N) float32
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_of(rows, N, TILE_M, TILE_N, GROUP_M)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for k in range(0, K, TILE_K):
        total = tl.dot(x.load([tile_m * TILE_M, k]), weight.load([k, tile_n * TILE_N]), total)
    HALF_N: tl.constexpr = TILE_N // 2
    left, right = halves(total, TILE_M, HALF_N)
    for i in tl.static_range(2):
        first = tile_n * TILE_N + i * HALF_N
        column = first + tl.arange(0, HALF_N)
        y = (left if i == 0 else right) * factor.load([tile_m * TILE_M, first]).to(tl.float32)
        out.store([tile_m * TILE_M, first], y.to(out.dtype))
        tl.store(sums + tile_m * N + column, tl.sum(y, 0), mask=column < N)


@triton.jit
def norm_backward_kernel(
    x,  # (rows, C)
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    gain,  # (C,) float32
    d_norm,  # (rows, C)
    d_stream,  # (rows, C)
    dx,  # (rows, C)
    sums,  # (programs, 3, C) float32
    rows,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    in_range = column < C
    g = tl.load(gain + column, mask=in_range, other=0.0)
    d_gain = tl.zeros((BLOCK,), dtype=tl.float32)
    d_shift = tl.zeros((BLOCK,), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=3):  # prefetches the next rows
        offset = tl.cast(row, tl.int64) * C + column
        r = tl.load(rstd + row)
        normal = (tl.load(x + offset, mask=in_range, other=0.0).to(tl.float32) - tl.load(mean + row)) * r
        d = tl.load(d_norm + offset, mask=in_range, other=0.0).to(tl.float32)
        stream = tl.load(d_stream + offset, mask=in_range, other=0.0).to(tl.float32)
        d_gain += d * normal
        d_shift += d
        d *= g  # zero outside the range
        d = stream + (d - tl.sum(d, 0) / C - normal * (tl.sum(d * normal, 0) / C)) * r
        d_bias += d
        tl.store(dx + offset, d.to(dx.dtype.element_ty), mask=in_range)
    sums += tl.program_id(0) * 3 * C + column
    tl.store(sums, d_gain, mask=in_range)
    tl.store(sums + C, d_shift, mask=in_range)
    tl.store(sums + 2 * C, d_bias, mask=in_range)


@triton.jit
def pack_kernel(
    q,  # (B, H, T, D), as k and v
    k,
    v,
    stride_b,
    stride_h,
    stride_t,
    packed,  # (rows, 3, H, D)
    sums,  # (blocks of rows, 3, H, D) float32
    rows,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source = q
    if part == 1:
        source = k
    if part == 2:
        source = v
    row = (block * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_range = (row < rows) & (d < D)[None, :]
    offset = row // T * stride_b + head * stride_h + row % T * stride_t + d[None, :]
    gradient = tl.load(source + offset, mask=in_range, other=0.0)
    column = (part * H + head) * D + d
    tl.store(packed + row * (3 * H * D) + column[None, :], gradient, mask=in_range)
    tl.store(sums + block * (3 * H * D) + column, tl.sum(gradient.to(tl.float32), 0), mask=d < D)


@torch.library.custom_op("gpt2::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """tanh-GELU of x (M, K) @ weight.T (K, N) + bias (N,), and the derivative of GELU: two (M, N)."""
    (M, K), N = x.shape, len(weight)
    activation, slope = x.new_empty(M, N), x.new_empty(M, N)
    linear_gelu_kernel[(triton.cdiv(M, TILE_M) * triton.cdiv(N, TILE_N),)](
        TensorDescriptor.from_tensor(x, [TILE_M, TILE_K]),
        TensorDescriptor.from_tensor(weight, [TILE_N, TILE_K]),
        bias,
        TensorDescriptor.from_tensor(activation, [TILE_M, TILE_N // 2]),
        TensorDescriptor.from_tensor(slope, [TILE_M, TILE_N // 2]),
        M,
        N,
        K,
        **PRODUCT,
    )
    return activation, slope


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))


@torch.library.custom_op("gpt2::matmul_times", mutates_args=())
def matmul_times(x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) @ weight (K, N) * factor (M, N): (M, N), and its sum over the rows, (N,) float32."""
    (M, K), N = x.shape, weight.size(1)
    out, sums = torch.empty_like(factor), x.new_empty(triton.cdiv(M, TILE_M), N, dtype=torch.float32)
    matmul_times_kernel[(triton.cdiv(M, TILE_M) * triton.cdiv(N, TILE_N),)](
        TensorDescriptor.from_tensor(x, [TILE_M, TILE_K]),
        TensorDescriptor.from_tensor(weight, [TILE_K, TILE_N]),
        TensorDescriptor.from_tensor(factor, [TILE_M, TILE_N // 2]),
        TensorDescriptor.from_tensor(out, [TILE_M, TILE_N // 2]),
        sums,
        M,
        N,
        K,
        **PRODUCT,
    )
    return out, sums.sum(0)


@matmul_times.register_fake
def _(x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(factor), x.new_empty(factor.size(1), dtype=torch.float32)


@torch.library.custom_op("gpt2::norm_backward", mutates_args=())
def norm_backward(
    x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, d_norm: Tensor, d_stream: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of x (M, C) used twice: as it is, with gradient d_stream, and by a LayerNorm, with gradient d_norm.

    Returns dx (M, C), and (3, C) float32: the gradients of the gain and the shift, and the sum of dx over the rows.
    """
    M, C = x.shape
    dx, sums = torch.empty_like(x), x.new_empty(NORM_PROGRAMS, 3, C, dtype=torch.float32)
    block = triton.next_power_of_2(C)
    norm_backward_kernel[(NORM_PROGRAMS,)](
        x, mean, rstd, gain, d_norm, d_stream, dx, sums, M, C, block, num_warps=max(block // 256, 1)
    )
    return dx, sums.sum(0)


@norm_backward.register_fake
def _(x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, d_norm: Tensor, d_stream: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(3, x.size(1), dtype=torch.float32)


@torch.library.custom_op("gpt2::pack", mutates_args=())
def pack(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Three (B, H, T, D) concatenated as (B T, 3 H D), and the sum over its rows, (3 H D,) float32."""
    B, H, T, D = q.shape
    if not q.stride() == k.stride() == v.stride() or q.stride(3) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    rows, block = B * T, 64
    blocks = triton.cdiv(rows, block)
    packed = q.new_empty(rows, 3 * H * D)
    sums = q.new_empty(blocks, 3 * H * D, dtype=torch.float32)
    stride_b, stride_h, stride_t, _ = q.stride()
    pack_kernel[(H, 3, blocks)](
        q,
        k,
        v,
        stride_b,
        stride_h,
        stride_t,
        packed,
        sums,
        rows,
        T,
        H,
        D,
        block,
        triton.next_power_of_2(D),
        num_warps=2,
    )
    return packed, sums.sum(0)


@pack.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    return q.new_empty(B * T, 3 * H * D), q.new_empty(3 * H * D, dtype=torch.float32)
