"""Question sets from the Hugging Face hub."""

from typing import Any


def rows(name: str, config: str, split: str) -> list[dict[str, Any]]:
    """All rows of a split. Raises ValueError, with what to do, where the hub can't be reached."""
    import logging

    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a hub out of reach is said below
    try:
        return list(load_dataset(name, config, split=split))
    except Exception as error:  # the hub's client raises what its transport raised
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the hub gave no {name} ({reason}): check the network, or give a local file with --data"
        ) from None
