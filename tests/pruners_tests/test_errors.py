"""Errors of bad input: raised by a library with its parameters' names, shown in the words of the user."""

from __future__ import annotations

import pickle

import pytest

from pruners.errors import InputError, check_share


def test_renamed__key_and_phrases_of_the_caller_value_as_it_was() -> None:
    with (
        pytest.raises(InputError) as raised,
        InputError.renamed({"images": "--images"}, {"give images": "give --data"}),
    ):
        raise InputError("images", 0, "must be positive; give images")
    assert str(raised.value) == "--images = 0: must be positive; give --data"
    assert (raised.value.key, raised.value.value) == ("--images", 0)
    assert raised.value.__suppress_context__


def test_renamed__other_keys_stay_the_very_error() -> None:
    error = InputError("model", "x", "must be known")
    with pytest.raises(InputError) as raised, InputError.renamed({"images": "--images"}):
        raise error
    assert raised.value is error


def test_renamed__a_function_may_change_all_of_it() -> None:
    with (
        pytest.raises(InputError, match=r"--sparsity = 0\.5: 7 weights too many"),
        InputError.renamed(lambda error: InputError("--sparsity", 0.5, f"7 weights {error.expected}")),
    ):
        raise InputError("budget", 7, "too many")


def test_replaced__survives_pickling() -> None:
    error = InputError("a", 1, "must be two").replaced(value=3)
    assert str(pickle.loads(pickle.dumps(error))) == "a = 3: must be two"


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_check_share__takes_both_ends(value: float) -> None:
    check_share("--floor", value)


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_check_share__names_the_key(value: float) -> None:
    with pytest.raises(InputError, match=rf"--floor = {value}: must lie between 0 and 1"):
        check_share("--floor", value)
