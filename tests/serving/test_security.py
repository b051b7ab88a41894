"""Tokens, origins, names of the host, bodies and pictures that are too large, paths."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from liveact.engine import Engine
from liveact.serve.portraits import list_portraits
from liveact.serve.security import LARGE_BODIES
from tests.support.server import Served, serving, upload

TOKEN = "sesame-sesame-0123"
ELSEWHERE = "https://talk.example.com"


@pytest.fixture(scope="module")
def served(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("portraits")
    Image.new("RGB", (40, 30), "green").save(folder / "green one.png")
    (folder / "notes.txt").write_text("secret")
    portraits = list_portraits(folder)
    with serving(engine, token=TOKEN, allow_origins=(ELSEWHERE,), portraits=portraits) as found:
        yield found


@pytest.fixture
def anybody(served: Served) -> Iterator[httpx.Client]:
    """A client without a token."""
    with httpx.Client(base_url=served.url) as client:
        yield client


def kind(answer: httpx.Response) -> str:
    return answer.json()["error"]["type"]


# --------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_need_no_token(anybody: httpx.Client, path: str) -> None:
    assert anybody.get(path).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/openapi.json",
        "/asyncapi.json",
        "/v1/options",
        "/v1/portraits",
        "/v1/portraits/green one.png",
        "/v1/sessions/x",
        "/page/../v1/portraits",
        "//v1/portraits",
        "/none",
    ],
)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer é"]
)
def test_everything_else_does(anybody: httpx.Client, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    answer = anybody.get(path, headers=headers)
    assert (answer.status_code, kind(answer)) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in answer.text


def test_a_browser_bears_it_in_a_subprotocol(served: Served) -> None:
    url = served.url.replace("http:", "ws:") + served.create(portrait="green one")["stream"]
    for subprotocols in (None, ["liveact.v1"], ["liveact.v1", "bearer.wrong"]):
        with pytest.raises(InvalidStatus) as refused, connect(url, subprotocols=subprotocols):
            pass
        assert refused.value.response.status_code == 401
    with connect(url, subprotocols=["liveact.v1", f"bearer.{TOKEN}"]) as socket:
        assert socket.subprotocol == "liveact.v1"  # and not the token
        assert "ready" in socket.recv(30)
    served.wait_until_free()


# --------------------------------------------------------------------------------- origin and host


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("{own}", 200),
        (ELSEWHERE, 200),
        ("https://evil.example.com", 403),
        (ELSEWHERE + ".evil.com", 403),
        ("http://talk.example.com", 403),
        ("null", 403),
        ("", 403),
        ("http://127.0.0.1:1", 403),
    ],
)
def test_origins(served: Served, origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"Origin": origin.format(own=served.url)}
    assert served.client.get("/v1/portraits", headers=headers).status_code == status


def test_a_page_of_an_allowed_origin_may_read_the_answers(anybody: httpx.Client) -> None:
    """A browser asks before it sends a token, and shows a page only what names its origin."""
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = anybody.options("/v1/sessions", headers=asks | {"Origin": ELSEWHERE})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ELSEWHERE
    answer = anybody.get("/v1/options", headers={"Origin": ELSEWHERE})
    assert (answer.status_code, kind(answer)) == (401, "unauthorized")
    assert answer.headers["access-control-allow-origin"] == ELSEWHERE
    stranger = {"Origin": "https://evil.example.com"}
    for refused in (
        anybody.options("/v1/sessions", headers=asks | stranger),
        anybody.get("/healthz", headers=stranger),
    ):
        assert refused.status_code in (400, 403)
        assert "access-control-allow-origin" not in refused.headers


def test_a_page_of_another_origin_cannot_open_a_stream(served: Served) -> None:
    url = served.url.replace("http:", "ws:") + served.create(portrait="green one")["stream"]
    protocols = ["liveact.v1", f"bearer.{TOKEN}"]
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(url, subprotocols=protocols, origin="https://evil.example.com"),
    ):
        pass
    assert refused.value.response.status_code == 403
    with connect(url, subprotocols=protocols, origin=ELSEWHERE) as socket:
        assert "ready" in socket.recv(30)
    served.wait_until_free()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:{port}", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("talk.example.com", 200),
        ("evil.example.com", 421),
        ("127.0.0.1.evil.com", 421),
        ("localhost@evil.com", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_names_of_the_host(served: Served, host: str, status: int) -> None:
    port = served.url.rpartition(":")[2]
    answer = served.client.get("/healthz", headers={"Host": host.format(port=port)})
    assert answer.status_code == status


# ------------------------------------------------------------------------------ bodies and pictures


def bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels that says it is huge, and is small."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = zlib.compress(bytes(width // 8 + 1) * 1000, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(50_000, 50_000), (8000, 5001), (1, 2**31 - 1)])
def test_pictures_that_grow_when_they_are_decoded(served: Served, size: tuple[int, int]) -> None:
    content = bomb(*size)
    assert len(content) < 100_000
    answer = served.client.post("/v1/sessions", json={"portrait": upload(content)})
    assert (answer.status_code, kind(answer)) == (400, "bad_request")
    assert len(served.sessions) == 0


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_pictures_of_other_kinds(served: Served, format: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, format)
    answer = served.client.post("/v1/sessions", json={"portrait": upload(file.getvalue())})
    assert (answer.status_code, kind(answer)) == (400, "bad_request")


def test_bodies_end_somewhere(served: Served) -> None:
    limit = served.sessions.settings.max_body_bytes
    large = b"x" * (limit + 1)
    answer = served.client.post("/v1/sessions", content=large)
    assert (answer.status_code, kind(answer)) == (413, "too_large")

    def pieces() -> Iterator[bytes]:  # of no announced length
        for start in range(0, len(large), 2**20):
            yield large[start : start + 2**20]

    answer = served.client.post("/v1/sessions", content=pieces())
    assert (answer.status_code, kind(answer)) == (413, "too_large")


def test_large_bodies_take_turns(served: Served) -> None:
    """More of them than are read at a time; all are answered."""
    content = upload(bytes(2**20))

    def ask(_: int) -> int:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = f"{served.url}/v1/sessions"
        return httpx.post(url, json={"portrait": content}, headers=headers, timeout=60).status_code

    with ThreadPoolExecutor(2 * LARGE_BODIES) as threads:
        answers = list(threads.map(ask, range(2 * LARGE_BODIES)))
    assert set(answers) <= {400, 503} and 400 in answers


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"portrait": {"data": 1}}']
)
def test_bodies_that_are_no_request(served: Served, body: bytes) -> None:
    answer = served.client.post(
        "/v1/sessions", content=body, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, kind(answer)) == (400, "bad_request")


# ------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "name",
    ["notes", "..%2Fnotes", "%2Fetc%2Fpasswd", "green one.png%00", "..", "%2e%2e%2fnotes.txt"],
)
def test_names_are_no_paths(served: Served, name: str) -> None:
    answer = served.client.get(f"/v1/portraits/{name}.png")
    assert (answer.status_code, kind(answer)) == (404, "not_found")
    answer = served.client.post("/v1/sessions", json={"portrait": name})
    assert (answer.status_code, kind(answer)) == (404, "not_found")


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page//etc/passwd",
        "/page/%2fetc/passwd",
        "/page/..\\app.py",
        "/page/%00",
    ],
)
def test_the_page_has_its_own_files_only(anybody: httpx.Client, path: str) -> None:
    request = anybody.build_request("GET", "/")
    request.url = httpx.URL(f"{anybody.base_url}".rstrip("/")).copy_with(raw_path=path.encode())
    assert anybody.send(request).status_code in (401, 404)


def test_answers_say_how_they_may_be_used(served: Served) -> None:
    headers = served.client.get("/v1/options").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "server" not in headers


def test_a_directory_of_portraits(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.jpeg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    assert list(list_portraits(tmp_path)) == ["a", "b"]
