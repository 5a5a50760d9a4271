"""A default that moves changes every run that does not name it, so all of them are written down."""

import json

import pytest
from defaults import REFERENCES, defaults

EXPECTED = json.loads(REFERENCES.read_text())


@pytest.fixture(scope="module")
def found():
    return defaults()


def test_nothing_is_new_or_gone(found):
    assert {part: list(values) for part, values in found.items()} == {
        part: list(values) for part, values in EXPECTED.items()
    }


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, values in EXPECTED.items() for name in values])
def test_a_default_is_what_it_was(found, part, name):
    "A change on purpose writes them anew: `python tests/defaults.py`."
    assert found[part][name] == EXPECTED[part][name]
