// What is known of the forecaster: what it was fitted on, when it alarms, and whether its probabilities came true.

import { $, choices, contentOr, el } from "./dom.js";
import { paint } from "./charts.js";
import { calibrationFigure } from "./figures.js";
import { grouped, percent, short, words } from "./text.js";
import * as wire from "./wire.js";

const HEADS = { full: "all signals", gradient: "loss and gradient norm", loss: "loss alone" };

export function open(page, route) {
  let horizon = route.params.horizon ?? "100";
  const job = page.jobs.add(60000, async (current) => {
    const card = await wire.forecaster();
    if (!current()) return;
    $("model-body").hidden = !card;
    contentOr("model", card ? null : "No forecaster comes with this installation; foreshock fit makes one.");
    if (card) fill(card);
  });

  function fill(card) {
    $("model-version").textContent = card.version;
    const data = card.data;
    const facts = [
      ["fitted on", `${grouped(data.runs)} runs in ${grouped(data.groups)} groups, ${grouped(data.rows)} records, ${grouped(data.healthy_rows)} of them healthy`],
      ["divergences", grouped(data.events)],
      ["alarm budget", `false alarms per 10,000 healthy steps: ${card.budget}`],
      ["horizons", card.horizons.map((h) => `${grouped(h)} steps`).join(", ")],
      ["training runs", `fingerprints of ${grouped(card.training_runs)} are in the artifact: Artifact.trained_on(...) tells whether a run was among them`],
    ];
    $("model-facts").replaceChildren(...facts.flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]));
    heads(card);
    families(data.families ?? {});
    const { evaluation } = card;
    contentOr("calibration", evaluation ? null : "This artifact came without the report of its evaluation: foreshock fit --report puts it in.");
    $("evaluation").hidden = !evaluation;
    if (!evaluation) return;
    const found = [...new Set(Object.keys(evaluation.risk ?? {}).map((name) => name.split(", ")[1]?.split(" ")[0]))].filter(Boolean);
    if (!found.includes(horizon)) [horizon] = found;
    choices("calibration-horizon", found.map((h) => [h, `${grouped(h)} steps`]), horizon, (value) => {
      horizon = value;
      page.replaceParams({ horizon });
      calibration(evaluation);
    });
    calibration(evaluation);
    const budgets = [...new Set((evaluation.alarms ?? []).map((row) => row.budget))].sort();
    choices("budget", budgets, card.budget, (budget) => alarms(evaluation, budget));
    alarms(evaluation, card.budget);
    limits(card);
  }

  function heads(card) {
    $("heads").tBodies[0].replaceChildren(...card.heads.map((head) => {
      const budgets = Object.entries(head.thresholds).map(([budget, value]) => `${budget}: ${value === null ? `none (${head.reasons[budget] ?? "no reason given"})` : percent(value)}`);
      const missing = Object.keys(head.unsupported);
      const supported = card.horizons.filter((h) => !missing.includes(String(h))).map(grouped).join(", ") || "none";
      return el("tr", {}, el("th", { scope: "row" }, HEADS[head.name] ?? head.name), el("td", { class: "number" }, grouped(head.features)),
        el("td", {}, supported), el("td", {}, budgets.join("; ")), el("td", { class: "number" }, head.base_rate === null ? "–" : short(1e4 * head.base_rate)));
    }));
  }

  function families(table) {
    const rows = Object.entries(table);
    $("families").tBodies[0].replaceChildren(...rows.map(([name, kinds]) => el("tr", {}, el("th", { scope: "row" }, name),
      el("td", {}, Object.entries(kinds).map(([kind, count]) => `${count} ${words(kind)}`).join(", ")))));
    $("families").hidden = !rows.length;
  }

  function calibration(evaluation) {
    const curves = Object.entries(evaluation.risk ?? {}).map(([name, quality]) => [...name.split(", "), quality])
      .filter(([, at]) => at === `${horizon} steps`)
      .map(([head, , quality], place) => ({ name: HEADS[head] ?? head, bins: quality.calibration, place, quality }));
    paint($("calibration"), () => calibrationFigure({ curves }));
    const said = curves.map(({ name, bins }) => `${name}: ${bins.map(([f, o]) => `${percent(f)} forecast, ${percent(o)} came true`).at(-1)} in the highest tenth`);
    $("calibration").setAttribute("aria-label", `Forecast against what came true at ${grouped(horizon)} steps. ${said.join(". ")}`);
    $("quality").tBodies[0].replaceChildren(...curves.map(({ name, quality }) => el("tr", {}, el("th", { scope: "row" }, name),
      ...[percent(quality.base_rate), ...[quality.average_precision, quality.auroc, quality.brier_skill, quality.calibration_error].map((value) => value?.toFixed(3) ?? "–")]
        .map((text) => el("td", { class: "number" }, text)))));
  }

  function alarms({ alarms: rows = [] }, budget) {
    const known = rows.filter((row) => row.budget === budget && row.forecast !== null).sort((a, b) => b.forecast - a.forecast);
    $("evaluated").tBodies[0].replaceChildren(...known.map((row) => el("tr", { class: row.method in HEADS ? "ours" : "" },
      el("th", { scope: "row" }, row.method in HEADS ? `forecaster, ${HEADS[row.method]}` : row.method),
      ...[`${percent(row.forecast)}${row.interval ? ` (${percent(row.interval[0])} to ${percent(row.interval[1])})` : ""}`, percent(row.detected),
        row.lead_median === null ? "–" : grouped(Math.round(row.lead_median)), row.false_rate?.toFixed(2) ?? "–"].map((text) => el("td", { class: "number" }, text)))));
  }

  /** Where it is not to be trusted, from its own figures. */
  function limits(card) {
    const { evaluation } = card;
    const lines = [];
    const unsupported = new Map();
    for (const head of card.heads) for (const [h, why] of Object.entries(head.unsupported)) unsupported.set(h, why);
    for (const [h, why] of unsupported) lines.push(`${grouped(h)} steps ahead it gives no answer: ${why}.`);
    for (const [name, [count, share]] of Object.entries(evaluation?.by_family ?? {})) if (share < 0.5) lines.push(`Of ${count} divergences of the kind ${name} it forecast ${percent(share)}.`);
    for (const [name, row] of Object.entries(evaluation?.held_out ?? {})) if (row.forecast !== null && row.forecast < 0.1) lines.push(`Fitted ${name} runs, it forecast ${percent(row.forecast)} of their divergences.`);
    $("limits").replaceChildren(...lines.map((text) => el("li", {}, text)));
    $("limits-card").hidden = !lines.length;
  }

  return { title: "Forecaster", runsChanged() {}, list: () => [], close() {}, job };
}
