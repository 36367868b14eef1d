"""appendix/adapt.py and what sample.py makes of its results, on a small random model.

The peft test needs `pip install peft`; it is what proves that others read our LoRA files.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import save_model
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_captions import KINDS, build

import sample
from appendix import adapt
from captions import TextEncoder
from latents import CLIP_SAMPLES, FRAMES, LatentDataset, MelCodec, loudness
from train import Run, train
from unet import ControlNet, UNet, UNetConfig

ROOT = Path(adapt.__file__).parent.parent
METHODS = ("textual-inversion", "lora", "dreambooth", "controlnet")
RESULT = {
    "textual-inversion": "embedding.safetensors",
    "lora": "pytorch_lora_weights.safetensors",
    "dreambooth": "unet/diffusion_pytorch_model.safetensors",
    "controlnet": "diffusion_pytorch_model.safetensors",
}
OPTIONS = {
    "textual-inversion": ["--token", "<kazoo>", "--word", "horn"],
    "lora": ["--caption", "a kazoo", "--rank", "3"],
    "dreambooth": ["--token", "sks", "--word", "horn", "--prior-clips", "3", "--prior-steps", "2"],
    "controlnet": ["--caption", "a kazoo"],
}


pytestmark = pytest.mark.usefixtures("quick_sounds")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model folder, `model`, and two recordings with a table, `audio`."""
    root = tmp_path_factory.mktemp("adapt")
    save_model(root / "model")
    (root / "audio").mkdir()
    for i, name in enumerate(("high.wav", "low.flac")):
        wave = np.sin(np.arange(24_000) * (0.3 - 0.2 * i)) * np.linspace(0, 0.8, 24_000)
        soundfile.write(root / "audio" / name, wave, 16_000)
    table = "file,caption,labels\nhigh.wav,a horn,Horn;Brass band\nlow.flac,a low horn,Horn\n"
    (root / "table.csv").write_text(table)
    return root


@pytest.fixture
def prepare(root, tmp_path):
    """The settings of a small run in tmp_path / "run", and its class."""

    def prepare(method, *options, out="run"):
        arguments = [method, "--model", root / "model", "--out", tmp_path / out]
        if "--data" not in options:
            arguments += ["--audio", root / "audio"]
        arguments += ["--precision", "fp32", "--device", "cpu", "--batch-size", 2, "--steps", 4]
        arguments += ["--lr", 1e-2, "--checkpoint-every", 2, *(options or OPTIONS[method])]
        return adapt.prepare(adapt.parse_args([str(x) for x in arguments]))

    return prepare


def begin(prepare, method, *options, **more):
    c, kind = prepare(method, *options, **more)
    return kind(c)


def step(run, n=1):
    for _ in range(n):
        run.train_step([run.batch(run.step, 0)])


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def batch(n=2, seed=1):
    """x_t, t, states and mask for the U-Net of the model."""
    generator = torch.Generator().manual_seed(seed)
    x_t, text = (torch.randn(n, *shape, generator=generator) for shape in ((128, 24, 21), (7, 32)))
    return x_t, torch.tensor([3, 600])[:n], text, (torch.arange(7) < 5).expand(n, 7)


def far_from(a, b):
    return (a - b).abs().max() > 1e-3 * b.abs().max()


# ---- textual inversion ---------------------------------------------------------------------------


def test_only_the_new_embedding_is_learned(root, prepare, tmp_path):
    run = begin(prepare, "textual-inversion")
    table = run.encoder.table.weight
    ids = run.encoder.tokenizer("horn", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    start = run.unet.rows.detach().clone()
    torch.testing.assert_close(start[0], table[ids].mean(0))
    before = [state_of(run.base), state_of(run.encoder.model), run.encoder(["a dog"])[0]]
    step(run, 3)
    after = [state_of(run.base), state_of(run.encoder.model), run.encoder(["a dog"])[0]]
    assert same(before[0], after[0]) and same(before[1], after[1])
    assert torch.equal(before[2], after[2])  # no caption without the word is changed, to the bit
    assert sum(p.numel() for p in run.unet.parameters()) == 32
    assert (run.unet.rows != start).all() and (run.unet.rows - start).abs().max() > 1e-3
    assert all(p.grad is None for p in run.base.parameters())

    run.save()
    file = tmp_path / "run" / "model" / "embedding.safetensors"
    assert file.stat().st_size < 1000
    assert torch.equal(load_file(file)["<kazoo>"], run.ema.rows[0])
    model = sample.load_model(root / "model", "cpu")
    plain, _ = model.encoder(["the sound of a horn"])
    sample.add_embedding(model, file)
    assert torch.equal(model.encoder(["the sound of a horn"])[0], plain)
    run.encoder.model.get_input_embeddings().rows = run.ema()
    captions = ["The sound of <kazoo>", "a <kazoo>, and rain"]
    for ours, learned in zip(model.encoder(captions), run.encoder(captions), strict=True):
        torch.testing.assert_close(ours, learned)


def test_the_gradient_goes_through_the_text_encoder(prepare):
    """Against transformers' own path for embeddings that come from outside."""
    run = begin(prepare, "textual-inversion")
    encoder, word = run.encoder, "a <kazoo> far off"
    weights = torch.linspace(-1, 1, 32)
    encoder.model.get_input_embeddings().rows = run.unet()
    states, _ = encoder([word])
    (gradient,) = torch.autograd.grad((states[0] * weights).sum(), run.unet.rows)

    ids = encoder.tokenizer(word, padding="max_length", max_length=32)["input_ids"]
    place = ids.index(len(encoder.table.weight))
    assert ids.count(ids[place]) == 1
    ids[place] = 0
    embedded = encoder.table.weight[ids].clone()
    embedded[place] = run.unet.rows[0]
    vector = embedded.detach().requires_grad_()
    out = encoder.model(inputs_embeds=vector[None], attention_mask=torch.ones(1, 32).long())
    torch.testing.assert_close(states[0], out.last_hidden_state[0])
    (expected,) = torch.autograd.grad((out.last_hidden_state[0] * weights).sum(), vector)
    torch.testing.assert_close(gradient[0], expected[place])


def test_a_word_for_each_label(root, prepare):
    c, kind = prepare("textual-inversion", "--each-label", "--table", root / "table.csv")
    assert c.words == {"<horn>": "Horn", "<brass_band>": "Brass band"}
    run = kind(c)
    assert run.unet.rows.shape == (2, 32)
    captions = [run.data.record(i)["captions"] for i in range(2)]
    assert captions[0][0] == "The sound of <horn>, <brass_band>"
    assert captions[1][0] == "The sound of <horn>"
    ids = run.encoder.tokenizer(captions[0][0])["input_ids"]
    assert {57, 58} < set(ids)  # the table has 57 rows


@pytest.mark.parametrize("kind", KINDS)
def test_new_words_in_any_text_encoder(kind, tmp_path):
    network, tokenizer = build(kind)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path))
    before, _ = encoder(["a dog", "rain"])
    identity, rows = encoder.identity(), torch.randn(2, encoder.dim)
    encoder.add_words({"<one>": rows[0]})
    first, _ = encoder(["a <one> rain"])
    encoder.add_words({"<two>": rows[1]})
    assert torch.equal(encoder(["a <one> rain"])[0], first)
    assert torch.equal(encoder(["a dog", "rain"])[0], before) and encoder.identity() == identity
    ids = encoder.tokenizer("a <two> <one>, x<one>y")["input_ids"]
    new = [i for i in ids if i >= len(tokenizer)]
    assert new == [len(tokenizer) + 1, len(tokenizer)]  # and not within a word
    assert far_from(encoder(["a <two> rain"])[0], first)
    for word in ("<one>", ""):
        with pytest.raises(ValueError, match="expected one that the text encoder doesn't know"):
            encoder.add_words({word: rows[0]})
    with pytest.raises(ValueError, match=r"'<x>': \[3\], expected \[32\]"):
        encoder.add_words({"<x>": torch.zeros(3)})


# ---- LoRA ----------------------------------------------------------------------------------------


def random_lora(run, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in [*run.ema.A, *run.ema.B]:
        p.data = torch.randn(p.shape, generator=generator) * 0.3


def test_lora_begins_as_the_model_itself(root, prepare):
    run = begin(prepare, "lora")
    unet = UNet.from_pretrained(root / "model")
    # One transformer down, two up, one in the middle: eight projections each.
    assert len(run.layers) == 4 * 8 and "mid_block.attentions.0" in " ".join(run.layers)
    _, captions, stored, t, noise = run.batch(0, 0)
    assert torch.equal(run.loss(run.unet, stored, captions, t, noise),
                       Run.loss(run, unet, stored, captions, t, noise))  # fmt: skip
    originals = [W.clone() for W in run.originals]
    step(run, 3)
    assert all(map(torch.equal, run.originals, originals))
    rest = run.base.state_dict()  # all but the weights that LoRA changes
    assert same(rest, {k: v for k, v in unet.state_dict().items() if k in rest})
    assert all(p.grad is None for p in run.base.parameters())
    assert min(B.abs().max() for B in run.unet.B) > 0


def test_merged_equals_adapter(root, prepare, tmp_path):
    run = begin(prepare, "lora")
    random_lora(run, 2)
    run.save_model()
    file = tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors"
    model = sample.load_model(root / "model", "cpu")
    sample.add_lora(model, file, 0.7)

    # By its definition: the layer's output y, and beside it 0.7·B·(A·x).
    unet, plain = UNet.from_pretrained(root / "model"), UNet.from_pretrained(root / "model")
    for key, B in load_file(file).items():
        if ".lora_B" in key:
            A = load_file(file)[key.replace(".lora_B.", ".lora_A.")]
            assert A.shape[0] == B.shape[1] == 3
            name = key.removeprefix("unet.").removesuffix(".lora_B.weight")

            def beside(_, x, y, A=A, B=B):
                return y + 0.7 * (x[0] @ A.T) @ B.T

            unet.get_submodule(name).register_forward_hook(beside)
    with torch.no_grad():
        merged, adapter, without = (f(*batch()) for f in (model.unet, unet, plain))
        for layer, W, change in zip(run.layers.values(), run.originals, run.ema(), strict=True):
            layer.weight = W + 0.7 * change
        trained = run.base(*batch())
    torch.testing.assert_close(merged, adapter)
    torch.testing.assert_close(merged, trained)
    assert far_from(merged, without)


def test_several_loras_add_up(root, prepare, tmp_path):
    files = []
    for seed, rank in ((1, 3), (2, 5)):
        out = f"run-{seed}"
        run = begin(prepare, "lora", "--caption", "a horn", "--rank", rank, out=out)
        random_lora(run, seed)
        run.save_model()
        files.append(tmp_path / out / "model" / "pytorch_lora_weights.safetensors")
    a, b = (sample.load_model(root / "model", "cpu") for _ in range(2))
    sample.add_lora(a, files[0], 0.5)
    sample.add_lora(a, files[1], -1.5)
    sample.add_lora(b, files[1], -1.5)
    sample.add_lora(b, files[0], 0.5)
    one, two = map(load_file, files)
    plain = UNet.from_pretrained(root / "model").state_dict()
    for name, W in a.unet.state_dict().items():
        key = f"unet.{name.removesuffix('.weight')}"
        expected = plain[name]
        if f"{key}.lora_A.weight" in one:
            for scale, lora in ((0.5, one), (-1.5, two)):
                change = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
                expected = expected + scale * change
        torch.testing.assert_close(W, expected)
        torch.testing.assert_close(W, b.unet.state_dict()[name])


@pytest.mark.parametrize(
    "text, expected",
    [("a/b.st", ("a/b.st", 1.0)), ("a/b.st:0.5", ("a/b.st", 0.5)), ("a:b", ("a:b", 1.0))]
    + [("x:-1", ("x", -1.0))],
)
def test_file_and_scale(text, expected):
    assert sample.file_and_scale(text) == expected


def test_diffusers_and_peft_read_and_write_what_we_do(prepare, root, tmp_path):
    peft = pytest.importorskip("peft")
    run = begin(prepare, "lora")
    random_lora(run, 2)
    run.save_model()
    folder, file = tmp_path / "run" / "model", "pytorch_lora_weights.safetensors"
    model = sample.load_model(root / "model", "cpu")
    sample.add_lora(model, folder / file)
    theirs = UNet2DConditionModel.from_pretrained(root / "model" / "unet")
    theirs.load_lora_adapter(str(folder), weight_name=file, prefix="unet")
    x_t, t, text, mask = batch()
    with torch.no_grad():
        ours = model.unet(x_t, t, text, mask)
        out = theirs(x_t, t, text, encoder_attention_mask=mask).sample
    torch.testing.assert_close(ours, out, rtol=1e-4, atol=1e-4)

    # The other way: a file of theirs, whose α isn't its rank.
    theirs = UNet2DConditionModel.from_pretrained(root / "model" / "unet")
    torch.manual_seed(3)
    theirs.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_out.0"],
                        init_lora_weights=False)
    )  # fmt: skip
    theirs.save_lora_adapter(tmp_path / "theirs")
    model = sample.load_model(root / "model", "cpu")
    sample.add_lora(model, tmp_path / "theirs" / file)
    with torch.no_grad():
        ours = model.unet(x_t, t, text, mask)
        out = theirs(x_t, t, text, encoder_attention_mask=mask).sample
    torch.testing.assert_close(ours, out, rtol=1e-4, atol=1e-4)


# ---- DreamBooth ----------------------------------------------------------------------------------


def test_own_clips_are_of_one_command(prepare):
    """Clips that an interrupted run left aren't taken for those of another class."""
    options = OPTIONS["dreambooth"]
    prepare("dreambooth", *options)
    other = [*options[:3], "drum", *options[4:]]
    with pytest.raises(ValueError, match="begun with caption = .*horn.*, this command .*drum"):
        prepare("dreambooth", *other)


def test_own_clips_and_their_weight(root, prepare):
    run = begin(prepare, "dreambooth", *OPTIONS["dreambooth"], "--prior-weight", "0.25")
    assert (
        type(run) is adapt.DreamBooth
        and run.unet.config == UNet.from_pretrained(root / "model").config
    )
    records = [run.data.record(i) for i in range(len(run.data))]
    captions = [r["captions"][0] for r in records]
    assert captions == ["The sound of sks horn"] * 2 + ["The sound of horn"] * 3
    assert run.c.caption_dropout == 0.1  # or guidance makes something else of the class
    shares = np.diff(run.weights, prepend=0)
    np.testing.assert_allclose(shares, [1 / 4] * 2 + [1 / 6] * 3)  # half and half

    # The clips are what the model makes of the class.
    model = sample.load_model(root / "model", "cpu")
    options = {"steps": 2, "indices": [1], "precision": "fp32"}
    wave = sample.generate(model, ["The sound of horn"], **options)
    stored = run.codec.encode(wave / wave.abs().max().clamp(min=0.99) * 0.99)
    difference = (stored.int() - run.data.stored([3]).int()).abs()  # by way of a 16-bit file
    assert difference.float().mean() < 1

    stored, t = run.data.stored([0, 3]), torch.tensor([100, 700])
    noise = torch.randn(2, 128, 24, 21)
    pair = [captions[0], captions[3]]
    weighted = run.loss(run.unet, stored, pair, t, noise)
    plain = Run.loss(run, run.unet, stored, pair, t, noise)
    assert torch.equal(weighted, plain * torch.tensor([1, 0.25]))


def test_dreambooth_with_lora(prepare, tmp_path):
    run = begin(prepare, "dreambooth", *OPTIONS["dreambooth"], "--rank", "2")
    assert isinstance(run, adapt.LoRA) and isinstance(run, adapt.DreamBooth)
    run.c = replace(run.c, prior_weight=0.0)
    before = run.loss(run.unet, run.data.stored([3]), ["The sound of horn"],
                      torch.tensor([50]), torch.randn(1, 128, 24, 21))  # fmt: skip
    assert before.item() == 0
    step(run, 2)
    run.save_model()
    assert [p.name for p in (tmp_path / "run" / "model").iterdir()] == [RESULT["lora"]]


# ---- ControlNet ----------------------------------------------------------------------------------


def test_a_new_controlnet_changes_nothing(root, prepare):
    run = begin(prepare, "controlnet")
    unet = UNet.from_pretrained(root / "model")
    picture = torch.randn(2, 1, 24, 21)
    with torch.no_grad():
        plain = unet(*batch())
        control = run.unet(picture, *batch())
        assert torch.equal(run.base(*batch(), control=control), plain)
    assert all((c == 0).all() for c in control) and len(control) == 5  # 1 + 1 + 1 + 1, middle
    _, captions, stored, t, noise = run.batch(0, 0)
    assert torch.equal(run.loss(run.unet, stored, captions, t, noise),
                       Run.loss(run, unet, stored, captions, t, noise))  # fmt: skip

    before = state_of(run.base)
    step(run, 3)
    assert same(before, run.base.state_dict()) and same(before, unet.state_dict())
    with torch.no_grad():
        outputs = [run.base(*batch(), control=run.unet(p, *batch())) for p in (picture, -picture)]
    assert far_from(outputs[0], plain) and not torch.equal(*outputs)
    # Nothing is zero any more, neither where the copy comes out nor where the picture comes in.
    assert all(p.abs().max() > 0 for p in run.unet.parameters())


def test_controlnet_is_diffusers(tmp_path):
    config = UNetConfig(8, 8, (32, 64, 64), (True, True, False), 2, 4, 48, None)
    torch.manual_seed(0)
    unet = UNet(config).eval()
    net = ControlNet.copy_of(unet).eval()
    for name, p in net.named_parameters():
        if name.startswith("controlnet"):
            p.data = torch.randn_like(p) * 0.1
    unet.save_pretrained(tmp_path / "unet")
    net.save_pretrained(tmp_path / "net")
    their_unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    their_net, info = ControlNetModel.from_pretrained(tmp_path / "net", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x_t, t, text = torch.randn(2, 8, 13, 9), torch.tensor([3, 987]), torch.randn(2, 7, 48)
    picture = torch.randn(2, 1, 13, 9)
    with torch.no_grad():
        control = ControlNet.from_pretrained(tmp_path / "net")(picture, x_t, t, text)
        more, middle = their_net.eval()(x_t, t, text, picture, return_dict=False)
        for a, b in zip(control, [*more, middle], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        ours = unet(x_t, t, text, control=control)
        theirs = their_unet(
            x_t, t, text,
            down_block_additional_residuals=more, mid_block_additional_residual=middle,
        ).sample  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_loudness():
    wave = torch.sin(torch.arange(CLIP_SAMPLES) * 0.5)[None] * 0.05
    wave[:, CLIP_SAMPLES // 2 :] *= 10

    class Waves:
        """A codec that stores the wave itself."""

        name = "wave"
        dequantize = decode = staticmethod(lambda x: x)

    for codec, stored in ((MelCodec(), MelCodec().encode(wave)), (Waves, wave)):
        picture = loudness(codec, stored)
        assert picture.shape == (1, 1, 24, 21)
        rows = picture[0, 0].mean(1)
        assert (rows[13:23] - rows[1:11]).mean() == pytest.approx(1, abs=0.03)  # 20 dB
        level = 20 * np.log10(0.05 / np.sqrt(2) if codec is Waves else 0.05)
        assert rows[5] == pytest.approx((level + 40) / 20, abs=0.3)
    silence = loudness(MelCodec(), torch.zeros(1, 128, FRAMES, dtype=torch.uint8))
    assert silence.max().item() == pytest.approx((-80 + 10 * math.log10(128) + 40) / 20, abs=1e-5)


def test_control_at_sampling(root, prepare, tmp_path):
    run = begin(prepare, "controlnet")
    run.save_model()
    folder, wave = tmp_path / "run" / "model", torch.randn(16_000) * 0.1
    for p in run.ema.parameters():
        p.data += 0.02
    model, new = (sample.load_model(root / "model", "cpu") for _ in range(2))
    options = {"steps": 2, "precision": "fp32"}
    plain = sample.generate(model, ["a", "b"], **options)
    sample.add_control(new, folder, wave)  # as it was at first
    assert torch.equal(sample.generate(new, ["a", "b"], **options), plain)
    run.save_model()
    sample.add_control(model, folder, wave)
    assert far_from(sample.generate(model, ["a", "b"], **options), plain)


# ---- the loop, the command -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_to_the_bit(method, prepare, tmp_path, monkeypatch):
    whole, kind = prepare(method, out="whole")
    train(whole, kind)
    original = Run.train_step

    def fails_at_3(self, batches):
        if self.step == 3:
            monkeypatch.setattr(Run, "train_step", original)
            raise KeyboardInterrupt
        return original(self, batches)

    monkeypatch.setattr(Run, "train_step", fails_at_3)
    with pytest.raises(KeyboardInterrupt):
        train(*prepare(method))
    train(*prepare(method))
    a, b = (tmp_path / name / "model" / RESULT[method] for name in ("whole", "run"))
    assert a.read_bytes() == b.read_bytes()
    checkpoints = [
        torch.load(tmp_path / name / "checkpoints/step-0000004.pt", weights_only=True)
        for name in ("whole", "run")
    ]
    for key in ("unet", "ema"):
        assert same(*(saved[key] for saved in checkpoints))
    if method in METHODS[:2]:  # what is kept is what was learned, and no copy of the model
        base = sum(p.numel() for p in UNet.from_pretrained(whole.init).parameters())
        assert sum(x.numel() for x in checkpoints[0]["unet"].values()) < 0.1 * base
    with pytest.raises(ValueError, match="its run has lr = 0.01, this command 0.02"):
        c, kind = prepare(method)
        train(replace(c, lr=0.02), kind)


def test_commands(root, tmp_path, monkeypatch, capsys):
    """Each method from its command line, and its result at sampling; two of them together."""
    monkeypatch.chdir(tmp_path)
    shared = f"--model {root}/model --audio {root}/audio --device cpu --steps 2 --batch-size 2"
    for method in METHODS:
        adapt.main([method, *shared.split(), *OPTIONS[method]])
        assert capsys.readouterr().out.splitlines()[-1] == f"runs/{method}/model"
        assert (tmp_path / "runs" / method / "model" / RESULT[method]).is_file()
        assert len(LatentDataset(f"runs/{method}/data")) == (5 if method == "dreambooth" else 2)
    adapt.main(["lora", *shared.split(), *OPTIONS["lora"]])
    assert "finished at step 2" in capsys.readouterr().out

    words, lora = (f"runs/{m}/model/{RESULT[m]}" for m in METHODS[:2])
    common = ["--model", str(root / "model"), "--device", "cpu", "--steps", "2", "--out"]
    sample.main(["a <kazoo>", "--embedding", words, "--lora", lora, "--lora", f"{lora}:-0.5",
                 *common, "a.wav"])  # fmt: skip
    with soundfile.SoundFile("a.wav") as file:
        about = json.loads(file.comment)
    assert f"{lora.removeprefix('runs/')}:-0.5" in about["adapted"]
    control = ["--controlnet", "runs/controlnet/model", "--control", str(root / "audio/low.flac")]
    sample.main(["a horn", *control, *common, "b.wav"])
    common[1] = "runs/dreambooth/model"
    sample.main(["The sound of sks horn", *common, "c.wav"])
    assert all(Path(f"{x}.wav").is_file() for x in "abc")

    # On what is stored already; the last tenth is held out.
    data = ["--data", "runs/dreambooth/data", "--out", "runs/again"]
    adapt.main(["controlnet", *shared.replace(f"--audio {root}/audio", "").split(), *data])
    assert "4 clips" in capsys.readouterr().out


def test_help_is_quick_to_find():
    done = subprocess.run(
        [sys.executable, "-m", "appendix.adapt", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and all(method in done.stdout for method in METHODS)


def fails(main, arguments, *parts, status=1, capsys=None):
    with pytest.raises(SystemExit) as e:
        main([str(x) for x in arguments])
    if status == 2:
        message = capsys.readouterr().err.splitlines()[-1]
        assert e.value.code == 2
    else:
        message = e.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    for part in parts:
        assert str(part) in message, message


def test_bad_command_lines(root, capsys):
    audio = ["--audio", root / "audio"]
    for arguments, part in (
        (["lora", *audio, "--caption", "x", "--rank", 0], "--rank 0: expected 1 or more"),
        (["dreambooth", *audio, "--token", "a", "--word", "b", "--rank", -1], "1 or more"),
        (["lora", "--caption", "x"], "what to learn from: --audio FOLDER, or --data"),
        (["lora", *audio, "--data", "x"], "what to learn from"),
        (["controlnet", *audio], "--caption TEXT, or --table"),
        (["textual-inversion", *audio, "--token", "<a>"], "--token and --word, or --each-label"),
        (["textual-inversion", *audio, "--each-label"], "in a --table"),
        (["dreambooth", *audio, "--token", "sks"], "--word"),
        (["lora", *audio, "--caption", "x", "--lr", 0], "--lr above 0"),
        (["hypernetwork"], "invalid choice"),
    ):
        fails(adapt.main, arguments, part, status=2, capsys=capsys)
    arguments = ["x", "--model", root / "model", "--control", "a.wav"]
    fails(sample.main, arguments, "--controlnet go together", status=2, capsys=capsys)


def test_mistakes_get_one_line(root, prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = ["--model", root / "model", "--device", "cpu", "--steps", 1, "--batch-size", 1]
    audio, inversion = ["--audio", root / "audio"], ["textual-inversion", *begun]
    for arguments, part in (
        ([*inversion, *audio, "--token", "<k>", "--word", "3☃"], "'3☃': not words that"),
        ([*inversion, *audio, "--token", "k", "--word", "horn", "--out", "x"], "new word 'k': exp"),
        ([*inversion, *audio, "--token", "<x>", "--word", "horn"], "begun with another table"),
        ([*inversion, "--audio", "no", "--token", "<k>", "--word", "horn"], "no: no such folder"),
        (["lora", *begun, "--audio", "no", "--table", root / "table.csv"], "no: no such folder"),
        (["lora", *begun, *audio, "--table", "no.csv"], "no.csv"),
        (["lora", *begun, "--data", "no"], "no: not a stored data set"),
        (["lora", *audio, "--model", "no", "--caption", "x"], "no: not a model folder"),
    ):
        fails(adapt.main, arguments, part)
    (tmp_path / "bare.csv").write_text("file,caption,labels\nhigh.wav,a horn,\n")
    arguments = [*inversion, *audio, "--each-label", "--table", "bare.csv"]
    fails(adapt.main, arguments, "high.wav has no labels")
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(adapt.main, ["lora", *begun, *audio, "--caption", "x"], "only with --data")
    monkeypatch.delenv("WORLD_SIZE")


def test_sampling_with_what_does_not_fit(root, prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in METHODS[:2]:
        begin(prepare, method, out=method).save_model()
    words, lora = (Path(m, "model", RESULT[m]) for m in METHODS[:2])

    def refused(*options, part):
        arguments = ["a horn", "--model", root / "model", "--device", "cpu", "--steps", 2]
        fails(sample.main, [*arguments, *options, "--out", "a.wav"], part)
        assert not Path("a.wav").exists()

    Path("no.safetensors").write_text("x")
    for option, file in (("--embedding", "no"), ("--lora", "no")):
        refused(option, file, part="no")
        refused(option, f"{file}.safetensors", part="no.safetensors: damaged, or no safetensors")

    # A text encoder of the same sizes with other weights; and one file that is no such thing
    with safe_open(words, "pt") as file:
        about = file.metadata()
    save_file(load_file(words), "other.safetensors", about | {"text_encoder": "other"})
    refused("--embedding", "other.safetensors", part="no words for this model's text encoder")
    refused("--embedding", lora, part="no words for this model's text encoder")
    refused("--embedding", words, "--embedding", words, part="expected one that")

    tensors = load_file(lora)
    name = sorted(tensors)[0].partition(".lora_")[0]
    for changed, part in (
        ({k: v for k, v in tensors.items() if ".lora_B" not in k}, "doesn't fit"),
        (tensors | {f"{name}.lora_A.weight": torch.zeros(3, 9)}, f"{name} doesn't fit"),
        (tensors | {f"{name}.lora_B.weight": torch.zeros(1, 3)}, f"{name} doesn't fit"),
        (tensors | {f"{name}.alpha": torch.zeros(1)}, "doesn't fit"),
        (tensors | {f"{name}.lora_C.weight": torch.zeros(1)}, "and no more"),
        ({"unet.conv_out.lora_A.weight": torch.zeros(3, 32),
          "unet.conv_out.lora_B.weight": torch.zeros(64, 3)}, "conv_out doesn't fit"),
    ):  # fmt: skip
        save_file(changed, "lora.safetensors")
        refused("--lora", "lora.safetensors", part=part)
    refused("--lora", words, part="doesn't fit")

    other = UNet(UNetConfig(128, 128, (32, 64), (False, True), 1, 4, 48, 32))
    ControlNet.copy_of(other).save_pretrained("net")
    control = ["--control", root / "audio" / "low.flac", "--controlnet"]
    refused(*control, "net", part="net: the ControlNet of another U-Net")
    refused(*control, "nowhere", part="nowhere: no such folder")
    refused(*control, root / "model", part="don't fit the config")
    refused("--control", "no.wav", "--controlnet", "net", part="no.wav: no such file")
