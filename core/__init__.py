"""gatematch: the LSTM and pairwise attention for PyTorch, with hand-written Triton kernels.

Public names are imported from their packages at first use (PEP 562): importing this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatematch.attention import *  # noqa: F403
    from gatematch.curvature import *  # noqa: F403
    from gatematch.lstm import *  # noqa: F403

__version__ = "0.1.0"

# All that is public, but for the function `lstm`: gatematch.lstm is the package.
_NAMES = {
    "lstm": """LSTM LSTMCell convert from_keras from_onnx from_tf1 init_gates_ init_preset_ lstm_cell
        named_gates to_keras to_onnx to_tf1""",
    "attention": """ABCNN AttentionFeatures PairwiseAttention attention_pool pairwise_attend
        pairwise_attention pairwise_sums""",
    "curvature": """HessianOperator SpectralDensity TraceEstimate hessian hvp parameter_index
        spectral_density trace""",
}
_PACKAGE_OF = {name: package for package, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_NAMES, *_PACKAGE_OF]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return import_module(f"gatematch.{name}")
    if name not in _PACKAGE_OF:
        raise AttributeError(f"module 'gatematch' has no attribute {name!r}")
    value = getattr(import_module(f"gatematch.{_PACKAGE_OF[name]}"), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
