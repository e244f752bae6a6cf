"""Every op of pairwise attention with inputs for opcheck, by either implementation."""

import torch

from gatematch.attention import ops

OPS = [f"pairwise_{name}{end}" for name in ("attention", "attend", "sums") for end in ("", "_backward")]


def opcheck_case(name, impl, dtype):
    q, a, v = torch.randn(2, 9, 20).to(dtype), torch.randn(2, 8, 20).to(dtype), torch.randn(2, 8, 3).to(dtype)
    lengths = torch.tensor([9, 4]), None
    by = (impl, "float32")
    exact = torch.promote_types(dtype, torch.float32)
    r, O, g = torch.rand(2, 9, dtype=exact), torch.randn(2, 9, 3, dtype=exact), torch.randn(2, 9, 3)
    S, W, centre = ops.attention.forward_op(q, a, *lengths, *by, True)
    inputs = {
        # Without lengths, and with A a multiple of 8, since W is not written where it is never read.
        "pairwise_attention": (q, a, None, None, *by, True),
        "pairwise_attention_backward": (q, a, W, centre, S, *lengths, *by, [True, False]),
        "pairwise_attend": (q, a, v, *lengths, True, *by),
        "pairwise_attend_backward": (
            q, a, v.mT.contiguous().mT, O, r, g.to(exact), *lengths, True, *by, [True, True, True]
        ),
        "pairwise_sums": (q, a, *lengths, *by),
        "pairwise_sums_backward": (q, a, r, torch.rand(2, 8, dtype=exact), *lengths, *by, [False, True]),
    }  # fmt: skip
    return getattr(torch.ops.gatematch, name).default, inputs[name]
