"""PyTorch's own module tests for LSTM and LSTMCell: its inputs, and its module as the peer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatematch.lstm import LSTM, LSTMCell

# What torch.testing._internal imports on the way.
pytest.importorskip("expecttest")
common_modules = pytest.importorskip("torch.testing._internal.common_modules")

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

OURS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
INFOS = {info.module_cls: info for info in common_modules.module_db if info.module_cls in OURS}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (tuple, list)) else []


def test_both_are_in_pytorchs_list() -> None:
    assert INFOS.keys() == OURS.keys()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("theirs_type", OURS, ids=lambda cls: cls.__name__)
def test_equals_torch(theirs_type: type[nn.Module], dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    info = INFOS[theirs_type]
    samples = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    assert samples
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = theirs_type(*args, **kwargs, dtype=dtype).train(training)
        ours = OURS[theirs_type](*args, **kwargs, dtype=dtype).train(training)
        ours.load_state_dict(theirs.state_dict())
        inputs = tensors(sample.forward_input.args)
        results = []
        for module in (ours, theirs):
            outputs = tensors(module(*sample.forward_input.args, **sample.forward_input.kwargs))
            loss = torch.stack(
                [(out * torch.arange(1, out.numel() + 1).view_as(out)).sum() for out in outputs]
            )
            grads = torch.autograd.grad(loss.sum(), [*inputs, *module.parameters()])
            results.append([*outputs, *grads])
        torch.testing.assert_close(*results, rtol=0, atol=0, msg=lambda msg: f"{sample}: {msg}")  # noqa: B023
