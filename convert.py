"""Convert a GPT-2 checkpoint of any known format.

    python convert.py --ckpt out/ckpt.pt --out models/mine                      # nanoGPT -> Hugging Face
    python convert.py --ckpt log124M/model_00019560.bin --out models/mine       # llm.c -> Hugging Face
    python convert.py --ckpt logs/gpt2 --out models/mine --format llmc          # -> models/mine/model.bin
    python convert.py --ckpt gpt2 --out models/mine --format nanogpt            # -> models/mine/ckpt.pt

Read: runs, checkpoint folders and Hugging Face folders, hub names, and checkpoint files of nanoGPT, build-nanogpt,
llm.c (versions 3 and 5) and the original project.
For GGUF, run llama.cpp's convert_hf_to_gguf.py on a checkpoint or Hugging Face folder.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core import checkpoint, cli, formats
from core.convert import computes_gpt2, save_pretrained
from core.data import tokenizer
from model import GPT


@dataclass
class Config:
    ckpt: str
    """Model: a run or checkpoint folder, a Hugging Face folder, a checkpoint file, or a hub name (gpt2, ...)."""
    out: str
    """Folder to write, which must be new or empty."""
    format: Literal["hf", "llmc", "nanogpt"] = "hf"
    """Format to write. hf: config.json, model.safetensors and tokenizer files; llmc: model.bin, for llm.c; nanogpt:
    ckpt.pt, for the --out_dir of nanoGPT."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of llmc: float32 is version 3, bfloat16 version 5, which rounds the weights. Others are float32."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    out = Path(config.out)
    if out.is_file() or out.suffix in (".bin", ".pt", ".pth", ".safetensors"):
        raise ValueError(f"--out {out} must be a folder, not a file. Use a new folder, such as {out.with_suffix('')}")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty. Use a new folder")
    if config.dtype != "float32" and config.format != "llmc":
        raise ValueError(f"--dtype {config.dtype} needs --format llmc. Omit it")
    source = checkpoint.resolve(config.ckpt)
    model = checkpoint.load_model(source)
    if config.format != "hf" and not computes_gpt2(model):
        raise ValueError(
            f"--format {config.format} needs the network of GPT-2, and model.py computes another one. Use --format hf"
        )
    written = out
    if config.format == "llmc":
        written = out / "model.bin"
        formats.write_llmc(model, written, config.dtype)
    elif config.format == "nanogpt":
        written = out / "ckpt.pt"
        formats.write_nanogpt(model, written)
        if model.config.activation_function != "gelu":
            print(
                "warning: nanoGPT computes the exact GELU, this model the tanh form: its logits there differ slightly"
            )
    else:
        write_hf(model, source, out)
    print(f"saved {written}")


def write_hf(model: GPT, source: str, out: Path) -> None:
    """A Hugging Face folder with the tokenizer of the source, or without one where the source has none."""
    try:
        encoding = checkpoint.load_encoding(source, model.config.vocab_size)
    except ValueError as error:
        print(f"warning: {out} gets no tokenizer: {error}")
        return save_pretrained(model, out)
    save_pretrained(model, out, tokenizer.end_of_text_id(encoding))
    tokenizer.save(encoding, out)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
