"""Tokens, sessions and the audit log in the database: what is kept, checked and ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.access.admission import BOOTSTRAP, Access, Credentials
from foreshock.api.access.audit import AuditLog
from foreshock.api.access.principal import ANYONE, NOBODY, SCOPES, Grant, GrantError, Principal
from foreshock.api.access.tables import audit, sessions, tokens
from foreshock.api.access.tokens import TokenBook, UnknownToken, digest_of, id_of
from foreshock.api.problems import Problem
from foreshock.api.registry import Registry
from foreshock.api.settings import Settings

CHOSEN = "a-chosen-token-of-some-length"
READ = Grant(frozenset({"read"}), frozenset({"a"}))
HOUR = timedelta(hours=1)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(tmp_path / "registry.sqlite")
    yield made
    made.close()


@pytest.fixture
def book(registry: Registry) -> TokenBook:
    return TokenBook(registry)


def access_of(registry: Registry, **settings: Any) -> Access:
    return Access(registry, Settings(**settings))


def now() -> datetime:
    return datetime.now(UTC)


def test_a_token_is_its_id_and_256_random_bits_and_only_its_digest_is_kept(
    registry: Registry, book: TokenBook
) -> None:
    issued = book.create("job", READ, by="me")
    assert id_of(issued.secret) == issued.token.id
    assert len(issued.secret.split("_", 2)[2]) == 43
    assert book.create("job", READ, by="me").secret != issued.secret
    with registry.engine.begin() as connection:
        stored = repr(connection.execute(sa.select(tokens)).all())
    assert digest_of(issued.secret) in stored
    assert issued.secret.split("_", 2)[2] not in stored
    for shown in (repr(issued), str(issued.token), repr(Credentials(issued.secret))):
        assert issued.secret not in shown
        assert digest_of(issued.secret) not in shown


@given(text=st.text(max_size=80))
def test_no_other_text_is_a_token(text: str) -> None:
    assert id_of(text) is None or text.startswith("fsk_")


def test_only_the_very_secret_matches(book: TokenBook) -> None:
    secret = book.create("job", READ, by="me").secret
    other = book.create("job", READ, by="me").secret
    # Id of one, secret of the other.
    mixed = secret[:17] + other[17:]
    for wrong in (secret[:-1], secret + "A", secret.swapcase(), mixed, "", "fsk_"):
        assert book.match(wrong, now()) is None, wrong
    found = book.match(secret, now())
    assert found is not None
    assert found.grant == READ


def test_a_rotated_token_takes_both_secrets_for_the_grace_period(book: TokenBook) -> None:
    old = book.create("job", READ, by="me")
    new = book.rotate(old.token.id, grace=HOUR)
    assert new.token.id == old.token.id
    for moment, taken in ((now(), True), (now() + 2 * HOUR, False)):
        assert (book.match(old.secret, moment) is not None) is taken
        assert book.match(new.secret, moment) is not None
    newest = book.rotate(old.token.id, grace=timedelta(0))
    assert book.match(new.secret, now()) is None
    assert book.match(newest.secret, now()) is not None


def test_rotation_renews_the_lifetime_and_never_prolongs_the_old_secret(book: TokenBook) -> None:
    old = book.create("job", READ, by="me", lifetime=HOUR)
    new = book.rotate(old.token.id, grace=10 * HOUR)
    assert new.token.expires_at is not None
    assert old.token.expires_at is not None
    assert new.token.expires_at - new.token.issued_at == HOUR
    assert new.token.previous_until == old.token.expires_at


def test_revoked_and_expired_tokens_are_told_apart_and_neither_is_in_force(
    book: TokenBook,
) -> None:
    ended = book.create("job", READ, by="me")
    assert book.revoke(ended.token.id).lapsed(now()) == "was revoked"
    again = book.revoke(ended.token.id)
    assert again.revoked_at == book.find(ended.token.id).revoked_at  # type: ignore[union-attr]
    short = book.create("job", READ, by="me", lifetime=HOUR)
    assert short.token.lapsed(now()) is None
    assert short.token.lapsed(now() + HOUR) == "has expired"
    assert book.in_force(now())
    assert not book.in_force(now() + HOUR)
    assert not book.empty, "a service whose tokens have all ended is not an open one"


def test_what_is_not_there_or_ended_is_not_rotated(book: TokenBook) -> None:
    ended = book.create("job", READ, by="me").token.id
    book.revoke(ended)
    for token_id in (ended, "absent"):
        with pytest.raises(UnknownToken, match=token_id):
            book.rotate(token_id, grace=HOUR)
    with pytest.raises(UnknownToken):
        book.revoke("absent")


@pytest.mark.parametrize("name", ["", " ", "x" * 129, "line\nbreak"])
def test_names_are_for_people(book: TokenBook, name: str) -> None:
    with pytest.raises(GrantError, match="name"):
        book.create(name, READ, by="me")


@pytest.mark.parametrize(
    ("scopes", "projects", "named"),
    [
        ([], None, "scopes are nothing"),
        (["root"], None, "'root'"),
        (["read"], [], "project"),
        (["read"], ["a b"], "'a b'"),
    ],
)
def test_grants_that_make_no_sense_are_refused(
    scopes: list[Any], projects: list[str] | None, named: str
) -> None:
    with pytest.raises(GrantError, match=named):
        Grant(frozenset(scopes), None if projects is None else frozenset(projects))


NAMES = st.frozensets(st.sampled_from("abc"), min_size=1)
GRANTS = st.builds(Grant, st.frozensets(st.sampled_from(SCOPES), min_size=1), st.none() | NAMES)


@given(holder=GRANTS, wanted=GRANTS)
def test_a_grant_covers_only_what_it_sees(holder: Grant, wanted: Grant) -> None:
    probe = wanted.projects or frozenset("abcd")
    assert holder.covers(wanted.projects) <= all(holder.sees(project) for project in probe)
    if wanted.projects is not None:
        assert holder.covers(wanted.projects) == wanted.projects.issubset(
            holder.projects or wanted.projects
        )


def test_nobody_may_do_nothing() -> None:
    assert not any(NOBODY.may(scope) for scope in SCOPES)
    assert not NOBODY.sees("default")
    assert NOBODY.projects == frozenset()


def test_default_means_the_one_project_of_a_token() -> None:
    one = Principal("i", "n", READ)
    assert (one.home("default"), one.home("b")) == ("a", "b")
    both = Principal("i", "n", Grant(frozenset({"read"}), frozenset({"a", "default"})))
    assert both.home("default") == "default"
    assert ANYONE.home("default") == "default"


def test_uses_are_written_with_the_flush_not_per_request(
    registry: Registry, book: TokenBook
) -> None:
    token = book.create("job", READ, by="me").token
    writes = []
    sa.event.listen(
        registry.engine,
        "before_cursor_execute",
        lambda *call: writes.append(call[2]) if "UPDATE" in call[2] else None,
    )
    for _ in range(100):
        book.used(token.id, now())
    assert book.list()[0].last_used is None
    assert writes == []
    book.flush()
    assert len(writes) == 1
    used = book.list()[0].last_used
    assert used is not None
    assert now() - used < timedelta(minutes=1)


def test_what_another_process_changed_is_noticed(tmp_path: Path, registry: Registry) -> None:
    access = access_of(registry, token=CHOSEN)
    elsewhere = Registry(tmp_path / "registry.sqlite")
    try:
        secret = TokenBook(elsewhere).create("job", READ, by="other").secret
    finally:
        elsewhere.close()
    deadline = time.monotonic() + 10
    while (known := access.tokens.match(secret, now())) is None and time.monotonic() < deadline:
        time.sleep(0.1)
        access.refresh()
    assert known is not None


def refused(access: Access, given: Credentials) -> Problem:
    with pytest.raises(Problem) as caught:
        access.admit(given)
    return caught.value


def test_the_service_is_open_until_the_first_token(registry: Registry) -> None:
    access = access_of(registry)
    assert access.admit(Credentials(address="::1")).grant == ANYONE.grant
    token = access.tokens.create("first", READ, by="me").token
    assert not access.open
    assert refused(access, Credentials(address="::1")).status == 401
    access.tokens.revoke(token.id)
    assert not access.open
    assert not access.usable


def test_why_a_token_is_refused_is_told_only_to_its_holder(registry: Registry) -> None:
    access = access_of(registry, token=CHOSEN)
    issued = access.tokens.create("job", READ, by="me")
    access.tokens.revoke(issued.token.id)
    assert "was revoked" in refused(access, Credentials(issued.secret)).detail
    guess = issued.secret[:-1] + ("A" if issued.secret[-1] != "A" else "B")
    assert "revoked" not in refused(access, Credentials(guess)).detail


def test_guesses_lock_the_address_but_no_made_token(registry: Registry) -> None:
    access = access_of(registry, token=CHOSEN)
    made = access.tokens.create("job", READ, by="me").secret
    statuses = [
        refused(access, Credentials(f"guess-number-{i:04}", address="10.0.0.1")).status
        for i in range(12)
    ]
    assert statuses == [401] * 10 + [429] * 2
    # The chosen token is not even looked at, or guessing would go on behind the 429.
    problem = refused(access, Credentials(CHOSEN, address="10.0.0.1"))
    assert problem.status == 429
    assert 1 <= int(problem.headers["Retry-After"]) <= 6
    assert access.admit(Credentials(made, address="10.0.0.1")).name == "job"
    assert access.admit(Credentials(CHOSEN, address="10.0.0.2")).id == BOOTSTRAP.id
    actions = [entry.action for entry in access.audit.page(limit=100)]
    assert actions.count("auth.failed") == 10
    assert actions.count("auth.locked") == 1


def test_an_old_token_sent_again_and_again_locks_nobody_out(registry: Registry) -> None:
    access = access_of(registry, token=CHOSEN)
    for _ in range(200):
        assert refused(access, Credentials("the-token-of-last-year", address="a")).status == 401
    assert access.admit(Credentials(CHOSEN, address="a")).id == BOOTSTRAP.id
    assert len(access.audit.page(limit=100)) == 1


def sign_in(access: Access, text: str, *scopes: Any) -> str:
    return access.sign_in(text, frozenset(scopes or ("read",)), "10.0.0.1")[0]


def test_a_session_may_less_than_its_token(registry: Registry) -> None:
    access = access_of(registry, token=CHOSEN)
    principal = access.admit(Credentials(cookie=sign_in(access, CHOSEN)))
    assert principal.session
    assert [scope for scope in SCOPES if principal.may(scope)] == ["read"]
    secret = access.tokens.create("job", READ, by="me").secret
    with pytest.raises(Problem, match="write"):
        sign_in(access, secret, "read", "write")
    kept = access.admit(Credentials(cookie=sign_in(access, secret)))
    assert kept.projects == frozenset("a")


def test_a_session_ends_with_its_time_its_token_or_by_signing_out(registry: Registry) -> None:
    access = access_of(registry, token=CHOSEN)
    issued = access.tokens.create("job", READ, by="me")
    cookies = [sign_in(access, issued.secret) for _ in range(2)]
    principal = access.admit(Credentials(cookie=cookies[0]))
    access.sign_out(cookies[1], "10.0.0.1")
    assert refused(access, Credentials(cookie=cookies[1])).status == 401
    assert access.holds(principal)
    access.tokens.rotate(issued.token.id, grace=timedelta(0))
    assert refused(access, Credentials(cookie=cookies[0])).status == 401
    access.tokens.revoke(issued.token.id)
    assert not access.holds(principal)
    with registry.write() as connection:
        connection.execute(sessions.update().values(expires_at=now() - HOUR))
    fresh = access_of(registry, token=CHOSEN)
    assert refused(fresh, Credentials(cookie=cookies[0])).status == 401


def test_a_session_of_a_changed_bootstrap_token_is_over(registry: Registry) -> None:
    cookie = sign_in(access_of(registry, token=CHOSEN), CHOSEN)
    assert access_of(registry, token=CHOSEN).admit(Credentials(cookie=cookie)).session
    changed = access_of(registry, token=CHOSEN + "-new")
    assert refused(changed, Credentials(cookie=cookie)).status == 401


def test_no_secret_is_in_the_database(tmp_path: Path, registry: Registry) -> None:
    access = access_of(registry, token=CHOSEN)
    issued = access.tokens.create("job", READ, by="me")
    cookie = sign_in(access, issued.secret)
    chosen = sign_in(access, CHOSEN)
    refused(access, Credentials("a-wrong-one-to-be-noted"))
    access.close()
    registry.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    # Nor the digest of a token that people chose: a dictionary might hold it.
    for secret in (issued.secret, cookie, chosen, CHOSEN, digest_of(CHOSEN), "a-wrong-one"):
        assert secret.encode() not in stored, secret


def test_the_log_is_read_backwards_page_by_page_and_by_project(registry: Registry) -> None:
    log = AuditLog(registry)
    for number in range(7):
        project = "a" if number % 2 else None
        log.add("run.delete", BOOTSTRAP, project=project, subject=str(number), detail={"n": number})
    seen = []
    before = None
    while page := log.page(limit=3, before=before):
        seen += [entry.subject for entry in page]
        before = page[-1].id
    assert seen == list("6543210")
    assert [e.subject for e in log.page(limit=9, projects=frozenset("a"))] == list("531")
    assert log.page(limit=9, action="token.create") == []


def test_old_entries_go(registry: Registry) -> None:
    AuditLog(registry).add("run.delete", BOOTSTRAP, subject="old")
    with registry.write() as connection:
        connection.execute(audit.update().values(at=now() - timedelta(days=31)))
    AuditLog(registry).add("run.delete", BOOTSTRAP, subject="new")
    assert len(AuditLog(registry).page(limit=9)) == 2
    log = AuditLog(registry, retention_days=30)
    log.add("run.delete", BOOTSTRAP, subject="newest")
    assert [entry.subject for entry in log.page(limit=9)] == ["newest", "new"]


def test_strangers_fill_the_log_only_so_fast_and_the_rest_is_counted(registry: Registry) -> None:
    log = AuditLog(registry)
    for _ in range(150):
        log.add_failure("auth.failed", NOBODY)
    written = len(log.page(limit=1000))
    assert 100 <= written < 150
    time.sleep(0.6)
    log.add_failure("auth.failed", NOBODY)
    last = log.page(limit=1)[0]
    total = sum(e.detail.get("unlogged_before", 0) + 1 for e in log.page(limit=1000))
    assert last.detail["unlogged_before"] > 0
    assert total == 151
