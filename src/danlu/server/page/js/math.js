/** Mathematics in Markdown: $..$, \(..\), $$..$$ and \[..\], as MathML, which browsers draw without fonts or styles. */
import "../vendor/katex.js";

const { katex } = globalThis;

// A formula is bounded, so that text full of opening delimiters costs no more than its length times this.
const LONGEST = 4000;
const DISPLAY = String.raw`\$\$([^]{1,${LONGEST}}?)\$\$|\\\[([^]{1,${LONGEST}}?)\\\]`;
// A dollar opens before a letter and closes after one, and not before a digit: "$5 and $6" are prices.
const INLINE = String.raw`\\\(([^]{1,${LONGEST}}?)\\\)|\$(?![\s$])((?:\\.|[^\\$\n]){1,${LONGEST}}?)(?<!\s)\$(?!\d)`;

const BLOCK_RULE = new RegExp(String.raw`^ {0,3}(?:${DISPLAY})[ \t]*(?:\n|$)`);
const INLINE_RULE = new RegExp(`^(?:${DISPLAY}|${INLINE})`);

function rule(level, start, pattern) {
  return {
    name: `${level}Math`,
    level,
    start: (source) => {
      const at = source.search(start);
      return at < 0 ? undefined : at;
    },
    tokenizer(source) {
      const match = pattern.exec(source);
      if (!match) return undefined;
      const [raw, dollars, brackets, round, dollar] = match;
      const display = dollars ?? brackets;
      return { type: `${level}Math`, raw, tex: (display ?? round ?? dollar).trim(), display: display !== undefined };
    },
    renderer: ({ tex, display }) => formula(tex, display),
  };
}

/** Extensions of marked. */
export const mathRules = [
  rule("block", /(?<=^|\n) {0,3}(?:\$\$|\\\[)/, BLOCK_RULE),
  rule("inline", /\$|\\\(|\\\[/, INLINE_RULE),
];

const escaped = (text) => text.replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt(0)};`);

function formula(tex, display) {
  let html;
  try {
    html = katex.renderToString(tex, {
      displayMode: display,
      output: "mathml",
      strict: "ignore",
      maxExpand: 200,
      maxSize: 20,
    });
  } catch {
    return `<code>${escaped(tex)}</code>`; // what is no formula is shown as it was written
  }
  // The TeX that KaTeX adds for tools would be text of the page once it is sanitised.
  html = html.replace(/<annotation[^]*?<\/annotation>/g, "").replace(/<\/?semantics>/g, "");
  return display ? `<span class="formula">${html}</span>` : html;
}
