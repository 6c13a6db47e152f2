"""Score a model on HellaSwag: choose which of four endings follows a description, by named protocols.

    python eval_hellaswag.py --ckpt logs/gpt2                        # a run; the validation split comes from the hub
    python eval_hellaswag.py --ckpt gpt2 gpt2-medium --protocol all  # OpenAI's weights, every protocol
    python eval_hellaswag.py --ckpt logs/gpt2 --data hellaswag_val.jsonl
    torchrun --nproc_per_node=8 eval_hellaswag.py --ckpt gpt2-xl     # GPUs share the questions
    python eval_hellaswag.py --compare a.jsonl b.jsonl               # McNemar's test of two files of --items

Results go to logs/results/, where report.py reads them.
"""

from dataclasses import dataclass, field

from core import cli
from core.eval import evaluate, hellaswag


@dataclass
class Config:
    questions: hellaswag.HellaSwagConfig = field(default_factory=hellaswag.HellaSwagConfig)
    scoring: evaluate.ScoringConfig = field(default_factory=evaluate.ScoringConfig)
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    evaluate.run(hellaswag.TASK, config.questions, config.scoring)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
