"""LlamaGen: a Llama that draws classes or words, code after code (Sun et al. 2024, arXiv 2406.06525).

    {class} 256 codes            a picture;        {1000} 256 codes                guidance's other branch
    {words}</s> 1024 codes       a picture;        the last of 120 vectors, as many as the pieces, 1024 codes

    engine = unigen.load("FoundationVision/LlamaGen:c2i_B_256")       # and every other c2i_* there
    engine.generate(207)
    engine = unigen.load("peizesun/llamagen_t2i:t2i_XL_stage2_512")   # and t2i_XL_stage1_256
    engine.generate("a blue car in front of a yellow wall")

Rotary positions are of two dimensions: the first half of a head turns with the row of a code, the second with its
column; the condition has none, its queries and keys are multiplied by zero. Classes stand before the codes in our
vocabulary, or T5's pieces and then the vectors of no words. Words are read by the encoder of flan-t5-xl, which is not
in LlamaGen's repository: it is looked for in the model's folder (flan-t5-xl/), else fetched from the hub. LlamaGen pads
its features to 120 on the left and hides the padding; as the condition has no positions, here it is left out. Public
weights: not run here.

Shapes: B rows, L positions, D width, E head width, F width of the text encoder.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

import torch
from torch import Tensor, nn

from unigen.batch import Tokens, Vocabulary
from unigen.config import save_json
from unigen.document import Document
from unigen.generators.base import Generator
from unigen.generators.next_token import NextToken
from unigen.hub.resolve import CONFIG, MANIFEST, fetch_snapshot, find_component, read_json
from unigen.hub.weights import load_strict, read_tensors, read_weights, rename_key, select_checkpoint, write_tensors
from unigen.model.template import ClassTemplate, ImageOnlyTemplate, Output, UnsupportedError
from unigen.model.unified import UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.nn.cache import SlotCache
from unigen.tokenizers import ImageTokenizer, load_image_tokenizer, text, vqgan

if TYPE_CHECKING:
    from transformers import LlamaConfig

ROPE_THETA = 10_000.0
HEAD_DIMS = {768: 64, 1024: 64, 1280: 64, 1536: 64, 2048: 64, 2560: 64, 3200: 100, 4096: 128}
"""Width of a head by the width of the model, for all published sizes (B to XXXL, 1B to 7B); the checkpoints do not
store the number of heads."""
TOKENIZERS = {"c2i": "vq_ds16_c2i.pt", "t2i": "vq_ds16_t2i.pt"}
"""Of models that draw classes, and words."""
STRIDE = 16
TEXT_ENCODER, TEXT_FOLDER = "google/flan-t5-xl", "flan-t5-xl"
"""Where the hub has what reads words, and where a model's folder may have it."""
DEFAULT_SAMPLING = {
    "c2i": {"guidance": 4.0, "temperature": 1.0, "top_k": 2000},
    "t2i": {"guidance": 7.5, "temperature": 1.0, "top_k": 1000},
}
VLLM_UNSUPPORTED = "its rotary positions have two axes, which no class of vLLM has"
MULTI_MODEL_REPOS = {
    "FoundationVision/LlamaGen": {
        name: (f"{name}.pt", TOKENIZERS["c2i"])
        for name in ("c2i_B_256", "c2i_B_384", "c2i_L_256", "c2i_L_384", "c2i_XL_384", "c2i_XXL_384", "c2i_3B_384")
    },
    "peizesun/llamagen_t2i": {
        name: (f"{name}.pt", TOKENIZERS["t2i"]) for name in ("t2i_XL_stage1_256", "t2i_XL_stage2_512")
    },
}
"""Repositories of the hub that hold several models: the files of each."""
WEIGHT_PATTERNS = ("[ct]2i_*.pt", *TOKENIZERS.values())
"""Files by which a folder is known."""


class Rotary2D(nn.Module):
    """cos and sin (B, L, E) of positions: the condition's are zero, a code's are of its row and its column.

    theta_p = base^(-2p / (E/2)), p = 0 .. E/4 - 1; pair p turns by row theta_p, pair E/4 + p by column theta_p.
    """

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        half_width = width // 2
        theta = ROPE_THETA ** (-torch.arange(0, half_width, 2).float() / half_width)
        turns = torch.outer(torch.arange(side).float(), theta)  # (side, E/4)
        rows, columns = turns[:, None].expand(-1, side, -1), turns[None].expand(side, -1, -1)
        angles = torch.cat((rows, columns), -1).flatten(0, 1)  # (side * side, E/2)
        angles = torch.cat((angles, angles), -1)
        zeros = torch.zeros(1, width)
        self.register_buffer("cos", torch.cat((zeros, angles.cos())), persistent=False)
        self.register_buffer("sin", torch.cat((zeros, angles.sin())), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    @torch.no_grad()
    def forward(self, x_BLD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions_BL = position_ids.clamp(max=len(self.cos) - 1)  # rows that are done go on reading
        return self.cos[positions_BL].to(x_BLD.dtype), self.sin[positions_BL].to(x_BLD.dtype)


class LlamaGenBackbone(Backbone):
    """A Llama whose table and head are of codes alone. before: how many ids, of what pictures are drawn from, stand
    before them."""

    def __init__(self, lm: Any, num_condition_ids: int, side: int) -> None:
        super().__init__(lm)
        self.num_condition_ids = num_condition_ids
        lm.model.rotary_emb = Rotary2D(side, lm.config.head_dim)

    def embed_condition(self, ids_BL: Tensor) -> Tensor:
        """Embeddings (B, L, D) of the ids before the codes; of codes anything."""
        raise TypeError("a backbone of LlamaGen's defines condition()")

    def embed(self, ids_BL: Tensor) -> Tensor:
        codes_BL = ids_BL - self.num_condition_ids
        table = self.lm.get_input_embeddings()
        if bool((codes_BL >= 0).all()):
            return table(codes_BL)  # type: ignore[no-any-return]
        return torch.where((codes_BL >= 0)[..., None], table(codes_BL.clamp(min=0)), self.embed_condition(ids_BL))

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return super().logits(
            hidden, max(0, start - self.num_condition_ids), None if stop is None else stop - self.num_condition_ids
        )


class ClassBackbone(LlamaGenBackbone):
    """Before the codes stand classes."""

    def __init__(self, lm: Any, classes: int, side: int) -> None:
        super().__init__(lm, classes, side)
        self.classes = nn.Embedding(classes, self.width)

    def embed_condition(self, ids_BL: Tensor) -> Tensor:
        return self.classes(ids_BL.clamp(max=self.num_condition_ids - 1))  # type: ignore[no-any-return]


class TextBackbone(LlamaGenBackbone):
    """Before the codes stand the pieces of T5, whose encoder reads each prompt up to its end, and `most` vectors that
    are read where there are no words; two layers take what T5 makes of them to the Llama. T5 is frozen."""

    def __init__(self, lm: Any, settings: Mapping[str, Any], max_prompt_length: int, side: int) -> None:
        from transformers import T5Config, T5EncoderModel

        config = T5Config(**{**settings, "dropout_rate": 0.0})
        if not isinstance(config.eos_token_id, int):
            raise ValueError(f"the config of T5 has no id of its end (eos_token_id): {config.eos_token_id!r}")
        self.text_vocab_size, self.max_prompt_length = config.vocab_size, max_prompt_length
        self.eos_id, self.num_codes = config.eos_token_id, side * side
        super().__init__(lm, self.text_vocab_size + max_prompt_length, side)
        self.encoder = T5EncoderModel(config).encoder.requires_grad_(False)
        self.wordless = nn.Embedding(max_prompt_length, config.d_model).requires_grad_(False)
        self.project = nn.Sequential(
            nn.Linear(config.d_model, self.width, bias=False),
            nn.GELU("tanh"),
            nn.Linear(self.width, self.width, bias=False),
        )

    def embed_condition(self, ids_BL: Tensor) -> Tensor:
        f_BLF = self.wordless((ids_BL - self.text_vocab_size).clamp(0, self.max_prompt_length - 1))
        for row, start, stop in self.prompt_spans(ids_BL):
            encoded_1LF = self.encoder(input_ids=ids_BL[row : row + 1, start:stop]).last_hidden_state
            f_BLF[row, start:stop] = encoded_1LF[0].to(f_BLF.dtype)
        return self.project(f_BLF)  # type: ignore[no-any-return]

    def prompt_spans(self, ids_BL: Tensor) -> Iterator[tuple[int, int, int]]:
        """Row, start and stop of every run of pieces that has an end; what has none is padding."""
        for row, ids in enumerate(ids_BL.tolist()):
            start = 0
            for index, id in enumerate(ids):
                if id == self.eos_id:
                    yield row, start, index + 1
                if id == self.eos_id or id >= self.text_vocab_size:
                    start = index + 1

    def forward_cached(
        self, embeds_BLD: Tensor, positions_BL: Tensor, mask: Tensor, cache: SlotCache | None = None
    ) -> Tensor:
        """Codes are counted from the end of the prompt. That is what a slot held when it was first read again."""
        assert cache is not None
        for row, length in zip(cache.step.slots, cache.step.lengths, strict=True):
            if length:
                cache.slot_state.setdefault(row, torch.tensor(length))
        step_end = torch.tensor(positions_BL.shape[1])  # a prompt that is being read ends with the step
        prompts_B = torch.stack([cache.slot_state.get(row, step_end) for row in cache.step.slots]).to(
            positions_BL.device
        )
        places_BL = (positions_BL - prompts_B[:, None] + 1).clamp(min=0)
        return super().forward_cached(embeds_BLD, places_BL, mask, cache)

    def forward_packed(
        self, embeds_BLD: Tensor, positions_BL: Tensor, segments_BL: Tensor, attend_until_BL: Tensor | None = None
    ) -> Tensor:
        """The same of documents that end in a whole picture."""
        lengths_BL = (segments_BL[:, :, None] == segments_BL[:, None]).sum(-1)
        places_BL = (positions_BL - lengths_BL + self.num_codes + 1).clamp(min=0)
        return super().forward_packed(embeds_BLD, places_BL, segments_BL, attend_until_BL)


_DOMAIN_SUFFIX = r"(?:[\w-]+\.)*(?:com|co|ru|net|org|edu|gov|it|png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
"""What follows a dot in an address, and in the name of a file."""
_PUNCTUATION_RULES = (
    (r"[-\u2010-\u2015]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~(){}|\\/*\[\]]+", " "),
    (r"\s+\.\s+", " "),
)
_SPACE_RULES = (
    (r"\b\s+:\s+", ": "),
    (rf"(\D(?:,|\.(?!{_DOMAIN_SUFFIX}\b)))\b", r"\1 "),
    (r"\s+", " "),
)
_EDGE_RULES = (
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
)
"""What captions were rid of in training, as far as prompts have it, in this order; between the first two hyphens, where
there are more than three."""


def clean_caption(words: str) -> str:
    """The words as captions were in training: lower case, typographic marks made plain, others left out, plus signs as
    spaces. Differently, what else captions of the web were rid of is read here: addresses and names of files and people
    (x.com, a.png, @me), numbers of articles and pages, sizes (3x4), names as r2d2, words of shops (free shipping),
    Chinese characters; marks in them are made plain like all others. Entities (&amp;) and damaged letters are not
    repaired."""
    for _ in range(2):  # as in training
        words = unquote_plus(words).strip().lower()
        for pattern, replacement in _PUNCTUATION_RULES:
            words = re.sub(pattern, replacement, words)
        if len(re.findall(r"[-_]", words)) > 3:
            words = re.sub(r"[-_]", " ", words)
        words = words.strip()
        for pattern, replacement in (*_SPACE_RULES, *_EDGE_RULES):
            words = re.sub(pattern, replacement, words)
        words = words.strip()
    return words


class TextTemplate(ImageOnlyTemplate):
    """Of models that draw words: a prompt is T5's pieces and its end, at most `most`; guidance's other branch as many
    of the vectors that stand after the pieces, the last ones."""

    def __init__(
        self, tokenizer: Any, eos_id: int, text_vocab_size: int, max_prompt_length: int, num_codes: int
    ) -> None:
        super().__init__(tokenizer, num_codes)
        self.eos_id, self.text_vocab_size, self.max_prompt_length = eos_id, text_vocab_size, max_prompt_length

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        if any(segment.image is not None for segment in document.segments):
            raise UnsupportedError("llamagen draws from words alone: leave the picture out")
        if any(segment.label is not None for segment in document.segments):
            raise ValueError("this model draws words, not classes: say what to draw in words")
        text_folder = clean_caption(" ".join((segment.text or "").strip() for segment in document.segments))
        tokens = text.PromptBuilder(self.tokenizer).add_user_text(text_folder).add_ids([self.eos_id]).build()
        if len(tokens) > self.max_prompt_length:
            raise ValueError(
                f"the prompt has {len(tokens)} pieces, the model reads {self.max_prompt_length}: shorten it"
            )
        if branch:
            last = self.text_vocab_size + self.max_prompt_length
            tokens.ids = list(range(last - len(tokens), last))
        return tokens


# what a tensor is called in a public file, and here
_KEY_RENAMES = (
    ("cls_embedding.embedding_table.", "classes."),
    ("cls_embedding.uncond_embedding", "wordless.weight"),
    ("cls_embedding.cap_proj.fc1.", "project.0."),
    ("cls_embedding.cap_proj.fc2.", "project.2."),
    ("tok_embeddings.", "lm.model.embed_tokens."),
    ("output.", "lm.lm_head."),
    ("norm.", "lm.model.norm."),
    ("layers.", "lm.model.layers."),
)
_LAYER_KEYS = (
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".attention.wqkv.", ".self_attn.qkv_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
)
_T5_KEYS = (("shared.", "encoder.embed_tokens."),)
"""Of T5, in its own folder and here."""


def permute_rotary(weight: Tensor, head_dim: int, back: bool = False) -> Tensor:
    """Rows of queries or keys with the pairs that turn together half a head apart, not side by side (or back)."""
    shape = (-1, 2, head_dim // 2) if back else (-1, head_dim // 2, 2)
    return weight.unflatten(0, shape).transpose(1, 2).flatten(0, 2).contiguous()


def infer_head_dim(state: Mapping[str, Tensor], config: Mapping[str, Any], source: Path) -> int:
    """How wide a head of attention is: of the file's table of positions, of `n_head` in the folder's config.json, or
    as in the published model of this width; a width that is none of theirs is taken to have heads of 64, and said."""
    width = state["tok_embeddings.weight"].shape[1]
    if "freqs_cis" in state:
        return 2 * state["freqs_cis"].shape[1]
    if "n_head" in config:
        heads = config["n_head"]
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise ValueError(f"{source.parent / CONFIG}: n_head {heads!r} does not divide a width of {width}")
        return width // heads
    if width not in HEAD_DIMS:
        warnings.warn(
            f"{source}: no published LlamaGen is {width} wide, its heads are taken to be 64 wide; "
            'if they are not, say so in config.json beside it, as {"n_head": 16}',
            stacklevel=2,
        )
    return HEAD_DIMS.get(width, 64)


def from_public(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """The tensors of a public file by their names here. Keys and values may have fewer heads than queries."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "freqs_cis":
            continue
        name = rename_key(name, _KEY_RENAMES, _LAYER_KEYS)
        if ".qkv_proj." in name:
            queries = tensor.shape[1]
            query, key, value = tensor.split([queries, *[(len(tensor) - queries) // 2] * 2])
            parts = {"q": permute_rotary(query, head_dim), "k": permute_rotary(key, head_dim), "v": value}
            ours |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts.items()}
        else:
            ours[name] = tensor
    return ours


def to_public(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """The same tensors by their public names."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("encoder.") or re.search(r"\.[kv]_proj\.", name):
            continue  # has a folder of its own, or goes with the queries
        if ".q_proj." in name:
            key, value = (state[name.replace("q_proj", f"{part}_proj")] for part in "kv")
            tensor = torch.cat(
                (permute_rotary(tensor, head_dim, back=True), permute_rotary(key, head_dim, back=True), value)
            )
            name = name.replace("q_proj", "qkv_proj")
        theirs[rename_key(name, _KEY_RENAMES, _LAYER_KEYS, inverse=True)] = tensor
    return theirs


def matches(folder: Path, config: dict[str, Any]) -> bool:
    """A folder with a file of a model, or of its image tokenizer, and without the config.json of another."""
    has_weight_file = any(
        list(folder.glob(f"{kind}_*.pt")) or (folder / file).is_file() for kind, file in TOKENIZERS.items()
    )
    return has_weight_file and config.get("model_type") in (None, "llamagen")


@dataclass
class _Checkpoint:
    """What a folder of either layout holds."""

    kind: str
    """ "c2i" draws classes, "t2i" words."""
    config: LlamaConfig
    state: dict[str, Tensor]
    """Tensors of the backbone by their names here."""
    image_tokenizer: ImageTokenizer
    text_folder: Path
    """Has the text tokenizer, of models that draw words."""


def load(folder: Path, dtype: torch.dtype | None, variant: str | None = None) -> UnifiedModel:
    """The model in a folder, in the public layout or in ours. No tensor may be missing or left over.

    Args:
        folder: of the model.
        dtype: of the weights; None: as they are stored.
        variant: the name of the file, where there are several.

    Raises:
        ValueError: the folder holds no such model, or is damaged.
    """
    from transformers import LlamaForCausalLM
    from transformers.initialization import no_init_weights

    checkpoint = _read_saved(folder) if (folder / MANIFEST).is_file() else _read_public(folder, variant)
    state, image_tokenizer = checkpoint.state, checkpoint.image_tokenizer
    side, tokenizer = image_tokenizer.grid[0], None
    weight_dtype = dtype or state["lm.lm_head.weight"].dtype
    backbone: LlamaGenBackbone
    template: ClassTemplate | TextTemplate
    with no_init_weights():
        lm = LlamaForCausalLM._from_config(checkpoint.config, attn_implementation="sdpa")
        if checkpoint.kind == "c2i":
            backbone = ClassBackbone(lm, len(state["classes.weight"]), side)
            template = ClassTemplate(backbone.num_condition_ids - 1, side * side)
        else:
            read_json(checkpoint.text_folder / "tokenizer.json")  # without it a tokenizer of no words would be made
            tokenizer = text.load(checkpoint.text_folder, newlines=False)
            max_prompt_length = len(state["wordless.weight"])
            backbone = TextBackbone(lm, checkpoint.config.t5, max_prompt_length, side)
            template = TextTemplate(
                tokenizer, backbone.eos_id, backbone.text_vocab_size, max_prompt_length, side * side
            )
    backbone.to(weight_dtype)
    if isinstance(backbone, TextBackbone) and weight_dtype == torch.float16:
        backbone.encoder.float()  # whose sums are too large for float16
    load_strict(backbone, state, folder)
    generators: dict[str, Generator] = {"next-token": NextToken(image_tokenizer.grid)}
    vocabulary = Vocabulary(backbone.num_condition_ids, image_tokenizer.codebook_size, separate_head=True)
    model = UnifiedModel("llamagen", backbone, vocabulary, tokenizer, image_tokenizer, template, generators)
    model.set_default_sampling("next-token", **DEFAULT_SAMPLING[checkpoint.kind])
    return model


def _read_saved(folder: Path) -> _Checkpoint:
    """A folder in our layout."""
    from transformers import LlamaConfig

    image_tokenizer = load_image_tokenizer(folder / "image_tokenizer")
    config = LlamaConfig(**read_json(folder / CONFIG))
    if "hidden_size" not in read_json(folder / CONFIG):  # a class's defaults are a model of billions
        raise ValueError(f"{folder / CONFIG} has no hidden_size: it is damaged")
    state = {f"lm.{name}": tensor for name, tensor in read_weights(folder).items()}
    state |= read_tensors(folder / "backbone" / "model.safetensors")
    kind = "c2i" if "classes.weight" in state else "t2i"
    return _Checkpoint(kind, config, state, image_tokenizer, folder)


def _read_public(folder: Path, variant: str | None) -> _Checkpoint:
    """A folder in the public layout: a file of the model, one of its image tokenizer, T5 beside them."""
    if not list(folder.glob(WEIGHT_PATTERNS[0])):
        raise ValueError(f"{folder} has no model beside its image tokenizer: a file named like c2i_B_256.pt")
    path = select_checkpoint(folder, WEIGHT_PATTERNS[0], variant)
    kind, text_folder = path.stem[:3], folder
    public_state = read_tensors(path)
    size = re.search(r"_(\d+)$", path.stem)
    said = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if not size or int(size[1]) % STRIDE:
        raise ValueError(f"{path.name}: the size of its pictures has to end the name, as in c2i_B_256.pt")
    image_tokenizer = vqgan.from_public(read_tensors(folder / TOKENIZERS[kind]), int(size[1]), "llamagen")
    config = _infer_config(public_state, kind, image_tokenizer.grid[0] ** 2, said, path)
    assert config.head_dim is not None
    state = from_public(public_state, config.head_dim)
    if kind == "t2i":
        text_folder = find_component(
            folder, f"{TEXT_FOLDER}/", "the text encoder", lambda: fetch_snapshot(TEXT_ENCODER)
        )
        config.t5 = read_json(text_folder / CONFIG)
        if "d_model" not in config.t5:
            raise ValueError(f"{text_folder / CONFIG} has no d_model: it is no T5's, or damaged")
        state |= load_text_encoder_state(text_folder)
    return _Checkpoint(kind, config, state, image_tokenizer, text_folder)


def _infer_config(
    public_state: Mapping[str, Tensor], kind: str, num_codes: int, said: Mapping[str, Any], path: Path
) -> LlamaConfig:
    """The config of the language model, read off its tensors.

    Args:
        public_state: tensors by their public names.
        kind: "c2i" or "t2i".
        num_codes: of a picture.
        said: the folder's config.json.
        path: of the file, for errors.
    """
    from transformers import LlamaConfig

    try:
        vocab_size, width = public_state["tok_embeddings.weight"].shape
        intermediate_size = public_state["layers.0.feed_forward.w1.weight"].shape[0]
        table = "embedding_table.weight" if kind == "c2i" else "uncond_embedding"
        num_condition_ids = 1 if kind == "c2i" else len(public_state[f"cls_embedding.{table}"])
        qkv_rows = len(public_state["layers.0.attention.wqkv.weight"])
    except KeyError as error:
        raise ValueError(f"checkpoint {path} has no {error.args[0]}: it is no LlamaGen ({kind})") from error
    head_dim = infer_head_dim(public_state, said, path)
    if width % head_dim or (qkv_rows - width) % (2 * head_dim) or not width < qkv_rows <= 3 * width:
        raise ValueError(f"{path}: queries, keys and values of {qkv_rows} rows are of no heads {head_dim} wide")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=intermediate_size,
        num_hidden_layers=len({name.split(".")[1] for name in public_state if name.startswith("layers.")}),
        num_attention_heads=width // head_dim,
        num_key_value_heads=(qkv_rows - width) // (2 * head_dim),
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=num_condition_ids + num_codes,
        tie_word_embeddings=False,
    )


def load_text_encoder_state(folder: Path) -> dict[str, Tensor]:
    """The encoder's tensors of a folder with T5 by their names here; its decoder's are left."""
    dropped_keys = ("decoder.", "lm_head.", "encoder.embed_tokens.")  # the last are the shared ones once more
    state = read_weights(folder)
    return {rename_key(name, _T5_KEYS): tensor for name, tensor in state.items() if not name.startswith(dropped_keys)}


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the two files of the public layout, and the folder of what reads words beside them."""
    tokenizer, backbone = model.image_tokenizer, model.backbone
    assert isinstance(tokenizer, vqgan.VQGAN)
    kind = "t2i" if isinstance(backbone, TextBackbone) else "c2i"
    state = to_public(backbone.state_dict(), backbone.lm.config.head_dim)
    torch.save({"model": state}, folder / f"{kind}_model_{tokenizer.image_size}.pt")
    torch.save({"model": vqgan.to_public(tokenizer, "llamagen")}, folder / TOKENIZERS[kind])
    heads = backbone.lm.config.num_attention_heads
    save_json(folder / CONFIG, {"model_type": "llamagen", "n_head": heads})
    if isinstance(backbone, TextBackbone):
        text_folder = folder / TEXT_FOLDER
        text.save(model.text_tokenizer, text_folder)
        save_json(text_folder / CONFIG, backbone.lm.config.t5)
        encoder_state = {f"encoder.{name}": tensor for name, tensor in backbone.encoder.state_dict().items()}
        write_tensors(
            text_folder / "model.safetensors",
            {rename_key(k, _T5_KEYS, inverse=True): v for k, v in encoder_state.items()},
        )
