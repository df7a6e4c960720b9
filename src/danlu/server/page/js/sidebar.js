/** The list of conversations: search, rename, delete, export, import. */
import { conversations } from "./api.js";
import { askTitle, confirmDelete, openMenu } from "./dialogs.js";
import { el, iconButton, notify, textButton } from "./dom.js";
import { say, t } from "./i18n.js";

const PAGE_SIZE = 40;
const TYPING_PAUSE = 200; // milliseconds

export class Sidebar {
  #rows = [];
  #next = null; // where the list goes on
  #asked = 0;
  #current = null;

  /** @param {{goTo: (id: string | null) => void, renamed: (id: string, title: string) => void,
   *   deleted: (id: string) => void}} page */
  constructor(element, page) {
    this.page = page;
    this.element = element;
    this.list = element.querySelector(".conversations");
    this.search = element.querySelector("[type=search]");
    const file = element.querySelector("[type=file]");
    let pause;
    this.search.addEventListener("input", () => {
      clearTimeout(pause);
      pause = setTimeout(() => this.refresh(), TYPING_PAUSE);
    });
    element.querySelector(".import").addEventListener("click", () => file.click());
    element.querySelector(".export").addEventListener("click", () => download(conversations.exportAllPlace()));
    file.addEventListener("change", async () => {
      await this.#import([...file.files]);
      file.value = "";
    });
  }

  /** Reads the list anew. */
  async refresh() {
    await this.#load([], null);
  }

  /** Whether the list shows this conversation. */
  knows(id) {
    return this.#rows.some((row) => row.id === id);
  }

  setCurrent(id) {
    this.#current = id;
    for (const link of this.list.querySelectorAll("a")) markCurrent(link, id);
  }

  async #load(before, place) {
    const asked = ++this.#asked;
    let found;
    try {
      found = await conversations.list({
        q: this.search.value.trim(),
        limit: PAGE_SIZE,
        before: place,
      });
    } catch (error) {
      return notify("error.other", { message: error.message }, "error");
    }
    if (asked !== this.#asked) return; // something else was searched for meanwhile
    this.#rows = [...before, ...found.data];
    this.#next = found.next;
    this.#render();
  }

  #render() {
    const groups = Map.groupBy(this.#rows, (row) => (this.search.value.trim() ? "list" : ageOf(row.updated_at)));
    const parts = [...groups].map(([age, rows]) => {
      const heading = say(el("h3", { class: age === "list" ? "spoken" : "" }), age === "list" ? "list" : `list.${age}`);
      return el("section", {}, heading, el("ul", {}, ...rows.map((row) => this.#row(row))));
    });
    if (!parts.length)
      parts.push(say(el("p", { class: "note" }), this.search.value.trim() ? "search.none" : "list.empty"));
    if (this.#next)
      parts.push(textButton("list.more", () => this.#load(this.#rows, this.#next), { kind: "quiet small" }));
    this.list.replaceChildren(...parts);
  }

  #row(row) {
    const title = row.title || t("untitled");
    const link = el(
      "a",
      { href: `#/c/${encodeURIComponent(row.id)}`, "data-id": row.id },
      el("span", { class: "title", dir: "auto" }, title),
    );
    if (row.snippet)
      link.append(el("span", { class: "snippet", dir: "auto" }, ...marked(row.snippet, this.search.value.trim())));
    markCurrent(link, this.#current);
    const button = iconButton("more", "menu", () => this.#menu(button, row, title), { title });
    button.setAttribute("aria-haspopup", "menu");
    return el("li", {}, link, button);
  }

  #menu(button, row, title) {
    openMenu(button, [
      { key: "menu.rename", picture: "edit", act: () => this.#rename(row) },
      { key: "menu.markdown", picture: "download", act: () => download(conversations.exportPlace(row.id, "markdown")) },
      { key: "menu.json", picture: "download", act: () => download(conversations.exportPlace(row.id, "json")) },
      { key: "menu.delete", picture: "trash", kind: "danger-text", act: () => this.#delete(row, title) },
    ]);
  }

  async #rename(row) {
    const title = await askTitle(row.title);
    if (title === null) return;
    await told(async () => {
      await conversations.change(row.id, { title });
      this.page.renamed(row.id, title);
    });
    await this.refresh();
  }

  async #delete(row, title) {
    if (!(await confirmDelete(title))) return;
    await told(async () => {
      await conversations.remove(row.id);
      this.page.deleted(row.id);
    });
    await this.refresh();
  }

  async #import(files) {
    await told(async () => {
      let last = null;
      let count = 0;
      for (const file of files) {
        const text = await file.text();
        const isMarkdown = /\.(md|markdown|txt)$/i.test(file.name);
        const body = isMarkdown ? { format: "markdown", text } : parsed(file.name, text);
        const answer = await conversations.importAll(body);
        count += answer.data.length;
        last = answer.data.at(-1)?.id ?? last;
      }
      notify("import.done", { count });
      if (last) this.page.goTo(last);
    });
    await this.refresh();
  }
}

function parsed(name, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name}: ${t("invalid.json", { message: error.message })}`, { cause: error });
  }
}

async function told(work) {
  try {
    await work();
  } catch (error) {
    notify("error.other", { message: error.message }, "error");
  }
}

function download(place) {
  el("a", { href: place, download: true }).click();
}

function markCurrent(link, id) {
  if (link.dataset.id === id) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
}

function ageOf(time) {
  const then = new Date(time * 1000);
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (then >= midnight) return "today";
  return then >= midnight - 6 * 86_400_000 ? "week" : "earlier";
}

/** The snippet with each word that was searched for marked. */
function marked(snippet, query) {
  const words = query.split(/\s+/).map((word) => word.replace(/[^\p{L}\p{N}\s]/gu, String.raw`\$&`));
  // Split by a pattern in brackets, every second piece is a hit.
  return snippet
    .split(new RegExp(`(${words.join("|")})`, "i"))
    .map((piece, at) => (at % 2 ? el("mark", {}, piece) : piece));
}
