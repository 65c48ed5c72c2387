// What a browser remembers of a reader's choices. Works where storage is forbidden, only without remembering.

const KEYS = { theme: "foreshock-theme", keys: "foreshock-keys", signedIn: "foreshock-signed-in" };

export function remembered(name) {
  try {
    return localStorage.getItem(KEYS[name]);
  } catch {
    return null;
  }
}

export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(KEYS[name]);
    else localStorage.setItem(KEYS[name], value);
  } catch {
    // nothing to do: the choice holds until the page is left
  }
}

export const THEMES = ["system", "light", "dark"];

export const theme = () => document.documentElement.dataset.theme ?? "system";

/** Uses a theme from now on; the caller draws its charts anew. */
export function setTheme(chosen) {
  if (chosen === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  remember("theme", chosen === "system" ? null : chosen);
}
