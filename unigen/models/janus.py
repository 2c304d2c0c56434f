"""Janus and Janus-Pro: pictures are read as features of a vision encoder, and written as codes with a separate table
and head (Wu et al. 2024, arXiv 2410.13848; Chen et al. 2025, arXiv 2501.17811).

    <bos><|User|>: {words}\n\n<|Assistant|>:<begin_of_image> 576 codes                  a picture
    <bos>User: {words}\n\nAssistant:<begin_of_image> 576 codes                          a picture by Janus-1.3B
    <bos><pad> ... <pad><begin_of_image> ...                                            the unconditional branch
    <bos>{system}\n\n<|User|>: <begin_of_image> 576 features <end_of_image>\n{question}\n\n<|Assistant|>:   an answer

    engine = unigen.load("deepseek-ai/Janus-Pro-1B")         # or transformers' layout: deepseek-community/Janus-Pro-1B

The padding of the unconditional branch is not masked. In our vocabulary the ids of codes follow those of text, though
no table holds both: id = text_size + code. Public weights: not run here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import gelu

from unigen.batch import Layout, Tokens, Vocabulary
from unigen.document import Document, Segment
from unigen.generators.base import Generator
from unigen.generators.next_token import NextToken, Text
from unigen.hub.resolve import CONFIG, MANIFEST, image_processor_config, read_json, read_manifest
from unigen.hub.weights import load_strict, read_tensors, read_weights, rename_key, with_architecture, write_tensors
from unigen.model.readers import VisionEncoder
from unigen.model.saving import vision_folder
from unigen.model.template import Output, PretrainedTemplate, UnsupportedError, split_system_messages
from unigen.model.unified import UnifiedModel
from unigen.nn.janus import JanusBackbone
from unigen.options import DEFAULT_GENERATOR
from unigen.tokenizers import load_image_tokenizer, text, vqgan
from unigen.utils.files import save_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
PLAIN_ROLES = ("User", "Assistant")
"""Names of the roles in the first Janus, whose repository has the same sft_format and tokens as Janus-Pro's."""
FIRST_JANUS_NAME = re.compile(r"Janus-1\.3B", re.IGNORECASE)
SFT_FORMATS = {PLAIN_ROLES: "deepseek_old", (USER, ASSISTANT): "deepseek"}
"""sft_format of processor_config.json, by the names of the roles."""
BOI, EOI, PAD = "<begin_of_image>", "<end_of_image>", "<｜▁pad▁｜>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
PAD_COLOR = (127, 127, 127)
"""RGB colour of the margins that make an input picture square."""
EMBEDDINGS_KEY = "backbone.lm.model.embed_tokens.weight"
IMAGE_SIZE = 384
DEFAULT_NUM_HEADS, VISION_HEAD_DIM = 16, 64
"""Heads, and width of a head, of the attention of the vision encoder, SigLIP."""
DEFAULT_SAMPLING = {"guidance": 5.0, "temperature": 1.0}


class JanusTemplate(PretrainedTemplate):
    """Lays out a dialogue, whose pictures are read as features, or the prompt of an image."""

    supports_system = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_features: int,
        num_codes: int,
        roles: tuple[str, str] = (USER, ASSISTANT),
    ) -> None:
        """
        Args:
            tokenizer: the text tokenizer, with the special tokens.
            num_features: positions of a picture that is read.
            num_codes: positions of a generated image.
            roles: names of the user and the assistant.

        Raises:
            ValueError: the tokenizer lacks special tokens.
        """
        super().__init__(tokenizer)
        self.num_features, self.num_codes, self.roles = num_features, num_codes, roles
        self.settings = {"roles": list(roles)}
        vocab = tokenizer.get_vocab()
        self.special_tokens = [name for name in (USER, ASSISTANT, BOI, EOI, PAD) if name in vocab]
        self.special_ids: dict[str, int] = {name: vocab[name] for name in self.special_tokens}
        if missing := [name for name in (BOI, EOI, PAD) if name not in vocab]:
            raise ValueError(f"the text tokenizer has no {', '.join(missing)}: it is not Janus's")
        self.stop_token_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        self.begin_ids = {self.context_generator: self.special_ids[BOI]}

    def layout(self, grid: tuple[int, int]) -> Layout:
        """The layout of a picture of h x w codes among ids: codes in raster order, then EOI."""
        return Layout(grid, suffix=(self.special_ids[EOI],))

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """Resize a picture by its longer side, and put it in the middle of a square of `PAD_COLOR`.

        Returns:
            Pixels (size, size, 3), uint8.
        """
        long_side = max(image.size)
        width, height = (max(14, int(side / long_side * size)) for side in image.size)
        canvas = Image.new("RGB", (size, size), PAD_COLOR)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
        return np.asarray(canvas)

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """Lay out a document up to where the model goes on. Guidance's other branch is padding after the first id.

        Raises:
            UnsupportedError: an image is requested, and the prompt holds a picture.
        """
        is_image = output == "image"
        prompt = self._dialogue(document.segments, system="" if is_image else SYSTEM, allow_images=not is_image)
        if document.segments[-1].role == "user":
            prompt.add_template_text(f"{self.roles[1]}:")
        tokens = prompt.build()
        return Tokens([tokens.ids[0]] + [self.special_ids[PAD]] * (len(tokens) - 1)) if branch else tokens

    def encode(self, document: Document, *, uncond: bool = False, generator: str = DEFAULT_GENERATOR) -> Tokens:
        """Lay out a whole document for training. Of the vision encoder nothing is trained here.

        Args:
            document: ends in a picture of the assistant's; the loss is on that picture.
            uncond: lay it out for the unconditional branch of guidance.
            generator: name of the generator of the image.

        Raises:
            ValueError: the document does not end in such a picture.
        """
        last = document.segments[-1]
        if last.image is None or last.role != "assistant":
            raise ValueError("janus learns to draw here: give documents that end in a picture of the assistant's")
        tokens = self.prompt(Document(document.segments[:-1]), output="image", branch=uncond)
        tokens.add([self.special_ids[BOI]])
        tokens.add_image(last.image, self.num_codes, loss=True)
        return tokens

    def _dialogue(self, segments: Sequence[Segment], system: str, allow_images: bool) -> text.PromptBuilder:
        """Turns of a dialogue.

        Args:
            segments: of a document.
            system: the system prompt where the document has none; "" leaves out the document's, too.
            allow_images: whether pictures may be read.
        """
        prompt = text.PromptBuilder(self.tokenizer, self.special_tokens).add_ids([self.tokenizer.bos_token_id])
        system_text, segments = split_system_messages(segments)
        if system and system_text:
            prompt.add_user_text(system_text).add_template_text("\n\n")
        else:
            prompt.add_template_text(f"{system}\n\n" if system else "")
        for number, segment in enumerate(segments):
            is_user, is_turn_start = segment.role == "user", number == 0 or segments[number - 1].role != segment.role
            is_turn_end = number + 1 == len(segments) or segments[number + 1].role != segment.role
            prompt.add_template_text(f"{self.roles[0] if is_user else self.roles[1]}: " if is_turn_start else "\n")
            if segment.image is not None:
                if not allow_images:
                    raise UnsupportedError(
                        "janus generates images from text alone: leave the picture out, or ask for text about it"
                    )
                prompt.add_template_text(BOI)
                prompt.add_image(segment.image, self.num_features, handler=JanusVisionEncoder.name).add_template_text(
                    EOI
                )
            elif segment.label is not None:
                raise ValueError("janus reads words, not classes: say it in words")
            else:
                prompt.add_user_text((segment.text or "").strip())
            if is_turn_end and is_user:
                prompt.add_template_text("\n\n")
            elif is_turn_end and number + 1 < len(segments):
                prompt.add_ids([self.tokenizer.eos_token_id])
        return prompt


class JanusVisionEncoder(VisionEncoder):
    """SigLIP's encoder, transformers' `JanusVisionModel`, and an aligner of two layers to the width of the backbone."""

    def __init__(self, settings: Mapping[str, Any], width: int) -> None:
        """
        Args:
            settings: of a `JanusVisionConfig`.
            width: of the backbone.
        """
        from transformers import JanusVisionConfig
        from transformers.models.janus.modeling_janus import JanusVisionModel

        super().__init__()
        self.settings = dict(settings)
        self.num_tokens = (self.settings["image_size"] // self.settings["patch_size"]) ** 2
        self.aligner = nn.ModuleList([nn.Linear(self.settings["hidden_size"], width), nn.Linear(width, width)])
        self.encoder = JanusVisionModel(JanusVisionConfig(**self.settings))

    def config(self) -> dict[str, object]:
        """The settings of its `JanusVisionConfig`."""
        return self.settings

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] (N, 3, H, W) -> features (N, P, D)."""
        weight = next(self.aligner.parameters())
        features_NPD = self.encoder(pixels_NCHW.to(weight.device, weight.dtype)).last_hidden_state
        return self.aligner[1](gelu(self.aligner[0](features_NPD)))  # type: ignore[no-any-return]


_KEY_RENAMES = (
    ("gen_embed.", "backbone.table."),
    ("gen_aligner.layers.", "backbone.aligner."),
    ("gen_head.output_mlp_projector.", "backbone.head.0."),
    ("gen_head.vision_head.", "backbone.head.2."),
    ("aligner.layers.0.", "vision_encoder.aligner.0."),
    ("aligner.layers.2.", "vision_encoder.aligner.1."),
    ("gen_vision_model.", "image_tokenizer."),
    ("language_model.", "backbone.lm."),
    ("vision_model.vision_tower.pos_embed", "vision_encoder.encoder.embeddings.position_embedding.weight"),
    ("vision_model.vision_tower.patch_embed.proj.", "vision_encoder.encoder.embeddings.patch_embedding."),
    ("vision_model.vision_tower.blocks.", "vision_encoder.encoder.encoder.layers."),
    ("vision_model.vision_tower.norm.", "vision_encoder.encoder.post_layernorm."),
)
"""Prefixes of the names of tensors in the authors' layout, and here."""
_BLOCK_KEYS = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".self_attn.proj.", ".self_attn.projection_layer."),
)
"""Parts of the names of tensors in a block of the vision encoder, in the authors' layout and here."""
_TRANSFORMERS_KEYS = (
    ("lm_head.", "backbone.lm.lm_head."),
    ("model.language_model.", "backbone.lm.model."),
    ("model.generation_embeddings.", "backbone.table."),
    ("model.generation_aligner.fc1.", "backbone.aligner.0."),
    ("model.generation_aligner.hidden_layers.0.", "backbone.aligner.2."),
    ("model.generation_head.proj_out.", "backbone.head.0."),
    ("model.generation_head.vision_head.", "backbone.head.2."),
    ("model.aligner.fc1.", "vision_encoder.aligner.0."),
    ("model.aligner.hidden_layers.0.", "vision_encoder.aligner.1."),
    ("model.vision_model.", "vision_encoder.encoder."),
    ("model.vqmodel.", "image_tokenizer."),
)
"""Prefixes of the names of tensors in transformers' layout, and here."""
_VQ_KEYS = (
    (".down.", ".conv_blocks."),
    (".up.", ".conv_blocks."),
    (".block.", ".res."),
    (".mid.block_1.", ".mid.0."),
    (".mid.attn_1.", ".mid.1."),
    (".mid.block_2.", ".mid.2."),
)
"""Parts of the names of the image tokenizer's tensors in transformers' layout, and here."""


def from_public(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder in the authors' layout by their names here.

    SigLIP's pooling, which takes no part in reading a picture here, is dropped.
    """
    renamed_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("vision_model.vision_tower.attn_pool.") or name.endswith("rotary_emb.inv_freq"):
            continue
        name = rename_key(name, _KEY_RENAMES, _BLOCK_KEYS if ".blocks." in name else ())
        if ".qkv." in name:
            for part, projection in zip("qkv", tensor.chunk(3), strict=True):
                renamed_state[name.replace(".qkv.", f".{part}_proj.")] = projection
        else:
            renamed_state[name] = tensor[0] if name.endswith("position_embedding.weight") else tensor
    return renamed_state


def from_transformers(state: Mapping[str, Tensor], tied_embeddings: bool) -> dict[str, Tensor]:
    """The tensors of a folder in transformers' layout by their names here.

    Args:
        state: the tensors of the folder.
        tied_embeddings: where there is no head, it is the table of embeddings.
    """
    renamed_state = {
        rename_key(k, _TRANSFORMERS_KEYS, _VQ_KEYS if k.startswith("model.vqmodel.") else ()): v
        for k, v in state.items()
    }
    if tied_embeddings and EMBEDDINGS_KEY in renamed_state:
        renamed_state.setdefault("backbone.lm.lm_head.weight", renamed_state[EMBEDDINGS_KEY])
    return renamed_state


def to_public(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model by their names in the authors' layout. The inverse of `from_public`."""
    public_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if re.search(r"\.[kv]_proj\.", name) and name.startswith("vision_encoder."):
            continue  # stored with the queries
        if name.startswith("vision_encoder.") and ".q_proj." in name:
            tensor = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".q_proj.", ".qkv.")
        public_name = rename_key(name, _KEY_RENAMES, _BLOCK_KEYS if ".encoder.layers." in name else (), inverse=True)
        public_state[public_name] = tensor[None] if public_name.endswith("pos_embed") else tensor
    return public_state


def matches(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether config.json, {} where there is none, is that of this family."""
    return config.get("model_type") in ("multi_modality", "janus")


def check_supported(folder: Path, config: Mapping[str, object]) -> None:
    """Raise ValueError for JanusFlow; the message names the models that are supported."""
    if any(name.startswith(("vision_gen_", "vision_und_")) for name in config):
        raise ValueError(
            f"{folder} is JanusFlow, which draws by rectified flow and is not supported: "
            "deepseek-ai/Janus-1.3B, Janus-Pro-1B and Janus-Pro-7B are"
        )


def chat_roles(folder: Path, config: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The names of the user and the assistant in the prompts of a public folder.

    A folder in transformers' layout has them in its processor's chat template. The authors' folders of Janus-1.3B and
    of Janus-Pro have the same files and differ in their scripts alone. The former is recognized by its name, in the
    path or in config.json, by a tokenizer without Janus-Pro's tokens, or by the sft_format that `save_public` writes.

    Args:
        folder: the model folder.
        config: its config.json.
        tokenizer: the text tokenizer.
    """
    if config["model_type"] == "janus":
        for file in ("chat_template.jinja", "chat_template.json"):
            template = (folder / file).read_text(encoding="utf-8") if (folder / file).is_file() else ""
            if USER in template or f"{PLAIN_ROLES[0]}: " in template:
                return (USER, ASSISTANT) if USER in template else PLAIN_ROLES
    path = folder / "processor_config.json"
    sft_format = read_json(path).get("sft_format") if path.is_file() else None
    is_first_janus = FIRST_JANUS_NAME.search(f"{folder.absolute()} {config.get('_name_or_path', '')}")
    use_plain_roles = is_first_janus or sft_format == SFT_FORMATS[PLAIN_ROLES] or USER not in tokenizer.get_vocab()
    return PLAIN_ROLES if use_plain_roles else (USER, ASSISTANT)


def load(folder: Path, dtype: torch.dtype | None) -> UnifiedModel:
    """Load the model in a folder, in the authors' layout, in transformers' or in ours.

    No tensor may be missing or left over.

    Args:
        folder: of the model.
        dtype: of the weights; None: as they are stored.

    Raises:
        ValueError: the folder holds no whole model of this family.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    tokenizer = text.load_from_model(folder)
    config = read_json(folder / CONFIG)
    if (folder / MANIFEST).is_file():
        user_role, assistant_role = read_manifest(folder).get("template", {}).get("roles", (USER, ASSISTANT))
        roles = (str(user_role), str(assistant_role))
        image_tokenizer = load_image_tokenizer(folder / "image_tokenizer")
        state = {f"backbone.lm.{name}": tensor for name, tensor in read_weights(folder).items()}
        for part, part_folder in {"backbone": folder / "backbone", "vision_encoder": vision_folder(folder)}.items():
            tensors = read_tensors(part_folder / "model.safetensors")
            state |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
        vision_config = read_json(vision_folder(folder) / CONFIG)
        if "text_size" in config:  # written by `causal_lm`
            config = {name: value for name, value in config.items() if name not in ("text_size", "head_width")} | {
                "vocab_size": config["text_size"]
            }
    else:
        roles = chat_roles(folder, config, tokenizer)
        if config["model_type"] == "janus":
            state = from_transformers(read_weights(folder), config.get("tie_word_embeddings", True))
            encoder, config = config["vision_config"], config["text_config"]
            size, heads = (
                int(encoder.get("image_size", IMAGE_SIZE)),
                encoder.get("num_attention_heads", DEFAULT_NUM_HEADS),
            )
        else:
            state = from_public(read_weights(folder))
            size, heads = int(image_processor_config(folder).get("image_size", IMAGE_SIZE)), None
            config = config["language_config"]
        tokenizer_state = {
            k.removeprefix("image_tokenizer."): v for k, v in state.items() if k.startswith("image_tokenizer.")
        }
        image_tokenizer = vqgan.from_public(tokenizer_state, size, "llamagen")
        vision_config = vision_settings(state, size, heads)
    model_state = {name: tensor for name, tensor in state.items() if not name.startswith("image_tokenizer.")}
    try:
        num_codes, code_dim = model_state["backbone.table.weight"].shape
        head_width = model_state["backbone.head.0.weight"].shape[0]
        table = tuple(model_state[EMBEDDINGS_KEY].shape)
    except KeyError as error:
        raise ValueError(f"checkpoint {folder} has no {error.args[0]}: it is not whole") from error
    lm_config = LlamaConfig(**config)
    # defaults of the class give a model of billions of parameters
    if table != (lm_config.vocab_size, lm_config.hidden_size):
        sizes = f"{lm_config.vocab_size} pieces of width {lm_config.hidden_size}"
        raise ValueError(f"{folder / CONFIG} says {sizes}, the tensors {table[0]} of {table[1]}: it is damaged")
    lm_config.bos_token_id, lm_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    parts = nn.Module()
    with no_init_weights():
        lm = LlamaForCausalLM._from_config(lm_config, attn_implementation="sdpa")
        parts.backbone = JanusBackbone(lm, num_codes, code_dim, head_width)
        parts.vision_encoder = JanusVisionEncoder(vision_config, parts.backbone.width)
    load_strict(parts.to(dtype or model_state["backbone.table.weight"].dtype), model_state, folder)
    codes_per_image = image_tokenizer.grid[0] * image_tokenizer.grid[1]
    template = JanusTemplate(tokenizer, parts.vision_encoder.num_tokens, codes_per_image, roles)
    generators: dict[str, Generator] = {
        "text": Text(sorted({*tokenizer.all_special_ids, *template.special_ids.values()})),
        "next-token": NextToken(image_tokenizer.grid),
    }
    vocabulary = Vocabulary(parts.backbone.text_size, num_codes, separate_head=True)
    model = UnifiedModel(
        "janus", parts.backbone, vocabulary, tokenizer, image_tokenizer, template, generators, parts.vision_encoder
    )
    model.set_default_sampling("next-token", **DEFAULT_SAMPLING)
    return model


def causal_lm(model: UnifiedModel) -> PreTrainedModel:
    """The language model with the whole vocabulary, for the class of ours that vLLM finds by this name
    (`unigen.backends.vllm_models`). The table and the head of codes are saved beside it.
    """
    assert isinstance(model.backbone, JanusBackbone)
    text_size, head_width = model.backbone.text_size, model.backbone.head[0].out_features
    sizes = {"vocab_size": model.vocabulary.size, "text_size": text_size, "head_width": head_width}
    return with_architecture(model.backbone.lm, "UnigenJanusForCausalLM", **sizes)


def vision_settings(state: Mapping[str, Tensor], size: int, heads: int | None = None) -> dict[str, int | float]:
    """Settings of the vision encoder, inferred from its tensors: the authors' folders name it and do not describe it.

    Args:
        state: tensors by their names here.
        size: pixels along a side of an input picture.
        heads: of its attention; None: see `default_num_heads`.

    Raises:
        ValueError: tensors are missing.
    """
    try:
        patch_weight = state["vision_encoder.encoder.embeddings.patch_embedding.weight"]
        width = patch_weight.shape[0]
        mlp_width = state["vision_encoder.encoder.encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"these are not the tensors of Janus: {error.args[0]} is not among them") from error
    layers = {name.split(".")[4] for name in state if name.startswith("vision_encoder.encoder.encoder.layers.")}
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads or default_num_heads(width),
        "mlp_ratio": mlp_width / width,
        "image_size": size,
        "patch_size": patch_weight.shape[-1],
    }


def default_num_heads(width: int) -> int:
    """Heads of a vision encoder of a width, where nothing else is known of it."""
    return max(1, width // VISION_HEAD_DIM)


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the files of the authors' layout into an empty folder.

    Raises:
        ValueError: the layout cannot describe the vision encoder.
    """
    assert isinstance(model.vision_encoder, JanusVisionEncoder)
    width, num_heads = (model.vision_encoder.settings[name] for name in ("hidden_size", "num_attention_heads"))
    if num_heads != default_num_heads(width):
        raise ValueError(
            f"the authors' layout has no word for a vision encoder with heads of width {width // num_heads}"
        )
    tokenizer, image_size = model.image_tokenizer, model.image_tokenizer.image_size
    assert isinstance(tokenizer, vqgan.VQGAN) and isinstance(model.backbone, JanusBackbone)
    state = {k: v for k, v in model.state_dict().items() if k.startswith(("backbone.", "vision_encoder."))}
    state |= {f"image_tokenizer.{k}": v for k, v in vqgan.to_public(tokenizer, "llamagen").items()}
    write_tensors(folder / "model.safetensors", to_public(state))
    text.save(model.text_tokenizer, folder)
    language_config = model.backbone.lm.config.to_diff_dict()
    save_json(folder / CONFIG, {"model_type": "multi_modality", "language_config": language_config})
    assert isinstance(model.template, JanusTemplate)
    processor_config = {"processor_class": "VLChatProcessor", "num_image_tokens": model.template.num_features}
    save_json(folder / "processor_config.json", processor_config | {"sft_format": SFT_FORMATS[model.template.roles]})
    save_json(
        folder / "preprocessor_config.json", {"image_size": image_size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )
