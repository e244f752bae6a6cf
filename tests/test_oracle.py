"""The hand-derived gradients of the oracle against central differences of its own forward."""

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import pytest

EPS = 1e-5


def differences(loss: Callable[[], float], array: np.ndarray) -> np.ndarray:
    """d loss / d array, entry by entry; the array is changed in place and put back."""
    grad = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + EPS
        above = loss()
        array[index] = value - EPS
        below = loss()
        array[index] = value
        grad[index] = (above - below) / (2 * EPS)
    return grad


def check(loss: Callable[[], float], array: np.ndarray, grad: np.ndarray) -> None:
    np.testing.assert_allclose(grad, differences(loss, array), rtol=0, atol=1e-8)


def test_no_torch() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text())
    imports = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imports += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert not [name for name in imports if "torch" in name]


def test_sigmoid_is_finite_far_out() -> None:
    np.testing.assert_allclose(oracle.sigmoid(np.array([-800.0, 0.0, 800.0])), [0.0, 0.5, 1.0])


def test_dense() -> None:
    rng = np.random.default_rng(0)
    x, W, b, u = (rng.normal(size=s) for s in ((3, 4), (2, 4), (2,), (3, 2)))

    def loss() -> float:
        return float((oracle.dense(x, W, b) * u).sum())

    for array, grad in zip((x, W, b), oracle.dense_backward(u, x, W), strict=True):
        check(loss, array, grad)


def lstm_parameters(
    rng: np.random.Generator, I: int, H: int, L: int, bias: bool, bidirectional: bool, P: int
) -> dict[str, np.ndarray]:
    params = {}
    suffixes = ("", "_reverse") if bidirectional else ("",)
    for layer in range(L):
        for s in suffixes:
            width = I if layer == 0 else (P or H) * len(suffixes)
            shapes = {"weight_ih": (4 * H, width), "weight_hh": (4 * H, P or H)}
            if bias:
                shapes |= {"bias_ih": (4 * H,), "bias_hh": (4 * H,)}
            if P:
                shapes["weight_hr"] = (P, H)
            params |= {f"{k}_l{layer}{s}": rng.normal(size=v) * 0.6 for k, v in shapes.items()}
    return params


@pytest.mark.parametrize("lengths", [None, [4, 0, 2]], ids=["full", "lengths"])
@pytest.mark.parametrize(
    ("L", "bias", "bidirectional", "P"),
    [(1, True, False, 0), (1, True, True, 2), (2, False, True, 0), (2, True, False, 2)],
)
def test_lstm(L: int, bias: bool, bidirectional: bool, P: int, lengths: list[int] | None) -> None:
    rng = np.random.default_rng(1)
    T, B, I, H, D = 4, 3, 2, 3, 1 + bidirectional
    params = lstm_parameters(rng, I, H, L, bias, bidirectional, P)
    x = rng.normal(size=(T, B, I))
    h_0, c_0 = rng.normal(size=(L * D, B, P or H)), rng.normal(size=(L * D, B, H))
    outputs, tape = oracle.lstm(x, params, h_0, c_0, lengths)
    ups = [rng.normal(size=out.shape) for out in outputs]

    def loss() -> float:
        outs, _ = oracle.lstm(x, params, h_0, c_0, lengths)
        return float(sum((out * up).sum() for out, up in zip(outs, ups, strict=True)))

    grads = oracle.lstm_backward(tape, *ups)
    check(loss, x, grads.x)
    check(loss, h_0, grads.h_0)
    check(loss, c_0, grads.c_0)
    assert grads.params.keys() == params.keys()
    for name, param in params.items():
        check(loss, param, grads.params[name])


def test_lstm_row_alone_equals_row_in_padded_batch() -> None:
    rng = np.random.default_rng(2)
    params = lstm_parameters(rng, 2, 3, 2, True, True, 0)
    x, h_0, c_0 = rng.normal(size=(5, 2, 2)), rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 2, 3))
    (y, h_n, c_n, cells), _ = oracle.lstm(x, params, h_0, c_0, [5, 3])
    alone, _ = oracle.lstm(x[:3, 1:], params, h_0[:, 1:], c_0[:, 1:])
    for padded, own in zip((y[:3, 1:], h_n[:, 1:], c_n[:, 1:], cells[:3, 1:]), alone, strict=True):
        np.testing.assert_allclose(padded, own, atol=1e-15)
    assert not y[3:, 1].any() and not cells[3:, 1].any()


@pytest.mark.parametrize("lengths", [(None, None), ([2, 3], [4, 0])], ids=["full", "lengths"])
def test_pairwise(lengths: tuple[list[int] | None, list[int] | None]) -> None:
    rng = np.random.default_rng(3)
    B, Q, A, D, V = 2, 3, 4, 5, 2
    q, a, v = rng.normal(size=(B, Q, D)), rng.normal(size=(B, A, D)), rng.normal(size=(B, A, V))
    u_S, u_O = rng.normal(size=(B, Q, A)), rng.normal(size=(B, Q, V))
    u_r, u_c = rng.normal(size=(B, Q)), rng.normal(size=(B, A))

    def loss() -> float:
        S, _ = oracle.pairwise(q, a, *lengths)
        r, c = oracle.sums(S)
        terms = (S * u_S, oracle.attend(S, v) * u_O, r * u_r, c * u_c)
        return float(sum(term.sum() for term in terms))

    S, tape = oracle.pairwise(q, a, *lengths)
    grad_S, grad_v = oracle.attend_backward(u_O, S, v)
    grad_q, grad_a = oracle.pairwise_backward(tape, u_S + grad_S + oracle.sums_backward(u_r, u_c))
    for array, grad in ((q, grad_q), (a, grad_a), (v, grad_v)):
        check(loss, array, grad)


def test_pairwise_at_zero_distance() -> None:
    q = np.ones((1, 2, 3))
    S, tape = oracle.pairwise(q, q.copy())
    assert (S == 1).all()
    grad_q, grad_a = oracle.pairwise_backward(tape, np.ones_like(S))
    assert not grad_q.any() and not grad_a.any()
