"""Ordinary equations M y' = f(t, y): one-step methods, forward and backward."""
