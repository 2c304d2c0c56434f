"""LlamaGen: a Llama that draws classes, code after code (Sun et al. 2024, arXiv 2406.06525).

    {class} 256 codes        a picture;        {1000} 256 codes        guidance's other branch

    engine = unigen.load("FoundationVision/LlamaGen:c2i_B_256")       # and every other c2i_* there
    engine.generate(207)

Rotary positions are of two dimensions: the first half of a head turns with the row of a code, the second with its
column; the condition has none, its queries and keys are multiplied by zero. Classes stand before the codes in our
vocabulary. The models that draw text (t2i_*) are not here yet. Public weights: not run here.

Shapes: B rows, L positions, D width, E head width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigen import hub
from unigen.config import save_json
from unigen.generators.base import Generator
from unigen.generators.next_token import NextToken
from unigen.model import UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.sequence import Vocabulary
from unigen.templates import ClassTemplate
from unigen.tokenizers import load_tokenizer, vqgan

BASE = 10_000.0
HEAD_WIDTHS = {3200: 100}
"""Of models of some width; of all others 64."""
TOKENIZER = "vq_ds16_c2i.pt"
STRIDE = 16
SAMPLING = {"guidance": 4.0, "temperature": 1.0, "top_k": 2000}
REPOSITORIES = {
    "FoundationVision/LlamaGen": {
        name: (f"{name}.pt", TOKENIZER)
        for name in ("c2i_B_256", "c2i_B_384", "c2i_L_256", "c2i_L_384", "c2i_XL_384", "c2i_XXL_384", "c2i_3B_384")
    }
}
"""Repositories of the hub that hold several models: the files of each."""


class Rotary2D(nn.Module):
    """cos and sin (B, L, E) of positions: the condition's are zero, a code's are of its row and its column.

    theta_p = base^(-2p / (E/2)), p = 0 .. E/4 - 1; pair p turns by row theta_p, pair E/4 + p by column theta_p.
    """

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        half = width // 2
        theta = BASE ** (-torch.arange(0, half, 2).float() / half)
        turns = torch.outer(torch.arange(side).float(), theta)  # (side, E/4)
        rows, columns = turns[:, None].expand(-1, side, -1), turns[None].expand(side, -1, -1)
        angles = torch.cat((rows, columns), -1).flatten(0, 1)  # (side * side, E/2)
        angles = torch.cat((angles, angles), -1)
        nothing = torch.zeros(1, width)
        self.register_buffer("cos", torch.cat((nothing, angles.cos())), persistent=False)
        self.register_buffer("sin", torch.cat((nothing, angles.sin())), persistent=False)

    @torch.no_grad()
    def forward(self, x_BLD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        at_BL = position_ids.clamp(max=len(self.cos) - 1)  # rows that are done go on reading
        return self.cos[at_BL].to(x_BLD.dtype), self.sin[at_BL].to(x_BLD.dtype)


class LlamaGenBackbone(Backbone):
    """A Llama whose table and head are of codes alone, and a table of classes before it."""

    def __init__(self, lm: Any, classes: int, side: int) -> None:
        super().__init__(lm)
        self.classes = nn.Embedding(classes, self.width)
        lm.model.rotary_emb = Rotary2D(side, lm.config.head_dim)

    def embed(self, ids_BL: Tensor) -> Tensor:
        codes_BL = ids_BL - self.classes.num_embeddings
        table = self.lm.get_input_embeddings()
        if bool((codes_BL >= 0).all()):
            return table(codes_BL)  # type: ignore[no-any-return]
        classes_BLD = self.classes(ids_BL.clamp(max=self.classes.num_embeddings - 1))
        return torch.where((codes_BL >= 0)[..., None], table(codes_BL.clamp(min=0)), classes_BLD)

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        before = self.classes.num_embeddings
        return super().logits(hidden, max(0, start - before), None if stop is None else stop - before)


# what a tensor is called in a public file, and here
_NAMES = (
    ("cls_embedding.embedding_table.", "classes."),
    ("tok_embeddings.", "lm.model.embed_tokens."),
    ("output.", "lm.lm_head."),
    ("norm.", "lm.model.norm."),
    ("layers.", "lm.model.layers."),
)
_LAYER = (
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".attention.wqkv.", ".self_attn.qkv_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
)


def halves(weight: Tensor, head_dim: int, back: bool = False) -> Tensor:
    """Rows of queries or keys with the pairs that turn together half a head apart, not side by side (or back)."""
    shape = (-1, 2, head_dim // 2) if back else (-1, head_dim // 2, 2)
    return weight.unflatten(0, shape).transpose(1, 2).flatten(0, 2).contiguous()


def from_public(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """The tensors of a public file by their names here."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "freqs_cis":
            continue
        name = hub.renamed(name, _NAMES, _LAYER)
        if ".qkv_proj." in name:
            query, key, value = tensor.chunk(3)
            parts = {"q": halves(query, head_dim), "k": halves(key, head_dim), "v": value}
            ours |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts.items()}
        else:
            ours[name] = tensor
    return ours


def to_public(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """The same tensors by their public names."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if re.search(r"\.[kv]_proj\.", name):
            continue  # goes with the queries
        if ".q_proj." in name:
            key, value = (state[name.replace("q_proj", f"{part}_proj")] for part in "kv")
            tensor = torch.cat((halves(tensor, head_dim, back=True), halves(key, head_dim, back=True), value))
            name = name.replace("q_proj", "qkv_proj")
        theirs[hub.renamed(name, _NAMES, _LAYER, back=True)] = tensor
    return theirs


def owns(folder: Path, config: dict[str, Any]) -> bool:
    """A folder with a file of a model and the file of its image tokenizer."""
    return bool(list(folder.glob("c2i_*.pt"))) and (folder / TOKENIZER).is_file()


def load(folder: Path, dtype: torch.dtype | None, variant: str | None = None) -> UnifiedModel:
    """The model in `folder`, in the public layout or in ours, strictly. dtype: None is as it is stored. variant: the
    name of the file, where there are several."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    if (folder / hub.MANIFEST).is_file():
        image_tokenizer = load_tokenizer(folder / "image_tokenizer")
        config = LlamaConfig(**hub.read_json(folder / hub.CONFIG))
        if "hidden_size" not in hub.read_json(folder / hub.CONFIG):  # a class's defaults are a model of billions
            raise ValueError(f"{folder / hub.CONFIG} has no hidden_size: it is damaged")
        state = {f"lm.{name}": tensor for name, tensor in hub.read_weights(folder).items()}
        state |= hub.read_tensors(folder / "backbone" / "model.safetensors")
        classes = state["classes.weight"].shape[0]
    else:
        path = hub.one_of(folder, "c2i_*.pt", variant)
        state = hub.read_tensors(path)
        try:
            width = state["tok_embeddings.weight"].shape[1]
            classes = state["cls_embedding.embedding_table.weight"].shape[0]
            wide = state["layers.0.feed_forward.w1.weight"].shape[0]
        except KeyError as error:
            raise ValueError(
                f"checkpoint {path} has no {error.args[0]}: it is no class-conditional LlamaGen"
            ) from error
        size = re.search(r"_(\d+)$", path.stem)
        if not size or int(size[1]) % STRIDE:
            raise ValueError(f"{path.name}: the size of its pictures has to end the name, as in c2i_B_256.pt")
        image_tokenizer = vqgan.from_public(hub.read_tensors(folder / TOKENIZER), int(size[1]), "llamagen")
        head_dim = HEAD_WIDTHS.get(width, 64)
        layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
        config = LlamaConfig(
            vocab_size=state["tok_embeddings.weight"].shape[0],
            hidden_size=width,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=width // head_dim,
            head_dim=head_dim,
            rms_norm_eps=1e-5,
            max_position_embeddings=1 + image_tokenizer.grid[0] ** 2,
            tie_word_embeddings=False,
        )
        state = from_public(state, head_dim)
    with no_init_weights():
        lm = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        backbone = LlamaGenBackbone(lm, classes, image_tokenizer.grid[0])
    hub.load_strict(backbone.to(dtype or state["classes.weight"].dtype), state, folder)
    codes = image_tokenizer.grid[0] * image_tokenizer.grid[1]
    template = ClassTemplate(classes - 1, codes)
    writers: dict[str, Generator] = {"next-token": NextToken(image_tokenizer.grid)}
    vocabulary = Vocabulary(classes, image_tokenizer.codebook_size)
    model = UnifiedModel("llamagen", backbone, vocabulary, None, image_tokenizer, template, writers)
    model.sample_by("next-token", **SAMPLING)
    return model


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the two files of the public layout."""
    tokenizer = model.image_tokenizer
    assert isinstance(tokenizer, vqgan.VQGAN)
    state = to_public(model.backbone.state_dict(), model.backbone.lm.config.head_dim)
    torch.save({"model": state}, folder / f"c2i_model_{tokenizer.image_size}.pt")
    torch.save({"model": vqgan.to_public(tokenizer, "llamagen")}, folder / TOKENIZER)
    save_json(folder / hub.CONFIG, {"model_type": "llamagen"})
