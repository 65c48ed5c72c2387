// Writes everything on the page that is text: run list, tiles, drivers, diagnosis, alerts.

import { $, ago, contentOr, el, percent, pill, short } from "./dom.js";
import { number } from "./api.js";
import { incidentPath } from "./wire.js";

const CAUSES = {
  learning_rate: "Learning rate",
  scale: "FP8 scale",
  outlier: "Activation outlier",
  bad_data: "Bad data",
  unknown: "Unknown cause",
};

const grouped = (value) => (value === null || value === undefined ? "–" : Number(value).toLocaleString("en"));

/** The list keeps its elements between refreshes, so that the keyboard focus stays where it is. */
export function runList(runs, selected, choose) {
  const list = $("runs");
  const known = new Map([...list.children].map((item) => [item.dataset.key, item]));
  const items = runs.map((run) => {
    const item = known.get(run.id) ?? el("li");
    item.dataset.key = run.id;
    const link = item.firstChild ?? item.appendChild(el("a"));
    link.href = run.href;
    link.onclick = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      choose(run);
    };
    if (run.id === selected) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
    const risks = run.risks.map(([h, p]) => `${h}: ${percent(p)}`).join(" · ");
    link.replaceChildren(
      el("span", { class: "row" }, el("span", { class: "name" }, run.name), pill(run.state)),
      el("span", { class: "row small" }, el("span", {}, `step ${grouped(run.lastStep)}`), el("span", {}, run.activity)),
      el("span", { class: "row small" }, risks ? `risk ${risks}` : "no forecast yet"),
    );
    return item;
  });
  if (items.length !== list.children.length || items.some((item, i) => list.children[i] !== item)) {
    const focused = document.activeElement;
    list.replaceChildren(...items);
    if (list.contains(focused)) focused.focus();
  }
  $("runs-empty").hidden = runs.length > 0;
}

export function heading(run, risk) {
  $("name").textContent = run.name;
  const facts = [`step ${grouped(run.lastStep)}`, run.activity];
  if (run.loss !== null && run.loss !== undefined) facts.push(`loss ${short(run.loss)}`);
  if (run.attempts > 1) facts.push(`attempt ${run.attempt ?? run.attempts}`);
  if (risk?.model_version) facts.push(`forecaster ${risk.model_version}`);
  if (run.project && run.project !== "default") facts.unshift(run.project);
  $("facts").textContent = facts.join("  ·  ");
  const kind = risk?.kind && risk.state !== "ok" ? el("span", { class: "quiet" }, `${risk.kind} `) : null;
  $("alarm").replaceChildren(...[kind, pill(risk?.state ?? run.state, true)].filter(Boolean));
}

/** What happened around the alarm, or around now, as a file for somebody without this service. */
export function incident(run, alarms) {
  const step = alarms.at(0)?.step ?? run.lastStep;
  const known = step !== null && step !== undefined;
  $("incident").hidden = !known;
  if (!known) return;
  $("incident").href = incidentPath(run, step);
  $("incident").title = `2,000 steps around step ${grouped(step)}: a page that opens anywhere, and the records`;
}

const answered = (risk) => Object.values(risk?.probability ?? {}).some((value) => value !== null);

export const noForecast = (risk) =>
  (Object.keys(risk?.reasons ?? {}).length ? "No horizon has an answer:" : "No forecast yet: it starts after the first records.");

export function tiles(risk) {
  const items = Object.keys(risk?.probability ?? {}).map((horizon, i) => {
    const band = risk.band?.[horizon];
    const note = band ? `${percent(band[0])} to ${percent(band[1])}` : risk.reasons?.[horizon] ?? "";
    return el("li", { class: `h${i}` },
      el("p", { class: "label" }, `risk within ${grouped(horizon)} steps`),
      el("p", { class: "value" }, percent(risk.probability[horizon])),
      el("p", { class: "note" }, note));
  });
  if (items.length) {
    const lead = number(risk.expected_lead);
    items.push(el("li", {},
      el("p", { class: "label" }, "expected lead"),
      el("p", { class: "value" }, lead === null ? "–" : `${grouped(Math.round(lead))}`),
      el("p", { class: "note" }, !answered(risk) ? "no forecast" : lead === null ? "no divergence in sight" : "steps until the loss rises, if it does")));
  }
  $("horizons").replaceChildren(...items);
  $("horizons").hidden = items.length === 0;
}

export function reasons(risk) {
  const rows = Object.entries(risk?.reasons ?? {});
  $("reasons").replaceChildren(...rows.map(([horizon, why]) => el("li", {}, `${grouped(horizon)} steps: no answer, ${why}`)));
}

export function drivers(risk) {
  const rows = (risk?.drivers ?? []).slice(0, 7);
  const none = answered(risk) ? "Nothing stands out: every signal is at this run's usual level." : "There is no forecast to explain.";
  contentOr("drivers", rows.length ? null : none);
  const largest = Math.max(...rows.map((row) => Math.abs(row.contribution)), 1e-9);
  $("drivers").replaceChildren(...rows.map((row) => {
    const raises = row.contribution >= 0;
    const fill = el("div", { class: raises ? "fill" : "fill lowers" });
    fill.style.width = `${(100 * Math.abs(row.contribution)) / largest}%`;
    return el("li", {},
      el("div", { class: "row" }, el("span", { class: "signal" }, row.signal),
        el("span", { class: "amount" }, `${raises ? "raises +" : "lowers −"}${Math.abs(row.contribution).toFixed(2)}`)),
      el("div", { class: "track" }, fill),
      row.layer ? el("code", {}, row.layer) : null);
  }));
}

function causeRows(cause) {
  const where = [cause.role, cause.statistic].filter(Boolean).join(" · ");
  return [
    cause.layers?.length ? ["layers", cause.layers.map((layer) => el("code", { class: "chip" }, layer))] : null,
    where ? ["seen in", [where]] : null,
    cause.since_step === null || cause.since_step === undefined ? null : ["since", [`step ${grouped(cause.since_step)}`]],
    cause.evidence ? ["evidence", [cause.evidence]] : null,
    cause.remedy ? ["remedy", [cause.remedy]] : null,
    cause.source ? ["source", [cause.source]] : null,
  ].filter(Boolean);
}

/** The likeliest cause in full, the others to open; what a reader has opened stays open. */
export function diagnosis(answer, state) {
  const causes = answer.filter((cause, i) => i === 0 || number(cause.probability) >= 0.01);
  const calm = state === "ok" || !state;
  contentOr("causes", causes.length ? null : "No cause stands out.");
  $("causes-calm").hidden = !calm || !causes.length;
  const opened = new Set([...$("causes").querySelectorAll("details[open]")].map((item) => item.dataset.cause));
  $("causes").replaceChildren(...causes.map((cause, i) => {
    const head = el("span", { class: "row" }, el("h3", {}, CAUSES[cause.name] ?? cause.name), el("span", { class: "share" }, percent(number(cause.probability))));
    const body = el("dl", {}, ...causeRows(cause).flatMap(([term, values]) => [el("dt", {}, term), el("dd", {}, ...values)]));
    if (i === 0) return el("li", {}, head, body);
    const rest = el("details", { open: opened.has(cause.name) }, el("summary", {}, head), body);
    rest.dataset.cause = cause.name;
    return el("li", {}, rest);
  }));
}

export function alerts(rows, answer) {
  contentOr("alerts", rows.length ? null : "No alerts for this run.");
  $("alerts").tBodies[0].replaceChildren(...rows.map((row) => {
    const button = (word, value) => {
      const node = el("button", { type: "button", "aria-pressed": String(row.correct === value) }, word);
      node.onclick = () => answer(row, value);
      return node;
    };
    const verdict = [button("yes", true), button("no", false)];
    return el("tr", {}, el("td", {}, pill(row.state)), el("td", {}, row.summary), el("td", {}, row.kind ?? ""),
      el("td", {}, grouped(row.step)), el("td", { title: row.since ?? "" }, ago(row.since)), el("td", {}, ...verdict));
  }));
}
