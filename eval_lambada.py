"""Score a model on LAMBADA: predict the last word of a passage, by named protocols.

    python eval_lambada.py --ckpt logs/gpt2                          # a run; the test set comes from the hub
    python eval_lambada.py --ckpt gpt2 gpt2-medium --protocol all    # OpenAI's weights, every protocol
    python eval_lambada.py --ckpt logs/gpt2 --data lambada_test_plain_text.txt
    torchrun --nproc_per_node=8 eval_lambada.py --ckpt gpt2-xl       # GPUs share the passages
    python eval_lambada.py --compare a.jsonl b.jsonl                 # McNemar's test of two files of --items

Results go to logs/results/, where report.py reads them.
"""

from dataclasses import dataclass, field

from core import cli
from core.eval import evaluate, lambada


@dataclass
class Config:
    questions: lambada.LambadaConfig = field(default_factory=lambada.LambadaConfig)
    scoring: evaluate.ScoringConfig = field(default_factory=evaluate.ScoringConfig)
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    evaluate.run(lambada.TASK, config.questions, config.scoring)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
