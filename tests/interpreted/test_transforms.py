"""Every op under every transform by the kernels: right, or raising what docs/differentiation.md says."""

from itertools import product

import pytest
import torch
import transform_ops
import transforms
from transforms import TABLES, WRITING

from gatematch.lstm import LSTM

torch.set_num_threads(1)
OPS = transform_ops.ops("triton")
COLUMNS = TABLES["kernels"]
OUTCOMES = {}


@pytest.fixture(scope="module", autouse=True)
def _table():
    yield
    if WRITING and OUTCOMES:
        transforms.write("kernels", list(OPS), OUTCOMES)


def cells():
    for op, (heading, column) in product(OPS, COLUMNS.items()):
        name = f"{heading}-{op}".replace("`", "").replace(" ", "")
        yield pytest.param(op, heading, id=name, marks=[pytest.mark.slow] if column.slow else [])


@pytest.mark.parametrize(("op", "heading"), list(cells()))
def test_cell(op, heading):
    found = transforms.judge(OPS[op], heading, COLUMNS[heading])
    OUTCOMES[op, heading] = found
    assert WRITING or transforms.committed("kernels")[op, heading] == found


# By others the same ops are called; what attention saves is not written past lengths, where it is never read.
CHECKED = (
    "`LSTM`, 2 layers, both directions, projection, lengths",
    "`lstm_cell`",
    "`pairwise_attention`",
    '`pairwise_attend`, `"rows"`, lengths',
    "`pairwise_sums`, lengths",
)


@pytest.mark.parametrize("op", CHECKED)
def test_opcheck(op):
    for function, args, kwargs in transforms.calls(OPS[op]):
        torch.library.opcheck(function, args, kwargs)


def test_every_registered_op_is_checked():
    assert not transforms.unchecked(OPS[op] for op in CHECKED)


@pytest.fixture
def one_precision():
    """No TF32 in cuDNN by torch's old switch: torch.export raises where the new ones differ from it."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.rnn.fp32_precision, False
    yield
    cudnn.allow_tf32, cudnn.rnn.fp32_precision = True, before


@pytest.mark.parametrize("op", ["`LSTM`", "`LSTMCell`", "`pairwise_attention`"])
@pytest.mark.usefixtures("one_precision")
def test_an_exported_program_has_gradients_if_it_was_exported_with_them(op):
    case = transforms.Case(OPS[op], torch.float32)
    for trainable in (True, False):
        inputs = transforms.leaves(case.inputs)
        results = transforms.exported(case, trainable=trainable)(*inputs)
        if trainable:
            grads = torch.autograd.grad(results, inputs, case.g)
            transforms.compare(grads, case.right_pullback(case.g), 2e-4)
        else:
            with pytest.raises(NotImplementedError, match="exported without gradients has no backward pass"):
                torch.autograd.grad(results, inputs, case.g)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_of_one_step_is_right_for_more():
    """A single step goes by the kernel of a cell, and a trace would do so for any sequence."""
    model = LSTM(3, 4, impl="triton")
    traced = torch.jit.trace(model, torch.randn(1, 2, 3))
    x = torch.randn(3, 5, 3)
    plain = torch.nn.LSTM(3, 4).double()
    plain.load_state_dict(model.state_dict())
    transforms.compare(traced(x), plain(x.double()), 1e-5)
