"""Let a model write.

    python sample.py --ckpt logs/gpt2 --prompt "The history of the telescope"
    python sample.py --ckpt gpt2-xl --tokens 200 --top-p 0.9 --samples 3 --seed 7

Without --prompt the model begins a document of its own.
"""

from dataclasses import dataclass
from typing import Annotated

from core import checkpoint, cli
from core.distributed import pick_device
from core.generation import sample_text


@dataclass
class Config:
    ckpt: str
    """Model: a run or checkpoint folder, a Hugging Face folder, or a hub name (gpt2, gpt2-medium, ...)."""
    prompt: str = ""
    """Text to continue. Default: begin a document."""
    tokens: int = 100
    """Tokens to add at most; a sample ends sooner where the model ends its document."""
    samples: int = 1
    """How many texts to write."""
    temperature: float = 1.0
    """Below 1 keeps to likelier words; 0 always takes the likeliest."""
    top_k: int = 50
    """Draw from so many of the likeliest tokens only; 0: from all."""
    top_p: Annotated[float | None, cli.DEFAULT_IN_HELP] = None
    """Draw from the fewest tokens whose probabilities reach p."""
    seed: int = 0
    """Equal seeds give equal texts on the same device."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""


def main(config: Config) -> None:
    cli.check_positive(tokens=config.tokens, samples=config.samples)
    source = checkpoint.resolve(config.ckpt)
    model = checkpoint.load_model(source).to(pick_device(config.device))
    encoding = checkpoint.load_encoding(source, model.config.vocab_size)
    texts = sample_text(
        model,
        encoding,
        config.prompt,
        config.tokens,
        samples=config.samples,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        seed=config.seed,
    )
    print("\n---\n".join(texts))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
