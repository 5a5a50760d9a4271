"""What an error message owes its reader, checked."""

import pytest

from crackseg_nb.core.checks import CrackSegError


def line_of(caught):
    "Return the message of a caught error, which has one line."
    message = str(caught.value)
    assert "\n" not in message
    return message


def one_line(action, *parts):
    "Check that `action` raises a CrackSegError of one line that contains all `parts`."
    with pytest.raises(CrackSegError) as caught:
        action()
    message = line_of(caught)
    for part in parts:
        assert part in message, message
