"""Completions that the learner may take."""

import numpy as np
import pytest

from qarl.errors import SyncError
from qarl.records import Completion
from qarl.samples import check_version


def written_by(version: int) -> Completion:
    return Completion(0, 0, np.zeros(1, np.int32), np.zeros(1, np.float32), "", "stop", version)


def test_completions_of_another_version_than_is_published_are_refused():
    check_version([written_by(3), written_by(3)], 3)
    with pytest.raises(SyncError, match=r"version 3 is published, but completions were written by \[2\]"):
        check_version([written_by(3), written_by(2)], 3)
