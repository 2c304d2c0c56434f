"""Scenes as chats: the documents from which one model learns to draw, describe, answer, edit, tell and judge.

    chats = ChatSampler(SceneRenderer(64), mixture={"draw": 0.5, "describe": 0.5})
    document, kind = chats(np.random.default_rng(0))

Knows questions and answers. Does not depend on: ids, templates, models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unigen.document import Document, Segment
from unigen.toyworld.language import (
    QAPair,
    caption,
    count_questions,
    descriptive_caption,
    expansion,
    extract_facts,
    noisy_caption,
    position_questions,
    questions,
    sample_edit,
    sample_judgement,
    short_caption,
)
from unigen.toyworld.scenes import Scene, groups_of, sample_scene
from unigen.toyworld.stories import story
from unigen.toyworld.world import SceneRenderer

CAPTION_PROMPT, DETAIL_REQUEST = "describe this picture", "describe this picture in detail"
EXPAND_REQUEST, JUDGE_QUESTION = "say more: {}", "does this picture show {}?"
DEFAULT_KIND_WEIGHTS = {
    "draw": 0.48,
    "describe": 0.16,
    "ask": 0.18,
    "edit": 0.05,
    "story": 0.03,
    "chat": 0.06,
    "expand": 0.01,
    "judge": 0.03,
}


class ChatSampler:
    """Draws documents: `chats(rng)` -> (document, kind). Training scenes only, unless held_out says otherwise.

    world: renders the pictures. mixture: the share of each kind among documents; the kinds are those of
    `DEFAULT_KIND_WEIGHTS`, and each is a method of this class. Raises ValueError for an unknown kind.
    """

    def __init__(
        self, world: SceneRenderer, mixture: Mapping[str, float] | None = None, held_out: bool | None = False
    ) -> None:
        mixture = DEFAULT_KIND_WEIGHTS if mixture is None else mixture
        unknown = sorted(set(mixture) - set(DEFAULT_KIND_WEIGHTS))
        if unknown or min(mixture.values(), default=0) < 0 or not sum(mixture.values()) > 0:
            reason = f"there is no {', '.join(unknown)}" if unknown else "each at least 0, not all of them 0"
            raise ValueError(f"a mixture shares out {', '.join(DEFAULT_KIND_WEIGHTS)}: {reason}")
        self.world, self.held_out = world, held_out
        self.kinds = list(mixture)
        self.probabilities = np.array([mixture[kind] for kind in self.kinds]) / sum(mixture.values())

    def __call__(self, rng: np.random.Generator) -> tuple[Document, str]:
        """A chat and its kind, a key of the mixture."""
        kind = self.kinds[int(rng.choice(len(self.kinds), p=self.probabilities))]
        return Document(getattr(self, kind)(rng)), kind

    # ---------------------------------------------------------------- the kinds

    def draw(self, rng: np.random.Generator) -> list[Segment]:
        """A picture as asked; in a third of these chats the scene of two of which there is more to say."""
        scenes = [self._sample_scene(rng) for _ in range(2 if rng.random() < 1 / 3 else 1)]
        return self._drawing_turns(max(scenes, key=_scene_complexity), rng)

    def describe(self, rng: np.random.Generator) -> list[Segment]:
        """Questions about a picture, then a caption."""
        scene = self._sample_scene(rng)
        detail = rng.random() < 0.25
        answer = descriptive_caption(scene, rng) if detail else caption(extract_facts(scene))
        question_turns = self._questions(
            scene, rng, int(rng.integers(0, 3))
        )  # before the caption, which would give them away
        return [
            self._image_segment(scene),
            *question_turns,
            *_question_answer(DETAIL_REQUEST if detail else CAPTION_PROMPT, answer),
        ]

    def ask(self, rng: np.random.Generator) -> list[Segment]:
        """Questions; in three of five of these chats where two things are that stand in a clear relation, which few
        scenes have. In one of five how many things there are comes first, whatever they are: counting is not to hang on
        what is counted.

        Which of the two is asked about has to be bound to its place. That is learnt where the question comes first,
        since every answer gives the next away; so "where", the hardest, mostly does.
        """
        scene = self._sample_scene(rng)
        if rng.random() < 0.4:
            count_pairs = count_questions(scene, rng) if rng.random() < 0.5 else []
            return [
                self._image_segment(scene),
                *_qa_turns(count_pairs),
                *self._questions(scene, rng, 6 - len(count_pairs)),
            ]
        while extract_facts(scene).relation is None:
            scene = self._sample_scene(rng)
        relation_questions = [
            qa for _ in range(2) for qa in questions(scene, rng) if qa.kind == "relation"
        ] + position_questions(scene, rng)
        pairs = list(
            {
                relation_questions[k].question: relation_questions[k] for k in rng.permutation(len(relation_questions))
            }.values()
        )
        if rng.random() < 0.7:
            pairs.sort(key=lambda qa: not (qa.kind == "relation" and qa.question.startswith("where")))
        return [self._image_segment(scene), *_qa_turns(pairs[:6])]

    def edit(self, rng: np.random.Generator) -> list[Segment]:
        """A picture, an instruction, and the picture after it."""
        scene = self._sample_scene(rng)
        edit = sample_edit(scene, rng, held_out=self.held_out)
        return [
            self._image_segment(scene),
            Segment(text=edit.instruction),
            self._image_segment(edit.edited_scene, "assistant"),
        ]

    def story(self, rng: np.random.Generator) -> list[Segment]:
        """A request, with pictures of its characters or without, and an illustrated story."""
        references = int(rng.choice(3, p=(0.6, 0.2, 0.2)))
        story_sample = story(rng, references=references, held_out=self.held_out)
        segments = [
            *(self._image_segment(scene) for scene in story_sample.references),
            Segment(text=story_sample.request),
        ]
        for text, scene in story_sample.pages:
            segments += [Segment(text=text, role="assistant"), self._image_segment(scene, "assistant")]
        return segments

    def chat(self, rng: np.random.Generator) -> list[Segment]:
        """Drawn as asked, asked about, changed as told, asked about again."""
        scene = self._sample_scene(rng)
        segments = [*self._drawing_turns(scene, rng), *self._questions(scene, rng, int(rng.integers(1, 3)))]
        if rng.random() < 0.6:
            edit = sample_edit(scene, rng, held_out=self.held_out)
            segments += [Segment(text=edit.instruction), self._image_segment(edit.edited_scene, "assistant")]
            segments += self._questions(edit.edited_scene, rng, 1)
        return segments

    def expand(self, rng: np.random.Generator) -> list[Segment]:
        """A short prompt, and the long one that it is expanded to."""
        short, expanded_prompt = expansion(self._sample_scene(rng), rng)
        return _question_answer(EXPAND_REQUEST.format(short), expanded_prompt)

    def judge(self, rng: np.random.Generator) -> list[Segment]:
        """Whether a picture is what a prompt says, and why."""
        scene = self._sample_scene(rng)
        prompt, ok, reason = sample_judgement(scene, rng)
        answer = f"{'yes' if ok else 'no'}, {reason}"
        return [
            self._image_segment(scene),
            *_question_answer(JUDGE_QUESTION.format(prompt), answer),
            *self._questions(scene, rng, 2),
        ]

    # ---------------------------------------------------------------- parts

    def _sample_scene(self, rng: np.random.Generator) -> Scene:
        return sample_scene(rng, size=self.world.size, held_out=self.held_out)

    def _image_segment(self, scene: Scene, role: Any = "user") -> Segment:
        return Segment(image=self.world.render(scene).image, role=role)

    def _drawing_turns(self, scene: Scene, rng: np.random.Generator) -> list[Segment]:
        prompt = rng.choice(4, p=(0.5, 0.25, 0.15, 0.1))
        text = (short_caption, _canonical_caption, descriptive_caption, noisy_caption)[prompt](scene, rng)
        return [Segment(text=text), self._image_segment(scene, "assistant")]

    def _questions(self, scene: Scene, rng: np.random.Generator, count: int) -> list[Segment]:
        pairs = questions(scene, rng)[:count]
        if pairs and rng.random() < 0.3:
            pairs[int(rng.integers(len(pairs)))] = (position_questions(scene, rng) or pairs)[0]
        return _qa_turns(pairs)


def _qa_turns(pairs: list[QAPair]) -> list[Segment]:
    return [segment for qa in pairs for segment in _question_answer(qa.question, qa.answer)]


def _question_answer(question: str, answer: str) -> list[Segment]:
    return [Segment(text=question), Segment(text=answer, role="assistant")]


def _scene_complexity(scene: Scene) -> int:
    """Objects and colours: what a picture can be wrong about."""
    return len(scene.objects) + sum(color is not None for _, color, _ in groups_of(scene))


def _canonical_caption(scene: Scene, rng: np.random.Generator) -> str:
    return caption(extract_facts(scene))
