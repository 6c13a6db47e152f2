"""Text generation with a key-value cache."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from core import cli
from model import GPT, KVCache

DEFAULT_TOKENS = 100  # new tokens of a sample
MIN_TEMPERATURE = 1e-6  # logits divided by less overflow float32; 0 gives the same ids


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
    masked_ids: Tensor | None = None,
) -> list[list[int]]:
    """Continue `prompt` (token ids) `samples` times by up to `max_tokens` ids each. Returns the new ids.

    Temperature 0 picks the most likely id; top_k keeps the k most likely ids, top_p the fewest whose probabilities
    reach p. A sample ends before `stop_id`, and never contains `masked_ids`, (vocab_size,) bool. Equal seeds give
    equal samples on the same device.
    Raises ValueError for an empty prompt, an id outside the vocabulary, more tokens than the model's context, a
    setting out of range, or logits that are not finite.
    """
    config = model.config
    check_prompt(prompt, config.vocab_size)
    if len(prompt) + max_tokens > config.n_positions:
        room = config.n_positions - len(prompt)
        raise ValueError(
            f"--tokens {max_tokens} and the prompt of {len(prompt)} tokens exceed the model's context of "
            f"{config.n_positions}. {f'Use --tokens {room}, or shorten' if room > 0 else 'Shorten'} the prompt"
        )
    check_sampling(temperature, top_k, top_p, seed)
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = allocate_cache(model, samples, len(prompt) + max_tokens)
    tokens = torch.tensor([prompt] * samples, device=model.device)  # (N, T)
    rows: list[list[int]] = [[] for _ in range(samples)]
    is_running = [True] * samples
    for _ in cli.progress_bar(range(max_tokens), "sampling", unit="tok", leave=False, delay=1):
        logits = model.logits(model.hidden(tokens, cache)[:, -1])  # (N, V)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: its training diverged. Use an earlier checkpoint")
        if masked_ids is not None:
            logits = logits.masked_fill(masked_ids, -torch.inf)
        tokens = sample_next(logits, temperature, top_k, top_p, generator)  # (N, 1)
        for i, token in enumerate(tokens[:, 0].tolist()):
            is_running[i] = is_running[i] and token != stop_id
            if is_running[i]:
                rows[i].append(token)
        if not any(is_running):
            break
    return rows


def allocate_cache(model: GPT, samples: int, length: int) -> KVCache:
    try:
        return KVCache(model.config, samples, length, like=model.transformer.wte.weight)
    except RuntimeError:  # of the allocator; torch.OutOfMemoryError is one
        raise ValueError(f"--samples {samples}: out of memory for {length} tokens each. Use fewer samples") from None


def check_prompt(prompt: list[int], vocab_size: int) -> None:
    if not prompt:
        raise ValueError("the prompt is empty. Use at least one token, such as end-of-text")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"token id {token} is outside the model's vocabulary of {vocab_size}. Use the model's own tokenizer"
            )


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"--seed {seed} must be an integer of 64 bits. Use a smaller one")
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"--temperature {temperature} must be 0, or at least {MIN_TEMPERATURE:g}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"--top-k {top_k} must be at least 1, or 0 for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top-p {top_p} must be above 0 and at most 1")


def sample_next(
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
        excluded = p.cumsum(dim=-1) - p >= top_p  # more likely ids reach p without this one
        logits = logits.masked_fill(excluded.gather(-1, order.argsort(dim=-1)), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


def ids_without_token(model: GPT, encoding: Any) -> Tensor | None:
    """The ids of a padded vocabulary that stand for no token, (vocab_size,) bool; None: every id has a token."""
    from core.data import tokenizer

    unused = [i for i in range(model.config.vocab_size) if not tokenizer.has_token(encoding, i)]
    if not unused:
        return None
    mask = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    mask[unused] = True
    return mask.to(model.device)


def sample_text(
    model: GPT,
    encoding: Any,
    prompt: str,
    max_tokens: int | None = None,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Texts that continue `prompt`, prompt included. An empty prompt starts a document. Settings as for generate.

    max_tokens None: DEFAULT_TOKENS, or as many as the context allows.
    """
    from core.data import tokenizer

    end_of_text = tokenizer.end_of_text_id(encoding)
    ids = [end_of_text, *encoding.encode_ordinary(prompt)]
    if max_tokens is None:
        max_tokens = max(min(DEFAULT_TOKENS, model.config.n_positions - len(ids)), 1)
    rows = generate(
        model,
        ids,
        max_tokens,
        samples=samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_id=end_of_text,
        masked_ids=ids_without_token(model, encoding),
    )
    for row in rows:
        yield prompt + encoding.decode(row)
