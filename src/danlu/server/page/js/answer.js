/** An answer on the page: thoughts, text, tool calls, errors, and what it took. */
import { BROKEN_OFF } from "./completion.js";
import { copyText, el, icon, iconButton, textButton } from "./dom.js";
import { label, say, t } from "./i18n.js";
import { MarkdownView } from "./markdown.js";
import { Paced } from "./pace.js";
import { remembered } from "./preferences.js";
import { TokensView } from "./tokens.js";
import { VersionSwitch } from "./versions.js";

const ERROR_TITLES = new Set([400, 403, 404, 413, 429, 503, 504]);

export class AnswerView {
  #thoughtText = el("div", { class: "markdown" });
  #thought = el("details", { class: "thought", hidden: true }, el("summary"), this.#thoughtText);
  #body = el("div", { class: "markdown", dir: "auto" });
  #calls = el("div", { class: "calls" });
  #status = el("div", { class: "status" });
  #numbers = el("p", { class: "numbers" });
  #markdown = new MarkdownView(this.#body);
  #thoughtMarkdown = new MarkdownView(this.#thoughtText);
  #tokens = new TokensView();
  #paced = new Paced(() => this.#draw());
  #drawn = {};

  /** @param {() => void} onDraw called after each drawing, so that the column can follow the text. */
  constructor(message, column, chat, onDraw) {
    Object.assign(this, { message, column, chat, onDraw });
    this.versions = new VersionSwitch(message, column, chat);
    this.actions = el("div", { class: "actions" });
    const byline = el(
      "h3",
      { class: "byline" },
      el("span", { class: "seal", "aria-hidden": "true" }),
      message.model ?? "",
    );
    this.foot = el("footer", { class: "foot" }, this.versions.element, this.actions, this.#numbers);
    this.element = el(
      "li",
      { class: "message answer" },
      byline,
      this.#thought,
      this.#body,
      this.#tokens.element,
      this.#calls,
      this.#status,
      this.foot,
    );
  }

  /** More of it has come. */
  grown() {
    this.#paced.ask();
  }

  /** Its state has changed. */
  update() {
    this.versions.update();
    this.#paced.now();
  }

  #draw() {
    const { message } = this;
    const state = this.chat.states.get(message.id);
    const running = Boolean(state?.controller) && state.phase !== "failed";
    this.element.classList.toggle("running", running);
    this.element.setAttribute("aria-busy", running);
    this.#drawThought(running);
    const heat = remembered("heat", false) && message.content !== "";
    this.#body.hidden = heat && Boolean(message.logprobs);
    this.#tokens.element.hidden = !heat;
    if (heat) this.#tokens.update(message.logprobs);
    if (this.#drawn.content !== message.content || this.#drawn.running !== running) {
      this.#markdown.update(message.content, !running);
    }
    this.#drawCalls();
    this.#drawStatus(state, running);
    if (this.#drawn.running !== running || this.#drawn.state !== state) this.#drawActions(state, running);
    this.#drawNumbers(running);
    this.#drawn = { content: message.content, reasoning: message.reasoning, running, state };
    this.onDraw();
  }

  #drawThought(running) {
    const { reasoning, reasoning_seconds: seconds, content } = this.message;
    this.#thought.hidden = !reasoning;
    if (!reasoning) return;
    const thinking = running && !content;
    const summary = this.#thought.querySelector("summary");
    const parts = [say(el("span", { class: "thought-title" }), thinking ? "thinking" : "thought")];
    parts.push(say(el("span"), "thought.length", { words: countWords(reasoning) }));
    if (seconds) parts.push(say(el("span"), "thought.time", { seconds: seconds.toFixed(1) }));
    summary.replaceChildren(icon("down"), ...parts);
    if (this.#drawn.reasoning !== reasoning || this.#drawn.running !== running) {
      this.#thoughtMarkdown.update(reasoning, !thinking);
    }
  }

  #drawCalls() {
    const cards = (this.message.tool_calls ?? []).map((call) => {
      const code = el("pre", { tabindex: 0 }, el("code", {}, call.arguments));
      const title = say(el("span"), "tool.call", { name: call.name });
      return el(
        "section",
        { class: "call" },
        el("div", { class: "call-head" }, icon("tool"), title),
        label(code, "tool.arguments"),
      );
    });
    if (cards.length || this.#calls.childElementCount) this.#calls.replaceChildren(...cards);
  }

  #drawStatus(state, running) {
    const { model, content, reasoning, finish_reason: reason, tool_calls: calls } = this.message;
    const note = (key, kind = "") => say(el("p", { class: `note ${kind}` }), key, { model });
    let shown = [];
    if (state?.phase === "failed") shown = [this.#errorCard(state)];
    else if (running && !content && !reasoning && !calls) {
      const ember = el("span", { class: "ember", "aria-hidden": "true" });
      shown = [el("p", { class: "waiting" }, ember, say(el("span"), "answer.waiting", { model }))];
    } else if (running) shown = [];
    else if (reason === "length") shown = [note("answer.cut")];
    else if (state?.phase === "stopped") shown = [note("answer.stopped")];
    else if (!reason) shown = [note("answer.unfinished")];
    if (shown.length || this.#status.childElementCount) this.#status.replaceChildren(...shown);
  }

  #errorCard({ error, retryIn }) {
    const title = el("h4");
    if (error.code === BROKEN_OFF) say(title, "error.aborted");
    else if (error.status === 0) say(title, "error.network");
    else if (error.status === 401) say(title, "error.403");
    else
      say(
        title,
        ERROR_TITLES.has(error.status) ? `error.${error.status}` : error.status < 500 ? "error.400" : "error.500",
      );
    const text = el("p", {}, error.message);
    if (error.status === 0) say(text, "error.network.text");
    if (error.status === 401) say(text, "error.session");
    const card = el("div", { class: "error-card", role: "alert" }, icon("warning"), el("div", {}, title, text));
    const buttons = el(
      "div",
      { class: "row" },
      textButton("retry", () => this.chat.retry(this.message), { picture: "again" }),
    );
    if (retryIn) buttons.append(say(el("span", { class: "note", role: "timer" }), "retry.in", { seconds: retryIn }));
    card.lastChild.append(buttons);
    return card;
  }

  #drawActions(state, running) {
    const { message } = this;
    this.foot.hidden = running;
    const copy = iconButton("copy", "copy", () => copyText(message.content, copy));
    const again = iconButton("again", "regenerate", () => this.chat.answerAgain(message, this.column));
    this.actions.replaceChildren(copy, again);
    const partial =
      message.content && !message.tool_calls && (message.finish_reason === "length" || !message.finish_reason);
    if (!partial || state?.phase === "failed") return;
    const more = textButton("continue", () => this.chat.resume(message), { picture: "forward", kind: "quiet small" });
    this.actions.append(label(more, "continue.label"));
  }

  #drawNumbers(running) {
    const stats = this.message.stats;
    this.#numbers.hidden = running || !stats;
    if (!stats) return;
    const numbers = [
      stats.tokens_per_second && ["stats.rate", { rate: digits(stats.tokens_per_second) }],
      stats.first_token_seconds !== null && ["stats.first", { seconds: digits(stats.first_token_seconds) }],
      stats.completion_tokens && ["stats.tokens", { count: stats.completion_tokens }],
    ];
    this.#numbers.replaceChildren(...numbers.filter(Boolean).map(([key, values]) => say(el("span"), key, values)));
  }

  /** What a screen reader is told once the answer is whole. */
  get spoken() {
    return t("answer.done", { model: this.message.model, text: this.#body.innerText });
  }
}

/** Words of spaced text, and each letter of text without spaces (Chinese, Japanese). */
function countWords(text) {
  return (text.match(/[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+/g) ?? []).length;
}

const digits = (number) => (number >= 100 ? number.toFixed(0) : number >= 10 ? number.toFixed(1) : number.toFixed(2));
