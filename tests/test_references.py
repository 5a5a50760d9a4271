"""A checkpoint of an earlier version means what it meant: names of weights and their answers are written down."""

import json

import pytest
from families import FAMILIES, REFERENCES, answers

from crackseg_nb.models.registry import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_family_is_written_down():
    assert {family for family, _ in FAMILIES.values()} == set(MODELS)


@pytest.mark.parametrize("name", FAMILIES)
def test_old_weights_give_the_old_answer(name):
    """After a swapped concatenation, branch or class every old checkpoint loads without a word.

    A change on purpose writes the answers anew: `python tests/families.py`.
    """
    found, expected = answers(name), json.loads(REFERENCES.read_text())[name]
    assert found["weights"] == expected["weights"], "a weight has another name or shape: old checkpoints do not load"
    assert found["logits"] == pytest.approx(expected["logits"], rel=1e-4, abs=1e-4)
