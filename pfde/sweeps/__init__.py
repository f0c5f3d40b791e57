"""Sweeps over the steps: forward, adjoint, tangent linear, and autograd through the same steps."""
