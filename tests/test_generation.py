"""Sampling: greedy decoding equals transformers', equal seeds give equal samples, and each limit is exact."""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import run

from core import convert
from core.data import tokenizer
from core.generation import generate, sample_next
from model import GPT, PRESETS

PROMPT = [5, 400, 31]
LOGITS = torch.tensor([1.0, 4.0, -2.0, 3.0, 0.5, 3.5, -1.0, 2.0])


@pytest.fixture(scope="module")
def model():
    """Large random weights, so that the most likely token differs between positions."""
    model = GPT(replace(PRESETS["tiny"], vocab_size=663), seed=3).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(80.0 if ".wpe." in name else 8.0)
    return model


def draws(logits, temperature=1.0, top_k=None, top_p=None, count=4000):
    """The number of draws of each id."""
    rows = logits.expand(count, -1)
    ids = sample_next(rows, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    assert ids.shape == (count, 1)
    return torch.bincount(ids[:, 0], minlength=len(logits))


def drawn(*args, **settings):
    return set(draws(*args, **settings).nonzero()[:, 0].tolist())


def nucleus(logits, top_p):
    """The fewest most likely ids whose probabilities reach top_p, added one by one."""
    probabilities, kept, total = logits.double().softmax(0).tolist(), set(), 0.0
    for i in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        kept.add(i)
        total += probabilities[i]
        if total >= top_p:
            return kept
    return kept


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_diverged_model_is_an_error(temperature):
    diverged = GPT(PRESETS["tiny"])
    with torch.no_grad():
        diverged.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite: its training diverged"):
        generate(diverged, PROMPT, 5, temperature=temperature)


def test_greedy_equals_transformers(model):
    from transformers import GPT2Config, GPT2LMHeadModel

    reference = GPT2LMHeadModel(GPT2Config(**asdict(model.config))).eval()
    reference.load_state_dict(convert.hf_state(model), strict=False)
    settings = {"do_sample": False, "max_new_tokens": 61, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(torch.tensor([PROMPT]), **settings)[0, len(PROMPT) :].tolist()
    assert generate(model, PROMPT, 61, temperature=0) == [expected]
    assert len(set(expected)) > 20  # a constant sequence would prove little


def test_the_seed_determines_the_samples(model):
    first, same, other = (generate(model, PROMPT, 20, samples=3, seed=seed) for seed in (7, 7, 8))
    assert first == same != other
    assert len({tuple(row) for row in first}) == 3


def test_top_k_of_one_is_greedy(model):
    assert generate(model, PROMPT, 30, top_k=1, samples=2, seed=5) == 2 * generate(model, PROMPT, 30, temperature=0)


def test_ids_stay_within_the_vocabulary(model):
    """The output matrix has 768 rows; uniform draws would soon select a padding row."""
    rows = generate(model, PROMPT, 60, samples=32, temperature=100.0)
    ids = [i for row in rows for i in row]
    assert len(ids) == 32 * 60
    assert 600 < max(ids) < 663
    assert min(ids) >= 0


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 100])
def test_top_k_keeps_the_k_most_likely_ids(k):
    assert drawn(LOGITS, top_k=k) == set(LOGITS.argsort(descending=True)[:k].tolist())


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0])
def test_top_p_keeps_the_fewest_ids_that_reach_p(p):
    assert drawn(LOGITS, top_p=p) == nucleus(LOGITS, p)


def test_top_p_applies_after_temperature_and_top_k():
    """Each of the three most likely ids has between 27 % and 41 % at temperature 2."""
    scaled = (LOGITS / 2).tolist()
    best = sorted(range(8), key=lambda i: -scaled[i])[:3]
    weights = torch.tensor([scaled[i] if i in best else -torch.inf for i in range(8)])
    for p, size in ((0.35, 1), (0.6, 2), (0.8, 3)):
        kept = nucleus(weights, p)
        assert len(kept) == size
        assert drawn(LOGITS, temperature=2.0, top_k=3, top_p=p) == kept


def test_draws_follow_the_probabilities():
    frequencies = draws(LOGITS, temperature=2.0, count=40_000) / 40_000
    torch.testing.assert_close(frequencies, (LOGITS / 2).softmax(0), atol=0.01, rtol=0)


def test_each_row_samples_from_its_own_logits():
    logits = torch.full((5, 8), -torch.inf)
    for row, i in enumerate((3, 0, 7, 1, 1)):
        logits[row, i] = 0.0
    ids = sample_next(logits, 1.0, 4, 0.9, torch.Generator().manual_seed(0))
    assert ids[:, 0].tolist() == [3, 0, 7, 1, 1]


def test_a_sample_ends_before_the_stop_id(model):
    (full,) = generate(model, PROMPT, 40, temperature=0)
    stop = full[25]
    assert generate(model, PROMPT, 40, temperature=0, stop_id=stop) == [full[: full.index(stop)]]
    free = generate(model, PROMPT, 40, samples=4, seed=2)
    stop = free[1][10]
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(model, PROMPT, 40, samples=4, seed=2, stop_id=stop) == cut  # the other rows continue


@pytest.mark.parametrize(
    "prompt, settings, message",
    [
        ([], {}, "prompt is empty"),
        ([5, 663], {}, "token id 663 .* vocabulary of 663"),
        ([5, -1], {}, "token id -1 .* vocabulary of 663"),
        ([5] * 60, {}, "--tokens 5 and the prompt of 60 tokens exceed .* context of 64. Use --tokens 4"),
        ([5] * 70, {}, "70 tokens .* context of 64"),
        (PROMPT, {"temperature": -1.0}, "--temperature -1.0 must be 0, or at least 1e-06"),
        (PROMPT, {"top_k": 0}, "--top-k 0 must be at least 1"),
        (PROMPT, {"top_p": 0.0}, "--top-p 0.0 must be above 0"),
        (PROMPT, {"top_p": 1.1}, r"--top-p 1\.1 must be .* at most 1"),
    ],
)
def test_invalid_prompts_and_settings_are_refused(model, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, 5, **settings)


def test_the_command_line_continues_the_prompt(world, tmp_path):
    data = world / "data/stories"
    encoding = tokenizer.load(data)
    model = GPT(replace(PRESETS["tiny"], vocab_size=encoding.n_vocab))
    model.save_pretrained(tmp_path)
    tokenizer.save(encoding, tmp_path)
    prompt = "One morning"
    arguments = ("--ckpt", tmp_path, "--prompt", prompt, "--tokens", 12, "--samples", 2, "--seed", 4, "--device", "cpu")
    texts = run("sample.py", *arguments, cwd=tmp_path).stdout.removesuffix("\n").split("\n---\n")
    ids = [tokenizer.end_of_text_id(encoding), *encoding.encode(prompt)]
    expected = generate(model, ids, 12, samples=2, top_k=50, seed=4, stop_id=ids[0])
    assert texts == [prompt + encoding.decode(row) for row in expected]
    assert texts[0] != texts[1]
