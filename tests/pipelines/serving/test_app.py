"""The whole application on a cluster, seen by the official client."""

import asyncio
import concurrent.futures
import io
import json
import socket
import time
import urllib.error
import urllib.request
from typing import Literal

import numpy as np
import openai
import pydantic
import pytest
import ray
from PIL import Image
from ray import serve

from pipelines import cluster
from pipelines.serving import client
from pipelines.serving.app import APPLICATION, serving
from pipelines.serving.config import ServeConfig

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def url(tiny_checkpoint):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = {"max_new_tokens": 12, "max_body_bytes": 100_000, "max_images": 2, "max_batch_size": 4, "max_queued_requests": 8}
    config = ServeConfig(model=str(tiny_checkpoint), name="tiny", port=port, **limits)
    with cluster.connect(num_cpus=2, object_store_memory=256 << 20), serving(config) as address:
        yield address


@pytest.fixture(scope="module")
def api(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


ONE_OF_TWO = {"name": "colour", "schema": {"enum": ["red", "blue"]}}


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (64, 64, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def ask(api, text="what is this?", image=0, **settings):
    return api.chat.completions.create(**client.request("tiny", text, picture(image), **settings))


def expected(model, text: str, seed: int, limit: int) -> str:
    """The answer of the model itself, without any server."""
    preprocess = model.config.build_preprocessor(for_inference=True, is_training=False)
    example = preprocess({"image": picture(seed), "messages": [{"role": "user", "content": text}]})
    return model.generate(**example, max_new_tokens=limit).text[0].strip()


def get(address: str):
    with urllib.request.urlopen(address, timeout=60) as response:
        return json.load(response)


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


def test_models_and_health(api, url):
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        api.models.retrieve("some/other")
    assert get(f"{url}/health") == {"status": "ok"}
    assert get(f"{url}/ready") == {"status": "ready"}


def test_the_description_names_every_body(url):
    described = get(f"{url}/openapi.json")
    for path, name in (("/v1/chat/completions", "ChatRequest"), ("/v1/completions", "CompletionRequest"), ("/tokenize", "TokenizeRequest")):
        route = described["paths"][path]["post"]
        reference = route["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference == f"#/components/schemas/{name}"
        assert "parameters" not in route
        assert "model" in described["components"]["schemas"][name]["properties"]


def test_plain_answer(api, tiny_model):
    answer = ask(api, max_tokens=6)
    assert answer.choices[0].message.content.strip() == expected(tiny_model, "what is this?", 0, 6)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens > 64, "image tokens count"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_streamed_answer(api):
    whole = ask(api).choices[0].message.content
    chunks = list(ask(api, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_only_conversation(api):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and now?"}]
    answer = api.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert answer.usage.completion_tokens <= 3
    assert answer.usage.prompt_tokens < 40


def test_texts_are_continued(api, tiny_model):
    tokenizer = tiny_model.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer.encode("The sky is")]
    expected = tiny_model.generate(input_ids=np.array(ids), max_new_tokens=6).text[0]
    answer = api.completions.create(model="tiny", prompt=["The sky is", "Red"], max_tokens=6, logprobs=1)
    assert answer.choices[0].text == expected
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[1].logprobs.tokens) == len(answer.choices[1].logprobs.text_offset) == 6
    assert answer.usage.prompt_tokens > len(ids)
    streamed = ["", ""]
    for chunk in api.completions.create(model="tiny", prompt=["The sky is", "Red"], max_tokens=6, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def questions(text="what is this?", image=0):
    url = client.request("tiny", text, picture(image))["messages"][0]["content"][0]["image_url"]["url"]
    return [{"role": "user", "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": text}]}]


def test_responses(api, tiny_model):
    answer = api.responses.create(model="tiny", input=questions(), max_output_tokens=6, top_logprobs=2)
    assert answer.output_text.strip() == expected(tiny_model, "what is this?", 0, 6)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [len(token.top_logprobs) for token in answer.output[0].content[0].logprobs] == [2] * 6
    again = api.responses.create(model="tiny", input=[*questions(), *answer.output, {"role": "user", "content": "Sure?"}])
    assert again.usage.input_tokens > answer.usage.total_tokens
    raw = api.responses.with_raw_response.create(model="tiny", input="hi", text={"format": {"type": "json_schema", **ONE_OF_TWO}})
    assert (raw.status_code, raw.headers["content-type"]) == (200, "application/json")
    assert json.loads(raw.parse().output_text) in ("red", "blue")


def test_streamed_responses(api):
    whole = api.responses.create(model="tiny", input=questions())
    events = list(api.responses.create(model="tiny", input=questions(), stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    with api.responses.stream(model="tiny", input=questions(), extra_body={"structured_outputs": {"choice": ["yes"]}}) as stream:
        kinds = {event.type for event in stream}
        assert (stream.get_final_response().output_text, stream.get_final_response().status) == ("yes", "completed")
    assert kinds == {event.type for event in events} - {"response.incomplete"} | {"response.completed"}


def test_the_asynchronous_client(url, tiny_model):
    async def everything():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as api:
            body = client.request("tiny", "what is this?", picture(0), max_tokens=6)
            answers = await asyncio.gather(*(api.chat.completions.create(**body) for _ in range(3)))
            stream = await api.chat.completions.create(**body, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            events = await api.responses.create(model="tiny", input=questions(), max_output_tokens=6, stream=True)
            deltas = "".join([event.delta async for event in events if event.type == "response.output_text.delta"])
            raw = await api.chat.completions.with_raw_response.create(**body)
            return {*(answer.choices[0].message.content for answer in answers), text, deltas, raw.parse().choices[0].message.content}

    (text,) = asyncio.run(everything())
    assert text.strip() == expected(tiny_model, "what is this?", 0, 6)


def test_tokens_and_back(api):
    told = api.with_options(base_url=str(api.base_url).removesuffix("/v1/")).post("/tokenize", body={"prompt": "Hello"}, cast_to=object)
    assert told["count"] == len(told["tokens"])
    text = api.with_options(base_url=str(api.base_url).removesuffix("/v1/")).post(
        "/detokenize", body={"tokens": told["tokens"]}, cast_to=object
    )
    assert text == {"prompt": "<|endoftext|>Hello"}


def test_an_answer_of_a_form(api):
    answer = ask(api, response_format={"type": "json_schema", "json_schema": ONE_OF_TWO})
    assert json.loads(answer.choices[0].message.content) in ("red", "blue")
    assert ask(api, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}).choices[0].message.content in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="'structured_outputs': grammar"):
        ask(api, extra_body={"structured_outputs": {"regex": "("}})


class Colour(pydantic.BaseModel):
    colour: Literal["red", "blue"]


def test_answers_that_the_client_parses(api):
    """Its helpers send the schema of a class, and join the chunks of a stream."""
    body = client.request("tiny", "which?", picture(0), max_tokens=200)
    parsed = api.chat.completions.parse(**body, response_format=Colour).choices[0].message.parsed
    assert parsed.colour in ("red", "blue")
    assert api.responses.parse(model="tiny", input="which?", text_format=Colour, max_output_tokens=200).output_parsed.colour
    with api.chat.completions.stream(**body, response_format=Colour) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_points(api):
    """In pixels of the picture, which has 64 of them on each side; its streams are joined by the client."""
    tags = '<point x="50.0" y="25.0" alt="a">a</point> and <points x1="0.0" y1="0.0" x2="100.0" y2="75.0" alt="b">b</points>'
    expected = [(32.0, 16.0, "a"), (0.0, 0.0, "b"), (64.0, 48.0, "b")]
    body = client.request("tiny", "point", picture(0), max_tokens=200, extra_body={"structured_outputs": {"choice": [tags]}})
    answer = api.chat.completions.create(**body)
    assert answer.choices[0].message.content == tags
    assert [(point["x"], point["y"], point["label"]) for point in answer.choices[0].message.points] == expected
    with api.chat.completions.stream(**body) as stream:
        final = stream.get_final_completion()
    assert [(point["x"], point["y"], point["label"]) for point in final.choices[0].message.points] == expected
    own = final.choices[0].message.model_dump()
    again = [*body["messages"], own, {"role": "user", "content": "Sure?"}]
    assert api.chat.completions.create(model="tiny", messages=again, max_tokens=1).choices


def test_stop_string(api):
    whole = ask(api, max_tokens=40).choices[0].message.content
    middle = len(whole) // 2
    stop = whole[middle : middle + 2]
    answer = ask(api, stop=stop, max_tokens=40)
    assert answer.choices[0].message.content == whole[: whole.find(stop)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(api, stop=[stop], max_tokens=40, stream=True))
    assert streamed == answer.choices[0].message.content


def test_seeded_sampling(api):
    def sample(seed):
        return ask(api, temperature=1.5, seed=seed).choices[0].message.content

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_several_answers(api):
    several = ask(api, temperature=1.5, seed=3, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[1].message.content == ask(api, temperature=1.5, seed=4).choices[0].message.content
    assert [len(token.top_logprobs) for token in several.choices[2].logprobs.content] == [2] * len(several.choices[2].logprobs.content)
    texts = ["", "", ""]
    for chunk in ask(api, temperature=1.5, seed=3, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in several.choices]


def test_concurrent_requests_do_not_disturb_each_other(api, tiny_model):
    jobs = [(f"what is this {'?' * (seed % 3)}", seed, 3 + seed % 7) for seed in range(10)]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda job: ask(api, job[0], job[1], max_tokens=job[2]), jobs))
    assert [answer.choices[0].message.content.strip() for answer in answers] == [expected(tiny_model, *job) for job in jobs]


@pytest.mark.parametrize(
    ("error", "settings", "words"),
    [
        (openai.NotFoundError, {"model": "gpt"}, "'gpt' does not exist; this server has 'tiny'"),
        (openai.BadRequestError, {"tools": [{}]}, "'tools' is not supported"),
        (openai.BadRequestError, {"messages": [{"role": "system", "content": "x"}]}, "not trained with system messages"),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "x " * 20_000}]}, "tokens"),
        (openai.BadRequestError, {"max_tokens": 20_000}, "context is 16384 tokens"),
        (openai.BadRequestError, {"stream": True, "temperature": 9}, "temperature"),
    ],
)
def test_errors(api, error, settings, words):
    request = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(error) as caught:
        api.chat.completions.create(**{**request, **settings})
    assert words in caught.value.message
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("https://example.com/cat.png", "fetches no addresses"),
        ("data:image/png;base64,@@", "base64 data is invalid"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
    ],
)
def test_bad_images(api, image, words):
    content = [{"type": "image_url", "image_url": {"url": image}}]
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
    assert words in caught.value.message
    assert caught.value.param == "messages[0].content[0].image_url.url"


def test_too_many_images_and_too_large_a_body(api):
    one = client.request("tiny", "x", picture(0))["messages"][0]["content"]
    with pytest.raises(openai.BadRequestError, match="at most 2"):
        api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [one[0]] * 3 + [one[1]]}])
    with pytest.raises(openai.APIStatusError) as caught:
        api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 200_000}])
    assert caught.value.status_code == 413


def test_bodies_that_are_not_answered(url):
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 5000, b'{"\\ud83d": 1}', b'{"model": "\\ud83d"}', b'{"seed": NaN}'):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", body), timeout=60)
        assert caught.value.code == 400
        assert json.load(caught.value)["error"]["message"]


def test_a_client_that_leaves_stops_the_generation(api):
    model = serve.get_deployment_handle("model", APPLICATION)
    before = model.load.remote().result()["tokens"]
    stream = ask(api, stream=True, max_tokens=15_000)
    next(stream)
    next(stream)
    stream.close()
    wait_until(lambda: not model.load.remote().result()["active"])
    assert model.load.remote().result()["tokens"] - before < 15_000


def test_a_full_server(api, url):
    """The next request is refused at once, in OpenAI's form; whoever asks for health, readiness or the models does not wait."""
    model = serve.get_deployment_handle("model", APPLICATION)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(ask, api, stream=True, max_tokens=15_000) for _ in range(12)]
        wait_until(lambda: model.load.remote().result() | {"tokens": 0} == {"active": 4, "waiting": 8, "tokens": 0})
        for _ in range(5):
            with pytest.raises(openai.RateLimitError) as caught:
                ask(api)
            assert caught.value.response.headers["retry-after"] == "1"
            assert caught.value.body["code"] == "rate_limit_exceeded"
            assert "queue is full" in caught.value.message
            assert get(f"{url}/health") == {"status": "ok"}
            assert get(f"{url}/ready") == {"status": "ready"}
            assert get(f"{url}/v1/models")["data"][0]["id"] == "tiny"
        assert model.load.remote().result()["active"] == 4, "none of this waited for them"
        # Those who have their first token leave, the next ones begin, until all have left.
        for stream in concurrent.futures.as_completed(waiting):
            stream.result().close()
    wait_until(lambda: model.load.remote().result()["active"] == 0)
    assert ask(api, max_tokens=2).usage.completion_tokens == 2


def test_a_lost_replica(api):
    """Nobody notices, streamed or not: another replica goes on with the answers in work where the lost one stopped."""
    before = ask(api, max_tokens=400)
    text = before.choices[0].message.content
    (name,) = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if "molmo#model" in a["name"]]
    replica = ray.get_actor(name, namespace="serve")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask, api, max_tokens=400)
        stream = ask(api, stream=True, max_tokens=400)
        chunks = [next(stream), next(stream)]
        ray.kill(replica)
        chunks += stream
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert whole.result().choices[0].message.content == text
        assert whole.result().usage == before.usage
