"""What every solve is, whichever equation it solves: request, problem, driver, checkpoints, autograd.

The folder is not called `solve`, because a module of that name would hide the function `pfde.solve`.
"""
