"""Named gate views and per-gate initialisers, on torch's modules and on ours."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from gatematch.lstm import LSTM, LSTMCell
from gatematch.lstm.gates import init_gates_, init_preset_, named_gates

I, H, P = 5, 7, 3
LSTMS = pytest.mark.parametrize("lstm_class", [nn.LSTM, LSTM], ids=["torch", "ours"])
CELLS = pytest.mark.parametrize("cell_class", [nn.LSTMCell, LSTMCell], ids=["torch", "ours"])


@LSTMS
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj_size", [0, P])
@pytest.mark.parametrize("bias", [False, True])
def test_names_and_shapes(lstm_class: Any, bidirectional: bool, proj_size: int, bias: bool) -> None:
    lstm: Any = lstm_class(I, H, 2, bias=bias, bidirectional=bidirectional, proj_size=proj_size)
    output = proj_size or H
    directions = ["", "_reverse"] if bidirectional else [""]
    expected: dict[str, tuple[int, ...]] = {}
    for layer, inputs in enumerate([I, len(directions) * output]):
        for suffix in [f"_l{layer}{direction}" for direction in directions]:
            expected |= {f"W_i{gate}{suffix}": (H, inputs) for gate in "ifgo"}
            expected |= {f"W_h{gate}{suffix}": (H, output) for gate in "ifgo"}
            if bias:
                expected |= {f"b_{source}{gate}{suffix}": (H,) for source in "ih" for gate in "ifgo"}
            if proj_size:
                expected[f"W_hr{suffix}"] = (P, H)
    shapes = {name: tuple(view.shape) for name, view in named_gates(lstm).items()}
    assert shapes == expected
    assert list(shapes) == list(expected)


@CELLS
def test_cell_has_no_suffix(cell_class: Any) -> None:
    gates = named_gates(cell_class(I, H))
    assert len(gates) == 16
    assert gates["W_if"].shape == (H, I)
    assert gates["W_ho"].shape == (H, H)
    assert gates["b_hg"].shape == (H,)
    assert len(named_gates(cell_class(I, H, bias=False))) == 8


@LSTMS
def test_writes_reach_the_parameter(lstm_class: Any) -> None:
    lstm: Any = lstm_class(I, H, 2, bidirectional=True, proj_size=P)
    gates = named_gates(lstm)
    with torch.no_grad():
        for number, view in enumerate(gates.values()):
            view.fill_(number)
    numbers = {name: number for number, name in enumerate(gates)}
    for k, gate in enumerate("ifgo"):
        rows = slice(k * H, (k + 1) * H)
        assert (lstm.weight_ih_l1[rows] == numbers[f"W_i{gate}_l1"]).all()
        assert (lstm.weight_hh_l0_reverse[rows] == numbers[f"W_h{gate}_l0_reverse"]).all()
        assert (lstm.bias_ih_l0[rows] == numbers[f"b_i{gate}_l0"]).all()
        assert (lstm.bias_hh_l1_reverse[rows] == numbers[f"b_h{gate}_l1_reverse"]).all()
    assert (lstm.weight_hr_l1 == numbers["W_hr_l1"]).all()
    nn.init.constant_(gates["W_hr_l0"], -1)
    nn.init.constant_(gates["b_hf_l0"], -2)
    assert (lstm.weight_hr_l0 == -1).all()
    assert (lstm.bias_hh_l0[H : 2 * H] == -2).all()


def test_views_carry_gradients() -> None:
    lstm: Any = nn.LSTM(I, H, proj_size=P)
    gates = named_gates(lstm)
    ((gates["W_hf_l0"] ** 2).sum() + gates["W_hr_l0"].sum()).backward()
    expected = torch.zeros(4 * H, P)
    expected[H : 2 * H] = 2 * lstm.weight_hh_l0[H : 2 * H].detach()
    torch.testing.assert_close(lstm.weight_hh_l0.grad, expected)
    assert (lstm.weight_hr_l0.grad == 1).all()


@LSTMS
def test_gradients_by_gate(lstm_class: Any) -> None:
    lstm: Any = lstm_class(I, H, bidirectional=True)
    assert named_gates(lstm, grad=True) == {}
    lstm.bias_hh_l0.requires_grad_(False)
    lstm(torch.randn(4, 2, I))[0].sum().backward()
    grads = named_gates(lstm, grad=True)
    assert grads.keys() == {name for name in named_gates(lstm) if name not in {f"b_h{g}_l0" for g in "ifgo"}}
    torch.testing.assert_close(grads["W_ig_l0_reverse"], lstm.weight_ih_l0_reverse.grad[2 * H : 3 * H])
    grads["W_ho_l0"].zero_()
    assert (lstm.weight_hh_l0.grad[3 * H :] == 0).all()
    assert (lstm.weight_hh_l0.grad[: 3 * H] != 0).any()


@pytest.mark.parametrize("module", [nn.GRU(I, H), nn.RNNCell(I, H), nn.Linear(I, 4 * H), nn.LayerNorm(4 * H)])
def test_other_modules_are_refused(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"LSTM or LSTMCell, got {type(module).__name__}"):
        named_gates(module)


@LSTMS
def test_init_gates_applies_rules_in_order(lstm_class: Any) -> None:
    lstm: Any = lstm_class(I, H, 2, proj_size=P)
    before = lstm.weight_ih_l1.clone()
    rules = {
        "W_ii_l0": nn.init.zeros_,
        "W_h?*": nn.init.orthogonal_,
        "W_hr*": 0.5,
        "b_*": 0,
        "b_if_l?": 1.0,
        "b_if_l1": lambda view: view.add_(2),
    }
    assert init_gates_(lstm, rules) is lstm
    gates = named_gates(lstm)
    assert (gates["W_ii_l0"] == 0).all()
    for gate in "ifgo":
        for layer in (0, 1):
            matrix = gates[f"W_h{gate}_l{layer}"]
            torch.testing.assert_close(matrix.T @ matrix, torch.eye(P), atol=1e-5, rtol=0)
    assert (gates["W_hr_l0"] == 0.5).all()
    assert (gates["b_if_l0"] == 1).all()
    assert (gates["b_if_l1"] == 3).all()
    assert (gates["b_hf_l0"] == 0).all()
    assert (gates["b_io_l1"] == 0).all()
    assert torch.equal(lstm.weight_ih_l1, before)


def test_init_gates_on_a_cell_reaches_its_result() -> None:
    cell: Any = init_gates_(nn.LSTMCell(I, H), {"*": 0.0, "b_i[io]": 100.0, "b_ig": 0.5})
    h, c = cell(torch.randn(2, I))
    torch.testing.assert_close(c, torch.full((2, H), math.tanh(0.5)))
    torch.testing.assert_close(h, c.tanh())


def test_init_gates_names_the_pattern_without_a_match() -> None:
    lstm: Any = nn.LSTM(I, H)
    before = lstm.weight_ih_l0.clone()
    with pytest.raises(ValueError, match=r"^rules: .* one of W_ii_l0, W_if_l0.*b_ho_l0, got 'W_hr\*'$"):
        init_gates_(lstm, {"W_i*": 0.0, "W_hr*": 0.0})
    assert torch.equal(lstm.weight_ih_l0, before)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"b_*": 1.0, "W_i*": "zeros"}, r"rules\['W_i\*'\]: expected a number or a function, got str$"),
        (["W_i*"], "rules: expected a mapping from patterns, got list$"),
    ],
    ids=["rule", "rules"],
)
def test_init_gates_refuses_other_types_before_writing(rules: Any, message: str) -> None:
    lstm = LSTM(I, H)
    before = {name: value.clone() for name, value in lstm.state_dict().items()}
    with pytest.raises(TypeError, match=message):
        init_gates_(lstm, rules)
    assert all(torch.equal(value, before[name]) for name, value in lstm.state_dict().items())


def test_parametrised_weights_are_read_but_not_written() -> None:
    cell: Any = parametrizations.weight_norm(nn.LSTMCell(I, H), "weight_hh")
    torch.testing.assert_close(named_gates(cell)["W_hg"], cell.weight_hh[2 * H : 3 * H])
    named_gates(cell)["W_hg"].sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of .grad of a tensor that is no leaf
        assert named_gates(cell, grad=True) == {}
    init_gates_(cell, {"W_i?": 0.0})
    with pytest.raises(
        ValueError, match=r"^rules: expected patterns of parameters, got 'W_\*' for W_hf, computed"
    ):
        init_gates_(cell, {"W_*": 0.0})
    with pytest.raises(
        ValueError, match=r"^module: expected parameters, got W_hf, computed by a parametrisation"
    ):
        init_preset_(cell, "torch")


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": P}, {"bias": False}]
)
@LSTMS
def test_torch_preset_is_reset_parameters(lstm_class: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    expected = nn.LSTM(I, H, **options).state_dict()  # the constructor draws them
    lstm: Any = lstm_class(I, H, **options)
    for generator in (None, torch.Generator().manual_seed(3)):
        torch.manual_seed(3 if generator is None else 4)
        assert init_preset_(lstm, "torch", generator) is lstm
        state = lstm.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


@CELLS
def test_torch_preset_is_reset_parameters_of_a_cell(cell_class: Any) -> None:
    torch.manual_seed(3)
    expected = nn.LSTMCell(I, H).state_dict()
    cell: Any = cell_class(I, H)
    torch.manual_seed(3)
    state = init_preset_(cell, "torch").state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def assert_uniform(tensor: torch.Tensor, limit: float) -> None:
    """Within the limit, and with the extremes, mean and deviation of a uniform distribution."""
    assert tensor.abs().max() <= limit
    assert tensor.abs().max() > 0.98 * limit
    assert tensor.mean().abs() < 5 * limit / math.sqrt(3 * tensor.numel())
    assert abs(tensor.std().item() / (limit / math.sqrt(3)) - 1) < 0.1


def assert_forget_bias_is_one(lstm: nn.Module) -> None:
    gates = named_gates(lstm)
    for name in [name for name in gates if name.startswith("b_i")]:
        total = gates[name] + gates[name.replace("b_i", "b_h", 1)]
        assert (total == (1.0 if name.startswith("b_if") else 0.0)).all()


@pytest.mark.parametrize("proj_size", [0, 12])
def test_keras_preset(proj_size: int) -> None:
    inputs, hidden = 30, 40
    lstm: Any = nn.LSTM(inputs, hidden, 2, bidirectional=True, proj_size=proj_size)
    init_preset_(lstm, "keras", torch.Generator().manual_seed(0))
    output = proj_size or hidden
    assert_uniform(lstm.weight_ih_l0, math.sqrt(6 / (inputs + 4 * hidden)))
    assert_uniform(lstm.weight_ih_l1_reverse, math.sqrt(6 / (2 * output + 4 * hidden)))
    for name, weight in lstm.named_parameters():
        if name.startswith("weight_hh"):
            torch.testing.assert_close(weight.T @ weight, torch.eye(output), atol=1e-5, rtol=0)
        if name.startswith("weight_hr"):
            assert_uniform(weight, math.sqrt(6 / (output + hidden)))
    assert_forget_bias_is_one(lstm)


@pytest.mark.parametrize("proj_size", [0, 12])
def test_tf1_preset(proj_size: int) -> None:
    inputs, hidden = 30, 40
    lstm: Any = nn.LSTM(inputs, hidden, 2, bidirectional=True, proj_size=proj_size)
    init_preset_(lstm, "tf1", torch.Generator().manual_seed(0))
    output = proj_size or hidden
    for suffix, width in {"_l0": inputs, "_l0_reverse": inputs, "_l1": 2 * output}.items():
        fused = torch.cat([getattr(lstm, f"weight_{part}{suffix}") for part in ("ih", "hh")], 1)
        assert_uniform(fused, math.sqrt(6 / (width + output + 4 * hidden)))
        if proj_size:
            assert_uniform(getattr(lstm, "weight_hr" + suffix), math.sqrt(6 / (output + hidden)))
    assert_forget_bias_is_one(lstm)


@pytest.mark.parametrize("preset", ["torch", "keras", "tf1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_presets_in_other_dtypes_follow_the_generator(preset: str, dtype: torch.dtype) -> None:
    first, second = (
        init_preset_(nn.LSTMCell(I, H, dtype=dtype), preset, torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(first.weight_hh, second.weight_hh)
    assert first.weight_hh.dtype == dtype
    assert first.weight_hh.isfinite().all()


def test_preset_errors() -> None:
    with pytest.raises(ValueError, match=r"^preset: expected one of 'torch', 'keras', 'tf1', got 'jax'$"):
        init_preset_(nn.LSTM(I, H), "jax")
    with pytest.raises(ValueError, match=r"^module: expected biases for 'tf1', .*, got none$"):
        init_preset_(nn.LSTM(I, H, bias=False), "tf1")
    assert "b_if_l0" not in named_gates(init_preset_(nn.LSTM(I, H, bias=False), "keras"))


def rule_by_data(view: torch.Tensor) -> torch.Tensor:
    return view.data.fill_(3)


def rule_with_another_result(view: torch.Tensor) -> torch.Tensor:
    return nn.init.constant_(view, 3).mean()


def rule_in_parts(view: torch.Tensor) -> None:
    for row in view:
        row.fill_(3)


@LSTMS
def test_a_function_that_returns_its_values_instead_of_writing_them(lstm_class: Any) -> None:
    for rule, got in (
        (torch.zeros_like, "Tensor"),
        (lambda view: view * 0, "Tensor"),
        (lambda view: view.to_sparse(), "Tensor"),
        (lambda view: np.zeros(view.shape), "ndarray"),
        (lambda view: 0.5, "float"),
    ):
        lstm = lstm_class(I, H)
        before = {name: value.clone() for name, value in lstm.state_dict().items()}
        with pytest.raises(TypeError) as info:
            init_gates_(lstm, {"W_h*": rule})
        assert str(info.value) == (
            "rules['W_h*']: expected a function that writes to the view it is given, "
            f"got one that returns a {got} and leaves W_hi_l0 as it was"
        )
        torch.testing.assert_close(dict(lstm.state_dict()), before)
    written = (nn.init.ones_, torch.Tensor.zero_, rule_by_data, rule_with_another_result, rule_in_parts)
    for rule in (*written, lambda view: None, lambda view: view[0].fill_(2)):
        lstm = init_gates_(lstm_class(I, H), {"W_h*": rule})
        if rule in written:
            assert len(lstm.weight_hh_l0.unique()) == 1
    with torch.inference_mode():  # where torch does not count writes
        assert (init_gates_(lstm_class(I, H), {"*": rule_with_another_result}).weight_hh_l0 == 3).all()
