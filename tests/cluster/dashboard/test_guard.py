"""Who may see and do what; no name leads out of the store; every answer says what it may load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from cluster.dashboard import guard
from cluster.dashboard.app import create_app
from cluster.dashboard.guard import COOKIE, FORGERY_HEADER, POLICY
from cluster.dashboard.store_view import StoreView
from tests.cluster.dashboard.records import new_run, train

TOKEN = "töken of 1 line"
HERE = "http://localhost:9870"
HTML = {"accept": "text/html"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    record = new_run(tmp_path / "store")
    train(record, 1, 5)
    record.close()
    return tmp_path / "store"


def application(store: Path, **options: Any) -> FastAPI:
    app = create_app(StoreView(str(store), store.parent / "cache"), **{"hosts": ["localhost", "::1"]} | options)

    @app.post("/api/change")
    def change() -> dict[str, str]:
        return {"message": "changed"}

    @app.get("/api/fault")
    def fault() -> None:
        raise ZeroDivisionError

    return app


def client(store: Path, **options: Any) -> TestClient:
    return TestClient(application(store, **options), HERE, raise_server_exceptions=False, follow_redirects=False)


def log_in(asked: TestClient, token: str = TOKEN) -> Any:
    return asked.post("/login", data={"token": token})


def forgery_token(asked: TestClient) -> str:
    found = re.search(r'name="forgery-token" content="([^"]+)"', asked.get("/", headers=HTML).text)
    assert found
    return found[1]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:9870", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:9870", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example@localhost", 421),
        ("localhost/static/?", 421),
        ("localhost:9870#", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_it_answers_under_its_own_names_alone(store: Path, host: str, status: int) -> None:
    assert client(store).get("/api/runs", headers={"host": host}).status_code == status


def test_without_a_token_nothing_is_shown(store: Path) -> None:
    asked = client(store, token=TOKEN)
    for path in ("/", "/api/runs", "/api/runs/run", "/api/openapi.json", "/runs/run", "/nothing", "/api/stream"):
        assert asked.get(path).status_code == 401, path
        answer = asked.get(path, headers=HTML)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path
        assert "run" not in answer.text
    assert asked.post("/api/change").status_code == 401
    assert asked.get("/static/style.css").status_code == 200
    assert "password" in asked.get("/login").text


@pytest.mark.parametrize("path", ["//static/", "/static/../api/runs", "/static/%2e%2e/api/runs", "/login/../api/runs"])
def test_no_other_way_of_writing_a_path_goes_past_the_token(store: Path, path: str) -> None:
    answer = client(store, token=TOKEN).get(path)
    assert answer.status_code in {401, 404} and "loss" not in answer.text


def test_a_host_that_is_half_a_path_does_not_go_past_the_token(store: Path) -> None:
    asked = client(store, token=TOKEN, hosts=[])
    assert asked.get("/api/runs", headers={"host": "localhost/static/?"}).status_code == 421
    assert asked.get("/api/runs", headers={"host": "localhost/login?"}).status_code == 421


def test_the_token_is_exchanged_for_a_cookie(store: Path) -> None:
    asked = client(store, token=TOKEN)
    assert log_in(asked, "another").headers["location"] == "/login?wrong=1"
    assert asked.get("/api/runs").status_code == 401
    answer = log_in(asked, f" {TOKEN}\n")
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert asked.get("/api/runs").status_code == 200
    for wrong in ("", "x", "t"):
        other = client(store, token=TOKEN)
        other.cookies.set(COOKIE, wrong)
        assert other.get("/api/runs").status_code == 401


def test_a_cookie_of_a_server_that_has_ended_is_worth_nothing(store: Path) -> None:
    old, new = client(store, token=TOKEN), client(store, token=TOKEN)
    log_in(old)
    new.cookies = old.cookies
    assert (old.get("/api/runs").status_code, new.get("/api/runs").status_code) == (200, 401)


def test_programs_send_the_token_itself(store: Path) -> None:
    asked = client(store, token=TOKEN)
    for given, status in ((TOKEN, 200), (TOKEN + "x", 401), (TOKEN[:-1], 401), ("", 401)):
        answer = asked.get("/api/runs", headers={"authorization": f"Bearer {given}".encode()})
        assert answer.status_code == status
    assert asked.get("/api/runs", headers={"authorization": TOKEN.encode()}).status_code == 401
    bearer = {"authorization": f"Bearer {TOKEN}".encode()}
    assert asked.post("/api/change", headers=bearer).status_code == 200
    assert asked.post("/api/change", headers=bearer | {"origin": "http://evil.example"}).status_code == 403


def test_secrets_are_compared_in_constant_time(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    asked = client(store, token=TOKEN)
    log_in(asked)
    asked.get("/api/runs", headers={"authorization": "Bearer x"})
    asked.post("/api/change", headers={FORGERY_HEADER: "x"})
    assert {TOKEN.encode(), f"Bearer {TOKEN}".encode()} < set(compared) and len(set(compared)) == 4


def test_a_form_that_is_too_long_is_not_read(store: Path) -> None:
    asked = client(store, token=TOKEN)
    assert log_in(asked, "x" * 5000).status_code == 413
    for body in (b"", b"token", b"token=%ff%00", b"\xff\xfe", b"token=a&token=" + TOKEN.encode()):
        assert asked.post("/login", content=body).status_code == 303
        assert asked.get("/api/runs").status_code == 401


@pytest.mark.parametrize("token", [None, TOKEN])
def test_what_changes_something_comes_from_a_page_of_this_server(store: Path, token: str | None) -> None:
    asked = client(store, token=token)
    log_in(asked)
    good = {FORGERY_HEADER: forgery_token(asked)}
    assert asked.post("/api/change").status_code == 403
    assert asked.post("/api/change", headers={FORGERY_HEADER: "x"}).status_code == 403
    assert asked.post("/api/change", headers=good).status_code == 200
    assert asked.post("/api/change", headers=good | {"origin": HERE}).status_code == 200
    for origin in ("http://evil.example", "null", "", "http://localhost", "http://localhost:9871", "http://[::1"):
        assert asked.post("/api/change", headers=good | {"origin": origin}).status_code == 403, origin
    for method in ("PUT", "DELETE", "PATCH"):
        assert asked.request(method, "/api/change").status_code == 403
    assert asked.get("/api/change").status_code == 405


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/api/runs", 200),
        ("/static/style.css", 200),
        ("/static/nothing", 404),
        ("/static/../guard.py", 404),
        ("/nothing", 404),
        ("/api/runs/nothing", 404),
        ("/api/runs/run/series", 422),
        ("/api/fault", 500),
    ],
)
def test_every_answer_says_what_it_may_load(store: Path, path: str, status: int) -> None:
    answers = [client(store).get(path), client(store).get(path, headers={"host": "evil.example"})]
    answers += [client(store, token=TOKEN).get(path, headers=headers) for headers in ({}, HTML)]
    assert answers[0].status_code == status
    for answer in answers:
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
    assert "unsafe" not in POLICY and "*" not in POLICY


def test_browsers_keep_static_files_by_their_content_and_nothing_else(store: Path) -> None:
    asked = client(store)
    page = asked.get("/", headers=HTML).text
    address = re.search(r'"(/static/style.css\?[^"]+)"', page)
    assert address
    assert "immutable" in asked.get(address[1]).headers["cache-control"]
    assert asked.get("/static/style.css").headers["cache-control"] == "no-cache"
    assert asked.get("/static/nothing?x").headers["cache-control"] == "no-store"
    assert asked.get("/api/runs").headers["cache-control"] == "no-store"


def names_that_lead_away(store: Path) -> list[str]:
    outside = store.parent / "outside"
    record = new_run(store.parent, "outside")
    record.close()
    (store / "link").symlink_to(outside)
    (store / "sub").mkdir()
    (store / "sub" / "inner").symlink_to(outside)
    return [
        "%2e%2e",
        "%2e%2e%2foutside",
        "..%2foutside",
        "..%5coutside",
        "run%2f..%2frun",
        "run%2f",
        "%2f" + str(outside)[1:].replace("/", "%2f"),
        str(outside)[1:],
        "run%00",
        "%00",
        "run%00%2f..",
        "link",
        "sub%2finner",
        "run.yaml",
        "x" * 300,
        "%ff%fe",
        "%ed%a0%80",
        "run%0a",
        "RUN%20",
    ]


def test_no_name_leads_out_of_the_store(store: Path) -> None:
    asked = client(store)
    for name in names_that_lead_away(store):
        for path in (
            "/api/runs/{}",
            "/runs/{}",
            "/api/runs/{}/events",
            "/api/runs/{}/sparkline",
            "/api/runs/{}/stream",
        ):
            answer = asked.get(path.format(name))
            assert answer.status_code in {404, 405, 307}, (path, name, answer.status_code)
            assert "started" not in answer.text
    assert [row["run"] for row in asked.get("/api/runs").json()] == ["run"]


def test_a_link_within_the_store_is_a_run(store: Path) -> None:
    (store / "other").symlink_to(store / "run")
    assert client(store).get("/api/runs/other").status_code == 200


@pytest.mark.parametrize(
    "query", ["start=nan", "start=inf&stop=-inf", "smooth=99999999999999999999", "buckets=0", "x=y"]
)
def test_odd_values_are_answered(store: Path, query: str) -> None:
    assert client(store).get(f"/api/runs/run/series?metric=loss&{query}").status_code in {200, 422}
    assert client(store).get("/api/runs/run/series?metric=nothing").json()["x"] == []
