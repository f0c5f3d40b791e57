"""PETSc's side: Caputo equations as a TS of type python, and PETSc's own integrators as methods of `odeint`."""
