"""appendix/classify.py: scores against scikit-learn, augmentation, and taggers that learn."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, roc_auc_score

from appendix import classify
from appendix.classify import AST, Config, LogMelCodec, augment, load_tagger, make_tagger, scores_of
from evaluate import Cnn14, log_mel, mel_matrix
from latents import MelCodec, encode_dataset

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kind", ["distinct", "many equal", "all equal"])
def test_scores_are_scikit_learns(kind):
    """Means over those classes that some clips have and others don't."""
    rng = np.random.default_rng(0)
    targets = rng.random((60, 6)) < 0.3
    targets[:, 1], targets[:, 4] = False, True
    logits = rng.standard_normal((60, 6)) + targets
    logits = {"distinct": logits, "many equal": logits.round(), "all equal": 0 * logits}[kind]
    found = scores_of(torch.from_numpy(logits), torch.from_numpy(targets), [*"abcdef"])
    there = [0, 2, 3, 5]
    targets, logits = targets[:, there], logits[:, there]
    expected = average_precision_score(targets, logits, average=None)
    assert [*found["AP"].values()] == pytest.approx(expected.tolist(), rel=1e-12)
    assert found["mAP"] == pytest.approx(expected.mean(), rel=1e-12) and [*found["AP"]] == [*"acdf"]
    assert found["AUC"] == pytest.approx(roc_auc_score(targets, logits), rel=1e-12)


def test_codec_keeps_what_the_classifier_hears():
    wave = torch.randn(2, 161_280, generator=torch.Generator().manual_seed(0)) * 0.1
    wave[1, 40_000:] *= 1e-4
    stored = LogMelCodec().encode(wave)
    assert stored.shape == (2, 64, 1009) and stored.dtype == torch.uint8
    expected = log_mel(wave - wave.mean(1, keepdim=True), mel_matrix()).transpose(1, 2)
    assert (LogMelCodec().dequantize(stored) - expected).abs().max() < 0.3  # half a step


def test_augmentation():
    def augmented(x, **settings):
        nothing = {"mixup": 0, "time_mask": 0, "mel_mask": 0}
        return augment(x, y, np.random.default_rng(0), Config(**nothing | settings))

    x, y = torch.randn(16, 300, 64, generator=torch.Generator().manual_seed(0)) + 5, torch.eye(16)
    assert torch.equal(augmented(x)[0], x) and torch.equal(augmented(x)[1], y)

    mixed, labels = augmented(x, mixup=1)
    torch.testing.assert_close(labels.sum(1), torch.ones(16))
    torch.testing.assert_close(mixed, torch.einsum("ij,jtm->itm", labels, x))  # as labels say
    assert (labels.diagonal() < 1).sum() > 10

    masked, labels = augmented(x, time_mask=192, mel_mask=24)
    assert torch.equal(labels, y)
    for clip, original in zip(masked, x, strict=True):
        changed = clip != original
        frames, bands = changed.all(1), changed.all(0)
        assert frames.sum() <= 192 and bands.sum() <= 24
        assert torch.equal(frames[:, None] | bands, changed)
        torch.testing.assert_close(clip[changed].unique(), original.mean()[None])
    assert len({int((a != b).all(1).sum()) for a, b in zip(masked, x, strict=True)}) > 5


def test_networks_are_the_papers_and_transformers():
    tagger = make_tagger("taltrans", ["x"] * 527, 512)
    assert round(sum(p.numel() for p in tagger.parameters()) / 1e6, 1) == 12.1
    tagger, x = AST(4, 64).eval(), torch.randn(1, 1009, 64)
    normalised = tagger.bn0(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2) / 2
    torch.testing.assert_close(tagger.classify(x)[1], tagger.ast(normalised).logits)
    assert tagger.classify(x[:, :900])[1].shape == (1, 4)


# ---- end to end, on sounds that can be told apart


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Stored features of three kinds of sound, some in pairs, made by the command."""
    root, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    t = np.arange(161_280) / 16_000
    for split, clips in (("train", 24), ("test", 12)):
        rows = []
        (root / split).mkdir()
        for i in range(clips):
            labels = rng.choice(["low", "high", "noise"], 1 + (i % 4 == 0), replace=False)
            wave = 0.003 * rng.standard_normal(len(t))
            for label in labels:
                hertz = {"low": 200, "high": 4000, "noise": 0}[label] * rng.uniform(0.9, 1.1)
                tone = np.sin(2 * np.pi * hertz * t) if hertz else rng.standard_normal(len(t)) / 2
                wave += 0.2 * rng.uniform(0.5, 1) * tone
            soundfile.write(root / split / f"{i}.flac", wave.clip(-1, 1), 16_000)
            rows.append({"file": f"{i}.flac", "labels": labels.tolist()})
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        arguments = [root / split, root / f"{split}.jsonl", "--out", root / f"{split}-mel"]
        classify.main(["encode", *map(str, arguments), "--workers", "0"])
    return root


def train(features, out, *options):
    data = [features / "train-mel", "--test", features / "test-mel", "--out", out]
    more = ["--batch-size", 8, "--warmup-steps", 3, "--device", "cpu", "--precision", "fp32"]
    classify.main(["train", *map(str, [*data, *more, *options])])
    return json.loads((out / "model" / "scores.json").read_text())


@pytest.mark.parametrize("model, width", [("cnn14", 4), ("taltrans", 16), ("ast", 16)])
def test_taggers_learn(features, tmp_path, model, width, monkeypatch, capsys):
    coarse = {"num_hidden_layers": 1, "time_stride": 100, "frequency_stride": 8}
    config = functools.partial(transformers.ASTConfig, **coarse)
    monkeypatch.setattr(transformers, "ASTConfig", config)
    if model != "ast":  # a quarter of the frames is enough, and four times as quick
        whole = LogMelCodec.dequantize
        monkeypatch.setattr(LogMelCodec, "dequantize", lambda self, x: whole(self, x)[..., ::4])
    options = ["--model", model, "--width", width, "--steps", 40, "--lr", 1e-2]
    scores = train(features, tmp_path, *options, "--mixup", 0, "--time-mask", 20, "--mel-mask", 2)
    assert set(scores["AP"]) == {"low", "high", "noise"}
    log = [json.loads(line)["loss"] for line in open(tmp_path / "log.jsonl")]
    assert np.mean(log[-5:]) < 0.85 * np.mean(log[:3])

    capsys.readouterr()
    file = tmp_path / "model" / "tagger.safetensors"
    classify.main(["test", str(file), str(features / "test-mel"), "--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    again = float(printed[-1].split()[1].rstrip(","))
    assert again == pytest.approx(scores["mAP"], abs=0.02)  # half-precision weights

    if model == "cnn14":  # it is a classifier for evaluate.py, with the same logits
        (tagger, labels), classifier = load_tagger(file), Cnn14.load(file)
        assert classifier.labels == labels == sorted(labels)
        wave = torch.randn(1, 161_280) * 0.1
        torch.testing.assert_close(
            classifier(wave), tagger.classify(log_mel(wave, classifier.mel))
        )  # whose filterbank is in half precision, too


def test_a_killed_run_goes_on_as_if_nothing_had_happened(features, tmp_path, monkeypatch):
    options = ("--steps", 4, "--width", 2, "--checkpoint-every", 2, "--validate-every", 2)
    train(features, tmp_path / "whole", *options)

    def killed(self, step, global_batch, choose=classify.Tagger.choose):
        if step == 3:
            raise KeyboardInterrupt
        return choose(self, step, global_batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="goes on"):
        patch.setattr(classify.Tagger, "choose", killed)
        train(features, tmp_path / "killed", *options)
    train(features, tmp_path / "killed", *options)
    whole, again = (
        load_file(tmp_path / x / "model/tagger.safetensors") for x in ("whole", "killed")
    )
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(SystemExit, match="mixup"):
        train(features, tmp_path / "killed", *options, "--mixup", 0.1)


def test_bad_input_is_one_line(features, tmp_path):
    rows = [{"id": "a", "captions": ["x"], "labels": ["x"]}]
    encode_dataset(tmp_path / "mel", MelCodec(), rows, lambda row: torch.zeros(1, 161_280))
    (tmp_path / "x.safetensors").write_text("hello")
    tagger = make_tagger("cnn14", ["unheard of"], 2)
    classify.save_tagger(tmp_path / "t.safetensors", tagger, "cnn14", ["unheard of"], 2)
    test = features / "test-mel"
    for arguments, words in (
        (["train", tmp_path / "nowhere", "--test", test], "nowhere"),
        (["train", tmp_path / "mel", "--test", test], "not log-mel"),
        (["train", test, "--test", test, "--model", "taltrans", "--width", 8], "multiple of 16"),
        (["test", tmp_path / "x.safetensors", test], "x.safetensors"),
        (["test", tmp_path / "t.safetensors", test], "none of the"),
    ):
        with pytest.raises(SystemExit, match=words) as e:
            classify.main([*map(str, [*arguments, "--device", "cpu"])])
        assert "\n" not in str(e.value.code)


def test_help_teaches():
    command = [sys.executable, "-m", "appendix.classify", "--help"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and b"mixup" in done.stdout
