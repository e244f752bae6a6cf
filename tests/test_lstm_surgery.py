"""What is done to a module from outside, as to torch.nn.LSTM: sizes and weights change, names are read."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gatematch.lstm import LSTM, LSTMCell, convert, named_gates

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def pair(**options: Any) -> tuple[nn.LSTM, LSTM]:
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(3, 6, **options), LSTM(3, 6, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def cut(
    name: str, rows: slice | list[int], columns: slice | list[int] = slice(None)
) -> Callable[[Any], None]:
    def operation(module: Any) -> None:
        weight = getattr(module, name).detach()[rows]
        setattr(
            module, name, nn.Parameter(weight[:, columns].clone() if weight.dim() == 2 else weight.clone())
        )

    return operation


def option(name: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value)


def without(name: str) -> Callable[[Any], None]:
    return lambda module: delattr(module, name)


KEPT = [6 * gate + unit for gate in range(4) for unit in (0, 1, 3, 5)]  # four of six hidden units
# What each is made with, what is done to it, and the width of x afterwards.
SURGERIES: dict[str, tuple[dict[str, Any], list[Callable[[Any], None]], int]] = {
    "a layer less": ({"num_layers": 2}, [option("num_layers", 1)], 3),
    "one direction": ({"bidirectional": True}, [option("bidirectional", False)], 3),
    "fewer inputs": ({}, [cut("weight_ih_l0", slice(None), [0, 2]), option("input_size", 2)], 2),
    "fewer inputs, size first": (
        {"num_layers": 2},
        [option("input_size", 2), cut("weight_ih_l0", slice(None), [0, 2])],
        2,
    ),
    "fewer hidden units": (
        {},
        [
            cut("weight_ih_l0", KEPT),
            cut("weight_hh_l0", KEPT, [0, 1, 3, 5]),
            cut("bias_ih_l0", KEPT),
            cut("bias_hh_l0", KEPT),
            option("hidden_size", torch.tensor(4)),
        ],
        3,
    ),
    "no biases": ({}, [option("bias", False)], 3),
    "biases deleted": ({}, [without("bias_ih_l0"), without("bias_hh_l0"), option("bias", False)], 3),
    "a smaller projection": (
        {"proj_size": 3},
        [cut("weight_hh_l0", slice(None), [0, 1]), cut("weight_hr_l0", [0, 1]), option("proj_size", 2)],
        3,
    ),
    "batch first": ({}, [option("batch_first", True)], 3),
    "dropout": ({"num_layers": 2}, [option("dropout", 0.5)], 3),
}


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("name", SURGERIES)
def test_surgery_does_what_it_does_to_torchs(name: str, called_before: bool) -> None:
    options, operations, width = SURGERIES[name]
    theirs, ours = pair(**options)
    if called_before:
        ours(torch.randn(4, 2, 3))
    for module in (theirs, ours):
        for operation in operations:
            operation(module)
    x = torch.randn(4, 2, width)
    torch.manual_seed(1)
    want = theirs(x)
    for module in (
        ours,
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        convert(copy.deepcopy(theirs)),
    ):
        torch.manual_seed(1)
        same(module(x), want)
        assert [p.shape for p in module.all_weights[0]] == [
            getattr(ours, n).shape for n in ours._all_weights[0]
        ]


def test_a_compiled_module_is_compiled_again_after_surgery() -> None:
    torch._dynamo.reset()
    _, ours = pair(num_layers=2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(compiled(x), ours(x))
    ours.num_layers = 1
    got = compiled(x)
    assert got[1][0].shape == (1, 2, 6)
    torch.testing.assert_close(got, ours(x))


def test_a_state_with_sizes_of_another_time() -> None:
    _, ours = pair(num_layers=2)
    state = {**vars(ours), "num_layers": 1}
    other = LSTM.__new__(LSTM)
    other.__setstate__(state)
    assert other(torch.randn(4, 2, 3))[1][0].shape == (1, 2, 6)


DO_NOT_FIT: dict[str, tuple[Callable[[Any], None], type[Exception], str]] = {
    "more layers": (option("num_layers", 2), TypeError, "weight_ih_l1: expected a Tensor, got NoneType"),
    "two directions": (
        option("bidirectional", True),
        TypeError,
        "weight_ih_l0_reverse: expected a Tensor, got NoneType",
    ),
    "wider inputs": (
        option("input_size", 5),
        ValueError,
        "weight_ih_l0: expected shape (24, 5), got (24, 3)",
    ),
    "the weight alone": (
        cut("weight_ih_l0", slice(None), [0, 2]),
        ValueError,
        "weight_ih_l0: expected shape (24, 3), got (24, 2)",
    ),
    "hidden units": (
        option("hidden_size", 4),
        ValueError,
        "weight_ih_l0: expected shape (16, 3), got (24, 3)",
    ),
    "a projection": (option("proj_size", 2), ValueError, "weight_hh_l0: expected shape (24, 2), got (24, 6)"),
    "a bias deleted": (without("bias_hh_l0"), TypeError, "bias_hh_l0: expected a Tensor, got NoneType"),
    "a bias of None": (option("bias_hh_l0", None), TypeError, "bias_hh_l0: expected a Tensor, got NoneType"),
}


@pytest.mark.parametrize("name", DO_NOT_FIT)
def test_what_does_not_fit_is_named(name: str) -> None:
    operation, error, message = DO_NOT_FIT[name]
    _, ours = pair()
    operation(ours)
    for _ in range(2):
        with pytest.raises(error) as info:
            ours(torch.randn(4, 2, 5 if name == "wider inputs" else 3))
        assert str(info.value) == message


def test_a_wrong_option_is_named_by_the_call() -> None:
    """In the words of the constructor, which refuses it too."""
    for name in LSTM.__constants__:
        for value in ("x", 1.5, None, -1):
            if name == "mode" or (name, value) == ("bidirectional", -1):
                continue
            _, ours = pair()
            setattr(ours, name, value)
            with pytest.raises((TypeError, ValueError), match=f"^{name} (should|must) "):
                ours(torch.randn(4, 2, 3))
            with pytest.raises((TypeError, ValueError), match=f"^{name} (should|must) "):
                LSTM(**{"input_size": 3, "hidden_size": 6} | {name: value})


# What torch's have and ours do not.
LACKS = {
    "__jit_unused_properties__": "torch.jit.script reads it, which does not take ours",
    "_flat_weight_refs": "by which torch's finds out that a weight was replaced; ours reads each by its name",
    "_update_flat_weights": "the same",
    "_weights_have_changed": "the same",
    "check_forward_args": "a step of torch's forward; what is wrong with a call of ours `check_call` says",
    "check_hidden_size": "the same",
    "check_input": "the same",
    "get_expected_cell_size": "the same",
    "get_expected_hidden_size": "the same",
    "permute_hidden": "a step of torch's forward",
}
MADE = [{}, {"num_layers": 2, "bias": False, "proj_size": 2}, {"bidirectional": True, "num_layers": 2}]


@pytest.mark.parametrize("options", MADE, ids=["plain", "projection", "two-way"])
def test_everything_that_an_lstm_of_torch_has_ours_has(options: dict[str, Any]) -> None:
    theirs, ours = pair(**options)
    assert {name for name in dir(theirs) if not hasattr(ours, name)} == set(LACKS)
    compare(theirs, ours)
    same(list(ours._flat_weights), theirs._flat_weights)
    same(ours.all_weights, theirs.all_weights)
    ours._init_flat_weights()
    compare(theirs, convert(theirs))


def test_everything_that_a_cell_of_torch_has_ours_has() -> None:
    theirs, ours = nn.LSTMCell(3, 6), LSTMCell(3, 6)
    assert not {name for name in dir(theirs) if not hasattr(ours, name)}
    compare(theirs, ours)


def compare(theirs: nn.Module, ours: nn.Module) -> None:
    """What can be called, and what values are plain, are the same in both."""
    own = {name for name in dir(theirs) if name not in dir(nn.Module()) and name not in LACKS}
    assert "input_size" in own
    for name in own:
        got, want = getattr(ours, name), getattr(theirs, name)
        assert callable(got) == callable(want), name
        if isinstance(want, (bool, int, float, str)) or (isinstance(want, list) and not tensors(want)):
            assert got == want and type(got) is type(want), name


def tensors(values: Any) -> bool:
    return any(isinstance(value, Tensor) or (isinstance(value, list) and tensors(value)) for value in values)


def test_the_loop_over_all_biases_sets_the_forget_gate() -> None:
    """As it stands in many programs, written for torch.nn.LSTM."""
    _, ours = pair(num_layers=2, bidirectional=True)
    for names in ours._all_weights:
        for name in filter(lambda name: "bias" in name, names):
            n = getattr(ours, name).size(0)
            getattr(ours, name).data[n // 4 : n // 2].fill_(1)
    gates = named_gates(ours)
    forget = [gate for name, gate in gates.items() if name.startswith(("b_if", "b_hf"))]
    assert len(forget) == 8 and all((gate == 1).all() for gate in forget)
    assert not any((gate == 1).any() for name, gate in gates.items() if name.startswith(("b_ii", "b_ho")))


def test_flat_weights_cannot_be_written_in_vain() -> None:
    _, ours = pair()
    with pytest.raises(TypeError):
        ours._flat_weights[0] = torch.zeros(24, 3)  # type: ignore[index]
    with pytest.raises(AttributeError):
        ours._flat_weights = [torch.zeros(24, 3)]  # type: ignore[misc, assignment]
    del ours.bias_hh_l0
    assert ours._flat_weights[3] is None


@pytest.mark.parametrize("sizes", [torch.tensor([2, 1, 2, 0])[::2], torch.tensor([2]).expand(3)])
def test_batch_sizes_of_any_stride(sizes):
    """torch's own op reads them as if they stood side by side, past their end."""
    model, theirs = LSTM(3, 6), torch.nn.LSTM(3, 6)
    theirs.load_state_dict(model.state_dict())
    data = torch.randn(int(sizes.sum()), 3)
    y, states = model(PackedSequence(data, sizes))
    right, right_states = theirs(PackedSequence(data, sizes.contiguous()))
    assert torch.equal(y.data, right.data) and all(map(torch.equal, states, right_states))
