"""Find the user's own line in a stack of calls."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from types import CodeType, FrameType

import torch

__all__ = ["user_line"]

_PACKAGE = Path(__file__).parents[2]
_NOT_THE_USERS = (
    str(Path(torch.__file__).parent),
    *(str(path) for path in _PACKAGE.iterdir() if path.name != "models"),
    str(Path(contextlib.__file__)),
    "<",
)
_LIBRARIES = ("site-packages", "dist-packages")


def user_line(place: Exception | FrameType, run: CodeType) -> str | None:
    """The innermost line of the user's own code, else of another library's than PyTorch and this, as "file:line".

    Args:
        place: an error, or a frame that runs.
        run: the code that has called the network: who called for the conversion is no part of it.
    """
    if isinstance(place, Exception):
        frames = list(traceback.walk_tb(place.__traceback__))[::-1]
    else:
        frames = list(traceback.walk_stack(place))
        frames = frames[: next((index for index, (frame, _) in enumerate(frames) if frame.f_code is run), None)]
    lines = [
        (frame.f_code.co_filename, line)
        for frame, line in frames
        if not frame.f_code.co_filename.startswith(_NOT_THE_USERS)
    ]
    own = (line for line in lines if not any(name in line[0] for name in _LIBRARIES))
    file, line = next(own, next(iter(lines), (None, 0)))
    return None if file is None else f"{Path(file).name}:{line}"
