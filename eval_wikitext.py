"""Measure the perplexity of a model on WikiText's test text, by named protocols.

    python eval_wikitext.py --ckpt logs/gpt2                         # a run; the test text comes from the hub
    python eval_wikitext.py --ckpt gpt2 gpt2-large --protocol all --stride 1024 512
    python eval_wikitext.py --ckpt logs/gpt2 --data wiki.test.raw
    torchrun --nproc_per_node=8 eval_wikitext.py --ckpt gpt2-xl      # GPUs share the windows

WikiText-2 and WikiText-103 have the same test text. Results go to logs/results/, where report.py reads them.
"""

from dataclasses import dataclass, field

from core import cli
from core.eval import evaluate, wikitext


@dataclass
class Config:
    text: wikitext.WikiTextConfig = field(default_factory=wikitext.WikiTextConfig)
    scoring: evaluate.ScoringConfig = field(default_factory=evaluate.ScoringConfig)
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    evaluate.run(wikitext.TASK, config.text, config.scoring)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
