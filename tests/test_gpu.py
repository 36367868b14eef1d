"""benchmarks/gpu.py, rehearsed: what a first minute on a GPU should not be spent on finding out."""

import json

import pytest
import torch

from benchmarks import gpu


def test_the_rehearsal(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.json")])
    about = json.loads((tmp_path / "gpu.json").read_text())
    assert about["small"] and not about["failed"]
    found = {row["what"]: row["value"] for row in about["rows"] if row["good"]}
    assert len(found) == len({row["what"] for row in about["rows"]})  # all are as they should be
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in found)
    for what in ("weights", "losses"):
        assert found[f"training, graph and eager, {what} differ by"] == 0
    for name in ("1 clip, graph and eager have the same bits", "and ends with the same bits"):
        assert found[name] == 1


def test_a_number_from_the_device_cant_be_captured():
    """Or the other tests with graphs would say nothing."""
    x, a = torch.tensor([3.0]), torch.arange(9.0)
    call = gpu.plain_graph(lambda x: a[x.long()] + 1, (x,))
    assert call(x + 2) == 6 and call(x) == 4
    for network in (lambda x: x if x > 0 else -x, lambda x: a[x.long()[0]]):
        with pytest.raises(RuntimeError, match="can't be captured"):
            gpu.plain_graph(network, (x,))


def test_a_part_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch):
    def sampling(bench):
        raise RuntimeError("no kernel image")

    def other(bench):
        bench.row("another part", 2.0, "s")

    monkeypatch.setattr(gpu, "sampling", sampling)
    for name in ("product", "training", "modules", "resume"):
        monkeypatch.setattr(gpu, name, other)
    with pytest.raises(SystemExit, match="^error: sampling$"):
        gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text())["failed"] == ["sampling"]
    assert capsys.readouterr().out.count("| another part | 2 s |") == 4
