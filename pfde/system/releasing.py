"""What a node of autograd's graph holds in Python is let go when torch frees what the node has saved.

A backward pass without retain_graph frees the tensors that each node has saved as soon as the node is done; what a node
of ours holds beside them, torch knows nothing of. At the end of the pass the saved tensors tell: if they are gone no
further backward pass can reach the node's data.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.autograd import Variable


def release_with_graph(ctx: Any, *names: str) -> None:
    """Within a node's backward: at the end of this backward pass set these attributes to None if its graph was freed.

    ctx : of a torch.autograd.Function that has saved a tensor
    """
    Variable._execution_engine.queue_callback(partial(_release, ctx, names))


def _release(ctx: Any, names: tuple[str, ...]) -> None:
    try:
        _ = ctx.saved_tensors
    except RuntimeError:  # freed
        for name in names:
            setattr(ctx, name, None)
