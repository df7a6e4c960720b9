/**
 * Markdown of a model, on the page. Whatever a model writes is text: HTML in it is shown, not obeyed, and all that marked,
 * KaTeX and highlight.js make of it goes through DOMPurify (the only one that a browser with Trusted Types lets make HTML).
 */
import hljs from "../vendor/highlight.js";
import { Marked } from "../vendor/marked.js";
import "../vendor/purify.js";
import { copyText, el, iconButton } from "./dom.js";
import { mathRules } from "./math.js";

const { DOMPurify } = globalThis;

const ALLOWED = {
  ALLOWED_TAGS: (
    "p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li table thead tbody tr th td a span " +
    "math mi mn mo ms mtext mspace mrow mfrac msqrt mroot mstyle mpadded mphantom msub msup msubsup munder mover " +
    "munderover mmultiscripts mprescripts mtable mtr mtd menclose"
  ).split(" "),
  ALLOWED_ATTR: (
    "href title target rel class start align data-language display displaystyle scriptlevel mathvariant mathcolor " +
    "mathbackground mathsize stretchy fence separator symmetric largeop movablelimits lspace rspace accent accentunder " +
    "width height depth voffset minsize maxsize linethickness columnalign columnspacing rowspacing columnlines rowlines " +
    "notation xmlns"
  ).split(" "),
  // Of every attribute: a value that begins with no scheme, or with one of these.
  ALLOWED_URI_REGEXP: /^(?:(?:https?|mailto):|[^a-z]|[a-z+.-]+(?:[^a-z+.:-]|$))/i,
  RETURN_TRUSTED_TYPE: true,
};

const LONGEST_HIGHLIGHTED = 100_000;

const escaped = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

function highlighted(text, language) {
  if (!hljs.getLanguage(language) || text.length > LONGEST_HIGHLIGHTED) return escaped(text);
  return hljs.highlight(text, { language, ignoreIllegals: true }).value;
}

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escaped(text),
    code({ text, lang }) {
      const language = (lang ?? "").split(/\s/)[0];
      return `<pre data-language="${escaped(language)}"><code>${highlighted(text, language)}</code></pre>`;
    },
    link({ href, title, tokens }) {
      const hover = title ? ` title="${escaped(title)}"` : "";
      const text = this.parser.parseInline(tokens);
      return `<a href="${escaped(href)}"${hover} target="_blank" rel="noopener noreferrer nofollow">${text}</a>`;
    },
    // A picture would be fetched from wherever the model says, which tells that place what was asked.
    image: ({ href, text }) =>
      `<a href="${escaped(href)}" target="_blank" rel="noopener noreferrer nofollow">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => `<span class="task">${checked ? "☑" : "☐"}</span> `,
  },
});
marked.use({ extensions: mathRules });

/** Text as CommonMark takes it (2.1, 2.3): a character 0, which HTML would drop, is shown; it is stored so, too. */
const source = (text) => text.replace(/\r\n?/g, "\n").replaceAll("\0", "\ufffd");

/**
 * An element that shows growing Markdown. Only what follows the last finished block is read and drawn again, so a long
 * answer costs as little per token as a short one, and what stands above stays still: selections, scrolled code.
 */
export class MarkdownView {
  #element;
  #blocks = []; // {raw, html, element} in order
  #settled = { blocks: 0, length: 0 }; // what no later text changes

  constructor(element) {
    this.#element = element;
  }

  /** @param {boolean} whole the text is finished; everything is read again, for links defined further down. */
  update(text, whole) {
    const read = source(text);
    const from = whole || read.length < this.#settled.length ? { blocks: 0, length: 0 } : this.#settled;
    const tokens = marked.lexer(read.slice(from.length));
    const shown = tokens.filter((token) => token.type !== "space" && token.type !== "def");
    shown.forEach((token, index) => this.#draw(from.blocks + index, token, whole));
    for (const block of this.#blocks.splice(from.blocks + shown.length)) block.element.remove();
    this.#settled = settledBefore(tokens, from, read.length);
  }

  #draw(index, token, whole) {
    const block = this.#blocks[index];
    if (block?.raw === token.raw && !whole) return;
    const html = marked.parser([token]);
    if (block?.html === html) return;
    const element = block?.element ?? this.#element.appendChild(el("div", { class: "block" }));
    element.innerHTML = DOMPurify.sanitize(html, ALLOWED);
    furnish(element);
    this.#blocks[index] = { raw: token.raw, html, element };
  }
}

function settledBefore(tokens, from, length) {
  const read = tokens.reduce((sum, token) => sum + token.raw.length, from.length);
  const last = tokens.findLastIndex((token) => token.type !== "space");
  if (read !== length || last < 1) return from;
  const before = tokens.slice(0, last);
  return {
    blocks: from.blocks + before.filter((token) => token.type !== "space" && token.type !== "def").length,
    length: before.reduce((sum, token) => sum + token.raw.length, from.length),
  };
}

/** What a block of code gets: its language and a button to copy it; a wide table its own scrolling. */
function furnish(element) {
  for (const pre of element.querySelectorAll("pre")) codeBlock(pre, pre.dataset.language);
  for (const table of element.querySelectorAll("table")) {
    const frame = el("div", { class: "table", tabindex: 0 });
    table.replaceWith(frame);
    frame.append(table);
  }
}

function codeBlock(pre, language) {
  pre.tabIndex = 0; // it scrolls, so the keyboard has to reach it
  const copy = iconButton("copy", "copy.code", () => copyText(pre.textContent, copy));
  const frame = el(
    "div",
    { class: "code" },
    el("div", { class: "code-head" }, el("span", {}, language || "text"), copy),
  );
  pre.replaceWith(frame);
  frame.append(pre);
}

/** A question as it was typed, but with blocks of code set as such. */
export function questionParts(text) {
  return marked.lexer(source(text)).reduce((parts, token) => {
    if (token.type === "code" && token.codeBlockStyle !== "indented") {
      const pre = el("pre", {}, el("code", {}, token.text));
      const holder = el("div", {}, pre);
      codeBlock(pre, token.lang);
      return [...parts, holder.firstChild];
    }
    const last = parts.at(-1);
    if (last?.className === "plain") last.textContent += token.raw;
    else parts.push(el("div", { class: "plain" }, token.raw));
    return parts;
  }, []);
}
