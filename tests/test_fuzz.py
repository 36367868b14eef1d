"""Damaged and hostile files: 200 of those of `python -m tests.fuzz`."""

import pytest

from tests import fuzz

pytestmark = pytest.mark.usefixtures("one_thread")


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    results, findings = fuzz.fuzz(tmp_path, list(range(200)))
    assert not findings, "\n".join(findings)
    for name, (counts, _) in results.items():
        assert counts["read"] + counts["refused"] >= 10, name
    read, refused = (sum(counts[x] for counts, _ in results.values()) for x in ("read", "refused"))
    assert read > 50 and refused > 50  # mutations do harm, but not always
