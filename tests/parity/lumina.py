"""Lumina-mGPT against its official code (goldens): its layers and the three logits processors of its solver, its VQGAN
and its way of cutting pictures; and against transformers' layers and VQ encoder.

The goldens are made from `checkpoint` by the official code, with the numbers of ids that it has written out exchanged
for those of the small vocabulary:
    UNIGEN_REFERENCE_LUMINA=<Lumina-mGPT>/lumina_mgpt python scripts/parity.py lumina --goldens
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import unigen
from tests.parity import common
from tests.parity import liquid as vq_case
from tests.parity.chameleon import VQ
from tests.parity.common import ParityRow, max_error, mismatch_share
from unigen.document import Document, Segment
from unigen.generators import next_token
from unigen.hub.resolve import read_json
from unigen.hub.weights import write_tensors
from unigen.models import chameleon, lumina
from unigen.samplers.logits import SamplingOptions, exponential_race_sample
from unigen.utils.files import save_json

CODES, STRIDE = vq_case.CODES, 4
WIDTH, HEIGHT = 40, 32  # pixels of what is drawn
GRID = (HEIGHT // STRIDE, WIDTH // STRIDE)
SIZE, PROMPT = (WIDTH, HEIGHT), "a red apple"
CLI_ARGUMENTS = [PROMPT]
PROMPTS = ("a waterfall", "a red apple")
SQUARES = 16
SHARED = 2
"""Rows of the norms of queries and keys: heads share them."""
LM: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "model_parallel_size": SHARED,
}  # fmt: skip
OFFICIAL: dict[str, Any] = {"mask_image_logits": False, "dropout": 0.05, "z_loss_weight": 1e-5, "rope_theta": 5000.0}
GOLDEN = common.GOLDENS / "lumina.safetensors"
SIZES = ((40, 32), (44, 20), (20, 44), (71, 64), (9, 100), (32, 32), (33, 65))


def checkpoint(folder: Path) -> None:
    """A model folder as the public ones, with random weights: a norm for several heads, no encoder of pictures; the
    image tokenizer in its own file beside it."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration, Qwen2Tokenizer

    order = torch.randperm(CODES, generator=torch.Generator().manual_seed(9)).tolist()
    names = ["<s>", "<pad>", "</s>", "<unk>", *(chameleon.code_token(code) for code in order)]
    names += [chameleon.EOI, chameleon.BOI, chameleon.EOT, "<image>", lumina.EOL]
    names += [f"<reserved{8800 + n:05d}>" for n in range(SQUARES + 1)]
    tokenizer = Qwen2Tokenizer(vocab={byte: n for n, byte in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    tokenizer.save_pretrained(folder)
    config = ChameleonConfig(**LM, vocab_size=len(tokenizer), vq_config=VQ, vocabulary_map=tokenizer.get_vocab())
    state = {k: v for k, v in ChameleonForConditionalGeneration(config).state_dict().items() if "vqmodel" not in k}
    for name in state:
        if "q_norm" in name or "k_norm" in name:
            state[name] = state[name][:SHARED]
    state = common.randomize_state(state, seed=6, scale=2.0)
    for name in state:
        if "q_norm.weight" in name or "k_norm.weight" in name:
            state[name] = 1 + 0.2 * state[name]
    write_tensors(folder / "model.safetensors", state)
    texts = {k: v for k, v in config.to_dict().items() if k != "rope_parameters"} | OFFICIAL
    save_json(folder / "config.json", texts | {"architectures": [lumina.PUBLIC_CLASS]})
    (folder / "tokenizer").mkdir()
    torch.save({"state_dict": vq_case.image_tokenizer_tensors()}, folder / "tokenizer" / "vqgan.ckpt")
    (folder / "tokenizer" / "vqgan.yaml").write_text("model:\n  params:\n    ddconfig:\n      resolution: 32\n")


def picture(size: tuple[int, int] = (44, 20)) -> Image.Image:
    width, height = size
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(3))
    return Image.fromarray((pixels * 255).byte().numpy())


def pixels_of(image: Any) -> Tensor:
    """(H, W, 3) of a picture."""
    return torch.from_numpy(np.array(image))


def drawn_codes() -> Tensor:
    return torch.randint(CODES, (1, *GRID), generator=torch.Generator().manual_seed(4))


def make_goldens(official: Path) -> None:
    """What the official code draws by the checkpoint, how it cuts pictures, and what its VQGAN makes of codes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint(folder)
        with common.importable(official):
            from model.chameleon import ChameleonConfig  # type: ignore[import-not-found]
            from model.chameleon import ChameleonForConditionalGeneration as Official
            from model.chameleon_vae_ori.vqgan import VQModel  # type: ignore[import-not-found]
        reference = Reference(folder)
        config = ChameleonConfig(**{k: v for k, v in read_json(folder / "config.json").items() if k != "model_type"})
        config.rope_scaling = None  # as it was before transformers 5
        model = Official(config)
        del model.model.vqmodel
        model.load_state_dict(load_file(folder / "model.safetensors"))
        model.eval()
        outputs: dict[str, Tensor] = {}
        for number, words in enumerate(PROMPTS):
            processors = official_processors(official, reference, model)
            ids, codes, steps = torch.tensor([reference.prompts(words)[0]]), [], []
            while len(codes) < GRID[0] * GRID[1]:
                with torch.no_grad():
                    scores = model(ids, use_cache=False).logits[:, -1].float()
                    for processor in processors:
                        scores = processor(ids, scores)
                ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), 1)
                if int(ids[0, -1]) in reference.codes_of:
                    codes.append(reference.codes_of[int(ids[0, -1])])
                    steps.append(scores[0, reference.ids])
            outputs[f"codes.{number}"] = torch.tensor(codes)
            outputs[f"logits.{number}"] = torch.stack([steps[position] for position in PLACES])
        for size in SIZES:
            outputs[f"cut.{size[0]}x{size[1]}"] = pixels_of(official_cut(official, picture(size)))
        arguments = {"ddconfig": vq_case.DDCONFIG, "n_embed": CODES, "embed_dim": 16}
        tokenizer = VQModel(**arguments).eval()
        tokenizer.load_state_dict(vq_case.image_tokenizer_tensors())
        with torch.no_grad():
            entries = tokenizer.quantize.get_codebook_entry(drawn_codes().flatten(), (1, *GRID, 16))
            outputs["pixels"] = tokenizer.decode(entries)
    save_file(outputs, GOLDEN)


PLACES = (0, 1, GRID[1] - 1, GRID[0] * GRID[1] - 1)
"""The codes whose logits are compared: the first two, the last of a row, the last of all."""


def official_processors(official: Path, reference: Reference, model: Any) -> list[Any]:
    """Those of the official solver, in its order: guidance, grammar, top-k."""
    source = (official / "inference_solver.py").read_text().split("class FlexARInferenceSolver")[0]
    first, last = int(reference.ids.min()), int(reference.ids.max())
    for old, new in (
        ("from data.item_processor import FlexARItemProcessor\n", ""),
        ("from model.chameleon import ChameleonForConditionalGeneration\n", ""),
        ("LogitsWarper", "LogitsProcessor"),
        ('device="cuda"', 'device="cpu"'),
        ("range(4, 8195 + 1)", f"range({first}, {last + 1})"),
        ("8804", str(reference.names["<reserved08800>"])),
    ):
        assert old in source, f"the official solver is not as it was: {old!r}"
        source = source.replace(old, new)
    solver: dict[str, Any] = {"print": lambda *_: None}
    exec(compile(source, "inference_solver.py", "exec"), solver)
    boi, eoi, eol = (reference.names[name] for name in (chameleon.BOI, chameleon.EOI, lumina.EOL))
    guided = solver["LLMImageStartTriggeredUnbatchedClassifierFreeGuidanceLogitsProcessor"]
    return [
        guided(4.0, model, boi, eoi, eol, 32, use_cache=False),
        solver["MultiModalLogitsProcessor"](boi, eoi, eol, 32, len(reference.names)),
        solver["InterleavedTopKLogitsProcessor"](2000, 10, boi, eoi),
    ]


def official_cut(official: Path, image: Image.Image) -> Image.Image:
    """A picture as the official processor cuts it, in the middle and not by chance."""
    import random

    source = (official / "data" / "item_processor.py").read_text()
    start, stop = source.index("def center_crop"), source.index("class FlexARItemProcessor")
    cutting: dict[str, Any] = {"random": random, "Image": Image}
    exec(compile(source[start:stop], "item_processor.py", "exec"), cutting)
    chance, random.randint = random.randint, lambda low, high: (low + high) // 2  # type: ignore[assignment]
    try:
        shapes = cutting["generate_crop_size_list"]((32 // (2 * STRIDE)) ** 2, 2 * STRIDE)
        return cutting["var_center_crop"](image, shapes)  # type: ignore[no-any-return]
    finally:
        random.randint = chance  # type: ignore[assignment]


class Reference:
    """The official strings, and transformers' layers without their mask, each head with the norm of its row."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, ChameleonConfig, ChameleonForConditionalGeneration

        state = load_file(folder / "model.safetensors")
        state |= {k: v[[0, 0, 1, 1]] for k, v in state.items() if "q_norm" in k}
        state |= {f"model.vqmodel.{k}": v for k, v in vq_case.image_tokenizer_tensors().items()}
        config = ChameleonConfig.from_pretrained(folder, attn_implementation="eager")
        self.model = ChameleonForConditionalGeneration(config).eval()
        self.model.load_state_dict({k: v for k, v in state.items() if k in self.model.state_dict()}, strict=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.names = self.tokenizer.get_vocab()
        self.ids = torch.tensor([self.names[chameleon.code_token(code)] for code in range(CODES)])
        self.codes_of = {id: code for code, id in enumerate(self.ids.tolist())}

    def string(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]  # type: ignore[no-any-return]

    def prompts(self, words: str) -> tuple[list[int], list[int]]:
        """What both branches read before the first code."""
        side = 2 * STRIDE
        start = f"<racm3:break><reserved{8800 + HEIGHT // side:05d}><reserved{8800 + WIDTH // side:05d}>"
        prompt_document = (
            f"<s>Generate an image of {WIDTH}x{HEIGHT} according to the following prompt:\n{words}<reserved08706>"
        )
        return self.string(prompt_document + start), self.string(start)

    def question(self, words: str, cut: Tensor) -> list[int]:
        """A picture, as it was cut (H, W, 3), after the words."""
        height, width = (side // STRIDE for side in cut.shape[:2])
        with torch.no_grad():
            ids_hw = self.model.model.get_image_tokens(cut.permute(2, 0, 1)[None] / 127.5 - 1).view(height, width)
        rows = [id for row in ids_hw.tolist() for id in (*row, self.names["<reserved08799>"])]
        start = f"<s>{words} <racm3:break><reserved{8800 + height // 2:05d}><reserved{8800 + width // 2:05d}>"
        return [*self.string(start), *rows, *self.string("<eoss><reserved08706>")]

    @torch.no_grad()
    def sampled(self, words: str, sampling: SamplingOptions, seed: int) -> list[int]:
        """Codes by a loop without a cache: guidance, grammar, temperature, top-k, a draw in the order of ids."""
        rng = torch.Generator().manual_seed(seed * 1_000_003 + 1)
        rows, codes = [list(ids) for ids in self.prompts(words)], []
        first, order = int(self.ids.min()), self.ids.argsort()
        while len(codes) < GRID[0] * GRID[1]:
            last = [self.model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
            cond_ids, blind = self.model.lm_head(torch.stack(last))[:, first : first + CODES]
            logits_K = (blind + 4.0 * (cond_ids - blind)) / sampling.temperature
            logits_K[logits_K < logits_K.topk(sampling.top_k).values[-1]] = -torch.inf
            noise_K = torch.empty(CODES).exponential_(generator=rng)
            sampled_ids = int(exponential_race_sample(logits_K.softmax(-1)[None], noise_K[None]))
            codes.append(int(order[sampled_ids]))
            for row in rows:
                row += [first + sampled_ids, *([self.names[lumina.EOL]] if len(codes) % GRID[1] == 0 else [])]
        return codes


def rows(folder: Path) -> Iterator[ParityRow]:
    engine = unigen.load(str(folder), device="cpu")
    model, reference, golden = engine.model, Reference(folder), load_file(GOLDEN)
    template, solver = model.template, "the official layers and processors (goldens)"

    def ours(words: str, grid: tuple[int, int]) -> list[int]:
        opening = [template.begin_ids["next-token"], *template.layout(grid).prefix]
        document = Document.of(words)
        document.size = SIZE
        outputs = [template.prompt(document, output="image", branch=blind).ids for blind in (False, True)]
        return [id for ids in outputs for id in (*ids, *opening)]

    reference_output = [id for words in PROMPTS for ids in reference.prompts(words) for id in ids]
    engine_values = [id for words in PROMPTS for id in ours(words, GRID)]
    turned = [id for words in PROMPTS for id in ours(words, (GRID[1], GRID[0]))]
    yield ParityRow("lumina prompt ids", mismatch_share(engine_values, reference_output), mismatch_share(turned, reference_output), "width, height", "the official strings")  # fmt: skip  # noqa: E501

    cuts = {size: golden[f"cut.{size[0]}x{size[1]}"] for size in SIZES}
    cut, squared = (
        sum(not torch.equal(pixels_of(frame(picture(size), 32)), cuts[size]) for size in SIZES) / len(SIZES)
        for frame in (template.preprocess, super(lumina.LuminaTemplate, template).preprocess)
    )
    yield ParityRow("lumina pictures cut", cut, squared, "cut to squares", "the official processor (goldens)")

    prompt_document = model.encode_document(Document([Segment(image=picture()), Segment(text="What is it")]))
    ids = model.token_ids(template.prompt(prompt_document, output="text"))
    with common.wrong_row_end(template, ()):
        bare = model.token_ids(template.prompt(prompt_document, output="text"))
    reference_values, mistake = reference.question("What is it", cuts[(44, 20)]), "no ends of rows"
    yield ParityRow(
        "lumina question ids",
        mismatch_share(ids, reference_values),
        mismatch_share(bare, reference_values),
        mistake,
        "transformers' VQ encoder",
    )

    runs: dict[bool, tuple[list[Tensor], list[int]]] = {}
    for trapped in (False, True):
        logits, codes = [], []
        for words in PROMPTS:
            row_end = () if trapped else template.layout(GRID).row_end_ids
            with common.wrong_row_end(template, row_end), common.record_logits(next_token) as steps:
                request = engine.build_request(words, "image", temperature=0.0, size=SIZE)
                list(engine.run_requests([request]))
            logits.append(torch.stack([steps[position][0] for position in PLACES]))
            codes += drawn_of(request)
        runs[trapped] = (logits, codes)
    order = reference.ids.argsort()
    scores = torch.cat([golden[f"logits.{n}"][:, order] for n in range(len(PROMPTS))])
    expected_ids = torch.cat([golden[f"codes.{n}"] for n in range(len(PROMPTS))]).tolist()
    assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
    yield ParityRow("lumina logits", max_error(torch.cat(runs[False][0]), scores), max_error(torch.cat(runs[True][0]), scores), mistake, solver)  # fmt: skip  # noqa: E501
    yield ParityRow(
        "lumina greedy ids",
        mismatch_share(runs[False][1], expected_ids),
        mismatch_share(runs[True][1], expected_ids),
        mistake,
        solver,
    )

    sampling = SamplingOptions(1.0, 100)
    sampled_ids, expected_ids, control = [], [], []
    for words in PROMPTS:
        expected_ids += reference.sampled(words, sampling, seed=5)
        for row_end, written in ((template.layout(GRID).row_end_ids, sampled_ids), ((), control)):
            with common.wrong_row_end(template, row_end):
                request = engine.build_request(words, "image", seed=5, temperature=1.0, top_k=100, size=SIZE)
                list(engine.run_requests([request]))
            written += drawn_of(request)
    yield ParityRow(
        "lumina sampled ids",
        mismatch_share(sampled_ids, expected_ids),
        mismatch_share(control, expected_ids),
        mistake,
        "transformers' layers",
    )

    reference_values, tokenizer = golden["pixels"].clamp(-1, 1), model.image_tokenizer
    engine_values, turned = tokenizer.decode(drawn_codes()), tokenizer.decode(drawn_codes().mT).mT
    yield ParityRow("lumina codes to pixels", max_error(engine_values, reference_values), max_error(turned, reference_values), "columns for rows", "the official VQModel (goldens)")  # fmt: skip  # noqa: E501


def drawn_of(request: Any) -> list[int]:
    return request.document.segments[-1].image.flatten().tolist()  # type: ignore[no-any-return]
