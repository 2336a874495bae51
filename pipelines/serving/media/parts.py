"""What a request says of a picture or a video: which field, of which kind, and where its bytes are."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from pipelines.serving.errors import bad_request, shown

Kind = Literal["image", "video"]

_ADDRESS = re.compile(r"https?:", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*(?P<base64>;base64)?,", re.IGNORECASE)
_HEAD = 1000
"""Characters of a URL among which the head of a data URL ends."""


@dataclasses.dataclass(frozen=True)
class Medium:
    """A picture or a video that a request names."""

    kind: Kind
    url: str
    where: str
    """The field, for error messages."""

    @property
    def is_address(self) -> bool:
        """It is elsewhere and would have to be fetched."""
        return _ADDRESS.match(self.url) is not None

    def base64(self) -> bytes:
        """The data of a data URL, as they came.

        Raises:
            ApiError: 400, it is none, or of another kind.
        """
        head = _DATA_URL.match(self.url[:_HEAD])
        if not head or not head["base64"]:
            found = shown(self.url[:30])
            raise bad_request(f"{self.where}: expected data:{self.kind}/...;base64,... but found {found}.", self.where, self.invalid("url"))
        check_type(head["type"], self)
        return self.url[head.end() :].encode()

    def invalid(self, what: str = "") -> str:
        """The code of an error, e.g. `invalid_image_url`."""
        return f"invalid_{self.kind}_{what}" if what else f"invalid_{self.kind}"


def check_type(media_type: str | None, medium: Medium) -> None:
    """Raises ApiError if a media type is of another kind than the part's."""
    if media_type and media_type.lower().partition("/")[0] != medium.kind:
        message = f"{medium.where}: the media type {shown(media_type)} is not that of {_ARTICLE[medium.kind]}."
        raise bad_request(message, medium.where, medium.invalid("url"))


_ARTICLE = {"image": "an image", "video": "a video"}
