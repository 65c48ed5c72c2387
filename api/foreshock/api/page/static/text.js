// Numbers and times as a reader wants them. Pure.

export const grouped = (value) => (value === null || value === undefined ? "–" : Number(value).toLocaleString("en"));

export function percent(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0 %";
  if (value > 0 && value < 0.001) return "<0.1 %";
  return `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
}

export function short(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

const span = (seconds) => {
  const [size, word] = seconds < 90 ? [1, "s"] : seconds < 5400 ? [60, "min"] : seconds < 129600 ? [3600, "h"] : [86400, "d"];
  return `${Math.round(seconds / size)} ${word}`;
};

export function ago(time) {
  const seconds = (Date.now() - Date.parse(time)) / 1000;
  if (!Number.isFinite(seconds)) return "";
  return seconds < 5 ? "just now" : `${span(seconds)} ago`;
}

export const lasted = (from, to) => span(Math.max(0, (Date.parse(to) - Date.parse(from)) / 1000));

export const words = (name) => name.replaceAll("_", " ");

const WHEN = { dateStyle: "medium", timeStyle: "short" };
export const moment = (time) => (time ? new Date(time).toLocaleString("en", WHEN) : "");

/** What a run is doing, in words. */
export function activity(row) {
  const seconds = (Date.now() - Date.parse(row.last_received)) / 1000;
  if (row.status === "new" || !Number.isFinite(seconds)) return "no records yet";
  if (row.status === "live" || row.status === "finished") return row.status;
  return `silent for ${span(seconds)}`;
}
