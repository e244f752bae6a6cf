"""An independent oracle in NumPy float64, with every backward derived by hand and no torch at all.

Shape letters: T time, B batch, I input, H hidden, P projection (R = P, or H without one), Q and A the two
sequence lengths, D feature, V value width. `grad_u` is the derivative of a scalar loss by u and has u's
shape. A forward returns its outputs and a tape; its backward takes the tape and one upstream gradient for
each output.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def dense(x: Array, W: Array, b: Array | None = None) -> Array:
    """y = x @ W.T + b: x (N, I), W (O, I), b (O,) to y (N, O)."""
    y = x @ W.T
    return y if b is None else y + b


def dense_backward(grad_y: Array, x: Array, W: Array) -> tuple[Array, Array, Array]:
    """grad_y (N, O) to grad_x (N, I), grad_W (O, I), grad_b (O,).

    In components y_no = sum_i x_ni W_oi + b_o, from which each line follows.
    """
    # dL/dx_ni = sum_o grad_y_no W_oi: the sum runs over W's first index, so W stands untransposed. The
    # forward's sum ran over its second, which is why W.T stood there.
    grad_x = grad_y @ W
    # dL/dW_oi = sum_n grad_y_no x_ni: the sum runs over the rows n, the first index of both factors. A
    # product sums over the left factor's second index, so the left one is transposed.
    grad_W = grad_y.T @ x
    # dL/db_o = sum_n grad_y_no: b was broadcast over n, so its gradient is summed over n.
    return grad_x, grad_W, grad_y.sum(0)


class LSTMGrads(NamedTuple):
    x: Array
    h_0: Array
    c_0: Array
    params: dict[str, Array]


def sigmoid(z: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def lstm(
    x: Array,
    params: Mapping[str, Array],
    h_0: Array,
    c_0: Array,
    lengths: Any = None,
) -> tuple[tuple[Array, Array, Array, Array], list[dict[str, Any]]]:
    """The LSTM of torch.nn.LSTM, params named as in its state_dict.

    x (T, B, I), h_0 (cells, B, R), c_0 (cells, B, H), lengths (B,), a cell being a layer in one direction.
    Returns y (T, B, directions * R), h_n, c_n as h_0 and c_0, the last layer's cell states
    (T, B, directions * H), and the tape: one entry for each layer and direction.
    """
    T, B, _ = x.shape
    valid = np.ones((T, B), bool) if lengths is None else np.arange(T)[:, None] < np.asarray(lengths)
    x = np.where(valid[..., None], x, 0.0)
    suffixes = [s for s in ("", "_reverse") if f"weight_ih_l0{s}" in params]
    tape: list[dict[str, Any]] = []
    layer = 0
    while f"weight_ih_l{layer}" in params:
        for s in suffixes:
            W = {k: params.get(f"{k}_l{layer}{s}") for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            W["weight_hr"] = params.get(f"weight_hr_l{layer}{s}")
            n = len(tape)
            tape.append(_direction(x, W, h_0[n], c_0[n], valid, reverse=bool(s)))
            tape[-1]["suffix"] = f"_l{layer}{s}"
        directions = tape[-len(suffixes) :]
        x = np.concatenate([d["y"] for d in directions], -1)
        layer += 1
    cells = np.concatenate([d["cells"] for d in directions], -1)
    return (x, np.stack([d["h_n"] for d in tape]), np.stack([d["c_n"] for d in tape]), cells), tape


def _direction(
    x: Array, W: dict[str, Any], h: Array, c: Array, valid: npt.NDArray[np.bool_], reverse: bool
) -> dict[str, Any]:
    T, B, _ = x.shape
    H = W["weight_hh"].shape[0] // 4
    y, cells = np.zeros((T, B, h.shape[-1])), np.zeros((T, B, H))
    steps: list[dict[str, Any]] = []
    for t in range(T - 1, -1, -1) if reverse else range(T):
        m = valid[t][:, None]
        z = dense(x[t], W["weight_ih"], W["bias_ih"]) + dense(h, W["weight_hh"], W["bias_hh"])
        i, f, o = sigmoid(z[:, :H]), sigmoid(z[:, H : 2 * H]), sigmoid(z[:, 3 * H :])
        g = np.tanh(z[:, 2 * H : 3 * H])
        c_t = f * c + i * g
        tanh_c = np.tanh(c_t)
        u = o * tanh_c
        h_t = u if W["weight_hr"] is None else dense(u, W["weight_hr"])
        steps.append(
            {"t": t, "m": m, "i": i, "f": f, "g": g, "o": o, "tanh_c": tanh_c, "u": u, "c": c, "h": h}
        )
        y[t], cells[t] = np.where(m, h_t, 0.0), np.where(m, c_t, 0.0)
        h, c = np.where(m, h_t, h), np.where(m, c_t, c)
    return {"x": x, "W": W, "steps": steps, "y": y, "cells": cells, "h_n": h, "c_n": c}


def lstm_backward(
    tape: list[dict[str, Any]],
    grad_y: Array,
    grad_h_n: Array,
    grad_c_n: Array,
    grad_cells: Array | None = None,
) -> LSTMGrads:
    """Gradients of y, h_n, c_n and the last layer's cells to those of x, h_0, c_0, parameters."""
    directions = 2 if tape[-1]["suffix"].endswith("_reverse") else 1
    grad_params: dict[str, Array] = {}
    grad_h_0, grad_c_0 = np.zeros_like(grad_h_n), np.zeros_like(grad_c_n)
    for start in range(len(tape) - directions, -1, -directions):
        entries = tape[start : start + directions]
        grad_x = np.zeros_like(entries[0]["x"])
        for d, entry in enumerate(entries):
            R, H = entry["y"].shape[-1], entry["cells"].shape[-1]
            own_cells = np.zeros_like(entry["cells"])
            if grad_cells is not None and start == len(tape) - directions:
                own_cells = grad_cells[..., d * H : (d + 1) * H]
            gx, grad_h_0[start + d], grad_c_0[start + d], grads = _direction_backward(
                entry, grad_y[..., d * R : (d + 1) * R], grad_h_n[start + d], grad_c_n[start + d], own_cells
            )
            grad_x += gx  # both directions read the same x
            grad_params |= {f"{k}{entry['suffix']}": v for k, v in grads.items()}
        grad_y = grad_x  # the layer below's y is this layer's x
    return LSTMGrads(grad_y, grad_h_0, grad_c_0, grad_params)


def _direction_backward(
    entry: dict[str, Any], grad_y: Array, grad_h: Array, grad_c: Array, grad_cells: Array
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Backpropagation through time: the steps of the forward in the opposite order.

    On entry to a step grad_h and grad_c are the derivatives by the state that it left, on exit by the
    state that it found. Where the row had ended the step was the identity, and they pass through.
    """
    x, W = entry["x"], entry["W"]
    grads = {k: np.zeros_like(v) for k, v in W.items() if v is not None}
    grad_x = np.zeros_like(x)
    for s in reversed(entry["steps"]):
        t, m, i, f, g, o, tanh_c = s["t"], s["m"], s["i"], s["f"], s["g"], s["o"], s["tanh_c"]
        grad_h_t = np.where(m, grad_y[t] + grad_h, 0.0)
        grad_c_t = np.where(m, grad_cells[t] + grad_c, 0.0)
        if W["weight_hr"] is None:
            grad_u = grad_h_t
        else:
            grad_u, grad_W_hr, _ = dense_backward(grad_h_t, s["u"], W["weight_hr"])
            grads["weight_hr"] += grad_W_hr
        # u = o tanh(c_t): c_t is reached directly and through u.
        grad_c_t = grad_c_t + grad_u * o * (1 - tanh_c**2)
        # c_t = f c + i g, and sigmoid' = s (1 - s), tanh' = 1 - tanh^2, each from its own value.
        grad_z = np.concatenate(
            [
                grad_c_t * g * i * (1 - i),
                grad_c_t * s["c"] * f * (1 - f),
                grad_c_t * i * (1 - g**2),
                grad_u * tanh_c * o * (1 - o),
            ],
            -1,
        )
        grad_x[t], grad_W_ih, grad_b = dense_backward(grad_z, x[t], W["weight_ih"])
        grad_h_prev, grad_W_hh, _ = dense_backward(grad_z, s["h"], W["weight_hh"])
        grads["weight_ih"] += grad_W_ih
        grads["weight_hh"] += grad_W_hh
        if W["bias_ih"] is not None:
            grads["bias_ih"] += grad_b
            grads["bias_hh"] += grad_b
        grad_h = np.where(m, grad_h_prev, grad_h)
        grad_c = np.where(m, grad_c_t * f, grad_c)
    return grad_x, grad_h, grad_c, grads


def pairwise_valid(
    B: int, Q: int, A: int, q_lengths: Any = None, a_lengths: Any = None
) -> npt.NDArray[np.bool_]:
    """(B, Q, A): both ends of the pair lie within their lengths."""
    q = np.full(B, Q) if q_lengths is None else np.asarray(q_lengths)
    a = np.full(B, A) if a_lengths is None else np.asarray(a_lengths)
    return (np.arange(Q) < q[:, None])[:, :, None] & (np.arange(A) < a[:, None])[:, None, :]


def pairwise(
    q: Array, a: Array, q_lengths: Any = None, a_lengths: Any = None
) -> tuple[Array, dict[str, Any]]:
    """S_ij = 1 / (1 + ||q_i - a_j||), 0 for a padded pair: q (B, Q, D), a (B, A, D) to S (B, Q, A), tape."""
    valid = pairwise_valid(len(q), q.shape[1], a.shape[1], q_lengths, a_lengths)
    difference = np.where(valid[..., None], q[:, :, None] - a[:, None], 0.0)  # (B, Q, A, D)
    d = np.sqrt((difference**2).sum(-1))
    S = np.where(valid, 1 / (1 + d), 0.0)
    return S, {"difference": difference, "d": d, "S": S}


def pairwise_backward(tape: dict[str, Any], grad_S: Array) -> tuple[Array, Array]:
    """grad_S (B, Q, A) to grad_q (B, Q, D), grad_a (B, A, D).

    dS/dd = -S^2 and dd/dq = (q - a) / d, with a's sign opposite. At d = 0 there is no derivative; the
    subgradient 0 is taken. S = 0 in padded pairs keeps them out.
    """
    d, S = tape["d"], tape["S"]
    slope = np.divide(-(S**2) * grad_S, d, out=np.zeros_like(d), where=d > 0)
    pairs = slope[..., None] * tape["difference"]
    return pairs.sum(2), -pairs.sum(1)


def attend(S: Array, v: Array) -> Array:
    """O = S @ v: S (B, Q, A), v (B, A, V) to (B, Q, V)."""
    return S @ v


def attend_backward(grad_O: Array, S: Array, v: Array) -> tuple[Array, Array]:
    """grad_O (B, Q, V) to grad_S (B, Q, A), grad_v (B, A, V)."""
    # O_iv = sum_j S_ij v_jv. dL/dS_ij sums over v, the last index of both, so v is transposed;
    # dL/dv_jv sums over i, the first index of both, so S is.
    return grad_O @ v.transpose(0, 2, 1), S.transpose(0, 2, 1) @ grad_O


def sums(S: Array) -> tuple[Array, Array]:
    """Row sums (B, Q) and column sums (B, A)."""
    return S.sum(2), S.sum(1)


def sums_backward(grad_r: Array, grad_c: Array) -> Array:
    """Each S_ij is in one row sum and one column sum."""
    return grad_r[:, :, None] + grad_c[:, None, :]
