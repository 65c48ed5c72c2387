/* global Plotly */
// Draws prepared figures with plotly.js, which is loaded when the first chart is wanted. Fetches no data.

import { grouped } from "./text.js";

// Plotly's default tool bar offers to send a chart to its maker's cloud: a run's data never leaves this page.
const OPTIONS = {
  displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "", doubleClick: false,
  displayModeBar: false,
};

let loading = null;

/** plotly.js is 1.4 MB: a page without charts does not wait for it. */
function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = document.getElementById("plotly").href;
    script.onload = resolve;
    script.onerror = () => {
      loading = null; // the next chart tries again
      reject(new Error("the charts could not be loaded"));
    };
    document.head.append(script);
  });
  return loading;
}

/** A colour of the page as the theme in force has it: rgb(...) */
export function colour(name) {
  const probe = document.getElementById("colour-probe");
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

export const translucent = (rgb, alpha) => rgb.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);

/** Plotly reads markup in labels: names come from outside and must stay text. */
export const escape = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** What all charts have in common. `range` holds the steps that a reader zoomed into, or {}. */
export function layout(range, extra) {
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, automargin: true };
  const within = range.from !== null && range.from !== undefined ? { range: [range.from, range.to], autorange: false } : {};
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--muted") },
    margin: { l: 52, r: 52, t: 26, b: 40 }, hovermode: "x unified", dragmode: "zoom", selectdirection: "h",
    hoverlabel: { bgcolor: colour("--surface"), bordercolor: colour("--line"), font: { color: colour("--text"), size: 12 } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
    ...extra,
    xaxis: { ...axis, automargin: false, title: { text: "step", standoff: 4 }, tickformat: ",d", hoverformat: ",d", ...within, ...extra.xaxis },
    yaxis: { ...axis, exponentformat: "e", fixedrange: true, ...extra.yaxis },
    ...(extra.yaxis2 ? { yaxis2: { ...axis, fixedrange: true, ...extra.yaxis2 } } : {}),
  };
}

const upright = (step, line) => ({ type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, line });

/** Alarms as dotted lines, the step that a reader chose as a solid one. */
export function marks({ alarms = [], step = null }, line = colour("--firing")) {
  const shapes = alarms.map((alarm) => upright(alarm.step, { color: line, width: 1.5, dash: "dot" }));
  if (step !== null) shapes.push(upright(step, { color: colour("--accent"), width: 1.5 }));
  return shapes;
}

export function alarmNotes(alarms) {
  return alarms.slice(0, 3).map((alarm) => ({
    x: alarm.step, yref: "paper", y: 1, yanchor: "top", xanchor: "right", showarrow: false, xshift: -4,
    text: `▲ alarm at step ${grouped(alarm.step)}`, font: { color: colour("--firing"), size: 12 },
  }));
}

const drawn = new Map();

/** Draws a figure, {traces, layout} from a function, so that it can be drawn anew in another theme. */
export async function paint(node, make) {
  await plotly();
  if (!node.isConnected) return;
  drawn.set(node, make);
  const { traces, layout: figure } = make();
  await Plotly.react(node, traces, figure, OPTIONS);
  // The chart has one name, its label; what it is made of is nothing to read out.
  for (const part of [node.firstElementChild, document.getElementById("js-plotly-tester")]) part?.setAttribute("aria-hidden", "true");
}

/** After a change of the theme, or for paper. */
export function repaint() {
  for (const [node, make] of drawn) {
    if (!node.isConnected) {
      Plotly.purge(node);
      drawn.delete(node);
      continue;
    }
    const { traces, layout: figure } = make();
    Plotly.react(node, traces, figure, OPTIONS);
    Plotly.Plots.resize(node);
  }
}

/** Forgets the charts of a view that is left. */
export function wipe(root) {
  for (const node of drawn.keys()) {
    if (!root.contains(node)) continue;
    Plotly.purge(node);
    drawn.delete(node);
  }
}

/** A reader chose a range of steps, or (null) all of them, or a step. Call after the first `paint`. */
export function listen(node, { zoomed, picked }) {
  if (node.dataset.listening || !node.data) return;
  node.dataset.listening = "yes";
  node.on("plotly_relayout", (event) => {
    const [low, high] = [event["xaxis.range[0]"], event["xaxis.range[1]"]];
    if (low !== undefined) zoomed?.({ from: Math.max(0, Math.floor(low)), to: Math.max(1, Math.ceil(high)) });
  });
  node.on("plotly_doubleclick", () => zoomed?.(null));
  node.on("plotly_click", (event) => picked?.(Math.round(event.points[0].x), event.points[0]));
}
