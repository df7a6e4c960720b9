/** Files that go with a message: text becomes a fenced block of it. What is no text is refused with the reason. */
import { el, iconButton, notify } from "./dom.js";

const LARGEST = 256 * 1024; // bytes; with more the message would not fit a model's context by far
const HIGHLIGHTED_AS = {
  py: "python",
  js: "javascript",
  ts: "typescript",
  md: "markdown",
  yml: "yaml",
  rs: "rust",
  sh: "bash",
};

export class Attachments {
  #files = []; // {name, text}

  constructor(list, changed) {
    this.list = list;
    this.changed = changed;
  }

  get isEmpty() {
    return this.#files.length === 0;
  }

  async add(files) {
    for (const file of files) {
      if (file.size > LARGEST) {
        notify("attach.big", { name: file.name, limit: `${LARGEST / 1024} KiB` }, "error");
        continue;
      }
      const text = textOf(await file.arrayBuffer());
      if (text === null) notify("attach.binary", { name: file.name }, "error");
      else this.#files.push({ name: file.name, text });
    }
    this.#render();
  }

  /** The message with its files; they are no longer attached then. */
  take(message) {
    const blocks = this.#files.map(({ name, text }) => fenced(name, text));
    this.#files = [];
    this.#render();
    return [message.trim(), ...blocks].filter(Boolean).join("\n\n");
  }

  #render() {
    const chips = this.#files.map((file) => {
      const leaveOut = () => {
        this.#files = this.#files.filter((other) => other !== file);
        this.#render();
      };
      return el(
        "li",
        { class: "chip" },
        el("span", {}, file.name),
        iconButton("close", "attach.remove", leaveOut, { name: file.name }),
      );
    });
    this.list.replaceChildren(...chips);
    this.list.hidden = chips.length === 0;
    this.changed();
  }
}

/** UTF-8 text without control characters, or null. */
function textOf(bytes) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    return /[\u0000-\u0008\u000e-\u001a\u001c-\u001f]/.test(text) ? null : text;
  } catch {
    return null;
  }
}

/** A fence is longer than any in the text that it holds. */
function fenced(name, text) {
  const longest = Math.max(2, ...(text.match(/`{3,}/g) ?? []).map((run) => run.length));
  const fence = "`".repeat(longest + 1);
  const ending = /\.(\w+)$/.exec(name)?.[1].toLowerCase() ?? "";
  return `${name}:\n${fence}${HIGHLIGHTED_AS[ending] ?? ending}\n${text.replace(/\n$/, "")}\n${fence}`;
}
