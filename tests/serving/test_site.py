"""The files of the page: all of them are there, and nothing in them comes from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources

import pytest

from liveact.engine import Engine
from tests.support.paths import PORTRAIT
from tests.support.server import Served, serving

PAGE = resources.files("liveact.serve") / "page"
FILES = {file.name: file.read_text() for file in PAGE.iterdir()}
TOKEN = "a-token-that-is-long"


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine, token=TOKEN, example=PORTRAIT) as found:
        yield found


def test_every_file_is_served_with_its_type_and_the_policy(served: Served) -> None:
    types = {
        "html": "text/html",
        "css": "text/css",
        "js": "text/javascript",
        "svg": "image/svg+xml",
    }
    assert set(types) == {name.split(".")[1] for name in FILES}
    for name, text in FILES.items():
        answer = served.client.get("/" if name == "index.html" else f"/page/{name}")
        assert (answer.status_code, answer.text) == (200, text)
        assert answer.headers["content-type"].startswith(types[name.split(".")[1]])
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]


def test_the_page_needs_no_token_and_what_it_offers_does(served: Served) -> None:
    served.client.headers.pop("Authorization")
    try:
        assert served.client.get("/").status_code == 200
        assert served.client.get("/page/app.js").status_code == 200
        for path in ("/v1/options", "/v1/example", "/v1/portraits"):
            assert served.client.get(path).status_code == 401
    finally:
        served.client.headers["Authorization"] = f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    "name", ["none.js", "../settings.py", "..%2fsettings.py", "%2e%2e/app.py", "a/b", ".js", "é"]
)
def test_nothing_else_is_served(served: Served, name: str) -> None:
    assert served.client.get(f"/page/{name}").status_code == 404


def test_what_the_files_name_is_there_and_nothing_is_from_elsewhere() -> None:
    for name, text in FILES.items():
        for found in re.findall(r'(?:src|href)="([^"]+)"', text):
            assert found.removeprefix("page/") in FILES, f"{name}: {found}"
        for found in re.findall(r'from "\./([^"]+)"', text):
            assert found in FILES, f"{name}: {found}"
        assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    # The policy allows nothing inline.
    assert not re.search(r"<style|style=|<script>|\son\w+=", FILES["index.html"])


def test_every_element_that_the_page_asks_for_exists() -> None:
    ids = set(re.findall(r'id="([^"]+)"', FILES["index.html"]))
    asked = set(re.findall(r'(?:\$|onClick)\("([^"]+)"', FILES["app.js"]))
    assert asked <= ids


def test_the_example_is_offered_where_there_is_one(served: Served, engine: Engine) -> None:
    path = served.client.get("/v1/options").json()["example"]
    assert served.client.get(path).content == PORTRAIT.read_bytes()
    with serving(engine) as other:
        assert other.client.get("/v1/options").json()["example"] is None
        assert other.client.get("/v1/example").status_code == 404
