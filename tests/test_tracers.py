"""What tracers find, beyond the tables of transforms.py: packed sequences, what a trace needs, errors."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gatematch.attention
from gatematch.attention import ABCNN, pairwise_attention
from gatematch.lstm import LSTM, LSTMCell, lstm

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Packed(nn.Module):
    def __init__(self, return_cells: bool) -> None:
        super().__init__()
        self.lstm, self.return_cells = LSTM(3, 4, bidirectional=True), return_cells

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, (h_n, c_n), *cells = self.lstm(packed, return_cells=self.return_cells)
        return pad_packed_sequence(y)[0], h_n, c_n, *(pad_packed_sequence(c)[0] for c in cells)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch's own, of packing
@pytest.mark.parametrize("return_cells", [False, True])
def test_a_trace_of_packed_sequences_takes_other_batches(return_cells: bool) -> None:
    model = Packed(return_cells)
    traced = torch.jit.trace(model, (torch.randn(2, 3, 3), torch.tensor([2, 1, 2])))
    for lengths in (torch.tensor([3, 5, 1, 4, 2]), torch.tensor([2, 3])):
        x = torch.randn(5, len(lengths), 3)
        for found, right in zip(traced(x, lengths), model(x, lengths), strict=True):
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [(LSTM(3, 4, 2), (torch.randn(2, 6, 3),)), (LSTMCell(3, 4), (torch.randn(2, 3),))],
    ids=["LSTM", "LSTMCell"],
)
def test_a_trace_without_lengths_needs_no_library_but_torch(module: nn.Module, inputs: tuple) -> None:
    assert "gatematch::" not in str(torch.jit.trace(module, inputs).inlined_graph)


TRACES = """
import torch
from gatematch.attention import ABCNN
from gatematch.lstm import LSTM
q, a, lengths = torch.randn(2, 6, 3), torch.randn(2, 5, 3), torch.tensor([5, 3])
torch.jit.trace(ABCNN(3, length=7), (q, a, lengths, lengths))
torch.jit.trace(LSTM(3, 4, batch_first=True), (q,))
"""


def test_a_trace_warns_of_nothing() -> None:
    """In a process of its own, since pytest has filters of its own."""
    run = subprocess.run([sys.executable, "-c", TRACES], capture_output=True, text=True)
    assert run.returncode == 0 and "TracerWarning" not in run.stderr, run.stderr


def test_torch_fx_says_how_to_take_what_it_cannot_follow() -> None:
    class Attentive(nn.Module):
        def forward(self, q: Tensor, a: Tensor) -> Tensor:
            return pairwise_attention(q, a)

    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return lstm(x, dict(LSTM(3, 4).named_parameters()))[0]

    for module, name in ((Attentive(), "q"), (Functional(), "x")):
        with pytest.raises(
            TypeError, match=rf"^{name}: expected a Tensor.*, got Proxy; .* after torch.fx.wrap"
        ):
            torch.fx.symbolic_trace(module)
    for module in (LSTM(3, 4), LSTMCell(3, 4), ABCNN(3, length=7), gatematch.attention.PairwiseAttention()):
        got = f"^module: expected one inside of what torch.fx traces, got {type(module).__name__} itself$"
        with pytest.raises(TypeError, match=got):
            torch.fx.symbolic_trace(module)
