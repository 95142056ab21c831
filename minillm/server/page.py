"""The page: a chat, and a look at what the cache keeps. Three files, which ask nobody but this server."""

from importlib.resources import files

from starlette.responses import Response

FILES = {"/": "index.html", "/web/style.css": "style.css", "/web/page.js": "page.js"}  # path -> file
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def page(request):
    """One of FILES."""
    name = FILES[request.url.path]
    data = (files(__package__) / "web" / name).read_bytes()
    return Response(data, media_type=TYPES[name.rpartition(".")[2]], headers=HEADERS)
