"""The LSTM for PyTorch: functions, modules named as torch.nn's, and weight converters."""

from .functional import lstm, lstm_cell
from .gates import init_gates_, init_preset_, named_gates
from .layouts import from_keras, from_onnx, from_tf1, to_keras, to_onnx, to_tf1
from .modules import LSTM, LSTMCell, convert

__all__ = [
    "LSTM",
    "LSTMCell",
    "convert",
    "from_keras",
    "from_onnx",
    "from_tf1",
    "init_gates_",
    "init_preset_",
    "lstm",
    "lstm_cell",
    "named_gates",
    "to_keras",
    "to_onnx",
    "to_tf1",
]
