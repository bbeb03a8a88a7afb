"""`python -m rsfast.deploy.server DIR`: an HTTP server that chooses the resolution as it goes.

An example, and small: POST /classify takes the bytes of an image, GET /status says how it is.
`make_app` is the WSGI application itself, for other servers. One thread runs the network, first
come, first served. Those that wait are at most as many as the fastest resolution answers within
the objective: whoever comes then would be late at any resolution, and is told so at once (503),
rather than make all later ones late as well.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rsfast.deploy.chooser import Chooser
from rsfast.deploy.manifest import Manifest
from rsfast.deploy.network import load
from rsfast.deploy.table import Table

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["App", "Classifier", "create_server", "main", "make_app", "waiting_places"]

MAX_BODY = 16 * 2**20  # bytes
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's EPS starts a program
MAX_PIXELS = 2**26  # 192 MiB in RGB
MAX_ASPECT = 20  # as the shorter side is scaled to the resolution, the longer one takes memory
_MOST_WAITING = 64  # a thread of the server waits for each
_RECENT = 1000  # requests that the percentiles of /status are taken of
_SPARE_THREADS = 4  # to refuse requests, and to answer /status, while all places are taken

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Classifier(Protocol):
    """What a server needs of a network; :class:`rsfast.deploy.Network` has it."""

    @property
    def manifest(self) -> Manifest:
        """Of which the class names are used."""

    def preprocess(self, images: list[Image.Image], resolution: int) -> np.ndarray:
        """Pictures to [N, 3, r, r]."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """[N, 3, r, r] to logits [N, K]."""


class _RefusalError(Exception):
    """A request that is answered by its status and one sentence."""

    def __init__(self, status: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def waiting_places(chooser: Chooser) -> int:
    """How many requests may wait while one runs, at least 1 and at most 64.

    It is largest at the start, before decoding and preprocessing have been seen.
    """
    return min(max(1, int(chooser.objective_ms / chooser.fastest_ms)), _MOST_WAITING)


def make_app(net: Classifier, chooser: Chooser) -> App:
    """The application, as WSGI (PEP 3333) has it; in one process, called by any number of threads.

    Args:
        net: runs one image at a time; nothing else may use it.
        chooser: of its resolutions; nothing else may tell it of requests.
    """
    service = _Service(net, chooser)
    routes = {"/classify": ("POST", service.classify), "/status": ("GET", service.status)}

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        came = time.monotonic()
        headers = []
        try:
            path = environ.get("PATH_INFO", "")
            if path not in routes:
                raise _RefusalError("404 Not Found", f"{path} is not one of {', '.join(routes)}")
            method, answer = routes[path]
            if environ["REQUEST_METHOD"] != method:
                headers.append(("Allow", method))
                raise _RefusalError("405 Method Not Allowed", f"{path} takes {method} only")
            status, content = "200 OK", answer(environ, came)
        except _RefusalError as refusal:
            status, content = refusal.status, {"error": str(refusal)}
            if status.startswith("503"):
                headers.append(("Retry-After", "1"))
        body = json.dumps(content).encode() + b"\n"
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response(status, headers)
        return [body]

    return app


class _Service:
    """What the requests to one network share."""

    def __init__(self, net: Classifier, chooser: Chooser) -> None:
        self._net = net
        self._chooser = chooser
        self._names = net.manifest.class_names
        self._turns = ThreadPoolExecutor(1, "network")
        self._lock = threading.Lock()  # of what follows
        self._inside = 0  # requests that wait or run
        self._counts: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def classify(self, environ: dict[str, Any], came: float) -> dict[str, Any]:
        """The five most probable classes of the image in the request's body."""
        with self._lock:
            full = self._inside > waiting_places(self._chooser)
            self._counts["refused"] += full
            self._inside += not full
        if full:
            raise _RefusalError("503 Service Unavailable", "too many requests wait: try later")
        try:
            body = _read_body(environ)
            return self._turns.submit(self._run, body, came).result()
        except _RefusalError:
            with self._lock:
                self._counts["bad"] += 1
            raise
        finally:
            with self._lock:
                self._inside -= 1

    def status(self, _environ: dict[str, Any], _came: float) -> dict[str, Any]:
        """Resolution, slowdown and counts of this moment."""
        with self._lock:
            recent = list(self._recent)
            known = {
                **asdict(self._chooser.status()),
                "inside": self._inside,
                "bad": self._counts["bad"],
                "refused": self._counts["refused"],
            }
        p50, p95 = np.percentile(recent, [50, 95]).tolist() if recent else (None, None)
        return {**known, "recent": len(recent), "p50_ms": p50, "p95_ms": p95}

    def _run(self, body: bytes, came: float) -> dict[str, Any]:
        """In the one thread of the network, at the resolution chosen as the turn comes.

        Decoding, too: pictures of all that wait would take too much memory.
        """
        begin = time.monotonic()
        resolution = self._chooser.resolution
        pixels = self._net.preprocess([_read_image(body, self._net.manifest.exif)], resolution)
        start = time.monotonic()
        logits = self._net(pixels)[0]
        now = time.monotonic()
        latency_ms = 1000 * (now - came)
        fixed_ms = 1000 * (start - begin)  # decoding and preprocessing
        with self._lock:
            self._recent.append(latency_ms)
            self._chooser.observe(resolution, latency_ms, fixed_ms)
        return {
            "resolution": resolution,
            "top5": _top5(logits, self._names),
            "latency_ms": latency_ms,
        }


def _read_body(environ: dict[str, Any]) -> bytes:
    text = environ.get("CONTENT_LENGTH") or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _RefusalError("400 Bad Request", f"Content-Length must be a number, got {text!r:.80}")
    length = int(text)
    if length > MAX_BODY:
        raise _RefusalError(
            "413 Content Too Large", f"a body must have at most {MAX_BODY} bytes, got {length}"
        )
    body: bytes = environ["wsgi.input"].read(length)
    if not body or len(body) < length:
        raise _RefusalError(
            "400 Bad Request", f"the body must be an image, got {len(body)} bytes of {length}"
        )
    return body


def _read_image(body: bytes, exif: str) -> Image.Image:
    """In RGB, and turned if EXIF is to be honoured."""
    try:
        from rsfast.files import orientation, pictures
    except ImportError as error:
        raise ImportError("the server needs Pillow: pip install pillow") from error
    try:
        image = pictures.Image.open(io.BytesIO(body), formats=FORMATS)
        if math.prod(image.size) <= MAX_PIXELS and max(image.size) <= MAX_ASPECT * min(image.size):
            return pictures.as_rgb(orientation.upright(image) if exif == "honour" else image)
        reason = (
            f"it must have at most {MAX_PIXELS} pixels and a longer side of at most {MAX_ASPECT} "
            f"times the shorter, got {image.width} x {image.height}"
        )
    except pictures.Image.UnidentifiedImageError:  # its message names an object in memory
        reason = f"it must be a file of {', '.join(FORMATS)}"
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged content
        reason = str(error) or type(error).__name__
    raise _RefusalError("400 Bad Request", f"the body is no image that can be read: {reason}")


def _top5(logits: np.ndarray, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Classes and probabilities, highest first."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    probs = powers / powers.sum()
    best = np.argsort(-probs, kind="stable")[:5].tolist()
    return [
        {"class": k, "label": names[k] if names else None, "probability": float(probs[k])}
        for k in best
    ]


def create_server(app: App, chooser: Chooser, host: str, port: int) -> Any:
    """The server, listening; its `run` serves until it is interrupted.

    There is a thread for every place in the queue, so that requests wait where they are seen, and
    in none of the server's own. A body is received before a thread takes the request: latency
    begins when it is complete.

    Args:
        app: of make_app.
        chooser: that the app has.
        host: address to listen on.
        port: 0 for any that is free; `effective_port` says which.

    Raises:
        ImportError: if waitress is absent.
    """
    try:
        import waitress
    except ImportError as error:
        raise ImportError("the server needs waitress: pip install 'rsfast[serve]'") from error
    return waitress.create_server(
        app,
        host=host,
        port=port,
        threads=1 + waiting_places(chooser) + _SPARE_THREADS,
        max_request_body_size=MAX_BODY + 1,  # the first that waitress refuses
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 stopped, 1 it failed, 2 bad input."""
    args = _parse(argv)
    try:
        server, resolution = _open(args)
    except (ValueError, ImportError) as error:
        print(f"rsfast.deploy.server: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"rsfast.deploy.server: error: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as Ctrl-C: those that wait are answered
    address = f"http://{server.effective_host}:{server.effective_port}"
    print(f"serving {args.folder} at {address}, at {resolution} pixels to begin with", flush=True)
    server.run()
    return 0


def _open(args: argparse.Namespace) -> tuple[Any, int]:
    """The server and the resolution that it starts with; every resolution has run once."""
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, got {args.port}")
    how = {name: getattr(args, name) for name in ("runtime", "precision", "mode", "threads")}
    chooser = Chooser(Table.read(args.latency, batch=1, **how), args.objective_ms, args.percentile)
    net = load(args.folder, **how)
    for resolution in chooser.resolutions:
        if args.mode == "fast":
            net.prepare(resolution)
        net(np.zeros((1, 3, resolution, resolution), net.manifest.input_dtype))
    server = create_server(make_app(net, chooser), chooser, args.host, args.port)
    return server, chooser.resolution


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rsfast.deploy.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="that rsfast.export wrote")
    add("--latency", type=Path, required=True, help="latency.csv, measured on this machine")
    add("--objective-ms", type=float, required=True, help="to answer within, waiting included")
    add("--percentile", type=float, default=95, help="of the requests, 50 to 95 (default 95)")
    add("--runtime", default="onnxruntime", help="onnxruntime (default) or openvino")
    add("--precision", default="fp32", help="fp32 (default), int8, or bf16 with openvino")
    add("--mode", default="fast", help="fast (default): a session per resolution; small: one")
    add("--threads", type=int, default=1, help="to compute with (default 1)")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    add("--port", type=int, default=8000, help="(default 8000; 0 for any that is free)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
