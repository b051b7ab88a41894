"""The page: static files, held in memory, so that no path of a request reaches the disk."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, Response

from liveact.serve.errors import not_found

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# `Guard` adds what all answers have: nothing from elsewhere, nothing inline, in no frame.
HEADERS = {
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cache-Control": "no-cache",
}


def page_files() -> APIRouter:
    """The page at / and its files at /page, which everybody may read."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files("liveact.serve") / "page"
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def answer(name: str) -> Response:
        if name not in files:
            raise not_found("page")
        media_type = MEDIA_TYPES[name[name.rindex(".") :]]
        return Response(files[name], media_type=media_type, headers=HEADERS)

    @router.get("/")
    async def index() -> Response:
        return answer("index.html")

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        return answer(name)

    return router
