// A line of some sixty points in a table cell: drawn by hand, so that a list of runs loads no charts.

import { drawable } from "./api.js";

const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

/** Points of a path with gaps where nothing was measured; y from 0 (bottom) to 1. */
export function outline(steps, values, [low, high], [width, height]) {
  const first = steps[0];
  const across = Math.max(1, steps.at(-1) - first);
  const up = high > low ? high - low : 1;
  let path = "", pen = "M";
  values.forEach((value, i) => {
    if (value === null) {
      pen = "M";
      return;
    }
    const x = (((steps[i] - first) / across) * width).toFixed(1);
    const y = (height - Math.min(1, Math.max(0, (value - low) / up)) * height).toFixed(1);
    path += `${pen}${x} ${y}`;
    pen = "L";
  });
  return path;
}

/** Draws into an svg element. `range` null takes the values' own, outliers left out: a spike must not flatten the rest. */
export function sparkline(svg, { step, value, range = null, label, kind }) {
  const [width, height] = [120, 26];
  const values = value.map(drawable);
  const known = values.filter((each) => each !== null).sort((a, b) => a - b);
  svg.setAttribute("viewBox", `-1 -2 ${width + 2} ${height + 4}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", known.length ? label : "no values");
  svg.setAttribute("class", `spark ${kind}`);
  if (known.length < 2) {
    svg.replaceChildren();
    return;
  }
  const at = (share) => known[Math.round(share * (known.length - 1))];
  const box = range ?? [at(0.01), at(0.99)];
  svg.replaceChildren(shape("path", { d: outline(step, values, box, [width, height]) }));
}

export const canvas = () => document.createElementNS(SVG, "svg");
