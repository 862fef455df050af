"""What we write as JSON every reader takes."""

import json
import math

import pytest
from pydantic import BaseModel

from upcycle.core.json_text import json_text


def strict(text):
    """By the standard, which knows no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_plain_values_are_as_python_writes_them():
    value = {"a": [1, 2.5, 1e-9, None, True, "é\udc80"], "b": {"c": ()}}
    assert json_text(value) == json.dumps(value)
    assert json_text(value, indent=2) == json.dumps(value, indent=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_json_and_read_back_as_it_was(value):
    class Row(BaseModel):
        loss: float

    text = json_text({"deep": [{"loss": value}]})
    (row,) = strict(text)["deep"]
    again = Row(**row).loss
    assert again == value or (math.isnan(again) and math.isnan(value))


def test_a_value_that_json_has_no_place_for_is_still_an_error():
    with pytest.raises(TypeError):
        json_text({"a": object()})
