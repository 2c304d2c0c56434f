"""Show-o against its official code: what its Phi, its prompts, its sampler and MAGVIT-v2 made of the same tensors.

The goldens are made from `checkpoint` by the official code; of what it imports, what needs libraries that are not here
is left out, and greedy draws are argmax in place of its multinomial:
    UNIGEN_REFERENCE_SHOWO=<Show-o> python scripts/parity.py showo --goldens
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import unigen
from tests.parity import common
from tests.parity.common import ParityRow, max_error, mismatch_share
from unigen.document import Document, Segment
from unigen.generators.masked import Masked
from unigen.models import showo
from unigen.tokenizers import magvit2
from unigen.utils.files import save_json

BITS, SIDE, GRID = 8, 32, 8
CODES, COUNT = 2**BITS, GRID * GRID
SIZE, PROMPT = (SIDE, SIDE), "a red apple"
CLI_ARGUMENTS = [PROMPT]
PROMPTS = (PROMPT, ", ".join(["two dogs on a blue table"] * 30))
"""The second is longer than what Show-o reads."""
QUESTION = "What is it"
SCALE, STEPS, SEED, WORDS = 5.0, 8, 5, 12
PHI: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "partial_rotary_factor": 0.75, "rope_theta": 100.0, "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5, "num_key_value_heads": 4, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
VQ = magvit2.MAGVIT2Config(SIDE, BITS, (32, 64, 64), (2, 1, 2), (32, 32, 64), (1, 2, 2))
PLACES = (0, 1, GRID - 1, COUNT - 1)
GOLDEN = common.GOLDENS / "showo.safetensors"


def image_tokenizer_tensors() -> dict[str, Tensor]:
    state = magvit2.to_public(magvit2.MAGVIT2(VQ))
    table = {name: state[name] for name in magvit2.TABLE_KEYS}
    return common.randomize_state(state, seed=1, scale=1.3) | table


def tensors(pieces: int) -> dict[str, Tensor]:
    """Of the official model, random; pieces: of text, of Phi's tokenizer."""
    from transformers import PhiConfig, PhiForCausalLM

    lm = PhiForCausalLM(PhiConfig(**PHI, vocab_size=pieces + len(showo.ADDED_TOKENS) + CODES + 1, qk_layernorm=True))
    outputs = common.randomize_state(
        {f"showo.{name}": tensor for name, tensor in lm.state_dict().items()}, seed=2, scale=2.5
    )
    for name, tensor in outputs.items():
        if "self_attn" in name and "_layernorm.weight" in name:
            outputs[name] = 2 * tensor  # masked codes are told apart by attention to positions alone
        elif name == "showo.lm_head.weight":
            outputs[name] = tensor / 4  # else codes are certain
    return outputs


def checkpoint(folder: Path) -> None:
    """The model's folder with random weights, those of Phi and MAGVIT-v2 beside its files."""
    from safetensors.torch import save_file as save
    from transformers import CodeGenTokenizer

    lines = [f"a red apple on a blue table, two dogs USER: \n{QUESTION} ASSISTANT:"]
    tokenizer = CodeGenTokenizer().train_new_from_iterator(lines * 4, 300)
    tokenizer.add_tokens(["  ", "   "])
    language, images = folder / "phi-1_5", folder / "magvitv2"
    tokenizer.save_pretrained(language)
    tensors_by_name = {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "torch_dtype": "float16",
        "qk_layernorm": False,
    }
    save_json(language / "config.json", PHI | tensors_by_name | {"vocab_size": 512})
    images.mkdir()
    save(image_tokenizer_tensors(), images / "pytorch_model.safetensors")
    save_json(images / "config.json", {"_class_name": "MAGVITv2"})
    outputs = tensors(len(tokenizer))
    save(outputs, folder / "model.safetensors")
    rows, pieces = len(outputs["showo.lm_head.weight"]), len(tokenizer)
    config = {"_class_name": "Showo", "codebook_size": CODES, "llm_model_path": "microsoft/phi-1_5"}
    config |= {"llm_vocab_size": pieces, "mask_token_id": rows - 1, "num_vq_tokens": COUNT}
    save_json(folder / "config.json", config | {"load_from_showo": True, "vocab_size": rows, "w_clip_vit": False})


def picture() -> Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1


def keep_file(codes_hw: Tensor) -> Tensor:
    """The codes of a picture with its middle to be painted anew."""
    fixed_hw = codes_hw.clone()
    fixed_hw[1:-1, 1:-1] = -1
    return fixed_hw


# ---------------------------------------------------------------- the official code


class BareModel(nn.Module):
    """In place of what transformers' and diffusers' model classes do beside computing."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        pass


@contextmanager
def official(folder: Path) -> Iterator[None]:
    """Inside, the official modules can be imported."""
    package = types.ModuleType("models")
    package.__path__ = [str(folder / "models")]
    mixins = types.ModuleType("models.modeling_utils")
    mixins.ConfigMixin, mixins.ModelMixin = type("ConfigMixin", (), {}), BareModel  # type: ignore[attr-defined]
    mixins.register_to_config = lambda init: init  # type: ignore[attr-defined]
    misc = types.ModuleType("models.misc")
    misc.List, misc.Union = typing.List, typing.Union  # type: ignore[attr-defined]  # noqa: UP006
    stubs = {"models": package, "models.modeling_utils": mixins, "models.misc": misc}
    stubs |= {name: MagicMock() for name in ("einops", "einops.layers", "einops.layers.torch")}
    with common.importable(folder), patch.dict(sys.modules, stubs):
        with patch("transformers.modeling_utils.PreTrainedModel", BareModel):
            importlib.import_module("models.phi")
        yield


def official_showo(state: dict[str, Tensor]) -> Any:
    """The official model with these tensors, its forward pass watched: `seen` has the logits of each."""
    from models import modeling_showo, phi  # type: ignore[import-not-found]

    rows = len(state["showo.lm_head.weight"])
    settings = PHI | {"vocab_size": rows, "pad_token_id": None, "rope_scaling": None, "use_cache": False}
    settings |= {"_attn_implementation": "eager", "output_attentions": False, "output_hidden_states": False}

    class Watched(modeling_showo.Showo):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            BareModel.__init__(self, types.SimpleNamespace(mask_token_id=rows - 1, w_clip_vit=False))
            self.showo = phi.PhiForCausalLM(types.SimpleNamespace(**settings, use_return_dict=True))
            self.seen: list[Tensor] = []
            self.illegal: list[int] = []

        def forward(self, ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
            mask = attention_mask.reshape(-1, 1, *attention_mask.shape[-2:])
            logits = super().forward(ids, attention_mask=mask)
            self.seen.append(logits.clone())
            logits[..., self.illegal] = -torch.inf
            return logits

    model = Watched().eval()
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def make_goldens(folder: Path) -> None:
    """Ids of prompts, logits, codes and answers by the official model and prompts; codes and pixels by MAGVIT-v2."""
    with official(folder):
        outputs = official_pictures()
        outputs |= official_drawings(outputs["read"])
        outputs |= official_answer(outputs["read"])
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, GOLDEN)


def official_pictures() -> dict[str, Tensor]:
    """Codes (1, h, w) and pixels by MAGVIT-v2."""
    from models import modeling_magvitv2 as vq  # type: ignore[import-not-found]

    images, native_tokenizer = nn.Module(), {"ch": 32, "z_channels": BITS, "resolution": SIDE}
    images.encoder = vq.VQGANEncoder(ch_mult=[1, 2, 2], num_res_blocks=[2, 1, 2], **native_tokenizer)
    images.decoder = vq.VQGANDecoder(ch_mult=[1, 1, 2], num_res_blocks=[1, 2, 2], **native_tokenizer)
    images.quantize = vq.LFQuantizer(codebook_dim=BITS)
    images.load_state_dict(image_tokenizer_tensors(), strict=True)
    codes_1P = vq.MAGVITv2.get_code(images, picture())
    return {"read": codes_1P.unflatten(1, (GRID, GRID)), "pixels": vq.MAGVITv2.decode_code(images, codes_1P)}


def official_prompts() -> Any:
    """UniversalPrompting with the tokenizer of `checkpoint`, and what it calls its special tokens."""
    from training import prompting_utils  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint(Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(Path(scratch) / "phi-1_5", padding_side="left")
    prompts = prompting_utils.UniversalPrompting(tokenizer, max_text_len=showo.MAX_PROMPT_LEN - 1)
    return prompts, {name: int(id) for name, id in prompts.sptids_dict.items()}


def official_drawings(read_1hw: Tensor) -> dict[str, Tensor]:
    """Greedy, sampled, and with the middle painted anew; logits of the first prompt's greedy codes after guidance."""
    from training import prompting_utils

    prompts, special = official_prompts()
    pieces = len(prompts.text_tokenizer)
    native_tokenizer = {"num_vq_tokens": COUNT, "num_new_special_tokens": len(showo.ADDED_TOKENS)}
    parts = types.SimpleNamespace(
        showo=types.SimpleNamespace(**native_tokenizer, llm_vocab_size=pieces - len(showo.ADDED_TOKENS))
    )
    lengths = types.SimpleNamespace(preprocessing=types.SimpleNamespace(max_seq_length=showo.MAX_PROMPT_LEN - 1))
    options: dict[str, Any] = {"timesteps": STEPS, "config": types.SimpleNamespace(model=parts, dataset=lengths)}
    model = official_showo(tensors(pieces - len(showo.ADDED_TOKENS)))
    pad, marks = special["<|pad|>"], {"soi_id": special["<|soi|>"], "eoi_id": special["<|eoi|>"]}
    outputs: dict[str, Tensor] = {}

    def draw(number: int, codes: Tensor, scale: float, temperature: float) -> Tensor:
        ids_1P = torch.where(codes.flatten() < 0, model.config.mask_token_id, codes.flatten() + pieces)[None]
        cond_ids, blind = (prompts(([words], ids_1P), "t2i_gen")[0] for words in (PROMPTS[number], ""))
        input_pair = torch.cat([cond_ids, blind])
        outputs[f"ids.{number}"] = torch.cat([row[row != pad][: -COUNT - 1] for row in input_pair])
        mask = prompting_utils.create_attention_mask_predict_next(input_pair, pad, **marks, rm_pad_in_image=True)
        rng = torch.Generator().manual_seed(SEED * 1_000_003 + 1)
        model.seen.clear()
        sampled_ids = model.t2i_generate(
            cond_ids, blind, mask, temperature, guidance_scale=scale, generator=rng, **options
        )
        return sampled_ids[0]  # type: ignore[no-any-return]

    nothing = torch.full((COUNT,), -1)
    for number in range(len(PROMPTS)):
        with patch("torch.multinomial", lambda weights, *_, **__: weights.argmax(-1, keepdim=True)):
            outputs[f"greedy.{number}"] = draw(number, nothing, SCALE, 0.0)
        if number == 0:
            cond_ids, blind = torch.stack(model.seen)[[0, 1, -1], :, -COUNT - 1 : -1, -CODES - 1 : -1].unbind(1)
            outputs["logits"] = ((1 + SCALE) * cond_ids - SCALE * blind)[:, PLACES]
        outputs[f"sampled.{number}"] = draw(number, nothing, SCALE, 1.0)
        outputs[f"inpainted.{number}"] = draw(number, keep_file(read_1hw[0]), 1.75, 1.0)
    return outputs


def official_answer(read_1hw: Tensor) -> dict[str, Tensor]:
    """Of `mmu_generate` to a question about a picture, which cannot name codes and specials: ids, and logits (T, V)."""
    from training import prompting_utils

    prompts, special = official_prompts()
    tokenizer = prompts.text_tokenizer
    pieces = len(tokenizer) - len(showo.ADDED_TOKENS)
    model = official_showo(tensors(pieces))
    model.illegal = list(range(pieces, model.config.mask_token_id + 1))
    words = tokenizer([f"USER: \n{QUESTION} ASSISTANT:"])["input_ids"]
    begin, end = [[special["<|mmu|>"], special["<|soi|>"]]], [[special["<|eoi|>"], special["<|sot|>"]]]
    codes = read_1hw.flatten(1) + len(tokenizer)
    prompt_document = torch.cat([torch.tensor(begin), codes, torch.tensor(end), torch.tensor(words)], 1)
    mask = prompting_utils.create_attention_mask_for_mmu(prompt_document, eoi_id=special["<|eoi|>"])
    stop = special["<|eot|>"]
    answer = model.mmu_generate(prompt_document, attention_mask=mask, max_new_tokens=WORDS, top_k=1, eot_token=stop)
    logits = torch.stack([logits[0, -1, :pieces] for logits in model.seen])
    return {"question": prompt_document[0], "answer": torch.stack(answer), "answer logits": logits}


# ---------------------------------------------------------------- rows


def rows(folder: Path) -> Iterator[ParityRow]:
    engine, golden = unigen.load(str(folder), device="cpu"), load_file(GOLDEN)
    model = engine.model
    template: Any = model.template
    generator: Any = model.generators["masked"]

    def asked(words: str, end: int | None = None) -> list[int]:
        branches = [template.prompt(Document.of(words), output="image", branch=blind).ids for blind in (0, 1)]
        return [id for ids in branches for id in (*ids[:end], template.begin_ids["masked"])]

    reference_values = [id for number in range(len(PROMPTS)) for id in golden[f"ids.{number}"].tolist()]
    engine_output = [id for words in PROMPTS for id in asked(words)]
    trapped = [id for words in PROMPTS for id in asked(words, -1)]
    reference_name = "the official UniversalPrompting (goldens)"
    yield ParityRow(
        "showo prompt ids",
        mismatch_share(engine_output, reference_values),
        mismatch_share(trapped, reference_values),
        "no end of text",
        reference_name,
    )

    official = golden["read"]
    share = float((model.encode_images(picture()) != official).float().mean())
    with bits_reversed(model):
        control = float((model.encode_images(picture()) != official).float().mean())
    reference_name, mistake = "the official MAGVITv2 (goldens)", "the first bit as the lowest"
    yield ParityRow("showo pixels to codes", share, control, mistake, reference_name)
    pixels = model.image_tokenizer.decode(official)
    with bits_reversed(model):
        mixed = model.image_tokenizer.decode(official)
    there_BCHW = golden["pixels"].clamp(-1, 1)
    yield ParityRow(
        "showo codes to pixels", max_error(pixels, there_BCHW), max_error(mixed, there_BCHW), mistake, reference_name
    )

    reference_name = "the official Showo and t2i_generate (goldens)"
    options: dict[str, Any] = {"guidance": 1 + SCALE, "steps": STEPS, "temperature": 0.0, "seed": SEED}
    first, blind, causal = (
        drawn(engine, options),
        drawn(engine, options | {"guidance": SCALE}),
        drawn(engine, options, prepare_step=lambda state: Masked.prepare_step(generator, state)),
    )
    mistake, other_output = "guidance of g for 1 + g", "no token after the codes"
    yield ParityRow(
        "showo logits",
        max_error(first[1], golden["logits"]),
        max_error(causal[1], golden["logits"]),
        other_output,
        reference_name,
    )
    expected_ids = golden["greedy.0"].tolist() + golden["greedy.1"].tolist()
    assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
    yield ParityRow(
        "showo greedy ids",
        mismatch_share(first[0], expected_ids),
        mismatch_share(blind[0], expected_ids),
        mistake,
        reference_name,
    )

    options |= {"temperature": 1.0}
    reference = drawn(
        engine, options, choice_temperature_at=lambda step, steps: Masked.choice_temperature_at(generator, step, steps)
    )
    expected_ids = golden["sampled.0"].tolist() + golden["sampled.1"].tolist()
    assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
    mistake = "noise that cools once"
    ids = drawn(engine, options)[0]
    yield ParityRow(
        "showo sampled ids",
        mismatch_share(ids, expected_ids),
        mismatch_share(reference[0], expected_ids),
        mistake,
        reference_name,
    )

    options |= {"guidance": 2.75, "fixed_codes": keep_file(official[0])}
    expected_ids = golden["inpainted.0"].tolist() + golden["inpainted.1"].tolist()
    num_steps = drawn(engine, options, num_masked=lambda *rest: Masked.num_masked(generator, *rest))
    mistake, ids = "a share of the unknown codes", drawn(engine, options)[0]
    yield ParityRow(
        "showo inpainted ids",
        mismatch_share(ids, expected_ids),
        mismatch_share(num_steps[0], expected_ids),
        mistake,
        reference_name,
    )

    document = Document([Segment(image=official[0]), Segment(text=QUESTION)])
    turned = Document([Segment(image=official[0].T), Segment(text=QUESTION)])
    engine_output, trapped = (model.token_ids(template.prompt(each, output="text")) for each in (document, turned))
    reference_values = golden["question"].tolist()
    reference_name = "the official prompt of inference_mmu (goldens)"
    yield ParityRow(
        "showo question ids",
        mismatch_share(engine_output, reference_values),
        mismatch_share(trapped, reference_values),
        "columns for rows",
        reference_name,
    )

    texts, logits = answer_ids(engine, document)
    with patch.object(template, "bidirectional_prefix", lambda ids: 0):
        control, blind_TV = answer_ids(engine, document)
    reference_name, mistake = "the official mmu_generate (goldens)", "a picture read causally"
    there_TV = golden["answer logits"]
    yield ParityRow(
        "showo answer logits", max_error(logits, there_TV), max_error(blind_TV, there_TV), mistake, reference_name
    )
    decoded_text = model.text_tokenizer.decode(golden["answer"], skip_special_tokens=True).strip()
    yield ParityRow(
        "showo answer", float(texts != decoded_text), float(control != decoded_text), mistake, reference_name
    )


def answer_ids(engine: Any, document: Document) -> tuple[str, Tensor]:
    """A greedy answer, and the logits (T, V) of text at each of its tokens."""
    steps, score = [], engine.model.backbone.logits

    def watched(hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        logits: Tensor = score(hidden, start, stop)
        steps.append(logits[0, : -len(showo.ADDED_TOKENS)].clone())
        return logits

    with patch.object(engine.model.backbone, "logits", watched):
        texts = engine.generate(document, "text", max_tokens=WORDS)
    return texts, torch.stack(steps)


def drawn(engine: Any, options: dict[str, Any], **mistakes: Any) -> tuple[list[int], Tensor]:
    """Codes of all prompts, and of the first the logits in the first two steps and the last; mistakes: methods that
    take the place of the generator's own."""
    generator = engine.model.generators["masked"]
    codes, steps, write = [], [], generator._unmask

    def watched(state: Any, number: int, logits_NV: Tensor, first: int) -> None:
        steps.append(logits_NV[list(PLACES)].clone())
        write(state, number, logits_NV, first)

    with patch.multiple(generator, _unmask=watched, create=True, **mistakes):
        for words in PROMPTS:
            request = engine.build_request(words, "image", **options)
            list(engine.run_requests([request]))
            codes += request.document.segments[-1].image.flatten().tolist()
    return codes, torch.stack([steps[0], steps[1], steps[STEPS - 1]])


@contextmanager
def bits_reversed(model: Any) -> Iterator[None]:
    with patch.object(Tensor, "flip", lambda self, *_: self):
        yield
