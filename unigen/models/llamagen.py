"""LlamaGen: a Llama that generates images by class or from text, code after code (Sun et al. 2024, arXiv 2406.06525).

    {class} 256 codes            a picture;        {1000} 256 codes                the unconditional branch
    {words}</s> 1024 codes       a picture;        the last of 120 vectors, as many as the pieces, 1024 codes

    engine = unigen.load("FoundationVision/LlamaGen:c2i_B_256")       # and every other c2i_* there
    engine.generate(207)
    engine = unigen.load("peizesun/llamagen_t2i:t2i_XL_stage2_512")   # and t2i_XL_stage1_256
    engine.generate("a blue car in front of a yellow wall")

Rotary positions have two axes: the first half of a head rotates by the row of a code, the second by its column. The
condition has no position: its queries and keys are multiplied by zero. In our vocabulary the ids of classes precede
those of codes, or the ids of T5's pieces and then of the unconditional vectors do. Words are encoded by flan-t5-xl,
which is not in LlamaGen's repository: it is looked for in the model's folder (flan-t5-xl/), else fetched from the hub.
LlamaGen pads T5's features to 120 on the left and masks the padding. As the condition has no positions, the padding is
left out here. Public weights: not run here.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unigen.batch import Tokens, Vocabulary
from unigen.document import Document
from unigen.generators.base import Generator
from unigen.generators.next_token import NextToken
from unigen.hub.resolve import CONFIG, MANIFEST, fetch_snapshot, find_component, read_json
from unigen.hub.weights import load_strict, read_tensors, read_weights, rename_key, select_checkpoint, write_tensors
from unigen.model.template import ClassTemplate, ImageOnlyTemplate, Output, UnsupportedError
from unigen.model.unified import UnifiedModel
from unigen.nn.llamagen import ClassBackbone, LlamaGenBackbone, TextBackbone
from unigen.tokenizers import ImageTokenizer, load_image_tokenizer, text, vqgan
from unigen.utils.captions import clean_caption
from unigen.utils.files import save_json

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

HEAD_DIMS = {768: 64, 1024: 64, 1280: 64, 1536: 64, 2048: 64, 2560: 64, 3200: 100, 4096: 128}
"""Head width by model width, for all published sizes (B to XXXL, 1B to 7B). The checkpoints do not store the number of
heads."""
TOKENIZERS = {"c2i": "vq_ds16_c2i.pt", "t2i": "vq_ds16_t2i.pt"}
"""Files of the image tokenizers of class-conditional and text-conditional models."""
STRIDE = 16
"""Pixels per code along a side."""
TEXT_ENCODER, TEXT_FOLDER = "google/flan-t5-xl", "flan-t5-xl"
"""The text encoder's repository on the hub, and its folder in a model's folder."""
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
"""Repositories of the hub that hold several models: the files of each, by variant."""
WEIGHT_PATTERNS = ("[ct]2i_*.pt", *TOKENIZERS.values())
"""Patterns of the weight files by which a folder is recognized."""


class TextTemplate(ImageOnlyTemplate):
    """Lays out prompts of text-conditional models: T5's pieces and its end. Guidance's other branch has as many of the
    unconditional vectors, the last ones.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_id: int,
        text_vocab_size: int,
        max_prompt_length: int,
        num_codes: int,
    ) -> None:
        """
        Args:
            tokenizer: T5's.
            eos_id: the id that ends a prompt.
            text_vocab_size: ids of T5; those of the unconditional vectors follow.
            max_prompt_length: the most ids of a prompt, its end among them.
            num_codes: codes of a picture.
        """
        super().__init__(tokenizer, num_codes)
        self.eos_id, self.text_vocab_size, self.max_prompt_length = eos_id, text_vocab_size, max_prompt_length

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """Lay out a document up to where the model goes on; see `Template.prompt`.

        Raises:
            UnsupportedError: the document holds a picture.
            ValueError: it holds a class, or its words are too long.
        """
        if any(segment.image is not None for segment in document.segments):
            raise UnsupportedError("llamagen generates images from text alone: leave the picture out")
        if any(segment.label is not None for segment in document.segments):
            raise ValueError("this model generates images from text, not by class: describe the image in words")
        caption = clean_caption(" ".join((segment.text or "").strip() for segment in document.segments))
        tokens = text.PromptBuilder(self.tokenizer).add_user_text(caption).add_ids([self.eos_id]).build()
        if len(tokens) > self.max_prompt_length:
            raise ValueError(
                f"the prompt has {len(tokens)} pieces, the model reads {self.max_prompt_length}: shorten it"
            )
        if branch:
            stop = self.text_vocab_size + self.max_prompt_length
            tokens.ids = list(range(stop - len(tokens), stop))
        return tokens


_KEY_RENAMES = (
    ("cls_embedding.embedding_table.", "classes."),
    ("cls_embedding.uncond_embedding", "uncond_embedding.weight"),
    ("cls_embedding.cap_proj.fc1.", "text_proj.0."),
    ("cls_embedding.cap_proj.fc2.", "text_proj.2."),
    ("tok_embeddings.", "lm.model.embed_tokens."),
    ("output.", "lm.lm_head."),
    ("norm.", "lm.model.norm."),
    ("layers.", "lm.model.layers."),
)
"""Prefixes of the names of tensors in a public file, and here."""
_LAYER_KEYS = (
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".attention.wqkv.", ".self_attn.qkv_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
)
"""Parts of the names of a layer's tensors in a public file, and here."""
_T5_KEYS = (("shared.", "encoder.embed_tokens."),)
"""Prefixes of the names of T5's tensors in its own folder, and here."""


def permute_rotary(weight: Tensor, head_dim: int, back: bool = False) -> Tensor:
    """Permute rows of queries or keys between the two layouts of rotary pairs.

    Args:
        weight: rows of queries or keys, (heads * head_dim, ...), in which the two of a pair are adjacent.
        head_dim: width of a head.
        back: take a weight in which they are half a head apart, and make them adjacent.

    Returns:
        The weight with the two of a pair half a head apart; adjacent with `back`.
    """
    shape = (-1, 2, head_dim // 2) if back else (-1, head_dim // 2, 2)
    return weight.unflatten(0, shape).transpose(1, 2).flatten(0, 2).contiguous()


def infer_head_dim(state: Mapping[str, Tensor], config: Mapping[str, object], source: Path) -> int:
    """The width of an attention head.

    It follows from the file's table of positions, from `n_head` in the folder's config.json, or from the published
    model of the same width. Where there is none, it is 64, with a warning.

    Args:
        state: tensors by their public names.
        config: the folder's config.json.
        source: of the file, for errors.

    Raises:
        ValueError: `n_head` does not divide the width.
    """
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
    """The tensors of a public file by their names here.

    Args:
        state: tensors by their public names.
        head_dim: width of a head. Keys and values may have fewer heads than queries.
    """
    renamed_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "freqs_cis":
            continue
        name = rename_key(name, _KEY_RENAMES, _LAYER_KEYS)
        if ".qkv_proj." in name:
            query_rows = tensor.shape[1]
            query, key, value = tensor.split([query_rows, *[(len(tensor) - query_rows) // 2] * 2])
            parts = {"q": permute_rotary(query, head_dim), "k": permute_rotary(key, head_dim), "v": value}
            renamed_state |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts.items()}
        else:
            renamed_state[name] = tensor
    return renamed_state


def to_public(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """The tensors of a backbone by their public names, without the text encoder's: the inverse of
    `from_public`."""
    public_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("encoder.") or re.search(r"\.[kv]_proj\.", name):
            continue  # stored in a folder of its own, or with the queries
        if ".q_proj." in name:
            key, value = (state[name.replace("q_proj", f"{part}_proj")] for part in "kv")
            tensor = torch.cat(
                (permute_rotary(tensor, head_dim, back=True), permute_rotary(key, head_dim, back=True), value)
            )
            name = name.replace("q_proj", "qkv_proj")
        public_state[rename_key(name, _KEY_RENAMES, _LAYER_KEYS, inverse=True)] = tensor
    return public_state


def matches(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether the folder has a file of a model or its image tokenizer, and no config.json of another family.

    Args:
        folder: the model folder, without our unigen.json.
        config: the contents of its config.json, {} where there is none.
    """
    has_weight_file = any(
        list(folder.glob(f"{kind}_*.pt")) or (folder / file).is_file() for kind, file in TOKENIZERS.items()
    )
    return has_weight_file and config.get("model_type") in (None, "llamagen")


@dataclass
class _Checkpoint:
    """The contents of a folder in either layout."""

    kind: str
    """Whether the model is class-conditional, "c2i", or text-conditional, "t2i"."""
    config: LlamaConfig
    """The config of the language model; `config.t5` is that of the text encoder."""
    state: dict[str, Tensor]
    """Tensors of the backbone by their names here."""
    image_tokenizer: ImageTokenizer
    text_folder: Path
    """The folder with the text tokenizer of a text-conditional model."""


def load(folder: Path, dtype: torch.dtype | None, variant: str | None = None) -> UnifiedModel:
    """Load the model in a folder, in the public layout or in ours. No tensor may be missing or left over.

    Args:
        folder: of the model.
        dtype: of the weights; None: as they are stored.
        variant: the name of the file without its extension, where there are several.

    Raises:
        ValueError: the folder holds no whole model of this family.
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
            read_json(checkpoint.text_folder / "tokenizer.json")  # without it the tokenizer would be empty
            tokenizer = text.load(checkpoint.text_folder, newlines=False)
            max_prompt_length = len(state["uncond_embedding.weight"])
            backbone = TextBackbone(lm, checkpoint.config.t5, max_prompt_length, side)
            template = TextTemplate(
                tokenizer, backbone.eos_id, backbone.text_vocab_size, max_prompt_length, side * side
            )
    backbone.to(weight_dtype)
    if isinstance(backbone, TextBackbone) and weight_dtype == torch.float16:
        backbone.encoder.float()  # its activations exceed the range of float16
    load_strict(backbone, state, folder)
    generators: dict[str, Generator] = {"next-token": NextToken(image_tokenizer.grid)}
    vocabulary = Vocabulary(backbone.num_condition_ids, image_tokenizer.codebook_size, separate_head=True)
    model = UnifiedModel("llamagen", backbone, vocabulary, tokenizer, image_tokenizer, template, generators)
    model.set_default_sampling("next-token", **DEFAULT_SAMPLING[checkpoint.kind])
    return model


def _read_saved(folder: Path) -> _Checkpoint:
    """The contents of a folder in our layout."""
    from transformers import LlamaConfig

    image_tokenizer = load_image_tokenizer(folder / "image_tokenizer")
    config = LlamaConfig(**read_json(folder / CONFIG))
    if "hidden_size" not in read_json(folder / CONFIG):  # defaults of the class give a model of billions of parameters
        raise ValueError(f"{folder / CONFIG} has no hidden_size: it is damaged")
    state = {f"lm.{name}": tensor for name, tensor in read_weights(folder).items()}
    old_keys = tuple(TextBackbone.OLD_KEYS.items())
    backbone_state = read_tensors(folder / "backbone" / "model.safetensors")
    state |= {rename_key(name, old_keys): tensor for name, tensor in backbone_state.items()}
    kind = "c2i" if "classes.weight" in state else "t2i"
    return _Checkpoint(kind, config, state, image_tokenizer, folder)


def _read_public(folder: Path, variant: str | None) -> _Checkpoint:
    """The contents of a folder in the public layout: a file of the model, one of its image tokenizer, and T5 beside
    them.
    """
    if not list(folder.glob(WEIGHT_PATTERNS[0])):
        raise ValueError(f"{folder} has no model beside its image tokenizer: a file named like c2i_B_256.pt")
    path = select_checkpoint(folder, WEIGHT_PATTERNS[0], variant)
    kind, text_folder = path.stem[:3], folder
    public_state = read_tensors(path)
    size = re.search(r"_(\d+)$", path.stem)
    file_config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if not size or int(size[1]) % STRIDE:
        raise ValueError(f"{path.name}: the size of its pictures has to end the name, as in c2i_B_256.pt")
    image_tokenizer = vqgan.from_public(read_tensors(folder / TOKENIZERS[kind]), int(size[1]), "llamagen")
    config = _infer_config(public_state, kind, image_tokenizer.grid[0] ** 2, file_config, path)
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
    public_state: Mapping[str, Tensor], kind: str, num_codes: int, file_config: Mapping[str, object], path: Path
) -> LlamaConfig:
    """The config of the language model, inferred from the shapes of its tensors.

    Args:
        public_state: tensors by their public names.
        kind: "c2i" or "t2i".
        num_codes: codes of a picture.
        file_config: the folder's config.json, {} where there is none.
        path: of the file, for errors.

    Raises:
        ValueError: tensors are missing, or their shapes do not fit each other.
    """
    from transformers import LlamaConfig

    try:
        vocab_size, width = public_state["tok_embeddings.weight"].shape
        intermediate_size = public_state["layers.0.feed_forward.w1.weight"].shape[0]
        table_name = "embedding_table.weight" if kind == "c2i" else "uncond_embedding"
        num_condition_ids = 1 if kind == "c2i" else len(public_state[f"cls_embedding.{table_name}"])
        qkv_rows = len(public_state["layers.0.attention.wqkv.weight"])
    except KeyError as error:
        raise ValueError(f"checkpoint {path} has no {error.args[0]}: it is no LlamaGen ({kind})") from error
    head_dim = infer_head_dim(public_state, file_config, path)
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
    """The tensors of T5's encoder in a folder, by their names here. Those of the decoder are dropped."""
    dropped_keys = ("decoder.", "lm_head.", "encoder.embed_tokens.")  # encoder.embed_tokens repeats the shared table
    state = read_weights(folder)
    return {rename_key(name, _T5_KEYS): tensor for name, tensor in state.items() if not name.startswith(dropped_keys)}


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the files of the public layout, and the folder of the text encoder beside them.

    Args:
        model: of this family.
        folder: exists and is empty.
    """
    tokenizer, backbone = model.image_tokenizer, model.backbone
    assert isinstance(tokenizer, vqgan.VQGAN)
    kind = "t2i" if isinstance(backbone, TextBackbone) else "c2i"
    state = to_public(backbone.state_dict(), backbone.lm.config.head_dim)
    torch.save({"model": state}, folder / f"{kind}_model_{tokenizer.image_size}.pt")
    torch.save({"model": vqgan.to_public(tokenizer, "llamagen")}, folder / TOKENIZERS[kind])
    num_heads = backbone.lm.config.num_attention_heads
    save_json(folder / CONFIG, {"model_type": "llamagen", "n_head": num_heads})
    if isinstance(backbone, TextBackbone):
        text_folder = folder / TEXT_FOLDER
        text.save(model.text_tokenizer, text_folder)
        save_json(text_folder / CONFIG, backbone.lm.config.t5)
        encoder_state = {f"encoder.{name}": tensor for name, tensor in backbone.encoder.state_dict().items()}
        write_tensors(
            text_folder / "model.safetensors",
            {rename_key(k, _T5_KEYS, inverse=True): v for k, v in encoder_state.items()},
        )
