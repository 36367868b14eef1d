"""The recordings of the tiny world."""

import csv
from pathlib import Path

TINY = Path(__file__).resolve().parent.parent / "tiny"


def test_every_recording_has_its_row_and_its_licence():
    rows = list(csv.DictReader((TINY / "recordings.csv").open(newline="", encoding="utf-8")))
    files = {f"recordings/{path.name}" for path in (TINY / "recordings").iterdir()}
    assert {row["file"] for row in rows} == files
    licences = (TINY / "LICENSES.md").read_text(encoding="utf-8")
    for row in rows:
        assert row["licence"] in licences and "GPL" not in row["licence"], row["file"]
        assert row["split"] in ("train", "test") and row["source_group"]
    sides = {}
    for row in rows:
        sides.setdefault(row["source_group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in sides.values())
