"""Mutants: one function of pfde whose source has one passage exchanged, which the gradient tests must notice."""

import inspect
import sys
import textwrap
from dataclasses import dataclass

NOTICED = 1e-6


@dataclass(frozen=True)
class Mutant:
    owner: type
    function: str
    old: str
    new: str
    methods: tuple[str, ...]
    case: str = "fixed"  # of test_ode_mutants


EVERY = ("euler", "pece", "beuler", "trapezoid", "gl", "l1", "bdf2")


def sources(mutants):
    """Read at once, when the tests are collected: what is on disk must be what was imported."""
    return {
        (m.owner, m.function): textwrap.dedent(inspect.getsource(getattr(m.owner, m.function)))
        for m in mutants.values()
    }


def mutate(monkeypatch, mutant, known):
    source = known[mutant.owner, mutant.function]
    assert source.count(mutant.old) == 1, f"the mutant no longer applies to {mutant.owner.__name__}.{mutant.function}"
    scope = {}
    code = compile(source.replace(mutant.old, mutant.new), f"<mutant of {mutant.function}>", "exec", dont_inherit=True)
    exec(code, dict(vars(sys.modules[mutant.owner.__module__])), scope)
    monkeypatch.setattr(mutant.owner, mutant.function, scope[mutant.function])
