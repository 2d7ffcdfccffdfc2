"""The playground's page and files over HTTP."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import httpx
import pytest

import serve_app

from .scripted import error_of

FOLDER = Path(serve_app.__file__).parent / "playground"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.html" and path.suffix != ".md")
# Other projects' files; libraries.md lists them.
LIBRARIES = ("marked.js",)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@pytest.mark.parametrize("path", ["/", *(f"/playground/{name}" for name in FILES)])
async def test_every_file_has_its_type_and_a_strict_policy(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] == TYPES.get(path.rpartition(".")[2], "text/html")
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.content == (FOLDER / (path.rpartition("/")[2] or "index.html")).read_bytes()


async def test_a_file_is_revalidated_by_its_etag(client: httpx.AsyncClient) -> None:
    first = await client.get("/playground/app.js")
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        again = await client.get("/playground/app.js", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    changed = await client.get("/playground/app.js", headers={"if-none-match": '"other"'})
    assert (changed.status_code, changed.content) == (200, first.content)
    assert (await client.get("/")).headers["etag"] != etag


@pytest.mark.parametrize(
    "name", ["nope.js", "index.html", "", "..%2fapi%2fpages.py", "a/b.js", "../api/pages.py", "libraries.md"]
)
async def test_no_other_file_is_served(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/playground/{name}")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")


async def test_pages_take_get_and_head_only(client: httpx.AsyncClient) -> None:
    assert (await client.head("/")).status_code == 200
    answer = await client.post("/playground/app.js", json={})
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_the_page_loads_only_its_own_files_and_has_no_inline_code() -> None:
    page = (FOLDER / "index.html").read_text()
    named = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page))
    assert named == {f"playground/{name}" for name in ("app.js", "content.css", "icon.svg", "style.css", "theme.js")}
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", page) == []


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js") and name not in LIBRARIES])
def test_no_module_writes_markup_and_each_is_imported(name: str) -> None:
    source = (FOLDER / name).read_text()
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", source) == []
    imported = set(re.findall(r'from "\./([\w.]+)"', "".join((FOLDER / other).read_text() for other in FILES)))
    assert name in imported | {"app.js", "theme.js"}


def test_every_library_is_the_listed_release_with_its_licence() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| ([\d.]+) \| `(\w+)` \|$", (FOLDER / "libraries.md").read_text(), re.M)
    assert tuple(file for file, *_ in rows) == LIBRARIES
    for file, package, version, sha256 in rows:
        content = (FOLDER / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
        assert f"{package} v{version} " in content[:200].decode()
        assert "Permission is hereby granted" in (FOLDER / f"{package}.LICENSE.md").read_text()
