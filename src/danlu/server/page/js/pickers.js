/** Which models answer: one choice for each column. */
import { el, iconButton } from "./dom.js";
import { label, say } from "./i18n.js";
import { remember } from "./preferences.js";

const MOST_COLUMNS = 4;

export class Pickers {
  #names = [];
  #marked = 0;

  constructor(element, chat) {
    Object.assign(this, { element, chat });
    chat.addEventListener("changed", () => this.render());
  }

  setNames(names) {
    this.#names = names;
  }

  /** The column that a narrow page shows; there its choice is the only one with room. */
  mark(column) {
    this.#marked = column;
    [...this.element.querySelectorAll(".picker")].forEach((picker, at) =>
      picker.classList.toggle("marked", at === column),
    );
  }

  render() {
    const { models } = this.chat.conversation;
    const running = this.chat.isRunning;
    const chosen = models.map((model, column) => this.#picker(model, column, models.length > 1, running));
    const add = iconButton("columns", "model.add", () => this.#add());
    add.disabled = running || models.length === 0 || models.length >= MOST_COLUMNS;
    if (!models.length) chosen.push(say(el("span", { class: "note" }), "model.none"));
    const focused = document.activeElement?.dataset.column;
    this.element.replaceChildren(...chosen, add);
    this.mark(Math.min(this.#marked, models.length - 1));
    if (focused !== undefined) this.element.querySelector(`select[data-column="${focused}"]`)?.focus();
  }

  #picker(model, column, several, running) {
    // A model of an old conversation may no longer be served; it is shown, and asking it says so.
    const names = this.#names.includes(model) ? this.#names : [model, ...this.#names];
    const options = names.map((name) => el("option", { value: name, selected: name === model }, name));
    const select = label(el("select", { "data-column": column, disabled: running }, ...options), "model.n", {
      n: column + 1,
    });
    select.addEventListener("change", () => this.#change((models) => models.with(column, select.value)));
    const picker = el("div", { class: "picker" }, select);
    if (several) {
      const remove = iconButton("close", "model.remove", () => this.#remove(column), { n: column + 1 });
      remove.disabled = running;
      picker.append(remove);
    }
    return picker;
  }

  #change(work) {
    const { conversation } = this.chat;
    conversation.models = work(conversation.models);
    this.#changed();
  }

  #add() {
    const { conversation } = this.chat;
    const other = this.#names.find((name) => !conversation.models.includes(name)) ?? conversation.models[0];
    conversation.addColumn(other);
    this.#changed();
  }

  #remove(column) {
    this.chat.conversation.removeColumn(column);
    this.#changed();
  }

  #changed() {
    const { conversation } = this.chat;
    remember("models", conversation.models);
    conversation.saveFields();
    this.chat.open(conversation);
  }
}
