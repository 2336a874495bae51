"""The steps of `forward` (embed, run, head) as others use them: with an attention of their own, in parts, without a host in the way."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_molmo import collate, example, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from molmo_core.generation.generate import Decoder, prompt_batch
from molmo_core.inputs import Inputs
from molmo_core.models.base import BaseModelConfig
from molmo_core.models.molmo import Embedded, Molmo
from molmo_core.models.molmo2 import Molmo2, Molmo2Config
from molmo_core.nn.attention import Cached, SequenceLayout, Whole, attend
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.llm import Pass
from molmo_core.preprocessing.tiling import Tiling

MOE = {"block_type": "moe", "moe_num_experts": 4, "moe_top_k": 2}
MODELS = ("molmo", "molmoe", "video_olmo", "he_molmo", "molmo2")


def build(name: str, golden: Path) -> Molmo:
    """A tiny model whose answers depend on the images."""
    folder = golden / {"video_olmo": "video-olmo/mixed-res", "he_molmo": "he-molmo"}.get(name, "")
    if name in ("video_olmo", "he_molmo"):
        model = BaseModelConfig.load(folder / "config.yaml").build_model().eval()
        model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return model
    if name == "molmo2":
        plain = tiny_config()
        config = Molmo2Config.new(llm=plain.llm, vision_backbone=plain.vision_backbone, mm_preprocessor={"overlap_margins": (1, 1)})
        model = Molmo2(config).eval()
        model.load_state_dict(tiny_model(bi_directional_attn="image_tokens").state_dict())
        return model
    return tiny_model(llm=MOE if name == "molmoe" else {})


def prompts(name: str, model: Molmo, golden: Path) -> list[dict[str, torch.Tensor]]:
    """Two prompts [1, S] of different lengths."""
    if name in ("video_olmo", "he_molmo"):
        batch = load_file(golden / {"video_olmo": "video-olmo/mixed-res", "he_molmo": "he-molmo"}[name] / "prompt.safetensors")
        batch.pop("metadata", None)
        longer = dict(batch)
        for key, fill in (("input_ids", 7), ("position_ids", int(batch["position_ids"].max()) + 1)):
            longer[key] = torch.cat((batch[key], torch.full((1, 1), fill)), dim=1)
        return [batch, longer]
    rows = [example(model.config, tilings, text=3 + n, seed=n) for n, tilings in enumerate(([Tiling(1, 2)], [Tiling(2, 1)]))]
    return [{k: v for k, v in collate([row]).items() if k not in ("labels", "loss_masks")} for row in rows]


def greedy(model: Molmo, row: dict[str, torch.Tensor], steps: int) -> list[int]:
    """The tokens that `generate` would choose (it also needs a tokenizer)."""
    decoder, tokens = Decoder(model, steps), []
    logits = decoder.prefill(prompt_batch(model, row))
    for _ in range(steps):
        tokens.append(int(logits.argmax()))
        logits = decoder.step(logits.argmax(-1))
    return tokens


class Ragged:
    """Attention of one new token a row to rows of different lengths, each with keys and values of its own."""

    def __init__(self, caches: list[KVCache]) -> None:
        self.caches = caches

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = [
            attend(q[b : b + 1], *cache.update(layer, k[b : b + 1], v[b : b + 1]))  # one query sees everything
            for b, cache in enumerate(self.caches)
        ]
        return torch.cat(rows)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_one_by_one_then_decode_together(name: str, golden: Path) -> None:
    """As an engine does it: each prompt is read alone, rows of different lengths decode together; the tokens are those of `generate`."""
    model, steps = build(name, golden), 6
    rows = prompts(name, model, golden)
    with torch.no_grad():
        expected = [greedy(model, row, steps) for row in rows]
        caches, found, positions = [], [], []
        for row in rows:
            inputs, cache = model.inputs(row), KVCache()
            embedded = model.embed(inputs, cache)
            blocks = model.run(embedded.tokens, model.attention(inputs, embedded.tokens.x.shape[1], cache))
            output = model.head(embedded, blocks, select=inputs.last_positions())
            assert cache.length == row["input_ids"].shape[1]
            caches.append(cache)
            found.append([int(output.logits.argmax())])
            positions.append(int(inputs.positions[0, -1]))
        for step in range(1, steps):
            last, where = torch.tensor([[row[-1]] for row in found]), torch.tensor(positions)[:, None] + step
            embedded = model.embed(Inputs(last, where))
            logits = model.head(embedded, model.run(embedded.tokens, Ragged(caches))).logits
            for row, token in zip(found, logits[:, 0].argmax(-1).tolist()):
                row.append(token)
    assert found == expected


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_forward(name: str, golden: Path) -> None:
    """Without a cache, an embedding that ran tokens already (HeMolmo) leaves all of them to the blocks."""
    model = build(name, golden)
    row = prompts(name, model, golden)[0]
    with torch.no_grad():
        inputs = model.inputs(row)
        embedded = model.embed(inputs)
        assert embedded.done is None
        assert embedded.tokens.x.shape[:2] == inputs.input_ids.shape
        output = model.head(embedded, model.run(embedded.tokens, model.attention(inputs)))
        torch.testing.assert_close(output.logits, model(**row).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["molmo", "molmoe", "he_molmo"])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_a_prompt_can_run_in_parts(name: str, size: int, golden: Path) -> None:
    """After embedding the sequence can be split: here parts that run one after the other over one cache."""
    model = build(name, golden)
    row = prompts(name, model, golden)[1]
    if name == "he_molmo":
        model.config.bi_directional_attn = None  # a part must not end inside a group
    with torch.no_grad():
        inputs, cache, parts = model.inputs(row), KVCache(), []
        embedded = model.embed(inputs)
        length = inputs.input_ids.shape[1]
        for a in range(0, length, size):
            b = min(a + size, length)
            mask = SequenceLayout().mask(1, b, b - a, model.device, "sdpa")
            parts.append(model.run(embedded.tokens.part(a, b), Cached(cache, Whole(mask))).hidden)
        expected = model(**row).logits
        torch.testing.assert_close(model.transformer.logits(torch.cat(parts, dim=1)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "molmoe"])
def test_decoding_reads_no_value_on_the_host(name: str, golden: Path) -> None:
    """On fake tensors whatever does (item, bool, tolist) is an error. Experts do on a CPU, on a GPU not: see nn/test_gpu.py."""
    config = build(name, golden).config
    with torch.device("meta"):
        model = config.model_class(config).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu")
        ids = torch.ones(4, 1, dtype=torch.int64)
        embedded = model.embed(Inputs(ids, ids))
        output = model.head(embedded, model.run(embedded.tokens, Whole()))
        assert output.logits.shape == (4, 1, config.llm.embedding_rows)
        with pytest.raises(RuntimeError):
            bool(output.logits.isfinite().all())  # the look that the test is about


def test_outputs_are_joined_with_what_was_done() -> None:
    """Hidden states of tokens that embedding ran stand before those of the blocks."""
    model = tiny_model()
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True)
        cache = KVCache()
        tokens = model.embed(model.inputs({"input_ids": ids})).tokens
        done = model.run(tokens.part(0, 4), Cached(cache, Whole()), output_hidden_states=True)
        rest: Pass = tokens.part(4, 7)
        embedded = Embedded(rest, done)
        blocks = model.run(rest, model.attention(model.inputs({"input_ids": ids}), 3, cache), output_hidden_states=True)
        output = model.head(embedded, blocks)
    torch.testing.assert_close(output.logits, whole.logits, atol=1e-5, rtol=1e-5)
    for a, b in zip(output.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
