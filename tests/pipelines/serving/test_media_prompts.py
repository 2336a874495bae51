"""From a conversation with media to model inputs: the same as preprocessing it directly; what is wrong is said of the part it is in."""

import asyncio
import base64
import io

import numpy as np
import pytest
from PIL import Image

from molmo_core.registry import BaseModelConfig
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError
from pipelines.serving.media.features import media_features
from pipelines.serving.media.parts import Medium
from pipelines.serving.media.prompts import Prompts

TEXT = [{"role": "user", "content": "What is it?"}]


def file(seed=0, size=(64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def url(data: bytes, kind="image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes, where="messages[0].content[1]") -> Medium:
    return Medium("image", url(data), where)


@pytest.fixture
def prompts(golden_config):
    """`prompts(**settings)`: of the golden Molmo, and the tasks that its pool was given."""

    def build(model=golden_config, **settings):
        tasks = []

        async def run(task):
            tasks.append(task)
            return media_features(task)

        return Prompts(ServeConfig(**{"model": "m", **settings}), model, run), tasks

    return build


@pytest.fixture(scope="module")
def video_config(golden):
    return BaseModelConfig.load(golden / "video-olmo/per-frame/config.yaml")


def inputs(prompts, media, messages=TEXT):
    return asyncio.run(prompts.inputs(messages, media))


def refusal(prompts, media) -> ApiError:
    with pytest.raises(ApiError) as caught:
        inputs(prompts, media)
    return caught.value


def same(a, b):
    assert a.keys() == b.keys()
    for name in a.keys() - {"metadata"}:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype
    assert a["metadata"] == b["metadata"]


@pytest.mark.parametrize("count", [1, 3])
def test_images(prompts, golden_config, count):
    files = [file(seed, (64 + seed, 48)) for seed in range(count)]
    direct = golden_config.build_preprocessor(for_inference=True)({"messages": TEXT, "images": files, "placeholders": False})
    same(inputs(prompts()[0], [image(data) for data in files]), direct)


def test_text_needs_no_pool(prompts, golden_config):
    service, tasks = prompts()
    same(inputs(service, []), golden_config.build_preprocessor(for_inference=True)({"messages": TEXT, "placeholders": False}))
    assert tasks == []


def test_a_video(prompts, video_config, golden):
    data = (golden / "video-olmo" / "video.mp4").read_bytes()
    service, _ = prompts(video_config)
    result = inputs(service, [Medium("video", url(data, "video/mp4"), "messages[0].content[1]")])
    same(result, video_config.build_preprocessor(for_inference=True)({"messages": TEXT, "video": data, "placeholders": False}))
    assert result["metadata"]["video_size"] == (96, 64)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_video_seconds": 0.5}, "s long; this server takes 0.5 s"),
        ({"max_video_frames": 2}, "frames; this server takes 2"),
        ({"max_image_pixels": 100}, "more than the limit of 100"),
        ({"max_media_bytes": 1024}, "bytes; this server takes 1,024"),
    ],
)
def test_limits_of_a_video(prompts, video_config, golden, limits, words):
    data = (golden / "video-olmo" / "video.mp4").read_bytes()
    error = refusal(prompts(video_config, **limits)[0], [Medium("video", url(data, "video/mp4"), "here")])
    assert (error.status, error.param, error.code) == (400, "here", "invalid_video")
    assert words in error.message


@pytest.mark.parametrize("data", [b"", b"hello", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"RIFF\xff\xff\xff\x00AVI ", file()])
def test_not_a_video(prompts, video_config, data):
    assert refusal(prompts(video_config)[0], [Medium("video", url(data, "video/mp4"), "here")]).code == "invalid_video"


def test_the_same_picture_is_prepared_once(prompts):
    service, tasks = prompts()
    first, second = (inputs(service, [image(file())]) for _ in range(2))
    same(first, second)
    assert len(tasks) == 1
    assert service.cache.hits == 1
    inputs(service, [image(file(1))])
    assert len(tasks) == 2
    small, tasks = prompts(media_cache_bytes=0)
    for _ in range(2):
        inputs(small, [image(file())])
    assert len(tasks) == 2
    assert small.cache.bytes == 0


def test_the_cache_is_bounded(prompts):
    service, tasks = prompts()
    inputs(service, [image(file())])
    size = service.cache.bytes
    service, tasks = prompts(media_cache_bytes=2 * size)
    for seed in (0, 1, 0, 2, 0, 1):  # 1 is the one not used for longest when 2 comes
        inputs(service, [image(file(seed))])
    assert len(tasks) == 4
    assert service.cache.bytes == 2 * size


@pytest.mark.parametrize("address", ["http://169.254.169.254/latest", "https://example.com/a.png", "HTTP://localhost/", "https:x"])
def test_no_address_is_fetched(prompts, address):
    error = refusal(prompts()[0], [Medium("image", address, "here")])
    assert (error.status, error.code, error.param) == (400, "url_not_supported", "here")
    assert "fetches no addresses" in error.message


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "/etc/passwd", "", "data:image/png,abc", "data:text/html;base64,PGI+", "ftp://a/b"]
)
def test_other_urls(prompts, address):
    error = refusal(prompts()[0], [Medium("image", address, "here")])
    assert (error.status, error.code) == (400, "invalid_image_url")


def test_parameters_in_a_data_url(prompts):
    medium = Medium("image", url(file(), "image/png;charset=utf-8"), "here")
    assert inputs(prompts()[0], [medium])["metadata"]["image_sizes"] == [(64, 48)]


def test_the_part_at_fault_is_named(prompts):
    service, _ = prompts()
    error = refusal(service, [image(file()), image(b"hello", "messages[2].content[0]"), image(file(1))])
    assert (error.status, error.param) == (400, "messages[2].content[0]")
    assert error.message.startswith("messages[2].content[0]: image of 5 bytes: not an image")


def test_what_a_model_is_not_shown(prompts, video_config, golden_config):
    video = Medium("video", url(b"x", "video/mp4"), "here")
    assert refusal(prompts()[0], [video]).code == "videos_not_supported"
    assert refusal(prompts(video_config)[0], [image(file(), "here")]).code == "images_not_supported"
    assert "at most 2" in refusal(prompts(max_images=2)[0], [image(file())] * 3).message
    assert refusal(prompts(video_config)[0], [video, image(file())]).param == "here"
    assert refusal(prompts(video_config)[0], [video, Medium("video", url(b"x"), "second")]).param == "second"
    wrong = refusal(prompts()[0], [Medium("image", url(b"x", "video/mp4"), "here")])
    assert wrong.message == "here: the media type 'video/mp4' is not that of an image."
