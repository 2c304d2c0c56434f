"""VAR: class-conditional images, scale by scale (Tian et al. 2024, arXiv 2404.02905), every depth, 256 and 512 pixels.

    {class} 4 9 16 ... 256 codes        a picture;        {1000} ...        the unconditional branch

    engine = unigen.load("FoundationVision/var:var_d16")       # and var_d20, d24, d30 (256 pixels), d36 (512)
    engine.generate(207)

VAR has a transformer of its own: attention over queries and keys of unit length with a learnt temperature, layer norms
whose scales, shifts and gates come from the class (adaLN), and no rotary positions. The generator is our `NextScale`.
Guidance grows with the scales. VAR's cfg is one less than our scale (4 in its demo is 5 here). Public weights: not run
here.

Shapes: B rows, L positions, D width, H heads, E head width, K scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, normalize, scaled_dot_product_attention, silu

from unigen.batch import Vocabulary
from unigen.generators.base import Generator
from unigen.generators.next_scale import NextScale
from unigen.hub.resolve import CONFIG, MANIFEST, read_json
from unigen.hub.weights import load_strict, read_tensors, read_weights, rename_key, select_checkpoint, write_tensors
from unigen.model.template import ClassTemplate
from unigen.model.unified import UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.nn.cache import SlotCache
from unigen.tokenizers import load_image_tokenizer, var_vq
from unigen.utils.files import save_json

SCALES_BY_LENGTH = {680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
"""Sides of the scales by the codes of a picture, for files that do not hold the scale of each code."""
HEAD_DIM = 64
LAYER_NORM_EPS = 1e-6
MAX_LOG_SCALE = math.log(100)
TOKENIZER_FILE = "vae_ch160v4096z32.pth"
DEFAULT_SAMPLING = {"guidance": 5.0, "temperature": 1.0, "top_k": 900, "top_p": 0.96}
VLLM_UNSUPPORTED = "it generates images scale by scale, not one code after another"
MULTI_MODEL_REPOS = {
    "FoundationVision/var": {f"var_d{depth}": (f"var_d{depth}.pth", TOKENIZER_FILE) for depth in (16, 20, 24, 30, 36)}
}
"""Repositories of the hub that hold several models: the files of each, by variant."""
WEIGHT_PATTERNS = ("var_d*.pth", TOKENIZER_FILE)
"""Patterns of the weight files by which a folder is recognized."""


class VARBlock(nn.Module):
    """A block of attention and an MLP, modulated by the class (adaLN).

    x += gate_1 attention((1 + scale_1) norm(x) + shift_1)
    x += gate_2 mlp((1 + scale_2) norm(x) + shift_2)
    """

    OLD_KEYS: ClassVar[Mapping[str, str]] = {"own": "ada_gss", "condition": "ada_lin"}
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, width: int, shared: bool) -> None:
        """
        Args:
            width: of the transformer.
            shared: gates, scales and shifts of all blocks come from one layer, to which each block adds a vector.
        """
        super().__init__()
        self.width, self.heads = width, width // HEAD_DIM
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.query_bias, self.value_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.temperature = nn.Parameter(torch.full((self.heads,), math.log(4)))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ada_gss = nn.Parameter(torch.zeros(6, width)) if shared else None
        self.ada_lin = None if shared else nn.Linear(width, 6 * width)

    def forward(
        self, x_BLD: Tensor, condition_BD: Tensor, mask: Tensor | None, cache: SlotCache, number: int
    ) -> Tensor:
        """One block.

        Args:
            x_BLD: the residual stream, float32.
            condition_BD: silu of the class's embedding; with `shared`, the modulation that all blocks share, (B, 6 D).
            mask: additive (B, 1, L, keys); None: all keys may be seen.
            cache: keys and values of what was read before.
            number: of the block, in the cache.

        Returns:
            The residual stream (B, L, D).
        """
        if self.ada_lin is not None:
            modulation = self.ada_lin(condition_BD).unflatten(-1, (6, self.width))
        else:
            modulation = condition_BD.unflatten(-1, (6, self.width)) + self.ada_gss
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation[:, None].unbind(2)
        modulated_BLD = (layer_norm_no_affine(x_BLD) * (1 + scale1) + shift1).to(condition_BD.dtype)
        x_BLD = x_BLD + gate1 * self.attention(modulated_BLD, mask, cache, number)
        modulated_BLD = (layer_norm_no_affine(x_BLD) * (1 + scale2) + shift2).to(condition_BD.dtype)
        return x_BLD + gate2 * self.down(gelu(self.up(modulated_BLD), approximate="tanh"))

    def attention(self, x_BLD: Tensor, mask: Tensor | None, cache: SlotCache, number: int) -> Tensor:
        """Attention (B, L, D) over queries and keys of unit length; see `forward` for the arguments."""
        parts = self.query_key_value(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)  # (B, H, L, E)
        query = query + self.query_bias.unflatten(0, (self.heads, 1, -1))
        value = value + self.value_bias.unflatten(0, (self.heads, 1, -1))
        query = normalize(query, dim=-1) * self.temperature.clamp(max=MAX_LOG_SCALE).exp()[:, None, None]
        keys, values = cache.update(normalize(key, dim=-1), value, number)
        output_BHLE = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
        return self.out(output_BHLE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def layer_norm_no_affine(x_BLD: Tensor) -> Tensor:
    """Layer norm over the last axis without weights."""
    return layer_norm(x_BLD, x_BLD.shape[-1:], eps=LAYER_NORM_EPS)


class VARTransformer(nn.Module):
    """VAR's blocks, with the part of a transformers model that `Backbone` needs."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {
        "start": "pos_start",
        "first": "first_scale_embedding",
        "last": "head_norm",
        "shared": "shared_ada_lin",
    }
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, classes: int, width: int, layers: int, positions: int, shared: bool) -> None:
        """
        Args:
            classes: rows of the table of classes, the unconditional one among them.
            width: of the residual stream.
            layers: blocks.
            positions: codes of a picture over all scales.
            shared: see `VARBlock`.
        """
        from transformers import PretrainedConfig

        super().__init__()
        self.settings = {"classes": classes, "width": width, "layers": layers, "positions": positions, "shared": shared}
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "max_position_embeddings": positions}
        self.config = PretrainedConfig.from_dict({**sizes, "vocab_size": classes})
        setattr(self.config, "model_type", "var")  # noqa: B010  # an attribute of configuration classes; this has none
        self.classes = nn.Embedding(classes, width)
        self.pos_start = nn.Parameter(torch.zeros(width))
        self.first_scale_embedding = nn.Parameter(torch.zeros(width))
        """Embedding of the first scale plus that of its position; the generator has both, too."""
        self.shared_ada_lin = nn.Linear(width, 6 * width) if shared else None
        self.blocks = nn.ModuleList(VARBlock(width, shared) for _ in range(layers))
        self.head_norm = nn.Linear(width, 2 * width)

    def set_attn_implementation(self, name: str) -> None:
        """Do nothing: VAR's attention is its own."""

    def get_decoder(self) -> VARTransformer:
        """The transformer itself."""
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of classes."""
        return self.classes

    def save_pretrained(self, folder: Path) -> None:
        """Write weights and settings into a folder."""
        write_tensors(Path(folder) / "model.safetensors", self.state_dict())
        save_json(Path(folder) / CONFIG, {"model_type": "var", **self.settings})


class VARBackbone(Backbone):
    """Runs VAR's transformer step by step. The class is read as the first position and kept with its slot, since it
    modulates every norm. The residual stream is in float32, whatever the weights are in, as under autocast.
    """

    def new_cache(self, slots: int, device: torch.device) -> SlotCache:
        """An empty cache in the precision of the weights: each step has many queries."""
        return SlotCache(len(self.lm.blocks), slots, device)

    def forward_cached(
        self, embeds_BLD: Tensor, positions_BL: Tensor, mask: Tensor, cache: SlotCache | None = None
    ) -> Tensor:
        """Hidden states (B, L, D) of a step; see `Backbone.forward_cached`. The first position of a picture is its
        class.
        """
        assert cache is not None, "VAR's transformer is for inference"
        lm, rows = self.lm, cache.step.slots
        is_start_B = positions_BL[:, 0] == 0
        for row, is_start, vector_D in zip(rows, is_start_B.tolist(), embeds_BLD[:, 0], strict=True):
            if is_start:
                cache.slot_state[row] = vector_D
        classes_BD = torch.stack([cache.slot_state[row] for row in rows])
        x_BLD = embeds_BLD.float().clone()
        x_BLD[is_start_B, 0] = x_BLD[is_start_B, 0] + lm.pos_start + lm.first_scale_embedding
        additive_mask = None if bool(mask.all()) else x_BLD.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        condition_BD = silu(classes_BD)
        block_condition_BD = condition_BD if lm.shared_ada_lin is None else lm.shared_ada_lin(condition_BD)
        for number, block in enumerate(lm.blocks):
            x_BLD = block(x_BLD, block_condition_BD, additive_mask, cache, number)
        scale, shift = lm.head_norm(condition_BD).unflatten(-1, (2, -1))[:, None].unbind(2)
        return layer_norm_no_affine(x_BLD) * (1 + scale) + shift


_KEY_RENAMES = (
    ("class_emb.", "lm.classes."),
    ("shared_ada_lin.1.", "lm.shared_ada_lin."),
    ("head_nm.ada_lin.1.", "lm.head_norm."),
    ("blocks.", "lm.blocks."),
    ("word_embed.", "head.proj_in."),
    ("lvl_embed.", "head.scale_embedding."),
    ("head.", "head.head."),
)
"""Prefixes of the names of tensors in a public file, and here."""
_BLOCK_KEYS = (
    (".attn.mat_qkv.", ".query_key_value."),
    (".attn.q_bias", ".query_bias"),
    (".attn.v_bias", ".value_bias"),
    (".attn.scale_mul_1H11", ".temperature"),
    (".attn.proj.", ".out."),
    (".ffn.fc1.", ".up."),
    (".ffn.fc2.", ".down."),
    (".ada_lin.1.", ".ada_lin."),
    (".ada_gss", ".ada_gss"),
)
"""Parts of the names of a block's tensors in a public file, and here."""
_DERIVED_KEYS = ("lvl_1L", "attn_bias_for_masking")
"""Tensors of a public file that follow from the scales."""


def from_public(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a public file by their names here."""
    renamed_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _DERIVED_KEYS or name.endswith(".zero_k_bias"):
            continue
        if name == "pos_start":
            renamed_state["lm.pos_start"] = tensor[0, 0]
        elif name == "pos_1LC":
            renamed_state["head.position_embedding.weight"] = tensor[0]
        else:
            name = rename_key(name, _KEY_RENAMES, _BLOCK_KEYS if name.startswith("blocks.") else ())
            flat_tensor = tensor.flatten() if name.endswith(".temperature") else tensor
            renamed_state[name] = flat_tensor[0, 0] if name.endswith(".ada_gss") else flat_tensor
    if "head.scale_embedding.weight" in renamed_state and "head.position_embedding.weight" in renamed_state:
        renamed_state["lm.first_scale_embedding"] = (
            renamed_state["head.scale_embedding.weight"][0] + renamed_state["head.position_embedding.weight"][0]
        )
    return renamed_state


def to_public(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model by their public names: the inverse of `from_public`, without tensors that follow from
    others."""
    public_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm.pos_start":
            public_state["pos_start"] = tensor[None, None]
        elif name == "head.position_embedding.weight":
            public_state["pos_1LC"] = tensor[None]
        elif name != "lm.first_scale_embedding":
            if name.endswith(".temperature"):
                tensor = tensor[None, :, None, None]
            if name.endswith(".ada_gss"):
                tensor = tensor[None, None]
            substitutions = _BLOCK_KEYS if name.startswith("lm.blocks.") else ()
            public_state[rename_key(name, _KEY_RENAMES, substitutions, inverse=True)] = tensor
    return public_state


def matches(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether the folder has a file of a model, and that of its image tokenizer or no config.json.

    Args:
        folder: the model folder, without our unigen.json.
        config: the contents of its config.json, {} where there is none.
    """
    return any(folder.glob(WEIGHT_PATTERNS[0])) and ((folder / TOKENIZER_FILE).is_file() or not config)


def load(folder: Path, dtype: torch.dtype | None, variant: str | None = None) -> UnifiedModel:
    """Load the model in a folder, in the public layout or in ours. No tensor may be missing or left over.

    Args:
        folder: of the model.
        dtype: of the weights; None: as they are stored.
        variant: the name of the file without its extension, where there are several.

    Raises:
        ValueError: the folder holds no whole model of this family.
    """
    if (folder / MANIFEST).is_file():
        settings = {k: v for k, v in read_json(folder / CONFIG).items() if k != "model_type"}
        tokenizer = load_image_tokenizer(folder / "image_tokenizer")
        state = {f"lm.{name}": tensor for name, tensor in read_weights(folder).items()}
        head_state = read_tensors(folder / "next-scale" / "model.safetensors")
        state |= {f"head.{name}": tensor for name, tensor in head_state.items()}
    else:
        path = select_checkpoint(folder, WEIGHT_PATTERNS[0], variant)
        public_state = read_tensors(path)
        state = from_public(public_state)
        try:
            num_classes, width = state["lm.classes.weight"].shape
            num_codes = len(state["head.position_embedding.weight"])
            state["lm.blocks.0.temperature"]
        except KeyError as error:
            raise ValueError(
                f"checkpoint {path} has no {error.args[0]}: it is no VAR of unit queries and keys"
            ) from error
        num_layers = len({name.split(".")[2] for name in state if name.startswith("lm.blocks.")})
        is_shared = "lm.shared_ada_lin.weight" in state
        settings = {
            "classes": num_classes,
            "width": width,
            "layers": num_layers,
            "positions": num_codes,
            "shared": is_shared,
        }
        scales = infer_scales(public_state, num_codes)
        tokenizer = var_vq.from_public(read_tensors(folder / TOKENIZER_FILE), scales)
    parts = nn.Module()
    lm, head = VARTransformer(**settings), NextScale(tokenizer, settings["width"])
    parts.lm, parts.head = lm, head
    tokenizer_state = {f"head.tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    weight_dtype = dtype or state["lm.classes.weight"].dtype
    load_strict(parts, tokenizer_state | state, folder)
    lm.to(weight_dtype)
    for layer in (head.proj_in, head.scale_embedding, head.position_embedding):  # the head itself stays in float32
        layer.to(weight_dtype)
    template = ClassTemplate(settings["classes"] - 1, head.num_positions())
    generators: dict[str, Generator] = {"next-scale": head}
    vocabulary = Vocabulary(settings["classes"], tokenizer.codebook_size)
    backbone = VARBackbone(lm)
    model = UnifiedModel("var", backbone, vocabulary, None, tokenizer, template, generators)
    model.set_default_sampling("next-scale", **DEFAULT_SAMPLING)
    return model


def infer_scales(public: Mapping[str, Tensor], codes: int) -> tuple[int, ...]:
    """The sides of the scales, which VAR calls patch_nums.

    They follow from `lvl_1L`, the scale of each code, or from the attention mask of training. Else they are those of
    the published models, else 1, 2, 4, ...

    Args:
        public: tensors of a public file.
        codes: of a picture, over all scales.

    Returns:
        The side of each scale, in codes.

    Raises:
        ValueError: the codes do not divide into square scales.
    """
    codes_per_scale = None
    if (levels_1L := public.get("lvl_1L")) is not None:
        codes_per_scale = torch.bincount(levels_1L.flatten().long()).tolist()
    elif (mask_11LL := public.get("attn_bias_for_masking")) is not None:  # a code attends to all scales up to its own
        ends = (mask_11LL[0, 0] == 0).sum(-1).unique().tolist()
        codes_per_scale = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if codes_per_scale is not None:
        scales = tuple(math.isqrt(count) for count in codes_per_scale)
        if [side * side for side in scales] == codes_per_scale and sum(codes_per_scale) == codes:
            return scales
        raise ValueError(f"the file has {codes_per_scale} codes by scale, of {codes}: a scale is a square")
    if codes in SCALES_BY_LENGTH:
        return SCALES_BY_LENGTH[codes]
    scales = tuple(2**k for k in range(codes.bit_length()))
    count = next((k for k in range(len(scales) + 1) if sum(side * side for side in scales[:k]) == codes), None)
    if count is None:
        raise ValueError(f"{codes} positions are of no scales known here ({', '.join(map(str, SCALES_BY_LENGTH))})")
    return scales[:count]


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the files of the public layout.

    Args:
        model: of this family.
        folder: exists and is empty.
    """
    tokenizer, head = model.image_tokenizer, model.generators["next-scale"]
    assert isinstance(tokenizer, var_vq.VARVQ) and isinstance(head, NextScale)
    state = {f"lm.{name}": tensor for name, tensor in model.backbone.lm.state_dict().items()}
    state |= {f"head.{k}": v for k, v in head.state_dict().items() if not k.startswith("tokenizer.")}
    levels = [torch.full((side * side,), level) for level, side in enumerate(tokenizer.settings.scales)]
    derived_state = {"lvl_1L": torch.cat(levels)[None]}
    torch.save(to_public(state) | derived_state, folder / f"var_d{model.backbone.lm.settings['layers']}.pth")
    torch.save(var_vq.to_public(tokenizer), folder / TOKENIZER_FILE)
    save_json(folder / CONFIG, {"model_type": "var"})
