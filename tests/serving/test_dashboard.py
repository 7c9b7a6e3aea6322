"""The dashboard over HTTP: who gets in, what browsers are told to refuse, what the data say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from code2lora.daemon.dashboard.routes import dashboard_routes
from code2lora.serving.app import create_app
from code2lora.serving.door import CODE_LIFE_S, COOKIE_LIFE_S, Door
from code2lora.serving.engine import Engine
from code2lora.serving.guard import TcpAccess
from code2lora.settings import Settings
from code2lora.state_store import Store
from tests.cli.conftest import Known, home, store  # noqa: F401
from tests.gitrepo import GitRepo
from tests.serving.tiny import REPOSITORIES, Provider, Registry, serving_tcp

TOKEN = "the-token-of-the-owner-and-nobody-else"
HOSTILE = "<img src=x onerror=alert(1)>\"'&<script>x</script>\u202e"
API = "/dashboard/api/places"


class Clock:
    """The time, which a test sets."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Served:
    """A dashboard on a port of its own, over a real state store and a real repository."""

    port: int
    door: Door
    clock: Clock
    known: Known

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.origin, headers=headers, timeout=20)

    def login(self, client: httpx.Client, code: str | None = None) -> httpx.Response:
        params = {"code": self.door.new_code() if code is None else code}
        return client.get("/dashboard/login", params=params)


@pytest.fixture
def served(
    engine: Engine,
    registry: Registry,
    home: Settings,  # noqa: F811
    store: Store,  # noqa: F811
    repo: GitRepo,
) -> Iterator[Served]:
    commits = [repo.commit({"a.py": f"x = {n}\n"}, f"change {n}") for n in range(3)]
    known = Known(home, store, repo)
    known.absorb(commits)
    known.publish(commits[1])
    known.publish(commits[2])
    repo.commit({"b.py": "y = 1\n"}, HOSTILE)
    clock = Clock()
    door = Door(TOKEN, clock=clock)

    async def refresh(request: Request) -> JSONResponse:
        return JSONResponse({})

    app = create_app(
        Provider(engine),
        registry,
        extra_routes=[Route("/daemon/refresh", refresh, methods=["POST"])],
        pages=dashboard_routes(home, store, door),
        tcp=TcpAccess(TOKEN, door),
    )
    with serving_tcp(app) as port:
        yield Served(port, door, clock, known)


@pytest.fixture
def browser(served: Served) -> Iterator[httpx.Client]:
    """Logged in, as a browser is."""
    with served.client() as client:
        assert served.login(client).status_code == 303
        yield client


def test_a_code_is_changed_for_a_cookie_that_scripts_and_other_sites_cannot_use(
    served: Served,
) -> None:
    with served.client() as client:
        answer = served.login(client)
        assert answer.status_code == 303
        assert answer.headers["location"] == "/dashboard"
        cookie = answer.headers["set-cookie"]
        assert {part.strip() for part in cookie.split(";")[1:]} == {
            "HttpOnly",
            "Path=/dashboard",
            "SameSite=strict",
            f"Max-Age={int(COOKIE_LIFE_S)}",
        }
        assert TOKEN not in cookie
        assert client.get("/dashboard").status_code == 200


def test_a_code_works_once(served: Served) -> None:
    code = served.door.new_code()
    with served.client() as first, served.client() as second:
        assert served.login(first, code).status_code == 303
        refused = served.login(second, code)
        assert refused.status_code == 401 and "set-cookie" not in refused.headers
        assert second.get(API).status_code == 401


def test_a_code_and_a_cookie_end(served: Served) -> None:
    code = served.door.new_code()
    served.clock.now_s += CODE_LIFE_S + 1
    with served.client() as client:
        assert served.login(client, code).status_code == 401
        assert served.login(client).status_code == 303
        served.clock.now_s += COOKIE_LIFE_S - 1
        assert client.get(API).status_code == 200
        served.clock.now_s += 2
        assert client.get(API).status_code == 401


def test_no_more_codes_are_kept_than_a_person_needs(served: Served) -> None:
    first = served.door.new_code()
    codes = [served.door.new_code() for _ in range(16)]
    with served.client() as client:
        assert served.login(client, first).status_code == 401
        assert served.login(client, codes[0]).status_code == 303


@pytest.mark.parametrize("place", ["//evil.com", "1;x", "-1", "%0d%0aX: y", "٣", "javascript:1"])
def test_a_login_leads_nowhere_else(served: Served, place: str) -> None:
    with served.client() as client:
        code = served.door.new_code()
        answer = client.get("/dashboard/login", params={"code": code, "place": place})
    assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")


def test_a_cookie_outlives_the_worker_but_not_the_token(served: Served) -> None:
    clock = served.clock
    with served.client() as client:
        served.login(client)
        [(name, value)] = client.cookies.items()
    scope = {"path": "/dashboard", "method": "GET", "server": ("127.0.0.1", served.port)}
    headers = httpx.Headers({"cookie": f"{name}={value}", "host": f"127.0.0.1:{served.port}"})
    assert Door(TOKEN, clock=clock).opens_to(scope, headers)  # type: ignore[arg-type]
    assert not Door("another", clock=clock).opens_to(scope, headers)  # type: ignore[arg-type]
    for forged in (value[:-1] + "0", value.replace("1", "2", 1), "", "..", f"9{value}"):
        headers["cookie"] = f"{name}={forged}"
        assert forged == value or not Door(TOKEN, clock=clock).opens_to(scope, headers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard",
        "/dashboard/",
        "/dashboard/static/app.js",
        "/dashboard/api/places",
        "/dashboard/api/places/1",
        "/dashboard/api/places/1/commits",
        "/dashboard/nothing",
        "/dashboard/login",
        "/dashboard/login?code=guess",
    ],
)
def test_nothing_is_told_without_cookie_or_token(served: Served, path: str) -> None:
    with served.client() as client:
        plain = client.get(path)
        page = client.get(path, headers={"accept": "text/html"})
        assert (plain.status_code, page.status_code) == (401, 401)
        assert "code2lora dashboard" in page.text
        for answer in (plain, page):
            assert served.known.repository_id not in answer.text
    with served.client(authorization=f"Bearer {TOKEN}") as owner:
        assert owner.get(path).status_code != 401 or "login" in path


def test_the_cookie_is_good_for_the_pages_alone(served: Served, browser: httpx.Client) -> None:
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    body = {"prompt": "class", "max_tokens": 2}
    headers = {"cookie": cookie, "origin": served.origin}
    for path in ("/v1/completions", "/completion", "/infill", "/daemon/refresh"):
        assert browser.post(path, json=body, headers=headers).status_code == 401
    for path in ("/health", "/metrics", "/v1/models", "/dashboards"):
        assert browser.get(path, headers=headers).status_code == 401
    with served.client(authorization=f"Bearer {TOKEN}") as owner:
        assert owner.post("/daemon/refresh", json={}).status_code == 404


def test_the_page_may_ask_for_completions(served: Served, browser: httpx.Client) -> None:
    body = {"prompt": "class", "max_tokens": 2, "repository": REPOSITORIES[0]}
    path = "/dashboard/api/completions"
    ours = browser.post(path, json=body, headers={"origin": served.origin})
    assert ours.status_code == 200
    assert ours.json()["code2lora"]["repository"] == REPOSITORIES[0]
    assert browser.post(path, json=body).status_code == 403  # no browser leaves the origin out


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.com"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9"},
        {"origin": "http://localhost"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"host": "evil.com"},
    ],
)
def test_other_pages_may_not_use_the_cookie(
    served: Served, browser: httpx.Client, headers: dict[str, str]
) -> None:
    # the client keeps its cookies from another host, a browser whose host was rebound does not
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    headers = headers | {"cookie": cookie}
    answers = [
        browser.get(API, headers=headers),
        browser.get("/dashboard", headers=headers),
        browser.post(
            "/dashboard/api/completions",
            json={"prompt": "x"},
            headers={"origin": served.origin} | headers,
        ),
    ]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert not any("access-control" in name for each in answers for name in each.headers)


def test_browsers_are_told_to_run_nothing_but_ours(served: Served, browser: httpx.Client) -> None:
    with served.client() as stranger:
        answers = [
            *(browser.get(f"/dashboard{path}") for path in ("", "/api/places", "/static/app.js")),
            browser.get("/dashboard/nothing"),
            stranger.get("/dashboard"),
            stranger.get("/dashboard", headers={"accept": "text/html"}),
        ]
    for answer in answers:
        policy = answer.headers["content-security-policy"].split("; ")
        assert policy[:6] == [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src 'self' data:",
            "frame-ancestors 'none'",
        ]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_inline(
    browser: httpx.Client,
) -> None:
    page = browser.get("/dashboard").text
    static = Path(__file__).parents[2] / "code2lora" / "daemon" / "dashboard" / "static"
    for file in static.iterdir():
        served_file = browser.get(f"/dashboard/static/{file.name}")
        assert served_file.content == file.read_bytes()
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, file.name
        assert "innerHTML" not in text and "eval(" not in text and "insertAdjacent" not in text
    assert "<style" not in page and " style=" not in page and " onclick" not in page
    assert page.count("<script") == page.count('<script type="module" src=') == 1
    for name in ("..%2froutes.py", "%2e%2e/routes.py", "../routes.py", "app.js/"):
        assert browser.get(f"/dashboard/static/{name}").status_code in (307, 404)


def test_places_are_listed(served: Served, browser: httpx.Client) -> None:
    [place] = browser.get(API).json()["places"]
    assert place == {
        "worktree": served.known.worktree.id,
        "repository": served.known.repository_id,
        "name": "repo",
        "path": str(served.known.repo.path),
        "branch": None,
    }


def overview(served: Served, client: httpx.Client) -> dict[str, Any]:
    answer = client.get(f"{API}/{served.known.worktree.id}")
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def test_a_place_says_what_is_stored(served: Served, browser: httpx.Client) -> None:
    known = served.known
    known.store.record_failure(known.repository_id, "refresh", HOSTILE, hint="mend it")
    view = overview(served, browser)
    head = known.repo.head
    live = known.store.live_adapter(known.worktree.id)
    assert live is not None
    assert view["head"] == {"commit": head, "branch": "main", "summary": HOSTILE}
    assert view["adapter"] == {
        "commit": live.commit,
        "generation": 2,
        "name": Path(live.path).name,
        "published_at": live.published_at.isoformat(timespec="milliseconds"),
        "n_bytes": live.n_bytes,
        "is_current": False,
        "use": "own",
    }
    assert (view["state"]["step"], view["state"]["behind"]) == (2, 1)
    assert view["state"]["anchor_role"] == "active"
    assert (view["n_states"], view["n_adapters"]) == (3, 2)
    assert [refresh["generation"] for refresh in view["refreshes"]] == [1, 2]
    assert view["refreshes"][1] | {"name": "", "published_at": ""} == {
        "generation": 2,
        "name": "",
        "commit": live.commit,
        "published_at": "",
        "embed_ms": 4.0,
        "advance_ms": 1.0,
        "publish_ms": 7.0,
    }
    assert view["standing"] == {
        "use": "own",
        "gate": "on",
        "gate_use": "own",
        "gain": None,  # nothing is scored, so nothing is said
        "why": "the repository's own adapter: no commit is scored yet",
    }
    assert [failure["message"] for failure in view["failures"]] == [HOSTILE]
    assert (view["problem"], view["backfill"]) == (None, None)


def test_a_place_says_what_its_adapter_gains_and_what_serves(
    served: Served, browser: httpx.Client
) -> None:
    known = served.known
    scored = known.repo.git("rev-parse", "HEAD~1")
    others = [f"{n:040x}" for n in range(12)]
    known.score([*others, scored], use="generic", base=0.25, generic=-0.125)
    view = overview(served, browser)

    standing = view["standing"]
    assert (standing["use"], standing["gain"]["n_commits"]) == ("generic", 13)
    assert standing["gain"]["over_base"]["mean"] == pytest.approx(0.25)
    assert standing["gain"]["over_generic"]["mean"] == pytest.approx(-0.125)
    assert standing["why"].startswith("the generic adapter: 0.125")
    commits = browser.get(f"{API}/{known.worktree.id}/commits").json()["commits"]
    figures = [(c["gain_over_base"], c["gain_over_generic"], c["n_scored_tokens"]) for c in commits]
    assert figures == [(None, None, None), (0.25, -0.125, 100), *[(None, None, None)] * 2]


def test_a_repository_that_is_gone_is_a_problem_and_no_error(
    served: Served, browser: httpx.Client
) -> None:
    served.known.repo.path.rename(served.known.repo.path.with_name("elsewhere"))
    view = overview(served, browser)
    assert view["problem"]
    assert view["adapter"]["generation"] == 2
    refused = browser.get(f"{API}/{served.known.worktree.id}/commits")
    assert refused.status_code == 400 and refused.json()["error"]["message"]


def commits(served: Served, client: httpx.Client, **params: Any) -> dict[str, Any]:
    answer = client.get(f"{API}/{served.known.worktree.id}/commits", params=params)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    content: dict[str, Any] = answer.json()
    return content


def test_commits_are_told_page_by_page(served: Served, browser: httpx.Client) -> None:
    whole = commits(served, browser)
    assert whole["following"] is None and whole["n_lanes"] == 1
    told = whole["commits"]
    assert [each["summary"] for each in told] == [HOSTILE, "change 2", "change 1", "change 0"]
    assert [each["mark"] for each in told] == ["no state", None, None, "anchor"]
    assert [each["generation"] for each in told] == [None, 2, 1, None]
    assert [each["is_live"] for each in told] == [False, True, False, False]
    assert [each["heads"] for each in told] == [["main"], [], [], []]
    assert told[1]["drift"] == 0.25 and told[1]["step"] == 2
    assert told[0]["parent"] == told[1]["commit"]

    first = commits(served, browser, limit=2)
    assert first["commits"] == told[:2]
    second = commits(served, browser, limit=2, before=first["following"])
    assert second["commits"] == told[2:] and second["following"] is None


def test_what_was_left_behind_has_a_lane_down_to_where_it_began(
    served: Served, browser: httpx.Client
) -> None:
    known, repo = served.known, served.known.repo
    root = repo.head
    repo.git("switch", "--quiet", "--create", "side")
    side = [repo.commit({"s.py": f"s = {n}\n"}, f"side {n}") for n in range(2)]
    repo.git("switch", "--quiet", "main")
    ahead = repo.commit({"c.py": "z = 1\n"}, "ahead")
    known.store.set_head(known.worktree.id, side[-1], "side")
    known.absorb(side)
    page = commits(served, browser)
    lanes = {each["commit"]: each["lane"] for each in page["commits"]}
    order = [each["commit"] for each in page["commits"]]
    assert page["n_lanes"] == 2
    assert [lanes[commit] for commit in (*side, ahead, root)] == [1, 1, 0, 0]
    assert order.index(side[1]) < order.index(side[0]) < order.index(root)


def test_commits_between_steps_are_told_from_those_without_a_state(
    served: Served, browser: httpx.Client
) -> None:
    known, repo = served.known, served.known.repo
    more = [repo.commit({"d.py": f"d = {n}\n"}, f"more {n}") for n in range(6)]
    known.absorb(more, between={1, 2, 4}, provisional={5})
    marks = {each["commit"]: each["mark"] for each in commits(served, browser)["commits"]}
    found = [marks[commit] for commit in more]
    expected = ["anchor", "between steps", "between steps", None, "between steps", "provisional"]
    assert found == expected
    pages, before = [], None
    while True:  # no page boundary changes what is said of a commit
        page = commits(served, browser, limit=1, **({"before": before} if before else {}))
        pages += page["commits"]
        before = page["following"]
        if before is None:
            break
    assert {each["commit"]: each["mark"] for each in pages} == marks


def test_an_answer_that_has_not_changed_is_not_sent_again(
    served: Served, browser: httpx.Client
) -> None:
    path = f"{API}/{served.known.worktree.id}"
    tag = browser.get(path).headers["etag"]
    again = browser.get(path, headers={"if-none-match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    served.known.repo.commit({"n.py": "n = 1\n"}, "new")
    assert browser.get(path, headers={"if-none-match": tag}).status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/999", 404),
        ("/99999999999999999999999", 404),
        ("/x", 404),
        ("/{id}/commits?limit=0", 400),
        ("/{id}/commits?limit=201", 400),
        ("/{id}/commits?limit=1e2", 400),
        ("/{id}/commits?before=HEAD", 400),
        ("/{id}/commits?before=--all", 400),
        ("/{id}/commits?before=" + "0" * 40, 400),
    ],
)
def test_what_cannot_be_answered_is_refused(
    served: Served, browser: httpx.Client, path: str, status: int
) -> None:
    answer = browser.get(API + path.replace("{id}", str(served.known.worktree.id)))
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
