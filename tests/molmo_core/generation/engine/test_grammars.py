"""Answers that have to be of a form: whatever a random model draws, they are; and nobody else notices."""

import json
import re

import jsonschema
import numpy as np
import pytest

from molmo_core.generation.engine.decoding import GraphDecoder
from molmo_core.generation.engine.engine import Engine
from molmo_core.generation.engine.grammars import KEPT, Grammars
from molmo_core.generation.engine.requests import End, Failed, Grammar, Request, SamplingParams, Token
from tests.molmo_core.generation.engine.prompts import TEXT
from tests.molmo_core.generation.engine.test_engine import alone, limits, pages, run, tokens_of

SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green", "a \"quoted\" / one", "日本"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "label": {"type": ["string", "null"], "maxLength": 8},
            "box": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 2, "maxItems": 2},
        },
        "required": ["colour", "count", "label", "box"],
        "additionalProperties": False,
    },
    {"$defs": {"leaf": {"type": "boolean"}}, "anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
]  # fmt: skip
CHOICE = ["red", "re d\n", "(a|b)*", "日本", "a much longer answer"]
REGEX = r"\d{2,4}-[a-f]{1,3}(é|ü)?"


@pytest.fixture(scope="module")
def prompts(tiny_model):
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    image = np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)
    return [preprocess({"image": image, "messages": ["describe it"]}), preprocess(TEXT)]


def schema(value) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def text_of(model, events) -> str:
    return model.tokenizer.decode(tokens_of(events), truncate_at_eos=False)


@pytest.mark.parametrize("kind", ["plenty", "preempted", "ahead"])
def test_every_answer_is_valid_and_neighbours_do_not_notice(tiny_model, prompts, kind):
    model = tiny_model
    longest = max(len(prompt["input_ids"]) for prompt in prompts)
    settings = pages(model, (longest + 200) // 4 + 20, page_size=4) if kind == "preempted" else limits()
    engine = Engine(model, settings)
    if kind == "ahead":  # as on a GPU, but without graphs
        engine.decoder = GraphDecoder(model, engine.runner.cache, 8, 6)
    grammars = [*map(schema, SCHEMAS), Grammar("choice", json.dumps(CHOICE)), Grammar("regex", REGEX)]
    asked = [
        Request(prompts[seed % 2], SamplingParams(max_tokens=200, temperature=1.0, seed=seed, grammar=grammar))
        for seed in range(8)
        for grammar in grammars
    ]
    free = [Request(prompts[i % 2], SamplingParams(max_tokens=15)) for i in range(8)]
    drawn = [Request(prompts[0], SamplingParams(max_tokens=15, temperature=1.0, seed=seed)) for seed in range(4)]
    events = run(engine, [(i // 2, request) for i, request in enumerate([*asked, *free, *drawn])])
    if kind == "preempted":
        assert engine.scheduler.preemptions > 0
    answers = set()
    for request in asked:
        assert events[request][-1] == End("stop")
        text = text_of(model, events[request])
        check(request.params.grammar, text)
        answers.add(text)
    assert len(answers) > 20, "they differ"
    for request, i in zip(free, range(8)):
        assert tokens_of(events[request]) == alone(model, prompts[i % 2], 15)
    without = Engine(model, limits())
    again = [Request(request.example, request.params) for request in drawn]
    events_without = run(without, [(0, request) for request in again])
    assert [tokens_of(events[one]) for one in drawn] == [tokens_of(events_without[one]) for one in again]


def check(grammar: Grammar, text: str) -> None:
    bare = text.removeprefix(" ")
    match grammar.kind:
        case "json_schema":
            jsonschema.validate(json.loads(bare), json.loads(grammar.text))
        case "regex":
            assert re.fullmatch(grammar.text, bare), text
        case "choice":
            assert text in json.loads(grammar.text) or bare in json.loads(grammar.text), text


@pytest.mark.parametrize("params", [{"min_tokens": 30}, {"ignore_eos": True}, {"repetition_penalty": 1e30, "logit_bias": {1: -1e38}}])
def test_the_grammar_is_stronger_than_other_settings(tiny_model, prompts, params):
    grammar = Grammar("choice", json.dumps(CHOICE))
    requests = [Request(prompts[0], SamplingParams(max_tokens=60, temperature=1.0, seed=s, grammar=grammar, **params)) for s in range(6)]
    events = run(Engine(tiny_model, limits()), [(0, request) for request in requests])
    for request in requests:
        assert events[request][-1] == End("stop")
        check(grammar, text_of(tiny_model, events[request]))


def test_cut_answers_say_so(tiny_model, prompts):
    request = Request(prompts[0], SamplingParams(max_tokens=3, grammar=Grammar("regex", "(abc){9}")))
    events = run(Engine(tiny_model, limits()), [(0, request)])[request]
    assert events[-1] == End("length")
    assert text_of(tiny_model, events).strip() == "abcabcabc"[: len(text_of(tiny_model, events).strip())]


def test_stop_tokens_end_what_is_not_complete(tiny_model, prompts):
    b = tiny_model.tokenizer.encode("b")[0]
    request = Request(prompts[0], SamplingParams(max_tokens=30, stop_token_ids=(b,), grammar=Grammar("regex", "a[b]{5}")))
    events = run(Engine(tiny_model, limits()), [(0, request)])[request]
    assert events[-1] == End("stop")
    assert text_of(tiny_model, events).strip() == "a"


def test_an_answer_begun_elsewhere_keeps_its_grammar(tiny_model, prompts):
    engine = Engine(tiny_model)
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=4, grammar=Grammar("regex", "[a-z]{12}-[0-9]{12}"))
    (events,) = run(engine, [(0, Request(prompts[0], params))]).values()
    tokens = tokens_of(events)
    (rest,) = run(engine, [(0, Request(prompts[0], params, tuple(tokens[:5])))]).values()
    assert tokens_of(rest) == tokens[5:]


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("regex", "(?=a)"), "look-around"),
        (Grammar("regex", r"[^\s\S]"), "cannot be followed"),
        (Grammar("choice", "[]"), "list of strings"),
        (Grammar("choice", '["a", 3]'), "list of strings"),
        (Grammar("json_schema", "{"), "not JSON"),
        (Grammar("json_schema", "[" * 60_000), "not JSON"),
        (Grammar("json_schema", '{"items":' * 500 + "{}" + "}" * 500), "recursion"),
        (Grammar("json_schema", "3"), "is an object"),
        (Grammar("json_schema", '{"type": "objekt"}'), "Invalid type: objekt"),
        (Grammar("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Grammar("regex", "a" * 70_000), "70,000 characters"),
    ],
)
def test_what_is_not_a_grammar_is_refused(tiny_model, prompts, grammar, message):
    engine = Engine(tiny_model, limits())
    ((event,),) = run(engine, [(0, Request(prompts[0], SamplingParams(grammar=grammar)))]).values()
    assert isinstance(event, Failed)
    assert isinstance(event.error, ValueError)
    assert re.match(f"grammar: .*{re.escape(message)}", str(event.error))
    assert len(str(event.error)) < 160
    assert engine.active == 0


def test_a_grammar_that_leads_nowhere_fails_alone(tiny_model, prompts):
    """It takes a blank, but then nothing more."""
    grammar = Grammar("json_schema", '{"$ref": "#"}')
    wrong, good = (Request(prompts[0], SamplingParams(max_tokens=9, grammar=one)) for one in (grammar, None))
    events = run(Engine(tiny_model, limits()), [(0, wrong), (0, good)])
    assert isinstance(events[wrong][-1], Failed)
    assert "cannot be followed" in str(events[wrong][-1].error)
    assert tokens_of(events[good]) == alone(tiny_model, prompts[0], 9)


def test_who_leaves_before_the_grammar_is_compiled(tiny_model, prompts):
    engine = Engine(tiny_model, limits())
    leaves, stays = (Request(prompts[0], SamplingParams(max_tokens=9, grammar=Grammar("regex", f"[a-{c}]{{99}}"))) for c in "yz")
    engine.add(leaves)
    engine.add(stays)
    assert engine.active == engine.stats().waiting == 2
    engine.abort(leaves)
    events = []
    while engine.active:
        events += engine.step()
    assert {request for request, _ in events} == {stays}
    assert events[-1][1] == End("length")


def test_compiled_grammars_are_kept_within_bounds(tiny_model):
    grammars = Grammars(lambda: tiny_model.tokenizer)
    for i in range(KEPT + 5):
        grammars.start(Grammar("regex", f"a{i}"))
    grammars.start(Grammar("regex", f"a{KEPT}"))
    assert len(grammars._compiled) == KEPT


def test_media_tokens_and_padding_are_never_allowed(tiny_model):
    tokenizer = tiny_model.tokenizer
    mask = np.zeros(-(-tokenizer.first_special_id // 32), np.int32)
    Grammars(lambda: tokenizer).start(Grammar("regex", r"[\s\S]*")).allow(mask)
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert allowed.max() < tokenizer.text_vocab_size
    assert len(allowed) > 256
    assert tokenizer.eos_token_id in allowed


def test_token_events_only(tiny_model, prompts):
    """Every token of the answer is handed out, the closing one included."""
    request = Request(prompts[0], SamplingParams(max_tokens=30, grammar=Grammar("choice", '["yes"]')))
    events = run(Engine(tiny_model, limits()), [(0, request)])[request]
    assert [type(event) for event in events] == [Token] * (len(events) - 1) + [End]
    assert text_of(tiny_model, events).strip() == "yes"
