"""Janus against its official code: the loop of its script over the tensors of the public folder, SigLIP written out,
and the official VQ-16. In transformers' layout, against transformers' `generate`.

The goldens of the VQ are made from `checkpoint` by the official class:
    UNIGEN_REFERENCE_JANUS=<Janus>/janus/models python scripts/parity.py janus --goldens
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, embedding, gelu, layer_norm, linear, scaled_dot_product_attention

import unigen
from tests.parity import common
from tests.parity.common import ParityRow, max_error, mismatch_share
from unigen.document import Document, Segment
from unigen.generators import next_token
from unigen.hub.resolve import read_json
from unigen.hub.weights import write_tensors
from unigen.models import janus
from unigen.samplers.logits import SamplingOptions, exponential_race_sample
from unigen.tokenizers import vqgan
from unigen.utils.files import save_json

SIDE, CODES, PATCH, HIDDEN = 32, 256, 8, 128
SIZE, PROMPT = (SIDE, SIDE), "a red apple"
CLI_ARGUMENTS = [PROMPT]
PROMPTS = ("a red apple on a blue table", "two dogs")
LANGUAGE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIALS = (BOS, EOS, janus.PAD, janus.USER, janus.ASSISTANT, janus.BOI, janus.EOI)
"""As the public tokenizer.json names them."""
GOLDEN = common.GOLDENS / "janus_vq.safetensors"


def image_tokenizer_tensors() -> dict[str, Tensor]:
    """A small VQ-16 with random weights in the public layout."""
    config = vqgan.VQGANConfig(SIDE, (32, 32, 64), 2, 16, 8, CODES, attention=True, l2_normalize=True)
    return common.randomize_state(vqgan.to_public(vqgan.VQGAN(config), "llamagen"), seed=1, scale=1.4)


def vision_tensors() -> dict[str, Tensor]:
    """SigLIP's, as timm names them, with the pooling that Janus does not use."""
    places = (SIDE // PATCH) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, places, HIDDEN),
        "patch_embed.proj.weight": (HIDDEN, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (HIDDEN,),
        "norm.weight": (HIDDEN,),
        "norm.bias": (HIDDEN,),
        "attn_pool.latent": (1, 1, HIDDEN),
    }
    for block in ("blocks.0", "blocks.1"):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"{block}.{name}.weight"] = (rows * HIDDEN, columns * HIDDEN)
            shapes[f"{block}.{name}.bias"] = (rows * HIDDEN,)
        for name in ("norm1", "norm2"):
            shapes |= {f"{block}.{name}.weight": (HIDDEN,), f"{block}.{name}.bias": (HIDDEN,)}
    return {f"vision_model.vision_tower.{name}": torch.empty(shape) for name, shape in shapes.items()}


def checkpoint(folder: Path) -> None:
    """A model folder in the public layout with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    lines = [f"a red apple on a blue table two dogs What is it {janus.SYSTEM} User: Assistant:\n\n"]
    common.byte_level_tokenizer(folder, lines * 4, SPECIALS)
    size = len(read_json(folder / "tokenizer.json")["model"]["vocab"])
    width, head = LANGUAGE["hidden_size"], 48
    language = LANGUAGE | {"vocab_size": size}
    state = {f"language_model.{k}": v for k, v in LlamaForCausalLM(LlamaConfig(**language)).state_dict().items()}
    state |= vision_tensors() | {"gen_embed.weight": torch.empty(CODES, 8)}
    for name, rows, columns in (
        ("aligner.layers.0", width, HIDDEN), ("aligner.layers.2", width, width), ("gen_aligner.layers.0", width, 8),
        ("gen_aligner.layers.2", width, width), ("gen_head.output_mlp_projector", head, width),
        ("gen_head.vision_head", CODES, head),
    ):  # fmt: skip
        state |= {f"{name}.weight": torch.empty(rows, columns), f"{name}.bias": torch.empty(rows)}
    state = common.randomize_state(state, seed=2, scale=2.0)
    state |= {f"gen_vision_model.{name}": tensor for name, tensor in image_tokenizer_tensors().items()}
    write_tensors(folder / "model.safetensors", state)
    save_json(folder / "config.json", {"model_type": "multi_modality", "language_config": language})
    save_json(folder / "preprocessor_config.json", {"image_size": SIDE})


def transformers_checkpoint(folder: Path, tied: bool = False, heads: int = 4) -> None:
    """A model folder in transformers' layout with random weights, as its conversion script writes one. tied: is the
    head the embeddings? heads: of the vision encoder."""
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig, Qwen2Tokenizer

    lines = [f"a red apple on a blue table two dogs What is it {janus.SYSTEM} User: Assistant:\n\n"]
    names = ["<bos>", janus.USER, janus.ASSISTANT, janus.BOI, janus.EOI, janus.PAD, "<image_placeholder>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(lines * 4, 400, new_special_tokens=names)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "pad_token": janus.PAD})
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    width, known_names = LANGUAGE["hidden_size"], tokenizer.get_vocab()
    config = JanusConfig(
        text_config=LlamaConfig(**LANGUAGE, **ids, vocab_size=len(tokenizer), pad_token_id=known_names[janus.PAD]),
        vision_config={
            "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": heads, "image_size": SIDE,
            "patch_size": PATCH // 2, "projection_dim": width, "num_image_tokens": (SIDE // PATCH * 2) ** 2,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16, "base_channels": 32,
            "channel_multiplier": [1, 1, 2], "projection_dim": width, "image_token_embed_dim": width,
        },
        image_token_id=known_names["<image_placeholder>"], tie_word_embeddings=tied,
    )  # fmt: skip
    model = JanusForConditionalGeneration(config)
    model.load_state_dict(common.randomize_state(model.state_dict(), seed=2, scale=2.0))
    model.tie_weights()
    chosen = model.generation_config
    chosen.guidance_scale, chosen.pad_token_id, chosen.boi_token_id = 5, known_names[janus.PAD], known_names[janus.BOI]
    model.save_pretrained(folder)
    texts = {"image_token": "<image_placeholder>", "boi_token": janus.BOI, "eoi_token": janus.EOI}
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    save_json(settings, read_json(settings) | {"extra_special_tokens": texts})


def pixels() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1


def picture() -> Image.Image:
    array = ((pixels()[0, :, :16] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)  # 32 wide, 16 high


def make_goldens(folder: Path) -> None:
    """Codes and pixels of the official class."""
    with common.importable(folder):
        import vq_model as official  # type: ignore[import-not-found]
    model = official.VQModel(official.ModelArgs(z_channels=16, codebook_size=CODES, codebook_embed_dim=8))
    model.encoder = official.Encoder(ch=32, ch_mult=(1, 1, 2), z_channels=16)
    model.decoder = official.Decoder(ch=32, ch_mult=(1, 1, 2), z_channels=16)
    model.load_state_dict(image_tokenizer_tensors() | {"quantize.codebook_used": model.quantize.codebook_used})
    model.eval()
    with torch.no_grad():
        ids_N = model.encode(pixels())[2][2]
        made_BCHW = model.decode_code(ids_N, [2, 8, 8, 8])
    save_file({"codes": ids_N.reshape(2, 8, 8), "pixels": made_BCHW}, GOLDEN)


class Reference:
    """The official script, over the tensors as they stand in the folder."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import LlamaConfig, LlamaForCausalLM

        self.state = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = LlamaConfig(**read_json(folder / "config.json")["language_config"], attn_implementation="eager")
        self.lm = LlamaForCausalLM(config).eval()
        language = {k.removeprefix("language_model."): v for k, v in self.state.items() if k.startswith("language_")}
        self.lm.load_state_dict(language)

    def layer(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids  # its file puts <bos> in front

    def prompts(self, words: str) -> tuple[list[int], list[int]]:
        ids = self.ids(f"<|User|>: {words}\n\n<|Assistant|>:<begin_of_image>")
        pad = self.tokenizer.token_to_id(janus.PAD)
        return ids, [ids[0]] + [pad] * (len(ids) - 2) + [ids[-1]]

    @torch.no_grad()
    def guided(self, words: str, codes: list[int], scale: float) -> Tensor:
        """Logits (K,) of the next code."""
        read_BLD = self.lm.get_input_embeddings()(torch.tensor(self.prompts(words)))
        if codes:
            drawn_PE = embedding(torch.tensor(codes), self.state["gen_embed.weight"])
            drawn_PD = self.layer("gen_aligner.layers.2", gelu(self.layer("gen_aligner.layers.0", drawn_PE)))
            read_BLD = torch.cat((read_BLD, drawn_PD.expand(2, -1, -1)), 1)
        last_BD = self.lm.model(inputs_embeds=read_BLD, use_cache=False).last_hidden_state[:, -1]
        projected = gelu(self.layer("gen_head.output_mlp_projector", last_BD))
        cond_ids, blind = self.layer("gen_head.vision_head", projected)
        return blind + scale * (cond_ids - blind)

    def codes(self, words: str, length: int, sampling: SamplingOptions, scale: float, seed: int) -> list[int]:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + 1)
        codes: list[int] = []
        for _ in range(length):
            logits_K = self.guided(words, codes, scale)
            if sampling.temperature == 0:
                codes.append(int(logits_K.argmax()))
                continue
            noise_K = torch.empty(CODES).exponential_(generator=rng)
            codes.append(
                int(exponential_race_sample((logits_K / sampling.temperature).softmax(-1)[None], noise_K[None]))
            )
        return codes

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """SigLIP (a plain vision transformer, pre-norm, gelu) and the aligner."""
        name = "vision_model.vision_tower."
        position = lambda key: self.state[name + key]  # noqa: E731
        x = conv2d(x_BCHW, position("patch_embed.proj.weight"), position("patch_embed.proj.bias"), stride=PATCH)
        x = x.flatten(2).transpose(1, 2) + position("pos_embed")
        norm = lambda x, key: layer_norm(x, (HIDDEN,), position(f"{key}.weight"), position(f"{key}.bias"), 1e-6)  # noqa: E731
        for block in ("blocks.0", "blocks.1"):
            qkv = self.layer(f"{name}{block}.attn.qkv", norm(x, f"{block}.norm1"))
            q, k, v = qkv.unflatten(-1, (3, HIDDEN // janus.VISION_HEAD_DIM, -1)).permute(2, 0, 3, 1, 4)
            mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.layer(f"{name}{block}.attn.proj", mixed)
            x = x + self.layer(f"{name}{block}.mlp.fc2", gelu(self.layer(f"{name}{block}.mlp.fc1", norm(x, f"{block}.norm2"))))  # fmt: skip  # noqa: E501
        return self.layer("aligner.layers.2", gelu(self.layer("aligner.layers.0", norm(x, "norm"))))

    @torch.no_grad()
    def answer(self, words: str, pixels_CHW: Tensor) -> Tensor:
        """Logits (V,) of the first id of an answer."""
        before = self.ids(f"{janus.SYSTEM}\n\n<|User|>: <begin_of_image>")
        after = self.ids(f"<end_of_image>\n{words}\n\n<|Assistant|>:")[1:]
        table = self.lm.get_input_embeddings()
        read_LD = torch.cat((table(torch.tensor(before)), self.features(pixels_CHW[None])[0], table(torch.tensor(after))))  # fmt: skip  # noqa: E501
        return self.lm(inputs_embeds=read_LD[None], use_cache=False).logits[0, -1]  # type: ignore[no-any-return]


def rows(folder: Path) -> Iterator[ParityRow]:
    engine = unigen.load(str(folder), device="cpu")
    model, reference = engine.model, Reference(folder)
    template, begin = model.template, model.template.begin_ids["next-token"]
    script = "the official loop over the public tensors"

    documents = [Document.of(words) for words in PROMPTS]
    outputs = [[*template.prompt(document, output="image", branch=blind).ids, begin] for document in documents for blind in (False, True)]  # fmt: skip  # noqa: E501
    engine_output = [id for ids in outputs for id in ids]
    reference_output = [id for words in PROMPTS for ids in reference.prompts(words) for id in ids]
    seen = [id for words in PROMPTS for ids in (reference.prompts(words)[0],) * 2 for id in ids]
    yield ParityRow(
        "janus prompt ids",
        mismatch_share(engine_output, reference_output),
        mismatch_share(seen, reference_output),
        "no padding",
        "the official strings",
    )

    prompt_document = Document([Segment(image=picture()), Segment(text="What is it")])
    padded_ids = Image.new("RGB", (SIDE, SIDE), (127, 127, 127))
    padded_ids.paste(picture(), (0, 8))
    pixels_CHW = torch.tensor(list(padded_ids.tobytes())).reshape(SIDE, SIDE, 3).permute(2, 0, 1) / 127.5 - 1
    reference_values = reference.answer("What is it", pixels_CHW)
    runs = []
    for text in (
        prompt_document,
        Document([Segment(image=picture().resize((SIDE, SIDE))), *prompt_document.segments[1:]]),
    ):
        with common.record_logits(next_token) as steps:
            engine.generate(text, "text", max_tokens=1)
        runs.append(steps[0][0])
    legal = runs[0].isfinite()
    yield ParityRow(
        "janus answer logits", max_error(runs[0][legal], reference_values[legal]),
        max_error(runs[1][legal], reference_values[legal]),
        "a picture stretched", "SigLIP written out, transformers' Llama",
    )  # fmt: skip

    height, width = model.image_tokenizer.grid
    places = (0, 1, width - 1, height * width - 1)
    greedy = reference.codes(PROMPTS[0], height * width, SamplingOptions(0.0), 5.0, 0)
    reference_values = torch.stack([reference.guided(PROMPTS[0], greedy[:position], 5.0) for position in places])
    runs = []
    for with_mistake in (False, True):
        with codes_as_text(model, with_mistake), common.record_logits(next_token) as steps:
            engine.generate(PROMPTS[0], temperature=0.0)
        runs.append(torch.stack([steps[position][0] for position in places]))
    mistake = "codes through the text's table"
    yield ParityRow(
        "janus logits", max_error(runs[0], reference_values), max_error(runs[1], reference_values), mistake, script
    )

    for name, sampling, seed in (("greedy", SamplingOptions(0.0), 0), ("sampled", SamplingOptions(1.0), 5)):
        written, expected_ids, control = [], [], []
        for words in PROMPTS:
            options = {"seed": seed, "temperature": sampling.temperature}
            expected_ids += reference.codes(words, height * width, sampling, 5.0, seed)
            for with_mistake, sampled_ids in ((False, written), (True, control)):
                request = engine.build_request(words, "image", **options)
                with codes_as_text(model, with_mistake):
                    list(engine.run_requests([request]))
                sampled_ids += request.document.segments[-1].image.flatten().tolist()
        assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
        yield ParityRow(
            f"janus {name} ids",
            mismatch_share(written, expected_ids),
            mismatch_share(control, expected_ids),
            mistake,
            script,
        )

    golden, tokenizer = load_file(GOLDEN), model.image_tokenizer
    share = float((tokenizer.encode(pixels()) != golden["codes"]).float().mean())
    long = vqgan.VQGAN(vqgan.VQGANConfig(**without_unit(tokenizer)))
    long.load_state_dict(tokenizer.state_dict())
    wrong = float((long.encode(pixels()) != golden["codes"]).float().mean())
    reference_name, mistake = "the official VQ-16 (goldens)", "not of unit length"
    yield ParityRow("janus pixels to codes", share, wrong, mistake, reference_name)
    reference_values = golden["pixels"].clamp(-1, 1)
    made_BCHW, wrong_BCHW = tokenizer.decode(golden["codes"]), long.eval().decode(golden["codes"])
    yield ParityRow(
        "janus codes to pixels",
        max_error(made_BCHW, reference_values),
        max_error(wrong_BCHW, reference_values),
        mistake,
        reference_name,
    )

    with tempfile.TemporaryDirectory() as scratch:
        transformers_checkpoint(Path(scratch))
        yield from transformers_rows(Path(scratch))


class Transformers:
    """transformers' own processor and `generate`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, GenerationConfig, JanusForConditionalGeneration, JanusProcessor
        from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

        self.model = JanusForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
        images = JanusImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": SIDE, "width": SIDE})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        count = self.model.config.vision_config.num_image_tokens
        self.processor = JanusProcessor(images, tokenizer, num_image_tokens=count)
        self.config = GenerationConfig.from_pretrained(folder)
        self.config.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids(janus.BOI)}

    def chosen(self, **options: Any) -> Any:
        config = copy.deepcopy(self.config)
        config.update(**options)
        return config

    def asked(self, words: str, image: Image.Image | None = None) -> Any:
        """What is read to draw, or to answer where there is a picture."""
        from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

        if image is None:
            text = f"<bos><|User|>: {words}\n\n<|Assistant|>:"
            return self.processor(text=[text], generation_mode="image")
        text = f"<bos>{DEFAULT_SYSTEM_PROMPT}<|User|>: <image_placeholder>\n{words}\n\n<|Assistant|>:"
        return self.processor(text=[text], images=[image])

    def draw(self, words: str, **options: Any) -> tuple[list[int], Tensor]:
        """Codes, and the logits (N, K) of each after guidance."""
        steps: list[Tensor] = []

        def watched(_: Tensor, scores_BK: Tensor) -> Tensor:
            cond_ids, blind = scores_BK.double()
            steps.append(blind + 5.0 * (cond_ids - blind))
            return scores_BK

        outputs = self.model.generate(
            **self.asked(words), generation_mode="image", generation_config=self.chosen(**options),
            logits_processor=[watched],
        )  # fmt: skip
        return outputs[0].tolist(), torch.stack(steps)

    def answer(self, words: str, image: Image.Image, forbidden: list[int], length: int) -> tuple[list[int], Tensor]:
        """Ids of a greedy answer, and the logits (V,) of the first."""
        prompt_document = self.asked(words, image)
        chosen = self.chosen(
            max_new_tokens=length, max_length=None, suppress_tokens=forbidden, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        outputs = self.model.generate(**prompt_document, generation_config=chosen)
        return outputs.sequences[0, prompt_document["input_ids"].shape[1] :].tolist(), outputs.logits[0][0]


def transformers_rows(folder: Path) -> Iterator[ParityRow]:
    engine = unigen.load(str(folder), device="cpu")
    model, reference = engine.model, Transformers(folder)
    template, begin, reference_name = model.template, model.template.begin_ids["next-token"], "transformers' generate"

    engine_output = [
        id for words in PROMPTS for id in (*template.prompt(Document.of(words), output="image").ids, begin)
    ]
    blind = [
        id for words in PROMPTS for id in (*template.prompt(Document.of(words), output="image", branch=1).ids, begin)
    ]
    reference_output = [id for words in PROMPTS for id in reference.asked(words)["input_ids"][0].tolist()]
    yield ParityRow(
        "janus-hf prompt ids",
        mismatch_share(engine_output, reference_output),
        mismatch_share(blind, reference_output),
        "padding",
        "JanusProcessor",
    )

    prompt_document = Document([Segment(image=picture()), Segment(text="What is it")])
    turned = Document([Segment(image=picture().resize((SIDE, SIDE))), *prompt_document.segments[1:]])
    forbidden = [id for id in model.generators["text"].forbidden_ids if id not in template.stop_token_ids]
    ids, reference_values = reference.answer("What is it", picture(), forbidden, 16)
    runs = []
    for text in (prompt_document, turned):
        with common.record_logits(next_token) as steps:
            request = engine.build_request(text, "text", max_tokens=16)
            list(engine.run_requests([request]))
        texts = template.tokenizer(request.document.segments[-1].text, add_special_tokens=False)["input_ids"]
        runs.append((steps[0][0], texts))
    legal, mistake = runs[0][0].isfinite(), "a picture stretched"
    yield ParityRow(
        "janus-hf answer logits", max_error(runs[0][0][legal], reference_values[legal]),
        max_error(runs[1][0][legal], reference_values[legal]),
        mistake, reference_name,
    )  # fmt: skip
    assert len(ids) == 16
    decoded_text = template.tokenizer(template.decode(ids), add_special_tokens=False)["input_ids"]
    yield ParityRow(
        "janus-hf answer ids",
        mismatch_share(runs[0][1], decoded_text),
        mismatch_share(runs[1][1], decoded_text),
        mistake,
        reference_name,
    )

    codes, steps_NK = reference.draw(PROMPTS[0], do_sample=False)
    places, mistake = [0, 1, model.image_tokenizer.grid[1] - 1, len(codes) - 1], "codes through the text's table"
    runs = []
    for trapped in (False, True):
        with codes_as_text(model, trapped), common.record_logits(next_token) as steps:
            request = engine.build_request(PROMPTS[0], "image", temperature=0.0)
            list(engine.run_requests([request]))
        runs.append((torch.stack([steps[position][0] for position in places]), generated_codes(request)))
    reference_values = steps_NK[places]
    yield ParityRow(
        "janus-hf logits",
        max_error(runs[0][0], reference_values),
        max_error(runs[1][0], reference_values),
        mistake,
        reference_name,
    )
    assert len(set(codes)) >= 32, f"too few different codes: {len(set(codes))}"
    yield ParityRow(
        "janus-hf greedy ids",
        mismatch_share(runs[0][1], codes),
        mismatch_share(runs[1][1], codes),
        mistake,
        reference_name,
    )

    sampled_ids: dict[bool, list[int]] = {False: [], True: []}
    expected_ids = []
    for words in PROMPTS:
        torch.manual_seed(5 * 1_000_003 + 1)
        expected_ids += reference.draw(words, do_sample=True, top_k=0)[0]
        for trapped, written in sampled_ids.items():
            request = engine.build_request(words, "image", seed=5)
            with codes_as_text(model, trapped):
                list(engine.run_requests([request]))
            written += generated_codes(request)
    yield ParityRow(
        "janus-hf sampled ids",
        mismatch_share(sampled_ids[False], expected_ids),
        mismatch_share(sampled_ids[True], expected_ids),
        mistake,
        reference_name,
    )

    made_Bhw = torch.tensor(expected_ids).unflatten(0, (2, *model.image_tokenizer.grid))
    with torch.no_grad():
        reference_values = reference.model.decode_image_tokens(made_Bhw.flatten(1)).permute(0, 3, 1, 2).clamp(-1, 1)
    engine_values, turned_BCHW = (model.image_tokenizer.decode(codes_Bhw) for codes_Bhw in (made_Bhw, made_Bhw.mT))
    yield ParityRow(
        "janus-hf codes to pixels", max_error(engine_values, reference_values),
        max_error(turned_BCHW.mT, reference_values),
        "columns for rows",
        "decode_image_tokens",
    )  # fmt: skip


def generated_codes(request: Any) -> list[int]:
    return request.document.segments[-1].image.flatten().tolist()  # type: ignore[no-any-return]


def without_unit(tokenizer: Any) -> dict[str, Any]:
    return {k: v for k, v in tokenizer.config().items() if k != "kind"} | {"l2_normalize": False}


class codes_as_text:  # noqa: N801
    """The mistake of the control: codes read through the text's table, where `on`."""

    def __init__(self, model: Any, on: bool) -> None:
        self.backbone, self.on = model.backbone, on

    def __enter__(self) -> None:
        if self.on:
            table = self.backbone.lm.get_input_embeddings()
            self.backbone.embed = lambda ids: table(ids % table.num_embeddings)

    def __exit__(self, *_: Any) -> None:
        if self.on:
            del self.backbone.embed
