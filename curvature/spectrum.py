"""Trace and eigenvalue density of a symmetric operator, from products with random vectors in O(P) memory."""

import math
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator

from gatematch.checks import check_int, check_kind, check_number


class TraceEstimate(NamedTuple):
    """A trace and the standard error of it.

    Attributes:
        value: the estimate, the mean over the samples.
        standard_error: the samples' standard deviation over the root of their number.
    """

    value: float
    standard_error: float


class SpectralDensity(NamedTuple):
    """The distribution of a matrix's eigenvalues as points with weights that sum to 1.

    Attributes:
        nodes: (N,), ascending.
        weights: (N,), of each node; sums of them are shares of the eigenvalues.
    """

    nodes: np.ndarray
    weights: np.ndarray

    def smooth(self, grid: np.ndarray, width: float) -> np.ndarray:
        """The density on a grid (N,), each node spread to a normal of standard deviation `width`."""
        check_number("width", width, over=0)
        grid = np.asarray(grid)
        if grid.ndim != 1 or grid.dtype.kind not in "fiu":
            raise ValueError(f"grid: expected real numbers (N,), got shape {grid.shape} of {grid.dtype}")
        z = (grid[:, None] - self.nodes) / width
        density: np.ndarray = np.exp(-(z**2) / 2) @ self.weights / (width * math.sqrt(2 * math.pi))
        return density


def trace(op: LinearOperator, *, samples: int = 100, seed: int | None = 0) -> TraceEstimate:
    """Estimate the trace of a symmetric operator: the mean of zᵀ A z over vectors z of random signs.

    Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines",
    Communications in Statistics 19(2), 1990. Exact for a diagonal matrix; else the variance of one sample is
    twice the sum of the squares off the diagonal.

    Args:
        op: (P, P), real and symmetric: a `HessianOperator`, or any of scipy's.
        samples: products, at least 2.
        seed: of numpy's generator that draws the signs; None draws anew each time. Torch's is left alone.

    Returns:
        (value, standard_error).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, by name.
    """
    _check(op, samples=(samples, 2), seed=(0 if seed is None else seed, 0))
    generator = np.random.default_rng(seed)
    values = np.empty(samples)
    for k in range(samples):
        z = _signs(generator, op.shape[0])
        values[k] = z @ op.matvec(z)
    return TraceEstimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(samples)))


def spectral_density(
    op: LinearOperator, *, samples: int = 10, steps: int = 64, seed: int | None = 0
) -> SpectralDensity:
    """Estimate how the eigenvalues of a symmetric operator are distributed: stochastic Lanczos quadrature.

    Each random vector starts a Lanczos recurrence; the eigenvalues of its tridiagonal matrix are the nodes,
    and the squared first components of the eigenvectors the weights, of a Gauss quadrature: its moments to
    order 2·steps - 1 are those of the eigenvalues as that vector sees them, and their mean over vectors
    estimates the true ones. Nodes at the ends of the spectrum are eigenvalues to high accuracy.

    Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix
    Anal. Appl. 38(4), 2017; for the Hessians of networks, Ghorbani, Krishnan and Xiao, ICML 2019. Only three
    vectors are kept and none is orthogonalised again: eigenvalues already found then come up again, as
    several nodes that share one's weight, which leaves the density as it is (Chen, Trogdon and Ubaru, ICML
    2021).

    Args:
        op: (P, P), P at least 1, real and symmetric.
        samples: random vectors.
        steps: products for each, fewer where a vector's recurrence ends before.
        seed: as for `trace`.

    Returns:
        (nodes, weights), float64, at most samples · steps of each; the nodes are in ascending order.

    Raises:
        TypeError, ValueError: as `trace`; also ValueError if a product is not finite.
    """
    _check(op, samples=(samples, 1), steps=(steps, 1), seed=(0 if seed is None else seed, 0))
    if op.shape[0] == 0:
        raise ValueError("op: expected at least one row, got shape (0, 0)")
    generator = np.random.default_rng(seed)
    rules = [_gauss_rule(op, _signs(generator, op.shape[0]), steps) for _ in range(samples)]
    nodes, weights = (np.concatenate(parts) for parts in zip(*rules, strict=True))
    order = np.argsort(nodes, kind="stable")
    return SpectralDensity(nodes[order], weights[order] / samples)


def _gauss_rule(op: LinearOperator, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the operator's spectrum as the vector `start` sees it (Golub and Welsch, 1969)."""
    v, before = start / np.linalg.norm(start), np.zeros_like(start)
    alphas: list[float] = []
    betas: list[float] = [0.0]
    for _ in range(min(steps, len(start))):
        w = op.matvec(v) - betas[-1] * before
        alpha = v @ w
        if not np.isfinite(alpha):
            raise ValueError(f"op: expected finite products, got {alpha} in one")
        w -= alpha * v
        alphas.append(alpha)
        beta = float(np.linalg.norm(w))
        if beta <= np.finfo(float).eps * max(map(abs, (*alphas, *betas))):
            break  # an invariant subspace: its eigenvalues are all found
        betas.append(beta)
        v, before = w / beta, v
    nodes, vectors = eigh_tridiagonal(alphas, betas[1 : len(alphas)])
    return nodes, vectors[0] ** 2


def _signs(generator: np.random.Generator, size: int) -> np.ndarray:
    return generator.integers(0, 2, size, dtype=np.int8) * 2.0 - 1.0


def _check(op: LinearOperator, **counts: tuple[int, int]) -> None:
    check_kind("op", op, LinearOperator, "a scipy.sparse.linalg.LinearOperator")
    if op.shape[0] != op.shape[1]:
        raise ValueError(f"op: expected as many rows as columns, got shape {op.shape}")
    if np.issubdtype(op.dtype, np.complexfloating):
        raise TypeError(f"op: expected a real dtype, got {op.dtype}")
    for name, (count, least) in counts.items():
        check_int(name, count, least)
