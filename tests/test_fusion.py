"""appendix/fusion.py: the discounted attention's mathematics, its inputs, and what it recovers."""

import json

import numpy as np
import pytest
import torch

import train
from appendix import fusion
from appendix.classify import LogMelCodec, make_tagger, save_tagger
from appendix.fusion import Clips, Fusion, read_audio, read_scores, read_video, simulated
from latents import LatentDataset, encode_dataset

CPU = torch.device("cpu")


@pytest.fixture
def inputs():
    """audio, video, there and s of five clips; the last frame of the second one is missing."""
    generator = torch.Generator().manual_seed(0)
    audio, video = (torch.randn(5, *shape, generator=generator) for shape in ((6, 7), (4, 3)))
    there = torch.ones(5, 4)
    there[1, 3] = 0
    return audio, video, there, torch.rand(5, generator=generator)


def network(mode, weights_of=None):
    torch.manual_seed(0)
    net = Fusion(7, 3, 8, 16, mode)
    if weights_of:
        net.load_state_dict(weights_of.state_dict())
    return net


def test_the_discount_is_the_formula(inputs):
    net, (audio, video, there, s) = network("discount"), inputs
    logits = net(audio, video, there, s)
    for b in range(len(s)):
        h = torch.cat([net.audio(audio[b]), net.video(video[b])])  # [T + F, width]
        e = torch.tensor([1.0] * 6 + [s[b]] * 4)
        if b == 1:
            h, e = h[:-1], e[:-1]
        weight = e[:, None] * net.weight(h).exp()  # e_i·exp(a_ki)
        context = (weight / weight.sum(0)).T @ h  # c_k: [classes, width]
        expected = (context * net.score.weight).sum(1) + net.score.bias
        torch.testing.assert_close(logits[b], expected)


def test_entailment_0_is_the_audio_alone_and_1_is_no_discount(inputs):
    net, (audio, video, there, s) = network("discount"), inputs
    whole = network("attention", net)(audio, video, there, s)
    assert torch.equal(net(audio, video, there, torch.ones(5)), whole)
    logits = net(audio, video, there, 0 * s)
    assert torch.equal(logits, network("audio", net)(audio, video, there, s))
    h = net.audio(audio)  # and that is attention pooling of the audio
    torch.testing.assert_close(logits, (net.weight(h).softmax(1) * net.score(h)).sum(1))
    logits.square().sum().backward()
    assert all((p.grad == 0).all() for p in net.video.parameters())
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_concatenation_pools_each_by_itself(inputs):
    net, (audio, video, there, s) = network("concatenation"), inputs
    h, g = net.audio(audio), net.video(video)
    c_audio = torch.einsum("btk,btw->bkw", net.weight(h).softmax(1), h)
    c_video = torch.einsum("btk,btw->bkw", net.weight(g).softmax(1), g)
    w = torch.cat([net.score.weight, net.score_video.weight], 1)  # [classes, 2·width]
    expected = (torch.cat([c_audio, c_video], 2) * w).sum(2) + net.score.bias
    others = [0, 2, 3, 4]  # all frames are there
    torch.testing.assert_close(net(audio, video, there, s)[others], expected[others])


def test_frames_that_are_not_there_change_nothing(inputs):
    audio, video, there, s = inputs
    more = torch.cat([video, torch.full((5, 2, 3), 7.0)], 1)
    for net in map(network, ("discount", "attention", "video", "concatenation")):
        longer = net(audio, more, torch.cat([there, torch.zeros(5, 2)], 1), s)
        torch.testing.assert_close(longer, net(audio, video, there, s))


def test_video_features_and_scores_are_found_by_id(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(3, 2))
    np.save(tmp_path / "c.npy", np.full((1, 2), 7, np.float16))
    video, there = read_video(tmp_path, ["c", "b", "a"])
    assert there.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert video[2].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert video[0].tolist() == [[7, 7], [0, 0], [0, 0]] and not video[1].any()
    for bad in (np.ones((2, 3)), np.ones(2), np.full((2, 2), np.nan), np.array([{}])):
        np.save(tmp_path / "d.npy", bad)
        with pytest.raises(ValueError, match="d.npy|allow_pickle"):
            read_video(tmp_path, ["a", "d"])

    entailment = {"a": {"llm": 0.4, "bert": -0.2}, "b": {"llm": None, "bert": 0.9}, "c": {}}
    lines = [{"id": i, "labels": ["x"], "entailment": x} for i, x in entailment.items()]
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    scores = read_scores(path, ["b", "a", "c"])
    torch.testing.assert_close(scores["llm"], torch.tensor([1.0, 0.4, 1.0]))
    torch.testing.assert_close(scores["bert"], torch.tensor([0.9, 0.0, 1.0]))
    assert "2 of 3 clips have no score llm" in capsys.readouterr().out
    path.write_text(json.dumps(lines[2]))
    with pytest.raises(ValueError, match="no record has"):
        read_scores(path, ["c"])


def heard_poorly(n):
    """Clips of one to two of six classes, heard in much noise."""
    rng, voices = np.random.default_rng(n), np.random.default_rng(9).standard_normal((6, 12))
    targets = torch.zeros(n, 6)
    for row in targets:
        row[torch.from_numpy(rng.choice(6, rng.integers(1, 3), replace=False))] = 1
    audio = 3 * rng.standard_normal((n, 5, 12)) + (targets.numpy() @ voices)[:, None]
    audio = torch.from_numpy(audio).float()
    return Clips(audio, torch.zeros(n, 1, 1), torch.ones(n, 1), {}, targets)


def test_simulation_is_what_it_says():
    clips = simulated(heard_poorly(400), seed=3, noise=0.0)
    looks = np.random.default_rng(0).standard_normal((6, 32))
    own = (clips.targets.numpy() @ looks)[:, None] - clips.video.numpy()
    assert torch.equal(torch.from_numpy(np.abs(own).max((1, 2)) < 1e-5), clips.fits)
    assert 150 < clips.fits.sum() < 250
    noisy, shuffled = clips.scores["noisy"], clips.scores["shuffled"]
    r = [np.corrcoef(x, clips.fits)[0, 1] for x in (noisy, shuffled)]
    assert r[0] > 0.6 and abs(r[1]) < 0.2


def test_the_discount_recovers_what_it_should():
    clips, held_out = (simulated(heard_poorly(n), n, noise=1.0) for n in (400, 300))
    c = train.parse_args("--steps 60 --batch-size 64 --warmup-steps 5 --lr 1e-2".split())
    modes, result = [(mode, "") for mode in ("audio", "attention", "concatenation")], {}
    for mode, score in [*modes, ("discount", "relevance"), ("discount", "shuffled")]:
        net = fusion.fit(mode, score, clips, 32, c, CPU)
        result[score or mode] = fusion.measure(net, score, held_out, list("abcdef"), CPU)
    fits, misfits = "mAP, video fits", "mAP, video doesn't fit"
    best, heard = result["relevance"], result["audio"]
    assert best[fits] > heard[fits] + 0.1  # a picture that fits helps,
    assert best[misfits] > heard[misfits] - 0.1  # one that doesn't does no harm,
    assert best["attention, doesn't fit"] == 0 and best["attention, fits"] > 0.2
    for naive in ("attention", "concatenation", "shuffled"):  # as it does without the score
        assert result[naive][misfits] < best[misfits] - 0.1
        assert result[naive]["mAP"] < best["mAP"] - 0.03


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Log-mel features of 24 and 12 clips of three labels, features and scores of their videos."""
    root, rng = tmp_path_factory.mktemp("fusion"), np.random.default_rng(0)
    (root / "video").mkdir()
    records = []
    for split, n in (("train", 24), ("test", 12)):
        rows = [{"id": f"{split}{i}", "captions": ["x"]} for i in range(n)]
        rows = [row | {"labels": [f"class {i % 3}"]} for i, row in enumerate(rows)]
        encode_dataset(root / split, LogMelCodec(), rows, lambda row: torch.randn(1, 161_280) / 9)
        for i, row in enumerate(rows):
            np.save(root / "video" / f"{row['id']}.npy", rng.standard_normal((1 + i % 3, 4)))
            records.append(row | {"entailment": {"llm": i / n, "t5": 0.5}})
    (root / "run.jsonl").write_text("\n".join(map(json.dumps, records[1:])))
    (root / "video" / "test3.npy").unlink()
    torch.manual_seed(0)
    for model in ("taltrans:16", "cnn14:2"):
        save_tagger(root / model[0], make_tagger(model, ["x"]), model, ["x"])
    return root


def command(root, name, *options):
    arguments = [name, root / "train", "--test", root / "test", "--steps", 3, "--batch-size", 8]
    if name == "train":
        arguments += ["--video", root / "video", "--scores", root / "run.jsonl"]
    fusion.main([*map(str, [*arguments, "--seeds", 0, 1, "--device", "cpu", *options])])


def test_train_and_simulate(root, tmp_path, capsys):
    command(root, "train", "--tagger", root / "t", "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "11 of 12 clips have video" in printed and "1 of 24 clips have no score" in printed
    for row in ("audio", "video", "concatenation", "attention", "discount by llm", "by t5"):
        assert f"{row} | " in printed
    command(root, "simulate", "--out", tmp_path, "--clips", "10")
    printed = capsys.readouterr().out
    assert "10 clips, tested on 10" in printed and "A simulation" in printed
    for option, file in (("--tagger", root / "c"), ("--video", tmp_path / "nowhere")):
        with pytest.raises(SystemExit, match="^error: .*(taltrans|nowhere)"):
            command(root, "train", "--out", tmp_path, option, file)


def test_states_of_audio(root):
    data = LatentDataset(root / "train")
    clips = read_audio(data, 5, None, data)
    z = data.stats.normalize(LogMelCodec().dequantize(data.stored(range(5))))
    block = z[2, :, 48:96]  # the second of 21 blocks of 48 frames
    torch.testing.assert_close(clips.audio[2, 1], torch.cat([block.mean(1), block.std(1)]))
    assert clips.audio.shape == (5, 21, 128) and clips.targets.sum(1).tolist() == [1] * 5
