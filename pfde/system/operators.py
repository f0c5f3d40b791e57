"""The Newton operator A = I - w J of an implicit stage, as a PETSc Mat that also has its transpose.

Two forms. `MatrixFree`: products by jvp and vjp of the linearisation, for torch functions; its optional
preconditioner `BlockLU` assembles J as independent dense blocks (one block: a small dense system; one block a
sample: a batch of independent systems) and factorises them in one batched LU. `Assembled`: a user's sparse J.
The weight w multiplies the rows of J: A^T = I - J^T w.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .base import Failure, Linearisation, Weight
from .mass import Mass
from .solver_defaults import matrix_free
from .start import PETSc
from .vectors import read, write


class Products:
    """A v and A^T v by jvp and vjp: the context of a Mat of type python.

    It does not know its Mat: the Mat's hold on it is in C, where no garbage collector would see the cycle.
    """

    def __init__(self, dtype: torch.dtype, mass: Mass | None = None) -> None:
        self._dtype, self.mass = dtype, mass
        self.at: Linearisation | None = None
        self.w: Weight = 0.0
        self.version = 0
        self.failure = Failure()

    def move(self, at: Linearisation, w: Weight) -> None:
        """Be those of this linearisation and weight."""
        self.at, self.w = at, w
        self.version += 1

    def product(self, v: Tensor) -> Tensor:
        """A v."""
        assert self.at is not None
        return (v if self.mass is None else self.mass.apply(v)) - self.at.jvp(v) * self.w

    def product_transpose(self, v: Tensor) -> Tensor:
        """A^T v."""
        assert self.at is not None
        return (v if self.mass is None else self.mass.apply_transpose(v)) - self.at.vjp(v * self.w, retain=True)

    def mult(self, _mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """PETSc's MatMult."""
        self._multiply(self.product, x, y)

    def multTranspose(self, _mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """PETSc's MatMultTranspose."""
        self._multiply(self.product_transpose, x, y)

    def _multiply(self, product: Callable[[Tensor], Tensor], x: PETSc.Vec, y: PETSc.Vec) -> None:
        value = self.failure.guard(product, read(x).to(self._dtype))
        if value is None:
            y.set(math.nan)  # ends the Krylov method
        else:
            write(y, value)


class MatrixFree:
    """A = I - w J by products; `update` moves it to another linearisation and weight.

    Parameters
    ----------
    vec : a Vec of the state's size
    dtype : of the model
    blocks : the number of dense diagonal blocks of J, to precondition with their LU; 0 for none
    mass : M, where A is M - w J
    """

    assembled = False

    def __init__(self, vec: PETSc.Vec, dtype: torch.dtype, blocks: int = 0, mass: Mass | None = None) -> None:
        self._blocks, self._size = blocks, vec.getLocalSize()
        self.systems = max(1, blocks)
        self._products = Products(dtype, mass)
        self.failure = self._products.failure
        sizes = (vec.getSizes(), vec.getSizes())
        self.mat = self.pmat = PETSc.Mat().createPython(sizes, context=self._products, comm=vec.comm)
        self.mat.setVecType(vec.getType())
        self.mat.setUp()

    def update(self, at: Linearisation, w: Weight) -> None:
        """Let A be I - w J at this linearisation."""
        self._products.move(at, w)
        self.mat.stateIncrease()

    def forget(self) -> None:
        """Let go of the linearisation, until the next update."""
        self._products.at = None

    def configure(self, ksp: PETSc.KSP) -> None:
        """GMRES on the products alone, or the blocks' LU as the solver."""
        if not self._blocks:
            matrix_free(ksp)
            return
        pc = ksp.getPC()
        ksp.setType(PETSc.KSP.Type.PREONLY)
        pc.setType(PETSc.PC.Type.PYTHON)
        pc.setPythonContext(BlockLU(self._products, self._size, self._blocks))


class BlockLU:
    """The exact inverse of A when J is block diagonal with `blocks` dense blocks of equal size: a PCPYTHON context.

    Assembly takes d / blocks vector-Jacobian products, whatever the number of blocks; memory d^2 / blocks.
    """

    def __init__(self, products: Products, size: int, blocks: int) -> None:
        self._products, self._blocks, self._size = products, blocks, size // blocks
        self._lu: tuple[Tensor, Tensor] | None = None
        self._matrix = torch.empty(0)
        self._version = -1

    @property
    def is_current(self) -> bool:
        """Whether what is factorised is A as it is now: options can have PETSc go on with an older one."""
        return self._lu is not None and self._version == self._products.version

    def multiply(self, x: Tensor, *, transpose: bool) -> Tensor:
        """A x or A^T x with the assembled blocks."""
        matrix = self._matrix.mT if transpose else self._matrix
        return (matrix @ x.view(self._blocks, self._size, 1)).reshape(-1)

    def sizes(self, x: Tensor) -> Tensor:
        """|A| |x|: the sizes of the terms of A x."""
        return (self._matrix.abs() @ x.abs().view(self._blocks, self._size, 1)).reshape(-1)

    def setUp(self, _pc: PETSc.PC) -> None:
        """Assemble and factorise; PETSc calls it whenever A has changed."""
        self._lu = self._products.failure.guard(self._factorise)

    def _factorise(self) -> tuple[Tensor, Tensor]:
        at, w = self._products.at, self._products.w
        assert at is not None
        unit = torch.zeros(self._blocks, self._size, dtype=at.value.dtype, device=at.value.device)
        mass, rows = self._products.mass, []
        for i in range(self._size):
            unit.zero_()[:, i] = 1.0
            flat = unit.view(-1)
            row = at.vjp(flat * w, retain=True).neg()
            row += flat if mass is None else mass.apply_transpose(flat)
            rows.append(row.view(self._blocks, self._size))
        self._matrix, self._version = torch.stack(rows, dim=1).double(), self._products.version
        lu, pivots = torch.linalg.lu_factor(self._matrix)
        return lu, pivots

    def apply(self, _pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = A^-1 x."""
        self._solve(x, y, transpose=False)

    def applyTranspose(self, _pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = A^-T x."""
        self._solve(x, y, transpose=True)

    def _solve(self, x: PETSc.Vec, y: PETSc.Vec, *, transpose: bool) -> None:
        if self._lu is None:
            y.set(math.nan)
            return
        b = read(x).view(self._blocks, self._size, 1)
        write(y, torch.linalg.lu_solve(*self._lu, b, adjoint=transpose).reshape(-1))


def block_lu(ksp: PETSc.KSP) -> BlockLU | None:
    """The factorised blocks that a KSP has as its preconditioner."""
    pc = ksp.getPC()
    context = pc.getPythonContext() if pc.getType() == PETSc.PC.Type.PYTHON else None
    return context if isinstance(context, BlockLU) else None


class Assembled:
    """A = I - w J from an assembled J (and a matrix P to precondition with, if it is another)."""

    assembled = True
    systems = 1

    def __init__(self, jacobian: PETSc.Mat, preconditioner: PETSc.Mat, vec: PETSc.Vec) -> None:
        self._j, self._p = jacobian, preconditioner
        self._w = vec.duplicate()
        self.failure = Failure()
        self.mat = jacobian.duplicate(copy=True)
        self.pmat = self.mat if preconditioner.handle == jacobian.handle else preconditioner.duplicate(copy=True)

    def update(self, at: Linearisation, w: Weight) -> None:
        """Let A be I - w J, J as the linearisation has just left it in the user's Mat."""
        at.assemble()  # type: ignore[attr-defined]
        self._shifted(self._j, self.mat, w)
        if self.pmat is not self.mat:
            self._shifted(self._p, self.pmat, w)

    def forget(self) -> None:
        """Nothing: the user's Mats are the TS's own."""

    def configure(self, ksp: PETSc.KSP) -> None:
        """PETSc's own defaults for an assembled matrix; the options choose."""

    def destroy(self) -> None:
        """Destroy the copies of J and P. Collective."""
        for own in (self.mat, self.pmat, self._w):
            own.destroy()

    def _shifted(self, source: PETSc.Mat, target: PETSc.Mat, w: Weight) -> None:
        source.copy(target, structure=PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
        if isinstance(w, Tensor):
            write(self._w, -w)
            target.diagonalScale(L=self._w)
        else:
            target.scale(-w)
        target.shift(1.0)


def random_factors(size: int, device: torch.device, draw: int = 0) -> Tensor:
    """Fixed numbers of random sign and sizes from 1/2 to 3/2: |A (u x)| estimates |A| |x|, whatever cancels in A x.

    draw : the number of a set; each is another
    """
    u = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size + draw)) - 0.5
    return (2 * u + 0.5 * u.sign()).to(device)


def signed_product(multiply: Callable[..., None], x: PETSc.Vec, draw: int = 0) -> PETSc.Vec:
    """A (u x), whose sizes estimate |A| |x|, for one product with A. Collective.

    multiply : (x, y) -> y = A x
    draw : which factors u
    """
    signed, product = x.duplicate(), x.duplicate()
    write(signed, read(x) * random_factors(x.getLocalSize(), read(x).device, draw))
    multiply(signed, product)
    return product
