"""What DALI makes of an image, for the check: decoded in a process of its own.

DALI's threads do not survive a fork, and its decoders may end their process; the check forks, and
goes on. So each worker of the check has a child, `python -m rsfast.data.comparing`, that is given
encoded images and answers with pixels. It ends with its worker.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import signal
import struct
import subprocess
import sys
from typing import IO

import numpy as np

__all__ = ["FARTHEST", "compare", "is_available", "main"]

# Decoders round differently: by 0.5 of 255 on average for 16 bits, and not at all for most files.
FARTHEST = 2.0
_REFUSED = "DALI cannot decode it"
_READY = b"ready"
_LENGTH = struct.Struct("<q")
_ANSWER = struct.Struct("<?qq")  # whether it was decoded; height and width, or bytes of a message
_child: subprocess.Popen | None = None
_owner = 0  # the process whose child it is; one that was forked since starts its own
_failed = False  # to start


def is_available() -> bool:
    """Whether DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and (
        importlib.util.find_spec("nvidia.dali") is not None
    )


def compare(encoded: bytes, picture: np.ndarray) -> str:
    """Why an image is of no use for the loaders, although Pillow decodes it.

    Args:
        encoded: the image, as its file has it.
        picture: [H, W, 3] uint8, what Pillow makes of it.

    Returns:
        A few words; empty if both decode it alike, or DALI is not there.
    """
    global _child
    child = _started()
    if child is None:
        return ""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(_LENGTH.pack(len(encoded)))
        child.stdin.write(encoded)
        child.stdin.flush()
        decoded, height, width = _ANSWER.unpack(_exactly(child.stdout, _ANSWER.size))
        content = _exactly(child.stdout, height * width * 3 if decoded else height)
    except (OSError, EOFError):
        child.kill()
        child.communicate()
        _child = None
        return "crashes DALI"
    if not decoded:
        return content.decode(errors="replace")
    if (height, width) != picture.shape[:2]:
        return f"DALI decodes it to {width} x {height} pixels"
    theirs = np.frombuffer(content, dtype=np.uint8).reshape(picture.shape)
    apart = np.abs(theirs.astype(np.int16) - picture).mean()
    if apart > FARTHEST:
        return f"Pillow and DALI decode it differently, by {apart:.0f} of 255 on average"
    return ""


def _started() -> subprocess.Popen | None:
    global _child, _failed, _owner
    if _owner != os.getpid():
        _child, _owner = None, os.getpid()
    if _child is None and not _failed and is_available():
        _child = subprocess.Popen(
            [sys.executable, "-m", "rsfast.data.comparing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where decoders complain about each file
        )
        assert _child.stdout is not None
        if _child.stdout.read(len(_READY)) != _READY:
            _child.communicate()
            _child, _failed = None, True
        else:
            atexit.register(_end, _child)  # workers of the check end without it, and their pipes do
    return _child


def _end(child: subprocess.Popen) -> None:
    if _owner == os.getpid():
        child.communicate()


def _exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError
    return content


def main() -> None:
    """Answers each image on the standard input, until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the check ends, and with it the input
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    from rsfast.data.dali import OneByOne

    decoder = OneByOne()
    answers.write(_READY)
    answers.flush()
    images = sys.stdin.buffer
    while len(length := images.read(_LENGTH.size)) == _LENGTH.size:
        try:
            picture = decoder.decode(_exactly(images, *_LENGTH.unpack(length)))
            answers.write(_ANSWER.pack(True, *picture.shape[:2]))
            answers.write(np.ascontiguousarray(picture).data)
        except RuntimeError as error:
            said = f"{_REFUSED}: {error}".encode()
            answers.write(_ANSWER.pack(False, len(said), 0) + said)
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, EOFError):
        main()
