/** A question on the page: its text, and how it is edited. */
import { copyText, el, icon, iconButton, textButton } from "./dom.js";
import { label, say } from "./i18n.js";
import { questionParts } from "./markdown.js";
import { grow, isComposing } from "./text_box.js";
import { VersionSwitch } from "./versions.js";

export class QuestionView {
  #body = el("div", { class: "question-body" });
  #foot = el("footer", { class: "foot" });
  #versions;

  constructor(message, column, chat) {
    this.message = message;
    this.chat = chat;
    this.#versions = new VersionSwitch(message, column, chat);
    const copy = iconButton("copy", "copy", () => copyText(message.content, copy));
    this.#foot.append(
      this.#versions.element,
      el(
        "div",
        { class: "actions" },
        iconButton("edit", "edit", () => this.edit()),
        copy,
      ),
    );
    this.element = el(
      "li",
      { class: "message question" },
      say(el("h3", { class: "spoken" }), "you"),
      this.#body,
      this.#foot,
    );
    this.#body.append(...questionParts(message.content));
  }

  update() {
    this.#versions.update();
  }

  edit() {
    if (this.element.querySelector("form")) return;
    const box = label(el("textarea", { rows: 1, dir: "auto" }), "edit.label");
    box.value = this.message.content;
    const close = () => {
      form.replaceWith(this.#body);
      this.#foot.hidden = false;
    };
    const send = () => {
      if (!box.value.trim()) return;
      close();
      this.chat.edit(this.message, box.value);
    };
    const form = el(
      "form",
      { class: "edit-form", onsubmit: (event) => (event.preventDefault(), send()) },
      box,
      el(
        "div",
        { class: "row end" },
        textButton("cancel", close, { kind: "quiet" }),
        el("button", { class: "button primary" }, icon("send"), say(el("span"), "edit.send")),
      ),
    );
    box.addEventListener("input", () => grow(box));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
        this.#foot.querySelector("button").focus();
      } else if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) {
        event.preventDefault();
        send();
      }
    });
    this.#body.replaceWith(form);
    this.#foot.hidden = true;
    grow(box);
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }
}
