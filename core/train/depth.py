"""Progressive depth (`--shallow-fraction`): the first part of the training computes every second block.

A network of half the depth learns as much per token at first, in 0.6 times the time. The other blocks, the idle ones,
start with output projections of zero and thus compute zero: leaving them out changes nothing, and a checkpoint of any
step is a plain GPT-2 of full depth. Later they start to be trained as copies of the block below, but for their output
projections, so that the loss doesn't change in this step (docs/recipes.md has the trials).
"""

import torch

from model import GPT, Block


def idle_blocks(model: GPT) -> list[Block]:
    """The blocks that `GPT.hidden` leaves out where shallow."""
    return list(model.transformer.h[1::2])


@torch.no_grad()
def start_shallow(model: GPT) -> None:
    """Make the idle blocks compute zero. Raises ValueError where an edited network can't be made so."""
    for block in idle_blocks(model):
        for name, p in block.named_parameters():
            if ".c_proj." in name:
                p.zero_()
    tokens = torch.arange(min(2, model.config.n_positions), device=model.device)[None]  # (1, 2)
    if not torch.equal(model.hidden(tokens), model.hidden(tokens, shallow=True)):
        raise ValueError(
            "--shallow-fraction leaves out blocks whose output projections (c_proj) are zero, but those of the edited "
            "model.py then still change the residual stream. Use --shallow-fraction 0"
        )


class Depth:
    """Which blocks are trained: neither DDP nor a CUDA graph may expect gradients of idle ones."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        parameters = [p for block in idle_blocks(model) for p in block.parameters()]
        self._idle = [p for p in parameters if p.requires_grad]  # the others are frozen for good

    def set(self, shallow: bool) -> None:
        for p in self._idle:
            p.requires_grad_(not shallow)

    @torch.no_grad()
    def deepen(self) -> None:
        """Train all blocks from now on. A second call, after a resume in the same step, changes nothing."""
        self.set(False)
        for block, below in zip(idle_blocks(self._model), self._model.transformer.h[::2], strict=False):
            sources = dict(below.named_parameters())
            for name, p in block.named_parameters():
                if ".c_proj." not in name:
                    p.copy_(sources[name])
