"""What was asked and answered, as attributes of a span: only where the operator wants it (`trace_content`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

LONGEST_MEDIUM = 1 << 20
"""Characters of a picture's data URL; of a larger medium only the kind and the size are kept."""


def inputs(body: Any, for_mlflow: bool) -> dict[str, str]:
    """A request: in the form of the conventions for generative AI, or in the one that MLflow shows pictures of."""
    messages = list(_messages(body))
    if for_mlflow:
        return {"mlflow.spanInputs": _json({"messages": messages})}
    return {"gen_ai.input.messages": _json([{"role": m["role"], "parts": [_part(part) for part in m["content"]]} for m in messages])}


def outputs(texts: Sequence[str], for_mlflow: bool) -> dict[str, str]:
    """The answers to it."""
    if for_mlflow:
        return {"mlflow.spanOutputs": _json({"choices": [{"message": {"role": "assistant", "content": text}} for text in texts]})}
    return {"gen_ai.output.messages": _json([{"role": "assistant", "parts": [{"type": "text", "content": text}]} for text in texts])}


def _messages(body: Any) -> Iterator[dict[str, Any]]:
    """The messages of a request to any endpoint, in the form of chat completions."""
    turns: Any = next((body[name] for name in ("messages", "input", "prompt") if name in body), []) if isinstance(body, dict) else []
    for turn in turns if isinstance(turns, list) else [turns]:
        turn = turn if isinstance(turn, dict) else {"content": turn}
        content = turn.get("content")
        yield {
            "role": str(turn.get("role", "user")),
            "content": [_shown(part) for part in (content if isinstance(content, list) else [content])],
        }


def _shown(part: Any) -> dict[str, Any]:
    """A part of a message: text, or a picture that is not too large."""
    if not isinstance(part, dict) or part.get("type") in ("text", "input_text", "output_text"):
        text = part.get("text") if isinstance(part, dict) else part
        return {"type": "text", "text": text if isinstance(text, str) else ""}
    url = next((part[name] for name in ("image_url", "video_url") if name in part), "")
    url = url.get("url", "") if isinstance(url, dict) else url
    if isinstance(url, str) and url.startswith("data:image/") and len(url) <= LONGEST_MEDIUM:
        return {"type": "image_url", "image_url": {"url": url}}
    kind = url[:100].partition(",")[0] if isinstance(url, str) else ""
    return {"type": "text", "text": f"[{part.get('type')}: {kind}, {len(url):,} characters]"}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "content": part["text"]}
    head, _, data = part["image_url"]["url"].partition(",")
    return {"type": "blob", "modality": "image", "mime_type": head.removeprefix("data:").partition(";")[0], "content": data}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
