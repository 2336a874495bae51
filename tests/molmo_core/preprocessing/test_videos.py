"""Videos: readers against clips whose frames carry their number, clips, limits, damage, and the golden VideoOlmo batches."""

import gc
import importlib.util
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from safetensors.numpy import load_file

from molmo_core.preprocessing.configs import Molmo2PreprocessorConfig, VideoPreprocessorConfig
from molmo_core.preprocessing.images import ImageSettings
from molmo_core.preprocessing.media import MediaError
from molmo_core.preprocessing.video_readers import DecordReader, EitherReader, PyAVReader, VideoReader, open_video
from molmo_core.preprocessing.videos import FrameSettings, frame_pooling, load_frames, preprocess_video, sample_video

BACKENDS = ["decord", "pyav"]
SIGLIP = ImageSettings(crop_size=(56, 56), resize_mode="siglip", crop_mode="resize")


def numbered(number: int) -> np.ndarray:
    """A frame that shows its number as eight black or white bars, over a red left edge."""
    frame = np.zeros((48, 144, 3), np.uint8)
    for bit in range(8):
        frame[:, 16 + 16 * bit : 32 + 16 * bit] = 255 * (number >> bit & 1)
    frame[:, :16] = [255, 0, 0]
    return frame


def number_of(frame: np.ndarray) -> int:
    assert frame[24, 8, 0] > 150  # upright: the red edge is on the left
    assert frame[24, 8, 1] < 100
    return sum(int(frame[24, 24 + 16 * bit].mean() > 127) << bit for bit in range(8))


def clip(
    path: Path,
    frames: int = 40,
    codec: str = "libx264",
    fps: int = 10,
    pts: list[int] | None = None,
    container: str | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encodes numbered frames; `pts` in ticks of 1/(10·fps) s."""
    with av.open(path, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=fps, options={"crf": "18", "g": "12", "bf": "2"} if options is None else options)
        stream.width, stream.height, stream.pix_fmt = 144, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10 * fps)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            frame.pts, frame.time_base = (pts[i] if pts else 10 * i), Fraction(1, 10 * fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def assert_frames(reader: VideoReader, times: np.ndarray) -> None:
    np.testing.assert_allclose(reader.timestamps, times, atol=1e-3)
    everything = list(range(len(times)))
    assert [number_of(f) for f in reader.get_batch(everything)] == everything
    for some in ([7], [3, 4, 30, 31], [0, 39], [39], [1]):  # forwards and backwards
        batch = reader.get_batch(some)
        assert batch.dtype == np.uint8
        assert batch.flags.writeable
        assert [number_of(f) for f in batch] == some


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("b_frames.mp4", {}),
        ("one_group.mp4", {"options": {"g": "250", "bf": "3"}}),
        ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("matroska.mkv", {}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"crf": "20", "b:v": "0", "cpu-used": "8"}}),
        ("mjpeg.avi", {"codec": "mjpeg", "options": {"qmin": "2", "qmax": "2"}}),
        ("flash.flv", {"options": {"bf": "0"}}),
        ("hevc.mp4", {"codec": "libx265", "options": {"crf": "18", "x265-params": "log-level=none"}}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_containers(tmp_path: Path, backend: str, name: str, arguments: dict) -> None:
    path = clip(tmp_path / name, **arguments)
    for source in (path, path.read_bytes()):
        reader = open_video(source, backend)
        assert_frames(reader, np.arange(40) / 10)
        assert reader.fps == pytest.approx(10, rel=0.05)
        reader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_variable_frame_rate(tmp_path: Path, backend: str) -> None:
    pts = np.cumsum([0] + [5, 20, 7, 33] * 9 + [10, 10, 10]).tolist()
    reader = open_video(clip(tmp_path / "vfr.mp4", pts=pts), backend)
    assert_frames(reader, np.array(pts) / 100)


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_rotation(tmp_path: Path, quarter: int) -> None:
    """Phones store the picture as the sensor sees it, and a matrix in the header."""
    data = bytearray(clip(tmp_path / "upright.mp4", frames=12).read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version, flags, times, ids, layer, volume; then nine 4-byte numbers
    turn = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}[quarter]
    for place, value in zip((0, 1, 3, 4), turn):
        data[at + 4 * place : at + 4 * place + 4] = (value * 65536).to_bytes(4, signed=True)
    upright = open_video((tmp_path / "upright.mp4").read_bytes(), "pyav").get_batch([5])[0]
    reader = open_video(bytes(data))
    turned = reader.get_batch([5])[0]
    assert np.abs(np.rot90(turned, quarter).astype(int) - upright).max() < 40
    assert isinstance(reader, EitherReader if quarter == 2 else PyAVReader)
    if quarter != 2:
        with pytest.raises(MediaError, match="rotated"):
            open_video(bytes(data), "decord")


def test_what_decord_gets_wrong_goes_to_pyav(tmp_path: Path) -> None:
    stream = clip(tmp_path / "transport.ts", container="mpegts")
    with pytest.raises(MediaError, match="pyav"):
        open_video(stream, "decord")
    reader = open_video(stream)
    assert isinstance(reader, PyAVReader)
    assert_frames(reader, np.arange(40) / 10)
    plain = open_video(clip(tmp_path / "plain.mp4"))
    assert isinstance(plain, EitherReader)
    assert_frames(plain, np.arange(40) / 10)
    assert isinstance(plain.reader, DecordReader), "nothing is decoded twice"


@pytest.mark.parametrize("width", [2, 4, 8, 10, 16, 24, 40, 46, 48, 64, 66, 72, 80, 96, 144, 146])
def test_frames_of_any_size(tmp_path: Path, width: int) -> None:
    """decord opens clips that are 16, 24, 48 or 72 pixels wide and then cannot copy their frames."""
    for height in (2, 40, 72, 130):
        path = tmp_path / f"{height}.mp4"
        pattern = np.full((height, width, 3), 90, np.uint8)
        pattern[: height // 2, : width // 2] = [200, 40, 40]
        with av.open(path, "w") as output:
            stream = output.add_stream("libx264", rate=10, options={"crf": "4"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for shade in range(3):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pattern + np.uint8(20 * shade), format="rgb24")))
            output.mux(stream.encode())
        right = open_video(path, "pyav").get_batch([0, 1, 2])
        reader = open_video(path)
        frames = np.concatenate([reader.get_batch([0]), reader.get_batch([1, 2])])
        assert frames.shape == (3, height, width, 3)
        assert np.abs(frames.astype(int) - right).max() <= 8
        np.testing.assert_allclose(reader.timestamps, [0, 0.1, 0.2], atol=1e-3)
        features = preprocess_video(path.read_bytes(), SIGLIP, FrameSettings("uniform", 3))
        assert len(features.images) == 3


def test_what_neither_reader_decodes_is_explained_by_both(tmp_path: Path) -> None:
    data = bytearray(clip(tmp_path / "whole.mp4", frames=30).read_bytes())
    start = data.index(b"mdat") + 4
    stop = data.index(b"moov") - 4
    data[start:stop] = np.random.default_rng(0).bytes(stop - start)
    with pytest.raises(MediaError) as failure:
        load_frames(bytes(data), FrameSettings("uniform", 4))
    message = str(failure.value)
    assert message.count(f"video of {len(data):,} bytes") == 1
    assert message.index("decord cannot") < message.index("; ") < message.index("PyAV")
    assert "frames [" not in message


def test_a_reader_that_fails_in_the_middle_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_video(clip(tmp_path / "plain.mp4"))
    assert number_of(reader.get_batch([3])[0]) == 3

    def fail(self: DecordReader, indices: list[int]) -> np.ndarray:
        raise MediaError("plain.mp4: decord cannot decode it")

    monkeypatch.setattr(DecordReader, "get_batch", fail)
    assert [number_of(f) for f in reader.get_batch([7, 30])] == [7, 30]
    assert_frames(reader, np.arange(40) / 10)
    reader.close()


def test_frames_before_the_start_are_refused_by_decord(tmp_path: Path) -> None:
    """Cutting without re-encoding leaves an edit list, which decord ignores."""
    source = clip(tmp_path / "whole.mp4", frames=60, options={"g": "24", "bf": "0", "crf": "18"})
    cut = tmp_path / "cut.mp4"
    with av.open(source) as infile, av.open(cut, "w") as output:
        stream = output.add_stream_from_template(infile.streams.video[0])
        offset = None
        for packet in infile.demux(video=0):
            if packet.dts is None or packet.pts < 24 * packet.time_base.denominator / 10:
                continue
            offset = packet.pts + packet.time_base.denominator if offset is None else offset  # starts one second before 0
            packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
            packet.stream = stream
            output.mux(packet)
    reader = open_video(cut)
    numbers = [number_of(f) for f in reader.get_batch(range(len(reader.timestamps)))]
    assert numbers == list(range(numbers[0], 60))
    assert reader.timestamps[0] == 0


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_not_a_video(tmp_path: Path, backend: str) -> None:
    whole = clip(tmp_path / "whole.mp4", frames=30).read_bytes()
    faststart = clip(tmp_path / "fast.mp4", frames=30, container_options={"movflags": "faststart"}).read_bytes()
    matroska = clip(tmp_path / "whole.mkv", frames=30).read_bytes()
    avi = clip(tmp_path / "whole.avi", frames=30, codec="mjpeg", options={}).read_bytes()
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    for data, message in [
        (b"", "empty"),
        (b"<html>not found</html>" * 30, "not a video"),
        (whole[: len(whole) // 2], "truncated|not a video"),
        (faststart[: len(faststart) * 3 // 4], "truncated"),
        (matroska[: len(matroska) * 3 // 4], "truncated"),
        (avi[: len(avi) * 3 // 4], "truncated"),
        (sound.getvalue(), "no video"),
    ]:
        with pytest.raises(MediaError, match=message):
            open_video(data, backend)
    with pytest.raises(MediaError, match="no such file"):
        open_video(tmp_path / "missing.mp4", backend)
    with pytest.raises(MediaError, match="folder"):
        open_video(tmp_path, backend)


def test_damaged_files_give_frames_or_a_media_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    originals = [clip(tmp_path / name, frames=20).read_bytes() for name in ("a.mp4", "a.mkv")]
    outcomes = []
    for n in range(30):
        data = bytearray(originals[n % 2])
        for at in rng.integers(0, len(data), 1 + n % 5):
            data[at] = rng.integers(256)
        for backend in BACKENDS:
            try:
                frames = load_frames(bytes(data), FrameSettings("uniform", 4, backend=backend, max_pixels=1_000_000))
                outcomes.append(frames.pixels.shape[0] == 4)
            except MediaError:
                outcomes.append(None)
    assert False not in outcomes
    assert True in outcomes


def test_pixel_limit(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", frames=5)
    assert len(open_video(path, max_pixels=144 * 48).timestamps) == 5
    with pytest.raises(MediaError, match="144 x 48 pixels"):
        open_video(path, max_pixels=144 * 48 - 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clips(tmp_path: Path, backend: str) -> None:
    path = clip(tmp_path / "a.mp4")  # 40 frames, 4 s

    def frames(start: float | None, end: float | None, mode: str = "uniform_last_frame", most: int = 50) -> list[int]:
        settings = FrameSettings(mode, most, max_fps=10, backend=backend)
        sample = sample_video(path, settings, start, end)
        loaded = load_frames(path, settings, start, end)
        assert [number_of(f) for f in loaded.pixels] == sample.indices.tolist()
        np.testing.assert_array_equal(loaded.times, sample.times)
        np.testing.assert_allclose(sample.times, np.maximum(sample.indices / 10 - (start or 0), 0), atol=1e-3)
        return sample.indices.tolist()

    assert frames(None, None) == list(range(40))
    assert frames(1.0, 2.0) == list(range(10, 20))
    assert frames(1.05, 1.25) == [10, 11, 12]  # frame 10 is still shown at 1.05 s
    assert frames(1.02, 1.04) == [10]
    assert frames(3.5, 99) == list(range(35, 40))
    assert frames(2.0, None, "uniform", 4) == [20, 25, 30, 35]
    assert frames(0.0, 1.0, "fps", 5) == [0, 2, 4, 6, 8]
    for start, end in [(5.0, 6.0), (2.0, 2.0), (-1.0, 2.0), (3.0, 1.0)]:
        with pytest.raises(MediaError, match=r"of a video of 4\.000 s"):
            sample_video(path, FrameSettings(backend=backend), start, end)


def test_repeated_frames(tmp_path: Path) -> None:
    loaded = load_frames(clip(tmp_path / "a.mp4", frames=3), FrameSettings("uniform", 7))
    assert [number_of(f) for f in loaded.pixels] == [0, 0, 0, 1, 1, 2, 2]


def test_adaptive_watches_the_action(tmp_path: Path) -> None:
    """150 frames of which only number 100 to 129 differ from one another."""
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264", rate=10, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 144, 48, "yuv420p"
        for i in range(150):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(min(max(i, 100), 129)), format="rgb24")))
        output.mux(stream.encode())
    indices = sample_video(path, FrameSettings("adaptive", 16)).indices
    assert len(indices) == 16
    assert (np.diff(indices) > 0).all()
    assert indices[0] == 0
    assert ((indices >= 96) & (indices < 132)).sum() >= 8  # a fifth of the video, half of the frames
    assert (indices < 96).sum() >= 4


def test_random_frames(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    settings = FrameSettings("random", 6)
    one, same, other = (sample_video(path, settings, rng=np.random.RandomState(s)).indices.tolist() for s in (1, 1, 2))
    assert one == same == sorted(set(one))
    assert one != other
    assert sample_video(path, settings).indices.tolist() == sample_video(path, FrameSettings("uniform", 6)).indices.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_readers_are_freed_at_once(tmp_path: Path, backend: str) -> None:
    """A reader in a reference cycle would keep its decoder's memory until the garbage collector comes by."""
    path = clip(tmp_path / "a.mp4")
    gc.collect()
    gc.disable()
    try:
        for mode in ("uniform", "adaptive"):
            preprocess_video(path, SIGLIP, FrameSettings(mode, 4, backend=backend))
        assert not [o for o in gc.get_objects() if isinstance(o, DecordReader | PyAVReader)]
    finally:
        gc.enable()


@pytest.mark.parametrize("case", ["per-frame", "mixed-res"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_batches(golden: Path, case: str, backend: str) -> None:
    expected = load_file(golden / "video-olmo" / case / "batch.safetensors")
    features = preprocess_video(golden / "video-olmo" / "video.mp4", SIGLIP, FrameSettings("fps", 6, backend=backend))
    reference = expected["images"][0] * 0.5 + 0.5
    assert np.abs(features.images / 255 - reference).max() <= 1 / 255 + 1e-6
    assert features.times.tolist() == [0, 1, 2, 3, 4]
    assert features.sampling_fps == 1
    assert features.image_masks is None
    low = [1, 3] if case == "mixed-res" else range(5)
    np.testing.assert_array_equal(frame_pooling(low, SIGLIP), expected["low_res_pooled_idx"][0])
    if case == "mixed-res":
        np.testing.assert_array_equal(frame_pooling([0, 2, 4], SIGLIP, (1, 1)), expected["high_res_pooled_idx"][0])


def test_molmo2_frames(golden: Path) -> None:
    settings = ImageSettings(crop_size=(378, 378), resize_mode="siglip")
    sampling = FrameSettings.from_config(Molmo2PreprocessorConfig())
    assert sampling == FrameSettings("uniform_last_frame", 128, 2.0)
    features = preprocess_video(golden / "video-olmo" / "video.mp4", settings, sampling)
    assert features.images.shape == (11, 729, 588)  # every half second of 4.875 s, and the last frame
    np.testing.assert_allclose(features.times, [*np.arange(10) / 2, 4.875], atol=1e-6)
    pooled = frame_pooling(range(11), settings, (3, 3))
    assert pooled.shape == (11 * 81, 9)
    assert np.unique(pooled).tolist() == list(range(11 * 729))
    assert frame_pooling([], settings, (3, 3)).shape == (0, 9)


def test_padding_encoders_get_masks(golden: Path) -> None:
    sampling = FrameSettings.from_config(VideoPreprocessorConfig(), max_frames=2)
    features = preprocess_video(golden / "video-olmo" / "video.mp4", ImageSettings(), sampling)
    assert features.image_masks is not None
    assert features.image_masks.shape == features.images.shape[:2] == (2, 576)
    assert 0 < features.image_masks.mean() < 1


ISCC = importlib.util.find_spec("iscc_samples")


@pytest.mark.slow
@pytest.mark.skipif(ISCC is None, reason="needs the iscc-samples package (54 MB, pip install iscc-samples==0.6.0)")
def test_one_clip_in_twenty_containers() -> None:
    """Both readers give the frames that decoding from the start gives, at the same times; or they refuse the file."""
    assert ISCC is not None
    assert ISCC.origin is not None
    opened = set()
    for path in sorted((Path(ISCC.origin).parent / "files" / "video").iterdir()):
        expected, times = [], []
        for backend in ["pyav", "decord", "auto"]:
            try:
                reader = open_video(path, backend)
                numbers = np.unique(np.linspace(0, len(reader.timestamps) - 1, 6).astype(int))
                frames = reader.get_batch(numbers.tolist())
            except MediaError as error:
                assert path.name in str(error)  # noqa: PT017
                continue
            if not expected:
                with av.open(path) as container:
                    stream = container.streams.video[0]
                    stream.codec_context.thread_count = 1
                    packets = (p for p in container.demux(stream) if p.size > 0 or p.pts is None)
                    for number, frame in enumerate(f for p in packets for f in p.decode()):
                        times.append(frame.time)
                        if number in numbers:
                            expected.append(frame.to_ndarray(format="rgb24"))
            assert len(times) == len(reader.timestamps), (path.name, backend)
            np.testing.assert_allclose(reader.timestamps, np.array(times) - times[0], atol=1e-3, err_msg=path.name)
            assert np.abs(frames.astype(int) - np.stack(expected)).max() <= 2, (path.name, backend)
            opened.add((path.suffix, backend))
            reader.close()
    assert {(s, b) for s in (".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv", ".3gp") for b in ("decord", "pyav", "auto")} <= opened
    assert {(s, b) for s in (".mpg", ".vob", ".wmv", ".asf", ".gif", ".m1v", ".swf") for b in ("pyav", "auto")} <= opened


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile 'video.mp4'\n", "#EXTM3U\n#EXTINF:10,\nvideo.mp4\n#EXT-X-ENDLIST\n"])
@pytest.mark.parametrize("backend", ["auto", "decord", "pyav"])
def test_playlists_read_no_other_file(golden, monkeypatch, text, backend):
    """libavformat would follow them to any file and address."""
    monkeypatch.chdir(golden / "video-olmo")
    with pytest.raises(MediaError, match="not a video"):
        open_video(text.encode(), backend)
