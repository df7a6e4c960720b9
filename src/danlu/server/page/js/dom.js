/** Elements, pictures and small things that every part of the page uses. */
import { label, say, t } from "./i18n.js";

/** An element. Attributes beginning with "on" are listeners; false and null leave an attribute out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const ICONS = {
  menu: "M4 7h16M4 12h10M4 17h16",
  plus: "M12 5v14M5 12h14",
  search: "M11 4a7 7 0 1 1 0 14 7 7 0 0 1 0-14ZM16.2 16.2 20 20",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  close: "M6 6l12 12M18 6 6 18",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  attach: "M19 11.5 12 18.4a4.4 4.4 0 0 1-6.3-6.2l7.4-7.3a3 3 0 0 1 4.2 4.2l-7.3 7.2a1.5 1.5 0 0 1-2.1-2.1l6.6-6.5",
  settings: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6a2 2 0 1 1 0 4 2 2 0 0 1 0-4ZM9 14a2 2 0 1 1 0 4 2 2 0 0 1 0-4Z",
  heat: "M12 3c.6 3.2 4.9 5.2 4.9 10a4.9 4.9 0 0 1-9.8 0c0-2 .9-3.2 1.8-4.1.2 1.5.9 2.4 1.7 2.6C10 8.7 10.5 5.4 12 3Z",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  check: "M5 12.500l4.5 4.500L19 7.5",
  edit: "M5 19l.8-3.600L16.2 5 19 7.8 8.6 18.200zM14 7.2 16.8 10",
  again: "M19 12a7 7 0 1 1-2.2-5.100M19 4v4h-4",
  forward: "M5 6l7 6-7 6zM13 6l7 6-7 6z",
  left: "M14 7l-5 5 5 5",
  right: "M10 7l5 5-5 5",
  down: "M7 10l5 5 5-5",
  columns: "M4 5h7v14H4zM15 12h6M18 9v6",
  leave: "M13 5H5v14h8M10 12h10M16.5 8.5 20 12l-3.5 3.5",
  theme: "M12 4a8 8 0 1 0 0 16V4Z",
  keyboard: "M3.5 7h17v10h-17zM7 10.500h.01M10.3 10.500h.01M13.7 10.500h.01M17 10.500h.01M8.5 13.800h7",
  language: "M4 6h9M8.5 4v2M11 6c-.8 3.5-3 6-6.5 7.500M6 8.500c1 2.5 3 4 5.5 5M12.5 20l4-9.5 4 9.500M14 17h5",
  download: "M12 4v11M7.5 10.8 12 15.200l4.5-4.400M5 19.500h14",
  upload: "M12 15.500v-11M7.5 8.8 12 4.400l4.5 4.400M5 19.500h14",
  trash: "M5 7h14M9.5 7V4.500h5V7M7 7l.8 12.500h8.400L17 7M10.3 10.500v5.500M13.7 10.500v5.5",
  tool: "M14.5 6.500a3.8 3.8 0 0 1 4.7-1.200l-2.4 2.5 1.5 1.5 2.4-2.400a3.8 3.8 0 0 1-5.2 4.700l-6.6 6.700a1.8 1.8 0 0 1-2.6-2.600l6.7-6.600a3.8 3.8 0 0 1 1.5-2.600Z",
  warning: "M12 4.5 21 19.500H3zM12 10.500v4M12 17h.01",
};

const SVG = "http://www.w3.org/2000/svg";

/** A picture that says nothing to a screen reader: its button has a label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that is a picture; `key` is the text of its label. */
export function iconButton(name, key, onclick, values) {
  return label(el("button", { type: "button", class: "icon-button", onclick }, icon(name)), key, values);
}

/** A button of words, with a picture before them where one is named. */
export function textButton(key, onclick, { picture = null, kind = "" } = {}) {
  return el(
    "button",
    { type: "button", class: `button ${kind}`, onclick },
    picture && icon(picture),
    say(el("span"), key),
  );
}

/** A short note at the foot of the page, read out by screen readers. */
export function notify(key, values, kind = "note") {
  const note = el("p", { class: `notice ${kind}` }, t(key, values));
  document.getElementById("notices").append(note);
  setTimeout(() => note.remove(), kind === "error" ? 9000 : 4000);
}

export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    notify("copy.failed", {}, "error"); // clipboards need https or this very machine
    return;
  }
  const before = button.querySelector(".icon");
  const done = icon("check");
  before?.replaceWith(done);
  announce(t("copied"));
  setTimeout(() => done.replaceWith(before), 1500);
}

/** Says something to screen readers only. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}
