"""Every public family's folder as a user meets it: the commands, conversion, and what is wrong with a damaged one."""

from __future__ import annotations

import copy
import importlib
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unigen
from scripts.parity import family_names
from tests.parity.common import record_logits
from unigen.batch import pack
from unigen.commands import main as cli
from unigen.document import Document, Segment
from unigen.generators import next_token
from unigen.hub.resolve import MANIFEST, read_json
from unigen.hub.weights import read_tensors, read_weights, write_tensors
from unigen.media.pixels import to_pixels
from unigen.models import convert
from unigen.nn.backbone import Backbone
from unigen.serving.jobs import Error, Finished, Job, Part, Started
from unigen.serving.worker import BatchedWorker
from unigen.training.objectives import MultiGeneratorLoss
from unigen.utils.numbers import NonFiniteError

FOLDERS: dict[str, Path] = {}


@pytest.fixture(params=family_names())
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(family: str) -> Any:
    return importlib.import_module(f"tests.parity.{family}")


@pytest.fixture
def public(family: str, case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the family's public layout; a family with models of two kinds has two cases."""
    if family not in FOLDERS:
        FOLDERS[family] = tmp_path_factory.mktemp(family)
        case.checkpoint(FOLDERS[family])
    return FOLDERS[family]


def test_the_commands(family: str, case: Any, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--model", str(public), "--device", "cpu"]
    width, height = case.SIZE
    picture = tmp_path / "out.png"
    assert cli.main(["info", *where]) == 0
    printed = capsys.readouterr().out
    assert family.partition("_")[0] in printed
    assert cli.main(["generate", *case.CLI_ARGUMENTS, "-o", str(picture), "--size", f"{width}x{height}", *where]) == 0
    assert Image.open(picture).size == (width, height)
    engine = unigen.load(str(public), "cpu")
    described = cli.main(["describe", str(picture), "-q", "What is it", *where])
    assert described == (0 if "text" in engine.outputs else 2)
    told = cli.main(["story", "a witch", "-o", str(tmp_path / "story.md"), *where])
    assert told == (0 if "interleaved" in engine.outputs else 2)
    assert (tmp_path / "story.md").exists() == (told == 0)
    assert "Traceback" not in capsys.readouterr().err


def test_pictures_whose_features_are_not_finite_are_not_read(case: Any, public: Path) -> None:
    """The code nearest to a nan would be an accident, and the answer one, too."""
    engine, picture = unigen.load(str(public), "cpu"), Image.new("RGB", (32, 32), "red")
    model = engine.model
    if "text" not in engine.outputs:
        return
    request = engine.build_request([picture, "what is it"], "text")
    for weight in (model.vision_encoder or model.image_tokenizer).parameters():
        weight.data.fill_(float("inf"))
    reason = "features of pictures of this model are not finite in float32: its checkpoint may be damaged"
    with pytest.raises(NonFiniteError, match=reason):
        engine.describe(picture, "what is it")
    worker = BatchedWorker(engine, 4)
    worker.submit(0, Job(request.document, "text"))
    events = [event for _ in range(2) for _, event in worker.step()]
    assert events == [Error(reason, retryable=False)] or events[1:] == [Error(reason, retryable=False)]


def test_it_is_served(case: Any, public: Path) -> None:
    """Two jobs at once by what `unigen serve` answers with: the pictures that the engine draws of each alone."""
    engine = unigen.load(str(public), "cpu")
    worker, drawn = BatchedWorker(engine, 8), {}
    for seed in (0, 1):
        worker.submit(seed, Job(Document.of(case.PROMPT), "image", {"seed": seed, "size": case.SIZE}))
    while worker.busy:
        for number, event in worker.step():
            assert isinstance(event, (Started, Part, Finished)), event
            if isinstance(event, Part):
                drawn[number] = event.content
    for seed in (0, 1):
        assert drawn[seed].tobytes() == engine.generate(case.PROMPT, seed=seed, size=case.SIZE).tobytes()


def test_a_system_message_is_followed_or_refused(case: Any, public: Path) -> None:
    """Where the family has a place for one it opens the prompt of a text, once, in the place of the usual one. Pictures
    are drawn from what the user says."""
    engine = unigen.load(str(public), "cpu")
    template = engine.model.template
    system, asked = Segment(text="a red apple", role="system"), Segment(text="red")
    if not template.supports_system:
        with pytest.raises(ValueError, match="system"):
            engine.build_request([system, asked], engine.outputs[0])
        return
    plain, told, later = (
        template.prompt(engine.build_request(said, "text").document, output="text").ids
        for said in ([asked], [system, asked], [asked, system])
    )
    assert told == later != plain and told[-3:] == plain[-3:]
    decoded = [template.tokenizer.decode(ids, skip_special_tokens=True) for ids in (plain, told)]
    assert [text.count("a red apple") for text in decoded] == [0, 1]
    drawn = engine.build_request([system, asked], "image").document
    assert template.prompt(drawn, output="image").ids == template.prompt(Document([asked]), output="image").ids


def test_conversion_there_and_back_changes_nothing(case: Any, public: Path, tmp_path: Path) -> None:
    convert(public, tmp_path / "ours")
    assert (tmp_path / "ours" / MANIFEST).is_file()
    convert(tmp_path / "ours", tmp_path / "public", "public")
    first, *others = (unigen.load(str(folder), "cpu") for folder in (public, tmp_path / "ours", tmp_path / "public"))
    picture = first.generate(case.PROMPT, size=case.SIZE)
    for other in others:
        mine, theirs = first.model.state_dict(), other.model.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert other.generate(case.PROMPT, size=case.SIZE).tobytes() == picture.tobytes()
        assert other.info() == first.info()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_as_trainers_write_them(case: Any, public: Path, tmp_path: Path, file: str) -> None:
    """Under the prefix of a compiled model, or in the pickle of a trainer that ran in several processes."""
    shutil.copytree(public, tmp_path / "other")
    files = list((tmp_path / "other").glob("*.safetensors"))
    if not files:
        return
    state = {f"_orig_mod.{name}": tensor for name, tensor in read_weights(tmp_path / "other").items()}
    for path in files:
        path.unlink()
    if file.endswith(".bin"):
        state = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "other" / file)
    else:
        write_tensors(tmp_path / "other" / file, state)
    mine, theirs = (unigen.load(str(f), "cpu").model.state_dict() for f in (public, tmp_path / "other"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_folder_that_is_no_model_is_not_replaced(public: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no model"):
        convert(public, tmp_path)
    assert (tmp_path / "notes.txt").is_file()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget(path: Path) -> None:
    state = read_tensors(path)
    name = sorted(state)[min(3, len(state) - 1)]
    del state[name]
    write_tensors(path, state) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def poison(path: Path) -> None:
    torch.save({"state_dict": Evil()}, path)


@pytest.mark.parametrize(
    ("harm", "safe", "pickled"),
    [
        (cut, "cannot be loaded|cannot be read", "cannot be read|damaged"),
        (forget, "missing", "missing"),
        (poison, "", "might run code"),
        (Path.unlink, "cannot be|holds neither|missing|has no weights", "has no|missing|holds neither"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(
    harm: Callable[[Path], None],
    safe: str,
    pickled: str,
    public: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds = (".safetensors", ".ckpt", ".pt", ".pth")
    files = [path.relative_to(public) for path in public.rglob("*") if path.suffix in kinds]
    spare = read_json(public / "config.json").keys() <= {"n_head"} if (public / "config.json").is_file() else False
    for file in [*files, *([Path("config.json")] if (public / "config.json").is_file() else [])]:
        reason = safe if file.suffix in (".safetensors", ".json") else pickled
        if not reason or (file.suffix == ".json" and (harm is forget or (spare and harm is Path.unlink))):
            continue
        folder = tmp_path / file.name
        shutil.copytree(public, folder)
        harm(folder / file)
        assert cli.main(["info", "--model", str(folder), "--device", "cpu"]) == 2, file
        told = capsys.readouterr()
        assert any(words in told.err for words in reason.split("|")), (file, told.err)
        assert len(told.err.strip().splitlines()) == 1 and "must not run" not in told.out


def test_names_on_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("someone/something", "someone/something@v1.0"):
        assert cli.main(["info", "--model", name, "--device", "cpu"]) == 2
        told = capsys.readouterr().err
        assert name in told and "not in the hub's cache" in told and len(told.strip().splitlines()) == 1


def test_a_folder_of_no_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert cli.main(["info", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "'bert', which is of no family known here" in capsys.readouterr().err


def test_a_negative_prompt_is_for_pipelines(case: Any, public: Path) -> None:
    engine = unigen.load(str(public), "cpu")
    with pytest.raises(ValueError, match="does not take negative_prompt: leave that out") as caught:
        engine.generate(case.PROMPT, negative_prompt="blurry", size=case.SIZE)
    assert "\n" not in str(caught.value)


def test_the_table_in_the_docs(family: str, public: Path, root: Path) -> None:
    """What docs/models.md says that a family can do is what it can do."""
    lines = (root / "docs" / "models.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    engine = unigen.load(str(public), "cpu")
    name = engine.info()["family"]
    kind = family.removeprefix(name).removeprefix("_")
    title = f"{name} ({kind})" if kind else name
    titles, said = rows[0], [row for row in rows if row[0] == title]
    assert len(said) == 1, f"give {title} one row in docs/models.md"
    told = dict(zip(titles, said[0], strict=True))
    picture = Image.new("RGB", (32, 32))
    able = {
        "draws": "image" in engine.outputs,
        "answers": "text" in engine.outputs,
        "interleaves": "interleaved" in engine.outputs,
        "edits": True,
    }
    try:
        engine.model.template.prompt(
            engine.model.encode_document(Document.of([picture, "make it red"])), output="image"
        )
    except ValueError:
        able["edits"] = False
    assert {name: told[name] for name in able} == {name: "yes" if can else "no" for name, can in able.items()}
    assert told["sizes"] == ("any" if engine.model.template.variable_size else "one")
    assert re.search(r"`[\w.-]+/[\w.:-]+`", told["first command's `--model`"])


@pytest.mark.parametrize("harm", [forget, "{}"], ids=["forget", "{}"])
def test_our_layout_damaged(harm: Any, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of a converted folder, one at a time: one clear line, or it was not needed."""
    convert(public, tmp_path / "ours")
    for file in sorted(p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*") if p.is_file()):
        weights = file.suffix == ".safetensors"
        if weights == isinstance(harm, str) or (file.suffix != ".json" and not weights):
            continue
        if harm is forget and not weights:
            continue
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "ours", folder)
        harm(folder / file) if callable(harm) else (folder / file).write_text(harm)
        code = cli.main(["info", "--model", str(folder), "--device", "cpu"])
        told = capsys.readouterr().err
        assert code in (0, 2) and (code == 0) == (told == ""), (file, told)
        spare = ("generation_config.json", "tokenizer_config.json", "next-scale/config.json")
        assert code == 2 or str(file) in spare
        assert len(told.strip().splitlines()) == code // 2, (file, told)
        shutil.rmtree(folder)


def test_what_is_learnt_is_what_is_read(case: Any, public: Path) -> None:
    """A batch to learn from, filled with codes, holds the ids that a prompt of the same document does."""
    model = unigen.load(str(public), "cpu").model
    if "next-token" not in model.generators:
        return
    width, height = case.SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    asked = Segment(label=case.PROMPT) if isinstance(case.PROMPT, int) else Segment(text=case.PROMPT)
    codes = model.encode_images(to_pixels([pixels], width) if width == height else model.preprocess_images([pixels]))[0]
    document = Document([asked, Segment(image=codes, role="assistant")])
    tokens = model.template.encode(document)
    batch = model.insert_image_ids(pack([[tokens]], len(tokens), width))
    assert batch.ids_BL[0].tolist() == model.token_ids(tokens)
    assert bool(model.vocabulary.is_image(batch.ids_BL[batch.loss_BL]).any())


def test_captions_are_chosen_by_the_picture(public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = unigen.load(str(public), "cpu")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in.png")
    where = ["--model", str(public), "--device", "cpu"]
    able = "text" in engine.outputs and engine.model.vision_encoder is None and "next-token" in engine.model.generators
    assert cli.main(["describe", str(tmp_path / "in.png"), "--candidates", "2", *where]) == (0 if able else 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(case: Any, public: Path, dtype: str) -> None:
    """It draws, alone as in a batch; image tokenizers stay in float32, and decode in bfloat16 where all else is."""
    engine = unigen.load(str(public), "cpu", dtype)
    assert {p.dtype for p in engine.model.image_tokenizer.parameters()} == {torch.float32}
    together = engine.generate_batch([case.PROMPT] * 2, [1, 2], size=case.SIZE)
    assert together[0].size == case.SIZE and together[0].tobytes() != together[1].tobytes()
    engine.model.decode_autocast = nullcontext  # type: ignore[method-assign, assignment]
    exact = engine.generate_batch([case.PROMPT] * 2, [1, 2], size=case.SIZE)
    levels = [np.abs(np.asarray(a, float) - np.asarray(b)) for a, b in zip(together, exact, strict=True)]
    assert np.mean(levels) < 5 and (np.max(levels) > 0) == (dtype == "bfloat16")


def test_the_loss_is_of_what_is_drawn(case: Any, public: Path) -> None:
    """A picture's nats are those of the scores by which the engine drew it; where the head scores text beside codes,
    of those scores among all others."""
    engine = unigen.load(str(public), "cpu")
    model, options = engine.model, {"guidance": 1.0, "top_k": 0, "top_p": 1.0, "size": case.SIZE}
    if "next-token" not in model.generators:
        return
    drawn: list[list[int]] = []
    generator = model.generators["next-token"]
    paint = generator.decode

    def watched(model: Any, states: Any) -> torch.Tensor:
        drawn.extend(state.ids for state in states)
        return paint(model, states)

    generator.decode = watched  # type: ignore[method-assign]
    with record_logits(next_token) as steps:
        engine.generate(case.PROMPT, seed=3, **options)
    ids_T, logits_TV = torch.tensor(drawn[0]), torch.cat(steps)
    first, (width, height) = model.vocabulary.image_start, case.SIZE
    stride = model.image_tokenizer.image_size // model.image_tokenizer.grid[0]
    codes = model.vocabulary.image_codes(ids_T).unflatten(0, (height // stride, width // stride))
    asked = Segment(label=case.PROMPT) if isinstance(case.PROMPT, int) else Segment(text=case.PROMPT)
    tokens = model.template.encode(Document([asked, Segment(image=codes, role="assistant")]))
    batch = model.insert_image_ids(pack([[tokens]], len(tokens), width))
    with torch.no_grad():
        hidden_BLD = model.hidden_states(batch)
        targets = generator.prepare(model, batch, torch.Generator())[1]
        nats = generator.loss(model, batch, hidden_BLD, targets)
    rows, at = targets.nonzero(as_tuple=True)
    coded = model.vocabulary.is_image(batch.ids_BL[rows, at])
    assert batch.ids_BL[rows, at][coded].tolist() == ids_T.tolist()
    expected = torch.nn.functional.cross_entropy(logits_TV, ids_T - first, reduction="none")
    if type(model.backbone) is Backbone:  # one head for text and codes
        scores = model.backbone.lm.get_output_embeddings()(hidden_BLD[rows, at - 1][coded])
        expected += scores.logsumexp(-1) - logits_TV.logsumexp(-1)
    torch.testing.assert_close(nats[coded], expected, rtol=1e-4, atol=1e-4)
    if model.vocabulary.separate_head:  # what is kept of a model before is of the same scores
        before = copy.deepcopy(model)
        with torch.no_grad():
            for p in before.backbone.lm.parameters():
                p.mul_(1.2)
            p, q = (
                m.logits(m.causal_hidden_states(batch)[rows, at - 1], first, first + len(logits_TV[0]))
                for m in (model, before)
            )
            found = MultiGeneratorLoss({"next-token": generator}, teacher=before)(model, batch, torch.Generator())
        gaps_T = (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1)
        torch.testing.assert_close(found["next-token"][0], gaps_T.sum(), rtol=1e-4, atol=1e-4)
        assert float(gaps_T.sum()) > 0.01


def test_pictures_that_are_far_too_long(public: Path, tmp_path: Path) -> None:
    """Before it is resized: a small file must not become pixels without end."""
    model = unigen.load(str(public), "cpu").model
    Image.new("RGB", (20_000, 2)).save(tmp_path / "long.png")
    for picture in (tmp_path / "long.png", np.zeros((20_000, 2, 3), np.uint8)):
        with pytest.raises(ValueError, match="pixels is too long: at most 50 to 1"):
            model.preprocess_images([picture])
    assert model.preprocess_images([Image.new("RGB", (50, 1))]).ndim == 4
