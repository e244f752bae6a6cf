"""300 drawn calls, valid ones and spoilt ones; `make fuzz` draws 10,000."""

import fuzz


def test_drawn_calls_agree_with_float64_or_name_what_is_wrong() -> None:
    assert not fuzz.main(300)


def test_everything_public_is_drawn() -> None:
    assert fuzz.VALID.keys() == fuzz.PUBLIC.keys() == set(fuzz.NAMES)
