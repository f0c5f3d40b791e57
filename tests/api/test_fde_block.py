"""pfde.nn.FDEBlock: copies, pickles and state dicts; its arguments."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import pfde
from support.faults import Field, assert_same, start


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"alpha": 1.0, "learn_alpha": True}, ValueError, r"alpha must be below 1 to be learned.*: got 1"),
        (
            {"alpha": start(0.5)},
            ValueError,
            r"alpha requires a gradient.*use alpha=alpha.detach\(\) with learn_alpha=True",
        ),
        ({"alpha": 0.5, "t": 1.0}, ValueError, r"t must be one-dimensional with at least one time.*: got shape \(\)"),
        ({"alpha": 1.2}, ValueError, r"alpha must be in \(0, 1\]: got 1.2"),
        ({"alpha": 0.5, "method": "rk4"}, ValueError, "method must be one of .*: got 'rk4'"),
        ({"alpha": 0.5, "t": (1.0, 0.0)}, ValueError, "t must be increasing"),
        ({}, TypeError, "missing 1 required keyword-only argument: 'alpha'"),
    ],
)
def test_block_arguments(keywords: dict, error: type[Exception], message: str) -> None:
    """When it is made; others are in test_fault_arguments.py."""
    with pytest.raises(error, match=message):
        pfde.nn.FDEBlock(Field(), **keywords)


@pytest.mark.parametrize("learn_alpha", [True, False])
def test_a_block_survives_copies_pickles_and_state_dicts(learn_alpha: bool) -> None:
    def step(block: nn.Module) -> list[Tensor]:
        block.zero_grad()
        y0 = start()
        y = block(y0)
        y.square().sum().backward()
        return [y.detach(), y0.grad, *(p.grad for p in block.parameters())]

    block = pfde.nn.FDEBlock(Field(), alpha=0.7, learn_alpha=learn_alpha, step_size=0.25, gradient=pfde.Discrete())
    del block.func.hook  # a lambda: not picklable, and not needed
    type(block.func).hook = staticmethod(lambda _: None)
    expected = step(block)
    assert len(expected) == 4 if learn_alpha else 3
    assert_same(step(copy.deepcopy(block)), expected)
    assert_same(step(pickle.loads(pickle.dumps(block))), expected)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = pfde.nn.FDEBlock(Field(), alpha=0.3, learn_alpha=learn_alpha, step_size=0.25)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.alpha, block.alpha)
    assert_same(step(other), expected)
    assert float(block.alpha.detach()) == pytest.approx(0.7, abs=1e-15)


def test_a_block_keeps_an_iterator_of_params() -> None:
    f = Field()
    block = pfde.nn.FDEBlock(lambda t, y: f(t, y), alpha=0.7, params=f.parameters())
    for _ in range(2):
        block(start()).sum().backward()
