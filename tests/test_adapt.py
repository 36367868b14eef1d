"""appendix/adapt.py on a small random model: what is learned, and the model folders it writes.

The test with peft needs `pip install peft`; it is what proves that others read our LoRA files.
"""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import save_model
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save, save_file

import sample
import train
from appendix import adapt
from captions import TextEncoder
from tests.test_captions import KINDS, build
from train import Denoiser
from unet import UNet

OPTIONS = {
    "textual-inversion": ["--token", "<kazoo>", "--word", "horn"],
    "lora": ["--caption", "a kazoo", "--rank", "3"],
    "dreambooth": "--token sks --word horn --prior-clips 4 --denoising-steps 2".split(),
}
WORDS, LORA = "words.safetensors", "pytorch_lora_weights.safetensors"

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
    table = "file,caption,labels\nhigh.wav,a horn,Horn;Brass band\nlow.flac,,Horn\n"
    (root / "table.csv").write_text(table)
    return root


@pytest.fixture
def begin(root, tmp_path):
    """What a small run in tmp_path / "run" trains, before its first step."""

    def begin(method, *options, out="run", model=root / "model"):
        arguments = [method, "--model", model, "--audio", root / "audio", "--out", tmp_path / out]
        arguments += "--precision fp32 --device cpu --batch-size 2 --steps 4 --lr 1e-2".split()
        arguments += "--warmup-steps 0 --checkpoint-every 2".split()
        arguments += options or OPTIONS[method]
        c, kind = adapt.prepare(*adapt.parse_args([str(x) for x in arguments]))
        return kind(c, torch.device("cpu"))

    return begin


def learn(task, steps):
    optimizer = torch.optim.AdamW(task.network.parameters(), 1e-2, fused=True)
    for step in range(steps):
        batch = task.batch(step, range(2), task.choose(step, 2))
        train.train_step(task, task.network, copy.deepcopy(task.network), optimizer, [batch])


def written(task, folder):
    folder.mkdir()
    task.write(task.network, folder)
    return folder


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- textual inversion ---------------------------------------------------------------------------


def test_only_the_new_embedding_is_learned(root, begin, tmp_path):
    task, model = begin("textual-inversion"), sample.load_model(root / "model", "cpu")
    ids = model.encoder.tokenizer("horn", add_special_tokens=False)["input_ids"]
    start = task.network.weight.detach().clone()
    table = model.encoder.model.get_input_embeddings().weight
    torch.testing.assert_close(start[0], table[ids].mean(0))
    assert len(ids) == 4 and sum(p.numel() for p in task.network.parameters()) == 32
    before = copy.deepcopy([task.unet.state_dict(), task.encoder.model.state_dict()])
    learn(task, 3)
    assert all(map(equal, before, [task.unet.state_dict(), task.encoder.model.state_dict()]))
    assert (task.network.weight - start).abs().min() > 0

    new = sample.load_model(written(task, tmp_path / "model"), "cpu")
    assert load_file(tmp_path / "model" / WORDS).keys() == {"<kazoo>"}
    assert equal(new.unet.state_dict(), model.unet.state_dict())
    # No caption without the word has changed, to the bit; with it, states are those in training.
    captions = ["the sound of a horn", "the sound of <kazoo>", "a <kazoo>, and rain"]
    assert torch.equal(new.encoder(captions[:1])[0], model.encoder(captions[:1])[0])
    task.loss(task.network, *task.batch(0, range(2), [0, 1]))
    torch.testing.assert_close(new.encoder(captions)[0], task.encoder(captions)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_goes_through_any_text_encoder(kind, root, begin, tmp_path):
    """Against the difference that a small step of the embedding makes."""
    adapt.write_model(tmp_path / "model", root / "model")
    for part in build(kind):
        part.save_pretrained(tmp_path / "model" / "text_encoder")
    about = json.loads((tmp_path / "model" / "model.json").read_text())
    about = json.dumps(about | {"text_encoder": "text_encoder"})
    (tmp_path / "model" / "model.json").write_text(about)
    options = ["--token", "<kazoo>", "--word", "a horn"]
    task = begin("textual-inversion", *options, model=tmp_path / "model")
    weights = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def out(rows, caption="a <kazoo> far off"):
        network = torch.nn.Embedding.from_pretrained(rows, freeze=False)
        task.loss(network, *task.batch(0, range(1), [0]))
        return network, (task.encoder([caption])[0] * weights).sum()

    rows, step = task.network.weight.detach(), torch.linspace(-1e-3, 1e-3, 32)[None]
    network, value = out(rows)
    (gradient,) = torch.autograd.grad(value, network.weight)
    difference = (out(rows + step)[1] - out(rows - step)[1]) / 2
    assert (gradient * step).sum().item() == pytest.approx(difference.item(), rel=0.05)
    assert torch.equal(out(rows, "a dog")[1], out(rows + step, "a dog")[1])
    # The hash that says which text encoder words are for doesn't depend on them.
    folder = str(tmp_path / "model" / "text_encoder")
    assert adapt.table_hash(task.encoder) == adapt.table_hash(TextEncoder(folder))


def test_words_for_labels_and_one_more_word(root, begin, tmp_path):
    task = begin("textual-inversion", "--each-label", "--table", root / "table.csv")
    assert task.c.words == {"<horn>": "Horn", "<brass_band>": "Brass band"}
    assert task.data.record(0)["captions"][0] == "The sound of <horn>, <brass_band>"
    assert task.data.record(1)["captions"] == [t.format("<horn>") for t in adapt.TEMPLATES]
    first = written(task, tmp_path / "first")
    task = begin("textual-inversion", "--token", "<zurna>", model=first, out="run-2")
    second = written(task, tmp_path / "second")
    words = load_file(second / WORDS)
    assert words.keys() == {"<horn>", "<brass_band>", "<zurna>"}
    assert torch.equal(words["<horn>"], load_file(first / WORDS)["<horn>"])
    task.loss(task.network, *task.batch(0, range(2), [0, 1]))
    states, _ = sample.load_model(second, "cpu").encoder(["<zurna> and <horn>"])
    torch.testing.assert_close(states, task.encoder(["<zurna> and <horn>"])[0])
    # A LoRA of its own leaves the words as they are.
    task = begin("lora", "--caption", "<zurna>", model=second, out="run-3")
    assert equal(load_file(written(task, tmp_path / "third") / WORDS), words)


# ---- LoRA ----------------------------------------------------------------------------------------


def test_lora_begins_as_the_model_itself(root, begin):
    task, unet = begin("lora"), UNet.from_pretrained(root / "model")
    # One transformer down, two up, one in the middle: eight projections each.
    assert len(task.layers) == 4 * 8 and "mid_block.attentions.0" in " ".join(task.layers)
    batch = task.batch(0, range(2), [0, 1])
    assert torch.equal(task.loss(task.network, *batch), Denoiser.loss(task, unet, *batch))
    learn(task, 2)
    originals = [unet.get_submodule(name).weight for name in task.layers]
    assert all(map(torch.equal, task.originals, originals))
    rest = task.unet.state_dict()  # all but the weights that LoRA changes
    assert equal(rest, {k: v for k, v in unet.state_dict().items() if k in rest})
    assert min(B.weight.abs().max() for _, B in task.network) > 0
    found = []
    for checkpointing in (False, True):
        task.c = replace(task.c, gradient_checkpointing=checkpointing)
        loss = task.loss(task.network, *batch).mean()
        found.append(torch.autograd.grad(loss, [*task.network.parameters()]))
    torch.testing.assert_close(*found)


def test_diffusers_and_peft_read_and_write_what_we_do(root, begin, tmp_path):
    peft = pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(1)
    x_t, text = (torch.randn(2, *shape, generator=generator) for shape in ((128, 24, 21), (7, 32)))
    t, mask = torch.tensor([3, 600]), (torch.arange(7) < 5).expand(2, 7)

    def compare(ours, theirs):
        with torch.no_grad():
            out = theirs(x_t, t, text, encoder_attention_mask=mask).sample
            torch.testing.assert_close(ours(x_t, t, text, mask), out, rtol=1e-4, atol=1e-4)

    task = begin("lora")
    for p in task.network.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    folder = written(task, tmp_path / "model")
    task.loss(task.network, *task.batch(0, range(2), [0, 1]))
    theirs = UNet2DConditionModel.from_pretrained(root / "model" / "unet")
    theirs.load_lora_adapter(str(folder), weight_name=LORA, prefix="unet")
    compare(UNet.from_pretrained(folder), theirs)
    compare(task.unet, theirs)  # and that is what was trained

    # The other way: files of theirs, whose α isn't the rank, and whose layers differ in both.
    patterns = {"rank_pattern": {"attn1.to_q": 5}, "alpha_pattern": {"up_blocks.*to_q": 3}}
    for more in ({}, patterns, {"use_rslora": True}):
        theirs = UNet2DConditionModel.from_pretrained(root / "model" / "unet")
        options = {"r": 2, "lora_alpha": 8, "init_lora_weights": False} | more
        theirs.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_out.0"], **options))
        theirs.save_lora_adapter(tmp_path / "theirs")
        ours = UNet.from_pretrained(root / "model")
        adapt.add_lora(ours, tmp_path / "theirs" / LORA)
        compare(ours, theirs)


@pytest.mark.parametrize(
    "about, name, complaint",
    [
        ({"use_dora": True}, "lora_A", "use_dora"),
        ({"fan_in_fan_out": True}, "lora_A", "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "lora_A", "of other base weights"),
        ({}, "lora_down", "lora_down"),  # kohya's
        ({}, "lora_magnitude_vector", "expected NAME.lora_A.weight"),
    ],
)
def test_other_kinds_of_lora_are_refused_by_name(about, name, complaint, root, tmp_path):
    unet = UNet.from_pretrained(root / "model")
    layer = next(n for n in unet.state_dict() if n.endswith("attn1.to_q.weight"))[:-7]
    tensors = {f"unet.{layer}.lora_A.weight": torch.ones(2, 32)}
    tensors[f"unet.{layer}.lora_B.weight"] = torch.ones(32, 2)
    tensors[f"unet.{layer}.{name}.weight"] = torch.ones(2, 32)
    about = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2} | about)}
    save_file(tensors, tmp_path / "l.safetensors", about)
    with pytest.raises(ValueError, match=rf"l.safetensors: .*{complaint}"):
        adapt.add_lora(unet, tmp_path / "l.safetensors")


# ---- DreamBooth ----------------------------------------------------------------------------------


def test_half_of_dreambooth_are_own_clips_with_their_weight(root, begin, tmp_path):
    task = begin("dreambooth", *OPTIONS["dreambooth"], "--prior-weight", "0.25")
    captions = [task.data.record(i)["captions"][0] for i in range(len(task.data))]
    assert captions == ["The sound of sks horn"] * 4 + ["The sound of horn"] * 4
    # The clips are what the model makes of the class; other settings are another data set.
    options = {"steps": 2, "indices": [1], "precision": "fp32"}
    wave = sample.generate(sample.load_model(root / "model"), ["The sound of horn"], **options)
    assert torch.equal(task.codec.encode(wave), task.data.stored([5]))
    with pytest.raises(ValueError, match="begun with another table"):
        begin("dreambooth", "--token", "sks", "--word", "drum", *OPTIONS["dreambooth"][4:])

    _, *rest = task.batch(0, range(2), [0, 5])
    batch = [captions[0], captions[5]], *rest
    plain = Denoiser.loss(task, task.network, *batch)
    assert torch.equal(task.loss(task.network, *batch), plain * torch.tensor([1, 0.25]))

    c = replace(task.c, rank=2, prior_weight=0.0)  # with LoRA
    task = adapt.DreamBoothLoRA(c, torch.device("cpu"))
    assert task.loss(task.network, *batch)[1] == 0
    assert len(load_file(written(task, tmp_path / "model") / LORA)) == 64


# ---- the loop, model folders, the command --------------------------------------------------------


def test_commands(root, tmp_path, monkeypatch, capsys):
    """Each method from its command line; two of its results together; and their sounds."""
    monkeypatch.chdir(tmp_path)
    shared = f"--model {root}/model --device cpu --steps 2 --batch-size 2 --warmup-steps 0"
    for method, options in OPTIONS.items():
        adapt.main([method, *shared.split(), "--audio", f"{root}/audio", *options])
        assert capsys.readouterr().out.splitlines()[-1] == f"runs/{method}/model"
    words, lora = f"runs/textual-inversion/model/{WORDS}", f"runs/lora/model/{LORA}"
    adapt.main(f"merge --model {root}/model --words {words} --lora {lora} {lora}:-0.5 {lora}:0.5 "
               "--out both".split())  # fmt: skip
    assert equal(load_file(f"both/{WORDS}"), load_file(words)) and not Path(f"both/{LORA}").exists()
    both, once, model = map(UNet.from_pretrained, ("both", "runs/lora/model", root / "model"))
    torch.testing.assert_close(both.state_dict(), once.state_dict())
    assert not equal(both.state_dict(), model.state_dict())
    sample.main("<kazoo> --model both --device cpu --steps 2 --out a.wav".split())
    data = "--data runs/dreambooth/data --out runs/again --val-clips 1"  # what is stored already
    adapt.main(["lora", *shared.split(), *data.split()])
    assert "7 clips" in capsys.readouterr().out


def test_mistakes(root, begin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    audio, base = f"--audio {root}/audio --model {root}/model", f"merge --model {root}/model --out"
    words = written(begin("textual-inversion"), tmp_path / "a") / WORDS
    lora = written(begin("lora", out="run-2"), tmp_path / "b") / LORA
    tensors = load_file(lora)
    name = sorted(tensors)[0].partition(".lora_")[0]
    for file, data in (
        ("x", b"x"),
        ("other", save(load_file(words), {"text_encoder": "of the same sizes"})),
        ("half", save({k: v for k, v in tensors.items() if "_B" not in k})),
        ("wide", save(tensors | {f"{name}.lora_A.weight": torch.zeros(3, 9)})),
        ("more", save(tensors | {f"{name}.lora_C.weight": torch.zeros(1)})),
    ):
        Path(file).write_bytes(data)
    for arguments, part, status in (
        (f"lora {audio} --caption x --rank 0", "--rank: 0: expected 1 to inf", 2),
        ("merge --out x --lr 1", "unrecognized arguments: --lr", 2),
        (f"textual-inversion {audio} --each-label", "no labels", 1),
        (f"textual-inversion {audio} --token <k> --word 3☃", "'3☃': not words that", 1),
        (f"{base} .", "exists", 1),
        (f"{base} new --words x", "x: damaged, or no safetensors", 1),
        (f"{base} new --words other", "other: no new words", 1),
        (f"merge --model a --words {words} --out new", "no new words", 1),  # it has them
        (f"{base} new --lora half", "half: .* doesn't fit", 1),
        (f"{base} new --lora wide", f"wide: .* {name} doesn't fit", 1),
        (f"{base} new --lora more", "more: .* and no more", 1),
    ):
        with pytest.raises(SystemExit) as e:
            adapt.main(arguments.split())
        message = capsys.readouterr().err.splitlines()[-1] if status == 2 else e.value.code
        assert re.search(f"error: .*{part}", message) and (status == 1 or e.value.code == 2)
        assert not Path("new").exists()
