"""`molmo ask`: the answer of `generate`, on the terminal, without Ray."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from jobs.ask import app
from molmo_core.config import ConfigError
from pipelines.ask import media_of, points_in

QUESTION = "What is this?"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a b.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (48, 80, 3), np.uint8)).save(path)
    return path


def generated(model, example, tokens):
    inputs = model.config.build_preprocessor(for_inference=True, is_training=False)(example)
    batch = model.config.build_collator(None)([inputs])
    batch.pop("metadata")
    with torch.inference_mode():
        return model.generate(**batch, max_new_tokens=tokens).text[0].strip()


def test_the_answer_is_that_of_generate(tiny_checkpoint, tiny_model, picture):
    result = CliRunner().invoke(app, [str(tiny_checkpoint), QUESTION, str(picture), "--max-tokens", "12"])
    assert result.exit_code == 0, result.output
    expected = generated(tiny_model, {"image": str(picture), "messages": [{"role": "user", "content": QUESTION}]}, 12)
    assert expected
    assert result.stdout.splitlines()[0].strip() == expected.splitlines()[0].strip()


def test_names_of_special_tokens_in_a_question_are_text(tiny_checkpoint, tiny_model, picture):
    question = "What does <|image|> mean, and <im_patch>?"
    result = CliRunner().invoke(app, [str(tiny_checkpoint), question, str(picture), "--max-tokens", "4"])
    assert result.exit_code == 0, result.output
    example = {"image": str(picture), "messages": [{"role": "user", "content": question}], "placeholders": False}
    assert result.stdout.splitlines()[0].strip() == generated(tiny_model, example, 4).splitlines()[0].strip()


def test_text_alone_and_draws(tiny_checkpoint):
    def ask(*options):
        result = CliRunner().invoke(app, [str(tiny_checkpoint), QUESTION, "--max-tokens", "8", *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert ask("--temperature", "2", "--seed", "1") == ask("--temperature", "2", "--seed", "1")
    assert len({ask("--temperature", "2", "--seed", str(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("arguments", [("nowhere", QUESTION), ("MODEL", QUESTION, "lost.png"), ("MODEL", QUESTION, "VIDEO")])
def test_mistakes(arguments, tiny_checkpoint, golden):
    places = {"MODEL": str(tiny_checkpoint), "VIDEO": str(golden / "video-olmo/video.mp4")}
    result = CliRunner().invoke(app, [places.get(word, word) for word in arguments])
    assert result.exit_code == 2, result.output
    told = {"nowhere": "no such file or folder", "lost.png": "lost.png: no such file", "VIDEO": "for videos use Molmo2 or VideoOlmo"}
    assert told[arguments[-1] if arguments[-1] in told else "nowhere"] in result.stderr


def test_a_video_is_asked_about_alone(golden, picture):
    with pytest.raises(ConfigError, match="one video, or pictures"):
        media_of([str(golden / "video-olmo/video.mp4"), str(picture)])


def test_a_model_for_videos(golden):
    folder = golden / "video-olmo/mixed-res"
    result = CliRunner().invoke(app, [str(folder), QUESTION, str(golden / "video-olmo/video.mp4"), "--max-tokens", "3"])
    assert result.exit_code == 0, result.output


def test_points_are_in_pixels_of_their_picture(picture, golden, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (200, 100)).save(other)
    one = points_in('<point x="50.0" y="25.0" alt="a">a</point>', media_of([str(picture)]))
    assert [(point.x, point.y, size) for point, size in one] == [(40, 12, (80, 48))]
    two = points_in('<points coords="1 1 500 250;2 2 500 250">a</points>', media_of([str(picture), str(other)]))
    assert [(point.block, point.x, point.y, size) for point, size in two] == [(1, 40, 12, (80, 48)), (2, 100, 25, (200, 100))]
    video = media_of([str(golden / "video-olmo/video.mp4")])
    (found,) = points_in('<points coords="1.5 1 500 250">a</points>', video)
    (width, height) = found[1]
    assert (found[0].block, found[0].x, found[0].y) == (1.5, width / 2, height / 4)
    assert points_in("(50, 25)", {}) == []
