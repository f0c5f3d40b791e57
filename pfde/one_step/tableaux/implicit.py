"""The coefficients of the diagonally implicit methods and of the additive ones (formulas: `tableau`).

Every function makes one method, with its reference in `source`; HW II is Hairer, Wanner, Solving ODEs II
(doi:10.1007/978-3-642-05221-7). The esdirk methods are the implicit parts of the ark methods of Kennedy and Carpenter,
with a dense output of their own.
"""

from __future__ import annotations

from fractions import Fraction
from math import isqrt
from typing import Any

from .coefficients import Matrix, hermite, lower, row, rows
from .tableau import ADDITIVE, TABLEAUX, AdditiveTableau, Tableau


@TABLEAUX.register("beuler")
def _beuler() -> Tableau:
    """Backward Euler."""
    return Tableau("beuler", 1, rows("1"), row("1"), row("1"), rows("1"), 1, "L-stable", "HW II, IV.3")


@TABLEAUX.register("cn")
def _cn() -> Tableau:
    """The trapezoidal rule (Crank, Nicolson)."""
    return Tableau(
        name="cn",
        order=2,
        A=rows("0 0", "1/2 1/2"),
        b=row("1/2 1/2"),
        c=row("0 1"),
        P=rows("1 -1/2", "0 1/2"),
        dense_order=2,
        stability="A-stable",
        source="Crank, Nicolson 1947, doi:10.1017/S0305004100023197",
    )


@TABLEAUX.register("implicit_midpoint")
def _implicit_midpoint() -> Tableau:
    """The one-stage Gauss method, symplectic."""
    return Tableau(
        name="implicit_midpoint",
        order=2,
        A=rows("1/2"),
        b=row("1"),
        c=row("1/2"),
        P=rows("2 -1", "-1 1"),
        dense_order=2,
        stability="A-stable",
        source="HW II, IV.5",
    )


@TABLEAUX.register("sdirk4")
def _sdirk4() -> Tableau:
    return Tableau(
        name="sdirk4",
        order=4,
        A=lower(
            "1/4",
            "1/2 1/4",
            "17/50 -1/25 1/4",
            "371/1360 -137/2720 15/544 1/4",
            "25/24 -49/48 125/16 -85/12 1/4",
        ),
        b=row("25/24 -49/48 125/16 -85/12 1/4"),
        c=row("1/4 3/4 11/20 1/2 1"),
        b_hat=row("59/48 -17/96 225/32 -85/12 0"),
        embedded_order=3,
        P=rows(
            "11/3 -463/72 217/36 -20/9",
            "11/2 -385/16 661/24 -10",
            "-125/18 20125/432 -8875/216 250/27",
            "0 -85/4 85/6 0",
            "-11/9 557/108 -359/54 80/27",
        ),
        dense_order=3,
        stability="L-stable",
        source="HW II, table IV.6.5, and the dense output given with it",
    )


_ARK3_B = "1471266399579/7840856788654 -4482444167858/7529755066697 11266239266428/11593286722821 "
_ARK3_GAMMA = "1767732205903/4055673282236"
_ARK3_B_HAT = (
    "2756255671327/12835298489170 -10771552573575/22201958757719 9247589265047/10645013368117 "
    "2193209047091/5459859503100"
)
_ARK3_SOURCE = "Kennedy, Carpenter 2003, doi:10.1016/S0168-9274(02)00138-1, ARK3(2)4L[2]SA"
_ARK4_B = "82889/524892 0 15625/83664 69875/102672 -2260/8211 1/4"
_ARK4_B_HAT = "4586570599/29645900160 0 178811875/945068544 814220225/1159782912 -3700637/11593932 61727/225920"
_ARK4_SOURCE = "Kennedy, Carpenter 2003, doi:10.1016/S0168-9274(02)00138-1, ARK4(3)6L[2]SA"


def _ark3_implicit(name: str, P: Matrix, dense_order: int) -> Tableau:
    return Tableau(
        name=name,
        order=3,
        A=lower(
            "0",
            f"{_ARK3_GAMMA} {_ARK3_GAMMA}",
            f"2746238789719/10658868560708 -640167445237/6845629431997 {_ARK3_GAMMA}",
            _ARK3_B + _ARK3_GAMMA,
        ),
        b=row(_ARK3_B + _ARK3_GAMMA),
        c=row("0 1767732205903/2027836641118 3/5 1"),
        b_hat=row(_ARK3_B_HAT),
        embedded_order=2,
        P=P,
        dense_order=dense_order,
        stability="L-stable",
        source=_ARK3_SOURCE,
        tolerance=1e-23,
    )


def _ark4_implicit(name: str, P: Matrix, dense_order: int, tolerance: float = 0) -> Tableau:
    return Tableau(
        name=name,
        order=4,
        A=lower(
            "0",
            "1/4 1/4",
            "8611/62500 -1743/31250 1/4",
            "5012029/34652500 -654441/2922500 174375/388108 1/4",
            "15267082809/155376265600 -71443401/120774400 730878875/902184768 2285395/8070912 1/4",
            _ARK4_B,
        ),
        b=row(_ARK4_B),
        c=row("0 1/2 83/250 31/50 17/20 1"),
        b_hat=row(_ARK4_B_HAT),
        embedded_order=3,
        P=P,
        dense_order=dense_order,
        stability="L-stable",
        source=_ARK4_SOURCE,
        tolerance=tolerance,
    )


@TABLEAUX.register("esdirk3")
def _esdirk3() -> Tableau:
    return _ark3_implicit("esdirk3", hermite(row(_ARK3_B + _ARK3_GAMMA), last=True), 3)


@TABLEAUX.register("esdirk4")
def _esdirk4() -> Tableau:
    # derived here: the quartics of order 4 with slopes K_1 and K_6 at the ends have one parameter, in which the last
    # row is the simplest
    P = rows(
        "1 -8620844395/2892679812 5195427235/1446339906 -1051472152/723169953",
        "0 -648559/1041579 1297118/1041579 -648559/1041579",
        "0 3480859375/592807248 -22816046875/2074825368 5510265625/1037412684",
        "0 -18332228125/5092428528 25263688375/2546214264 -7182354625/1273107132",
        "0 71540300/45250821 -192900040/45250821 15557840/6464403",
        "0 -1/4 1/2 0",
    )
    return _ark4_implicit("esdirk4", P, 4)


# ---- additive methods ----


@ADDITIVE.register("ark2")
def _ark2() -> AdditiveTableau:
    root = Fraction(isqrt(2 * 10**100), 10**50)  # the square root of 2, to 50 digits
    gamma, delta = 1 - root / 2, root / 4
    zero = Fraction(0)
    common: dict[str, Any] = {
        "order": 2,
        "b": (delta, delta, gamma),
        "c": (zero, 2 * gamma, Fraction(1)),
        "b_hat": ((4 - root) / 8, (4 - root) / 8, root / 4),
        "embedded_order": 1,
        "P": ((root / 2, -root / 4), (root / 2, -root / 4), (1 - root, root / 2)),
        "dense_order": 2,
        "source": "Giraldo, Kelly, Constantinescu 2013, doi:10.1137/120876034, ARK2(2,3,2), with PETSc's dense output",
        "tolerance": 1e-45,
    }
    implicit = ((zero, zero, zero), (gamma, gamma, zero), (delta, delta, gamma))
    explicit = ((zero, zero, zero), (2 * gamma, zero, zero), ((3 - 2 * root) / 6, (3 + 2 * root) / 6, zero))
    return AdditiveTableau(
        "ark2",
        2,
        Tableau(name="ark2 (implicit part)", A=implicit, stability="L-stable", **common),
        Tableau(name="ark2 (explicit part)", A=explicit, stability="conditional", **common),
    )


@ADDITIVE.register("ark3")
def _ark3() -> AdditiveTableau:
    # derived here: the only cubic of order 3 without further slopes (the published one is quadratic, of order 2)
    P = rows(
        "1 -1.350078131127539393697637536 0.5377191554742632188589296695",
        "0 -0.2882530517981419474979041084 -0.307044421778813000549918939",
        "0 2.217628682306934436908987085 -1.245838754585162313438475623",
        "0 -0.5792974993812530957134454401 1.015164020889712095129464888",
    )
    implicit = _ark3_implicit("ark3 (implicit part)", P, 3)
    explicit = Tableau(
        name="ark3 (explicit part)",
        order=3,
        A=lower(
            "0",
            "1767732205903/2027836641118",
            "5535828885825/10492691773637 788022342437/10882634858940",
            "6485989280629/16251701735622 -4246266847089/9704473918619 10755448449292/10357097424841",
        ),
        b=implicit.b,
        c=implicit.c,
        b_hat=implicit.b_hat,
        embedded_order=2,
        P=P,
        dense_order=3,
        stability="conditional",
        source=_ARK3_SOURCE,
        tolerance=implicit.tolerance,
    )
    return AdditiveTableau("ark3", 3, implicit, explicit)


@ADDITIVE.register("ark4")
def _ark4() -> AdditiveTableau:
    P = rows(
        "6943876665148/7220017795957 -54480133/30881146 6818779379841/7100303317025",
        "0 0 0",
        "7640104374378/9702883013639 -11436875/14766696 2173542590792/12501825683035",
        "-20649996744609/7521556579894 174696575/18121608 -31592104683404/5083833661969",
        "8854892464581/2390941311638 -12120380/966161 61146701046299/7138195549469",
        "-11397109935349/6675773540249 3843/706 -17219254887155/4939391667607",
    )
    implicit = _ark4_implicit("ark4 (implicit part)", P, 3, 1e-23)
    explicit = Tableau(
        name="ark4 (explicit part)",
        order=4,
        A=lower(
            "0",
            "1/2",
            "13861/62500 6889/62500",
            "-116923316275/2393684061468 -2731218467317/15368042101831 9408046702089/11113171139209",
            "-451086348788/2902428689909 -2682348792572/7519795681897 12662868775082/11960479115383 "
            "3355817975965/11060851509271",
            "647845179188/3216320057751 73281519250/8382639484533 552539513391/3454668386233 "
            "3354512671639/8306763924573 4040/17871",
        ),
        b=implicit.b,
        c=implicit.c,
        b_hat=implicit.b_hat,
        embedded_order=3,
        P=P,
        dense_order=3,
        stability="conditional",
        source=_ARK4_SOURCE,
        tolerance=implicit.tolerance,
    )
    return AdditiveTableau("ark4", 4, implicit, explicit)
