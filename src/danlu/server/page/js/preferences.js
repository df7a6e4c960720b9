/** What this browser remembers: theme, language, the settings of the last conversation. Nothing of what was said. */

export function remembered(name, otherwise = null) {
  try {
    return JSON.parse(localStorage.getItem(`danlu.${name}`)) ?? otherwise;
  } catch {
    return otherwise; // storage may be barred, or hold what an older page wrote
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`danlu.${name}`, JSON.stringify(value));
  } catch {
    // Without storage the page works; it forgets.
  }
}

/** @param {"system" | "light" | "dark"} theme */
export function setTheme(theme) {
  remember("theme", theme);
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
