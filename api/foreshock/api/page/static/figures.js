// The page's figures from prepared numbers: {traces, layout} for plotly.js. Fetches nothing and keeps nothing.

import { drawable } from "./api.js";
import { alarmNotes, colour, escape, layout, marks, translucent } from "./charts.js";
import { DIVERGING_ON_DARK, DIVERGING_ON_LIGHT, SEQUENTIAL, stops } from "./scales.js";
import { grouped, words } from "./text.js";

const HORIZON_COLOURS = ["--near", "--middle", "--far"];
export const LINES = ["--near", "--middle", "--far", "--fourth", "--fifth", "--loss"];
export const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "solid"];
const LOG_STATISTICS = /^(amax|rms|kurtosis|kurtosis_sequence_mean|channel_kurtosis|min_nonzero|mu)$/;
export const isLog = (statistic) => LOG_STATISTICS.test(statistic);

const NARROW = { l: 52, r: 14, t: 26, b: 40 };

/** A line with the smallest and largest values of each stretch as a band, where the service has put steps together. */
function lineWithBand(name, { step, low, value, high }, { line, dash = "solid", width = 1.8, hover = "%{y:.4g}" }) {
  const spread = low?.some((each, i) => each !== value[i]);
  const edge = { x: step, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: name };
  const band = spread ? [
    { ...edge, y: low.map(drawable) },
    { ...edge, y: high.map(drawable), fill: "tonexty", fillcolor: translucent(line, 0.16) },
  ] : [];
  const middle = {
    name: escape(name), legendgroup: name, x: step, y: value.map(drawable), mode: step.length > 1 ? "lines" : "markers",
    line: { color: line, width, dash }, marker: { color: line }, hovertemplate: hover,
  };
  return [...band, middle];
}

/** Loss on the left axis, the risk of one horizon shaded behind it on the right one. */
export function lossFigure({ loss, risk, horizon, alarms, step, log, range }) {
  const traces = [];
  if (risk && horizon) {
    const line = colour("--middle");
    traces.push({
      name: `risk within ${grouped(horizon)} steps`, x: risk.step, y: risk.probability[horizon].map(drawable), yaxis: "y2", mode: "lines",
      line: { color: line, width: 1 }, fill: "tozeroy", fillcolor: translucent(line, 0.22), hovertemplate: "%{y:.1%}",
    });
  }
  traces.push(...lineWithBand("loss", loss, { line: colour("--loss") }));
  if (loss.broken.length) {
    const marker = { symbol: "x", size: 8, color: colour("--firing") };
    traces.push({ name: "loss not finite", x: loss.broken, y: loss.broken.map(() => 0.97), yaxis: "y2", mode: "markers", marker, hovertemplate: "NaN or infinite" });
  }
  // The axis on the right lies below: risk is the ground, loss the figure.
  const behind = traces.some((trace) => trace.yaxis === "y2");
  return {
    traces,
    layout: layout(range, {
      yaxis: { title: { text: "loss" }, type: log ? "log" : "linear", side: "left", ...(behind ? { overlaying: "y2", tickmode: "auto" } : {}) },
      ...(behind ? { yaxis2: { title: { text: "risk" }, side: "right", range: [0, 1.02], tickformat: ".0%", showgrid: false } } : {}),
      shapes: marks({ alarms, step }), annotations: alarmNotes(alarms),
    }),
  };
}

/** One line per horizon with its band. */
export function riskFigure({ risk, horizons, alarms, step, range }) {
  const traces = horizons.flatMap((horizon, i) => lineWithBand(
    `${grouped(horizon)} steps`,
    { step: risk.step, low: risk.low?.[horizon], value: risk.probability[horizon], high: risk.high?.[horizon] },
    { line: colour(HORIZON_COLOURS[i % 3]), dash: DASHES[i % 3], width: 2, hover: "%{y:.1%}" },
  ));
  return { traces, layout: layout(range, { yaxis: { range: [0, 1.02], tickformat: ".0%" }, shapes: marks({ alarms, step }), margin: NARROW }) };
}

/** Ticks of a logarithmic axis that do not crowd: powers of ten, or 1, 2 and 5 of each, or even distances in a short range. */
function logTicks(lines) {
  const known = lines.flatMap(({ series }) => [...(series.low ?? []), ...(series.high ?? [])]).map(drawable).filter((value) => value > 0);
  if (!known.length) return {};
  const [low, high] = known.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, 0]);
  if (high / low < 1.05) return { nticks: 3 };
  if (high / low > 500) return { dtick: Math.max(1, Math.round(Math.log10(high / low) / 4)) };
  if (high / low > 4) return { dtick: "D2" };
  const rough = (high - low) / 3 || high;
  const size = 10 ** Math.floor(Math.log10(rough));
  return { dtick: `L${size * (rough / size >= 5 ? 5 : rough / size >= 2 ? 2 : 1)}` };
}

/** Lines of one unit: [{name, series, place}], the place choosing colour and dash. */
export function linesFigure({ lines, log, alarms = [], step, range, small = false, title = null }) {
  const traces = lines.flatMap(({ name, series, place }) => lineWithBand(
    name, series, { line: colour(LINES[place % LINES.length]), dash: DASHES[place % DASHES.length], width: small ? 1.5 : 1.8 },
  ));
  const frame = small ? { margin: { l: 46, r: 8, t: 6, b: 22 }, showlegend: false } : { margin: NARROW, showlegend: true };
  return {
    traces,
    layout: layout(range, {
      ...frame, shapes: marks({ alarms, step }),
      yaxis: { type: log ? "log" : "linear", ...(log ? logTicks(lines) : { nticks: small ? 5 : 8 }), ...(title ? { title: { text: escape(title) } } : {}) },
      xaxis: small ? { title: { text: "" }, nticks: 5 } : {},
    }),
  };
}

/**
 * The same map without columns that hold nothing because tensors are recorded at a cadence: a value then stands until the next.
 * Where far more than one record is missing, an empty column stays.
 */
export function withoutGaps(heat) {
  const held = heat.steps.map((_, j) => j).filter((j) => heat.values.some((row) => row[j] !== null));
  const apart = held.slice(1).map((j, i) => j - held[i]).sort((a, b) => a - b);
  const usual = apart[Math.floor(apart.length / 2)] ?? 1;
  const kept = held.flatMap((j, i) => (i && j - held[i - 1] > 3 * usual ? [held[i - 1] + usual, j] : [j]));
  return { ...heat, steps: kept.map((j) => heat.steps[j]), values: heat.values.map((row) => kept.map((j) => row[j])) };
}

export const rowName = (heat, i) => (heat.counts[i] > 1 ? `${heat.layers[i]} +${heat.counts[i] - 1}` : heat.layers[i]);

const shortened = (name) => (name.length > 34 ? `…${name.slice(-33)}` : name);

function heatLayout({ heat, alarms, step, range }) {
  const rows = heat.layers.length;
  const every = Math.max(1, Math.ceil(rows / 48));
  const shown = heat.layers.map((_, i) => i).filter((i) => i % every === 0);
  return layout(range, {
    // Names may be alike once they are cut: rows are numbers, names only their labels.
    yaxis: {
      autorange: "reversed", showgrid: false, ticks: "", tickfont: { size: 11 }, tickvals: shown,
      ticktext: shown.map((i) => escape(shortened(rowName(heat, i)))),
    },
    xaxis: { showgrid: false, nticks: 6, tickangle: 0 }, hovermode: "closest", shapes: marks({ alarms, step }, "#ffffff"),
    margin: { l: 60, r: 10, t: 12, b: 40 },
  });
}

const hovered = (heat, seen) => seen.map((row, i) => row.map((value) => [escape(rowName(heat, i)), value]));
const OVER = "%{customdata[0]}<br>step %{x:,d}<br>%{customdata[1]:.4g}<extra></extra>";

/** Layers from top to bottom in the order of the model, steps from left to right; the bad end is the bright one. */
export function heatFigure({ heat, statistic, alarms, step, range }) {
  const log = isLog(statistic);
  const seen = heat.values.map((row) => row.map(drawable));
  const z = log ? seen.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null))) : seen;
  const trace = {
    type: "heatmap", x: heat.steps, y: heat.layers.map((_, i) => i), z, customdata: hovered(heat, seen), colorscale: stops(SEQUENTIAL),
    reversescale: heat.worst === "min", hoverongaps: false, hovertemplate: OVER,
    colorbar: { title: { text: `${log ? "log10 " : ""}${escape(words(statistic))}`, side: "right" }, thickness: 10, outlinewidth: 0, xpad: 6 },
  };
  return { traces: [trace], layout: heatLayout({ heat, alarms, step, range }) };
}

const dark = () => Number(colour("--surface").match(/\d+/)[0]) < 128;

/** How far B lies from A, per layer and step; like the page itself where they agree, the same length of scale to both sides. */
export function differenceFigure({ heat, statistic, step, range }) {
  const known = heat.values.flat().filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
  const most = known[Math.floor(0.995 * (known.length - 1))] || 1; // one wild cell must not bleach all others
  const trace = {
    type: "heatmap", x: heat.steps, y: heat.layers.map((_, i) => i), z: heat.values, customdata: hovered(heat, heat.values),
    colorscale: stops(dark() ? DIVERGING_ON_DARK : DIVERGING_ON_LIGHT), zmin: -most, zmax: most, hoverongaps: false, hovertemplate: OVER,
    colorbar: { title: { text: isLog(statistic) ? "log2 (B / A)" : "B − A", side: "right" }, thickness: 10, outlinewidth: 0, xpad: 6 },
  };
  const figure = heatLayout({ heat, alarms: [], step, range });
  return { traces: [trace], layout: figure };
}

/** Forecast against what came, both on logarithmic axes: most forecasts are small. */
export function calibrationFigure({ curves }) {
  const positive = curves.flatMap(({ bins }) => bins.flat()).filter((value) => value > 0);
  const low = 10 ** Math.floor(Math.log10(Math.min(...positive, 0.1)));
  const grey = colour("--muted");
  const ideal = { name: "as forecast", x: [low, 1], y: [low, 1], mode: "lines", line: { color: grey, width: 1, dash: "dot" }, hoverinfo: "skip" };
  const traces = curves.map(({ name, bins, place }) => ({
    name: escape(name), x: bins.map(([mean]) => mean), y: bins.map(([, seen]) => (seen > 0 ? seen : null)), mode: "lines+markers",
    line: { color: colour(LINES[place]), width: 1.8, dash: DASHES[place] }, marker: { size: 7, symbol: ["circle", "square", "diamond"][place % 3] },
    hovertemplate: "forecast %{x:.2%}<br>came true %{y:.2%}<extra></extra>",
  }));
  const axis = { type: "log", range: [Math.log10(low), 0], tickformat: ".0%", dtick: 1, fixedrange: true };
  const figure = layout({}, { yaxis: { ...axis, title: { text: "share that came true" } }, hovermode: "closest", margin: { l: 62, r: 14, t: 26, b: 46 } });
  Object.assign(figure.xaxis, { ...axis, title: { text: "mean forecast of a tenth of the rows", standoff: 6 }, hoverformat: ".2%" });
  figure.xaxis.tickformat = low < 0.01 ? ".2~%" : ".0%";
  figure.yaxis.tickformat = figure.xaxis.tickformat;
  return { traces: [ideal, ...traces], layout: figure };
}

/** Height of a heatmap for so many rows, in pixels. */
export const heatHeight = (rows) => Math.min(760, Math.max(200, 76 + 20 * rows));
