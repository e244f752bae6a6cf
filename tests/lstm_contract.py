"""What the LSTM kernels promise, as checks against float64 on the same inputs, on any device."""

import copy
from collections import Counter, defaultdict

import torch

from gatematch.lstm import LSTM
from gatematch.lstm.reference import lstm_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def lengths_of(T, B, device="cpu"):
    """Lengths with 0 and T among them, where there are that many."""
    lengths = torch.randint(0, T + 1, (B,))
    lengths[-1] = T
    lengths[0] = 0 if B > 1 else T
    return lengths.to(device)


def results(function, x, hx, params, upstream):
    """y, h_n, c_n and c of `function`, and the gradients of all inputs, by name."""
    y, (h_n, c_n), c = function()
    outputs = {"y": y, "h_n": h_n, "c_n": c_n, "c": c}
    inputs = {"x": x, "h_0": hx[0], "c_0": hx[1], **params}
    chosen = [outputs[name] for name in upstream]
    grads = torch.autograd.grad(chosen, list(inputs.values()), list(upstream.values()))
    return outputs | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def of_torch(model, x, hx, lengths, upstream):
    """The same by torch.nn.LSTM's own op, in the same dtype; padded rows are packed for it."""
    theirs = copy.deepcopy(model)
    theirs.impl = "torch"
    x, *hx = (tensor.detach().nan_to_num().requires_grad_() for tensor in (x, *hx))

    def function():
        y, states = theirs(x.transpose(0, 1) if model.batch_first else x, tuple(hx), lengths)
        return y.transpose(0, 1) if model.batch_first else y, states, None

    return results(function, x, hx, dict(theirs.named_parameters()), upstream)


def check_layer(
    T, B, I, H, dtype, *, impl, N=2, L=1, P=0, bias=True, with_lengths=True, upstream=("y", "h_n", "c_n"),
    batch_first=False, device="cpu", draws=1,
):  # fmt: skip
    """Every result and gradient: at most twice torch.nn.LSTM's error and a rounding of the largest value, or
    4 ulp of that.

    With a gradient of the cell states, which torch.nn.LSTM does not return, 8 ulp. Few numbers, or sums that
    may cancel, are exact by chance, in ours or in torch's, and now and then off by many times what is usual:
    where ours are behind, others are drawn, and their root mean squares compared, of both directions
    together. In float32 dx is one library product, of 4·H·N terms, and may be off by twice what such a
    product is by itself: some CPUs' libraries add up one number after the other.
    """
    for number in (draws, 16):
        drawn = [
            draw(T, B, I, H, dtype, impl, N, L, P, bias, with_lengths, upstream, batch_first, device)
            for _ in range(number)
        ]
        ours, theirs, sizes = defaultdict(list), defaultdict(list), Counter()
        for got, want, _ in drawn:
            for name, value in got.items():
                assert value.dtype == dtype and value.shape == want[name].shape, name
                kind = name.removesuffix("_reverse")
                ours[kind].append(largest_error(value, want[name]))
                sizes[kind] = max(sizes[kind], float(want[name].detach().abs().max()))
        wrong = exceeded(ours, sizes, dtype, upstream)
        if wrong and "c" not in upstream:
            for _, want, peer in drawn:
                for name, value in peer().items():
                    if value is not None:
                        theirs[name.removesuffix("_reverse")].append(largest_error(value, want[name]))
        behind = []
        for name in wrong:
            rounding = torch.finfo(dtype).eps / 2 * sizes[name]
            if name == "dh_0" and dtype == torch.float32 and torch.device(device).type == "cuda":
                # One product of 4H terms and nothing after it. Tensor cores add 8 at a time and cut each sum.
                rounding *= 1 + (4 * H / 8) ** 0.5
            errors = root_mean_square(ours[name]), root_mean_square(theirs[name] or [0.0])
            if name == "dx" and dtype == torch.float32 and L == 1:
                errors = errors[0], max(errors[1], sizes["dx"] * product_error(T * B, 4 * H * N, I, device))
            if not errors[0] <= 2 * errors[1] + rounding:
                behind.append((name, *errors, sizes[name]))
        if not behind or "c" in upstream:
            break
    assert not behind, behind


def check_any_layer(dtype, impl, rng, most=64):
    """Four draws of a layer of any kind, with up to `most` hidden units."""
    H = rng.randint(1, rng.choice((20, most)))
    check_layer(
        T=rng.randint(1, 6), B=rng.randint(1, rng.choice((4, 40))), I=rng.randint(1, 9), H=H, dtype=dtype,
        impl=impl, N=rng.randint(1, 2), L=rng.choice((1, 1, 2)), P=rng.choice((0, 0, rng.randint(1, H) % H)),
        bias=rng.random() < 0.7, with_lengths=rng.random() < 0.7, batch_first=rng.random() < 0.3,
        upstream=rng.choice((("y", "h_n", "c_n"), ("y",), ("h_n", "c_n"))), draws=4,
    )  # fmt: skip


def root_mean_square(errors):
    return (sum(error**2 for error in errors) / len(errors)) ** 0.5


def product_error(n, k, m, device):
    """The largest error of a few float32 products (n, k) (k, m), as a share of their largest number."""
    shares = []
    for _ in range(8):
        x, y = torch.randn(n, k, device=device), torch.randn(k, m, device=device)
        exact = x.double() @ y.double()
        shares.append(largest_error(x @ y, exact) / float(exact.abs().max()))
    return max(shares)


def exceeded(errors, sizes, dtype, upstream):
    """The results that are off by more than a few ulp."""
    ulp = (8 if "c" in upstream else 4) * torch.finfo(dtype).eps
    return {name for name, of_draws in errors.items() if not max(of_draws) <= ulp * sizes[name]}


def draw(T, B, I, H, dtype, impl, N, L, P, bias, with_lengths, upstream, batch_first, device):
    """The results of one random layer, those in float64, and a function that gives torch's."""
    model = LSTM(
        I, H, L, bias, batch_first, bidirectional=N == 2, proj_size=P, device=device, dtype=dtype, impl=impl
    )
    x = torch.randn(T, B, I, device=device).to(dtype)
    hx = [torch.randn(L * N, B, width, device=device).to(dtype) for width in (P or H, H)]
    lengths = lengths_of(T, B, device) if with_lengths else None
    exact_x, *exact_hx = (tensor.double().requires_grad_() for tensor in (x, *hx))
    exact_params = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    if lengths is not None:
        x[torch.arange(T, device=device)[:, None] >= lengths] = torch.nan
    x, *hx = (tensor.requires_grad_() for tensor in (x, *hx))

    def ours():
        y, states, c = model(x.transpose(0, 1) if batch_first else x, tuple(hx), lengths, True)
        return (y.transpose(0, 1), states, c.transpose(0, 1)) if batch_first else (y, states, c)

    def exact():
        return lstm_reference(exact_x, exact_params, tuple(exact_hx), lengths=lengths)

    y, (h_n, c_n), c = exact()
    shapes = {"y": y, "h_n": h_n, "c_n": c_n, "c": c}
    g = {name: torch.randn_like(shapes[name]).to(dtype) for name in upstream}
    if lengths is not None and "y" in g:  # nor is what comes back there
        g["y"][torch.arange(T, device=device)[:, None] >= lengths] = torch.nan
    exact_g = {name: value.double().nan_to_num() for name, value in g.items()}
    want = results(exact, exact_x, exact_hx, exact_params, exact_g)
    got = results(ours, x, hx, dict(model.named_parameters()), g)
    g = {name: value.nan_to_num() for name, value in g.items() if name != "c"}
    return got, want, lambda: of_torch(model, x, hx, lengths, g)


def largest_error(got, want):
    """The largest difference; NaN, which is none, counts as infinite."""
    return float((got.detach().double() - want.detach()).abs().nan_to_num(torch.inf).max())
