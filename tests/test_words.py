"""tiny/words.py, on a small random model."""

import json

import pytest
import torch
from conftest import save_model

import sample
from tiny import words
from unet import UNet


def test_other_captions_get_the_plain_ones_answer(small, tmp_path, capsys):
    """Nothing is lost on plain and empty captions at first; then only cross-attention learns, and
    what it writes is a model folder."""
    save_model(tmp_path / "model")
    data = small[small.index("--data") + 1]
    options = f"--init {tmp_path}/model --data {data} --out {tmp_path}/run --steps 40 --lr 1e-2 "
    options += "--batch-size 8 --warmup-steps 0 --val-clips 4 --precision fp32 --device cpu"
    c = words.parse_args(options.split())
    task = words.Words(c, torch.device("cpu"))
    captions, *rest = task.batch(0, range(8), task.choose(0, 8))
    plain = [pair and (pair[0], pair[0]) for pair in captions]
    other = [(f"a low tone {i}", f"tone number {i}") for i in range(8)]
    with torch.no_grad():
        assert task.loss(task.network, plain, *rest).max() == 0
        assert task.loss(task.network, [""] * 8, *rest).max() == 0
        assert task.loss(task.network, other, *rest).min() > 0

    words.main(options.split())
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    before, after = (
        UNet.from_pretrained(tmp_path / x).state_dict() for x in ("model", "run/model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("attn2" in name for name in changed)
    assert sample.load_model(tmp_path / "run/model").guidance == 6.5
    with pytest.raises(SystemExit, match="^error: .*model.json"):
        words.main(["--init", str(tmp_path)])
