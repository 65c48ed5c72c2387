"""Alerts laid out for where they are read: a chat, a mail, a phone, a program.

The words are `alert_facts.py`'s. Sends nothing.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from foreshock.api.alert_facts import AlertFacts, facts_of, shorten
from foreshock.api.alert_model import Alert, Transition
from foreshock.api.alert_text import alert_annotations, alert_labels, summary

__all__ = ["MEDIUMS", "Medium", "Message", "message"]

Medium = Literal["chat", "plain", "mail", "phone", "webhook"]
"""chat: markdown as Slack, Discord and others read it; plain: the same without marks; mail: HTML,
which apprise accompanies with its text; phone: a short title and little below; webhook: lines of
`name: value`, for programs."""

MEDIUMS: Final[tuple[Medium, ...]] = get_args(Medium)

_PHONE_LINE: Final = 160

_COLOURS: Final[Mapping[Transition, str]] = {
    "firing": "#b3261e",
    "reminder": "#b3261e",
    "resolved": "#1e6b3a",
}
# White on each of them has a contrast above 5, as WCAG AA asks of text.


@dataclass(frozen=True, slots=True)
class Message:
    """A message, ready to send.

    Attributes:
        title: Subject or first line.
        body: The rest.
        format: How the body is written.
    """

    title: str
    body: str
    format: Literal["text", "markdown", "html"]


def message(alert: Alert, transition: Transition, medium: Medium, page: str | None) -> Message:
    """Lay out an alert.

    Args:
        alert: The alert.
        transition: Whether it fires, still fires, or is over.
        medium: Where it is read.
        page: Address of the service as people reach it, or None when it is not known.
    """
    if medium == "webhook":
        return _webhook(alert, transition, page)
    return _LAYOUTS[medium](facts_of(alert, transition, page), transition)


def _chat(facts: AlertFacts, transition: Transition) -> Message:
    # apprise turns it into the dialect of Slack and others.
    lines = [f"**{label}:** {_marked(text, facts.run)}" for label, text in facts.lines]
    lines += [f"**{label}:** {text}" for label, text in _links(facts)]
    return Message(_title(facts, transition), "\n".join(lines), "markdown")


def _plain(facts: AlertFacts, transition: Transition) -> Message:
    lines = [f"{label}: {text}" for label, text in (*facts.lines, *_links(facts))]
    return Message(_title(facts, transition), "\n".join(lines), "text")


def _phone(facts: AlertFacts, transition: Transition) -> Message:
    wanted = ("At risk", "Why", "Do", "Over")
    lines = [shorten(text, _PHONE_LINE) for label, text in facts.lines if label in wanted]
    lines += [facts.link] if facts.link else []
    return Message(facts.headline, "\n".join(lines), "text")


def _mail(facts: AlertFacts, transition: Transition) -> Message:
    rows = [(label, html.escape(text)) for label, text in facts.lines]
    # The address is the link's text too: the text part of the mail keeps nothing but that.
    rows += [("Page", _anchor(facts.link)), ("Runbook", _anchor(facts.runbook))]
    rows.append(("Quiet", html.escape(facts.handle)))
    paragraphs = "\n".join(
        f'<p style="margin:0 0 8px"><b>{label}:</b> {text}</p>' for label, text in rows if text
    )
    banner = (
        f'<p style="background:{_COLOURS[transition]};color:#ffffff;padding:10px 14px;'
        f'font-size:17px;margin:0 0 12px"><b>{html.escape(facts.headline)}</b></p>'
    )
    style = "font-family:sans-serif;font-size:15px;line-height:1.45;max-width:44em"
    body = f'<div style="{style}">\n{banner}\n{paragraphs}\n</div>'
    return Message(_title(facts, transition), body, "html")


def _anchor(url: str) -> str:
    return f'<a href="{html.escape(url, quote=True)}">{html.escape(url)}</a>' if url else ""


_LAYOUTS: Final[Mapping[Medium, Callable[[AlertFacts, Transition], Message]]] = {
    "chat": _chat,
    "plain": _plain,
    "phone": _phone,
    "mail": _mail,
}


def _webhook(alert: Alert, transition: Transition, page: str | None) -> Message:
    said = alert_labels(alert) | alert_annotations(alert, transition, page)
    # What the others are said in one piece, a program is given piece by piece.
    told = {name: text for name, text in said.items() if name not in ("summary", "description")}
    lines = [summary(alert, transition), "", *(f"{name}: {text}" for name, text in told.items())]
    title = f"[{transition}] {alert.name} {alert.subject.run}"
    return Message(title, "\n".join(lines), "text")


def _title(facts: AlertFacts, transition: Transition) -> str:
    return f"[{transition}] {facts.headline}"


def _links(facts: AlertFacts) -> list[tuple[str, str]]:
    links = (("Page", facts.link), ("Runbook", facts.runbook), ("Quiet", facts.handle))
    return [(label, text) for label, text in links if text]


_NAME: Final = re.compile(r"[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)+")
_MARKS: Final = re.compile(r"([*_`~\\])")


def _marked(text: str, run: str) -> str:
    """Names of layers and statistics as code, so that their underscores are not taken for marks."""
    pieces = []
    end = 0
    for found in re.finditer(f"{re.escape(run)}|{_NAME.pattern}", text):
        name = found[0]
        pieces.append(_MARKS.sub(r"\\\1", text[end : found.start()]))
        pieces.append(f"`{name}`" if "`" not in name and not _number(name) else name)
        end = found.end()
    return "".join([*pieces, _MARKS.sub(r"\\\1", text[end:])])


def _number(text: str) -> bool:
    return text.replace(".", "").isdecimal()
