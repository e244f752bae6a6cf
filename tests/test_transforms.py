"""Every op under every transform, on the CPU without kernels: right, or raising what the document says."""

import dataclasses
import re

import pytest
import torch
import transform_ops
import transforms
from transforms import TABLES, WRITING

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
OPS = transform_ops.ops("auto")
OUTCOMES = {table: {} for table in ("eager", "compiled", "around", "inside")}


def cells():
    for table in OUTCOMES:
        for heading, column in TABLES[table].items():
            for op in OPS:
                marks = [pytest.mark.slow] if column.slow else []
                name = f"{table}-{heading}-{op}".replace("`", "").replace(" ", "")
                yield pytest.param(table, heading, op, id=name, marks=marks)


@pytest.fixture(scope="module", autouse=True)
def _tables():
    yield
    for table, outcomes in OUTCOMES.items():
        if WRITING and outcomes:
            transforms.write(table, list(OPS), outcomes)


@pytest.mark.parametrize(("table", "heading", "op"), list(cells()))
def test_cell(table, heading, op, request):
    if (heading, op) == ("autocast", "`LSTM`"):
        request.getfixturevalue("bfloat16_lstm")
    found = transforms.judge(OPS[op], heading, TABLES[table][heading])
    OUTCOMES[table][op, heading] = found
    assert WRITING or transforms.here(transforms.committed(table)[op, heading]) == found


@pytest.mark.parametrize("table", OUTCOMES)
def test_the_tables_hold_these_cells_and_no_others(table):
    expected = {(op, heading) for op in OPS for heading in TABLES[table]}
    assert WRITING or set(transforms.committed(table)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "heading", ["forward", "`backward`", "`grad` inside", "`jvp` inside", "`vmap` inside"]
)
@pytest.mark.parametrize(
    "op", ["`lstm`, `return_cells`", "`pairwise_attention`, lengths", "`attention_pool`, lengths"]
)
def test_the_default_backend(op, heading, monkeypatch):
    monkeypatch.setattr(transforms, "BACKEND", "inductor")
    assert transforms.judge(OPS[op], heading, TABLES["compiled"][heading]) == "✓"


@pytest.mark.parametrize("heading", ["`backward`", "`grad`, `vjp`", "`jvp`", "`vmap(grad)`", "forward AD"])
def test_a_derivative_that_is_silently_zero_does_not_pass(heading):
    op = OPS["`lstm_cell`"]
    silent = dataclasses.replace(op, function=lambda x, *others: op.function(x.detach(), *others))
    with pytest.raises((AssertionError, RuntimeError), match=r"off by|not have been used"):
        transforms.judge(silent, heading, TABLES["eager"][heading])


def test_the_footnotes_are_those_of_the_tables_and_say_what_is_raised():
    text = " ".join(transforms.DOCUMENT.read_text().split())
    used = {
        letter
        for table in TABLES
        for cell in transforms.committed(table).values()
        for letter in cell.split(", ")
    }
    assert WRITING or used - {"✓", "–"} == set(transforms.FOOTNOTES)
    for letter, footnote in transforms.FOOTNOTES.items():
        (note,) = re.findall(rf"- \*\*{letter}\*\* (.*?)(?= - \*\*|$)", text)
        assert all(said in note for said in (footnote.error.__name__, footnote.sentence, footnote.before))


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    for function, args, kwargs in transforms.calls(OPS[op]):
        torch.library.opcheck(function, args, kwargs)


def test_every_registered_op_is_checked():
    # A step of the cell is an op for the kernels alone: tests/interpreted has it.
    cell = {"gatematch::lstm_cell", "gatematch::lstm_cell_backward"}
    assert transforms.unchecked(OPS.values()) <= cell
