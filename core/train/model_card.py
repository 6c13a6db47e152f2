"""The model card of a checkpoint: README.md, as the Hugging Face hub shows it."""

import json
from pathlib import Path
from typing import Any

from core.files import read_metrics
from core.train.recipe import SETTINGS

# Nothing here depends on interruptions of the run: an uninterrupted run has the same card.
CARD = """---
library_name: {library}
pipeline_tag: text-generation
tags:
- gpt2
---

# {title}

A GPT-2 of {parameters:,} parameters, {start}, after step {step:,} of {steps:,}.

| | |
|---|---|
{rows}

{usage}

This is a base model: it continues text. It was not tuned to follow instructions or to be safe.
"""

USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```"""
MODIFIED_USAGE = """This network is a modified GPT-2, which `transformers` refuses. With the model.py in this folder,
`GPT.from_pretrained({folder!r})` loads it."""


def model_card(run_folder: Path, manifest: dict[str, Any], step: int, is_gpt2: bool = True) -> str:
    """The card of the checkpoint after `step`, with the latest evaluations up to that step."""
    facts = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    measured = {line["split"]: line for line in read_metrics(run_folder) if line["step"] <= step}  # the last of each
    seen = measured["train"]["tokens"] if "train" in measured else 0
    split = {name: sum(s["tokens"] for s in manifest["shards"] if s["split"] == name) for name in ("train", "val")}
    versions = facts["versions"]
    rows = {
        "architecture": f"{facts['preset']}, sequences of {facts['seq_len']:,} tokens",
        "data": f"{manifest['source']['name']}{revision_of(manifest)}: {split['train']:,} training tokens",
        "encoding": manifest["encoding"],
        "manifest": f"sha256 {facts['manifest_hash']}",
        "tokens seen": f"{seen:,}, {seen / split['train']:.2f} epochs",
        "recipe": f"{facts['recipe']}: " + ", ".join(f"{name} {facts[name]}" for name in SETTINGS),
        "seed": str(facts["seed"]),
        "computed with": f"torch {versions['torch']}, Python {versions['python']}, {facts['dtype']}, "
        f"{facts['world_size']} x {versions['device']}, code {versions['git']}",
    }
    if "val" in measured and measured["val"]["loss"] is not None:
        val = measured["val"]
        bits = f", {val['bits_per_byte']:.4f} bits per byte" if val["bits_per_byte"] else ""
        rows["validation loss"] = f"{val['loss']:.4f} nats per token{bits} (step {val['step']:,})"
    for task, title in (("lambada", "LAMBADA"), ("hellaswag", "HellaSwag")):
        if score := measured.get(task):
            counts = f"{score['correct']:,} of {score['total']:,}"
            file = f" in {Path(name).name}" if (name := facts[f"eval_{task}"]) else ""
            rows[f"{title}, `{score['protocol']}`"] = (
                f"{100 * score['accuracy']:.2f} % ({counts}{file}, step {score['step']:,})"
            )
    return CARD.format(
        title=f"{run_folder.name}, step {step:,}",
        library="transformers" if is_gpt2 else "pytorch",
        parameters=facts["parameters"],
        start=f"initialized from {facts['init_from']}" if facts["init_from"] else "trained from scratch",
        step=step,
        steps=facts["steps"],
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        usage=(USAGE if is_gpt2 else MODIFIED_USAGE).format(folder=f"step_{step:06d}"),
    )


def revision_of(manifest: dict[str, Any]) -> str:
    revision = manifest["source"]["revision"]
    return f" at revision {revision}" if revision else ""
