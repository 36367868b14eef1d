"""appendix/more_metrics.py: extrapolated FD, common mistakes, and CLAP scores against transformers
itself, with small random weights."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torchaudio
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, RobertaTokenizerFast

from appendix import more_metrics
from evaluate import Cnn14, frechet_distance, kl_divergence, load_sound
from latents import save_audio

CPU = torch.device("cpu")


def rng_normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_fd_extrapolates_to_what_many_samples_would_give():
    x, y = rng_normal(250, 24), rng_normal(250, 24, seed=1)
    extrapolated = more_metrics.extrapolated_frechet_distance
    small = frechet_distance(x, y)  # the distributions are the same: the true FD is 0
    assert small > 0.5
    assert abs(extrapolated(x, y)) < small / 4
    z, truth = 1.5 * y + 0.5, 24 * (0.5**2 + 0.5**2)
    assert abs(extrapolated(x, z) - truth) < abs(frechet_distance(x, z) - truth) / 2


def test_common_mistakes():
    real, made = 4 * rng_normal(30, 50), 4 * rng_normal(30, 50, seed=1)
    found = more_metrics.variants(made, real)
    assert found["KL softmax"] == kl_divergence(real, made)
    assert found["KL softmax of probabilities taken for logits"] < 0.1 * found["KL softmax"]
    assert found["IS of probabilities taken for logits"] < found["IS in chunks of two clips"] < 2
    p, q = real.sigmoid().numpy(), made.sigmoid().numpy()
    expected = np.mean((p * np.log(p / (q + 1e-6))).sum(axis=1))
    assert found["KL sigmoid"] == pytest.approx(expected, rel=1e-6)


def save_clap(folder, truncation, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 300, "intermediate_size": 32, "max_position_embeddings": 66}
    audio = {"depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8}
    audio |= {"hidden_size": 16, "num_mel_bins": 64, "spec_size": 256, "num_hidden_layers": 2}
    config = ClapConfig(text_config=text, audio_config=audio | more, projection_dim=8)
    ClapModel(config).save_pretrained(folder)
    ClapFeatureExtractor(truncation=truncation, padding="repeatpad").save_pretrained(folder)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(33, 127)), "Ġ"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    RobertaTokenizerFast(vocab=vocab, merges=[]).save_pretrained(folder)


def test_the_command(tmp_path):
    """Captions are the prompts in the WAVs; the CLAP score is transformers' mean cosine."""
    save_clap(tmp_path / "clap", "rand_trunc")
    torch.manual_seed(0)
    Cnn14(5, (4, 4, 4, 4, 4, 8)).save(tmp_path / "classifier.safetensors")
    for kind, seed in (("made", 0), ("real", 50)):
        (tmp_path / kind).mkdir()
        for i in range(10):
            wave, about = 0.1 * rng_normal(33_000, seed=seed + i), json.dumps({"prompt": f"{i} a"})
            save_audio(tmp_path / kind / f"{i}.wav", wave, about if kind == "made" else None)
    options = ["--classifier", tmp_path / "classifier.safetensors"]
    options += ["--clap", tmp_path / "clap", "--device", "cpu"]
    more_metrics.main([*map(str, (tmp_path / "made", tmp_path / "real", *options))])
    found = json.loads((tmp_path / "made" / "more_metrics.json").read_text())
    assert found["N"] == 10 and found["FD"] > 0 and "KL sigmoid" in found

    model = ClapModel.from_pretrained(tmp_path / "clap").eval()
    extractor = ClapFeatureExtractor.from_pretrained(tmp_path / "clap")
    tokenizer = RobertaTokenizerFast.from_pretrained(tmp_path / "clap")
    cosines = []
    for i in range(10):
        wave = load_sound(tmp_path / "made" / f"{i}.wav")
        wave = torchaudio.functional.resample(wave, 16_000, 48_000)
        heard = extractor(wave.numpy(), sampling_rate=48_000, return_tensors="pt")
        with torch.no_grad():
            out = model(**tokenizer(f"{i} a", return_tensors="pt"), **heard)
        cosines.append((out.logits_per_audio / model.logit_scale_a.exp()).item())
    assert found["CLAP score"] == pytest.approx(np.mean(cosines), abs=1e-5)

    with pytest.raises(SystemExit, match="0 has no caption, nor a prompt"):
        more_metrics.main([*map(str, (tmp_path / "real", tmp_path / "made", *options))])


def test_clap_hears_the_same_every_time(tmp_path):
    """Above 10 s transformers takes a part at random, and says of one clip of a batch at random
    that it is longer; here it is the beginning of each."""
    save_clap(tmp_path / "clap", "fusion", enable_fusion=True, aff_block_r=1)
    waves = [0.1 * rng_normal(170_000, seed=i).float() for i in range(2)]
    sounds = {str(i): partial(torch.clone, wave) for i, wave in enumerate(waves)}
    arguments = (str(tmp_path / "clap"), sounds, {"0": "a", "1": "b"}, CPU)
    scores = {more_metrics.clap_score(*arguments)["CLAP score"] for _ in range(2)}
    assert len(scores) == 1
