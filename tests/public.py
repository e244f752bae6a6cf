"""Everything public, and a valid call of each: what tests that walk over the whole library start from."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import gatematch
import gatematch.lstm
from gatematch.attention import ABCNN, AttentionFeatures, PairwiseAttention
from gatematch.curvature import SpectralDensity
from gatematch.lstm import LSTM, LSTMCell


def public() -> dict[str, Callable[..., Any]]:
    """Functions, constructors and methods, but for constructors of results and methods without arguments."""
    return dict(sorted(_public()))


def _public() -> Iterator[tuple[str, Callable[..., Any]]]:
    packages = ("attention", "curvature", "lstm")
    for name in {*gatematch.__all__} - {*packages, "__version__"} | {"lstm"}:
        thing = getattr(gatematch.lstm if name == "lstm" else gatematch, name)
        if inspect.isclass(thing):
            methods = {f"{name}.{m}": method for m, method in vars(thing).items() if not m.startswith("_")}
            functions = {m: method for m, method in methods.items() if inspect.isfunction(method)}
            yield from ((m, f) for m, f in functions.items() if len(inspect.signature(f).parameters) > 1)
            if issubclass(thing, tuple):
                continue
        yield name, thing


def calls() -> dict[str, dict[str, Any]]:
    """The arguments of a valid call of everything public, made anew, by name and what is special."""
    torch.manual_seed(0)
    q, a, v = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    w = torch.randn(3, requires_grad=True)
    a[0, 1] = q[0, 1]
    x, hx, lengths = torch.randn(3, 2, 4), (torch.randn(1, 2, 5), torch.randn(1, 2, 5)), torch.tensor([3, 1])
    pair = {"q": q, "a": a, "q_lengths": torch.tensor([3, 2]), "a_lengths": torch.tensor([1, 5])}
    network, cell, op = LSTM(4, 5), LSTMCell(4, 5), aslinearoperator(np.eye(3))
    abcnn, features = ABCNN(4, length=5), AttentionFeatures(4, length=5)
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    step = {"hx": (hx[0][0], hx[1][0])}

    def loss() -> torch.Tensor:
        return (w**3).sum()

    curved = {"loss_fn": loss, "params": [w]}
    vector = torch.ones(3)
    found: dict[str, dict[str, Any]] = {
        "ABCNN": {"features": 4, "length": 3},
        "ABCNN.forward": {"self": abcnn, **pair},
        "ABCNN.representations": {"self": abcnn, **pair},
        "AttentionFeatures": {"features": 4, "length": 3},
        "AttentionFeatures.forward": {"self": features, **pair},
        "HessianOperator": curved,
        "LSTM": {"input_size": 4, "hidden_size": 5},
        "LSTM.forward": {"self": network, "input": x, "hx": hx, "lengths": lengths},
        "LSTM.forward, plain": {"self": network, "input": x},
        "LSTM.forward, packed": {"self": network, "input": packed, "return_cells": True},
        "LSTMCell": {"input_size": 4, "hidden_size": 5},
        "LSTMCell.forward": {"self": cell, "input": x[0], **step},
        "LSTMCell.forward, plain": {"self": cell, "input": x[0]},
        "PairwiseAttention": {},
        "PairwiseAttention.forward": {"self": PairwiseAttention(), **pair},
        "SpectralDensity.smooth": {
            "self": SpectralDensity(np.zeros(2), np.ones(2)),
            "grid": np.zeros(3),
            "width": 1.0,
        },
        "attention_pool": {**pair, "width": 1},
        "convert": {"module": nn.Sequential(nn.LSTM(4, 5))},
        "from_keras": {"weights": [np.ones((4, 20)), np.ones((5, 20))]},
        "from_onnx": {"weights": [np.ones((1, 20, 4)), np.ones((1, 20, 5))]},
        "from_tf1": {"weights": [np.ones((9, 20)), np.ones(20)]},
        "hessian": curved,
        "hvp": {**curved, "vector": vector},
        "init_gates_": {"module": LSTM(4, 5), "rules": {"*": nn.init.zeros_}},
        "init_preset_": {"module": LSTM(4, 5), "preset": "keras"},
        "lstm": {"x": x, "params": network.state_dict(), "hx": hx, "lengths": lengths},
        "lstm_cell": {"x": x[0], **step, **cell.state_dict()},
        "named_gates": {"module": network},
        "pairwise_attend": {"q": q, "a": a, "v": v, **pair},
        "pairwise_attention": pair,
        "pairwise_sums": pair,
        "parameter_index": {"params": [w]},
        "spectral_density": {"op": op},
        "to_keras": {"source": network},
        "to_onnx": {"source": network},
        "to_tf1": {"source": network},
        "trace": {"op": op},
    }
    return found
