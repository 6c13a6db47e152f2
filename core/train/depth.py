"""Progressive depth (`--shallow-fraction`): the first part of the training computes every second block.

A network of half the depth learns as much per token at first, in 0.5 to 0.6 times the time. The other blocks, the idle
ones, start with output projections of zero and thus compute zero: leaving them out changes nothing, and a checkpoint of
any step is a plain GPT-2 of full depth. Later they start to be trained as copies of the block below, but for their
output projections, so that the loss doesn't change in this step (docs/recipes.md has the trials).
"""

import torch

from model import GPT, Block


def idle_blocks(model: GPT) -> list[Block]:
    """The blocks that `GPT.hidden` leaves out where shallow."""
    return list(model.transformer.h[1::2])


@torch.no_grad()
def start_shallow(model: GPT) -> None:
    """Make the idle blocks compute zero. Raises ValueError for an edited network where that can't be."""
    check_pairs(model)
    was_training, kept = model.training, []
    for block in idle_blocks(model):
        for name, p in block.named_parameters():
            if ".c_proj." in name:
                p.zero_()
            else:  # other values for the check: whatever they become, the block must compute zero
                kept.append((p, p.clone()))
                p.add_(1.0)
    tokens = torch.arange(min(2, model.config.n_positions))[None]  # (1, 2)
    model.eval()
    try:
        is_equal = torch.equal(model(tokens), model(tokens, shallow=True))
    except TypeError as error:
        raise refusal(f"its forward pass doesn't accept shallow ({error})") from None
    finally:
        model.train(was_training)
        for p, value in kept:
            p.copy_(value)
    if not is_equal:
        raise refusal("blocks change the residual stream even where their output projections (c_proj) are zero")


def check_pairs(model: GPT) -> None:
    """Raise ValueError unless each idle block has the parameters of the block below, and shares none."""
    idle = {id(p) for block in idle_blocks(model) for p in block.parameters()}
    others = [p for block in model.transformer.h[::2] for p in block.parameters()]
    if any(id(p) in idle for p in others) or len(idle) < sum(len(list(b.parameters())) for b in idle_blocks(model)):
        raise refusal("blocks share parameters")
    for block, below in zip(idle_blocks(model), model.transformer.h[::2], strict=False):
        shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (block, below)]
        if shapes[0] != shapes[1]:
            different = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
            raise refusal(f"{different[0]} isn't in all blocks with the same shape")


def refusal(reason: str) -> ValueError:
    return ValueError(f"--shallow-fraction can't be used with the edited model.py: {reason}. Use --shallow-fraction 0")


class Depth:
    """Which blocks are trained: neither DDP nor a CUDA graph may expect gradients of idle ones."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        parameters = [p for block in idle_blocks(model) for p in block.parameters()]
        self._idle = [p for p in parameters if p.requires_grad]  # the others are frozen for good

    def set(self, shallow: bool) -> None:
        """Train every second block, or all."""
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
