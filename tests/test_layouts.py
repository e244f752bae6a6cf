"""Weight converters against the libraries: Keras, ONNX Runtime, and TensorFlow 1's cell in NumPy."""

import os
from typing import Any

# Keras reads it once, on import.
os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils import parametrizations

from gatematch.lstm import LSTM
from gatematch.lstm.layouts import from_keras, from_onnx, from_tf1, to_keras, to_onnx, to_tf1

# Keras's own conversions, on NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

B, T, I, H, P = 3, 6, 5, 4, 2
CONVERTERS = [(from_keras, to_keras), (from_tf1, to_tf1), (from_onnx, to_onnx)]
SHAPES = pytest.mark.parametrize(
    ("layers", "bidirectional", "bias"),
    [(1, False, True), (1, True, True), (2, False, True), (3, True, True), (2, True, False)],
)


def lstm_with(layers: int, bidirectional: bool, bias: bool, proj_size: int = 0) -> LSTM:
    return LSTM(I, H, layers, bias, True, bidirectional=bidirectional, proj_size=proj_size)


def lstm_from(
    state: dict[str, torch.Tensor], layers: int, bidirectional: bool, bias: bool, proj_size: int = 0
) -> LSTM:
    lstm = lstm_with(layers, bidirectional, bias, proj_size)
    lstm.load_state_dict(state)
    return lstm


def output(lstm: LSTM, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return lstm(torch.from_numpy(x))[0].numpy()


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((B, T, I), dtype=np.float32)


def keras_lstm(layers: int, bidirectional: bool, bias: bool) -> keras.Sequential:
    """Random weights everywhere: Keras's own biases are 0 and 1 and would hide a mix-up."""
    model = keras.Sequential([keras.Input((T, I))])
    for _ in range(layers):
        layer = keras.layers.LSTM(H, return_sequences=True, use_bias=bias)
        model.add(keras.layers.Bidirectional(layer) if bidirectional else layer)
    random = np.random.default_rng(1)
    model.set_weights([random.standard_normal(w.shape, dtype=np.float32) for w in model.get_weights()])
    return model


@SHAPES
def test_from_keras(x: np.ndarray, layers: int, bidirectional: bool, bias: bool) -> None:
    model = keras_lstm(layers, bidirectional, bias)
    state = from_keras(model.get_weights(), bidirectional=bidirectional)
    expected = keras.ops.convert_to_numpy(model(x))
    assert_same(
        output(lstm_from(state, layers, bidirectional, bias), x),
        expected,
    )


@SHAPES
def test_to_keras(x: np.ndarray, layers: int, bidirectional: bool, bias: bool) -> None:
    lstm = lstm_with(layers, bidirectional, bias)
    model = keras_lstm(layers, bidirectional, bias)
    model.set_weights(to_keras(lstm))
    assert_same(keras.ops.convert_to_numpy(model(x)), output(lstm, x))


def onnx_lstm(weights: list[np.ndarray], bidirectional: bool, bias: bool) -> onnxruntime.InferenceSession:
    """Stacked LSTM nodes; (T, B, I) in, (T, B, dirs * H) out."""
    size = 2 + bias
    initialisers = [numpy_helper.from_array(w, f"w{k}") for k, w in enumerate(weights)]
    initialisers.append(numpy_helper.from_array(np.array([0, 0, -1]), "merged"))
    nodes, below = [], "x"
    for start in range(0, len(weights), size):
        inputs = [below] + [f"w{k}" for k in range(start, start + size)]
        direction = "bidirectional" if bidirectional else "forward"
        nodes.append(helper.make_node("LSTM", inputs, [f"y{start}"], hidden_size=H, direction=direction))
        # Y is (T, dirs, B, H).
        nodes.append(helper.make_node("Transpose", [f"y{start}"], [f"t{start}"], perm=[0, 2, 1, 3]))
        below = f"out{start}"
        nodes.append(helper.make_node("Reshape", [f"t{start}", "merged"], [below]))
    graph = helper.make_graph(
        nodes,
        "lstm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [T, B, I])],
        [helper.make_tensor_value_info(below, TensorProto.FLOAT, [T, B, (1 + bidirectional) * H])],
        initialisers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def onnx_output(weights: list[np.ndarray], bidirectional: bool, bias: bool, x: np.ndarray) -> np.ndarray:
    session = onnx_lstm(weights, bidirectional, bias)
    return session.run(None, {"x": x.transpose(1, 0, 2)})[0].transpose(1, 0, 2)


@SHAPES
def test_from_onnx(x: np.ndarray, layers: int, bidirectional: bool, bias: bool) -> None:
    random, directions = np.random.default_rng(2), 1 + bidirectional
    weights = []
    for width in [I, *[directions * H] * (layers - 1)]:
        for shape in [(4 * H, width), (4 * H, H), (8 * H,)][: 2 + bias]:
            weights.append(random.standard_normal((directions, *shape), dtype=np.float32))
    expected = onnx_output(weights, bidirectional, bias, x)
    state = from_onnx(weights)
    assert_same(
        output(lstm_from(state, layers, bidirectional, bias), x),
        expected,
    )


@SHAPES
def test_to_onnx(x: np.ndarray, layers: int, bidirectional: bool, bias: bool) -> None:
    lstm = lstm_with(layers, bidirectional, bias)
    got = onnx_output(to_onnx(lstm), bidirectional, bias, x)
    assert_same(got, output(lstm, x))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def tf1_cell(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray,
    projection: np.ndarray | None = None,
    *,
    forget_bias: float,
) -> np.ndarray:
    """rnn_cell_impl.LSTMCell.call of TensorFlow 1.15 over a sequence; x is (B, T, I)."""
    c = np.zeros((len(x), len(bias) // 4), x.dtype)
    h = np.zeros((len(x), c.shape[1] if projection is None else projection.shape[1]), x.dtype)
    outputs = []
    for step in range(x.shape[1]):
        z = np.concatenate([x[:, step], h], 1) @ kernel + bias
        i, j, f, o = np.split(z, 4, 1)
        c = c * sigmoid(f + forget_bias) + sigmoid(i) * np.tanh(j)
        h = np.tanh(c) * sigmoid(o)
        if projection is not None:
            h = h @ projection
        outputs.append(h)
    return np.stack(outputs, 1)


def tf1_output(
    x: np.ndarray, weights: list[np.ndarray], bidirectional: bool, forget_bias: float, size: int
) -> np.ndarray:
    """As stack_bidirectional_dynamic_rnn, or MultiRNNCell, does."""
    cells = [weights[start : start + size] for start in range(0, len(weights), size)]
    while cells:
        y = tf1_cell(x, *cells.pop(0), forget_bias=forget_bias)
        if bidirectional:
            reverse = tf1_cell(x[:, ::-1], *cells.pop(0), forget_bias=forget_bias)[:, ::-1]
            y = np.concatenate([y, reverse], -1)
        x = y
    return x


TF1_SHAPES = pytest.mark.parametrize(
    ("layers", "bidirectional", "proj_size", "forget_bias"),
    [(1, False, 0, 1.0), (2, False, 0, 0.0), (2, True, 0, 1.0), (2, True, P, 2.5), (1, False, P, 1.0)],
)


@TF1_SHAPES
def test_from_tf1(
    x: np.ndarray, layers: int, bidirectional: bool, proj_size: int, forget_bias: float
) -> None:
    random, out = np.random.default_rng(3), proj_size or H
    weights = []
    for width in [I, *[(1 + bidirectional) * out] * (layers - 1)]:
        for _ in range(1 + bidirectional):
            shapes = [(width + out, 4 * H), (4 * H,), (H, proj_size)][: 3 if proj_size else 2]
            weights += [random.standard_normal(shape, dtype=np.float32) for shape in shapes]
    state = from_tf1(weights, bidirectional=bidirectional, forget_bias=forget_bias)
    lstm = lstm_from(state, layers, bidirectional, True, proj_size)
    expected = tf1_output(x, weights, bidirectional, forget_bias, 3 if proj_size else 2)
    assert_same(output(lstm, x), expected)


@TF1_SHAPES
@pytest.mark.parametrize("bias", [True, False])
def test_to_tf1(
    x: np.ndarray, layers: int, bidirectional: bool, proj_size: int, forget_bias: float, bias: bool
) -> None:
    lstm = lstm_with(layers, bidirectional, bias, proj_size)
    weights = to_tf1(lstm, forget_bias=forget_bias)
    got = tf1_output(x, weights, bidirectional, forget_bias, 3 if proj_size else 2)
    assert_same(got, output(lstm, x))


@pytest.mark.parametrize(("import_", "export"), CONVERTERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_round_trip_keeps_values_and_dtype(import_: Any, export: Any, dtype: torch.dtype) -> None:
    lstm = nn.LSTM(I, H, 2, dtype=dtype)
    if import_ is not from_onnx:  # the others have one bias
        for layer in (0, 1):
            nn.init.zeros_(getattr(lstm, f"bias_hh_l{layer}"))
    state = import_(export(lstm))
    assert list(state) == list(lstm.state_dict())
    for name, expected in lstm.state_dict().items():
        torch.testing.assert_close(
            state[name], expected, rtol=0, atol=2e-3 if dtype == torch.float16 else 1e-6
        )
        assert state[name].is_contiguous()


@pytest.mark.parametrize(("import_", "export"), CONVERTERS)
def test_nothing_returned_shares_memory(import_: Any, export: Any) -> None:
    lstm = nn.LSTM(1, H, bias=False)  # one column: its transpose is contiguous as it stands
    before = {name: value.clone() for name, value in lstm.state_dict().items()}
    exported = [torch.from_numpy(array) for array in export(lstm)]
    imported = import_(exported)
    for tensor in [*exported, *imported.values()]:
        tensor.add_(1)
    assert all(torch.equal(lstm.state_dict()[name], value) for name, value in before.items())
    torch.testing.assert_close(imported["weight_ih_l0"], before["weight_ih_l0"] + 1)


@pytest.mark.parametrize(("import_", "export"), CONVERTERS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_arrays_in_either_byte_order_are_the_same(import_: Any, export: Any, dtype: str) -> None:
    arrays = [array.astype(dtype) for array in export(nn.LSTM(I, H))]
    state = import_(arrays)
    for order in "<>":
        swapped = import_([array.astype(order + dtype) for array in arrays])
        assert all(torch.equal(swapped[name], value) for name, value in state.items())
        exported = export({name: value.numpy().astype(order + dtype) for name, value in state.items()})
        for got, expected in zip(exported, export(state), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_sources_may_be_cells_modules_dicts_and_tensors() -> None:
    cell = nn.LSTMCell(I, H)
    lstm = nn.LSTM(I, H)
    lstm.load_state_dict({name + "_l0": value for name, value in cell.state_dict().items()})
    for export in (to_keras, to_tf1, to_onnx):
        for source in (lstm, lstm.state_dict(), cell.state_dict()):
            for got, expected in zip(export(source), export(cell), strict=True):
                np.testing.assert_array_equal(got, expected)
    tensors = [torch.from_numpy(w).bfloat16() for w in to_keras(cell)]
    assert from_keras(tensors)["weight_hh_l0"].dtype == torch.bfloat16


def test_a_parametrised_weight_is_exported_as_computed() -> None:
    cell: Any = nn.LSTMCell(I, H)
    parametrizations.weight_norm(cell, "weight_hh")
    cell.parametrizations.weight_hh.original0.data.mul_(2)
    np.testing.assert_array_equal(to_keras(cell)[1], cell.weight_hh.detach().numpy().T)


KERAS = [(I, 4 * H), (H, 4 * H), (4 * H,)]
TF1 = [(I + H, 4 * H), (4 * H,)]
ONNX = [(1, 4 * H, I), (1, 4 * H, H), (1, 8 * H)]
WRONG = [
    (
        from_keras,
        [(4 * H, I), *KERAS[1:]],
        r"weights\[0\] \(kernel\): .* \(any, 16\), got \(16, 5\); it looks transposed",
    ),
    (from_keras, [KERAS[0], (4 * H, H), KERAS[2]], r"weights\[1\] \(recurrent_kernel\): .* looks transposed"),
    (from_keras, [*KERAS[:2], (8 * H,)], r"weights\[2\] \(bias\): expected shape \(16,\), got \(32,\)$"),
    (from_keras, [*KERAS, *KERAS], r"weights\[3\] \(kernel\): expected shape \(4, 16\), got \(5, 16\)$"),
    (from_keras, KERAS[:1], "expected kernel, recurrent_kernel for every layer, got 1 arrays"),
    (from_keras, [], "got 0 arrays"),
    (from_tf1, [TF1[0][::-1], TF1[1]], r"weights\[0\] \(kernel\): .* looks transposed"),
    (from_tf1, [(H, 4 * H), TF1[1]], r"weights\[0\] \(kernel\): expected over 4 rows, got 4"),
    (from_tf1, [(I + P, 4 * H), TF1[1], (P, H)], r"weights\[2\] \(projection_kernel\): .* looks transposed"),
    (from_tf1, [TF1[0], *TF1, TF1[1]], r"weights\[1\] \(bias\): expected shape \(16,\), got \(9, 16\)"),
    (from_tf1, TF1[:1], "expected kernel, bias"),
    (from_tf1, [TF1[0], TF1[0]], r"weights\[1\] \(bias\): expected shape \(16,\), got \(9, 16\)"),
    (from_tf1, KERAS, r"weights\[1\] \(bias\): expected shape \(16,\), got \(4, 16\)"),
    (
        from_onnx,
        [(1, I, 4 * H), *ONNX[1:]],
        r"weights\[0\] \(W\): expected shape \(1, 16, any\).* looks transposed",
    ),
    (from_onnx, [ONNX[0], (1, H, 4 * H), ONNX[2]], r"weights\[1\] \(R\): .* looks transposed"),
    (from_onnx, [*ONNX[:2], (1, 4 * H)], r"weights\[2\] \(B\): expected shape \(1, 32\), got \(1, 16\)"),
    (
        from_onnx,
        [(2, 4 * H, I), *ONNX[1:]],
        r"weights\[1\] \(R\): expected shape \(2, 16, 4\), got \(1, 16, 4\)",
    ),
    (from_onnx, [shape[1:] for shape in ONNX[:2]], "expected W, R, B for every layer, got 2 arrays"),
]


@pytest.mark.parametrize(("import_", "shapes", "message"), WRONG)
def test_wrong_shapes_are_named(import_: Any, shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_([np.zeros(shape, np.float32) for shape in shapes])


def test_reverse_direction_has_the_same_input_size() -> None:
    weights = [np.zeros(shape) for shape in [*KERAS, (I + 1, 4 * H), *KERAS[1:]]]
    with pytest.raises(ValueError, match=r"weights\[3\] \(kernel\): expected shape \(5, 16\), got \(6, 16\)"):
        from_keras(weights, bidirectional=True)
    with pytest.raises(ValueError, match="every direction of every layer"):
        from_keras(weights[:3], bidirectional=True)


def test_export_errors() -> None:
    projected = nn.LSTM(I, H, proj_size=P)
    with pytest.raises(
        ValueError, match=r"^source: expected no projection, as Keras's LSTM has none, got weight_hr$"
    ):
        to_keras(projected)
    with pytest.raises(ValueError, match=r"^source: expected no projection, as ONNX's LSTM has none"):
        to_onnx(projected)
    with pytest.raises(TypeError, match="got GRU"):
        to_keras(nn.GRU(I, H))
    with pytest.raises(ValueError, match="expected shape"):
        to_keras(nn.GRU(I, H).state_dict())
    with pytest.raises(TypeError, match=r"^source: expected a dtype that NumPy has, got torch\.bfloat16"):
        to_keras(nn.LSTM(I, H, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"^source: expected tensors that hold values, got device meta$"):
        to_tf1(nn.LSTM(I, H, device="meta"))
    with pytest.raises(ValueError, match=r"got lstm\.weight_ih_l0"):
        to_keras({f"lstm.{name}": value for name, value in nn.LSTM(I, H).state_dict().items()})
    with pytest.raises(ValueError, match="both biases or none, got weight_ih_l0, weight_hh_l0, bias_ih_l0"):
        to_onnx({name: value for name, value in nn.LSTM(I, H).state_dict().items() if name != "bias_hh_l0"})


@pytest.mark.parametrize(("import_", "export"), CONVERTERS)
@pytest.mark.parametrize("wrong", [None, np.zeros((2, 2)), "x"], ids=lambda wrong: type(wrong).__name__)
def test_other_types_are_refused(import_: Any, export: Any, wrong: Any) -> None:
    got = type(wrong).__name__
    with pytest.raises(TypeError, match=f"^weights: expected a list of arrays, got {got}$"):
        import_(wrong)
    with pytest.raises(TypeError, match=r"^weights: expected a list of arrays, got LSTM$"):
        import_(nn.LSTM(I, H))
    with pytest.raises(TypeError, match=f"^source: expected a module or a state_dict, got {got}$"):
        export(wrong)
    for call in (lambda: from_tf1([], forget_bias=wrong), lambda: to_tf1({}, forget_bias=wrong)):
        with pytest.raises(TypeError, match=f"^forget_bias: expected a number, got {got}$"):
            call()


@pytest.mark.parametrize(("import_", "export"), CONVERTERS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "expected an array or a tensor, got NoneType"),
        ("x", "expected an array or a tensor, got str"),
        ([[1.0]], "expected an array or a tensor, got list"),
        (
            numpy_helper.from_array(np.zeros((2, 2)), "W"),
            "expected an array or a tensor, got TensorProto; onnx.numpy_helper.to_array makes one of it",
        ),
        (np.zeros((2, 2), int), "expected dtype float64, float32 or float16, got int64"),
        (np.zeros((2, 2), bool), "expected dtype float64, float32 or float16, got bool"),
        (np.zeros((2, 2), np.longdouble), f"expected dtype .*, got {np.dtype(np.longdouble)}"),
        (np.zeros((2, 2), complex), "expected dtype .*, got complex128"),
        (np.full((2, 2), None), "expected dtype .*, got object"),
        (np.full((2, 2), "x"), "expected dtype .*, got <U1"),
        (torch.zeros(2, 2, dtype=torch.int8), r"expected dtype torch\.float64, .*, got torch\.int8"),
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_is_no_array_of_numbers_is_named(import_: Any, export: Any, wrong: Any, message: str) -> None:
    state = nn.LSTM(I, H).state_dict()
    for index in (0, 1):
        weights = export(state)
        weights[index] = wrong
        with pytest.raises(TypeError, match=rf"^weights\[{index}\]: {message}$"):
            import_(weights)
    with pytest.raises(TypeError, match=f"^weight_hh_l0: {message}$"):
        export(state | {"weight_hh_l0": wrong})
