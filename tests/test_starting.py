"""State that starts from data."""

import pytest

from wnq.starting import StartsFromData


def test_state_that_starts_from_data_says_so_until_it_has():
    first, second = StartsFromData(), StartsFromData()
    with pytest.raises(RuntimeError, match="calibrate_"):
        first.check_ready()
    first.mark_ready_()
    first.check_ready()
    second.load_state_dict(first.state_dict())
    assert second._ready  # known before a compiled step could ask
    second.load_state_dict(StartsFromData().state_dict())
    assert not second.ready
