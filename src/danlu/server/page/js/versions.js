/** "< 2/3 >": which version of a message is shown, and the way to the others. */
import { el, iconButton } from "./dom.js";
import { label } from "./i18n.js";

export class VersionSwitch {
  #position = el("span", { class: "position" });
  #previous = iconButton("left", "branch.previous", () => this.#step(-1));
  #next = iconButton("right", "branch.next", () => this.#step(1));

  constructor(message, column, chat) {
    Object.assign(this, { message, column, chat });
    this.element = el("div", { class: "versions", role: "group" }, this.#previous, this.#position, this.#next);
  }

  update() {
    const versions = this.#versions();
    const at = versions.indexOf(this.message);
    this.element.hidden = versions.length < 2;
    this.#position.textContent = `${at + 1}/${versions.length}`;
    label(this.element, "branch.position", { n: at + 1, count: versions.length });
    this.#previous.disabled = at <= 0;
    this.#next.disabled = at === versions.length - 1;
  }

  #versions() {
    const { tree, models } = this.chat.conversation;
    return tree.versions(this.message, models.length > 1 ? (this.message.model ?? null) : null);
  }

  #step(by) {
    const versions = this.#versions();
    const version = versions[versions.indexOf(this.message) + by];
    if (version) this.chat.show(version, this.column);
  }
}
