"""The messages of a conversation: what a client may send, and the turns that are made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipelines.serving.api.fields import NoEffect, Only, Strict
from pipelines.serving.errors import bad_request
from pipelines.serving.media.parts import Medium

SYSTEM_ROLES = ("system", "developer")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message, whichever endpoint it came by."""

    role: str
    text: str
    media: tuple[Medium, ...]
    where: str
    """The field, for error messages."""


class ImageURL(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """A hint without effect: the model's own tiling decides the resolution."""


class VideoURL(Strict):
    url: str


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: VideoURL


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(Strict):
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[Part], Field(fail_fast=True), BeforeValidator(_parts, json_schema_input_type=str | list[Part])]

    # What servers and clients write into an assistant's message, this one's extensions included: only as far as it says nothing.
    refusal: Annotated[Any, Only("")] = None
    annotations: Annotated[Any, Only([])] = None
    tool_calls: Annotated[Any, Only([])] = None
    reasoning: Annotated[Any, Only("")] = None
    reasoning_content: Annotated[Any, Only("")] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    points: NoEffect = None
    """Points of an answer that is sent back: its text holds them."""
    parsed: NoEffect = None
    """What OpenAI's client made of an answer of a form."""

    def turn(self, where: str) -> Turn:
        """The message as a turn; its text parts are joined by a line break."""
        media = []
        for j, part in enumerate(self.content):
            if isinstance(part, ImagePart):
                media.append(Medium("image", part.image_url.url, f"{where}.content[{j}].image_url.url"))
            elif isinstance(part, VideoPart):
                media.append(Medium("video", part.video_url.url, f"{where}.content[{j}].video_url.url"))
        return Turn(self.role, "\n".join(part.text for part in self.content if isinstance(part, TextPart)), tuple(media), where)


def turns_of(messages: Sequence[Message], field: str = "messages") -> list[Turn]:
    """The messages as turns; `field` is their name in the request."""
    return [message.turn(f"{field}[{i}]") for i, message in enumerate(messages)]


def conversation(turns: Sequence[Turn], system: bool, field: str = "messages") -> list[Turn]:
    """The turns of user and assistant that the model is asked with.

    Args:
        turns: as they came.
        system: the model was trained on system messages; their words join the first question, as in its training data.
        field: the messages' name in the request, for errors.

    Raises:
        ApiError: 400, not a conversation that the model can answer.
    """
    turns, words = list(turns), []
    while turns and turns[0].role in SYSTEM_ROLES:
        first = turns.pop(0)
        if not system:
            raise bad_request(
                f"'{first.where}': this model was not trained with system messages, so that one would do nothing or harm. "
                "Put the instruction into the first user message.",
                f"{first.where}.role" if first.where.endswith("]") else first.where,
                "unsupported_value",
            )
        if first.media:
            raise bad_request(f"{first.where}: only a user's message can hold an image.", f"{first.where}.content")
        words.append(first.text)
    if not turns:
        raise bad_request("There is no user's message; it is what the model answers.", field)
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise bad_request(
                f"{turn.where} has role '{turn.role}', expected '{expected}': "
                "user and assistant messages alternate, the first is the user's.",
                f"{turn.where}.role",
            )
        if turn.role == "user" and not turn.text.strip() and not turn.media:
            raise bad_request(f"{turn.where} is empty.", f"{turn.where}.content")
        if turn.role == "assistant" and turn.media:
            raise bad_request(f"{turn.where}: only a user's message can hold an image.", f"{turn.where}.content")
    if turns[-1].role != "user":
        raise bad_request("The last message must be the user's; it is what the model answers.", turns[-1].where)
    return [dataclasses.replace(turns[0], text="\n".join([*words, turns[0].text])), *turns[1:]]
