"""Derivatives in the orders by dual numbers: to the bit those of torch's forward mode, which takes what has no rule."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

import pfde
from pfde.caputo.dual import NoRuleError, _dual, differentiate
from pfde.caputo.intervals import quadrature
from pfde.caputo.schemes import METHODS
from pfde.caputo.schemes.base import Weights
from support.covering import pairs

X = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
K = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
ORDERS = {"one": [0.6], "the last": [1.0], "the first": [0.01], "three": [0.35, 0.7, 0.95]}

OPERATIONS = {
    "a number on either side": lambda x: (2 + x) * 3 - (x - 1) / 4 + (1 - 2 * x) + (x + 2) * (3 * x),
    "a tensor on either side": lambda x: (K + x) * K - (x - K) / K + (K - K * x) + (x + K) * (x * K),
    "two of them": lambda x: (x + x * x) * (x - 2) / (x + 1) - (1 / x) * (K / x),
    "powers": lambda x: x**3 + 2.5**x + K**x + (x + 1) ** x + torch.zeros(3, dtype=x.dtype) ** x,
    "functions": lambda x: torch.exp(x) + torch.expm1(x) + torch.log(x) + torch.log1p(x) + torch.lgamma(x + 1),
    "a broadcast": lambda x: x[:, None] + K + (K[:, None] * x - x[None, :]),
    "addcmul": lambda x: torch.addcmul(x, x, K) + torch.addcmul(K, K, x) + torch.addcmul(x, x, x),
    "matmul": lambda x: (K.diag() + 1) @ x + x @ (K.diag() - 2),
    "where": lambda x: torch.where(x > 0.5, x, 2 * x) + torch.where(x <= 0.7, x, K) + torch.where(x > 0.5, x, 0.0),
    "cumprod": lambda x: (x[:, None] + K).cumprod(1),
    "parts": lambda x: torch.cat([x[1:], torch.stack([x[0], K[0], x[-1]]), torch.zeros_like(x)]),
    "views": lambda x: (x[:, None] * K).T.contiguous().permute(1, 0).unsqueeze(0).sum(2).reshape(-1),
    "pieces": lambda x: sum(a * b for a, b in zip((x * K).unbind(0), torch.split(x, 1), strict=True)),
    "no tangent": lambda x: torch.ones_like(x) * len(x) + x.new_zeros(3),
}


def by_torch(function, x):
    with torch.no_grad(), forward_ad.dual_level():
        parts = function(forward_ad.make_dual(x.clone(), torch.ones_like(x)))
        found = [forward_ad.unpack_dual(y) for y in (parts if isinstance(parts, tuple) else (parts,)) if y is not None]
        return [torch.zeros_like(y.primal) if y.tangent is None else y.tangent.clone() for y in found]


def assert_same(function, x):
    found = differentiate(function, x)
    found = [y for y in found if y is not None] if isinstance(found, tuple) else [found]
    expected = by_torch(function, x)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert type(a) is torch.Tensor and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.smoke
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_rule_is_torchs(name):
    OPERATIONS[name](_dual(X.clone(), torch.ones_like(X)))  # there is a rule
    assert_same(OPERATIONS[name], X)


@pytest.mark.parametrize(("method", "orders", "steps"), pairs(METHODS, ORDERS, [3, 40, 3000]))
def test_weights_of_a_scheme(method, orders, steps):
    alpha = torch.tensor(ORDERS[orders], dtype=torch.float64)
    assert_same(lambda a: METHODS[method].weights(a, 0.01, steps), alpha)


@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("rule", sorted({rule for scheme in METHODS.values() for rule in scheme.rules}))
def test_weights_of_intervals(rule, orders):
    alpha = torch.tensor(ORDERS[orders], dtype=torch.float64)
    found = quadrature(rule, pfde.graded(0.2, 1.4, 40, 2.5))
    assert_same(lambda a: found.block(a, 10, 40, 1, 39), alpha)
    assert_same(lambda a: Weights(found.near(a), found.start(a), found.local(a)), alpha)


UNRULED = {
    "a function": torch.sinh,
    "a product with a zero": lambda x: (x - 0.7).cumprod(0),
    "a product of two": lambda x: x.unsqueeze(0) @ x,
    "a keyword": lambda x: torch.add(x, x, alpha=2) - torch.sub(x, x, alpha=3),
    "keywords only": lambda x: torch.cat(tensors=[x, 2 * x]),
    "two in a linear one": lambda x: torch.diff(x, prepend=x[:1] * 2),
    "another operation of the name": lambda x: torch.where(x > 0.5)[0] + x[:2] * torch.pow(0.0, x[:2]),
    "in place": lambda x: x.clone().mul_(x),
    "an entry set": lambda x: x.new_zeros(3).index_put((torch.tensor([1]),), x[:1]),
}


@pytest.mark.parametrize("function", UNRULED.values(), ids=UNRULED)
def test_what_has_no_rule_is_left_to_torch(function):
    with pytest.raises(NoRuleError):
        function(_dual(X.clone(), torch.ones_like(X)))
    assert_same(function, X)


SOLVE = """
import sys, torch, pfde
alpha = torch.tensor(0.6, requires_grad=True)
t = torch.linspace(0, 1, 20)
for method in ("euler", "pece", "beuler", "trapezoid", "gl", "l1", "bdf2"):
    for history in (None, pfde.SumOfExponentials(1e-3)):
        pfde.fdeint(lambda t, y: -y, torch.ones(2), t, alpha, method=method, history=history).sum().backward()
for method in ("euler", "pece", "beuler", "trapezoid"):
    pfde.fdeint(lambda t, y: -y, torch.ones(2), pfde.graded(0, 1, 20, 2), alpha, method=method).sum().backward()
assert "torch._dynamo" not in sys.modules
"""


def test_a_gradient_in_alpha_does_not_import_torchs_compiler():
    subprocess.run([sys.executable, "-c", SOLVE], check=True, timeout=120)
