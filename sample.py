"""Generate text with a model.

    python sample.py --ckpt logs/gpt2 --prompt "The history of the telescope"
    python sample.py --ckpt gpt2-xl --tokens 200 --top-p 0.9 --samples 3 --seed 7

Without --prompt, the model starts a new document.
"""

from dataclasses import dataclass, field
from typing import Annotated

from core import checkpoint, cli
from core.distributed import pick_device
from core.generation import sample_text


@dataclass
class Config:
    ckpt: str
    """Model: a run or checkpoint folder, a Hugging Face folder, a checkpoint file of nanoGPT, build-nanogpt or llm.c,
    or a hub name (gpt2, gpt2-medium, ...)."""
    prompt: Annotated[str, cli.DEFAULT_IN_HELP] = ""
    """Text to continue. Default: the start of a new document."""
    tokens: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Maximum number of new tokens; a sample ends earlier if the model ends the document. Default: 100, or as many as
    the context of the model allows."""
    samples: int = 1
    """Number of texts to generate."""
    temperature: float = 1.0
    """Divisor of the logits: below 1 prefers likely tokens; 0 always picks the most likely one."""
    top_k: int = 50
    """Number of most likely tokens to sample from; 0: all."""
    top_p: Annotated[float | None, cli.DEFAULT_IN_HELP] = None
    """Probability: sample from the fewest most likely tokens that reach it together. Default: no limit."""
    seed: int = 0
    """Random seed: equal seeds give equal texts on the same device."""
    device: str = "auto"
    """Device: auto, cuda, mps or cpu."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


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
