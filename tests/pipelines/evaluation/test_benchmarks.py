"""Every benchmark of configs/evaluate, on three rows in the columns of its files, as they are published: read, asked, and scored."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from molmo_core.preprocessing.data_formatter import Formatter
from molmo_core.registry import BaseModelConfig
from pipelines.data.records.reading import read_record
from pipelines.data.sources import open_records
from pipelines.evaluation.columns import mapped
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.questions import judge, media_of, questions

CONFIGS = Path(__file__).parents[3] / "configs/evaluate"
SIZE = (40, 20)


def picture() -> dict:
    """As Hugging Face stores it in Parquet."""
    file = io.BytesIO()
    Image.new("RGB", SIZE, "red").save(file, "PNG")
    return {"bytes": file.getvalue(), "path": "a.png"}


def votes(*answers: str) -> list[dict]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers)]


MASK = [[column < 20 for column in range(SIZE[0])] for _ in range(SIZE[1])]
POINT = '<point x="25.0" y="50.0" alt="cup">cup</point>'
COMMON = {"image": picture(), "question": "What is it?", "question_id": "7"}
VIDEO = {"question": "What happens?", "question_id": "7"}
# A row, a right answer, and a wrong one, of each kind of row of a benchmark.
ROWS: dict[str, list[tuple[dict, str, str]]] = {
    "vqa_v2": [
        (
            {
                **COMMON,
                "answers": votes(*["red"] * 10),
                "answer_type": "other",
                "image_id": 1,
                "question_type": "what",
                "multiple_choice_answer": "red",
            },
            "Red.",
            "blue",
        ),
        (
            {
                **COMMON,
                "answers": votes(*["two"] * 3, *["3"] * 7),
                "answer_type": "number",
                "image_id": 1,
                "question_type": "how",
                "multiple_choice_answer": "3",
            },
            "2",
            "4",
        ),
    ],
    "text_vqa": [({**COMMON, "answers": ["stop"] * 9 + ["stop sign"], "image_id": "a", "ocr_tokens": ["stop"]}, "stop", "go")],
    "doc_vqa": [
        (
            {**COMMON, "questionId": "7", "question_types": ["form"], "docId": 1, "answers": ["Smith", "J. Smith"], "data_split": "val"},
            "smith",
            "Miller & Sons",
        )
    ],
    "info_vqa": [
        (
            {
                **COMMON,
                "questionId": "7",
                "answers": ["12%"],
                "answer_type": ["single span"],
                "image_url": "http://example.org/a",
                "ocr": "[]",
            },
            "12%",
            "many",
        )
    ],
    "chart_qa": [
        ({"type": "human_test", "question": "How many?", "answer": "100", "image": picture()}, "104", "110"),
        ({"type": "augmented_test", "question": "Which?", "answer": "Peru", "image": picture()}, "peru", "Chile"),
    ],
    "ai2d": [({**COMMON, "options": ["sun", "moon", "star", "sea"], "answer": "2"}, "C", "D")],
    "real_world_qa": [
        (
            {
                "image": picture(),
                "image_path": "a.webp",
                "question": "Which? A. left B. right Please answer with the letter.",
                "answer": "B",
            },
            "B",
            "A",
        ),
        ({"image": picture(), "image_path": "a.webp", "question": "How many?", "answer": "2"}, "Two", "3"),
    ],
    "mmmu": [
        (
            {
                "id": "v_1",
                "question": "<image 1> and <image 2>?",
                "options": "['one', 'two']",
                "explanation": "",
                "answer": "B",
                "subfield": "Art",
                "image_1": picture(),
                "image_2": picture(),
                **{f"image_{i}": None for i in range(3, 8)},
                "question_type": "multiple-choice",
            },
            "B",
            "A",
        ),
        (
            {
                "id": "v_2",
                "question": "How much <image 1>?",
                "options": "[]",
                "explanation": "",
                "answer": "7.5",
                "subfield": "Finance",
                "image_1": picture(),
                **{f"image_{i}": None for i in range(2, 8)},
                "question_type": "open",
            },
            "It is 7.50",
            "8",
        ),
    ],
    "math_vista": [
        (
            {
                "pid": "1",
                "question": "How long?",
                "image": "images/1.jpg",
                "decoded_image": picture(),
                "choices": None,
                "unit": None,
                "precision": 1.0,
                "answer": "1.2",
                "question_type": "free_form",
                "answer_type": "float",
                "query": "Hint: ...",
            },
            "1.2",
            "2.1",
        ),
        (
            {
                "pid": "2",
                "question": "Which?",
                "image": "images/2.jpg",
                "decoded_image": picture(),
                "choices": ["5", "6"],
                "unit": None,
                "precision": None,
                "answer": "6",
                "question_type": "multi_choice",
                "answer_type": "text",
                "query": "Hint: ...",
            },
            "(B) 6",
            "A",
        ),
    ],
    "count_bench": [
        ({"image": picture(), "text": "Three cups", "question": "How many cups are there?", "number": 3}, "a total of three", "four")
    ],
    "pixmo_count": [
        ({"image_url": "a.png", "image_sha256": "x", "count": 2, "points": {"x": [1.0, 9.0], "y": [2.0, 3.0]}, "label": "cups"}, "2", "3"),
        ({"image_url": "a.png", "image_sha256": "x", "count": 0, "points": {"x": [], "y": []}, "label": "dogs"}, "There are none.", "1"),
    ],
    "pixmo_points": [
        (
            {"image_url": "a.png", "image_sha256": "x", "label": "cup", "points": [{"x": 25.0, "y": 50.0}], "masks": [MASK]},
            POINT.replace("25.0", "45.0"),
            POINT.replace("25.0", "55.0"),
        )
    ],
    "mv_bench": [
        ({"video": "a.mp4", "question": "What?", "candidates": ["It falls.", "It flies."], "answer": "It flies."}, "(B) It flies.", "A")
    ],
    "video_mme": [
        (
            {
                **VIDEO,
                "video_id": "001",
                "duration": "short",
                "domain": "Knowledge",
                "sub_category": "Law",
                "url": "https://example.org/v",
                "videoID": "a",
                "task_type": "Counting Problem",
                "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
                "answer": "C",
            },
            "C",
            "B",
        )
    ],
    "long_video_bench": [
        (
            {
                "video_id": "a",
                "question": "Who?",
                "question_wo_referring_query": "Who?",
                "candidates": ["he", "she", "it"],
                "correct_choice": 1,
                "topic_category": "movie",
                "question_category": "S2E",
                "level": "L1",
                "id": "a_0",
                "video_path": "a.mp4",
                "subtitle_path": "a.json",
                "duration_group": 15,
                "starting_timestamp_for_subtitles": 0,
                "duration": 10.5,
                "view_count": 5,
            },
            "B",
            "C",
        )
    ],
    "perception_test": [
        (
            {
                **VIDEO,
                "video_name": "a",
                "options": ["yes", "no", "maybe"],
                "answer_id": "1",
                "area": "physics",
                "reasoning": "descriptive",
                "tag": ["motion"],
            },
            "B. no",
            "yes",
        )
    ],
}
VIDEO_PLACES = {
    "mv_bench": "videos/task/a.mp4",
    "video_mme": "data/a.mp4",
    "long_video_bench": "videos/a.mp4",
    "perception_test": "videos/a.mp4",
}


def prepared(name: str, folder: Path) -> tuple[EvaluateConfig, list[tuple[dict, str, str]]]:
    """The benchmark's configuration on three rows, written where it looks for them."""
    config = EvaluateConfig.load(CONFIGS / f"{name}.yaml", ["model=m"])
    rows = [ROWS[name][i % len(ROWS[name])] for i in range(3)]
    path = folder / config.records.replace("*", "task" if name == "mv_bench" else "00000-of-00001")
    path.parent.mkdir(parents=True)
    if path.suffix == ".json":
        path.write_text(json.dumps([row for row, _, _ in rows]))
    else:
        pq.write_table(pa.Table.from_pylist([row for row, _, _ in rows]), path)
    Image.new("RGB", SIZE).save(path.parent / "a.png")
    if name in VIDEO_PLACES:
        video = folder / "data/benchmarks" / name / VIDEO_PLACES[name]
        video.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, video)  # that a file is there is all that is looked at
    config.records = str(folder / config.records)
    return config, rows


def test_every_benchmark_is_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - set(ROWS) == {"demo", "emoji_scenes", "emoji_scenes_small", "own"}


@pytest.mark.parametrize("name", VIDEO_PLACES)
def test_videos_are_asked_about_as_in_the_published_evaluation(name, tmp_path):
    """Molmo2's: the question, what to return, and the options with letters; no style before them."""
    config, rows = prepared(name, tmp_path)
    (question,) = questions(read_record(mapped(open_records(config.records), config.fields)[0]))
    formatter = Formatter(BaseModelConfig.load(CONFIGS.parent / "models/molmo2-4b.yaml").data_formatter)
    (annotation,) = formatter(question.task, np.random.RandomState(0), for_inference=True)
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDE", question.task["options"]))
    asked = f"{rows[0][0]['question']}\nOnly return the correct answer option.\n{options}"
    assert annotation.messages == [f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"]


@pytest.mark.parametrize("name", ROWS)
def test_rows_as_they_are_published(name, tmp_path):
    config, rows = prepared(name, tmp_path)
    records = mapped(open_records(config.records), config.fields)
    assert len(records) == 3
    for i, (row, right, wrong) in enumerate(rows):
        example = read_record(records[i])
        media = media_of(example)
        assert len(media) == 1
        for reference in media.get("images", [media.get("image", media.get("video"))]):
            assert isinstance(reference, bytes) or Path(reference).is_file()
        (question,) = questions(example)
        sizes = [SIZE] * 2
        scored = judge(question, config, sizes)
        assert scored.metric.name == config.metric
        assert question.text == row.get("question", row.get("label"))
        assert scored.score(right) == 1, (question, right)
        assert scored.score(wrong) == 0, (question, wrong)
        if "type" in config.fields:
            assert question.type in (row.get(config.fields["type"]), "task")


@pytest.mark.parametrize("name", ["vqa_v2", "ai2d", "mmmu", "pixmo_points", "count_bench"])
def test_the_model_is_asked(name, tmp_path, tiny_model):
    """The prompt of a benchmark's question, with its picture, through the whole way of an evaluation."""
    from pipelines.evaluation.prompts import Prompts

    config, rows = prepared(name, tmp_path)
    prompts = Prompts(tiny_model.config)
    (prompt,) = prompts(mapped(open_records(config.records), config.fields)[0])
    assert prompt.image_sizes == [SIZE] * (2 if name == "mmmu" else 1)
    ids = np.asarray(prompt.inputs["input_ids"])
    said = tiny_model.tokenizer.decode(ids[(ids >= 0)].tolist())
    asked = rows[0][0].get("question", rows[0][0].get("label"))
    assert asked.split()[0].lower() in said.lower()
    assert "True" not in said
    prompts.close()
