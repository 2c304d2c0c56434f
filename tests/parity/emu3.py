"""Emu3 against transformers: its processor, its `generate` with the official script's logits processors, its VQ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import unigen
from tests.parity import common
from tests.parity.common import ParityRow, max_error, mismatch_share
from unigen.document import Document, Segment
from unigen.generators import next_token
from unigen.hub.resolve import read_json
from unigen.models import emu3
from unigen.samplers.logits import SamplingOptions, exponential_race_sample
from unigen.utils.files import save_json

CODES, STRIDE = 256, 4
WIDTH, HEIGHT = 40, 32  # pixels of what is drawn
SIZE, PROMPT = (WIDTH, HEIGHT), "a red apple"
CLI_ARGUMENTS = [PROMPT]
PROMPTS = ("a shiba inu", "a red apple")
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "attention_dropout": 0.0,
}  # fmt: skip
VQ: dict[str, Any] = {
    "codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1,
    "attn_resolutions": [2], "hidden_size": 64,
}  # fmt: skip
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "Emu3ImageProcessor", "min_pixels": 24 * 24, "max_pixels": 40 * 40,
    "spatial_factor": STRIDE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def checkpoint(folder: Path) -> None:
    """A model folder in transformers' layout with random weights."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration, Qwen2Tokenizer

    suffixes = f"{emu3.QUALITY_SUFFIX}{emu3.NEGATIVE_PROMPT}"
    lines = [f"a shiba inu red apple 0123456789* {emu3.SYSTEM_PROMPT}USER: What is it. ASSISTANT:{suffixes}"]
    names = ["<|extra_203|>", "<image>", emu3.BOI, emu3.IMG, emu3.EOI, emu3.EOL, emu3.EOF]
    names += [emu3.visual_token(code) for code in range(CODES)]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(lines * 4, 400, new_special_tokens=names)
    # special tokens made in training come first: the codes have to be the last ids
    vocab = tokenizer.get_vocab()
    tokenizer = Qwen2Tokenizer(vocab={k: i for i, k in enumerate(sorted(set(vocab) - set(names), key=vocab.get))}, merges=merges_of(tokenizer))  # fmt: skip  # noqa: E501
    special = {"image_token": "<image>", "boi_token": emu3.BOI, "eoi_token": emu3.EOI}
    special |= {"image_wrapper_token": emu3.IMG, "eof_token": emu3.EOF}
    tokenizer.add_special_tokens({"bos_token": names[0]})
    tokenizer.add_special_tokens({"additional_special_tokens": names[1:]})
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    save_json(settings, read_json(settings) | {"extra_special_tokens": special})
    vocab = tokenizer.get_vocab()
    ids = {"pad_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_config = TEXT | ids | {"bos_token_id": tokenizer.bos_token_id, "vocab_size": len(tokenizer)}
    config = Emu3Config(text_config=text_config, vq_config=VQ, vocabulary_map=vocab)
    model = Emu3ForConditionalGeneration(config)
    # the norms of its VQ have running means and variances, which stay as they are
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    outputs = common.randomize_state(state, seed=4, scale=1.8)
    kept_files = {name: value for name, value in model.state_dict().items() if "running" in name or name not in outputs}
    model.load_state_dict(outputs | kept_files, strict=True)
    model.save_pretrained(folder)
    save_json(folder / "preprocessor_config.json", PREPROCESSOR)


def merges_of(tokenizer: Any) -> list[tuple[str, str]]:
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges]


def picture() -> Image.Image:
    pixels = torch.rand(20, 44, 3, generator=torch.Generator().manual_seed(3))
    return Image.fromarray((pixels * 255).byte().numpy())


class Reference:
    """transformers' model and processor as the official scripts use them."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, Emu3ForConditionalGeneration, Emu3ImageProcessor, Emu3Processor

        self.model = Emu3ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = Emu3ImageProcessor.from_pretrained(folder)
        self.processor = Emu3Processor(self.images, self.tokenizer)
        self.processor.downsample_ratio = STRIDE
        self.first = self.tokenizer.convert_tokens_to_ids(emu3.visual_token(0))

    def prompts(self, words: str) -> tuple[list[int], list[int]]:
        area = {"ratio": f"{WIDTH}:{HEIGHT}", "image_area": WIDTH * HEIGHT}
        input_pair = [words + " masterpiece, film grained, best quality.", emu3.NEGATIVE_PROMPT]
        outputs = self.processor(text=input_pair, return_for_image_generation=True, images_kwargs=area)
        return tuple(outputs["input_ids"])  # type: ignore[return-value]

    def question(self, words: str) -> list[int]:
        text = f"You are a helpful assistant. USER: <image>{words}. ASSISTANT:"
        inputs = self.processor(images=[picture()], text=text, return_tensors="pt")
        ids = inputs["input_ids"][0]
        codes = self.model.model.get_image_tokens(inputs["pixel_values"], inputs["image_sizes"])
        ids[ids == self.tokenizer.convert_tokens_to_ids("<image>")] = codes.long()
        return ids.tolist()  # type: ignore[no-any-return]

    def allowed(self, start: int) -> Any:
        """The grammar: where the image token stands at `start`, which ids may come next."""
        height, width = HEIGHT // STRIDE, WIDTH // STRIDE
        names = (emu3.EOL, emu3.EOF, emu3.EOI)
        eol, eof, eoi = (self.tokenizer.convert_tokens_to_ids(name) for name in names)
        visual = list(range(self.first, self.first + CODES))

        def ids(_: int, written: Tensor) -> list[int]:
            offset = len(written) - start
            after = offset - (width + 1) * height
            if after > 0:
                return [eof if after == 1 else eoi if after == 2 else self.tokenizer.eos_token_id]
            return [eol] if offset % (width + 1) == 0 else visual

        return ids

    def greedy(self, words: str) -> tuple[list[int], Tensor]:
        """Codes, and for each the logits (V) of the visual ids, by `generate`."""
        from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor
        from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guided

        ids, negative = (torch.tensor([ids]) for ids in self.prompts(words))
        chain = [Guided(3.0, self.model, negative), PrefixConstrainedLogitsProcessor(self.allowed(ids.shape[1] - 1), 1)]
        outputs = self.model.generate(
            ids, logits_processor=LogitsProcessorList(chain), do_sample=False, output_scores=True,
            return_dict_in_generate=True, max_new_tokens=(WIDTH // STRIDE + 1) * (HEIGHT // STRIDE) + 3,
        )  # fmt: skip
        written = outputs.sequences[0, ids.shape[1] :]
        visual = (written >= self.first).nonzero()[:, 0].tolist()
        codes = [int(written[position]) - self.first for position in visual]
        return codes, torch.stack([outputs.scores[position][0, self.first :] for position in visual])

    @torch.no_grad()
    def sampled(self, words: str, sampling: SamplingOptions, seed: int) -> list[int]:
        """Codes by a loop without a cache: guidance, grammar, temperature, top-k, a draw."""
        rng = torch.Generator().manual_seed(seed * 1_000_003 + 1)
        rows, codes = [list(ids) for ids in self.prompts(words)], []
        allowed = self.allowed(len(rows[0]) - 1)
        while True:
            legal = allowed(0, torch.tensor(rows[0]))
            if len(legal) == 1:
                if legal[0] != self.tokenizer.convert_tokens_to_ids(emu3.EOL):
                    return codes
                sampled_ids = legal[0]
            else:
                cond_ids, negative = (self.model(input_ids=torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in rows)  # fmt: skip  # noqa: E501
                logits_K = (negative + 3.0 * (cond_ids - negative))[self.first :] / sampling.temperature
                logits_K[logits_K < logits_K.topk(sampling.top_k).values[-1]] = -torch.inf
                noise_K = torch.empty(CODES).exponential_(generator=rng)
                sampled_ids = self.first + int(exponential_race_sample(logits_K.softmax(-1)[None], noise_K[None]))
                codes.append(sampled_ids - self.first)
            for row in rows:
                row.append(sampled_ids)


def rows(folder: Path) -> Iterator[ParityRow]:
    engine = unigen.load(str(folder), device="cpu")
    model, reference = engine.model, Reference(folder)
    template, grid = model.template, (HEIGHT // STRIDE, WIDTH // STRIDE)
    size, reference_name = (WIDTH, HEIGHT), "transformers' generate with guidance and grammar"

    def ours(words: str, grid: tuple[int, int]) -> list[int]:
        opening = [template.begin_ids["next-token"], *template.layout(grid).prefix]
        outputs = [template.prompt(Document.of(words), output="image", branch=blind).ids for blind in (False, True)]
        return [id for ids in outputs for id in (*ids, *opening)]

    reference_output = [id for words in PROMPTS for ids in reference.prompts(words) for id in ids]
    engine_values = [id for words in PROMPTS for id in ours(words, grid)]
    turned = [id for words in PROMPTS for id in ours(words, (grid[1], grid[0]))]
    yield ParityRow(
        "emu3 prompt ids",
        mismatch_share(engine_values, reference_output),
        mismatch_share(turned, reference_output),
        "width*height",
        "Emu3Processor",
    )

    prompt_document = model.encode_document(Document([Segment(image=picture()), Segment(text="What is it")]))
    ids = model.token_ids(template.prompt(prompt_document, output="text"))
    with common.wrong_row_end(template, ()):
        bare = model.token_ids(template.prompt(prompt_document, output="text"))
    official = reference.question("What is it")
    mistake = "no ends of rows"
    yield ParityRow(
        "emu3 question ids",
        mismatch_share(ids, official),
        mismatch_share(bare, official),
        mistake,
        "Emu3Processor, Emu3VQVAE",
    )

    codes, scores = reference.greedy(PROMPTS[0])
    places = [0, 1, grid[1] - 1, len(codes) - 1]
    runs = []
    for row_end in (template.layout(grid).row_end_ids, ()):
        with common.wrong_row_end(template, row_end), common.record_logits(next_token) as steps:
            request = engine.build_request(PROMPTS[0], "image", temperature=0.0, size=size)
            list(engine.run_requests([request]))
        runs.append((torch.stack([steps[position][0] for position in places]), request.document.segments[-1].image))
    reference_values = center_crop(scores[places])
    yield ParityRow(
        "emu3 logits",
        max_error(center_crop(runs[0][0]), reference_values),
        max_error(center_crop(runs[1][0]), reference_values),
        mistake,
        reference_name,
    )

    expected_ids, greedy, control = list(codes), runs[0][1].flatten().tolist(), runs[1][1].flatten().tolist()
    assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
    yield ParityRow(
        "emu3 greedy ids",
        mismatch_share(greedy, expected_ids),
        mismatch_share(control, expected_ids),
        mistake,
        reference_name,
    )

    sampling = SamplingOptions(1.0, 100)
    sampled_ids, expected_ids, control = [], [], []
    for words in PROMPTS:
        expected_ids += reference.sampled(words, sampling, seed=5)
        for row_end, written in ((template.layout(grid).row_end_ids, sampled_ids), ((), control)):
            with common.wrong_row_end(template, row_end):
                request = engine.build_request(words, "image", seed=5, temperature=1.0, top_k=100, size=size)
                list(engine.run_requests([request]))
            written += request.document.segments[-1].image.flatten().tolist()
    yield ParityRow(
        "emu3 sampled ids",
        mismatch_share(sampled_ids, expected_ids),
        mismatch_share(control, expected_ids),
        mistake,
        "transformers' forward",
    )

    made_Bhw = torch.tensor(expected_ids).unflatten(0, (2, *grid))
    with torch.no_grad():
        pixels = [reference.model.decode_image_tokens(image_tokens=codes_in_order(reference, codes), height=grid[0], width=grid[1]) for codes in made_Bhw]  # fmt: skip  # noqa: E501
    reference_values = torch.cat(pixels).clamp(-1, 1)
    engine_values = model.image_tokenizer.decode(made_Bhw)
    turned = model.image_tokenizer.decode(made_Bhw.transpose(1, 2)).transpose(2, 3)
    yield ParityRow(
        "emu3 codes to pixels",
        max_error(engine_values, reference_values),
        max_error(turned, reference_values),
        "columns for rows",
        "decode_image_tokens",
    )


def codes_in_order(reference: Reference, codes_hw: Tensor) -> Tensor:
    """A picture as `generate` leaves it: ids with ends of rows, then three more."""
    eol = reference.tokenizer.convert_tokens_to_ids(emu3.EOL)
    rows = torch.cat((codes_hw + reference.first, torch.full((len(codes_hw), 1), eol)), 1)
    return torch.cat((rows.flatten(), torch.zeros(3, dtype=torch.int64)))[None]


def center_crop(logits: Tensor) -> Tensor:
    """Logits up to a constant: the reference's have been through a log-softmax."""
    return logits - logits.mean(-1, keepdim=True)
