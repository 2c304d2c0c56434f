"""Chameleon against transformers: its layers without its mask, its VQ encoder; the VQGAN's decoder against Liquid's
goldens, which are of the same official class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import unigen
from tests.parity import common
from tests.parity import liquid as vq_case
from tests.parity.common import ParityRow, max_error, mismatch_share
from unigen.document import Document, Segment
from unigen.generators import next_token
from unigen.models import chameleon
from unigen.samplers.logits import SamplingOptions, exponential_race_sample

SIDE, CODES = vq_case.SIDE, vq_case.CODES
SIZE, PROMPT = (SIDE, SIDE), "a red apple"
CLI_ARGUMENTS = [PROMPT]
WORDS = "what comes next"
SCALES = (3.0, 1.2)
LM: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
VQ: dict[str, Any] = {
    "embed_dim": 16, "num_embeddings": CODES, "latent_channels": 16, "resolution": SIDE, "base_channels": 32,
    "channel_multiplier": [1, 1, 2], "num_res_blocks": 2, "attn_resolutions": None, "attn_type": "vanilla",
}  # fmt: skip


def checkpoint(folder: Path) -> None:
    """A model folder in transformers' layout with random weights, its codes spelt in no order, and the image tokenizer
    in its own file."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration, Qwen2Tokenizer

    names = ["<s>", "<pad>", "</s>", "<unk>"]
    order = torch.randperm(CODES, generator=torch.Generator().manual_seed(9)).tolist()
    names += [chameleon.code_token(code) for code in order]
    names += [chameleon.EOI, chameleon.BOI, chameleon.EOT, "<image>"]
    lines = ["a red apple what comes next two dogs What is it draw a story about witch and raven"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(lines * 4, 900, new_special_tokens=names)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    tokenizer.save_pretrained(folder)
    config = ChameleonConfig(**LM, vocab_size=len(tokenizer), vq_config=VQ, vocabulary_map=tokenizer.get_vocab())
    model = ChameleonForConditionalGeneration(config)
    state = common.randomize_state(model.state_dict(), seed=6, scale=2.0)
    official = vq_case.image_tokenizer_tensors()
    for name in state:
        if name.startswith("model.vqmodel."):
            state[name] = official[name.removeprefix("model.vqmodel.")]
    model.load_state_dict(state)
    model.save_pretrained(folder)
    (folder / "tokenizer").mkdir()
    torch.save({"state_dict": official}, folder / "tokenizer" / "vqgan.ckpt")
    (folder / "tokenizer" / "vqgan.yaml").write_text(f"model:\n  params:\n    ddconfig:\n      resolution: {SIDE}\n")


def picture() -> Image.Image:
    pixels = torch.rand(20, 44, 3, generator=torch.Generator().manual_seed(3))
    return Image.fromarray((pixels * 255).byte().numpy())


class Reference:
    """transformers' layers and head, without its mask of image codes."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, ChameleonForConditionalGeneration

        self.model = ChameleonForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.names = self.tokenizer.get_vocab()
        self.ids = torch.tensor([self.names[chameleon.code_token(code)] for code in range(CODES)])

    def picture(self) -> list[int]:
        """Ids of the picture, resized and cut as the official tokenizer does, by transformers' encoder."""
        scale = SIDE / 20
        resized = picture().resize((round(44 * scale), SIDE), Image.Resampling.LANCZOS)
        left = (resized.width - SIDE) // 2
        cut = resized.crop((left, 0, left + SIDE, SIDE))
        pixels = torch.tensor(list(cut.tobytes())).reshape(1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 127.5 - 1
        return self.model.model.get_image_tokens(pixels).flatten().tolist()  # type: ignore[no-any-return]

    def branches(self, picture: list[int] | None = None) -> list[list[int]]:
        """What the three branches read before the first code."""
        image = [] if picture is None else [self.names[chameleon.BOI], *picture, self.names[chameleon.EOI]]
        words = self.tokenizer(WORDS)["input_ids"]
        start, end = self.names["<s>"], [self.names[chameleon.EOT], self.names[chameleon.BOI]]
        return [[start, *image, *words, *end], [start, *image, end[1]], [start, end[1]]]

    @torch.no_grad()
    def guided(self, branches: list[list[int]], codes: list[int]) -> Tensor:
        """Logits (K,) of the next code, in the order of ids, of which code k is the k-th drawn."""
        last = [self.model.model(torch.tensor([[*b, *self.ids[codes].tolist()]])).last_hidden_state[0, -1] for b in branches]  # fmt: skip  # noqa: E501
        cond_ids, image, uncond_ids = self.model.lm_head(torch.stack(last))
        mixed = uncond_ids + SCALES[0] * (cond_ids - image) + SCALES[1] * (image - uncond_ids)
        return mixed[self.ids.min() : self.ids.max() + 1]  # type: ignore[no-any-return]

    def codes(self, branches: list[list[int]], length: int, sampling: SamplingOptions, seed: int) -> list[int]:
        rng, order = torch.Generator().manual_seed(seed * 1_000_003 + 1), self.ids.argsort()
        codes: list[int] = []
        for _ in range(length):
            logits_K = self.guided(branches, codes)
            if sampling.temperature == 0:
                sampled_ids = int(logits_K.argmax())
            else:
                sorted_K, at_K = (logits_K / sampling.temperature).sort(descending=True)
                above_K = sorted_K.softmax(-1).cumsum(-1) - sorted_K.softmax(-1) >= sampling.top_p
                kept_K = (logits_K / sampling.temperature).index_fill(0, at_K[above_K], -torch.inf)
                noise_K = torch.empty(CODES).exponential_(generator=rng)
                sampled_ids = int(exponential_race_sample(kept_K.softmax(-1)[None], noise_K[None]))
            codes.append(int(order[sampled_ids]))
        return codes


def rows(folder: Path) -> Iterator[ParityRow]:
    engine = unigen.load(str(folder), device="cpu")
    model, reference = engine.model, Reference(folder)
    template, begin, reference_name = (
        model.template,
        model.template.begin_ids["next-token"],
        "transformers' Chameleon, unmasked",
    )
    shown = Document([Segment(image=picture()), Segment(text=WORDS)])
    document = model.encode_document(shown)

    official = reference.branches(reference.picture())
    outputs = [[*model.token_ids(template.prompt(document, output="image", branch=b)), begin] for b in range(3)]
    squeezed = Document([Segment(image=picture().resize((SIDE, SIDE))), Segment(text=WORDS)])
    control = [
        [*model.token_ids(template.prompt(model.encode_document(squeezed), output="image", branch=b)), begin]
        for b in range(3)
    ]
    flat, reference_output, trapped = ([id for ids in rows for id in ids] for rows in (outputs, official, control))
    yield ParityRow(
        "chameleon prompt ids", mismatch_share(flat, reference_output), mismatch_share(trapped, reference_output),
        "a picture squeezed",
        "the official strings, transformers' VQ encoder",
    )  # fmt: skip

    height, width = model.image_tokenizer.grid
    places = (0, 1, width - 1, height * width - 1)
    greedy = reference.codes(official, height * width, SamplingOptions(0.0), 0)
    reference_values = torch.stack([reference.guided(official, greedy[:position]) for position in places])
    logits = {}
    for with_mistake in (False, True):
        with without_image_branch(template, with_mistake), common.record_logits(next_token) as steps:
            engine.generate(shown, temperature=0.0)
        logits[with_mistake] = torch.stack([steps[position][0] for position in places])
    mistake = "no branch that sees the picture alone"
    yield ParityRow(
        "chameleon logits",
        max_error(logits[False], reference_values),
        max_error(logits[True], reference_values),
        mistake,
        reference_name,
    )

    for name, sampling, seed in (("greedy", SamplingOptions(0.0), 0), ("sampled", SamplingOptions(1.0, top_p=0.95), 5)):
        options = {"seed": seed, "temperature": sampling.temperature, "top_p": sampling.top_p}
        expected_ids = reference.codes(official, height * width, sampling, seed)
        expected_ids += reference.codes(reference.branches(), height * width, sampling, seed)
        sampled_ids: dict[bool, list[int]] = {False: [], True: []}
        for with_mistake, codes in sampled_ids.items():
            for prompt_document in (shown, Document.of(WORDS)):
                request = engine.build_request(prompt_document, "image", **options)
                with without_image_branch(template, with_mistake):
                    list(engine.run_requests([request]))
                image = request.document.segments[-1].image
                assert isinstance(image, Tensor)
                codes += image.flatten().tolist()
        assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
        share = mismatch_share(sampled_ids[True][: height * width], expected_ids[: height * width])
        yield ParityRow(
            f"chameleon {name} ids", mismatch_share(sampled_ids[False], expected_ids), share, mistake, reference_name
        )

    golden, tokenizer = load_file(common.GOLDENS / "liquid_vqgan.safetensors"), model.image_tokenizer
    reference_values = golden["pixels"].clamp(-1, 1)
    made_BCHW, wrong_BCHW = tokenizer.decode(golden["codes"]), tokenizer.decode(golden["codes"].transpose(1, 2))
    reference_name = "the official VQModel (goldens)"
    yield ParityRow(
        "chameleon codes to pixels",
        max_error(made_BCHW, reference_values),
        max_error(wrong_BCHW, reference_values),
        "columns for rows",
        reference_name,
    )


class without_image_branch:  # noqa: N801
    """The mistake of guiding by two branches, the weaker of which sees nothing, where `on`."""

    def __init__(self, template: Any, on: bool) -> None:
        self.template, self.on = template, on

    def __enter__(self) -> None:
        if self.on:
            prompt = self.template.prompt
            self.template.prompt = lambda document, output, branch=0: prompt(
                document, output=output, branch=branch and 2
            )

    def __exit__(self, *_: Any) -> None:
        if self.on:
            del self.template.prompt
