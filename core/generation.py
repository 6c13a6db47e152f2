"""Sampling text from a model with a key-value cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from core import cli
from model import GPT, KVCache


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    max_tokens: int,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[list[int]]:
    """Continue `prompt` (token ids) `samples` times by up to `max_tokens` ids each.

    temperature 0 takes the likeliest id; top_k keeps the k likeliest, top_p the fewest whose probabilities reach p.
    A sample ends before `stop_id`. Equal seeds give equal samples on the same device.
    Raises ValueError for an empty prompt, an id outside the vocabulary, more tokens than the model's context, or a
    model that diverged.
    """
    config = model.config
    check_prompt(prompt, config.vocab_size)
    if len(prompt) + max_tokens > config.n_positions:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {max_tokens} more pass the model's context of {config.n_positions}: "
            f"shorten the prompt, or ask for at most {max(config.n_positions - len(prompt), 0)}"
        )
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: need >= 0, >= 1, and 0 < p <= 1")

    generator = torch.Generator(model.device).manual_seed(seed)
    like = model.transformer.wte.weight
    cache = KVCache(config, samples, len(prompt) + max_tokens, like)
    tokens = torch.tensor([prompt] * samples, device=model.device)  # (N, T)
    rows: list[list[int]] = [[] for _ in range(samples)]
    running = [True] * samples
    for _ in cli.progress_bar(range(max_tokens), "writing", unit="tok", leave=False, delay=1):
        logits = model.logits(model.hidden(tokens, cache)[:, -1])  # (N, V)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: its training diverged; take an earlier checkpoint")
        tokens = pick(logits, temperature, top_k, top_p, generator)  # (N, 1)
        for i, token in enumerate(tokens[:, 0].tolist()):
            running[i] = running[i] and token != stop_id
            if running[i]:
                rows[i].append(token)
        if not any(running):
            break
    return rows


def check_prompt(prompt: list[int], vocab_size: int) -> None:
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token, such as end-of-text")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the model's vocabulary of {vocab_size}: another tokenizer?")


def pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """One id for each row of logits: (N, V) -> (N, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (N, 1)
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)  # (N, V)
        unneeded = p.cumsum(dim=-1) - p >= top_p  # the ids before this one reach p already
        logits = logits.masked_fill(unneeded.gather(-1, order.argsort(dim=-1)), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


def sample_text(model: GPT, encoding: Any, prompt: str, max_tokens: int, **settings: Any) -> Iterator[str]:
    """Texts that continue `prompt`, prompt included; an empty prompt begins a document. `settings` as for generate."""
    from core.data import tokenizer

    end_of_text = tokenizer.end_of_text_id(encoding)
    ids = [end_of_text, *encoding.encode_ordinary(prompt)]
    for row in generate(model, ids, max_tokens, stop_id=end_of_text, **settings):
        yield prompt + encoding.decode(row)
