"""Codecs: how an update is written, screened and read; see docs/update-format.md."""

from __future__ import annotations

from weft.common.codec.feedback import ErrorFeedback
from weft.common.codec.section import seed_of
from weft.common.codec.settings import CodecKind, CodecSettings, ValueKind
from weft.common.codec.update import (
    CODECS,
    MAGNITUDE_MAX,
    EncodedUpdate,
    UpdateFile,
    UpdateStatistics,
    encode_update,
    screen_update,
    update_bytes_max,
)

__all__ = [
    "CODECS",
    "MAGNITUDE_MAX",
    "CodecKind",
    "CodecSettings",
    "EncodedUpdate",
    "ErrorFeedback",
    "UpdateFile",
    "UpdateStatistics",
    "ValueKind",
    "encode_update",
    "screen_update",
    "seed_of",
    "update_bytes_max",
]
