/** The models of a conversation side by side, each with the branch that it shows; on a phone one beside the other to swipe. */
import { AnswerView } from "./answer.js";
import { el, iconButton } from "./dom.js";
import { label } from "./i18n.js";
import { QuestionView } from "./question.js";

const NEAR_END = 60; // pixels; who is nearer to the end than this follows the text

class Column {
  #views = new Map();
  #follows = true;
  #list = el("ol", { class: "thread" });
  #toEnd = iconButton("down", "help.message", () => this.follow());

  constructor(index, chat) {
    this.index = index;
    this.chat = chat;
    this.scroller = el("div", { class: "scroller", tabindex: -1 }, this.#list);
    this.#toEnd.className = "to-end";
    this.#toEnd.hidden = true;
    this.element = el("section", { class: "column", id: `column-${index}` }, this.scroller, this.#toEnd);
    this.scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new ResizeObserver(() => this.#keepUp()).observe(this.scroller);
  }

  render() {
    const path = this.chat.conversation.path(this.index);
    const kept = new Map(path.map((message) => [message.id, this.#views.get(message.id) ?? this.#view(message)]));
    this.#views = kept;
    const elements = [...kept.values()].map((view) => view.element);
    if (
      elements.some((element, at) => this.#list.children[at] !== element) ||
      this.#list.children.length > elements.length
    ) {
      this.#list.replaceChildren(...elements);
    }
    for (const view of kept.values()) view.update();
    label(this.element, "answer.of", { model: this.chat.conversation.models[this.index] });
    this.#keepUp();
  }

  #view(message) {
    if (message.role === "user") return new QuestionView(message, this.index, this.chat);
    return new AnswerView(message, this.index, this.chat, () => this.#keepUp());
  }

  view(message) {
    return this.#views.get(message.id);
  }

  get lastQuestion() {
    return [...this.#views.values()].findLast((view) => view instanceof QuestionView);
  }

  /** Goes to the end, and stays there while text comes. */
  follow() {
    this.#follows = true;
    this.#keepUp();
  }

  #keepUp() {
    if (this.#follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#showToEnd();
  }

  #scrolled() {
    this.#follows = this.#distance() < NEAR_END;
    this.#showToEnd();
  }

  #distance() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight;
  }

  #showToEnd() {
    this.#toEnd.hidden = this.#follows || this.#distance() < NEAR_END;
  }
}

export class Columns {
  #columns = [];
  #conversation = null;

  /** @param {(column: number) => void} shown told which column a narrow page shows. */
  constructor(element, tabs, chat, shown) {
    Object.assign(this, { element, tabs, chat, shown });
    chat.addEventListener("changed", () => this.render());
    chat.addEventListener("grown", ({ detail }) => {
      for (const column of this.#columns) column.view(detail)?.grown();
    });
    element.addEventListener("scroll", () => this.#markTab(), { passive: true });
  }

  render() {
    const { conversation } = this.chat;
    if (conversation !== this.#conversation || conversation.models.length !== this.#columns.length) {
      this.#conversation = conversation;
      this.#columns = conversation.models.map((_, index) => new Column(index, this.chat));
      this.element.replaceChildren(...this.#columns.map((column) => column.element));
    }
    this.element.classList.toggle("several", this.#columns.length > 1);
    this.#renderTabs();
    for (const column of this.#columns) column.render();
  }

  #renderTabs() {
    const { models } = this.chat.conversation;
    this.tabs.hidden = models.length < 2;
    const tabs = models.map((model, index) => {
      const show = () => this.#columns[index].element.scrollIntoView({ inline: "start", block: "nearest" });
      return el("button", { type: "button", class: "tab", onclick: show, "aria-controls": `column-${index}` }, model);
    });
    this.tabs.replaceChildren(...tabs);
    this.#markTab();
  }

  #markTab() {
    const width = this.element.clientWidth || 1;
    const at = Math.round(this.element.scrollLeft / width);
    [...this.tabs.children].forEach((tab, index) => tab.setAttribute("aria-current", index === at ? "true" : "false"));
    this.shown(at);
  }

  /** Each column goes to its end: a question was asked. */
  follow() {
    for (const column of this.#columns) column.follow();
  }

  view(message) {
    return this.#columns.map((column) => column.view(message)).find(Boolean);
  }

  editLastQuestion() {
    this.#columns[0]?.lastQuestion?.edit();
  }
}
