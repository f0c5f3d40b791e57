"""A preconditioner that PETSc makes by name: -pc_type python -pc_python_type programs.identity.Identity."""


class Identity:
    """y = x."""

    def apply(self, pc, x, y):
        x.copy(y)

    applyTranspose = apply  # noqa: N815 - PETSc's name
