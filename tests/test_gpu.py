"""The CPU's contract on a CUDA device: the same numbers, right against float64."""

import pytest
import torch

from gatematch.attention import pairwise_attend, pairwise_attention, pairwise_sums
from gatematch.attention.reference import pairwise_attention_reference
from gatematch.lstm import LSTM

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("D", [1, 7, 50, 300])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_pairwise_attention_is_exact(D, offset):
    words = torch.randn(20, D, device="cuda") + offset
    q, a = words[torch.randint(0, 20, (3, 65))], words[torch.randint(0, 20, (3, 63))]
    q = (q + 1e-3 * torch.randn_like(q) * torch.randint(0, 2, (3, 65, 1), device="cuda")).requires_grad_()
    a.requires_grad_()
    q_lengths = torch.tensor([65, 1, 30], device="cuda")
    want = pairwise_attention_reference(q.double(), a.double(), q_lengths)
    S = pairwise_attention(q, a, q_lengths)
    assert (S.double() - want).abs().max() < 1e-6
    g = torch.randn_like(S)
    grads = torch.autograd.grad(S, (q, a), g)
    for grad, true in zip(grads, torch.autograd.grad(want, (q, a), g.double()), strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-4)
    r, c = pairwise_sums(q, a, q_lengths)
    torch.testing.assert_close((r.double(), c.double()), (want.sum(2), want.sum(1)), rtol=1e-5, atol=1e-5)
    v = torch.randn(3, 63, 5, device="cuda")
    O = pairwise_attend(q, a, v, q_lengths=q_lengths)
    torch.testing.assert_close(O.double(), want @ v.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_with_lengths_follows_float64(bidirectional):
    model = LSTM(65, 63, 2, bidirectional=bidirectional).cuda()
    x = torch.randn(20, 5, 65, device="cuda")
    lengths = torch.tensor([20, 1, 7, 0, 13], device="cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y, (h_n, c_n), c = model(x, lengths=lengths, return_cells=True)
        fused = model(x, lengths=lengths)[0]
    want, states, cells = model.double()(x.double(), lengths=lengths, return_cells=True)
    for got, true in ((y, want), (fused, want), (h_n, states[0]), (c_n, states[1]), (c, cells)):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5)
