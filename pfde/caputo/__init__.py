"""Caputo equations D^alpha y = f(t, y): schemes with a history, forward and backward."""
