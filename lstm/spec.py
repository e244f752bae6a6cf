"""The configuration of an LSTM: its sizes, and its parameters' names and shapes in torch's order."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gatematch.checks import check_kind, check_tensor

State = tuple[Tensor, Tensor]
# What `impl` may name.
KERNELS = ("resident", "persistent", "step")
IMPLS = ("auto", "torch", "triton", *KERNELS)


class Spec(NamedTuple):
    """The sizes of an LSTM, and what its parameters are called and shaped."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    bidirectional: bool
    proj_size: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of_sizes(
        cls,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> "Spec":
        state_size, gates = proj_size or hidden_size, 4 * hidden_size
        suffixes = ("", "_reverse") if bidirectional else ("",)
        names: list[str] = []
        shapes: list[tuple[int, ...]] = []
        for layer in range(num_layers):
            width = input_size if layer == 0 else state_size * len(suffixes)
            for suffix in suffixes:
                kinds = ["weight_ih", "weight_hh"]
                shapes += [(gates, width), (gates, state_size)]
                if bias:
                    kinds += ["bias_ih", "bias_hh"]
                    shapes += [(gates,), (gates,)]
                if proj_size:
                    kinds += ["weight_hr"]
                    shapes += [(proj_size, hidden_size)]
                names += [f"{kind}_l{layer}{suffix}" for kind in kinds]
        bidirectional = len(suffixes) == 2
        return cls(
            input_size, hidden_size, num_layers, bias, bidirectional, proj_size, tuple(names), tuple(shapes)
        )

    @classmethod
    def of_params(cls, params: Mapping[str, Tensor], x: Any = None) -> "Spec":
        """The sizes that a mapping named as torch.nn.LSTM's state_dict implies; x helps where it is wrong."""
        check_kind("params", params, Mapping, "a mapping from names to tensors")
        for name in ("weight_ih_l0", "weight_hh_l0"):
            if name not in params:
                raise ValueError(f"params: expected {name!r} among the names, got {list(params)}")
        for name in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"):
            if name in params:
                check_matrix(name, params[name])
        projected = "weight_hr_l0" in params
        x = x.data if isinstance(x, PackedSequence) else x
        input_size, hidden_size = sizes(x, params["weight_ih_l0"], params["weight_hh_l0"], projected)
        num_layers = 1
        while f"weight_ih_l{num_layers}" in params:
            num_layers += 1
        spec = cls.of_sizes(
            input_size,
            hidden_size,
            num_layers,
            "bias_ih_l0" in params,
            "weight_ih_l0_reverse" in params,
            min(params["weight_hr_l0"].shape) if projected else 0,
        )
        if params.keys() != set(spec.names):
            missing = [name for name in spec.names if name not in params]
            unexpected = [name for name in params if name not in spec.names]
            raise ValueError(
                "params: expected the names of a torch.nn.LSTM with "
                f"num_layers={num_layers}, bias={spec.bias}, bidirectional={spec.bidirectional}, "
                f"projection={spec.proj_size > 0}, got missing {missing} and unexpected {unexpected}"
            )
        return spec

    def state_shapes(self, batch: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of h_0 and c_0, for an unbatched x if `batch` is None."""
        cells = self.num_layers * (2 if self.bidirectional else 1)
        lead = (cells,) if batch is None else (cells, batch)
        return (*lead, self.proj_size or self.hidden_size), (*lead, self.hidden_size)


def sizes(x: Any, weight_ih: Tensor, weight_hh: Tensor, projected: bool = False) -> tuple[int, int]:
    """I and H, so that of arguments which do not go together the odd one out is blamed.

    H is told by weight_hh alone if that is (4H, H), or transposed; I by weight_ih if one side of it is 4H.
    """
    state_size, gates = min(weight_hh.shape), max(weight_hh.shape)  # sorted() cannot be compiled
    plausible = gates % 4 == 0 if projected else gates == 4 * state_size
    H = gates // 4 if plausible else max(weight_ih.shape[0] // 4, 1)
    rows, columns = weight_ih.shape
    if rows != 4 * H and columns == 4 * H:
        return rows, H
    known = isinstance(x, Tensor) and not x.is_nested and x.dim() > 0
    width = x.shape[-1] if known else columns
    return width if rows != 4 * H and width == rows else columns, H


def check_matrix(name: str, value: Any, empty: bool = False) -> None:
    check_tensor(name, value)
    if value.dim() != 2 or (value.numel() == 0 and not empty):
        raise ValueError(f"{name}: expected a matrix, got shape {tuple(value.shape)}")
