"""Promise 5: logits equal those of transformers for the same weights, and conversion works in both directions."""

import gc
import io
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from core import ops
from core.convert import computes_gpt2, hf_state
from model import GPT, PRESETS, Block, CausalSelfAttention, KVCache

TINY = replace(PRESETS["tiny"], vocab_size=663)  # padded to 768
SHALLOW = replace(PRESETS["gpt2"], n_layer=3)
WTE = "transformer.wte.weight"


@torch.no_grad()
def randomized(config, seed=0):
    """A model with random biases and gains: with 0 and 1, a wrong mapping would have no effect."""
    model = GPT(config, seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        if p.dim() == 1:
            p.add_(torch.empty_like(p).normal_(0.0, 0.02, generator=generator))
    return model


def random_tokens(vocab_size, length, rows=1, seed=0):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def hf_model(config, weights=None):
    """The model of transformers with this shape, in eval mode, with `weights` where given."""
    from transformers import GPT2Config, GPT2LMHeadModel

    hf_config = GPT2Config(**asdict(config))
    if weights is None:
        return GPT2LMHeadModel(hf_config).eval()
    with torch.device("meta"):  # random weights would take minutes at the large sizes
        hf = GPT2LMHeadModel(hf_config)
    loaded = hf.load_state_dict(weights, strict=False, assign=True)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (["lm_head.weight"], [])
    hf.tie_weights()
    return hf.eval()


@pytest.fixture
def folder(tmp_path):
    """A saved model with the shape of the tiny preset."""
    randomized(TINY).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def as_pickle(folder, content):
    """Replace model.safetensors by a pytorch_model.bin."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


@pytest.mark.parametrize("name, layers", [("gpt2", 12), ("gpt2-medium", 24), ("gpt2-large", 12), ("gpt2-xl", 4)])
@torch.no_grad()
def test_logits_equal_transformers(name, layers):
    config = replace(PRESETS[name], n_layer=layers)
    model = randomized(config)
    tokens = random_tokens(config.vocab_size, 16)
    logits = model(tokens)
    weights = hf_state(model)
    del model
    expected = hf_model(config, weights)(tokens).logits
    del weights
    gc.collect()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert logits.std() > 0.1  # logits that are almost equal would test nothing


def test_presets_have_the_four_published_shapes():
    shapes = {name: tuple(asdict(config).values())[:5] for name, config in PRESETS.items() if name.startswith("gpt2")}
    assert shapes == {
        "gpt2": (12, 12, 768, 1024, 50257),
        "gpt2-medium": (24, 16, 1024, 1024, 50257),
        "gpt2-large": (36, 20, 1280, 1024, 50257),
        "gpt2-xl": (48, 25, 1600, 1024, 50257),
    }


@torch.no_grad()
def test_weights_saved_by_transformers_load(tmp_path):
    hf = hf_model(SHALLOW)
    for p in hf.parameters():
        p.add_(torch.empty_like(p).normal_(0.0, 0.02))
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert model.config == SHALLOW
    expected = dict(hf.named_parameters())
    for name, weight in hf_state(model).items():
        assert torch.equal(weight, expected.pop(name)), name
    assert not expected
    assert not model.transformer.wte.weight[50257:].any()
    tokens = random_tokens(50257, 16)
    torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_transformers_loads_saved_weights(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    model = randomized(SHALLOW)
    model.save_pretrained(tmp_path, end_of_text_id=50256)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(hf) is GPT2LMHeadModel
    assert hf.config.eos_token_id == hf.config.bos_token_id == 50256
    assert hf.generation_config.eos_token_id == 50256
    weights = hf_state(model)
    for name, p in hf.named_parameters():
        assert torch.equal(p, weights.pop(name)), name
    assert not weights
    tokens = random_tokens(50257, 16)
    torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


def test_saving_and_loading_preserves_every_bit(folder):
    loaded, original = GPT.from_pretrained(folder), randomized(TINY)
    assert loaded.config == original.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))


def test_initial_weights_have_the_standard_deviation_of_the_paper():
    model = GPT(PRESETS["gpt2"])
    for name, p in hf_state(model).items():
        if ".ln_" in name:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith(".bias"):
            assert not p.any(), name
        else:
            std = 0.01 if ".wpe." in name else 0.02
            std /= math.sqrt(2 * 12) if name.endswith("c_proj.weight") else 1
            assert p.std().item() == pytest.approx(std, rel=0.01), name
            assert abs(p.mean().item()) < 0.01 * std, name
    assert model.num_parameters() == sum(p.numel() for p in hf_state(model).values()) == 124_439_808


def test_seed_determines_the_initial_weights():
    first, same, other = (GPT(TINY, seed).transformer.wte.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_model_has_no_buffers():
    assert not list(GPT(TINY).buffers())  # DistributedDataParallel would broadcast them


def test_padding_rows_stay_zero_and_have_no_logits():
    model = GPT(TINY)
    wte = model.transformer.wte.weight
    assert wte.shape[0] == 768
    assert not wte[663:].any()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    tokens = random_tokens(663, 17, rows=4)
    for _ in range(3):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        assert wte.grad[:663].any()
        assert not wte.grad[663:].any()
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        optimizer.zero_grad()
    assert not wte[663:].any()
    assert model(tokens).shape == (4, 17, 663)


def test_loss_is_the_cross_entropy_without_padding():
    model, tokens = randomized(TINY), random_tokens(663, 17, rows=4)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logprobs = model(inputs).log_softmax(dim=-1)
    expected = -logprobs.gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model(inputs, targets), expected)


def test_masked_loss_for_gpus_has_the_same_gradients():
    model, tokens = randomized(TINY), random_tokens(663, 17, rows=4)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    sliced, _ = gradients(model, inputs, targets)
    logits = ops.masked_logits(model.hidden(inputs), model.transformer.wte.weight, 663)  # (4, 16, 768)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, model(inputs, targets))
    loss.backward()
    masked = [p.grad for p in model.parameters()]
    assert all(wte.shape[0] == 768 and not wte[663:].any() for wte in (sliced[0], masked[0]))
    for found, expected in zip(sliced, masked, strict=True):
        torch.testing.assert_close(found, expected)


def gradients(model, tokens, targets):
    """Gradients of the loss, and the bytes that were saved for the backward pass."""
    saved = {}  # by address: a tensor may be saved more than once

    def save(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(tokens, targets)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return grads, sum(saved.values())


def test_activation_checkpointing_changes_no_bit_and_saves_memory():
    model = GPT(replace(PRESETS["tiny"], n_layer=6, vocab_size=128), seed=3)
    tokens, targets = torch.randint(128, (2, 16, 64), generator=torch.Generator().manual_seed(1)).unbind()
    plain, plain_bytes = gradients(model, tokens, targets)
    model.activation_checkpointing = True
    recomputed, recomputed_bytes = gradients(model, tokens, targets)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, plain, strict=True))
    assert recomputed_bytes < plain_bytes / 3


@torch.no_grad()
def test_logits_with_a_cache_equal_those_of_one_forward_pass():
    model, tokens = randomized(TINY), random_tokens(663, 40, rows=3)
    expected = model(tokens)
    cache = KVCache(TINY, batch_size=3, max_length=40, like=model.transformer.wte.weight)
    logits = [model(chunk, cache=cache) for chunk in tokens.split([17, 5, 1, 1, 16], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_depend_on_no_later_token():
    model, tokens = randomized(TINY), random_tokens(663, 32)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 663
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.isclose(before[:, 20:], after[:, 20:]).all(dim=-1).any()


def wrong_shape(weights):
    weights["transformer.h.0.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"].T.contiguous()


def missing(weights):
    del weights["transformer.h.1.attn.c_proj.bias"]


def unknown(weights):
    weights["transformer.h.2.ln_1.weight"] = torch.ones(32)


@pytest.mark.parametrize(
    "change, message",
    [
        (wrong_shape, r"h\.0\.mlp\.c_fc\.weight has shape \(128, 32\).*\(32, 128\)"),
        (missing, r"lacks 1 tensors, such as transformer\.h\.1\.attn\.c_proj\.bias"),
        (unknown, r"also has 1 tensors, such as transformer\.h\.2\.ln_1\.weight"),
    ],
)
def test_weights_that_do_not_match_are_refused(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "gpt_neo"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("n_inner", 64),
        ("n_head", 5),
    ],
)
def test_other_architectures_are_refused(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"{key}.* {value!r}"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"n_layer": 2,', '{"n_layer": "two"}'])
def test_damaged_config_is_refused_by_name(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file_is_refused_by_name(folder, file):
    (folder / file).unlink()
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_safetensors_are_refused_by_name(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        GPT.from_pretrained(folder)


def test_older_format_loads(folder):
    """As uploaded by OpenAI: a pickle without prefix, with the causal masks."""
    weights = load_file(folder / "model.safetensors")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    as_pickle(folder, {name.removeprefix("transformer."): w for name, w in weights.items()} | masks)
    loaded = hf_state(GPT.from_pretrained(folder))
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_pickle_that_contains_code_is_refused_and_not_executed(folder, tmp_path):
    trace = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return open, (str(trace), "w")

    weights = load_file(folder / "model.safetensors")
    as_pickle(folder, weights | {"evil": Evil()})
    with pytest.raises(ValueError, match=r"pytorch_model\.bin contains more than tensors"):
        GPT.from_pretrained(folder)
    assert not trace.exists()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"not a pickle", saved([1, 2])], ids=["empty", "text", "list"])
def test_pickle_without_weights_is_refused_by_name(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        GPT.from_pretrained(folder)


def test_a_buffer_of_the_network_is_refused_by_name(monkeypatch):
    class BlockWithBuffer(Block):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("scale", torch.full((4,), 3.0))

    monkeypatch.setattr("model.Block", BlockWithBuffer)
    with pytest.raises(ValueError, match=r"buffer transformer\.h\.0\.scale would be uninitialized\. Compute it in"):
        GPT(PRESETS["tiny"])


class OwnNorm(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(8)))
        self.bias = nn.Parameter(torch.ones(8))


def block_with_norm(name):
    class BlockWithNorm(Block):
        def __init__(self, config):
            super().__init__(config)
            self.q_norm, self.k_norm = nn.RMSNorm(8), OwnNorm(name)

    return BlockWithNorm


def test_gains_of_any_norm_start_at_one_and_biases_at_zero(monkeypatch):
    monkeypatch.setattr("model.Block", block_with_norm("weight"))
    block = GPT(PRESETS["tiny"]).transformer.h[1]
    for norm in (block.q_norm, block.k_norm):
        assert torch.equal(norm.weight.detach(), torch.ones(8))
    assert torch.equal(block.k_norm.bias.detach(), torch.zeros(8))
    assert torch.equal(block.ln_1.weight.detach(), torch.ones(32))


def test_a_vector_of_unknown_meaning_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("model.Block", block_with_norm("gamma"))
    message = r"parameter transformer\.h\.0\.k_norm\.gamma has no initial value\. Name it `weight` \(1\) or `bias`"
    with pytest.raises(ValueError, match=message):
        GPT(PRESETS["tiny"])
    GPT(PRESETS["tiny"], seed=None)  # its weights are loaded


def test_a_network_with_renamed_parameters_is_saved_as_modified_and_read_back(monkeypatch, tmp_path):
    class Renamed(CausalSelfAttention):
        def __init__(self, config):
            super().__init__(config)
            self.qkv = self._modules.pop("c_attn")

        def __getattr__(self, name):  # the forward of GPT-2, with another name of its weights
            return super().__getattr__("qkv" if name == "c_attn" else name)

    monkeypatch.setattr("model.CausalSelfAttention", Renamed)
    model = randomized(PRESETS["tiny"])
    assert not computes_gpt2(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2_modified"
    tokens = random_tokens(100, 9)
    assert torch.equal(GPT.from_pretrained(tmp_path)(tokens), model(tokens))
