// Knows the paths and JSON of the public API, and gives the page's other modules plain shapes.

import { Unknown, get, number } from "./api.js";

export const STATISTICS = [
  "kurtosis", "kurtosis_sequence_mean", "channel_kurtosis", "amax", "rms", "underflow_ratio", "subnormal_ratio",
  "overflow_ratio", "headroom_log2", "sqnr_db", "scale_log2", "top_channel_share", "zero_ratio", "nonfinite_count", "min_nonzero",
];
export const ROLES = ["input", "weight", "grad_output"];

const POINTS = 800; // points per line: about one per pixel
const path = (run, tail = "") => `/runs/${run.id}${tail}`;

export const incidentPath = (run, step) => `/api/v1${path(run, "/incident")}?${new URLSearchParams({ step })}`;
export const eventsPath = (run) => `/api/v1${path(run, "/events")}`;

/** What a part answers that this service may not have; a run that is gone still fails elsewhere. */
const optional = (answer, without) => answer.catch((error) => {
  if (error instanceof Unknown) return without;
  throw error;
});

function activity(row) {
  const seconds = (Date.now() - Date.parse(row.last_received)) / 1000;
  if (row.status === "new" || !Number.isFinite(seconds)) return "no records yet";
  if (row.status === "live" || row.status === "finished") return row.status;
  const [size, word] = seconds < 5400 ? [60, "min"] : seconds < 129600 ? [3600, "h"] : [86400, "d"];
  return `quiet for ${Math.round(seconds / size)} ${word}`;
}

function toRun(row) {
  const search = new URLSearchParams({ run: row.run });
  if (row.project !== "default") search.set("project", row.project);
  return {
    id: row.run_id, name: row.run, project: row.project, href: `/?${search}`, lastStep: row.last_step, activity: activity(row),
    live: row.status === "live", created: row.created_at ?? "", loss: row.loss, attempts: row.attempts, attempt: row.attempt,
    state: row.state, risks: Object.entries(row.risk ?? {}).map(([h, p]) => [h, number(p)]).filter(([, p]) => p !== null),
  };
}

/** Live runs first, then the youngest: an order that does not change with every record. */
export async function runs() {
  const rows = [];
  for (let cursor = null; ;) {
    const page = await get("/runs", { order: "created", limit: 1000, cursor });
    rows.push(...page.runs.map(toRun));
    cursor = page.next;
    if (!cursor) break;
  }
  return rows.sort((a, b) => b.live - a.live || b.created.localeCompare(a.created) || a.name.localeCompare(b.name));
}

/** Roles of tensors that a run has recorded, in the order in which they are of interest. */
export async function roles(run) {
  const known = new Set((await get(path(run))).roles);
  return [...ROLES.filter((role) => known.has(role)), ...[...known].filter((role) => !ROLES.includes(role))];
}

export const risk = (run) => optional(get(path(run, "/risk")), null);

export function history(run) {
  const nothing = { step: [], probability: {} };
  return optional(get(path(run, "/risk/history"), { points: POINTS }), nothing);
}

export async function loss(run) {
  const answer = await get(path(run, "/series"), { name: "loss", points: POINTS });
  return { step: answer.step, value: answer.mean, broken: answer.step.filter((_, i) => answer.nonfinite[i] > 0) };
}

export const heat = (run, statistic, role) => get(path(run, "/heatmap"), { statistic, role });

export const diagnosis = async (run) => (await optional(get(path(run, "/diagnosis")), { causes: [] })).causes;

export async function alerts(run) {
  const answer = await optional(get("/alerts", { run: run.id }), { alerts: [] });
  return answer.alerts.map((row) => ({
    id: row.id, state: row.state, kind: row.kind, step: row.step, since: row.starts_at, fired: row.fired_step,
    summary: row.summary, correct: row.correct,
  }));
}

export const alarms = (rows) => rows.filter((row) => row.fired !== null && row.fired !== undefined).map((row) => ({ step: row.fired }));

export const feedback = (correct) => ({ correct });
