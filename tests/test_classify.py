"""appendix/classify.py: scores against scikit-learn, augmentation, and taggers that learn."""

import functools
import json

import numpy as np
import pytest
import soundfile
import torch
import transformers
from sklearn.metrics import average_precision_score, roc_auc_score

from appendix import classify
from appendix.classify import AST, Config, LogMelCodec, augment, load_tagger, make_tagger, scores_of
from evaluate import Cnn14, log_mel, mel_matrix
from latents import LatentDataset, MelCodec, encode_dataset


def test_scores_are_scikit_learns():
    """Means over those classes that some clips have and others don't."""
    rng, there = np.random.default_rng(0), [0, 2, 3, 5]
    targets = rng.random((60, 6)) < 0.3
    targets[:, 1], targets[:, 4] = False, True
    some = rng.standard_normal((60, 6)) + targets
    for logits in (some, some.round(), 0 * some):  # distinct, many equal, all equal
        found = scores_of(torch.from_numpy(logits), torch.from_numpy(targets), [*"abcdef"])
        pair = targets[:, there], logits[:, there]
        expected = average_precision_score(*pair, average=None)
        assert [*found["AP"].values()] == pytest.approx(expected.tolist(), rel=1e-12)
        assert [*found["AP"]] == [*"acdf"]
        assert found["mAP"] == pytest.approx(expected.mean(), rel=1e-12)
        assert found["AUC"] == pytest.approx(roc_auc_score(*pair), rel=1e-12)


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
    tagger = make_tagger("taltrans", ["x"] * 527)
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
            soundfile.write(root / split / f"{i}.wav", wave.clip(-1, 1), 16_000)
            rows.append({"file": f"{i}.wav", "labels": labels.tolist()})
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        arguments = [root / split, root / f"{split}.jsonl", "--out", root / f"{split}-mel"]
        classify.main(["encode", *map(str, arguments), "--workers", "0"])
    return root


def train(features, out, *options):
    data = [features / "train-mel", "--test", features / "test-mel", "--out", out]
    more = ["--warmup-steps", 3, "--device", "cpu", "--precision", "fp32"]
    classify.main(["train", *map(str, [*data, *more, *options])])
    return json.loads((out / "model" / "scores.json").read_text())


@pytest.fixture
def few_frames(monkeypatch):
    """Taggers hear an eighth of the frames, which is enough and eight times as quick."""
    whole = LogMelCodec.dequantize
    monkeypatch.setattr(LogMelCodec, "dequantize", lambda self, x: whole(self, x)[..., ::8])


@pytest.mark.parametrize("model", ["cnn14:4", "taltrans:16", "ast:16"])
def test_taggers_learn(features, tmp_path, model, request, monkeypatch):
    if model != "ast:16":  # which pads to all frames
        request.getfixturevalue("few_frames")
    coarse = {"num_hidden_layers": 1, "time_stride": 100, "frequency_stride": 8}
    config = functools.partial(transformers.ASTConfig, **coarse)
    monkeypatch.setattr(transformers, "ASTConfig", config)
    options = ["--model", model, "--steps", 30, "--lr", 1e-2, "--batch-size", 8]
    scores = train(features, tmp_path, *options, "--mixup", 0, "--time-mask", 9, "--mel-mask", 2)
    assert set(scores["AP"]) == {"low", "high", "noise"}
    log = [json.loads(line)["loss"] for line in open(tmp_path / "log.jsonl")]
    assert np.mean(log[-5:]) < 0.85 * np.mean(log[:3])

    file = tmp_path / "model" / "tagger.safetensors"
    tagger, labels = load_tagger(file)
    data = LatentDataset(features / "test-mel")
    again = classify.test(tagger, data, labels, torch.device("cpu"))
    assert again["mAP"] == pytest.approx(scores["mAP"], abs=0.02)  # half-precision weights

    if model == "cnn14:4":  # it is a classifier for evaluate.py, with the same logits
        classifier = Cnn14.load(file)
        assert classifier.labels == labels == sorted(labels)
        wave = torch.randn(1, 161_280) * 0.1
        theirs = tagger.classify(log_mel(wave, classifier.mel))  # a filterbank in half precision
        torch.testing.assert_close(classifier(wave), theirs)


def test_bad_input_is_one_line(features, tmp_path):
    rows = [{"id": "a", "captions": ["x"], "labels": ["x"]}]
    encode_dataset(tmp_path / "mel", MelCodec(), rows, lambda row: torch.zeros(1, 161_280))
    classify.save_tagger(tmp_path / "t.safetensors", make_tagger("cnn14:2", ["x"]), "ast", ["x"])
    for part in (b"hello", (tmp_path / "t.safetensors").read_bytes()):
        (tmp_path / "x.safetensors").write_bytes(part)
        with pytest.raises(ValueError, match="x.safetensors: "):
            load_tagger(tmp_path / "x.safetensors")
    test = features / "test-mel"
    for arguments, words in (
        ([tmp_path / "nowhere", "--test", test], "nowhere"),
        ([tmp_path / "mel", "--test", test], "not log-mel"),
        ([test, "--test", test, "--model", "taltrans:8"], "multiple of 16"),
        ([features / "train-mel", "--test", tmp_path / "mel"], "not log-mel"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            classify.main(["train", *map(str, [*arguments, "--device", "cpu"])])
    with pytest.raises(ValueError, match="none of the tagger's classes"):
        scores_of(torch.zeros(2, 1), torch.zeros(2, 1), ["unheard of"])
