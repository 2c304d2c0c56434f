"""Language models that vLLM has no class for: classes made of vLLM's layers, which vLLM finds by their names.

    vllm.general_plugins: unigen = unigen.backends.vllm_models:register      # an entry point of the package
    {"architectures": ["UnigenChameleonForCausalLM"]}                       # config.json of unigen convert --to vllm

So vLLM runs such a folder in processes of its own too, where the package is installed. Our engine registers the classes
itself. All are plain causal language models over all ids, of text and of image codes, whose tensors keep the names that
they have in transformers. Does not depend on: images, guidance, sampling, prompts.

Shapes: L positions, D width, H heads of width W, T pieces of text, K codes of width C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear
from vllm import ModelRegistry
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.model_executor.utils import set_weight_attrs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Weights = Iterable[tuple[str, Tensor]]
BACKBONE_PREFIX = "backbone."
"""Prefix of the names of tensors in the model's folder `backbone`, beside the language model's tensors."""


def register() -> None:
    """Register the classes with vLLM. To do so again has no effect."""
    for kind in (UnigenChameleonForCausalLM, UnigenJanusForCausalLM):
        ModelRegistry.register_model(kind.__name__, kind)


class HeadNorm(nn.Module):
    """A LayerNorm of each head by itself, with its own weights.

    Args:
        heads: H.
        width: W.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(heads, width)), nn.Parameter(torch.zeros(heads, width))
        for parameter in self.parameters():  # each process has a share of the heads
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})

    def forward(self, x_LD: Tensor) -> Tensor:
        """Normalize the heads of (L, H * W); the shape stays."""
        x_LHW = x_LD.unflatten(-1, self.weight.shape)
        normed_LHW = layer_norm(x_LHW, x_LHW.shape[-1:], eps=1e-5)
        return (normed_LHW * self.weight + self.bias).flatten(-2)


class ChameleonAttention(LlamaAttention):
    """Llama's attention, with norms of queries and keys."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        if self.num_kv_heads * (self.total_num_heads // self.num_heads) != self.total_num_kv_heads:
            raise ValueError(
                f"{self.total_num_kv_heads} heads of keys cannot be shared out: lower tensor_parallel_size"
            )
        self.q_norm = HeadNorm(self.num_heads, self.head_dim)
        self.k_norm = HeadNorm(self.num_kv_heads, self.head_dim)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend.

        Args:
            positions: (L,) int64.
            hidden_states: (L, D).

        Returns:
            The output (L, D).
        """
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, self.q_norm(q), self.k_norm(k))
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class ChameleonLayer(LlamaDecoderLayer):
    """Llama's layer with Chameleon's attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=ChameleonAttention)


class SwinLayer(ChameleonLayer):
    """Layer of Chameleon 34B: the outputs of attention and MLP are normed, and not their inputs."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            positions: (L,) int64.
            hidden_states: (L, D).
            residual: (L, D), or None in the first layer; the residual stream is the sum of both.

        Returns:
            The MLP's normed output and the stream before it, both (L, D).
        """
        stream = hidden_states if residual is None else hidden_states + residual
        stream = stream + self.input_layernorm(self.self_attn(positions=positions, hidden_states=stream))
        return self.post_attention_layernorm(self.mlp(stream)), stream


class UnigenChameleonForCausalLM(LlamaForCausalLM):
    """Chameleon and Lumina-mGPT, with the logits of image codes. The weights of their image tokenizer are not
    loaded."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        swin = vllm_config.model_config.hf_config.swin_norm
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SwinLayer if swin else ChameleonLayer)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load the language model's tensors. Raises ValueError where one is missing. Returns the names of the
        parameters."""
        language = ((name, tensor) for name, tensor in weights if not name.startswith("model.vqmodel."))
        return load_weights_strict(self, AutoWeightsLoader(self).load_weights, language)


class UnigenJanusForCausalLM(LlamaForCausalLM):
    """Janus: a Llama whose image codes are further rows of its embedding table, with a head of their own.

    Its config has two more keys. text_size: pieces of text, which are `lm_head`'s. head_width: width inside the head of
    codes.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model_config, config = vllm_config.model_config, vllm_config.model_config.hf_config
        if get_pp_group().is_last_rank:
            names = {"quant_config": vllm_config.quant_config, "prefix": maybe_prefix(prefix, "lm_head")}
            self.lm_head = ParallelLMHead(config.text_size, config.hidden_size, **names)
            self.logits_processor = LogitsProcessor(config.text_size)
        self.head = nn.Sequential(
            nn.Linear(config.hidden_size, config.head_width),
            nn.GELU(),
            nn.Linear(config.head_width, config.vocab_size - config.text_size),
        )
        backbone_source = DefaultModelLoader.Source(
            model_config.model, model_config.revision, subfolder="backbone", prefix=BACKBONE_PREFIX
        )
        self.secondary_weights = (backbone_source,)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits (L, T + K) of hidden states (L, D); None on the ranks of which vLLM does not gather any."""
        scores = super().compute_logits(hidden_states)
        return None if scores is None else torch.cat((scores, self.head(hidden_states)), -1)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load the tensors of both folders. Raises ValueError where one is missing. Returns the names of the
        parameters."""
        return load_weights_strict(self, AutoWeightsLoader(self).load_weights, self._joined(weights))

    def _joined(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """The tensors by the names of this class; those of codes become rows of the embedding table."""
        table, code_weights = "model.embed_tokens.weight", dict[str, Tensor]()
        for name, tensor in weights:
            if name == table or name.startswith((f"{BACKBONE_PREFIX}table.", f"{BACKBONE_PREFIX}aligner.")):
                code_weights[name.removeprefix(BACKBONE_PREFIX)] = tensor
            else:
                yield name.removeprefix(BACKBONE_PREFIX), tensor
        try:
            text_TD, codes_KC = code_weights.pop(table), code_weights.pop("table.weight")
            wide_KD = gelu(linear(codes_KC, code_weights.pop("aligner.0.weight"), code_weights.pop("aligner.0.bias")))
            codes_KD = linear(wide_KD, code_weights.pop("aligner.2.weight"), code_weights.pop("aligner.2.bias"))
        except KeyError as error:
            raise ValueError(f"the model lacks {error.args[0]}: it is not whole") from error
        yield table, torch.cat((text_TD, codes_KD))
        if self.config.tie_word_embeddings:
            yield "lm_head.weight", text_TD
        yield from code_weights.items()


def load_weights_strict(model: LlamaForCausalLM, load: Callable[[Weights], set[str]], weights: Weights) -> set[str]:
    """Load tensors, and check that none is missing. vLLM raises for a tensor that is left over, and for a parameter
    that gets none, but not for a missing part of a fused parameter.

    Args:
        model: a model of vLLM's.
        load: loads the tensors.
        weights: names and tensors.

    Returns:
        The names of the loaded parameters.

    Raises:
        ValueError: in one line, with the first of the missing tensors.
    """
    weight_names: set[str] = set()

    def record_names() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            weight_names.add(name)
            yield name, tensor

    loaded_names = load(record_names())
    parts: dict[str, list[str]] = {}
    mapper: WeightsMapper = model.hf_to_vllm_mapper
    for part, (fused_name, _) in mapper.orig_to_new_stacked.items():
        parts.setdefault(fused_name, []).append(part)
    required_names: set[str] = set()
    for name, _ in model.named_parameters():
        fused_name = next((fused_name for fused_name in parts if f"{fused_name}." in name), "")
        required_names |= {name.replace(fused_name, part) for part in parts[fused_name]} if fused_name else {name}
    if model.model.quant_config is None and (missing := sorted(required_names - weight_names)):
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"the model lacks {', '.join(missing[:3])}{others}: it is not whole")
    return loaded_names
