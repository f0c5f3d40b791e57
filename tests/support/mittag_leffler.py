"""The solution of D^alpha y = lambda y."""

import mpmath


def mittag_leffler(alpha, lam, t):
    """E_alpha(lam t^alpha) by its series, which suffices for |lam| t^alpha <= 2 (alpha k > 80 at the last term)."""
    z = lam * mpmath.mpf(t) ** alpha
    return mpmath.fsum(z**k * mpmath.rgamma(alpha * k + 1) for k in range(200))
