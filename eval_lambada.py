"""Score a model on LAMBADA: how often it knows a passage's last word, by protocol.

    python eval_lambada.py --ckpt logs/gpt2                          # a run; the test set comes from the hub
    python eval_lambada.py --ckpt gpt2 gpt2-medium --protocol all    # OpenAI's weights, every protocol
    python eval_lambada.py --ckpt logs/gpt2 --data lambada_test_plain_text.txt

Results go to logs/results/, where report.py finds them.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core import checkpoint, cli, results
from core.distributed import pick_device
from core.results import Result
from core.scoring import score
from core.tasks import lambada

Passages = tuple[list[str], dict[str, Any]]  # the passages, and how results name them


@dataclass
class Config:
    ckpt: tuple[str, ...]
    """Models: a run or checkpoint folder, a Hugging Face folder, or a hub name (gpt2, gpt2-medium, ...)."""
    data: str | None = None
    """File of passages: .txt, one a line, or .jsonl with a `text` field. Default: the hub's test set."""
    text: Literal["openai", "standard", "other"] | None = None
    """Which text --data holds: OpenAI's, the tokenised standard one, or one of your own. Known from LAMBADA's own
    file names; lines can't tell."""
    protocol: tuple[Literal[("all", *lambada.PROTOCOLS)], ...] = ()
    """How to score; `all` that the data allow. Default: openai, on a standard text standard."""
    batch_size: int = 32
    """Passages a forward. Changes the result by rounding alone."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    out: str | None = None
    """File for the results. Default: one in logs/results/, where report.py looks."""
    items: str | None = None
    """File for the outcome of each passage, a JSON object a line."""


def main(config: Config) -> None:
    cli.check_positive(batch_size=config.batch_size)
    sources = checkpoint.resolve_all(config.ckpt)
    text = which_text(config)
    protocols = which_protocols(config, text)
    passages = load_passages(config, protocols, text)
    device = pick_device(config.device)
    found: list[Result] = []
    items: list[dict[str, Any]] = []
    for source in sources:
        model = checkpoint.load_model(source).to(device)
        encoding = checkpoint.load_encoding(source, model.config.vocab_size)
        for protocol in protocols:
            result, verdicts = evaluate(model, encoding, source, protocol, passages[protocol], config)
            found.append(result)
            items += [
                {"model": result.model, "protocol": protocol, "index": i, "correct": v.correct, "logprob": v.logprob}
                for i, v in enumerate(verdicts)
            ]
    print(f"\n{results.results_table(found)}\n")
    if any(result.has_published for result in found):
        print(
            f"On the test set of {lambada.TEST_PASSAGES:,} passages, accuracy % (perplexity); OpenAI's weights unless"
        )
        print("the source says otherwise:\n")
        print(results.published_table("lambada", protocols))
    print(results.near_ties_line(found))
    if config.items:
        results.save_items(items, config.items)
    print(f"\nsaved {results.save(found, config.out)}")


def which_text(config: Config) -> str | None:
    """The text that --data holds, None for the hub's. Raises ValueError where nothing tells."""
    if config.data is None:
        if config.text is not None:
            raise ValueError(f"--text {config.text} says what --data holds: give --data, or choose by --protocol")
        return None
    known, _ = lambada.FILES.get(Path(config.data).name, (None, 0))
    if config.text is None and known is None:
        raise ValueError(
            f"--data {config.data}: lines can't tell which text they are; add --text openai (as OpenAI's "
            f"lambada_test.jsonl), --text standard (tokenised), or --text other (your own passages)"
        )
    return config.text or known


def which_protocols(config: Config, text: str | None) -> list[str]:
    """The protocols to run. Raises ValueError for one that the text doesn't allow."""
    possible = list(lambada.PROTOCOLS) if text is None else lambada.allowed(text)
    chosen = list(dict.fromkeys(config.protocol)) or possible[:1]
    if "all" in chosen:
        return possible
    for protocol in chosen:
        if protocol not in possible:
            raise ValueError(
                f"--protocol {protocol} needs another text than {text}, which allows {', '.join(possible)}"
            )
    return chosen


def load_passages(config: Config, protocols: list[str], text: str | None) -> dict[str, Passages]:
    """The passages for each protocol."""
    if config.data is not None:
        path = Path(config.data)
        loaded = lambada.read(path), results.data_facts(path, "")
        return dict.fromkeys(protocols, loaded)
    needed = {lambada.PROTOCOLS[protocol] for protocol in protocols}
    by_text = {text: (lambada.from_hub(text), results.data_facts(None, lambada.HUB[text][0])) for text in needed}
    return {protocol: by_text[lambada.PROTOCOLS[protocol]] for protocol in protocols}


def evaluate(
    model: Any, encoding: Any, source: str, protocol: str, passages: Passages, config: Config
) -> tuple[Result, list[lambada.Verdict]]:
    begin = time.perf_counter()
    texts, facts = passages
    banned = lambada.stop_word_mask(encoding, model.config.vocab_size) if protocol == "stop-filter" else None
    questions = [lambada.question(protocol, text, encoding.encode_ordinary) for text in texts]
    verdicts = lambada.judge(score(model, questions, config.batch_size, banned, label=f"LAMBADA {protocol}"))
    result = Result(
        task="lambada",
        protocol=protocol,
        model=results.short_name(source),
        correct=sum(verdict.correct for verdict in verdicts),
        total=len(verdicts),
        perplexity=lambada.perplexity(protocol, verdicts),
        seconds=time.perf_counter() - begin,
        near_ties=sum(verdict.near_tie for verdict in verdicts),
        has_published=config.text != "other",
        **facts,
    )
    return result, verdicts


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
