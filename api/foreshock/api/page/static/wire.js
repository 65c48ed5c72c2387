// Knows the paths and JSON of the public API, and gives the page's other modules plain shapes.

import { get } from "./api.js";

export const STATISTICS = [
  "kurtosis", "kurtosis_sequence_mean", "channel_kurtosis", "amax", "rms", "underflow_ratio", "subnormal_ratio",
  "overflow_ratio", "headroom_log2", "sqnr_db", "scale_log2", "top_channel_share", "zero_ratio", "nonfinite_count", "min_nonzero",
];
export const ROLES = ["input", "weight", "grad_output"];

const POINTS = 800; // points per line: about one per pixel
const path = (run, tail = "") => `/runs/${encodeURIComponent(run.name)}${tail}`;
const scope = (run) => ({ project: run.project === "default" ? null : run.project });

export function eventsPath(run) {
  const tail = run.project === "default" ? "" : `?project=${encodeURIComponent(run.project)}`;
  return `/api/v1${path(run, "/events")}${tail}`;
}

function activity(run) {
  const seconds = (Date.now() - Date.parse(run.last_time)) / 1000;
  if (!Number.isFinite(seconds)) return "no records";
  if (seconds < 60) return "live";
  return `silent for ${seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`}`;
}

function toRun(row) {
  const search = new URLSearchParams({ run: row.run });
  if (row.project !== "default") search.set("project", row.project);
  return {
    key: `${row.project}/${row.run}`, name: row.run, project: row.project, href: `/?${search}`,
    lastStep: row.last_step, activity: activity(row), loss: row.loss, attempts: row.attempts, state: row.state,
    risks: Object.entries(row.risk ?? {}).filter(([, p]) => p !== null),
  };
}

export async function runs() {
  return (await get("/runs")).runs.map(toRun);
}

export const risk = (run) => get(path(run, "/risk"), scope(run));

export async function history(run) {
  const answer = await get(path(run, "/risk/history"), { ...scope(run), points: POINTS });
  const alarms = answer.step.filter((_, i) => answer.state[i] === "firing" && answer.state[i - 1] !== "firing");
  return { ...answer, alarms: alarms.map((step) => ({ step })) };
}

export async function loss(run) {
  const answer = await get(path(run, "/series"), { ...scope(run), name: "loss", points: POINTS });
  return { step: answer.step, value: answer.mean };
}

export async function heat(run, statistic, role) {
  return get(path(run, "/heatmap"), { ...scope(run), statistic, role });
}

export const diagnosis = async (run) => (await get(path(run, "/diagnosis"), scope(run))).causes;

export async function alerts(run) {
  const answer = await get("/alerts", { run: run.name, ...scope(run) });
  return answer.alerts.map((row) => ({
    id: row.id, state: row.state, kind: row.kind, step: row.step, since: row.starts_at,
    fired: row.fired_step, summary: row.summary, correct: row.correct,
  }));
}

export const alarms = (rows) => rows.filter((row) => row.fired !== null && row.fired !== undefined).map((row) => ({ step: row.fired }));

export const feedback = (correct) => ({ correct });
