"""Pipelines of diffusers with random weights, as small as their classes allow: one function a class, by name.

pipe = make("FluxPipeline")
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz,."
TEXTS = ["a red dog on a blue hill, a witch and her raven in the snow"] * 4
PIPELINES: dict[str, Callable[[], Any]] = {}


def register(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a function under the name of the class that it makes."""
    PIPELINES[function.__name__] = function
    return function


def make_pipeline(name: str) -> Any:
    """A pipeline of this class; the same weights each time, none of them 0: networks begin with heads of zeros, which
    would hear neither words nor guidance."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for weight in part.eval().parameters():
                if weight.ndim > 1 and not weight.any():
                    weight.data.normal_(0, 0.1)
    return pipe


# --- parts ----------------------------------------------------------------------------------------------------------


@functools.cache
def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocab = {f"{c}</w>": i for i, c in enumerate(LETTERS)} | {c: 30 + i for i, c in enumerate(LETTERS)}
    vocab |= {"<|startoftext|>": 60, "<|endoftext|>": 61}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def make_clip(projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, projection_dim=32,
        vocab_size=62, bos_token_id=60, eos_token_id=61, pad_token_id=61,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


@functools.cache
def byte_tokenizer() -> Any:
    """Pieces of a byte-level BPE; stands in for the sentencepiece models of T5, Gemma, Qwen and others."""
    from tokenizers.processors import TemplateProcessing
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(TEXTS, 300)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "pad_token": "<pad>", "eos_token": "<eos>"})
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.backend_tokenizer.post_processor = begin  # no prompt is of no pieces
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}"
        "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}"
        "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    return tokenizer


def make_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=len(byte_tokenizer()))
    )


def make_causal_lm(kind: str) -> Any:
    """A language model of transformers by the name of its class, such as Gemma2Model."""
    import transformers

    config = getattr(transformers, kind.replace("ForCausalLM", "").replace("Model", "") + "Config")
    return getattr(transformers, kind)(
        config(
            hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=len(byte_tokenizer()), pad_token_id=0,
        )
    )  # fmt: skip


def qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": len(byte_tokenizer()),
                "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
            },
            vision_config={
                "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            },
            vision_start_token_id=1, vision_end_token_id=2, vision_token_id=3, image_token_id=4, video_token_id=5,
        )
    )  # fmt: skip


def make_vae(channels: int = 4, blocks: int = 2, **more: Any) -> Any:
    """An image autoencoder that scales by 2 a block but the first."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16,) * blocks, latent_channels=channels, norm_num_groups=8, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **more,
    )  # fmt: skip


def make_flow_vae(channels: int = 4, blocks: int = 2) -> Any:
    return make_vae(
        channels, blocks, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5
    )


def make_unet(cross: int = 32, channels: int = 4, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=channels, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross, **more,
    )  # fmt: skip


def make_ddim_scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, steps_offset=1)


def make_flow_scheduler(**more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


# --- pipelines with a U-Net -----------------------------------------------------------------------------------------


def _stable(kind: str, channels: int = 4, **more: Any) -> Any:
    import diffusers

    return getattr(diffusers, kind)(
        vae=make_vae(), text_encoder=make_clip(), tokenizer=clip_tokenizer(), unet=make_unet(channels=channels, **more),
        scheduler=make_ddim_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@register
def StableDiffusionPipeline() -> Any:
    return _stable("StableDiffusionPipeline")


@register
def StableDiffusionImg2ImgPipeline() -> Any:
    return _stable("StableDiffusionImg2ImgPipeline")


@register
def StableDiffusionInpaintPipeline() -> Any:
    return _stable("StableDiffusionInpaintPipeline", 9)


@register
def StableDiffusionInstructPix2PixPipeline() -> Any:
    return _stable("StableDiffusionInstructPix2PixPipeline", 8)


@register
def LatentConsistencyModelPipeline() -> Any:
    from diffusers import LatentConsistencyModelPipeline as Kind
    from diffusers import LCMScheduler

    return Kind(
        vae=make_vae(), text_encoder=make_clip(), tokenizer=clip_tokenizer(), unet=make_unet(time_cond_proj_dim=32),
        scheduler=LCMScheduler(clip_sample=False, set_alpha_to_one=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@register
def StableDiffusionXLPipeline() -> Any:
    from diffusers import StableDiffusionXLPipeline as Kind

    return Kind(
        vae=make_vae(), text_encoder=make_clip(), text_encoder_2=make_clip(True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), scheduler=make_ddim_scheduler(), add_watermarker=False,
        unet=make_unet(
            64, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
    )  # fmt: skip


@register
def KandinskyV22CombinedPipeline() -> Any:
    from diffusers import KandinskyV22CombinedPipeline as Kind
    from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, VQModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    network = UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim=32, cross_attention_dim=32,
        encoder_hid_dim_type="image_proj", down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), block_out_channels=(32, 64),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", layers_per_block=1, attention_head_dim=4,
        resnet_time_scale_shift="scale_shift", class_embed_type=None,
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), in_channels=3,
        latent_channels=4, layers_per_block=1, norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12,
        out_channels=3, up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), vq_embed_dim=4,
    )  # fmt: skip
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1, num_embeddings=77
    )
    torch.nn.init.ones_(prior.clip_std)
    eyes = CLIPVisionConfig(
        hidden_size=32, image_size=32, projection_dim=32, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=1, patch_size=8,
    )  # fmt: skip
    return Kind(
        unet=network, scheduler=make_ddim_scheduler(), movq=movq, prior_prior=prior, prior_text_encoder=make_clip(True),
        prior_image_encoder=CLIPVisionModelWithProjection(eyes), prior_tokenizer=clip_tokenizer(),
        prior_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample=True),
        prior_image_processor=CLIPImageProcessor(size=32, crop_size=32),
    )  # fmt: skip


@register
def Kandinsky3Pipeline() -> Any:
    from diffusers import DDPMScheduler, Kandinsky3UNet, VQModel
    from diffusers import Kandinsky3Pipeline as Kind

    movq = VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), in_channels=3,
        latent_channels=4, layers_per_block=1, norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12,
        out_channels=3, up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), vq_embed_dim=4,
    )  # fmt: skip
    network = Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=32,
    )  # fmt: skip
    schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, variance_type="fixed_small")
    return Kind(tokenizer=byte_tokenizer(), text_encoder=make_t5(), unet=network, scheduler=schedule, movq=movq)


@register
def IFPipeline() -> Any:
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers import IFPipeline as Kind

    network = UNet2DConditionModel(
        sample_size=32, layers_per_block=1, block_out_channels=(32, 64), in_channels=3, out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), encoder_hid_dim=32,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=32, attention_head_dim=8,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), addition_embed_type="text",
        addition_embed_type_num_heads=2, cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )  # fmt: skip
    schedule = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.0,
        prediction_type="epsilon", variance_type="learned_range",
    )  # fmt: skip
    return Kind(
        tokenizer=byte_tokenizer(), text_encoder=make_t5(), unet=network, scheduler=schedule, safety_checker=None,
        feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip


# --- pipelines with a transformer -----------------------------------------------------------------------------------


@register
def DiTPipeline() -> Any:
    from diffusers import DiTPipeline as Kind
    from diffusers import DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    return Kind(transformer, make_vae(), make_ddim_scheduler())


@register
def AuraFlowPipeline() -> Any:
    from diffusers import AuraFlowPipeline as Kind
    from diffusers import AuraFlowTransformer2DModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4,
        pos_embed_max_size=1024,
    )  # fmt: skip
    for weight in transformer.parameters():  # as it begins, its gates leave next to nothing of the words
        if weight.ndim > 1:
            weight.data.normal_(0, 0.3)
    return Kind(byte_tokenizer(), make_t5(), make_vae(), transformer, make_flow_scheduler())


@register
def PixArtSigmaPipeline() -> Any:
    from diffusers import PixArtSigmaPipeline as Kind
    from diffusers import PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=32, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        caption_channels=32, cross_attention_dim=16, out_channels=8, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    return Kind(byte_tokenizer(), make_t5(), make_vae(), transformer, make_ddim_scheduler())


@register
def StableDiffusion3Pipeline() -> Any:
    from diffusers import SD3Transformer2DModel
    from diffusers import StableDiffusion3Pipeline as Kind

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64, out_channels=16,
    )  # fmt: skip
    texts: dict[str, Any] = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer()}
    texts |= {
        "text_encoder": make_clip(True),
        "text_encoder_2": make_clip(True),
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    return Kind(transformer=transformer, scheduler=make_flow_scheduler(), vae=make_flow_vae(16), **texts)


def _flux(kind: str, embeds: bool, channels: int = 4) -> Any:
    import diffusers

    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=channels, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=embeds,
    )  # fmt: skip
    return getattr(diffusers, kind)(
        scheduler=make_flow_scheduler(), vae=make_flow_vae(1), text_encoder=make_clip(), tokenizer=clip_tokenizer(),
        text_encoder_2=make_t5(),
        tokenizer_2=byte_tokenizer(), transformer=transformer,
    )  # fmt: skip


@register
def FluxPipeline() -> Any:
    """As FLUX.1 [dev]: its network reads the guidance."""
    return _flux("FluxPipeline", True)


@register
def FluxKontextPipeline() -> Any:
    return _flux("FluxKontextPipeline", True)


@register
def FluxFillPipeline() -> Any:
    return _flux("FluxFillPipeline", True, channels=24)


def flux_schnell() -> Any:
    """As FLUX.1 [schnell]: its network reads no guidance."""
    return _flux("FluxPipeline", False)


@register
def ChromaPipeline() -> Any:
    from diffusers import ChromaPipeline as Kind
    from diffusers import ChromaTransformer2DModel

    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return Kind(
        scheduler=make_flow_scheduler(),
        vae=make_flow_vae(1),
        text_encoder=make_t5(),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
    )


def _qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def _qwen_transformer() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


@register
def QwenImagePipeline() -> Any:
    from diffusers import QwenImagePipeline as Kind

    return Kind(
        scheduler=make_flow_scheduler(), vae=_qwen_vae(), text_encoder=qwen_vl(), tokenizer=byte_tokenizer(),
        transformer=_qwen_transformer(),
    )  # fmt: skip


@register
def SanaPipeline() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
    from diffusers import SanaPipeline as Kind

    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=32,
        sample_size=32,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    schedule = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, final_sigmas_type="zero"
    )
    return Kind(byte_tokenizer(), make_causal_lm("Gemma2Model"), vae, transformer, schedule)


@register
def Lumina2Pipeline() -> Any:
    from diffusers import Lumina2Pipeline as Kind
    from diffusers import Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2), axes_lens=(512, 512, 512), cap_feat_dim=32,
    )  # fmt: skip
    return Kind(transformer, make_flow_scheduler(), make_flow_vae(4), make_causal_lm("Gemma2Model"), byte_tokenizer())


@register
def HunyuanDiTPipeline() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel
    from diffusers import HunyuanDiTPipeline as Kind
    from transformers import BertConfig, BertModel

    transformer = HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    words = BertModel(
        BertConfig(
            vocab_size=len(byte_tokenizer()), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=37,
        )
    )  # fmt: skip
    return Kind(
        vae=make_vae(blocks=4), text_encoder=words, tokenizer=byte_tokenizer(), transformer=transformer,
        scheduler=DDPMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, text_encoder_2=make_t5(),
        tokenizer_2=byte_tokenizer(),
    )  # fmt: skip


@register
def CogView3PlusPipeline() -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusTransformer2DModel
    from diffusers import CogView3PlusPipeline as Kind

    transformer = CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=2, pos_embed_max_size=32, sample_size=8,
    )  # fmt: skip
    return Kind(byte_tokenizer(), make_t5(), make_vae(), transformer, CogVideoXDDIMScheduler())


@register
def CogView4Pipeline() -> Any:
    from diffusers import CogView4Pipeline as Kind
    from diffusers import CogView4Transformer2DModel

    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    return Kind(
        byte_tokenizer(),
        make_causal_lm("GlmModel"),
        make_vae(),
        transformer,
        make_flow_scheduler(base_shift=0.25, max_shift=0.75),
    )


@register
def ZImagePipeline() -> Any:
    from diffusers import ZImagePipeline as Kind
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=32, rope_theta=256.0, t_scale=1000.0,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return Kind(make_flow_scheduler(), make_flow_vae(), make_causal_lm("Qwen3Model"), byte_tokenizer(), transformer)
