"""The right-hand side f with its products, the stage solver (SNES, KSP), and Vec <-> tensor.

PETSc objects appear here and in `pfde.ts` only. Importing this package itself initialises nothing.
"""
