// Texts without enough contrast on the page as it stands; run as the body of a function by test_page_views.py.
// WCAG 2.1: relative luminance, and 4.5:1 for text of ordinary size (3:1 from 24 px, or bold 19 px).
const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parse = text => text.match(/[\d.]+/g).map(Number);
const ground = node => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const poor = [];
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim());
  if (!own || node.closest('svg, noscript, :disabled') || !node.offsetParent) continue;
  const style = getComputedStyle(node), size = parseFloat(style.fontSize);
  const [a, b] = [light(parse(style.color)), light(ground(node))].sort((x, y) => y - x);
  const wanted = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < wanted) poor.push(`${node.textContent.trim()}: ${ratio.toFixed(2)}`);
}
return poor;
