"""Activations and roundings of the kernels, in float32.

    sigmoid(x) = 1 / (1 + e^-|x|) for x >= 0, and e^-|x| / (1 + e^-|x|) below: nothing overflows
    tanh(x)    = ±(1 - e^-2|x|) / (1 + e^-2|x|), and x + x³ P(x²) near 0, where that cancels

Errors are a few roundings, relative to the value, and |x| more of them where sigmoid is small: a GPU computes
e^-|x| as a power of 2 whose exponent has been rounded.

P is the polynomial of the Cephes library's tanhf (S. Moshier). Triton's own libdevice.tanh cannot be
interpreted.
"""

import triton
import triton.language as tl

# Up to here tanh is a polynomial. Beyond, 1 - e^-2|x| is more than 0.7 and has lost no digit.
_SMALL = tl.constexpr(0.625)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """The hyperbolic tangent, within a few roundings everywhere."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = x + x * (z * p)
    return tl.where(a < _SMALL, small, tl.where(x < 0.0, -large, large))


@triton.jit
def as_multiplied(x, PREC: tl.constexpr):
    """A float32 x as the tensor cores read it where PREC is "tf32": rounded to nearest, not cut."""
    if PREC == "tf32" and x.dtype == tl.float32:
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)  # the carry of some NaN would run into the sign
    else:
        return x
