/** How sure was it: an answer's tokens, coloured by their probability, with what else might have stood there. */
import { el } from "./dom.js";
import { label, say, t } from "./i18n.js";

/** Log-probabilities of a stream -> [text, logprob, [[text, logprob], ...]]; the parts of one character are joined. */
export class TokenReader {
  #tokens;
  #bytes = [];
  #logprob = 0;

  constructor(tokens) {
    this.#tokens = tokens;
  }

  read(entries) {
    for (const { token, bytes, logprob, top_logprobs: top = [] } of entries) {
      this.#bytes.push(...(bytes ?? new TextEncoder().encode(token)));
      this.#logprob += logprob;
      const text = decoded(this.#bytes);
      if (text === null) continue;
      const others = top.filter((other) => other.token !== token).map((other) => [other.token, other.logprob]);
      this.#tokens.push([text, this.#logprob, others]);
      this.#bytes = [];
      this.#logprob = 0;
    }
    return this.#tokens;
  }
}

function decoded(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes));
  } catch {
    return bytes.length < 4 ? null : new TextDecoder().decode(new Uint8Array(bytes));
  }
}

const HEATS = [0, 1, 2, 3, 4, 5];

/** 0 (sure) to 5 (a guess among many). */
export function heatOf(logprob) {
  const probability = Math.exp(logprob);
  return [0.9, 0.7, 0.5, 0.3, 0.1].filter((bound) => probability < bound).length;
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value < 0.1) return "< 0.1 %";
  return `${value.toFixed(value < 9.95 ? 1 : 0)} %`;
}

/** The answer as a text of tokens, and a legend below it. Hovering, tapping or the arrow keys tell about one token. */
export class TokensView {
  #text = label(el("div", { class: "tokens", tabindex: 0, role: "group" }), "heat.tokens");
  #legend = el("p", { class: "heat-legend" });
  #tip = el("div", { class: "token-tip", role: "status", hidden: true });
  #shown = 0;
  #current = null;
  #tokens = [];

  constructor() {
    this.element = el("div", {}, this.#text, this.#legend, this.#tip);
    this.#text.addEventListener("pointerover", (event) => this.#tell(event.target.closest(".token")));
    this.#text.addEventListener("click", (event) => this.#tell(event.target.closest(".token")));
    this.#text.addEventListener("pointerleave", () => this.#tell(null));
    this.#text.addEventListener("blur", () => this.#tell(null));
    this.#text.addEventListener("keydown", (event) => this.#move(event));
  }

  update(tokens) {
    if (!tokens?.length) {
      this.#text.replaceChildren(say(el("p", { class: "note" }), "heat.none"));
      this.#shown = 0;
      return;
    }
    if (this.#shown === 0 || tokens !== this.#tokens) this.#text.replaceChildren();
    if (tokens !== this.#tokens) this.#shown = 0;
    this.#tokens = tokens;
    const fresh = tokens.slice(this.#shown).map(([text, logprob], index) => {
      return el("span", { class: `token heat-${heatOf(logprob)}`, "data-token": this.#shown + index }, text);
    });
    this.#text.append(...fresh);
    this.#shown = tokens.length;
    const mean = tokens.reduce((sum, [, logprob]) => sum + logprob, 0) / tokens.length;
    this.#legend.replaceChildren(
      say(el("span"), "heat.legend"),
      say(el("span", { class: "heat-word" }), "heat.sure"),
      el(
        "span",
        { class: "swatches", "aria-hidden": "true" },
        ...HEATS.map((heat) => el("span", { class: `swatch heat-${heat}` })),
      ),
      say(el("span", { class: "heat-word" }), "heat.unsure"),
      say(el("span"), "heat.mean", { percent: percent(mean) }),
    );
  }

  #move(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape" && this.#current) {
      event.stopPropagation();
      this.#tell(null);
    }
    if (!step || !this.#shown) return;
    event.preventDefault();
    const at = this.#current ? Number(this.#current.dataset.token) + step : 0;
    this.#tell(this.#text.querySelector(`[data-token="${Math.min(Math.max(at, 0), this.#shown - 1)}"]`));
  }

  #tell(token) {
    this.#current?.classList.remove("current");
    this.#current = token;
    this.#tip.hidden = !token;
    if (!token) return;
    token.classList.add("current");
    const [text, logprob, others = []] = this.#tokens[Number(token.dataset.token)];
    const row = ([word, value], kind) =>
      el("div", { class: `tip-row ${kind}` }, el("code", {}, visible(word)), el("span", {}, percent(value)));
    this.#tip.replaceChildren(row([text, logprob], "chosen"));
    if (others.length) {
      this.#tip.append(el("div", { class: "tip-head" }, t("heat.instead")), ...others.map((other) => row(other, "")));
    }
    this.#place(token);
  }

  #place(token) {
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const { width, height } = this.#tip.getBoundingClientRect();
    const below = box.bottom + 6 + height < document.documentElement.clientHeight;
    this.#tip.style.left = `${Math.max(8, Math.min(box.left, room - width - 8))}px`;
    this.#tip.style.top = `${below ? box.bottom + 6 : box.top - height - 6}px`;
  }
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
