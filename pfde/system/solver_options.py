"""Which of PETSc's solvers suit an implicit stage, and which of their options would make its result something else.

A stage y = r + w f(t, y) is solved by an iteration that ends on its residual, and its adjoint with the transpose of
I - w J. So a SNES that stops without looking at the residual, and a J by finite differences, which the transposed
system would not have, are refused; and so is a preconditioner made from entries where A is known by its products only.
PETSc itself takes them, and ends in a wrong value or in an internal error.
"""

from __future__ import annotations

from .prefixes import shown
from .start import PETSc

# Those that end on the residual. The others either do not look at it (ksponly, qn with its own line search, newtonal)
# or need callbacks, meshes or bounds that a stage does not have.
_SNES_TYPES = ("newtonls", "newtontr", "newtontrdc", "vinewtonrsls", "ngmres", "anderson", "nrichardson", "ncg")
_ENDS = {"snes_convergence_test": ("default",), "snes_norm_schedule": ("default", "always")}
_DIFFERENCES = ("snes_mf_operator", "snes_mf", "snes_fd", "snes_fd_color")
_BY_PRODUCTS = ("none", "python", "ksp", "mat", "svd")
_ELSEWHERE = (
    "if it belongs to another solver of the program, give this solve a prefix (options_prefix=, or that of the TS)"
)
_FACTORISED = "'fde_jacobian': 'dense' or 'blocks' instead, which factorise it"


def require_residual_solver(snes: PETSc.SNES, *, assembled: bool, instead: str = _FACTORISED) -> None:
    """Raise ValueError for options of a SNES with which a stage or its adjoint would not be what it should.

    snes : after setFromOptions
    assembled : whether its matrix has entries; False where it is known by products only
    instead : what takes the place of a preconditioner that needs entries
    """
    prefix, options = snes.getOptionsPrefix() or "", PETSc.Options()
    seen = shown(prefix)
    if snes.getType() not in _SNES_TYPES:
        raise ValueError(
            f"PETSc option -{seen}snes_type must be one of {', '.join(_SNES_TYPES)} here, which end on the residual "
            f"of the stage: got {snes.getType()}; {_ELSEWHERE}"
        )
    for name in _DIFFERENCES:
        if options.getBool(prefix + name, False):
            exact = "RHSJacobian" if assembled else "without it products by autograd, which are exact"
            raise ValueError(
                f"PETSc option -{seen}{name} does not apply here: the stages and their adjoint need one and the same "
                f"Jacobian, without differences; leave it out ({exact}); {_ELSEWHERE}"
            )
    for name, sound in _ENDS.items():
        value = options.getString(prefix + name, sound[0])
        if value not in sound:
            raise ValueError(
                f"PETSc option -{seen}{name} {value} does not apply here: a stage that ends without a look at its "
                f"residual is a wrong value; loosen snes_rtol or snes_atol instead; {_ELSEWHERE}"
            )
    require_preconditioner(snes.getKSP(), assembled=assembled, instead=instead)


def require_preconditioner(ksp: PETSc.KSP, *, assembled: bool, instead: str = _FACTORISED) -> None:
    """Raise ValueError for a preconditioner that needs the entries of a matrix which is known by its products only.

    ksp : after setFromOptions
    assembled, instead : as above
    """
    pc = ksp.getPC()
    kind, prefix = pc.getType(), pc.getOptionsPrefix() or ""
    seen = shown(prefix)
    if assembled:
        return
    if kind not in _BY_PRODUCTS:
        raise ValueError(
            f"PETSc option -{seen}pc_type {kind} does not apply here: it needs the entries of the Newton matrix, "
            f"and of a torch function only products are known; use {instead}, or pc_type none or python; {_ELSEWHERE}"
        )
    if kind == "python" and pc.getPythonContext() is None and not PETSc.Options().hasName(f"{prefix}pc_python_type"):
        raise ValueError(
            f"PETSc option -{seen}pc_type python needs -{seen}pc_python_type module.Class, the preconditioner; or "
            f"use {instead}"
        )
