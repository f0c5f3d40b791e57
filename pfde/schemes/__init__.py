"""Time-stepping schemes: convolution weights and one step, with the step's tangent and transpose.

`METHODS` maps the names that `method=` takes to the schemes; tests and the documentation's tables iterate it. To add
a scheme, write its class in one file here and name it below.
"""

from .base import Scheme
from .convolution_quadrature import BackwardDifferentiation2, GruenwaldLetnikov
from .l1 import L1
from .product_integration import BackwardEuler, Euler, PredictorCorrector, Trapezoid

METHODS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Euler(),
        PredictorCorrector(),
        BackwardEuler(),
        Trapezoid(),
        GruenwaldLetnikov(),
        L1(),
        BackwardDifferentiation2(),
    )
}
