"""Damaged and hostile files: 100 of those of `python -m tests.fuzz`."""

import pytest

from tests import fuzz


@pytest.mark.usefixtures("quick_sounds")
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    results, findings = fuzz.fuzz(tmp_path, list(range(100)))
    assert not findings, "\n".join(findings)
    read, refused = (sum(counts[x] for counts in results.values()) for x in ("read", "refused"))
    assert read > 50 and refused > 50  # mutations do harm, but not always
