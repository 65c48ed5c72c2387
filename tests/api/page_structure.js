// What is wrong with the structure of the page as it stands; run as the body of a function by test_page_views.py.
// What axe-core calls duplicate-id, heading-order, landmark-one-main, page-has-heading-one, label, aria-valid-attr-value,
// aria-hidden-focus, nested-interactive, scrollable-region-focusable, list, scope-attr-valid, document-title, html-has-lang,
// tabindex, target-size.
const wrong = [], shown = node => node.getClientRects().length > 0;
const all = selector => [...document.querySelectorAll(selector)];
const ids = all('[id]').map(node => node.id);
for (const id of new Set(ids)) if (ids.filter(each => each === id).length > 1) wrong.push(`id ${id}`);
if (!document.documentElement.lang) wrong.push('no language');
if (!document.title.includes('foreshock')) wrong.push('no title');
if (all('main').length !== 1) wrong.push('not one main');
const headings = all('h1, h2, h3, h4').filter(shown).map(node => Number(node.tagName[1]));
if (headings.filter(level => level === 1).length !== 1) wrong.push(`h1: ${headings}`);
headings.forEach((level, i) => i && level > headings[i - 1] + 1 && wrong.push(`headings ${headings}`));
for (const node of all('input, select, textarea').filter(shown))
  if (!node.labels?.length && !node.getAttribute('aria-label')) wrong.push(`label of ${node.id}`);
for (const name of ['aria-labelledby', 'aria-describedby', 'aria-controls', 'for', 'list'])
  for (const node of all(`[${name}]`))
    for (const id of node.getAttribute(name).split(' ')) if (!document.getElementById(id)) wrong.push(`${name} ${id}`);
const focusable = 'a[href], button, input, select, summary, [tabindex]';
for (const node of all('[aria-hidden=true]')) if (node.querySelector(focusable)) wrong.push('focus in hidden');
for (const node of all('a, button, summary')) if (node.querySelector('a, button, input, select')) wrong.push(`nested in ${node.textContent}`);
for (const node of all('[tabindex]')) if (Number(node.tabIndex) > 0) wrong.push('tabindex');
for (const node of all('#main *')) {
  const style = getComputedStyle(node);
  if (/auto|scroll/.test(style.overflowX) && node.scrollWidth > node.clientWidth + 1 && node.tabIndex < 0 && !node.querySelector(focusable)) wrong.push(`scrolls: ${node.className}`);
}
for (const list of all('ul, ol')) for (const item of list.children) if (item.tagName !== 'LI') wrong.push(`list ${list.id}`);
for (const cell of all('thead th')) if (cell.scope !== 'col') wrong.push(`column ${cell.textContent}`);
for (const cell of all('tbody th')) if (cell.scope !== 'row') wrong.push(`row ${cell.textContent}`);
for (const node of all('button, input[type=checkbox]').filter(shown)) {
  const box = (node.closest('label') ?? node).getBoundingClientRect();
  if (box.height < 17 || box.width < 17) wrong.push(`small: ${node.textContent || node.id} ${box.width}x${box.height}`);
}
return [...new Set(wrong)];
