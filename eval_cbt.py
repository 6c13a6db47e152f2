"""Score a model on the Children's Book Test: choose which of ten words fills the blank, by named protocols.

    python eval_cbt.py --ckpt logs/gpt2                              # a run; NE and CN, validation, from the hub
    python eval_cbt.py --ckpt gpt2 gpt2-medium --types NE CN V P --split test --protocol all
    python eval_cbt.py --ckpt logs/gpt2 --data cbtest_NE_valid_2000ex.txt cbtest_CN_valid_2000ex.txt
    torchrun --nproc_per_node=8 eval_cbt.py --ckpt gpt2-xl           # GPUs share the questions
    python eval_cbt.py --compare a.jsonl b.jsonl                     # McNemar's test of two files of --items

Results go to logs/results/, where report.py reads them.
"""

from dataclasses import dataclass, field

from core import cli
from core.eval import cbt, evaluate


@dataclass
class Config:
    questions: cbt.CBTConfig = field(default_factory=cbt.CBTConfig)
    scoring: evaluate.ScoringConfig = field(default_factory=evaluate.ScoringConfig)
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    evaluate.run(cbt.TASK, config.questions, config.scoring)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
