"""The page in headless Chromium, before real frontends and a real model that has learned its answers."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess

import pytest
from PIL import Image, ImageOps

from pipelines import cluster
from pipelines.serving.app import serving
from pipelines.serving.config import Example, ServeConfig
from tests.pipelines.serving.taught import PICTURES, POINTED, STORY, picture, taught_model

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
playwright.expect.set_options(timeout=30_000)
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.skipif(BROWSER is None, reason="no Chromium")]
NAME = "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText.split('\\n')[0]"
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const parts = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const ground = (node) => {
    const colour = parts(getComputedStyle(node).backgroundColor);
    return colour[3] > 250 ? colour : ground(node.parentElement);
  };
  const linear = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const read = "summary, .asked p, .text, .foot small, .foot button, .points b, .points small, .error, .keys";
  return [...document.querySelectorAll(read)].map((node) => {
    const [a, b] = [luminance(parts(getComputedStyle(node).color)), luminance(ground(node))];
    return [node.className || node.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
}"""
"""What is read, and by how much it differs from its ground (WCAG's measure)."""
KEY = "sesame-" * 5
DESK, PHONE = {"width": 1180, "height": 820}, {"width": 320, "height": 640}


@pytest.fixture(scope="module")
def url(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    taught_model(golden).save_checkpoint(folder / "model")
    (folder / "dogs.png").write_bytes(PICTURES["wide.png"])
    (folder / "keys").touch(0o600)
    (folder / "keys").write_text(KEY)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    examples = [Example(POINTED, str(folder / "dogs.png")), Example("Hello!")]
    limits = {"max_new_tokens": 64, "max_body_bytes": 1 << 20}
    where = {"model": str(folder / "model"), "name": "taught", "port": port, "api_keys_file": str(folder / "keys")}
    config = ServeConfig(**where, **limits, examples=examples)
    with cluster.connect(num_cpus=2, object_store_memory=256 << 20), serving(config) as address:
        yield address


@pytest.fixture(scope="module")
def browser(url):
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page in a fresh window; at the end nothing has gone wrong in it, what its rules forbid included."""
    contexts, wrong = [], []

    def note(message):
        if message.type == "error" and "Failed to load resource" not in message.text:  # such as a status of 400
            wrong.append(message.text)

    def opened(key=KEY, **settings):
        context = browser.new_context(**{"viewport": DESK, "reduced_motion": "reduce", **settings})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        if key:
            context.add_init_script(f"sessionStorage.setItem('api-key', '{key}')")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{url}/")
        page.locator("#examples button").first.wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(visit):
    return visit()


def attach(page, *files: tuple[str, bytes]) -> None:
    kinds = {"png": "image/png", "jpg": "image/jpeg", "mp4": "video/mp4"}
    page.set_input_files("#files", [{"name": n, "mimeType": kinds[n.rpartition(".")[2]], "buffer": data} for n, data in files])
    playwright.expect(page.locator("#attached li")).to_have_count(len(files))


def send(page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")


def ask(page, question: str, *files: tuple[str, bytes]):
    """Asks, waits for the end of the answer, and returns its element."""
    attach(page, *files)
    before = page.locator(".turn").count()
    send(page, question)
    playwright.expect(page.locator(".turn")).to_have_count(before + 1)
    playwright.expect(page.locator(".turn .asked").last).to_contain_text(question)
    playwright.expect(page.locator(".turn").last).not_to_have_class(re.compile("working"))
    return page.locator(".turn .answer").last


def text_of(answer) -> str:
    return answer.locator(".text").inner_text()


def marked_at(figure, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Where the markers that are seen are on the picture, in its pixels."""
    view = figure.locator("img, video")
    box = view.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(size[0] / size[1], rel=0.01), "the picture keeps its shape"
    centres = []
    for marker in figure.locator(".marker:visible").all():
        at = marker.bounding_box()
        x, y = at["x"] + at["width"] / 2 - box["x"], at["y"] + at["height"] / 2 - box["y"]
        centres.append((x * size[0] / box["width"], y * size[1] / box["height"]))
    return centres


def test_a_picture_is_asked_about(page):
    answer = ask(page, POINTED, ("wide.png", PICTURES["wide.png"]))
    assert text_of(answer) == '<points coords="1 1 250 750">dogs</points>'
    assert re.search(r"\d+ tokens in \d+\.\d s", answer.inner_text())
    assert page.locator(".asked img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [300, 120], "it is sent as it is"
    assert page.get_by_label("Question").input_value() == ""
    assert page.locator("#attached li").count() == 0
    assert "Answer: " in page.get_by_role("status").inner_text(), "readers of the screen are told"


def test_a_point_is_at_its_pixel(page):
    answer = ask(page, POINTED, ("wide.png", PICTURES["wide.png"]))
    ((x, y),) = marked_at(answer.locator("figure"), (300, 120))
    assert (x, y) == (pytest.approx(75, abs=0.7), pytest.approx(90, abs=0.7))
    assert answer.locator(".points button").all_inner_texts() == ["1\ndogs\n75, 90"]
    small = answer.locator("figure img").bounding_box()["width"]
    answer.get_by_role("button", name="Enlarge wide.png").click()
    assert answer.locator("figure img").bounding_box()["width"] > small
    assert marked_at(answer.locator("figure"), (300, 120)) == [(pytest.approx(75, abs=0.7), pytest.approx(90, abs=0.7))]
    page.keyboard.press("Escape")
    assert answer.locator("figure img").bounding_box()["width"] == small


def test_points_of_a_picture_that_is_stored_sideways(page):
    """The camera's way: what is seen, and so what is pointed at, is the upright picture."""
    upright = Image.open(io.BytesIO(PICTURES["wide.png"]))
    stored = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right for showing
    upright.transpose(Image.Transpose.ROTATE_90).save(stored, "jpeg", quality=95, exif=exif)
    assert ImageOps.exif_transpose(Image.open(stored)).size == (300, 120)
    answer = ask(page, POINTED, ("wide.jpg", stored.getvalue()))
    ((x, y),) = marked_at(answer.locator("figure"), (300, 120))
    assert (x, y) == (pytest.approx(75, abs=0.7), pytest.approx(90, abs=0.7))


def test_points_on_two_pictures(page):
    answer = ask(page, "Point to the cups.", *PICTURES.items())
    wide, tall = answer.locator("figure").all()
    assert marked_at(wide, (300, 120)) == [(pytest.approx(30, abs=0.7), pytest.approx(24, abs=0.7))]
    assert marked_at(tall, (90, 240)) == [(pytest.approx(72, abs=0.7), pytest.approx(144, abs=0.7))]


def test_points_in_a_video_at_their_times(page, golden):
    answer = ask(page, "Where is the ball?", ("ball.mp4", (golden / "video-olmo/video.mp4").read_bytes()))
    figure = answer.locator("figure")
    for number, time, at in ((None, 1.0, (28.8, 25.6)), (1, 3.0, (67.2, 38.4)), (0, 1.0, (28.8, 25.6))):
        if number is not None:
            figure.locator(".points button").nth(number).click()
        playwright.expect(figure.locator("video")).to_have_js_property("currentTime", time)
        playwright.expect(figure.locator(".marker:visible")).to_have_count(1)
        assert marked_at(figure, (96, 64)) == [(pytest.approx(at[0], abs=0.5), pytest.approx(at[1], abs=0.5))]
    figure.get_by_label("Time in the video").fill("2")
    playwright.expect(figure.locator("video")).to_have_js_property("currentTime", 2)
    playwright.expect(figure.locator(".marker:visible")).to_have_count(0)
    figure.get_by_role("button", name="Play").click()
    playwright.expect(figure.locator(".marker:visible")).to_have_count(1)  # it passes the second point
    figure.get_by_role("button", name="Pause").click()


def test_a_conversation_goes_on(page):
    """The second question makes sense with the first one only."""
    ask(page, POINTED, ("wide.png", PICTURES["wide.png"]))
    assert text_of(ask(page, "And their color?")) == "brown"
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    assert page.locator("#examples").is_visible()


def test_without_earlier_turns_the_last_picture_is_sent_again(page):
    page.locator("summary", has_text="Settings").click()
    page.get_by_label("Send earlier turns along").uncheck()
    page.keyboard.press("Escape")
    ask(page, POINTED, ("wide.png", PICTURES["wide.png"]))
    with page.expect_request("**/chat/completions") as sent:
        answer = ask(page, POINTED)
    (message,) = sent.value.post_data_json["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert answer.locator("figure .marker").count() == 1


def test_an_example_is_clicked(page):
    page.get_by_role("button", name=POINTED).click()
    playwright.expect(page.locator(".turn .foot button").first).to_be_visible()
    assert text_of(page.locator(".answer")) == '<points coords="1 1 250 750">dogs</points>'


def test_what_is_sent_is_what_was_chosen(page):
    """By drop, paste and choice: the very bytes, and the settings."""
    give = """([event, data]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], `${event}.png`, {type: "image/png"}));
        const given = event === "drop" ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
                                       : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true});
        document.querySelector("#question").dispatchEvent(given);
    }"""
    files = {"drop": PICTURES["wide.png"], "paste": PICTURES["tall.png"]}
    for number, (event, data) in enumerate(files.items(), 1):
        page.evaluate(give, [event, base64.b64encode(data).decode()])
        playwright.expect(page.locator("#attached li")).to_have_count(number)
    assert page.locator("#attached .name").all_inner_texts() == ["drop.png", "paste.png"]
    page.locator("summary", has_text="Settings").click()
    for name, value in {"Longest answer": "5", "Temperature": "0.5", "Top p": "0.9", "Seed": "7"}.items():
        page.get_by_label(name).fill(value)
    assert page.locator("#settings-summary").inner_text() == "temperature 0.5 · top p 0.9 · seed 7 · 5 tokens"
    with page.expect_request("**/chat/completions") as sent:
        send(page, "Point to the cups.")
    body = sent.value.post_data_json
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"][:2]]
    assert [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls] == list(files.values())
    settings = {name: body[name] for name in ("model", "max_tokens", "temperature", "top_p", "seed")}
    assert settings == {"model": "taught", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    playwright.expect(page.locator(".foot")).to_contain_text("cut at the longest answer")


def test_a_broken_file(page):
    answer = ask(page, POINTED, ("wide.png", PICTURES["wide.png"]), ("broken.png", b"\x89PNG that is none"))
    error = answer.get_by_role("alert").inner_text()
    assert error.startswith("broken.png: ")
    assert "messages[" not in error
    answer.get_by_role("button", name="Edit").click()
    assert page.locator(".turn").count() == 0
    assert page.get_by_label("Question").input_value() == POINTED
    page.get_by_role("button", name="Remove broken.png").click()
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".marker")).to_have_count(1)


def test_files_that_are_not_sent(page):
    page.set_input_files("#files", [{"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}])
    playwright.expect(page.locator("#composer-problem")).to_have_text("notes.txt is neither a picture nor a video.")
    attach(page, ("large.png", picture(700, 700)))
    send(page, POINTED)
    playwright.expect(page.locator("#composer-problem")).to_contain_text("the server takes 1.0 MB")
    assert page.get_by_label("Question").input_value() == POINTED, "nothing of it is lost"


def test_a_server_that_is_gone(page):
    page.context.set_offline(True)
    answer = ask(page, "Hello!")
    assert "cannot be reached" in answer.get_by_role("alert").inner_text()
    page.context.set_offline(False)
    answer.get_by_role("button", name="Try again").click()
    playwright.expect(page.locator(".answer .text")).to_have_text("Hi.")
    assert page.locator(".turn").count() == 1


def endless(page) -> None:
    """Has an answer begun that would go on for minutes."""
    page.locator("summary", has_text="Settings").click()
    page.get_by_label("Longest answer").fill("15000")
    page.keyboard.press("Enter")
    send(page, "Tell me a story.")
    longer_than(page, 200)


def longer_than(page, length: int) -> None:
    """Waits until so much of the answer is there."""
    playwright.expect(page.locator(".turn .text")).to_have_text(re.compile(f".{{{length}}}."))


def test_stop(page):
    endless(page)
    early = page.locator(".text").inner_text()
    longer_than(page, len(early))  # it streams
    page.get_by_role("button", name="Stop").click()
    playwright.expect(page.locator(".foot")).to_contain_text("Stopped")
    text = page.locator(".text").text_content()
    assert len(text) > len(early)
    assert (STORY * 20).startswith(text[:200])
    assert page.get_by_role("button", name="Send").is_visible()
    page.get_by_role("button", name="New conversation").click()
    assert text_of(ask(page, "Hello!")) == "Hi."


def test_keyboard_only(page):
    """The question has the focus from the start; Tab passes everything in the order in which it is seen."""
    assert page.evaluate("document.activeElement.id") == "question"
    endless(page)
    page.keyboard.press("Escape")
    playwright.expect(page.locator(".foot")).to_contain_text("Stopped")
    passed = []
    for key in ["Shift+Tab"] * 6 + ["Tab"] * 7:
        page.keyboard.press(key)
        passed.append(page.evaluate(NAME))
    assert passed[4].startswith("Settings")
    before = ["taught", passed[4], "New conversation", "Try again", "Copy as curl", "Choose pictures or a video"]
    assert passed == [*reversed(before), *before[1:], "Question", "Send"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("Hello!")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("?")
    assert page.get_by_label("Question").input_value() == "Hello!\n?"


def test_copied_as_curl(page, tmp_path):
    """The command, run by a shell, gets the same answer; a large file is read where the command runs."""
    large, environment = picture(400, 300, 5), {**os.environ, "API_KEY": KEY}
    for name, data in {"small.png": PICTURES["tall.png"], "it's large.png": large}.items():
        (tmp_path / name).write_bytes(data)
        answer = ask(page, f"{POINTED} $HOME `date` \\ \"'", (name, data))
        answer.get_by_role("button", name="Copy as curl").click()
        playwright.expect(answer).to_contain_text("Copied")
        command = page.evaluate("navigator.clipboard.readText()")
        assert len(command) < 100_000
        assert KEY not in command
        done = subprocess.run(["bash", "-c", command], capture_output=True, check=True, cwd=tmp_path, env=environment, timeout=120)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] == answer.locator(".text").text_content()
        page.get_by_role("button", name="New conversation").click()
    assert "base64 < 'it'\\''s large.png'" in command


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_is_wider_than_the_window(visit, viewport, golden):
    page = visit(viewport=viewport, has_touch=viewport is PHONE)
    wide = "document.scrollingElement.scrollWidth <= innerWidth"
    assert page.evaluate(wide)
    ask(page, "Point to the cups.", (f"{'long name ' * 9}.png", PICTURES["wide.png"]), ("tall.png", PICTURES["tall.png"]))
    ask(page, "Where?" * 40, ("broken.png", b"broken"))
    attach(page, (f"{'longname' * 20}.mp4", (golden / "video-olmo/video.mp4").read_bytes()))
    page.locator("summary", has_text="Settings").click()
    assert page.evaluate(wide)
    for part in page.locator("button:visible, input:visible, figure:visible, form:visible, .asked").all():
        box = part.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= viewport["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(visit, scheme):
    """Text and its ground differ by the 4.5 that the WCAG ask for."""
    page = visit(color_scheme=scheme)
    ask(page, POINTED, ("wide.png", PICTURES["wide.png"]))
    ask(page, "Hello!", ("broken.png", b"broken"))
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 12
    assert [found for found in contrasts if found[1] < 4.5] == []
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert brightness > 200 if scheme == "light" else brightness < 60


def test_a_key_is_asked_for(visit):
    """The page itself is open; what it asks the server for is not. The key is kept for the window, and what failed is done again."""
    page = visit(key=None)
    key, problem = page.get_by_label("This server asks for an API key."), page.locator("#key-problem")
    playwright.expect(key).to_be_focused()
    assert problem.inner_text() == ""
    for given, result in (("wrong", re.compile("key")), (KEY, "")):
        key.fill(given)
        page.keyboard.press("Enter")
        playwright.expect(problem).to_have_text(result)
    playwright.expect(page.locator("#model")).to_have_value("taught")
    page.reload()
    playwright.expect(page.locator("#model")).to_have_value("taught")
    assert key.is_hidden()
    page.evaluate("sessionStorage.clear()")
    send(page, "Hello!")
    key.fill(KEY)
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".answer .text")).to_have_text("Hi.")
    assert page.locator(".turn").count() == 1
