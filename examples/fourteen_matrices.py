"""The 14 arrays of an LSTM with a dense head: where each is kept, and one step computed from them by hand.

8 matrices (an input and a recurrent one for each of the gates i, f, g, o), 4 biases and the head's
matrix and bias. PyTorch packs the gates, four blocks of H rows, so that a step is one product of width
4H; `named_gates` gives each block its name. It also keeps two biases per gate, which are only ever used
as their sum.
"""

import torch
from torch import nn

from gatematch.lstm import LSTM, init_gates_, named_gates

B, I, H, CLASSES = 3, 5, 4, 2
torch.manual_seed(0)
lstm = LSTM(I, H)
head = nn.Linear(H, CLASSES)

# Each array can have an initialiser of its own; later rules win.
init_gates_(
    lstm,
    {
        "W_i?_l0": nn.init.xavier_uniform_,
        "W_h?_l0": nn.init.orthogonal_,
        "W_ig_l0": lambda view: nn.init.normal_(view, std=0.1),
        "b_*": 0.0,
        "b_if_l0": 1.0,  # remember by default
    },
)
nn.init.xavier_uniform_(head.weight)
nn.init.zeros_(head.bias)

gates = named_gates(lstm)
arrays, places = {}, {}
for k, gate in enumerate("ifgo"):
    rows = f"rows {k * H:2} to {(k + 1) * H - 1:2}"
    arrays[f"W_i{gate}"], places[f"W_i{gate}"] = gates[f"W_i{gate}_l0"], f"weight_ih_l0, {rows}"
    arrays[f"W_h{gate}"], places[f"W_h{gate}"] = gates[f"W_h{gate}_l0"], f"weight_hh_l0, {rows}"
    arrays[f"b_{gate}"] = gates[f"b_i{gate}_l0"] + gates[f"b_h{gate}_l0"]
    places[f"b_{gate}"] = f"bias_ih_l0 + bias_hh_l0, {rows}"
arrays |= {"W": head.weight, "b": head.bias}
places |= {"W": "head.weight", "b": "head.bias"}

assert len(arrays) == 14
for name, array in arrays.items():
    print(f"{name:5} {tuple(array.shape)!s:8} {places[name]}")

# One step by hand. x @ W.T, with the four gates' matrices stacked: a single product per operand.
x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
W_i = torch.cat([arrays[f"W_i{gate}"] for gate in "ifgo"])  # (4H, I)
W_h = torch.cat([arrays[f"W_h{gate}"] for gate in "ifgo"])  # (4H, H)
bias = torch.cat([arrays[f"b_{gate}"] for gate in "ifgo"])  # (4H,)
z = x @ W_i.T + h @ W_h.T + bias  # (B, 4H)
i, f, g, o = z.chunk(4, 1)
c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
h_next = o.sigmoid() * c_next.tanh()
scores = h_next @ arrays["W"].T + arrays["b"]

y, (_, c_n) = lstm(x[None], (h[None], c[None]))
torch.testing.assert_close(c_next, c_n[0])
torch.testing.assert_close(scores, head(y[-1]))
print("\none step from the 14 arrays equals the module")
