"""The fused loss equals that of the model: each kernel compared with plain PyTorch, then the loss and its gradients.

The interpreter of Triton runs the kernels on the CPU. It can't multiply bfloat16: the tests use float32 and float16.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import pytest

pytest.importorskip("triton", reason="Triton exists only for Linux")

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from core import ops
from core.ops import kernels, loss_kernels
from model import GPT, GPTConfig

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # 1 / (1 + inf) is 0, as intended
SHAPE = GPTConfig(n_layer=2, n_head=3, n_embd=96, n_positions=32, vocab_size=300)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(kernels, "NORM_PROGRAMS", 7)  # the interpreter runs them sequentially


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32", "float16"])
def draw(request):
    """Random tensors of one dtype."""
    torch.manual_seed(0)
    return lambda *size, scale=1.0: (torch.randn(*size) * scale).to(request.param)


def error(found, expected):
    """The relative error, by the Euclidean norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("rows, inputs, outputs", [(200, 96, 192), (128, 64, 128), (1, 32, 40), (150, 160, 200)])
def test_linear_gelu(draw, rows, inputs, outputs):
    x, weight, bias = draw(rows, inputs), draw(outputs, inputs, scale=0.3), draw(outputs)
    activation, slope = kernels.linear_gelu(x, weight, bias)
    u = (x.double() @ weight.double().T + bias.double()).requires_grad_()
    expected = F.gelu(u, approximate="tanh")
    expected.sum().backward()
    assert error(activation, expected) < TOLERANCE[x.dtype]
    assert error(slope, u.grad) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("rows, inputs, outputs", [(200, 96, 192), (128, 64, 128), (1, 32, 40), (150, 160, 200)])
def test_matmul_times(draw, rows, inputs, outputs):
    x, weight, factor = draw(rows, inputs), draw(inputs, outputs, scale=0.3), draw(rows, outputs)
    out, sums = kernels.matmul_times(x, weight, factor)
    expected = x.double() @ weight.double() * factor.double()
    assert error(out, expected) < TOLERANCE[x.dtype]
    assert error(sums, expected.sum(0)) < 1e-5  # summed in float32, before rounding


@pytest.mark.parametrize("rows, width", [(50, 96), (1, 32), (100, 160)])
def test_norm_backward(draw, rows, width):
    x, d_norm, d_stream = draw(rows, width, scale=3.0), draw(rows, width), draw(rows, width)
    wide, gain, shift = (t.double().requires_grad_() for t in (x, torch.rand(width), torch.randn(width)))
    normal, mean, rstd = torch.native_layer_norm(wide, (width,), gain, shift, 1e-5)
    (normal * d_norm.double() + wide * d_stream.double()).sum().backward()
    dx, sums = kernels.norm_backward(x, mean.float(), rstd.float(), gain.float().detach(), d_norm, d_stream)
    assert error(dx, wide.grad) < TOLERANCE[x.dtype]
    for found, expected in zip(sums, (gain.grad, shift.grad, wide.grad.sum(0)), strict=True):
        assert error(found, expected) < 1e-4


@pytest.mark.parametrize("layout", ["(B, T, H, D)", "(B, H, T, D)", "mixed"])
def test_pack(draw, layout):
    B, H, T, D = 2, 3, 45, 24
    between = [draw(B, T, H, D).transpose(1, 2) for _ in range(3)]
    parts = [part.contiguous() for part in between] if layout == "(B, H, T, D)" else between
    if layout == "mixed":
        parts[1] = parts[1].contiguous()
    packed, sums = kernels.pack(*parts)
    expected = torch.stack(parts).permute(1, 3, 0, 2, 4).reshape(B * T, 3 * H * D)
    assert torch.equal(packed, expected)
    assert error(sums, expected.double().sum(0)) < 1e-5


@pytest.mark.parametrize("vocab, block", [(1000, 8192), (1000, 256), (1024, 256), (770, 256)])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_cross_entropy(draw, monkeypatch, vocab, block, has_offsets):
    """Loss and gradients, for columns that fill all blocks or not. The padding has no gradient."""
    monkeypatch.setattr(loss_kernels, "LOGITS_BLOCK", block)
    padded, C = 1024, 32
    hidden, weight = draw(9, C), draw(padded, C, scale=0.5)
    targets = torch.randint(vocab, (9,))
    targets[:2] = torch.tensor([0, vocab - 1])
    wide, head = hidden.double().requires_grad_(), weight.double().requires_grad_()
    offsets = 3 * torch.rand(vocab) if has_offsets else None
    expected = F.cross_entropy((wide @ head.T)[:, :vocab] + (0 if offsets is None else offsets), targets)
    expected.backward()
    for chunk_rows in (4, 9):
        loss, d_hidden, d_weight = loss_kernels.linear_cross_entropy(
            hidden, weight, targets, offsets, vocab, chunk_rows
        )
        assert loss.item() == pytest.approx(expected.item(), abs=1e-2 if hidden.dtype == torch.float16 else 1e-5)
        assert error(d_hidden, wide.grad) < 3 * TOLERANCE[hidden.dtype]
        assert error(d_weight, head.grad) < 3 * TOLERANCE[hidden.dtype]
        assert not d_weight[vocab:].any()


@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_cross_entropy_of_logits_far_from_zero(offset):
    """No exponential overflows, and not all of them underflow."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(4, 32) * 5, torch.randn(128, 32), torch.tensor([0, 5, 50, 99])
    hidden[:, 0], weight[:, 0] = offset, 1.0
    loss, d_hidden, _ = loss_kernels.linear_cross_entropy(hidden, weight, targets, None, 100, 4)
    wide = hidden.double().requires_grad_()
    expected = F.cross_entropy((wide @ weight.double().T)[:, :100], targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert error(d_hidden[:, 1:], wide.grad[:, 1:]) < 1e-4


def test_operators_declare_their_shapes_and_dtypes_to_the_compiler():
    """Declared shapes and dtypes are those of the results; no operator writes to an input."""

    def draw(*size):
        return torch.randn(*size).half()

    x, weight, targets = draw(20, 32), draw(128, 32), torch.randint(100, (20,))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.linear_gelu, (x, weight, draw(128)), test_utils=tests)
    torch.library.opcheck(kernels.matmul_times, (x, weight.T.contiguous(), draw(20, 128)), test_utils=tests)
    norm = (x, torch.randn(20), torch.rand(20), torch.randn(32), draw(20, 32), draw(20, 32))
    torch.library.opcheck(kernels.norm_backward, norm, test_utils=tests)
    torch.library.opcheck(kernels.pack, [draw(2, 2, 10, 8) for _ in range(3)], test_utils=tests)
    torch.library.opcheck(loss_kernels.linear_cross_entropy, (x, weight, targets, None, 100, 16), test_utils=tests)


@pytest.fixture
def model():
    """A GPT with random biases, gains and residual projections."""
    torch.manual_seed(1)
    model = GPT(SHAPE, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        model.transformer.wte.weight[SHAPE.vocab_size :] = 0.0
    return model


def gradients(loss, model, tokens):
    """The loss on the tokens, and the gradients of a third of it, as for one of three micro-batches."""
    value = loss(tokens[:, :-1], tokens[:, 1:])
    (value / 3).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return value.item(), found


@pytest.fixture
def tokens(monkeypatch):
    monkeypatch.setattr(ops, "CHUNK_ROWS", 24)  # three chunks, the last one shorter
    return torch.randint(SHAPE.vocab_size, (3, 21), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def build_fused(monkeypatch):
    """Builds the training copy of a model that uses the kernels for a dtype."""

    def build(model, compiled=False, activation_checkpointing=False, dtype=torch.float32, portable=False):
        monkeypatch.setattr(ops, "KERNEL_DTYPE", dtype)
        monkeypatch.setattr(ops, "USE_TMA", not portable)
        return model.training_copy(
            compiled=compiled, stream_dtype=dtype, activation_checkpointing=activation_checkpointing
        )

    return build


@pytest.mark.parametrize(
    "dtype, tolerance, portable",
    [(torch.float32, 2e-6, False), (torch.float16, 1e-2, False), (torch.float32, 2e-6, True)],
)
def test_fused_loss_and_gradients_equal_those_of_the_model(
    build_fused, monkeypatch, model, tokens, dtype, tolerance, portable
):
    plain, expected = gradients(model, model, tokens)
    if portable:
        monkeypatch.delattr(kernels, "linear_gelu")  # needs TMA
    fused, found = gradients(build_fused(model, dtype=dtype, portable=portable), model, tokens)
    assert fused == pytest.approx(plain, rel=tolerance / 10)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert error(gradient, expected[name]) < tolerance, name
    assert not found["transformer.wte.weight"][SHAPE.vocab_size :].any()


def test_fused_loss_without_gradients_is_the_same(build_fused, model, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        fused = build_fused(model, compiled=False, dtype=torch.float32)(inputs, targets)
        assert fused.item() == pytest.approx(model(inputs, targets).item(), abs=1e-5)


def test_activation_checkpointing_changes_no_bit(build_fused, model, tokens):
    plain = gradients(build_fused(model, False, dtype=torch.float32), model, tokens)
    recomputed = gradients(build_fused(model, False, True, dtype=torch.float32), model, tokens)
    assert plain[0] == recomputed[0]
    assert all(torch.equal(gradient, recomputed[1][name]) for name, gradient in plain[1].items())


def test_all_blocks_and_steps_share_one_compiled_block(build_fused, model, tokens, monkeypatch):
    """Three graphs: the embedding, a block, the loss. Other blocks and steps compile no further graph."""
    compile_ = torch.compile

    def without_inductor(function=None, **options):
        return compile_(function, **(options | {"backend": "aot_eager"}))

    monkeypatch.setattr(torch, "compile", without_inductor)
    torch._dynamo.reset()
    counters.clear()
    loss = build_fused(model, compiled=True, dtype=torch.float32)
    expected = gradients(build_fused(model, compiled=False, dtype=torch.float32), model, tokens)
    recomputing = build_fused(model, compiled=True, activation_checkpointing=True, dtype=torch.float32)
    for compiled in (loss, loss, recomputing):
        found = gradients(compiled, model, tokens)
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert all(error(found[1][name], gradient) < 2e-6 for name, gradient in expected[1].items())
        assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("change", ["linear-subclass", "hook", "no-bias", "norm-without-bias"])
def test_modules_that_a_kernel_does_not_compute_use_the_plain_body(build_fused, model, tokens, change):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block, width = model.transformer.h[0], SHAPE.n_embd
    if change == "linear-subclass":
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            linear.__class__ = Doubled
    elif change == "hook":
        block.mlp.c_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif change == "no-bias":
        block.attn.c_attn = torch.nn.Linear(width, 3 * width, bias=False)
    else:
        block.ln_2 = torch.nn.LayerNorm(width, bias=False)
    plain, expected = gradients(model, model, tokens)
    fused, found = gradients(build_fused(model), model, tokens)
    assert fused == pytest.approx(plain, rel=2e-7)
    assert all(error(gradient, expected[name]) < 2e-6 for name, gradient in found.items())


def test_the_compiled_training_copy_runs_an_edited_run_block(build_fused, model, tokens, monkeypatch):
    def half(self, block, x, *inputs):
        x, h = block(x, *inputs)
        return 0.5 * x, 0.5 * h

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: compile_(function, backend="eager"))
    unedited, _ = gradients(model, model, tokens)
    monkeypatch.setattr(GPT, "run_block", half)
    edited, _ = gradients(model, model, tokens)
    compiled, _ = gradients(build_fused(model, compiled=True), model, tokens)
    assert compiled == pytest.approx(edited, rel=1e-6)
    assert abs(compiled - unedited) > 1e-4
