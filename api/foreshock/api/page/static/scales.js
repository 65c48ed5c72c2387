// Colour scales for maps of numbers. Both can be read by people without red, green or blue cones, and in grey:
// tests/api/test_page_colours.py checks that luminance rises all along (and, of the second, on both sides of its middle).

// Cividis (Nunez, Anderton, Renslow 2018, doi:10.1371/journal.pone.0199239): every 16th colour of its published table.
export const SEQUENTIAL = [
  "#00224e", "#002e6a", "#1a386f", "#32436d", "#434e6c", "#535a6d", "#61656f", "#6f7073", "#7d7c78",
  "#8c8878", "#9b9476", "#aba072", "#bcae6c", "#cdbb63", "#dec958", "#f0d846", "#fee838",
];

// From blue over grey to brown: the middle is "alike" and recedes into the page, the ends stand out from it.
export const DIVERGING_ON_DARK = ["#a9d3f5", "#6aaade", "#3b78ad", "#274a6b", "#20242c", "#5a4322", "#8f6322", "#cc9850", "#f5d5a2"];
export const DIVERGING_ON_LIGHT = ["#0b3c6f", "#2a6ea6", "#6fa8d0", "#b9d5e8", "#f5f4f0", "#ecd0a4", "#cf9a52", "#9a5f17", "#5a3200"];

/** As plotly.js takes a scale: [[0, colour], ..., [1, colour]]. */
export const stops = (colours) => colours.map((colour, i) => [i / (colours.length - 1), colour]);
