"""Every option of everything public says what is wrong with a value of another kind or range.

Options are the arguments annotated as bool, int, float or str. They are read off the signatures: a new one
needs no test of its own.
"""

import inspect
import math
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from public import calls, public
from torch import nn

import gatematch

WRONG: dict[type, list[Any]] = {
    bool: ["no", "", 2, 0.5, None, [], np.zeros(2)],
    int: ["3", 2.5, -1, None, True, [], math.nan],
    float: ["x", -math.inf, math.inf, math.nan, None, True, []],
    str: ["another", "", 3, None, [], np.zeros(2), np.array(["auto", "auto"])],
}
# torch.nn's constructors take these as a bool or an int, and so do ours.
TAKEN = {"LSTM": (True, 2), "LSTMCell": (True, 2)}


def options(thing: Callable[..., Any]) -> dict[str, tuple[type, bool]]:
    """The kind of each option, and whether None is a value of it."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    found = {}
    for name, hint in get_type_hints(function).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        real = [kind for kind in kinds if kind is not NoneType]
        if len(real) == 1 and real[0] in list(WRONG) and name != "return":
            found[name] = real[0], NoneType in kinds
    return found


CALLS = calls()
network, keras = CALLS["named_gates"]["module"], CALLS["from_keras"]["weights"]
THINGS = {name: (thing, found) for name, thing in public().items() if (found := options(thing))}
EVERY = [(name, option) for name, (_, found) in THINGS.items() for option in found]


def test_the_options_are_found() -> None:
    assert len(EVERY) > 40


@pytest.mark.parametrize(("name", "option"), EVERY)
def test_a_wrong_value_of_an_option_is_named(name: str, option: str) -> None:
    thing, found = THINGS[name]
    kind, none = found[option]
    for value in WRONG[kind]:
        if (value is None and none) or any(value is taken for taken in TAKEN.get(name, ())):
            continue
        with pytest.raises((TypeError, ValueError)) as info:
            thing(**CALLS[name] | {option: value})
        message = str(info.value)
        assert re.fullmatch(rf"{option}(:| should| must| has) .+", message), (value, message)


@pytest.mark.parametrize(
    ("name", "option"), [pair for pair in EVERY if not pair[0].lower().startswith("lstm")]
)
def test_numpys_numbers_are_taken(name: str, option: str) -> None:
    thing, found = THINGS[name]
    value = CALLS[name].get(option, inspect.signature(thing).parameters[option].default)
    numpy = {bool: np.bool_, int: np.int64, float: np.float64}.get(found[option][0])
    if numpy is not None and value is not None:
        thing(**CALLS[name] | {option: numpy(value)})


def test_options_that_two_calls_took_without_a_word() -> None:
    for wrong in (2, -1, "x"):
        with pytest.raises(TypeError, match=f"^bidirectional: expected a bool, got {type(wrong).__name__}$"):
            gatematch.from_keras(keras, bidirectional=wrong)
    with pytest.raises(ValueError, match=r"^forget_bias: expected a finite number, got inf$"):
        gatematch.to_tf1(network, forget_bias=math.inf)
    for rule, error in ((True, TypeError), (math.nan, ValueError)):
        with pytest.raises(error, match=r"^rules\['b_\*'\]: expected a (finite )?number, got"):
            gatematch.init_gates_(network, {"b_*": rule})
    with pytest.raises(TypeError, match=r"^generator: expected a Generator, got int$"):
        gatematch.init_preset_(network, "torch", 3)
    with pytest.raises(ValueError, match=r"^grid: expected real numbers \(N,\), got shape \(\) of float64$"):
        gatematch.SpectralDensity(np.zeros(2), np.ones(2)).smooth(1.0, 1.0)


@pytest.mark.parametrize("module", [gatematch.ABCNN, gatematch.AttentionFeatures])
def test_sizes_by_position_raise_and_name_the_keywords(module: type[nn.Module]) -> None:
    name = module.__name__
    with pytest.raises(
        TypeError, match=rf"^{name}: expected features and the keywords length, .*dtype, got 2 "
    ):
        module(40, 300)
    with pytest.raises(
        TypeError, match=rf"^{name}: expected features and the keywords length, .*dtype, got 2 "
    ):
        module(40, 300, length=3)
    assert list(inspect.signature(module).parameters)[:2] == ["features", "length"]
    assert repr(module(300, length=40)).replace("\n", "").replace(" ", "").startswith(f"{name}(300,length=40")
