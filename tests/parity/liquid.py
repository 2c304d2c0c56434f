"""Liquid against transformers' Gemma run as the official scripts run it, and its VQGAN against the official one.

The goldens of the VQGAN are made from `checkpoint` by the official class:
    UNIGEN_REFERENCE_LIQUID=<Liquid>/evaluation python scripts/parity.py liquid --goldens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import unigen
from tests.parity import common
from tests.parity.common import ParityRow, max_error, mismatch_share
from unigen.document import Document, Segment
from unigen.generators import next_token
from unigen.models import liquid
from unigen.samplers.logits import SamplingOptions, exponential_race_sample
from unigen.tokenizers import vqgan

SIDE, CODES = 32, 512
SIZE, PROMPT = (SIDE, SIDE), "a red apple"
CLI_ARGUMENTS = [PROMPT]
"""SIZE, PROMPT, CLI_ARGUMENTS: what tests of all families draw, in Python and by the command."""
PROMPTS = ("a red apple on a blue table", "What is in the picture")
DDCONFIG: dict[str, Any] = {
    "double_z": False, "z_channels": 16, "resolution": SIDE, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 2], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip


def image_tokenizer_tensors() -> dict[str, Tensor]:
    """A small VQGAN with random weights in taming's layout."""
    config = vqgan.VQGANConfig(SIDE, (32, 32, 64), 2, 16, 16, CODES)
    return common.randomize_state(vqgan.to_public(vqgan.VQGAN(config)), seed=1, scale=1.4)


def checkpoint(folder: Path) -> None:
    """A model folder as the public one: Gemma's files, and Chameleon's image tokenizer beside them."""
    from transformers import GemmaConfig, GemmaForCausalLM, GemmaTokenizer

    lines = [
        "a red apple on a blue table Generate an image based on this description. What is in the picture\nuser model"
    ]
    specials = ["<start_of_turn>", "<end_of_turn>", liquid.BOI, liquid.EOI, liquid.UNCOND]
    tokenizer = GemmaTokenizer().train_new_from_iterator(lines * 4, 300, new_special_tokens=specials)
    tokenizer.save_pretrained(folder)
    config = GemmaConfig(**GEMMA, vocab_size=len(tokenizer) + CODES, pad_token_id=tokenizer.pad_token_id)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    lm = GemmaForCausalLM(config)
    lm.load_state_dict(common.randomize_state(lm.state_dict(), seed=2, scale=2.0), strict=True)
    lm.tie_weights()
    lm.save_pretrained(folder)
    (folder / "tokenizer").mkdir()
    torch.save({"state_dict": image_tokenizer_tensors()}, folder / "tokenizer" / "vqgan.ckpt")
    (folder / "tokenizer" / "vqgan.yaml").write_text(f"model:\n  params:\n    ddconfig:\n      resolution: {SIDE}\n")


def pixels() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1


def picture() -> Image.Image:
    array = ((pixels()[0, :, :, :24] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def make_goldens(folder: Path) -> None:
    """Codes and pixels of the official class."""
    with common.importable(folder):
        from chameleon.inference.vqgan import VQModel  # type: ignore[import-not-found]
    model = VQModel(DDCONFIG, CODES, 16).eval()
    model.load_state_dict(image_tokenizer_tensors())
    with torch.no_grad():
        ids_N = model.encode(pixels())[2][2].reshape(-1)
        made_BCHW = model.decode(model.quantize.get_codebook_entry(ids_N, (2, 8, 8, 16)))
    save_file({"codes": ids_N.reshape(2, 8, 8), "pixels": made_BCHW}, common.GOLDENS / "liquid_vqgan.safetensors")


class Reference:
    """transformers' Gemma as the official scripts use it: rows padded on the left, no cache, the whole vocabulary."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, GemmaForCausalLM

        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.add_bos_token = True
        self.lm = GemmaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.offset = len(self.tokenizer)

    def prompts(self, words: str) -> tuple[list[int], list[int]]:
        texts = [f"{words} Generate an image based on this description.<boi>", "<unconditional><boi>"]
        return tuple(self.with_start(text) for text in texts)  # type: ignore[return-value]

    def with_start(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [self.tokenizer.bos_token_id, *ids]

    @torch.no_grad()
    def guided(self, words: str, codes: list[int], scale: float) -> Tensor:
        """Logits (V,) of the whole vocabulary after these codes."""
        rows = [[*prompt, *(code + self.offset for code in codes)] for prompt in self.prompts(words)]
        longest = max(map(len, rows))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        condition, blind = self.lm(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        return blind + scale * (condition - blind)

    def codes(self, words: str, length: int, sampling: SamplingOptions, scale: float, seed: int) -> list[int]:
        """The official sampler: temperature, text out, top-k, top-p, a draw."""
        rng = torch.Generator().manual_seed(seed * 1_000_003 + 1)
        codes: list[int] = []
        for _ in range(length):
            logits_V = self.guided(words, codes, scale)
            if sampling.temperature == 0:
                codes.append(int(logits_V[self.offset :].argmax()))
                continue
            logits_V = logits_V / sampling.temperature
            logits_V[: self.offset] = -torch.inf
            logits_V[logits_V < logits_V.topk(sampling.top_k).values[-1]] = -torch.inf
            sorted_V, order_V = logits_V.sort(descending=True)
            above_V = sorted_V.softmax(-1).cumsum(-1) > sampling.top_p
            above_V = torch.cat((above_V.new_zeros(1), above_V[:-1]))
            logits_V[order_V[above_V]] = -torch.inf
            drawn_K = logits_V.softmax(-1)[self.offset :]
            noise_K = torch.empty(len(drawn_K)).exponential_(generator=rng)
            codes.append(int(exponential_race_sample(drawn_K[None], noise_K[None])))
        return codes


def rows(folder: Path) -> Iterator[ParityRow]:
    engine = unigen.load(str(folder), device="cpu")
    model, reference = engine.model, Reference(folder)
    template, begin = model.template, model.template.begin_ids["next-token"]
    reference_name = "transformers' Gemma"

    documents = [Document.of(words) for words in PROMPTS]
    engine_output = [
        [*template.prompt(document, output="image", branch=blind).ids, begin]
        for document in documents
        for blind in (False, True)
    ]
    flat = [id for ids in engine_output for id in ids]
    reference_output = [id for words in PROMPTS for ids in reference.prompts(words) for id in ids]
    empty = [
        id for words in PROMPTS for ids in (reference.prompts(words)[0], reference.with_start("<boi>")) for id in ids
    ]
    mistake = "guidance against no words"
    yield ParityRow(
        "liquid prompt ids",
        mismatch_share(flat, reference_output),
        mismatch_share(flat, empty),
        mistake,
        "the official strings",
    )

    prompt_document = Document([Segment(image=picture()), Segment(text=PROMPTS[1])])
    read = model.encode_document(prompt_document)
    before, after = (
        reference.with_start("<start_of_turn>user\n<boi>"),
        reference.with_start(f"<eoi>\n{PROMPTS[1]}<end_of_turn>\n<start_of_turn>model\n")[1:],
    )
    padded_ids = Image.new("RGB", (SIDE, SIDE), (122, 116, 104))
    padded_ids.paste(picture(), ((SIDE - 24) // 2, 0))
    cropped = picture().crop((0, 4, 24, 28)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    shares = []
    for text in (padded_ids, cropped):
        codes = model.image_tokenizer.encode(torch.tensor(list(text.tobytes())).reshape(1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 127.5 - 1)  # fmt: skip  # noqa: E501
        official = [*before, *(codes + reference.offset).flatten().tolist(), *after]
        shares.append(mismatch_share(model.token_ids(template.prompt(read, output="text")), official))
    yield ParityRow("liquid question ids", shares[0], shares[1], "the centre of the picture", "the official strings")

    # logits after guidance and legality: the first, the second, at the end of a row and the last
    height, width = model.image_tokenizer.grid
    places = (0, 1, width - 1, height * width - 1)
    with common.record_logits(next_token) as steps:
        engine.generate(PROMPTS[0], temperature=0.0)
    greedy = reference.codes(PROMPTS[0], height * width, SamplingOptions(0.0), 7.0, 0)
    reference_values = torch.stack(
        [reference.guided(PROMPTS[0], greedy[:position], 7.0)[reference.offset :] for position in places]
    )
    engine_values = torch.stack([steps[position][0] for position in places])
    with without_embedding_scale(model), common.record_logits(next_token) as wrong:
        engine.generate(PROMPTS[0], temperature=0.0)
    mistaken = torch.stack([wrong[position][0] for position in places])
    yield ParityRow(
        "liquid logits",
        max_error(engine_values, reference_values),
        max_error(mistaken, reference_values),
        "codes not scaled by sqrt(width)",
        reference_name,
    )

    for name, sampling, seed in (("greedy", SamplingOptions(0.0), 0), ("sampled", SamplingOptions(1.0, 100, 0.96), 5)):
        options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        written, expected_ids, control = [], [], []
        for words in PROMPTS:
            written += codes_of(engine, words, seed, **options)
            expected_ids += reference.codes(words, height * width, sampling, 7.0, seed)
            control += codes_of(engine, words, seed, **options, guidance=8.0)
        assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
        yield ParityRow(
            f"liquid {name} ids",
            mismatch_share(written, expected_ids),
            mismatch_share(control, expected_ids),
            "1 + s for s",
            reference_name,
        )

    golden = load_file(common.GOLDENS / "liquid_vqgan.safetensors")
    tokenizer = model.image_tokenizer
    official_codes, official_pixels = golden["codes"], golden["pixels"].clamp(-1, 1)
    share = float((tokenizer.encode(pixels()) != official_codes).float().mean())
    control_share = float((tokenizer.encode((pixels() + 1) / 2) != official_codes).float().mean())
    yield ParityRow(
        "liquid pixels to codes", share, control_share, "pixels in [0, 1]", "the official VQModel (goldens)"
    )
    outputs = tokenizer.decode(official_codes)
    turned = tokenizer.decode(official_codes.transpose(1, 2))
    yield ParityRow(
        "liquid codes to pixels", max_error(outputs, official_pixels), max_error(turned, official_pixels),
        "columns for rows",
        "the official VQModel (goldens)",
    )  # fmt: skip


def codes_of(engine: Any, words: str, seed: int, **options: Any) -> list[int]:
    request = engine.build_request(words, "image", seed=seed, **options)
    list(engine.run_requests([request]))
    codes: Tensor = request.document.segments[-1].image
    return codes.flatten().tolist()  # type: ignore[no-any-return]


class without_embedding_scale:  # noqa: N801
    """The mistake of the control: image codes whose embeddings are not multiplied by sqrt(width), as Gemma's are."""

    def __init__(self, model: Any) -> None:
        self.backbone, self.offset = model.backbone, model.vocabulary.text_size

    def __enter__(self) -> None:
        embed: Callable[[Tensor], Tensor] = self.backbone.embed
        scale = self.backbone.width**0.5
        self.backbone.embed = lambda ids: torch.where(ids[..., None] >= self.offset, embed(ids) / scale, embed(ids))

    def __exit__(self, *_: Any) -> None:
        del self.backbone.embed
