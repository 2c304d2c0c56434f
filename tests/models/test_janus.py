"""What is Janus's own: folders of pickles and shards, what it refuses. How its folder behaves is in test_public."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

import unigen
from tests.parity import janus as case
from unigen.batch import Batch, pack
from unigen.document import Document, Segment
from unigen.hub.resolve import read_json
from unigen.hub.weights import read_tensors, write_tensors
from unigen.model.inputs import PromptIds
from unigen.models import convert, janus
from unigen.utils.files import save_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("janus")
    case.checkpoint(made)
    return made


def pickled(folder: Path, to: Path, shards: int) -> Path:
    """The folder with its weights as Janus-Pro's are published: pickles, in shards where there are several."""
    shutil.copytree(folder, to)
    state = read_tensors(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names = sorted(state)
    if shards == 1:
        torch.save(state, to / "pytorch_model.bin")
        return to
    where = {name: f"pytorch_model-{k % shards}.bin" for k, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: state[name] for name in names if where[name] == file}, to / file)
    (to / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return to


@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_and_shards(folder: Path, tmp_path: Path, shards: int) -> None:
    first, second = (unigen.load(str(f), "cpu") for f in (folder, pickled(folder, tmp_path / "pickled", shards)))
    assert second.generate(case.PROMPT).tobytes() == first.generate(case.PROMPT).tobytes()


def named(folder: Path, to: Path, harm: dict[str, dict[str, Any]] | None = None) -> Path:
    """A copy of the folder, whose files of settings say more."""
    shutil.copytree(folder, to)
    for file, more in (harm or {}).items():
        said = read_json(to / file) if (to / file).is_file() else {}
        save_json(to / file, said | more)
    return to


@pytest.mark.parametrize(
    ("place", "harm"),
    [
        ("Janus-1.3B", None),
        ("models--deepseek-ai--Janus-1.3B/snapshots/0123", None),
        ("mine", {"config.json": {"_name_or_path": "deepseek-ai/Janus-1.3B"}}),
        ("mine", {"processor_config.json": {"sft_format": "deepseek_old"}}),
    ],
)
def test_the_roles_of_the_first_janus(
    place: str, harm: dict[str, dict[str, Any]] | None, folder: Path, tmp_path: Path
) -> None:
    """Prompts are those of its script, and stay so when it is converted."""
    first = named(folder, tmp_path / place, harm)
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    drawn = encode("User: a red apple\n\nAssistant:").ids
    said = encode(f"{janus.SYSTEM}\n\nUser: What is it\n\nAssistant: a dog{case.EOS}User: a dog\n\nAssistant:").ids
    asked = Document([Segment(text="What is it"), Segment(text="a dog", role="assistant"), Segment(text="a dog")])
    convert(first, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "public", "public")
    for where in (first, tmp_path / "ours", tmp_path / "public"):
        template = unigen.load(str(where), "cpu").model.template
        assert template.prompt(Document.of("a red apple"), output="image").ids == drawn
        assert template.prompt(asked, output="text").ids == said


def test_the_roles_of_janus_pro(folder: Path, tmp_path: Path) -> None:
    pro = named(folder, tmp_path / "Janus-Pro-1B", {"processor_config.json": {"sft_format": "deepseek"}})
    true = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("<|User|>: a red apple\n\n<|Assistant|>:").ids
    for where in (folder, pro):
        template = unigen.load(str(where), "cpu").model.template
        assert template.prompt(Document.of("a red apple"), output="image").ids == true


class MaliciousPickle:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_a_pickle_that_runs_code_is_not_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poisoned = pickled(folder, tmp_path / "poisoned", 1)
    torch.save({"gen_embed.weight": MaliciousPickle()}, poisoned / "pytorch_model.bin")
    with pytest.raises(ValueError, match="might run code"):
        unigen.load(str(poisoned), "cpu")
    assert "must not run" not in capsys.readouterr().out


def test_pictures_are_read_alone_as_in_a_batch(folder: Path) -> None:
    """Features of a picture stand with the row that asked for them."""
    engine = unigen.load(str(folder), "cpu")
    pictures = [Image.new("RGB", (32, 20), color) for color in ("red", "blue")]
    asked = [[pictures[0], "What is it"], "two dogs", [pictures[1], pictures[0], "What is it"]]
    together = engine.generate_batch(asked, [0, 0, 0], output="text", max_tokens=8)
    assert together == [engine.generate(one, "text", max_tokens=8) for one in asked]
    assert len(set(together)) == 3


@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_of_transformers(tmp_path: Path, tied: bool) -> None:
    """Read with a head of its own or with the embeddings as its head, and written in the authors' layout."""
    case.transformers_checkpoint(tmp_path / "theirs", tied, heads=2)
    stored = read_tensors(tmp_path / "theirs" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied)
    first = unigen.load(str(tmp_path / "theirs"), "cpu")
    head, table = (first.model.state_dict()[f"backbone.lm.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(head, table) == tied
    convert(tmp_path / "theirs", tmp_path / "public", "public")
    second = unigen.load(str(tmp_path / "public"), "cpu")
    asked = [Image.new("RGB", (32, 20), "red"), "What is it"]
    assert first.generate(asked, "text", max_tokens=8) == second.generate(asked, "text", max_tokens=8)


def test_the_layout_of_transformers_damaged(tmp_path: Path) -> None:
    case.transformers_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="heads of width 32"):
        convert(tmp_path, tmp_path / "public", "public")
    config = json.loads((tmp_path / "config.json").read_text())
    for harm, reason in (
        ({"text_config": {}}, "says 32000 pieces of width 4096"),
        ({"text_config": None}, "damaged"),
        ({"vision_config": config["vision_config"] | {"image_size": 64}}, "of another shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | harm))
        with pytest.raises(ValueError, match=reason):
            unigen.load(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = read_tensors(tmp_path / "model.safetensors")
    for name in ("model.generation_embeddings.weight", "model.aligner.fc1.weight", "model.vqmodel.quant_conv.bias"):
        write_tensors(tmp_path / "model.safetensors", {k: v for k, v in state.items() if k != name})
        with pytest.raises(ValueError, match="missing|not whole|not among them"):
            unigen.load(str(tmp_path), "cpu")


def test_what_it_refuses(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    with pytest.raises(ValueError, match="generates images from text alone"):
        engine.edit(Image.new("RGB", (8, 8)), "make it red")
    with pytest.raises(ValueError, match="learns to draw here"):
        engine.model.template.encode(Document([Segment(text="a"), Segment(text="b", role="assistant")]))
    with pytest.raises(ValueError, match="32x32 pixels alone"):
        engine.generate(case.PROMPT, size=(64, 64))


QUESTION = [Image.new("RGB", (32, 20), "red"), "What is it"]


def question_batch(model: Any) -> Batch:
    """A question about a picture as a packed row, as training reads it."""
    tokens = model.template.prompt(Document.of(QUESTION), output="text")
    assert tokens.handlers == ["vision"]
    return pack([[tokens]], len(tokens) + 2, model.image_tokenizer.image_size)


def test_training_reads_pictures_as_inference_does(folder: Path) -> None:
    """One builder of inputs: hidden states of a packed row are those of the scheduler, and gradients reach the vision
    encoder. The control: without its features the states are others."""
    model = (engine := unigen.load(str(folder), "cpu")).model
    batch = question_batch(model)
    batch.images = model.preprocess_images(QUESTION[:1])
    expected_SD = engine.hidden_states(QUESTION)
    with torch.no_grad():
        found_LD = model.hidden_states(model.insert_image_ids(batch))[0]
        ids_only_LD = model.backbone.forward_packed(model.embed(batch.ids_BL), batch.positions_BL, batch.segments_BL)[0]
    torch.testing.assert_close(found_LD[: len(expected_SD)], expected_SD, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ids_only_LD[: len(expected_SD)], expected_SD, atol=1e-3)
    model.hidden_states(batch).square().sum().backward()
    gradients = [weight.grad for weight in model.vision_encoder.parameters()]
    assert any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_features_of_a_picture_are_no_ids(folder: Path) -> None:
    """Their positions hold id 0, which a penalty on repetition does not count. The control: it is among the ids."""
    engine = unigen.load(str(folder), "cpu")
    sequence = engine.new_scheduler().new_sequence(engine.build_request(QUESTION, "text", repetition_penalty=1.5))
    ids, [span] = sequence.pending_ids[0], sequence.prompt_spans[0]
    assert set(ids[span.start : span.stop]) == {0} and len(span.features_PD) == span.stop - span.start
    assert max(ids) < engine.model.vocabulary.size
    assert sequence.state is not None and sequence.state.spec.context_ids == frozenset(sequence.context_ids)
    begin = sequence.state.spec.begin_id
    assert sequence.context_ids == {*ids[: span.start], *ids[span.stop :], begin}
    renamed = PromptIds(
        [id or 1 for id in ids[: span.start]] + ids[span.start :] + [begin], [span]
    )  # id 0 is <bos>, too
    assert 0 in renamed.ids and 0 not in renamed.vocabulary_ids()


def test_a_folder_of_version_0_1(folder: Path, tmp_path: Path) -> None:
    """Its vision encoder stands in another folder, and its weights have other names in checkpoints."""
    convert(folder, tmp_path / "new")
    assert not (tmp_path / "new" / "sight").exists()
    first = unigen.load(str(tmp_path / "new"), "cpu")
    (tmp_path / "new" / "vision_encoder").rename(tmp_path / "new" / "sight")
    second = unigen.load(str(tmp_path / "new"), "cpu")
    assert first.generate(QUESTION, "text", max_tokens=8) == second.generate(QUESTION, "text", max_tokens=8)
    state = first.model.state_dict()
    old_state = {name.replace("vision_encoder.", "sight.", 1): weight for name, weight in state.items()}
    assert old_state.keys() != state.keys()
    assert second.model.load_state_dict(old_state, strict=True)
