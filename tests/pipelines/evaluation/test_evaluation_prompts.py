"""What a model is asked about a record; a video that kills its decoder costs its record."""

import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from molmo_core.preprocessing.media import MediaError
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record
from pipelines.evaluation.prompts import Prompts, TaskBuilder


def record(**fields):
    return Record("x.jsonl", 3, fields)


@pytest.fixture
def prompts(tiny_model):
    made = Prompts(tiny_model.config)
    yield made
    made.close()


def test_a_prompt_a_question_with_the_inputs_of_inference(prompts, tiny_model, tmp_path):
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 64, 3), np.uint8)).save(tmp_path / "a.png")
    asked = [{"style": "demo", "question": q, "answer": a} for q, a in (("what?", "x"), ("why?", "y"))]
    first, second = prompts(record(image=str(tmp_path / "a.png"), message_list=asked))
    assert (first.question.text, first.question.answers, second.question.text) == ("what?", ["x"], "why?")
    assert first.image_sizes == [(64, 40)]
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    expected = preprocess({"image": tmp_path / "a.png", "style": "demo", "question": "why?"})
    np.testing.assert_array_equal(second.inputs["input_ids"], expected["input_ids"])
    np.testing.assert_array_equal(second.inputs["images"], expected["images"])
    (only,) = prompts(record(image=str(tmp_path / "a.png"), message_list=asked), lambda questions: questions[1:])
    assert only.question == second.question


def test_a_text_has_no_size(prompts):
    (prompt,) = prompts(record(style="demo", question="what?", answer="x"))
    assert prompt.image_sizes == [(100, 100)]


class Fragile(TaskBuilder):
    """Dies, as decoders do, of files called `poison`; fails to decode `damaged`."""

    def __init__(self):
        super().__init__(None, 10**6)

    def build(self, example, rng):
        if "poison" in example["video"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "damaged" in example["video"]:
            self.preprocessor = _damaged
            return super().build(example, rng)
        return {"inputs": [{"process": os.getpid()} for _ in example["tasks"]]}


def _damaged(_):
    raise MediaError("no such frame")


def test_a_video_that_kills_its_decoder_costs_its_record(tiny_model, golden, tmp_path):
    for name in ("good", "poison", "damaged"):
        shutil.copy(golden / "video-olmo" / "video.mp4", tmp_path / f"{name}.mp4")
    prompts = Prompts(tiny_model.config, Fragile())
    try:
        for _ in range(2):
            (made,) = prompts(record(video=str(tmp_path / "good.mp4"), question="q", answer="a"))
            assert made.inputs["process"] != os.getpid()
            with pytest.raises(Rejected, match=r"video: crashes the decoder: .*poison.mp4.*SIGSEGV"):
                prompts(record(video=str(tmp_path / "poison.mp4"), question="q", answer="a"))
            with pytest.raises(Rejected, match="video: undecodable: no such frame"):
                prompts(record(video=str(tmp_path / "damaged.mp4"), question="q", answer="a"))
    finally:
        prompts.close()
