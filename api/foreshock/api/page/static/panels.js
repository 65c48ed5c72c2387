// Writes the texts of a run: heading, tiles, drivers, diagnosis.

import { $, contentOr, el, pill } from "./dom.js";
import { number } from "./api.js";
import { href } from "./routes.js";
import { grouped, percent, short } from "./text.js";
import { incidentPath } from "./wire.js";

export const CAUSES = {
  learning_rate: "Learning rate",
  scale: "FP8 scale",
  outlier: "Activation outlier",
  underflow: "Underflow",
  bad_data: "Bad data",
  optimizer_state: "Lost optimizer state",
  attention: "Attention logits",
  unknown: "Unknown cause",
};

export function heading(run, risk) {
  $("name").textContent = run.name;
  const facts = [`step ${grouped(run.lastStep)}`, run.activity];
  if (run.loss !== null && run.loss !== undefined) facts.push(`loss ${short(run.loss)}`);
  if (run.attempts > 1) facts.push(`attempt ${run.attempt ?? run.attempts} of ${run.attempts}`);
  if (risk?.model_version) facts.push(`forecaster ${risk.model_version}`);
  if (run.project && run.project !== "default") facts.unshift(run.project);
  $("facts").textContent = facts.join("  ·  ");
  const kind = risk?.kind && risk.state !== "ok" ? el("span", { class: "quiet" }, `${risk.kind} `) : null;
  $("alarm").replaceChildren(...[kind, pill(risk?.state ?? run.state, true)].filter(Boolean));
}

/** What happened around a step as a file for somebody without this service. */
export function incident(run, step) {
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

const layerLink = (run, layer, params = {}) =>
  el("a", { class: "chip", href: href({ view: "layer", project: run.project, run: run.name, layer, params }) }, el("code", {}, layer));

export function drivers(run, risk) {
  const rows = (risk?.drivers ?? []).slice(0, 7);
  // An answer from the store has no pace: what drove it was not kept.
  const kept = risk?.steps_per_record !== null;
  const none = !answered(risk) ? "There is no forecast to explain."
    : kept ? "Nothing stands out: every signal is at this run's usual level."
      : "What drives the risk is known while a run is live. Its alarms keep what drove them.";
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
      row.layer ? layerLink(run, row.layer) : null);
  }));
}

/** Rows of a cause as a list of terms; with a run, its layers are links. */
export function causeBody(cause, run = null) {
  const where = [cause.role, cause.statistic].filter(Boolean).join(" · ");
  const chip = (layer) => (run ? layerLink(run, layer, { statistic: cause.statistic, step: cause.since_step }) : el("span", { class: "chip" }, el("code", {}, layer)));
  const rows = [
    cause.layers?.length ? ["layers", cause.layers.map(chip)] : null,
    where ? ["seen in", [where]] : null,
    cause.since_step === null || cause.since_step === undefined ? null : ["since", [`step ${grouped(cause.since_step)}`]],
    cause.evidence ? ["evidence", [cause.evidence]] : null,
    cause.remedy ? ["remedy", [cause.remedy]] : null,
    cause.source ? ["source", [cause.source]] : null,
  ].filter(Boolean);
  return el("dl", {}, ...rows.flatMap(([term, values]) => [el("dt", {}, term), el("dd", {}, ...values)]));
}

/** The likeliest cause in full, the others to open; what a reader has opened stays open. */
export function diagnosis(run, answer, state, step) {
  const causes = answer.causes.filter((cause, i) => i === 0 || number(cause.probability) >= 0.01);
  const calm = (state === "ok" || !state) && step === null;
  contentOr("causes", causes.length ? null : "No cause stands out.");
  $("causes-calm").hidden = !calm || !causes.length;
  $("causes-when").textContent = step === null ? "" : `as of step ${grouped(step)}`;
  const opened = new Set([...$("causes").querySelectorAll("details[open]")].map((item) => item.dataset.cause));
  $("causes").replaceChildren(...causes.map((cause, i) => {
    const head = el("span", { class: "row" }, el("h3", {}, CAUSES[cause.name] ?? cause.name), el("span", { class: "share" }, percent(number(cause.probability))));
    if (i === 0) return el("li", {}, head, causeBody(cause, run));
    const rest = el("details", { open: opened.has(cause.name) }, el("summary", {}, head), causeBody(cause, run));
    rest.dataset.cause = cause.name;
    return el("li", {}, rest);
  }));
  $("causes-doubt").hidden = !causes.length || !answer.abstains;
  precision(answer.precision);
}

/** Configurations for the layers of the likeliest cause, to be copied; closed until somebody asks. */
function precision(advice) {
  $("precision").hidden = !advice;
  if (!advice) return;
  const text = (title, body) => [el("h3", {}, title), el("pre", { tabIndex: 0, "aria-label": title }, el("code", {}, body))];
  $("precision-body").replaceChildren(
    el("p", { class: "quiet" }, advice.why),
    ...text("Transformer Engine: recipe", advice.transformer_engine_recipe),
    ...text("Transformer Engine: these layers in high precision", advice.transformer_engine_debug),
    ...text("torchao: which layers to convert", advice.torchao_filter),
  );
}
