"""The spectrum of the Hessian of an LSTM's loss, before and after training.

A small LSTM learns to say in every step what came in two steps before. Of the Hessian of its mean square
error by all parameters, at the initial weights and at the trained ones, this prints

- by products alone, which also works for a model whose Hessian no memory holds: the eigenvalues at both
  ends, the trace with its standard error, and the share of eigenvalues in each range;
- from the whole matrix, which a small model has room for: the same, exact, and the norm of each gate's block;

and asserts that both agree.

    python hessian_spectrum.py
    python hessian_spectrum.py --hidden 8 --steps 600 --plot spectrum.svg
"""

import argparse
import copy
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn

from gatematch.curvature import HessianOperator, hessian, parameter_index, spectral_density, trace
from gatematch.lstm import LSTM, named_gates

DELAY = 2
EDGES = [-np.inf, -0.1, -0.01, 0.01, 0.1, 1, np.inf]
RANGES = ["below -0.1", "-0.1 to -0.01", "-0.01 to 0.01", "0.01 to 0.1", "0.1 to 1", "above 1"]


def by_products(loss_fn, model, seed):
    """Three eigenvalues at each end, the trace and the density: hundreds of products, and no matrix."""
    op = HessianOperator(loss_fn, model)
    start = np.random.default_rng(seed).standard_normal(op.shape[0])
    # More Lanczos vectors than the default: after training the smallest lie close beside many near zero.
    options = {"v0": start, "ncv": min(80, op.shape[0]), "tol": 1e-4, "return_eigenvectors": False}
    largest, smallest = eigsh(op, 3, which="LA", **options), eigsh(op, 3, which="SA", **options)
    density = spectral_density(op, samples=8, steps=40, seed=seed)
    return np.sort(largest)[::-1], np.sort(smallest), trace(op, samples=50, seed=seed), density


def shares(values, weights):
    """Which share of the eigenvalues is in each range."""
    return np.histogram(values, bins=EDGES, weights=weights)[0]


def gate_rows(model):
    """The rows of H of each gate's matrices and biases: `named_gates` of a copy that holds row numbers."""
    index, numbers = parameter_index(model), copy.deepcopy(model)
    for name, p in numbers.named_parameters():
        p.data = torch.arange(index[name].start, index[name].stop, dtype=p.dtype).view(p.shape)
    return {name: gate.detach().flatten().long() for name, gate in named_gates(numbers["lstm"]).items()}


def three_digits(number):
    number = float(f"{number:.3g}")
    return number if abs(number) < 100 else int(number)


def report(when, loss_fn, model, seed):
    """Print and check everything at the present weights; the numbers by name, and the density."""
    largest, smallest, (value, error), density = by_products(loss_fn, model, seed)
    H = hessian(loss_fn, model)
    exact = torch.linalg.eigvalsh(H).numpy()  # ascending
    estimated, true = shares(*density), shares(exact, np.full(len(exact), 1 / len(exact)))
    gates = gate_rows(model)
    norms = {name: torch.linalg.norm(H[rows][:, rows]).item() for name, rows in gates.items()}

    loss = loss_fn().item()
    print(f"{when}, loss {loss:.3g}: {len(H)} x {len(H)}")
    print("  largest eigenvalues ", *(f"{number:9.3g}" for number in largest))
    print("  smallest eigenvalues", *(f"{number:9.3g}" for number in smallest))
    print(f"  trace {value:.3g} ± {error:.2g}, exactly {exact.sum():.3g}")
    print("  eigenvalues       by products     exact")
    for where, guess, share in zip(RANGES, estimated, true, strict=True):
        print(f"  {where:<18} {guess:10.1%} {share:9.1%}  {'#' * round(50 * guess)}".rstrip())
    print("  norm of the block of        i        f        g        o")
    for name in norms:
        if name[3] == "i":  # W_ii_l0, and the other three beside it
            row = (norms[name[:3] + gate + name[4:]] for gate in "ifgo")
            print(f"  {name[:3] + '?' + name[4:]:<20}", *(f"{norm:8.2g}" for norm in row))
    print()

    scale = np.abs(exact).max()
    np.testing.assert_allclose(largest, exact[::-1][:3], rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(smallest, exact[:3], rtol=0, atol=1e-6 * scale)
    assert abs(value - exact.sum()) < 5 * error, "the estimated trace is off"
    assert np.abs(estimated - true).max() < 0.1, "an estimated share is off"
    # Only the sum of a gate's two biases is ever used: nothing changes along their difference.
    zeros = sum(len(rows) for name, rows in gates.items() if name.startswith("b_h"))
    assert (np.abs(exact) < 1e-10 * scale).sum() >= zeros, "too few eigenvalues are zero"

    numbers = {
        "loss": loss,
        "largest eigenvalue": largest[0],
        "smallest eigenvalue": smallest[0],
        "trace": value,
        "trace, standard error": error,
        "trace, exact": exact.sum(),
        "share below -0.01": estimated[:2].sum(),
        "share below -0.01, exact": true[:2].sum(),
        **{f"norm of W_h{gate}": norms[f"W_h{gate}_l0"] for gate in "ifgo"},
    }
    return {"parameters": len(H)} | {name: three_digits(v) for name, v in numbers.items()}, density


def draw(path, densities):
    """Both densities on a logarithmic scale, each node spread over a fiftieth of the spectrum's width."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(densities), figsize=(6, 5), layout="constrained")
    for ax, (when, density) in zip(axes, densities.items(), strict=True):
        low, high = density.nodes[0], density.nodes[-1]
        grid = np.linspace(low - (high - low) / 10, high + (high - low) / 10, 1000)
        ax.semilogy(grid, np.maximum(density.smooth(grid, (high - low) / 50), 1e-6))
        ax.set(title=when, xlabel="eigenvalue", ylabel="density")
    figure.savefig(path)


def at_least(least):
    """For argparse: an integer that is not smaller."""

    def integer(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return int(text)

    return integer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--hidden", type=at_least(1), default=6, help="of the LSTM (default 6: 223 parameters)"
    )
    parser.add_argument("--steps", type=at_least(1), default=400, help="of training (default 400)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--plot", type=Path, help="draw both densities to this file; needs matplotlib")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib")
    if args.plot and (args.plot.suffix != ".svg" or not args.plot.parent.is_dir()):
        parser.error(f"--plot must be an .svg file in a folder that exists; got {args.plot}")
    if args.json and args.json.is_dir():
        parser.error(f"--json must be a file; {args.json} is a folder")

    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    torch.manual_seed(args.seed)
    model = nn.ModuleDict({"lstm": LSTM(1, args.hidden), "head": nn.Linear(args.hidden, 1)})
    model.double()  # Lanczos loses to rounding what it found: the more digits, the later
    x = torch.randn(10, 32, 1, dtype=torch.float64)

    def loss_fn():
        y, _ = model["lstm"](x)
        return F.mse_loss(model["head"](y)[DELAY:], x[:-DELAY])

    before, density_before = report("before training", loss_fn, model, args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(args.steps):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    after, density_after = report("after training", loss_fn, model, args.seed)

    if args.plot:
        draw(args.plot, {"before training": density_before, "after training": density_after})
    if args.json:
        from gatematch.bench.results import describe_machine, write_results

        rows = [
            {"case": f"example/{name}", "before training": before[name], "after training": after[name]}
            for name in before
        ]
        write_results(args.json, describe_machine(torch.device("cpu")), rows)


if __name__ == "__main__":
    main()
