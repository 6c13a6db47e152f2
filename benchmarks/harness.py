"""LAMBADA by lm-evaluation-harness, offline: reference scores of a Hugging Face model folder."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

TASK = "lambada_local"


def harness(
    folder: str, passages: list[str], batch_size: int, device: str, dtype: str = "float32"
) -> tuple[list[tuple[float, bool]], float, float]:
    """Log-probability of each target and whether it is greedy; seconds in `loglikelihood`; seconds in total.

    Context, target and metrics are those of lm_eval's lambada_openai.yaml. Both times exclude loading the model. Raises
    ValueError if a request is not the passage split at its last space.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before the first import
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Timed(HFLM):
        seconds = 0.0

        def loglikelihood(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            start = time.perf_counter()
            answers = super().loglikelihood(*args, **kwargs)  # Python numbers: the device has finished
            self.seconds += time.perf_counter() - start
            return answers

    model = Timed(pretrained=folder, batch_size=batch_size, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as name:
        data, task = Path(name, "passages.jsonl"), Path(name, "task.yaml")
        data.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages), encoding="utf-8")
        metrics = (("perplexity", "perplexity", False), ("acc", "mean", True))
        keys = ("metric", "aggregation", "higher_is_better")
        config = {
            "task": TASK,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(Path(name, "cache"))},
            "output_type": "loglikelihood",
            "test_split": "test",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [dict(zip(keys, metric, strict=True)) for metric in metrics],
        }
        task.write_text(yaml.safe_dump(config), encoding="utf-8")
        start = time.perf_counter()
        manager = TaskManager(include_path=name, include_defaults=False)
        results = lm_eval.simple_evaluate(model, tasks=[TASK], task_manager=manager, bootstrap_iters=0)
        seconds = time.perf_counter() - start
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    for sample, passage in zip(samples, passages, strict=True):
        context, _, target = passage.rpartition(" ")
        if [tuple(request) for request in sample["arguments"]] != [(context, " " + target)]:
            raise ValueError(f"lm_eval's request {sample['arguments']} is not the passage {passage!r}")
    return [(float(s["resps"][0][0][0]), bool(s["resps"][0][0][1])) for s in samples], model.seconds, seconds
