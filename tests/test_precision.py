"""The precision of library products: set while it is wanted, by however many threads, and set back."""

import threading
from types import SimpleNamespace

import pytest
import torch

from gatematch import precision
from gatematch.precision import Switch, library_products


@pytest.fixture
def switch():
    return Switch(SimpleNamespace(fp32_precision="none"))


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("wanted", ["ieee", "tf32"])
def test_it_is_set_and_set_back(switch, before, wanted):
    switch.backend.fp32_precision = before
    with switch.at(wanted):
        assert switch.is_at(wanted)
    assert switch.backend.fp32_precision == before
    with pytest.raises(ZeroDivisionError), switch.at(wanted):
        raise ZeroDivisionError
    assert switch.backend.fp32_precision == before


def test_the_last_that_goes_sets_it_back(switch):
    first, second = switch.at("tf32"), switch.at("tf32")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert switch.backend.fp32_precision == "tf32"
    second.__exit__(None, None, None)
    assert switch.backend.fp32_precision == "none"


def test_who_wants_another_precision_waits(switch):
    entered = threading.Event()

    def exact():
        with switch.at("ieee"):
            entered.found = switch.is_at("ieee")
            entered.set()

    with switch.at("tf32"):
        thread = threading.Thread(target=exact)
        thread.start()
        assert not entered.wait(0.1) and switch.is_at("tf32")
    assert entered.wait(10) and entered.found
    thread.join()
    assert switch.backend.fp32_precision == "none"


def test_what_is_inherited_is_not_pinned_down(switch, monkeypatch):
    monkeypatch.setattr(precision, "_ALL", SimpleNamespace(fp32_precision="tf32"))
    switch.backend.fp32_precision = "tf32"  # as it reads where all of torch is
    with switch.at("ieee"):
        assert switch.is_at("ieee")
    assert switch.backend.fp32_precision == "none"


def test_autocast_is_off():
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16), library_products("cpu"):
        assert (x @ x).dtype == torch.float32


def test_nothing_is_done_where_nothing_is_to_do():
    assert library_products("cpu") is library_products("cpu")
