/** Dialogs that ask or tell one thing. */
import { el, iconButton, textButton } from "./dom.js";
import { say } from "./i18n.js";

/** Shows a dialog; it is gone once closed, and the focus goes back to where it was (the browser sees to that). */
function open(dialog) {
  document.body.append(dialog);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue)));
}

function form(title, contents, confirm, kind) {
  const heading = say(el("h2", { id: "dialog-title" }), title);
  const cancel = say(
    el("button", { type: "submit", class: "button quiet", value: "", formnovalidate: true }),
    "cancel",
  );
  const done = say(el("button", { type: "submit", class: `button ${kind}`, value: "done" }), confirm);
  // The confirming button stands first in the document, so that Enter means it; the style sheet puts it last.
  const buttons = el("div", { class: "row end reversed" }, done, cancel);
  return el(
    "dialog",
    { "aria-labelledby": "dialog-title" },
    el("form", { method: "dialog" }, heading, ...contents, buttons),
  );
}

/** @returns {Promise<boolean>} */
export async function confirmDelete(title) {
  const text = say(el("p"), "delete.text", { title });
  return (await open(form("delete.title", [text], "menu.delete", "danger"))) === "done";
}

/** @returns {Promise<string | null>} the new title. */
export async function askTitle(title) {
  const input = el("input", { value: title, maxlength: 200, required: true, id: "title-input", autocomplete: "off" });
  const caption = say(el("label", { for: "title-input" }), "rename.label");
  const dialog = form("rename.title", [el("div", { class: "field" }, caption, input)], "save", "primary");
  const answer = open(dialog);
  input.select();
  return (await answer) === "done" ? input.value.trim() || null : null;
}

const onMac = /Mac|iPhone|iPad/.test(navigator.platform);
const command = onMac ? "⌘" : "Ctrl";

const SHORTCUTS = [
  [["Enter"], "help.send"],
  [["Shift", "Enter"], "help.line"],
  [["Esc"], "help.stop"],
  [["↑"], "help.edit"],
  [[command, "K"], "help.search"],
  [[command, "Shift", "O"], "help.new"],
  [[command, "B"], "help.sidebar"],
  [[command, "."], "help.settings"],
  [["/"], "help.message"],
  [["?"], "help.help"],
];

export function showHelp() {
  const rows = SHORTCUTS.map(([keys, text]) => {
    const shown = keys.flatMap((key, at) => [at ? " + " : "", el("kbd", {}, key)]);
    return el("div", { class: "shortcut" }, say(el("dt"), text), el("dd", {}, ...shown));
  });
  const close = iconButton("close", "close", () => dialog.close());
  const head = el("div", { class: "row between" }, say(el("h2", { id: "dialog-title" }), "help"), close);
  const dialog = el("dialog", { class: "help", "aria-labelledby": "dialog-title" }, head, el("dl", {}, ...rows));
  return open(dialog);
}

/** A menu below a button: {key, picture, act, kind?} each. */
export function openMenu(button, items) {
  const menu = el("div", { class: "menu", popover: "auto", role: "menu" });
  for (const { key, picture, act, kind = "" } of items) {
    const choose = () => (menu.hidePopover(), act());
    const item = textButton(key, choose, { picture, kind: `quiet ${kind}` });
    item.setAttribute("role", "menuitem");
    menu.append(item);
  }
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = [...menu.children];
    all.at((all.indexOf(document.activeElement) + step) % all.length).focus();
  });
  menu.addEventListener("toggle", (event) => {
    button.setAttribute("aria-expanded", event.newState === "open");
    if (event.newState === "closed") menu.remove();
  });
  button.after(menu); // next in the order of the keyboard
  menu.showPopover();
  const box = button.getBoundingClientRect();
  const { width, height } = menu.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(box.right - width, innerWidth - width - 8))}px`;
  menu.style.top = `${box.bottom + height + 8 > innerHeight ? box.top - height - 4 : box.bottom + 4}px`;
  menu.firstChild.focus();
}
