// Alarms on a line of steps or of time, each with its diagnosis, its remedy, and the question whether it was right.

import { el, keyed, pill } from "./dom.js";
import { number } from "./api.js";
import { CAUSES, causeBody } from "./panels.js";
import { ago, grouped, lasted, moment, percent, short } from "./text.js";
import * as wire from "./wire.js";

/** Where a bar lies on an axis, in percent; never thinner than can be seen. */
export function place([from, to], [first, last]) {
  const across = Math.max(1e-9, last - first);
  const clamp = (value) => Math.min(100, Math.max(0, (100 * (value - first)) / across));
  const left = Math.min(clamp(from), 99.2);
  return { left, width: Math.max(0.8, clamp(to) - left) };
}

const byStep = (alert, run) => [alert.opened_step, alert.resolved_step ?? Math.max(run.lastStep ?? 0, alert.step)];
const byTime = (alert) => [Date.parse(alert.starts_at), alert.ends_at ? Date.parse(alert.ends_at) : Date.now()];

/** The list, and a scale above it. `run` null: alarms of all runs, by time. */
export function timeline({ list, scale, rows, run, act, only = null }) {
  const spans = rows.map((alert) => (run ? byStep(alert, run) : byTime(alert)));
  const axis = run ? [run.firstStep ?? 0, Math.max(run.lastStep ?? 1, ...spans.map(([, to]) => to))]
    : [Math.min(...spans.map(([from]) => from)), Date.now()];
  const written = run ? axis.map((step) => `step ${grouped(step)}`) : axis.map((time) => moment(time));
  scale.replaceChildren(...(rows.length ? written.map((text) => el("span", {}, text)) : []));
  keyed(list, rows, () => newItem(), (item, alert) => {
    const at = place(spans[rows.indexOf(alert)], axis);
    Object.assign(item.bar.style, { left: `${at.left}%`, width: `${at.width}%` });
    const signature = JSON.stringify([alert, Boolean(run)]);
    if (item.signature !== signature) fill(item, alert, run, act);
    item.signature = signature;
    item.since.textContent = ago(alert.since);
    if (only !== null && String(only) === alert.key) item.more.open = true;
  });
}

function newItem() {
  const item = el("li", { class: "alarm" });
  item.head = el("div", { class: "row" });
  item.bar = el("span", { class: "stretch" });
  item.since = el("span", { class: "quiet" });
  item.body = el("div", { class: "more" });
  item.more = el("details", {}, el("summary", {}, "Why, and what to do"), item.body);
  item.verdict = el("div", { class: "verdict", role: "group", "aria-label": "Was this alarm right?" });
  item.note = el("input", { type: "text", maxLength: 2000, placeholder: "note (optional)", "aria-label": "note to the answer" });
  item.paging = el("div", { class: "verdict", role: "group", "aria-label": "Who has it" });
  item.append(item.head, el("div", { class: "axis", "aria-hidden": "true" }, item.bar), item.more, item.paging, item.verdict);
  return item;
}

function fill(item, alert, run, act) {
  item.bar.className = `stretch ${alert.state}`;
  // A summary begins with the name of its run.
  const what = el("strong", {}, run ? alert.summary : el("a", { href: alert.href }, alert.summary));
  const at = el("a", { href: alert.href }, `step ${grouped(alert.step)}`);
  const end = alert.ends_at ? `, over after ${lasted(alert.starts_at, alert.ends_at)}${alert.end_reason ? ` (${alert.end_reason})` : ""}` : "";
  item.since.title = moment(alert.starts_at);
  item.head.replaceChildren(pill(alert.state), what, el("span", { class: "quiet" }, alert.kind), at, item.since, el("span", { class: "quiet" }, end.replace(/^, /, "")));
  item.body.replaceChildren(...reasons(alert));
  const button = (word, value) => {
    const node = el("button", { type: "button", "aria-pressed": String(alert.correct === value) }, word);
    node.onclick = () => act(() => wire.answerAlert(alert, value, item.note.value.trim()));
    return node;
  };
  item.paging.hidden = alert.state === "resolved";
  item.paging.replaceChildren(...paging(alert, act));
  if (document.activeElement !== item.note) item.note.value = alert.note ?? "";
  item.verdict.replaceChildren(el("span", { class: "quiet" }, "Was it right?"), button("yes", true), button("no", false), item.note);
}

const SNOOZES = [["1 h", 3600], ["4 h", 4 * 3600], ["1 day", 86400]];

/** Who keeps it from paging, or the buttons with which a reader can. */
function paging(alert, act) {
  const button = (text, work, label = text) => {
    const node = el("button", { type: "button", "aria-label": label }, text);
    node.onclick = () => act(work);
    return node;
  };
  const { mute } = alert;
  if (mute) {
    const until = mute.until ? ` until ${moment(mute.until)}` : "";
    return [el("span", {}, `${mute.decision} by ${mute.by}${until}, ${ago(mute.at)}${mute.note ? `: ${mute.note}` : ""}`),
      button("undo", () => wire.unmute(alert), `undo: ${mute.decision}`)];
  }
  return [button("I have it", () => wire.acknowledge(alert), "acknowledge: I have it"), el("span", { class: "quiet" }, "not now:"),
    ...SNOOZES.map(([text, seconds]) => button(text, () => wire.snooze(alert, seconds), `snooze for ${text}`))];
}

function reasons(alert) {
  const run = { project: alert.project, name: alert.run };
  const chances = Object.entries(alert.probability ?? {}).map(([h, p]) => [h, number(p)]).filter(([, p]) => p !== null);
  const lead = number(alert.expected_lead);
  const facts = [
    ...chances.map(([h, p]) => `risk within ${grouped(h)} steps ${percent(p)}`),
    ...(Number.isFinite(lead) ? [`about ${grouped(Math.round(lead))} steps ahead`] : []),
    ...(alert.attempt > 1 ? [`attempt ${alert.attempt}`] : []),
    ...(alert.model_version ? [`forecaster ${alert.model_version}`] : []),
  ];
  const drivers = (alert.drivers ?? []).slice(0, 3).map((d) => `${d.signal}${d.layer ? ` of ${d.layer}` : ""} (${short(number(d.contribution))})`);
  const causes = (alert.causes ?? []).filter((cause, i) => i < 3 && (i === 0 || number(cause.probability) >= 0.05));
  return [
    facts.length ? el("p", {}, facts.join("  ·  ")) : null,
    ...causes.map((cause) => el("section", { class: "cause" },
      el("p", { class: "row" }, el("strong", {}, CAUSES[cause.name] ?? cause.name), el("span", { class: "share" }, percent(number(cause.probability)))),
      causeBody(cause, run))),
    causes.length ? null : el("p", { class: "quiet" }, "No cause was found."),
    drivers.length ? el("p", {}, el("span", { class: "quiet" }, "Driven by "), drivers.join(", ")) : null,
    el("p", {}, el("a", { href: `/runbook#${encodeURIComponent(alert.name.toLowerCase())}` }, `Runbook of ${alert.name}`)),
    deliveries(alert.deliveries ?? []),
  ].filter(Boolean);
}

function deliveries(rows) {
  if (!rows.length) return el("p", { class: "quiet" }, "Nobody was told: no receiver is set.");
  const told = rows.map((row) => `${row.channel} (${row.transition}): ${row.delivered_at ? `told ${ago(row.delivered_at)}` : row.abandoned ? "given up" : `trying, ${row.tries} so far`}${row.error && !row.delivered_at ? `, ${row.error}` : ""}`);
  return el("p", { class: "quiet" }, told.join("  ·  "));
}
