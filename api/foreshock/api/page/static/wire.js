// Knows the paths and JSON of the public API, and gives the page's other modules plain shapes.

import { Unknown, get, number, post } from "./api.js";
import { href } from "./routes.js";
import { activity } from "./text.js";

export const POINTS = 800; // points per line at most: about one per pixel
export const ROLES = ["input", "weight", "grad_output"]; // the operands, which are of interest first
export const STATISTICS = [
  "kurtosis", "kurtosis_sequence_mean", "channel_kurtosis", "amax", "rms", "underflow_ratio", "subnormal_ratio",
  "overflow_ratio", "headroom_log2", "sqnr_db", "scale_log2", "top_channel_share", "zero_ratio", "nonfinite_count", "min_nonzero",
];

const path = (run, tail = "") => `/runs/${run.id}${tail}`;
const encoded = (given) => new URLSearchParams(Object.entries(given).filter(([, v]) => v !== null && v !== undefined && v !== ""));

export const address = (run, tail, given) => `/api/v1${path(run, tail)}?${encoded(given)}`;
export const incidentPath = (run, step) => address(run, "/incident", { step });
export const eventsPath = (run) => `/api/v1${path(run, "/events")}`;

/** What a part answers that this service may not have; a run that is gone still fails elsewhere. */
const optional = (answer, without) => answer.catch((error) => {
  if (error instanceof Unknown) return without;
  throw error;
});

function toRun(row) {
  const risks = Object.entries(row.risk ?? {}).map(([h, p]) => [h, number(p)]).filter(([, p]) => p !== null);
  return {
    id: row.run_id, key: row.run_id, name: row.run, project: row.project, firstStep: row.first_step, lastStep: row.last_step,
    href: href({ view: "run", project: row.project, run: row.run }), activity: activity(row), status: row.status,
    created: row.created_at ?? "", loss: row.loss, attempts: row.attempts, attempt: row.attempt, state: row.state, kind: row.kind,
    risks, worst: Math.max(-1, ...risks.map(([, p]) => p)),
  };
}

/** Every run, in the order in which they were announced, youngest first. */
export async function runs() {
  const rows = [];
  for (let cursor = null; ;) {
    const page = await get("/runs", { order: "created", limit: 1000, cursor });
    rows.push(...page.runs.map(toRun));
    cursor = page.next;
    if (!cursor) return rows;
  }
}

/** What a run has recorded: layers in model order, scalars, roles in the order of interest, formats, attempts. */
export async function detail(run) {
  const answer = await get(path(run));
  const known = new Set(answer.roles);
  return {
    layers: answer.layers, scalars: answer.scalars, formats: answer.formats, statistics: answer.statistics,
    roles: [...ROLES.filter((role) => known.has(role)), ...answer.roles.filter((role) => !ROLES.includes(role))],
    history: answer.history.map((each) => each.number),
  };
}

export const risk = (run) => optional(get(path(run, "/risk")), null);

export function history(run, range = {}, points = POINTS) {
  const nothing = { step: [], probability: {} };
  return optional(get(path(run, "/risk/history"), { ...span(range), points }), nothing);
}

/** A range as a query has it; its attempt too. */
const span = ({ from, to, attempt }) => ({ first_step: from, last_step: to, attempt });

const toSeries = (answer) => ({
  step: answer.step, low: answer.min, value: answer.mean, high: answer.max,
  broken: answer.step.filter((_, i) => answer.nonfinite[i] > 0),
});

export const scalar = async (run, name, range = {}, points = POINTS) =>
  toSeries(await get(path(run, "/series"), { name, ...span(range), points }));

/** One statistic of one tensor: {layer, role, statistic, format}. */
export const tensor = async (run, which, range = {}, points = POINTS) =>
  toSeries(await optional(get(path(run, "/series"), { ...which, ...span(range), points }), { step: [], min: [], mean: [], max: [], nonfinite: [] }));

/** Layers by steps: {statistic, role, format, match, start, span, rows, points}. */
export const heat = (run, which, range = {}) => get(path(run, "/heatmap"), { ...which, ...span(range) });

export const compare = (a, b, given) => get(path(a, "/compare"), { other: b.id, ...given });

/** What there is to say of a run without records, or before its service can diagnose. */
export const NO_DIAGNOSIS = { causes: [], abstains: true, precision: null };

export const diagnosis = async (run, step = null) => optional(get(path(run, "/diagnosis"), { step }), NO_DIAGNOSIS);

export const forecaster = () => optional(get("/forecaster"), null);

const toAlert = (row) => ({
  ...row, key: String(row.id), fired: row.fired_step, since: row.starts_at,
  href: href({ view: "run", project: row.project, run: row.run, params: { step: row.step } }),
});

/** Alerts, newest first, of one run or (null) of all; the newest 200. */
export async function alerts(run, state = null) {
  const answer = await optional(get("/alerts", { run: run?.id, state, limit: 200 }), { alerts: [] });
  return answer.alerts.map(toAlert);
}

export const alarms = (rows) => rows.filter((row) => row.fired !== null && row.fired !== undefined).map((row) => ({ step: row.fired, id: row.id }));

const toAlarm = (alert, what, body, note) =>
  post(`/api/v1/alerts/${encodeURIComponent(alert.id)}/${what}`, { ...body, ...(note ? { note } : {}) });

export const answerAlert = (alert, correct, note) => toAlarm(alert, "feedback", { correct }, note);
export const acknowledge = (alert, note) => toAlarm(alert, "acknowledge", {}, note);
export const snooze = (alert, seconds, note) => toAlarm(alert, "snooze", { seconds }, note);
export const unmute = (alert) => toAlarm(alert, "unmute", {}, null);
