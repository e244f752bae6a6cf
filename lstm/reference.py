r"""The LSTM written out step by step, in plain differentiable torch operations.

Shape letters: T time, B batch, I input, H hidden, P projection, L layers. One step of one layer and
direction, gates in the order i, f, g, o:

    z_t = x_t @ W_ih.T + b_ih + h_{t-1} @ W_hh.T + b_hh      (B, 4H) = [z_i, z_f, z_g, z_o]
    i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)       (B, H) each
    g   = tanh(z_g)                                          (B, H)
    c_t = f * c_{t-1} + i * g                                (B, H)
    h_t = o * tanh(c_t)                                      (B, H)
    h_t = (o * tanh(c_t)) @ W_hr.T                           (B, P) with a projection

    x (T, B, I)     W_ih (4H, I), W_hh (4H, H or P), b_ih and b_hh (4H,), W_hr (P, H)

The reverse direction runs from the last step to the first. A layer's output is its directions' h side by
side, and the input of the layer above; there I is the width of the layer below. A row with a length
ends there: its later outputs are 0, and its final state is the one after its last valid step, which for
the reverse direction is where it starts.

In float16 and bfloat16 the products, the gates and the cell state are float32; h is rounded to the
storage type in every step, because it is the output.

Hochreiter and Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; the forget gate is that of
Gers et al. 2000, the projection that of Sak et al. 2014, https://arxiv.org/abs/1402.1128.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cell_update(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations z (..., 4H) and cell state c (..., H) to h, before projection, and the next c."""
    i, f, g, o = z.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_cell_reference(
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step: x (..., I), h and c (..., H) to the next h and c, in x's dtype."""
    h, c = hx
    wide = torch.promote_types(x.dtype, torch.float32)
    z = _input_product(x, weight_ih, bias_ih, bias_hh) + h.to(wide) @ weight_hh.to(wide).T
    h, c = cell_update(z, c.to(wide))
    return h.to(x.dtype), c.to(x.dtype)


def lstm_reference(
    x: Tensor,
    params: Mapping[str, Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    packed_rows: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """A whole LSTM: every layer and direction.

    Args:
        x: (T, B, I), T at least 1, any floating dtype. What lies past a row's length is never used.
        params: weights under the names of `torch.nn.LSTM`'s state_dict, which also say how many layers
            there are and whether there are biases, a reverse direction and a projection.
        hx: h_0 (L * directions, B, P or H) and c_0 (L * directions, B, H); zeros if None.
        lengths: (B,) integers on x's device; values outside [0, T] count as the nearer end.
        dropout: probability of dropping an output between layers, if `training`.
        packed_rows: (sum of lengths,) the rows of x.flatten(0, 1) that a packed x has, in its order: dropout
            then draws for those, and a seed gives the mask that it gives the packed x.

    Returns:
        y (T, B, directions * (P or H)), (h_n, c_n) shaped as hx, and the last layer's cell states
        (T, B, directions * H), all in x's dtype.
    """
    T, B, _ = x.shape
    live = None
    if lengths is not None:
        live = (torch.arange(T, device=x.device)[:, None] < lengths)[..., None]  # (T, B, 1)
        x = torch.where(live, x, 0)
    suffixes = ("", "_reverse") if "weight_ih_l0_reverse" in params else ("",)
    layers = sum(name.startswith("weight_ih") for name in params) // len(suffixes)
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for layer in range(layers):
        if layer > 0:
            x = drop(x, dropout, training, packed_rows)
        hs, cells = [], []
        for suffix in suffixes:
            weight_ih, weight_hh = (
                params[f"weight_ih_l{layer}{suffix}"],
                params[f"weight_hh_l{layer}{suffix}"],
            )
            weight_hr = params.get(f"weight_hr_l{layer}{suffix}")
            bias_ih, bias_hh = (
                params.get(f"bias_ih_l{layer}{suffix}"),
                params.get(f"bias_hh_l{layer}{suffix}"),
            )
            if hx is None:
                h, c = x.new_zeros(B, weight_hh.shape[1]), x.new_zeros(B, weight_hh.shape[0] // 4)
            else:
                h, c = hx[0][len(h_n)], hx[1][len(c_n)]
            z_x = _input_product(x, weight_ih, bias_ih, bias_hh)
            hs_d, cells_d, h, c = _recurrence(z_x, h, c, weight_hh, weight_hr, live, reverse=bool(suffix))
            hs.append(hs_d)
            cells.append(cells_d)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(hs, dim=-1)
    return x, (torch.stack(h_n), torch.stack(c_n)), torch.cat(cells, dim=-1)


def scatter_rows(rows: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows (N, width) at their places in zeros (*shape, width)."""
    zeros = rows.new_zeros(math.prod(shape), rows.shape[1])
    return zeros.index_copy(0, index, rows).unflatten(0, shape)


def drop(x: Tensor, dropout: float, training: bool, packed_rows: Tensor | None) -> Tensor:
    """Dropout of x (T, B, width), drawn for its `packed_rows` alone if given."""
    if packed_rows is None or not training:
        return torch.dropout(x, dropout, training)
    kept = torch.dropout(x.flatten(0, 1).index_select(0, packed_rows), dropout, training)
    return scatter_rows(kept, packed_rows, x.shape[:2])


def _input_product(x: Tensor, weight_ih: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor:
    """x (..., I) to the part of z (..., 4H) that does not depend on h, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) @ weight_ih.to(wide).T
    if bias_ih is not None and bias_hh is not None:
        z = z + (bias_ih.to(wide) + bias_hh.to(wide))
    return z


def _recurrence(
    z_x: Tensor,  # (T, B, 4H)
    h: Tensor,  # (B, P or H), storage dtype
    c: Tensor,  # (B, H)
    weight_hh: Tensor,  # (4H, P or H)
    weight_hr: Tensor | None,  # (P, H)
    live: Tensor | None,  # (T, B, 1)
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer over all steps: h and c of every step, and the final h and c."""
    dtype, wide = h.dtype, z_x.dtype
    W_hh, W_hr = weight_hh.to(wide).T, None if weight_hr is None else weight_hr.to(wide).T
    c = c.to(wide)
    hs, cells = [], []
    z_steps = z_x.unbind(0)  # one node in the graph; indexing step by step would cost O(T^2) in backward
    for t in reversed(range(len(z_steps))) if reverse else range(len(z_steps)):
        h_t, c_t = cell_update(z_steps[t] + h.to(wide) @ W_hh, c)
        h_t = (h_t if W_hr is None else h_t @ W_hr).to(dtype)
        if live is None:
            h, c = h_t, c_t
            hs.append(h_t)
            cells.append(c_t)
        else:
            h, c = torch.where(live[t], h_t, h), torch.where(live[t], c_t, c)
            hs.append(torch.where(live[t], h_t, 0))
            cells.append(torch.where(live[t], c_t, 0))
    if reverse:
        hs.reverse()
        cells.reverse()
    return torch.stack(hs), torch.stack(cells).to(dtype), h, c.to(dtype)
