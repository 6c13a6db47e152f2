"""Promise 5 for files of other projects: the logits of transformers, or a refusal by name; written files read back."""

import json
import math
import os
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENCODING, refused, run, save_model
from safetensors.torch import load_file, save_file

import convert
from core import checkpoint, cli, formats, generation
from core.convert import hf_state
from core.data import tokenizer
from model import GPT, PRESETS

MODELS = Path(os.environ.get("GPT2_TEST_MODELS", "no folder"))
V, T, C, L, H = 300, 64, 32, 2, 2  # vocabulary, context, width, layers and heads of the tiny model below
TOKENS = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(3))


def hf_config(**changes):
    from transformers import GPT2Config

    shape = {"vocab_size": V, "n_positions": T, "n_embd": C, "n_layer": L, "n_head": H}
    return GPT2Config(**(shape | {"bos_token_id": 0, "eos_token_id": 0} | changes))


@torch.no_grad()
def hf_model(seed=5, **changes):
    """A random GPT-2 of transformers, whose activations are large enough to tell the two forms of GELU apart."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(seed)
    hf = GPT2LMHeadModel(hf_config(**changes)).eval()
    for name, p in hf.named_parameters():
        p.copy_(
            torch.randn_like(p) * (0.3 if p.dim() == 2 else 0.1) + (1.0 if "ln_" in name and "weight" in name else 0)
        )
    return hf


@pytest.fixture(scope="module")
def hf():
    return {activation: hf_model(activation_function=activation) for activation in ("gelu_new", "gelu")}


@torch.no_grad()
def expected(hf):
    return hf(TOKENS).logits


def linear_state(hf):
    """Weights as nn.Linear stores them, under nanoGPT's names, with the tied head."""
    state = hf.state_dict()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: w.T.contiguous() if name.endswith(linear) else w.clone() for name, w in state.items()}


def padded(state, rows=384):
    """The state with a vocabulary of more rows, as nanoGPT trains it."""
    more = torch.cat([state["transformer.wte.weight"], torch.randn(rows - V, C)])
    return state | {"transformer.wte.weight": more, "lm_head.weight": more}


def renamed(state, *pairs):
    for old, new in pairs:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def nanogpt_file(path, state, **changes):
    shape = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "bias": True, "vocab_size": V, "dropout": 0.0}
    facts = {"optimizer": {"state": {}, "param_groups": []}, "iter_num": 7, "best_val_loss": torch.tensor(3.1)}
    content = {"model": state, "model_args": shape | changes, "config": {"dataset": "x", "learning_rate": 6e-4}}
    torch.save(content | facts, path)


def build_nanogpt_file(path, state):
    """The pickle of a dataclass of __main__, as the script train_gpt2.py writes it."""
    config = type("GPTConfig", (), {"__module__": "__main__"})()
    config.__dict__.update(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C)
    main = sys.modules["__main__"]
    main.GPTConfig = type(config)
    try:
        torch.save({"model": state, "config": config, "step": 5000, "val_loss": 3.2}, path)
    finally:
        del main.GPTConfig


def llmc_file(path, hf, version=3, **header):
    """A model file of llm.c, written independently of this project."""
    state, dtype = linear_state(hf), torch.bfloat16 if version == 5 else torch.float32
    rows = math.ceil(V / 128) * 128
    fields = [20240326, version, T, V, L, H, C, rows]
    fields[7] = header.get("padded", rows)
    tensors = [torch.cat([state["transformer.wte.weight"], torch.zeros(rows - V, C)]), state["transformer.wpe.weight"]]
    kinds = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in kinds:
        for part in ("weight", "bias"):
            tensors += [state[f"transformer.h.{i}.{kind}.{part}"] for i in range(L)]
    tensors += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    content = b"".join(t.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    path.write_bytes(struct.pack("<256i", *fields, *[0] * 248) + content)


ORIGINAL_NAMES = (
    ("transformer.wte.", "token_embedding."),
    ("transformer.wpe.", "pos_embedding."),
    ("transformer.h.", "blocks."),
    ("transformer.", ""),
    (".attn.c_proj.", ".attn.proj."),
    (".attn.c_attn.", ".attn.attn."),
    (".mlp.c_fc.", ".mlp.fc."),
    (".mlp.c_proj.", ".mlp.proj."),
)


def with_masks(state, name):
    mask = torch.ones(1, 1, T, T).tril()
    return state | {f"{prefix}.{i}.attn.{name}": mask for i in range(L) for prefix in ["transformer.h"]}


def folder_of(hf, folder, **changes):
    """The Hugging Face folder that transformers saves, with changes of config.json."""
    hf.save_pretrained(folder)
    path = folder / "config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not ...}
    path.write_text(json.dumps(config))
    return folder


def as_pickle(folder, wrap=lambda state: state):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(wrap(state), folder / "pytorch_model.bin")
    return folder


def sharded_pickle(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def sharded(hf, folder):
    hf.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def file(write, *args, **settings):
    """A form that is a file."""

    def make(hf, folder):
        folder.mkdir()
        write(folder / "a.pt", *args, **settings) if args else write(folder / "a.pt", hf, **settings)
        return folder / "a.pt"

    return make


# Name -> the activation of the random GPT-2, and a function that writes it in this form and returns the source.
FORMS = {
    "safetensors": ("gelu_new", folder_of),
    "sharded safetensors": ("gelu_new", sharded),
    "pickle": ("gelu_new", lambda hf, path: as_pickle(folder_of(hf, path))),
    "sharded pickle": ("gelu_new", lambda hf, path: sharded_pickle(folder_of(hf, path))),
    "exact GELU": ("gelu", folder_of),
    "gelu_pytorch_tanh": ("gelu_new", lambda hf, path: folder_of(hf, path, activation_function="gelu_pytorch_tanh")),
    "n_ctx": ("gelu_new", lambda hf, path: folder_of(hf, path, n_positions=..., n_ctx=T)),
    "without prefix": (
        "gelu_new",
        lambda hf, path: as_pickle(folder_of(hf, path), lambda state: renamed(state, ("transformer.", ""))),
    ),
    "of torch.compile and DDP": (
        "gelu_new",
        lambda hf, path: as_pickle(
            folder_of(hf, path), lambda state: {f"module._orig_mod.{name}": w for name, w in state.items()}
        ),
    ),
    "in model": ("gelu_new", lambda hf, path: as_pickle(folder_of(hf, path), lambda state: {"model": state})),
    "in state_dict": ("gelu_new", lambda hf, path: as_pickle(folder_of(hf, path), lambda state: {"state_dict": state})),
    "with a tied head": (
        "gelu_new",
        lambda hf, path: as_pickle(
            folder_of(hf, path), lambda state: state | {"lm_head.weight": state["transformer.wte.weight"].clone()}
        ),
    ),
    "nanoGPT": ("gelu", file(lambda path, hf: nanogpt_file(path, linear_state(hf)))),
    "nanoGPT, compiled, with masks": (
        "gelu",
        file(
            lambda path, hf: nanogpt_file(
                path, {f"_orig_mod.{name}": w for name, w in with_masks(linear_state(hf), "bias").items()}
            )
        ),
    ),
    "nanoGPT, padded": ("gelu", file(lambda path, hf: nanogpt_file(path, padded(linear_state(hf)), vocab_size=384))),
    "build-nanogpt": ("gelu_new", file(lambda path, hf: build_nanogpt_file(path, linear_state(hf)))),
    "llm.c float32": ("gelu_new", file(llmc_file)),
    "llm.c bfloat16": ("gelu_new", file(llmc_file, version=5)),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_each_form_of_a_random_gpt2_has_the_logits_of_transformers(hf, tmp_path, form):
    activation, write = FORMS[form]
    source = write(hf[activation], tmp_path / "source")
    model = checkpoint.load_model(checkpoint.resolve(str(source)))
    reference = hf[activation]
    if "bfloat16" in form:
        reference = hf_model(activation_function=activation).bfloat16().float()
    torch.testing.assert_close(model(TOKENS)[..., :V], expected(reference), atol=1e-4, rtol=0)
    assert model.config.activation_function == activation
    assert (expected(hf["gelu"]) - expected(hf["gelu_new"])).abs().max() > 1e-3  # the forms of GELU differ


@torch.no_grad()
def test_the_original_projects_checkpoint_has_the_logits_of_transformers(tmp_path, capsys):
    """It has the shape of GPT-2 124M, exact GELU and a vocabulary of 50,304; here with a short context."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=50304, n_positions=T, activation_function="gelu")
    hf = GPT2LMHeadModel(config).eval()
    state = renamed(with_masks(linear_state(hf), "tril"), *ORIGINAL_NAMES)
    torch.save({"step": 19072, "model_state_dict": state}, tmp_path / "step19072.pt")
    model = checkpoint.load_model(checkpoint.resolve(str(tmp_path / "step19072.pt")))
    torch.testing.assert_close(model(TOKENS), hf(TOKENS).logits, atol=1e-4, rtol=0)
    note = "is read as a checkpoint of the original project, with the exact (erf) GELU"
    assert f"note: {tmp_path}/step19072.pt {note}" in capsys.readouterr().out


@pytest.mark.skipif(not MODELS.is_dir(), reason="GPT2_TEST_MODELS is not a folder of trained models")
@torch.no_grad()
def test_small_trained_models_of_other_projects():
    from transformers import GPT2LMHeadModel

    model = checkpoint.load_model(str(MODELS / "capp-gpt"))
    tokens = torch.randint(53, (2, 100), generator=torch.Generator().manual_seed(0))
    reference = GPT2LMHeadModel.from_pretrained(MODELS / "capp-gpt", dtype=torch.float32).eval()
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=0)

    path = MODELS / "slm4096/ckpt.pt"
    model = checkpoint.load_model(checkpoint.resolve(str(path)))
    ids = torch.load(path, weights_only=True)["stoi"]
    text = torch.tensor([ids[character] for character in (MODELS / "slm4096/corpus.txt").read_text()])
    nats = 0.0
    for start in range(0, len(text) - 1, 128):  # blocks that don't overlap
        targets = text[start + 1 : start + 129][None]
        nats += model(text[start : start + 128][None, : targets.size(1)], targets).item() * targets.numel()
    assert nats / (len(text) - 1) == pytest.approx(0.070764, abs=5e-7)  # with the tanh form: 0.070770


def edit_weights(change):
    """A folder whose tensors are changed."""

    def make(hf, path):
        folder_of(hf, path)
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


def head(weights, difference=0.0):
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + difference


def edit_config(**changes):
    return lambda hf, path: folder_of(hf, path, **changes)


def halve(weights):
    for name in list(weights):
        weights[name] = weights[name].half()


# 30 ways in which a folder can mean something else. Each has the logits of transformers or is refused by this name.
MATRIX = {
    "plain": (edit_config(), None),
    "another head": (edit_weights(lambda w: head(w, 0.01)), "lm_head.weight differs from wte.weight"),
    "another head by one weight": (
        edit_weights(lambda w: head(w, 1e-3 * torch.eye(V, C))),
        "lm_head.weight differs from wte.weight",
    ),
    "the same head": (edit_weights(head), None),
    "a head with more rows": (
        edit_weights(lambda w: w.update({"lm_head.weight": torch.randn(V + 4, C)})),
        "lm_head.weight differs from wte.weight",
    ),
    "a head bias": (edit_weights(lambda w: w.update({"lm_head.bias": torch.ones(V)})), "such as lm_head.bias"),
    "an untied head": (edit_config(tie_word_embeddings=False), "tie_word_embeddings is False"),
    "exact GELU": (edit_config(activation_function="gelu"), None),
    "ReLU": (edit_config(activation_function="relu"), "activation_function is 'relu'"),
    "SiLU": (edit_config(activation_function="silu"), "activation_function is 'silu'"),
    "quick GELU": (edit_config(activation_function="quick_gelu"), "activation_function is 'quick_gelu'"),
    "a fast GELU": (edit_config(activation_function="gelu_fast"), None),
    "no activation": (edit_config(activation_function=None), "activation_function is None"),
    "unscaled attention": (edit_config(scale_attn_weights=False), "scale_attn_weights is False"),
    "attention scaled by layer": (
        edit_config(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx is True",
    ),
    "reordered attention": (edit_config(reorder_and_upcast_attn=True), None),
    "another epsilon": (edit_config(layer_norm_epsilon=1e-3), "layer_norm_epsilon is 0.001"),
    "another n_inner": (edit_config(n_inner=64), "n_inner is 64"),
    "n_inner in full": (edit_config(n_inner=4 * C), None),
    "other heads": (edit_config(n_head=4), None),
    "heads by two names": (edit_config(num_attention_heads=4), "num_attention_heads, its other name, is 4"),
    "shape by general names": (
        edit_config(n_head=..., num_attention_heads=2, n_layer=..., num_hidden_layers=2),
        None,
    ),
    "heads that are not an integer": (edit_config(n_head=2.5), "n_head is 2.5, not an integer"),
    "float16": (edit_weights(halve), None),
    "int8": (
        edit_weights(lambda w: w.update({"transformer.wpe.weight": torch.ones(T, C, dtype=torch.int8)})),
        "dtype torch.int8",
    ),
    "quantized": (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config is set"),
    "a tensor that is missing": (
        edit_weights(lambda w: w.pop("transformer.h.1.ln_2.bias")),
        "lacks 1 tensors, such as transformer.h.1.ln_2.bias",
    ),
    "one layer more": (
        edit_weights(lambda w: w.update({"transformer.h.2.ln_1.weight": torch.ones(C)})),
        "also has 1 tensors, such as transformer.h.2.ln_1.weight",
    ),
    "one layer fewer in the config": (edit_config(n_layer=1), "also has 12 tensors"),
    "a classifier": (edit_weights(lambda w: w.update({"score.weight": torch.ones(2, C)})), "such as score.weight"),
    "a tensor by two names": (
        edit_weights(lambda w: w.update({"wpe.weight": torch.zeros(T, C)})),
        "wpe.weight under two names",
    ),
    "cross-attention": (edit_config(add_cross_attention=True), None),
    "a mask": (edit_weights(lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(1, 1, T, T).tril()})), None),
    "a longer context than the weights": (edit_config(n_positions=128), "wpe.weight has shape (64, 32)"),
    "a larger vocabulary than the weights": (edit_config(vocab_size=V + 1), "wte.weight has shape (300, 32)"),
    "weights of another name": (edit_config(transformers_weights="other.safetensors"), "transformers_weights is set"),
    "GPT-1": (edit_config(model_type="openai-gpt"), "GPT-1"),
    "GPT-Neo": (edit_config(model_type="gpt_neo", n_layer=...), "model_type is 'gpt_neo'"),
    "an adapter": (lambda hf, path: adapter(folder_of(hf, path)), "is a PEFT adapter"),
    "a pointer of Git LFS": (lambda hf, path: pointer(folder_of(hf, path)), "is a pointer of Git LFS"),
    "a shard that is missing": (
        lambda hf, path: without(sharded(hf, path), "model-00002*"),
        "is missing, but model.safetensors.index.json lists it",
    ),
    "a tensor that no shard has": (lambda hf, path: unlisted(sharded(hf, path)), "lacks transformer.h.9.ln_1.weight"),
    "a damaged index": (lambda hf, path: nested(sharded(hf, path)), "is not an index of weight files"),
}


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    return folder


def pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
    (folder / "model.safetensors").write_text(text)
    return folder


def without(folder, pattern):
    for path in list(folder.glob(pattern)):
        path.unlink()
    return folder


def nested(folder):
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    return folder


def unlisted(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.h.9.ln_1.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("case", MATRIX)
@torch.no_grad()
def test_a_folder_has_the_logits_of_transformers_or_is_refused_by_name(hf, tmp_path, case):
    from transformers import AutoModelForCausalLM

    write, message = MATRIX[case]
    folder = write(hf["gelu_new"], tmp_path / "folder")
    if message is not None:
        with pytest.raises(ValueError) as error:
            checkpoint.load_model(checkpoint.resolve(str(folder)))
        assert message in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        return
    model = checkpoint.load_model(checkpoint.resolve(str(folder)))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, atol=1e-4, rtol=0)


REFUSED = {  # files, and what their error says
    "nanoGPT without biases": (
        lambda path, hf: nanogpt_file(path, {n: w for n, w in linear_state(hf).items() if "bias" not in n}, bias=False),
        "bias is False, but GPT-2 has biases",
    ),
    "nanoGPT without its arguments": (
        lambda path, hf: torch.save({"model": linear_state(hf)}, path),
        "neither their number of heads nor their activation",
    ),
    "nanoGPT with another head": (
        lambda path, hf: nanogpt_file(path, linear_state(hf) | {"lm_head.weight": torch.zeros(V, C)}),
        "lm_head.weight differs from wte.weight",
    ),
    "nanoGPT with another activation": (
        lambda path, hf: torch.save(
            {"model": linear_state(hf), "config": {"activation_function": "relu"}, "model_args": {"block_size": T}},
            path,
        ),
        "its configuration has no n_layer",
    ),
    "llm.c of version 1": (lambda path, hf: llmc_file(path, hf, version=1), "version 1 .*float32 without padding"),
    "llm.c of version 2": (lambda path, hf: llmc_file(path, hf, version=2), "version 2 .*LayerNorms|bfloat16 without"),
    "llm.c of version 4": (lambda path, hf: llmc_file(path, hf, version=4), "version 4 .*float32 LayerNorms"),
    "llm.c of version 7": (lambda path, hf: llmc_file(path, hf, version=7), "its version is 7"),
    "llm.c with another padding": (lambda path, hf: llmc_file(path, hf, padded=512), "is damaged: it has .* bytes"),
    "llm.c that is cut short": (
        lambda path, hf: llmc_file(path, hf) or path.write_bytes(path.read_bytes()[:-4]),
        "is damaged: it has .* bytes",
    ),
    "llm.c with its header only": (lambda path, hf: path.write_bytes(struct.pack("<2i", 20240326, 3)), "version is 0"),
    "optimizer state of llm.c": (lambda path, hf: path.write_bytes(struct.pack("<i", 20240527)), "optimizer state"),
    "data of llm.c": (lambda path, hf: path.write_bytes(struct.pack("<i", 20240520)), "llm.c file of data"),
    "GGUF": (lambda path, hf: path.write_bytes(b"GGUF" + bytes(20)), "is a GGUF file"),
    "a pointer of Git LFS": (
        lambda path, hf: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n"),
        "is a pointer of Git LFS",
    ),
    "text": (lambda path, hf: path.write_text("hello"), "is not a folder, and not a checkpoint file of a known format"),
    "a zip file": (lambda path, hf: path.write_bytes(b"PK\x03\x04" + bytes(100)), "can't be read as tensors|more than"),
    "a list": (lambda path, hf: torch.save([1, 2], path), "contains no tensors by name, but a list"),
    "no tensors": (lambda path, hf: torch.save({"a": 1}, path), "contains no tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_in_one_sentence(hf, tmp_path, case):
    write, message = REFUSED[case]
    path = tmp_path / "a.pt"
    write(path, hf["gelu_new"])
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_model(checkpoint.resolve(str(path)))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


LITTLE_MEMORY = """
import re, resource, sys
from pathlib import Path
from core import cli
from core.weights import read_tensors

def main(_):
    used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
    read_tensors(Path("pytorch_model.bin"))

cli.run(main, cli.Terminal, "")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_lack_of_memory_is_not_reported_as_damage(tmp_path):
    torch.save({"a": torch.zeros(2**25)}, tmp_path / "pytorch_model.bin")  # 128 MiB
    (tmp_path / "read.py").write_text(LITTLE_MEMORY)
    error = refused(run(tmp_path / "read.py", cwd=tmp_path, check=False))
    assert "memory" in error and "Download" not in error


def test_an_adapter_is_named_with_and_without_a_model(hf, tmp_path):
    adapter(folder_of(hf["gelu_new"], tmp_path / "model"))
    with pytest.raises(ValueError, match="is a PEFT adapter"):
        GPT.from_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(ValueError, match="is a PEFT adapter"):
        checkpoint.resolve(str(tmp_path / "model"))


def test_weights_without_a_config_name_the_folder(hf, tmp_path):
    folder_of(hf["gelu_new"], tmp_path / "folder")
    with pytest.raises(ValueError, match=rf"is one file of a model folder. Use --ckpt {tmp_path}/folder$"):
        checkpoint.resolve(str(tmp_path / "folder/model.safetensors"))
    (tmp_path / "folder/config.json").unlink()
    with pytest.raises(ValueError, match=r"weights without a config.json. Name a folder that contains both"):
        checkpoint.resolve(str(tmp_path / "folder/model.safetensors"))


def test_a_folder_with_a_checkpoint_file_names_the_file(hf, tmp_path):
    nanogpt_file(tmp_path / "ckpt.pt", linear_state(hf["gelu"]))
    with pytest.raises(ValueError, match=rf"Name a checkpoint file in it, such as {tmp_path}/ckpt.pt"):
        checkpoint.resolve(str(tmp_path))


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (self.trace, "w")


def test_code_in_a_checkpoint_file_is_not_executed(hf, tmp_path):
    trace = tmp_path / "executed"
    for key in ("model", "config", "more"):
        content = {"model": linear_state(hf["gelu"]), "model_args": {"block_size": T}} | {key: Evil(str(trace))}
        torch.save(content, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match=r"ckpt.pt contains more than tensors"):
            checkpoint.load_model(str(tmp_path / "ckpt.pt"))
        assert not trace.exists()


def converted(source, out, *options):
    convert.main(cli.parse(convert.Config, args=["--ckpt", str(source), "--out", str(out), *options]))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@torch.no_grad()
def test_a_converted_folder_has_the_logits_and_the_activation_in_transformers(hf, tmp_path, activation):
    from transformers import AutoModelForCausalLM

    write = {"gelu_new": build_nanogpt_file, "gelu": nanogpt_file}[activation]
    write(tmp_path / "a.pt", linear_state(hf[activation]))
    converted(tmp_path / "a.pt", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["activation_function"] == activation
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(reference(TOKENS).logits, expected(hf[activation]))


def bits(model):
    return {name: tensor.view(torch.int32) for name, tensor in hf_state(model).items()}


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("form, file", [("hf", ""), ("nanogpt", "ckpt.pt"), ("llmc", "model.bin")])
@torch.no_grad()
def test_each_written_format_is_read_back_bit_for_bit(hf, tmp_path, capsys, activation, form, file):
    folder_of(hf[activation], tmp_path / "a")
    if (form, activation) == ("llmc", "gelu"):
        with pytest.raises(ValueError, match=r"llm\.c computes the tanh form of GELU, this model the exact one"):
            converted(tmp_path / "a", tmp_path / "b", "--format", form)
        assert not (tmp_path / "b").exists()
        return
    converted(tmp_path / "a", tmp_path / "b", "--format", form)
    before = checkpoint.load_model(str(tmp_path / "a"))
    after = checkpoint.load_model(checkpoint.resolve(str(tmp_path / "b" / file)))
    assert after.config == before.config
    assert bits(after).keys() == bits(before).keys()
    assert all(torch.equal(tensor, bits(before)[name]) for name, tensor in bits(after).items())
    warned = "warning: nanoGPT computes the exact GELU" in capsys.readouterr().out
    assert warned == (form == "nanogpt" and activation == "gelu_new")


@pytest.mark.parametrize("dtype, version, itemsize", [("float32", 3, 4), ("bfloat16", 5, 2)])
def test_a_written_llmc_file_has_the_size_and_the_bytes_of_the_format(hf, tmp_path, dtype, version, itemsize):
    folder_of(hf["gelu_new"], tmp_path / "a")
    converted(tmp_path / "a", tmp_path / "b", "--format", "llmc", "--dtype", dtype)
    llmc_file(tmp_path / "expected.bin", hf["gelu_new"], version=version)
    content = (tmp_path / "b/model.bin").read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header == (20240326, version, T, V, L, H, C, 384, *[0] * 248)
    parameters = 384 * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    assert len(content) == 1024 + itemsize * parameters
    assert content == (tmp_path / "expected.bin").read_bytes()


def test_the_llmc_file_of_gpt2_has_its_published_size():
    config = PRESETS["gpt2"]
    assert formats.llmc_size(config, config.padded_vocab_size, torch.float32) == 497_904_640


class NanoGPTBlock(torch.nn.Module):
    """The parameters of nanoGPT's block, for its loaders."""

    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(C), torch.nn.LayerNorm(C)
        self.attn = torch.nn.ModuleDict({"c_attn": linear(C, 3 * C), "c_proj": linear(C, C)})
        self.mlp = torch.nn.ModuleDict({"c_fc": linear(C, 4 * C), "c_proj": linear(4 * C, C)})


def test_a_written_nanogpt_file_loads_as_nanogpt_loads_it(hf, tmp_path):
    folder_of(hf["gelu"], tmp_path / "a")
    converted(tmp_path / "a", tmp_path / "b", "--format", "nanogpt")
    content = torch.load(tmp_path / "b/ckpt.pt", weights_only=True)
    names = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert content["model_args"].keys() == names  # nanoGPT passes them to its GPTConfig
    modules = {"wte": torch.nn.Embedding(V, C), "wpe": torch.nn.Embedding(T, C), "ln_f": torch.nn.LayerNorm(C)}
    modules["h"] = torch.nn.ModuleList(NanoGPTBlock() for _ in range(L))
    model = torch.nn.Module()
    model.transformer = torch.nn.ModuleDict(modules)
    model.lm_head = torch.nn.Linear(C, V, bias=False)
    model.transformer.wte.weight = model.lm_head.weight
    model.load_state_dict(content["model"])
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2]}, {"params": [p for p in parameters if p.dim() < 2]}]
    torch.optim.AdamW(groups).load_state_dict(content["optimizer"])
    assert {"iter_num", "best_val_loss", "config"} <= content.keys()


def test_convert_refuses_a_folder_with_files_a_file_and_an_unused_precision(hf, tmp_path):
    folder_of(hf["gelu_new"], tmp_path / "a")
    with pytest.raises(ValueError, match=r"--out .*a is not empty. Use a new folder"):
        converted(tmp_path / "a", tmp_path / "a")
    with pytest.raises(ValueError, match="--dtype bfloat16 needs --format llmc"):
        converted(tmp_path / "a", tmp_path / "b", "--dtype", "bfloat16")
    with pytest.raises(
        ValueError, match=r"--out .*b/model\.bin must be a folder, not a file\. Use a new folder, such as .*b/model$"
    ):
        converted(tmp_path / "a", tmp_path / "b/model.bin", "--format", "llmc")
    assert not (tmp_path / "b").exists()


def test_convert_keeps_the_tokenizer_of_a_folder(tmp_path):
    save_model(tmp_path / "a", seed=1)
    converted(tmp_path / "a", tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name


def test_rows_beyond_the_tokenizer_are_not_sampled(tmp_path):
    """A model with random weights gives the rows of a padded vocabulary as often as others."""
    model = GPT(replace(PRESETS["tiny"], vocab_size=1024), seed=1)
    texts = list(generation.sample_text(model, ENCODING, "Ana", 40, samples=8, temperature=5.0, seed=2))
    assert len(texts) == 8
    rows = generation.generate(model, [1], 40, samples=8, temperature=5.0, seed=2)
    assert max(max(row) for row in rows) >= ENCODING.n_vocab


def test_a_padded_vocabulary_trains_and_is_evaluated_where_the_ids_fit(world, tmp_path):
    for name in ("data",):
        shutil.copytree(world / name, tmp_path / name)
    model = GPT(replace(PRESETS["tiny"], vocab_size=704), seed=1)
    model.save_pretrained(tmp_path / "other")
    options = ("--preset", "tiny", "--data", "data/small", "--device", "cpu", "--seq-len", 64, "--init-from", "other")
    training = ("--batch-tokens", 2048, "--micro-batch", 16, "--steps", 2, "--val-tokens", 2048)
    assert "step 2/2" in run("train.py", *options, *training, cwd=tmp_path).stdout
    assert "704" not in refused(
        run("train.py", *options[:-1], "nowhere/x", cwd=tmp_path, check=False, HF_HUB_OFFLINE="1")
    )
    assert "val_loss" in run("train.py", *options, "--eval-only", "--val-tokens", 2048, cwd=tmp_path).stdout
    saved = checkpoint.load_model(checkpoint.resolve(str(tmp_path / "logs/tiny")))
    assert saved.config.vocab_size == 704
    assert run(
        "sample.py", "--ckpt", "logs/tiny", "--tokens", 20, "--temperature", 9, "--top-k", 0, cwd=tmp_path
    ).stdout


def test_a_much_larger_vocabulary_without_a_tokenizer_is_refused(world, hf, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    torch.manual_seed(0)
    nanogpt_file(tmp_path / "ckpt.pt", padded(linear_state(hf["gelu"]), rows=50304), vocab_size=50304)
    options = ("--preset", "tiny", "--data", "data/small", "--device", "cpu", "--init-from", "ckpt.pt", "--eval-only")
    error = refused(run("train.py", *options, cwd=tmp_path, check=False))
    assert "ckpt.pt has 50,304 token ids, data/small has 664, and one has no tokenizer to compare" in error


def test_shards_of_another_tokenizer_are_refused(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    GPT(replace(PRESETS["tiny"], vocab_size=ENCODING.n_vocab), seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save(ENCODING, tmp_path / "other")
    spec = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(spec))
    options = ("--preset", "tiny", "--data", "data/small", "--device", "cpu", "--seq-len", 64, "--init-from", "other")
    error = refused(run("train.py", *options, "--eval-only", cwd=tmp_path, check=False))
    assert "other has another tokenizer than data/small: id" in error
