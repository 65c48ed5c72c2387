/* global Plotly */
// Draws the three charts from prepared numbers. Fetches nothing and keeps nothing.

import { $ } from "./dom.js";
import { drawable } from "./api.js";

const HORIZON_COLOURS = ["--near", "--middle", "--far"];
const DASHES = ["solid", "dash", "dot"];
const LOG_STATISTICS = /^(amax|rms|kurtosis|kurtosis_sequence_mean|channel_kurtosis|min_nonzero)$/;
// Plotly's default tool bar offers to send a chart to its maker's cloud: a run's data never leaves this page.
const OPTIONS = {
  displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["lasso2d", "select2d", "toImage", "autoScale2d"],
};

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Plotly reads markup in labels: names come from outside and must stay text. */
export const escape = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function translucent(hex, alpha) {
  const value = parseInt(hex.slice(1), 16);
  return `rgba(${value >> 16}, ${(value >> 8) & 255}, ${value & 255}, ${alpha})`;
}

function layout(key, extra) {
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, automargin: true };
  return {
    uirevision: key, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--muted") },
    margin: { l: 52, r: 52, t: 26, b: 36 }, hovermode: "x unified", dragmode: "zoom",
    hoverlabel: { bgcolor: colour("--surface"), bordercolor: colour("--line"), font: { color: colour("--text"), size: 12 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent") },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
    ...extra,
    xaxis: { ...axis, title: { text: "step", standoff: 4 }, tickformat: ",d", hoverformat: ",d", ...extra.xaxis },
    yaxis: { ...axis, ...extra.yaxis },
    ...(extra.yaxis2 ? { yaxis2: { ...axis, ...extra.yaxis2 } } : {}),
  };
}

function alarmShapes(alarms, line = colour("--firing")) {
  return alarms.map((alarm) => ({
    type: "line", x0: alarm.step, x1: alarm.step, yref: "paper", y0: 0, y1: 1, line: { color: line, width: 1.5, dash: "dot" },
  }));
}

function alarmNotes(alarms) {
  const last = alarms.slice(-3);
  return last.map((alarm) => ({
    x: alarm.step, yref: "paper", y: 1, yanchor: "top", xanchor: "right", showarrow: false, xshift: -4,
    text: `▲ alarm at step ${alarm.step.toLocaleString("en")}`, font: { color: colour("--firing"), size: 12 },
  }));
}

/** Loss on the left axis, the risk of one horizon shaded behind it on the right one. */
export function drawLoss(view) {
  const { loss, risk, horizon, alarms, log } = view;
  const y = loss.value.map(drawable);
  const { broken } = loss;
  const traces = [];
  if (risk && horizon) {
    traces.push({
      name: `risk within ${horizon} steps`, x: risk.step, y: risk.probability[horizon].map(drawable), yaxis: "y2", mode: "lines",
      line: { color: colour("--middle"), width: 1 }, fill: "tozeroy", fillcolor: colour("--shade"), hovertemplate: "%{y:.1%}",
    });
  }
  traces.push({ name: "loss", x: loss.step, y, mode: "lines", line: { color: colour("--loss"), width: 1.8 }, hovertemplate: "%{y:.4g}" });
  if (broken.length) {
    const marker = { symbol: "x", size: 8, color: colour("--firing") };
    traces.push({ name: "loss not finite", x: broken, y: broken.map(() => 0.97), yaxis: "y2", mode: "markers", marker, hovertemplate: "NaN or infinite" });
  }
  // The axis on the right lies below: risk is the ground, loss the figure.
  const behind = traces.some((trace) => trace.yaxis === "y2");
  const figure = layout(`${view.key}|${log}`, {
    yaxis: { title: { text: "loss" }, type: log ? "log" : "linear", side: "left", ...(behind ? { overlaying: "y2", tickmode: "auto" } : {}) },
    ...(behind ? { yaxis2: { title: { text: "risk" }, side: "right", range: [0, 1.02], tickformat: ".0%", showgrid: false } } : {}),
    shapes: alarmShapes(alarms), annotations: alarmNotes(alarms),
  });
  return Plotly.react($("loss"), traces, figure, OPTIONS);
}

/** One line per horizon with its band. */
export function drawRisk(view) {
  const { risk, horizons, alarms } = view;
  const traces = horizons.flatMap((horizon, i) => {
    const name = `${horizon} steps`;
    const line = colour(HORIZON_COLOURS[i % 3]);
    const edge = { x: risk.step, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: name };
    const band = risk.low ? [
      { ...edge, y: risk.low[horizon].map(drawable) },
      { ...edge, y: risk.high[horizon].map(drawable), fill: "tonexty", fillcolor: translucent(line, 0.16) },
    ] : [];
    const middle = {
      name, legendgroup: name, x: risk.step, y: risk.probability[horizon].map(drawable), mode: "lines",
      line: { color: line, width: 2, dash: DASHES[i % 3] }, hovertemplate: "%{y:.1%}",
    };
    return [...band, middle];
  });
  const figure = layout(view.key, {
    yaxis: { range: [0, 1.02], tickformat: ".0%" }, shapes: alarmShapes(alarms), margin: { l: 52, r: 14, t: 26, b: 36 },
  });
  return Plotly.react($("risk"), traces, figure, OPTIONS);
}

/** Layers from top to bottom in the order of the model, steps from left to right; the bad end is the bright one. */
export function drawHeat(view) {
  const { heat, statistic, alarms } = view;
  const log = LOG_STATISTICS.test(statistic);
  const seen = heat.values.map((row) => row.map(drawable));
  const z = log ? seen.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null))) : seen;
  const trace = {
    type: "heatmap", x: heat.steps, y: heat.layers.map(escape), z, customdata: seen, colorscale: "Cividis", reversescale: heat.worst === "min", hoverongaps: false,
    hovertemplate: "%{y}<br>step %{x:,d}<br>%{customdata:.4g}<extra></extra>",
    colorbar: { title: { text: `${log ? "log10 " : ""}${escape(statistic).replaceAll("_", " ")}`, side: "right" }, thickness: 10, outlinewidth: 0, xpad: 6 },
  };
  const rows = heat.layers.length;
  $("heat").style.minHeight = `${Math.min(760, Math.max(240, 96 + 20 * rows))}px`;
  const figure = layout(`${view.key}|${statistic}|${view.role}`, {
    yaxis: { autorange: "reversed", type: "category", showgrid: false, ticks: "", tickfont: { size: 11 } },
    xaxis: { showgrid: false, nticks: 6, tickangle: 0 }, hovermode: "closest", shapes: alarmShapes(alarms, "#ffffff"), margin: { l: 60, r: 10, t: 30, b: 36 },
  });
  return Plotly.react($("heat"), [trace], figure, OPTIONS);
}

export const clear = () => ["loss", "risk", "heat"].forEach((id) => Plotly.purge($(id)));
