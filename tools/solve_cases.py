"""The cases that `record_solves` records: products of methods, histories, gradients and schedules.

They are pruned by letting the order, the model, the dtype and the rest of a product go round. Every case has a name of
its own and makes what it uses anew. The methods are named here, since the package's tables of them are not public.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from checkpoint_schedules import MultistageCheckpointSchedule, SingleMemoryStorageSchedule, TwoLevelCheckpointSchedule
from mpi4py import MPI
from solve_runs import (
    F64,
    block,
    complex_hand,
    draw,
    dropout,
    event,
    explosion,
    hand,
    interface,
    kinetics,
    network,
    oscillator,
    pair,
    petsc,
    solved,
    split,
    split_networks,
    stiff,
    verified,
)

import pfde
import pfde.nn
import pfde.testing
import pfde.ts

Cases = Iterator[tuple[str, Callable[[], Any]]]

N = 36
FDE = ("euler", "pece", "beuler", "trapezoid", "gl", "l1", "bdf2")
ANY_GRID = ("euler", "pece", "beuler", "trapezoid")
EXPLICIT = (
    "euler",
    "midpoint",
    "heun2",
    "ralston",
    "bosh3",
    "rk4",
    "rk4_classic",
    "fehlberg",
    "dopri5",
    "tsit5",
    "dopri8",
)
IMPLICIT = ("beuler", "cn", "implicit_midpoint", "sdirk4", "esdirk3", "esdirk4")
ADDITIVE = ("ark2", "ark3", "ark4")
ADAPTIVE = ("bosh3", "fehlberg", "dopri5", "tsit5", "dopri8", "sdirk4", "esdirk3", "esdirk4", *ADDITIVE)

ORDERS: dict[str, dict[str, Any]] = {
    "number": {"alpha": 0.6},
    "learned": {"alpha": 0.7, "learn": True},
    "several": {"alpha": (0.45, 0.7, 0.95), "learn": True},
}
HISTORIES = {
    "chosen": None,
    "exact": pfde.Exact(),
    "sum": pfde.SumOfExponentials(1e-8),
    "short": pfde.ShortMemory(0.3),
    "direct": pfde.Exact(algorithm="direct"),
    "blocked": pfde.Exact(algorithm="blocked"),
    "fft": pfde.Exact(algorithm="fft"),
}
PLANS = {
    "revolve": pfde.Revolve(3, leaf=5),
    "disk": pfde.Revolve(2, on_disk=1, leaf=5),
    "online": pfde.Online(3, leaf=4),
    "multistage": MultistageCheckpointSchedule(N, 3, 0),
}
GRADIENTS: dict[str, Any] = {
    "state": pfde.Discrete(),
    "stages": pfde.Discrete(store="stages"),
    "graph": pfde.Discrete(store="graph"),
    "graphs": pfde.Discrete(store="graph", schedule=PLANS["revolve"]),
    "backprop": pfde.Backprop(),
    **{name: pfde.Discrete(schedule=plan) for name, plan in PLANS.items()},
}
REVOLVE, LOOSE = GRADIENTS["revolve"], {"rtol": 1e-5, "atol": 1e-7}


def turn(items: Any, i: int, count: int = 1) -> list[Any]:
    """`count` of the items from the i-th on, beginning again at the end."""
    items = list(items)
    return [items[(i + k) % len(items)] for k in range(count)]


def fractional() -> Cases:
    """Methods with a history, on uniform and nonuniform grids, with every history, store and schedule."""
    h = {"step_size": 1 / N}
    for i, method in enumerate(FDE):
        for j, (history, past) in enumerate(HISTORIES.items()):
            for dtype in (F64, torch.float32) if history in ("exact", "sum") else (F64,):
                (order, alpha), (model,) = *turn(ORDERS.items(), i + j), turn((hand, network), i + j)
                more = {"method": method, "history": past, "dtype": dtype, "moving": j % 2 == 0, **alpha, **h}
                yield f"fde {method} {history} {order} {model.__name__} {dtype}", partial(solved, model, **more)
        ways = [*turn(PLANS, i, 2), "graph", "backprop", *(["stages", "disk"] if method == "pece" else [])]
        for j, (name, history) in enumerate(
            [(x, "sum") for x in ways] + [(x, "exact") for x in ("graphs", "backprop")]
        ):
            (order, alpha), (model,) = *turn(ORDERS.items(), i + j), turn((network, hand), i + j)
            more = {"method": method, "history": HISTORIES[history], "gradient": GRADIENTS[name], **alpha, **h}
            yield f"fde {method} {history} {name} {order} {model.__name__}", partial(solved, model, **more)
        for j, name in enumerate(("state", "revolve", "backprop") if method in ANY_GRID else ()):
            for history in ("exact", "sum")[: 2 - (name == "backprop")]:
                more = {"t": pfde.graded(0.0, 1.0, 24, 2.0), "history": HISTORIES[history], "method": method}
                yield (
                    f"fde nonuniform {method} {history} {name}",
                    partial(solved, (hand, network)[j % 2], gradient=GRADIENTS[name], **ORDERS["several"], **more),
                )
        yield f"fde {method} alpha 1", partial(solved, network, method=method, alpha=1.0, **h)


def long_memory() -> Cases:
    """More steps than a block of the compressed history has, under more schedules."""
    long = partial(solved, t=(0.0, 0.5, 2.0), step_size=1 / 128, alpha=0.6, learn=True, history=HISTORIES["sum"])
    plans = {
        "memory": pfde.Revolve(memory="8kB"),
        "revolve": pfde.Revolve(2, leaf=40),
        "planned": pfde.Revolve(4),
        "online": pfde.Online(3),
        "all": pfde.StoreAll(),
        "single": SingleMemoryStorageSchedule(),
        "two levels": TwoLevelCheckpointSchedule(40, 3),
    }
    for i, (name, plan) in enumerate(plans.items()):
        method, model = ("euler", "pece")[i % 2], (hand, network)[i % 2]
        yield f"fde long {name} {method}", partial(long, model, method=method, gradient=pfde.Discrete(schedule=plan))
    for history in ("direct", "blocked", "fft", "exact"):
        yield f"fde long {history}", partial(long, method="euler", history=HISTORIES[history])
    yield "fde long chosen", partial(long, method="euler", history=None, gradient=REVOLVE, t=(0.0, 4.0))


def door() -> Cases:
    """What else `fdeint` and `solve` take."""
    h, whole = {"step_size": 1 / 24}, tuple(n / 24 for n in range(25))
    at = partial(solved, alpha=0.6)
    cast = partial(torch.autocast, "cpu", torch.bfloat16)
    for method in ("pece", "trapezoid"):
        special: dict[str, dict[str, Any]] = {
            "backprop dropout": {"model": dropout, "gradient": pfde.Backprop()},
            "complex several": {"model": complex_hand, **ORDERS["several"]},
            "repeated": {"t": (0.0, 0.0, 0.5, 0.5, 1.0, 1.0), "moving": True},
            "no entries": {"y0": torch.ones(0, 3, dtype=F64)},
            "whole grid": {"door": pfde.fdeint, "t": whole, "moving": True, "step_size": None},
            "no gradient": {"model": network, "under": torch.no_grad},
            "inference": {"model": network, "under": torch.inference_mode},
            "again": {"model": network, "gradient": GRADIENTS["disk"], "backwards": 3},
            "comm": {"comm": MPI.COMM_SELF, "options_prefix": "mine_"},
            "float16": {"model": network, "dtype": torch.float16},
            "bfloat16": {"model": network, "dtype": torch.bfloat16},
            "autocast": {"model": network, "dtype": torch.float32, "under": cast},
        }
        for history in ("exact", "sum"):
            how = REVOLVE if history == "sum" else None
            for model in (complex_hand, pair, dropout):
                more = {"model": model, "history": HISTORIES[history], "gradient": how}
                special[f"{model.__name__} {history}"] = more
        for name, more in special.items():
            yield f"fde {method} {name}", partial(at, **{"method": method, **h, **more})
    double = {"gradient": pfde.Backprop(), "second": True}
    yield "fde pece double backward", partial(at, network, method="pece", learn=True, **double, **h)
    yield "ode rk4 double backward", partial(solved, network, method="rk4", **double, **h)
    yield "fde one time", partial(at, t=(0.5,))
    free = {"fde_jacobian": "matrix_free"}
    for name, options in {
        "dense": {"fde_jacobian": "dense"},
        "blocks": {"fde_jacobian": "blocks"},
        "free": free,
        "snes_rtol": {"snes_rtol": 1e-4},
        "ksp_type": {"ksp_type": "bcgs", **free},
        "adjoint": {"adjoint_ksp_rtol": 1e-4, **free},
        "snes_type": {"snes_type": "newtontr"},
        "line search": {"snes_linesearch_type": "bt"},
        "default test": {"snes_convergence_test": "default"},
    }.items():
        yield f"fde options {name}", partial(at, stiff, options=options, step_size=1 / 12)
        yield f"ode options {name}", partial(solved, stiff, method="sdirk4", options=options, step_size=1 / 8)
    yield "solve chooses ode", partial(solved, network)
    yield "solve chooses fde", partial(at, network, learn=True)
    yield "solve chooses history", partial(solved, network, history=HISTORIES["sum"])
    yield "solve chooses nonuniform", partial(at, network, t=pfde.graded(0.0, 1.0, 7, 1.5))


def ordinary() -> Cases:
    """One-step methods on fixed and adaptive steps, with every store and schedule."""
    ways = {name: GRADIENTS[name] for name in ("stages", "graph", "backprop")} | {"symplectic": pfde.Symplectic()}
    plans = GRADIENTS | {"multistage": pfde.Discrete(schedule=MultistageCheckpointSchedule(16, 3, 0))}
    for i, method in enumerate(EXPLICIT + IMPLICIT + ADDITIVE):
        models = (split, split_networks) if method in ADDITIVE else (hand, network)
        plan = turn([*PLANS, "graphs"], i)[0]
        chosen = [("state", None), (plan, plans[plan]), *turn(ways.items(), i, 2)]
        if i % 3 == 0:
            chosen.append(("continuous", pfde.Continuous()))
        for j, (name, how) in enumerate(chosen):
            dtype = torch.float32 if (i + j) % 4 == 0 else F64
            more = {"gradient": how, "dtype": dtype, "moving": j % 2 == 0, "step_size": 1 / 16, **LOOSE}
            yield f"ode {method} fixed {name}", partial(solved, models[(i + j) % 2], method=method, **more)
        if method in ADAPTIVE:
            for j, (name, how) in enumerate([("online", plans["online"]), *turn(ways.items(), i + 1, 2)]):
                more = {"gradient": how, "moving": j % 2 == 1, "t": (0.0, 0.3, 1.0), "rtol": 1e-4, "atol": 1e-6}
                yield f"ode {method} adaptive {name}", partial(solved, models[(i + j) % 2], method=method, **more)
    for method in ("rk4", "dopri5", "esdirk4"):
        for name, more in {
            "decreasing": {"t": (1.0, 0.5, 0.25, 0.0), "moving": True},
            "complex": {"model": complex_hand},
            "pair": {"model": pair},
            "repeated": {"t": (0.0, 0.0, 0.5, 0.5, 1.0), "moving": True},
            "dropout": {"model": dropout, "gradient": REVOLVE if method == "rk4" else None},
            "again": {"model": network, "backwards": 2, "gradient": GRADIENTS["disk"]},
            "door": {"model": network, "door": pfde.odeint},
            "no gradient": {"model": network, "under": torch.no_grad},
            "comm": {"comm": MPI.COMM_SELF},
            "float16": {"model": network, "dtype": torch.float16},
            "no entries": {"y0": torch.ones(0, 3, dtype=F64)},
        }.items():
            steps = {"step_size": 1 / 16} if method == "rk4" else LOOSE
            yield f"ode {method} {name}", partial(solved, **{"method": method, **steps, **more})
    by_entry = {"rtol": torch.tensor([1e-4, 1e-5, 1e-6]), "atol": torch.tensor(1e-8)}
    yield "ode dopri5 tolerances by entry", partial(solved, method="dopri5", **by_entry)
    yield "ode dopri5 tolerances by part", partial(solved, pair, method="dopri5", rtol=(1e-4, 1e-6), atol=1e-8)
    limits = {"first_step": 0.01, "max_step": 0.05, "min_step": 1e-6, "safety": 0.8, "ifactor": 5.0, "dfactor": 0.3}
    yield "ode tsit5 limits", partial(solved, method="tsit5", options=limits, **LOOSE)
    end = {"method": "dopri5", "t": (0.0, 0.5, 0.9, 2.0), "under": torch.no_grad}
    yield "ode on_limit", partial(solved, explosion, options={"on_limit": "return"}, **end)
    yield "ode on_limit steps", partial(solved, explosion, options={"on_limit": "return", "max_num_steps": 9}, **end)


def ordinary_doors() -> Cases:
    """Mass matrices, events, PETSc's own methods."""
    singular = torch.tensor([1.0, 1.0, 0.0], dtype=F64)
    full = torch.eye(3, dtype=F64) + 0.1 * draw(3, 3)
    masses = {"full": (hand, full), "diagonal": (network, 1 + singular), "singular": (kinetics, singular)}
    for name, (model, mass) in masses.items():
        for method, plan in (("beuler", "stages"), ("cn", "disk"), ("sdirk4", "revolve"), ("esdirk3", "graph")):
            more = {"mass": mass, "step_size": 1 / 16, "gradient": GRADIENTS[plan], "moving": method != "cn"}
            yield f"ode {method} mass {name} {plan}", partial(solved, model, method=method, **more)
    for name, more in {
        "dopri5": {},
        "dopri8": LOOSE,
        "rk4": {"step_size": 0.0625},
        "midpoint": {"step_size": 0.05, "gradient": REVOLVE},
        "esdirk3": LOOSE,
        "tsit5": {"reverse_time": True},
        "fehlberg": {"t0": "moving", "t_max": 9.0},
        "bosh3": {"gradient": GRADIENTS["online"], **LOOSE},
        "dopri5 symplectic": {"gradient": pfde.Symplectic()},
        "dopri5 backprop": {"gradient": pfde.Backprop()},
        "implicit_midpoint": {"step_size": 0.1, "t0": "moving", "reverse_time": True},
    }.items():
        yield f"event {name}", partial(event, oscillator, method=name.split()[0], **more)
    for name, more in {
        "rk:5dp fixed": {"step_size": 1 / 16},
        "rk:5dp adaptive": LOOSE,
        "rk:4 fixed": {"step_size": 1 / 16, "model": network},
        "theta:0.5 fixed": {"step_size": 1 / 16},
        "theta:0.7 grid": {"dtype": torch.float32, "model": network},
        "beuler fixed": {"step_size": 1 / 16},
        "cn grid": {"model": network},
        "cn options": {"model": stiff, "options": {"snes_rtol": 1e-6}},
        "arkimex:3 fixed": {"step_size": 1 / 16, "model": split},
        "arkimex:3 adaptive": {"model": split, **LOOSE},
        "rk:3bs pair": {"model": pair, **LOOSE},
    }.items():
        yield f"petsc:{name}", partial(solved, **{"model": hand, **more}, method=f"petsc:{name.split()[0]}")


def modules() -> Cases:
    """The layers, the gradient battery, the PETSc door, and what is public."""
    fde, ode = pfde.nn.FDEBlock, pfde.nn.ODEBlock
    yield "block fde learned", partial(block, fde, alpha=0.7, learn_alpha=True, method="pece", step_size=1 / 24)
    yield "block fde fixed", partial(block, fde, alpha=0.7, return_all=True, t=(0.0, 0.25, 1.0), method="euler")
    yield "block fde several", partial(block, fde, alpha=[0.5, 0.6, 0.7], learn_alpha=True, history=HISTORIES["sum"])
    yield "block fde params", partial(block, fde, hand, alpha=0.6, step_size=0.125, gradient=REVOLVE)
    yield "block ode", partial(block, ode)
    yield "block ode all", partial(block, ode, return_all=True, t=(1.0, 0.5, 0.0), method="rk4", step_size=0.125)
    yield "block ode implicit", partial(block, ode, method="cn", step_size=0.125, options={"fde_jacobian": "blocks"})
    yield "block ode params", partial(block, ode, hand, gradient=pfde.Symplectic(), **LOOSE)
    yield "block ode petsc", partial(block, ode, method="petsc:rk:4", step_size=0.125)
    for i, method in enumerate(("euler", "pece", "trapezoid", "bdf2")):
        more = {"history": turn(HISTORIES.values(), i + 1)[0], "gradient": turn(GRADIENTS.values(), i)[0]}
        yield f"verify {method}", partial(verified, method=method, **more)
    yield "verify float32", partial(verified, hand, method="l1", dtype=torch.float32)
    for method in ("rk4", "cn", "esdirk3", "ark3"):
        model = split_networks if method == "ark3" else hand
        yield f"verify {method}", partial(verified, model, method=method, alpha=1.0, step_size=1 / 24)
    yield "ts trapezoid", partial(petsc, alpha=0.6, method="trapezoid")
    yield "ts bdf2 two costs", partial(petsc, alpha=0.8, method="bdf2", costs=2)
    yield "ts euler sum", partial(petsc, alpha=0.6, method="euler", history=HISTORIES["sum"], schedule=PLANS["revolve"])
    yield "ts pece online", partial(petsc, alpha=0.6, method="pece", schedule=PLANS["online"], costs=2)
    yield "ts l1 defaults", partial(petsc, method="l1")
    yield "public pfde", partial(interface, pfde, pfde.__all__)
    yield "public testing", partial(interface, pfde.testing, pfde.testing.__all__)
    yield "public nn", partial(interface, pfde.nn, ("FDEBlock", "ODEBlock"))
    yield "public ts", partial(interface, pfde.ts, ("FractionalTS", "adjoint_solve"))
