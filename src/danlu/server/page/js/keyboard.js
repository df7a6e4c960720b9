/** Keyboard shortcuts of the whole page. */

const isTyping = (target) => target.matches?.("input, textarea, select, [contenteditable]");

/** @param {Record<"search" | "create" | "sidebar" | "settings" | "message" | "help" | "escape", () => void>} acts */
export function listen(acts) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    const act = actOf(event);
    if (!act) return;
    if (act !== "escape") event.preventDefault();
    acts[act]();
  });
}

function actOf(event) {
  const key = event.key.toLowerCase();
  if (key === "escape") return "escape";
  if ((event.ctrlKey || event.metaKey) && !event.altKey) {
    if (event.shiftKey) return key === "o" ? "create" : null;
    return { k: "search", b: "sidebar", ".": "settings", "/": "help" }[key];
  }
  if (event.altKey || isTyping(event.target)) return null;
  return { "/": "message", "?": "help" }[key];
}
