"""Media from addresses: real servers with TLS on this machine, which the fetcher may dial only because the test says so."""

import asyncio
import contextlib
import socket
import ssl

import pytest
import trustme

from pipelines.serving.errors import ApiError
from pipelines.serving.media.fetching import REDIRECTS, Fetcher
from pipelines.serving.media.parts import Medium

PICTURE = b"\x89PNG" + bytes(range(256)) * 20
LIMIT = len(PICTURE)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def trusting(authority):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


class Server:
    """Answers each path with bytes, and remembers what it was asked."""

    def __init__(self, port):
        self.port, self.asked, self.connections, self.names = port, [], 0, []
        self.answers = {"/a.png": answer(PICTURE)}

    async def __call__(self, reader, writer):
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.asked.append(head)
            parts = self.answers.get(head.split()[1], answer(b"", status="404 Not Found"))
            for part in parts if isinstance(parts, list) else [parts]:
                if part is None:
                    await reader.read()  # until the client has left
                else:
                    writer.write(part)
                    await writer.drain()
        writer.close()


def answer(body=b"", kind="image/png", status="200 OK", length=True, **headers) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}"] if kind else [f"HTTP/1.1 {status}"]
    lines += [f"Content-Length: {len(body)}"] if length else ["Connection: close"]
    return "\r\n".join([*lines, *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()), "", ""]).encode() + body


def redirect(to: str, status="302 Found") -> bytes:
    return answer(status=status, Location=to)


@contextlib.asynccontextmanager
async def served(authority, name="media.test"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = Server(listening.getsockname()[1])
        context.sni_callback = lambda connection, name, _: server.names.append(name)
        async with await asyncio.start_server(server, sock=listening, ssl=context):
            yield server


class Names:
    """A resolver, and what it was asked."""

    def __init__(self, *addresses):
        self.addresses, self.asked = list(addresses) or ["127.0.0.1"], []

    async def __call__(self, host, port):
        self.asked.append(host)
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in self.addresses]
        return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for kind, address in zip(kinds, self.addresses)]


def on_this_machine(address):
    return address == "127.0.0.1"


@pytest.fixture
def fetch(authority, trusting):
    """`fetch(url, answers, ...)`: the bytes; `{}` in the URL and in redirects is the host and the port of the server."""

    def run(url, answers=None, names=None, hosts=("{}",), server=None, kind="image", certificate="media.test", **settings):
        async def scenario():
            async with served(authority, certificate) as running:
                place = f"media.test:{running.port}"
                for path, parts in (answers or {}).items():
                    running.answers[path] = [
                        part.replace(b"{}", place.encode()) if part else part for part in (parts if isinstance(parts, list) else [parts])
                    ]
                if server is not None:
                    server.append(running)
                options = {"allowed": on_this_machine, "resolve": names or Names(), "tls": trusting, **settings}
                fetcher = Fetcher([host.format(place) for host in hosts], LIMIT, options.pop("timeout_s", 20), 8, **options)
                return await fetcher(Medium(kind, url.replace("{}", place), "here"))

        return asyncio.run(scenario())

    return run


@pytest.fixture
def refusal(fetch):
    def run(*args, **settings) -> ApiError:
        with pytest.raises(ApiError) as caught:
            fetch(*args, **settings)
        assert (caught.value.status, caught.value.param) == (400, "here")
        return caught.value

    return run


def test_a_picture(fetch):
    names, server = Names(), []
    assert fetch("https://{}/a.png#part", names=names, server=server) == PICTURE
    assert names.asked == ["media.test"], "resolved once"
    assert server[0].names == ["media.test"], "TLS names the host, not the address"
    head = server[0].asked[0].lower()
    assert head.startswith("get /a.png http/1.1\r\nhost: media.test:")
    assert "cookie" not in head
    assert "authorization" not in head


@pytest.mark.parametrize("kind", ["image/jpeg", "IMAGE/PNG; charset=x", "application/octet-stream", None])
def test_media_types(fetch, kind):
    assert fetch("https://{}/x", {"/x": answer(PICTURE, kind)}) == PICTURE


@pytest.mark.parametrize("kind", ["text/html", "video/mp4", "application/json", "multipart/mixed"])
def test_other_media_types(refusal, kind):
    assert "is not that of an image" in refusal("https://{}/x", {"/x": answer(PICTURE, kind)}).message


def test_a_video(fetch):
    assert fetch("https://{}/x", {"/x": answer(PICTURE, "video/mp4")}, kind="video") == PICTURE


@pytest.mark.parametrize(
    "url",
    [
        "http://{}/a.png", "HTTP://{}/a.png", "https:", "https:/{}/a.png", "https:///a.png", "https:{}/a.png", "https://", "https://{}\\@a/a.png",
        "https://user@{}/a.png", "https://user:secret@{}/a.png", "https://:secret@{}/a.png", "https://{}/a b.png", "https://{}/a\n.png",
        "https://{}/\u00fc.png", "https://{}:1/a.png", "https://example.com/", "https://{}.example.com/", "https://media.test/a.png",
        "https://media.test.:443/", "https://127.0.0.1/", "https://[::1]/", "https://0x7f.1/", "https://[::ffff:127.0.0.1]/", "https://[/",
        "https://media.test:port/", "https://media.test:99999/", "https://{}/" + "x" * 5000, "https://{}@example.com/a.png",
        "https://example.com#@{}/a.png", "https://example.com?@{}/a.png", "https://MEDIA\u3002test/",
    ],
)  # fmt: skip
def test_addresses_that_are_not_fetched(refusal, url):
    names, server = Names(), []
    assert refusal(url, names=names, server=server).code == "url_not_supported"
    assert names.asked == []
    assert server[0].connections == 0


def test_no_error_shows_a_password(refusal):
    assert "secret" not in refusal("https://user:secret@{}/a.png").message


@pytest.mark.parametrize("addresses", [["127.0.0.2"], ["127.0.0.1", "10.0.0.1"], ["::1"], ["127.0.0.1", "fe80::1"], []])
def test_every_address_of_a_name_must_be_allowed(refusal, addresses):
    names, server = Names("127.0.0.1"), []
    names.addresses = addresses
    error = refusal("https://{}/a.png", names=names, server=server)
    assert (error.code, error.message) == ("url_not_supported", "here: 'media.test' is not at a public address.")
    assert server[0].connections == 0


def test_without_the_tests_permission_this_machine_is_not_dialled(authority, trusting):
    """As it is used: the system's resolver, public addresses only."""

    async def scenario():
        async with served(authority, "localhost") as server:
            host = f"localhost:{server.port}"
            medium = Medium("image", f"https://{host}/a.png", "here")
            with pytest.raises(ApiError, match="not at a public address"):
                await Fetcher([host], LIMIT, 20, 8, tls=trusting)(medium)
            assert server.connections == 0
            loopback = {"127.0.0.1", "::1"}.__contains__
            assert await Fetcher([host], LIMIT, 20, 8, tls=trusting, allowed=loopback)(medium) == PICTURE

    asyncio.run(scenario())


def test_a_certificate_of_another_name_or_authority(refusal):
    assert "certificate is not accepted" in refusal("https://{}/a.png", certificate="other.test").message
    assert "certificate is not accepted" in refusal("https://{}/a.png", tls=ssl.create_default_context()).message


def test_redirects(fetch):
    names = Names()
    answers = {
        "/1": redirect("/2", "307 Temporary Redirect"),
        "/2": redirect("https://{}/3"),
        "/3": redirect("a.png", "301 Moved Permanently"),
    }
    assert fetch("https://{}/1", answers, names=names) == PICTURE
    assert names.asked == ["media.test"] * 4, "each hop is resolved and checked"


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("http://{}/a.png", "only https"),
        ("//example.com/a.png", "does not fetch from 'example.com'"),
        ("https://169.254.169.254/latest", "does not fetch from '169.254.169.254'"),
        ("https://media.test/a.png", "another port"),
        ("https://user@{}/a.png", "user or a password"),
        ("file:///etc/passwd", "only https"),
        ("https://[::1", "could not be fetched"),
        ("data:image/png;base64,QQ==", "only https"),
    ],
)
def test_redirects_that_are_not_followed(refusal, to, words):
    server = []
    assert words in refusal("https://{}/1", {"/1": redirect(to)}, hosts=["{}", "media.test"], server=server).message
    assert len(server[0].asked) == 1


def test_a_name_that_moves_between_two_hops(refusal):
    class Moving(Names):
        async def __call__(self, host, port):
            result = await super().__call__(host, port)
            self.addresses = ["10.0.0.1"]
            return result

    server = []
    error = refusal("https://{}/1", {"/1": redirect("/a.png")}, names=Moving(), server=server)
    assert "not at a public address" in error.message
    assert len(server[0].asked) == 1


def test_too_many_redirects(refusal):
    server = []
    assert f"more than {REDIRECTS} times" in refusal("https://{}/1", {"/1": redirect("/1")}, server=server).message
    assert len(server[0].asked) == REDIRECTS + 1


@pytest.mark.parametrize("length", [True, False])
def test_too_many_bytes(refusal, length):
    big = answer(PICTURE + b"x", length=length)
    assert f"more than the {LIMIT:,} bytes" in refusal("https://{}/x", {"/x": big}).message
    endless = answer(length=False) + b"x" * LIMIT
    assert "more than the" in refusal("https://{}/x", {"/x": [endless, b"x", None]}).message


def test_too_slow(refusal):
    for parts in ([None], [answer(length=False) + b"x", None]):
        assert "did not come within 0.5 s" in refusal("https://{}/x", {"/x": parts}, timeout_s=0.5).message

    class Slow(Names):
        async def __call__(self, host, port):
            await asyncio.Event().wait()

    assert "did not come within 0.5 s" in refusal("https://{}/a.png", names=Slow(), timeout_s=0.5).message


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (answer(PICTURE, Content_Encoding="gzip"), "compressed"),
        (answer(status="404 Not Found"), "status 404"),
        (answer(status="204 No Content"), "status 204"),
        (answer(status="304 Not Modified"), "status 304"),
        (answer(status="302 Found"), "status 302"),
        (b"garbage", "cannot be reached"),
        (b"", "cannot be reached"),
        (answer(PICTURE)[:-7], "cannot be reached"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "cannot be reached"),
    ],
)
def test_answers_that_are_no_file(refusal, parts, words):
    error = refusal("https://{}/x", {"/x": parts})
    assert words in error.message
    assert error.code == "invalid_image_url"


def test_nobody_listens_and_no_such_name(refusal):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "cannot be reached" in refusal(f"https://media.test:{port}/a.png", hosts=[f"media.test:{port}"]).message

    class Unknown(Names):
        async def __call__(self, host, port):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert "cannot be reached" in refusal("https://{}/a.png", names=Unknown()).message


def test_places(authority, trusting):
    async def scenario():
        async with served(authority) as server:
            server.answers["/slow"] = [None]
            host = f"media.test:{server.port}"
            fetcher = Fetcher([host], LIMIT, 60, 1, allowed=on_this_machine, resolve=Names(), tls=trusting)
            first = asyncio.create_task(fetcher(Medium("image", f"https://{host}/slow", "here")))
            await asyncio.sleep(0)
            with pytest.raises(ApiError) as caught:
                await fetcher(Medium("image", f"https://{host}/a.png", "here"))
            assert caught.value.status == 429
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert await fetcher(Medium("image", f"https://{host}/a.png", "here")) == PICTURE

    asyncio.run(scenario())
