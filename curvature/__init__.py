"""The Hessian of a loss over a list of tensors of any shape: as one matrix, or as an operator."""

from .matrix import hessian, hvp
from .operator import HessianOperator
from .parameters import parameter_index
from .spectrum import SpectralDensity, TraceEstimate, spectral_density, trace

__all__ = [
    "HessianOperator",
    "SpectralDensity",
    "TraceEstimate",
    "hessian",
    "hvp",
    "parameter_index",
    "spectral_density",
    "trace",
]
